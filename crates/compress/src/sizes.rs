//! Sizes of attentions and FFNs as levels of a search.

use std::sync::Arc;

use lacuna_contract::{AtSize, Edit, Level, MethodError, Searching, Slot, Unit};
use lacuna_format::Float;
use lacuna_model::Block;
use lacuna_spec::{LayerSpec, Part, Place, Role};

use crate::account::CompressError;
use crate::activations::Activations;
use crate::calibrate::Gather;
use crate::drive::{SOURCE, Walk, at_step};
use crate::model_wide::Layer;
use crate::overlay::{Overlay, finite, need};
use crate::recipe::RecipeStep;
use crate::scratch::Scratch;
use crate::search::{Entry, Meaning, attention, told};

/// Rows and columns of tensors that stay.
type Rows = Arc<Vec<(Place, Option<Vec<usize>>, Option<Vec<usize>>)>>;

/// A part of a layer at one size; new matrices lie in the scratch file.
#[derive(Clone)]
pub(crate) struct Sized {
    part: Unit,
    layer: LayerSpec,
    pub(crate) rows: Rows,
}

impl Sized {
    /// Gives a layer the part at this size.
    pub(crate) fn describe(&self, layer: &mut LayerSpec) {
        match self.part {
            Unit::Attention => layer.attn = self.layer.attn.clone(),
            _ => layer.ffn = self.layer.ffn.clone(),
        }
    }
}

impl Walk<'_> {
    /// The attention and the FFN of a layer at all sizes.
    pub(crate) fn sizes_of(
        &mut self,
        (by, search): (&RecipeStep, &dyn Searching),
        overlay: &Overlay<'_>,
        layer: usize,
        x: &mut Activations,
        scratch: &mut Scratch,
    ) -> Result<Vec<(Slot, Vec<Level>, Entry)>, CompressError> {
        let places = overlay.spec.layer_places(layer);
        for p in &places {
            finite(p, &*need(overlay, p)?, SOURCE)?;
        }
        let mut gather = Gather::new(&overlay.spec, search.sizes_need(&overlay.spec, layer));
        if gather.is_needed() {
            let block = Block::load(overlay, layer)?;
            self.through(&overlay.spec, &block, x, &mut gather, false)?;
        }
        let statistics = gather.finish();
        let work = Layer { weights: overlay, statistics: &statistics, vocabulary: None };
        let mut out = Vec::new();
        for (part, name, role, group) in [(Unit::Attention, "attn", Role::O, 0), (Unit::Ffn, "ffn", Role::Down, 1)] {
            let (mut levels, mut sizes, mut kept) = (Vec::new(), Vec::<Sized>::new(), Vec::new());
            let mut each = |at: AtSize| -> Result<(), MethodError> {
                let (mut rows, mut tensors) = (Vec::new(), Vec::new());
                for edit in at.edits {
                    match edit {
                        Edit::Matrix(place, m) => {
                            // As they will be written; many of them are kept.
                            let stored = m.pack(Float::F16).map_err(told)?;
                            finite(&place, &stored, "the new value").map_err(told)?;
                            tensors.push((place, scratch.put(&stored).map_err(told)?));
                        }
                        Edit::Keep { place, rows: r, cols } => rows.push((place, r, cols)),
                        other => return Err(MethodError::new(format!("{other:?} is no edit of a size"))),
                    }
                }
                let one = Sized { part, layer: at.layer, rows: rows.into() };
                for share in at.shares {
                    levels.push(Level { value: share, bytes: at.bytes, error: at.error, lost: at.lost });
                    sizes.push(one.clone());
                    kept.push(tensors.clone());
                }
                Ok(())
            };
            let there = search.sizes(layer, part, &work, &mut each);
            there.map_err(|e| at_step(by, Place::layer(layer, role), e))?;
            if levels.is_empty() {
                continue;
            }
            let mine =
                places.iter().filter(|p| p.part == Part::Weight && attention(p.role) == (part == Unit::Attention));
            let parameters = mine.filter_map(|p| overlay.spec.shape(p)).map(|(r, c)| (r * c) as u64).sum();
            let slot = Slot { name: format!("layers.{layer}.{name}"), parameters, group };
            out.push((slot, levels, Entry { layer, meaning: Meaning::Sizes(sizes), kept }));
        }
        Ok(out)
    }

    /// Puts what was chosen for a part in the place of what was there.
    pub(crate) fn take_size(
        &self,
        overlay: &mut Overlay<'_>,
        size: &Sized,
        tensors: &[(Place, usize)],
        scratch: &mut Scratch,
    ) -> Result<(), CompressError> {
        let dir = self.scratch_dir();
        for (place, rows, cols) in size.rows.iter() {
            overlay.keep(*place, rows.clone(), cols.clone(), &dir)?;
        }
        for (place, number) in tensors {
            let stored = scratch.get(*number).map_err(self.scratch_error())?;
            overlay.replace(*place, &stored, &dir)?;
        }
        Ok(())
    }
}

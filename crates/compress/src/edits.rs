//! Edits of model-wide steps: the whole list is held against the network before one is applied.

use std::collections::HashMap;
use std::path::Path;

use lacuna_base::Mat;
use lacuna_contract::Edit;
use lacuna_format::{Float, PatternKind, Stored, Weights, pack_float};
use lacuna_spec::{Place, Spec};

use crate::account::CompressError;
use crate::overlay::{Overlay, finite, packing};

/// Changes that wait for the end of a walk, their tensors in the overlay's scratch file.
#[derive(Default)]
pub(crate) struct Pending {
    spec: Option<Box<Spec>>,
    /// Tokens that stay.
    kept: Option<Vec<usize>>,
    tensors: Vec<(Place, Tensor)>,
}

enum Tensor {
    /// Its number in the scratch file and its shape.
    New(usize, (usize, usize)),
    Keep(Option<Vec<usize>>, Option<Vec<usize>>),
}

/// Whether indices rise within `n`.
fn rising(list: &[usize], n: usize) -> bool {
    list.windows(2).all(|w| w[0] < w[1]) && list.last().is_none_or(|l| *l < n)
}

impl Pending {
    /// Takes edits in; matrices are packed and set aside at once.
    pub(crate) fn take(
        &mut self,
        edits: Vec<Edit>,
        overlay: &mut Overlay<'_>,
        dir: &Path,
    ) -> Result<(), CompressError> {
        let mut aside = |place: &Place, stored: Stored| {
            // What the network becomes later must be sound now.
            finite(place, &stored, "the new value")?;
            Ok::<_, CompressError>(Tensor::New(overlay.set_aside(&stored, dir)?, (stored.rows, stored.cols)))
        };
        for edit in edits {
            match edit {
                Edit::Matrix(place, m) => {
                    let stored = m.pack(Float::F32).map_err(|e| packing(&place, e))?;
                    self.tensors.push((place, aside(&place, stored)?));
                }
                Edit::Vector(place, values) => {
                    let m = Mat::from_vec(1, values.len(), values);
                    let piece = pack_float(m.view(), None, PatternKind::Dense, Float::F32);
                    let piece = piece.map_err(|e| packing(&place, e))?;
                    self.tensors.push((place, aside(&place, Stored::from_piece(piece))?));
                }
                Edit::Keep { place, rows, cols } => self.tensors.push((place, Tensor::Keep(rows, cols))),
                Edit::Spec(spec) => self.spec = Some(spec),
                Edit::Vocabulary(kept) => self.kept = Some(kept),
            }
        }
        Ok(())
    }

    /// Refuses a list that does not lead to a network: every tensor must come out in the shape that the new description
    /// gives it.
    pub(crate) fn check(&self, overlay: &Overlay<'_>) -> Result<(), String> {
        let (old, new) = (&overlay.spec, self.spec.as_deref().unwrap_or(&overlay.spec));
        new.check().map_err(|e| e.what)?;
        match &self.kept {
            Some(kept) if !rising(kept, old.vocab) || kept.len() != new.vocab => {
                let (n, rows) = (kept.len(), new.vocab);
                return Err(format!(
                    "{n} tokens stay, not rising within {}, and the new network has {rows}",
                    old.vocab
                ));
            }
            None if old.vocab != new.vocab => {
                return Err(format!("{} tokens become {}, and nobody says which", old.vocab, new.vocab));
            }
            _ => {}
        }
        let mut shapes: HashMap<Place, (usize, usize)> = HashMap::new();
        for (place, tensor) in &self.tensors {
            let shape = match tensor {
                Tensor::New(_, shape) => *shape,
                Tensor::Keep(rows, cols) => {
                    let before = shapes.get(place).copied().or_else(|| old.shape(place));
                    let Some((m, n)) = before else {
                        return Err(format!("{place} is not there, and rows of it were to stay"));
                    };
                    let fits = |l: &Option<Vec<usize>>, n| l.as_deref().is_none_or(|l| rising(l, n));
                    if !fits(rows, m) || !fits(cols, n) {
                        return Err(format!("{place}: the rows or columns that stay do not rise within {m} x {n}"));
                    }
                    (rows.as_ref().map_or(m, Vec::len), cols.as_ref().map_or(n, Vec::len))
                }
            };
            shapes.insert(*place, shape);
        }
        for place in new.places() {
            let (Some(want), have) = (new.shape(&place), shapes.get(&place).copied().or_else(|| old.shape(&place)))
            else {
                continue;
            };
            match have {
                None => return Err(format!("the new network has {place}, and nothing was given for it")),
                Some(have) if have != want => {
                    return Err(format!(
                        "{place} is {} x {}, and the new network wants {} x {}",
                        have.0, have.1, want.0, want.1
                    ));
                }
                _ => {}
            }
        }
        match shapes.keys().find(|p| new.shape(p).is_none()) {
            Some(extra) => Err(format!("{extra} was given, and the new network has no such tensor")),
            None => Ok(()),
        }
    }

    /// Applies a checked list; the tokens that stay, where it says which.
    pub(crate) fn apply(self, overlay: &mut Overlay<'_>, dir: &Path) -> Result<Option<Vec<usize>>, CompressError> {
        for (place, tensor) in self.tensors {
            match tensor {
                Tensor::New(number, _) => overlay.put_in_place(place, number),
                Tensor::Keep(rows, cols) => overlay.keep(place, rows, cols, dir)?,
            }
        }
        if let Some(spec) = self.spec {
            overlay.spec = *spec;
        }
        debug_assert!(overlay.spec().check().is_ok());
        Ok(self.kept)
    }
}

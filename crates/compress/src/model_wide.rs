//! Model-wide steps: each one full pass over the layers, then its edits.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use lacuna_base::{Mat, dense};
use lacuna_contract::{
    Ask, Finished, LayerWork, MethodError, ModelWide, Reader, Site, Stats, Step, Vocabulary, Walker,
};
use lacuna_format::Weights;
use lacuna_model::{Block, NoTap};
use lacuna_spec::{LayerSpec, Place, Role, Spec};

use crate::account::CompressError;
use crate::activations::Activations;
use crate::calibrate::{Gather, Statistics};
use crate::drive::{SOURCE, Walk, at_step};
use crate::edits::Pending;
use crate::overlay::{Overlay, Stitched, finite, need, release_layer};
use crate::recipe::RecipeStep;

/// One layer as a walker sees it.
pub(crate) struct Layer<'a> {
    pub(crate) weights: &'a Overlay<'a>,
    pub(crate) statistics: &'a Statistics,
    pub(crate) vocabulary: Option<&'a Vocabulary>,
}

impl LayerWork for Layer<'_> {
    fn spec(&self) -> &Spec {
        &self.weights.spec
    }

    fn weight(&self, place: &Place) -> Result<Mat, MethodError> {
        let stored = need(self.weights, place).map_err(|e| MethodError::new(e.to_string()))?;
        let values = stored.to_mat();
        self.weights.release(place);
        Ok(values)
    }

    fn stats(&self, site: Site) -> Stats<'_> {
        self.statistics.of(&self.weights.spec, site)
    }

    fn vocabulary(&self) -> Option<&Vocabulary> {
        self.vocabulary
    }
}

/// Ends a walk and takes its last edits in.
fn finish(
    step: &RecipeStep,
    walker: Box<dyn Walker>,
    vocabulary: Option<&Vocabulary>,
    pending: &mut Pending,
    overlay: &mut Overlay<'_>,
    dir: &Path,
) -> Result<Finished, CompressError> {
    let work = Layer { weights: overlay, statistics: &Statistics::default(), vocabulary };
    let mut finished = walker.finish(&work).map_err(|e| at_step(step, "the model", e))?;
    pending.take(std::mem::take(&mut finished.edits), overlay, dir)?;
    Ok(finished)
}

/// A network of which layer `layer` has one part alone.
fn alone(spec: &Spec, layer: usize, reader: Reader) -> Spec {
    let mut spec = spec.clone();
    let whole = std::mem::take(&mut spec.layers[layer]);
    spec.layers[layer] = match reader {
        Reader::Attention(_) => LayerSpec { ffn: None, ffn_shortcut: false, ..whole },
        _ => LayerSpec { attn: None, attn_shortcut: false, ..whole },
    };
    spec
}

/// A step that turns the residual stream, on its walk.
struct Turning<'a> {
    step: &'a RecipeStep,
    model: &'a dyn ModelWide,
    dir: &'a Path,
    x: Activations,
}

impl Walk<'_> {
    /// Every step before the blocks.
    pub(crate) fn model_wide(
        &mut self,
        overlay: &mut Overlay<'_>,
        notes: &mut Vec<String>,
    ) -> Result<(), CompressError> {
        let recipe = self.recipe;
        for step in &recipe.steps {
            let note = match step.step() {
                Step::Local(_) => continue,
                Step::Model(model) => self.one_pass(step, model.as_ref(), overlay)?,
                Step::Search(search) => self.search(step, search.as_ref(), overlay)?,
            };
            notes.push(format!("step '{}': {note}", step.name));
        }
        Ok(())
    }

    fn one_pass(
        &mut self,
        step: &RecipeStep,
        model: &dyn ModelWide,
        overlay: &mut Overlay<'_>,
    ) -> Result<String, CompressError> {
        let fail = |e: MethodError| at_step(step, "the model", e);
        model.check(&overlay.spec).map_err(fail)?;
        let rows = overlay.spec.vocab;
        let read = model.reads_vocabulary().then(|| self.vocabulary(rows)).transpose().map_err(fail)?;
        let vocabulary = read.as_ref();
        let walker = model.begin(&overlay.spec).map_err(fail)?;
        let mut pending = Pending::default();
        let dir = self.scratch_dir();
        let note = if model.turns() {
            let mut turning = Turning { step, model, dir: &dir, x: self.embedded(overlay)? };
            self.turn(&mut turning, walker, &mut pending, overlay)?
        } else {
            self.visit((step, model, &dir), walker, vocabulary, &mut pending, overlay)?
        };
        pending.check(overlay).map_err(|what| fail(MethodError::new(what)))?;
        if let Some(kept) = pending.apply(overlay, &dir)? {
            self.shorten(kept).map_err(fail)?;
        }
        Ok(note)
    }

    /// Walks over the layers, again and again until the walker is done.
    fn visit(
        &mut self,
        (step, model, dir): (&RecipeStep, &dyn ModelWide, &Path),
        mut walker: Box<dyn Walker>,
        vocabulary: Option<&Vocabulary>,
        pending: &mut Pending,
        overlay: &mut Overlay<'_>,
    ) -> Result<String, CompressError> {
        let layers = overlay.spec.layers.len();
        let watched = (0..layers).any(|l| !model.needs(&overlay.spec, l).is_empty());
        let mut x = if watched { Some(self.embedded(overlay)?) } else { None };
        let mut note = String::new();
        let mut first = true;
        loop {
            self.progress.phase(&format!("{}: looking at the whole model", step.name), layers as u64);
            for l in 0..layers {
                let wanted = if x.is_some() { model.needs(&overlay.spec, l) } else { Vec::new() };
                let mut gather = Gather::new(&overlay.spec, wanted);
                if first {
                    for place in overlay.spec.layer_places(l) {
                        finite(&place, &*need(overlay, &place)?, SOURCE)?;
                    }
                }
                if let Some(x) = &mut x {
                    let block = Block::load(overlay, l)?;
                    self.through(&overlay.spec, &block, x, &mut gather, true)?;
                }
                let places = overlay.spec.layer_places(l);
                let statistics = self.with_gradients(gather.finish(), &places)?;
                let work = Layer { weights: overlay, statistics: &statistics, vocabulary };
                let edits = walker.visit(l, &work).map_err(|e| at_step(step, format!("layers.{l}"), e))?;
                pending.take(edits, overlay, dir)?;
                release_layer(overlay, l);
                self.progress.step(l as u64 + 1, &format!("layer {l}"));
            }
            let finished = finish(step, walker, vocabulary, pending, overlay, dir)?;
            note += &finished.note;
            // Statistics are those of the first walk.
            (x, first) = (None, false);
            match finished.again {
                Some(again) => walker = again,
                None => return Ok(note),
            }
        }
    }

    /// A walk that changes the residual stream before each of its readers: every part runs on what it became.
    fn turn(
        &mut self,
        turning: &mut Turning<'_>,
        mut walker: Box<dyn Walker>,
        pending: &mut Pending,
        overlay: &mut Overlay<'_>,
    ) -> Result<String, CompressError> {
        let layers = overlay.spec.layers.len();
        self.progress.phase(&format!("{}: turning the residual stream", turning.step.name), layers as u64);
        for l in 0..layers {
            for place in overlay.spec.layer_places(l) {
                finite(&place, &*need(overlay, &place)?, SOURCE)?;
            }
            let here = &overlay.spec.layers[l];
            let attention = here.attn.as_ref().map(|_| (Reader::Attention(l), Place::layer(l, Role::AttnNorm)));
            let ffn = here.ffn.as_ref().map(|_| (Reader::Ffn(l), Place::layer(l, Role::FfnNorm)));
            for (reader, norm) in attention.into_iter().chain(ffn) {
                let spec = alone(&overlay.spec, l, reader);
                let asks = turning.model.needs(&spec, l);
                self.before(turning, walker.as_mut(), (reader, norm, asks), pending, overlay)?;
                let block = Block::load(&Stitched { base: overlay, spec: &spec, new: HashMap::new() }, l)?;
                self.through(&spec, &block, &mut turning.x, &mut NoTap, true)?;
            }
            release_layer(overlay, l);
            self.progress.step(l as u64 + 1, &format!("layer {l}"));
        }
        let asks = turning.model.needs(&overlay.spec, layers);
        let head = (Reader::Head, Place::global(Role::FinalNorm), asks);
        self.before(turning, walker.as_mut(), head, pending, overlay)?;
        Ok(finish(turning.step, walker, None, pending, overlay, turning.dir)?.note)
    }

    /// What a walker does before one reader, which reads the stream behind `norm`: its statistics are of the stream.
    fn before(
        &mut self,
        turning: &mut Turning<'_>,
        walker: &mut dyn Walker,
        (reader, norm, asks): (Reader, Place, Vec<(Site, Ask)>),
        pending: &mut Pending,
        overlay: &mut Overlay<'_>,
    ) -> Result<(), CompressError> {
        let of = |(site, _): &(Site, Ask)| if let Site::Matrix(place) = site { Some(*place) } else { None };
        let places: BTreeSet<Place> = asks.iter().filter_map(of).collect();
        let mut gather = Gather::new(&overlay.spec, asks);
        let x = &mut turning.x;
        for i in 0..x.len() {
            let m = x.take(i).map_err(self.scratch_error())?;
            places.iter().for_each(|p| gather.see(p, m.view()));
            x.put(i, m).map_err(self.scratch_error())?;
        }
        let work = Layer { weights: overlay, statistics: &gather.finish(), vocabulary: None };
        let turn = walker.turn(reader, &work).map_err(|e| at_step(turning.step, norm, e))?;
        if let Some(map) = &turn.map {
            for i in 0..x.len() {
                let m = x.take(i).map_err(self.scratch_error())?;
                x.put(i, dense::matmul_nn(m.view(), map.view())).map_err(self.scratch_error())?;
            }
        }
        pending.take(turn.edits, overlay, turning.dir)
    }
}

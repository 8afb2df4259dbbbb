//! Model-wide steps: each one full pass over the layers, then its edits.

use lacuna_base::Mat;
use lacuna_contract::{LayerWork, MethodError, ModelWide, Site, Stats, Step, Vocabulary};
use lacuna_format::Weights;
use lacuna_model::Block;
use lacuna_spec::{Place, Spec};

use crate::account::CompressError;
use crate::calibrate::{Gather, Statistics};
use crate::drive::{SOURCE, Walk, at_step};
use crate::edits::Pending;
use crate::overlay::{Overlay, finite, need, release_layer};
use crate::recipe::RecipeStep;

/// One layer as a walker sees it.
struct Layer<'a> {
    weights: &'a Overlay<'a>,
    statistics: &'a Statistics,
    vocabulary: Option<&'a Vocabulary>,
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
        let mut walker = model.begin(&overlay.spec).map_err(fail)?;
        let layers = overlay.spec.layers.len();
        let watched = (0..layers).any(|l| !model.needs(&overlay.spec, l).is_empty());
        let mut x = if watched { Some(self.embedded(overlay)?) } else { None };
        let mut pending = Pending::default();
        let (mut note, dir) = (String::new(), self.scratch_dir());
        loop {
            self.progress.phase(&format!("{}: looking at the whole model", step.name), layers as u64);
            for l in 0..layers {
                let wanted = if x.is_some() { model.needs(&overlay.spec, l) } else { Vec::new() };
                let mut gather = Gather::new(&overlay.spec, wanted);
                if let Some(x) = &mut x {
                    for place in overlay.spec.layer_places(l) {
                        finite(&place, &*need(overlay, &place)?, SOURCE)?;
                    }
                    let block = Block::load(overlay, l)?;
                    self.through(&overlay.spec, &block, x, &mut gather, true)?;
                }
                let places = overlay.spec.layer_places(l);
                let statistics = self.with_gradients(gather.finish(), &places)?;
                let work = Layer { weights: overlay, statistics: &statistics, vocabulary };
                let edits = walker.visit(l, &work).map_err(|e| at_step(step, format!("layers.{l}"), e))?;
                pending.take(edits, overlay, &dir)?;
                release_layer(overlay, l);
                self.progress.step(l as u64 + 1, &format!("layer {l}"));
            }
            let work = Layer { weights: overlay, statistics: &Statistics::default(), vocabulary };
            let finished = walker.finish(&work).map_err(fail)?;
            pending.take(finished.edits, overlay, &dir)?;
            note += &finished.note;
            // Statistics are those of the first walk.
            x = None;
            match finished.again {
                Some(again) => walker = again,
                None => break,
            }
        }
        pending.check(overlay).map_err(|what| fail(MethodError::new(what)))?;
        if let Some(kept) = pending.apply(overlay, &dir)? {
            self.shorten(kept).map_err(fail)?;
        }
        Ok(note)
    }
}

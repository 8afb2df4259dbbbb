//! The walk: model-wide steps, then block after block, each calibrated on what the compressed earlier blocks put out.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lacuna_checkpoint::{Checkpoint, PackedWriter};
use lacuna_contract::{Made, MethodError, Needs, Outcome, PruneAsk, Slot, Sparsity, Stats, Verb};
use lacuna_format::{Float, FormatError, PatternKind, Piece, Stored, Term, Values, Weights, pack_float};
use lacuna_model::{Block, Embedding, NoTap, Tap};
use lacuna_spec::{Part, Place, Role, Spec};
use serde_json::{Value, json};

use crate::account::{CompressError, Options, Outcomes, Progress, TensorReport};
use crate::activations::Activations;
use crate::identity;
use crate::matrix::Matrix;
use crate::memory;
use crate::overlay::{Overlay, finite, forward, need, nll, read_back, release_layer, report};
use crate::recipe::{Recipe, Rest, Step};
use crate::select::{Scored, select};
use crate::sequences::{cut, fingerprint};
use crate::stats::{Gather, Similarity};

/// Compresses `source` by `recipe`, calibrating on `tokens`, into a packed model at `options.out`.
pub fn compress(
    source: &Checkpoint,
    tokens: &[u32],
    recipe: &Recipe,
    options: &Options<'_>,
    progress: &mut dyn Progress,
) -> Result<Outcomes, CompressError> {
    let mut notes = Vec::new();
    let needs_text = recipe.steps.iter().any(|s| step_needs(s) != Needs::default());
    let sequences = if needs_text { cut(tokens, recipe, options.bos, &mut notes)? } else { Vec::new() };
    let mut overlay = Overlay { base: source, spec: source.spec().clone(), new: HashMap::new() };
    let plan = memory::plan(&overlay.spec, recipe, &sequences, options.max_ram)?;
    let calibration = (sequences.len(), sequences.first().map_or(0, Vec::len));
    let identity = json!({
        "recipe": recipe.resolved, "source": options.source, "files": identity::fingerprint(source), "bos": options.bos,
        "sequences": calibration, "text": fingerprint(&sequences), "program": identity::revision(),
    });
    let mut writer = PackedWriter::open(options.out, options.overwrite, options.resume, &identity)?;
    let mut walk = Walk {
        recipe,
        options,
        progress,
        sequences: &sequences,
        spill: plan.spill,
        budgets: HashMap::new(),
        unreached: Vec::new(),
        wide: BTreeSet::new(),
    };
    walk.model_wide(&mut overlay, &mut notes)?;
    let mut tensors = Vec::new();
    walk.globals(&mut overlay, &mut writer, &[Role::Embed, Role::Positions], &mut tensors)?;
    walk.blocks(&mut overlay, Some(&mut writer), &mut tensors)?;
    walk.globals(&mut overlay, &mut writer, &[Role::FinalNorm, Role::Head], &mut tensors)?;
    if let Some(first) = walk.unreached.first() {
        let n = walk.unreached.len();
        notes.push(format!("{n} matrices, {first} the first, keep what they were: no calibration token reached them"));
    }
    if let Some(first) = walk.wide.first() {
        let n = walk.wide.len();
        notes.push(format!("{n} matrices, {first} the first, have values beyond f16: they are stored as bf16 or f32"));
    }
    let recipe_json = serde_json::to_value(&recipe.resolved).unwrap_or(Value::Null);
    let path = writer.finish(
        overlay.spec.clone(),
        recipe_json,
        options.source.clone(),
        approximations(recipe),
        Some(source),
    )?;
    let bytes = tensors.iter().map(|t| t.bytes_after).sum();
    Ok(Outcomes { path, bytes, spec: overlay.spec, tensors, calibration, notes })
}

/// Each step in words, for whoever loads the model.
fn approximations(recipe: &Recipe) -> Vec<String> {
    recipe
        .steps
        .iter()
        .map(|s| {
            let targets: Vec<&str> = s.targets.iter().map(|t| t.0.as_str()).collect();
            format!("{} by {} on {}", s.name, s.method.card.name, targets.join(", "))
        })
        .collect()
}

/// Whose weights are looked at before anything is done to them.
const SOURCE: &str = "the source's weight";

/// Whether a matrix that was made here has floats of another type than f16.
fn wide(stored: &Stored) -> bool {
    let one = |p: &Piece| matches!(p.values, Values::Float(f, _) if f != Float::F16);
    stored.terms.iter().any(|t| match t {
        Term::Piece(p) => one(p),
        Term::Product(a, b) => one(a) || one(b),
    })
}

/// What a step's method, and its grid, read.
pub(crate) fn step_needs(step: &Step) -> Needs {
    step.method.card.needs
}

struct Walk<'a> {
    recipe: &'a Recipe,
    options: &'a Options<'a>,
    progress: &'a mut dyn Progress,
    sequences: &'a [Vec<u32>],
    spill: bool,
    /// Sparsity by prune step and place, where a budget step decided.
    budgets: HashMap<(String, Place), f64>,
    /// Matrices (of experts) that a step left alone since no calibration token reached them.
    unreached: Vec<Place>,
    /// Matrices whose values f16 cannot say.
    wide: BTreeSet<Place>,
}

impl Walk<'_> {
    fn scratch_dir(&self) -> PathBuf {
        let parent = self.options.out.parent().filter(|p| !p.as_os_str().is_empty());
        parent.map_or_else(|| PathBuf::from("."), Path::to_owned)
    }

    fn scratch_error(&self) -> impl Fn(std::io::Error) -> CompressError + use<> {
        let dir = self.scratch_dir().display().to_string();
        move |source| CompressError::Scratch { dir: dir.clone(), source }
    }

    /// The embedded sequences.
    fn embedded(&self, weights: &dyn Weights) -> Result<Activations, CompressError> {
        let dir = self.scratch_dir();
        let lens = self.sequences.iter().map(Vec::len).collect();
        let mut x = Activations::new(lens, weights.spec().hidden, self.spill.then_some(dir.as_path()))
            .map_err(self.scratch_error())?;
        if self.sequences.is_empty() {
            return Ok(x);
        }
        let embed = Embedding::load(weights)?;
        for (i, s) in self.sequences.iter().enumerate() {
            let positions: Vec<usize> = (0..s.len()).collect();
            x.put(i, embed.rows(s, &positions)?.into_mat()).map_err(self.scratch_error())?;
        }
        Ok(x)
    }

    /// Runs every sequence through `block`, keeping what comes out if `keep`.
    fn through(
        &self,
        spec: &Spec,
        block: &Block,
        x: &mut Activations,
        tap: &mut dyn Tap,
        keep: bool,
    ) -> Result<(), CompressError> {
        for i in 0..x.len() {
            let mut m = x.take(i).map_err(self.scratch_error())?;
            let before = if keep { None } else { Some(m.clone()) };
            forward(spec, block, &mut m, tap)?;
            x.put(i, before.unwrap_or(m)).map_err(self.scratch_error())?;
        }
        Ok(())
    }

    fn model_wide(&mut self, overlay: &mut Overlay<'_>, notes: &mut Vec<String>) -> Result<(), CompressError> {
        for step in self.recipe.steps.iter().filter(|s| s.is_model_wide()) {
            match (&step.made, step.verb) {
                (Made::Drop(method), Verb::Drop) => {
                    let (part, count) = step.drop_part()?;
                    let layers = overlay.spec.layers.len();
                    let mut similarity = Similarity::new(part, layers);
                    if step.method.card.needs.similarity {
                        self.progress.phase(&format!("{}: watching the dense model", step.name), layers as u64);
                        let mut x = self.embedded(overlay)?;
                        for l in 0..layers {
                            for place in overlay.spec.layer_places(l) {
                                finite(&place, &*need(overlay, &place)?, SOURCE)?;
                            }
                            let block = Block::load(overlay, l)?;
                            self.through(&overlay.spec, &block, &mut x, &mut similarity, true)?;
                            release_layer(overlay, l);
                            self.progress.step(l as u64 + 1, &format!("layer {l}"));
                        }
                    }
                    let means = similarity.means();
                    let stats = lacuna_contract::DropStats { similarity: &means };
                    let gone = lacuna_contract::Drop::drop(method.as_ref(), part, count, &stats)
                        .map_err(|e| at_step(step, "model", e))?;
                    for &l in &gone {
                        let Some(layer) = overlay.spec.layers.get_mut(l) else {
                            return Err(at_step(step, "model", MethodError::new(format!("layer {l} of {layers}"))));
                        };
                        if part != lacuna_contract::DropPart::Ffn {
                            layer.attn = None;
                        }
                        if part != lacuna_contract::DropPart::Attention {
                            layer.ffn = None;
                        }
                    }
                    notes.push(format!("step '{}' dropped {part:?} of layers {gone:?}", step.name));
                }
                (Made::Budget(_), Verb::Budget) => self.budget(step, overlay)?,
                _ => unreachable!("the recipe was checked: '{}' is no model-wide step", step.name),
            }
        }
        Ok(())
    }

    /// Asks a budget for assignments; one that comes alone is taken as it is, several are measured on the calibration text.
    fn budget(&mut self, step: &Step, overlay: &Overlay<'_>) -> Result<(), CompressError> {
        let target_step = self.recipe.steps.iter().find(|s| s.name == step.budget_for() && s.verb == Verb::Prune);
        let Some(target_step) = target_step else { return Ok(()) };
        let slots: Vec<Slot> = (0..overlay.spec.layers.len())
            .flat_map(|l| overlay.spec.layer_places(l))
            .filter(|p| p.part == Part::Weight && target_step.aims_at(p))
            .filter_map(|p| overlay.spec.shape(&p).map(|(r, c)| Slot { place: p, parameters: r as u64 * c as u64 }))
            .collect();
        let Some(target) = slots.first().and_then(|s| target_step.prune(&s.place)).map(|k| k.sparsity) else {
            return Ok(());
        };
        let json = Value::Object(Default::default());
        let Made::Budget(mut method) = (step.method.make)(json).map_err(|e| at_step(step, "model", e))? else {
            return Ok(());
        };
        let fail = |e| at_step(step, "model", e);
        let mut best: Option<(f64, Vec<f64>)> = None;
        let mut next = method.ask(&slots, target).map_err(fail)?;
        while let Some(a) = next {
            if a.len() != slots.len() || a.iter().any(|s| !(0.0..=1.0).contains(s)) {
                return Err(fail(MethodError::new(format!("{} fractions for {} matrices", a.len(), slots.len()))));
            }
            let after = method.ask(&slots, target).map_err(fail)?;
            if after.is_none() && best.is_none() {
                best = Some((0.0, a));
                break;
            }
            self.assign(target_step, &slots, &a);
            let outcome = self.measure(overlay)?;
            method.tell(&a, &outcome);
            if best.as_ref().is_none_or(|(loss, _)| outcome.loss < *loss) {
                best = Some((outcome.loss, a));
            }
            next = after;
        }
        if let Some((_, a)) = best {
            self.assign(target_step, &slots, &a);
        }
        Ok(())
    }

    fn assign(&mut self, step: &Step, slots: &[Slot], fractions: &[f64]) {
        for (s, f) in slots.iter().zip(fractions) {
            self.budgets.insert((step.name.clone(), s.place), *f);
        }
    }

    /// The calibration loss of the model that the local steps make under the present assignment; nothing is written.
    fn measure(&mut self, overlay: &Overlay<'_>) -> Result<Outcome, CompressError> {
        let mut trial = Overlay { base: overlay.base, spec: overlay.spec.clone(), new: HashMap::new() };
        let mut tensors = Vec::new();
        let mut x = self.blocks(&mut trial, None, &mut tensors)?;
        let head = lacuna_model::Head::load(&trial)?;
        let (mut sum, mut n) = (0.0f64, 0u64);
        for (i, s) in self.sequences.iter().enumerate() {
            let m = x.take(i).map_err(self.scratch_error())?;
            for from in (0..s.len() - 1).step_by(32) {
                let to = (from + 32).min(s.len() - 1);
                let logits = head.logits(m.view().rows_range(from, to));
                for r in from..to {
                    sum += nll(logits.row(r - from), s[r + 1] as usize);
                    n += 1;
                }
            }
        }
        Ok(Outcome { loss: sum / n.max(1) as f64, bytes: tensors.iter().map(|t| t.bytes_after).sum() })
    }

    /// Tensors outside the blocks.
    fn globals(
        &mut self,
        overlay: &mut Overlay<'_>,
        writer: &mut PackedWriter,
        roles: &[Role],
        tensors: &mut Vec<TensorReport>,
    ) -> Result<(), CompressError> {
        let places: Vec<Place> =
            overlay.spec.places().into_iter().filter(|p| p.layer.is_none() && roles.contains(&p.role)).collect();
        for place in places {
            let source = need(overlay, &place)?;
            let stored = match writer.read(&place)? {
                Some(s) => Arc::new(s),
                None => {
                    finite(&place, &source, SOURCE)?;
                    let mut work = self.begin(&source, &place);
                    for step in self.recipe.steps.iter().filter(|s| !s.is_model_wide() && s.aims_at(&place)) {
                        if step_needs(step) != Needs::default() {
                            let what = format!(
                                "{} needs statistics that are gathered in blocks only; use rtn",
                                step.method.card.name
                            );
                            return Err(CompressError::Method {
                                place: place.to_string(),
                                step: step.name.clone(),
                                what,
                            });
                        }
                        let work = work.get_or_insert_with(|| Matrix::new(source.clone()));
                        self.apply(step, &place, work, &Stats::default())?;
                    }
                    let new = self.finish(work, &source, &place)?;
                    writer.put(&place, &new)?;
                    new
                }
            };
            tensors.push(report(&place, &source, &stored, &Stats::default()));
            overlay.new.insert(place, stored);
            overlay.release(&place);
        }
        Ok(())
    }

    /// Whether anything is done to `place`; the matrix is decoded only then.
    fn begin(&self, source: &Arc<Stored>, place: &Place) -> Option<Matrix> {
        let aimed = self.recipe.steps.iter().any(|s| !s.is_model_wide() && s.aims_at(place));
        aimed.then(|| Matrix::new(source.clone()))
    }

    /// The stored form of a matrix, which decodes to finite numbers.
    fn finish(
        &mut self,
        work: Option<Matrix>,
        source: &Arc<Stored>,
        place: &Place,
    ) -> Result<Arc<Stored>, CompressError> {
        let fail = |what| CompressError::Method { place: place.to_string(), step: "pack".into(), what };
        let mut stored = match work {
            Some(m) => m.finish().map_err(fail)?,
            None => source.clone(),
        };
        if !Arc::ptr_eq(&stored, source) {
            if wide(&stored) {
                self.wide.insert(*place);
            }
        } else if self.recipe.rest == Rest::F16 {
            let float = if stored.rows == 1 { Float::F32 } else { Float::F16 };
            let piece = pack_float(source.to_mat().view(), None, PatternKind::Dense, float)
                .map_err(|e: FormatError| fail(format!("{}; rest = \"source\" keeps it as it is", e.what)))?;
            stored = Arc::new(Stored::from_piece(piece));
        } else {
            return Ok(stored);
        }
        finite(place, &stored, &format!("the weight as {}", stored.codec_name()))?;
        Ok(stored)
    }

    /// The blocks, first to last. Without a writer (a trial) nothing is saved. Returns the activations behind the last block.
    fn blocks(
        &mut self,
        overlay: &mut Overlay<'_>,
        mut writer: Option<&mut PackedWriter>,
        tensors: &mut Vec<TensorReport>,
    ) -> Result<Activations, CompressError> {
        let layers = overlay.spec.layers.len();
        let local: Vec<&Step> = self.recipe.steps.iter().filter(|s| !s.is_model_wide()).collect();
        let mut x = self.embedded(overlay)?;
        let calibrates = |l: usize, spec: &Spec| {
            spec.layer_places(l).iter().any(|p| local.iter().any(|s| s.aims_at(p) && step_needs(s) != Needs::default()))
        };
        let last = (0..layers).rev().find(|&l| calibrates(l, &overlay.spec));
        self.progress.phase("compressing", layers as u64);
        for l in 0..layers {
            let places = overlay.spec.layer_places(l);
            let done = writer.as_ref().is_some_and(|w| places.iter().all(|p| w.is_done(p)));
            let mut sources = HashMap::new();
            for p in &places {
                let source = need(overlay, p)?;
                if !done {
                    finite(p, &source, SOURCE)?;
                }
                sources.insert(*p, source);
            }
            let mut gather = Gather::new(
                &overlay.spec,
                places.iter().flat_map(|p| {
                    local.iter().filter(|s| s.aims_at(p)).map(|s| (*p, step_needs(s))).collect::<Vec<_>>()
                }),
            );
            if !done && gather.is_needed() {
                let block = Block::load(overlay, l)?;
                self.through(&overlay.spec, &block, &mut x, &mut gather, false)?;
            }
            let made = if done {
                let writer = writer.as_deref();
                read_back(writer, &places)?
            } else {
                self.local_steps(&local, &overlay.spec, &places, &sources, &gather)?
            };
            for (place, stored) in &made {
                if let (false, Some(w)) = (done || writer.as_ref().is_some_and(|w| w.is_done(place)), writer.as_mut()) {
                    w.put(place, stored)?;
                }
                tensors.push(report(place, &sources[place], stored, &gather.stats(&overlay.spec, place)));
            }
            drop(gather);
            drop(sources);
            // Later blocks see this one as it is stored.
            if writer.is_none() || last.is_some_and(|last| l < last) {
                overlay.new.extend(made);
                let block = Block::load(overlay, l)?;
                self.through(&overlay.spec, &block, &mut x, &mut NoTap, true)?;
                overlay.new.retain(|p, _| p.layer.is_none());
            }
            release_layer(overlay, l);
            self.progress.step(l as u64 + 1, &format!("layer {l}"));
        }
        Ok(x)
    }

    /// The local steps on one block's matrices, step after step.
    fn local_steps(
        &mut self,
        local: &[&Step],
        spec: &Spec,
        places: &[Place],
        sources: &HashMap<Place, Arc<Stored>>,
        gather: &Gather,
    ) -> Result<Vec<(Place, Arc<Stored>)>, CompressError> {
        // An expert that no token reached says nothing of how its weights are used: a method that asks must not guess.
        let blind = |step: &Step, p: &Place| step_needs(step) != Needs::default() && gather.stats(spec, p).tokens == 0;
        let left: Vec<Place> =
            places.iter().copied().filter(|p| local.iter().any(|s| s.aims_at(p) && blind(s, p))).collect();
        let mut work: HashMap<Place, Option<Matrix>> =
            places.iter().map(|p| (*p, if left.contains(p) { None } else { self.begin(&sources[p], p) })).collect();
        for step in local {
            let aimed: Vec<Place> = places.iter().copied().filter(|p| step.aims_at(p) && !left.contains(p)).collect();
            if let Some(scope) = self.layer_scope(step, &aimed) {
                self.prune_together(step, &aimed, &mut work, spec, gather, scope)?;
                continue;
            }
            for p in aimed {
                if let Some(Some(m)) = work.get_mut(&p) {
                    self.apply(step, &p, m, &gather.stats(spec, &p))?;
                }
            }
        }
        self.unreached.extend(&left);
        places.iter().map(|p| Ok((*p, self.finish(work.remove(p).flatten(), &sources[p], p)?))).collect()
    }

    fn prune_ask(&self, step: &Step, place: &Place) -> Option<PruneAsk> {
        let k = step.prune(place)?;
        let sparsity = match k.pattern {
            Sparsity::Nm { .. } => k.sparsity,
            _ => self.budgets.get(&(step.name.clone(), *place)).copied().unwrap_or(k.sparsity),
        };
        Some(PruneAsk { sparsity, pattern: k.pattern })
    }

    /// The scope of a score-driven prune step, if its matrices compete with each other.
    fn layer_scope(&self, step: &Step, aimed: &[Place]) -> Option<lacuna_contract::Scope> {
        let (Verb::Prune, Made::Score(s)) = (step.verb, &step.made) else { return None };
        let scope = aimed.first().and_then(|p| step.prune(p)).and_then(|k| k.scope).unwrap_or(s.scope());
        (scope == lacuna_contract::Scope::Layer).then_some(scope)
    }

    fn prune_together(
        &self,
        step: &Step,
        aimed: &[Place],
        work: &mut HashMap<Place, Option<Matrix>>,
        spec: &Spec,
        gather: &Gather,
        scope: lacuna_contract::Scope,
    ) -> Result<(), CompressError> {
        let Made::Score(method) = &step.made else { return Ok(()) };
        let mut scores = Vec::new();
        for p in aimed {
            let (Some(Some(m)), Some(ask)) = (work.get(p), self.prune_ask(step, p)) else { continue };
            let s = method.score(m.w(), &gather.stats(spec, p)).map_err(|e| at_step(step, p, e))?;
            scores.push((*p, s, ask));
        }
        let Some(pattern) = scores.first().map(|(_, _, a)| a.pattern) else { return Ok(()) };
        let list: Vec<Scored<'_>> = scores
            .iter()
            .map(|(p, s, ask)| {
                let before = work.get(p).and_then(Option::as_ref).and_then(Matrix::mask);
                Scored { scores: s, before, sparsity: ask.sparsity }
            })
            .collect();
        let masks = select(&list, pattern, scope).map_err(|e| at_step(step, aimed[0], MethodError::new(e)))?;
        drop(list);
        for ((p, _, ask), mask) in scores.iter().zip(masks) {
            if let Some(Some(m)) = work.get_mut(p) {
                m.prune_to(mask, ask.pattern).map_err(|e| at_step(step, p, MethodError::new(e)))?;
            }
        }
        Ok(())
    }

    /// One local step on one matrix.
    fn apply(&self, step: &Step, place: &Place, m: &mut Matrix, stats: &Stats<'_>) -> Result<(), CompressError> {
        let fail = |what: String| at_step(step, place, MethodError::new(what));
        match (step.verb, &step.made) {
            (Verb::Prune, Made::Score(method)) => {
                let Some(ask) = self.prune_ask(step, place) else { return Ok(()) };
                let scope = step.prune(place).and_then(|k| k.scope).unwrap_or(method.scope());
                let scores = method.score(m.w(), stats).map_err(|e| at_step(step, place, e))?;
                let one = Scored { scores: &scores, before: m.mask(), sparsity: ask.sparsity };
                let mask = select(&[one], ask.pattern, scope).map_err(fail)?.remove(0);
                m.prune_to(mask, ask.pattern).map_err(fail)
            }
            (Verb::Prune, Made::Solve(method)) => {
                let Some(ask) = self.prune_ask(step, place) else { return Ok(()) };
                m.prune_solved(method.as_ref(), stats, ask).map_err(fail)
            }
            (Verb::Quantize, made) => {
                let Some(keys) = step.quantize(place) else { return Ok(()) };
                match (made, &step.grid) {
                    (Made::Grid(grid), _) => m.round(grid.as_ref(), &keys).map_err(fail),
                    (Made::Solve(method), Some(Made::Grid(grid))) => {
                        m.round_solved(method.as_ref(), grid.as_ref(), stats, &keys).map_err(fail)
                    }
                    _ => Err(fail("a quantize step needs a grid".into())),
                }
            }
            (Verb::Factor, Made::Factor(method)) => {
                let Some(keep) = step.keep(place) else { return Ok(()) };
                let (rows, cols) = (m.w().rows(), m.w().cols());
                let (a, b) =
                    method.factor(m.w(), stats, Step::rank(keep, rows, cols)).map_err(|e| at_step(step, place, e))?;
                m.factored(a, b).map_err(fail)
            }
            (Verb::Outliers, Made::Score(method)) => {
                let Some(fraction) = step.fraction(place) else { return Ok(()) };
                m.extract(method.as_ref(), stats, fraction).map_err(fail)
            }
            _ => Err(fail("its method does not answer this step's question".into())),
        }
    }
}

pub(crate) fn at_step(step: &Step, place: impl std::fmt::Display, e: MethodError) -> CompressError {
    CompressError::Method { place: place.to_string(), step: step.name.clone(), what: e.what }
}

//! Searches: a database of levels, each calibrated on the source, and trials stitched from it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use lacuna_base::Mat;
use lacuna_contract::{Assignment, Lab, Level, MethodError, Outcome, Searching, Site, Slot, Step, Varied};
use lacuna_eval::loss;
use lacuna_model::{Block, Head, NoTap};
use lacuna_spec::{Part, Place, Role, Spec};
use rayon::prelude::*;

use crate::account::CompressError;
use crate::activations::Activations;
use crate::calibrate::Gather;
use crate::drive::{SOURCE, Walk, at_step};
use crate::error::change;
use crate::local::{asks, gathered_for, local_of, locals_of};
use crate::model_wide::Layer;
use crate::overlay::{Overlay, Stitched, finite, forward, need, release_layer, sliced};
use crate::recipe::RecipeStep;
use crate::scratch::Scratch;
use crate::sizes::Sized;
use crate::trials::Trials;

/// What a slot stands for.
pub(crate) enum Meaning {
    /// Places of one layer, compressed at each level.
    Places(Vec<Place>),
    /// The attention or the FFN of a layer, absent at level 0.
    Part(Role),
    /// The attention or the FFN of a layer, at each level of a size.
    Sizes(Vec<Sized>),
}

pub(crate) struct Entry {
    pub(crate) layer: usize,
    pub(crate) meaning: Meaning,
    /// By level, the tensors in the scratch file.
    pub(crate) kept: Vec<Vec<(Place, usize)>>,
}

/// The laboratory of one search.
struct Database<'a> {
    overlay: &'a Overlay<'a>,
    sequences: &'a [Vec<u32>],
    slots: Vec<Slot>,
    levels: Vec<Vec<Level>>,
    entries: Vec<Entry>,
    /// Tensors that other steps change in every trial.
    common: Vec<(Place, usize)>,
    scratch: Mutex<Scratch>,
    /// What goes into the first block, and what comes out of the source's last.
    first: Activations,
    last: Activations,
    trials: Trials,
    tell: &'a mut dyn FnMut(usize, &Outcome),
    /// By slot, what the search saw.
    looks: Vec<f64>,
    /// By level, the value that varies.
    names: Vec<String>,
    notes: String,
    rest_bytes: u64,
}

pub(crate) fn told(e: impl std::fmt::Display) -> MethodError {
    MethodError::new(e.to_string())
}

/// Rows whose logits are computed at a time.
const ROWS: usize = 32;

impl Database<'_> {
    /// Levels of the slots of a layer.
    fn key(&self, a: &[usize], layer: usize) -> Vec<usize> {
        self.entries.iter().zip(a).filter(|(e, _)| e.layer == layer).map(|(_, l)| *l).collect()
    }

    /// A layer as an assignment has it, and the network that it is of.
    fn layer(&self, a: &[usize], layer: usize) -> Result<(Spec, Block), MethodError> {
        let mut spec = self.overlay.spec.clone();
        let mut new = HashMap::new();
        let mut wanted: Vec<(Place, usize)> =
            self.common.iter().filter(|(p, _)| p.layer == Some(layer as u32)).copied().collect();
        for (entry, &level) in self.entries.iter().zip(a).filter(|(e, _)| e.layer == layer) {
            match &entry.meaning {
                Meaning::Places(_) => wanted.extend(&entry.kept[level]),
                Meaning::Part(_) if level > 0 => {}
                Meaning::Part(Role::O) => spec.layers[layer].attn = None,
                Meaning::Part(_) => spec.layers[layer].ffn = None,
                Meaning::Sizes(sizes) => {
                    let at = &sizes[level];
                    at.describe(&mut spec.layers[layer]);
                    wanted.extend(&entry.kept[level]);
                    for (place, rows, cols) in at.rows.iter() {
                        let whole = need(self.overlay, place).map_err(told)?;
                        let cut = sliced(&whole, rows.as_deref(), cols.as_deref()).map_err(told)?;
                        new.insert(*place, Arc::new(cut));
                    }
                }
            }
        }
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, number) in wanted {
            new.insert(place, Arc::new(scratch.get(number).map_err(told)?));
        }
        drop(scratch);
        let block = Block::load(&Stitched { base: self.overlay, spec: &spec, new }, layer).map_err(told)?;
        release_layer(self.overlay, layer);
        Ok((spec, block))
    }

    /// Runs trials that agree on every layer before `layer`, whose activations are `x`: what they share is computed
    /// once.
    fn descend(
        &self,
        group: &[&Assignment],
        layer: usize,
        mut x: Vec<Mat>,
        dense: &[Mat],
        out: &mut HashMap<Assignment, Outcome>,
    ) -> Result<(), MethodError> {
        if layer == self.overlay.spec.layers.len() {
            let (loss, kl) = self.judge(&x, dense)?;
            for a in group {
                out.insert((*a).clone(), Outcome { loss, kl, bytes: self.bytes(a) });
            }
            return Ok(());
        }
        let mut parts: BTreeMap<Vec<usize>, Vec<&Assignment>> = BTreeMap::new();
        for &a in group {
            parts.entry(self.key(a, layer)).or_default().push(a);
        }
        let many = parts.len();
        for (i, part) in parts.into_values().enumerate() {
            let mut next = if i + 1 < many { x.clone() } else { std::mem::take(&mut x) };
            let (spec, block) = self.layer(part[0], layer)?;
            for m in &mut next {
                forward(&spec, &block, m, &mut NoTap).map_err(told)?;
            }
            drop(block);
            self.descend(&part, layer + 1, next, dense, out)?;
        }
        Ok(())
    }

    fn bytes(&self, a: &[usize]) -> u64 {
        a.iter().enumerate().map(|(s, &l)| self.levels[s][l].bytes).sum()
    }

    /// Loss and divergence of final activations, nats a token.
    fn judge(&self, x: &[Mat], dense: &[Mat]) -> Result<(f64, f64), MethodError> {
        let head = Head::load(self.overlay).map_err(told)?;
        let (mut loss, mut kl, mut n) = (0.0, 0.0, 0u64);
        for (s, (m, d)) in self.sequences.iter().zip(x.iter().zip(dense)) {
            for from in (0..s.len() - 1).step_by(ROWS) {
                let to = (from + ROWS).min(s.len() - 1);
                let p = head.logits(d.view().rows_range(from, to));
                let q = head.logits(m.view().rows_range(from, to));
                let rows: Vec<(f64, f64)> = (0..to - from)
                    .into_par_iter()
                    .map(|r| (loss::nll(q.row(r), s[from + r + 1]), loss::kl(p.row(r), q.row(r))))
                    .collect();
                for (one, other) in rows {
                    loss += one;
                    kl += other;
                    n += 1;
                }
            }
        }
        let n = n.max(1) as f64;
        Ok((loss / n, kl / n))
    }
}

impl Lab for Database<'_> {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn levels(&self, slot: usize) -> &[Level] {
        &self.levels[slot]
    }

    fn measure(&mut self, batch: &[Assignment], tokens: usize) -> Result<Vec<Outcome>, MethodError> {
        for a in batch {
            let fits = |(s, l): (usize, &usize)| *l < self.levels[s].len();
            if a.len() != self.slots.len() || !a.iter().enumerate().all(fits) {
                return Err(MethodError::new(format!("{a:?} is no assignment for {} slots", self.slots.len())));
            }
        }
        let mut used = 0;
        let count = self.sequences.iter().take_while(|s| {
            let more = used < tokens;
            used += s.len();
            more
        });
        let count = count.count();
        let fresh: Vec<&Assignment> = batch.iter().filter(|a| self.trials.known(a, count).is_none()).collect();
        if !fresh.is_empty() {
            let take = |all: &mut Activations, i: usize| {
                let m = all.take(i).map_err(told)?;
                all.put(i, m.clone()).map_err(told)?;
                Ok(m)
            };
            let x = (0..count).map(|i| take(&mut self.first, i)).collect::<Result<Vec<_>, MethodError>>()?;
            let dense = (0..count).map(|i| take(&mut self.last, i)).collect::<Result<Vec<_>, MethodError>>()?;
            let mut out = HashMap::new();
            self.descend(&fresh, 0, x, &dense, &mut out)?;
            for (a, outcome) in out {
                self.trials.learn(a, count, outcome).map_err(told)?;
            }
        }
        let mut all = Vec::with_capacity(batch.len());
        for a in batch {
            let outcome = self.trials.known(a, count).ok_or_else(|| MethodError::new("a trial was lost"))?;
            // A loss that is no number must lose, whatever a search compares.
            let worst = |x: f64| if x.is_nan() { f64::INFINITY } else { x };
            let outcome = Outcome { loss: worst(outcome.loss), kl: worst(outcome.kl), ..outcome };
            self.trials.spend().map_err(MethodError::new)?;
            (self.tell)(self.trials.spent(), &outcome);
            all.push(outcome);
        }
        Ok(all)
    }

    fn looked(&self, slot: usize) -> f64 {
        self.looks[slot]
    }

    fn name(&self, slot: usize, level: usize) -> String {
        self.names.get(level).cloned().unwrap_or_else(|| self.levels[slot][level].value.to_string())
    }

    fn rest_bytes(&self) -> u64 {
        self.rest_bytes
    }

    fn note(&mut self, text: String) {
        self.notes += "; ";
        self.notes += &text;
    }
}

impl Walk<'_> {
    /// Builds the database, lets the method search it, and keeps what it chose.
    pub(crate) fn search(
        &mut self,
        step: &RecipeStep,
        search: &dyn Searching,
        overlay: &mut Overlay<'_>,
    ) -> Result<String, CompressError> {
        let fail = |e: MethodError| at_step(step, "the model", e);
        let varies = search.varies();
        let scratch = Scratch::new(&self.scratch_dir()).map_err(self.scratch_error())?;
        let (first, mut x) = (self.embedded(overlay)?, self.embedded(overlay)?);
        let (mut slots, mut levels, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        let (mut common, mut looks) = (Vec::new(), Vec::new());
        let mut scratch = scratch;
        let names: Vec<String> = match &varies {
            Varied::Parts | Varied::Sizes => Vec::new(),
            Varied::Key { values, .. } => {
                values.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect()
            }
        };
        let varied = match &varies {
            Varied::Parts | Varied::Sizes => None,
            Varied::Key { step: name, by_layer, .. } => {
                let at = self.recipe.steps.iter().position(|s| s.name == *name && matches!(s.step(), Step::Local(_)));
                at.map(|i| (i, *by_layer))
            }
        };
        let layers = overlay.spec.layers.len();
        self.progress.phase(&format!("{}: each place at each level", step.name), layers as u64);
        for l in 0..layers {
            let spec = overlay.spec.clone();
            match varied {
                None => {
                    match varies {
                        Varied::Sizes => {
                            for (slot, of, entry) in self.sizes_of((step, search), overlay, l, &mut x, &mut scratch)? {
                                slots.push(slot);
                                levels.push(of);
                                entries.push(entry);
                            }
                        }
                        _ => parts_of(overlay, l, &mut slots, &mut levels, &mut entries)?,
                    }
                    looks.resize(slots.len(), 0.0);
                }
                Some((i, by_layer)) => {
                    let (places, seen) =
                        self.at_levels((i, step, by_layer), search, overlay, l, &mut x, &mut scratch)?;
                    self.slots_of(i, &spec, l, by_layer, places, &mut slots, &mut levels, &mut entries, &mut common);
                    let of = |e: &Entry| match &e.meaning {
                        Meaning::Places(places) => seen.get(&places[0]).copied().unwrap_or(0.0),
                        Meaning::Part(_) | Meaning::Sizes(_) => 0.0,
                    };
                    looks.extend(entries[looks.len()..].iter().map(of));
                }
            }
            let block = Block::load(overlay, l)?;
            self.through(&spec, &block, &mut x, &mut NoTap, true)?;
            release_layer(overlay, l);
            self.progress.step(l as u64 + 1, &format!("layer {l}"));
        }
        let trials = Trials::open(self.options.out, self.options.resume, self.identity, &step.name, search.trials())
            .map_err(self.scratch_error())?;
        let bytes_on_disk = scratch.bytes();
        self.progress.phase(&format!("{}: trials", step.name), search.trials() as u64);
        let progress = &mut self.progress;
        let mut tell = |n: usize, o: &Outcome| progress.step(n as u64, &format!("loss {:.4}, KL {:.4}", o.loss, o.kl));
        let mut lab = Database {
            overlay,
            sequences: &self.sequences,
            slots,
            levels,
            entries,
            common,
            scratch: Mutex::new(scratch),
            first,
            last: x,
            trials,
            tell: &mut tell,
            looks,
            names,
            notes: String::new(),
            rest_bytes: beside(&overlay.spec),
        };
        let chosen = search.search(&mut lab).map_err(fail)?;
        let spent = lab.trials.spent();
        let told: Vec<String> = chosen.iter().enumerate().map(|(s, &level)| lab.name(s, level)).collect();
        let (entries, notes, scratch) = (lab.entries, lab.notes, lab.scratch);
        let mut scratch = scratch.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut histogram: BTreeMap<String, usize> = BTreeMap::new();
        let mut spec = overlay.spec.clone();
        for (s, (entry, &level)) in entries.iter().zip(&chosen).enumerate() {
            *histogram.entry(told[s].clone()).or_default() += 1;
            match (&entry.meaning, varied) {
                (Meaning::Places(places), Some((i, _))) => {
                    let of = self.chosen.0.entry(i).or_default();
                    places.iter().for_each(|p| {
                        of.insert(*p, level);
                    });
                }
                (Meaning::Part(Role::O), _) if level == 0 => spec.layers[entry.layer].attn = None,
                (Meaning::Part(_), _) if level == 0 => spec.layers[entry.layer].ffn = None,
                (Meaning::Sizes(sizes), _) => {
                    sizes[level].describe(&mut spec.layers[entry.layer]);
                    self.take_size(overlay, &sizes[level], &entry.kept[level], &mut scratch)?;
                }
                _ => {}
            }
        }
        overlay.spec = spec;
        let what = match &varies {
            Varied::Parts => "parts (1 there, 0 gone)".to_owned(),
            Varied::Sizes => "sizes (1 whole, 0 gone)".to_owned(),
            Varied::Key { step, key, .. } => format!("{step}.{key}"),
        };
        let shown: Vec<String> = histogram.iter().map(|(v, n)| format!("{v} at {n}")).collect();
        let levels = match bytes_on_disk {
            0 => String::new(),
            n => format!("; levels of {} calibrated on the source", lacuna_base::units::show_bytes(n)),
        };
        let (n, shown) = (entries.len(), shown.join(", "));
        Ok(format!("chose {what} for {n} places: {shown} ({spent} trials{levels}){notes}"))
    }

    /// One layer's matrices at each level of step `i`: by level, each place's tensor with its bytes and its relative
    /// error. And what the search `by` saw of each place's slot.
    fn at_levels(
        &mut self,
        (i, by, by_layer): (usize, &RecipeStep, bool),
        search: &dyn Searching,
        overlay: &Overlay<'_>,
        layer: usize,
        x: &mut Activations,
        scratch: &mut Scratch,
    ) -> Result<(AllLevels, HashMap<Place, f64>), CompressError> {
        let recipe = self.recipe;
        let places = overlay.spec.layer_places(layer);
        let mut wanted = asks(recipe, &self.chosen, &overlay.spec, layer);
        for variant in &recipe.steps[i].variants {
            for p in places.iter().filter(|p| p.part == Part::Weight) {
                let Some(local) = variant.local(p) else { continue };
                let before = locals_of(recipe, &self.chosen, &overlay.spec, p);
                let mixes = before.iter().find(|(at, ..)| *at == i).and_then(|(.., mixes)| *mixes);
                wanted.extend(gathered_for(local, p, mixes).map(|ask| (Site::Matrix(*p), ask)));
            }
        }
        let aims = |p: &&Place| p.part == Part::Weight && local_of(&recipe.steps[i], i, &self.chosen, p).is_some();
        let aimed: Vec<Place> = places.iter().filter(aims).copied().collect();
        for p in &aimed {
            wanted.extend(search.needs().iter().map(|ask| (Site::Matrix(*p), *ask)));
        }
        let mut gather = Gather::new(&overlay.spec, wanted);
        if gather.is_needed() {
            for p in &places {
                finite(p, &*need(overlay, p)?, SOURCE)?;
            }
            let block = Block::load(overlay, layer)?;
            self.through(&overlay.spec, &block, x, &mut gather, false)?;
        }
        let statistics = self.with_gradients(gather.finish(), &places)?;
        let mut seen = HashMap::new();
        let work = Layer { weights: overlay, statistics: &statistics, vocabulary: None };
        for slot in if by_layer { aimed.chunks(aimed.len().max(1)) } else { aimed.chunks(1) } {
            let looked = search.look(slot, &work).map_err(|e| at_step(by, slot[0].to_string(), e))?;
            seen.extend(slot.iter().map(|p| (*p, looked)));
        }
        let mut sources = HashMap::new();
        for p in &places {
            sources.insert(*p, need(overlay, p)?);
        }
        let mut out = Vec::new();
        for v in 0..recipe.steps[i].variants.len() {
            let all = places.iter().map(|p| (*p, v)).collect();
            self.chosen.0.insert(i, all);
            let made = self.local_steps(&overlay.spec, &places, &sources, &statistics)?;
            let mut level = Vec::new();
            for (place, stored) in made {
                let stats = statistics.of(&overlay.spec, Site::Matrix(place));
                let change = change(&sources[&place], &stored, &stats);
                let (error, lost) = change.map_or((0.0, 0.0), |c| (c.relative(), c.lost));
                let number = scratch.put(&stored).map_err(self.scratch_error())?;
                level.push(AtLevel { place, number, bytes: stored.bytes(), error, lost });
            }
            out.push(level);
        }
        self.chosen.0.remove(&i);
        Ok((out, seen))
    }

    /// Slots of a layer from its matrices at each level.
    #[allow(clippy::too_many_arguments)]
    fn slots_of(
        &self,
        i: usize,
        spec: &Spec,
        layer: usize,
        by_layer: bool,
        at: Vec<Vec<AtLevel>>,
        slots: &mut Vec<Slot>,
        levels: &mut Vec<Vec<Level>>,
        entries: &mut Vec<Entry>,
        common: &mut Vec<(Place, usize)>,
    ) {
        let step = &self.recipe.steps[i];
        let Some(base) = at.first() else { return };
        let aims = |p: &Place| local_of(step, i, &self.chosen, p).is_some();
        common.extend(base.iter().filter(|t| !aims(&t.place)).map(|t| (t.place, t.number)));
        let aimed: Vec<Place> = base.iter().map(|t| t.place).filter(|p| aims(p)).collect();
        let groups: Vec<Vec<Place>> = match by_layer {
            true if aimed.is_empty() => Vec::new(),
            true => vec![aimed],
            false => aimed.into_iter().map(|p| vec![p]).collect(),
        };
        let values = step.variant_values();
        for places in groups {
            let weights = |p: &Place| spec.shape(p).map_or(0, |(r, c)| r as u64 * c as u64);
            let parameters: u64 = places.iter().map(weights).sum();
            let mut all = Vec::new();
            let mut kept = Vec::new();
            for (v, level) in at.iter().enumerate() {
                let mine: Vec<&AtLevel> = level.iter().filter(|t| places.contains(&t.place)).collect();
                let error = mine.iter().map(|t| t.error * weights(&t.place) as f64).sum::<f64>();
                all.push(Level {
                    value: values.get(v).copied().unwrap_or(v as f64),
                    bytes: mine.iter().map(|t| t.bytes).sum(),
                    error: error / parameters.max(1) as f64,
                    lost: mine.iter().map(|t| t.lost).sum(),
                });
                kept.push(mine.iter().map(|t| (t.place, t.number)).collect());
            }
            let name = if by_layer { format!("layers.{layer}") } else { places[0].to_string() };
            let group = if by_layer { 0 } else { places[0].role as usize };
            slots.push(Slot { name, parameters, group });
            levels.push(all);
            entries.push(Entry { layer, meaning: Meaning::Places(places), kept });
        }
    }
}

/// By level, the matrices of a layer.
type AllLevels = Vec<Vec<AtLevel>>;

/// A matrix at one level.
struct AtLevel {
    place: Place,
    number: usize,
    bytes: u64,
    error: f64,
    lost: f64,
}

/// Bytes at 16 bits that a token is multiplied with outside the layers.
fn beside(spec: &Spec) -> u64 {
    let head = if spec.tied { Role::Embed } else { Role::Head };
    let ends = spec.places().into_iter().filter(|p| p.layer.is_none() && p.role == head && p.part == Part::Weight);
    ends.filter_map(|p| spec.shape(&p)).map(|(r, c)| 2 * (r * c) as u64).sum()
}

/// Whether a tensor is the attention's.
pub(crate) fn attention(role: Role) -> bool {
    use Role::*;
    matches!(role, AttnNorm | Q | K | V | O | QNorm | KNorm | AttnGate | AttnPostNorm)
}

/// The attention and the FFN of a layer as slots.
fn parts_of(
    overlay: &Overlay<'_>,
    layer: usize,
    slots: &mut Vec<Slot>,
    levels: &mut Vec<Vec<Level>>,
    entries: &mut Vec<Entry>,
) -> Result<(), CompressError> {
    let here = &overlay.spec.layers[layer];
    for (name, role, there, group) in
        [("attn", Role::O, here.attn.is_some(), 0), ("ffn", Role::Down, here.ffn.is_some(), 1)]
    {
        if !there {
            continue;
        }
        let (mut bytes, mut parameters) = (0, 0);
        // A shortcut stays: what comes behind it stands in its axes.
        let mine = |p: &Place| !p.role.is_shortcut() && !p.role.is_mixer() && attention(p.role) == (role == Role::O);
        for p in overlay.spec.layer_places(layer).into_iter().filter(mine) {
            let stored = need(overlay, &p)?;
            // Else the part would be dropped because it is broken.
            finite(&p, &stored, SOURCE)?;
            bytes += stored.bytes();
            parameters += stored.rows as u64 * stored.cols as u64;
        }
        slots.push(Slot { name: format!("layers.{layer}.{name}"), parameters, group });
        // What a part's absence costs its own outputs is not looked at.
        let level = |value, bytes, error| Level { value, bytes, error, lost: 0.0 };
        levels.push(vec![level(0.0, 0, 1.0), level(1.0, bytes, 0.0)]);
        entries.push(Entry { layer, meaning: Meaning::Part(role), kept: Vec::new() });
    }
    Ok(())
}

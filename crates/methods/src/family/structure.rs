//! `structure`: heads and FFN channels go, and the matrices get smaller.
//!
//! A head is a key and value head with the query heads that read it. At least one head and `align` channels stay in
//! every layer. Of what competes, the units of lowest score go, so many that the parameters that go with them are
//! nearest to the asked fraction of those of all targeted heads and channels (a tie: the fewer). Where units compete
//! within a layer, its heads are met from below and its channels make up for the difference, so that equal layers stay
//! equal; each loses the same fraction, or the share that the method gives it.
//!
//! Layers that `keep_first` and `keep_last` name stay whole. The fraction is of all layers: the others lose more.
//!
//! The experts of a layer keep one width: each loses channels of its own, the lowest of all experts together, the
//! second lowest together, and so on; together they score the mean over the experts that calibration reached.

use std::sync::Arc;

use lacuna_base::Mat;
use lacuna_contract::{
    Ask, Compete, Edit, Family, Finished, LayerWork, Learner, Made, Making, MethodError, ModelWide, Site, Stats, Step,
    Structure, StructureAsk, Unit, Walker,
};
use lacuna_spec::{AttnSpec, LayerSpec, Place, Role, Spec};
use serde::Deserialize;

use super::keys::{Fraction, Whole};
use super::sizes::heads_stand_alone;
use super::{plain_blocks, wrong};
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Fraction of the parameters of `parts` that go, 0 to 1.
    sparsity: Fraction,
    /// What goes: "heads", "channels".
    parts: Vec<Kind>,
    /// The channels that stay in a layer are a multiple of this, 1 to 65536: formats with groups and kernels with tiles
    /// want it.
    align: Whole<1, 65536>,
    /// Whose units compete: "layer", "model" or "standardized"; unless given, as the method says.
    scope: Option<Compete>,
    /// Layers at the start that stay whole, 0 to 4096.
    keep_first: Whole<0, 4096>,
    /// Layers at the end that stay whole, 0 to 4096.
    keep_last: Whole<0, 4096>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys {
            sparsity: Fraction(0.2),
            parts: vec![Kind::Heads, Kind::Channels],
            align: Whole(32),
            scope: None,
            keep_first: Whole(0),
            keep_last: Whole(0),
        }
    }
}

/// Kinds of units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// Key and value heads with their query heads.
    Heads,
    /// Channels of FFNs.
    Channels,
}

pub(crate) fn family() -> Family {
    Family { verb: "structure", keys: make::keys::<Keys>, make: structured }
}

fn structured(making: &Making<'_>) -> Result<Step, MethodError> {
    let (mut keys, made) = make::split::<Keys>(making)?;
    let Made::Structure(by) = made else { return Err(wrong(making, &made)) };
    keys.parts.sort_unstable();
    keys.parts.dedup();
    if keys.parts.is_empty() {
        return Err(MethodError::new("parts = []: name \"heads\", \"channels\" or both"));
    }
    let mut asks = making.method.card.needs.to_vec();
    if by.keeps_means() && !asks.contains(&Ask::InputMoments) {
        asks.push(Ask::InputMoments);
    }
    Ok(Step::Model(Box::new(Structured { keys, by: by.into(), asks })))
}

#[derive(Clone)]
struct Structured {
    keys: Keys,
    by: Arc<dyn Structure>,
    /// Of the inputs of each reader and of the layer; what backward passes give, of the writers, too.
    asks: Vec<Ask>,
}

/// Why heads of an attention cannot be cut, if they cannot.
pub(super) fn uncuttable(a: &AttnSpec) -> Option<&'static str> {
    match (a.latent.is_some(), a.sinks) {
        (true, _) => Some("latent attention, whose heads share one key"),
        (_, true) => Some("sinks, one for each head"),
        _ => None,
    }
}

/// The first layer whose heads cannot be cut, in words.
pub(super) fn first_uncuttable(spec: &Spec) -> Option<String> {
    let of = |(l, layer): (usize, &LayerSpec)| {
        let why = uncuttable(layer.attn.as_ref()?)?;
        Some(format!("layer {l} has {why}: parts = [\"channels\"] can be cut"))
    };
    spec.layers.iter().enumerate().find_map(of)
}

/// The heads or the channels of one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) layer: usize,
    pub(super) kind: Kind,
    /// How many units there are.
    pub(super) count: usize,
    /// Columns of the reader that a unit writes.
    pub(super) width: usize,
    /// Rows of k and v that belong to a unit.
    pub(super) narrow: usize,
    /// FFNs side by side, in a mixture.
    pub(super) experts: Option<usize>,
    pub(super) gated: bool,
    /// Parameters that go with a unit, of all experts together.
    pub(super) parameters: u64,
}

impl Group {
    /// Those of a layer, heads first.
    pub(super) fn of_layer(spec: &Spec, layer: usize, kinds: &[Kind]) -> Vec<Group> {
        let (described, h) = (&spec.layers[layer], spec.hidden as u64);
        let one = |kind: &Kind| match kind {
            Kind::Heads => described.attn.as_ref().filter(|a| uncuttable(a).is_none()).map(|a| {
                let (width, narrow) = (a.heads / a.kv_heads * a.head_dim, a.head_dim);
                let rows = (width + 2 * narrow) as u64;
                let parameters = rows * (h + u64::from(a.qkv_bias)) + h * width as u64;
                Group { layer, kind: *kind, count: a.kv_heads, width, narrow, experts: None, gated: false, parameters }
            }),
            Kind::Channels => described.ffn.as_ref().map(|f| {
                let writers = 1 + u64::from(f.gated);
                let parameters = writers * (h + u64::from(f.bias)) + h;
                let experts = f.experts.map(|e| e.count);
                Group {
                    layer,
                    kind: *kind,
                    count: f.width,
                    width: 1,
                    narrow: 1,
                    experts,
                    gated: f.gated,
                    parameters: parameters * experts.unwrap_or(1) as u64,
                }
            }),
        };
        kinds.iter().filter_map(one).collect()
    }

    fn total(&self) -> u64 {
        self.count as u64 * self.parameters
    }

    /// Units that go together, those of lowest score first; what is left over always stays.
    fn bundles(&self, align: usize) -> Vec<usize> {
        let (size, stay) = match self.kind {
            Kind::Heads => (1, 1),
            Kind::Channels => (align, align),
        };
        if self.count <= stay {
            return Vec::new();
        }
        let odd = self.count % size;
        let even = vec![size; (self.count - odd) / size - 1];
        if odd > 0 { [vec![odd], even].concat() } else { even }
    }

    fn place(&self, role: Role, expert: usize) -> Place {
        match self.experts {
            Some(_) => Place::expert(self.layer, role, expert),
            None => Place::layer(self.layer, role),
        }
    }

    pub(super) fn readers(&self) -> Vec<Place> {
        let role = if self.kind == Kind::Heads { Role::O } else { Role::Down };
        (0..self.experts.unwrap_or(1)).map(|e| self.place(role, e)).collect()
    }

    /// The matrices that write what one reader reads, with the rows of a unit.
    pub(super) fn writers(&self, expert: usize) -> Vec<(Place, usize)> {
        match (self.kind, self.gated) {
            (Kind::Heads, _) => [(Role::Q, self.width), (Role::K, self.narrow), (Role::V, self.narrow)]
                .map(|(role, rows)| (self.place(role, expert), rows))
                .to_vec(),
            (_, true) => [Role::Gate, Role::Up].map(|role| (self.place(role, expert), 1)).to_vec(),
            (_, false) => vec![(self.place(Role::Up, expert), 1)],
        }
    }
}

impl Structured {
    /// Of a layer; none where it stays whole.
    fn of_layer(&self, spec: &Spec, layer: usize) -> Vec<Group> {
        let (first, last) = (self.keys.keep_first.0, self.keys.keep_last.0);
        let cut = layer >= first && layer + last < spec.layers.len();
        if cut { Group::of_layer(spec, layer, &self.keys.parts) } else { Vec::new() }
    }

    fn groups(&self, spec: &Spec) -> Vec<Group> {
        (0..spec.layers.len()).flat_map(|l| self.of_layer(spec, l)).collect()
    }

    /// Parameters of the parts in all layers, those that stay whole among them.
    fn total(&self, spec: &Spec) -> u64 {
        (0..spec.layers.len()).flat_map(|l| Group::of_layer(spec, l, &self.keys.parts)).map(|g| g.total()).sum()
    }

    /// Statistics of the readers' inputs, or of their weights.
    fn of_readers(&self) -> impl Iterator<Item = Ask> {
        self.asks.iter().copied().filter(|ask| !ask.is_of_layer())
    }
}

impl ModelWide for Structured {
    fn needs(&self, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
        let (groups, mut out) = (self.of_layer(spec, layer), Vec::new());
        if !groups.is_empty() {
            out.extend(self.asks.iter().filter(|ask| ask.is_of_layer()).map(|ask| (Site::Layer(layer), *ask)));
        }
        for group in groups {
            for (expert, reader) in group.readers().into_iter().enumerate() {
                out.extend(self.of_readers().map(|ask| (Site::Matrix(reader), ask)));
                for (writer, _) in group.writers(expert) {
                    let back = self.asks.iter().filter(|ask| ask.is_gradient());
                    out.extend(back.map(|ask| (Site::Matrix(writer), *ask)));
                }
            }
        }
        out
    }

    fn check(&self, spec: &Spec) -> Result<(), MethodError> {
        plain_blocks(spec)?;
        if self.keys.parts.contains(&Kind::Heads) {
            heads_stand_alone(spec)?;
        }
        let (sparsity, align, groups) = (self.keys.sparsity.0, self.keys.align.0, self.groups(spec));
        let total = self.total(spec);
        if let Some(what) = first_uncuttable(spec).filter(|_| self.keys.parts.contains(&Kind::Heads)) {
            return Err(MethodError::new(what));
        }
        if total == 0 {
            return Err(MethodError::new(format!("no layer has {}", words(&self.keys.parts))));
        }
        if groups.is_empty() {
            return Err(MethodError::new(format!(
                "keep_first = {} and keep_last = {} of {} layers leave none with {} to cut",
                self.keys.keep_first.0,
                self.keys.keep_last.0,
                spec.layers.len(),
                words(&self.keys.parts)
            )));
        }
        if self.asks.iter().any(|ask| ask.is_of_layer())
            && let Some(place) = spec.first_shortcut()
        {
            return Err(MethodError::new(format!(
                "{place} turns the residual stream: what goes into a block cannot be compared with what comes out"
            )));
        }
        let free: u64 = groups.iter().map(|g| g.parameters * g.bundles(align).iter().sum::<usize>() as u64).sum();
        if sparsity * total as f64 > free as f64 {
            // Rounded down, so that the number printed is one that works.
            let most = (free as f64 / total as f64 * 1e3).floor() / 1e3;
            return Err(MethodError::new(format!(
                "sparsity = {sparsity}: at most {most} of the parameters of {} can go, since a head and {align} \
                 channels stay in each layer that is cut; align = {align} can be less",
                words(&self.keys.parts)
            )));
        }
        Ok(())
    }

    fn reshapes(&self) -> bool {
        true
    }

    fn begin(&self, spec: &Spec) -> Result<Box<dyn Walker>, MethodError> {
        let cut: u64 = self.groups(spec).iter().map(Group::total).sum();
        // `check` has seen that it is less than 1.
        let rate = self.keys.sparsity.0 * (self.total(spec) as f64 / cut.max(1) as f64);
        let learner = self.by.learner();
        let learning = learner.is_some();
        let (step, total) = (self.clone(), self.total(spec));
        Ok(Box::new(Walk { step, total, rate, seen: Vec::new(), looked: Vec::new(), learner, learning }))
    }
}

fn words(kinds: &[Kind]) -> &'static str {
    match kinds {
        [Kind::Heads] => "heads",
        [Kind::Channels] => "channels",
        _ => "heads and channels",
    }
}

struct Walk {
    step: Structured,
    /// Parameters of the parts in all layers.
    total: u64,
    /// The fraction that goes of the layers that are cut.
    rate: f64,
    seen: Vec<Seen>,
    /// What the method saw of each layer that is cut.
    looked: Vec<f64>,
    /// Of a method that learns.
    learner: Option<Box<dyn Learner>>,
    /// Whether this walk is one to learn from, and no unit is scored yet.
    learning: bool,
}

/// A group whose units are scored.
struct Seen {
    group: Group,
    /// One for each reader.
    sorted: Vec<Sorted>,
}

/// The units that one reader reads.
struct Sorted {
    /// Lowest score first; of equal ones the lower number first.
    order: Vec<usize>,
    /// Absent where calibration reached no token of an expert.
    scores: Option<Vec<f64>>,
    /// Mean of each of the reader's inputs, where means are kept.
    means: Vec<f64>,
}

impl Walk {
    fn sorted(&self, group: &Group, expert: usize, place: &Place, work: &dyn LayerWork) -> Result<Sorted, MethodError> {
        let stats = work.stats(Site::Matrix(*place));
        if group.experts.is_some() && stats.tokens == 0 && self.step.of_readers().next().is_some() {
            let means = vec![0.0; group.count];
            return Ok(Sorted { order: (0..group.count).collect(), scores: None, means });
        }
        let mut scores = self.asked(group, expert, place, work, |ask| match &self.learner {
            Some(learner) => learner.score(ask),
            None => self.step.by.score(ask),
        })?;
        let count = group.count;
        if scores.len() != count {
            return Err(MethodError::new(format!("{place}: {} scores for {count} units", scores.len())));
        }
        if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
            return Err(MethodError::new(format!("{place}: the score of unit {i} is {}", scores[i])));
        }
        if self.compete() == Compete::Standardized {
            standardize(&mut scores);
        }
        let mut order: Vec<usize> = (0..group.count).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
        let means = if self.step.by.keeps_means() { stats.moments()?.0.to_vec() } else { Vec::new() };
        Ok(Sorted { order, scores: Some(scores), means })
    }

    /// What `of` makes of the units that one reader reads.
    fn asked<T>(
        &self,
        group: &Group,
        expert: usize,
        place: &Place,
        work: &dyn LayerWork,
        of: impl FnOnce(&StructureAsk<'_>) -> Result<T, MethodError>,
    ) -> Result<T, MethodError> {
        let stats = work.stats(Site::Matrix(*place));
        let reader = work.weight(place)?;
        let places: Vec<Place> = group.writers(expert).into_iter().map(|(p, _)| p).collect();
        let writers = places.iter().map(|p| work.weight(p)).collect::<Result<Vec<Mat>, _>>()?;
        let writers: Vec<_> = writers.iter().map(Mat::view).collect();
        // Their inputs are others than the reader's: what was gathered of those is nobody's business here.
        let writer_stats: Vec<Stats<'_>> =
            places.iter().map(|p| Stats { found: &[], worked: None, ..work.stats(Site::Matrix(*p)) }).collect();
        let unit = if group.kind == Kind::Heads { Unit::Head } else { Unit::Channel };
        let (layer, count, width, reader) = (group.layer, group.count, group.width, Some(reader.view()));
        let (writers, writer_stats) = (writers.as_slice(), writer_stats.as_slice());
        of(&StructureAsk { unit, layer, count, width, reader, writers, stats, writer_stats })
    }

    /// Lets the learner look at a layer.
    fn learn(&mut self, groups: &[Group], work: &dyn LayerWork) -> Result<(), MethodError> {
        let Some(mut learner) = self.learner.take() else { return Ok(()) };
        for group in groups {
            for (expert, place) in group.readers().iter().enumerate() {
                self.asked(group, expert, place, work, |ask| learner.look(ask, self.rate))?;
            }
        }
        self.learner = Some(learner);
        Ok(())
    }

    fn compete(&self) -> Compete {
        self.step.keys.scope.unwrap_or_else(|| self.step.by.compete())
    }

    /// The fraction that goes of each layer that is cut, where units compete in their layer.
    fn shares(&self) -> Result<Vec<f64>, MethodError> {
        let shares = self.step.by.shares(&self.looked, self.rate)?;
        if shares.len() != self.looked.len() {
            return Err(MethodError::new(format!("{} shares for {} layers", shares.len(), self.looked.len())));
        }
        match shares.iter().position(|s| !(0.0..=1.0).contains(s)) {
            Some(i) => Err(MethodError::new(format!("the share of layer {i} is {}, not from 0 to 1", shares[i]))),
            None => Ok(shares),
        }
    }

    /// How many units of each group go.
    fn choose(&self) -> Result<Vec<usize>, MethodError> {
        let align = self.step.keys.align.0;
        let total = |groups: &[Seen]| groups.iter().map(|s| s.group.total() as f64).sum::<f64>();
        let mut gone = vec![0; self.seen.len()];
        if self.compete() != Compete::Layer {
            let mut all: Vec<Bundle> = self.seen.iter().enumerate().flat_map(|(i, s)| s.bundles(i, align)).collect();
            // Stable: the bundles of a group stay in their order.
            all.sort_by(|a, b| a.score.total_cmp(&b.score));
            let n = nearest(&all, self.step.keys.sparsity.0 * self.total as f64);
            all[..n].iter().for_each(|b| gone[b.group] += b.units);
            return Ok(gone);
        }
        let mut first = 0;
        for (layer, share) in self.seen.chunk_by(|a, b| a.group.layer == b.group.layer).zip(self.shares()?) {
            let mut left = share * total(layer);
            for (i, one) in layer.iter().enumerate() {
                let bundles = one.bundles(first + i, align);
                let n = match i + 1 == layer.len() {
                    true => nearest(&bundles, left),
                    false => within(&bundles, share * one.group.total() as f64),
                };
                gone[first + i] = bundles[..n].iter().map(|b| b.units).sum();
                left -= bundles[..n].iter().map(|b| b.parameters as f64).sum::<f64>();
            }
            first += layer.len();
        }
        Ok(gone)
    }
}

/// Units of one group that go together or not at all.
struct Bundle {
    group: usize,
    units: usize,
    score: f64,
    parameters: u64,
}

impl Seen {
    fn bundles(&self, group: usize, align: usize) -> Vec<Bundle> {
        let (mut from, mut before, mut out) = (0, f64::NEG_INFINITY, Vec::new());
        for units in self.group.bundles(align) {
            let mean = |s: &Sorted, scores: &[f64]| {
                s.order[from..from + units].iter().map(|&u| scores[u]).sum::<f64>() / units as f64
            };
            let reached: Vec<f64> =
                self.sorted.iter().filter_map(|s| s.scores.as_deref().map(|scores| mean(s, scores))).collect();
            // Sorted scores rise; their means must not fall by a rounding.
            let score = (reached.iter().sum::<f64>() / reached.len().max(1) as f64).max(before);
            out.push(Bundle { group, units, score, parameters: units as u64 * self.group.parameters });
            (from, before) = (from + units, score);
        }
        out
    }
}

/// The number of bundles, from the first, whose parameters are nearest to `asked`; of two as near the fewer.
fn nearest(bundles: &[Bundle], asked: f64) -> usize {
    let (mut best, mut off, mut sum) = (0, asked.abs(), 0u64);
    for (i, b) in bundles.iter().enumerate() {
        sum += b.parameters;
        let here = (sum as f64 - asked).abs();
        if here < off {
            (best, off) = (i + 1, here);
        }
    }
    best
}

/// The largest number of bundles, from the first, with no more parameters than `asked`.
fn within(bundles: &[Bundle], asked: f64) -> usize {
    let mut sum = 0;
    bundles
        .iter()
        .take_while(|b| {
            sum += b.parameters;
            sum as f64 <= asked
        })
        .count()
}

/// Less the mean, over the standard deviation; all zeros where they are alike.
fn standardize(scores: &mut [f64]) {
    let n = scores.len().max(1) as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let deviation = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt();
    scores.iter_mut().for_each(|s| *s = if deviation > 0.0 { (*s - mean) / deviation } else { 0.0 });
}

/// `n` indices for each unit.
pub(super) fn spread(units: &[usize], n: usize) -> Vec<usize> {
    units.iter().flat_map(|u| u * n..(u + 1) * n).collect()
}

impl Walker for Walk {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        let groups = self.step.of_layer(work.spec(), layer);
        if self.learning {
            return self.learn(&groups, work).map(|()| Vec::new());
        }
        if !groups.is_empty() && self.compete() == Compete::Layer {
            self.looked.push(self.step.by.look(&work.stats(Site::Layer(layer)))?);
        }
        for group in groups {
            let readers = group.readers();
            let sorted = readers.iter().enumerate().map(|(e, place)| self.sorted(&group, e, place, work));
            let sorted = sorted.collect::<Result<_, _>>()?;
            self.seen.push(Seen { group, sorted });
        }
        Ok(Vec::new())
    }

    fn finish(mut self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        if let (true, Some(learner)) = (self.learning, &mut self.learner) {
            self.learning = learner.again();
            return Ok(Finished { again: Some(self), ..Finished::default() });
        }
        let gone = self.choose()?;
        let (mut edits, mut spec) = (Vec::new(), work.spec().clone());
        for (seen, &n) in self.seen.iter().zip(&gone).filter(|(_, n)| **n > 0) {
            self.cut(seen, n, work, &mut edits)?;
            let (left, layer) = (seen.group.count - n, &mut spec.layers[seen.group.layer]);
            let means = self.step.by.keeps_means();
            if let (Kind::Heads, Some(a)) = (seen.group.kind, &mut layer.attn) {
                (a.heads, a.kv_heads, a.o_bias) = (a.heads / a.kv_heads * left, left, a.o_bias || means);
            }
            if let (Kind::Channels, Some(f)) = (seen.group.kind, &mut layer.ffn) {
                (f.width, f.down_bias) = (left, f.down_bias || (means && !f.bias));
            }
        }
        let note = self.note(&gone);
        if !edits.is_empty() {
            edits.push(Edit::Spec(Box::new(spec)));
        }
        Ok(Finished { edits, note, again: None })
    }
}

impl Walk {
    /// The edits by which `n` units of a group go.
    fn cut(&self, seen: &Seen, n: usize, work: &dyn LayerWork, edits: &mut Vec<Edit>) -> Result<(), MethodError> {
        let (group, spec) = (&seen.group, work.spec());
        for (e, (reader, sorted)) in group.readers().into_iter().zip(&seen.sorted).enumerate() {
            let (removed, kept) = sorted.order.split_at(n);
            let mut kept = kept.to_vec();
            kept.sort_unstable();
            for (place, rows) in group.writers(e) {
                let stay = spread(&kept, rows);
                if spec.shape(&place.bias()).is_some() {
                    edits.push(Edit::Keep { place: place.bias(), rows: None, cols: Some(stay.clone()) });
                }
                edits.push(Edit::Keep { place, rows: Some(stay), cols: None });
            }
            edits.push(Edit::Keep { place: reader, rows: None, cols: Some(spread(&kept, group.width)) });
            if self.step.by.keeps_means() {
                let w = work.weight(&reader)?;
                let old = match spec.shape(&reader.bias()) {
                    Some(_) => work.weight(&reader.bias())?.into_vec(),
                    None => vec![0.0; w.rows()],
                };
                edits.push(Edit::Vector(
                    reader.bias(),
                    with_means(&w, old, &spread(removed, group.width), &sorted.means)?,
                ));
            }
        }
        Ok(())
    }

    fn note(&self, gone: &[usize]) -> String {
        let mut parameters = 0;
        let mut told = Vec::new();
        for kind in &self.step.keys.parts {
            let (mut n, mut of, mut left) = (0, 0, Vec::new());
            for (seen, gone) in self.seen.iter().zip(gone).filter(|(s, _)| s.group.kind == *kind) {
                n += gone;
                of += seen.group.count;
                left.push(seen.group.count - gone);
                parameters += *gone as u64 * seen.group.parameters;
            }
            told.push(format!(
                "{n} of {of} {} are gone, left in each layer {left:?}",
                words(std::slice::from_ref(kind))
            ));
        }
        let unreached = self.seen.iter().flat_map(|s| &s.sorted).filter(|s| s.scores.is_none()).count();
        if unreached > 0 {
            told.push(format!("{unreached} experts saw no calibration token and lost their first channels"));
        }
        let (total, met) = (self.total, parameters as f64 / (self.total as f64).max(1.0));
        format!("{}; {met:.4} of {total} parameters, asked were {}", told.join("; "), self.step.keys.sparsity.0)
    }
}

/// `old` and what the removed columns of `w` write on average.
fn with_means(w: &Mat, old: Vec<f32>, removed: &[usize], means: &[f64]) -> Result<Vec<f32>, MethodError> {
    if means.len() != w.cols() {
        return Err(MethodError::new(format!("means of {} inputs for a matrix of {}", means.len(), w.cols())));
    }
    let add = |(r, b): (usize, f32)| {
        let row = w.row(r);
        (f64::from(b) + removed.iter().map(|&c| f64::from(row[c]) * means[c]).sum::<f64>()) as f32
    };
    let new: Vec<f32> = old.into_iter().enumerate().map(add).collect();
    match new.iter().position(|x| !x.is_finite()) {
        Some(i) => Err(MethodError::new(format!("the new bias at {i} is {}", new[i]))),
        None => Ok(new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::MatRef;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;
    use lacuna_spec::Part;
    use serde_json::json;
    use std::collections::HashMap;

    /// A unit's score is the sum of squares of its columns.
    struct Squares(Compete, bool);

    impl Structure for Squares {
        fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
            let w = ask.reader.expect("a reader");
            assert_eq!(
                (w.cols(), ask.writers.len()),
                (ask.count * ask.width, 3 - usize::from(ask.unit == Unit::Channel))
            );
            Ok((0..ask.count).map(|u| squares(w, u * ask.width..(u + 1) * ask.width)).collect())
        }
        fn compete(&self) -> Compete {
            self.0
        }
        fn keeps_means(&self) -> bool {
            self.1
        }
    }

    fn squares(w: MatRef<'_>, columns: std::ops::Range<usize>) -> f64 {
        columns.map(|c| (0..w.rows()).map(|r| f64::from(w.at(r, c)).powi(2)).sum::<f64>()).sum()
    }

    /// A network in memory, whose inputs have a mean each.
    struct Network {
        spec: Spec,
        weights: HashMap<Place, Mat>,
        found: HashMap<Site, Vec<(Ask, Gathered)>>,
    }

    impl Network {
        fn new(name: &str) -> Network {
            let spec = lacuna_arch::from_config(&json!({
                "model_type": name, "vocab_size": 20, "hidden_size": 8, "intermediate_size": 22, "num_hidden_layers": 3,
                "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 16, "head_dim": 2,
                "num_local_experts": 3, "num_experts_per_tok": 2,
            }));
            let spec = spec.expect("a network");
            let mut out = Network { weights: HashMap::new(), found: HashMap::new(), spec };
            for (i, place) in out.spec.places().into_iter().enumerate() {
                let (rows, cols) = out.spec.shape(&place).expect("a shape");
                out.weights.insert(place, random(rows, cols, i as u64));
                let mean: Vec<f64> = (0..cols).map(|c| 0.25 * c as f64 - 1.0).collect();
                // The last expert of the first layer is never reached.
                if place.part == Part::Weight && (place.layer, place.expert) != (Some(0), Some(2)) {
                    let found = vec![(Ask::InputMoments, Gathered::Moments { variance: vec![1.0; cols], mean })];
                    out.found.insert(Site::Matrix(place), found);
                }
            }
            out
        }

        fn run(&self, keys: Keys, by: Squares) -> Finished {
            let step = Structured { keys, by: Arc::new(by), asks: vec![Ask::InputMoments] };
            step.check(&self.spec).expect("fits");
            let mut walk = step.begin(&self.spec).expect("begins");
            for l in 0..self.spec.layers.len() {
                assert!(walk.visit(l, self).expect("visits").is_empty());
            }
            walk.finish(self).expect("decides")
        }
    }

    impl LayerWork for Network {
        fn spec(&self) -> &Spec {
            &self.spec
        }
        fn weight(&self, place: &Place) -> Result<Mat, MethodError> {
            self.weights.get(place).cloned().ok_or_else(|| MethodError::new(format!("no {place}")))
        }
        fn stats(&self, site: Site) -> Stats<'_> {
            let found = self.found.get(&site).map_or(&[][..], Vec::as_slice);
            Stats { tokens: found.len() as u64, found, gradients: &[], sequences: 0, worked: None }
        }
        fn vocabulary(&self) -> Option<&lacuna_contract::Vocabulary> {
            None
        }
    }

    fn keys(sparsity: f64, align: usize) -> Keys {
        Keys { sparsity: Fraction(sparsity), align: Whole(align), ..Keys::default() }
    }

    fn spec_of(done: &Finished) -> &Spec {
        let spec = done.edits.iter().find_map(|e| if let Edit::Spec(s) = e { Some(s) } else { None });
        spec.expect("a new network")
    }

    fn targeted(spec: &Spec) -> u64 {
        let mine = |p: &&Place| {
            let reader = matches!(p.role, Role::O | Role::Down);
            p.role.is_linear() && p.layer.is_some() && p.role != Role::Router && !(reader && p.part == Part::Bias)
        };
        spec.places().iter().filter(mine).filter_map(|p| spec.shape(p)).map(|(r, c)| (r * c) as u64).sum()
    }

    #[test]
    fn the_asked_fraction_goes_to_the_nearest_bundle() {
        for name in ["llama", "qwen2", "mixtral"] {
            let network = Network::new(name);
            let total = targeted(&network.spec);
            let groups = Group::of_layer(&network.spec, 0, &[Kind::Heads, Kind::Channels]);
            assert_eq!(groups.iter().map(Group::total).sum::<u64>() * 3, total, "{name}: parameters of {groups:?}");
            for (sparsity, align) in [(0.0, 4), (0.1, 1), (0.2, 4), (0.33, 8), (0.5, 1), (0.6, 4)] {
                for compete in [Compete::Layer, Compete::Model, Compete::Standardized] {
                    let done = network.run(keys(sparsity, align), Squares(compete, false));
                    if sparsity == 0.0 {
                        assert!(done.edits.is_empty());
                        continue;
                    }
                    let new = spec_of(&done);
                    new.check().expect("a network");
                    let off = (total - targeted(new)) as f64 - sparsity * total as f64;
                    let most = groups.iter().map(|g| g.parameters * if g.width > 1 { 1 } else { align as u64 }).max();
                    let layers = if compete == Compete::Layer { 3.0 } else { 1.0 };
                    assert!(
                        off.abs() <= layers * most.expect("groups") as f64 / 2.0,
                        "{name} {sparsity} {align}: {off}"
                    );
                    for l in &new.layers {
                        let (a, f) = (l.attn.as_ref().expect("stays"), l.ffn.as_ref().expect("stays"));
                        assert!(a.kv_heads >= 1 && a.heads == 2 * a.kv_heads, "{name}");
                        assert!(f.width == 22 || f.width.is_multiple_of(align), "{name}: {}", f.width);
                        assert!(compete != Compete::Layer || *l == new.layers[0], "{name}: uneven layers");
                    }
                }
            }
        }
    }

    /// Straight from the definition, with single channels: nothing that went scores above anything of the model that
    /// could have gone.
    #[test]
    fn what_goes_scores_lowest() {
        let network = Network::new("llama");
        let only = Keys { parts: vec![Kind::Channels], ..keys(0.4, 1) };
        let done = network.run(only, Squares(Compete::Model, false));
        let (mut kept_scores, mut gone_scores) = (vec![], vec![]);
        for l in 0..3 {
            let place = Place::layer(l, Role::Down);
            let kept = done.edits.iter().find_map(|e| match e {
                Edit::Keep { place: p, cols: Some(cols), .. } if *p == place => Some(cols.clone()),
                _ => None,
            });
            let kept = kept.unwrap_or_else(|| (0..22).collect());
            for c in 0..22 {
                let score = squares(network.weights[&place].view(), c..c + 1);
                if kept.contains(&c) { &mut kept_scores } else { &mut gone_scores }.push(score);
            }
        }
        assert_eq!(gone_scores.len(), (0.4 * 66.0_f64).round() as usize);
        let (least, most) =
            (kept_scores.iter().copied().fold(f64::MAX, f64::min), gone_scores.iter().copied().fold(0.0, f64::max));
        assert!(least >= most, "{least} {most}");
    }

    /// At the mean input the reader's output is what it was; rows and columns belong together.
    #[test]
    fn means_stay_and_rows_match_columns() {
        for name in ["llama", "mixtral"] {
            let network = Network::new(name);
            // Within a layer, so that heads go, too.
            let done = network.run(keys(0.4, 2), Squares(Compete::Layer, true));
            let new = spec_of(&done);
            let kept = |place: Place, rows: bool| {
                done.edits.iter().find_map(|e| match e {
                    Edit::Keep { place: p, rows: r, cols: c } if *p == place => {
                        if rows {
                            r.clone()
                        } else {
                            c.clone()
                        }
                    }
                    _ => None,
                })
            };
            let mut cut = 0;
            for (place, w) in network.weights.iter().filter(|(p, _)| matches!(p.role, Role::O | Role::Down)) {
                let Some(cols) = kept(*place, false) else { continue };
                cut += 1;
                let bias = done.edits.iter().find_map(|e| match e {
                    Edit::Vector(p, v) if *p == place.bias() => Some(v),
                    _ => None,
                });
                assert_eq!(new.shape(&place.bias()), Some((1, 8)));
                let bias = bias.expect("a bias");
                let mean = |c: usize| {
                    if (place.layer, place.expert) == (Some(0), Some(2)) { 0.0 } else { 0.25 * c as f64 - 1.0 }
                };
                for r in 0..8 {
                    let sum =
                        |all: &mut dyn Iterator<Item = usize>| all.map(|c| f64::from(w[(r, c)]) * mean(c)).sum::<f64>();
                    let (before, after) =
                        (sum(&mut (0..w.cols())), sum(&mut cols.iter().copied()) + f64::from(bias[r]));
                    assert!((before - after).abs() < 1e-5, "{name} {place} {r}: {before} {after}");
                }
                let writer = if place.role == Role::O { Role::Q } else { Role::Up };
                assert_eq!(kept(Place { role: writer, ..*place }, true), Some(cols.clone()), "{name} {place}");
                if place.role == Role::O {
                    // Two query heads of two channels read one head of k and v.
                    let two: Vec<usize> =
                        cols.iter().filter(|c| *c % 4 == 0).flat_map(|c| [c / 2, c / 2 + 1]).collect();
                    assert_eq!(kept(Place { role: Role::K, ..*place }, true), Some(two.clone()));
                    assert_eq!(kept(Place { role: Role::V, ..*place }, true), Some(two));
                }
            }
            assert_eq!(cut, if name == "llama" { 6 } else { 12 }, "{name}");
            assert_eq!(done.note.contains("1 experts saw no calibration token"), name == "mixtral", "{}", done.note);
        }
    }

    /// Layer `l` loses `l` parts of six, and what backward passes give is asked of the writers, too.
    struct Rising;

    impl Structure for Rising {
        fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
            assert_eq!(ask.writer_stats.len(), ask.writers.len());
            Ok(vec![0.0; ask.count])
        }
        fn compete(&self) -> Compete {
            Compete::Layer
        }
        fn keeps_means(&self) -> bool {
            false
        }
        fn shares(&self, looked: &[f64], _: f64) -> Result<Vec<f64>, MethodError> {
            Ok((0..looked.len()).map(|l| l as f64 / 6.0).collect())
        }
    }

    #[test]
    fn each_layer_loses_its_share_and_kept_layers_nothing() {
        let network = Network::new("llama");
        let channels = Keys { parts: vec![Kind::Channels], ..keys(0.2, 1) };
        let run = |keys: Keys, by: Arc<dyn Structure>| {
            let step = Structured { keys, by, asks: vec![Ask::GradientMean, Ask::Angle(Unit::Block)] };
            step.check(&network.spec).expect("fits");
            let mut walk = step.begin(&network.spec).expect("begins");
            (0..3).for_each(|l| assert!(walk.visit(l, &network).expect("visits").is_empty()));
            let done = walk.finish(&network).expect("decides");
            let spec = spec_of(&done).clone();
            (spec.layers.iter().map(|l| l.ffn.as_ref().expect("stays").width).collect::<Vec<_>>(), step, done)
        };
        let (widths, step, _) = run(channels.clone(), Arc::new(Rising));
        assert_eq!(widths, [22, 18, 15], "0, 3.7 and 7.3 of 22 channels go");
        let asked = step.needs(&network.spec, 1);
        let of = |role| asked.contains(&(Site::Matrix(Place::layer(1, role)), Ask::GradientMean));
        assert!(of(Role::Down) && of(Role::Gate) && of(Role::Up) && !of(Role::Q));
        assert!(asked.contains(&(Site::Layer(1), Ask::Angle(Unit::Block))) && asked.len() == 4, "{asked:?}");
        // A fifth of 66 channels is 13.2, all of the last layer but 9 where the others stay whole.
        for scope in [Compete::Layer, Compete::Model] {
            let kept = Keys { keep_first: Whole(1), keep_last: Whole(1), scope: Some(scope), ..channels.clone() };
            let (widths, step, done) = run(kept, Arc::new(Squares(scope, false)));
            assert_eq!(widths, [22, 9, 22]);
            assert!(step.needs(&network.spec, 0).is_empty() && done.note.contains("0.1970 of"), "{}", done.note);
        }
        let none = Keys { keep_first: Whole(2), keep_last: Whole(1), ..channels };
        let step = Structured { keys: none, by: Arc::new(Rising), asks: Vec::new() };
        assert!(step.check(&network.spec).expect_err("refused").what.contains("keep_first = 2"));
    }

    #[test]
    fn what_cannot_go_is_refused_with_the_most_that_can() {
        let network = Network::new("llama");
        let fails = |keys: Keys, spec: &Spec| {
            let step = Structured { keys, by: Arc::new(Squares(Compete::Model, false)), asks: Vec::new() };
            step.check(spec).expect_err("refused").what
        };
        let said = fails(keys(0.99, 2), &network.spec);
        let most: f64 = said
            .split("at most ")
            .nth(1)
            .expect("a number")
            .split(' ')
            .next()
            .expect("a number")
            .parse()
            .expect("a number");
        network.run(keys(most, 2), Squares(Compete::Model, false));
        assert!(fails(keys(most + 0.001, 2), &network.spec).contains("can go"), "{said}");
        assert!(fails(keys(0.5, 32), &network.spec).contains("align = 32 can be less"));
        let mut bare = network.spec.clone();
        bare.layers.iter_mut().for_each(|l| l.ffn = None);
        assert!(fails(Keys { parts: vec![Kind::Channels], ..keys(0.1, 1) }, &bare).contains("no layer has channels"));
    }
}

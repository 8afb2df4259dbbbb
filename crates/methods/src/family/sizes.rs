//! What a search over sizes chooses from: the attention and the FFN of each layer with fewer and fewer heads and
//! channels, and the time that each takes.
//!
//! A head is a key and value head with the query heads that read it. All parts have the same shares for levels; a level
//! has the nearest number of units, one head or `align` channels at the least, until the part is gone.

use lacuna_base::Mat;
use lacuna_contract::{
    Ask, AtSize, Cut, Edit, Lab, LayerWork, MethodError, Search, Shrink, Shrinking, Site, Stats, StructureAsk, Unit,
};
use lacuna_format::Unpacked;
use lacuna_spec::{LayerSpec, Order, Place, QkNorm, Spec};
use serde::Deserialize;

use super::structure::{Group, Kind, first_uncuttable, spread};

/// Measured times of a token's parts, microseconds.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Times {
    /// Key and value heads of an attention, rising, with its time; between two numbers on a line.
    heads: Vec<(f64, f64)>,
    /// Channels of an FFN, the same.
    channels: Vec<(f64, f64)>,
    /// What no size changes: the head, sampling.
    rest: f64,
}

pub(super) struct Sizes {
    /// Who cuts, where the method that searches does not.
    pub cuts: Option<Box<dyn Search>>,
    pub align: usize,
    pub times: Option<Times>,
}

/// The value at `x` of the line through `points`.
fn between(points: &[(f64, f64)], x: f64, of: &str) -> Result<f64, MethodError> {
    let bad = |(a, b): (&(f64, f64), &(f64, f64))| a.0 >= b.0;
    if points.iter().any(|p| !(p.0 >= 0.0 && p.1 >= 0.0 && p.1 < 1e12)) || points.iter().zip(&points[1..]).any(bad) {
        return Err(MethodError::new(format!(
            "times.{of}: write pairs of rising numbers and microseconds, none negative"
        )));
    }
    let pair = points.windows(2).find(|p| p[0].0 <= x && x <= p[1].0);
    match (pair, points.iter().find(|p| p.0 == x)) {
        (_, Some(p)) => Ok(p.1),
        (Some(p), _) => Ok(p[0].1 + (p[1].1 - p[0].1) * (x - p[0].0) / (p[1].0 - p[0].0)),
        _ => Err(MethodError::new(format!("times.{of} says nothing of {x}"))),
    }
}

/// Refuses to take heads where those that stay would compute otherwise without them.
pub(super) fn heads_stand_alone(spec: &Spec) -> Result<(), MethodError> {
    for (l, a) in spec.layers.iter().enumerate().filter_map(|(l, s)| Some((l, s.attn.as_ref()?))) {
        let why = match (a.qk_norm.then_some(a.qk_norm_over), a.alibi) {
            (Some(QkNorm::Whole), _) => "one norm goes over all heads of q and of k",
            (Some(QkNorm::Heads), _) => "the norms of q and k have scales of their own for each head",
            (_, Some(_)) => "the slopes of ALiBi follow from the number of heads",
            _ => continue,
        };
        return Err(MethodError::new(format!("layer {l}: {why}: heads cannot go; parts = [\"channels\"] can")));
    }
    Ok(())
}

fn kind(part: Unit) -> Kind {
    if part == Unit::Attention { Kind::Heads } else { Kind::Channels }
}

/// The layer with so many units of a part.
fn sized(layer: &LayerSpec, kind: Kind, units: usize) -> LayerSpec {
    let mut out = layer.clone();
    match (kind, units) {
        (Kind::Heads, 0) => out.attn = None,
        (Kind::Channels, 0) => out.ffn = None,
        (Kind::Heads, n) => out.attn.iter_mut().for_each(|a| (a.heads, a.kv_heads) = (a.heads / a.kv_heads * n, n)),
        (Kind::Channels, n) => out.ffn.iter_mut().for_each(|f| f.width = n),
    }
    out
}

impl Sizes {
    fn shrink<'a>(&'a self, by: &'a dyn Search) -> Result<&'a dyn Shrink, MethodError> {
        let other = || self.cuts.as_ref().and_then(|c| c.shrinker());
        by.shrinker().or_else(other).ok_or_else(|| MethodError::new("there is no method that cuts"))
    }

    pub(super) fn needs(&self, by: &dyn Search, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
        let Ok(shrink) = self.shrink(by) else { return Vec::new() };
        let groups = Group::of_layer(spec, layer, &[Kind::Heads, Kind::Channels]);
        let readers = groups.iter().flat_map(Group::readers);
        readers.flat_map(|p| shrink.needs().iter().map(move |ask| (Site::Matrix(p), *ask))).collect()
    }

    /// Five matrices of all pairs of a reader's inputs, its weights a few times, its writers; all experts at once.
    pub(super) fn scratch_bytes(spec: &Spec) -> u64 {
        let groups = (0..spec.layers.len()).flat_map(|l| Group::of_layer(spec, l, &[Kind::Heads, Kind::Channels]));
        let one = |g: Group| {
            let n = (g.count * g.width) as u64;
            8 * n * (6 * n + 5 * spec.hidden as u64) * g.experts.unwrap_or(1) as u64
        };
        groups.map(one).max().unwrap_or(0)
    }

    /// What the budget counts of a part with `units` left: nanoseconds where times are known, else bytes at 16 bits.
    fn cost(&self, layer: usize, kind: Kind, units: usize, spec: &Spec) -> Result<u64, MethodError> {
        match &self.times {
            _ if units == 0 => Ok(0),
            Some(t) if kind == Kind::Heads => Ok((1e3 * between(&t.heads, units as f64, "heads")?).round() as u64),
            Some(t) => Ok((1e3 * between(&t.channels, units as f64, "channels")?).round() as u64),
            None => {
                let mut spec = spec.clone();
                let described = sized(&spec.layers[layer], kind, units);
                // Of this part alone: a norm that both share stays with neither.
                let mut described = described;
                if std::mem::take(&mut described.order) == Order::Shared {
                    described.attn.iter_mut().for_each(|a| a.pre_norm = false);
                }
                spec.layers[layer] = match kind {
                    Kind::Heads => LayerSpec { ffn: None, ffn_shortcut: false, attn_shortcut: false, ..described },
                    Kind::Channels => LayerSpec { attn: None, ffn_shortcut: false, attn_shortcut: false, ..described },
                };
                let experts = spec.layers[layer].ffn.as_ref().and_then(|f| f.experts);
                let share = experts.map_or(1.0, |e| e.used as f64 / e.count as f64);
                let used = |p: &Place| if p.expert.is_some() { share } else { 1.0 };
                let one = |p: Place| Some((used(&p), spec.shape(&p)?));
                let all = spec.layer_places(layer).into_iter().filter_map(one);
                Ok(all.map(|(used, (r, c))| 2.0 * used * (r * c) as f64).sum::<f64>().round() as u64)
            }
        }
    }

    /// Hands `each` a part of a layer at all sizes.
    pub(super) fn cut(
        &self,
        by: &dyn Search,
        layer: usize,
        part: Unit,
        work: &dyn LayerWork,
        each: &mut dyn FnMut(AtSize) -> Result<(), MethodError>,
    ) -> Result<(), MethodError> {
        let (shrink, spec, kind) = (self.shrink(by)?, work.spec(), kind(part));
        if kind == Kind::Heads {
            heads_stand_alone(spec)?;
        }
        if let Some(what) = first_uncuttable(spec) {
            return Err(MethodError::new(format!("{what} by a structure step, sizes of both cannot be searched")));
        }
        let Some(group) = Group::of_layer(spec, layer, &[kind]).pop() else { return Ok(()) };
        let step = if kind == Kind::Heads { 1 } else { self.align };
        let units = |share: f64| match share {
            s if s <= 0.0 => 0,
            s if s >= 1.0 => group.count,
            s => (((s * group.count as f64 / step as f64).round() as usize).max(1) * step).min(group.count),
        };
        let mut sizes: Vec<(usize, Vec<f64>)> = Vec::new();
        for share in shrink.shares() {
            match sizes.last_mut().filter(|s| s.0 == units(share)) {
                Some(last) => last.1.push(share),
                None => sizes.push((units(share), vec![share])),
            }
        }
        if sizes.first().is_none_or(|whole| whole.0 != group.count) {
            return Err(MethodError::new("the sizes do not begin with the whole"));
        }
        let readers = group.readers();
        let begun = readers.iter().enumerate().map(|(e, place)| begin(shrink, &group, e, place, work));
        let mut parts = begun.collect::<Result<Vec<_>, MethodError>>()?;
        let tokens: f64 = parts.iter().map(|p| p.1).sum();
        for (units, shares) in sizes {
            let (mut error, mut lost, mut edits) = (0.0, 0.0, Vec::new());
            for (e, ((part, weight), place)) in parts.iter_mut().zip(&readers).enumerate() {
                if units == group.count {
                    continue;
                }
                let cut = part.cut(units)?;
                if cut.kept.len() != units {
                    return Err(MethodError::new(format!("{place}: {} units stay, not {units}", cut.kept.len())));
                }
                error += cut.error * *weight / tokens.max(1.0);
                lost += cut.lost;
                if units > 0 {
                    edit(&group, e, *place, cut, spec, &mut edits);
                }
            }
            let bytes = self.cost(layer, kind, units, spec)?;
            each(AtSize { shares, bytes, error, lost, edits, layer: sized(&spec.layers[layer], kind, units) })?;
        }
        Ok(())
    }

    /// Everything that a token takes: of all slots as they were, and beside them.
    fn whole(&self, lab: &dyn Lab) -> (u64, u64) {
        let slots = 0..lab.slots().len();
        let all = slots.filter_map(|s| lab.levels(s).iter().map(|l| l.bytes).max()).sum();
        (all, self.times.as_ref().map_or_else(|| lab.rest_bytes(), |t| (1e3 * t.rest.max(0.0)).round() as u64))
    }

    /// What all slots may take for a target.
    pub(super) fn budget(&self, lab: &dyn Lab, speedup: f64) -> Result<u64, MethodError> {
        let (slots, rest) = self.whole(lab);
        let left = (slots + rest) as f64 / speedup - rest as f64;
        if left < 0.0 {
            let most = (slots + rest) as f64 / rest as f64;
            return Err(MethodError::new(format!(
                "speedup = {speedup}: at most {:.3} is there by {}, since heads and channels are {slots} of {}",
                (most * 1e3).floor() / 1e3,
                self.by_what(),
                slots + rest
            )));
        }
        Ok(left as u64)
    }

    /// How much faster a token is when the slots take `bytes`.
    pub(super) fn speedup(&self, lab: &dyn Lab, bytes: u64) -> f64 {
        let (slots, rest) = self.whole(lab);
        (slots + rest) as f64 / ((bytes + rest) as f64).max(1.0)
    }

    pub(super) fn by_what(&self) -> &'static str {
        if self.times.is_some() { "the times given" } else { "the bytes it reads" }
    }
}

/// The units that one reader reads, all of them yet, with the tokens that it saw.
fn begin(
    shrink: &dyn Shrink,
    group: &Group,
    expert: usize,
    place: &Place,
    work: &dyn LayerWork,
) -> Result<(Box<dyn Shrinking>, f64), MethodError> {
    let (reader, stats) = (work.weight(place)?, work.stats(Site::Matrix(*place)));
    if group.experts.is_some() && stats.tokens == 0 {
        return Ok((Box::new(Unreached(reader)), 0.0));
    }
    let writers = group.writers(expert).iter().map(|(p, _)| work.weight(p)).collect::<Result<Vec<Mat>, _>>()?;
    let writers: Vec<_> = writers.iter().map(Mat::view).collect();
    let none = vec![Stats::default(); writers.len()];
    let unit = if group.kind == Kind::Heads { Unit::Head } else { Unit::Channel };
    let (layer, count, width, reader) = (group.layer, group.count, group.width, Some(reader.view()));
    let (writers, writer_stats) = (writers.as_slice(), none.as_slice());
    let ask = StructureAsk { unit, layer, count, width, reader, writers, stats, writer_stats };
    Ok((shrink.begin(&ask)?, stats.tokens as f64))
}

/// An expert that no calibration token reached: its first channels go, and nobody saw what that costs.
struct Unreached(Mat);

impl Shrinking for Unreached {
    fn cut(&mut self, size: usize) -> Result<Cut, MethodError> {
        let kept: Vec<usize> = (self.0.cols() - size..self.0.cols()).collect();
        let reader = Mat::from_fn(self.0.rows(), size, |r, c| self.0[(r, kept[c])]);
        Ok(Cut { kept, reader, error: 0.0, lost: 0.0 })
    }
}

/// Rows of the writers and the new reader.
fn edit(group: &Group, expert: usize, reader: Place, cut: Cut, spec: &Spec, out: &mut Vec<Edit>) {
    for (place, rows) in group.writers(expert) {
        let stay = spread(&cut.kept, rows);
        if spec.shape(&place.bias()).is_some() {
            out.push(Edit::Keep { place: place.bias(), rows: None, cols: Some(stay.clone()) });
        }
        out.push(Edit::Keep { place, rows: Some(stay), cols: None });
    }
    out.push(Edit::Matrix(reader, Unpacked::dense(cut.reader)));
}

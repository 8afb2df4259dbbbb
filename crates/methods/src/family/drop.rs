//! `drop`: whole attentions, FFNs or decoder blocks go; of the blocks that stay, neighbours may share their weights.

use lacuna_contract::{
    Ask, Card, Compete, Edit, Family, Finished, LayerWork, Made, Making, MethodError, ModelWide, Site, Step, Structure,
    StructureAsk, Unit, Walker,
};
use lacuna_spec::Spec;
use serde::Deserialize;

use super::keys::{Fraction, Whole};
use super::{plain_blocks, wrong};
use crate::make;
use std::sync::Arc;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Which parts: "block", "attention" or "ffn".
    part: Unit,
    /// How many go, 0 to 4096; unless given, as many as `fraction` says, or 1.
    count: Option<Whole<0, 4096>>,
    /// Which fraction of those there are goes, 0 to 1, rounded to the nearest number of them.
    fraction: Option<Fraction>,
    /// With blocks: so many neighbours of those that stay use the weights of the first of them, 1 to 64. The file gets
    /// smaller, time stays.
    share: Whole<1, 64>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { part: Unit::Block, count: None, fraction: None, share: Whole(1) }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "drop", keys: make::keys::<Keys>, make: drop_parts }
}

/// How many go.
#[derive(Clone, Copy)]
enum HowMany {
    Count(usize),
    Fraction(f64),
}

impl HowMany {
    /// Of so many.
    fn of(self, there: usize) -> usize {
        match self {
            HowMany::Count(n) => n,
            HowMany::Fraction(x) => (x * there as f64).round() as usize,
        }
    }
}

struct DropParts {
    part: Unit,
    many: HowMany,
    share: usize,
    by: Arc<dyn Structure>,
    card: Card,
}

fn drop_parts(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Structure(by) = made else { return Err(wrong(making, &made)) };
    if matches!(keys.part, Unit::Head | Unit::Channel) {
        return Err(MethodError::new("part: write \"block\", \"attention\" or \"ffn\""));
    }
    let share = keys.share.0;
    if share > 1 && keys.part != Unit::Block {
        return Err(MethodError::new(format!(
            "share = {share}: only whole blocks share weights; write part = \"block\""
        )));
    }
    let many = match (keys.count, keys.fraction) {
        (Some(n), Some(x)) => {
            return Err(MethodError::new(format!("count = {} and fraction = {}: give one of them", n.0, x.0)));
        }
        (Some(n), None) => HowMany::Count(n.0),
        (None, Some(x)) => HowMany::Fraction(x.0),
        (None, None) => HowMany::Count(1),
    };
    let card = making.method.card.clone();
    Ok(Step::Model(Box::new(DropParts { part: keys.part, many, share, by: by.into(), card })))
}

/// How many layers have the part.
fn there(spec: &Spec, part: Unit) -> usize {
    (0..spec.layers.len()).filter(|&l| has(spec, l, part)).count()
}

/// Keys and values that the cache holds of a position.
fn cached(spec: &Spec) -> usize {
    spec.layers
        .iter()
        .filter_map(|l| l.attn.as_ref())
        .filter(|a| a.kv_from.is_none())
        .map(|a| 2 * a.kv_heads * a.head_dim)
        .sum()
}

/// Whether a layer has the part.
fn has(spec: &Spec, layer: usize, part: Unit) -> bool {
    let l = &spec.layers[layer];
    match part {
        Unit::Attention => l.attn.is_some(),
        Unit::Ffn => l.ffn.is_some(),
        _ => l.attn.is_some() || l.ffn.is_some(),
    }
}

impl ModelWide for DropParts {
    fn needs(&self, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
        let mine = |ask: &Ask| match ask {
            Ask::Similarity(_) => Ask::Similarity(self.part),
            Ask::Angle(_) => Ask::Angle(self.part),
            other => *other,
        };
        let all = self.card.needs.iter().map(|ask| (Site::Layer(layer), mine(ask)));
        if has(spec, layer, self.part) { all.collect() } else { Vec::new() }
    }

    fn check(&self, spec: &Spec) -> Result<(), MethodError> {
        plain_blocks(spec)?;
        let there = there(spec, self.part);
        let count = self.many.of(there);
        if count > there {
            let what = format!("{count} to drop; only {there} layers have the part {:?}", self.part);
            return Err(MethodError::new(what));
        }
        let compares = self.card.needs.iter().any(|ask| ask.is_of_layer());
        match spec.first_shortcut() {
            Some(place) if compares => Err(MethodError::new(format!(
                "{place} turns the residual stream: what goes into a part cannot be compared with what comes out"
            ))),
            _ => Ok(()),
        }
    }

    fn begin(&self, spec: &Spec) -> Result<Box<dyn Walker>, MethodError> {
        let count = self.many.of(there(spec, self.part));
        Ok(Box::new(Walk { part: self.part, count, share: self.share, by: self.by.clone(), scores: Vec::new() }))
    }
}

/// Lets groups of `share` neighbours among the whole blocks use the weights of the first of them, where they are made
/// alike; says which.
fn shared(spec: &mut Spec, share: usize) -> String {
    let whole: Vec<usize> = (0..spec.layers.len()).filter(|&l| has_all(spec, l)).collect();
    let (mut groups, mut apart) = (Vec::new(), Vec::new());
    for group in whole.chunks(share) {
        let (first, rest) = (group[0], &group[1..]);
        let (alike, other): (Vec<usize>, Vec<usize>) =
            rest.iter().partition(|&&l| spec.layers[l] == spec.layers[first]);
        alike.iter().for_each(|&l| spec.layers[l].like = Some(first));
        apart.extend(other);
        if !alike.is_empty() {
            groups.push(format!("{alike:?} use those of {first}"));
        }
    }
    let mut note = format!("; layers share weights: {}", groups.join(", "));
    if !apart.is_empty() {
        note += &format!("; layers {apart:?} are made otherwise than the first of their group and keep their own");
    }
    note
}

/// Whether a layer has both parts.
fn has_all(spec: &Spec, layer: usize) -> bool {
    spec.layers[layer].attn.is_some() && spec.layers[layer].ffn.is_some()
}

struct Walk {
    part: Unit,
    count: usize,
    share: usize,
    by: Arc<dyn Structure>,
    /// Layer and score.
    scores: Vec<(usize, f64)>,
}

impl Walker for Walk {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        if !has(work.spec(), layer, self.part) {
            return Ok(Vec::new());
        }
        let stats = work.stats(Site::Layer(layer));
        let (unit, count, width, reader) = (self.part, 1, 0, None);
        let ask = StructureAsk { unit, layer, count, width, reader, writers: &[], stats, writer_stats: &[] };
        match self.by.score(&ask)?.as_slice() {
            [score] if score.is_finite() => self.scores.push((layer, *score)),
            [score] => {
                return Err(MethodError::new(format!("the score of layer {layer} is {score}, not a finite number")));
            }
            all => return Err(MethodError::new(format!("{} scores for one part of layer {layer}", all.len()))),
        }
        Ok(Vec::new())
    }

    fn finish(mut self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        if self.by.compete() == Compete::Layer {
            return Err(MethodError::new("the method compares within a layer, and whole parts compete across layers"));
        }
        self.scores.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        let mut gone: Vec<usize> = self.scores.iter().take(self.count).map(|(l, _)| *l).collect();
        gone.sort_unstable();
        let mut spec = work.spec().clone();
        for &l in &gone {
            if self.part != Unit::Ffn {
                spec.layers[l].attn = None;
            }
            if self.part != Unit::Attention {
                spec.layers[l].ffn = None;
            }
        }
        let part = match self.part {
            Unit::Attention => "the attention",
            Unit::Ffn => "the FFN",
            _ => "attention and FFN",
        };
        let mut note = format!("dropped {part} of layers {gone:?}");
        let (before, after) = (cached(work.spec()), cached(&spec));
        if after < before {
            // The cache of a run may be of 32, 16 or 8 bits: numbers are what the step decides.
            let saved = before - after;
            note += &format!(
                "; a position's keys and values are {after} numbers, not {before}: {} bytes less at 16 bits, {} at 32",
                2 * saved,
                4 * saved
            );
        }
        if self.share > 1 {
            note += &shared(&mut spec, self.share);
        }
        Ok(Finished { edits: vec![Edit::Spec(Box::new(spec))], note, again: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_spec::{AttnSpec, FfnSpec, LayerSpec};

    #[test]
    fn a_fraction_goes_to_the_nearest_number_of_parts() {
        let of = |x: f64, n: usize| HowMany::Fraction(x).of(n);
        assert_eq!((of(0.1, 30), of(0.25, 30), of(0.5, 30), of(0.0, 30), of(1.0, 30)), (3, 8, 15, 0, 30));
        assert_eq!((HowMany::Count(7).of(3), of(0.3, 1), of(0.7, 1), of(0.4, 0)), (7, 0, 1, 0));
    }

    #[test]
    fn neighbours_share_the_first_ones_weights_where_they_are_alike() {
        let layer =
            || LayerSpec { attn: Some(AttnSpec::default()), ffn: Some(FfnSpec::default()), ..Default::default() };
        let mut spec = Spec { layers: (0..6).map(|_| layer()).collect(), ..Spec::default() };
        spec.layers[1] = LayerSpec::default();
        spec.layers[5].ffn = Some(FfnSpec { width: 7, ..FfnSpec::default() });
        let note = shared(&mut spec, 2);
        let like: Vec<Option<usize>> = spec.layers.iter().map(|l| l.like).collect();
        assert_eq!(like, [None, None, Some(0), None, Some(3), None], "{note}");
        assert!(note.contains("[2] use those of 0") && note.contains("[4] use those of 3"), "{note}");
        let mut spec = Spec { layers: vec![layer(), layer(), layer()], ..Spec::default() };
        spec.layers[2].ffn = Some(FfnSpec { width: 7, ..FfnSpec::default() });
        let note = shared(&mut spec, 3);
        assert!(
            spec.layers[1].like == Some(0) && spec.layers[2].like.is_none() && note.contains("[2] are made"),
            "{note}"
        );
    }

    #[test]
    fn one_way_of_saying_how_many() {
        let made = |keys: serde_json::Value| {
            let registry = crate::registry();
            let method = registry.methods.iter().find(|m| m.card.verb == "drop").expect("a method");
            let keys = keys.as_object().expect("keys");
            drop_parts(&Making { method, keys, registry: &registry })
        };
        let said = made(serde_json::json!({ "count": 2, "fraction": 0.5 })).expect_err("refused").what;
        assert!(said.contains("count = 2") && said.contains("fraction = 0.5"), "{said}");
        assert!(made(serde_json::json!({ "fraction": 1.5 })).is_err());
        let said = made(serde_json::json!({ "part": "ffn", "share": 2 })).expect_err("refused").what;
        assert!(said.contains("share = 2"), "{said}");
        assert!(made(serde_json::json!({ "part": "attention", "fraction": 0.25 })).is_ok());
    }
}

//! `search`: a key of another step, whether parts are there at all, or how many heads and channels they have, chosen
//! place by place within a budget of bytes or of time.

use lacuna_contract::{
    Ask, Assignment, AtSize, Family, Lab, LayerWork, Made, Making, MethodError, Search, SearchAsk, Searching, Site,
    Step, Unit, Varied,
};
use lacuna_spec::{Place, Spec};
use serde::Deserialize;
use serde_json::Value;

use super::keys::{Fraction, Whole};
use super::sizes::{Sizes, Times};
use super::wrong;
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// The step whose key varies.
    step: String,
    /// The key.
    key: String,
    /// Its values, each a level.
    values: Vec<Value>,
    /// The value whose bytes, the same everywhere, are the budget.
    target: Option<Value>,
    /// What decides together: "matrix" or "layer".
    slot: Each,
    /// Instead of a key: whole attentions and FFNs are there or not, and this fraction of their bytes is the budget.
    parts: Option<Fraction>,
    /// Instead of a key: heads and channels go until a token takes this part of its time, 1 to 1000 times as fast.
    speedup: Option<f64>,
    /// With `speedup`: the method that cuts them, unless the one that searches does.
    shrink: String,
    /// With `speedup`: the channels that stay are a multiple of this, 1 to 65536.
    align: Whole<1, 65536>,
    /// With `speedup`: measured times; without them bytes read stand for time.
    times: Option<Times>,
    /// Most trials.
    trials: Whole<0, 1_000_000>,
    /// Calibration tokens of a trial at the most.
    tokens: Whole<2, { 1 << 24 }>,
    /// Where randomness comes from.
    seed: u64,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Each {
    #[default]
    Matrix,
    Layer,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys {
            step: "prune".into(),
            key: "sparsity".into(),
            values: Vec::new(),
            target: None,
            slot: Each::Matrix,
            parts: None,
            speedup: None,
            shrink: "ziplm".into(),
            align: Whole(32),
            times: None,
            trials: Whole(200),
            tokens: Whole(8192),
            seed: 0,
        }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "search", keys: make::keys::<Keys>, make: search }
}

struct Choose {
    keys: Keys,
    /// Index of the target among the values.
    target: usize,
    by: Box<dyn Search>,
    sizes: Option<Sizes>,
    needs: &'static [Ask],
}

fn search(making: &Making<'_>) -> Result<Step, MethodError> {
    let (mut keys, made) = make::split::<Keys>(making)?;
    let Made::Search(by) = made else { return Err(wrong(making, &made)) };
    let (mut target, mut sizes) = (0, None);
    if let Some(speedup) = keys.speedup {
        if let Some(key) = ["key", "values", "target", "parts"].iter().find(|k| making.keys.contains_key(**k)) {
            return Err(MethodError::new(format!("speedup and {key} exclude each other")));
        }
        if !(1.0..=1000.0).contains(&speedup) {
            return Err(MethodError::new(format!("speedup = {speedup}; write a number from 1 to 1000")));
        }
        let named = making.registry.method(&keys.shrink).map(|m| (m.make)(Value::Null)).transpose()?;
        let cuts = match named {
            _ if by.shrinker().is_some() => None,
            Some(Made::Search(other)) if other.shrinker().is_some() => Some(other),
            _ => {
                return Err(MethodError::new(format!(
                    "shrink = \"{}\": no method that cuts is called so",
                    keys.shrink
                )));
            }
        };
        sizes = Some(Sizes { cuts, align: keys.align.0, times: keys.times.clone() });
    } else if keys.parts.is_none() {
        let Some(wanted) = keys.target.clone() else {
            return Err(MethodError::new(
                "target is missing: the value that, the same everywhere, makes the budget of bytes (for example target \
                 = 0.5)",
            ));
        };
        if keys.values.is_empty() {
            keys.values.push(wanted.clone());
        }
        let same = |v: &Value| *v == wanted || (v.as_f64().is_some() && v.as_f64() == wanted.as_f64());
        target = keys.values.iter().position(same).ok_or_else(|| {
            MethodError::new(format!("target = {wanted} is not among values = {}", Value::Array(keys.values.clone())))
        })?;
    } else if making.keys.contains_key("key") || making.keys.contains_key("values") {
        return Err(MethodError::new("parts and key exclude each other"));
    }
    Ok(Step::Search(Box::new(Choose { keys, target, by, sizes, needs: making.method.card.needs })))
}

impl Searching for Choose {
    fn varies(&self) -> Varied {
        match (self.keys.parts, &self.sizes) {
            (_, Some(_)) => Varied::Sizes,
            (Some(_), _) => Varied::Parts,
            _ => Varied::Key {
                step: self.keys.step.clone(),
                key: self.keys.key.clone(),
                values: self.keys.values.clone(),
                by_layer: self.keys.slot == Each::Layer,
            },
        }
    }

    fn trials(&self) -> usize {
        self.keys.trials.0
    }

    fn needs(&self) -> &'static [Ask] {
        self.needs
    }

    fn look(&self, places: &[Place], work: &dyn LayerWork) -> Result<f64, MethodError> {
        self.by.look(places, work)
    }

    fn sizes_need(&self, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
        self.sizes.as_ref().map_or_else(Vec::new, |s| s.needs(self.by.as_ref(), spec, layer))
    }

    fn sizes(
        &self,
        layer: usize,
        part: Unit,
        work: &dyn LayerWork,
        each: &mut dyn FnMut(AtSize) -> Result<(), MethodError>,
    ) -> Result<(), MethodError> {
        let Some(sizes) = &self.sizes else { return Ok(()) };
        super::plain_blocks(work.spec())?;
        sizes.cut(self.by.as_ref(), layer, part, work, each)
    }

    fn scratch_bytes(&self, spec: &Spec) -> u64 {
        self.sizes.as_ref().map_or(0, |_| Sizes::scratch_bytes(spec))
    }

    fn search(&self, lab: &mut dyn Lab) -> Result<Assignment, MethodError> {
        let slots = 0..lab.slots().len();
        let budget_bytes = match (self.keys.parts, &self.sizes) {
            (_, Some(sizes)) => sizes.budget(lab, self.keys.speedup.unwrap_or(1.0))?,
            (Some(Fraction(keep)), _) => {
                let all: u64 = slots.clone().filter_map(|s| lab.levels(s).iter().map(|l| l.bytes).max()).sum();
                (keep * all as f64).round() as u64
            }
            _ => slots.clone().filter_map(|s| lab.levels(s).get(self.target)).map(|l| l.bytes).sum(),
        };
        let (trials, tokens, seed) = (self.keys.trials.0, self.keys.tokens.0, self.keys.seed);
        let chosen = self.by.search(lab, &SearchAsk { budget_bytes, trials, tokens, seed })?;
        // A search must not cheat.
        if chosen.len() != slots.len() {
            return Err(MethodError::new(format!("{} levels for {} slots", chosen.len(), slots.len())));
        }
        let mut bytes = 0;
        for (s, &l) in chosen.iter().enumerate() {
            let all = lab.levels(s);
            bytes += all.get(l).ok_or_else(|| MethodError::new(format!("level {l} of {}", all.len())))?.bytes;
        }
        if bytes > budget_bytes {
            return Err(MethodError::new(format!("{bytes} bytes were chosen, above the budget of {budget_bytes}")));
        }
        if let Some(sizes) = &self.sizes {
            let (faster, asked) = (sizes.speedup(lab, bytes), self.keys.speedup.unwrap_or(1.0));
            lab.note(format!("a token {faster:.3} times as fast by {}, asked were {asked}", sizes.by_what()));
        }
        Ok(chosen)
    }
}

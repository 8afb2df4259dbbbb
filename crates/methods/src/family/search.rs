//! `search`: a key of another step, or whether parts are there at all, chosen place by place within a budget of bytes.

use lacuna_contract::{
    Ask, Assignment, Family, Lab, LayerWork, Made, Making, MethodError, Search, SearchAsk, Searching, Step, Varied,
};
use lacuna_spec::Place;
use serde::Deserialize;
use serde_json::Value;

use super::keys::{Fraction, Whole};
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
    needs: &'static [Ask],
}

fn search(making: &Making<'_>) -> Result<Step, MethodError> {
    let (mut keys, made) = make::split::<Keys>(making)?;
    let Made::Search(by) = made else { return Err(wrong(making, &made)) };
    let mut target = 0;
    if keys.parts.is_none() {
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
    Ok(Step::Search(Box::new(Choose { keys, target, by, needs: making.method.card.needs })))
}

impl Searching for Choose {
    fn varies(&self) -> Varied {
        match self.keys.parts {
            Some(_) => Varied::Parts,
            None => Varied::Key {
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

    fn search(&self, lab: &mut dyn Lab) -> Result<Assignment, MethodError> {
        let slots = 0..lab.slots().len();
        let budget_bytes = match self.keys.parts {
            Some(Fraction(keep)) => {
                let all: u64 = slots.clone().filter_map(|s| lab.levels(s).iter().map(|l| l.bytes).max()).sum();
                (keep * all as f64).round() as u64
            }
            None => slots.clone().filter_map(|s| lab.levels(s).get(self.target)).map(|l| l.bytes).sum(),
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
        Ok(chosen)
    }
}

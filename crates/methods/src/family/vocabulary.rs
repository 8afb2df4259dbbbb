//! `vocabulary`: tokens go, and with them their rows of embedding and head.

use std::sync::Arc;

use lacuna_contract::{
    Ask, Edit, Family, Finished, LayerWork, Made, Making, MethodError, ModelWide, Shortlist, ShortlistAsk, Site, Step,
    Vocabulary, Walker,
};
use lacuna_spec::{Place, Role, Spec};
use serde::Deserialize;

use super::keys::{Fraction, Whole};
use super::wrong;
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Largest fraction of the embedding's rows that stays.
    keep: Fraction,
    /// Most tokens that stay; 0: as many as `keep` allows.
    count: Whole<0, 16777216>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { keep: Fraction(1.0), count: Whole(0) }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "vocabulary", keys: make::keys::<Keys>, make: shorten }
}

#[derive(Clone)]
struct Shorten {
    keys: Keys,
    by: Arc<dyn Shortlist>,
}

fn shorten(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Shortlist(by) = made else { return Err(wrong(making, &made)) };
    Ok(Step::Model(Box::new(Shorten { keys, by: by.into() })))
}

impl Shorten {
    /// Most tokens of `rows` that may stay.
    fn most(&self, rows: usize) -> usize {
        let fraction = (self.keys.keep.0 * rows as f64).round() as usize;
        if self.keys.count.0 == 0 { fraction } else { fraction.min(self.keys.count.0) }
    }
}

impl ModelWide for Shorten {
    fn needs(&self, _: &Spec, _: usize) -> Vec<(Site, Ask)> {
        Vec::new()
    }

    fn check(&self, spec: &Spec) -> Result<(), MethodError> {
        match spec.head_bias {
            true => {
                Err(MethodError::new(format!("{}: logits have a bias, whose tokens would have to go, too", spec.arch)))
            }
            false => Ok(()),
        }
    }

    fn reads_vocabulary(&self) -> bool {
        true
    }

    fn begin(&self, _: &Spec) -> Result<Box<dyn Walker>, MethodError> {
        Ok(Box::new(self.clone()))
    }
}

/// Refuses an answer that a tokenizer could not live with.
fn check(kept: &[usize], v: &Vocabulary) -> Result<(), MethodError> {
    let n = v.counts.len();
    if kept.is_empty() || !kept.windows(2).all(|w| w[0] < w[1]) || kept.last().is_some_and(|l| *l >= n) {
        return Err(MethodError::new(format!("the tokens that stay do not rise within {n}")));
    }
    let has = |id: usize| kept.binary_search(&id).is_ok();
    if let Some(id) = (0..n).find(|&id| v.must[id] && !has(id)) {
        return Err(MethodError::new(format!("token {id} must stay, and the method leaves it out")));
    }
    match kept.iter().find(|&&id| !v.pieces[id].iter().all(|p| has(*p as usize))) {
        Some(id) => Err(MethodError::new(format!("token {id} stays without its pieces {:?}", v.pieces[*id]))),
        None => Ok(()),
    }
}

impl Walker for Shorten {
    fn visit(&mut self, _: usize, _: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        Ok(Vec::new())
    }

    fn finish(self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        let v = work.vocabulary().ok_or_else(|| MethodError::new("the model's tokens were not read"))?;
        let rows = work.spec().vocab;
        if v.counts.len() != rows {
            return Err(MethodError::new(format!("{} tokens for an embedding of {rows} rows", v.counts.len())));
        }
        let kept = self.by.shortlist(&ShortlistAsk { vocabulary: v, most: self.most(rows) })?;
        check(&kept, v)?;
        let (all, seen): (u64, u64) = (v.counts.iter().sum(), kept.iter().map(|&id| v.counts[id]).sum());
        let mut note = format!(
            "{} of {rows} tokens stay, with {:.3}% of the calibration text's {all} tokens",
            kept.len(),
            100.0 * seen as f64 / all.max(1) as f64
        );
        // Below that most tokens of any language have not come up yet.
        if all < 20 * rows as u64 && kept.len() < rows {
            note += &format!(
                "; a text of {all} tokens says little about {rows}: give more of what the model is for with \
                 --calibration"
            );
        }
        if kept.len() == rows {
            return Ok(Finished { edits: Vec::new(), note, again: None });
        }
        let mut spec = work.spec().clone();
        spec.vocab = kept.len();
        if let Some(i) = &mut spec.layer_inputs {
            if i.vocab < rows {
                return Err(MethodError::new(format!(
                    "the table of the layers' inputs has {} rows for {rows} tokens: tokens cannot go",
                    i.vocab
                )));
            }
            i.vocab = kept.len();
        }
        let (tied, inputs) = (spec.tied, spec.layer_inputs.is_some());
        let there = |r: &Role| match r {
            Role::Head => !tied,
            Role::LayerInputs => inputs,
            _ => true,
        };
        let tables = [Role::Embed, Role::Head, Role::LayerInputs].into_iter().filter(there);
        let keep = |role| Edit::Keep { place: Place::global(role), rows: Some(kept.clone()), cols: None };
        let mut edits: Vec<Edit> = tables.map(keep).collect();
        edits.push(Edit::Vocabulary(kept));
        edits.push(Edit::Spec(Box::new(spec)));
        Ok(Finished { edits, note, again: None })
    }
}

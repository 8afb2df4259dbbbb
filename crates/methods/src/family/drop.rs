//! `drop`: whole attentions, FFNs or decoder blocks go.

use lacuna_contract::{
    Ask, Card, Compete, Edit, Family, Finished, LayerWork, Made, Making, MethodError, ModelWide, Site, Step, Structure,
    StructureAsk, Unit, Walker,
};
use lacuna_spec::Spec;
use serde::Deserialize;

use super::keys::Whole;
use super::wrong;
use crate::make;
use std::sync::Arc;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Which parts: "block", "attention" or "ffn".
    part: Unit,
    /// How many go.
    count: Whole<0, 4096>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { part: Unit::Block, count: Whole(1) }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "drop", keys: make::keys::<Keys>, make: drop_parts }
}

struct DropParts {
    part: Unit,
    count: usize,
    by: Arc<dyn Structure>,
    card: Card,
}

fn drop_parts(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Structure(by) = made else { return Err(wrong(making, &made)) };
    if matches!(keys.part, Unit::Head | Unit::Channel) {
        return Err(MethodError::new("part: write \"block\", \"attention\" or \"ffn\""));
    }
    let card = making.method.card.clone();
    Ok(Step::Model(Box::new(DropParts { part: keys.part, count: keys.count.0, by: by.into(), card })))
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
            other => *other,
        };
        let all = self.card.needs.iter().map(|ask| (Site::Layer(layer), mine(ask)));
        if has(spec, layer, self.part) { all.collect() } else { Vec::new() }
    }

    fn check(&self, spec: &Spec) -> Result<(), MethodError> {
        let there = (0..spec.layers.len()).filter(|&l| has(spec, l, self.part)).count();
        if self.count > there {
            let what = format!("{} to drop; only {there} layers have the part {:?}", self.count, self.part);
            return Err(MethodError::new(what));
        }
        let compares = self.card.needs.iter().any(|ask| matches!(ask, Ask::Similarity(_)));
        match spec.first_shortcut() {
            Some(place) if compares => Err(MethodError::new(format!(
                "{place} turns the residual stream: what goes into a part cannot be compared with what comes out"
            ))),
            _ => Ok(()),
        }
    }

    fn begin(&self, _: &Spec) -> Result<Box<dyn Walker>, MethodError> {
        Ok(Box::new(Walk { part: self.part, count: self.count, by: self.by.clone(), scores: Vec::new() }))
    }
}

struct Walk {
    part: Unit,
    count: usize,
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
        let ask = StructureAsk { unit: self.part, layer, count: 1, width: 0, reader: None, writers: &[], stats };
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
        Ok(Finished {
            edits: vec![Edit::Spec(Box::new(spec))],
            note: format!("dropped {part} of layers {gone:?}"),
            again: None,
        })
    }
}

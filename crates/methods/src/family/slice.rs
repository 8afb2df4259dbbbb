//! `slice`: the residual stream gets other axes and loses some of them; every matrix around it is folded, and a plain
//! narrower model is left.
//!
//! With `Q` `[D, d]`: matrices that read the stream become `W diag(scale) Q`, matrices that write it `Qᵀ W` (their
//! biases `Qᵀ b`), embedding rows `e Q`; norms keep the constant scale `sqrt(D / d)` and `eps D / d`, since `d` numbers
//! now stand under a root that was made for `D`. A tied head is untied: it reads behind the last norm's scale, the
//! embedding does not.

use std::sync::Arc;

use lacuna_base::dense::{matmul_nn, matmul_tn};
use lacuna_base::{Mat, Mat64};
use lacuna_contract::{
    Ask, Basis, Edit, Family, Finished, LayerWork, Made, Making, MethodError, ModelWide, Site, Step, Walker,
};
use lacuna_format::Unpacked;
use lacuna_spec::{NormKind, Part, Place, Positions, Role, Spec};
use serde::Deserialize;

use super::keys::{Fraction, Whole};
use super::wrong;
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Fraction of the residual stream's width that stays.
    keep: Fraction,
    /// The width that stays is a multiple of this, where it is not the whole.
    align: Whole<1, 4096>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { keep: Fraction(0.75), align: Whole(32) }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "slice", keys: make::keys::<Keys>, make: slice }
}

#[derive(Clone)]
struct Slice {
    keep: f64,
    align: usize,
    by: Arc<dyn Basis>,
}

fn slice(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Basis(by) = made else { return Err(wrong(making, &made)) };
    Ok(Step::Model(Box::new(Slice { keep: keys.keep.0, align: keys.align.0, by: by.into() })))
}

/// The matrix of a layer that every token's FFN input meets.
fn ffn_reader(spec: &Spec, layer: usize) -> Option<Role> {
    let ffn = spec.layers[layer].ffn.as_ref()?;
    Some(match (ffn.experts, ffn.gated) {
        (Some(_), _) => Role::Router,
        (None, true) => Role::Gate,
        (None, false) => Role::Up,
    })
}

/// The norm before a matrix that reads the residual stream; `None` for one that does not.
fn norm_of(place: &Place) -> Option<Place> {
    let role = match place.role {
        Role::Q | Role::K | Role::V => Role::AttnNorm,
        Role::Gate | Role::Up | Role::Router => Role::FfnNorm,
        Role::Head => Role::FinalNorm,
        _ => return None,
    };
    Some(Place { role, expert: None, ..*place })
}

impl Slice {
    fn width(&self, hidden: usize) -> usize {
        let units = (self.keep * hidden as f64 / self.align as f64).round() as usize;
        (units * self.align).clamp(self.align.min(hidden), hidden)
    }
}

impl ModelWide for Slice {
    fn needs(&self, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
        let attention = spec.layers[layer].attn.as_ref().map(|_| Role::Q);
        let roles = attention.into_iter().chain(ffn_reader(spec, layer));
        roles.map(|role| (Site::Matrix(Place::layer(layer, role)), Ask::InputGram)).collect()
    }

    fn check(&self, spec: &Spec) -> Result<(), MethodError> {
        let no =
            |what: &str| Err(MethodError::new(format!("{}: {what}; the residual stream cannot be turned", spec.arch)));
        if spec.norm.kind != NormKind::Rms {
            return no("its norms subtract the mean (LayerNorm)");
        }
        if !matches!(spec.positions, Positions::None) {
            return no("learned positions are added to the stream");
        }
        let post = |l: &lacuna_spec::LayerSpec| {
            l.attn.as_ref().is_some_and(|a| a.post_norm) || l.ffn.as_ref().is_some_and(|f| f.post_norm)
        };
        if spec.layers.iter().any(post) {
            return no("norms stand behind attention or FFN (post-norm)");
        }
        if !spec.final_norm {
            return no("no norm stands before the head");
        }
        Ok(())
    }

    fn begin(&self, spec: &Spec) -> Result<Box<dyn Walker>, MethodError> {
        Ok(Box::new(Watch { slice: self.clone(), sum: Mat64::zeros(spec.hidden, spec.hidden), of: 0 }))
    }
}

/// A norm's scale as it multiplies.
fn scale(work: &dyn LayerWork, norm: &Place) -> Result<Vec<f32>, MethodError> {
    let offset = work.spec().norm.offset;
    Ok(work.weight(norm)?.into_vec().into_iter().map(|s| s + offset).collect())
}

/// The first walk: what the stream carries.
struct Watch {
    slice: Slice,
    /// Mean outer products of normalised signals, summed over the places seen.
    sum: Mat64,
    of: u64,
}

impl Walker for Watch {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        for (site, _) in self.slice.needs(work.spec(), layer) {
            let Site::Matrix(place) = site else { continue };
            let Some(norm) = norm_of(&place) else { continue };
            let gram = make::gram(&work.stats(site), work.spec().hidden)?.mean();
            // The scale goes into the matrices: the basis is that of what comes before it. What it mutes says nothing.
            let inverse: Vec<f64> =
                scale(work, &norm)?.iter().map(|s| if *s == 0.0 { 0.0 } else { 1.0 / f64::from(*s) }).collect();
            for r in 0..gram.rows() {
                let row = self.sum.row_mut(r);
                row.iter_mut().enumerate().for_each(|(c, v)| *v += gram[(r, c)] * inverse[r] * inverse[c]);
            }
            self.of += 1;
        }
        Ok(Vec::new())
    }

    fn finish(self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        let spec = work.spec();
        let (hidden, width) = (spec.hidden, self.slice.width(spec.hidden));
        let all: f64 = (0..hidden).map(|i| self.sum[(i, i)]).sum();
        let q = self.slice.by.basis(&self.sum, width)?;
        let kept: f64 = (0..width)
            .map(|k| {
                (0..hidden)
                    .map(|r| q[(r, k)] * (0..hidden).map(|c| self.sum[(r, c)] * q[(c, k)]).sum::<f64>())
                    .sum::<f64>()
            })
            .sum();
        let share = 100.0 * kept / all.max(f64::MIN_POSITIVE);
        let note =
            format!("kept {width} of {hidden} axes of the residual stream, with {share:.2}% of its normalised energy");
        let fold = Fold { q: q.to_f32(), tied: spec.tied };
        Ok(Finished { edits: Vec::new(), note, again: Some(Box::new(fold)) })
    }
}

/// The second walk: every matrix around the stream.
struct Fold {
    /// `[D, d]`.
    q: Mat,
    tied: bool,
}

impl Fold {
    /// `W diag(scale) Q`, `[out, d]`.
    fn reads(&self, w: Mat, scale: &[f32]) -> Mat {
        let mut w = w;
        for r in 0..w.rows() {
            w.row_mut(r).iter_mut().zip(scale).for_each(|(v, s)| *v *= s);
        }
        matmul_nn(w.view(), self.q.view())
    }

    fn edit(&self, place: Place, work: &dyn LayerWork) -> Result<Option<Edit>, MethodError> {
        let (hidden, width) = (self.q.rows(), self.q.cols());
        let norm = matches!(place.role, Role::AttnNorm | Role::FfnNorm | Role::FinalNorm);
        Ok(match (place.part, place.role) {
            (Part::Weight, _) if norm => {
                let scale = (hidden as f64 / width as f64).sqrt() as f32 - work.spec().norm.offset;
                Some(Edit::Vector(place, vec![scale; width]))
            }
            (Part::Weight, Role::O | Role::Down) => {
                Some(Edit::Matrix(place, Unpacked::dense(matmul_tn(self.q.view(), work.weight(&place)?.view()))))
            }
            (Part::Bias, Role::O | Role::Down) => {
                Some(Edit::Vector(place, matmul_nn(work.weight(&place)?.view(), self.q.view()).into_vec()))
            }
            (Part::Weight, Role::Embed) => {
                Some(Edit::Matrix(place, Unpacked::dense(matmul_nn(work.weight(&place)?.view(), self.q.view()))))
            }
            (Part::Weight, _) => match norm_of(&place) {
                Some(norm) => {
                    let w = self.reads(work.weight(&place)?, &scale(work, &norm)?);
                    Some(Edit::Matrix(place, Unpacked::dense(w)))
                }
                None => None,
            },
            (Part::Bias, _) => None,
        })
    }
}

impl Walker for Fold {
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError> {
        let mut places = work.spec().layer_places(layer);
        let mut edits = Vec::new();
        if layer == 0 {
            places.extend(work.spec().places().into_iter().filter(|p| p.layer.is_none()));
            if self.tied {
                // The head reads behind the last norm, the embedding stands before the first: from here on they differ.
                let norm = scale(work, &Place::global(Role::FinalNorm))?;
                let w = self.reads(work.weight(&Place::global(Role::Embed))?, &norm);
                edits.push(Edit::Matrix(Place::global(Role::Head), Unpacked::dense(w)));
            }
        }
        for place in places {
            edits.extend(self.edit(place, work)?);
        }
        Ok(edits)
    }

    fn finish(self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError> {
        let (hidden, width) = (self.q.rows(), self.q.cols());
        let mut spec = work.spec().clone();
        spec.hidden = width;
        spec.norm.eps = (f64::from(spec.norm.eps) * hidden as f64 / width as f64) as f32;
        let untied =
            if std::mem::replace(&mut spec.tied, false) { "; the head is untied from the embedding" } else { "" };
        Ok(Finished { edits: vec![Edit::Spec(Box::new(spec))], note: untied.into(), again: None })
    }
}

//! Tensors turned into things that compute.

use std::sync::Arc;

use lacuna_base::{Mat, MatRef};
use lacuna_format::{Stored, Weights};
use lacuna_kernels::Activations;
use lacuna_spec::{NormKind, Place, QkNorm, Role};

use crate::ModelError;
use crate::backend::{Backend, Measure};
use crate::carried::plain_norm;
use crate::gating::{GateStore, Gated, Gating, refused};
use crate::profile::span;

/// The tensor at `place`, which the description must have, in the shape it says.
pub(crate) fn tensor(weights: &dyn Weights, place: Place) -> Result<Arc<Stored>, ModelError> {
    let missing = || ModelError::Missing { place: place.to_string() };
    let (rows, cols) = weights.spec().shape(&place).ok_or_else(missing)?;
    let stored = weights.get(&place)?.ok_or_else(missing)?;
    if (stored.rows, stored.cols) != (rows, cols) {
        return Err(ModelError::Shape {
            place: place.to_string(),
            have_rows: stored.rows,
            have_cols: stored.cols,
            rows,
            cols,
        });
    }
    Ok(stored)
}

/// A vector, decoded.
pub(crate) fn vector(weights: &dyn Weights, place: Place) -> Result<Vec<f32>, ModelError> {
    let stored = tensor(weights, place)?;
    stored.check().map_err(|e| ModelError::bad(&place, e))?;
    Ok(stored.to_mat().into_vec())
}

/// A normalisation with its constants.
pub(crate) fn norm<B: Backend>(backend: &B, weights: &dyn Weights, place: Place) -> Result<B::Norm, ModelError> {
    let spec = weights.spec();
    let mut norm = spec.norm;
    let there = |p: Place| spec.shape(&p).map(|_| vector(weights, p)).transpose();
    let (scale, bias) = (there(place)?, there(place.bias())?);
    if place.role == Role::InputsNorm {
        norm.divisor = None;
        let width = spec.layer_inputs.map_or(0, |i| i.width);
        return Ok(backend.norm_of(&place, norm, width, scale, bias));
    }
    let mut width = spec.hidden;
    let layer = place.layer.and_then(|l| spec.layers.get(l as usize)?.attn.as_ref());
    if matches!(place.role, Role::QDownNorm | Role::KvDownNorm) || place.role.is_mixer_own_norm() {
        norm.divisor = None;
        width = scale.as_ref().map_or(width, Vec::len);
    }
    if matches!(place.role, Role::QNorm | Role::KNorm) {
        norm.divisor = None;
        let missing = || ModelError::Missing { place: place.to_string() };
        let a = layer.ok_or_else(missing)?;
        width = match a.qk_norm_over {
            QkNorm::Plain => return Ok(plain_norm(backend, weights, place, a.head_dim)),
            QkNorm::Head | QkNorm::Heads => a.head_dim,
            QkNorm::Whole if place.role == Role::QNorm => a.heads * a.head_dim,
            QkNorm::Whole => a.kv_heads * a.head_dim,
        };
    }
    if let (Role::QDownNorm | Role::KvDownNorm, Some(m)) = (place.role, layer.and_then(|a| a.latent)) {
        norm.eps = m.eps;
    }
    if place.role.is_mixer_own_norm() {
        // Its scale lies whole where others lie less one, and it is an RMS norm in every network.
        (norm.offset, norm.kind) = (0.0, NormKind::Rms);
    }
    Ok(backend.norm_of(&place, norm, width, scale, bias))
}

/// A matrix with the bias after it, as it is multiplied.
fn matrix<B: Backend>(
    backend: &B,
    weights: &dyn Weights,
    place: Place,
    activations: Activations,
) -> Result<B::Matrix, ModelError> {
    let stored = tensor(weights, place)?;
    let bias = weights.spec().shape(&place.bias()).map(|_| vector(weights, place.bias())).transpose()?;
    backend.matrix(&place, &stored, bias, activations, &|| ())
}

/// What products with a matrix are called in profiles.
fn name(role: Role) -> &'static str {
    match role {
        Role::Q | Role::K | Role::V => "attn.q, k, v",
        Role::QDown | Role::KvDown => "attn.q_down, kv_down",
        Role::KUp => "attn.k_up",
        Role::VUp => "attn.v_up",
        Role::SharedGate | Role::SharedUp => "ffn.shared.gate, up",
        Role::SharedDown => "ffn.shared.down",
        Role::O => "attn.o",
        Role::AttnGate => "attn.gate",
        Role::MixerIn | Role::MixerZ => "mixer.in, z",
        Role::MixerDt | Role::MixerBeta => "mixer.dt, beta",
        Role::MixerDtDown | Role::MixerB | Role::MixerC => "mixer.dt_down, b, c",
        Role::MixerOut => "mixer.out",
        Role::Gate | Role::Up => "ffn.gate, up",
        Role::Down => "ffn.down",
        Role::InputGate | Role::InputOut => "input.gate, out",
        role if role.is_shortcut() => "shortcuts",
        _ => "other products",
    }
}

/// A matrix of the network.
pub(crate) struct Projection<B: Backend> {
    pub(crate) place: Place,
    pub(crate) measure: Measure,
    matrix: B::Matrix,
}

impl<B: Backend> Projection<B> {
    pub(crate) fn load(
        backend: &B,
        weights: &dyn Weights,
        place: Place,
        activations: Activations,
    ) -> Result<Projection<B>, ModelError> {
        let matrix = matrix(backend, weights, place, activations)?;
        Ok(Projection { place, measure: backend.measure(&matrix), matrix })
    }

    pub(crate) fn apply(&self, backend: &B, x: &B::Rows) -> B::Rows {
        let [out] = Projection::together(backend, [self], x);
        out
    }

    /// [`Projection::together`], where a gate says what rows need.
    pub(crate) fn gated<const N: usize>(
        backend: &B,
        all: [&Projection<B>; N],
        gated: Option<&Gated>,
        x: &B::Rows,
    ) -> Result<[B::Rows; N], ModelError> {
        let Some(gated) = gated else { return Ok(Projection::together(backend, all, x)) };
        let matrices: Vec<&B::Matrix> = gated.which.iter().map(|&i| &all[i].matrix).collect();
        let (some, reads) = span(name(gated.place.role), || backend.products_gated(&matrices, x, &gated.ask()))?;
        gated.gating.count(reads);
        let mut some = gated.which.iter().zip(some).peekable();
        Ok(std::array::from_fn(|i| match some.next_if(|(which, _)| **which == i) {
            Some((_, out)) => out,
            None => all[i].apply(backend, x),
        }))
    }

    /// Several projections of the same rows, in one go.
    pub(crate) fn together<const N: usize>(backend: &B, all: [&Projection<B>; N], x: &B::Rows) -> [B::Rows; N] {
        span(name(all[0].place.role), || backend.products(all.map(|p| &p.matrix), x))
    }
}

/// What a gate says of matrices that read the same rows, as far as it stands at them: they are kept so that few channels
/// cost less, where they can be.
pub(crate) fn gate<B: Backend, const N: usize>(
    backend: &B,
    weights: &dyn Weights,
    gating: Option<&Arc<Gating>>,
    all: [Option<&mut Projection<B>>; N],
) -> Result<Option<Gated>, ModelError> {
    let Some(gating) = gating else { return Ok(None) };
    let (mut which, mut dense, mut store, mut first) = (Vec::new(), Vec::new(), GateStore::default(), None);
    for (i, p) in all.into_iter().flatten().enumerate() {
        if !gating.stands_at(&p.place) {
            continue;
        }
        let stored = tensor(weights, p.place)?;
        dense.push(stored.to_mat());
        store.add(backend.keep_columns(&mut p.matrix, &stored));
        which.push(i);
        first.get_or_insert(p.place);
    }
    let Some(place) = first else { return Ok(None) };
    let views: Vec<MatRef<'_>> = dense.iter().map(Mat::view).collect();
    let norms = gating.gate.norms(&views).map_err(|e| refused(&place, &e))?;
    Ok(Some(Gated { gating: Arc::clone(gating), place, norms, which, store }))
}

/// One matrix of every expert.
pub(crate) struct Grouped<B: Backend> {
    pub(crate) places: Vec<Place>,
    /// Of each of them.
    pub(crate) measures: Vec<Measure>,
    all: B::Experts,
}

impl<B: Backend> Grouped<B> {
    pub(crate) fn load(
        backend: &B,
        weights: &dyn Weights,
        places: Vec<Place>,
        activations: Activations,
    ) -> Result<Grouped<B>, ModelError> {
        let all: Result<Vec<_>, _> = places.iter().map(|&p| matrix(backend, weights, p, activations)).collect();
        let all = all?;
        let measures = all.iter().map(|m| backend.measure(m)).collect();
        Ok(Grouped { places, measures, all: backend.experts(all) })
    }

    /// Each head's columns by its own matrix.
    pub(crate) fn by_head(&self, backend: &B, x: &B::Rows) -> B::Rows {
        let name = self.places.first().map_or("other products", |p| name(p.role));
        span(name, || backend.head_products(&self.all, x))
    }

    pub(crate) fn apply(&self, backend: &B, x: &B::Rows, routes: &B::Routes) -> B::Rows {
        let [out] = Grouped::together(backend, [self], x, routes);
        out
    }

    /// Several matrices of each expert and the rows gathered for it.
    pub(crate) fn together<const N: usize>(
        backend: &B,
        all: [&Grouped<B>; N],
        x: &B::Rows,
        routes: &B::Routes,
    ) -> [B::Rows; N] {
        let name = all[0].places.first().map_or("other products", |p| name(p.role));
        span(name, || backend.expert_products(all.map(|g| &g.all), x, routes))
    }
}

//! Tensors turned into things that compute.

use std::sync::Arc;

use lacuna_format::{Stored, Weights};
use lacuna_kernels::Activations;
use lacuna_spec::{NormKind, Place, Role};

use crate::ModelError;
use crate::backend::{Backend, Measure};
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
    let mut norm = weights.spec().norm;
    if matches!(place.role, Role::QNorm | Role::KNorm | Role::MixerOutNorm) {
        norm.divisor = None;
    }
    if place.role == Role::MixerOutNorm {
        // Its scale lies whole where others lie less one, and it is an RMS norm in every network.
        (norm.offset, norm.kind) = (0.0, NormKind::Rms);
    }
    let bias = (norm.kind == NormKind::Layer).then(|| vector(weights, place.bias())).transpose()?;
    Ok(backend.norm_of(&place, norm, vector(weights, place)?, bias))
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
        Role::O => "attn.o",
        Role::AttnGate => "attn.gate",
        Role::MixerIn | Role::MixerZ => "mixer.in, z",
        Role::MixerDt | Role::MixerBeta => "mixer.dt, beta",
        Role::MixerOut => "mixer.out",
        Role::Gate | Role::Up => "ffn.gate, up",
        Role::Down => "ffn.down",
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

    /// Several projections of the same rows, in one go.
    pub(crate) fn together<const N: usize>(backend: &B, all: [&Projection<B>; N], x: &B::Rows) -> [B::Rows; N] {
        span(name(all[0].place.role), || backend.products(all.map(|p| &p.matrix), x))
    }
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

//! Tensors turned into things that compute.

use std::sync::Arc;

use lacuna_base::{Mat, MatRef};
use lacuna_format::{Stored, Weights};
use lacuna_kernels as kernels;
use lacuna_kernels::{Activations, Linear, Packing};
use lacuna_spec::{Norm, NormKind, Place, Role};

use crate::ModelError;
use crate::lent::Lent;
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
pub(crate) struct NormWeights {
    pub(crate) place: Place,
    pub(crate) norm: Norm,
    pub(crate) scale: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl NormWeights {
    pub(crate) fn load(weights: &dyn Weights, place: Place) -> Result<NormWeights, ModelError> {
        let mut norm = weights.spec().norm;
        if matches!(place.role, Role::QNorm | Role::KNorm) {
            norm.divisor = None;
        }
        let bias = (norm.kind == NormKind::Layer).then(|| vector(weights, place.bias())).transpose()?;
        Ok(NormWeights { place, norm, scale: vector(weights, place)?, bias })
    }

    /// Whether a bias is added.
    pub(crate) fn has_bias(&self) -> bool {
        self.bias.is_some()
    }

    pub(crate) fn apply(&self, x: MatRef<'_>) -> Lent {
        let mut out = Lent::new(x.rows(), x.cols());
        span("norm", || kernels::norm(self.norm, &self.scale, self.bias.as_deref(), x, out.view_mut()));
        out
    }

    pub(crate) fn in_place(&self, x: &mut Mat) {
        kernels::norm_in_place(self.norm, &self.scale, self.bias.as_deref(), x.view_mut());
    }

    /// Normalises every head of every row on its own.
    pub(crate) fn heads_in_place(&self, x: &mut Mat) {
        let dim = self.scale.len();
        let heads = x.rows() * x.cols() / dim;
        let view = lacuna_base::MatMut::new(heads, dim, x.data_mut());
        kernels::norm_in_place(self.norm, &self.scale, self.bias.as_deref(), view);
    }
}

/// A matrix and the bias after it.
pub(crate) struct Projection {
    pub(crate) place: Place,
    /// In profiles.
    name: &'static str,
    linear: Linear,
    pub(crate) bias: Option<Mat>,
}

impl Projection {
    pub(crate) fn load(
        weights: &dyn Weights,
        place: Place,
        activations: Activations,
    ) -> Result<Projection, ModelError> {
        let stored = tensor(weights, place)?;
        let packing = Packing { activations, ..Packing::default() };
        let linear = Linear::pack_with(&stored, &packing).map_err(|e| ModelError::bad(&place, e))?;
        let bias = match weights.spec().shape(&place.bias()) {
            Some((_, n)) => Some(Mat::from_vec(1, n, vector(weights, place.bias())?)),
            None => None,
        };
        let name = match place.role {
            Role::Q | Role::K | Role::V => "attn.q, k, v",
            Role::O => "attn.o",
            Role::Gate | Role::Up => "ffn.gate, up",
            Role::Down => "ffn.down",
            role if role.is_shortcut() => "shortcuts",
            _ => "other products",
        };
        Ok(Projection { place, name, linear, bias })
    }

    pub(crate) fn apply(&self, x: MatRef<'_>) -> Lent {
        let [out] = Projection::together([self], x);
        out
    }

    /// Several projections of the same rows, in one go.
    pub(crate) fn together<const N: usize>(all: [&Projection; N], x: MatRef<'_>) -> [Lent; N] {
        let mut out = all.map(|p| Lent::new(x.rows(), p.linear.rows()));
        span(all[0].name, || {
            let mut views = out.each_mut().map(|o| o.view_mut());
            Linear::forward_all(all.map(|p| &p.linear), x, &mut views);
        });
        for (p, out) in all.iter().zip(&mut out) {
            if let Some(b) = &p.bias {
                kernels::add(out.view_mut(), b.view());
            }
        }
        out
    }

    /// Outputs.
    pub(crate) fn rows(&self) -> usize {
        self.linear.rows()
    }

    pub(crate) fn work(&self) -> [u64; 2] {
        self.linear.work()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.linear.weights_bytes() + self.bias.as_ref().map_or(0, |b| 4 * b.cols() as u64)
    }
}

//! Bytes that a recipe will come to, by arithmetic alone.

use lacuna_contract::{Sparsity, Verb};
use lacuna_format::Float;
use lacuna_spec::{Part, Spec};

use crate::recipe::Recipe;

/// What arithmetic knows beforehand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Matrices that a step aims at.
    pub matrices: usize,
    /// Their parameters.
    pub parameters: u64,
    /// Their bytes afterwards.
    pub bytes: u64,
}

/// Predicts the bytes of every matrix that a local step aims at. Patterns cost what the cheapest of dense, N:M and a mask a row costs; steps
/// that drop whole parts are not counted.
pub fn predict(spec: &Spec, recipe: &Recipe) -> Prediction {
    let mut sum = Prediction::default();
    for place in spec.places() {
        let steps: Vec<_> = recipe.steps.iter().filter(|s| !s.is_model_wide() && s.aims_at(&place)).collect();
        let (false, Part::Weight, Some((rows, cols))) = (steps.is_empty(), place.part, spec.shape(&place)) else {
            continue;
        };
        let all = rows as f64 * cols as f64;
        let (mut values, mut bits, mut index, mut scales, mut extra) = (all, 16.0, 0.0, 0.0, 0.0);
        for s in steps {
            match s.verb {
                Verb::Prune => {
                    if let Some(k) = s.prune(&place) {
                        values = all * (1.0 - k.sparsity);
                        index = match k.pattern {
                            Sparsity::Nm { m, .. } => values * f64::from(usize::BITS - (m - 1).leading_zeros()),
                            Sparsity::Unstructured => all,
                            Sparsity::Block { height, width } => all / (height * width) as f64,
                        };
                    }
                }
                Verb::Quantize => {
                    if let Some(k) = s.quantize(&place) {
                        bits = f64::from(k.bits);
                        let group = if k.group == 0 { cols } else { k.group };
                        let each =
                            if k.scale == Float::F32 { 32.0 } else { 16.0 } + if k.symmetric { 0.0 } else { bits };
                        scales = each
                            * if values > all { values / group as f64 } else { (rows * cols.div_ceil(group)) as f64 };
                        if s.quantize(&place).is_some_and(|k| k.factors == Some(true)) {
                            scales = each * values / group as f64;
                        }
                    }
                }
                Verb::Factor => {
                    if let Some(keep) = s.keep(&place) {
                        values = all * keep;
                        index = 0.0;
                    }
                }
                Verb::Outliers => {
                    if let Some(f) = s.fraction(&place) {
                        extra += f * all * 32.0 + 32.0 * rows as f64;
                    }
                }
                Verb::Drop | Verb::Budget => {}
            }
        }
        // A mask that costs more than it saves is not stored.
        let body = (values * bits + index).min(if values < all { all * bits } else { f64::INFINITY });
        sum.matrices += 1;
        sum.parameters += all as u64;
        sum.bytes += ((body + scales + extra) / 8.0).ceil() as u64;
    }
    sum
}

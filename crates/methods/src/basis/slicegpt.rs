//! SliceGPT: the residual stream is turned to its principal axes, and the last of them are cut off.
//!
//! **Paper.** Saleh Ashkboos, Maximilian L. Croci, Marcelo Gennari do Nascimento, Torsten Hoefler, James Hensman,
//! "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", 2024, arXiv 2401.15024.
//!
//! **Idea.** RMS norms commute with rotations: with `Q` orthogonal, `x -> x Q` in the whole residual stream and `Q`
//! folded into the matrices around it changes no output. `Q` are the eigenvectors of `Σ xᵀx` over the normalised
//! signals `x`, largest first; keeping `d` of `D` columns deletes what carries least.
//!
//! **Shapes and units.** `gram` `[D, D]`: the mean outer product of the normalised signals at the inputs of attentions
//! and FFNs, norm scales taken out (of one basis; else that of the stream); the answer `[D, d]`, its columns
//! orthonormal.
//!
//! **Cost.** `D³` once, in f64.
//!
//! With `basis = "layer"` every attention, every FFN and the head has its own `Q_s`, of `D x d`, found front to back on
//! the sliced network's own stream before the norm, as the authors' program has it, and shortcuts carry `Q_sᵀ Q_{s+1}`.
//! (Of normalised signals instead, on smollm2: perplexity 235 instead of 136.)
//!
//! **Departs.** By default one basis for the whole model, so that no matrix stands in the shortcuts and the result is a
//! plain model; the signals of all blocks count alike. All parts keep the same `d`, and the head is sliced, too (the
//! paper's program leaves the last width whole). LayerNorm,
//! which the paper turns into RMS norms first, is refused.

use lacuna_base::{Mat64, factor};
use lacuna_contract::{Basis, Card, Made, Method, MethodError};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SliceGpt {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "slicegpt",
            paper: "Ashkboos, Croci, Gennari do Nascimento, Hoefler, Hensman: SliceGPT: Compress Large Language Models \
             by Deleting Rows and Columns, 2024",
            arxiv: "2401.15024",
            summary: "The residual stream is turned to its principal axes and loses the last of them.",
            system: Some(144),
            verb: "slice",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<SliceGpt>,
        make: |given| Ok(Made::Basis(Box::new(make::parameters::<SliceGpt>("slicegpt", given)?))),
    }
}

/// Refuses numbers and widths that no basis can have.
pub(super) fn check(gram: &Mat64, width: usize) -> Result<(), MethodError> {
    if width == 0 || width > gram.rows() {
        return Err(MethodError::new(format!("{width} of {} axes", gram.rows())));
    }
    match gram.data().iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(MethodError::new(format!(
            "the outer products of channels {} and {} are {}, not a finite number",
            i / gram.cols(),
            i % gram.cols(),
            gram.data()[i]
        ))),
    }
}

impl Basis for SliceGpt {
    fn basis(&self, gram: &Mat64, width: usize) -> Result<Mat64, MethodError> {
        check(gram, width)?;
        let eigen = factor::symmetric_eigen(gram).map_err(|e| MethodError::new(e.to_string()))?;
        let mut order: Vec<usize> = (0..gram.rows()).collect();
        order.sort_by(|&a, &b| eigen.values[b].total_cmp(&eigen.values[a]).then(a.cmp(&b)));
        Ok(Mat64::from_fn(gram.rows(), width, |r, c| eigen.q[(r, order[c])]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::dense::{matmul_nn_f64, matmul_tn_f64};
    use lacuna_base::testkit::random;

    /// From the definition: no other projection of that width found by trying keeps more of the rows, and what it keeps
    /// is what the power iteration with deflation finds.
    #[test]
    fn agrees_with_brute_force_power_iteration() {
        for (n, width) in [(1, 1), (5, 2), (6, 6), (8, 3)] {
            let x = Mat64::from_f32(random(30, n, 7).view());
            let gram = matmul_tn_f64(&x, &x);
            let q = SliceGpt {}.basis(&gram, width).expect("a basis");
            let qq = matmul_tn_f64(&q, &q);
            for (r, c) in (0..width).flat_map(|r| (0..width).map(move |c| (r, c))) {
                assert!((qq[(r, c)] - f64::from(u8::from(r == c))).abs() < 1e-9, "orthonormal");
            }
            let kept: f64 = matmul_nn_f64(&matmul_tn_f64(&q, &gram), &q).data().iter().step_by(width + 1).sum();
            let (mut left, mut best) = (gram.clone(), 0.0);
            for k in 0..width {
                let mut v: Vec<f64> = (0..n).map(|i| 1.0 + ((i * 7 + k) % 5) as f64).collect();
                for _ in 0..3000 {
                    let next: Vec<f64> = (0..n).map(|r| (0..n).map(|c| left[(r, c)] * v[c]).sum()).collect();
                    let norm = next.iter().map(|x| x * x).sum::<f64>().sqrt();
                    v = next.iter().map(|x| x / norm.max(1e-300)).collect();
                }
                let value: f64 = (0..n).map(|r| v[r] * (0..n).map(|c| left[(r, c)] * v[c]).sum::<f64>()).sum();
                best += value;
                left = Mat64::from_fn(n, n, |r, c| left[(r, c)] - value * v[r] * v[c]);
            }
            assert!((kept / best - 1.0).abs() < 1e-6, "{n} {width}: {kept} {best}");
        }
        assert!(SliceGpt {}.basis(&Mat64::from_fn(2, 2, |_, _| f64::NAN), 1).is_err());
    }
}

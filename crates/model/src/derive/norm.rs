//! The adjoint of RMS and layer normalisation.

use lacuna_base::{MatMut, MatRef};
use lacuna_spec::{Norm, NormKind};

use super::rows::{chunks, sum_of};

/// Gradients of a normalisation's vectors, `[cols]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct NormGradients {
    /// Of the scale.
    pub scale: Vec<f32>,
    /// Of the bias, where there is one.
    pub bias: Vec<f32>,
}

/// `dx += ` the gradient of the rows `x` that a normalisation read, from `dy`, that of what it put out: with
/// `x̂ = (x - mean) · inv` and `g = dy · (scale + offset)` it is `inv · (g - mean(g) - x̂ · mean(g x̂))`, of RMS
/// without the means of `x` and `g`, and the last mean over the divisor where there is one.
///
/// All are `[rows, cols]`; the scale has a value for each column, or for each column of some rows, which take turns.
/// Gives the gradients of the vectors where `vectors`.
#[track_caller]
pub fn norm(
    norm: Norm,
    scale: &[f32],
    x: MatRef<'_>,
    dy: MatRef<'_>,
    dx: MatMut<'_>,
    vectors: bool,
) -> Option<NormGradients> {
    let cols = x.cols();
    assert_eq!((x.rows(), cols), (dy.rows(), dy.cols()), "two shapes");
    assert_eq!((x.rows(), cols), (dx.rows(), dx.cols()), "two shapes");
    assert!(scale.len() >= cols && scale.len().is_multiple_of(cols.max(1)), "{} scales, {cols} columns", scale.len());
    let turns = scale.len() / cols.max(1);
    let n = cols as f32;
    let divisor = norm.divisor.map_or(n, |n| n as f32);
    let parts = chunks(dx, |first, mut dx| {
        let mut sums = vectors.then(|| NormGradients { scale: vec![0.0; scale.len()], bias: vec![0.0; scale.len()] });
        let mut g = vec![0.0f32; cols];
        for i in 0..dx.rows() {
            let (x, dy) = (x.row(first + i), dy.row(first + i));
            let mine = (first + i) % turns * cols..((first + i) % turns + 1) * cols;
            let scale = &scale[mine.clone()];
            let mean = match norm.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => sum_of(x, x, |x, _| x) / n,
            };
            let inv = 1.0 / (sum_of(x, x, |x, _| (x - mean) * (x - mean)) / divisor + norm.eps).sqrt();
            for ((g, &d), &s) in g.iter_mut().zip(dy).zip(scale) {
                *g = d * (s + norm.offset);
            }
            let g_mean = match norm.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => sum_of(&g, &g, |g, _| g) / n,
            };
            let along = sum_of(&g, x, |g, x| g * ((x - mean) * inv)) / divisor;
            for ((o, &g), &x) in dx.row_mut(i).iter_mut().zip(&g).zip(x) {
                *o += inv * (g - g_mean - (x - mean) * inv * along);
            }
            let Some(sums) = &mut sums else { continue };
            for ((s, &d), &x) in sums.scale[mine.clone()].iter_mut().zip(dy).zip(x) {
                *s += d * ((x - mean) * inv);
            }
            sums.bias[mine].iter_mut().zip(dy).for_each(|(b, &d)| *b += d);
        }
        sums
    });
    let mut parts = parts.into_iter().flatten();
    let zero = || NormGradients { scale: vec![0.0; scale.len()], bias: vec![0.0; scale.len()] };
    let first = parts.next().or_else(|| vectors.then(zero))?;
    Some(parts.fold(first, |mut all, part| {
        all.scale.iter_mut().zip(&part.scale).for_each(|(a, b)| *a += b);
        all.bias.iter_mut().zip(&part.bias).for_each(|(a, b)| *a += b);
        all
    }))
}

#[cfg(test)]
mod tests {
    use super::super::rows::zeros;
    use super::*;
    use crate::backend::naive;
    use crate::derive::differences::check;
    use lacuna_base::testkit::random;

    #[test]
    fn agrees_with_finite_differences_of_the_definition() {
        for (kind, divisor) in [(NormKind::Rms, None), (NormKind::Layer, None), (NormKind::Rms, Some(41))] {
            for (rows, cols, turns) in [(1, 1, 1), (3, 5, 1), (40, 37, 1), (0, 4, 1), (36, 5, 3)] {
                let n = Norm { kind, eps: 1e-2, offset: 0.5, divisor, ..Norm::default() };
                let (x, dy, scale) = (random(rows, cols, 1), random(rows, cols, 2), random(1, turns * cols, 3));
                let mut dx = zeros(rows, cols);
                let got = norm(n, scale.data(), x.view(), dy.view(), dx.view_mut(), true).unwrap();
                let bias = vec![0.3; turns * cols];
                check(
                    &format!("{kind:?} {rows} x {cols} over {divisor:?}"),
                    dy.data(),
                    &[(x.data(), dx.data()), (scale.data(), &got.scale), (&bias, &got.bias)],
                    |v| naive::norm(n, cols, &v[1], &v[2], &v[0]),
                );
                assert!(norm(n, scale.data(), x.view(), dy.view(), dx.view_mut(), false).is_none());
            }
        }
    }
}

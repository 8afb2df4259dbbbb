//! RMS and layer normalisation.

use lacuna_base::{MatMut, MatRef};
use lacuna_spec::{Norm, NormKind};

use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, parallel};

/// One row: `out = (x - mean) / sqrt(var + eps) * scale + bias`.
struct Row<'a> {
    norm: Norm,
    x: *const f32,
    out: *mut f32,
    cols: usize,
    scale: &'a [f32],
    bias: Option<&'a [f32]>,
}

/// The sum of `f(x)` over a row, lanes first, then the fixed tree; columns beyond the last count as `pad`.
#[inline(always)]
unsafe fn total<S: Simd>(s: S, x: *const f32, cols: usize, shift: f32, square: bool) -> f32 {
    let (mut acc, m) = (s.splat(0.0), s.splat(shift));
    let whole = cols / S::LANES * S::LANES;
    let mut i = 0;
    // SAFETY: the caller's row has `cols` values; the copy of the rest has 32.
    unsafe {
        while i < whole {
            let v = s.sub(s.load(x.add(i)), m);
            acc = if square { s.fma(v, v, acc) } else { s.add(acc, v) };
            i += S::LANES;
        }
        if whole < cols {
            let mut rest = [shift; 32];
            std::ptr::copy_nonoverlapping(x.add(whole), rest.as_mut_ptr(), cols - whole);
            let v = s.sub(s.load(rest.as_ptr()), m);
            acc = if square { s.fma(v, v, acc) } else { s.add(acc, v) };
        }
    }
    s.sum(acc)
}

/// `(x - mean) * inv * (scale + offset) + bias`.
#[inline(always)]
fn scaled<S: Simd>(s: S, x: S::V, [mean, inv, offset]: [S::V; 3], scale: S::V, bias: S::V) -> S::V {
    s.add(s.mul(s.mul(s.sub(x, mean), inv), s.add(scale, offset)), bias)
}

impl Op for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = self.cols as f32;
        let divisor = self.norm.divisor.map_or(n, |n| n as f32);
        // SAFETY: x and out are rows of `cols` values (they may be the same row); scale and bias have as many.
        unsafe {
            let mean = match self.norm.kind {
                NormKind::Rms => 0.0,
                NormKind::Layer => total(s, self.x, self.cols, 0.0, false) / n,
            };
            let inv = 1.0 / (total(s, self.x, self.cols, mean, true) / divisor + self.norm.eps).sqrt();
            let (mean, inv, offset) = (s.splat(mean), s.splat(inv), s.splat(self.norm.offset));
            let whole = self.cols / S::LANES * S::LANES;
            let mut c = 0;
            while c < whole {
                let bias = match self.bias {
                    Some(b) => s.load(b.as_ptr().add(c)),
                    None => s.splat(0.0),
                };
                s.store(
                    self.out.add(c),
                    scaled(s, s.load(self.x.add(c)), [mean, inv, offset], s.load(self.scale.as_ptr().add(c)), bias),
                );
                c += S::LANES;
            }
            if whole < self.cols {
                let rest = self.cols - whole;
                let mut parts = [[0.0f32; 16]; 3];
                std::ptr::copy_nonoverlapping(self.x.add(whole), parts[0].as_mut_ptr(), rest);
                parts[1][..rest].copy_from_slice(&self.scale[whole..]);
                if let Some(b) = self.bias {
                    parts[2][..rest].copy_from_slice(&b[whole..]);
                }
                let [x, scale, bias] =
                    [s.load(parts[0].as_ptr()), s.load(parts[1].as_ptr()), s.load(parts[2].as_ptr())];
                s.store(parts[0].as_mut_ptr(), scaled(s, x, [mean, inv, offset], scale, bias));
                std::ptr::copy_nonoverlapping(parts[0].as_ptr(), self.out.add(whole), rest);
            }
        }
    }
}

struct Shared(*const f32, *mut f32);
// SAFETY: tasks take disjoint rows.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

/// Normalises every row of `x` into `out`, of the same shape. `scale` (and `bias`) have a value for each column, or for
/// each column of some rows, which take turns.
#[track_caller]
pub fn norm(norm: Norm, scale: &[f32], bias: Option<&[f32]>, x: MatRef<'_>, mut out: MatMut<'_>) {
    assert_eq!((x.rows(), x.cols()), (out.rows(), out.cols()), "two shapes");
    let stride = (x.stride(), out.stride());
    run(
        Isa::best(),
        norm,
        scale,
        bias,
        (x.rows(), x.cols()),
        stride,
        Shared(x.raw().as_ptr(), out.raw_mut().as_mut_ptr()),
    );
}

/// Normalises every row of `x` in place, as [`norm`].
#[track_caller]
pub fn norm_in_place(norm: Norm, scale: &[f32], bias: Option<&[f32]>, mut x: MatMut<'_>) {
    let (shape, stride) = ((x.rows(), x.cols()), (x.stride(), x.stride()));
    let p = x.raw_mut().as_mut_ptr();
    run(Isa::best(), norm, scale, bias, shape, stride, Shared(p, p));
}

#[track_caller]
fn run(
    isa: Isa,
    norm: Norm,
    scale: &[f32],
    bias: Option<&[f32]>,
    (rows, cols): (usize, usize),
    stride: (usize, usize),
    at: Shared,
) {
    assert!(scale.len() >= cols && scale.len().is_multiple_of(cols), "{} scales for {cols} columns", scale.len());
    assert!(bias.is_none_or(|b| b.len() == scale.len()), "a bias for each scale");
    let turns = scale.len() / cols;
    parallel::ranges(rows, 1, usize::MAX, 4 * cols, |from, to| {
        let at = &at;
        for r in from..to {
            // SAFETY: both pointers lead to `rows` rows of `cols` values at these strides, borrowed by the caller.
            let (x, out) = unsafe { (at.0.add(r * stride.0), at.1.add(r * stride.1)) };
            let mine = r % turns * cols..(r % turns + 1) * cols;
            let (scale, bias) = (&scale[mine.clone()], bias.map(|b| &b[mine]));
            dispatch(isa, Row { norm, x, out, cols, scale, bias });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;

    #[test]
    fn both_kinds_match_f64_on_every_isa() {
        for isa in Isa::here() {
            for (kind, divisor) in [(NormKind::Rms, None), (NormKind::Layer, None), (NormKind::Rms, Some(80))] {
                for cols in [1, 5, 16, 64, 577] {
                    let (x, scale, bias) = (random(4, cols, 1), random(1, cols, 2), random(1, cols, 3));
                    let n = Norm { kind, eps: 1e-3, offset: 1.0, divisor, ..Norm::default() };
                    let mut out = Mat::zeros(4, cols);
                    let at = Shared(x.data().as_ptr(), out.data_mut().as_mut_ptr());
                    run(isa, n, scale.data(), Some(bias.data()), (4, cols), (cols, cols), at);
                    for r in 0..4 {
                        let row: Vec<f64> = x.row(r).iter().map(|&v| f64::from(v)).collect();
                        let mean = if kind == NormKind::Layer { row.iter().sum::<f64>() / cols as f64 } else { 0.0 };
                        let over = divisor.unwrap_or(cols) as f64;
                        let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / over;
                        for c in 0..cols {
                            let want = (row[c] - mean) / (var + 1e-3f32 as f64).sqrt()
                                * (f64::from(scale[(0, c)]) + 1.0)
                                + f64::from(bias[(0, c)]);
                            let off = (f64::from(out[(r, c)]) - want).abs() / want.abs().max(1.0);
                            assert!(off < 2e-5, "{isa} {kind:?} {cols} over {divisor:?}: {off}");
                        }
                    }
                    // Two scales, in turns: every second row as with the first one.
                    let (both, other) = (random(1, 2 * cols, 2), random(1, 2 * cols, 3));
                    let mut turns = Mat::zeros(4, cols);
                    let at = Shared(x.data().as_ptr(), turns.data_mut().as_mut_ptr());
                    run(isa, n, both.data(), Some(other.data()), (4, cols), (cols, cols), at);
                    for r in 0..4 {
                        let at = Shared(x.row(r).as_ptr(), out.row_mut(r).as_mut_ptr());
                        let half = |v: &Mat| v.data()[r % 2 * cols..(r % 2 + 1) * cols].to_vec();
                        run(isa, n, &half(&both), Some(&half(&other)), (1, cols), (cols, cols), at);
                        assert_eq!(turns.row(r), out.row(r), "{isa} {kind:?} {cols}: row {r}");
                    }
                    let at = Shared(x.data().as_ptr(), out.data_mut().as_mut_ptr());
                    run(isa, n, scale.data(), Some(bias.data()), (4, cols), (cols, cols), at);
                    let mut again = x.clone();
                    if isa == Isa::best() {
                        norm_in_place(n, scale.data(), Some(bias.data()), again.view_mut());
                        assert_eq!(again, out);
                    }
                }
            }
        }
    }
}

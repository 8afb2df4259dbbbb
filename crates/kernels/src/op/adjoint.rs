//! What derivatives need beyond the forward operations: slopes of activations, and a softmax in lanes for rows by the
//! thousand.

use lacuna_base::MatMut;
use lacuna_spec::Activation;

use super::elementwise::{Xielu, Zip, rows};
use super::math;
use crate::Isa;
use crate::simd::{Op, Simd, dispatch};

/// `1 / sqrt(2 pi)`, the height of the normal density.
const DENSITY: f32 = 0.398_942_3;
/// `sqrt(2 / pi)` and the cube's coefficient of the tanh form of GELU.
const TANH: (f32, f32) = (0.797_884_6, 0.044_715);

#[inline(always)]
fn slope<S: Simd>(s: S, act: Activation, x: S::V) -> S::V {
    let (zero, one, half) = (s.splat(0.0), s.splat(1.0), s.splat(0.5));
    match act {
        // y = x p with p = sigmoid(x): p + x p (1 - p).
        Activation::Silu => {
            let p = s.div(one, s.add(one, math::exp(s, s.sub(zero, x))));
            s.fma(s.mul(x, p), s.sub(one, p), p)
        }
        // y = x P(x): P(x) + x p(x), the normal distribution and its density.
        Activation::Gelu => {
            let e = math::erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
            let density = s.mul(s.splat(DENSITY), math::exp(s, s.mul(s.splat(-0.5), s.mul(x, x))));
            s.fma(x, density, s.mul(half, s.add(e, one)))
        }
        // y = x (1 + t) / 2 with t = tanh(u): (1 + t) / 2 + x (1 - t²) u' / 2.
        Activation::GeluTanh => {
            let (a, b) = TANH;
            let x2 = s.mul(x, x);
            let t = math::tanh(s, s.mul(x, s.fma(x2, s.splat(a * b), s.splat(a))));
            let inner = s.fma(x2, s.splat(3.0 * a * b), s.splat(a));
            let bell = s.mul(s.sub(one, s.mul(t, t)), inner);
            s.mul(half, s.fma(x, bell, s.add(one, t)))
        }
        Activation::Relu => s.select_lt(zero, x, one, zero),
        Activation::Sigmoid => {
            let p = math::sigmoid(s, x);
            s.mul(p, s.sub(one, p))
        }
        Activation::Relu2 => s.add(s.max(zero, x), s.max(zero, x)),
        Activation::Xielu => unreachable!("its numbers are a layer's own: `xielu_slope`"),
        // y = x p with p = sigmoid(1.702 x): p + 1.702 x p (1 - p), and 0 beyond the cut.
        Activation::SwigluOai => {
            let a = s.splat(1.702);
            let p = s.div(one, s.add(one, math::exp(s, s.sub(zero, s.mul(a, x)))));
            let d = s.fma(s.mul(s.mul(a, x), p), s.sub(one, p), p);
            s.select_lt(s.splat(7.0), x, zero, d)
        }
    }
}

#[derive(Clone, Copy)]
struct XieluSlope(Xielu);
impl Zip for XieluSlope {
    #[inline(always)]
    fn zip<S: Simd>(self, s: S, _: S::V, x: S::V) -> S::V {
        let (half, one) = (s.splat(0.5), s.splat(1.0));
        let above = s.fma(s.add(x, x), s.splat(self.0.above), half);
        // Nearer to 0 than 1e-6 the power stands still.
        let power = s.select_lt(x, s.splat(-1e-6), math::exp(s, x), s.splat(0.0));
        let below = s.fma(s.sub(power, one), s.splat(self.0.below), half);
        s.select_lt(s.splat(0.0), x, above, below)
    }
}

/// `x = xielu'(x)`.
#[track_caller]
pub fn xielu_slope(of: Xielu, x: MatMut<'_>) {
    rows(Isa::best(), XieluSlope(of), x, None, 16);
}

#[derive(Clone, Copy)]
struct Slope(Activation);
impl Zip for Slope {
    #[inline(always)]
    fn zip<S: Simd>(self, s: S, _: S::V, b: S::V) -> S::V {
        slope(s, self.0, b)
    }
}

/// `x = act'(x)`, within 2e-6 of exact; of ReLU at 0: 0. An infinite input has no slope here (NaN).
#[track_caller]
pub fn activation_slope(act: Activation, x: MatMut<'_>) {
    rows(Isa::best(), Slope(act), x, None, 16);
}

/// `row = exp(row - top)`; gives the sum.
struct Soften {
    row: *mut f32,
    n: usize,
    top: f32,
}

impl Op for Soften {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let whole = self.n / S::LANES * S::LANES;
        let (top, mut sum) = (s.splat(self.top), s.splat(0.0));
        let mut i = 0;
        // SAFETY: the maker has n values; the copy of the rest has 32.
        unsafe {
            while i < whole {
                let e = math::exp(s, s.sub(s.load(self.row.add(i)), top));
                s.store(self.row.add(i), e);
                sum = s.add(sum, e);
                i += S::LANES;
            }
            if whole < self.n {
                let mut rest = [f32::NEG_INFINITY; 32];
                std::ptr::copy_nonoverlapping(self.row.add(whole), rest.as_mut_ptr(), self.n - whole);
                let e = math::exp(s, s.sub(s.load(rest.as_ptr()), top));
                s.store(rest.as_mut_ptr(), e);
                sum = s.add(sum, e);
                std::ptr::copy_nonoverlapping(rest.as_ptr(), self.row.add(whole), self.n - whole);
            }
        }
        s.sum(sum)
    }
}

/// The softmax of a row, in place, in lanes and f32: each value within 1e-5 times itself of exact for rows up to a
/// million. A row without any finite value becomes NaN. Gives the logarithm of the sum of the exponentials.
pub fn softmax_lanes(row: &mut [f32]) -> f64 {
    let mut tops = [f32::NEG_INFINITY; 16];
    let parts = row.chunks_exact(16);
    let rest = parts.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for part in parts {
        tops.iter_mut().zip(part).for_each(|(t, &x)| *t = if x > *t { x } else { *t });
    }
    let top = tops.iter().copied().fold(rest, f32::max);
    // Sums of some thousands in f32, those in f64: a large vocabulary loses nothing.
    let mut total = 0.0f64;
    for part in row.chunks_mut(4096) {
        total += f64::from(dispatch(Isa::best(), Soften { row: part.as_mut_ptr(), n: part.len(), top }));
    }
    let by = (1.0 / total) as f32;
    row.iter_mut().for_each(|x| *x *= by);
    f64::from(top) + total.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::softmax;
    use lacuna_base::Mat;

    const ALL: [Activation; 7] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Relu2,
        Activation::SwigluOai,
        Activation::Sigmoid,
    ];

    /// The error function, by its Maclaurin series: near enough for |x| < 3.2.
    fn erf(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }

    fn exact(act: Activation, x: f64) -> f64 {
        match act {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::SwigluOai => x.min(7.0) / (1.0 + (-1.702 * x.min(7.0)).exp()),
            Activation::Relu2 => x.max(0.0).powi(2),
            Activation::Xielu => unreachable!(),
        }
    }

    #[test]
    fn the_slope_of_xielu_matches_finite_differences() {
        let of = Xielu { above: 0.9, below: 0.7 };
        let x = Mat::from_fn(1, 401, |_, c| (c as f32 - 200.0) * 0.03 + 1e-2);
        let exact = |v: f64| if v > 0.0 { 0.9 * v * v + v / 2.0 } else { 0.7 * (v.exp() - 1.0 - v) + v / 2.0 };
        for isa in Isa::here() {
            let mut y = x.clone();
            rows(isa, XieluSlope(of), y.view_mut(), None, 16);
            for (x, y) in x.data().iter().zip(y.data()) {
                let (v, h) = (f64::from(*x), 1e-4);
                let want = (exact(v + h) - exact(v - h)) / (2.0 * h);
                assert!((f64::from(*y) - want).abs() < 4e-6 * (1.0 + v.abs()), "{isa} {x}: {y} for {want}");
            }
        }
    }

    #[test]
    fn slopes_match_finite_differences_on_every_isa() {
        let x = Mat::from_fn(3, 139, |r, c| (c as f32 - 69.0) * 0.06 + r as f32 * 0.01 + 0.003);
        for isa in Isa::here() {
            for act in ALL {
                let mut y = x.clone();
                rows(isa, Slope(act), y.view_mut(), None, 16);
                for (x, y) in x.data().iter().zip(y.data()) {
                    let (x, h) = (f64::from(*x), 1e-4);
                    let want = (exact(act, x + h) - exact(act, x - h)) / (2.0 * h);
                    assert!((f64::from(*y) - want).abs() < 2e-6, "{isa} {act:?}'({x}) = {y}, exact {want}");
                }
            }
        }
        let mut at_zero = Mat::zeros(1, 3);
        activation_slope(Activation::Relu, at_zero.view_mut());
        assert_eq!(at_zero.data(), [0.0; 3]);
        let mut far = Mat::from_vec(1, 2, vec![-200.0, 200.0]);
        activation_slope(Activation::Silu, far.view_mut());
        assert_eq!(far.data(), [0.0, 1.0]);
    }

    #[test]
    fn softmax_in_lanes_is_softmax() {
        for n in [1, 3, 16, 17, 1000, 50_001] {
            let x: Vec<f32> = (0..n).map(|i| ((i * 7919) % 101) as f32 * 0.2 - 300.0).collect();
            let (mut a, mut b) = (x.clone(), x.clone());
            let log_sum = softmax_lanes(&mut a);
            softmax(&mut b);
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() <= 1e-5 * b + 1e-38, "{n}: {a} for {b}");
            }
            let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let want = f64::from(top) + x.iter().map(|v| f64::from(v - top).exp()).sum::<f64>().ln();
            assert!((log_sum - want).abs() < 1e-6);
        }
        let mut bad = [f32::NAN, 1.0];
        softmax_lanes(&mut bad);
        assert!(bad.iter().all(|x| x.is_nan()));
    }
}

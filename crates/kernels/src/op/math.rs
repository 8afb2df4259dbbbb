//! Transcendental functions on lanes. NaN in, NaN out.

use crate::simd::Simd;

/// `e^x`, relative error below 2e-7; exactly 0 below -87.3 (minus infinity included) and infinite above 88.37.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let (lo, hi) = (s.splat(-87.3), s.splat(88.37));
    // The constant first: the second operand wins where one is NaN.
    let c = s.min(hi, s.max(lo, x));
    let n = s.round(s.mul(c, s.splat(std::f32::consts::LOG2_E)));
    let y = s.mul(power(s, c, n), s.pow2(n));
    let y = s.select_lt(x, lo, s.splat(0.0), y);
    s.select_lt(hi, x, s.splat(f32::INFINITY), y)
}

/// The same where no lane is above 0; below -87.3 it stays at 1.2e-38.
#[inline(always)]
pub(crate) fn exp_below<S: Simd>(s: S, x: S::V) -> S::V {
    let c = s.max(s.splat(-87.3), x);
    let n = s.round(s.mul(c, s.splat(std::f32::consts::LOG2_E)));
    s.mul(power(s, c, n), s.pow2(n))
}

/// `e^(c - n ln 2)` for whole `n` nearest to `c / ln 2`.
#[inline(always)]
fn power<S: Simd>(s: S, c: S::V, n: S::V) -> S::V {
    // ln 2 in two parts, so that n * ln 2 loses nothing.
    let r = s.fma(n, s.splat(-0.693_359_4), c);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_1e-4);
    for k in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = s.fma(p, r, s.splat(k));
    }
    s.add(s.fma(s.mul(r, r), p, r), s.splat(1.0))
}

/// `tanh x`, absolute error below 3e-7.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.add(x, x));
    s.sub(s.splat(1.0), s.div(s.splat(2.0), s.add(e, s.splat(1.0))))
}

/// `erf x`, absolute error below 5e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
pub(crate) fn erf<S: Simd>(s: S, x: S::V) -> S::V {
    let zero = s.splat(0.0);
    let a = s.select_lt(x, zero, s.sub(zero, x), x);
    let t = s.div(s.splat(1.0), s.fma(a, s.splat(0.327_591_1), s.splat(1.0)));
    let mut p = s.splat(1.061_405_4);
    for k in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        p = s.fma(p, t, s.splat(k));
    }
    let y = s.sub(s.splat(1.0), s.mul(s.mul(p, t), exp(s, s.sub(zero, s.mul(a, a)))));
    s.select_lt(x, zero, s.sub(zero, y), y)
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(e, s.splat(1.0)))
}

/// The least of `x` and 7, times its sigmoid at 1.702 times that.
#[inline(always)]
pub(crate) fn swiglu_oai<S: Simd>(s: S, x: S::V) -> S::V {
    let m = s.min(s.splat(7.0), x);
    let e = exp(s, s.mul(s.splat(-1.702), m));
    s.div(m, s.add(e, s.splat(1.0)))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(s.splat(1.0), s.add(e, s.splat(1.0)))
}

/// GELU through the error function.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let e = erf(s, s.mul(x, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    s.mul(s.mul(x, s.splat(0.5)), s.add(e, s.splat(1.0)))
}

/// GELU through tanh.
#[inline(always)]
pub(crate) fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let inner = s.mul(x, s.fma(s.mul(x, x), s.splat(0.797_884_6 * 0.044_715), s.splat(0.797_884_6)));
    s.mul(s.mul(x, s.splat(0.5)), s.add(tanh(s, inner), s.splat(1.0)))
}

//! Element by element: activations, sums, soft caps, and softmax of a row.

use lacuna_base::{MatMut, MatRef};
use lacuna_spec::Activation;

use super::math;
use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, parallel};

/// A function of two values, lane by lane.
pub(super) trait Zip: Copy + Sync {
    fn zip<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V;
}

/// `a[i] = f(a[i], b[i])` for `i < n`; `b` may be `a`.
struct Each<F> {
    f: F,
    a: *mut f32,
    b: *const f32,
    n: usize,
}

impl<F: Zip> Op for Each<F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (a, b, n) = (self.a, self.b, self.n);
        let whole = n / S::LANES * S::LANES;
        let mut i = 0;
        // SAFETY: the maker vouches for n values at both; i + LANES <= n, and the copies of the rest have LANES.
        unsafe {
            while i < whole {
                s.store(a.add(i), self.f.zip(s, s.load(a.add(i)), s.load(b.add(i))));
                i += S::LANES;
            }
            if whole < n {
                let (mut p, mut q) = ([0.0f32; 32], [0.0f32; 32]);
                std::ptr::copy_nonoverlapping(a.add(whole), p.as_mut_ptr(), n - whole);
                std::ptr::copy_nonoverlapping(b.add(whole), q.as_mut_ptr(), n - whole);
                s.store(p.as_mut_ptr(), self.f.zip(s, s.load(p.as_ptr()), s.load(q.as_ptr())));
                std::ptr::copy_nonoverlapping(p.as_ptr(), a.add(whole), n - whole);
            }
        }
    }
}

#[inline(always)]
fn activate<S: Simd>(s: S, act: Activation, x: S::V) -> S::V {
    match act {
        Activation::Silu => math::silu(s, x),
        Activation::Gelu => math::gelu(s, x),
        Activation::GeluTanh => math::gelu_tanh(s, x),
        // Zero first: a NaN passes.
        Activation::Relu => s.max(s.splat(0.0), x),
        Activation::Sigmoid => math::sigmoid(s, x),
    }
}

#[derive(Clone, Copy)]
struct Gated(Activation);
impl Zip for Gated {
    #[inline(always)]
    fn zip<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.mul(activate(s, self.0, a), b)
    }
}

#[derive(Clone, Copy)]
struct Alone(Activation);
impl Zip for Alone {
    #[inline(always)]
    fn zip<S: Simd>(self, s: S, _: S::V, b: S::V) -> S::V {
        activate(s, self.0, b)
    }
}

#[derive(Clone, Copy)]
struct Sum;
impl Zip for Sum {
    #[inline(always)]
    fn zip<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.add(a, b)
    }
}

#[derive(Clone, Copy)]
struct Scaled(f32);
impl Zip for Scaled {
    #[inline(always)]
    fn zip<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.fma(b, s.splat(self.0), a)
    }
}

#[derive(Clone, Copy)]
struct Cap(f32);
impl Zip for Cap {
    #[inline(always)]
    fn zip<S: Simd>(self, s: S, _: S::V, b: S::V) -> S::V {
        s.mul(s.splat(self.0), math::tanh(s, s.div(b, s.splat(self.0))))
    }
}

/// Applies `f` row by row: `a = f(a, b)`, where `b` is a matrix of a's shape, one row for all, or `None` for `a`
/// itself.
#[track_caller]
pub(super) fn rows<F: Zip>(isa: Isa, f: F, a: MatMut<'_>, b: Option<MatRef<'_>>, cost: usize) {
    let (n, cols, stride) = (a.rows(), a.cols(), a.stride());
    if let Some(b) = b {
        assert!(
            b.cols() == cols && (b.rows() == n || b.rows() == 1),
            "{} x {} against {n} x {cols}",
            b.rows(),
            b.cols()
        );
    }
    let mut a = a;
    let base = Shared(a.raw_mut().as_mut_ptr());
    parallel::ranges(n, 1, usize::MAX, cols * cost, |from, to| {
        let base = &base;
        for r in from..to {
            // SAFETY: tasks take disjoint rows of a matrix that this call borrows mutably; b has rows as long, or is
            // the row itself.
            let a = unsafe { base.0.add(r * stride) };
            let b = match b {
                Some(b) => b.row(if b.rows() == 1 { 0 } else { r }).as_ptr(),
                None => a,
            };
            dispatch(isa, Each { f, a, b, n: cols });
        }
    });
}

struct Shared(*mut f32);
// SAFETY: used for disjoint rows only.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

/// `gate = act(gate) * up`. Within 1e-6 times (1 + |gate|)·|up| of exact.
#[track_caller]
pub fn gated_activation(act: Activation, gate: MatMut<'_>, up: MatRef<'_>) {
    rows(Isa::best(), Gated(act), gate, Some(up), 16);
}

/// `x = act(x)`. Within 1e-6 times (1 + |x|) of exact.
#[track_caller]
pub fn activation(act: Activation, x: MatMut<'_>) {
    activation_on(Isa::best(), act, x);
}

pub(crate) fn activation_on(isa: Isa, act: Activation, x: MatMut<'_>) {
    rows(isa, Alone(act), x, None, 16);
}

/// `x += y`; `y` has x's shape or one row for all.
#[track_caller]
pub fn add(x: MatMut<'_>, y: MatRef<'_>) {
    rows(Isa::best(), Sum, x, Some(y), 1);
}

/// `x += factor * y`, rounded once where the instruction set can.
#[track_caller]
pub fn add_scaled(x: &mut [f32], factor: f32, y: &[f32]) {
    assert_eq!(x.len(), y.len(), "two lengths");
    dispatch(Isa::best(), Each { f: Scaled(factor), a: x.as_mut_ptr(), b: y.as_ptr(), n: x.len() });
}

/// `x = cap * tanh(x / cap)`, within 3e-7 times cap of exact.
#[track_caller]
pub fn softcap(cap: f32, x: MatMut<'_>) {
    rows(Isa::best(), Cap(cap), x, None, 16);
}

/// The softmax of a row, in place: largest value taken away first, sums in f64. A row without any finite value becomes
/// NaN.
pub fn softmax(row: &mut [f32]) {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0f64;
    for x in row.iter_mut() {
        *x = (*x - top).exp();
        total += f64::from(*x);
    }
    for x in row.iter_mut() {
        *x = (f64::from(*x) / total) as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;

    fn erf(x: f64) -> f64 {
        // The Maclaurin series, good to 1e-12 for |x| < 5.
        if x.abs() > 5.0 {
            return x.signum();
        }
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
            Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
            Activation::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        }
    }

    #[test]
    fn activations_stay_within_their_tolerance_on_every_isa() {
        for isa in Isa::here() {
            for act in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::Sigmoid]
            {
                for cols in [1, 7, 16, 33, 1000] {
                    let x = Mat::from_fn(3, cols, |r, c| {
                        [0.0, -100.0, 100.0, 1e-6][(c + r) % 4] * f32::from(u8::from(c % 5 == 0))
                            + (c as f32 / cols as f32 - 0.5) * 14.0
                    });
                    let mut y = x.clone();
                    activation_on(isa, act, y.view_mut());
                    for (x, y) in x.data().iter().zip(y.data()) {
                        let want = exact(act, f64::from(*x));
                        let off = (f64::from(*y) - want).abs();
                        assert!(off <= 1e-6 * (1.0 + f64::from(x.abs())), "{isa} {act:?}({x}) = {y}, exact {want}");
                    }
                }
                let mut bad = Mat::from_vec(1, 4, vec![f32::NAN, f32::INFINITY, 1.0, f32::NEG_INFINITY]);
                activation_on(isa, act, bad.view_mut());
                assert!(
                    bad[(0, 0)].is_nan()
                        && bad[(0, 1)] == if act == Activation::Sigmoid { 1.0 } else { f32::INFINITY }
                        && bad[(0, 2)].is_finite(),
                    "{isa} {act:?} {bad:?}"
                );
            }
        }
    }

    #[test]
    fn sums_caps_and_softmax() {
        let (a, b, v) = (random(5, 19, 1), random(5, 19, 2), random(1, 19, 3));
        let mut x = a.clone();
        add(x.view_mut(), b.view());
        add(x.view_mut(), v.view());
        for r in 0..5 {
            for c in 0..19 {
                assert_eq!(x[(r, c)], a[(r, c)] + b[(r, c)] + v[(0, c)]);
            }
        }
        let mut y = x.clone();
        softcap(2.0, y.view_mut());
        for (x, y) in x.data().iter().zip(y.data()) {
            assert!((2.0 * (x / 2.0).tanh() - y).abs() < 1e-6);
        }
        let mut s = vec![1000.0, 1001.0, f32::NEG_INFINITY];
        softmax(&mut s);
        assert!((s[1] - 0.731_058_6).abs() < 1e-6 && s[2] == 0.0);
    }
}

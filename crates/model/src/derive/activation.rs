//! The adjoints of activations and soft caps.

use lacuna_base::{MatMut, MatRef};
use lacuna_kernels as kernels;
use lacuna_spec::Activation;

use super::rows::each;
use crate::backend::{Xielu, factors};

/// What an activation is multiplied with, and its slope there.
fn beside(act: Activation, up: f32) -> (f32, f32) {
    match act {
        Activation::SwigluOai => (up.clamp(-7.0, 7.0) + 1.0, if up.abs() > 7.0 { 0.0 } else { 1.0 }),
        _ => (up, 1.0),
    }
}

/// The adjoint of `act(gate) · up` (or of what `act` makes of `up`): from `dy`, the gradient of the product, that of the gate's input into `dgate` and
/// that of `up` into `dup`, both overwritten. All are `[rows, width]`.
#[track_caller]
pub fn gated_activation(
    act: Activation,
    gate: MatRef<'_>,
    up: MatRef<'_>,
    dy: MatRef<'_>,
    mut dgate: MatMut<'_>,
    mut dup: MatMut<'_>,
) {
    each(dup.reborrow(), |r, row| row.copy_from_slice(gate.row(r)));
    kernels::activation(act, dup.reborrow());
    each(dup, |r, row| {
        row.iter_mut().zip(up.row(r)).zip(dy.row(r)).for_each(|((d, up), dy)| *d *= beside(act, *up).1 * dy);
    });
    each(dgate.reborrow(), |r, row| row.copy_from_slice(gate.row(r)));
    kernels::activation_slope(act, dgate.reborrow());
    each(dgate, |r, row| {
        row.iter_mut().zip(up.row(r)).zip(dy.row(r)).for_each(|((d, up), dy)| *d *= beside(act, *up).0 * dy);
    });
}

/// The adjoint of `act(x)`: from `dy`, the gradient of x into `dx`, overwritten. All are `[rows, width]`.
#[track_caller]
pub fn activation(act: Activation, x: MatRef<'_>, dy: MatRef<'_>, mut dx: MatMut<'_>) {
    each(dx.reborrow(), |r, row| row.copy_from_slice(x.row(r)));
    kernels::activation_slope(act, dx.reborrow());
    each(dx, |r, row| row.iter_mut().zip(dy.row(r)).for_each(|(d, dy)| *d *= dy));
}

/// The adjoint of xIELU: from `dy`, the gradient of x into `dx`, overwritten. All are `[rows, width]`.
#[track_caller]
pub fn xielu(of: &Xielu, x: MatRef<'_>, dy: MatRef<'_>, mut dx: MatMut<'_>) {
    each(dx.reborrow(), |r, row| row.copy_from_slice(x.row(r)));
    kernels::xielu_slope(factors(*of), dx.reborrow());
    each(dx, |r, row| row.iter_mut().zip(dy.row(r)).for_each(|(d, dy)| *d *= dy));
}

/// The gradients of xIELU's two learned numbers, summed row by row.
pub(super) fn xielu_numbers(of: &Xielu, x: MatRef<'_>, dy: MatRef<'_>) -> [f32; 2] {
    let mut sums = [0.0f64; 2];
    for r in 0..x.rows() {
        for (&x, &dy) in x.row(r).iter().zip(dy.row(r)) {
            let (x, dy) = (f64::from(x), f64::from(dy));
            if x > 0.0 {
                sums[0] += dy * x * x;
            } else {
                sums[1] += dy * (x.min(-1e-6).exp_m1() - x);
            }
        }
    }
    // The slope of softplus.
    let through = |sum: f64, number: f32| (sum / (1.0 + (-f64::from(number)).exp())) as f32;
    [through(sums[0], of.above), through(sums[1], of.below)]
}

/// The adjoint of a cut to `-by ..= by` from what went in: `d`, the gradient of what came out, becomes that of `x`.
#[track_caller]
pub fn clip(by: f32, x: &[f32], d: &mut [f32]) {
    assert_eq!(x.len(), d.len(), "two lengths");
    d.iter_mut().zip(x).filter(|(_, x)| x.abs() > by).for_each(|(d, _)| *d = 0.0);
}

/// The adjoint of `y = cap · tanh(x / cap)` from what came out: `d`, the gradient of `y`, becomes that of `x`.
#[track_caller]
pub fn softcap(cap: f32, y: &[f32], d: &mut [f32]) {
    assert_eq!(y.len(), d.len(), "two lengths");
    d.iter_mut().zip(y).for_each(|(d, y)| *d *= 1.0 - (y / cap) * (y / cap));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::naive;
    use crate::derive::differences::check;
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;

    #[test]
    fn agree_with_finite_differences_of_the_definitions() {
        use Activation::{Gelu, GeluTanh, Relu, Relu2, Silu, SwigluOai};
        for act in [Silu, Gelu, GeluTanh, Relu, Relu2, SwigluOai] {
            let [mut x, mut up, dy] = [1, 2, 3].map(|seed| random(20, 37, seed));
            if act == SwigluOai {
                // On both sides of the cuts.
                [&mut x, &mut up].into_iter().for_each(|m| m.data_mut().iter_mut().for_each(|v| *v *= 8.0));
            }
            let [mut dx, mut dgate, mut dup] = [(); 3].map(|()| Mat::zeros(20, 37));
            activation(act, x.view(), dy.view(), dx.view_mut());
            check(&format!("{act:?}"), dy.data(), &[(x.data(), dx.data())], |v| {
                v[0].iter().map(|&x| naive::activation(act, x)).collect()
            });
            gated_activation(act, x.view(), up.view(), dy.view(), dgate.view_mut(), dup.view_mut());
            let pairs = [(x.data(), dgate.data()), (up.data(), dup.data())];
            check(&format!("gated {act:?}"), dy.data(), &pairs, |v| {
                v[0].iter().zip(&v[1]).map(|(&x, &up)| naive::activation(act, x) * naive::beside(act, up)).collect()
            });
        }
    }

    #[test]
    fn xielu_and_its_numbers_agree_with_finite_differences() {
        let of = Xielu { layer: 0, above: 0.3, below: -0.8 };
        let (x, dy) = (random(20, 37, 1), random(20, 37, 2));
        let mut dx = Mat::zeros(20, 37);
        xielu(&of, x.view(), dy.view(), dx.view_mut());
        let [above, below] = xielu_numbers(&of, x.view(), dy.view());
        let pairs = [(x.data(), dx.data()), (&[of.above], &[above]), (&[of.below], &[below])];
        check("xielu", dy.data(), &pairs, |v| {
            let softplus = |x: f64| x.exp().ln_1p();
            let factors = [softplus(v[1][0]), 0.5 + softplus(v[2][0])];
            v[0].iter().map(|&x| naive::xielu(factors, x)).collect()
        });
    }

    #[test]
    fn a_cut_agrees_with_its_finite_differences() {
        let (x, dy) = (random(3, 50, 6), random(3, 50, 7));
        let mut dx = dy.clone();
        clip(0.75, x.data(), dx.data_mut());
        check("clip", dy.data(), &[(x.data(), dx.data())], |v| v[0].iter().map(|x| x.clamp(-0.75, 0.75)).collect());
    }

    #[test]
    fn a_soft_cap_agrees_with_its_finite_differences() {
        let (x, dy) = (random(3, 50, 4), random(3, 50, 5));
        let mut y = x.clone();
        kernels::softcap(1.5, y.view_mut());
        let mut dx = dy.clone();
        softcap(1.5, y.data(), dx.data_mut());
        check("softcap", dy.data(), &[(x.data(), dx.data())], |v| {
            v[0].iter().map(|x| 1.5 * (x / 1.5).tanh()).collect()
        });
    }
}

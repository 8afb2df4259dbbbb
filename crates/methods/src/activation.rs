//! The non-linearities of FFNs, with their slopes.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use lacuna_spec::Activation;

/// `act(x)` and its derivative there; of an `up` beside it nothing is known here.
pub(crate) fn value_and_slope(act: Activation, x: f64) -> (f64, f64) {
    match act {
        Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::Relu2 => (x.max(0.0).powi(2), 2.0 * x.max(0.0)),
        Activation::Xielu => panic!("xIELU's numbers are a layer's own: who asks refuses it first"),
        Activation::Sigmoid => {
            let s = 1.0 / (1.0 + (-x).exp());
            (s, s * (1.0 - s))
        }
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-x).exp());
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Activation::Gelu => {
            let below = 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2));
            (x * below, below + x * (-0.5 * x * x).exp() / (2.0 * PI).sqrt())
        }
        Activation::GeluTanh => {
            let c = (2.0 / PI).sqrt();
            let t = (c * (x + 0.044715 * x.powi(3))).tanh();
            let inner = c * (1.0 + 3.0 * 0.044715 * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner)
        }
        Activation::SwigluOai => {
            let m = x.min(7.0);
            let s = 1.0 / (1.0 + (-1.702 * m).exp());
            (m * s, if x > 7.0 { 0.0 } else { s + 1.702 * m * s * (1.0 - s) })
        }
    }
}

/// The error function, absolute error below 5e-7 (Abramowitz and Stegun 7.1.26).
fn erf(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.3275911 * x.abs());
    let terms = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
    let sum = terms.iter().fold(0.0, |sum, a| (sum + a) * t);
    (1.0 - sum * (-x * x).exp()).copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_and_slopes_by_differences() {
        use Activation::{Gelu, GeluTanh, Relu, Relu2, Silu};
        for (act, x, want) in [
            (Silu, 1.0, 0.731_058_6),
            (Silu, -3.0, -0.142_277_6),
            (Gelu, 1.0, 0.841_344_7),
            (Gelu, -2.0, -0.045_500_3),
            (GeluTanh, 1.0, 0.841_192_0),
            (Relu, -1.0, 0.0),
            (Relu, 2.5, 2.5),
            (Relu2, 1.5, 2.25),
        ] {
            assert!((value_and_slope(act, x).0 - want).abs() < 1e-6, "{act:?} of {x}");
        }
        for act in [Silu, Gelu, GeluTanh, Relu, Relu2] {
            for i in -40..40 {
                let (x, h) = (f64::from(i) * 0.2 + 0.05, 1e-3);
                let by = (value_and_slope(act, x + h).0 - value_and_slope(act, x - h).0) / (2.0 * h);
                assert!((value_and_slope(act, x).1 - by).abs() < 1e-3, "{act:?} at {x}");
            }
        }
    }
}

//! RoPE's frequencies for the slow twin, from the definitions.

use lacuna_spec::{Rope, RopeScaling};

/// The angle by which each pair of channels turns at a position, for a sequence of `length` tokens, and the factor on
/// cos and sin.
pub(super) fn frequencies(rope: &Rope, length: usize) -> (Vec<f64>, f64) {
    let (pairs, theta) = (rope.dims / 2, f64::from(rope.theta));
    let power = |i: usize| theta.powf(2.0 * i as f64 / rope.dims as f64);
    let divided = |by: &[f32]| (0..pairs).map(|i| 1.0 / (f64::from(by[i]) * power(i))).collect();
    let of = |f: &dyn Fn(usize, f64) -> f64| (0..pairs).map(|i| f(i, 1.0 / power(i))).collect();
    match &rope.scaling {
        RopeScaling::Default => (of(&|_, f| f), 1.0),
        RopeScaling::Linear { factor } => (of(&|_, f| f / f64::from(*factor)), 1.0),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
            let (factor, low, high) = (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
            let turned = |_, f: f64| {
                // Turns over the original context.
                let turns = *original as f64 * f / std::f64::consts::TAU;
                let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - smooth) * f / factor + smooth * f
            };
            (of(&turned), 1.0)
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original, truncate } => {
            let channel = |turns: f32| {
                let over = *original as f64 / (f64::from(turns) * std::f64::consts::TAU);
                rope.dims as f64 * over.ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (channel(*beta_fast), channel(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, mut high) = (low.max(0.0), high.min(rope.dims as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            let ramp = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            let turned = |i: usize, f: f64| f / f64::from(*factor) * ramp(i) + f * (1.0 - ramp(i));
            (of(&turned), f64::from(*attention_factor))
        }
        RopeScaling::Longrope { short, long, attention_factor, original } => {
            (divided(if length > *original { long } else { short }), f64::from(*attention_factor))
        }
        RopeScaling::Factors { factors } => (divided(factors), 1.0),
        RopeScaling::Proportional { pairs: turning, factor } => {
            (of(&|i, f| if i < *turning { f / f64::from(*factor) } else { 0.0 }), 1.0)
        }
    }
}

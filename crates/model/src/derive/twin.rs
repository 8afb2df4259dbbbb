//! Slow f64 forms of the decoder's operations, from their definitions, and their derivatives by finite differences.

use lacuna_kernels::Attention;
use lacuna_spec::{Activation, Norm, NormKind};

/// Compares gradients with central differences of `forward` in f64: `of` are the arguments with their gradients under
/// test, `dy` the gradient of what comes out. `forward` is given all arguments.
#[track_caller]
pub(crate) fn check(name: &str, dy: &[f32], of: &[(&[f32], &[f32])], forward: impl Fn(&[Vec<f64>]) -> Vec<f64>) {
    let mut args: Vec<Vec<f64>> = of.iter().map(|(v, _)| v.iter().map(|&x| f64::from(x)).collect()).collect();
    let along = |y: Vec<f64>| {
        assert_eq!(y.len(), dy.len(), "{name}: outputs and their gradients");
        y.iter().zip(dy).map(|(y, d)| y * f64::from(*d)).sum::<f64>()
    };
    for (a, (values, gradient)) in of.iter().enumerate() {
        assert_eq!(values.len(), gradient.len(), "{name}: argument {a} and its gradient");
        let size = gradient.iter().fold(1.0f64, |m, g| m.max(f64::from(g.abs())));
        for i in 0..values.len() {
            let (x, h) = (args[a][i], 1e-5);
            args[a][i] = x + h;
            let up = along(forward(&args));
            args[a][i] = x - h;
            let down = along(forward(&args));
            args[a][i] = x;
            let want = (up - down) / (2.0 * h);
            let got = f64::from(gradient[i]);
            assert!((got - want).abs() <= 2e-5 * size, "{name}: argument {a}, entry {i}: {got}, exact {want}");
        }
    }
}

/// `x · Wᵀ + b`.
pub(crate) fn linear(x: &[f64], w: &[f64], b: &[f64], inputs: usize) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        let one = |w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
        w.chunks(inputs).map(one).zip(b).map(|(y, b)| y + b).collect()
    };
    x.chunks(inputs).flat_map(row).collect()
}

/// Rows of `cols`, normalised.
pub(crate) fn norm(n: Norm, cols: usize, scale: &[f64], bias: &[f64], x: &[f64]) -> Vec<f64> {
    let row = |x: &[f64]| -> Vec<f64> {
        let mean = if n.kind == NormKind::Layer { x.iter().sum::<f64>() / cols as f64 } else { 0.0 };
        let var = x.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n.divisor.unwrap_or(cols) as f64;
        let by = (var + f64::from(n.eps)).sqrt();
        let one = |(i, v): (usize, &f64)| (v - mean) / by * (scale[i] + f64::from(n.offset)) + bias[i];
        x.iter().enumerate().map(one).collect()
    };
    x.chunks(cols).flat_map(row).collect()
}

/// The error function, by its Maclaurin series.
fn erf(x: f64) -> f64 {
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

/// One value.
pub(crate) fn activation(act: Activation, x: f64) -> f64 {
    match act {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::Relu => x.max(0.0),
    }
}

/// The softmax of a row.
pub(crate) fn softmax(row: &[f64]) -> Vec<f64> {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = row.iter().map(|x| (x - top).exp()).sum();
    row.iter().map(|x| (x - top).exp() / total).collect()
}

/// Causal attention of one sequence from its start: `q` is `[tokens, heads * dim]`, `k` and `v`
/// `[tokens, kv_heads * dim]`.
pub(crate) fn attention(p: &Attention, dim: usize, kv_heads: usize, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
    let (wide, narrow) = (p.heads * dim, kv_heads * dim);
    let mut out = vec![0.0; q.len()];
    for t in 0..q.len() / wide {
        for h in 0..p.heads {
            let g = h / (p.heads / kv_heads);
            let low = p.window.map_or(0, |w| (t + 1).saturating_sub(w));
            let score = |j: usize| {
                let s: f64 = (0..dim).map(|c| q[t * wide + h * dim + c] * k[j * narrow + g * dim + c]).sum();
                let s = s * f64::from(p.scale);
                p.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
            };
            let weights = softmax(&(low..=t).map(score).collect::<Vec<_>>());
            for (j, w) in (low..=t).zip(weights) {
                for c in 0..dim {
                    out[t * wide + h * dim + c] += w * v[j * narrow + g * dim + c];
                }
            }
        }
    }
    out
}

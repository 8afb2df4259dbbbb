//! The adjoint of rotary positions.

use lacuna_base::MatMut;
use lacuna_kernels::RopeTable;

/// Turns the gradients of turned heads back, in place, each `[rows, heads * head_dim]`: the transpose of the turn of
/// every row, which stands at (position, length of the sequence). The factor on cos and sin stays: it is no rotation's.
pub fn rope<const N: usize>(
    table: &RopeTable,
    at: impl ExactSizeIterator<Item = (usize, usize)> + Clone,
    head_dim: usize,
    gradients: [MatMut<'_>; N],
) {
    let back = table.with(at, |rows| rows.transposed());
    gradients.into_iter().for_each(|g| back.apply(head_dim, g));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::derive::differences::check;
    use lacuna_base::testkit::random;
    use lacuna_spec::{Rope, RopeScaling, RopeStyle};

    #[test]
    fn agrees_with_finite_differences_of_every_style_and_scaling() {
        let factor = 2.0;
        let scalings = [
            RopeScaling::Default,
            RopeScaling::Linear { factor },
            RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 32 },
            RopeScaling::Yarn {
                factor,
                beta_fast: 4.0,
                beta_slow: 1.0,
                attention_factor: 1.3,
                original: 32,
                truncate: true,
            },
            RopeScaling::Longrope {
                short: vec![1.0, 1.2, 1.5],
                long: vec![2.0, 3.0, 4.0],
                attention_factor: 1.2,
                original: 4,
            },
            RopeScaling::Factors { factors: vec![1.0, 3.0, 2.0] },
            RopeScaling::Proportional { pairs: 2, factor: 1.5 },
        ];
        let (rows, heads, dim) = (5, 2, 8);
        for style in [RopeStyle::Half, RopeStyle::Interleaved] {
            for scaling in &scalings {
                let table = RopeTable::new(&Rope { theta: 50.0, dims: 6, style, scaling: scaling.clone() });
                let (x, dy) = (random(rows, heads * dim, 1), random(rows, heads * dim, 2));
                let at = || (0..rows).map(|p| (p, rows));
                let mut dx = dy.clone();
                rope(&table, at(), dim, [dx.view_mut()]);
                // The turn by definition, with the table's own angles.
                let forward = |v: &[Vec<f64>]| {
                    let mut y = v[0].clone();
                    for (r, head) in y.chunks_mut(dim).enumerate() {
                        let (mut cos, mut sin) = ([0.0; 3], [0.0; 3]);
                        table.angles(r / heads, rows, &mut cos, &mut sin);
                        for i in 0..3 {
                            let (a, b) = if style == RopeStyle::Half { (i, i + 3) } else { (2 * i, 2 * i + 1) };
                            let (c, s) = (f64::from(cos[i]), f64::from(sin[i]));
                            (head[a], head[b]) = (head[a] * c - head[b] * s, head[b] * c + head[a] * s);
                        }
                    }
                    y
                };
                check(&format!("{style:?} {scaling:?}"), dy.data(), &[(x.data(), dx.data())], forward);
            }
        }
    }
}

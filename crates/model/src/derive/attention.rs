//! The adjoint of causal attention.

use lacuna_base::{Mat, MatMut, MatRef, dense};
use lacuna_kernels::{Attention, softcap, softmax_lanes};
use rayon::prelude::*;

use super::rows::{dot, each};
use crate::Lent;

/// Queries whose scores are made again together.
const TILE: usize = 64;

/// Gradients of what attention reads.
pub struct AttentionGradients {
    /// Of the queries, `[tokens, heads * head_dim]`.
    pub q: Lent,
    /// Of the keys, `[tokens, kv_heads * head_dim]`.
    pub k: Lent,
    /// Of the values, `[tokens, kv_heads * head_dim]`.
    pub v: Lent,
    /// Of the sinks, `[heads]`; empty where there are none.
    pub sinks: Vec<f32>,
}

/// The adjoint of causal attention over one sequence from its first position on.
///
/// `q` is `[tokens, heads * head_dim]` and `k` and `v` `[tokens, kv_heads * head_dim]` as attention read them; `out` is
/// what it gave and `dout` the gradient of that. With `S` the scores and `P` their softmax: `dV = Pᵀ dO`,
/// `dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O))`, `dQ = dS K`, `dK = dSᵀ Q`; a sink, whose value is nothing, gets the sum over
/// queries of `-p rowsum(dO ∘ O)`. Weights are made again, a tile of queries at a time:
/// never a whole score matrix.
#[track_caller]
pub fn attention(
    p: &Attention,
    head_dim: usize,
    [q, k, v]: [MatRef<'_>; 3],
    out: MatRef<'_>,
    dout: MatRef<'_>,
) -> AttentionGradients {
    let tokens = q.rows();
    assert_eq!(q.cols(), p.heads * head_dim, "query heads of another width");
    assert!(k.rows() == tokens && v.rows() == tokens && k.cols() == v.cols(), "keys or values of another shape");
    assert_eq!((out.rows(), out.cols()), (tokens, q.cols()), "two shapes");
    assert_eq!((dout.rows(), dout.cols()), (tokens, q.cols()), "two shapes");
    let kv_heads = k.cols() / head_dim;
    assert!(k.cols().is_multiple_of(head_dim) && p.heads.is_multiple_of(kv_heads), "{} heads over {kv_heads}", p.heads);
    let group = p.heads / kv_heads;
    let heads: Vec<([Mat; 3], f32)> = (0..p.heads)
        .into_par_iter()
        .map(|h| {
            let mine = |m: MatRef<'_>, h: usize| m.columns(h * head_dim, (h + 1) * head_dim).to_mat();
            let (k, v) = (mine(k, h / group), mine(v, h / group));
            let [q, out, dout] = [q, out, dout].map(|m| mine(m, h));
            one(p, h, [&q, &k, &v], &out, &dout)
        })
        .collect();
    let mut all = AttentionGradients {
        q: Lent::new(tokens, q.cols()),
        k: Lent::new(tokens, k.cols()),
        v: Lent::new(tokens, k.cols()),
        sinks: heads.iter().filter(|_| p.sinks.is_some()).map(|(_, sink)| *sink).collect(),
    };
    let heads: Vec<[Mat; 3]> = heads.into_iter().map(|(of, _)| of).collect();
    each(all.q.view_mut(), |r, row| {
        row.chunks_exact_mut(head_dim).zip(&heads).for_each(|(to, [dq, ..])| to.copy_from_slice(dq.row(r)));
    });
    // Heads that share keys, in their order.
    for (i, to) in [(1, &mut all.k), (2, &mut all.v)] {
        each(to.view_mut(), |r, row| {
            for (to, sharing) in row.chunks_exact_mut(head_dim).zip(heads.chunks(group)) {
                to.copy_from_slice(sharing[0][i].row(r));
                for one in &sharing[1..] {
                    to.iter_mut().zip(one[i].row(r)).for_each(|(a, b)| *a += b);
                }
            }
        });
    }
    all
}

/// Gradients of one head's queries, and its part of those of its keys and values: `[tokens, head_dim]` each; and of its
/// sink.
fn one(p: &Attention, head: usize, [q, k, v]: [&Mat; 3], out: &Mat, dout: &Mat) -> ([Mat; 3], f32) {
    let (tokens, dim) = (q.rows(), q.cols());
    let mut dsink = 0.0;
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| Mat::zeros(tokens, dim));
    let (mut weights, mut scores, mut capped) = (Vec::new(), Vec::new(), Vec::new());
    let first_seen = |position: usize| {
        let window = p.window.map_or(0, |w| (position + 1).saturating_sub(w));
        window.max(p.chunk.map_or(0, |c| position / c * c))
    };
    for from in (0..tokens).step_by(TILE) {
        let to = (from + TILE).min(tokens);
        let low = first_seen(from);
        let (rows, keys) = (to - from, to - low);
        for buffer in [&mut weights, &mut scores] {
            buffer.clear();
            buffer.resize(rows * keys, 0.0f32);
        }
        let (q, k, v) = (q.view().rows_range(from, to), k.view().rows_range(low, to), v.view().rows_range(low, to));
        let dout_tile = dout.view().rows_range(from, to);
        dense::add_matmul_nt(MatMut::new(rows, keys, &mut weights), p.scale, q, k);
        if let Some(cap) = p.softcap {
            softcap(cap, MatMut::new(rows, keys, &mut weights));
            capped.clear();
            capped.extend_from_slice(&weights);
        }
        dense::add_matmul_nt(MatMut::new(rows, keys, &mut scores), 1.0, dout_tile, v);
        for (i, (w, s)) in weights.chunks_exact_mut(keys).zip(scores.chunks_exact_mut(keys)).enumerate() {
            let seen = first_seen(from + i) - low..from + i + 1 - low;
            w[..seen.start].fill(0.0);
            w[seen.end..].fill(0.0);
            s[..seen.start].fill(0.0);
            s[seen.end..].fill(0.0);
            if p.alibi.is_some() {
                // How near the key lies changes nothing about the slope of its score.
                let nearer = (0..seen.len()).rev();
                w[seen.clone()].iter_mut().zip(nearer).for_each(|(w, away)| *w -= p.slope(head) * away as f32);
            }
            let log_sum = softmax_lanes(&mut w[seen.clone()]);
            let mean = dot(dout.row(from + i), out.row(from + i));
            if let Some(sinks) = &p.sinks {
                // What the sink has of the whole, and what it leaves.
                let taken = 1.0 / (1.0 + (log_sum - f64::from(sinks[head])).exp());
                w[seen.clone()].iter_mut().for_each(|w| *w *= (1.0 - taken) as f32);
                dsink -= taken as f32 * mean;
            }
            for (s, w) in s[seen.clone()].iter_mut().zip(&w[seen.clone()]) {
                *s = w * (*s - mean);
            }
            if let Some(cap) = p.softcap {
                let capped = &capped[i * keys..(i + 1) * keys];
                super::softcap(cap, &capped[seen.clone()], &mut s[seen]);
            }
        }
        let (weights, scores) = (MatRef::new(rows, keys, &weights), MatRef::new(rows, keys, &scores));
        let below = |m: &mut Mat, f: &mut dyn FnMut(MatMut<'_>)| {
            f(MatMut::new(keys, dim, &mut m.data_mut()[low * dim..to * dim]));
        };
        below(&mut dv, &mut |dv| dense::add_matmul_tn(dv, 1.0, weights, dout_tile));
        below(&mut dk, &mut |dk| dense::add_matmul_tn(dk, p.scale, scores, q));
        let dq = MatMut::new(rows, dim, &mut dq.data_mut()[from * dim..to * dim]);
        dense::add_matmul_nn(dq, p.scale, scores, k);
    }
    ([dq, dk, dv], dsink)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::naive;
    use crate::derive::differences::check;
    use lacuna_base::testkit::random;
    use lacuna_kernels::{KvFormat, KvLayout, KvPool, KvView};

    #[test]
    fn agrees_with_finite_differences_of_the_definition() {
        let plain =
            || Attention { heads: 4, scale: 0.7, window: None, chunk: None, softcap: None, alibi: None, sinks: None };
        let sinks = Some([0.4, -2.0, 1.5, 0.0].into());
        for (name, p, kv_heads, dim, tokens) in [
            ("grouped", plain(), 2, 3, 6),
            ("one key head", Attention { window: Some(3), ..plain() }, 1, 2, 8),
            ("in chunks", Attention { chunk: Some(3), ..plain() }, 2, 2, 8),
            ("tiles in chunks", Attention { heads: 1, chunk: Some(20), window: Some(18), ..plain() }, 1, 2, 70),
            ("capped", Attention { softcap: Some(1.5), ..plain() }, 4, 2, 5),
            ("capped in a window", Attention { softcap: Some(2.0), window: Some(2), ..plain() }, 2, 2, 7),
            ("tiles", Attention { heads: 1, window: Some(40), ..plain() }, 1, 2, 70),
            ("one token", plain(), 2, 3, 1),
            ("with sinks", Attention { window: Some(4), sinks, ..plain() }, 2, 3, 9),
            ("ALiBi", Attention { heads: 6, alibi: Some(4.0), ..plain() }, 2, 2, 9),
            (
                "ALiBi, capped in a window",
                Attention { alibi: Some(8.0), softcap: Some(2.0), window: Some(4), ..plain() },
                2,
                2,
                9,
            ),
        ] {
            let [q, dout] = [1, 2].map(|seed| random(tokens, p.heads * dim, seed));
            let [k, v] = [3, 4].map(|seed| random(tokens, kv_heads * dim, seed));
            let layout = KvLayout { kv_heads, head_dim: dim, page_tokens: 96 };
            let mut pool = KvPool::new(layout, KvFormat::F32);
            pool.reserve(0);
            (0..tokens).for_each(|t| pool.page_mut(0).write(t, k.row(t), v.row(t)));
            let mut out = Mat::zeros(tokens, q.cols());
            let positions: Vec<usize> = (0..tokens).collect();
            let kv = KvView { pool: &pool, blocks: &[0], tokens };
            p.run(q.view(), &positions, [(0..tokens, kv)], out.view_mut());
            let got = attention(&p, dim, [q.view(), k.view(), v.view()], out.view(), dout.view());
            let pairs = [(q.data(), got.q.data()), (k.data(), got.k.data()), (v.data(), got.v.data())];
            check(name, dout.data(), &pairs, |a| naive::attention(&p, dim, kv_heads, &a[0], &a[1], &a[2]));
            let Some(sinks) = &p.sinks else { continue };
            let [q, k, v] = [&q, &k, &v].map(|m| m.data().iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
            for (h, got) in got.sinks.iter().enumerate() {
                let moved = |by: f32| -> f64 {
                    let mut sinks = sinks.to_vec();
                    sinks[h] += by;
                    let p = Attention { sinks: Some(sinks.into()), ..p.clone() };
                    let y = naive::attention(&p, dim, kv_heads, &q, &k, &v);
                    y.iter().zip(dout.data()).map(|(y, d)| y * f64::from(*d)).sum()
                };
                let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((f64::from(*got) - want).abs() < 1e-3, "sink of head {h}: {got}, exact {want}");
            }
        }
    }

    #[test]
    fn long_sequences_agree_along_a_direction() {
        let p =
            Attention { heads: 2, scale: 0.6, window: Some(170), chunk: None, softcap: None, alibi: None, sinks: None };
        let (tokens, dim) = (300, 4);
        let [q, dout] = [1, 2].map(|seed| random(tokens, 2 * dim, seed));
        let [k, v] = [3, 4].map(|seed| random(tokens, dim, seed));
        let args: Vec<Vec<f64>> =
            [&q, &k, &v].iter().map(|m| m.data().iter().map(|&x| f64::from(x)).collect()).collect();
        let exact = naive::attention(&p, dim, 1, &args[0], &args[1], &args[2]);
        let out = Mat::from_vec(tokens, 2 * dim, exact.iter().map(|&x| x as f32).collect());
        let got = attention(&p, dim, [q.view(), k.view(), v.view()], out.view(), dout.view());
        for (i, gradient) in [&got.q, &got.k, &got.v].into_iter().enumerate() {
            let direction = random(tokens, gradient.cols(), 9);
            let moved = |h: f64| {
                let mut args = args.clone();
                args[i].iter_mut().zip(direction.data()).for_each(|(a, d)| *a += h * f64::from(*d));
                let y = naive::attention(&p, dim, 1, &args[0], &args[1], &args[2]);
                y.iter().zip(dout.data()).map(|(y, d)| y * f64::from(*d)).sum::<f64>()
            };
            let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            let along = |a: &f32, b: &f32| f64::from(*a) * f64::from(*b);
            let mine: f64 = gradient.data().iter().zip(direction.data()).map(|(a, b)| along(a, b)).sum();
            let size = gradient.data().iter().map(|g| along(g, g)).sum::<f64>().sqrt();
            assert!((mine - want).abs() < 1e-4 * size, "argument {i}: {mine}, exact {want}");
        }
    }
}

//! The attention that keys get, added up over queries: what some keepers of cached entries go by.

use std::ops::Range;
use std::sync::Mutex;

use lacuna_base::MatRef;

use super::attention::Attention;
use super::elementwise::{softmax, softmax_beside};
use crate::kv::{KEY_BLOCK, KvView};
use crate::parallel;

/// Rows whose scores are computed side by side, so that keys are read once for them.
const ROWS: usize = 8;

/// The attention that the slots of one sequence got in one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mass {
    /// Of each key head.
    pub heads: Vec<HeadMass>,
    /// Rows from this slot on may be taken back: what they give is kept apart.
    pub certain: usize,
}

/// The attention that the slots of one key head got from all query heads that read it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadMass {
    /// A number for each slot, or for more: those count as nothing.
    pub sum: Vec<f32>,
    /// What each row kept apart gave, in order: a number for each slot that it sees.
    pub apart: Vec<Vec<f32>>,
}

impl Mass {
    /// Of `heads` key heads, nothing yet.
    pub fn new(heads: usize) -> Mass {
        Mass { heads: vec![HeadMass::default(); heads], certain: 0 }
    }
}

impl HeadMass {
    /// Adds what one row gave to slots.
    pub fn add(&mut self, given: &[f32]) {
        if self.sum.len() < given.len() {
            self.sum.resize(given.len(), 0.0);
        }
        self.sum.iter_mut().zip(given).for_each(|(sum, x)| *sum += x);
    }

    /// Takes the attention that one row gave, at slot `at`: the sum of its query heads' weights.
    pub fn take(&mut self, at: usize, certain: usize, given: &[f32]) {
        if at < certain { self.add(given) } else { self.apart.push(given.to_vec()) }
    }
}

/// What one thread does: one key head of one sequence.
struct Job<'a> {
    rows: Range<usize>,
    kv: &'a KvView<'a>,
    head: usize,
    certain: usize,
    mass: &'a mut HeadMass,
}

impl Attention {
    /// Adds the attention of some rows to the slots that they see, row by row in their order: `q` is `[rows, heads *
    /// head_dim]`, `slots` the rows' own slots, `sequences` the rows cut into sequences. A row's share does not depend
    /// on its company; neither do sums of rows that come in several calls. Panics where shapes do not fit.
    #[track_caller]
    pub fn weigh(&self, q: MatRef<'_>, slots: &[usize], sequences: &mut [(Range<usize>, KvView<'_>, &mut Mass)]) {
        assert_eq!(q.rows(), slots.len(), "a slot for each row");
        let (mut jobs, mut cost) = (Vec::new(), 0);
        for (rows, kv, mass) in sequences {
            assert_eq!(mass.heads.len(), kv.pool.layout().kv_heads, "a sum for each key head");
            cost += rows.len() * self.heads * kv.pool.layout().head_dim * kv.tokens;
            let certain = mass.certain;
            for (head, mass) in mass.heads.iter_mut().enumerate() {
                jobs.push(Mutex::new(Job { rows: rows.clone(), kv, head, certain, mass }));
            }
        }
        parallel::ranges(jobs.len(), 1, 1, cost / jobs.len().max(1), |from, to| {
            for job in &jobs[from..to] {
                // Nobody else meets it.
                self.weigh_head(q, slots, &mut job.lock().unwrap_or_else(|e| e.into_inner()));
            }
        });
    }

    fn weigh_head(&self, q: MatRef<'_>, slots: &[usize], job: &mut Job<'_>) {
        let layout = job.kv.pool.layout();
        let (dim, group) = (layout.head_dim, self.heads / layout.kv_heads);
        let mut keys = vec![0.0; dim * KEY_BLOCK];
        let (mut scores, mut given) = (Vec::new(), Vec::new());
        for from in job.rows.clone().step_by(ROWS) {
            let rows = from..(from + ROWS).min(job.rows.end);
            let blocks = rows.clone().map(|r| slots[r] / KEY_BLOCK + 1).max().unwrap_or(0);
            let stride = blocks * KEY_BLOCK;
            scores.resize(rows.len() * group * stride, 0.0);
            for block in 0..blocks {
                let at = block * KEY_BLOCK;
                job.kv.page_of(at).keys_into(job.head, at % layout.page_tokens / KEY_BLOCK, &mut keys);
                for (i, scores) in scores.chunks_exact_mut(stride).enumerate() {
                    let head = (job.head * group + i % group) * dim;
                    let q = &q.row(rows.start + i / group)[head..head + dim];
                    let mut sums = [0.0f32; KEY_BLOCK];
                    for (q, keys) in q.iter().zip(keys.chunks_exact(KEY_BLOCK)) {
                        sums.iter_mut().zip(keys).for_each(|(s, k)| *s += q * k);
                    }
                    scores[at..at + KEY_BLOCK].copy_from_slice(&sums);
                }
            }
            for (r, scores) in rows.zip(scores.chunks_exact_mut(group * stride)) {
                let high = slots[r];
                let low = self.low(high);
                given.clear();
                given.resize(high + 1, 0.0f32);
                for (h, scores) in scores.chunks_exact_mut(stride).enumerate() {
                    let slope = self.slope(job.head * group + h);
                    let seen = &mut scores[low..=high];
                    for (t, s) in (low..).zip(seen.iter_mut()) {
                        *s *= self.scale;
                        *s = self.softcap.map_or(*s, |c| c * (*s / c).tanh());
                        if self.alibi.is_some() {
                            *s -= slope * (high - t) as f32;
                        }
                    }
                    match self.sink(job.head * group + h) {
                        None => softmax(seen),
                        Some(sink) => softmax_beside(seen, sink),
                    }
                    given[low..].iter_mut().zip(seen).for_each(|(g, s)| *g += *s);
                }
                job.mass.take(high, job.certain, &given);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;

    use super::*;
    use crate::kv::{KvFormat, KvLayout, KvPool};

    /// A pool with `n` slots in pages that lie in no order, with what it holds of keys and values.
    fn pool(layout: KvLayout, format: KvFormat, n: usize) -> (KvPool, Vec<u32>, [Mat; 2]) {
        let width = layout.kv_heads * layout.head_dim;
        let (mut k, mut v) = (random(n, width, 2), random(n, width, 3));
        let mut pool = KvPool::new(layout, format);
        let blocks: Vec<u32> = (0..n.div_ceil(layout.page_tokens) as u32).map(|i| (i * 5 + 3) % 16).collect();
        blocks.iter().for_each(|&b| pool.reserve(b));
        for p in 0..n {
            pool.page_mut(blocks[p / layout.page_tokens]).write(p % layout.page_tokens, k.row(p), v.row(p));
        }
        read(&pool, &blocks, &mut k, &mut v);
        (pool, blocks, [k, v])
    }

    fn read(pool: &KvPool, blocks: &[u32], k: &mut Mat, v: &mut Mat) {
        let n = pool.layout().page_tokens;
        (0..k.rows()).for_each(|p| pool.page(blocks[p / n]).read(p % n, k.row_mut(p), v.row_mut(p)));
    }

    const LAYOUTS: [(usize, KvLayout); 3] = [
        (1, KvLayout { kv_heads: 1, head_dim: 5, page_tokens: 32 }),
        (6, KvLayout { kv_heads: 2, head_dim: 16, page_tokens: 32 }),
        (8, KvLayout { kv_heads: 4, head_dim: 20, page_tokens: 64 }),
    ];

    #[test]
    fn sums_are_those_of_the_definition_however_rows_come() {
        for (heads, layout) in LAYOUTS {
            for (format, window, softcap) in
                [(KvFormat::F32, None, Some(0.7)), (KvFormat::F16, Some(20), None), (KvFormat::Q8, None, None)]
            {
                let alibi = window.map(|_| 8.0);
                let sinks = softcap.map(|_| (0..heads).map(|h| h as f32 - 1.0).collect());
                let chunk = (format == KvFormat::Q8).then_some(50);
                let a = Attention { heads, scale: 0.3, window, chunk, softcap, alibi, sinks };
                let (n, dim, group) = (137, layout.head_dim, heads / layout.kv_heads);
                let (pool, blocks, [k, _]) = pool(layout, format, n);
                let q = random(n, heads * dim, 1);
                let slots: Vec<usize> = (0..n).collect();
                let mut want = vec![vec![0.0f64; n]; layout.kv_heads];
                for p in 0..n {
                    for h in 0..heads {
                        let low = window.map_or(chunk.map_or(0, |c| p / c * c), |w| (p + 1).saturating_sub(w));
                        let score = |t: usize| {
                            let (q, k) = (&q.row(p)[h * dim..], &k.row(t)[h / group * dim..]);
                            let dot: f64 = (0..dim).map(|d| f64::from(q[d]) * f64::from(k[d])).sum();
                            let x = dot * f64::from(a.scale);
                            let x = softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh());
                            (x - f64::from(a.slope(h)) * (p - t) as f64).exp()
                        };
                        let sink = a.sink(h).map_or(0.0, |s| f64::from(s).exp());
                        let total: f64 = sink + (low..=p).map(score).sum::<f64>();
                        (low..=p).for_each(|t| want[h / group][t] += score(t) / total);
                    }
                }
                let run = |steps: &[usize], certain: usize| {
                    let (mut mass, mut from) = (Mass { certain, ..Mass::new(layout.kv_heads) }, 0);
                    for &to in steps {
                        let kv = KvView { pool: &pool, blocks: &blocks, tokens: to };
                        let rows = q.view().rows_range(from, to);
                        a.weigh(rows, &slots[from..to], &mut [(0..to - from, kv, &mut mass)]);
                        from = to;
                    }
                    mass
                };
                let whole = run(&[n], n);
                for (head, want) in whole.heads.iter().zip(&want) {
                    assert!(head.apart.is_empty() && head.sum.len() == n);
                    let off = head.sum.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
                    assert!(off < 1e-4, "{format:?} {heads}: {off}");
                }
                assert_eq!(run(&[1, 2, 40, 41, 100, n], n), whole, "in parts");
                // Rows kept apart, and counted later.
                let mut late = run(&[90, n], 100);
                for head in &mut late.heads {
                    assert_eq!(head.apart.len(), 37);
                    let apart = std::mem::take(&mut head.apart);
                    apart.iter().for_each(|given| head.add(given));
                }
                assert_eq!(late.heads, whole.heads);
            }
        }
    }

    #[test]
    fn slots_gather_bit_for_bit_in_their_own_pages_or_others() {
        for (_, layout) in LAYOUTS {
            for format in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
                for own in [false, true] {
                    let (n, pages, dim) = (137, layout.page_tokens, layout.head_dim);
                    let (mut pool, blocks, [k, v]) = pool(layout, format, n);
                    // Every head keeps others.
                    let kept: Vec<Vec<usize>> = (0..layout.kv_heads)
                        .map(|h| (0..n).filter(|p| (p * 7 + h) % 3 != 0).take(80).collect())
                        .collect();
                    let to: Vec<u32> = if own { blocks.clone() } else { (20..25).collect() };
                    to.iter().for_each(|&b| pool.reserve(b));
                    let to = &to[..80usize.div_ceil(pages)];
                    for (i, &block) in to.iter().enumerate() {
                        let slots = i * pages..((i + 1) * pages).min(80);
                        let part: Vec<&[usize]> = kept.iter().map(|kept| &kept[slots.clone()]).collect();
                        pool.gather(&blocks, block, &part);
                    }
                    let (mut k2, mut v2) = (Mat::zeros(80, k.cols()), Mat::zeros(80, v.cols()));
                    read(&pool, to, &mut k2, &mut v2);
                    for (h, kept) in kept.iter().enumerate() {
                        let head = h * dim..(h + 1) * dim;
                        for (slot, &from) in kept.iter().enumerate() {
                            assert_eq!(
                                k2.row(slot)[head.clone()],
                                k.row(from)[head.clone()],
                                "{format:?} {own} {slot}"
                            );
                            assert_eq!(
                                v2.row(slot)[head.clone()],
                                v.row(from)[head.clone()],
                                "{format:?} {own} {slot}"
                            );
                        }
                    }
                    if !own {
                        let (mut k3, mut v3) = (k.clone(), v.clone());
                        read(&pool, &blocks, &mut k3, &mut v3);
                        assert!(k3 == k && v3 == v, "what was copied from is as it was");
                    }
                }
            }
        }
    }
}

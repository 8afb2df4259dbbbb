//! Causal attention over pages, streaming: an online softmax over blocks of 32 absolute positions, never a whole score matrix.
//!
//! A query's blocks, its bounds in them and every order of summation follow from its own position, so its result is the same bits in any
//! company: alone, in a chunk of any size, with any number of threads.

use half::f16;
use lacuna_base::{MatMut, MatRef};

use super::math;
use crate::kv::{Data, KEY_BLOCK, KvLayout, KvView};
use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, parallel, scratch};

/// What attention does with scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads; a multiple of the layout's key heads.
    pub heads: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// A query at `p` sees keys `p - window + 1 ..= p`; `None`: all earlier ones.
    pub window: Option<usize>,
    /// `c * tanh(scores / c)`.
    pub softcap: Option<f32>,
}

/// Queries a task handles together for one key head.
const QUERIES: usize = 24;

impl Attention {
    /// The outputs of one sequence's rows: `q` and `out` are `[rows, heads * head_dim]`, `positions` the rows' positions, whose keys
    /// (and all before) are in `kv`. Panics where shapes do not fit or a position is not written.
    #[track_caller]
    pub fn run(&self, q: MatRef<'_>, positions: &[usize], kv: &KvView<'_>, out: MatMut<'_>) {
        self.run_on(Isa::best(), q, positions, kv, out);
    }

    #[track_caller]
    fn run_on(&self, isa: Isa, q: MatRef<'_>, positions: &[usize], kv: &KvView<'_>, mut out: MatMut<'_>) {
        assert_eq!((q.rows(), q.cols()), (out.rows(), out.cols()), "two shapes");
        assert_eq!(q.rows(), positions.len(), "a position for each row");
        let Some(last) = positions.iter().max() else { return };
        let layout = kv.pages.first().expect("a sequence with queries has a page").layout();
        assert!(kv.pages.iter().all(|p| p.layout() == layout), "pages of one layout");
        assert!(
            *last < kv.tokens && kv.tokens <= kv.pages.len() * layout.page_tokens,
            "position {last} of {}",
            kv.tokens
        );
        assert_eq!(q.cols(), self.heads * layout.head_dim, "query heads of another width");
        assert!(self.heads.is_multiple_of(layout.kv_heads), "{} heads over {}", self.heads, layout.kv_heads);
        let group = self.heads / layout.kv_heads;
        let rows = (QUERIES / group).max(1);
        let chunks = q.rows().div_ceil(rows);
        let at = Shared(out.raw_mut().as_mut_ptr(), out.stride());
        let mean = kv.tokens.min(self.window.unwrap_or(usize::MAX));
        parallel::ranges(
            layout.kv_heads * chunks,
            1,
            1,
            2 * rows.min(q.rows()) * group * layout.head_dim * mean,
            |from, to| {
                let at = &at;
                for task in from..to {
                    let (head, chunk) = (task / chunks, task % chunks);
                    let (first, end) = (chunk * rows, ((chunk + 1) * rows).min(q.rows()));
                    let need = (end - first) * group * (layout.padded() + KEY_BLOCK);
                    // The scratch is lent out here and not within: a closure would be compiled without the instruction set.
                    scratch::with(need, |buffer| {
                        dispatch(
                            isa,
                            Task { p: self, q, positions, kv, layout, out: at, head, group, first, end, buffer },
                        );
                    });
                }
            },
        );
    }
}

struct Shared(*mut f32, usize);
// SAFETY: tasks write disjoint (row, head) pairs.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

/// One key head and the queries of rows `first..end` that share it.
struct Task<'a> {
    p: &'a Attention,
    q: MatRef<'a>,
    positions: &'a [usize],
    kv: &'a KvView<'a>,
    layout: KvLayout,
    out: &'a Shared,
    head: usize,
    group: usize,
    first: usize,
    end: usize,
    /// Room for every query's sums and one block of weights each.
    buffer: &'a mut [f32],
}

/// A cached element.
trait Element: Copy {
    /// # Safety
    /// `p` is readable for LANES elements.
    unsafe fn lanes<S: Simd>(s: S, p: *const Self) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const f32) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load(p) }
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const f16) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load_f16(p.cast()) }
    }
}

/// What a query carries from block to block.
#[derive(Clone, Copy)]
struct State {
    q: *const f32,
    acc: *mut f32,
    weights: *mut f32,
    /// First and last visible position.
    low: usize,
    high: usize,
    top: f32,
    sum: f32,
}

impl State {
    /// The visible part of the block that starts at `start`, counted within it; empty where it sees nothing.
    #[inline(always)]
    fn bounds(&self, start: usize) -> (usize, usize) {
        let end = (self.high + 1).saturating_sub(start).min(KEY_BLOCK);
        (self.low.saturating_sub(start).min(end), end)
    }
}

impl Op for Task<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (dim, padded) = (self.layout.head_dim, self.layout.padded());
        let count = (self.end - self.first) * self.group;
        let (accs, weights) = std::mem::take(&mut self.buffer).split_at_mut(count * padded);
        accs.fill(0.0);
        let mut states = Vec::with_capacity(count);
        for r in self.first..self.end {
            let high = self.positions[r];
            let low = self.p.window.map_or(0, |w| (high + 1).saturating_sub(w));
            for g in 0..self.group {
                let i = states.len();
                let at = (self.head * self.group + g) * dim;
                states.push(State {
                    q: self.q.row(r)[at..at + dim].as_ptr(),
                    acc: accs[i * padded..].as_mut_ptr(),
                    weights: weights[i * KEY_BLOCK..].as_mut_ptr(),
                    low,
                    high,
                    top: f32::NEG_INFINITY,
                    sum: 0.0,
                });
            }
        }
        // SAFETY: the states point into this buffer and into q; run_on checked that the pages hold every visible position.
        unsafe { self.blocks(s, &mut states) };
        for (i, state) in states.iter().enumerate() {
            let (r, g) = (self.first + i / self.group, i % self.group);
            for d in 0..dim {
                // SAFETY: `out` has this row and these columns, which belong to this task alone; `acc` has `padded` values.
                unsafe {
                    *self.out.0.add(r * self.out.1 + (self.head * self.group + g) * dim + d) =
                        *state.acc.add(d) / state.sum;
                }
            }
        }
    }
}

impl Task<'_> {
    /// # Safety
    /// States are as [`Op::run`] makes them.
    #[inline(always)]
    unsafe fn blocks<S: Simd>(&self, s: S, states: &mut [State]) {
        let l = self.layout;
        let (mut low, mut high) = (usize::MAX, 0);
        for state in states.iter() {
            low = low.min(state.low);
            high = high.max(state.high);
        }
        let mut b = low / KEY_BLOCK;
        while b <= high / KEY_BLOCK {
            let start = b * KEY_BLOCK;
            let (page, slot) = (self.kv.pages[start / l.page_tokens], start % l.page_tokens);
            let key = (self.head * l.page_tokens + slot) * l.head_dim;
            let value = (self.head * l.page_tokens + slot) * l.padded();
            // SAFETY: block, head and slot lie inside the page.
            unsafe {
                match &page.data {
                    Data::F32(k, v) => self.block(s, states, start, k.as_ptr().add(key), v.as_ptr().add(value)),
                    Data::F16(k, v) => self.block(s, states, start, k.as_ptr().add(key), v.as_ptr().add(value)),
                }
            }
            b += 1;
        }
    }

    /// One block of keys against every query that sees some of it.
    /// # Safety
    /// As for [`Task::blocks`]; `keys` is a whole block, `values` its rows.
    #[inline(always)]
    unsafe fn block<S: Simd, E: Element>(
        &self,
        s: S,
        states: &mut [State],
        start: usize,
        keys: *const E,
        values: *const E,
    ) {
        let (dim, padded) = (self.layout.head_dim, self.layout.padded());
        let n = states.len();
        let mut i = 0;
        // SAFETY: as the caller promises.
        unsafe {
            while i < n {
                let (lo, hi) = states[i].bounds(start);
                if lo == hi {
                    i += 1;
                    continue;
                }
                let mut same = 1;
                while same < 4 && i + same < n && states[i + same].bounds(start) == (lo, hi) {
                    same += 1;
                }
                if same == 4 {
                    let four = &mut states[i..i + 4];
                    scores::<S, E, 4>(s, four, keys, dim);
                    for state in four.iter_mut() {
                        self.soften(s, state, lo, hi, padded);
                    }
                    gather::<S, E, 4>(s, four, values, lo, hi, padded);
                    i += 4;
                } else {
                    let one = &mut states[i..i + 1];
                    scores::<S, E, 1>(s, one, keys, dim);
                    self.soften(s, &mut one[0], lo, hi, padded);
                    gather::<S, E, 1>(s, one, values, lo, hi, padded);
                    i += 1;
                }
            }
        }
    }

    /// Turns a block's raw scores into weights and brings the query's sums to the new largest score.
    /// # Safety
    /// As for [`Task::blocks`].
    #[inline(always)]
    unsafe fn soften<S: Simd>(&self, s: S, state: &mut State, lo: usize, hi: usize, padded: usize) {
        // SAFETY: weights hold a block, acc `padded` values.
        unsafe {
            let w = state.weights;
            let mut j = 0;
            while j < KEY_BLOCK {
                let mut v = s.mul(s.load(w.add(j)), s.splat(self.p.scale));
                if let Some(c) = self.p.softcap {
                    v = s.mul(s.splat(c), math::tanh(s, s.div(v, s.splat(c))));
                }
                s.store(w.add(j), v);
                j += S::LANES;
            }
            for j in (0..lo).chain(hi..KEY_BLOCK) {
                *w.add(j) = f32::NEG_INFINITY;
            }
            let mut top = state.top;
            for j in lo..hi {
                let v = *w.add(j);
                top = if v > top { v } else { top };
            }
            let mut total = s.splat(0.0);
            let mut j = 0;
            while j < KEY_BLOCK {
                let v = math::exp(s, s.sub(s.load(w.add(j)), s.splat(top)));
                s.store(w.add(j), v);
                total = s.add(total, v);
                j += S::LANES;
            }
            if top > state.top {
                let mut lane = [0.0f32; 32];
                s.store(lane.as_mut_ptr(), math::exp(s, s.splat(state.top - top)));
                let shrink = lane[0];
                state.sum *= shrink;
                let mut d = 0;
                while d < padded {
                    s.store(state.acc.add(d), s.mul(s.load(state.acc.add(d)), s.splat(shrink)));
                    d += S::LANES;
                }
                state.top = top;
            }
            state.sum += s.sum(total);
        }
    }
}

/// Raw scores of `M` queries against a block of keys.
/// # Safety
/// Every state's `q` has `dim` values and its `weights` a block; `keys` is `[dim][32]`.
#[inline(always)]
unsafe fn scores<S: Simd, E: Element, const M: usize>(s: S, states: &[State], keys: *const E, dim: usize) {
    let mut j = 0;
    // SAFETY: as the caller promises.
    unsafe {
        while j < KEY_BLOCK {
            let mut acc = [[s.splat(0.0); 2]; M];
            let mut d = 0;
            while d < dim {
                let k = [E::lanes(s, keys.add(d * KEY_BLOCK + j)), E::lanes(s, keys.add(d * KEY_BLOCK + j + S::LANES))];
                let mut m = 0;
                while m < M {
                    let q = s.splat(*states[m].q.add(d));
                    acc[m][0] = s.fma(q, k[0], acc[m][0]);
                    acc[m][1] = s.fma(q, k[1], acc[m][1]);
                    m += 1;
                }
                d += 1;
            }
            let mut m = 0;
            while m < M {
                s.store(states[m].weights.add(j), acc[m][0]);
                s.store(states[m].weights.add(j + S::LANES), acc[m][1]);
                m += 1;
            }
            j += 2 * S::LANES;
        }
    }
}

/// Adds the weighted values of positions `lo..hi` of a block to `M` queries' sums.
/// # Safety
/// Every state's `acc` has `padded` values and its `weights` a block; `values` is `[32][padded]`.
#[inline(always)]
unsafe fn gather<S: Simd, E: Element, const M: usize>(
    s: S,
    states: &[State],
    values: *const E,
    lo: usize,
    hi: usize,
    padded: usize,
) {
    let mut d = 0;
    // SAFETY: as the caller promises; `padded` is a multiple of 16 and so of LANES.
    unsafe {
        while d < padded {
            if d + 2 * S::LANES <= padded {
                columns::<S, E, M, 2>(s, states, values, lo, hi, padded, d);
                d += 2 * S::LANES;
            } else {
                columns::<S, E, M, 1>(s, states, values, lo, hi, padded, d);
                d += S::LANES;
            }
        }
    }
}

/// [`gather`] for `C` vectors of columns from `d` on.
/// # Safety
/// As for [`gather`].
#[inline(always)]
unsafe fn columns<S: Simd, E: Element, const M: usize, const C: usize>(
    s: S,
    states: &[State],
    values: *const E,
    lo: usize,
    hi: usize,
    padded: usize,
    d: usize,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let mut acc = [[s.splat(0.0); C]; M];
        let mut m = 0;
        while m < M {
            let mut c = 0;
            while c < C {
                acc[m][c] = s.load(states[m].acc.add(d + c * S::LANES));
                c += 1;
            }
            m += 1;
        }
        let mut j = lo;
        while j < hi {
            let mut v = [s.splat(0.0); C];
            let mut c = 0;
            while c < C {
                v[c] = E::lanes(s, values.add(j * padded + d + c * S::LANES));
                c += 1;
            }
            let mut m = 0;
            while m < M {
                let w = s.splat(*states[m].weights.add(j));
                let mut c = 0;
                while c < C {
                    acc[m][c] = s.fma(w, v[c], acc[m][c]);
                    c += 1;
                }
                m += 1;
            }
            j += 1;
        }
        let mut m = 0;
        while m < M {
            let mut c = 0;
            while c < C {
                s.store(states[m].acc.add(d + c * S::LANES), acc[m][c]);
                c += 1;
            }
            m += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::{KvFormat, KvPage};
    use lacuna_base::Mat;
    use lacuna_base::testkit::{max_abs_diff, random};

    fn pages(layout: KvLayout, format: KvFormat, k: &Mat, v: &Mat) -> Vec<KvPage> {
        let mut pages: Vec<KvPage> =
            (0..k.rows().div_ceil(layout.page_tokens)).map(|_| KvPage::new(layout, format)).collect();
        for p in 0..k.rows() {
            pages[p / layout.page_tokens].write(p % layout.page_tokens, k.row(p), v.row(p));
        }
        pages
    }

    fn reference(a: &Attention, kv_heads: usize, q: &Mat, positions: &[usize], k: &Mat, v: &Mat) -> Mat {
        let dim = k.cols() / kv_heads;
        let mut out = Mat::zeros(q.rows(), q.cols());
        for (r, &p) in positions.iter().enumerate() {
            for h in 0..a.heads {
                let g = h / (a.heads / kv_heads);
                let low = a.window.map_or(0, |w| (p + 1).saturating_sub(w));
                let scores: Vec<f64> = (low..=p)
                    .map(|t| {
                        let dot: f64 =
                            (0..dim).map(|d| f64::from(q[(r, h * dim + d)]) * f64::from(k[(t, g * dim + d)])).sum();
                        let x = dot * f64::from(a.scale);
                        a.softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh())
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|x| (x - top).exp()).sum();
                for d in 0..dim {
                    let y: f64 = scores
                        .iter()
                        .enumerate()
                        .map(|(i, x)| (x - top).exp() * f64::from(v[(low + i, g * dim + d)]))
                        .sum();
                    out[(r, h * dim + d)] = (y / total) as f32;
                }
            }
        }
        out
    }

    #[test]
    fn matches_f64_and_does_not_see_its_company() {
        for (heads, kv_heads, dim, tokens, window, softcap) in [
            (1, 1, 1, 1, None, None),
            (3, 1, 5, 40, None, None),
            (4, 2, 16, 100, Some(10), Some(3.0)),
            (9, 3, 64, 130, None, None),
            (2, 2, 80, 97, Some(33), None),
            (8, 1, 36, 70, None, Some(1.0)),
        ] {
            let a = Attention { heads, scale: 0.3, window, softcap };
            let layout = KvLayout { kv_heads, head_dim: dim, page_tokens: 64 };
            let (q, k, v) =
                (random(tokens, heads * dim, 1), random(tokens, kv_heads * dim, 2), random(tokens, kv_heads * dim, 3));
            let all: Vec<usize> = (0..tokens).collect();
            let want = reference(&a, kv_heads, &q, &all, &k, &v);
            for format in [KvFormat::F32, KvFormat::F16] {
                let pages = pages(layout, format, &k, &v);
                let view = KvView { pages: pages.iter().collect(), tokens };
                for isa in Isa::here() {
                    let mut whole = Mat::zeros(tokens, heads * dim);
                    a.run_on(isa, q.view(), &all, &view, whole.view_mut());
                    let off = max_abs_diff(whole.view(), want.view());
                    assert!(off < if format == KvFormat::F32 { 2e-5 } else { 2e-2 }, "{isa} {heads} {dim}: {off}");
                    for step in [1, 7, 33] {
                        let mut from = 0;
                        while from < tokens {
                            let to = (from + step).min(tokens);
                            let mut part = Mat::zeros(to - from, heads * dim);
                            a.run_on(isa, q.view().rows_range(from, to), &all[from..to], &view, part.view_mut());
                            assert_eq!(
                                part.view().to_mat(),
                                whole.view().rows_range(from, to).to_mat(),
                                "{isa} step {step}"
                            );
                            from = to;
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn later_positions_cannot_leak() {
        let a = Attention { heads: 2, scale: 1.0, window: None, softcap: None };
        let layout = KvLayout { kv_heads: 1, head_dim: 16, page_tokens: 32 };
        let (q, k, v) = (random(20, 32, 1), random(20, 16, 2), random(20, 16, 3));
        let (mut k2, mut v2) = (k.clone(), v.clone());
        k2.row_mut(19).fill(f32::NAN);
        v2.row_mut(19).fill(f32::NAN);
        let run = |k: &Mat, v: &Mat| {
            let pages = pages(layout, KvFormat::F32, k, v);
            let mut out = Mat::zeros(20, 32);
            let view = KvView { pages: pages.iter().collect(), tokens: 20 };
            a.run(q.view(), &(0..20).collect::<Vec<_>>(), &view, out.view_mut());
            out
        };
        let (clean, dirty) = (run(&k, &v), run(&k2, &v2));
        assert_eq!(clean.view().rows_range(0, 19).to_mat(), dirty.view().rows_range(0, 19).to_mat());
        assert!(dirty.row(19).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn pages_read_back() {
        let layout = KvLayout { kv_heads: 3, head_dim: 5, page_tokens: 64 };
        let (k, v) = (random(64, 15, 1), random(64, 15, 2));
        let pages = pages(layout, KvFormat::F32, &k, &v);
        let (mut a, mut b) = (vec![0.0; 15], vec![0.0; 15]);
        for p in 0..64 {
            pages[0].read(p, &mut a, &mut b);
            assert_eq!((&a[..], &b[..]), (k.row(p), v.row(p)));
        }
        assert_eq!(layout.page_bytes(KvFormat::F16), 2 * 3 * 64 * (5 + 16));
    }
}

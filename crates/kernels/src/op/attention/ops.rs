//! The arithmetic of attention, one operation at a time.

use half::f16;

use super::{Attention, SUBS, TILE};
use crate::kv::KEY_BLOCK;
use crate::op::math;
use crate::panel::fetch;
use crate::simd::{Op, Simd};

/// A cached element.
pub(super) trait Element: Copy + Send + Sync {
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

impl Element for i8 {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const i8) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load_i8(p) }
    }
}

/// A tile where it lies, key block by key block; those that nobody sees are dangling.
#[derive(Clone, Copy)]
pub(super) struct Tile<E> {
    pub(super) keys: [*const E; SUBS],
    pub(super) values: [*const E; SUBS],
    /// Factors of every position's keys and values, where the cache has them.
    pub(super) scales: Option<[[*const f32; SUBS]; 2]>,
    /// Keys of the tile after it, null where there are none.
    pub(super) next: [*const u8; SUBS],
}

/// Adds a segment to those before; gives their largest score and sum.
pub(super) struct Merge {
    /// Largest score and sum of those before, and of this one.
    pub(super) both: [(f32, f32); 2],
    pub(super) total: *mut f32,
    pub(super) seen: *const f32,
    pub(super) padded: usize,
}

impl Op for Merge {
    type Out = (f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let [(top, sum), (seen_top, seen_sum)] = self.both;
        let most = if seen_top > top { seen_top } else { top };
        let before = lane(s, math::exp(s, s.splat(top - most)));
        let now = lane(s, math::exp(s, s.splat(seen_top - most)));
        let mut d = 0;
        while d < self.padded {
            // SAFETY: the maker has as many values in both.
            unsafe {
                let v = s.mul(s.load(self.total.add(d)), s.splat(before));
                s.store(self.total.add(d), s.fma(s.load(self.seen.add(d)), s.splat(now), v));
            }
            d += S::LANES;
        }
        (most, sum * before + seen_sum * now)
    }
}

/// Sums over their sum, to the output.
pub(super) struct Finish {
    pub(super) total: *const f32,
    pub(super) sum: f32,
    pub(super) out: *mut f32,
    pub(super) dim: usize,
}

impl Op for Finish {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut d = 0;
        while d < self.dim {
            // SAFETY: the maker has room for `dim` values, and as many sums, padded.
            unsafe {
                let v = s.div(s.load(self.total.add(d)), s.splat(self.sum));
                if d + S::LANES <= self.dim {
                    s.store(self.out.add(d), v);
                } else {
                    let mut rest = [0.0f32; 16];
                    s.store(rest.as_mut_ptr(), v);
                    std::ptr::copy_nonoverlapping(rest.as_ptr(), self.out.add(d), self.dim - d);
                }
            }
            d += S::LANES;
        }
    }
}

/// One lane of a vector whose lanes are equal.
#[inline(always)]
fn lane<S: Simd>(s: S, v: S::V) -> f32 {
    let mut all = [0.0f32; 16];
    // SAFETY: 16 lanes at most.
    unsafe { s.store(all.as_mut_ptr(), v) };
    all[0]
}

/// Turns a query's raw scores of a tile into weights, brings its sums to the new largest score, and gives that and the sum of weights.
pub(super) struct Soften<'a> {
    pub(super) p: &'a Attention,
    pub(super) top: f32,
    pub(super) sum: f32,
    pub(super) acc: *mut f32,
    pub(super) padded: usize,
    /// What it sees of the tile.
    pub(super) bounds: (usize, usize),
    /// The key blocks of that.
    pub(super) subs: (usize, usize),
    pub(super) scales: Option<[[*const f32; SUBS]; 2]>,
    /// Raw scores of those key blocks.
    pub(super) w: *mut f32,
}

impl Op for Soften<'_> {
    type Out = (f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let Soften { p, top: before, mut sum, acc, padded, bounds: (lo, hi), subs, scales, w } = self;
        let (from, to) = (subs.0 * KEY_BLOCK, subs.1 * KEY_BLOCK);
        // SAFETY: weights hold a tile, acc `padded` values.
        unsafe {
            let none = s.splat(f32::NEG_INFINITY);
            let mut top = none;
            let mut j = from;
            while j < to {
                let mut v = s.mul(s.load(w.add(j)), s.splat(p.scale));
                if let Some([keys, _]) = scales {
                    v = s.mul(v, s.load(keys[j / KEY_BLOCK].add(j % KEY_BLOCK)));
                }
                if let Some(c) = p.softcap {
                    v = s.mul(s.splat(c), math::tanh(s, s.div(v, s.splat(c))));
                }
                if j < lo || j + S::LANES > hi {
                    let at = s.load(COUNT.0.as_ptr().add(j));
                    v = s.select_lt(at, s.splat(lo as f32), none, v);
                    v = s.select_lt(at, s.splat(hi as f32), v, none);
                }
                // The second where one is NaN: a NaN never becomes the largest.
                top = s.max(v, top);
                s.store(w.add(j), v);
                j += S::LANES;
            }
            let top = s.top(top);
            let top = if top > before { top } else { before };
            let mut total = s.splat(0.0);
            let mut j = from;
            while j < to {
                let mut v = math::exp(s, s.sub(s.load(w.add(j)), s.splat(top)));
                total = s.add(total, v);
                if let Some([_, values]) = scales {
                    v = s.mul(v, s.load(values[j / KEY_BLOCK].add(j % KEY_BLOCK)));
                }
                s.store(w.add(j), v);
                j += S::LANES;
            }
            if top > before {
                // The first time both the sums and the factor are zero.
                let shrink = lane(s, math::exp(s, s.splat(before - top)));
                sum *= shrink;
                let mut d = 0;
                while d < padded {
                    s.store(acc.add(d), s.mul(s.load(acc.add(d)), s.splat(shrink)));
                    d += S::LANES;
                }
            }
            (top, sum + s.sum(total))
        }
    }
}

/// 0, 1, 2, ...
#[repr(align(64))]
struct Count([f32; TILE]);
static COUNT: Count = {
    let mut all = [0.0; TILE];
    let mut i = 0;
    while i < TILE {
        all[i] = i as f32;
        i += 1;
    }
    Count(all)
};

/// Writes `n` elements, a multiple of 16, as f32.
pub(super) struct Widen<E> {
    pub(super) from: *const E,
    pub(super) to: *mut f32,
    pub(super) n: usize,
}

impl<E: Element> Op for Widen<E> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.n {
            // SAFETY: the maker has as many in both.
            unsafe { s.store(self.to.add(i), E::lanes(s, self.from.add(i))) };
            i += S::LANES;
        }
    }
}

/// Raw scores of `M` queries against key blocks `subs`, those of query `m` to `weights[m * 128..]`.
pub(super) struct Scores<E, const M: usize> {
    pub(super) q: [*const f32; M],
    /// `[dim][32]` each.
    pub(super) keys: [*const E; SUBS],
    /// What is needed next: asked for meanwhile.
    pub(super) values: [*const E; SUBS],
    pub(super) subs: (usize, usize),
    pub(super) dim: usize,
    pub(super) weights: *mut f32,
}

impl<E: Element, const M: usize> Op for Scores<E, M> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = self.subs.0;
        while i < self.subs.1 {
            let keys = self.keys[i];
            let values = self.values[i].cast::<u8>();
            let mut j = 0;
            while j < KEY_BLOCK {
                let mut acc = [[s.splat(0.0); 2]; M];
                let mut d = 0;
                // SAFETY: the maker has queries of `dim` values, these key blocks, and room for a tile of each query's weights.
                unsafe {
                    while d < self.dim {
                        if M <= 4 && size_of::<E>() < 4 && j == 0 {
                            fetch(values.wrapping_add(d * KEY_BLOCK * size_of::<E>()));
                        }
                        let k = keys.add(d * KEY_BLOCK + j);
                        let k = [E::lanes(s, k), E::lanes(s, k.add(S::LANES))];
                        let mut m = 0;
                        while m < M {
                            let q = s.splat(*self.q[m].add(d));
                            acc[m][0] = s.fma(q, k[0], acc[m][0]);
                            acc[m][1] = s.fma(q, k[1], acc[m][1]);
                            m += 1;
                        }
                        d += 1;
                    }
                    let mut m = 0;
                    while m < M {
                        let at = self.weights.add(m * TILE + i * KEY_BLOCK + j);
                        s.store(at, acc[m][0]);
                        s.store(at.add(S::LANES), acc[m][1]);
                        m += 1;
                    }
                }
                j += 2 * S::LANES;
            }
            i += 1;
        }
    }
}

/// Adds the weighted values of positions `js` of each of key blocks `subs` to `M` queries' sums.
pub(super) struct Mix<E, const M: usize> {
    /// `padded` values each.
    pub(super) acc: [*mut f32; M],
    pub(super) tile: Tile<E>,
    pub(super) subs: (usize, usize),
    pub(super) js: (usize, usize),
    pub(super) padded: usize,
    /// A tile for each query.
    pub(super) weights: *const f32,
}

impl<E: Element, const M: usize> Op for Mix<E, M> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut d = 0;
        // `padded` is a multiple of 16 and so of LANES.
        while d < self.padded {
            if d + 2 * S::LANES <= self.padded {
                self.columns::<S, 2>(s, d);
                d += 2 * S::LANES;
            } else {
                self.columns::<S, 1>(s, d);
                d += S::LANES;
            }
        }
    }
}

impl<E: Element, const M: usize> Mix<E, M> {
    /// `C` vectors of columns from `d` on.
    #[inline(always)]
    fn columns<S: Simd, const C: usize>(&self, s: S, d: usize) {
        // SAFETY: the maker has sums and values of `padded` columns, these key blocks and their weights.
        unsafe {
            let mut acc = [[s.splat(0.0); C]; M];
            let mut m = 0;
            while m < M {
                let mut c = 0;
                while c < C {
                    acc[m][c] = s.load(self.acc[m].add(d + c * S::LANES));
                    c += 1;
                }
                m += 1;
            }
            let mut i = self.subs.0;
            while i < self.subs.1 {
                let (values, w) = (self.tile.values[i].add(d), self.weights.add(i * KEY_BLOCK));
                let mut j = self.js.0;
                while j < self.js.1 {
                    if M <= 4 && size_of::<E>() < 4 && !self.tile.next[i].is_null() {
                        // As many bytes as the columns at hand have: all of a key block in the end.
                        let bytes = C * S::LANES * size_of::<E>();
                        fetch(self.tile.next[i].wrapping_add((j * self.padded + d) * size_of::<E>() / bytes * bytes));
                    }
                    let mut v = [s.splat(0.0); C];
                    let mut c = 0;
                    while c < C {
                        v[c] = E::lanes(s, values.add(j * self.padded + c * S::LANES));
                        c += 1;
                    }
                    let mut m = 0;
                    while m < M {
                        let w = s.splat(*w.add(m * TILE + j));
                        let mut c = 0;
                        while c < C {
                            acc[m][c] = s.fma(w, v[c], acc[m][c]);
                            c += 1;
                        }
                        m += 1;
                    }
                    j += 1;
                }
                i += 1;
            }
            let mut m = 0;
            while m < M {
                let mut c = 0;
                while c < C {
                    s.store(self.acc[m].add(d + c * S::LANES), acc[m][c]);
                    c += 1;
                }
                m += 1;
            }
        }
    }
}

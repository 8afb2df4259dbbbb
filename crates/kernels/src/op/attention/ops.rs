//! The arithmetic of attention, one operation at a time.

use super::element::Element;
use super::{Attention, SUBS, TILE};
use crate::kv::KEY_BLOCK;
use crate::op::math;
use crate::panel::fetch_far;
use crate::simd::{Op, Simd};

/// A tile where it lies, key block by key block; those that nobody sees are dangling.
#[derive(Clone, Copy)]
pub(super) struct Tile<E> {
    pub(super) keys: [*const E; SUBS],
    pub(super) values: [*const E; SUBS],
    /// Factors of every position's keys and values, where the cache has them.
    pub(super) scales: Option<[[*const f32; SUBS]; 2]>,
    /// Keys and values of the tile after it, asked for while these are read; where there is none, the same.
    pub(super) next: [[*const u8; SUBS]; 2],
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

/// Turns a query's raw scores of a tile into weights, brings its sums to the new largest score, and gives that and the
/// sum of weights.
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
    /// What a score gets for each position that its key lies nearer, and the tile's first position less the query's.
    pub(super) near: (f32, f32),
    /// Raw scores of those key blocks.
    pub(super) w: *mut f32,
}

impl Op for Soften<'_> {
    type Out = (f32, f32);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> (f32, f32) {
        let Soften { p, top: before, mut sum, acc, padded, bounds: (lo, hi), subs, scales, near, w } = self;
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
                if p.alibi.is_some() {
                    let away = s.add(s.load(COUNT.0.as_ptr().add(j)), s.splat(near.1));
                    v = s.fma(away, s.splat(near.0), v);
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
                let mut v = math::exp_below(s, s.sub(s.load(w.add(j)), s.splat(top)));
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
    /// Keys of the tile after it, prefetched meanwhile.
    pub(super) next: [*const u8; SUBS],
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
            let pair = self.subs.1 - i >= 2;
            if S::LANES == 16 && M <= 4 && pair {
                // Every sum waits for the one before it: few queries are met by more keys side by side.
                self.keys::<S, 2, 2>(s, i, 0);
                i += 1;
            } else if S::LANES == 8 && M <= 2 {
                self.keys::<S, 1, 4>(s, i, 0);
            } else if S::LANES == 8 && M <= 4 {
                if pair {
                    self.lines::<S, 2>(s, i);
                    i += 1;
                } else {
                    self.lines::<S, 1>(s, i);
                }
            } else {
                let mut j = 0;
                while j < KEY_BLOCK {
                    self.keys::<S, 1, 2>(s, i, j);
                    j += 2 * S::LANES;
                }
            }
            i += 1;
        }
    }
}

impl<E: Element, const M: usize> Scores<E, M> {
    /// All keys of the `B` key blocks from `i` on, where registers do not hold their sums: those pass through the
    /// weights' memory, a few dimensions at a time, so that every line of keys is read once. Read in several passes,
    /// lines from memory came no faster for being asked for.
    #[inline(always)]
    fn lines<S: Simd, const B: usize>(&self, s: S, i: usize) {
        let mut d = 0;
        while d < self.dim {
            if M <= 3 && self.dim - d >= 3 {
                self.dimensions::<S, B, 3>(s, i, d);
                d += 3;
            } else if self.dim - d >= 2 {
                self.dimensions::<S, B, 2>(s, i, d);
                d += 2;
            } else {
                self.dimensions::<S, B, 1>(s, i, d);
                d += 1;
            }
        }
    }

    /// Adds `D` dimensions from `d` on to the sums of all keys of the `B` key blocks from `i` on.
    #[inline(always)]
    fn dimensions<S: Simd, const B: usize, const D: usize>(&self, s: S, i: usize, d: usize) {
        // SAFETY: as for `keys`.
        unsafe {
            let sums = self.weights.add(i * KEY_BLOCK);
            let mut q = [[s.splat(0.0); D]; M];
            let mut m = 0;
            while m < M {
                let mut e = 0;
                while e < D {
                    q[m][e] = s.splat(*self.q[m].add(d + e));
                    e += 1;
                }
                m += 1;
            }
            let mut b = 0;
            while b < B {
                let keys = self.keys[i + b].add(d * KEY_BLOCK);
                let next = self.next[i + b].wrapping_add(d * KEY_BLOCK * size_of::<E>());
                let mut e = 0;
                while e < D && size_of::<E>() < 4 {
                    fetch_far(next.wrapping_add(e * KEY_BLOCK * size_of::<E>()));
                    e += 1;
                }
                let mut v = 0;
                while v < KEY_BLOCK {
                    let mut k = [s.splat(0.0); D];
                    e = 0;
                    while e < D {
                        k[e] = E::lanes(s, keys.add(e * KEY_BLOCK + v));
                        e += 1;
                    }
                    let mut m = 0;
                    while m < M {
                        let at = sums.add(m * TILE + b * KEY_BLOCK + v);
                        let mut sum = if d == 0 { s.splat(0.0) } else { s.load(at) };
                        e = 0;
                        while e < D {
                            sum = s.fma(q[m][e], k[e], sum);
                            e += 1;
                        }
                        s.store(at, sum);
                        m += 1;
                    }
                    v += S::LANES;
                }
                b += 1;
            }
        }
    }

    /// `V` vectors of keys from `j` on in each of the `B` key blocks from `i` on.
    #[inline(always)]
    fn keys<S: Simd, const B: usize, const V: usize>(&self, s: S, i: usize, j: usize) {
        // SAFETY: the maker has queries of `dim` values, these key blocks, and room for a tile of each query's weights.
        unsafe {
            let (queries, dim) = (self.q, self.dim);
            let (mut keys, mut next) = ([self.keys[i]; B], [self.next[i]; B]);
            let mut b = 0;
            while b < B {
                (keys[b], next[b]) = (self.keys[i + b].add(j), self.next[i + b]);
                b += 1;
            }
            let mut acc = [[[s.splat(0.0); V]; B]; M];
            let mut d = 0;
            while d < dim {
                let mut k = [[s.splat(0.0); V]; B];
                let mut b = 0;
                while b < B {
                    // So few queries always meet whole key blocks: every line is prefetched once.
                    if M <= 4 && size_of::<E>() < 4 {
                        fetch_far(next[b].wrapping_add(d * KEY_BLOCK * size_of::<E>()));
                    }
                    let mut v = 0;
                    while v < V {
                        k[b][v] = E::lanes(s, keys[b].add(d * KEY_BLOCK + v * S::LANES));
                        v += 1;
                    }
                    b += 1;
                }
                let mut m = 0;
                while m < M {
                    let q = s.splat(*queries[m].add(d));
                    let mut b = 0;
                    while b < B {
                        let mut v = 0;
                        while v < V {
                            acc[m][b][v] = s.fma(q, k[b][v], acc[m][b][v]);
                            v += 1;
                        }
                        b += 1;
                    }
                    m += 1;
                }
                d += 1;
            }
            let mut m = 0;
            while m < M {
                let mut b = 0;
                while b < B {
                    let mut v = 0;
                    while v < V {
                        let at = m * TILE + (i + b) * KEY_BLOCK + j + v * S::LANES;
                        s.store(self.weights.add(at), acc[m][b][v]);
                        v += 1;
                    }
                    b += 1;
                }
                m += 1;
            }
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
        if S::LANES == 8 && M <= 4 {
            let mut i = self.subs.0;
            while i < self.subs.1 {
                let mut j = self.js.0;
                while j < self.js.1 {
                    if M <= 2 && self.js.1 - j >= 4 {
                        self.lines::<S, 4>(s, i, j);
                        j += 4;
                    } else if M <= 3 && self.js.1 - j >= 3 {
                        self.lines::<S, 3>(s, i, j);
                        j += 3;
                    } else if self.js.1 - j >= 2 {
                        self.lines::<S, 2>(s, i, j);
                        j += 2;
                    } else {
                        self.lines::<S, 1>(s, i, j);
                        j += 1;
                    }
                }
                i += 1;
            }
            return;
        }
        let mut d = 0;
        // `padded` is a multiple of 16 and so of LANES.
        while d < self.padded {
            let left = (self.padded - d) / S::LANES;
            if M <= 4 && left >= 4 {
                self.columns::<S, 4>(s, d);
                d += 4 * S::LANES;
            } else if left >= 2 {
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
    /// `R` positions from `j` of key block `i` on, all columns: sums pass through memory, and every line of values is
    /// read once.
    #[inline(always)]
    fn lines<S: Simd, const R: usize>(&self, s: S, i: usize, j: usize) {
        // SAFETY: as for `columns`.
        unsafe {
            let (sums, padded) = (self.acc, self.padded);
            let values = self.tile.values[i].add(j * padded);
            let next = self.tile.next[1][i].wrapping_add(j * padded * size_of::<E>());
            let mut w = [[s.splat(0.0); R]; M];
            let mut m = 0;
            while m < M {
                let mut r = 0;
                while r < R {
                    w[m][r] = s.splat(*self.weights.add(m * TILE + i * KEY_BLOCK + j + r));
                    r += 1;
                }
                m += 1;
            }
            let mut d = 0;
            while d < R * padded * size_of::<E>() && size_of::<E>() < 4 {
                fetch_far(next.wrapping_add(d));
                d += 64;
            }
            d = 0;
            while d < padded {
                let mut v = [s.splat(0.0); R];
                let mut r = 0;
                while r < R {
                    v[r] = E::lanes(s, values.add(r * padded + d));
                    r += 1;
                }
                let mut m = 0;
                while m < M {
                    let mut sum = s.load(sums[m].add(d));
                    let mut r = 0;
                    while r < R {
                        sum = s.fma(w[m][r], v[r], sum);
                        r += 1;
                    }
                    s.store(sums[m].add(d), sum);
                    m += 1;
                }
                d += S::LANES;
            }
        }
    }

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
            let (padded, (from, to)) = (self.padded, self.js);
            while i < self.subs.1 {
                let (values, w) = (self.tile.values[i].add(d), self.weights.add(i * KEY_BLOCK));
                let next = self.tile.next[1][i].wrapping_add(d * size_of::<E>());
                let mut j = from;
                while j < to {
                    if M <= 4 && size_of::<E>() < 4 {
                        // As many bytes as the columns at hand have: all of a key block in the end.
                        let next = next.wrapping_add(j * padded * size_of::<E>());
                        fetch_far(next);
                        if C * S::LANES * size_of::<E>() > 64 {
                            fetch_far(next.wrapping_add(64));
                        }
                    }
                    let mut v = [s.splat(0.0); C];
                    let mut c = 0;
                    while c < C {
                        v[c] = E::lanes(s, values.add(j * padded + c * S::LANES));
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

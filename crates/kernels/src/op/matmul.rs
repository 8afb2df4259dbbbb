//! The float product: rows of `x` times panels.
//!
//! Every (row of x, output) pair owns one lane. Within a span of 256 columns its products are added to it in rising
//! order, by one chain of fused operations; the spans' sums are added in order. How many pairs are computed side by
//! side changes speed, never a bit.

use crate::Isa;
use crate::panel::{BLOCK, Codec, FETCH, NEAR, ROWS, SPAN, View};
use crate::simd::{Op, Simd, dispatch};

/// Where results go: output `(r, n)` lies at `out[r * stride + n]`.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub(crate) data: *mut f32,
    pub(crate) stride: usize,
    /// Add to what is there instead of overwriting it.
    pub(crate) add: bool,
}

// SAFETY: tasks that share it write disjoint columns.
unsafe impl Send for Out {}
// SAFETY: see above.
unsafe impl Sync for Out {}

impl Out {
    /// The same from row `r` on.
    pub(crate) fn below(self, r: usize) -> Out {
        // SAFETY: the caller has that row.
        Out { data: unsafe { self.data.add(r * self.stride) }, ..self }
    }

    /// The same, added to what is there.
    pub(crate) fn added(self) -> Out {
        Out { add: true, ..self }
    }

    /// The same from output `n` on.
    pub(crate) fn beside(self, n: usize) -> Out {
        // SAFETY: the caller has that output.
        Out { data: unsafe { self.data.add(n) }, ..self }
    }

    /// Writes the 16 results of panel `p` in row `r`, as far as there are outputs.
    /// # Safety
    /// The row is there and has `rows` outputs.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd>(self, s: S, r: usize, p: usize, rows: usize, v: [S::V; 2]) {
        // SAFETY: as the caller promises.
        unsafe {
            let at = self.data.add(r * self.stride + p * ROWS);
            let have = rows - p * ROWS;
            if have >= ROWS {
                let mut h = 0;
                while h < ROWS / S::LANES {
                    let at = at.add(h * S::LANES);
                    s.store(at, if self.add { s.add(s.load(at), v[h]) } else { v[h] });
                    h += 1;
                }
                return;
            }
            let mut all = [0.0f32; ROWS];
            let mut h = 0;
            while h < ROWS / S::LANES {
                s.store(all.as_mut_ptr().add(h * S::LANES), v[h]);
                h += 1;
            }
            let mut i = 0;
            while i < have {
                *at.add(i) = if self.add { *at.add(i) + all[i] } else { all[i] };
                i += 1;
            }
        }
    }
}

/// Panels `from..to` times one row of x, straight from their codes.
pub(crate) struct Gemv<'a, C> {
    pub(crate) panels: View,
    pub(crate) codec: &'a C,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Padded with zeros to whole blocks.
    pub(crate) x: *const f32,
    pub(crate) out: Out,
}

impl<C: Codec> Op for Gemv<'_, C> {
    type Out = ();
    const INTEGER: bool = C::EXPANDS;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut p = self.from;
        // SAFETY: the maker has these panels, an x as long and room in `out`.
        unsafe {
            // Chains side by side hide the latency of each; a group that lacks panels repeats its last one and does not
            // write it.
            while C::EXPANDS && S::LANES < ROWS && self.to - p > 1 {
                // Every panel has two places where it is read.
                gemv::<S, C, 2>(s, &self, p);
                p += 2;
            }
            while self.to - p > 2 {
                gemv::<S, C, 4>(s, &self, p);
                p = (p + 4).min(self.to);
            }
            while p < self.to {
                gemv::<S, C, 1>(s, &self, p);
                p += 1;
            }
        }
    }
}

/// # Safety
/// Panel `p` is there.
#[inline(always)]
unsafe fn gemv<S: Simd, C: Codec, const P: usize>(s: S, g: &Gemv<'_, C>, p: usize) {
    let mut at = [g.panels.at(p); P];
    let mut i = 1;
    while i < P {
        at[i] = g.panels.at((p + i).min(g.to - 1));
        i += 1;
    }
    let ahead = g.panels.ahead(P, if C::PREFETCH { FETCH } else { NEAR });
    let mut total = [[s.splat(0.0); 2]; P];
    let mut b = 0;
    while b < g.panels.blocks {
        let end = (b + SPAN / BLOCK).min(g.panels.blocks);
        let mut acc = [[s.splat(0.0); 2]; P];
        while b < end {
            // SAFETY: as the caller promises; x is padded to whole blocks.
            unsafe {
                let mut blocks = [[g.codec.block(s, at[0], b, 0); 2]; P];
                let mut i = 0;
                while i < P {
                    if C::PREFETCH || S::LANES == ROWS {
                        ahead.fetch(at[i], b);
                    }
                    let mut h = 0;
                    while h < ROWS / S::LANES {
                        blocks[i][h] = g.codec.block(s, at[i], b, h);
                        h += 1;
                    }
                    i += 1;
                }
                // Octet by octet, so that the chains of all panels are near enough to run side by side.
                let mut o = 0;
                while o < BLOCK / 8 {
                    let x = g.x.add(b * BLOCK + 8 * o);
                    let mut j = 0;
                    while C::EXPANDS && S::LANES < ROWS && j < 8 {
                        let x = s.splat(*x.add(j));
                        let mut i = 0;
                        while i < P {
                            let w = g.codec.both(s, &mut blocks[i][0]);
                            acc[i] = [s.fma(x, w[0], acc[i][0]), s.fma(x, w[1], acc[i][1])];
                            i += 1;
                        }
                        j += 1;
                    }
                    let mut i = 0;
                    while (!C::EXPANDS || S::LANES == ROWS) && i < P {
                        let mut h = 0;
                        while h < ROWS / S::LANES {
                            let w = g.codec.eight(s, &mut blocks[i][h], o);
                            let mut j = 0;
                            while j < 8 {
                                acc[i][h] = s.fma(s.splat(*x.add(j)), w[j], acc[i][h]);
                                j += 1;
                            }
                            h += 1;
                        }
                        i += 1;
                    }
                    o += 1;
                }
            }
            b += 1;
        }
        let mut i = 0;
        while i < P {
            let mut h = 0;
            while h < ROWS / S::LANES {
                total[i][h] = s.add(total[i][h], acc[i][h]);
                h += 1;
            }
            i += 1;
        }
    }
    let mut i = 0;
    while i < P && p + i < g.to {
        // SAFETY: as the caller promises.
        unsafe { g.out.put(s, 0, p + i, g.panels.rows, total[i]) };
        i += 1;
    }
}

/// Rows of x that a register block holds at most, and the panels beside them, for vectors of 16 and of 8 lanes.
const WIDE: (usize, usize) = (12, 2);
const NARROW: (usize, usize) = (6, 1);

/// The sizes of the row tiles that cover `rows`, most first, the last one padded: what x is packed by.
#[inline(always)]
pub(crate) fn tiles(rows: usize, lanes: usize, mut f: impl FnMut(usize, usize)) {
    let most = if lanes == 16 { WIDE.0 } else { NARROW.0 };
    let mut r = 0;
    while r < rows {
        let m = match rows - r {
            n if n >= most => most,
            1 | 2 => 2,
            3 | 4 => 4,
            n if n <= 8 && lanes == 16 => 8,
            _ => most,
        };
        f(r, m);
        r += m;
    }
}

/// Panels that are multiplied side by side.
pub(crate) fn side(isa: Isa) -> usize {
    if isa.lanes() == 16 { WIDE.1 } else { NARROW.1 }
}

/// Scratch for `batch`: panels of a span in f32, and the sums of every padded row.
pub(crate) fn scratch(rows: usize) -> usize {
    WIDE.1 * ROWS * (SPAN + rows + WIDE.0)
}

/// Panels `from..to` times many rows of x.
pub(crate) struct Batch<'a, C> {
    pub(crate) panels: View,
    pub(crate) codec: &'a C,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Tile by tile, and within a tile of `m` rows column by column, padded with zero columns to whole blocks and with
    /// any rows.
    pub(crate) x: *const f32,
    pub(crate) rows: usize,
    pub(crate) out: Out,
    pub(crate) scratch: &'a mut [f32],
}

impl<C: Codec> Batch<'_, C> {
    /// Runs it. Decoding a span, which knows the codec, and multiplying it, which does not, are compiled apart.
    pub(crate) fn run(self, isa: Isa) {
        assert!(self.scratch.len() >= scratch(self.rows), "room for a span and the sums");
        let side = side(isa);
        let (w, sums) = self.scratch.split_at_mut(side * SPAN * ROWS);
        let (w, sums) = (w.as_mut_ptr(), sums.as_mut_ptr());
        let Batch { panels, codec, x, rows, out, .. } = self;
        let mut p = self.from;
        while p < self.to {
            let have = side.min(self.to - p);
            let mut b = 0;
            loop {
                let end = (b + SPAN / BLOCK).min(panels.blocks);
                dispatch(isa, Decode { panels, codec, p, have, from: b, to: end, w });
                let last = (end == panels.blocks).then_some(out);
                dispatch(isa, Tiles { w, x, panels, p, have, rows, from: b, to: end, sums, last });
                b = end;
                if b == panels.blocks {
                    break;
                }
            }
            p += side;
        }
    }
}

/// Blocks `from..to` of `have` panels from `p` on to f32.
struct Decode<'a, C> {
    panels: View,
    codec: &'a C,
    p: usize,
    have: usize,
    from: usize,
    to: usize,
    w: *mut f32,
}

impl<C: Codec> Op for Decode<'_, C> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut i = 0;
        while i < self.have {
            // SAFETY: the maker has these panels and room for a span of each.
            unsafe {
                decode(s, self.codec, self.panels.at(self.p + i), self.from, self.to, self.w.add(i * SPAN * ROWS));
            }
            i += 1;
        }
    }
}

/// A span of panels in f32 times all rows.
struct Tiles {
    w: *const f32,
    x: *const f32,
    panels: View,
    p: usize,
    have: usize,
    rows: usize,
    from: usize,
    to: usize,
    sums: *mut f32,
    /// Where the sums go after the last span.
    last: Option<Out>,
}

impl Op for Tiles {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: the maker has an x and scratch as long, and room in `last`.
        unsafe {
            if S::LANES == 16 { tiles_of::<S, { WIDE.1 }>(s, self) } else { tiles_of::<S, { NARROW.1 }>(s, self) }
        }
    }
}

/// # Safety
/// As `Tiles` promises.
#[inline(always)]
unsafe fn tiles_of<S: Simd, const P: usize>(s: S, g: Tiles) {
    let cols = g.panels.blocks * BLOCK;
    let (k, skip, first) = ((g.to - g.from) * BLOCK, g.from * BLOCK, g.from == 0);
    let mut r = 0;
    // The cuts of `tiles`, without a closure: it would be compiled without the instruction set.
    while r < g.rows {
        // SAFETY: as the caller promises.
        unsafe {
            let (x, sums) = (g.x.add(r * cols), g.sums.add(r * P * ROWS));
            let left = g.rows - r;
            if S::LANES == 16 {
                match left {
                    1 | 2 => tile::<S, P, 2>(s, g.w, k, x.add(skip * 2), sums, first),
                    3 | 4 => tile::<S, P, 4>(s, g.w, k, x.add(skip * 4), sums, first),
                    5..=8 => tile::<S, P, 8>(s, g.w, k, x.add(skip * 8), sums, first),
                    _ => tile::<S, P, { WIDE.0 }>(s, g.w, k, x.add(skip * WIDE.0), sums, first),
                }
                r += WIDE.0;
            } else {
                match left {
                    1 | 2 => tile::<S, P, 2>(s, g.w, k, x.add(skip * 2), sums, first),
                    3 | 4 => tile::<S, P, 4>(s, g.w, k, x.add(skip * 4), sums, first),
                    _ => tile::<S, P, { NARROW.0 }>(s, g.w, k, x.add(skip * NARROW.0), sums, first),
                }
                r += NARROW.0;
            }
        }
    }
    let Some(out) = g.last else { return };
    let mut r = 0;
    while r < g.rows {
        let mut i = 0;
        while i < g.have {
            let mut v = [s.splat(0.0); 2];
            let mut h = 0;
            // SAFETY: as the caller promises.
            unsafe {
                while h < ROWS / S::LANES {
                    v[h] = s.load(g.sums.add((r * P + i) * ROWS + h * S::LANES));
                    h += 1;
                }
                out.put(s, r, g.p + i, g.panels.rows, v);
            }
            i += 1;
        }
        r += 1;
    }
}

/// Blocks `from..to` of a panel to f32, column by column.
/// # Safety
/// The panel has them and `out` has room.
#[inline(always)]
unsafe fn decode<S: Simd, C: Codec>(s: S, codec: &C, panel: *const u8, from: usize, to: usize, out: *mut f32) {
    let mut b = from;
    while b < to {
        let mut h = 0;
        while h < ROWS / S::LANES {
            // SAFETY: as the caller promises.
            unsafe {
                let mut block = codec.block(s, panel, b, h);
                let mut o = 0;
                while o < BLOCK / 8 {
                    let w = codec.eight(s, &mut block, o);
                    let mut j = 0;
                    while j < 8 {
                        s.store(out.add(((b - from) * BLOCK + 8 * o + j) * ROWS + h * S::LANES), w[j]);
                        j += 1;
                    }
                    o += 1;
                }
            }
            h += 1;
        }
        b += 1;
    }
}

/// `P` panels' `k` columns times a tile of `M` rows, added to `sums`, `[M][P][16]`.
/// # Safety
/// All are as long.
#[inline(always)]
unsafe fn tile<S: Simd, const P: usize, const M: usize>(
    s: S,
    w: *const f32,
    k: usize,
    x: *const f32,
    sums: *mut f32,
    first: bool,
) {
    let mut acc = [[[s.splat(0.0); 2]; P]; M];
    let mut c = 0;
    while c < k {
        let mut v = [[s.splat(0.0); 2]; P];
        // SAFETY: as the caller promises.
        unsafe {
            let mut i = 0;
            while i < P {
                let mut h = 0;
                while h < ROWS / S::LANES {
                    v[i][h] = s.load(w.add((i * SPAN + c) * ROWS + h * S::LANES));
                    h += 1;
                }
                i += 1;
            }
            let mut m = 0;
            while m < M {
                let x = s.splat(*x.add(c * M + m));
                let mut i = 0;
                while i < P {
                    let mut h = 0;
                    while h < ROWS / S::LANES {
                        acc[m][i][h] = s.fma(x, v[i][h], acc[m][i][h]);
                        h += 1;
                    }
                    i += 1;
                }
                m += 1;
            }
        }
        c += 1;
    }
    let mut m = 0;
    while m < M {
        let mut i = 0;
        while i < P {
            let mut h = 0;
            while h < ROWS / S::LANES {
                // SAFETY: as the caller promises.
                unsafe {
                    let at = sums.add((m * P + i) * ROWS + h * S::LANES);
                    let before = if first { s.splat(0.0) } else { s.load(at) };
                    s.store(at, s.add(before, acc[m][i][h]));
                }
                h += 1;
            }
            i += 1;
        }
        m += 1;
    }
}

//! The integer product: quantized rows of `x` times panels of codes.
//!
//! A block of 32 columns is summed exactly, in integers; then
//! `acc = fma(sum, weight's scale * activation's scale, acc)`, blocks in rising order. Every instruction set gives the
//! same bits, and so does any number of rows.

use super::matmul::Out;
use crate::panel::ints::{Bytes, META};
use crate::panel::{BLOCK, NEAR, ROWS, View};
use crate::simd::{Op, Simd};

/// Quantized rows, see [`super::quantize`], with [`SPARE`] rows of anything after the last; or, where they are `tiled`,
/// in tiles of 16, the last filled up with zeros: block by block, 16 rows of 32 bytes each, and likewise their numbers,
/// each of the four of all 16 rows together.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) codes: *const i8,
    pub(crate) meta: *const f32,
    pub(crate) rows: usize,
    /// The row of the call that is the first of these.
    pub(crate) first: usize,
    pub(crate) tiled: bool,
}

// SAFETY: only read.
unsafe impl Send for Rows {}
// SAFETY: see above.
unsafe impl Sync for Rows {}

/// Panels `from..to` times all rows.
pub(crate) struct Dots<'a, C> {
    pub(crate) panels: View,
    pub(crate) codec: &'a C,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) x: Rows,
    pub(crate) out: Out,
}

/// Panels that a single row meets side by side: memory gives several streams faster than one.
const SIDE: usize = 4;

/// How many of `n` panels are met side by side, and how far apart they are: each place is read from its start to its
/// end, as if it were alone.
#[inline(always)]
pub(crate) fn side(n: usize) -> (usize, usize) {
    if n < SIDE { (n, 1) } else { (SIDE, n / SIDE) }
}

/// Rows that may be read beyond the last.
pub(crate) const SPARE: usize = 7;

/// Bytes of quantized rows that should stay near while panels pass by.
const PASSED: usize = 192 << 10;

impl<C: Bytes> Op for Dots<'_, C> {
    type Out = ();
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if !C::SIXTEENS && self.codec.plain() { run::<S, C, true>(s, self) } else { run::<S, C, false>(s, self) }
    }
}

/// The whole product, for codecs that are plain and for others.
#[inline(always)]
fn run<S: Simd, C: Bytes, const PLAIN: bool>(s: S, g: Dots<'_, C>) {
    let cols = g.panels.blocks * BLOCK;
    let chunk = (PASSED / cols.max(1)).next_multiple_of(8).max(8);
    let mut first = 0;
    while first < g.x.rows {
        let end = (first + chunk).min(g.x.rows);
        let mut p = g.from;
        if first + 1 == g.x.rows {
            while p < g.to {
                let (n, apart) = side(g.to - p);
                let end = p + apart;
                while p < end {
                    // SAFETY: the maker has these panels and rows, and room in `out`.
                    unsafe { beside::<S, C, PLAIN>(s, &g, (p, n, apart), first) };
                    p += 1;
                }
                p += (n - 1) * apart;
            }
        }
        while p < g.to {
            let mut r = first;
            // SAFETY: the maker has these panels and rows, and room in `out`.
            unsafe {
                // Rows beyond the last are computed from whatever is there, and not written.
                while r < end {
                    r += match end - r {
                        n if n > 4 && S::LANES == 16 => rows::<S, C, PLAIN, 8>(s, &g, p, r, n.min(8)),
                        n if S::LANES == 16 => rows::<S, C, PLAIN, 4>(s, &g, p, r, n.min(4)),
                        n @ (1 | 2) => rows::<S, C, PLAIN, 2>(s, &g, p, r, n),
                        n => rows::<S, C, PLAIN, 4>(s, &g, p, r, n.min(4)),
                    };
                }
            }
            p += 1;
        }
        first = end;
    }
}

/// Panel `p` times rows `r..r + M`, of which the first `have` are written; gives `have`.
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn rows<S: Simd, C: Bytes, const PLAIN: bool, const M: usize>(
    s: S,
    g: &Dots<'_, C>,
    p: usize,
    r: usize,
    have: usize,
) -> usize {
    let panel = g.panels.at(p);
    let mut out = [[s.splat(0.0); 2]; M];
    // SAFETY: as the caller promises.
    unsafe {
        if S::LANES == ROWS {
            sums::<S, C, PLAIN, M>(s, g, panel, r, (0, ROWS / S::LANES), &mut out);
        } else {
            // Of several rows the sums of one half are all that registers hold.
            sums::<S, C, PLAIN, M>(s, g, panel, r, (0, 1), &mut out);
            sums::<S, C, PLAIN, M>(s, g, panel, r, (1, 2), &mut out);
        }
        let mut m = 0;
        while m < M && m < have {
            g.out.put(s, r + m, p, g.panels.rows, out[m]);
            m += 1;
        }
    }
    have
}

/// Sums of halves `from..to` of the lanes of a panel and rows `r..r + M`.
/// # Safety
/// As for [`rows`].
#[inline(always)]
unsafe fn sums<S: Simd, C: Bytes, const PLAIN: bool, const M: usize>(
    s: S,
    g: &Dots<'_, C>,
    panel: *const u8,
    r: usize,
    (from, to): (usize, usize),
    out: &mut [[S::V; 2]; M],
) {
    let blocks = g.panels.blocks;
    let mut b = 0;
    while b < blocks {
        // SAFETY: as the caller promises.
        unsafe { block::<S, C, PLAIN, M>(s, g, (panel, b), r, (from, to), out) };
        b += 1;
    }
}

/// Row `r` times `n` panels from `p` on, at most [`SIDE`], `apart` from one to the next, block by block of each. Their
/// bytes meet both halves of the lanes while they are in registers.
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn beside<S: Simd, C: Bytes, const PLAIN: bool>(
    s: S,
    g: &Dots<'_, C>,
    (p, n, apart): (usize, usize, usize),
    r: usize,
) {
    let blocks = g.panels.blocks;
    let each = g.panels.stride / blocks.max(1);
    let mut out = [[[s.splat(0.0); 2]; 1]; SIDE];
    let mut b = 0;
    while b < blocks {
        let mut i = 0;
        while i < n {
            let panel = g.panels.at(p + i * apart);
            // Thin codes at all places in line, processors with eight lanes guess as fast as they multiply: asking only
            // takes their time. At fewer places they guess too little.
            if S::LANES == 16 || C::BLOCK_BYTES > 256 {
                g.panels.ask_in_line(panel, b, each, NEAR);
            } else if n < SIDE {
                g.panels.ask_in_line(panel, b, each, 2 * NEAR);
            }
            // SAFETY: as the caller promises.
            unsafe {
                if C::PICKS {
                    out[i][0] = picked::<S, C, PLAIN>(s, g, (panel, b), r, out[i][0]);
                } else {
                    block::<S, C, PLAIN, 1>(s, g, (panel, b), r, (0, ROWS / S::LANES), &mut out[i]);
                }
            }
            i += 1;
        }
        b += 1;
    }
    let mut i = 0;
    while i < n {
        // SAFETY: as the caller promises.
        unsafe { g.out.put(s, r, p + i * apart, g.panels.rows, out[i][0]) };
        i += 1;
    }
}

/// Adds block `b` of a panel.
/// # Safety
/// As for [`sums`].
#[inline(always)]
unsafe fn block<S: Simd, C: Bytes, const PLAIN: bool, const M: usize>(
    s: S,
    g: &Dots<'_, C>,
    (panel, b): (*const u8, usize),
    r: usize,
    (from, to): (usize, usize),
    out: &mut [[S::V; 2]; M],
) {
    let blocks = g.panels.blocks;
    // SAFETY: as the caller promises.
    unsafe {
        let x = g.x.codes.add((r * blocks + b) * BLOCK);
        let meta = g.x.meta.add((r * blocks + b) * META);
        let codes = panel.add(g.codec.grid().codes::<PLAIN>(b, C::BLOCK_BYTES));
        // A block is summed as a whole, or in the two parts that have scales of their own.
        let parts = if C::SIXTEENS { 2 } else { 1 };
        let mut part = 0;
        while part < parts {
            let mut sums = [[[s.splat_i(0); 2]; 2]; M];
            let mut m = 0;
            while m < M {
                let bias = s.spread_i::<false>(meta.add(m * blocks * META + 1 + part).cast());
                sums[m][0][0] = bias;
                sums[m][1][0] = bias;
                m += 1;
            }
            // One by one and not in a loop: how codes are cut out of their planes is then known in every place.
            let at = (codes, x, (from, to));
            if part == 0 {
                octet::<S, C, M>(s, g, at, 0, &mut sums);
                octet::<S, C, M>(s, g, at, 1, &mut sums);
            }
            if part + 1 == parts {
                octet::<S, C, M>(s, g, at, 2, &mut sums);
                octet::<S, C, M>(s, g, at, 3, &mut sums);
            }
            let mut h = from;
            while h < to {
                let shared = if C::SIXTEENS {
                    g.codec.shared_half(s, panel, b, part, h)
                } else {
                    g.codec.shared::<S, PLAIN>(s, panel, b, h)
                };
                let mut m = 0;
                while m + 1 < M {
                    let [sum, other] = s.total_both(C::BITS, [sums[m][h], sums[m + 1][h]]);
                    sums[m][h][0] = sum;
                    sums[m + 1][h][0] = other;
                    m += 2;
                }
                if m < M {
                    sums[m][h][0] = s.total(C::BITS, sums[m][h]);
                }
                m = 0;
                while m < M {
                    let meta = meta.add(m * blocks * META);
                    out[m][h] = g.codec.close::<S, PLAIN>(s, &shared, sums[m][h][0], meta, out[m][h]);
                    m += 1;
                }
                h += 1;
            }
            part += 1;
        }
    }
}

/// Adds the products of octet `o` of the block at `block` to the sums of halves `from..to`.
/// # Safety
/// As for [`rows`]; `x` leads to the block's bytes in the first row.
#[inline(always)]
unsafe fn octet<S: Simd, C: Bytes, const M: usize>(
    s: S,
    g: &Dots<'_, C>,
    (block, x, (from, to)): (*const u8, *const i8, (usize, usize)),
    o: usize,
    sums: &mut [[[S::I; 2]; 2]; M],
) {
    let mut h = from;
    while h < to {
        // SAFETY: as the caller promises.
        unsafe {
            let codes = g.codec.octet(s, block, o, h);
            let (x, row) = (x.add(8 * o), g.panels.blocks * BLOCK);
            let mut m = 0;
            // Some processors multiply by two rows at once.
            while m + 1 < M {
                let two = [x.add(m * row), x.add((m + 1) * row)];
                [sums[m][h], sums[m + 1][h]] = s.dot8_both(C::BITS, [sums[m][h], sums[m + 1][h]], codes, two);
                m += 2;
            }
            if m < M {
                sums[m][h] = s.dot8::<false>(C::BITS, sums[m][h], codes, x.add(m * row));
            }
        }
        h += 1;
    }
}

/// Adds the products of row `r` and block `b` of a panel of codes that x is brought to: the same exact sums.
/// # Safety
/// As for [`rows`].
#[inline(always)]
unsafe fn picked<S: Simd, C: Bytes, const PLAIN: bool>(
    s: S,
    g: &Dots<'_, C>,
    (panel, b): (*const u8, usize),
    r: usize,
    mut out: [S::V; 2],
) -> [S::V; 2] {
    let blocks = g.panels.blocks;
    let zero = s.and_i(s.splat_i(-1), g.codec.grid().zero);
    // SAFETY: as the caller promises.
    unsafe {
        let x = g.x.codes.add((r * blocks + b) * BLOCK);
        let scale = s.splat(*g.x.meta.add((r * blocks + b) * META));
        let block = panel.add(g.codec.grid().codes::<PLAIN>(b, C::BLOCK_BYTES));
        let mut h = 0;
        while h < ROWS / S::LANES {
            let mut sum = [s.splat_i(0); 2];
            let mut given = [s.splat_i(0); 2];
            let mut part = 0;
            while part < 2 {
                let [codes, places] = g.codec.picks(s, block, part, h);
                let x = x.add(part * BLOCK / 2);
                let x = [s.pick(x, places[0]), s.pick(x, places[1])];
                sum = s.dot(C::BITS, sum, codes, x);
                given = s.dot(C::BITS, given, [zero; 2], x);
                part += 1;
            }
            let shared = g.codec.shared::<S, PLAIN>(s, panel, b, h);
            let (sum, given) = (s.total(C::BITS, sum), s.total(C::BITS, given));
            out[h] = g.codec.close_gathered::<S, PLAIN>(s, &shared, sum, (given, scale), out[h]);
            h += 1;
        }
    }
    out
}

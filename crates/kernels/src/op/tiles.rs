//! The integer product by tiles, for prompts: what [`super::dot`] computes, bit by bit.
//!
//! A panel's codes become bytes once, as many columns as stay in the first-level cache, and meet 16 rows of x at a
//! time. A tile's sums of a block are exact, as those of dot products are; what follows is done in the same order with
//! the same roundings: `acc = fma(sum, weight's scale * activation's scale, acc)`, blocks in rising order. Where codes
//! less their zero fit signed bytes, which they nearly always do, the zero is taken off once and not from every sum.

use super::dot::Rows;
use super::matmul::Out;
use crate::panel::ints::{Bytes, META};
use crate::panel::{BLOCK, ROWS, TILE, View};
use crate::simd::unit::{GROUP, SUMS, Unit};
use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, scratch};

/// Blocks of a panel that are brought to bytes at a time, at most: 16 kB of them.
const NEAR: usize = 32;

/// f32 values that stand beside a block's bytes: two scales or a scale, minima and zeros.
const BESIDE: usize = 4 * ROWS;

/// Panels `from..to` times rows in tiles.
pub(crate) fn multiply<C: Bytes>(isa: Isa, panels: View, codec: &C, (from, to): (usize, usize), x: Rows, out: Out) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Amx && isa.available() {
        let tiles = crate::simd::amx::Amx::new(if C::SIXTEENS { BLOCK / 2 } else { BLOCK });
        return by(tiles.unit(), isa, panels, codec, (from, to), x, out);
    }
    #[cfg(test)]
    return by(crate::simd::unit::Slow, isa, panels, codec, (from, to), x, out);
    #[cfg(not(test))]
    panic!("{isa} has no tiles");
}

fn by<C: Bytes, U: Unit>(unit: U, isa: Isa, panels: View, codec: &C, (from, to): (usize, usize), x: Rows, out: Out) {
    let (blocks, tiles) = (panels.blocks, x.rows.div_ceil(TILE));
    let near = blocks.div_ceil(blocks.div_ceil(NEAR).max(1)).next_multiple_of(GROUP);
    // Sums so far are kept between parts of a panel, where there are several.
    let kept = if blocks > near { tiles * SUMS } else { 0 };
    scratch::with(near * (ROWS * BLOCK / 4 + BESIDE) + 2 * GROUP * SUMS + kept, |room| {
        let (codes, room) = room.split_at_mut(near * ROWS * BLOCK / 4);
        let (beside, room) = room.split_at_mut(near * BESIDE);
        let (sums, kept) = room.split_at_mut(2 * GROUP * SUMS);
        let (codes, beside) = (codes.as_mut_ptr().cast::<u8>(), beside.as_mut_ptr());
        let (sums, kept) = (sums.as_mut_ptr().cast::<i32>(), kept.as_mut_ptr());
        for p in from..to {
            for from in (0..blocks).step_by(near) {
                let to = (from + near).min(blocks);
                let signed = dispatch(isa, Unpack { panel: panels.at(p), codec, from, to, codes, beside });
                let part = Part { unit, panels, p, from, to, codes, beside, sums, kept, x, out };
                match (C::SIXTEENS, signed, codec.grid().kind.minima()) {
                    (true, ..) => dispatch(isa, Halves(part)),
                    (_, true, false) => dispatch(isa, Product::<U, true, false>(part)),
                    (_, true, true) => dispatch(isa, Product::<U, true, true>(part)),
                    (_, false, false) => dispatch(isa, Product::<U, false, false>(part)),
                    (_, false, true) => dispatch(isa, Product::<U, false, true>(part)),
                }
            }
        }
    });
}

/// Blocks `from..to` of a panel to bytes, `[columns / 4][16 outputs][4 columns]`, less their zeros where they fit
/// signed bytes then; and beside them what every block shares. Gives whether they are signed.
struct Unpack<'a, C> {
    panel: *const u8,
    codec: &'a C,
    from: usize,
    to: usize,
    codes: *mut u8,
    /// [`BESIDE`] values of each block: its scales, then the second ones or its minima, then its zeros as whole
    /// numbers.
    beside: *mut f32,
}

impl<C: Bytes> Op for Unpack<'_, C> {
    type Out = bool;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> bool {
        // SAFETY: the maker has these blocks of the panel and room for them.
        unsafe {
            if !C::SIXTEENS && self.codec.plain() {
                unpack::<S, C, true>(s, &self)
            } else {
                unpack::<S, C, false>(s, &self)
            }
        }
    }
}

/// # Safety
/// As [`Unpack`] promises.
#[inline(always)]
unsafe fn unpack<S: Simd, C: Bytes, const PLAIN: bool>(s: S, u: &Unpack<'_, C>) -> bool {
    let grid = u.codec.grid();
    let each = !PLAIN && grid.kind.zeros();
    let (most, zero) = ((1 << C::BITS) - 1, i32::from(grid.zero));
    let mut signed = if each { most <= 127 } else { zero <= 128 && most - zero <= 127 };
    let halves = ROWS / S::LANES;
    // SAFETY: as the caller promises.
    unsafe {
        if each && signed {
            let mut top = s.splat(0.0);
            let mut b = u.from;
            while b < u.to {
                let mut h = 0;
                while h < halves {
                    top = s.max(top, s.float(u.codec.shared::<S, PLAIN>(s, u.panel, b, h).zeros));
                    h += 1;
                }
                b += 1;
            }
            signed = s.top(top) <= 128.0;
        }
        assert!(signed || !C::SIXTEENS, "codes with two scales a block fit signed bytes");
        let mut b = u.from;
        while b < u.to {
            let i = b - u.from;
            let block = u.panel.add(grid.codes::<PLAIN>(b, C::BLOCK_BYTES));
            let (codes, beside) = (u.codes.add(i * ROWS * BLOCK), u.beside.add(i * BESIDE));
            let mut h = 0;
            while h < halves {
                let (codes, beside) = (codes.add(4 * h * S::LANES), beside.add(h * S::LANES));
                let mut zeros = s.splat_i(zero);
                if C::SIXTEENS {
                    s.store(beside, u.codec.shared_half(s, u.panel, b, 0, h).scale);
                    s.store(beside.add(ROWS), u.codec.shared_half(s, u.panel, b, 1, h).scale);
                } else {
                    let shared = u.codec.shared::<S, PLAIN>(s, u.panel, b, h);
                    s.store(beside, shared.scale);
                    s.store(beside.add(ROWS), shared.minima);
                    if each {
                        zeros = shared.zeros;
                    }
                    s.store_i(beside.add(2 * ROWS).cast(), zeros);
                }
                // In every byte of its lane, or none.
                let two = s.or_i(zeros, s.up_i(zeros, s.splat_i(8)));
                let four = s.or_i(two, s.up_i(two, s.splat_i(16)));
                let off = if signed { four } else { s.splat_i(0) };
                // One by one and not in a loop: how codes are cut out of their planes is then known in every place.
                octet(s, u.codec, (block, codes), (0, h), off);
                octet(s, u.codec, (block, codes), (1, h), off);
                octet(s, u.codec, (block, codes), (2, h), off);
                octet(s, u.codec, (block, codes), (3, h), off);
                h += 1;
            }
            b += 1;
        }
    }
    signed
}

/// Octet `o` of the block at `block` as bytes to its place among `codes`.
/// # Safety
/// Both are there.
#[inline(always)]
unsafe fn octet<S: Simd, C: Bytes>(
    s: S,
    codec: &C,
    (block, codes): (*const u8, *mut u8),
    (o, h): (usize, usize),
    off: S::I,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let [first, second] = codec.octet(s, block, o, h);
        s.store_i(codes.add(2 * o * 4 * ROWS), s.sub_bytes(first, off));
        s.store_i(codes.add((2 * o + 1) * 4 * ROWS), s.sub_bytes(second, off));
    }
}

/// Blocks `from..to` of panel `p`, as bytes, times all rows.
struct Part<U> {
    unit: U,
    panels: View,
    p: usize,
    from: usize,
    to: usize,
    codes: *const u8,
    beside: *const f32,
    /// Room for two groups of products: one is made while the other is read.
    sums: *mut i32,
    /// Sums of all rows up to `from`, `[tiles][16 rows][16 outputs]`.
    kept: *mut f32,
    x: Rows,
    out: Out,
}

struct Product<U, const SIGNED: bool, const MINIMA: bool>(Part<U>);

impl<U: Unit, const SIGNED: bool, const MINIMA: bool> Op for Product<U, SIGNED, MINIMA> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut t = 0;
        while t * TILE < self.0.x.rows {
            // SAFETY: the maker has these panels and rows, and the room.
            unsafe { tile::<S, U, BLOCK, SIGNED, MINIMA>(s, &self.0, t) };
            t += 1;
        }
    }
}

/// Where every block has two scales.
struct Halves<U>(Part<U>);

impl<U: Unit> Op for Halves<U> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut t = 0;
        while t * TILE < self.0.x.rows {
            // SAFETY: the maker has these panels and rows, and the room.
            unsafe { tile::<S, U, { BLOCK / 2 }, true, false>(s, &self.0, t) };
            t += 1;
        }
    }
}

/// A tile of rows.
/// # Safety
/// As [`Part`] promises.
#[inline(always)]
unsafe fn tile<S: Simd, U: Unit, const COLUMNS: usize, const SIGNED: bool, const MINIMA: bool>(
    s: S,
    g: &Part<U>,
    t: usize,
) {
    let (blocks, halves) = (g.panels.blocks, ROWS / S::LANES);
    let steps = (g.to - g.from) * (BLOCK / COLUMNS);
    let mut acc = [[s.splat(0.0); 2]; TILE];
    // SAFETY: as the caller promises.
    unsafe {
        let x = g.x.codes.add((t * blocks + g.from) * TILE * BLOCK);
        let meta = g.x.meta.add((t * blocks + g.from) * TILE * META);
        let kept = g.kept.wrapping_add(t * SUMS);
        if g.from > 0 {
            let mut m = 0;
            while m < TILE {
                let mut h = 0;
                while h < halves {
                    acc[m][h] = s.load(kept.add(m * ROWS + h * S::LANES));
                    h += 1;
                }
                m += 1;
            }
        }
        // A group of products is asked for before the sums of the one before are read.
        let (mut asked, mut done) = (0, 0);
        while done < steps {
            let ready = asked;
            if asked < steps {
                let n = GROUP.min(steps - asked);
                let sums = g.sums.add(asked % (2 * GROUP) * SUMS);
                g.unit.products::<COLUMNS, SIGNED>(x, g.codes, sums, asked, n);
                asked += n;
            }
            while done < ready {
                let block = done / (BLOCK / COLUMNS);
                let beside = g.beside.add(block * BESIDE);
                let scale = beside.add(done % (BLOCK / COLUMNS) * ROWS);
                let (meta, sums) = (meta.add(block * TILE * META), g.sums.add(done % (2 * GROUP) * SUMS));
                let mut h = 0;
                while h < halves {
                    let at = h * S::LANES;
                    let (scale, minima) = (s.load(scale.add(at)), s.load(beside.add(ROWS + at)));
                    let zeros = s.load_i(beside.add(2 * ROWS + at).cast());
                    let mut m = 0;
                    while m < TILE {
                        let mut sum = s.load_i(sums.add(m * ROWS + at).cast());
                        if !SIGNED {
                            sum = s.less_product(sum, zeros, s.spread_i::<false>(meta.add(2 * TILE + m).cast()));
                        }
                        let scale = s.mul(scale, s.splat(*meta.add(m)));
                        acc[m][h] = s.fused(s.float(sum), scale, acc[m][h]);
                        if MINIMA {
                            acc[m][h] = s.fused(minima, s.splat(*meta.add(3 * TILE + m)), acc[m][h]);
                        }
                        m += 1;
                    }
                    h += 1;
                }
                done += 1;
            }
        }
        let mut m = 0;
        while m < TILE {
            if g.to < blocks {
                let mut h = 0;
                while h < halves {
                    s.store(kept.add(m * ROWS + h * S::LANES), acc[m][h]);
                    h += 1;
                }
            } else if t * TILE + m < g.x.rows {
                g.out.put(s, t * TILE + m, g.p, g.panels.rows, acc[m]);
            }
            m += 1;
        }
    }
}

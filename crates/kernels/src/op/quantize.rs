//! Activations as signed bytes, each block of 32 columns of a row with a scale of its own.
//!
//! A block becomes 16-bit words first, `x * (32767 / max |x|)` to the nearest, ties to even. Its codes are
//! `word * L / 2^15` to the nearest, halves up, where `L` is that of 127, 126, 125 and 124 under which they lose least:
//! a step a little wider than need be often meets a block's 32 values better, an eighth less error on the whole. The
//! scale is then the one that suits the codes best (least squares). A block whose largest magnitude is below 1e-30
//! becomes zeros. A block with a NaN or an infinity gets the scale NaN, so that every result of its row is NaN. All
//! sums are of whole numbers, exact, so that every instruction set gives the same bits.

use std::mem::MaybeUninit;

use crate::panel::ints::META;
use crate::panel::{BLOCK, Opening};
use crate::simd::{Op, Simd};

/// Below this a block counts as zeros: its scale's inverse would leave the range of f32.
const LEAST: f32 = 1e-30;
/// The largest magnitude of a block as a word.
const TOP: f32 = 32767.0;
/// Words to a step at level 1.
const ONE: f32 = 32768.0;

/// Quantizes one row, padded with zeros to whole blocks.
pub(crate) struct Quantize {
    pub(crate) x: *const f32,
    pub(crate) blocks: usize,
    /// 32 for each block.
    pub(crate) codes: *mut i8,
    /// [`META`] numbers for each block.
    pub(crate) meta: *mut f32,
    /// How many rows' codes lie by turns, block by block, and their numbers, number by number: 1 where they lie row
    /// after row.
    pub(crate) beside: usize,
    /// The matrix's zero.
    pub(crate) zero: i32,
    /// Whether its blocks have two scales each.
    pub(crate) sixteens: bool,
    /// What will be read next.
    pub(crate) opening: Opening,
}

/// A number for each block of a group, by lanes: room for the most lanes.
type Group = [f32; 16];

/// What the blocks of a group leave on the way.
struct Partials {
    /// Their words.
    words: [[i16; BLOCK]; 16],
    /// Four squares of lanes: a vector of partial sums, or of candidates for the largest, for each block.
    squares: [[[f32; 16]; 16]; 4],
}

impl Op for Quantize {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // A group of as many blocks as there are lanes, step by step: what a block's steps need of all its values is
        // made for all blocks at once, a lane each. One block alone would wait for every step.
        let mut room = MaybeUninit::<Partials>::uninit();
        let mut b = 0;
        while b < self.blocks {
            let n = S::LANES.min(self.blocks - b);
            // SAFETY: the maker has rows as long; a group that is not full finds zeros in the place of the blocks it
            // lacks.
            unsafe {
                if n < S::LANES {
                    room.as_mut_ptr().write_bytes(0, 1);
                }
                self.group(s, b, n, room.as_mut_ptr());
            }
            b += S::LANES;
        }
    }
}

/// Levels that are tried, from the highest on, each one below the last.
const LEVELS: [f32; 4] = [127.0, 126.0, 125.0, 124.0];
/// What rounding takes off a code comes as a word, in 2^-16 of a step; of these so many bits are enough, so that sums
/// stay below 2^24 and are exact in f32: 512ths of a step where they are squared, 4096ths where they meet codes.
const SQUARED: u32 = 7;
const MET: u32 = 4;

impl Quantize {
    /// Blocks `first..first + n`, at most as many as lanes.
    /// # Safety
    /// The row has these blocks; the room is there, and filled with numbers where they are fewer than lanes.
    #[inline(always)]
    unsafe fn group<S: Simd>(&self, s: S, first: usize, n: usize, room: *mut Partials) {
        let none = s.splat(0.0);
        // SAFETY: as the caller promises.
        unsafe {
            let (words, squares) = ((&raw mut (*room).words).cast::<i16>(), (&raw mut (*room).squares).cast::<f32>());
            let x = self.x.add(first * BLOCK);
            let mut b = 0;
            while b < n {
                self.opening.fetch(first + b);
                s.store(row::<S>(squares, 0, b), s.tops(x.add(b * BLOCK)));
                b += 1;
            }
            let top = s.row_tops(row::<S>(squares, 0, 0));
            let mut by: Group = [0.0; 16];
            s.store(by.as_mut_ptr(), s.select_lt(top, s.splat(LEAST), none, s.div(s.splat(TOP), top)));
            b = 0;
            while b < n {
                let w = s.words(x.add(b * BLOCK), by[b]);
                s.store_w(words.add(b * BLOCK), w);
                lost(s, w, squares, b);
                b += 1;
            }
            // The level under which a block loses least; the highest of equals.
            let (mut least, mut level) = (s.splat(f32::INFINITY), s.splat(LEVELS[0]));
            let mut j = 0;
            while j < 4 {
                // Errors in steps, comparable from one level to the next.
                let steps = s.splat(1.0 / (LEVELS[j] * LEVELS[j]));
                let lost = s.mul(s.row_sums(row::<S>(squares, j, 0)), steps);
                level = s.select_lt(lost, least, s.splat(LEVELS[j]), level);
                least = s.select_lt(lost, least, lost, least);
                j += 1;
            }
            let mut levels: Group = [0.0; 16];
            s.store(levels.as_mut_ptr(), level);
            let apart = BLOCK * self.beside;
            let codes = self.codes.add(first * apart);
            b = 0;
            while b < n {
                // One of `LEVELS`.
                let level: i32 = levels[b].to_int_unchecked();
                self.round(s, words.add(b * BLOCK), codes.add(b * apart), level as i16, squares, b);
                b += 1;
            }
            let sum = s.row_sums(row::<S>(squares, 0, 0));
            let (powers, rests) = (s.row_sums(row::<S>(squares, 1, 0)), s.row_sums(row::<S>(squares, 2, 0)));
            let part = if self.sixteens { s.row_sums(row::<S>(squares, 3, 0)) } else { none };
            // At least one code is +-124 or more, but where all are zeros.
            let fit = s.mul(s.div(rests, powers), s.splat(1.0 / (1 << (16 - MET)) as f32));
            let step = s.div(top, s.mul(level, s.splat(TOP / ONE)));
            let scale = s.mul(step, s.add(s.splat(1.0), fit));
            let scale = s.select_lt(top, s.splat(LEAST), none, scale);
            let scale = s.select_lt(top, s.splat(f32::INFINITY), scale, s.splat(f32::NAN));
            let mut all: [Group; 4] = [[0.0; 16]; 4];
            for (group, v) in all.iter_mut().zip([scale, part, sum, s.mul(scale, sum)]) {
                s.store(group.as_mut_ptr(), v);
            }
            b = 0;
            while b < n {
                let [scale, part, sum, scaled] = [all[0][b], all[1][b], all[2][b], all[3][b]];
                let numbers: [f32; META] = if scale.is_nan() {
                    codes.add(b * apart).write_bytes(0, BLOCK);
                    [f32::NAN, 0.0, 0.0, f32::NAN]
                } else {
                    // Whole numbers of at most 32 * 127.
                    let (part, whole) = (part.to_int_unchecked::<i32>(), sum.to_int_unchecked::<i32>());
                    let bias = |sum: i32| f32::from_bits((-self.zero * sum) as u32);
                    if self.sixteens {
                        [scale, bias(part), bias(whole - part), 0.0]
                    } else {
                        [scale, bias(whole), f32::from_bits(whole as u32), scaled]
                    }
                };
                let meta = self.meta.add((first + b) * META * self.beside);
                if self.beside == 1 {
                    meta.cast::<[f32; META]>().write_unaligned(numbers);
                } else {
                    let mut k = 0;
                    while k < META {
                        meta.add(k * self.beside).write(numbers[k]);
                        k += 1;
                    }
                }
                b += 1;
            }
        }
    }

    /// Codes of the 32 words at `words`; partial sums of the codes, of their squares, of what rounding took off times
    /// the code, and where they are asked for of the first sixteen codes, to row `b` of the four squares.
    /// # Safety
    /// The pointers are good for 32 values, the squares have that row.
    #[inline(always)]
    unsafe fn round<S: Simd>(&self, s: S, words: *const i16, codes: *mut i8, level: i16, squares: *mut f32, b: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            let w = s.load_w(words);
            let code = s.high_w(w, s.splat_w(level, level));
            s.store_bytes(codes, code);
            let rest = s.down_w::<MET>(s.low_w(w, s.splat_w(2 * level, 2 * level)));
            s.store(row::<S>(squares, 0, b), s.float(s.products_w(code, s.splat_w(1, 1))));
            s.store(row::<S>(squares, 1, b), s.float(s.products_w(code, code)));
            s.store(row::<S>(squares, 2, b), s.float(s.products_w(rest, code)));
            if self.sixteens {
                s.store(row::<S>(squares, 3, b), s.float(s.products_w(code, s.splat_w(1, 0))));
            }
        }
    }
}

/// Row `b` of square `j` of lanes.
#[inline(always)]
fn row<S: Simd>(squares: *mut f32, j: usize, b: usize) -> *mut f32 {
    squares.wrapping_add((j * S::LANES + b) * S::LANES)
}

/// Squares of what 32 words lose when they are rounded under each level: partial sums, to row `b` of the four squares.
/// # Safety
/// The squares have that row.
#[inline(always)]
unsafe fn lost<S: Simd>(s: S, words: S::W, squares: *mut f32, b: usize) {
    // Of `words * 2 * level` the last 16 bits are what is over a whole number of 2^16; one level less takes twice the
    // words off it.
    let top = 2 * LEVELS[0] as i16;
    let (mut rest, two) = (s.low_w(words, s.splat_w(top, top)), s.low_w(words, s.splat_w(2, 2)));
    let mut j = 0;
    while j < 4 {
        let near = s.down_w::<SQUARED>(rest);
        // SAFETY: as the caller promises.
        unsafe { s.store(row::<S>(squares, j, b), s.float(s.products_w(near, near))) };
        rest = s.sub_w(rest, two);
        j += 1;
    }
}

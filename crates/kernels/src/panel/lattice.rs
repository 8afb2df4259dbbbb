//! Panels of GGUF's codes that point into a grid ([`lacuna_format::lattice`]), at the file's own bits.
//!
//! 256 columns of 16 rows lie together: 16 f16, what scales are not among the signs, then 8 blocks of 32 columns. Four
//! indices of a row make a word of its lane, a byte each (those of 4 values two words: each eight columns' first, then
//! their second); so do the signs, a byte for eight columns. Where seven of them are kept, the eighth bit of that byte
//! holds what else there is: a bit of the block's scale, or the index's ninth. Higher bits of other indices are a byte
//! of a lane at the block's end.
//!
//! Eight columns become bytes by one look-up for a lane in a table of 32 bits an entry: eight magnitudes as places in a
//! list of sixteen, or four as they are. Codes are `zero ± magnitude`, so that products of bytes are the same as of any
//! other codes.

use std::sync::LazyLock;

use lacuna_format::{GgufType, Lattice, Piece, Points, Values};

use super::ints::{Bytes, GroupLayout, Shared};
use super::{BLOCK, Panels, ROWS};
use crate::simd::Simd;

/// The types, by the number that stands for each in [`Indexed`].
const TYPES: [GgufType; 5] = [GgufType::IQ2_XXS, GgufType::IQ2_XS, GgufType::IQ2_S, GgufType::IQ3_XXS, GgufType::IQ3_S];
pub(crate) const IQ2_XXS: usize = 0;
pub(crate) const IQ2_XS: usize = 1;
pub(crate) const IQ2_S: usize = 2;
pub(crate) const IQ3_XXS: usize = 3;
pub(crate) const IQ3_S: usize = 4;

/// Where things lie, and what the codes point into.
#[derive(Clone, Copy)]
struct Shape {
    /// Whether an index says eight values, else four.
    eight: bool,
    /// Whether of eight signs seven are kept.
    seven: bool,
    /// Bits of an index beyond a byte.
    above: usize,
    /// Bytes of 256 columns' scales that lie before their codes.
    scales: usize,
}

const SHAPES: [Shape; 5] = [
    Shape { eight: true, seven: true, above: 0, scales: 0 },
    Shape { eight: true, seven: true, above: 1, scales: 8 * ROWS },
    Shape { eight: true, seven: false, above: 2, scales: 8 * ROWS },
    Shape { eight: false, seven: true, above: 0, scales: 0 },
    Shape { eight: false, seven: false, above: 1, scales: 4 * ROWS },
];

impl Shape {
    /// Whether a block's scales are two.
    const fn sixteens(self) -> bool {
        self.scales == 8 * ROWS
    }
    /// Where a block's signs begin.
    const fn signs(self) -> usize {
        if self.eight { 4 * ROWS } else { 8 * ROWS }
    }
    /// Bytes of a block.
    const fn block(self) -> usize {
        // Single higher bits of eight indices, or two of four; a ninth bit beside seven signs lies among these.
        self.signs() + 4 * ROWS + if self.above > 0 && !self.seven { ROWS } else { 0 }
    }
    /// Bytes before the first block.
    const fn head(self) -> usize {
        2 * ROWS + self.scales
    }
}

/// What every index points to, for each type.
static ENTRIES: [LazyLock<Vec<u32>>; 5] = [
    LazyLock::new(|| entries(IQ2_XXS)),
    LazyLock::new(|| entries(IQ2_XS)),
    LazyLock::new(|| entries(IQ2_S)),
    LazyLock::new(|| entries(IQ3_XXS)),
    LazyLock::new(|| entries(IQ3_S)),
];

fn lattice(kind: usize) -> Lattice {
    TYPES[kind].lattice().expect("a type with a lattice")
}

/// Four magnitudes a byte each; of eight the places, the first four in the lower halves of the bytes.
fn entries(kind: usize) -> Vec<u32> {
    let l = lattice(kind);
    let one = |i: usize| {
        let at = |j: usize| l.places[i * l.each + j];
        u32::from_le_bytes(std::array::from_fn(|j| match l.each {
            8 => at(j) | at(j + 4) << 4,
            _ => l.levels[usize::from(at(j))],
        }))
    };
    (0..l.places.len() / l.each).map(one).collect()
}

/// Codes of type `T` in every column.
#[derive(Clone)]
pub(crate) struct Indexed<const T: usize> {
    grid: GroupLayout,
    entries: &'static [u32],
    /// Magnitudes by their places.
    levels: [i8; 16],
    /// Scales by their four bits.
    scales: [f32; 16],
}

impl<const T: usize> Indexed<T> {
    const SHAPE: Shape = SHAPES[T];

    fn new() -> Indexed<T> {
        let l = lattice(T);
        let zero = if T == IQ3_S { 16 } else { 64 };
        let mut levels = [0; 16];
        levels.iter_mut().zip(l.levels).for_each(|(to, from)| *to = *from as i8);
        Indexed {
            grid: GroupLayout::indexed(zero, Self::SHAPE.head(), 8 * Self::SHAPE.block()),
            entries: &ENTRIES[T],
            levels,
            scales: std::array::from_fn(|s| (2 * s + 1) as f32 * l.unit),
        }
    }

    /// Eight signs for every eight columns of a block, a byte each, where seven are kept.
    #[inline(always)]
    fn whole<S: Simd>(s: S, kept: S::I) -> S::I {
        if !Self::SHAPE.seven {
            return kept;
        }
        let seven = s.and_i(kept, 127);
        // The lowest bit of a byte becomes the sum of all seven; what comes from the byte above stays above it.
        let sum = s.xor_i(seven, s.shr_i(seven, 4));
        let sum = s.xor_i(sum, s.shr_i(sum, 2));
        let sum = s.xor_i(sum, s.shr_i(sum, 1));
        s.or_i(seven, s.shl_i(s.and_i(sum, 1), 7))
    }

    /// Indices of octet `o`, their first (of eight columns only) or second.
    /// # Safety
    /// The block is there.
    #[inline(always)]
    unsafe fn index<S: Simd>(s: S, block: *const u8, o: usize, second: usize, h: usize) -> S::I {
        let shape = Self::SHAPE;
        // SAFETY: as the caller promises.
        unsafe {
            let at = second * 4 * ROWS + h * 4 * S::LANES;
            let index = s.byte(s.load_i(block.add(at)), o);
            if shape.above == 0 {
                return index;
            }
            let high = if shape.seven {
                s.shr_i(s.byte(s.load_i(block.add(shape.signs() + h * 4 * S::LANES)), o), 7)
            } else {
                let more = s.widen(block.add(shape.signs() + 4 * ROWS + h * S::LANES));
                let down = if shape.eight { 2 * o } else { o + 4 * second };
                s.and_i(s.shr_i(more, down as u32), (1 << shape.above) - 1)
            };
            s.or_i(index, s.shl_i(high, 8))
        }
    }

    /// Scales of a block, or of the first or second (`part`) half of it.
    /// # Safety
    /// `panel` is a whole panel and has this block.
    #[inline(always)]
    unsafe fn scale<S: Simd>(&self, s: S, panel: *const u8, b: usize, part: usize, h: usize) -> S::V {
        let shape = Self::SHAPE;
        // SAFETY: as the caller promises; four bits are below the table's length.
        unsafe {
            let head = panel.add(b / 8 * (shape.head() + 8 * shape.block()));
            let bits = if shape.scales == 0 {
                let block = panel.add(self.grid.codes::<false>(b, Self::BLOCK_BYTES));
                let bit = s.and_i(s.shr_i(s.load_i(block.add(shape.signs() + h * 4 * S::LANES)), 7), 1);
                let up = |n: usize| s.up_i(s.byte(bit, n), s.splat_i(n as i32));
                s.or_i(s.or_i(s.byte(bit, 0), up(1)), s.or_i(up(2), up(3)))
            } else {
                let (at, high) = if shape.sixteens() { (b % 8, part) } else { (b % 8 / 2, b % 2) };
                let two = s.widen(head.add(2 * ROWS + at * ROWS + h * S::LANES));
                if high == 0 { s.and_i(two, 15) } else { s.shr_i(two, 4) }
            };
            s.mul(s.load_f16(head.add(2 * h * S::LANES)), s.lookup(self.scales.as_ptr(), 16, bits))
        }
    }
}

impl<const T: usize> Bytes for Indexed<T> {
    const BITS: usize = if T == IQ3_S { 5 } else { 7 };
    const BLOCK_BYTES: usize = SHAPES[T].block();
    const SIXTEENS: bool = SHAPES[T].sixteens();
    const UNFOLDS: bool = true;
    /// 7 bits, 11 of an f16 and 5 of a scale over it fit those of an f32.
    const FOLDS: bool = true;
    #[inline(always)]
    fn grid(&self) -> &GroupLayout {
        &self.grid
    }
    #[inline(always)]
    fn plain(&self) -> bool {
        false
    }
    #[inline(always)]
    unsafe fn octet<S: Simd>(&self, s: S, block: *const u8, o: usize, h: usize) -> [S::I; 2] {
        let shape = Self::SHAPE;
        // SAFETY: as the caller promises; indices have no more bits than entries are told apart by, places are below 16.
        unsafe {
            let first = s.entries(self.entries.as_ptr(), Self::index(s, block, o, 0, h));
            let magnitudes = if shape.eight {
                let levels = self.levels.as_ptr();
                [s.pick(levels, s.and_i(first, 15)), s.pick(levels, s.and_i(s.shr_i(first, 4), 15))]
            } else {
                [first, s.entries(self.entries.as_ptr(), Self::index(s, block, o, 1, h))]
            };
            let signs = Self::whole(s, s.load_i(block.add(shape.signs() + h * 4 * S::LANES)));
            let zero = if T == IQ3_S { 16 } else { 64 };
            [s.signed(magnitudes[0], signs, 8 * o, zero), s.signed(magnitudes[1], signs, 8 * o + 4, zero)]
        }
    }
    #[inline(always)]
    unsafe fn shared<S: Simd, const PLAIN: bool>(&self, s: S, panel: *const u8, b: usize, h: usize) -> Shared<S> {
        // SAFETY: as the caller promises.
        unsafe { self.shared_half(s, panel, b, 0, h) }
    }
    #[inline(always)]
    unsafe fn shared_half<S: Simd>(&self, s: S, panel: *const u8, b: usize, part: usize, h: usize) -> Shared<S> {
        // SAFETY: as the caller promises.
        let scale = unsafe { self.scale(s, panel, b, part, h) };
        Shared { scale, zeros: s.splat_i(0), minima: s.splat(0.0) }
    }
}

/// Writes a block's 256 columns of lane `lane` to `to`, which is zeros there.
fn put(to: &mut [u8], shape: Shape, p: &Points, lane: usize) {
    to[2 * lane..][..2].copy_from_slice(&p.d.to_le_bytes());
    let (head, block) = (shape.head(), shape.block());
    if shape.sixteens() {
        (0..8).for_each(|b| to[2 * ROWS + b * ROWS + lane] = p.scales[2 * b] | p.scales[2 * b + 1] << 4);
    } else if shape.scales > 0 {
        (0..4).for_each(|b| to[2 * ROWS + b * ROWS + lane] = p.scales[2 * b] | p.scales[2 * b + 1] << 4);
    }
    for b in 0..8 {
        let to = &mut to[head + b * block..][..block];
        let each = if shape.eight { 1 } else { 2 };
        let mut more = 0;
        for o in 0..4 {
            let sign = shape.signs() + 4 * lane + o;
            to[sign] = p.signs[4 * b + o];
            if shape.seven {
                let over = if shape.above > 0 { p.index[4 * b + o] >> 8 } else { u16::from(p.scales[b] >> o) & 1 };
                to[sign] = to[sign] & 127 | (over as u8) << 7;
            }
            for second in 0..each {
                let index = p.index[(4 * b + o) * each + second];
                to[second * 4 * ROWS + 4 * lane + o] = index as u8;
                more |= (index >> 8) << if shape.eight { 2 * o } else { o + 4 * second };
            }
        }
        if shape.above > 0 && !shape.seven {
            to[shape.signs() + 4 * ROWS + lane] = more as u8;
        }
    }
}

/// The number of the type of a dense piece, where it is one of these.
pub(crate) fn kind(piece: &Piece) -> Option<usize> {
    let Values::Gguf(kind, _) = &piece.values else { return None };
    TYPES.iter().position(|t| t == kind)
}

/// Panels of a checked piece of type `T`.
pub(crate) fn pack<const T: usize>(piece: &Piece, read: &dyn Fn()) -> (Panels, Indexed<T>) {
    let Values::Gguf(kind, bytes) = &piece.values else { unreachable!("told by `kind`") };
    let (lattice, shape) = (lattice(T), SHAPES[T]);
    let (supers, size) = (piece.cols / (8 * BLOCK), kind.block_bytes());
    let each = shape.head() + 8 * shape.block();
    let panels = Panels::build(piece.rows, piece.cols, supers * each, read, |first, n, panel| {
        for lane in 0..n {
            let row = &bytes[(first + lane) * supers * size..][..supers * size];
            for (b, to) in row.chunks_exact(size).zip(panel.chunks_exact_mut(each)) {
                put(to, shape, &lattice.points(b), lane);
            }
        }
    });
    (panels, Indexed::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_have_the_bits_of_the_file() {
        for (shape, kind) in SHAPES.into_iter().zip(TYPES) {
            assert_eq!(shape.head() + 8 * shape.block(), ROWS * kind.block_bytes(), "{kind:?}");
        }
    }
}

//! Panels whose rows share their columns: only those are kept, and x is gathered to them once for a panel.
//!
//! Where 16 rows share, a panel is as ever. Where 8 do, a panel has two halves with columns of their own: even lanes
//! are the rows of the first, odd lanes those of the second, and x comes in pairs.
//!
//! The kept columns of a run lie together, and are filled up to whole octets; in a pair, both halves are as long as the
//! longer. A run is a block of 32 columns for codes, which have one scale of the weights and one of quantized
//! activations there, and the whole row for floats.

use lacuna_format::{Float, Pattern, Piece, Values};

use super::ints::{Bytes, GroupLayout, Ints, put_code, put_scale};
use super::source::{Line, Source};
use super::{BLOCK, Panels, ROWS};
use crate::simd::{Op, Simd};

/// Where things lie in every panel: the masks of its halves first, then the scales of its groups, then its values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Whether halves have columns of their own.
    pub(crate) pair: bool,
    /// Panels that share their columns.
    pub(crate) share: usize,
    /// Blocks of 32 columns in a run.
    pub(crate) run: usize,
    /// Blocks of 32 columns in a scale group.
    pub(crate) per: usize,
    /// Most octets of a panel.
    pub(crate) octets: usize,
    /// Bytes of an octet's values.
    pub(crate) octet_bytes: usize,
    /// Where the values begin.
    pub(crate) values_at: usize,
    /// Bytes that are read of all panels.
    pub(crate) bytes: u64,
}

/// Whether rows share columns in the way of this module: in whole eights.
pub(crate) fn fits(pattern: &Pattern) -> bool {
    matches!(pattern, Pattern::Mask { height, .. } | Pattern::Blocks { height, .. } if height.is_multiple_of(8))
}

/// The kept columns of a panel's halves.
fn columns(piece: &Piece, pair: bool, first: usize) -> Vec<Vec<u32>> {
    let half = |r: usize| {
        let mut out = Vec::new();
        if r < piece.rows {
            piece.pattern.columns(r, piece.cols, &mut out);
        }
        out
    };
    if pair { vec![half(first), half(first + 8)] } else { vec![half(first)] }
}

/// Octets of every run, as many as the longest half keeps columns there.
fn octets(halves: &[Vec<u32>], runs: usize, run: usize) -> Vec<usize> {
    let mut out = vec![0; runs];
    for half in halves {
        let mut mine = vec![0usize; runs];
        half.iter().for_each(|&c| mine[c as usize / (run * BLOCK)] += 1);
        out.iter_mut().zip(mine).for_each(|(o, m)| *o = m.div_ceil(8).max(*o));
    }
    out
}

/// The layout, by the blocks of a run and of a scale group and the bytes of a panel's scales and of an octet, as far as
/// scales do not move it; and where the masks end.
fn layout(piece: &Piece, run: usize, per: usize, scale_bytes: usize, octet_bytes: usize) -> (Layout, usize) {
    let (rows, blocks) = (piece.rows, piece.cols.div_ceil(BLOCK));
    let shared = match piece.pattern {
        Pattern::Mask { height, .. } | Pattern::Blocks { height, .. } => height,
        _ => unreachable!("checked by `fits`"),
    };
    let pair = !shared.is_multiple_of(ROWS);
    let (mut most, mut all) = (0, 0);
    for first in (0..rows).step_by(ROWS) {
        let mine: usize = octets(&columns(piece, pair, first), blocks.div_ceil(run), run).iter().sum();
        (most, all) = (most.max(mine), all + mine * octet_bytes + scale_bytes);
    }
    let masks = (if pair { 2 } else { 1 } * blocks * 4).next_multiple_of(64);
    let bytes = (all + rows.div_ceil(ROWS) * masks) as u64;
    let share = (shared / ROWS).max(1);
    (Layout { pair, share, run, per, octets: most, octet_bytes, values_at: 0, bytes }, masks)
}

/// Writes the masks and gives the slot of every kept column of every half.
fn masks(panel: &mut [u8], halves: &[Vec<u32>], layout: &Layout, blocks: usize) -> Vec<Vec<usize>> {
    let runs = blocks.div_ceil(layout.run);
    let mut starts = vec![0; runs + 1];
    for (r, octets) in octets(halves, runs, layout.run).into_iter().enumerate() {
        starts[r + 1] = starts[r] + 8 * octets;
    }
    let mut out = Vec::new();
    for (h, half) in halves.iter().enumerate() {
        let (mut next, mut slots) = (starts.clone(), Vec::new());
        for &c in half {
            let c = c as usize;
            panel[h * blocks * 4 + c / 8] |= 1 << (c % 8);
            let next = &mut next[c / (layout.run * BLOCK)];
            slots.push(*next);
            *next += 1;
        }
        out.push(slots);
    }
    out
}

/// The lane of row `i` of a panel, and its half.
fn place(pair: bool, i: usize) -> (usize, usize) {
    if pair { (2 * (i % 8) + i / 8, i / 8) } else { (i, 0) }
}

/// Panels of a float piece that fits: f16 as it is, everything else as f32.
pub(crate) fn floats(piece: &Piece, read: &dyn Fn()) -> (Panels, Layout, bool) {
    let f16 = matches!(piece.values, Values::Float(Float::F16, _));
    let width = if f16 { 2 } else { 4 };
    let blocks = piece.cols.div_ceil(BLOCK);
    let (mut layout, masks_end) = layout(piece, blocks.max(1), blocks.max(1), 0, 8 * ROWS * width);
    layout.values_at = masks_end;
    let stride = masks_end + layout.octets * layout.octet_bytes;
    let panels = Panels::build(piece.rows, piece.cols, stride, read, |first, n, panel| {
        let slots = masks(panel, &columns(piece, layout.pair, first), &layout, blocks);
        for i in 0..n {
            let (lane, half) = place(layout.pair, i);
            let mut slots = slots[half].iter();
            piece.for_row(first + i, |_, v| {
                let slot = slots.next().expect("a slot for every kept column");
                let at = layout.values_at + (slot * ROWS + lane) * width;
                if f16 {
                    panel[at..at + 2].copy_from_slice(&half::f16::from_f32(v).to_le_bytes());
                } else {
                    panel[at..at + 4].copy_from_slice(&v.to_le_bytes());
                }
            });
        }
    });
    (panels, layout, f16)
}

/// Panels of codes of 4 or 8 bits (`wide`), whatever fewer the source has.
pub(crate) fn ints(piece: &Piece, source: &Source, wide: usize, read: &dyn Fn()) -> (Panels, GroupLayout, Layout) {
    let blocks = piece.cols.div_ceil(BLOCK);
    let per = (source.run / BLOCK).clamp(1, blocks.max(1));
    let groups = blocks.div_ceil(per);
    let scale_bytes = GroupLayout::together_bytes(source.kind, groups);
    let (mut layout, masks_end) = layout(piece, 1, per, scale_bytes, 16 * wide);
    let grid = GroupLayout::together(source, groups, masks_end);
    layout.values_at = (masks_end + scale_bytes).next_multiple_of(64);
    let stride = layout.values_at + layout.octets * layout.octet_bytes;
    let panels = Panels::build(piece.rows, piece.cols, stride, read, |first, n, panel| {
        let halves = columns(piece, layout.pair, first);
        let slots = masks(panel, &halves, &layout, blocks);
        let mut line = Line::default();
        for i in 0..n {
            (source.read)(first + i, &mut line);
            let (lane, half) = place(layout.pair, i);
            for (&code, &slot) in line.codes.iter().zip(&slots[half]) {
                put_code(&mut panel[layout.values_at + slot / 8 * 16 * wide..], wide, lane, slot % 8, code);
            }
            (0..groups).for_each(|g| put_scale(panel, &grid, lane, g, &line, g));
        }
    });
    (panels, grid, layout)
}

/// Whether panels of this grid may be filled in: where a code says zero, the same one everywhere.
pub(crate) fn fills(grid: &GroupLayout) -> bool {
    !grid.kind.zeros() && !grid.kind.minima() && !grid.kind.supers()
}

/// Bytes of a panel that [`Fill`] writes.
pub(crate) fn filled_bytes<const BITS: usize>(grid: &GroupLayout, layout: &Layout, blocks: usize) -> usize {
    grid.beside(layout.per, 64 * BITS).dense_bytes(blocks, 64 * BITS)
}

/// Writes a gathered panel as a dense one, the matrix's zero where nothing was kept; gives its grid.
pub(crate) struct Fill<'a, const BITS: usize> {
    pub(crate) panel: &'a [u8],
    pub(crate) codec: &'a Ints<BITS>,
    pub(crate) layout: &'a Layout,
    pub(crate) blocks: usize,
    pub(crate) out: &'a mut [u8],
}

impl<const BITS: usize> Op for Fill<'_, BITS>
where
    Ints<BITS>: Bytes,
{
    type Out = Ints<BITS>;
    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Ints<BITS> {
        assert!(
            self.out.len() >= filled_bytes::<BITS>(self.codec.grid(), self.layout, self.blocks),
            "room for a panel"
        );
        let Fill { panel, codec: Ints(grid), layout, blocks, out } = self;
        let dense = grid.beside(layout.per, 64 * BITS);
        // SAFETY: a whole panel of this codec, and room for as much.
        unsafe {
            let mut lanes = [0; ROWS];
            let mut i = 0;
            while i < ROWS {
                lanes[i] = place(layout.pair, i).0;
                i += 1;
            }
            fill_codes::<BITS>(panel.as_ptr(), (layout, blocks, &dense), &lanes, out.as_mut_ptr());
            let (groups, entry) = (blocks.div_ceil(layout.per), grid.kind.entry());
            let mut i = 0;
            while i < groups * ROWS {
                let (width, g) = (entry / ROWS, i / ROWS);
                let (from, to) = (grid.entry(g) + lanes[i % ROWS] * width, dense.entry(g) + i % ROWS * width);
                panel.as_ptr().add(from).copy_to_nonoverlapping(out.as_mut_ptr().add(to), width);
                i += 1;
            }
        }
        Ints(dense)
    }
}

/// Codes to where they are in a dense panel. Plain loops over lanes, by pointers: they become vectors of the
/// instruction set that they are inlined into, as iterators and closures would not.
/// # Safety
/// `panel` is a whole one of `blocks` blocks, `lanes` are in it, and `out` has room for as many blocks.
#[inline(always)]
unsafe fn fill_codes<const BITS: usize>(
    panel: *const u8,
    (layout, blocks, dense): (&Layout, usize, &GroupLayout),
    lanes: &[usize; ROWS],
    out: *mut u8,
) {
    let fill = u32::from(if BITS == 4 { dense.zero * 17 } else { dense.zero }) * 0x0101_0101;
    let one = if BITS == 4 { 15 } else { 255 };
    // SAFETY: as the caller promises.
    unsafe {
        let mut next = panel.add(layout.values_at).cast::<[u32; ROWS]>();
        let mut b = 0;
        while b < blocks {
            let mine = panel.cast::<u32>().add(b).read_unaligned();
            let other = if layout.pair { panel.cast::<u32>().add(blocks + b).read_unaligned() } else { mine };
            let count = mine.count_ones().max(other.count_ones()).div_ceil(8) as usize * BITS / 4;
            // A word holds a lane's codes of four columns, with 4 bits those of eight.
            let mut source = [[0; ROWS]; 8];
            let mut w = 0;
            while w < count {
                let from = next.read_unaligned();
                let mut i = 0;
                while i < ROWS {
                    source[w][i] = from[lanes[i]] ^ fill;
                    i += 1;
                }
                next = next.add(1);
                w += 1;
            }
            let to = out.add(dense.codes::<false>(b, 64 * BITS)).cast::<[u32; ROWS]>();
            w = 0;
            while w < BITS {
                to.add(w).write_unaligned([fill; ROWS]);
                w += 1;
            }
            let mut h = 0;
            while h < 2 {
                // Where all rows share, both halves take the same way.
                let (mut rest, mut k) = (if h == 0 { mine } else { other }, 0);
                while rest != 0 {
                    let c = rest.trailing_zeros() as usize;
                    let ((from, down), (word, up)) = (within::<BITS>(k), within::<BITS>(c));
                    let from = source.as_ptr().add(from).cast::<u32>().add(8 * h);
                    let at = to.add(word).cast::<u32>().add(8 * h);
                    let mut i = 0;
                    while i < 8 {
                        let code = *from.add(i) >> down & one;
                        at.add(i).write_unaligned(at.add(i).read_unaligned() ^ code << up);
                        i += 1;
                    }
                    (rest, k) = (rest & (rest - 1), k + 1);
                }
                h += 1;
            }
            b += 1;
        }
    }
}

/// The word, and the place in it, of column `c` of a block.
#[inline(always)]
fn within<const BITS: usize>(c: usize) -> (usize, usize) {
    if BITS == 4 { (c / 8, 8 * (c % 4) + c % 8 / 4 * 4) } else { (c / 4, 8 * (c % 4)) }
}

//! Panels whose rows share their columns: only those are kept, and x is gathered to them once for a panel.
//!
//! Where 16 rows share, a panel is as ever. Where 8 do, a panel has two halves with columns of their own: even lanes are the rows of the first,
//! odd lanes those of the second, and x comes in pairs.
//!
//! The kept columns of each scale group lie together, in pieces of 32, the last one cut to whole octets; in a pair, both halves are as long as the
//! longer. A piece is what has one scale of the weights and one of quantized activations, which share one for a scale group, or for 128 columns of
//! a larger one.

use lacuna_format::{Float, Pattern, Piece, Values};

use super::ints::{Grid, grid, put_code, put_scale};
use super::source::{Line, Source};
use super::{BLOCK, Panels, ROWS};

/// Where things lie in every panel: the masks of its halves first, then the scales of its pieces, then its values.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Whether halves have columns of their own.
    pub(crate) pair: bool,
    /// Panels that share their columns.
    pub(crate) share: usize,
    /// Columns of a scale group, in blocks of 32.
    pub(crate) group: usize,
    /// Most octets and pieces of a panel.
    pub(crate) octets: usize,
    pub(crate) pieces: usize,
    /// Where the values begin.
    pub(crate) values_at: usize,
    /// Bytes that are read of all panels.
    pub(crate) bytes: u64,
}

/// Whether rows share columns in the way of this module: in whole eights.
pub(crate) fn fits(pattern: &Pattern) -> bool {
    matches!(pattern, Pattern::Mask { height, .. } | Pattern::Blocks { height, .. } if height.is_multiple_of(8))
}

/// Blocks of quantized activations that share a scale, at most.
const UNIT: usize = 4;

/// Octets of `n` kept columns of a group, and their pieces.
#[inline(always)]
pub(crate) fn cut(n: usize) -> (usize, usize) {
    (n.div_ceil(8), n.div_ceil(BLOCK))
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

/// How many columns of each group every half keeps, as long as the longest.
fn lengths(halves: &[Vec<u32>], groups: usize, run: usize) -> Vec<usize> {
    let mut out = vec![0; groups];
    for half in halves {
        let mut mine = vec![0; groups];
        half.iter().for_each(|&c| mine[c as usize / run] += 1);
        out.iter_mut().zip(mine).for_each(|(o, m)| *o = m.max(*o));
    }
    out
}

/// What both kinds need: the layout so far, by a scale entry's bytes and an octet's.
fn layout(piece: &Piece, group: usize, scales: impl Fn(usize) -> usize, octet: usize) -> (Layout, usize) {
    let (rows, blocks) = (piece.rows, piece.cols.div_ceil(BLOCK));
    let shared = match piece.pattern {
        Pattern::Mask { height, .. } | Pattern::Blocks { height, .. } => height,
        _ => unreachable!("checked by `fits`"),
    };
    let pair = !shared.is_multiple_of(ROWS);
    let (mut octets, mut pieces, mut all) = (0, 0, 0);
    for first in (0..rows).step_by(ROWS) {
        let lengths = lengths(&columns(piece, pair, first), blocks.div_ceil(group), group * BLOCK);
        let sum = lengths.iter().map(|&n| cut(n)).fold((0, 0), |a, c| (a.0 + c.0, a.1 + c.1));
        (octets, pieces, all) = (octets.max(sum.0), pieces.max(sum.1), all + sum.0 * octet + scales(sum.1));
    }
    let masks = (if pair { 2 } else { 1 } * blocks * 4).next_multiple_of(64);
    let bytes = (all + rows.div_ceil(ROWS) * masks) as u64;
    (Layout { pair, share: (shared / ROWS).max(1), group, octets, pieces, values_at: 0, bytes }, masks)
}

/// Writes the masks and gives the slot of every kept column of every half, and the piece of every slot's octet.
fn masks(panel: &mut [u8], halves: &[Vec<u32>], layout: &Layout, blocks: usize) -> Vec<Vec<(usize, usize)>> {
    let run = layout.group * BLOCK;
    let groups = blocks.div_ceil(layout.group);
    let lengths = lengths(halves, groups, run);
    let mut starts = vec![(0, 0); groups + 1];
    for g in 0..groups {
        let (octets, pieces) = cut(lengths[g]);
        starts[g + 1] = (starts[g].0 + octets * 8, starts[g].1 + pieces);
    }
    let mut out = Vec::new();
    for (h, half) in halves.iter().enumerate() {
        let (mut taken, mut slots) = (vec![0; groups], Vec::new());
        for &c in half {
            let c = c as usize;
            panel[h * blocks * 4 + c / 8] |= 1 << (c % 8);
            let g = c / run;
            slots.push((starts[g].0 + taken[g], starts[g].1 + taken[g] / BLOCK));
            taken[g] += 1;
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
pub(crate) fn floats(piece: &Piece) -> (Panels, Layout, bool) {
    let f16 = matches!(piece.values, Values::Float(Float::F16, _));
    let width = if f16 { 2 } else { 4 };
    let blocks = piece.cols.div_ceil(BLOCK);
    let (mut layout, masks_end) = layout(piece, blocks.max(1), |_| 0, 8 * ROWS * width);
    layout.values_at = masks_end;
    let stride = masks_end + layout.octets.next_multiple_of(4) * 8 * ROWS * width;
    let panels = Panels::build(piece.rows, piece.cols, stride, |first, n, panel| {
        let slots = masks(panel, &columns(piece, layout.pair, first), &layout, blocks);
        for i in 0..n {
            let (lane, half) = place(layout.pair, i);
            let mut slots = slots[half].iter();
            piece.for_row(first + i, |_, v| {
                let (slot, _) = slots.next().expect("a slot for every kept column");
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
pub(crate) fn ints(piece: &Piece, source: &Source, wide: usize) -> (Panels, Grid, Layout) {
    let blocks = piece.cols.div_ceil(BLOCK);
    let group = (source.run / BLOCK).clamp(1, blocks.max(1));
    // Columns that share a scale of the weights share one of x, too, but not too many.
    let unit = if group >= blocks { UNIT } else { (1..=UNIT).rev().find(|u| group.is_multiple_of(*u)).unwrap_or(1) };
    let entry = source.kind.entry();
    let (mut layout, masks_end) = layout(piece, unit, |pieces| pieces * entry, 16 * wide);
    let (mut grid, scales_end) = grid(source, layout.pieces, 1, masks_end);
    layout.values_at = scales_end.next_multiple_of(64);
    grid.scales_at = masks_end;
    let stride = layout.values_at + layout.octets * 16 * wide;
    let panels = Panels::build(piece.rows, piece.cols, stride, |first, n, panel| {
        let halves = columns(piece, layout.pair, first);
        let slots = masks(panel, &halves, &layout, blocks);
        let mut line = Line::default();
        for i in 0..n {
            (source.read)(first + i, &mut line);
            let (lane, half) = place(layout.pair, i);
            for ((&c, &code), &(slot, piece)) in halves[half].iter().zip(&line.codes).zip(&slots[half]) {
                let octet = &mut panel[layout.values_at + slot / 8 * 16 * wide..];
                put_code(octet, wide, lane, slot % 8, code);
                put_scale(panel, &grid, lane, piece, &line, c as usize / (group * BLOCK));
            }
        }
    });
    (panels, grid, layout)
}

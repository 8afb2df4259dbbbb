//! Panels whose rows share their columns: only those are kept, and x is gathered to them once for a panel.
//!
//! Where 16 rows share, a panel is as ever. Where 8 do, a panel has two halves with columns of their own: even lanes are the rows of the first,
//! odd lanes those of the second, and x comes in pairs.
//!
//! The kept columns of a run lie together, and are filled up to whole octets; in a pair, both halves are as long as the longer. A run is a block
//! of 32 columns for codes, which have one scale of the weights and one of quantized activations there, and the whole row for floats.

use lacuna_format::{Float, Pattern, Piece, Values};

use super::ints::{Grid, grid, put_code, put_scale};
use super::source::{Line, Source};
use super::{BLOCK, Panels, ROWS};

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

/// The layout, by the blocks of a run and of a scale group and the bytes of a panel's scales and of an octet, as far as scales do not move it; and
/// where the masks end.
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
pub(crate) fn ints(piece: &Piece, source: &Source, wide: usize, read: &dyn Fn()) -> (Panels, Grid, Layout) {
    let blocks = piece.cols.div_ceil(BLOCK);
    let per = (source.run / BLOCK).clamp(1, blocks.max(1));
    let groups = blocks.div_ceil(per);
    let (_, scale_bytes) = grid(source, groups, 1, 0);
    let (mut layout, masks_end) = layout(piece, 1, per, scale_bytes, 16 * wide);
    let (grid, scales_end) = grid(source, groups, 1, masks_end);
    layout.values_at = scales_end.next_multiple_of(64);
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

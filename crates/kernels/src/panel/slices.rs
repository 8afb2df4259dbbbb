//! Panels of what little there is: 16 rows side by side, each a list of columns and values, as long as the longest of
//! them. Rows of like length share a panel: the few rows of a matrix that have most of its outliers would otherwise
//! have fifteen others filled up to their length. Lists that join another term's pass are sorted within windows of that
//! pass's panels, so that a range of those is a range of panels here, of the same rows.
//!
//! A panel: the length of its lists (u32, in 64 bytes), the 16 rows it is of (u32), then for every place in a list 16
//! columns (u16 where all fit, else u32) and 16 values. Lists are filled up with zeros at the column after the last,
//! where x has a zero, so that nothing but the entries themselves takes part.

use std::sync::Arc;

use lacuna_format::{Float, Piece, Values};

use super::{BLOCK, ROWS};
use crate::memory::Memory;
use crate::parallel;

/// Where a panel's rows stand, and its lists.
pub(crate) const NAMES: usize = 64;
pub(crate) const HEAD: usize = NAMES + 4 * ROWS;
/// In place of a row that is none.
pub(crate) const NONE: u32 = u32::MAX;

/// Panels of lists, one after the other, shortest first: the tasks that threads take last have fewest panels.
#[derive(Clone)]
pub(crate) struct Lists {
    memory: Arc<Memory>,
    /// Where each panel begins, and where the last one ends.
    starts: Arc<[usize]>,
    /// Blocks of 32 columns.
    pub(crate) blocks: usize,
    /// Whether columns are u32.
    pub(crate) wide: bool,
    /// Whether panels `from..to` that are whole windows are those of rows `16 * from..16 * to`.
    pub(crate) windowed: bool,
}

impl Lists {
    /// How many panels there are.
    pub(crate) fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// Where panel `p` begins.
    #[inline(always)]
    pub(crate) fn at(&self, p: usize) -> *const u8 {
        // SAFETY: inside the memory.
        unsafe { self.memory.ptr().add(self.starts[p]) }
    }

    /// Bytes that are read.
    pub(crate) fn bytes(&self) -> u64 {
        self.memory.len() as u64
    }
}

/// Panels of a float piece of any pattern, in f16 where that is exactly what is stored, else in f32; gives whether it
/// is f16. `window`: panels of a window, where rows are not sorted beyond.
pub(crate) fn lists(piece: &Piece, window: Option<usize>, read: &dyn Fn()) -> (Lists, bool) {
    let half = matches!(piece.values, Values::Float(Float::F16, _));
    let (rows, cols) = (piece.rows, piece.cols);
    let wide = cols.next_multiple_of(BLOCK) > usize::from(u16::MAX);
    let widths = (if wide { 4 } else { 2 }, if half { 2 } else { 4 });
    let entry = ROWS * (widths.0 + widths.1);
    let length = |r: u32| piece.pattern.span(r as usize, cols).len();
    let mut order: Vec<u32> = (0..rows as u32).collect();
    let sorted = window.map_or(rows, |panels| panels * ROWS).max(1);
    order.chunks_mut(sorted).for_each(|rows| rows.sort_by_cached_key(|&r| length(r)));
    let lengths: Vec<usize> = order.chunks(ROWS).map(|of| length(of[of.len() - 1])).collect();
    let mut starts = vec![0];
    for n in &lengths {
        starts.push(starts[starts.len() - 1] + HEAD + n * entry);
    }
    let mut memory = Memory::zeroed(starts[lengths.len()]);
    let mut panels = Vec::with_capacity(lengths.len());
    let mut rest = memory.bytes_mut();
    for (of, n) in order.chunks(ROWS).zip(&lengths) {
        let (panel, more) = rest.split_at_mut(HEAD + n * entry);
        panels.push(std::sync::Mutex::new((of, panel)));
        rest = more;
    }
    parallel::ranges(panels.len(), 1, usize::MAX, ROWS * cols, |from, to| {
        for panel in &panels[from..to] {
            let (of, panel) = &mut *panel.lock().unwrap_or_else(|e| e.into_inner());
            fill(piece, of, widths, panel);
        }
    });
    drop(panels);
    read();
    let (memory, starts, blocks) = (Arc::new(memory), starts.into(), cols.div_ceil(BLOCK));
    (Lists { memory, starts, blocks, wide, windowed: window.is_some() }, half)
}

/// The panel of these rows, with room for the longest; bytes of a column and of a value.
fn fill(piece: &Piece, rows: &[u32], (column, width): (usize, usize), panel: &mut [u8]) {
    let entry = ROWS * (column + width);
    let (head, places) = panel.split_at_mut(HEAD);
    head[..4].copy_from_slice(&((places.len() / entry) as u32).to_le_bytes());
    let names = rows.iter().copied().chain(std::iter::repeat(NONE));
    for (name, row) in head[NAMES..].chunks_exact_mut(4).zip(names) {
        name.copy_from_slice(&row.to_le_bytes());
    }
    let none = (piece.cols.div_ceil(BLOCK) * BLOCK) as u32;
    for place in places.chunks_exact_mut(entry) {
        place[..column * ROWS].chunks_exact_mut(column).for_each(|c| c.copy_from_slice(&none.to_le_bytes()[..column]));
    }
    for (lane, &row) in rows.iter().enumerate() {
        let mut place = places.chunks_exact_mut(entry);
        piece.for_row(row as usize, |c, v| {
            let place = place.next().expect("a place for every entry");
            place[column * lane..][..column].copy_from_slice(&(c as u32).to_le_bytes()[..column]);
            let value = &mut place[column * ROWS + width * lane..][..width];
            if width == 2 {
                value.copy_from_slice(&half::f16::from_f32(v).to_le_bytes());
            } else {
                value.copy_from_slice(&v.to_le_bytes());
            }
        });
    }
}

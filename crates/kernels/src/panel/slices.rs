//! Panels of what little there is: 16 rows side by side, each a list of columns and values, as long as the longest of them.
//!
//! A panel: the length of its lists (u32, in 64 bytes), then for every place in a list 16 columns (u32) and 16 values. Lists are filled up with
//! zeros at the column after the last, where x has a zero, so that nothing but the entries themselves takes part.

use lacuna_format::{Float, Piece, Values};

use super::{BLOCK, Panels, ROWS};

/// Bytes before the lists.
pub(crate) const HEAD: usize = 64;

/// Panels of a float piece of any pattern, in f16 where that is exactly what is stored, else in f32; whether it is f16; and the bytes that are read.
pub(crate) fn slices(piece: &Piece, read: &dyn Fn()) -> (Panels, bool, u64) {
    let half = matches!(piece.values, Values::Float(Float::F16, _));
    let entry = ROWS * (4 + if half { 2 } else { 4 });
    let (rows, cols) = (piece.rows, piece.cols);
    let longest = |first: usize| {
        let lengths = (first..rows.min(first + ROWS)).map(|r| piece.pattern.span(r, cols).len());
        lengths.max().unwrap_or(0)
    };
    let lengths: Vec<usize> = (0..rows).step_by(ROWS).map(longest).collect();
    let bytes = lengths.iter().map(|n| (HEAD + n * entry) as u64).sum();
    let stride = HEAD + lengths.iter().max().unwrap_or(&0) * entry;
    let panels = Panels::build(rows, cols, stride, read, |first, n, panel| {
        let length = lengths[first / ROWS];
        panel[..4].copy_from_slice(&(length as u32).to_le_bytes());
        let none = (cols.div_ceil(BLOCK) * BLOCK) as u32;
        for place in panel[HEAD..][..length * entry].chunks_exact_mut(entry) {
            place[..4 * ROWS].chunks_exact_mut(4).for_each(|c| c.copy_from_slice(&none.to_le_bytes()));
        }
        for lane in 0..n {
            let mut place = panel[HEAD..].chunks_exact_mut(entry);
            piece.for_row(first + lane, |c, v| {
                let place = place.next().expect("a place for every entry");
                place[4 * lane..][..4].copy_from_slice(&(c as u32).to_le_bytes());
                let values = &mut place[4 * ROWS..];
                if half {
                    values[2 * lane..][..2].copy_from_slice(&half::f16::from_f32(v).to_le_bytes());
                } else {
                    values[4 * lane..][..4].copy_from_slice(&v.to_le_bytes());
                }
            });
        }
    });
    (panels, half, bytes)
}

//! Panels of codes whose rows have tables of their own.
//!
//! A vector of codes picks from one table, so its lanes are columns of one row, and a row's sum is a sum across lanes
//! in the end. A panel: the 16 rows' tables, `2^bits` entries each (f16 where they are stored so), then four rows at a
//! time their codes, 128 columns of each a block, in the planes of [`super::ints`]: what is an octet of columns there
//! is a row here, and the places in an octet are the row's runs of 16 columns.

use lacuna_format::bits::unpack;
use lacuna_format::{Float, Piece, Values};

use super::ints::put_code;
use super::{Panels, ROWS};

/// Rows that are multiplied side by side.
pub(crate) const SIDE: usize = 4;
/// Columns of a block.
pub(crate) const STEP: usize = 128;

/// The panels.
#[derive(Clone)]
pub(crate) struct RowTables {
    pub(crate) panels: Panels,
    /// Whether tables are f16.
    pub(crate) half: bool,
}

impl RowTables {
    /// Blocks of 128 columns.
    pub(crate) fn steps(&self) -> usize {
        self.panels.blocks.div_ceil(STEP / super::BLOCK)
    }
}

/// Bytes of a panel's tables.
pub(crate) const fn head(bits: usize, half: bool) -> usize {
    (ROWS << bits) * if half { 2 } else { 4 }
}

/// Panels of a dense piece of codes whose rows have tables.
pub(crate) fn pack(piece: &Piece, read: &dyn Fn()) -> RowTables {
    let Values::Codebook { bits, codes, tables, .. } = &piece.values else { unreachable!("codes into tables") };
    let (cols, wide) = (piece.cols, usize::from(*bits));
    let (steps, half) = (cols.div_ceil(STEP), tables.float == Float::F16);
    let (head, block, table) = (head(wide, half), 64 * wide, tables.float.bytes() << bits);
    let panels = Panels::build(piece.rows, cols, head + ROWS / SIDE * steps * block, read, |first, n, panel| {
        // The rows' tables are one after the other in the piece, too.
        panel[..n * table].copy_from_slice(&tables.bytes[first * table..(first + n) * table]);
        let mut line = vec![0; cols];
        for i in 0..n {
            unpack(codes, *bits, (first + i) * cols, &mut line);
            for (step, run) in line.chunks(STEP).enumerate() {
                let block = &mut panel[head + (i / SIDE * steps + step) * block..][..block];
                for (c, &code) in run.iter().enumerate() {
                    put_code(block, wide, c % 16, i % SIDE * 8 + c / 16, code);
                }
            }
        }
    });
    RowTables { panels, half }
}

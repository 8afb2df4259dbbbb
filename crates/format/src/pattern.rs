//! Patterns: where values are.

use bytes::Bytes;

/// Which entries of a `[rows, cols]` matrix are stored; the others are exactly zero.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// Every entry.
    Dense,
    /// `n` of every `m` consecutive columns of a row (`cols` divides by `m`). Positions within their run, `ceil(log2 m)` bits each,
    /// rising; one stream, least significant bit first, without padding between rows.
    Nm {
        /// Kept of each run.
        n: u8,
        /// Length of a run, 2 to 32.
        m: u8,
        /// Packed positions.
        index: Bytes,
    },
    /// A bit for every column, shared by `height` consecutive rows (1: a mask for each row; the last group may have fewer rows).
    Mask {
        /// Rows that share a mask: 1, 8, 16 or 32 are usual.
        height: usize,
        /// `[ceil(rows / height), ceil(cols / 8)]`; bit `i` of byte `j` is column `8j + i`.
        bits: Bytes,
        /// u32 little-endian, `[ceil(rows / height) + 1]`: kept columns of all mask rows before this one. Every row under mask row `g` has
        /// `k = starts[g+1] - starts[g]` values, and row `r` begins at value `height * starts[g] + (r - g * height) * k`.
        starts: Bytes,
    },
    /// Compressed rows.
    Csr {
        /// u32 little-endian, `[rows + 1]`: values before each row.
        starts: Bytes,
        /// Columns, rising within a row: u16 little-endian where `cols <= 65536`, else u32.
        columns: Bytes,
    },
    /// Dense blocks of `height x width`, compressed by block rows. `rows` divides by `height` and `cols` by `width`. Values lie row by row
    /// like everywhere: row `r` holds `width` values of each block of its block row, left to right.
    Blocks {
        /// Rows of a block.
        height: usize,
        /// Columns of a block.
        width: usize,
        /// u32 little-endian, `[ceil(rows / height) + 1]`: blocks before each block row.
        starts: Bytes,
        /// Block columns, rising within a block row, u16 or u32 as in `Csr`, counted in blocks.
        columns: Bytes,
    },
}

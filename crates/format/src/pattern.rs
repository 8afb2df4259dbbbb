//! Patterns: where values are.

use std::ops::Range;

use bytes::Bytes;

/// Which entries of a `[rows, cols]` matrix are stored; the others are exactly zero.
#[derive(Clone, Debug, PartialEq)]
pub enum Pattern {
    /// Every entry.
    Dense,
    /// `n` of every `m` consecutive columns of a row (`cols` divides by `m`). Positions within their run,
    /// `ceil(log2 m)` bits each, rising; one stream, least significant bit first, without padding between rows.
    Nm {
        /// Kept of each run.
        n: u8,
        /// Length of a run, 2 to 32.
        m: u8,
        /// Packed positions.
        index: Bytes,
    },
    /// A bit for every column, shared by `height` consecutive rows (1: a mask for each row; the last group may have
    /// fewer rows).
    Mask {
        /// Rows that share a mask: 1, 8, 16 or 32 are usual.
        height: usize,
        /// `[ceil(rows / height), ceil(cols / 8)]`; bit `i` of byte `j` is column `8j + i`.
        bits: Bytes,
        /// u32 little-endian, `[ceil(rows / height) + 1]`: kept columns of all mask rows before this one. Every row
        /// under mask row `g` has `k = starts[g+1] - starts[g]` values, and row `r` begins at value
        /// `height * starts[g] + (r - g * height) * k`.
        starts: Bytes,
    },
    /// Compressed rows.
    Csr {
        /// u32 little-endian, `[rows + 1]`: values before each row.
        starts: Bytes,
        /// Columns, rising within a row: u16 little-endian where `cols <= 65536`, else u32.
        columns: Bytes,
    },
    /// Dense blocks of `height x width`, compressed by block rows. `rows` divides by `height` and `cols` by `width`.
    /// Values lie row by row like everywhere: row `r` holds `width` values of each block of its block row, left to
    /// right.
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

/// The `i`-th little-endian u32.
pub(crate) fn u32_at(bytes: &[u8], i: usize) -> usize {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]) as usize
}

/// Bytes of an index below `limit`: 2 where it fits, else 4.
pub(crate) fn index_width(limit: usize) -> usize {
    if limit <= 65536 { 2 } else { 4 }
}

/// The `i`-th index of `width` (2 or 4) bytes.
pub(crate) fn index_at(bytes: &[u8], width: usize, i: usize) -> usize {
    if width == 2 { usize::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])) } else { u32_at(bytes, i) }
}

impl Pattern {
    /// Bits of a position within a run of `m` columns.
    pub fn position_bits(m: usize) -> u8 {
        m.max(2).next_power_of_two().trailing_zeros() as u8
    }

    /// Where the values of row `r` of a `[rows, cols]` piece lie among all stored values.
    pub fn span(&self, r: usize, cols: usize) -> Range<usize> {
        let (start, len) = match self {
            Pattern::Dense => (r * cols, cols),
            Pattern::Nm { n, m, .. } => {
                let len = cols / usize::from(*m) * usize::from(*n);
                (r * len, len)
            }
            Pattern::Mask { height, starts, .. } => {
                let g = r / height;
                let k = u32_at(starts, g + 1) - u32_at(starts, g);
                (height * u32_at(starts, g) + r % height * k, k)
            }
            Pattern::Csr { starts, .. } => (u32_at(starts, r), u32_at(starts, r + 1) - u32_at(starts, r)),
            Pattern::Blocks { height, width, starts, .. } => {
                let first = u32_at(starts, r / height);
                let len = (u32_at(starts, r / height + 1) - first) * width;
                (first * height * width + r % height * len, len)
            }
        };
        start..start + len
    }

    /// The columns of row `r`'s stored values, rising, into `out` (overwritten).
    pub fn columns(&self, r: usize, cols: usize, out: &mut Vec<u32>) {
        out.clear();
        match self {
            Pattern::Dense => out.extend(0..cols as u32),
            Pattern::Nm { n, m, index } => {
                let (n, m, span) = (usize::from(*n), usize::from(*m), self.span(r, cols));
                out.resize(span.len(), 0);
                crate::bits::unpack_map(index, Pattern::position_bits(m), span.start, out, u32::from);
                for (run, positions) in out.chunks_exact_mut(n).enumerate() {
                    positions.iter_mut().for_each(|p| *p += (run * m) as u32);
                }
            }
            Pattern::Mask { height, bits, .. } => {
                let width = cols.div_ceil(8);
                let row = &bits[r / height * width..(r / height + 1) * width];
                for (i, bytes) in row.chunks(8).enumerate() {
                    let mut word = bytes.iter().rev().fold(0u64, |w, &b| w << 8 | u64::from(b));
                    while word != 0 {
                        out.push(i as u32 * 64 + word.trailing_zeros());
                        word &= word - 1;
                    }
                }
            }
            Pattern::Csr { starts, columns } => {
                let width = index_width(cols);
                out.extend((u32_at(starts, r)..u32_at(starts, r + 1)).map(|i| index_at(columns, width, i) as u32));
            }
            Pattern::Blocks { height, width, starts, columns } => {
                let bytes = index_width(cols / width);
                for i in u32_at(starts, r / height)..u32_at(starts, r / height + 1) {
                    let first = (index_at(columns, bytes, i) * width) as u32;
                    out.extend(first..first + *width as u32);
                }
            }
        }
    }
}

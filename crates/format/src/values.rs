//! Codecs: how values are written.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::GgufType;

/// Plain floating-point codecs, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Float {
    /// 32 bits.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits, 4 of exponent (FN form).
    F8E4m3,
    /// 8 bits, 5 of exponent.
    F8E5m2,
}

impl Float {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::Bf16 => 2,
            Float::F8E4m3 | Float::F8E5m2 => 1,
        }
    }
}

/// The values of a piece, in the order of its pattern: row by row, and within a row by rising column.
///
/// Packed codes of `bits` bits form one stream, least significant bit first, without padding between rows: the code of
/// the piece's `i`-th stored value starts at bit `i * bits`. A grouped codec's group is found from a value's *column in
/// the matrix* (so a sparse row and a dense one share the same scales), through [`Group`].
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// Floats as they are.
    Float(Float, Bytes),
    /// `value = scale[row, group] * (code - zero[row, group])`.
    ///
    /// Without `zeros` the code is read as `code - 2^(bits-1)`: symmetric, stored with that offset. SpQR is 3 bits in
    /// groups of 16, scales and [`Zeros::Real`] both in [`Scales::Int`] of 3 bits over runs of 16 of them.
    Int {
        /// 2 to 8.
        bits: u8,
        /// Codes, `bits` each.
        codes: Bytes,
        /// `[rows, groups]`.
        scales: Scales,
        /// Zero points, `[rows, groups]`.
        zeros: Option<Zeros>,
        /// Which columns share a scale.
        group: Group,
    },
    /// `value = scale[row, group] * table[code]`; without scales `value = table[code]`. The table is the one of the
    /// value's [`Owner`].
    Codebook {
        /// 1 to 8; a table has `2^bits` entries.
        bits: u8,
        /// Codes, `bits` each.
        codes: Bytes,
        /// `[owners, 2^bits]`.
        tables: Tables,
        /// `[rows, groups]` with the group they count in.
        scales: Option<(Scales, Group)>,
    },
    /// -1, 0 or 1 times `scale[row, group]`; five to a byte in base 3, first value least significant, digit = value +
    /// 1; one stream.
    Ternary {
        /// `ceil(n / 5)` bytes for `n` stored values.
        codes: Bytes,
        /// `[rows, groups]`.
        scales: Scales,
        /// Which columns share a scale.
        group: Group,
    },
    /// GGUF blocks, row after row; the dense pattern only.
    Gguf(GgufType, Bytes),
}

/// Zero points of integer codes, or what stands in their place, `[rows, groups]`.
#[derive(Clone, Debug, PartialEq)]
pub enum Zeros {
    /// Unsigned codes of as many bits as the values', one stream: every zero point is a code, whose value is exactly 0.
    Codes(Bytes),
    /// Any numbers, encoded as scales are: none of the codes need be worth 0.
    Real(Scales),
    /// No zero points but minima, encoded as scales are: `value = scale * code - minimum`.
    Minima(Scales),
}

impl From<Bytes> for Zeros {
    fn from(codes: Bytes) -> Zeros {
        Zeros::Codes(codes)
    }
}

impl From<Vec<u8>> for Zeros {
    fn from(codes: Vec<u8>) -> Zeros {
        Zeros::Codes(codes.into())
    }
}

/// What has a table of a codebook to itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Owner {
    /// The matrix: one table.
    #[default]
    Matrix,
    /// Every row: `[rows]` tables.
    Row,
    /// Every run of so many columns of a row, the last may be shorter: `[rows, ceil(cols / n)]` tables.
    Group(usize),
}

impl Owner {
    /// Tables that a row of `cols` columns chooses from.
    pub fn in_row(self, cols: usize) -> usize {
        match self {
            Owner::Matrix | Owner::Row => 1,
            Owner::Group(n) => cols.div_ceil(n.max(1)),
        }
    }

    /// Tables of a `[rows, cols]` matrix; `None` beyond the range of `usize`.
    pub fn count(self, rows: usize, cols: usize) -> Option<usize> {
        match self {
            Owner::Matrix => Some(1),
            Owner::Row | Owner::Group(_) => rows.checked_mul(self.in_row(cols)),
        }
    }

    /// The table of the value at row `r`, column `c`.
    pub fn of(self, r: usize, c: usize, cols: usize) -> usize {
        match self {
            Owner::Matrix => 0,
            Owner::Row => r,
            Owner::Group(n) => r * self.in_row(cols) + c / n.max(1),
        }
    }
}

/// The tables of a codebook.
#[derive(Clone, Debug, PartialEq)]
pub struct Tables {
    /// Whose they are.
    pub owner: Owner,
    /// How an entry is written: f32 or f16.
    pub float: Float,
    /// Entries, `[owners, 2^bits]`, owners row by row and within a row by rising column.
    pub bytes: Bytes,
}

impl Tables {
    /// One table of f32 for the whole matrix, `[2^bits]`.
    pub fn one(entries: &[f32]) -> Tables {
        let bytes = entries.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>().into();
        Tables { owner: Owner::Matrix, float: Float::F32, bytes }
    }

    /// The tables that row `r` chooses from, `[in_row, 2^bits]`, into `out` (overwritten). They must have passed a
    /// check.
    pub fn row(&self, r: usize, cols: usize, bits: u8, out: &mut Vec<f32>) {
        let n = self.owner.in_row(cols) << bits;
        let first = if self.owner == Owner::Matrix { 0 } else { r * n };
        out.resize(n, 0.0);
        self.float.decode(&self.bytes[first * self.float.bytes()..(first + n) * self.float.bytes()], out);
    }

    /// Bytes of the tables of a `[rows, cols]` matrix with codes of `bits` bits, in f32 or f16; `None` beyond the range
    /// of `usize`.
    pub fn exact_bytes(owner: Owner, float: Float, bits: u8, (rows, cols): (usize, usize)) -> Option<usize> {
        owner.count(rows, cols)?.checked_mul(float.bytes())?.checked_mul(1 << bits)
    }
}

/// Which columns share a scale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// Runs of `n` columns; the last may be shorter. `n` = columns of the matrix: one scale a row.
    Run(usize),
    /// The group of each column, u16 little-endian, `[cols]`, with the number of groups (GPTQ's activation order).
    Index {
        /// Number of groups.
        groups: usize,
        /// Group of each column.
        of: Bytes,
    },
}

impl Group {
    /// Number of groups over `cols` columns.
    pub fn count(&self, cols: usize) -> usize {
        match self {
            Group::Run(n) => cols.div_ceil((*n).max(1)),
            Group::Index { groups, .. } => *groups,
        }
    }

    /// The group of column `c`.
    pub fn of(&self, c: usize) -> usize {
        match self {
            Group::Run(n) => c / (*n).max(1),
            Group::Index { of, .. } => usize::from(u16::from_le_bytes([of[2 * c], of[2 * c + 1]])),
        }
    }
}

/// An encoded array of scales, `[rows, groups]`, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// Floats.
    Float(Float, Bytes),
    /// Integers with scales of their own: `scale = super_scale * code + super_min` over runs of `per` scales of a row.
    Int {
        /// 2 to 8.
        bits: u8,
        /// Scales that share a super-scale.
        per: usize,
        /// Codes, `[rows, groups]`, one stream.
        codes: Bytes,
        /// f16, `[rows, ceil(groups / per)]`.
        super_scales: Bytes,
        /// f16, same shape; absent: 0.
        super_mins: Option<Bytes>,
    },
}

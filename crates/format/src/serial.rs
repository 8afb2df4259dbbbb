//! A stored matrix as a small description and named buffers, and back.
//!
//! Suffixes follow from the description alone. A piece's buffers are `values` (floats), `blocks` (GGUF), `codes`,
//! `table`, `scales`, `scale_codes`, `super_scales`, `super_mins`, `zeros` (`zero_` before the names of scales where
//! they are encoded so), `group_index`, and of its pattern `positions`, `mask`, `starts`, `columns`. A product puts
//! `left.` and `right.` before them, signs times a product `signs` before these; the second, third... term `t1.`, `t2.`... The maps of the input put `in0.`,
//! `in1.`... before `index`, `diagonal`, `signs` or `matrix`, those of the output `out0.`...

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::pattern::index_width;
use crate::{
    Float, FormatError, GgufType, Group, MOST_MAPS, Map, Owner, Pattern, PatternKind, Piece, Scales, Signed, Stored,
    Tables, Term, Values, Zeros,
};

/// Element types of buffers, those of safetensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Elem {
    F32,
    F16,
    BF16,
    F8_E4M3,
    F8_E5M2,
    U8,
    U16,
    U32,
}

impl Elem {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Elem::F32 | Elem::U32 => 4,
            Elem::F16 | Elem::BF16 | Elem::U16 => 2,
            Elem::F8_E4M3 | Elem::F8_E5M2 | Elem::U8 => 1,
        }
    }
}

impl From<Float> for Elem {
    fn from(f: Float) -> Elem {
        match f {
            Float::F32 => Elem::F32,
            Float::F16 => Elem::F16,
            Float::Bf16 => Elem::BF16,
            Float::F8E4m3 => Elem::F8_E4M3,
            Float::F8E5m2 => Elem::F8_E5M2,
        }
    }
}

/// One buffer: a tensor named `<place>.<suffix>`.
#[derive(Clone, Debug, PartialEq)]
pub struct Buffer {
    /// Its name behind the place's.
    pub suffix: String,
    /// Element type.
    pub elem: Elem,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub bytes: Bytes,
}

/// What a stored matrix is made of, without its buffers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Descriptor {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// The summands.
    pub terms: Vec<TermDesc>,
    /// Maps of the input; left out where there are none, as version 1 has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub input: Vec<MapDesc>,
    /// Maps of the output, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output: Vec<MapDesc>,
}

/// A map without its buffers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs)]
pub enum MapDesc {
    Permutation,
    Diagonal(Float),
    Hadamard { size: usize, signs: bool },
    Dense { size: usize, float: Float },
}

impl Descriptor {
    /// The first version of the packed format that has all of this: 2 for a codebook's tables that are not one of f32,
    /// for zero points that are no codes, and for maps; 4 for minima beside codes; 5 for signs times a product;
    /// 7 for blocks of indices into a grid.
    pub fn version(&self) -> u32 {
        let of = |p: &PieceDesc| match &p.values {
            ValuesDesc::Gguf(kind) if !kind.is_written() => 7,
            ValuesDesc::Int { minima: Some(_), .. } => 4,
            ValuesDesc::Codebook { tables, .. } if !tables.is_first() => 2,
            ValuesDesc::Int { real_zeros: Some(_), .. } => 2,
            _ => 1,
        };
        let terms = self.terms.iter().map(|t| match t {
            TermDesc::Piece(p) => of(p),
            TermDesc::Product { left, right, .. } => of(left).max(of(right)),
            TermDesc::Signed { .. } => 5,
        });
        let maps = if self.input.is_empty() && self.output.is_empty() { 1 } else { 2 };
        terms.max().unwrap_or(1).max(maps)
    }
}

/// A term without its buffers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum TermDesc {
    /// A piece as large as the matrix.
    Piece(PieceDesc),
    /// A product over `rank`.
    Product {
        /// Columns of the left factor, rows of the right.
        rank: usize,
        /// `[rows, rank]`.
        left: PieceDesc,
        /// `[rank, cols]`.
        right: PieceDesc,
    },
    /// Signs times such a product.
    Signed {
        /// Columns of the left factor, rows of the right.
        rank: usize,
        /// `[rows, rank]`.
        left: PieceDesc,
        /// `[rank, cols]`.
        right: PieceDesc,
    },
}

/// A piece without its buffers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PieceDesc {
    /// Where values are.
    pub pattern: PatternKind,
    /// How they are written.
    pub values: ValuesDesc,
}

/// A codec without its buffers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs)]
pub enum ValuesDesc {
    Float(Float),
    Int {
        bits: u8,
        /// Whether zero points are codes.
        zeros: bool,
        scales: ScalesDesc,
        group: GroupDesc,
        /// How they are encoded where they are any numbers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        real_zeros: Option<ScalesDesc>,
        /// How minima are encoded, where those stand in the place of zero points.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        minima: Option<ScalesDesc>,
    },
    Codebook {
        bits: u8,
        scales: Option<(ScalesDesc, GroupDesc)>,
        /// Left out where it is one table of f32: what version 1 has.
        #[serde(default, skip_serializing_if = "TablesDesc::is_first")]
        tables: TablesDesc,
    },
    Ternary {
        scales: ScalesDesc,
        group: GroupDesc,
    },
    Gguf(GgufType),
}

/// Tables of a codebook without their entries.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TablesDesc {
    /// Whose they are.
    pub owner: Owner,
    /// How an entry is written.
    pub float: Float,
}

impl Default for TablesDesc {
    /// One table of f32.
    fn default() -> TablesDesc {
        TablesDesc { owner: Owner::Matrix, float: Float::F32 }
    }
}

impl TablesDesc {
    fn is_first(&self) -> bool {
        *self == TablesDesc::default()
    }
}

/// Encoded scales without their buffers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs)]
pub enum ScalesDesc {
    Float(Float),
    Int { bits: u8, per: usize, mins: bool },
}

/// A group: a run of columns, or the number of groups of an explicit index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[allow(missing_docs)]
pub enum GroupDesc {
    Run(usize),
    Index(usize),
}

fn prefix(term: usize) -> String {
    if term == 0 { String::new() } else { format!("t{term}.") }
}

impl Stored {
    /// The description and every buffer. The matrix must pass [`Stored::check`].
    pub fn to_parts(&self) -> (Descriptor, Vec<Buffer>) {
        let mut parts = Vec::new();
        let terms = self.terms.iter().enumerate().map(|(i, term)| match term {
            Term::Piece(p) => TermDesc::Piece(write_piece(p, &prefix(i), &mut parts)),
            Term::Product(l, r) => TermDesc::Product {
                rank: l.cols,
                left: write_piece(l, &format!("{}left.", prefix(i)), &mut parts),
                right: write_piece(r, &format!("{}right.", prefix(i)), &mut parts),
            },
            Term::Signed(s) => {
                let (suffix, shape) = (format!("{}signs", prefix(i)), vec![s.left.rows, s.right.cols.div_ceil(8)]);
                parts.push(Buffer { suffix, elem: Elem::U8, shape, bytes: s.signs.clone() });
                TermDesc::Signed {
                    rank: s.rank(),
                    left: write_piece(&s.left, &format!("{}left.", prefix(i)), &mut parts),
                    right: write_piece(&s.right, &format!("{}right.", prefix(i)), &mut parts),
                }
            }
        });
        let terms = terms.collect();
        let input = write_maps(&self.input, "in", self.cols, &mut parts);
        let output = write_maps(&self.output, "out", self.rows, &mut parts);
        (Descriptor { rows: self.rows, cols: self.cols, terms, input, output }, parts)
    }

    /// Puts a matrix together; `get` gives the element type, shape and bytes of the buffer of a suffix. Everything is
    /// checked.
    pub fn from_parts(
        desc: &Descriptor,
        mut get: impl FnMut(&str) -> Option<(Elem, Vec<usize>, Bytes)>,
    ) -> Result<Stored, FormatError> {
        let mut shapes = Vec::new();
        let mut take = |suffix: String, elem: Elem| {
            let (have, shape, bytes) =
                get(&suffix).ok_or_else(|| FormatError::new(format!("buffer '{suffix}' is missing")))?;
            if have != elem {
                return Err(FormatError::new(format!("buffer '{suffix}' holds {have:?}, expected {elem:?}")));
            }
            shapes.push((suffix, shape));
            Ok(bytes)
        };
        let (rows, cols) = (desc.rows, desc.cols);
        let mut terms = Vec::with_capacity(desc.terms.len());
        for (i, term) in desc.terms.iter().enumerate() {
            terms.push(match term {
                TermDesc::Piece(p) => Term::Piece(read_piece(p, (rows, cols), &prefix(i), &mut take)?),
                TermDesc::Product { rank, left, right } => Term::Product(
                    read_piece(left, (rows, *rank), &format!("{}left.", prefix(i)), &mut take)?,
                    read_piece(right, (*rank, cols), &format!("{}right.", prefix(i)), &mut take)?,
                ),
                TermDesc::Signed { rank, left, right } => Term::Signed(Signed {
                    signs: take(format!("{}signs", prefix(i)), Elem::U8)?,
                    left: read_piece(left, (rows, *rank), &format!("{}left.", prefix(i)), &mut take)?,
                    right: read_piece(right, (*rank, cols), &format!("{}right.", prefix(i)), &mut take)?,
                }),
            });
        }
        let input = read_maps(&desc.input, "in", &mut take)?;
        let output = read_maps(&desc.output, "out", &mut take)?;
        let stored = Stored { rows, cols, terms, input, output };
        stored.check()?;
        for ((suffix, shape), part) in shapes.into_iter().zip(stored.to_parts().1) {
            if shape != part.shape {
                let want = part.shape;
                return Err(FormatError::new(format!("buffer '{suffix}' has shape {shape:?}, expected {want:?}")));
            }
        }
        Ok(stored)
    }
}

fn write_maps(maps: &[Map], end: &str, n: usize, parts: &mut Vec<Buffer>) -> Vec<MapDesc> {
    let of = |(i, map): (usize, &Map)| {
        let mut put = |suffix: &str, elem: Elem, shape: Vec<usize>, bytes: &Bytes| {
            parts.push(Buffer { suffix: format!("{end}{i}.{suffix}"), elem, shape, bytes: bytes.clone() });
        };
        match map {
            Map::Permutation(index) => {
                put("index", Elem::U32, vec![n], index);
                MapDesc::Permutation
            }
            Map::Diagonal(float, bytes) => {
                put("diagonal", (*float).into(), vec![n], bytes);
                MapDesc::Diagonal(*float)
            }
            Map::Hadamard { size, signs } => {
                if let Some(s) = signs {
                    put("signs", Elem::U8, vec![s.len()], s);
                }
                MapDesc::Hadamard { size: *size, signs: signs.is_some() }
            }
            Map::Dense { size, float, values } => {
                put("matrix", (*float).into(), vec![*size, *size], values);
                MapDesc::Dense { size: *size, float: *float }
            }
        }
    };
    maps.iter().enumerate().map(of).collect()
}

fn read_maps(maps: &[MapDesc], end: &str, take: Take<'_>) -> Result<Vec<Map>, FormatError> {
    // Before anything is read: a description may name any number.
    if maps.len() > MOST_MAPS {
        return Err(FormatError::new(format!("{} maps at one end, at most {MOST_MAPS}", maps.len())));
    }
    let of = |(i, map): (usize, &MapDesc)| {
        let mut take = |suffix: &str, elem: Elem| take(format!("{end}{i}.{suffix}"), elem);
        Ok(match map {
            MapDesc::Permutation => Map::Permutation(take("index", Elem::U32)?),
            MapDesc::Diagonal(float) => Map::Diagonal(*float, take("diagonal", (*float).into())?),
            MapDesc::Hadamard { size, signs } => {
                Map::Hadamard { size: *size, signs: if *signs { Some(take("signs", Elem::U8)?) } else { None } }
            }
            MapDesc::Dense { size, float } => {
                Map::Dense { size: *size, float: *float, values: take("matrix", (*float).into())? }
            }
        })
    };
    maps.iter().enumerate().map(of).collect()
}

// Writing and reading name the buffers of a piece in one order: `from_parts` compares shapes by place.

fn write_piece(p: &Piece, prefix: &str, parts: &mut Vec<Buffer>) -> PieceDesc {
    let mut put = |suffix: &str, elem: Elem, shape: &[usize], bytes: &Bytes| {
        parts.push(Buffer { suffix: format!("{prefix}{suffix}"), elem, shape: shape.to_vec(), bytes: bytes.clone() });
    };
    let index = |limit: usize| if index_width(limit) == 2 { Elem::U16 } else { Elem::U32 };
    match &p.pattern {
        Pattern::Dense => {}
        Pattern::Nm { index, .. } => put("positions", Elem::U8, &[index.len()], index),
        Pattern::Mask { height, bits, starts } => {
            put("mask", Elem::U8, &[p.rows.div_ceil(*height), p.cols.div_ceil(8)], bits);
            put("starts", Elem::U32, &[starts.len() / 4], starts);
        }
        Pattern::Csr { starts, columns } => {
            put("starts", Elem::U32, &[starts.len() / 4], starts);
            put("columns", index(p.cols), &[columns.len() / index_width(p.cols)], columns);
        }
        Pattern::Blocks { width, starts, columns, .. } => {
            put("starts", Elem::U32, &[starts.len() / 4], starts);
            let limit = p.cols / width;
            put("columns", index(limit), &[columns.len() / index_width(limit)], columns);
        }
    }
    let values = match &p.values {
        Values::Float(float, bytes) => {
            let dense = [p.rows, p.cols];
            let shape = if p.pattern == Pattern::Dense { &dense[..] } else { &[bytes.len() / float.bytes()] };
            put("values", (*float).into(), shape, bytes);
            ValuesDesc::Float(*float)
        }
        Values::Int { bits, codes, scales, zeros, group } => {
            put("codes", Elem::U8, &[codes.len()], codes);
            let shape = (p.rows, group.count(p.cols));
            let (coded, real_zeros, minima) = match zeros {
                None => (false, None, None),
                Some(Zeros::Codes(z)) => {
                    put("zeros", Elem::U8, &[z.len()], z);
                    (true, None, None)
                }
                Some(Zeros::Real(z)) => (false, Some(write_encoded(z, "zero_", shape, &mut put)), None),
                Some(Zeros::Minima(z)) => (false, None, Some(write_encoded(z, "min_", shape, &mut put))),
            };
            let (scales, group) = write_scales(scales, group, p, &mut put);
            ValuesDesc::Int { bits: *bits, zeros: coded, scales, group, real_zeros, minima }
        }
        Values::Codebook { bits, codes, tables: Tables { owner, float, bytes }, scales } => {
            put("codes", Elem::U8, &[codes.len()], codes);
            let entries = 1 << bits;
            let shape = match owner {
                Owner::Matrix => vec![entries],
                Owner::Row => vec![p.rows, entries],
                Owner::Group(_) => vec![p.rows, owner.in_row(p.cols), entries],
            };
            put("table", (*float).into(), &shape, bytes);
            let scales = scales.as_ref().map(|(s, g)| write_scales(s, g, p, &mut put));
            ValuesDesc::Codebook { bits: *bits, scales, tables: TablesDesc { owner: *owner, float: *float } }
        }
        Values::Ternary { codes, scales, group } => {
            put("codes", Elem::U8, &[codes.len()], codes);
            let (scales, group) = write_scales(scales, group, p, &mut put);
            ValuesDesc::Ternary { scales, group }
        }
        Values::Gguf(kind, bytes) => {
            put("blocks", Elem::U8, &[p.rows, p.cols / kind.block() * kind.block_bytes()], bytes);
            ValuesDesc::Gguf(*kind)
        }
    };
    PieceDesc { pattern: p.pattern.kind(), values }
}

/// An encoded array, `[rows, groups]`, its buffers' names behind `prefix`.
fn write_encoded(
    scales: &Scales,
    prefix: &str,
    (rows, groups): (usize, usize),
    put: &mut impl FnMut(&str, Elem, &[usize], &Bytes),
) -> ScalesDesc {
    let mut put =
        |name: &str, elem: Elem, shape: &[usize], bytes: &Bytes| put(&format!("{prefix}{name}"), elem, shape, bytes);
    match scales {
        Scales::Float(float, bytes) => {
            put("scales", (*float).into(), &[rows, groups], bytes);
            ScalesDesc::Float(*float)
        }
        Scales::Int { bits, per, codes, super_scales, super_mins } => {
            let supers = [rows, groups.div_ceil(*per)];
            put("scale_codes", Elem::U8, &[codes.len()], codes);
            put("super_scales", Elem::F16, &supers, super_scales);
            if let Some(m) = super_mins {
                put("super_mins", Elem::F16, &supers, m);
            }
            ScalesDesc::Int { bits: *bits, per: *per, mins: super_mins.is_some() }
        }
    }
}

fn write_scales(
    scales: &Scales,
    group: &Group,
    p: &Piece,
    put: &mut impl FnMut(&str, Elem, &[usize], &Bytes),
) -> (ScalesDesc, GroupDesc) {
    let scales = write_encoded(scales, "", (p.rows, group.count(p.cols)), put);
    let group = match group {
        Group::Run(n) => GroupDesc::Run(*n),
        Group::Index { groups, of } => {
            put("group_index", Elem::U16, &[of.len() / 2], of);
            GroupDesc::Index(*groups)
        }
    };
    (scales, group)
}

type Take<'a> = &'a mut dyn FnMut(String, Elem) -> Result<Bytes, FormatError>;

fn read_piece(d: &PieceDesc, (rows, cols): (usize, usize), prefix: &str, take: Take<'_>) -> Result<Piece, FormatError> {
    let mut take = |suffix: &str, elem: Elem| take(format!("{prefix}{suffix}"), elem);
    let index = |limit: usize| if index_width(limit) == 2 { Elem::U16 } else { Elem::U32 };
    let pattern = match d.pattern {
        PatternKind::Dense => Pattern::Dense,
        PatternKind::Nm { n, m } => Pattern::Nm { n, m, index: take("positions", Elem::U8)? },
        PatternKind::Mask { height } => {
            Pattern::Mask { height, bits: take("mask", Elem::U8)?, starts: take("starts", Elem::U32)? }
        }
        PatternKind::Csr => Pattern::Csr { starts: take("starts", Elem::U32)?, columns: take("columns", index(cols))? },
        PatternKind::Blocks { height, width } => Pattern::Blocks {
            height,
            width,
            starts: take("starts", Elem::U32)?,
            columns: take("columns", index(cols / width.max(1)))?,
        },
    };
    let values = match &d.values {
        ValuesDesc::Float(float) => Values::Float(*float, take("values", (*float).into())?),
        ValuesDesc::Int { bits, zeros, scales, group, real_zeros, minima } => {
            let codes = take("codes", Elem::U8)?;
            let zeros = match (zeros, real_zeros, minima) {
                (false, None, None) => None,
                (true, None, None) => Some(Zeros::Codes(take("zeros", Elem::U8)?)),
                (false, Some(z), None) => Some(Zeros::Real(read_encoded(z, "zero_", &mut take)?)),
                (false, None, Some(m)) => Some(Zeros::Minima(read_encoded(m, "min_", &mut take)?)),
                _ => return Err(FormatError::new("zero points that are codes, any numbers or minima at once")),
            };
            let (scales, group) = read_scales(scales, group, &mut take)?;
            Values::Int { bits: *bits, codes, scales, zeros, group }
        }
        ValuesDesc::Codebook { bits, scales, tables: TablesDesc { owner, float } } => {
            let codes = take("codes", Elem::U8)?;
            let tables = Tables { owner: *owner, float: *float, bytes: take("table", (*float).into())? };
            let scales = scales.as_ref().map(|(s, g)| read_scales(s, g, &mut take)).transpose()?;
            Values::Codebook { bits: *bits, codes, tables, scales }
        }
        ValuesDesc::Ternary { scales, group } => {
            let codes = take("codes", Elem::U8)?;
            let (scales, group) = read_scales(scales, group, &mut take)?;
            Values::Ternary { codes, scales, group }
        }
        ValuesDesc::Gguf(kind) => Values::Gguf(*kind, take("blocks", Elem::U8)?),
    };
    Ok(Piece { rows, cols, pattern, values })
}

fn read_encoded(
    scales: &ScalesDesc,
    prefix: &str,
    take: &mut impl FnMut(&str, Elem) -> Result<Bytes, FormatError>,
) -> Result<Scales, FormatError> {
    let mut take = |name: &str, elem: Elem| take(&format!("{prefix}{name}"), elem);
    Ok(match scales {
        ScalesDesc::Float(float) => Scales::Float(*float, take("scales", (*float).into())?),
        ScalesDesc::Int { bits, per, mins } => Scales::Int {
            bits: *bits,
            per: *per,
            codes: take("scale_codes", Elem::U8)?,
            super_scales: take("super_scales", Elem::F16)?,
            super_mins: if *mins { Some(take("super_mins", Elem::F16)?) } else { None },
        },
    })
}

fn read_scales(
    scales: &ScalesDesc,
    group: &GroupDesc,
    take: &mut impl FnMut(&str, Elem) -> Result<Bytes, FormatError>,
) -> Result<(Scales, Group), FormatError> {
    let scales = read_encoded(scales, "", take)?;
    let group = match group {
        GroupDesc::Run(n) => Group::Run(*n),
        GroupDesc::Index(groups) => Group::Index { groups: *groups, of: take("group_index", Elem::U16)? },
    };
    Ok((scales, group))
}

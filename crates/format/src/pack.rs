//! From plain data to pieces, and what each pattern would cost.
//!
//! A mask says what stays. Positions that a pattern stores and the mask drops (padding of N:M runs, rows that share a
//! mask or a block) hold exact zeros. Only finite numbers are packed. A scale too large for its codec is an error; one
//! too small becomes 0, the nearest value there is, so that its group decodes to zeros (at f16: values below 2^-25
//! times the largest code).

use bytes::Bytes;
use half::{bf16, f16};
use lacuna_base::float::{f8_e4m3, f8_e5m2};
use lacuna_base::{Mat, MatRef};
use serde::{Deserialize, Serialize};

use crate::bits::{pack, pack_trits};
use crate::pack_scales::pack_scales;
use crate::pattern::index_width;
use crate::{Float, FormatError, Group, Integers, Mask, Owner, Pattern, Piece, Tables, Values, Zeros};

/// A pattern without its indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum PatternKind {
    /// Every entry.
    Dense,
    /// `n` of every `m` columns.
    Nm {
        /// Kept of each run.
        n: u8,
        /// Length of a run.
        m: u8,
    },
    /// A bit for every column, shared by `height` rows.
    Mask {
        /// Rows that share a mask.
        height: usize,
    },
    /// Compressed rows.
    Csr,
    /// Dense blocks.
    Blocks {
        /// Rows of a block.
        height: usize,
        /// Columns of a block.
        width: usize,
    },
}

/// How scales are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ScaleCodec {
    /// 32-bit floats.
    F32,
    /// IEEE half.
    F16,
    /// 8-bit floats with 4 bits of exponent.
    F8E4m3,
    /// 8-bit floats with 5 bits of exponent: powers of two from 2^-16 to 2^15 exactly.
    F8E5m2,
    /// Integers of `bits` bits over an f16 scale and minimum for every `per` scales of a row: those of least squares
    /// found from the smallest and the largest value on, each value at its nearest code.
    Int {
        /// 2 to 8.
        bits: u8,
        /// Scales that share a super-scale.
        per: usize,
    },
}

/// Codes into tables, before they are packed: `value[r, c] = scale[r, g] * tables[owner of (r, c), code]`.
#[derive(Clone, Debug)]
pub struct Codebook {
    /// 1 to 8.
    pub bits: u8,
    /// One code a byte, `[rows, cols]`, row-major. Entries that a mask drops are ignored.
    pub codes: Vec<u8>,
    /// What has a table to itself.
    pub owner: Owner,
    /// `[owners, 2^bits]`, the owners in the order of [`Owner::of`].
    pub tables: Mat,
    /// `[rows, groups]` with the group they count in.
    pub scales: Option<(Mat, Group)>,
}

/// Signs and zeros before they are packed: `value[r, c] = scale[r, g] * code[r, c]`.
#[derive(Clone, Debug)]
pub struct Ternary {
    /// -1, 0 or 1, `[rows, cols]`, row-major. Entries that a mask drops are ignored.
    pub codes: Vec<i8>,
    /// `[rows, groups]`.
    pub scales: Mat,
    /// Which columns share a scale.
    pub group: Group,
}

pub(crate) fn fail<T>(what: String) -> Result<T, FormatError> {
    Err(FormatError { what })
}

/// Packs floats, rounded to nearest. `mask`: what stays (all, where absent).
pub fn pack_float(w: MatRef<'_>, mask: Option<&Mask>, kind: PatternKind, float: Float) -> Result<Piece, FormatError> {
    let (rows, cols) = (w.rows(), w.cols());
    let pattern = Pattern::build(rows, cols, mask, kind)?;
    let mut out = FloatWriter::new(float);
    let (mut at, mut row) = (Vec::new(), Vec::new());
    for r in 0..rows {
        row.clear();
        if pattern == Pattern::Dense && mask.is_none() {
            row.extend_from_slice(w.row(r));
        } else {
            pattern.columns(r, cols, &mut at);
            row.extend(at.iter().map(|&c| if keeps(mask, r, c as usize) { w.row(r)[c as usize] } else { 0.0 }));
        }
        if let Err(i) = out.extend(&row) {
            let c = if at.is_empty() { i } else { at[i] as usize };
            return fail(format!("row {r}, column {c}: {} is beyond {}", row[i], float.name()));
        }
    }
    finish(rows, cols, pattern, Values::Float(float, out.bytes.into()))
}

/// Packs grouped integers. `mask`: what stays (all, where absent); what it drops gets the code of zero. Zero points that
/// are any numbers are written as the scales are.
pub fn pack_integers(
    q: &Integers,
    mask: Option<&Mask>,
    kind: PatternKind,
    scales: ScaleCodec,
) -> Result<Piece, FormatError> {
    if let Some(zeros) = &q.offsets {
        return pack_integers_off(q, zeros, mask, kind, scales, scales);
    }
    let (rows, cols, groups) = (q.rows, q.cols, q.group.count(q.cols));
    codes_fit(rows, cols, q.codes.len(), q.bits, 2)?;
    scales_fit(rows, groups, &q.scales)?;
    if let Some(z) = &q.zeros
        && (z.len() != rows * groups || z.iter().any(|&z| u32::from(z) >> q.bits != 0))
    {
        return fail(format!("{} zero points for {rows} x {groups} groups of {} bits", z.len(), q.bits));
    }
    let pattern = Pattern::build(rows, cols, mask, kind)?;
    let mut codes = Vec::new();
    walk(&pattern, rows, cols, mask, |r, c, kept| {
        let zero = || q.zeros.as_ref().map_or(1 << (q.bits - 1), |z| z[r * groups + q.group.of(c)]);
        let code = if kept { q.codes[r * cols + c] } else { zero() };
        codes.push(fitting(code, q.bits, r, c)?);
        Ok(())
    })?;
    let values = Values::Int {
        bits: q.bits,
        codes: pack(&codes, q.bits).into(),
        scales: pack_scales(&q.scales, scales)?,
        zeros: q.zeros.as_ref().map(|z| pack(z, q.bits).into()),
        group: q.group.clone(),
    };
    finish(rows, cols, pattern, values)
}

/// Packs grouped integers whose zero points are any numbers, `[rows, groups]`, written as `codec` says; `q` has none of
/// its own. Positions that a pattern stores and the mask drops are refused where no code is worth 0.
pub fn pack_integers_off(
    q: &Integers,
    zeros: &Mat,
    mask: Option<&Mask>,
    kind: PatternKind,
    scales: ScaleCodec,
    codec: ScaleCodec,
) -> Result<Piece, FormatError> {
    let (rows, cols, groups) = (q.rows, q.cols, q.group.count(q.cols));
    codes_fit(rows, cols, q.codes.len(), q.bits, 2)?;
    scales_fit(rows, groups, &q.scales)?;
    scales_fit(rows, groups, zeros)?;
    if q.zeros.is_some() {
        return fail("zero points that are codes and any numbers at once".into());
    }
    let zeros = Zeros::Real(pack_scales(zeros, codec)?);
    let pattern = Pattern::build(rows, cols, mask, kind)?;
    let (mut codes, mut row, mut read) = (Vec::new(), vec![0.0; groups], None);
    walk(&pattern, rows, cols, mask, |r, c, kept| {
        let code = if kept {
            q.codes[r * cols + c]
        } else {
            if read != Some(r) {
                zeros.row(r, q.bits, &mut row);
                read = Some(r);
            }
            let zero = row[q.group.of(c)];
            if zero.fract() != 0.0 || !(0.0..f32::from(1u16 << q.bits)).contains(&zero) {
                return fail(format!("row {r}, column {c} is dropped and its zero point {zero} is no code"));
            }
            zero as u8
        };
        codes.push(fitting(code, q.bits, r, c)?);
        Ok(())
    })?;
    let values = Values::Int {
        bits: q.bits,
        codes: pack(&codes, q.bits).into(),
        scales: pack_scales(&q.scales, scales)?,
        zeros: Some(zeros),
        group: q.group.clone(),
    };
    finish(rows, cols, pattern, values)
}

/// Packs codes into tables, `[rows, cols]`, whose entries are written in `float` (f32 or f16, rounded to nearest).
/// Where the pattern stores what the mask drops, that value's table needs an entry of 0.
pub fn pack_codebook(
    (rows, cols): (usize, usize),
    q: &Codebook,
    mask: Option<&Mask>,
    kind: PatternKind,
    float: Float,
    scales: ScaleCodec,
) -> Result<Piece, FormatError> {
    codes_fit(rows, cols, q.codes.len(), q.bits, 1)?;
    if q.owner == Owner::Group(0)
        || Some(q.tables.rows()) != q.owner.count(rows, cols)
        || q.tables.cols() != 1 << q.bits
    {
        let (r, c, bits) = (q.tables.rows(), q.tables.cols(), q.bits);
        return fail(format!("tables of {r} x {c} for {rows} x {cols} codes of {bits} bits, owned by {:?}", q.owner));
    }
    let bytes = float.encode(q.tables.data()).or_else(|i| {
        let (owner, entry) = (i >> q.bits, i & ((1 << q.bits) - 1));
        fail(format!("table {owner}, entry {entry}: {} is beyond {}", q.tables.data()[i], float.name()))
    })?;
    // As it is written: an entry too small for its codec is a zero, too.
    let tables = Tables { owner: q.owner, float, bytes: bytes.into() };
    let (mut row, mut read) = (Vec::new(), None);
    let pattern = Pattern::build(rows, cols, mask, kind)?;
    let mut codes = Vec::new();
    walk(&pattern, rows, cols, mask, |r, c, kept| {
        let code = if kept {
            q.codes[r * cols + c]
        } else {
            if read != Some(r) {
                tables.row(r, cols, q.bits, &mut row);
                read = Some(r);
            }
            let first = q.owner.of(0, c, cols) << q.bits;
            match row[first..first + (1 << q.bits)].iter().position(|&t| t == 0.0) {
                Some(z) => z as u8,
                None => return fail(format!("row {r}, column {c} is dropped and its table has no 0")),
            }
        };
        codes.push(fitting(code, q.bits, r, c)?);
        Ok(())
    })?;
    let scales = match &q.scales {
        Some((s, group)) => {
            scales_fit(rows, group.count(cols), s)?;
            Some((pack_scales(s, scales)?, group.clone()))
        }
        None => None,
    };
    let codes = pack(&codes, q.bits).into();
    finish(rows, cols, pattern, Values::Codebook { bits: q.bits, codes, tables, scales })
}

/// Packs signs and zeros, `[rows, cols]`.
pub fn pack_ternary(
    (rows, cols): (usize, usize),
    q: &Ternary,
    mask: Option<&Mask>,
    kind: PatternKind,
    scales: ScaleCodec,
) -> Result<Piece, FormatError> {
    codes_fit(rows, cols, q.codes.len(), 8, 1)?;
    scales_fit(rows, q.group.count(cols), &q.scales)?;
    let pattern = Pattern::build(rows, cols, mask, kind)?;
    let mut codes = Vec::new();
    walk(&pattern, rows, cols, mask, |r, c, kept| {
        let code = if kept { q.codes[r * cols + c] } else { 0 };
        if !(-1..=1).contains(&code) {
            return fail(format!("row {r}, column {c}: {code} is no ternary value"));
        }
        codes.push(code);
        Ok(())
    })?;
    let scales = pack_scales(&q.scales, scales)?;
    finish(rows, cols, pattern, Values::Ternary { codes: pack_trits(&codes).into(), scales, group: q.group.clone() })
}

/// Bytes of a matrix's values and indices under a pattern, at `bits` bits a value (scales apart: they are the same
/// under every pattern). `None` where the mask or the shape does not allow the pattern.
pub fn exact_bytes(kind: PatternKind, mask: &Mask, bits: f64) -> Option<u64> {
    let (rows, cols) = (mask.rows(), mask.cols());
    let (count, index) = match kind {
        PatternKind::Dense => (rows * cols, 0),
        PatternKind::Nm { n, m } => {
            nm_fits(mask, n, m).ok()?;
            let count = rows * cols / usize::from(m) * usize::from(n);
            (count, (count * usize::from(Pattern::position_bits(usize::from(m)))).div_ceil(8))
        }
        PatternKind::Mask { height } => {
            let bands = shared_rows(mask, height).ok()?;
            let kept = |words: &[u64]| words.iter().map(|w| w.count_ones() as usize).sum::<usize>();
            let count = bands.iter().enumerate().map(|(g, b)| kept(b) * (rows - g * height).min(height)).sum();
            (count, bands.len() * cols.div_ceil(8) + (bands.len() + 1) * 4)
        }
        PatternKind::Csr => (mask.kept(), mask.kept() * index_width(cols) + (rows + 1) * 4),
        PatternKind::Blocks { height, width } => {
            let found: usize = kept_blocks(mask, height, width).ok()?.iter().map(Vec::len).sum();
            (found * height * width, found * index_width(cols / width) + (rows / height + 1) * 4)
        }
    };
    let starts = !matches!(kind, PatternKind::Dense | PatternKind::Nm { .. });
    (!starts || count <= u32::MAX as usize).then(|| (count as f64 * bits / 8.0).ceil() as u64 + index as u64)
}

/// The pattern of fewest exact bytes among those that the mask allows: dense, the usual N:M, masks of each row or
/// shared by 8, 16 or 32, CSR, and `blocks` of `(height, width)` where given. The first of equals, in this order.
pub fn cheapest_pattern(mask: &Mask, bits: f64, blocks: Option<(usize, usize)>) -> PatternKind {
    let runs = [(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (2, 8), (4, 8), (6, 8), (4, 16), (8, 16), (16, 32)];
    let kinds = [PatternKind::Dense].into_iter();
    let kinds = kinds.chain(runs.map(|(n, m)| PatternKind::Nm { n, m }));
    let kinds = kinds.chain([32, 16, 8, 1].map(|height| PatternKind::Mask { height })).chain([PatternKind::Csr]);
    let kinds = kinds.chain(blocks.map(|(height, width)| PatternKind::Blocks { height, width }));
    kinds
        .filter_map(|k| exact_bytes(k, mask, bits).map(|b| (k, b)))
        .min_by_key(|&(_, b)| b)
        .map_or(PatternKind::Dense, |(k, _)| k)
}

fn finish(rows: usize, cols: usize, pattern: Pattern, values: Values) -> Result<Piece, FormatError> {
    let piece = Piece { rows, cols, pattern, values };
    piece.check()?;
    Ok(piece)
}

fn codes_fit(rows: usize, cols: usize, codes: usize, bits: u8, least: u8) -> Result<(), FormatError> {
    if !(least..=8).contains(&bits) {
        return fail(format!("codes of {bits} bits, expected {least} to 8"));
    }
    if codes != rows * cols { fail(format!("{codes} codes for {rows} x {cols} entries")) } else { Ok(()) }
}

fn fitting(code: u8, bits: u8, r: usize, c: usize) -> Result<u8, FormatError> {
    if u32::from(code) >> bits == 0 {
        Ok(code)
    } else {
        fail(format!("row {r}, column {c}: code {code} of {bits} bits"))
    }
}

fn scales_fit(rows: usize, groups: usize, s: &Mat) -> Result<(), FormatError> {
    if (s.rows(), s.cols()) != (rows, groups) {
        return fail(format!("scales of {} x {}, expected {rows} x {groups}", s.rows(), s.cols()));
    }
    Ok(())
}

impl Float {
    /// Little-endian bytes of `values`, rounded to nearest; the index of the first that this codec cannot say, if any.
    pub fn encode(self, values: &[f32]) -> Result<Vec<u8>, usize> {
        let mut out = FloatWriter::new(self);
        out.extend(values)?;
        Ok(out.bytes)
    }
}

/// Floats on their way to bytes; what is not finite, or would not be, is refused.
pub(crate) struct FloatWriter {
    float: Float,
    pub(crate) bytes: Vec<u8>,
    /// The 8-bit codec's values of the codes 0 to 127, rising.
    table: Vec<f32>,
}

impl FloatWriter {
    pub(crate) fn new(float: Float) -> FloatWriter {
        let table: fn(u8) -> f32 = match float {
            Float::F8E4m3 => f8_e4m3,
            _ => f8_e5m2,
        };
        let eight = matches!(float, Float::F8E4m3 | Float::F8E5m2);
        let table = (0..if eight { 128u8 } else { 0 }).map(table).filter(|v| v.is_finite()).collect();
        FloatWriter { float, bytes: Vec::new(), table }
    }

    /// Appends values; the index of the first that the codec cannot say, if any.
    pub(crate) fn extend(&mut self, values: &[f32]) -> Result<(), usize> {
        let limit = match self.float {
            Float::F32 => {
                self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
                f32::MAX
            }
            Float::F16 => {
                self.bytes.extend(values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()));
                // Halfway to the next power of two and beyond rounds to infinity.
                65520f32.next_down()
            }
            Float::Bf16 => {
                self.bytes.extend(values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()));
                f32::from_bits(0x7F7F_7FFF)
            }
            Float::F8E4m3 | Float::F8E5m2 => {
                let codes = values.iter().map(|&v| eight_bits(&self.table, v));
                self.bytes.extend(codes);
                self.table[self.table.len() - 1]
            }
        };
        values.iter().position(|v| v.is_nan() || v.abs() > limit).map_or(Ok(()), Err)
    }
}

/// The nearest of a table of rising values, as sign and code; ties go to the even code, as everywhere in IEEE
/// arithmetic.
fn eight_bits(table: &[f32], v: f32) -> u8 {
    let up = table.partition_point(|&x| x < v.abs()).min(table.len() - 1);
    let down = up.saturating_sub(1);
    let (below, above) = (v.abs() - table[down], table[up] - v.abs());
    let code = if below < above || (below == above && down % 2 == 0) { down } else { up };
    code as u8 | u8::from(v.is_sign_negative()) << 7
}

fn keeps(mask: Option<&Mask>, r: usize, c: usize) -> bool {
    mask.is_none_or(|m| m.row(r)[c / 64] >> (c % 64) & 1 == 1)
}

/// Calls `f(row, column, kept)` for every position that the pattern stores.
fn walk(
    pattern: &Pattern,
    rows: usize,
    cols: usize,
    mask: Option<&Mask>,
    mut f: impl FnMut(usize, usize, bool) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let mut at = Vec::new();
    for r in 0..rows {
        if r == 0 || *pattern != Pattern::Dense {
            pattern.columns(r, cols, &mut at);
        }
        for &c in &at {
            f(r, c as usize, keeps(mask, r, c as usize))?;
        }
    }
    Ok(())
}

impl Pattern {
    fn build(rows: usize, cols: usize, mask: Option<&Mask>, kind: PatternKind) -> Result<Pattern, FormatError> {
        if kind == PatternKind::Dense {
            return Ok(Pattern::Dense);
        }
        let all;
        let mask = match mask {
            Some(m) if (m.rows(), m.cols()) != (rows, cols) => {
                return fail(format!("a mask of {} x {} for a matrix of {rows} x {cols}", m.rows(), m.cols()));
            }
            Some(m) => m,
            None => {
                all = Mask::all(rows, cols, true);
                &all
            }
        };
        match kind {
            PatternKind::Dense => Ok(Pattern::Dense),
            PatternKind::Nm { n, m } => {
                nm_fits(mask, n, m)?;
                let (keep, len) = (usize::from(n), usize::from(m));
                let mut index = Vec::with_capacity(rows * cols / len * keep);
                for r in 0..rows {
                    for first in (0..cols).step_by(len) {
                        let mut spare = keep - (first..first + len).filter(|&c| mask.get(r, c)).count();
                        for p in 0..m {
                            let kept = mask.get(r, first + usize::from(p));
                            if kept || spare > 0 {
                                spare -= usize::from(!kept);
                                index.push(p);
                            }
                        }
                    }
                }
                Ok(Pattern::Nm { n, m, index: pack(&index, Pattern::position_bits(len)).into() })
            }
            PatternKind::Mask { height } => {
                let bands = shared_rows(mask, height)?;
                let kept = |b: &Vec<u64>| b.iter().map(|w| w.count_ones() as usize).sum();
                let starts = running(bands.iter().map(kept))?;
                let width = cols.div_ceil(8);
                let bytes = |b: &Vec<u64>| b.iter().flat_map(|w| w.to_le_bytes()).take(width).collect::<Vec<u8>>();
                Ok(Pattern::Mask { height, bits: bands.iter().flat_map(bytes).collect::<Vec<u8>>().into(), starts })
            }
            PatternKind::Csr => {
                let found: Vec<Vec<usize>> =
                    (0..rows).map(|r| (0..cols).filter(|&c| mask.get(r, c)).collect()).collect();
                let starts = running(found.iter().map(Vec::len))?;
                Ok(Pattern::Csr { starts, columns: indices(&found, cols) })
            }
            PatternKind::Blocks { height, width } => {
                let found = kept_blocks(mask, height, width)?;
                let starts = running(found.iter().map(Vec::len))?;
                Ok(Pattern::Blocks { height, width, starts, columns: indices(&found, cols / width) })
            }
        }
    }
}

/// Running sums from 0, as u32.
fn running(counts: impl Iterator<Item = usize>) -> Result<Bytes, FormatError> {
    let (mut sum, mut out) = (0usize, 0u32.to_le_bytes().to_vec());
    for c in counts {
        sum += c;
        match u32::try_from(sum) {
            Ok(s) => out.extend(s.to_le_bytes()),
            Err(_) => return fail(format!("{sum} stored values are more than 32 bits can count")),
        }
    }
    Ok(out.into())
}

fn indices(found: &[Vec<usize>], limit: usize) -> Bytes {
    let width = index_width(limit);
    found.iter().flatten().flat_map(|&c| (c as u32).to_le_bytes().into_iter().take(width)).collect::<Vec<u8>>().into()
}

fn nm_fits(mask: &Mask, n: u8, m: u8) -> Result<(), FormatError> {
    let (keep, len) = (usize::from(n), usize::from(m));
    if !(2..=32).contains(&len) || keep == 0 || keep > len || !mask.cols().is_multiple_of(len) {
        return fail(format!("{n}:{m} over {} columns", mask.cols()));
    }
    for r in 0..mask.rows() {
        for first in (0..mask.cols()).step_by(len) {
            let kept = (first..first + len).filter(|&c| mask.get(r, c)).count();
            if kept > keep {
                return fail(format!("row {r} keeps {kept} of columns {first} to {}: not {n}:{m}", first + len - 1));
            }
        }
    }
    Ok(())
}

/// The union of every `height` rows.
fn shared_rows(mask: &Mask, height: usize) -> Result<Vec<Vec<u64>>, FormatError> {
    if height == 0 {
        return fail("a mask shared by 0 rows".into());
    }
    let union = |first: usize| {
        let mut words = mask.row(first).to_vec();
        for r in first + 1..(first + height).min(mask.rows()) {
            words.iter_mut().zip(mask.row(r)).for_each(|(a, b)| *a |= b);
        }
        words
    };
    Ok((0..mask.rows()).step_by(height).map(union).collect())
}

/// The block columns in which anything is kept, for each block row.
fn kept_blocks(mask: &Mask, height: usize, width: usize) -> Result<Vec<Vec<usize>>, FormatError> {
    let (rows, cols) = (mask.rows(), mask.cols());
    if height == 0 || width == 0 || !rows.is_multiple_of(height) || !cols.is_multiple_of(width) {
        return fail(format!("blocks of {height} x {width} in a matrix of {rows} x {cols}"));
    }
    let any = |band: &[u64], b: usize| (b * width..(b + 1) * width).any(|c| band[c / 64] >> (c % 64) & 1 == 1);
    let found = |band: Vec<u64>| (0..cols / width).filter(|&b| any(&band, b)).collect();
    Ok(shared_rows(mask, height)?.into_iter().map(found).collect())
}

//! Whether data fit their description. After a check that passes, nothing in decoding can run out of bounds.
//!
//! Lengths, starts, positions and scales are read; plain floats and the scales inside GGUF blocks are not, since no
//! value of theirs can do more harm than itself, and reading them would pull a whole mapped file into memory.

use half::{bf16, f16};

use crate::bits::packed_len;
use crate::pattern::{index_width, u32_at};
use crate::{
    Float, FormatError, Group, MOST_DENSE, MOST_MAPS, Map, Owner, Pattern, Piece, Scales, Stored, Tables, Term, Values,
    Zeros,
};

type Check = Result<(), FormatError>;

fn fail<T>(what: String) -> Result<T, FormatError> {
    Err(FormatError { what })
}

/// A product of sizes that fits memory at all.
fn product(sizes: &[usize]) -> Result<usize, FormatError> {
    sizes
        .iter()
        .try_fold(1usize, |p, &s| p.checked_mul(s))
        .filter(|&p| p < 1 << 56)
        .map_or_else(|| fail(format!("sizes {sizes:?} multiply beyond all memory")), Ok)
}

fn length(name: &str, have: usize, want: usize) -> Check {
    if have == want { Ok(()) } else { fail(format!("{name}: {have} bytes, expected {want}")) }
}

fn stream(name: &str, have: usize, count: usize, bits: u8) -> Check {
    match packed_len(count, bits) {
        Some(want) => length(name, have, want),
        None => fail(format!("{name}: {count} codes of {bits} bits are beyond all memory")),
    }
}

fn bits_of(name: &str, bits: u8, from: u8) -> Check {
    if (from..=8).contains(&bits) { Ok(()) } else { fail(format!("{name}: {bits} bits, expected {from} to 8")) }
}

/// The first of `count` starts is 0 and they never fall; gives the last.
fn starts(bytes: &[u8], count: usize) -> Result<usize, FormatError> {
    length("starts", bytes.len(), product(&[count, 4])?)?;
    let mut last = 0;
    for i in 0..count {
        let s = u32_at(bytes, i);
        if s < last || (i == 0 && s != 0) {
            return fail(format!("starts: {s} at place {i} after {last}"));
        }
        last = s;
    }
    Ok(last)
}

/// Column indices below `limit` that rise within every run between two starts.
fn columns(bytes: &[u8], starts: &[u8], runs: usize, limit: usize) -> Check {
    let width = index_width(limit);
    length("columns", bytes.len(), product(&[u32_at(starts, runs), width])?)?;
    for r in 0..runs {
        let mut least = 0;
        for i in u32_at(starts, r)..u32_at(starts, r + 1) {
            let c = crate::pattern::index_at(bytes, width, i);
            if c < least || c >= limit {
                return fail(format!(
                    "columns: {c} in row {r}, expected {least} to {} (rising)",
                    limit.saturating_sub(1)
                ));
            }
            least = c + 1;
        }
    }
    Ok(())
}

/// Every value of a float buffer is finite.
fn finite(name: &str, float: Float, bytes: &[u8]) -> Check {
    let bad = match float {
        Float::F32 => bytes.chunks_exact(4).position(|b| !f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_finite()),
        Float::F16 => bytes.chunks_exact(2).position(|b| !f16::from_le_bytes([b[0], b[1]]).is_finite()),
        Float::Bf16 => bytes.chunks_exact(2).position(|b| !bf16::from_le_bytes([b[0], b[1]]).is_finite()),
        Float::F8E4m3 => bytes.iter().position(|b| b & 0x7F == 0x7F),
        Float::F8E5m2 => bytes.iter().position(|b| b & 0x7C == 0x7C),
    };
    bad.map_or(Ok(()), |i| fail(format!("{name}: value {i} is not finite")))
}

impl Group {
    fn check(&self, cols: usize) -> Check {
        match self {
            Group::Run(0) => fail("group: runs of 0 columns".into()),
            Group::Run(_) => Ok(()),
            Group::Index { groups, of } => {
                length("group index", of.len(), product(&[cols, 2])?)?;
                match (0..cols).find(|&c| self.of(c) >= *groups) {
                    Some(c) => {
                        fail(format!("group index: group {} of column {c}, expected below {groups}", self.of(c)))
                    }
                    None => Ok(()),
                }
            }
        }
    }
}

impl Scales {
    fn check(&self, rows: usize, groups: usize) -> Check {
        let n = product(&[rows, groups])?;
        match self {
            Scales::Float(float, bytes) => {
                length("scales", bytes.len(), product(&[n, float.bytes()])?)?;
                finite("scales", *float, bytes)
            }
            Scales::Int { bits, per, codes, super_scales, super_mins } => {
                bits_of("scales", *bits, 2)?;
                if *per == 0 {
                    return fail("scales: super-scales over runs of 0".into());
                }
                stream("scale codes", codes.len(), n, *bits)?;
                let want = product(&[rows, groups.div_ceil(*per), 2])?;
                length("super-scales", super_scales.len(), want)?;
                finite("super-scales", Float::F16, super_scales)?;
                if let Some(m) = super_mins {
                    length("super-minima", m.len(), want)?;
                    finite("super-minima", Float::F16, m)?;
                }
                Ok(())
            }
        }
    }
}

impl Tables {
    fn check(&self, rows: usize, cols: usize, bits: u8) -> Check {
        if self.owner == Owner::Group(0) {
            return fail("table: runs of 0 columns".into());
        }
        if !matches!(self.float, Float::F32 | Float::F16) {
            return fail(format!("table: entries in {}, expected f32 or f16", self.float.name()));
        }
        let Some(want) = Tables::exact_bytes(self.owner, self.float, bits, (rows, cols)) else {
            return fail(format!("table: tables of {rows} x {cols} entries are beyond all memory"));
        };
        length("table", self.bytes.len(), want)?;
        finite("table", self.float, &self.bytes)
    }
}

impl Pattern {
    /// Checks the pattern of a `[rows, cols]` piece and gives its number of stored values.
    fn check(&self, rows: usize, cols: usize) -> Result<usize, FormatError> {
        match self {
            Pattern::Dense => product(&[rows, cols]),
            Pattern::Nm { n, m, index } => {
                let (n, m) = (usize::from(*n), usize::from(*m));
                if !(2..=32).contains(&m) || n == 0 || n > m || !cols.is_multiple_of(m) {
                    return fail(format!("{n}:{m} over {cols} columns"));
                }
                let (runs, bits) = (product(&[rows, cols / m])?, Pattern::position_bits(m));
                let count = product(&[runs, n])?;
                stream("positions", index.len(), count, bits)?;
                let mut run = [0u8; 32];
                for g in 0..runs {
                    crate::bits::unpack(index, bits, g * n, &mut run[..n]);
                    if usize::from(run[n - 1]) >= m || run[..n].windows(2).any(|w| w[0] >= w[1]) {
                        return fail(format!("positions: {:?} in run {g} of {n}:{m}", &run[..n]));
                    }
                }
                Ok(count)
            }
            Pattern::Mask { height, bits, starts: st } => {
                if *height == 0 {
                    return fail("mask: shared by 0 rows".into());
                }
                let (groups, width) = (rows.div_ceil(*height), cols.div_ceil(8));
                length("mask bits", bits.len(), product(&[groups, width])?)?;
                starts(st, groups + 1)?;
                let mut count = 0usize;
                for g in 0..groups {
                    let row = &bits[g * width..(g + 1) * width];
                    let kept: usize = row.iter().map(|b| b.count_ones() as usize).sum();
                    let told = u32_at(st, g + 1) - u32_at(st, g);
                    if kept != told {
                        return fail(format!("mask row {g} keeps {kept} columns, its starts say {told}"));
                    }
                    if !cols.is_multiple_of(8) && row.last().is_some_and(|b| b >> (cols % 8) != 0) {
                        return fail(format!("mask row {g} has bits beyond column {cols}"));
                    }
                    count += kept * (rows - g * height).min(*height);
                }
                Ok(count)
            }
            Pattern::Csr { starts: st, columns: at } => {
                let count = starts(st, rows.saturating_add(1))?;
                columns(at, st, rows, cols)?;
                Ok(count)
            }
            Pattern::Blocks { height, width, starts: st, columns: at } => {
                if *height == 0 || *width == 0 || !rows.is_multiple_of(*height) || !cols.is_multiple_of(*width) {
                    return fail(format!("blocks of {height} x {width} in a matrix of {rows} x {cols}"));
                }
                let blocks = starts(st, rows / height + 1)?;
                columns(at, st, rows / height, cols / width)?;
                product(&[blocks, *height, *width])
            }
        }
    }
}

impl Piece {
    /// Whether every length, index and scale fits: if so, decoding cannot panic.
    pub fn check(&self) -> Check {
        let (rows, cols) = (self.rows, self.cols);
        product(&[rows.max(1), cols.max(1), 8])?;
        if cols > u32::MAX as usize {
            return fail(format!("{cols} columns are more than an index can name"));
        }
        let count = self.pattern.check(rows, cols)?;
        match &self.values {
            Values::Float(float, bytes) => length("values", bytes.len(), product(&[count, float.bytes()])?),
            Values::Int { bits, codes, scales, zeros, group } => {
                bits_of("codes", *bits, 2)?;
                stream("codes", codes.len(), count, *bits)?;
                group.check(cols)?;
                scales.check(rows, group.count(cols))?;
                let n = product(&[rows, group.count(cols)])?;
                match zeros {
                    None => Ok(()),
                    Some(Zeros::Codes(z)) => stream("zeros", z.len(), n, *bits),
                    Some(Zeros::Real(z)) => {
                        z.check(rows, group.count(cols)).map_err(|e| FormatError { what: format!("zeros: {e}") })
                    }
                    Some(Zeros::Minima(z)) => {
                        z.check(rows, group.count(cols)).map_err(|e| FormatError { what: format!("minima: {e}") })
                    }
                }
            }
            Values::Codebook { bits, codes, tables, scales } => {
                bits_of("codes", *bits, 1)?;
                stream("codes", codes.len(), count, *bits)?;
                tables.check(rows, cols, *bits)?;
                match scales {
                    Some((scales, group)) => {
                        group.check(cols)?;
                        scales.check(rows, group.count(cols))
                    }
                    None => Ok(()),
                }
            }
            Values::Ternary { codes, scales, group } => {
                length("codes", codes.len(), count.div_ceil(5))?;
                if let Some(i) = codes.iter().position(|&b| b > 242) {
                    return fail(format!("codes: byte {i} is {}, expected five base-3 digits (at most 242)", codes[i]));
                }
                group.check(cols)?;
                scales.check(rows, group.count(cols))
            }
            Values::Gguf(kind, bytes) => {
                if self.pattern != Pattern::Dense {
                    return fail(format!("{kind:?} blocks under a sparse pattern"));
                }
                if !cols.is_multiple_of(kind.block()) {
                    return fail(format!("{cols} columns do not divide into {kind:?} blocks of {}", kind.block()));
                }
                length("blocks", bytes.len(), product(&[count / kind.block(), kind.block_bytes()])?)
            }
        }
    }
}

impl Map {
    /// Whether it maps `n` values.
    pub(crate) fn check(&self, n: usize) -> Check {
        let runs = |size: usize| {
            if size == 0 || !n.is_multiple_of(size) { fail(format!("runs of {size} in {n} values")) } else { Ok(()) }
        };
        let number = |float: Float, bytes: &[u8], count: usize| {
            if !matches!(float, Float::F32 | Float::F16) {
                return fail(format!("values in {}, expected f32 or f16", float.name()));
            }
            length("values", bytes.len(), product(&[count, float.bytes()])?)?;
            finite("values", float, bytes)
        };
        match self {
            Map::Permutation(index) => {
                length("index", index.len(), product(&[n, 4])?)?;
                let mut seen = vec![false; n];
                for i in 0..n {
                    let at = u32_at(index, i);
                    if at >= n || std::mem::replace(&mut seen[at], true) {
                        return fail(format!("index: {at} at place {i}, expected each of 0 to {} once", n - 1));
                    }
                }
                Ok(())
            }
            Map::Diagonal(float, bytes) => number(*float, bytes, n),
            Map::Hadamard { size, signs } => {
                runs(*size)?;
                if crate::hadamard_parts(*size).is_none() {
                    return fail(format!("no Hadamard matrix of order {size} here: 1, 12, 20, 28, 36 or 44 times 2^k"));
                }
                let Some(signs) = signs else { return Ok(()) };
                length("signs", signs.len(), n.div_ceil(8))?;
                if !n.is_multiple_of(8) && signs.last().is_some_and(|b| b >> (n % 8) != 0) {
                    return fail(format!("signs beyond value {n}"));
                }
                Ok(())
            }
            Map::Dense { size, float, values } => {
                runs(*size)?;
                if *size > MOST_DENSE {
                    return fail(format!("a dense map of {size} values, at most {MOST_DENSE}"));
                }
                number(*float, values, size * size)
            }
        }
    }
}

impl Stored {
    /// Whether every term fits this matrix and itself: if so, decoding cannot panic.
    pub fn check(&self) -> Check {
        let (rows, cols) = (self.rows, self.cols);
        product(&[rows.max(1), cols.max(1), 8])?;
        for (i, term) in self.terms.iter().enumerate() {
            let inside = |e: FormatError| FormatError { what: format!("term {i}: {e}") };
            let shape = match term {
                Term::Piece(p) => {
                    p.check().map_err(inside)?;
                    (p.rows, p.cols)
                }
                Term::Product(l, r) => {
                    l.check().map_err(inside)?;
                    r.check().map_err(inside)?;
                    if l.cols != r.rows {
                        return fail(format!("term {i}: a product of {} columns and {} rows", l.cols, r.rows));
                    }
                    (l.rows, r.cols)
                }
                Term::Signed(s) => {
                    s.check().map_err(inside)?;
                    (s.left.rows, s.right.cols)
                }
            };
            if shape != (rows, cols) {
                return fail(format!("term {i} is {} x {}, the matrix {rows} x {cols}", shape.0, shape.1));
            }
        }
        for (end, maps, n) in [("input", &self.input, cols), ("output", &self.output, rows)] {
            if maps.len() > MOST_MAPS {
                return fail(format!("{} maps at the {end}, at most {MOST_MAPS}", maps.len()));
            }
            for (i, map) in maps.iter().enumerate() {
                map.check(n).map_err(|e| FormatError { what: format!("{end} map {i}: {e}") })?;
            }
        }
        Ok(())
    }
}

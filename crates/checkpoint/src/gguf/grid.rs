//! GGUF's types whose codes point into a table or a grid of few levels, read as codes into a table of their own with the
//! file's own scales: exactly the values that gguf-py gives, in codecs that kernels multiply.
//!
//! | type | in the file, bits a weight | as read |
//! |---|---|---|
//! | IQ1_S | 1.56 | 3-bit codes, scales for 32: 3.19 |
//! | IQ1_M | 1.75 | 3-bit codes, scales for 16: 3.31 |
//! | TQ1_0, TQ2_0 | 1.69, 2.06 | ternary: 1.66 (2.07 where a code of TQ2_0 is worth 2) |
//! | MXFP4 | 4.25 | 4-bit codes, f16 scales for 32: 4.5 |
//! | NVFP4 | 4.5 | 4-bit codes, f16 scales for 16: 5 |
//!
//! The grid of IQ1 holds 8 values at once; unfolded, each value is a code of its own, which is what makes it longer.
//! IQ2 and IQ3, whose grids hold magnitudes, stay blocks ([`lacuna_format::lattice`]).

use std::ops::Range;

use half::f16;
use lacuna_format::bits::{pack, pack_trits};
use lacuna_format::lattice::ternary;
use lacuna_format::{Float, Group, Pattern, Piece, Scales, Stored, Tables, Values};

use crate::foreign::{Data, Fault, Module};

/// The types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum GridType {
    IQ1_S,
    IQ1_M,
    TQ1_0,
    TQ2_0,
    MXFP4,
    NVFP4,
}

/// All of them.
pub(super) const ALL: [GridType; 6] =
    [GridType::IQ1_S, GridType::IQ1_M, GridType::TQ1_0, GridType::TQ2_0, GridType::MXFP4, GridType::NVFP4];

impl GridType {
    /// Values in a block.
    pub fn block(self) -> usize {
        match self {
            GridType::MXFP4 => 32,
            GridType::NVFP4 => 64,
            _ => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            GridType::IQ1_S => 50,
            GridType::IQ1_M => 56,
            GridType::TQ2_0 => 66,
            GridType::TQ1_0 => 54,
            GridType::MXFP4 => 17,
            GridType::NVFP4 => 36,
        }
    }

    /// Bits of a code as read, and columns that share a scale.
    fn form(self) -> (u8, usize) {
        match self {
            GridType::IQ1_S => (3, 32),
            GridType::IQ1_M => (3, 16),
            GridType::MXFP4 => (4, 32),
            GridType::NVFP4 => (4, 16),
            GridType::TQ1_0 | GridType::TQ2_0 => (2, 256),
        }
    }

    /// What a code is worth under a scale of 1.
    fn table(self) -> Vec<f32> {
        match self {
            // A shift by an eighth, up or down.
            GridType::IQ1_S | GridType::IQ1_M => {
                let moved = |by: f32| [-1.0 + by, by, 1.0 + by, 0.0];
                [moved(0.125), moved(-0.125)].concat()
            }
            GridType::MXFP4 | GridType::NVFP4 => FP4.map(|v| 2.0 * v).to_vec(),
            GridType::TQ1_0 | GridType::TQ2_0 => vec![-1.0, 0.0, 1.0, 2.0],
        }
    }
}

/// The sixteen numbers of FP4 (e2m1) by their bits.
pub(crate) const FP4: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Codes of one block, whole scales of its runs and the f16 over them.
struct Block {
    codes: [u8; 256],
    scales: [u8; 16],
    d: [u8; 2],
}

impl Block {
    /// The `i`-th `grid.len()` values: places in the list of magnitudes, and `sign` set where the bit is.
    fn put(&mut self, i: usize, grid: &[u8], signs: u8, sign: u8) {
        let n = grid.len();
        for (j, (code, place)) in self.codes[i * n..][..n].iter_mut().zip(grid).enumerate() {
            *code = place | if signs >> j & 1 == 1 { sign } else { 0 };
        }
    }
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

/// The scale of an odd number of parts.
fn odd(half: u8) -> u8 {
    2 * half + 1
}

/// `i`-th half of a byte of a list.
fn nibble(b: &[u8], i: usize) -> u8 {
    b[i / 2] >> (i % 2 * 4) & 15
}

/// One block of a type with a grid, into `out`.
fn block(kind: GridType, b: &[u8], out: &mut Block) {
    let eight = |at: usize| &ternary()[8 * at..8 * at + 8];
    out.d = [b[0], b[1]];
    match kind {
        GridType::IQ1_S => {
            for run in 0..8 {
                let h = u16_at(b, 34 + 2 * run);
                out.scales[run] = odd((h >> 12 & 7) as u8);
                let down = if h >> 15 == 1 { 255 } else { 0 };
                for i in 0..4 {
                    let at = usize::from(b[2 + 4 * run + i]) | usize::from(h >> (3 * i) & 7) << 8;
                    out.put(4 * run + i, eight(at), down, 4);
                }
            }
        }
        GridType::IQ1_M => {
            // The f16 lies in the upper quarters of the four words of scales.
            let word = |i: usize| u16_at(b, 48 + 2 * i);
            out.d = (0..4).fold(0, |d, i| d | (word(i) >> 12) << (4 * i)).to_le_bytes();
            (0..16).for_each(|i| out.scales[i] = odd((word(i / 4) >> (i % 4 * 3) & 7) as u8));
            for i in 0..32 {
                let h = nibble(&b[32..48], i);
                let at = usize::from(b[i]) | usize::from(h & 7) << 8;
                out.put(i, eight(at), if h & 8 != 0 { 255 } else { 0 }, 4);
            }
        }
        _ => unreachable!("types without a grid"),
    }
}

/// The 256 codes of a block of TQ1_0 or TQ2_0: the values and one.
fn trits(kind: GridType, b: &[u8], codes: &mut [u8]) {
    if kind == GridType::TQ2_0 {
        for (i, c) in codes.iter_mut().enumerate() {
            *c = b[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        }
        return;
    }
    // A digit is what a byte, as a part of 256, times a power of three carries over: five of 32 bytes, five of 16 and
    // four of 4.
    let mut codes = codes.iter_mut();
    for (bytes, digits) in [(&b[..32], 5), (&b[32..48], 5), (&b[48..52], 4)] {
        for digit in 0..digits {
            let power = 3u8.pow(digit);
            for (byte, c) in bytes.iter().zip(&mut codes) {
                *c = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
            }
        }
    }
}

/// Powers of two as f16 scales, as far as those can reach, and what is left over for the table: `scale * 2^shift`.
/// Where they lie too far apart, as bf16.
///
/// `exponents`: those of all scales; `None` where nothing hangs on it.
pub(crate) fn powers_of_two(exponents: &[Option<i32>]) -> (Scales, i32) {
    let told = || exponents.iter().flatten().copied();
    let (least, most) = (told().min().unwrap_or(0), told().max().unwrap_or(0));
    let write = |float: Float, shift: i32| {
        let two = |e: Option<i32>| {
            let x = f32::from_bits(match e.map_or(0, |e| e - shift) {
                // Below the normal numbers.
                e @ ..=-127 => 1 << (149 + e).max(0),
                e => ((e + 127) as u32) << 23,
            });
            if float == Float::F16 { f16::from_f32(x).to_le_bytes() } else { half::bf16::from_f32(x).to_le_bytes() }
        };
        (Scales::Float(float, exponents.iter().flat_map(|e| two(*e)).collect::<Vec<u8>>().into()), shift)
    };
    if most - least > 39 {
        return write(Float::Bf16, 0);
    }
    write(Float::F16, if most > 15 { most - 15 } else { (least + 24).min(0) })
}

/// A table times a power of two.
pub(crate) fn shifted(table: &[f32], shift: i32) -> Tables {
    let unit = 2f32.powi(shift);
    Tables::one(&table.iter().map(|v| v * unit).collect::<Vec<f32>>())
}

/// A matrix, or a stack of them, of such a type.
pub(crate) struct GridMatrix {
    /// The tensor.
    pub tensor: usize,
    pub name: String,
    pub kind: GridType,
    /// Rows of all matrices, and columns, whole blocks.
    pub shape: (usize, usize),
    /// NVFP4: a tensor beside it with one factor for each matrix, f32, and how many.
    pub factors: Option<(usize, usize)>,
}

impl GridMatrix {
    fn bad<T>(&self, what: String) -> Result<T, Fault> {
        Err(Fault { tensor: self.name.clone(), what })
    }

    /// The factor of the matrix that `rows` lie in.
    fn factor(&self, rows: &Range<usize>, data: Data<'_>) -> Result<f32, Fault> {
        let Some((tensor, n)) = self.factors else { return Ok(1.0) };
        let (bytes, each) = (data(tensor), self.shape.0 / n.max(1));
        let of = |row: usize| -> Option<f32> {
            let at = 4 * (row / each.max(1));
            Some(f32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
        };
        match (of(rows.start), of(rows.end.saturating_sub(1).max(rows.start))) {
            (Some(a), Some(b)) if a == b && a.is_finite() => Ok(a),
            (a, b) => self.bad(format!("its factors are {a:?} and {b:?} at rows {} and {}", rows.start, rows.end)),
        }
    }

    fn values(&self, rows: Range<usize>, data: Data<'_>) -> Result<Values, Fault> {
        let (kind, cols) = (self.kind, self.shape.1);
        let row = cols / kind.block() * kind.block_bytes();
        let bytes = data(self.tensor).slice(rows.start * row..rows.end * row);
        let blocks = bytes.chunks_exact(kind.block_bytes());
        let (bits, run) = kind.form();
        let n = rows.len() * cols;
        let group = Group::Run(run);
        let mut codes = vec![0; n];
        if matches!(kind, GridType::TQ1_0 | GridType::TQ2_0) {
            let mut d = Vec::with_capacity(n / 128);
            for (b, codes) in blocks.zip(codes.chunks_exact_mut(256)) {
                trits(kind, b, codes);
                d.extend_from_slice(&b[kind.block_bytes() - 2..]);
            }
            let scales = Scales::Float(Float::F16, d.into());
            if codes.iter().any(|c| *c > 2) {
                let zeros = pack(&vec![1; n / 256], 2).into();
                return Ok(Values::Int { bits, codes: pack(&codes, bits).into(), scales, zeros: Some(zeros), group });
            }
            let trits: Vec<i8> = codes.iter().map(|c| *c as i8 - 1).collect();
            return Ok(Values::Ternary { codes: pack_trits(&trits).into(), scales, group });
        }
        let (scales, tables) = match kind {
            GridType::MXFP4 => {
                let mut exponents = Vec::with_capacity(n / 32);
                for (b, codes) in blocks.zip(codes.chunks_exact_mut(32)) {
                    for (j, q) in b[1..].iter().enumerate() {
                        (codes[j], codes[j + 16]) = (q & 15, q >> 4);
                    }
                    let zeros = codes.iter().all(|c| c & 7 == 0);
                    exponents.push(Some(i32::from(b[0]) - 128).filter(|_| !zeros));
                }
                let (scales, shift) = powers_of_two(&exponents);
                (scales, shifted(&kind.table(), shift))
            }
            GridType::NVFP4 => {
                let mut scales = Vec::with_capacity(n / 8);
                for (b, codes) in blocks.zip(codes.chunks_exact_mut(64)) {
                    for (j, (q, d)) in b[4..].chunks_exact(8).zip(&b[..4]).enumerate() {
                        for (i, q) in q.iter().enumerate() {
                            (codes[16 * j + i], codes[16 * j + i + 8]) = (q & 15, q >> 4);
                        }
                        scales.extend(f16::from_f32(half_e4m3(*d)).to_le_bytes());
                    }
                }
                let factor = self.factor(&rows, data)?;
                let table: Vec<f32> = kind.table().iter().map(|v| v * factor).collect();
                (Scales::Float(Float::F16, scales.into()), Tables::one(&table))
            }
            _ => {
                let runs = 256 / run;
                let mut one = Block { codes: [0; 256], scales: [0; 16], d: [0; 2] };
                let (mut all, mut d) = (Vec::with_capacity(n / run), Vec::with_capacity(n / 128));
                for (b, codes) in blocks.zip(codes.chunks_exact_mut(256)) {
                    block(kind, b, &mut one);
                    codes.copy_from_slice(&one.codes);
                    all.extend_from_slice(&one.scales[..runs]);
                    d.extend(one.d);
                }
                let codes = pack(&all, 5).into();
                let scales = Scales::Int { bits: 5, per: runs, codes, super_scales: d.into(), super_mins: None };
                (scales, Tables::one(&kind.table()))
            }
        };
        Ok(Values::Codebook { bits, codes: pack(&codes, bits).into(), tables, scales: Some((scales, group)) })
    }
}

/// Half of an 8-bit float with a sign that is not looked at, as NVFP4 in GGUF has it: the codes of nothing and of no
/// number are 0.
fn half_e4m3(b: u8) -> f32 {
    if b == 0 || b == 0x7f {
        return 0.0;
    }
    let (exponent, fraction) = (i32::from(b >> 3 & 15), f32::from(b & 7));
    if exponent == 0 { fraction * 2f32.powi(-10) } else { (1.0 + fraction / 8.0) * 2f32.powi(exponent - 8) }
}

impl Module for GridMatrix {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let own = (self.tensor, self.name.as_str());
        [Some(own), self.factors.map(|f| (f.0, self.name.as_str()))].into_iter().flatten().collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let values = self.values(rows.clone(), data)?;
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols: self.shape.1, pattern: Pattern::Dense, values }))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::Value;

    use super::*;

    fn golden() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/dequant.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn matrix(kind: GridType, cols: usize) -> GridMatrix {
        GridMatrix { tensor: 0, name: "t".into(), kind, shape: (1, cols), factors: None }
    }

    #[test]
    fn every_type_reads_as_in_the_gguf_package() {
        let golden = golden();
        for kind in ALL {
            let case = &golden[format!("{kind:?}")];
            assert_eq!(case["block_elements"], kind.block());
            assert_eq!(case["block_bytes"], kind.block_bytes());
            let hex = case["bytes_hex"].as_str().unwrap();
            let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
            let bytes: Bytes = (0..hex.len() / 2).map(byte).collect::<Vec<u8>>().into();
            let values = case["values"].as_array().unwrap();
            // Twice the same row, so that a part begins within.
            let two: Bytes = [&bytes[..], &bytes[..]].concat().into();
            let m = GridMatrix { shape: (2, values.len()), ..matrix(kind, values.len()) };
            let data = |_: usize| two.clone();
            for rows in [0..2, 1..2] {
                let stored = m.read(rows.clone(), &data).unwrap();
                stored.check().unwrap();
                let got = stored.to_mat();
                assert_eq!(got.rows(), rows.len());
                for r in 0..rows.len() {
                    for (i, (a, b)) in got.row(r).iter().zip(values).enumerate() {
                        assert_eq!(*a, b.as_f64().unwrap() as f32, "{kind:?}: value {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn powers_of_two_stay_what_they_are() {
        for exponents in
            [vec![-128, -127, -126, -120], vec![127, 100, 90], vec![-1, 0, 3], vec![-128, 127], vec![-40, -20]]
        {
            let (scales, shift) = powers_of_two(&exponents.iter().map(|e| Some(*e)).collect::<Vec<_>>());
            let mut out = vec![0.0; exponents.len()];
            scales.row(0, &mut out);
            let mut one = vec![];
            shifted(&[1.0], shift).row(0, 1, 0, &mut one);
            for (e, s) in exponents.iter().zip(&out) {
                assert_eq!(f64::from(*s) * f64::from(one[0]), 2f64.powi(*e), "{exponents:?}");
            }
        }
    }

    #[test]
    fn factors_are_those_of_their_matrices() {
        let factors: Bytes = [0.5f32, 2.0].iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<u8>>().into();
        // A scale of 1, all codes 2: 1.
        let block = [[0x38; 4].as_slice(), &[0x22; 32]].concat();
        let bytes: Bytes = block.repeat(4).into();
        let m = GridMatrix { shape: (4, 64), factors: Some((1, 2)), ..matrix(GridType::NVFP4, 64) };
        let data = |i: usize| if i == 0 { bytes.clone() } else { factors.clone() };
        assert_eq!(m.read(1..2, &data).unwrap().to_mat()[(0, 5)], 0.5);
        assert_eq!(m.read(2..4, &data).unwrap().to_mat()[(1, 5)], 2.0);
        assert!(m.read(1..3, &data).unwrap_err().what.contains("factors"));
    }
}

//! Matrices in every form that the kernels have a row for, random: what the benches multiply.

use lacuna_base::{Mat, Rng};
use lacuna_format::{
    Float, GgufType, Group, Integers, Mask, Pattern, PatternKind, Piece, ScaleCodec, Stored, Term, Ternary, Values,
    pack_float, pack_integers, pack_ternary,
};
use lacuna_kernels::{Activations, Linear, Packing};

/// A form by name, and how a matrix of it is made.
pub struct Row {
    /// As in reports: `int4 g32, 16x1 50%`.
    pub name: &'static str,
    /// The dense form of the same values, to compare with.
    pub dense: Option<&'static str>,
    make: fn(usize, usize) -> Stored,
}

impl Row {
    /// A matrix `[rows, cols]`.
    pub fn matrix(&self, rows: usize, cols: usize) -> Stored {
        (self.make)(rows, cols)
    }

    /// The same ready to multiply, with 8-bit activations where it has integer codes.
    pub fn linear(&self, rows: usize, cols: usize) -> Linear {
        let packing = Packing { activations: Activations::Int8, ..Packing::default() };
        Linear::pack_with(&self.matrix(rows, cols), &packing).expect("a sound matrix")
    }
}

/// Every row.
pub const ROWS: &[Row] = &[
    Row { name: "f32", dense: None, make: |r, c| float(r, c, Float::F32, None) },
    Row { name: "f16", dense: None, make: |r, c| float(r, c, Float::F16, None) },
    Row { name: "bf16", dense: None, make: |r, c| float(r, c, Float::Bf16, None) },
    Row { name: "int2 g32", dense: None, make: |r, c| ints(r, c, 2, None) },
    Row { name: "int3 g32", dense: None, make: |r, c| ints(r, c, 3, None) },
    Row { name: "int4 g32", dense: None, make: |r, c| ints(r, c, 4, None) },
    Row { name: "int5 g32", dense: None, make: |r, c| ints(r, c, 5, None) },
    Row { name: "int6 g32", dense: None, make: |r, c| ints(r, c, 6, None) },
    Row { name: "int8 g32", dense: None, make: |r, c| ints(r, c, 8, None) },
    Row { name: "ternary g32", dense: None, make: ternary },
    Row { name: "q6_k", dense: None, make: q6_k },
    Row { name: "f16, bitmask 50%", dense: Some("f16"), make: |r, c| float(r, c, Float::F16, Some((1, 0.5))) },
    Row { name: "f16, bitmask 70%", dense: Some("f16"), make: |r, c| float(r, c, Float::F16, Some((1, 0.7))) },
    Row { name: "f16, 8x1 50%", dense: Some("f16"), make: |r, c| float(r, c, Float::F16, Some((8, 0.5))) },
    Row { name: "f16, 16x1 50%", dense: Some("f16"), make: |r, c| float(r, c, Float::F16, Some((16, 0.5))) },
    Row { name: "f16, 32x1 50%", dense: Some("f16"), make: |r, c| float(r, c, Float::F16, Some((32, 0.5))) },
    Row { name: "int4 g32, 2:4", dense: Some("int4 g32"), make: half },
    Row { name: "int4 g32, 8x1 50%", dense: Some("int4 g32"), make: |r, c| ints(r, c, 4, Some(8)) },
    Row { name: "int4 g32, 16x1 50%", dense: Some("int4 g32"), make: |r, c| ints(r, c, 4, Some(16)) },
    Row { name: "int4 g32, 32x1 50%", dense: Some("int4 g32"), make: |r, c| ints(r, c, 4, Some(32)) },
    Row { name: "int4 g32, mask 50%", dense: Some("int4 g32"), make: |r, c| ints(r, c, 4, Some(1)) },
    Row { name: "f16, lists 1%", dense: Some("f16"), make: lists },
    Row { name: "low rank 25%, int4 g32", dense: Some("int4 g32"), make: |r, c| low_rank(r, c, 0.25) },
    Row { name: "low rank 50%, int4 g32", dense: Some("int4 g32"), make: |r, c| low_rank(r, c, 0.5) },
];

fn random(rows: usize, cols: usize) -> Mat {
    let mut rng = Rng::new(1);
    Mat::from_fn(rows, cols, |_, _| rng.below(2001) as f32 / 1000.0 - 1.0)
}

/// What stays when a share of `sparsity` goes, chosen by lot, `height` rows at a time.
fn chosen(rows: usize, cols: usize, height: usize, sparsity: f64) -> Mask {
    let mut rng = Rng::new(2);
    let keep: Vec<bool> =
        (0..rows.div_ceil(height) * cols).map(|_| rng.below(1000) as f64 >= 1000.0 * sparsity).collect();
    Mask::from_fn(rows, cols, |r, c| keep[r / height * cols + c])
}

fn one(piece: Piece) -> Stored {
    Stored::from_piece(piece)
}

fn float(rows: usize, cols: usize, float: Float, mask: Option<(usize, f64)>) -> Stored {
    let mask = mask.map(|(height, sparsity)| (height, chosen(rows, cols, height, sparsity)));
    let kind = mask.as_ref().map_or(PatternKind::Dense, |(height, _)| PatternKind::Mask { height: *height });
    one(pack_float(random(rows, cols).view(), mask.as_ref().map(|(_, m)| m), kind, float).expect("packs"))
}

fn integers(rows: usize, cols: usize, bits: u8) -> Integers {
    let mut rng = Rng::new(3);
    Integers {
        rows,
        cols,
        bits,
        codes: (0..rows * cols).map(|_| rng.below(1 << bits) as u8).collect(),
        scales: Mat::from_fn(rows, cols.div_ceil(32), |r, g| 0.01 + ((r + g) % 7) as f32 * 1e-3),
        zeros: None,
        offsets: None,
        group: Group::Run(32),
    }
}

fn ints(rows: usize, cols: usize, bits: u8, height: Option<usize>) -> Stored {
    let mask = height.map(|h| chosen(rows, cols, h, 0.5));
    let kind = height.map_or(PatternKind::Dense, |height| PatternKind::Mask { height });
    one(pack_integers(&integers(rows, cols, bits), mask.as_ref(), kind, ScaleCodec::F16).expect("packs"))
}

fn half(rows: usize, cols: usize) -> Stored {
    let mask = Mask::from_fn(rows, cols, |r, c| (c + r + c / 4) % 4 < 2);
    let kind = PatternKind::Nm { n: 2, m: 4 };
    one(pack_integers(&integers(rows, cols, 4), Some(&mask), kind, ScaleCodec::F16).expect("packs"))
}

fn ternary(rows: usize, cols: usize) -> Stored {
    let mut rng = Rng::new(4);
    let q = Ternary {
        codes: (0..rows * cols).map(|_| rng.below(3) as i8 - 1).collect(),
        scales: integers(rows, cols, 2).scales,
        group: Group::Run(32),
    };
    one(pack_ternary((rows, cols), &q, None, PatternKind::Dense, ScaleCodec::F16).expect("packs"))
}

/// Random bytes but for the scale over each block.
fn q6_k(rows: usize, cols: usize) -> Stored {
    let mut rng = Rng::new(5);
    let blocks = rows * cols.div_ceil(256);
    let mut bytes: Vec<u8> = (0..blocks * GgufType::Q6_K.block_bytes()).map(|_| rng.u64() as u8).collect();
    for block in bytes.chunks_exact_mut(GgufType::Q6_K.block_bytes()) {
        block[208..].copy_from_slice(&half::f16::from_f32(1e-4).to_le_bytes());
    }
    one(Piece { rows, cols, pattern: Pattern::Dense, values: Values::Gguf(GgufType::Q6_K, bytes.into()) })
}

fn lists(rows: usize, cols: usize) -> Stored {
    one(pack_float(random(rows, cols).view(), Some(&chosen(rows, cols, 1, 0.99)), PatternKind::Csr, Float::F16)
        .expect("packs"))
}

/// Two factors with so large a share of the matrix's weights.
fn low_rank(rows: usize, cols: usize, kept: f64) -> Stored {
    let rank = ((rows * cols) as f64 * kept) as usize / (rows + cols);
    let rank = rank.next_multiple_of(32);
    let piece = |r, c| pack_integers(&integers(r, c, 4), None, PatternKind::Dense, ScaleCodec::F16).expect("packs");
    Stored::new(rows, cols, vec![Term::Product(piece(rows, rank), piece(rank, cols))])
}

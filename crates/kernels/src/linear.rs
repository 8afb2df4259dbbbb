//! A stored matrix ready to multiply.

use std::sync::Arc;

use lacuna_base::{MatMut, MatRef};
use lacuna_format::{FormatError, Piece, Stored, Term, Values};

use crate::Isa;
use crate::op::matmul::{Decode, Direct, Out, Product, Rows, padded, tile_rows};
use crate::parallel;
use crate::scratch;
use crate::simd::dispatch;
use crate::tile::{AnyTile, Plain, Tile};

/// Rows of x from which decoding a tile once beats decoding it anew for every row.
const DECODE_FROM: usize = 2;

/// A matrix `W`, `[outputs, inputs]`, ready to multiply: `x · Wᵀ`.
///
/// A result depends on its own row of `x`, on the matrix and on the instruction set: not on the other rows, their number or the threads.
#[derive(Clone)]
pub struct Linear {
    rows: usize,
    cols: usize,
    terms: Vec<Ready>,
    bytes: u64,
    isa: Isa,
}

/// A summand ready to multiply.
#[derive(Clone)]
enum Ready {
    /// Straight from its codes.
    Tile(AnyTile),
    /// Decoded by `lacuna-format` a tile of rows at a time.
    Decoded(Arc<Stored>),
    /// Right factor first, then left.
    Product { left: Box<Linear>, right: Box<Linear> },
}

impl Linear {
    /// Makes a stored matrix ready for this processor. Buffers are shared with it, not copied.
    pub fn pack(stored: &Stored) -> Result<Linear, FormatError> {
        Linear::pack_for(stored, Isa::best())
    }

    /// As [`Linear::pack`] for one instruction set. Panics later, at the product, where the processor lacks it.
    pub fn pack_for(stored: &Stored, isa: Isa) -> Result<Linear, FormatError> {
        stored.check()?;
        let one =
            |piece: &Piece| Stored { rows: piece.rows, cols: piece.cols, terms: vec![Term::Piece(piece.clone())] };
        let mut terms = Vec::with_capacity(stored.terms.len());
        for term in &stored.terms {
            terms.push(match term {
                Term::Piece(p) => match AnyTile::new(p) {
                    Some(tile) => Ready::Tile(tile),
                    None => Ready::Decoded(Arc::new(one(p))),
                },
                Term::Product(l, r) => Ready::Product {
                    left: Box::new(Linear::pack_for(&one(l), isa)?),
                    right: Box::new(Linear::pack_for(&one(r), isa)?),
                },
            });
        }
        Ok(Linear { rows: stored.rows, cols: stored.cols, terms, bytes: stored_bytes(stored), isa })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of weights read for one row of `x`.
    pub fn weights_bytes(&self) -> u64 {
        self.bytes
    }

    /// The codec of each term and whether it multiplies straight from its codes, for reports.
    pub fn describe(&self) -> Vec<&'static str> {
        self.terms
            .iter()
            .map(|t| match t {
                Ready::Tile(t) => t.name(),
                Ready::Decoded(_) => "decoded",
                Ready::Product { .. } => "product",
            })
            .collect()
    }

    /// `x · Wᵀ`: `x` is `[n, inputs]`, `out` `[n, outputs]`, overwritten. Panics where the shapes do not fit.
    ///
    /// A NaN or infinity in a row of `x` or of `W` reaches the results that it takes part in and no others.
    #[track_caller]
    pub fn forward(&self, x: MatRef<'_>, out: MatMut<'_>) {
        self.run(x, out, false);
    }

    #[track_caller]
    fn run(&self, x: MatRef<'_>, mut out: MatMut<'_>, mut add: bool) {
        assert_eq!(x.cols(), self.cols, "x has {} columns, the matrix {}", x.cols(), self.cols);
        assert_eq!((out.rows(), out.cols()), (x.rows(), self.rows), "the result has another shape");
        if x.rows() == 0 || self.rows == 0 {
            return;
        }
        if self.terms.is_empty() && !add {
            (0..out.rows()).for_each(|r| out.row_mut(r).fill(0.0));
        }
        for term in &self.terms {
            match term {
                Ready::Tile(tile) => self.tile(tile, x, &mut out, add),
                Ready::Decoded(stored) => self.decoded(stored, x, &mut out, add),
                Ready::Product { left, right } => {
                    let mut inner = vec![0.0; x.rows() * right.rows];
                    right.run(x, MatMut::new(x.rows(), right.rows, &mut inner), false);
                    left.run(MatRef::new(x.rows(), right.rows, &inner), out.reborrow(), add);
                }
            }
            add = true;
        }
    }

    fn tile(&self, tile: &AnyTile, x: MatRef<'_>, out: &mut MatMut<'_>, add: bool) {
        match tile {
            AnyTile::F32(bytes) => self.plain(bytes, x, out, add),
            AnyTile::F16(t) => self.encoded(t, x, out, add),
            AnyTile::Bf16(t) => self.encoded(t, x, out, add),
            AnyTile::Int4(t) => self.encoded(t, x, out, add),
            AnyTile::Int8(t) => self.encoded(t, x, out, add),
            AnyTile::Q4_0(t) => self.encoded(t, x, out, add),
            AnyTile::Q4_1(t) => self.encoded(t, x, out, add),
            AnyTile::Q8_0(t) => self.encoded(t, x, out, add),
        }
    }

    fn plain(&self, bytes: &[u8], x: MatRef<'_>, out: &mut MatMut<'_>, add: bool) {
        assert_eq!(bytes.len(), self.rows * self.cols * 4, "checked when packed");
        let (rows, out) = (rows_of(x), out_of(out, add));
        // Where x has many rows a task's share of the matrix is cut to a cache's size; one row streams through it once.
        let most = if x.rows() < DECODE_FROM { usize::MAX } else { tile_rows(self.cols) };
        parallel::ranges(self.rows, 4, most, x.rows() * self.cols, |from, to| {
            let tile = Plain { data: bytes[from * self.cols * 4..].as_ptr(), stride: self.cols };
            dispatch(self.isa, Product { tile, rows: to - from, column: from, x: rows, out });
        });
    }

    fn encoded<T: Tile>(&self, tile: &T, x: MatRef<'_>, out: &mut MatMut<'_>, add: bool) {
        if x.rows() < DECODE_FROM {
            let (rows, out) = (rows_of(x), out_of(out, add));
            return parallel::ranges(self.rows, 4, usize::MAX, x.rows() * self.cols, |from, to| {
                dispatch(self.isa, Direct { tile, from, to, x: rows, out });
            });
        }
        self.through_tiles(x, out, add, |from, n, buffer, stride| {
            dispatch(self.isa, Decode { tile, from, n, cols: self.cols, out: buffer, stride });
        });
    }

    fn decoded(&self, stored: &Stored, x: MatRef<'_>, out: &mut MatMut<'_>, add: bool) {
        self.through_tiles(x, out, add, |from, n, buffer, stride| {
            stored.decode_rows(from, from + n, MatMut::with_stride(n, self.cols, stride, buffer));
        });
    }

    /// Decodes a tile of rows with `fill(first row, rows, buffer, stride)` and multiplies it with every row of x before the next.
    fn through_tiles(
        &self,
        x: MatRef<'_>,
        out: &mut MatMut<'_>,
        add: bool,
        fill: impl Fn(usize, usize, &mut [f32], usize) + Sync,
    ) {
        let (rows, out, stride) = (rows_of(x), out_of(out, add), padded(self.cols));
        // Decoding costs about as much as eight rows.
        parallel::ranges(self.rows, 4, tile_rows(self.cols), (x.rows() + 8) * self.cols, |from, to| {
            scratch::with((to - from) * stride, |buffer| {
                fill(from, to - from, buffer, stride);
                let tile = Plain { data: buffer.as_ptr().cast(), stride };
                dispatch(self.isa, Product { tile, rows: to - from, column: from, x: rows, out });
            });
        });
    }
}

fn rows_of(x: MatRef<'_>) -> Rows {
    Rows { data: x.raw().as_ptr(), stride: x.stride(), rows: x.rows(), cols: x.cols() }
}

fn out_of(out: &mut MatMut<'_>, add: bool) -> Out {
    Out { stride: out.stride(), data: out.raw_mut().as_mut_ptr(), add }
}

/// Bytes of every buffer of a stored matrix.
fn stored_bytes(stored: &Stored) -> u64 {
    stored
        .terms
        .iter()
        .map(|t| match t {
            Term::Piece(p) => piece_bytes(p),
            Term::Product(l, r) => piece_bytes(l) + piece_bytes(r),
        })
        .sum()
}

fn piece_bytes(p: &Piece) -> u64 {
    use lacuna_format::{Group, Pattern, Scales};
    let scales = |s: &Scales| match s {
        Scales::Float(_, b) => b.len(),
        Scales::Int { codes, super_scales, super_mins, .. } => {
            codes.len() + super_scales.len() + super_mins.as_ref().map_or(0, |m| m.len())
        }
    };
    let group = |g: &Group| match g {
        Group::Run(_) => 0,
        Group::Index { of, .. } => of.len(),
    };
    let values = match &p.values {
        Values::Float(_, b) | Values::Gguf(_, b) => b.len(),
        Values::Int { codes, scales: s, zeros, group: g, .. } => {
            codes.len() + scales(s) + zeros.as_ref().map_or(0, |z| z.len()) + group(g)
        }
        Values::Codebook { codes, table, scales: s, .. } => {
            codes.len() + 4 * table.len() + s.as_ref().map_or(0, |(s, g)| scales(s) + group(g))
        }
        Values::Ternary { codes, scales: s, group: g } => codes.len() + scales(s) + group(g),
    };
    let pattern = match &p.pattern {
        Pattern::Dense => 0,
        Pattern::Nm { index, .. } => index.len(),
        Pattern::Mask { bits, starts, .. } => bits.len() + starts.len(),
        Pattern::Csr { starts, columns } | Pattern::Blocks { starts, columns, .. } => starts.len() + columns.len(),
    };
    (values + pattern) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::PRODUCT_TOLERANCE;
    use half::{bf16, f16};
    use lacuna_base::testkit::random;
    use lacuna_base::{Mat, Rng};
    use lacuna_format::bits::pack;
    use lacuna_format::{Bytes, Float, GgufType, Group, Pattern, Scales};

    fn floats(m: &Mat, float: Float) -> Bytes {
        let one = |x: &f32| match float {
            Float::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            Float::Bf16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
            Float::F32 => x.to_le_bytes().to_vec(),
            Float::F8E4m3 | Float::F8E5m2 => vec![(x.to_bits() >> 24) as u8 & 0xB7],
        };
        Bytes::from(m.data().iter().flat_map(one).collect::<Vec<u8>>())
    }

    fn dense(rows: usize, cols: usize, values: Values) -> Stored {
        Stored { rows, cols, terms: vec![Term::Piece(Piece { rows, cols, pattern: Pattern::Dense, values })] }
    }

    fn ints(rows: usize, cols: usize, bits: u8, run: usize, zeros: bool, float: Float, rng: &mut Rng) -> Stored {
        let groups = cols.div_ceil(run);
        let codes: Vec<u8> = (0..rows * cols).map(|_| (rng.u64() as u8) & (0xFFu16 >> (8 - bits)) as u8).collect();
        // Every seventh group is all zeros.
        let scales = Mat::from_fn(rows, groups, |r, g| if (r + g) % 7 == 6 { 0.0 } else { rng.normal() * 0.1 });
        let z: Vec<u8> = (0..rows * groups).map(|_| (rng.u64() as u8) & (0xFFu16 >> (8 - bits)) as u8).collect();
        dense(
            rows,
            cols,
            Values::Int {
                bits,
                codes: Bytes::from(pack(&codes, bits)),
                scales: Scales::Float(float, floats(&scales, float)),
                zeros: zeros.then(|| Bytes::from(pack(&z, bits))),
                group: Group::Run(run),
            },
        )
    }

    fn gguf(rows: usize, cols: usize, kind: GgufType, rng: &mut Rng) -> Stored {
        let blocks = rows * cols / kind.block();
        let mut bytes: Vec<u8> = (0..blocks * kind.block_bytes()).map(|_| rng.u64() as u8).collect();
        // Wherever a block keeps its f16 scales, random bits there stay finite: the exponent's top bit off.
        for b in bytes.chunks_mut(kind.block_bytes()) {
            let n = b.len();
            for at in [0, 2, n - 2, n - 4] {
                b[at + 1] &= 0x2F;
            }
        }
        dense(rows, cols, Values::Gguf(kind, Bytes::from(bytes)))
    }

    fn sparse(rows: usize, cols: usize) -> Stored {
        let mut starts = vec![0u32];
        let (mut columns, mut values) = (Vec::new(), Vec::new());
        for r in 0..rows {
            // Row 1 is empty.
            for c in (0..cols).filter(|c| r != 1 && (c * 7 + r) % 5 == 0) {
                columns.extend((c as u16).to_le_bytes());
                values.push((c as f32 - r as f32) * 0.1);
            }
            starts.push(values.len() as u32);
        }
        let m = Mat::from_vec(1, values.len(), values);
        let pattern = Pattern::Csr {
            starts: Bytes::from(starts.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<_>>()),
            columns: Bytes::from(columns),
        };
        let values = Values::Float(Float::F16, floats(&m, Float::F16));
        Stored { rows, cols, terms: vec![Term::Piece(Piece { rows, cols, pattern, values })] }
    }

    /// Matrices of every kind in awkward shapes.
    fn cases() -> Vec<(String, Stored)> {
        let mut rng = Rng::new(5);
        let mut out = Vec::new();
        for (rows, cols) in [(1, 1), (3, 31), (7, 33), (5, 64), (130, 96), (9, 577)] {
            for float in [Float::F32, Float::F16, Float::Bf16, Float::F8E4m3] {
                let w = random(rows, cols, rng.u64());
                out.push((format!("{float:?}"), dense(rows, cols, Values::Float(float, floats(&w, float)))));
            }
            out.push(("csr".into(), sparse(rows, cols)));
            let piece = |m: &Mat, float| {
                let values = Values::Float(float, floats(m, float));
                Piece { rows: m.rows(), cols: m.cols(), pattern: Pattern::Dense, values }
            };
            let (l, r) = (random(rows, 3, rng.u64()), random(3, cols, rng.u64()));
            let mut sum = sparse(rows, cols);
            sum.terms.push(Term::Product(piece(&l, Float::F16), piece(&r, Float::F32)));
            sum.terms.push(Term::Piece(piece(&random(rows, cols, rng.u64()), Float::F16)));
            out.push(("csr + product + f16".into(), sum));
            for bits in 2..=8 {
                out.push((format!("int{bits} run 5"), ints(rows, cols, bits, 5, true, Float::F16, &mut rng)));
            }
        }
        for (rows, cols) in [(1, 32), (6, 96), (133, 256), (11, 2048)] {
            for (bits, run, zeros, float) in [
                (4, 32, false, Float::F16),
                (4, 64, true, Float::F32),
                (8, 32, true, Float::Bf16),
                (8, cols, false, Float::F16),
                (4, 32, true, Float::F16),
                (3, 32, false, Float::F16),
            ] {
                let name = format!("int{bits} run {run} zeros {zeros} {float:?}");
                out.push((name, ints(rows, cols, bits, run, zeros, float, &mut rng)));
            }
            for kind in [GgufType::Q4_0, GgufType::Q4_1, GgufType::Q8_0, GgufType::Q5_0, GgufType::Q6_K, GgufType::Q4_K]
            {
                if cols % kind.block() == 0 {
                    out.push((format!("{kind:?}"), gguf(rows, cols, kind, &mut rng)));
                }
            }
        }
        out.push(("nothing".into(), Stored { rows: 4, cols: 8, terms: vec![] }));
        out.push(("no rows".into(), Stored { rows: 0, cols: 8, terms: vec![] }));
        out
    }

    fn forward(l: &Linear, x: MatRef<'_>) -> Mat {
        let mut out = Mat::from_fn(x.rows(), l.rows(), |_, _| f32::NAN);
        l.forward(x, out.view_mut());
        out
    }

    fn bits(m: MatRef<'_>) -> Vec<u32> {
        (0..m.rows()).flat_map(|r| m.row(r).iter().map(|x| x.to_bits()).collect::<Vec<_>>()).collect()
    }

    #[test]
    fn every_kind_on_every_isa_against_f64_and_in_any_company() {
        for (name, stored) in cases() {
            let w = stored.to_mat();
            let x = random(67, stored.cols, 9);
            for isa in Isa::here() {
                let l = Linear::pack_for(&stored, isa).unwrap();
                let y = forward(&l, x.view());
                for r in 0..x.rows() {
                    for o in 0..w.rows() {
                        let terms = || x.row(r).iter().zip(w.row(o)).map(|(a, b)| f64::from(*a) * f64::from(*b));
                        let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        // A sum of terms may cancel: each is as exact as its own size allows.
                        let size = size + if stored.terms.len() > 1 { 100.0 } else { 0.0 };
                        let off = (f64::from(y[(r, o)]) - want).abs();
                        let bound = f64::from(PRODUCT_TOLERANCE) * size + 1e-30;
                        assert!(off <= bound, "{name} {} x {} {isa}: {} for {want}", w.rows(), w.cols(), y[(r, o)]);
                    }
                }
                for step in [1, 2, 3, 7, 16, 64] {
                    let mut from = 0;
                    while from < x.rows() {
                        let to = (from + step).min(x.rows());
                        let part = forward(&l, x.view().rows_range(from, to));
                        assert_eq!(bits(part.view()), bits(y.view().rows_range(from, to)), "{name} {isa} step {step}");
                        from = to;
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_decode_to_the_bits_of_the_format() {
        for (name, stored) in cases().into_iter().filter(|(_, s)| s.terms.len() == 1) {
            let (w, one) = (stored.to_mat(), Mat::identity(stored.cols));
            for isa in Isa::here() {
                let l = Linear::pack_for(&stored, isa).unwrap();
                for step in [1, 64] {
                    for from in (0..one.rows()).step_by(step).take(40) {
                        let to = (from + step).min(one.rows());
                        let y = forward(&l, one.view().rows_range(from, to));
                        for (c, o) in (from..to).flat_map(|c| (0..w.rows()).map(move |o| (c, o))) {
                            // A sum with zeros forgets the sign of a zero and nothing else.
                            assert_eq!(y[(c - from, o)] + 0.0, w[(o, c)] + 0.0, "{name} {isa} ({o}, {c})");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        let mut rng = Rng::new(1);
        let w = random(700, 300, 1);
        for stored in [
            dense(700, 300, Values::Float(Float::F16, floats(&w, Float::F16))),
            ints(700, 320, 4, 32, false, Float::F16, &mut rng),
        ] {
            let l = Linear::pack(&stored).unwrap();
            for rows in [1, 40] {
                let x = random(rows, stored.cols, 2);
                let one = pool(1).install(|| forward(&l, x.view()));
                for n in [2, 5] {
                    assert_eq!(bits(pool(n).install(|| forward(&l, x.view())).view()), bits(one.view()));
                }
            }
        }
    }

    #[test]
    fn not_a_number_stays_in_its_row_and_output() {
        let mut w = random(9, 70, 1);
        w[(4, 69)] = f32::INFINITY;
        let mut x = random(8, 70, 2);
        x[(3, 7)] = f32::NAN;
        for isa in Isa::here() {
            let y = forward(
                &Linear::pack_for(&dense(9, 70, Values::Float(Float::F32, floats(&w, Float::F32))), isa).unwrap(),
                x.view(),
            );
            for r in 0..8 {
                for o in 0..9 {
                    assert_eq!(y[(r, o)].is_finite(), r != 3 && o != 4, "{isa} ({r}, {o})");
                }
            }
        }
    }

    #[test]
    fn bytes_and_refusals() {
        let mut rng = Rng::new(1);
        assert_eq!(Linear::pack(&ints(4, 64, 4, 32, false, Float::F16, &mut rng)).unwrap().weights_bytes(), 128 + 16);
        let short = dense(2, 4, Values::Float(Float::F32, Bytes::from(vec![0; 31])));
        assert!(Linear::pack(&short).is_err());
    }
}

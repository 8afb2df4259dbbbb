//! The conformance suite of products.

mod tiles;

use half::{bf16, f16};
use lacuna_base::testkit::random;
use lacuna_base::{Mat, MatRef, Rng};
use lacuna_format::bits::{pack, pack_trits};
use lacuna_format::gguf::ALL;
use lacuna_format::{
    Bytes, Float, FormatError, GgufType, Group, Integers, Map, Mask, Owner, Pattern, PatternKind, Piece, ScaleCodec,
    Scales, Signed, Stored, Tables, Term, Values, Zeros, hadamard_parts, pack_float, pack_integers, pack_integers_off,
    pack_multiples, pack_scales,
};

use super::{Activations, Group as Rows, Linear, Packing, Transposed};
use crate::Isa;
use crate::table::PRODUCT_TOLERANCE;

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
    Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values })
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
            zeros: zeros.then(|| pack(&z, bits).into()),
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

/// Codes of every kind that has a table or three levels.
fn tables(rows: usize, cols: usize, run: usize, rng: &mut Rng) -> Vec<(String, Stored)> {
    let group = || Group::Run(run);
    let scales = Mat::from_fn(rows, cols.div_ceil(run), |_, _| rng.normal());
    let scales_of = |float| Scales::Float(float, floats(&scales, float));
    let scales = || scales_of(Float::F16);
    let mut out = Vec::new();
    for bits in [1u8, 3, 4, 8] {
        let codes: Vec<u8> = (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
        let table: Vec<f32> = (0..1 << bits).map(|_| rng.normal()).collect();
        for float in [None, Some(Float::F16), Some(Float::F8E4m3), Some(Float::F8E5m2)] {
            let name = format!("codebook {bits} scales {float:?}");
            let s = float.map(|f| (scales_of(f), group()));
            let codes = Bytes::from(pack(&codes, bits));
            out.push((
                name,
                dense(rows, cols, Values::Codebook { bits, codes, tables: Tables::one(&table), scales: s }),
            ));
        }
    }
    for (bits, float) in [(3u8, Float::F16), (3, Float::F32), (4, Float::F16), (4, Float::F32), (5, Float::F32)] {
        for owner in [Owner::Row, Owner::Group(run)] {
            let codes: Vec<u8> = (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
            let tables = Mat::from_fn(owner.count(rows, cols).unwrap(), 1 << bits, |_, _| rng.normal());
            let tables = Tables { owner, float, bytes: floats(&tables, float) };
            let values = Values::Codebook { bits, codes: pack(&codes, bits).into(), tables, scales: None };
            out.push((format!("codebook {bits} {owner:?} {float:?}"), dense(rows, cols, values)));
        }
    }
    // Scales that are integers under one f16 for 256 columns, and scales for 16 columns, as GGUF's types below 4 bits
    // and 4-bit floats have them.
    for (bits, run, float) in [(3u8, 16, None), (3, 32, None), (4, 32, None), (4, 16, None), (4, 16, Some(Float::F32))]
    {
        let n = cols.div_ceil(run);
        let codes: Vec<u8> = (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
        let table: Vec<f32> = (0..1 << bits).map(|_| rng.normal()).collect();
        let per = 256 / run;
        let supers = Mat::from_fn(rows, n.div_ceil(per), |_, _| rng.normal());
        let five: Vec<u8> = (0..rows * n).map(|_| (rng.u64() % 32) as u8).collect();
        let plain = Mat::from_fn(rows, n, |_, _| rng.normal());
        let scales = match float {
            Some(float) => Scales::Float(float, floats(&plain, float)),
            None => Scales::Int {
                bits: 5,
                per,
                codes: pack(&five, 5).into(),
                super_scales: floats(&supers, Float::F16),
                super_mins: None,
            },
        };
        let scales = Some((scales, Group::Run(run)));
        let values = Values::Codebook { bits, codes: pack(&codes, bits).into(), tables: Tables::one(&table), scales };
        out.push((format!("codebook {bits} run {run} {float:?}"), dense(rows, cols, values)));
    }
    let trits: Vec<i8> = (0..rows * cols).map(|_| (rng.u64() % 3) as i8 - 1).collect();
    let codes = Bytes::from(pack_trits(&trits));
    out.push(("ternary".into(), dense(rows, cols, Values::Ternary { codes, scales: scales(), group: group() })));
    out
}

/// Matrices under every pattern, in f16, f32, bf16 and int4.
fn patterns(rows: usize, cols: usize, rng: &mut Rng) -> Vec<(String, Stored)> {
    let w = random(rows, cols, rng.u64());
    let mut kinds = vec![];
    for height in [1, 4, 8, 16, 32] {
        kinds.push(PatternKind::Mask { height });
    }
    if cols.is_multiple_of(8) {
        kinds.extend([(2, 4), (4, 8), (1, 4), (1, 2), (2, 8)].map(|(n, m)| PatternKind::Nm { n, m }));
        if rows.is_multiple_of(8) {
            let sizes = [(8, 1), (16, 8), (4, 4)].into_iter().filter(|(h, _)| rows.is_multiple_of(*h));
            kinds.extend(sizes.map(|(height, width)| PatternKind::Blocks { height, width }));
        }
    }
    kinds.push(PatternKind::Csr);
    let mut out = Vec::new();
    for kind in kinds {
        let keep = |r: usize, c: usize| {
            let hash = |a: usize| (a.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) % 100;
            match kind {
                PatternKind::Nm { n, m } => {
                    c % usize::from(m) < usize::from(n) + (r % 2)
                        && (!c.is_multiple_of(m.into()) || r.is_multiple_of(2))
                }
                // The third group of rows keeps nothing.
                PatternKind::Mask { height } => r / height != 2 && hash(r / height * 7919 + c) < 45,
                PatternKind::Blocks { height, width } => hash(r / height * 7919 + c / width) < 40,
                _ => r != 1 && hash(r * 7919 + c) < 8,
            }
        };
        let mask = Mask::from_fn(rows, cols, keep);
        for float in [Float::F16, Float::F32, Float::Bf16, Float::F8E5m2] {
            let piece = pack_float(w.view(), Some(&mask), kind, float).unwrap();
            out.push((format!("{kind:?} {float:?}"), Stored::from_piece(piece)));
        }
        for (bits, run, zeros) in [(4, 32, false), (4, 64, true), (8, cols, false), (3, 32, false), (4, cols, true)] {
            let groups = cols.div_ceil(run);
            let any = |rng: &mut Rng, n: usize| (0..n).map(|_| rng.u64() as u8 >> (8 - bits)).collect::<Vec<u8>>();
            let q = Integers {
                rows,
                cols,
                bits,
                codes: any(rng, rows * cols),
                scales: Mat::from_fn(rows, groups, |_, _| rng.normal()),
                zeros: zeros.then(|| any(rng, rows * groups)),
                group: Group::Run(run),
                offsets: None,
            };
            let piece = pack_integers(&q, Some(&mask), kind, ScaleCodec::F16).unwrap();
            out.push((format!("{kind:?} int{bits} run {run} zeros {zeros}"), Stored::from_piece(piece)));
        }
    }
    out
}

fn sparse(rows: usize, cols: usize) -> Stored {
    let mut starts = vec![0u32];
    let (mut columns, mut values) = (Vec::new(), Vec::new());
    for r in 0..rows {
        // Row 1 is empty, row 5 full, the others of like length.
        for c in (0..cols).filter(|c| r != 1 && (r == 5 || (c * 7 + r) % 5 == 0)) {
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
    Stored::from_piece(Piece { rows, cols, pattern, values })
}

/// Sums of terms that one pass multiplies, and some that it does not.
fn sums(rng: &mut Rng) -> Vec<(String, Stored)> {
    let mut out = Vec::new();
    for (rows, cols) in [(18, 96), (300, 544), (4, 32)] {
        let w = random(rows, cols, rng.u64());
        let float = |m: &Mat, float| {
            let values = Values::Float(float, floats(m, float));
            Piece { rows: m.rows(), cols: m.cols(), pattern: Pattern::Dense, values }
        };
        let one = |s: Stored| -> Piece { s.single().unwrap().clone() };
        let csr = |float: Float, every: usize| {
            let mask = Mask::from_fn(rows, cols, |r, c| (r * 31 + c * 7) % every == 0 || (r == 3 && c % 2 == 0));
            Term::Piece(pack_float(w.view(), Some(&mask), PatternKind::Csr, float).unwrap())
        };
        let rank = 40;
        let thin = [random(rows, rank, rng.u64()), random(rank, cols, rng.u64())];
        let halves = || Term::Product(float(&thin[0], Float::F16), float(&thin[1], Float::F16));
        let left = one(ints(rows, rank, 8, 64, false, Float::F16, rng));
        let codes = |right: Piece| Term::Product(left.clone(), right);
        let int4 = one(ints(rows, cols, 4, 32, false, Float::F16, rng));
        let tabled = tables(rows, cols, 32, rng).into_iter().find(|(n, _)| n == "codebook 3 Row F16").unwrap().1;
        let mask = Mask::from_fn(rows, cols, |r, c| (r / 16 + c) % 2 == 0);
        let shared = pack_float(w.view(), Some(&mask), PatternKind::Mask { height: 16 }, Float::F16).unwrap();
        let int3 = one(ints(rows, cols, 3, 32, false, Float::F16, rng));
        let all = [
            ("int4 + csr", vec![Term::Piece(int4.clone()), csr(Float::F16, 190)]),
            ("int4 + csr f32 + product", vec![Term::Piece(int4.clone()), csr(Float::F32, 50), halves()]),
            ("int4 + product of codes", vec![Term::Piece(int4.clone()), codes(float(&thin[1], Float::F32))]),
            ("table of rows + csr", vec![Term::Piece(one(tabled)), csr(Float::F16, 190)]),
            ("masks + csr + int4", vec![Term::Piece(shared), csr(Float::F16, 40), Term::Piece(int4.clone())]),
            ("csr + int4", vec![csr(Float::F16, 40), Term::Piece(int4.clone())]),
            ("two zeros", vec![Term::Piece(int4.clone()), Term::Piece(int3)]),
            ("many", vec![Term::Piece(int4); 9]),
        ];
        out.extend(all.map(|(name, terms)| (name.to_owned(), Stored::new(rows, cols, terms))));
    }
    out
}

/// Stacks of signs times products, their factors in bytes or in anything.
fn stacks(rng: &mut Rng) -> Vec<(String, Stored)> {
    let mut out = Vec::new();
    for (rows, cols, rank) in [(1, 1, 1), (18, 97, 3), (70, 544, 16), (300, 40, 1), (33, 601, 20)] {
        let one = |s: Stored| -> Piece { s.single().unwrap().clone() };
        let bytes = |r: usize, c: usize, rng: &mut Rng| one(ints(r, c, 8, c, false, Float::F16, rng));
        let turned = Mask::from_fn(rows, cols, |_, _| rng.below(2) == 0);
        let [codes, more] = [0; 2].map(|_| {
            let (left, right) = (bytes(rows, rank, rng), bytes(rank, cols, rng));
            Term::Signed(Signed::new(&turned, left, right))
        });
        let thin = |r: usize, c: usize, rng: &mut Rng| {
            pack_float(random(r, c, rng.u64()).view(), None, PatternKind::Dense, Float::F16).unwrap()
        };
        let floats = Term::Signed(Signed::new(&turned, thin(rows, rank, rng), thin(rank, cols, rng)));
        let mixed = Signed::new(&turned, thin(rows, rank, rng), bytes(rank, cols, rng));
        let stored = |terms| Stored::new(rows, cols, terms);
        out.push((format!("signs of rank {rank}"), stored(vec![codes.clone()])));
        out.push((format!("signs of floats, rank {rank}"), stored(vec![floats.clone()])));
        out.push((format!("signs of both, rank {rank}"), stored(vec![Term::Signed(mixed)])));
        let d: Vec<f32> = (0..cols).map(|c| 0.5 + c as f32 / cols as f32).collect();
        let scaled = stored(vec![codes, more, floats]).with_maps(vec![Map::diagonal(&d, Float::F16).unwrap()], vec![]);
        out.push((format!("a stack of rank {rank}"), scaled));
    }
    out
}

/// Matrices with every map at either end.
fn between_maps(rng: &mut Rng) -> Vec<(String, Stored)> {
    let mut out = Vec::new();
    for n in [1, 24, 96, 384, 352, 512] {
        let mut index: Vec<u32> = (0..n as u32).collect();
        (1..n).rev().for_each(|i| index.swap(i, rng.below(i + 1)));
        let signs: Vec<bool> = (0..n).map(|_| rng.below(2) == 0).collect();
        let normal = |n: usize, rng: &mut Rng| (0..n).map(|_| rng.normal()).collect::<Vec<f32>>();
        let mut maps = vec![
            Map::permutation(&index),
            Map::diagonal(&normal(n, rng), Float::F32).unwrap(),
            Map::diagonal(&normal(n, rng), Float::F16).unwrap(),
        ];
        for size in (1..=n).filter(|s| n.is_multiple_of(*s)) {
            if hadamard_parts(size).is_some() {
                maps.push(Map::hadamard(size, (size % 8 > 0 || size == n).then_some(&signs[..])));
            }
            if [1, 6, 32, 96].contains(&size) {
                maps.push(Map::dense(size, &normal(size * size, rng), Float::F16).unwrap());
            }
        }
        let w = |rows: usize, cols: usize, rng: &mut Rng| {
            let w = random(rows, cols, rng.u64());
            dense(rows, cols, Values::Float(Float::F32, floats(&w, Float::F32)))
        };
        for map in &maps {
            out.push((format!("in {}", map.name()), w(9, n, rng).with_maps(vec![map.clone()], vec![])));
            out.push((format!("out {}", map.name()), w(n, 9, rng).with_maps(vec![], vec![map.clone()])));
        }
        let few = |rng: &mut Rng| (0..3).map(|_| maps[rng.below(maps.len())].clone()).collect::<Vec<_>>();
        let (input, output) = (few(rng), few(rng));
        let name = format!("{} x {n} between chains", n);
        out.push((name, w(n, n, rng).with_maps(input, output)));
    }
    out
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
        for bits in 2..=8 {
            let name = format!("int{bits} run 32");
            out.push((name, ints(rows, cols, bits, 32, bits % 2 == 0, Float::F16, &mut rng)));
        }
        for (bits, run) in [(3u8, 32), (4, 64), (3, 16)] {
            let codes: Vec<u8> = (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
            let groups = cols.div_ceil(run);
            let numbers = |rng: &mut Rng| Mat::from_fn(rows, groups, |_, _| rng.normal() + 3.0);
            let (scales, zeros) = (numbers(&mut rng), numbers(&mut rng));
            let q = Integers { rows, cols, bits, codes, scales, zeros: None, group: Group::Run(run), offsets: None };
            let codec = ScaleCodec::Int { bits: 3, per: 16 };
            let piece = pack_integers_off(&q, &zeros, None, PatternKind::Dense, codec, codec).unwrap();
            out.push((format!("int{bits} run {run} off"), Stored::from_piece(piece)));
        }
        for (i, (bits, run)) in
            [(4u8, 32), (2, 32), (3, 32), (5, 32), (6, 32), (8, 32), (4, 64)].into_iter().enumerate()
        {
            let n = rows * cols;
            let codes: Vec<u8> = (0..n).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
            let groups = cols.div_ceil(run);
            let mut numbers = || Mat::from_fn(rows, groups, |_, _| rng.normal().abs() + 0.5);
            let (scales, minima) = (numbers(), numbers());
            let per = [8, 24, 16][i % 3];
            let coded = |m: &Mat| pack_multiples(m, [8, 6][i % 2], per).unwrap();
            let floats = |m: &Mat| pack_scales(m, ScaleCodec::F16).unwrap();
            for (name, s, m) in [("", floats(&scales), floats(&minima)), (" coded", coded(&scales), coded(&minima))] {
                let (zeros, group) = (Some(Zeros::Minima(m)), Group::Run(run));
                let values = Values::Int { bits, codes: pack(&codes, bits).into(), scales: s, zeros, group };
                let piece = Piece { rows, cols, pattern: Pattern::Dense, values };
                piece.check().unwrap();
                out.push((format!("int{bits} run {run} minima{name}"), Stored::from_piece(piece)));
            }
        }
        out.extend(tables(rows, cols, 32, &mut rng));
        if rows == 11 {
            // Beyond whole panels and blocks, and short of them.
            out.extend(tables(18, 577, 32, &mut rng));
            out.extend(tables(3, 5, 32, &mut rng));
        }
        for kind in [
            GgufType::Q4_0,
            GgufType::Q4_1,
            GgufType::Q5_0,
            GgufType::Q5_1,
            GgufType::Q8_0,
            GgufType::Q4_K,
            GgufType::Q5_K,
            GgufType::Q2_K,
            GgufType::Q3_K,
            GgufType::Q6_K,
            GgufType::IQ4_NL,
            GgufType::IQ4_XS,
            GgufType::IQ2_XXS,
            GgufType::IQ2_XS,
            GgufType::IQ2_S,
            GgufType::IQ3_XXS,
            GgufType::IQ3_S,
        ] {
            if cols % kind.block() == 0 {
                out.push((format!("{kind:?}"), gguf(rows, cols, kind, &mut rng)));
            }
        }
    }
    for (rows, cols) in [(1, 31), (40, 96), (17, 601), (64, 1024)] {
        out.extend(patterns(rows, cols, &mut rng));
    }
    // Panels of floats so large that they are read by quarters, the one that keeps nothing too.
    let large = patterns(40, 2408, &mut rng).into_iter();
    out.extend(large.filter(|(name, _)| name.starts_with("Mask") && !name.contains("int")));
    out.extend(sums(&mut rng));
    out.extend(stacks(&mut rng));
    out.extend(between_maps(&mut rng));
    out.push(("nothing".into(), Stored::new(4, 8, vec![])));
    out.push(("no rows".into(), Stored::new(0, 8, vec![])));
    out
}

fn pack_for(stored: &Stored, isa: Isa, activations: Activations) -> Result<Linear, FormatError> {
    Linear::pack_with(stored, &Packing { isa, activations })
}

fn forward(l: &Linear, x: MatRef<'_>) -> Mat {
    let mut out = Mat::from_fn(x.rows(), l.rows(), |_, _| f32::NAN);
    l.forward(x, out.view_mut());
    out
}

fn bits(m: MatRef<'_>) -> Vec<u32> {
    (0..m.rows()).flat_map(|r| m.row(r).iter().map(|x| x.to_bits()).collect::<Vec<_>>()).collect()
}

/// `forward` of parts of x gives the rows of `y`.
fn in_any_company(l: &Linear, x: &Mat, y: &Mat, steps: &[usize], name: &str) {
    for &step in steps {
        let mut from = 0;
        while from < x.rows() {
            let to = (from + step).min(x.rows());
            let part = forward(l, x.view().rows_range(from, to));
            assert_eq!(bits(part.view()), bits(y.view().rows_range(from, to)), "{name} step {step}");
            from = to;
        }
    }
}

#[test]
fn every_kind_on_every_isa_against_f64_and_in_any_company() {
    for (name, stored) in cases() {
        let w = stored.to_mat();
        let x = random(35, stored.cols, 9);
        for isa in Isa::here() {
            let l = pack_for(&stored, isa, Activations::Exact).unwrap();
            let y = forward(&l, x.view());
            for r in 0..x.rows() {
                for o in 0..w.rows() {
                    let terms = || x.row(r).iter().zip(w.row(o)).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    // A sum of terms may cancel: each is as exact as its own size allows.
                    let size = size + if stored.terms.len() > 1 || stored.has_maps() { 100.0 } else { 0.0 };
                    let off = (f64::from(y[(r, o)]) - want).abs();
                    let bound = f64::from(PRODUCT_TOLERANCE) * size + 1e-30;
                    assert!(off <= bound, "{name} {} x {} {isa}: {} for {want}", w.rows(), w.cols(), y[(r, o)]);
                }
            }
            in_any_company(
                &l,
                &x,
                &y,
                if isa == Isa::Portable { &[1, 7] } else { &[1, 2, 3, 7, 16] },
                &format!("{name} {isa}"),
            );
        }
    }
}

#[test]
fn every_kind_from_its_other_side_against_f64_with_any_threads() {
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let mut all = cases();
    // More rows than a panel has, floats that lie at an odd address, a product of a rank that is no panel's.
    let w = random(700, 40, 3);
    all.push(("panels f16".into(), dense(700, 40, Values::Float(Float::F16, floats(&w, Float::F16)))));
    let plain = floats(&w, Float::F32);
    let odd = Bytes::from([&[0u8], &plain[..]].concat()).slice(1..);
    let [plain, odd] = [plain, odd].map(|b| dense(700, 40, Values::Float(Float::F32, b)));
    let dy = random(5, 700, 4);
    let product = |stored: &Stored, dy: &Mat| {
        let mut dx = random(dy.rows(), stored.cols, 8);
        Transposed::new(stored).unwrap().add_product(dy.view(), dx.view_mut());
        dx
    };
    assert_eq!(bits(product(&plain, &dy).view()), bits(product(&odd, &dy).view()), "by address");
    all.push(("panels f32".into(), plain));
    for (name, stored) in all {
        let w = stored.to_mat();
        let dy = random(if stored.cols > 1000 { 3 } else { 35 }, stored.rows, 7);
        let start = random(dy.rows(), stored.cols, 8);
        let dx = product(&stored, &dy);
        for r in 0..dy.rows() {
            for c in 0..w.cols() {
                let terms = || (0..w.rows()).map(|o| f64::from(dy[(r, o)]) * f64::from(w[(o, c)]));
                let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                // What was there is part of the sum; terms of one matrix may cancel.
                let size = size + if stored.terms.len() > 1 { 100.0 } else { 3.0 };
                let off = (f64::from(dx[(r, c)]) - f64::from(start[(r, c)]) - want).abs();
                let bound = f64::from(PRODUCT_TOLERANCE) * size;
                assert!(off <= bound, "{name} {} x {}: off by {off} of {want}", w.rows(), w.cols());
            }
        }
        let single = alone.install(|| product(&stored, &dy));
        assert_eq!(bits(single.view()), bits(dx.view()), "{name} with one thread");
    }
}

#[test]
fn five_hundred_rows_are_five_hundred_single_ones() {
    let mut rng = Rng::new(3);
    let mut all = vec![
        ints(70, 544, 4, 32, false, Float::F16, &mut rng),
        ints(70, 544, 8, 64, true, Float::F16, &mut rng),
        dense(70, 601, Values::Float(Float::F16, floats(&random(70, 601, 1), Float::F16))),
    ];
    all.extend(patterns(24, 544, &mut rng).into_iter().step_by(3).map(|(_, s)| s));
    for stored in all {
        let x = random(512, stored.cols, 9);
        for isa in Isa::here().into_iter().filter(|i| *i != Isa::Portable) {
            for activations in [Activations::Exact, Activations::Int8] {
                let l = pack_for(&stored, isa, activations).unwrap();
                let y = forward(&l, x.view());
                in_any_company(&l, &x, &y, &[1, 2, 7, 16, 64, 100], l.describe()[0]);
            }
        }
    }
}

#[test]
fn what_is_left_out_is_zero_bit_for_bit() {
    let (rows, cols) = (40, 352);
    let mut rng = Rng::new(11);
    let kinds = [8, 16, 32].map(|height| PatternKind::Mask { height });
    let kinds = kinds.into_iter().chain([(1, 2), (2, 4)].map(|(n, m)| PatternKind::Nm { n, m }));
    for (kind, bits, run) in kinds.flat_map(|k| [(k, 4, 32), (k, 4, 96), (k, 8, 64)]) {
        let mask = Mask::from_fn(rows, cols, |r, c| match kind {
            PatternKind::Nm { n, m } => (c + r * 3 + c / 8) % usize::from(m) < n.into(),
            PatternKind::Mask { height } => (r / height * 7919 + c).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 63 == 0,
            _ => unreachable!("of the kinds above"),
        });
        let codes: Vec<u8> = (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
        let scales = Mat::from_fn(rows, cols.div_ceil(run), |_, _| rng.normal());
        let with = |codes, mask, kind| {
            let q = Integers {
                rows,
                cols,
                bits,
                codes,
                scales: scales.clone(),
                zeros: None,
                group: Group::Run(run),
                offsets: None,
            };
            Stored::from_piece(pack_integers(&q, mask, kind, ScaleCodec::F16).unwrap())
        };
        let zero = 1 << (bits - 1);
        let filled = (0..rows * cols).map(|i| if mask.get(i / cols, i % cols) { codes[i] } else { zero }).collect();
        let (sparse, dense) = (with(codes, Some(&mask), kind), with(filled, None, PatternKind::Dense));
        let x = random(100, cols, 12);
        for isa in Isa::here() {
            let [a, b] = [&sparse, &dense].map(|w| pack_for(w, isa, Activations::Int8).unwrap());
            for n in [1, 3, 100] {
                let x = x.view().rows_range(0, n);
                assert!(
                    bits_equal(&forward(&a, x), &forward(&b, x)),
                    "{kind:?} int{bits} run {run}, {n} rows on {isa}"
                );
            }
        }
    }
}

fn bits_equal(a: &Mat, b: &Mat) -> bool {
    bits(a.view()) == bits(b.view())
}

/// Rows in blocks of 32 columns as the definition in `op::quantize` has them, and how far each value may be from its
/// own.
fn rounded(x: &Mat) -> (Mat, Mat) {
    let (mut q, mut far) = (x.clone(), x.clone());
    for r in 0..x.rows() {
        for (q, far) in q.row_mut(r).chunks_mut(32).zip(far.row_mut(r).chunks_mut(32)) {
            let top = q.iter().fold(0.0f32, |t, v| t.max(v.abs()));
            if top < 1e-30 {
                q.fill(0.0);
                far.fill(top);
                continue;
            }
            let words: Vec<i64> = q.iter().map(|v| (v * (32767.0 / top)).round_ties_even() as i64).collect();
            // A code, and what rounding takes off it in 2^-16 of a step.
            let code = |w: i64, level: i64| (2 * w * level + (1 << 15)).div_euclid(1 << 16);
            let rest = |w: i64, level: i64| 2 * w * level - (code(w, level) << 16);
            // In 512ths of a step, squared.
            let lost = |level: i64| {
                let all: i64 = words.iter().map(|w| rest(*w, level).div_euclid(1 << 7).pow(2)).sum();
                all as f32 * (1.0 / (level * level) as f32)
            };
            let level = (124..=127).rev().reduce(|best, l| if lost(l) < lost(best) { l } else { best }).unwrap();
            let squares: i64 = words.iter().map(|w| code(*w, level).pow(2)).sum();
            // In 4096ths.
            let rests: i64 = words.iter().map(|w| rest(*w, level).div_euclid(1 << 4) * code(*w, level)).sum();
            let step = top / (level as f32 * (32767.0 / 32768.0));
            let scale = step * (1.0 + rests as f32 / squares as f32 / 4096.0);
            let codes = words.iter().map(|w| code(*w, level) as f32);
            for ((q, far), code) in q.iter_mut().zip(far).zip(codes) {
                (*q, *far) = (code * scale, 0.503 * step + code.abs() * (scale - step).abs());
            }
        }
    }
    (q, far)
}

/// Wider steps and scales that suit are worth their while: less error than `max / 127`, on values of many kinds.
#[test]
fn levels_lose_less() {
    for power in [1, 3] {
        let x = Mat::from_fn(200, 64, |r, c| random(200, 64, 3)[(r, c)].powi(power));
        let (q, _) = rounded(&x);
        let (mut ours, mut plain) = (0.0, 0.0);
        for r in 0..x.rows() {
            for (x, q) in x.row(r).chunks(32).zip(q.row(r).chunks(32)) {
                let step = x.iter().fold(0.0f32, |t, v| t.max(v.abs())) / 127.0;
                for (x, q) in x.iter().zip(q) {
                    ours += f64::from(x - q).powi(2);
                    plain += f64::from(x - (x / step).round() * step).powi(2);
                }
            }
        }
        assert!(ours < plain * 0.95, "{ours} of {plain}");
    }
}

#[test]
fn bytes_against_f64_in_any_company_and_the_same_on_every_isa() {
    for (name, stored) in cases() {
        let w = stored.to_mat();
        let mut x = random(19, stored.cols, 9);
        x.row_mut(5).fill(0.0);
        x.row_mut(6).iter_mut().for_each(|v| *v *= 1e-36);
        let (q, far) = rounded(&x);
        let mut first: Option<Vec<u32>> = None;
        for isa in Isa::here() {
            let l = pack_for(&stored, isa, Activations::Int8).unwrap();
            if l.terms.len() != 1 || !l.describe()[0].ends_with(" bytes") {
                continue;
            }
            let y = forward(&l, x.view());
            for r in 0..x.rows() {
                for o in 0..w.rows() {
                    let dot =
                        |a: &[f32]| a.iter().zip(w.row(o)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                    // Minima are apart from what they are added to: what cancels in a weight does not cancel in its
                    // error.
                    let top = w.row(o).iter().fold(0.0f32, |t, v| t.max(v.abs()));
                    let size = q.row(r).iter().map(|a| f64::from(a.abs() * top)).sum::<f64>();
                    let (got, tight) = (f64::from(y[(r, o)]), f64::from(PRODUCT_TOLERANCE) * size + 1e-30);
                    assert!((got - dot(q.row(r))).abs() <= tight, "{name} {isa}: {got} for {}", dot(q.row(r)));
                    let loose: f64 = (0..w.cols()).map(|c| f64::from(far[(r, c)] * w[(o, c)].abs())).sum();
                    let want = dot(x.row(r));
                    assert!((got - want).abs() <= loose + tight, "{name} {isa}: {got} for {want}, bound {loose}");
                }
            }
            in_any_company(&l, &x, &y, &[1, 2, 7, 16], &format!("{name} {isa}"));
            let all = bits(y.view());
            assert!(*first.get_or_insert(all.clone()) == all, "{name} {isa}: other bits than {}", Isa::Portable);
        }
    }
}

#[test]
fn what_should_multiply_as_bytes_does() {
    let mut rng = Rng::new(2);
    let fast = |s: &Stored| pack_for(s, Isa::best(), Activations::Int8).unwrap().describe()[0].ends_with(" bytes");
    for bits in 2..=8 {
        assert!(
            fast(&ints(3, 64, bits, 32, false, Float::F16, &mut rng))
                && !fast(&ints(3, 64, bits, 5, false, Float::F16, &mut rng))
        );
    }
    for kind in [
        GgufType::Q4_0,
        GgufType::Q4_1,
        GgufType::Q5_0,
        GgufType::Q5_1,
        GgufType::Q8_0,
        GgufType::Q3_K,
        GgufType::Q4_K,
        GgufType::Q5_K,
        GgufType::Q6_K,
        GgufType::IQ2_XXS,
        GgufType::IQ2_XS,
        GgufType::IQ2_S,
        GgufType::IQ3_XXS,
        GgufType::IQ3_S,
    ] {
        assert!(fast(&gguf(2, 256, kind, &mut rng)), "{kind:?}");
    }
    for (name, stored) in patterns(40, 96, &mut rng) {
        assert_eq!(fast(&stored), name.contains("int"), "{name}");
        assert_ne!(Linear::pack(&stored).unwrap().describe()[0], "decoded", "{name}");
    }
    assert_eq!(Linear::pack(&sparse(9, 70)).unwrap().describe(), ["lists"]);
    for (name, stored) in tables(20, 200, 32, &mut rng) {
        let what = Linear::pack(&stored).unwrap().describe()[0];
        let row = name.contains("Row") && !name.contains("codebook 5");
        let none = name.contains("Group") || name.contains("codebook 5 Row");
        assert_eq!((what == "row tables", what == "decoded"), (row, none), "{name}: {what}");
    }
}

/// Memory holds as many bits as the file, and a row reads them once.
#[test]
fn indices_into_a_grid_stay_what_they_are() {
    let mut rng = Rng::new(3);
    for kind in ALL.into_iter().filter(|k| k.lattice().is_some()) {
        let stored = gguf(64, 2048, kind, &mut rng);
        for activations in [Activations::Exact, Activations::Int8] {
            let l = pack_for(&stored, Isa::best(), activations).unwrap();
            let (bytes, file) = (l.weights_bytes(), stored.bytes());
            // A panel ends at a cache line.
            assert!(bytes >= file && bytes < file + 4 * 64, "{kind:?}: {bytes} for {file}");
        }
    }
}

#[test]
fn tiles_decode_to_the_bits_of_the_format() {
    // A weight of signs times a product is a sum itself, and rounds as its sum is taken.
    let sums = |s: &Stored| s.terms.len() != 1 || s.has_maps() || matches!(s.terms[..], [Term::Signed(_)]);
    for (name, stored) in cases().into_iter().filter(|(_, s)| !sums(s)) {
        let (w, one) = (stored.to_mat(), Mat::identity(stored.cols));
        for isa in Isa::here() {
            let l = pack_for(&stored, isa, Activations::Exact).unwrap();
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
fn matrices_behind_equal_maps_give_the_bits_that_each_gives_alone() {
    let mut rng = Rng::new(11);
    let n = 96;
    let signs: Vec<bool> = (0..n).map(|i| i % 3 == 0).collect();
    let index: Vec<u32> = (0..n as u32).rev().collect();
    let d: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
    let maps = [
        vec![Map::hadamard(96, Some(&signs))],
        vec![Map::permutation(&index), Map::diagonal(&d, Float::F16).unwrap()],
        vec![Map::hadamard(96, None)],
        vec![Map::dense(2, &[1.0, 2.0, 3.0, 4.0], Float::F32).unwrap()],
        vec![],
    ];
    for (i, j) in (0..maps.len()).flat_map(|i| (0..maps.len()).map(move |j| (i, j))) {
        let (a, b) = (ints(40, n, 4, 32, false, Float::F16, &mut rng), ints(24, n, 4, 32, false, Float::F16, &mut rng));
        let (a, b) = (a.with_maps(maps[i].clone(), vec![]), b.with_maps(maps[j].clone(), vec![Map::hadamard(8, None)]));
        let c = sparse(9, n).with_maps(maps[j].clone(), vec![]);
        for activations in [Activations::Exact, Activations::Int8] {
            let all = [&a, &b, &c, &a].map(|s| pack_for(s, Isa::best(), activations).unwrap());
            for rows in [0, 1, 5] {
                let x = random(rows, n, 3);
                let mut outs = [40, 24, 9, 40].map(|out| random(rows, out, 4));
                let [p, q, r, s] = &mut outs;
                let mut views = [p.view_mut(), q.view_mut(), r.view_mut(), s.view_mut()];
                Linear::forward_all([&all[0], &all[1], &all[2], &all[3]], x.view(), &mut views);
                let mut two = [&all[0], &all[3]].map(|l| random(rows, l.rows(), 5));
                let [p, q] = &mut two;
                Linear::forward_all([&all[0], &all[3]], x.view(), &mut [p.view_mut(), q.view_mut()]);
                for (l, got) in all.iter().zip(&outs).chain([(&all[0], &two[0]), (&all[3], &two[1])]) {
                    assert_eq!(bits(got.view()), bits(forward(l, x.view()).view()), "{i} {j} {activations:?} {rows}");
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
        sparse(700, 320),
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
            &pack_for(&dense(9, 70, Values::Float(Float::F32, floats(&w, Float::F32))), isa, Activations::Exact)
                .unwrap(),
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
    assert_eq!(Linear::pack(&ints(16, 64, 4, 32, false, Float::F16, &mut rng)).unwrap().weights_bytes(), 16 * (32 + 4));
    let short = dense(2, 4, Values::Float(Float::F32, Bytes::from(vec![0; 31])));
    assert!(Linear::pack(&short).is_err());
}

#[test]
fn bytes_of_a_row_with_no_number_are_no_numbers() {
    let mut rng = Rng::new(2);
    let stored = ints(20, 96, 4, 32, true, Float::F16, &mut rng);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = random(5, 96, 2);
        x[(3, 70)] = bad;
        for isa in Isa::here() {
            let y = forward(&pack_for(&stored, isa, Activations::Int8).unwrap(), x.view());
            for (r, o) in (0..5).flat_map(|r| (0..20).map(move |o| (r, o))) {
                assert_eq!(y[(r, o)].is_nan(), r == 3, "{isa} ({r}, {o})");
            }
        }
    }
}

#[test]
fn groups_of_rows_are_as_each_alone() {
    // More groups than threads and fewer, of one row and of several, in f32 and with rows as bytes.
    let mut rng = Rng::new(5);
    for activations in [Activations::Exact, Activations::Int8] {
        let packing = Packing { activations, ..Packing::default() };
        let linears: Vec<[Linear; 2]> = (0..9)
            .map(|_| {
                [48, 33].map(|rows| {
                    let stored = ints(rows, 256, 4, 32, false, Float::F16, &mut rng);
                    Linear::pack_with(&stored, &packing).unwrap()
                })
            })
            .collect();
        for rows in [[1; 9], [3, 1, 7, 40, 1, 2, 5, 1, 30]] {
            let xs: Vec<Mat> = rows.iter().enumerate().map(|(i, &n)| random(n, 256, i as u64)).collect();
            let alone: Vec<[Mat; 2]> = linears
                .iter()
                .zip(&xs)
                .map(|(l, x)| {
                    l.each_ref().map(|l| {
                        let mut out = Mat::zeros(x.rows(), l.rows());
                        l.forward(x.view(), out.view_mut());
                        out
                    })
                })
                .collect();
            for threads in [1, 2, 4, 20] {
                let mut out: Vec<[Mat; 2]> =
                    alone.iter().map(|a| a.each_ref().map(|m| Mat::zeros(m.rows(), m.cols()))).collect();
                let groups = linears
                    .iter()
                    .zip(&xs)
                    .zip(&mut out)
                    .map(|((l, x), out)| Rows {
                        all: l.each_ref(),
                        x: x.view(),
                        out: out.each_mut().map(|m| m.view_mut()),
                    })
                    .collect();
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| Linear::forward_groups(groups));
                assert_eq!(out, alone, "{activations:?} on {threads} threads");
            }
        }
    }
}

/// What is simulated is the exact product of rounded rows, behind the maps of the input; bytes are simulated as they are
/// multiplied.
#[test]
fn simulated_activations_are_rounded_ones() {
    use crate::Simulated;
    for (name, stored) in cases() {
        let x = random(5, stored.cols, 31);
        let exact = pack_for(&stored, Isa::best(), Activations::Exact).unwrap();
        let bytes = pack_for(&stored, Isa::best(), Activations::Int8).unwrap();
        for format in Simulated::ALL {
            let l = pack_for(&stored, Isa::best(), Activations::Simulated(format)).unwrap();
            let y = forward(&l, x.view());
            if stored.input.is_empty() && l.terms.len() == 1 && matches!(l.terms[0], super::PackedTerm::Piece(_)) {
                let mut rounded = x.clone();
                (0..5).for_each(|r| format.round(rounded.row_mut(r)));
                assert!(bits_equal(&y, &forward(&exact, rounded.view())), "{name} {format:?}");
            }
            if format == Simulated::Int8 && l.terms.len() == 1 && bytes.describe()[0].ends_with(" bytes") {
                let (real, top) = (
                    forward(&bytes, x.view()),
                    forward(&exact, x.view()).data().iter().fold(0.0f32, |t, v| t.max(v.abs())),
                );
                let off = lacuna_base::testkit::max_abs_diff(real.view(), y.view());
                assert!(off <= 1e-4 * top.max(1e-3), "{name}: {off} of {top}");
            }
        }
    }
}

/// Matrices that are kept by columns, of every kind, some beyond a span and of several units; each with the bytes of one
/// of its columns.
fn columned(rng: &mut Rng) -> Vec<(String, Stored, usize)> {
    let mut out = Vec::new();
    for (rows, cols) in [(1usize, 31usize), (40, 96), (131, 577), (330, 1088)] {
        let (units, lines) = (rows.div_ceil(32), |bytes: usize| bytes.next_multiple_of(64));
        for (float, unit) in [(Float::F32, 128), (Float::F16, 64), (Float::Bf16, 64)] {
            let w = random(rows, cols, rng.u64());
            let values = Values::Float(float, floats(&w, float));
            out.push((format!("{float:?}"), dense(rows, cols, values), lines(units * unit)));
        }
        for bits in 2..=8 {
            for (run, zeros, float) in [
                (32, false, Float::F16),
                (64, true, Float::F32),
                (cols, bits % 2 == 0, Float::F16),
                (128, true, Float::F16),
            ] {
                let name = format!("int{bits} run {run} zeros {zeros} {float:?}");
                let unit = if bits <= 4 { 16 } else { 32 };
                out.push((name, ints(rows, cols, bits, run, zeros, float, rng), lines(units * unit)));
            }
        }
        let kinds = [GgufType::Q4_0, GgufType::Q4_1, GgufType::Q5_0, GgufType::Q5_1, GgufType::Q8_0];
        for (kind, unit) in kinds.into_iter().zip([16, 16, 32, 32, 32]) {
            if cols % kind.block() == 0 {
                out.push((format!("{kind:?}"), gguf(rows, cols, kind, rng), lines(units * unit)));
            }
        }
        let trits: Vec<i8> = (0..rows * cols).map(|_| (rng.u64() % 3) as i8 - 1).collect();
        let scales = Scales::Float(Float::F16, floats(&random(rows, cols.div_ceil(32), 3), Float::F16));
        let values = Values::Ternary { codes: Bytes::from(pack_trits(&trits)), scales, group: Group::Run(32) };
        out.push(("ternary".into(), dense(rows, cols, values), lines(units * 16)));
    }
    out
}

/// Lists of channels: all, none, the last, some here and there, a run, few.
fn lists(cols: usize, rng: &mut Rng) -> Vec<Vec<u32>> {
    let all = 0..cols as u32;
    let mut some = |of: usize| all.clone().filter(|_| rng.below(of) == 0).collect::<Vec<u32>>();
    let (half, few) = (some(2), some(9));
    let run = all.clone().skip(cols / 3).take(cols / 4 + 1).collect();
    vec![all.clone().collect(), vec![], vec![cols as u32 - 1], half, run, few]
}

fn chosen(all: &[&Linear], x: MatRef<'_>, kept: &[Option<&[u32]>]) -> (Vec<Mat>, u64) {
    let mut out: Vec<Mat> = all.iter().map(|l| Mat::from_fn(x.rows(), l.rows(), |_, _| f32::NAN)).collect();
    let mut views: Vec<_> = out.iter_mut().map(|m| m.view_mut()).collect();
    let bytes = Linear::forward_chosen(all, x, kept, &mut views);
    (out, bytes)
}

/// Channels that a row lacks are not read, and its results are those of zeros there, to the bit, on every instruction
/// set, with any threads; which are near those of f64.
#[test]
fn chosen_channels_are_the_product_of_a_row_with_zeros() {
    let mut rng = Rng::new(17);
    for (name, stored, column) in columned(&mut rng) {
        let (w, lists) = (stored.to_mat(), lists(stored.cols, &mut rng));
        let mut x = random(lists.len(), stored.cols, rng.u64());
        for (r, kept) in lists.iter().enumerate() {
            (0..stored.cols).filter(|c| !kept.contains(&(*c as u32))).for_each(|c| x[(r, c)] = 0.0);
        }
        for isa in Isa::here() {
            for activations in [Activations::Exact, Activations::Int8] {
                let mut l = pack_for(&stored, isa, activations).unwrap();
                let want = forward(&l, x.view());
                let held = l.keep_columns(&stored).unwrap_or_else(|| panic!("{name} has columns"));
                assert!(held >= (stored.cols * column) as u64, "{name}");
                let mut least = u64::MAX;
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    for (r, kept) in lists.iter().enumerate() {
                        let row = x.view().rows_range(r, r + 1);
                        let (got, bytes) = pool.install(|| chosen(&[&l], row, &[Some(kept)]));
                        let what = format!("{name} {} x {} {isa} {activations:?}, list {r}", w.rows(), w.cols());
                        assert_eq!(bits(got[0].view()), bits(want.view().rows_range(r, r + 1)), "{what}");
                        let own = (kept.len() * column) as u64;
                        assert!(bytes == l.weights_bytes() || (bytes >= own && bytes < l.weights_bytes() * 5 / 4));
                        least = least.min(bytes);
                        for o in (0..w.rows()).filter(|_| activations == Activations::Exact) {
                            let terms =
                                || kept.iter().map(|&c| f64::from(x[(r, c as usize)]) * f64::from(w[(o, c as usize)]));
                            let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                            let off = (f64::from(got[0][(0, o)]) - want).abs();
                            assert!(off <= f64::from(PRODUCT_TOLERANCE) * size + 1e-30, "{what}: off by {off}");
                        }
                    }
                }
                // Without a channel nothing is read.
                assert_eq!(least, 0, "{name}");
                // Rows together, some of which need everything.
                let kept: Vec<Option<&[u32]>> =
                    lists.iter().enumerate().map(|(r, k)| (r > 0).then_some(k.as_slice())).collect();
                let (got, bytes) = chosen(&[&l], x.view(), &kept);
                assert_eq!((bits(got[0].view()), bytes), (bits(want.view()), l.weights_bytes()), "{name} {isa}");
                let few: Vec<Option<&[u32]>> = lists[1..3].iter().map(|k| Some(k.as_slice())).collect();
                let (got, _) = chosen(&[&l], x.view().rows_range(1, 3), &few);
                assert_eq!(bits(got[0].view()), bits(want.view().rows_range(1, 3)), "{name} {isa}");
            }
        }
    }
}

/// Several matrices of the same rows, some of which have no columns.
#[test]
fn chosen_channels_of_matrices_together() {
    let mut rng = Rng::new(23);
    let cols = 512;
    let f16 = |rows: usize, rng: &mut Rng| {
        dense(rows, cols, Values::Float(Float::F16, floats(&random(rows, cols, rng.u64()), Float::F16)))
    };
    let mut stored = vec![f16(300, &mut rng), f16(40, &mut rng), ints(640, cols, 4, 64, true, Float::F16, &mut rng)];
    stored.push(f16(70, &mut rng).with_maps(vec![Map::diagonal(&vec![0.5; cols], Float::F32).unwrap()], vec![]));
    let lists = lists(cols, &mut rng);
    for activations in [Activations::Exact, Activations::Int8] {
        let mut all: Vec<Linear> = stored.iter().map(|s| pack_for(s, Isa::best(), activations).unwrap()).collect();
        let held: Vec<bool> = all.iter_mut().zip(&stored).map(|(l, s)| l.keep_columns(s).is_some()).collect();
        assert_eq!(held, [true, true, true, false]);
        for picked in
            [vec![0, 1, 2], vec![0, 1], vec![3, 0], vec![2, 3, 3], vec![3, 3, 3], vec![3, 3], vec![0, 3, 1, 2]]
        {
            let linears: Vec<&Linear> = picked.iter().map(|&i| &all[i]).collect();
            for kept in &lists {
                let mut x = random(1, cols, rng.u64());
                (0..cols).filter(|c| !kept.contains(&(*c as u32))).for_each(|c| x[(0, c)] = 0.0);
                let (got, bytes) = chosen(&linears, x.view(), &[Some(kept)]);
                let mut most = 0;
                for (l, got) in linears.iter().zip(&got) {
                    assert_eq!(bits(got.view()), bits(forward(l, x.view()).view()), "{picked:?}");
                    most += l.weights_bytes();
                }
                let whole: u64 = picked.iter().filter(|i| **i == 3).map(|_| all[3].weights_bytes()).sum();
                assert!(bytes >= whole && (bytes < most || kept.len() > 100 || whole == most), "{picked:?} {bytes}");
                assert!(kept.len() < cols || bytes == most, "{picked:?}");
            }
        }
        let nothing = Mat::zeros(0, cols);
        assert_eq!(chosen(&[&all[0]], nothing.view(), &[]).0[0].rows(), 0);
    }
    let simulated = Packing { isa: Isa::best(), activations: Activations::Simulated(crate::Simulated::Int8) };
    assert_eq!(Linear::pack_with(&stored[0], &simulated).unwrap().keep_columns(&stored[0]), None);
}

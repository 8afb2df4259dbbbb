//! Every pattern under every codec: packed, decoded, described and read back, and broken on purpose.

mod common;

use std::collections::HashMap;

use common::{decode, group_of, kind_and_mask, random_piece, random_stored};
use lacuna_base::{Mat, MatMut, Rng};
use lacuna_format::*;
use proptest::prelude::*;

fn close(s: &Stored, got: &Mat) {
    let (want, size) = decode(s);
    for (i, ((&g, w), m)) in got.data().iter().zip(want).zip(size).enumerate() {
        assert!((f64::from(g) - w).abs() <= 1e-5 * m + 1e-12, "entry {i}: {g}, reference {w}, {}", s.codec_name());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decoding_agrees_with_the_reference(seed: u64) {
        let mut rng = Rng::new(seed);
        let s = random_stored(&mut rng);
        s.check().unwrap();
        let all = s.to_mat();
        close(&s, &all);
        // Any range of rows gives the same bits, into a wider matrix, too.
        let from = rng.below(s.rows + 1);
        let to = from + rng.below(s.rows - from + 1);
        let stride = s.cols + 3;
        let mut room = vec![7.0; (to - from) * stride];
        s.decode_rows(from, to, MatMut::with_stride(to - from, s.cols, stride, &mut room));
        for r in from..to {
            let at = (r - from) * stride;
            prop_assert_eq!(&room[at..at + s.cols], all.row(r));
            prop_assert_eq!(&room[at + s.cols..at + stride], &[7.0; 3]);
        }
    }

    #[test]
    fn stored_values_are_walked_in_order(seed: u64) {
        let mut rng = Rng::new(seed);
        let (rows, cols) = (8, 32 * (1 + rng.below(3)));
        let p = random_piece(&mut rng, rows, cols);
        let all = p.to_mat();
        let mut count = 0;
        for r in 0..rows {
            let (mut row, mut last) = (vec![0.0; cols], None);
            p.for_row(r, |c, v| {
                assert!(last < Some(c));
                (last, row[c]) = (Some(c), v);
                count += 1;
            });
            prop_assert_eq!(&row[..], all.row(r));
            let mut again = vec![9.0; cols];
            p.row(r, &mut again);
            prop_assert_eq!(&again, &row);
        }
        prop_assert_eq!(count, p.stored_values());
        let stored = Stored::from_piece(p);
        prop_assert!((stored.sparsity() - (1.0 - count as f64 / (rows * cols) as f64)).abs() < 1e-12);
    }

    #[test]
    fn descriptions_and_buffers_come_back(seed: u64) {
        let s = random_stored(&mut Rng::new(seed));
        let (desc, parts) = s.to_parts();
        prop_assert!(parts.iter().all(|p| p.shape.iter().product::<usize>() * p.elem.bytes() == p.bytes.len()));
        prop_assert_eq!(parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>(), s.bytes());
        let desc: Descriptor = serde_json::from_str(&serde_json::to_string(&desc).unwrap()).unwrap();
        let map: HashMap<String, Buffer> = parts.into_iter().map(|p| (p.suffix.clone(), p)).collect();
        prop_assert_eq!(map.values().map(|p| p.bytes.len() as u64).sum::<u64>(), s.bytes(), "names are unique");
        let get = |n: &str| map.get(n).map(|p| (p.elem, p.shape.clone(), p.bytes.clone()));
        prop_assert_eq!(&Stored::from_parts(&desc, get).unwrap(), &s);
        for name in map.keys() {
            let e = Stored::from_parts(&desc, |n| if n == name { None } else { get(n) }).unwrap_err();
            prop_assert!(e.what.contains(name.as_str()));
            let e = Stored::from_parts(&desc, |n| {
                get(n).map(|(e, mut s, b)| {
                    s.insert(0, if n == name { 2 } else { 1 });
                    if n == name { (e, s, b) } else { (e, s.split_off(1), b) }
                })
            });
            prop_assert!(e.unwrap_err().what.contains(name.as_str()));
        }
    }

    #[test]
    fn broken_data_are_refused_or_decode_quietly(seed: u64) {
        let mut rng = Rng::new(seed);
        let s = random_stored(&mut rng);
        let (mut desc, mut parts) = s.to_parts();
        for _ in 0..1 + rng.below(3) {
            if parts.is_empty() {
                break;
            }
            let i = rng.below(parts.len());
            let p = &mut parts[i];
            let mut bytes = p.bytes.to_vec();
            match rng.below(3) {
                0 => bytes.truncate(rng.below(bytes.len() + 1)),
                1 => bytes.extend([0xFF; 4]),
                _ if bytes.is_empty() => {}
                _ => {
                    let at = rng.below(bytes.len());
                    bytes[at] = rng.u64() as u8;
                }
            }
            p.bytes = bytes.into();
        }
        if rng.below(4) == 0 {
            desc.rows = if rng.below(2) == 0 { rng.u64() as usize } else { desc.rows + 1 };
        }
        if rng.below(4) == 0 {
            desc.cols = if rng.below(2) == 0 { rng.u64() as usize } else { desc.cols + 1 };
        }
        let map: HashMap<String, Buffer> = parts.into_iter().map(|p| (p.suffix.clone(), p)).collect();
        let read = Stored::from_parts(&desc, |n| map.get(n).map(|p| (p.elem, p.shape.clone(), p.bytes.clone())));
        if let Ok(s) = read
            && s.rows.saturating_mul(s.cols) < 1 << 20
        {
            s.to_mat();
        }
    }

    #[test]
    fn bytes_are_foretold_exactly(seed: u64) {
        let mut rng = Rng::new(seed);
        let (rows, cols) = (1 + rng.below(40), 8 * (1 + rng.below(20)));
        let (kind, mask) = kind_and_mask(&mut rng, rows, cols);
        let mask = mask.unwrap_or_else(|| Mask::all(rows, cols, true));
        let group = group_of(&mut rng, cols);
        let scales = Mat::zeros(rows, group.count(cols));
        let q = Integers { rows, cols, bits: 5, codes: vec![3; rows * cols], scales, zeros: None, group, offsets: None };
        let p = pack_integers(&q, Some(&mask), kind, ScaleCodec::F16).unwrap();
        let Values::Int { codes, .. } = &p.values else { unreachable!() };
        prop_assert_eq!(exact_bytes(kind, &mask, 5.0), Some(p.pattern.bytes() + codes.len() as u64));
        let f = pack_float(Mat::zeros(rows, cols).view(), Some(&mask), kind, Float::F16).unwrap();
        prop_assert_eq!(exact_bytes(kind, &mask, 16.0), Some(f.bytes()));
        let best = cheapest_pattern(&mask, 16.0, Some((1, 8)));
        prop_assert!(exact_bytes(best, &mask, 16.0) <= Some(f.bytes()).max(exact_bytes(PatternKind::Dense, &mask, 16.0)));
    }
}

#[test]
fn what_goes_in_comes_out() {
    let mut rng = Rng::new(3);
    for _ in 0..300 {
        let (rows, cols) = (1 + rng.below(17), [8, 12, 40, 64, 71][rng.below(5)]);
        let (kind, mask) = kind_and_mask(&mut rng, rows, cols);
        let kept = |r, c| mask.as_ref().is_none_or(|m| m.get(r, c));
        let w = Mat::from_fn(rows, cols, |_, _| rng.normal());
        let got = pack_float(w.view(), mask.as_ref(), kind, Float::F32).unwrap().to_mat();
        assert_eq!(got, Mat::from_fn(rows, cols, |r, c| if kept(r, c) { w[(r, c)] } else { 0.0 }));

        let group = group_of(&mut rng, cols);
        let n = rows * group.count(cols);
        let bits = 2 + rng.below(7) as u8;
        let mut codes = |n: usize| (0..n).map(|_| rng.below(1 << bits) as u8).collect::<Vec<u8>>();
        let (values, zeros) = (codes(rows * cols), Some(codes(n)).filter(|_| n.is_multiple_of(2)));
        let scales = Mat::from_fn(rows, group.count(cols), |_, _| rng.normal());
        let q = Integers { rows, cols, bits, codes: values, scales, zeros, group, offsets: None };
        let got = pack_integers(&q, mask.as_ref(), kind, ScaleCodec::F32).unwrap().to_mat();
        assert_eq!(got, Mat::from_fn(rows, cols, |r, c| if kept(r, c) { q.value(r, c) } else { 0.0 }));
    }
}

#[test]
fn every_code_of_a_small_float_is_its_own_nearest() {
    for (codec, value) in [
        (Float::F8E4m3, lacuna_base::float::f8_e4m3 as fn(u8) -> f32),
        (Float::F8E5m2, lacuna_base::float::f8_e5m2 as fn(u8) -> f32),
    ] {
        let all: Vec<f32> = (0..=255u8).map(value).filter(|v| v.is_finite()).collect();
        let pack = |v: Vec<f32>| pack_float(Mat::from_vec(1, v.len(), v).view(), None, PatternKind::Dense, codec);
        assert_eq!(pack(all.clone()).unwrap().to_mat().data(), all);
        let mut rng = Rng::new(5);
        for _ in 0..2000 {
            let x = rng.normal() * 10f32.powi(rng.below(6) as i32 - 4);
            let got = pack(vec![x]).unwrap().to_mat().data()[0];
            let best = all.iter().map(|v| (v - x).abs()).fold(f32::INFINITY, f32::min);
            assert_eq!((got - x).abs(), best, "{x} became {got}");
        }
        assert!(pack(vec![1e6]).unwrap_err().what.contains("beyond"));
    }
}

#[test]
fn scales_too_large_are_errors_and_too_small_are_zeros() {
    let q = |scale: f32| Integers {
        rows: 1,
        cols: 4,
        bits: 4,
        codes: vec![1, 8, 9, 15],
        scales: Mat::from_vec(1, 1, vec![scale]),
        zeros: None,
        group: Group::Run(4),
        offsets: None,
    };
    let pack = |scale, codec| pack_integers(&q(scale), None, PatternKind::Dense, codec);
    for codec in [ScaleCodec::F16, ScaleCodec::Int { bits: 6, per: 8 }] {
        let e = pack(70000.0, codec).unwrap_err().what;
        assert!(e.contains("row 0") && e.contains("70000"), "{e}");
        assert_eq!(pack(1e-9, codec).unwrap().to_mat().data(), [0.0; 4]);
    }
    assert_eq!(pack(70000.0, ScaleCodec::F32).unwrap().to_mat().data(), [-490000.0, 0.0, 70000.0, 490000.0]);
    assert!(pack(f32::NAN, ScaleCodec::F32).is_err());
}

#[test]
fn errors_name_the_numbers() {
    let w = Mat::from_fn(2, 8, |r, c| if (r, c) == (1, 5) { 1e6 } else { 1.0 });
    let e = pack_float(w.view(), None, PatternKind::Dense, Float::F16).unwrap_err().what;
    assert_eq!(e, "row 1, column 5: 1000000 is beyond f16");
    let edge = |v: f32| pack_float(Mat::from_vec(1, 1, vec![v]).view(), None, PatternKind::Dense, Float::F16);
    assert_eq!(edge(65519.0).unwrap().to_mat().data(), [65504.0]);
    assert!(edge(65520.0).is_err() && edge(f32::NAN).is_err());
    let e = pack_float(w.view(), None, PatternKind::Nm { n: 2, m: 4 }, Float::F32).unwrap_err().what;
    assert_eq!(e, "row 0 keeps 4 of columns 0 to 3: not 2:4");
    let p = |values| Piece { rows: 2, cols: 8, pattern: Pattern::Dense, values };
    let e = p(Values::Float(Float::F16, vec![0; 31].into())).check().unwrap_err().what;
    assert_eq!(e, "values: 31 bytes, expected 32");
    let scales = Scales::Float(Float::F16, vec![0, 0, 0, 0x7C].into());
    let int = Values::Int { bits: 4, codes: vec![0; 8].into(), scales, zeros: None, group: Group::Run(8) };
    assert_eq!(p(int).check().unwrap_err().what, "scales: value 1 is not finite");
    let csr = |columns: &[u16]| Piece {
        rows: 1,
        cols: 8,
        pattern: Pattern::Csr {
            starts: [0u32, columns.len() as u32].iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>().into(),
            columns: columns.iter().flat_map(|c| c.to_le_bytes()).collect::<Vec<u8>>().into(),
        },
        values: Values::Float(Float::F32, vec![0; 4 * columns.len()].into()),
    };
    assert_eq!(csr(&[1, 7]).check(), Ok(()));
    assert!(csr(&[7, 1]).check().is_err() && csr(&[3, 3]).check().is_err() && csr(&[8]).check().is_err());
}

#[test]
fn names_and_sizes() {
    let w = lacuna_base::testkit::random(8, 64, 1);
    let half = Mask::from_fn(8, 64, |r, c| (r + c) % 2 == 0);
    let f = |kind| pack_float(w.view(), Some(&half), kind, Float::F16).unwrap();
    assert_eq!(f(PatternKind::Mask { height: 1 }).codec_name(), "bitmask f16");
    assert_eq!(f(PatternKind::Nm { n: 2, m: 4 }).codec_name(), "2:4 f16");
    assert_eq!(f(PatternKind::Csr).codec_name(), "csr f16");
    assert_eq!(f(PatternKind::Dense).bytes(), 1024);
    assert_eq!(f(PatternKind::Nm { n: 2, m: 4 }).bytes(), 512 + 64);
    assert_eq!(f(PatternKind::Mask { height: 1 }).bytes(), 512 + 64 + 36);
    let q = Integers {
        rows: 8,
        cols: 64,
        bits: 4,
        codes: vec![8; 512],
        scales: Mat::zeros(8, 2),
        zeros: None,
        group: Group::Run(32),
        offsets: None,
    };
    let int4 = pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).unwrap();
    let sum = Stored::new(8, 64, vec![Term::Piece(int4), Term::Piece(f(PatternKind::Csr))]);
    assert_eq!(sum.codec_name(), "int4 g32 + csr f16");
    let thin = |rows, cols| pack_float(Mat::zeros(rows, cols).view(), None, PatternKind::Dense, Float::F16).unwrap();
    let low = Stored::new(8, 64, vec![Term::Product(thin(8, 3), thin(3, 64))]);
    assert_eq!((low.codec_name(), low.bytes(), low.sparsity()), ("lowrank 3 (f16)".into(), 2 * 72 * 3, 0.0));
    assert_eq!(low.bits_per_weight(), 432.0 * 8.0 / 512.0);
    let terms = vec![Term::Piece(f(PatternKind::Csr)), Term::Piece(f(PatternKind::Nm { n: 2, m: 4 }))];
    let two = Stored::new(8, 64, terms);
    assert_eq!((two.sparsity(), sum.sparsity()), (0.5, 0.0));
    assert_eq!(cheapest_pattern(&half, 16.0, None), PatternKind::Nm { n: 1, m: 2 });
    let random = Mask::from_fn(64, 512, |r, c| (r * 7919 + c * c * 31 + 17 * c) % 97 < 48);
    assert_eq!(cheapest_pattern(&random, 16.0, None), PatternKind::Mask { height: 1 });
    let rows = Mask::from_fn(64, 512, |_, c| (c * c * 31) % 97 < 48);
    assert_eq!(cheapest_pattern(&rows, 16.0, None), PatternKind::Mask { height: 32 });
    assert_eq!(cheapest_pattern(&Mask::from_fn(64, 512, |r, c| (r + c) % 100 == 0), 16.0, None), PatternKind::Csr);
    assert_eq!(cheapest_pattern(&Mask::all(64, 512, true), 4.0, None), PatternKind::Dense);
}

#[test]
fn plain_rounding_stays_within_half_a_step() {
    let w = lacuna_base::testkit::random(1, 640, 9);
    for (codec, levels) in [(GgufType::Q8_0, 127.0), (GgufType::Q4_0, 8.0)] {
        let bytes = codec.encode(w.data());
        let mut back = vec![0.0; 640];
        codec.decode(&bytes, &mut back);
        for (w, b) in w.data().chunks(32).zip(back.chunks(32)) {
            let top = w.iter().fold(0.0f32, |t, x| t.max(x.abs()));
            // Half a step and what rounding the scale to f16 moves the extreme by; Q4_0's far end has only 7 steps, so
            // what lies opposite the extreme may be off by a whole one.
            let bound = if codec == GgufType::Q8_0 { 0.57 } else { 1.01 } * top / levels;
            assert!(w.iter().zip(b).all(|(x, y)| (x - y).abs() <= bound));
        }
        assert_eq!(codec.encode(&[0.0; 32]).len(), codec.block_bytes());
    }
}

/// A matrix of few columns and the buffers of what version 1 of the packed format wrote for it.
#[test]
fn a_codebook_of_the_first_version_reads_as_it_did() {
    let json =
        r#"{"rows":2,"cols":3,"terms":[{"piece":{"pattern":"dense","values":{"codebook":{"bits":2,"scales":null}}}}]}"#;
    let desc: Descriptor = serde_json::from_str(json).unwrap();
    let table: Vec<u8> = [-1.5f32, 0.0, 0.1, 3.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    // Codes 0, 1, 2 and 3, 2, 1, two bits each, the first lowest.
    let get = |name: &str| match name {
        "codes" => Some((Elem::U8, vec![2], vec![0b11_10_01_00u8, 0b01_10].into())),
        "table" => Some((Elem::F32, vec![4], table.clone().into())),
        _ => None,
    };
    let s = Stored::from_parts(&desc, get).unwrap();
    assert_eq!(s.to_mat().data(), [-1.5, 0.0, 0.1, 3.0, 0.1, 0.0]);
    assert_eq!((s.codec_name(), desc.version()), ("table2".into(), 1));
    assert_eq!(serde_json::to_string(&s.to_parts().0).unwrap(), json, "and is written so");
}

#[test]
fn tables_of_rows_and_groups_are_described_and_bounded() {
    let table = |owner, float, bytes: usize| Piece {
        rows: 3,
        cols: 10,
        pattern: Pattern::Dense,
        values: Values::Codebook {
            bits: 3,
            codes: vec![0xFF; 12].into(),
            tables: Tables { owner, float, bytes: vec![0; bytes].into() },
            scales: None,
        },
    };
    for (owner, count, name, shape) in [
        (Owner::Matrix, 1, "table3", vec![8]),
        (Owner::Row, 3, "table3 a row", vec![3, 8]),
        (Owner::Group(4), 9, "table3 a g4", vec![3, 3, 8]),
    ] {
        for float in [Float::F32, Float::F16] {
            let bytes = count * 8 * float.bytes();
            let s = Stored::from_piece(table(owner, float, bytes));
            assert_eq!(s.check(), Ok(()));
            assert_eq!((s.bytes(), s.codec_name()), (12 + bytes as u64, name.to_owned()));
            assert_eq!(Tables::exact_bytes(owner, float, 3, (3, 10)), Some(bytes));
            let (desc, parts) = s.to_parts();
            assert_eq!(parts[1].shape, shape);
            assert_eq!(desc.version(), if (owner, float) == (Owner::Matrix, Float::F32) { 1 } else { 2 });
            let short = table(owner, float, bytes - 1).check().unwrap_err().what;
            assert_eq!(short, format!("table: {} bytes, expected {bytes}", bytes - 1));
        }
        for float in [Float::Bf16, Float::F8E4m3] {
            assert!(table(owner, float, count * 8 * float.bytes()).check().is_err());
        }
    }
    assert!(table(Owner::Group(0), Float::F32, 96).check().unwrap_err().what.contains("runs of 0"));
    let mut huge = table(Owner::Group(1), Float::F32, 96);
    (huge.rows, huge.cols) = (1 << 40, 1 << 14);
    assert!(huge.check().is_err());
    let Values::Codebook { tables, .. } = &mut huge.values else { unreachable!() };
    tables.bytes = [0u8, 0, 0xC0, 0x7F].repeat(8).into();
    tables.owner = Owner::Matrix;
    (huge.rows, huge.cols) = (3, 10);
    assert_eq!(huge.check().unwrap_err().what, "table: value 0 is not finite");
}

/// What a row's table says is what comes back: f16 entries as f16 has them.
#[test]
fn tables_of_rows_come_back_exactly() {
    let mut rng = Rng::new(8);
    for (owner, count) in [(Owner::Row, 5), (Owner::Group(7), 15)] {
        for bits in [1u8, 3, 4, 8] {
            let (rows, cols) = (5, 20);
            let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(1 << bits) as u8).collect();
            let tables = Mat::from_fn(count, 1 << bits, |_, _| half::f16::from_f32(rng.normal()).to_f32());
            let q = Codebook { bits, codes, owner, tables, scales: None };
            let pack = |f| pack_codebook((rows, cols), &q, None, PatternKind::Dense, f, ScaleCodec::F16).unwrap();
            let (full, half) = (pack(Float::F32), pack(Float::F16));
            let entry = |r, c| q.tables[(owner.of(r, c, cols), usize::from(q.codes[r * cols + c]))];
            assert_eq!(full.to_mat(), Mat::from_fn(rows, cols, entry));
            assert_eq!(half.to_mat(), full.to_mat());
            assert_eq!(full.bytes() - half.bytes(), (count << bits) as u64 * 2);
            // Dropped entries need a zero in their own table.
            let mask = Mask::from_fn(rows, cols, |r, c| (r, c) != (3, 8));
            let e = pack_codebook((rows, cols), &q, Some(&mask), PatternKind::Dense, Float::F32, ScaleCodec::F16);
            assert!(e.unwrap_err().what.contains("row 3, column 8"));
        }
    }
    let big = Codebook {
        bits: 1,
        codes: vec![0; 4],
        owner: Owner::Row,
        tables: Mat::from_vec(2, 2, vec![0.0, 1.0, 1e6, 2.0]),
        scales: None,
    };
    let e = pack_codebook((2, 2), &big, None, PatternKind::Dense, Float::F16, ScaleCodec::F16).unwrap_err().what;
    assert_eq!(e, "table 1, entry 0: 1000000 is beyond f16");
}

/// SpQR's second level: 3-bit scales and zeros, with an f16 scale and minimum of each for every 16.
#[test]
fn encoded_zeros_are_counted_and_near() {
    let mut rng = Rng::new(12);
    let (rows, cols, codec) = (4, 512, ScaleCodec::Int { bits: 3, per: 16 });
    let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(8) as u8).collect();
    let numbers = |rng: &mut Rng, by: f32| Mat::from_fn(rows, 32, |_, _| by * (1.0 + 0.2 * rng.normal()));
    let (scales, zeros) = (numbers(&mut rng, 0.01), numbers(&mut rng, 3.5));
    let q = Integers { rows, cols, bits: 3, codes, scales, zeros: None, group: Group::Run(16), offsets: None };
    let p = pack_integers_off(&q, &zeros, None, PatternKind::Dense, codec, codec).unwrap();
    // 3 bits a weight, and for 16 of them 3 and 3, and for 256 four f16.
    assert_eq!(p.bytes(), (4 * 512 * 3 + 4 * 32 * 6 + 4 * 2 * 64) / 8);
    assert_eq!(p.codec_name(), "int3 g16 zero3 s3");
    let s = Stored::from_piece(p);
    assert!(s.integers().is_none() && s.to_parts().0.version() == 2);
    let half = Mask::from_fn(rows, cols, |_, c| c % 2 == 0);
    let e = pack_integers_off(&q, &zeros, Some(&half), PatternKind::Dense, codec, codec).unwrap_err().what;
    assert!(e.starts_with("row 0, column 1 is dropped and its zero point"), "{e}");
    let whole = Mat::from_fn(rows, 32, |r, g| ((r + g) % 8) as f32);
    let p = pack_integers_off(&q, &whole, Some(&half), PatternKind::Dense, codec, codec).unwrap().to_mat();
    assert!((0..cols).all(|c| (p[(2, c)] == 0.0) || c % 2 == 0));
}

/// Least squares lose no more than the smallest and the largest value as ends of the grid, and mostly less.
#[test]
fn encoded_scales_lose_less_than_between_their_ends() {
    let mut rng = Rng::new(13);
    for (bits, most) in [(3u8, 0.9), (4, 0.95), (6, 1.0)] {
        let m = Mat::from_fn(50, 64, |_, _| (0.5 * rng.normal()).exp());
        let scales = pack_scales(&m, ScaleCodec::Int { bits, per: 16 }).unwrap();
        let (mut ours, mut ends) = (0.0, 0.0);
        for r in 0..50 {
            let mut got = vec![0.0; 64];
            scales.row(r, &mut got);
            for (run, got) in m.row(r).chunks(16).zip(got.chunks(16)) {
                let low = run.iter().copied().fold(f32::INFINITY, f32::min);
                let step = (run.iter().copied().fold(0.0, f32::max) - low) / ((1 << bits) - 1) as f32;
                let (low, step) = (half::f16::from_f32(low).to_f32(), half::f16::from_f32(step).to_f32());
                let between = |v: f32| low + step * ((v - low) / step).round().clamp(0.0, ((1 << bits) - 1) as f32);
                let one: f64 = run.iter().zip(got).map(|(v, g)| f64::from(v - g).powi(2)).sum();
                let other: f64 = run.iter().map(|v| f64::from(v - between(*v)).powi(2)).sum();
                assert!(one <= other * 1.0001 + 1e-12, "{one} against {other}");
                (ours, ends) = (ours + one, ends + other);
            }
        }
        assert!(ours <= most * ends, "{bits} bits: {ours} against {ends}");
    }
}

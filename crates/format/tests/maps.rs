//! Maps at a matrix's ends.

mod common;

use common::{map_matrix, random_maps, random_piece};
use lacuna_base::{Mat, MatMut, Rng};
use lacuna_format::*;

#[test]
fn cores_are_orthogonal_and_of_ones() {
    for h in [1, 12, 20, 28, 36, 44] {
        let m = hadamard_core(h);
        assert!(m.iter().all(|v| v.abs() == 1), "{h}");
        for (a, b) in (0..h).flat_map(|a| (0..h).map(move |b| (a, b))) {
            let dot: i32 = (0..h).map(|k| i32::from(m[a * h + k]) * i32::from(m[b * h + k])).sum();
            assert_eq!(dot, if a == b { h as i32 } else { 0 }, "rows {a} and {b} of {h}");
        }
    }
    for (size, parts) in [(1, (1, 1)), (128, (1, 128)), (384, (12, 32)), (20, (20, 1)), (56, (28, 2)), (176, (44, 4))] {
        assert_eq!(hadamard_parts(size), Some(parts));
    }
    assert!([0, 3, 6, 13, 52].iter().all(|s| hadamard_parts(*s).is_none()));
}

/// What quantizers rely on: a rotation before and its inverse folded into the weights leave the matrix as it was.
#[test]
fn a_hadamard_of_half_the_size_thrice_is_its_own_inverse() {
    let signs: Vec<bool> = (0..384).map(|i| i % 3 == 0).collect();
    for size in [128, 384] {
        let map = Map::hadamard(size, Some(&signs));
        let m = map_matrix(&map, 384);
        for i in 0..384 {
            for j in 0..384 {
                let dot: f64 = (0..384).map(|k| m[i * 384 + k] * m[j * 384 + k]).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-12, "{size}: {i}, {j}");
            }
        }
        // A row of the decoded identity with the map in front is a row of the map.
        let one = pack_float(Mat::identity(384).view(), None, PatternKind::Dense, Float::F32).unwrap();
        let s = Stored::from_piece(one).with_maps(vec![map], vec![]);
        let got = s.to_mat();
        assert!(got.data().iter().zip(&m).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-6));
    }
}

/// Any rows alone are those of the whole, to the last bit, whatever maps mix them.
#[test]
fn ranges_of_rows_have_the_bits_of_all() {
    let mut rng = Rng::new(6);
    for round in 0..120 {
        let (rows, cols) = ([24, 96, 12, 40][round % 4], [32, 60][round % 2]);
        let s = Stored::from_piece(random_piece(&mut rng, rows, cols));
        let (input, output) = (random_maps(&mut rng, cols), random_maps(&mut rng, rows));
        let s = s.with_maps(input, output);
        s.check().unwrap();
        let all = s.to_mat();
        for (from, to) in [(0, 1), (rows - 1, rows), (5, 7), (3, 3), (1, rows - 1)] {
            let mut some = Mat::zeros(to - from, cols);
            s.decode_rows(from, to, some.view_mut());
            assert_eq!(some.data(), &all.data()[from * cols..to * cols], "{from}..{to} of {}", s.codec_name());
        }
    }
}

#[test]
fn maps_are_counted_named_and_not_forgotten() {
    let piece = |rows, cols| pack_float(Mat::zeros(rows, cols).view(), None, PatternKind::Dense, Float::F16).unwrap();
    let plain = Stored::from_piece(piece(8, 128));
    let index: Vec<u32> = (0..8).rev().collect();
    let diagonal = Map::diagonal(&[0.5; 128], Float::F16).unwrap();
    let maps =
        plain.clone().with_maps(vec![diagonal, Map::hadamard(128, Some(&[true; 128]))], vec![Map::permutation(&index)]);
    assert_eq!(maps.codec_name(), "f16, in diagonal, hadamard 128, out permutation");
    assert_eq!(maps.bytes(), plain.bytes() + 256 + 16 + 32);
    assert!(plain.single().is_some() && maps.single().is_none() && maps.has_maps());
    assert_eq!((plain.to_parts().0.version(), maps.to_parts().0.version()), (1, 2));
    let names: Vec<String> = maps.to_parts().1.into_iter().map(|p| p.suffix).collect();
    assert_eq!(names, ["values", "in0.diagonal", "in1.signs", "out0.index"]);
    let q = GgufType::Q8_0.encode(&[1.0; 8 * 128]);
    let blocks = Piece { rows: 8, cols: 128, pattern: Pattern::Dense, values: Values::Gguf(GgufType::Q8_0, q.into()) };
    let blocks = Stored::from_piece(blocks);
    assert!(blocks.integers().is_some(), "integers as they are");
    assert!(
        blocks.with_maps(vec![], vec![Map::permutation(&index)]).integers().is_none(),
        "but not where a map follows"
    );
    let mask = Mask::from_fn(8, 128, |r, c| (r + c) % 2 == 0);
    let half = pack_float(Mat::zeros(8, 128).view(), Some(&mask), PatternKind::Mask { height: 1 }, Float::F16).unwrap();
    let half = Stored::from_piece(half).with_maps(vec![], vec![Map::permutation(&index)]);
    assert_eq!(half.sparsity(), 0.5);
    assert_eq!(half.with_maps(vec![Map::hadamard(64, None)], vec![]).sparsity(), 0.0);
}

#[test]
fn broken_maps_are_refused() {
    let piece = pack_float(Mat::zeros(4, 6).view(), None, PatternKind::Dense, Float::F32).unwrap();
    let s = Stored::from_piece(piece);
    let with = |map: Map| s.clone().with_maps(vec![map], vec![]).check().map_err(|e| e.what);
    let of = |what: &str, map: Map| {
        let e = with(map).unwrap_err();
        assert!(e.starts_with("input map 0: ") && e.contains(what), "{e}");
    };
    assert_eq!(with(Map::permutation(&[5, 4, 3, 2, 1, 0])), Ok(()));
    of("each of 0 to 5 once", Map::permutation(&[5, 4, 3, 2, 1, 1]));
    of("each of 0 to 5 once", Map::permutation(&[5, 4, 3, 2, 1, 6]));
    of("20 bytes, expected 24", Map::permutation(&[0, 1, 2, 3, 4]));
    of("not finite", Map::Diagonal(Float::F16, [0, 0x7C].repeat(6).into()));
    of("expected f32 or f16", Map::Diagonal(Float::Bf16, vec![0; 12].into()));
    of("runs of 4 in 6", Map::hadamard(4, None));
    of("runs of 0 in 6", Map::hadamard(0, None));
    of("no Hadamard matrix of order 6", Map::hadamard(6, None));
    of("signs beyond value 6", Map::Hadamard { size: 2, signs: Some(vec![0x40].into()) });
    of("2 bytes, expected 1", Map::Hadamard { size: 2, signs: Some(vec![0, 0].into()) });
    of("runs of 5", Map::Dense { size: 5, float: Float::F32, values: vec![0; 100].into() });
    of("expected 36", Map::Dense { size: 3, float: Float::F32, values: vec![0; 35].into() });
    let wide = Piece {
        rows: 1,
        cols: 8192,
        pattern: Pattern::Dense,
        values: Values::Float(Float::F16, vec![0; 16384].into()),
    };
    let dense = Map::Dense { size: 8192, float: Float::F16, values: Bytes::new() };
    let e = Stored::from_piece(wide).with_maps(vec![dense], vec![]).check().unwrap_err().what;
    assert!(e.contains("at most 4096"), "{e}");
    assert!(Map::diagonal(&[1e6], Float::F16).is_err() && Map::dense(1, &[f32::NAN], Float::F32).is_err());
    let five = s.clone().with_maps(vec![], vec![Map::hadamard(2, None); 5]);
    assert!(five.check().unwrap_err().what.contains("5 maps at the output, at most 4"));
    let (mut desc, parts) = s.to_parts();
    desc.input = vec![MapDesc::Permutation; 1 << 20];
    let e = Stored::from_parts(&desc, |n| {
        parts.iter().find(|p| p.suffix == n).map(|p| (p.elem, p.shape.clone(), p.bytes.clone()))
    });
    assert!(e.unwrap_err().what.contains("at most 4"));
    let mut room = Mat::zeros(0, 6);
    s.with_maps(vec![], vec![Map::hadamard(4, None)]).decode_rows(2, 2, MatMut::new(0, 6, room.data_mut()));
}

//! Products by tiles have the bits of products by dot products: on a processor with tiles by its own (every other test
//! asks it of them, too), everywhere by plain loops in their place.

use super::*;
use crate::simd::unit::everywhere;

/// Codes under a zero each group or one for all, whatever its size: some fit no signed byte.
fn zeros(rows: usize, cols: usize, bits: u8, most: u64, rng: &mut Rng) -> Stored {
    let groups = cols.div_ceil(64);
    let q = Integers {
        rows,
        cols,
        bits,
        codes: (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect(),
        scales: Mat::from_fn(rows, groups, |_, _| rng.normal()),
        zeros: Some((0..rows * groups).map(|_| (rng.u64() % (most + 1)) as u8).collect()),
        group: Group::Run(64),
        offsets: None,
    };
    Stored::from_piece(pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).unwrap())
}

fn as_bytes() -> Vec<(String, Stored)> {
    let mut all = cases();
    let mut rng = Rng::new(21);
    // One part of a panel, several, and such as end within a group of products.
    for (rows, cols) in [(33, 1024), (17, 1056), (40, 1376), (5, 4128)] {
        for bits in [2, 4, 8] {
            all.push((format!("int{bits} {cols}"), ints(rows, cols, bits, 32, false, Float::F16, &mut rng)));
            all.push((format!("int{bits} {cols} zeros"), ints(rows, cols, bits, 64, true, Float::F32, &mut rng)));
        }
        all.push((format!("int4 {cols} zeros to 15"), zeros(rows, cols, 4, 15, &mut rng)));
        all.push((format!("int8 {cols} zeros to 255"), zeros(rows, cols, 8, 255, &mut rng)));
    }
    let kinds = [GgufType::Q4_0, GgufType::Q8_0, GgufType::Q6_K, GgufType::Q3_K, GgufType::Q4_K];
    for kind in kinds.into_iter().chain([GgufType::IQ2_XS, GgufType::IQ3_S]) {
        all.push((format!("{kind:?} of several parts"), gguf(19, 1280, kind, &mut rng)));
    }
    let bytes = |s: &Stored| {
        let l = pack_for(s, Isa::Portable, Activations::Int8).unwrap();
        l.describe().iter().any(|d| d.ends_with(" bytes"))
    };
    all.retain(|(_, s)| bytes(s));
    all
}

#[test]
fn tiles_give_the_bits_of_dot_products() {
    let all = as_bytes();
    assert!(all.len() > 100, "{}", all.len());
    for (i, (name, stored)) in all.iter().enumerate() {
        // Few rows, whole tiles, and such as fill none.
        let rows = [19, 2, 16, 33, 50][i % 5];
        let mut x = random(rows, stored.cols, 9);
        x.row_mut(0).fill(0.0);
        x.row_mut(1)[stored.cols / 2] = f32::NAN;
        let plain = forward(&pack_for(stored, Isa::Portable, Activations::Int8).unwrap(), x.view());
        for isa in Isa::here() {
            let l = pack_for(stored, isa, Activations::Int8).unwrap();
            let tiled = everywhere::with(|| forward(&l, x.view()));
            let alike = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            let dots = forward(&l, x.view());
            assert!(dots.data().iter().zip(tiled.data()).all(alike), "{name} {isa}, {rows} rows");
            // Bytes have the same bits on every instruction set, floats beside them have not.
            let bytes = stored.terms.len() == 1 && !stored.has_maps();
            assert!(!bytes || plain.data().iter().zip(tiled.data()).all(alike), "{name} {isa}, {rows} rows");
        }
    }
}

#[test]
fn matrices_that_share_rows_in_tiles_give_the_bits_that_each_gives_alone() {
    let mut rng = Rng::new(4);
    let all = [(70, 4), (33, 4), (16, 4), (9, 8)].map(|(n, b)| ints(n, 544, b, 32, false, Float::F16, &mut rng));
    let all = all.map(|s| pack_for(&s, Isa::best(), Activations::Int8).unwrap());
    for rows in [2, 16, 40, 500] {
        let x = random(rows, 544, 3);
        let want: Vec<Mat> = all.iter().map(|l| forward(l, x.view())).collect();
        everywhere::with(|| {
            for threads in [1, 2, 5] {
                let mut outs = [70, 33, 16, 9].map(|n| random(rows, n, 4));
                let [a, b, c, d] = &mut outs;
                crate::set_threads(threads);
                Linear::forward_all([&all[0], &all[1], &all[2]], x.view(), &mut [a, b, c].map(|m| m.view_mut()));
                Linear::forward_all([&all[3]], x.view(), &mut [d.view_mut()]);
                crate::set_threads(0);
                for (want, got) in want.iter().zip(&outs) {
                    assert_eq!(bits(want.view()), bits(got.view()), "{rows} rows, {threads} threads");
                }
            }
        });
    }
}

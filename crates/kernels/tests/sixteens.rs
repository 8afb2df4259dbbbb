//! Codes into a table whose scales are for 16 columns, or integers under one f16 for 256, and codes with f32 minima:
//! from panels, with the same bits in any company.

use lacuna_base::{Mat, Rng};
use lacuna_format::bits::pack;
use lacuna_format::{Bytes, Float, Group, Pattern, Piece, Scales, Stored, Tables, Values, Zeros};
use lacuna_kernels::{Activations, Isa, Linear, Packing};

fn floats(float: Float, n: usize, rng: &mut Rng) -> Scales {
    let values: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
    Scales::Float(float, float.encode(&values).unwrap().into())
}

fn codes(bits: u8, n: usize, rng: &mut Rng) -> Bytes {
    pack(&(0..n).map(|_| rng.u64() as u8 >> (8 - bits)).collect::<Vec<u8>>(), bits).into()
}

fn cases(rows: usize, cols: usize, rng: &mut Rng) -> Vec<(String, Stored)> {
    let stored = |values| Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values });
    let mut out = Vec::new();
    for (bits, run) in [(3u8, 16), (3, 32), (4, 16), (4, 32)] {
        let groups = cols.div_ceil(run);
        let table: Vec<f32> = (0..1 << bits).map(|_| rng.normal()).collect();
        let supers = rows * groups.div_ceil(256 / run);
        let Scales::Float(_, super_scales) = floats(Float::F16, supers, rng) else { unreachable!("made above") };
        let coded = Scales::Int {
            bits: 5,
            per: 256 / run,
            codes: codes(5, rows * groups, rng),
            super_scales,
            super_mins: None,
        };
        for scales in [coded, floats(Float::F16, rows * groups, rng), floats(Float::F32, rows * groups, rng)] {
            let name =
                format!("table{bits} g{run} {}", if let Scales::Int { .. } = scales { "coded" } else { "floats" });
            let (codes, scales) = (codes(bits, rows * cols, rng), Some((scales, Group::Run(run))));
            out.push((name, stored(Values::Codebook { bits, codes, tables: Tables::one(&table), scales })));
        }
    }
    for (bits, float) in [(2u8, Float::Bf16), (4, Float::Bf16), (8, Float::F32), (6, Float::F16)] {
        let n = rows * cols.div_ceil(64);
        let (scales, zeros) = (floats(float, n, rng), Some(Zeros::Minima(floats(float, n, rng))));
        let codes = codes(bits, rows * cols, rng);
        out.push((
            format!("int{bits} min {float:?}"),
            stored(Values::Int { bits, codes, scales, zeros, group: Group::Run(64) }),
        ));
    }
    out
}

#[test]
fn products_are_those_of_the_decoded_matrix() {
    let mut rng = Rng::new(9);
    for (rows, cols) in [(1, 32), (18, 576), (33, 80), (48, 1024)] {
        let x = Mat::from_fn(5, cols, |_, _| rng.normal());
        for (name, stored) in cases(rows, cols, &mut rng) {
            stored.check().unwrap();
            let w = stored.to_mat();
            let biggest = w.data().iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let mut first: Option<Vec<u32>> = None;
            for (isa, activations) in
                Isa::here().into_iter().flat_map(|i| [(i, Activations::Exact), (i, Activations::Int8)])
            {
                // Bytes are not what tables are multiplied as.
                let near = if activations == Activations::Int8 { 0.02 } else { 1e-5 };
                let packing = Packing { isa, activations };
                let l = Linear::pack_with(&stored, &packing).unwrap();
                assert_ne!(l.describe(), ["decoded"], "{name}");
                let mut y = Mat::zeros(5, rows);
                l.forward(x.view(), y.view_mut());
                for r in 0..5 {
                    for o in 0..rows {
                        let terms = || x.row(r).iter().zip(w.row(o)).map(|(a, b)| f64::from(*a) * f64::from(*b));
                        let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                        let got = f64::from(y[(r, o)]);
                        assert!(
                            (got - want).abs()
                                <= near * if near < 0.01 { size } else { f64::from(biggest) * cols as f64 } + 1e-30,
                            "{name} {isa} {rows}x{cols}: {got} for {want}"
                        );
                    }
                    let (one, mut alone) = (Mat::from_fn(1, cols, |_, c| x[(r, c)]), Mat::zeros(1, rows));
                    l.forward(one.view(), alone.view_mut());
                    let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
                    assert_eq!(bits(alone.row(0)), bits(y.row(r)), "{name} {isa}: row {r} alone");
                }
                // Whole numbers are summed exactly, whatever the vectors; floats are not.
                if name.starts_with("int") && activations == Activations::Int8 {
                    let all: Vec<u32> = y.data().iter().map(|v| v.to_bits()).collect();
                    assert!(*first.get_or_insert(all.clone()) == all, "{name} {isa}: other bits");
                }
            }
        }
    }
}

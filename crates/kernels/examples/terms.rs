//! What further terms cost: one token through int4 alone and through sums that begin with it, and through tables of
//! rows, by turns, from memory and from caches. Speeds over int4 alone are medians over rounds of numbers taken within
//! one.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::{Mat, Rng};
use lacuna_format::{
    Codebook, Float, Group, Integers, Map, Mask, Owner, PatternKind, Piece, ScaleCodec, Stored, Term, pack_codebook,
    pack_float, pack_integers,
};
use lacuna_kernels::{Activations, Linear, Packing};

const ROUNDS: usize = 15;

fn int4(rows: usize, cols: usize, bits: u8) -> Piece {
    let mut rng = Rng::new(3);
    let q = Integers {
        rows,
        cols,
        bits,
        codes: (0..rows * cols).map(|_| rng.below(1 << bits) as u8).collect(),
        scales: Mat::from_fn(rows, cols / 32, |r, g| 0.01 + ((r + g) % 7) as f32 * 1e-3),
        zeros: None,
        group: Group::Run(32),
        offsets: None,
    };
    pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).expect("packs")
}

fn random(rows: usize, cols: usize) -> Mat {
    let mut rng = Rng::new(1);
    Mat::from_fn(rows, cols, |_, _| rng.below(2001) as f32 / 1000.0 - 1.0)
}

/// Outliers by lot, so many in a thousand.
fn csr(rows: usize, cols: usize, per_mille: usize) -> Term {
    let mut rng = Rng::new(2);
    let mask = Mask::from_fn(rows, cols, |_, _| rng.below(1000) < per_mille);
    Term::Piece(pack_float(random(rows, cols).view(), Some(&mask), PatternKind::Csr, Float::F16).expect("packs"))
}

fn thin(rows: usize, rank: usize, cols: usize) -> Term {
    let f16 = |r, c| pack_float(random(r, c).view(), None, PatternKind::Dense, Float::F16).expect("packs");
    Term::Product(f16(rows, rank), f16(rank, cols))
}

fn table(rows: usize, cols: usize, bits: u8, owner: Owner) -> Stored {
    let mut rng = Rng::new(4);
    let codes = (0..rows * cols).map(|_| rng.below(1 << bits) as u8).collect();
    let tables = Mat::from_fn(owner.count(rows, cols).expect("few"), 1 << bits, |_, c| c as f32 - 3.5);
    let q = Codebook { bits, codes, owner, tables, scales: None };
    Stored::from_piece(
        pack_codebook((rows, cols), &q, None, PatternKind::Dense, Float::F16, ScaleCodec::F16).expect("packs"),
    )
}

fn main() {
    for (rows, cols, bytes) in [(1024, 2048, 1 << 20), (576, 1536, 1 << 20), (4096, 4096, 100 << 20)] {
        let sum = |more: Vec<Term>| {
            Stored::new(rows, cols, std::iter::once(Term::Piece(int4(rows, cols, 4))).chain(more).collect())
        };
        let rotated = sum(vec![]).with_maps(vec![Map::hadamard(if cols == 1536 { 512 } else { cols }, None)], vec![]);
        use Activations::{Exact, Int8};
        let all: Vec<(&str, Activations, Stored)> = vec![
            ("int4", Int8, sum(vec![])),
            ("int4 + csr 0.5%", Int8, sum(vec![csr(rows, cols, 5)])),
            ("int4 + csr 1%", Int8, sum(vec![csr(rows, cols, 10)])),
            ("int4 + low rank 32", Int8, sum(vec![thin(rows, 32, cols)])),
            ("int4 + csr 0.5% + low rank 32", Int8, sum(vec![csr(rows, cols, 5), thin(rows, 32, cols)])),
            ("hadamard, int4", Int8, rotated),
            ("int3", Int8, Stored::from_piece(int4(rows, cols, 3))),
            ("int4 exact", Exact, sum(vec![])),
            ("table of the matrix 4", Exact, table(rows, cols, 4, Owner::Matrix)),
            ("tables of rows 4", Exact, table(rows, cols, 4, Owner::Row)),
            ("tables of rows 3", Exact, table(rows, cols, 3, Owner::Row)),
        ];
        let packed: Vec<Vec<Linear>> = all
            .iter()
            .map(|(_, activations, s)| {
                let packing = Packing { activations: *activations, ..Packing::default() };
                let one = Linear::pack_with(s, &packing).expect("sound");
                let more = (bytes / one.weights_bytes()).clamp(1, 40);
                (1..more).map(|_| Linear::pack_with(s, &packing).expect("sound")).chain([one.clone()]).collect()
            })
            .collect();
        let x = Mat::from_fn(1, cols, |_, c| (c * 17 % 101) as f32 / 50.0 - 1.0);
        let mut out = Mat::zeros(1, rows);
        let mut times = vec![Vec::new(); all.len()];
        for _ in 0..ROUNDS {
            for (linears, times) in packed.iter().zip(&mut times) {
                let calls = if bytes > 1 << 20 { 2 * linears.len() } else { 400 };
                linears[0].forward(black_box(x.view()), out.view_mut());
                let best = (0..3).map(|_| {
                    let start = Instant::now();
                    for l in linears.iter().cycle().take(calls) {
                        l.forward(black_box(x.view()), out.view_mut());
                    }
                    start.elapsed().as_secs_f64() / calls as f64
                });
                times.push(best.fold(f64::INFINITY, f64::min));
            }
        }
        println!("{rows} x {cols}, {} matrices a row", packed[0].len());
        for ((name, ..), (t, l)) in all.iter().zip(times.iter().zip(&packed)) {
            let mut ratios: Vec<f64> = t.iter().zip(&times[0]).map(|(t, base)| base / t).collect();
            ratios.sort_by(f64::total_cmp);
            let best = t.iter().copied().fold(f64::INFINITY, f64::min);
            println!(
                "  {name:<30} {:>8.1} us {:>6.2} MB {:>6.1} GB/s  speed over int4 {:.3} ({:.3} to {:.3})  {:?}",
                best * 1e6,
                l[0].weights_bytes() as f64 / 1e6,
                l[0].weights_bytes() as f64 / best / 1e9,
                ratios[ROUNDS / 2],
                ratios[1],
                ratios[ROUNDS - 2],
                l[0].describe()
            );
        }
    }
}

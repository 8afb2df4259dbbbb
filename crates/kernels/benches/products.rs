//! Products of every packed form: G weights/s and GB/s, in the second-level cache and from memory, with one thread and
//! two.
//!
//! Criterion's statistics are about one number; what matters here is a table of minima beside each other, made quickly
//! and alternating between sizes. Run with `cargo bench -p lacuna-kernels`; words given after `--` choose the rows
//! whose name contains one of them.

#[cfg(target_arch = "x86_64")]
#[path = "by_hand.rs"]
mod by_hand;

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::{Mat, Rng};
use lacuna_format::{
    Float, GgufType, Group, Integers, Mask, PatternKind, Piece, ScaleCodec, Stored, Values, pack_float, pack_integers,
};
use lacuna_kernels::{Activations, Isa, Linear, Packing, set_threads};

/// A matrix of codes of `bits` bits in groups of `run`.
fn ints(rows: usize, cols: usize, bits: u8, run: usize, kind: PatternKind, mask: Option<&Mask>) -> Stored {
    let mut rng = Rng::new(1);
    let q = Integers {
        rows,
        cols,
        bits,
        codes: (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect(),
        scales: Mat::from_fn(rows, cols / run, |_, _| 0.01),
        zeros: None,
        group: Group::Run(run),
        offsets: None,
    };
    Stored::from_piece(pack_integers(&q, mask, kind, ScaleCodec::F16).expect("fits"))
}

fn floats(rows: usize, cols: usize, float: Float, kind: PatternKind, mask: Option<&Mask>) -> Stored {
    let mut rng = Rng::new(1);
    let w = Mat::from_fn(rows, cols, |_, _| (rng.u64() >> 40) as f32 / 1e7 - 0.8);
    Stored::from_piece(pack_float(w.view(), mask, kind, float).expect("fits"))
}

fn gguf(rows: usize, cols: usize, kind: GgufType) -> Stored {
    let n = rows * cols / kind.block() * kind.block_bytes();
    let values = Values::Gguf(kind, vec![0x11u8; n].into());
    Stored::from_piece(Piece { rows, cols, pattern: lacuna_format::Pattern::Dense, values })
}

/// Keeps `percent` of the columns for every `height` rows; for N:M the first ones of every run, turned by the row.
fn mask(rows: usize, cols: usize, height: usize, percent: u64) -> Mask {
    let mut rng = Rng::new(2);
    let kept: Vec<bool> = (0..rows.div_ceil(height) * cols).map(|_| rng.u64() % 100 < percent).collect();
    Mask::from_fn(rows, cols, |r, c| kept[r / height * cols + c])
}

fn half_of_each(rows: usize, cols: usize, m: usize) -> Mask {
    Mask::from_fn(rows, cols, |r, c| (c + r) % m < m / 2)
}

type Make = Box<dyn Fn(usize, usize) -> Stored>;

fn rows() -> Vec<(&'static str, Activations, Make)> {
    use Activations::{Exact, Int8};
    use PatternKind::Dense;
    let float = |f: Float| -> Make { Box::new(move |r, c| floats(r, c, f, Dense, None)) };
    let int = |bits: u8, run: usize| -> Make { Box::new(move |r, c| ints(r, c, bits, run, Dense, None)) };
    let shared = |height: usize| -> Make {
        Box::new(move |r, c| ints(r, c, 4, c, PatternKind::Mask { height }, Some(&mask(r, c, height, 50))))
    };
    let grouped = |height: usize, run: usize| -> Make {
        Box::new(move |r, c| ints(r, c, 4, run, PatternKind::Mask { height }, Some(&mask(r, c, height, 50))))
    };
    vec![
        ("f32", Exact, float(Float::F32)),
        ("f16", Exact, float(Float::F16)),
        ("bf16", Exact, float(Float::Bf16)),
        ("int4 exact", Exact, int(4, 32)),
        ("int8 exact", Exact, int(8, 32)),
        ("int2 bytes", Int8, int(2, 32)),
        ("int3 bytes", Int8, int(3, 32)),
        ("int4 bytes", Int8, int(4, 32)),
        ("int5 bytes", Int8, int(5, 32)),
        ("int6 bytes", Int8, int(6, 32)),
        ("int8 bytes", Int8, int(8, 32)),
        ("q4_0 bytes", Int8, Box::new(|r, c| gguf(r, c, GgufType::Q4_0))),
        ("q8_0 bytes", Int8, Box::new(|r, c| gguf(r, c, GgufType::Q8_0))),
        ("q4_k bytes", Int8, Box::new(|r, c| gguf(r, c, GgufType::Q4_K))),
        ("shared 32 int4 row bytes", Int8, shared(32)),
        ("shared 16 int4 row bytes", Int8, shared(16)),
        ("shared 8 int4 row bytes", Int8, shared(8)),
        ("shared 16 int4 g128 bytes", Int8, grouped(16, 128)),
        ("shared 16 int4 g64 bytes", Int8, grouped(16, 64)),
        ("shared 8 int4 g64 bytes", Int8, grouped(8, 64)),
        (
            "shared 16 f16",
            Exact,
            Box::new(|r, c| floats(r, c, Float::F16, PatternKind::Mask { height: 16 }, Some(&mask(r, c, 16, 50)))),
        ),
        (
            "bitmask 50% f16",
            Exact,
            Box::new(|r, c| floats(r, c, Float::F16, PatternKind::Mask { height: 1 }, Some(&mask(r, c, 1, 50)))),
        ),
        (
            "bitmask 70% f16",
            Exact,
            Box::new(|r, c| floats(r, c, Float::F16, PatternKind::Mask { height: 1 }, Some(&mask(r, c, 1, 30)))),
        ),
        (
            "2:4 f16",
            Exact,
            Box::new(|r, c| floats(r, c, Float::F16, PatternKind::Nm { n: 2, m: 4 }, Some(&half_of_each(r, c, 4)))),
        ),
        (
            "2:4 int4 bytes",
            Int8,
            Box::new(|r, c| ints(r, c, 4, 32, PatternKind::Nm { n: 2, m: 4 }, Some(&half_of_each(r, c, 4)))),
        ),
        (
            "4:8 int4 bytes",
            Int8,
            Box::new(|r, c| ints(r, c, 4, 32, PatternKind::Nm { n: 4, m: 8 }, Some(&half_of_each(r, c, 8)))),
        ),
    ]
}

/// Shortest time of a call, in seconds, over at least `budget` seconds.
fn shortest(budget: f64, mut call: impl FnMut()) -> f64 {
    call();
    let (begun, mut best) = (Instant::now(), f64::INFINITY);
    while begun.elapsed().as_secs_f64() < budget {
        let one = Instant::now();
        call();
        best = best.min(one.elapsed().as_secs_f64());
    }
    best
}

/// The generic int4 row beside what a person would write, alternating, one thread, shortest of each; and the ratio of
/// their times. In the caches, where instructions are what counts, and from memory, where a token finds its weights; by
/// hand without and with prefetching.
#[cfg(target_arch = "x86_64")]
fn against_hand(rows: usize, cols: usize) {
    if !Isa::Avx2.available() {
        return;
    }
    set_threads(1);
    let mut rng = Rng::new(1);
    let scale = half::f16::from_f32(0.01);
    let q = Integers {
        rows,
        cols,
        bits: 4,
        codes: (0..rows * cols).map(|_| rng.u64() as u8 >> 4).collect(),
        scales: Mat::from_fn(rows, cols / 32, |_, _| scale.to_f32()),
        zeros: None,
        group: Group::Run(32),
        offsets: None,
    };
    let hand = by_hand::Matrix::new(rows, cols, &q.codes, scale);
    let stored = Stored::from_piece(pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).expect("fits"));
    let packing = Packing { isa: Isa::Avx2, activations: Activations::Int8 };
    let l = Linear::pack_with(&stored, &packing).expect("a good matrix");
    let x = Mat::from_fn(1, cols, |_, _| (rng.u64() >> 40) as f32 / 1e7 - 0.8);
    let mut outs = [Mat::zeros(1, rows), Mat::zeros(1, rows), Mat::zeros(1, rows)];
    let (mut codes, mut meta) = (vec![0i8; cols], vec![(0.0, 0); cols / 32]);
    let mut best = [f64::INFINITY; 3];
    for _ in 0..10 {
        best[0] = best[0].min(shortest(0.05, || l.forward(black_box(x.view()), outs[0].view_mut())));
        let call = || hand.multiply::<false>(black_box(x.data()), &mut codes, &mut meta, outs[1].data_mut());
        best[1] = best[1].min(shortest(0.05, call));
        let call = || hand.multiply::<true>(black_box(x.data()), &mut codes, &mut meta, outs[2].data_mut());
        best[2] = best[2].min(shortest(0.05, call));
    }
    assert!(outs[1..].iter().all(|o| o.data() == outs[0].data()), "by hand comes the same");
    let rate = |t: f64| (rows * cols) as f64 / t / 1e9;
    println!(
        "int4 bytes avx2 {rows}x{cols}: generic {:.1} G weights/s; by hand {:.1}, time ratio {:.3}; by hand and \
         prefetched {:.1}, {:.3}",
        rate(best[0]),
        rate(best[1]),
        best[0] / best[1],
        rate(best[2]),
        best[0] / best[2]
    );
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|w| name.contains(w.as_str()));
    let isas: Vec<Isa> = Isa::here().into_iter().filter(|i| wanted(i.name()) || *i == Isa::best()).collect();
    let all_rows = words.iter().all(|w| Isa::ALL.iter().any(|i| i.name() == w));
    println!("{:<28} {:>10} {:>12} {:>5} {:>3}  G weights/s   GB/s", "row", "isa", "shape", "rows", "thr");
    #[cfg(target_arch = "x86_64")]
    for (rows, cols) in [(512, 1024), (1024, 1024), (16384, 8192)] {
        against_hand(rows, cols);
    }
    for (name, activations, make) in rows() {
        if !(all_rows || wanted(name)) {
            continue;
        }
        // In the second-level caches of two cores; from memory, beyond the third level of most processors; prompts.
        for (shape, batches) in [((1024, 1024), &[1, 512][..]), ((8192, 8192), &[1, 4][..])] {
            let stored = make(shape.0, shape.1);
            for &isa in &isas {
                let l = Linear::pack_with(&stored, &Packing { isa, activations }).expect("a good matrix");
                for &n in batches {
                    let x = Mat::from_fn(n, shape.1, |r, c| ((r * 31 + c * 17) % 101) as f32 / 50.0 - 1.0);
                    let mut out = Mat::zeros(n, shape.0);
                    for threads in [1, 2] {
                        set_threads(threads);
                        let t = shortest(0.15, || l.forward(black_box(x.view()), out.view_mut()));
                        let weights = (shape.0 * shape.1 * n) as f64 / t / 1e9;
                        let gb = l.weights_bytes() as f64 / t / 1e9;
                        let shape = format!("{}x{}", shape.0, shape.1);
                        println!(
                            "{name:<28} {:>10} {shape:>12} {n:>5} {threads:>3} {weights:>12.1} {gb:>6.1}",
                            isa.name()
                        );
                    }
                }
            }
        }
    }
}

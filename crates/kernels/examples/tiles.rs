//! Products of many rows by dot products and by tiles, by turns: G multiply-adds a second of both, and how many times as
//! fast tiles are. From how many rows on they are worth it is in `linear/prepare.rs`.
//!
//! Run with `cargo run --release -p lacuna-kernels --example tiles -- THREADS... [ROWS...]`: numbers up to 64 before a
//! `rows` are threads, those after it rows of x.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::{Mat, Rng};
use lacuna_format::{
    GgufType, Group, Integers, Pattern, PatternKind, Piece, ScaleCodec, Stored, Values, pack_integers,
};
use lacuna_kernels::{Activations, Isa, Linear, Packing, set_threads};

fn ints(rows: usize, cols: usize, bits: u8, run: usize, zeros: bool) -> Stored {
    let mut rng = Rng::new(1);
    let mut codes = |n: usize| (0..n).map(|_| rng.u64() as u8 >> (8 - bits)).collect::<Vec<u8>>();
    let q = Integers {
        rows,
        cols,
        bits,
        codes: codes(rows * cols),
        scales: Mat::from_fn(rows, cols / run, |_, _| 0.01),
        zeros: zeros.then(|| codes(rows * cols / run)),
        group: Group::Run(run),
        offsets: None,
    };
    Stored::from_piece(pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).expect("fits"))
}

fn gguf(rows: usize, cols: usize, kind: GgufType) -> Stored {
    let n = rows * cols / kind.block() * kind.block_bytes();
    let values = Values::Gguf(kind, vec![0x11u8; n].into());
    Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values })
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (threads, rows) = words.split_at(words.iter().position(|w| w == "rows").unwrap_or(words.len()));
    let numbers = |words: &[String]| words.iter().filter_map(|w| w.parse().ok()).collect::<Vec<usize>>();
    let (threads, mut rows) = (numbers(threads), numbers(rows));
    if rows.is_empty() {
        rows = vec![4, 8, 12, 16, 24, 32, 64, 512, 2048];
    }
    let [plain, tiled] = [Isa::Avx512Vnni, Isa::Amx];
    if !plain.available() {
        return println!("this processor has no {plain}");
    }
    let tiled = if tiled.available() { tiled } else { plain };
    println!(
        "{plain} beside {tiled}, G multiply-adds/s\nform        shape        threads   rows     dots    tiles  times"
    );
    for (out, cols) in [(1536, 576), (4096, 4096), (4096, 14336)] {
        let forms = [
            ("int4 g32", ints(out, cols, 4, 32, false)),
            ("int8 g32", ints(out, cols, 8, 32, false)),
            ("int4 zeros", ints(out, cols, 4, 64, true)),
            ("q4_k", gguf(out, cols / 256 * 256, GgufType::Q4_K)),
            ("q6_k", gguf(out, cols / 256 * 256, GgufType::Q6_K)),
        ];
        for (name, stored) in &forms {
            let cols = stored.cols;
            let pack = |isa| Linear::pack_with(stored, &Packing { isa, activations: Activations::Int8 }).expect("good");
            let both = [pack(plain), pack(tiled)];
            for (&threads, &n) in threads.iter().flat_map(|t| rows.iter().map(move |r| (t, r))) {
                if cols > 576 && threads == 1 && n > 512 || cols > 4096 && !["int4 g32", "q6_k"].contains(name) {
                    continue;
                }
                set_threads(threads);
                let x = Mat::from_fn(n, cols, |r, c| ((r * 31 + c * 17) % 101) as f32 / 50.0 - 1.0);
                let mut outs = [Mat::zeros(n, out), Mat::zeros(n, out)];
                let (begun, mut best, mut turns) = (Instant::now(), [f64::INFINITY; 2], 0);
                while turns < 3 || (begun.elapsed().as_secs_f64() < 0.1 && turns < 200) {
                    for i in 0..2 {
                        let one = Instant::now();
                        both[i].forward(black_box(x.view()), outs[i].view_mut());
                        best[i] = best[i].min(one.elapsed().as_secs_f64());
                    }
                    turns += 1;
                }
                let [a, b] = &outs;
                assert!(a.data().iter().zip(b.data()).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: other bits");
                let [dots, tiles] = best.map(|t| (out * cols * n) as f64 / t / 1e9);
                let shape = format!("{out}x{cols}");
                println!("{name:<11} {shape:<12} {threads:>7} {n:>6} {dots:>8.0} {tiles:>8.0} {:>6.2}", tiles / dots);
            }
        }
    }
}

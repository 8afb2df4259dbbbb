//! How near every kernel row comes to what the machine allows, one token at a time, by all threads.
//!
//!     cargo run --release --manifest-path bench/rows/Cargo.toml -- [--threads N] [--shape ROWSxCOLS] [--only TEXT] [--json FILE]
//!
//! For each row: weights a second on a matrix in the second-level cache, and on matrices from memory; the share that the latter has of the
//! smaller of that cache rate and bandwidth over bytes a weight; and the speed against the dense form of the same bits. Bandwidth is measured
//! just before and after each row, since shared machines drift.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::Mat;
use lacuna_bench_rows::ROWS;
use lacuna_kernels::{Isa, Linear, ceiling, set_threads, threads};
use serde_json::{Value, json};

/// Bytes that are read in turn, far more than caches hold.
const FROM_MEMORY: u64 = 256 << 20;
/// Bytes of a matrix in the second-level caches, for each thread.
const IN_CACHE: u64 = 640 << 10;

/// Weights a second over the matrices, the best of several passes.
fn rate(all: &[Linear], passes: usize) -> f64 {
    let (rows, cols) = (all[0].rows(), all[0].cols());
    let x = Mat::from_fn(1, cols, |_, c| (c * 17 % 101) as f32 / 50.0 - 1.0);
    let mut out = Mat::zeros(1, rows);
    let mut best = 0.0f64;
    for _ in 0..=passes {
        let start = Instant::now();
        for linear in all {
            linear.forward(black_box(x.view()), out.view_mut());
        }
        best = best.max((all.len() * rows * cols) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |flag: &str| args.iter().position(|a| a == flag).and_then(|i| args.get(i + 1));
    set_threads(value("--threads").map_or(0, |n| n.parse().expect("--threads takes a number")));
    let (rows, cols) = value("--shape").map_or((2048, 8192), |s| {
        let (r, c) = s.split_once('x').expect("--shape takes ROWSxCOLS");
        (r.parse().expect("a number of rows"), c.parse().expect("a number of columns"))
    });
    let threads = threads();
    println!("{}, {threads} threads, {rows} x {cols}", Isa::best());
    println!("{:<24} {:>7} {:>9} {:>9} {:>7} {:>7} {:>7} {:>7}", "", "bytes/w", "cache G/s", "mem. G/s", "GB/s", "ceiling", "share", "x dense");
    let mut done: Vec<(&str, f64, Value)> = Vec::new();
    for row in ROWS.iter().filter(|r| value("--only").is_none_or(|only| r.name.contains(only.as_str()))) {
        let one = row.linear(rows, cols);
        let bytes = one.weights_bytes() as f64 / (rows * cols) as f64;
        // As many rows of it as the caches hold.
        let few = (IN_CACHE as f64 * threads as f64 / (bytes * cols as f64)) as usize / 64 * 64;
        let near = row.linear(few.max(64), cols);
        let cache = rate(&vec![near; 1], 200);
        let copies = (FROM_MEMORY / one.weights_bytes()).max(1) as usize;
        let matrix = row.matrix(rows, cols);
        let packing = lacuna_kernels::Packing { activations: lacuna_kernels::Activations::Int8, ..Default::default() };
        let mut all = vec![one];
        all.extend((1..copies).map(|_| Linear::pack_with(&matrix, &packing).expect("a sound matrix")));
        let mut bandwidth = ceiling::bandwidth(512 << 20);
        let memory = rate(&all, 5);
        bandwidth = bandwidth.max(ceiling::bandwidth(512 << 20));
        let share = memory / cache.min(bandwidth / bytes);
        let against = row.dense.and_then(|d| done.iter().find(|(n, ..)| *n == d)).map(|(_, g, _)| memory / g);
        println!(
            "{:<24} {bytes:>7.3} {:>9.1} {:>9.1} {:>7.1} {:>7.1} {:>6.0}% {:>7}",
            row.name,
            cache / 1e9,
            memory / 1e9,
            memory * bytes / 1e9,
            bandwidth / 1e9,
            100.0 * share,
            against.map_or_else(String::new, |x| format!("{x:.2}")),
        );
        let v = json!({
            "row": row.name, "bytes_per_weight": bytes, "cache_weights_per_second": cache, "memory_weights_per_second": memory,
            "read_bytes_per_second": bandwidth, "share": share, "speed_over_dense": against,
        });
        done.push((row.name, memory, v));
    }
    if let Some(file) = value("--json") {
        let rows: Vec<Value> = done.into_iter().map(|(_, _, v)| v).collect();
        let all = json!({ "isa": Isa::best().name(), "threads": threads, "columns": cols, "rows": rows });
        std::fs::write(file, format!("{all:#}\n")).expect("the record is written");
    }
}

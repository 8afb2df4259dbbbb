//! How near every kernel row comes to what the machine allows, one token at a time, by all threads.
//!
//!     cargo run --release --manifest-path bench/rows/Cargo.toml -- [--threads N] [--shape ROWSxCOLS] [--only TEXT] [--json FILE]
//!
//! For each row: weights a second on a matrix in the second-level cache, and on matrices from memory; the share that
//! the latter has of the smaller of that cache rate and bandwidth over bytes a weight; and the speed against the dense
//! form of the same bits. Shared machines drift, in memory and in processors, so bandwidth, the row from memory, the
//! row in the cache for as many weights, and its dense form are measured by turns, each as often as the others, and the
//! best of a round counts: shares and speeds over dense are medians over rounds, of numbers taken within one; the rates
//! printed are the best ones.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::Mat;
use lacuna_bench_rows::{ROWS, Row};
use lacuna_kernels::{Activations, Isa, Linear, Packing, ceiling, set_threads, threads};
use serde_json::{Value, json};

/// Bytes that are read in turn, far more than caches hold; the stream beside them reads as many.
const FROM_MEMORY: u64 = 512 << 20;
/// Bytes of a matrix in the second-level caches, for each thread.
const IN_CACHE: u64 = 640 << 10;

/// Rounds of measuring by turns.
const ROUNDS: usize = 11;
/// Turns of a round.
const TURNS: usize = 3;
/// Passes of a turn: as many as [`ceiling::Reads::pass`] makes.
const PASSES: usize = 2;

/// Weights a second over the matrices, `times` over; the best of several such passes.
fn rate(all: &[Linear], times: usize, passes: usize) -> f64 {
    let (rows, cols) = (all[0].rows(), all[0].cols());
    let x = Mat::from_fn(1, cols, |_, c| (c * 17 % 101) as f32 / 50.0 - 1.0);
    let mut out = Mat::zeros(1, rows);
    let mut best = 0.0f64;
    for _ in 0..passes {
        let start = Instant::now();
        for linear in (0..times).flat_map(|_| all) {
            linear.forward(black_box(x.view()), out.view_mut());
        }
        best = best.max((times * all.len() * rows * cols) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

/// Enough copies of a row's matrix that none is in a cache when its turn comes.
fn from_memory(row: &Row, rows: usize, cols: usize) -> Vec<Linear> {
    let matrix = row.matrix(rows, cols);
    let packing = Packing { activations: Activations::Int8, ..Packing::default() };
    let pack = || Linear::pack_with(&matrix, &packing).expect("a sound matrix");
    let one = pack();
    let copies = (FROM_MEMORY / one.weights_bytes()).max(1);
    std::iter::once(one).chain((1..copies).map(|_| pack())).collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
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
    println!(
        "{:<24} {:>7} {:>9} {:>9} {:>7} {:>7} {:>7} {:>7}",
        "", "bytes/w", "cache G/s", "mem. G/s", "GB/s", "ceiling", "share", "x dense"
    );
    let mut done: Vec<Value> = Vec::new();
    let reads = ceiling::Reads::new(FROM_MEMORY as usize);
    for row in ROWS.iter().filter(|r| value("--only").is_none_or(|only| r.name.contains(only.as_str()))) {
        let all = from_memory(row, rows, cols);
        let dense = row.dense.and_then(|d| ROWS.iter().find(|r| r.name == d)).map(|d| from_memory(d, rows, cols));
        let bytes = all[0].weights_bytes() as f64 / (rows * cols) as f64;
        // As many rows of it as the caches hold, a quarter as long: x is packed for about as many rows as in the
        // large matrix.
        let short = (cols / 4).next_multiple_of(256);
        let few = (IN_CACHE as f64 * threads as f64 / (bytes * short as f64)) as usize / 64 * 64;
        let small = [row.linear(few.max(64), short)];
        let again = (all.len() * rows * cols).div_ceil(few.max(64) * short);
        // In short passes some meet a moment when nobody else slows the processor: the rate printed, not that of
        // shares.
        let mut best = [0.0, 0.0, rate(&small, 1, 400)];
        let (mut shares, mut over) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (mut round, mut beside) = ([0.0f64; 3], 0.0f64);
            for _ in 0..TURNS {
                let read = reads.pass().into_iter().fold(0.0, f64::max);
                for (most, now) in round.iter_mut().zip([read, rate(&all, 1, PASSES), rate(&small, again, PASSES)]) {
                    *most = most.max(now);
                }
                beside = dense.as_ref().map_or(0.0, |d| beside.max(rate(d, 1, PASSES)));
            }
            let [read, memory, cache] = round;
            shares.push(memory / cache.min(read / bytes));
            over.extend(dense.as_ref().map(|_| memory / beside));
            for (most, now) in best.iter_mut().zip(round) {
                *most = most.max(now);
            }
        }
        let [bandwidth, memory, cache] = best;
        let share = median(shares);
        let against = dense.map(|_| median(over));
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
        done.push(json!({
            "row": row.name, "bytes_per_weight": bytes, "cache_weights_per_second": cache, "memory_weights_per_second": memory,
            "read_bytes_per_second": bandwidth, "share": share, "speed_over_dense": against,
        }));
    }
    if let Some(file) = value("--json") {
        let all = json!({ "isa": Isa::best().name(), "threads": threads, "columns": cols, "rows": done });
        std::fs::write(file, format!("{all:#}\n")).expect("the record is written");
    }
}

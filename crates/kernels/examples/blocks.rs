//! What constant blocks pay: products with matrices that keep blocks of some rows by one column, beside the dense
//! product of the same codec, by turns, on shapes of models; one token and 32 at once. Speeds over dense are medians
//! over rounds of numbers taken within one, with the second-lowest and second-highest. Words after `--` choose the
//! codecs; `threads=N` how many threads, else as many as the machine has.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::{Mat, Rng};
use lacuna_format::{
    Code, Float, Group, Integers, Layout, Mask, ScaleCodec, Stored, Unpacked, UnpackedPiece, UnpackedTerm,
};
use lacuna_kernels::{Activations, Linear, Packing, set_threads};

const ROUNDS: usize = 11;

/// Keeps `percent` of the blocks of `height` rows in every block row, by lot.
fn mask(rows: usize, cols: usize, height: usize, percent: usize) -> Mask {
    let mut rng = Rng::new(2);
    let mut kept = vec![false; rows.div_ceil(height) * cols];
    for row in kept.chunks_mut(cols) {
        let mut order: Vec<usize> = (0..cols).collect();
        for i in 0..cols {
            order.swap(i, i + rng.below(cols - i));
        }
        order[..(cols * percent).div_ceil(100)].iter().for_each(|&c| row[c] = true);
    }
    Mask::from_fn(rows, cols, |r, c| kept[r / height * cols + c])
}

/// As a recipe leaves it: f16 (`bits` 16) or integers with a scale for every 64 columns, in the cheapest pattern.
fn stored(rows: usize, cols: usize, bits: u8, sparse: Option<(usize, usize)>) -> Stored {
    let mut rng = Rng::new(1);
    let w = Mat::from_fn(rows, cols, |_, _| (rng.u64() >> 40) as f32 / 1e7 - 0.8);
    let mut piece = UnpackedPiece::dense(w);
    if bits < 16 {
        let codes = (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
        let scales = Mat::from_fn(rows, cols / 64, |_, _| 0.0078125);
        let q = Integers { rows, cols, bits, codes, scales, zeros: None, group: Group::Run(64), offsets: None };
        piece.code = Code::Integers(q, ScaleCodec::F16);
    }
    if let Some((height, percent)) = sparse {
        piece.layout = Layout::Cheapest(Some((height, 1)));
        piece.keep(mask(rows, cols, height, percent));
    }
    let whole = Unpacked { main: UnpackedTerm::Piece(piece), aside: Vec::new(), input: Vec::new() };
    whole.pack(Float::F16).expect("packs")
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let number = words.iter().find_map(|w| w.strip_prefix("threads=")?.parse().ok());
    set_threads(number.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get())));
    let named: Vec<&String> = words.iter().filter(|w| !w.contains('=')).collect();
    let codecs = [("f16", 16, Activations::Exact), ("int8", 8, Activations::Int8), ("int4", 4, Activations::Int8)];
    for (codec, bits, activations) in codecs.into_iter().filter(|c| named.is_empty() || named.iter().any(|n| *n == c.0))
    {
        for (rows, cols) in [(1536, 576), (2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096)] {
            let mut all = vec![("dense".to_owned(), None)];
            for percent in [30, 20, 10] {
                let sparse = |h: usize| (format!("{}% of {h}x1 gone", 100 - percent), Some((h, percent)));
                all.extend([4, 8, 16, 32].map(sparse));
            }
            // Beyond the caches, as a token finds the matrices of a model.
            let bytes = if rows * cols > 1 << 20 { 96 << 20 } else { 1 << 20 };
            let packed: Vec<Vec<Linear>> = all
                .iter()
                .map(|(_, sparse)| {
                    let stored = stored(rows, cols, bits, *sparse);
                    let packing = Packing { activations, ..Packing::default() };
                    let one = Linear::pack_with(&stored, &packing).expect("sound");
                    let more = (bytes / one.weights_bytes() as usize).clamp(1, 24);
                    (1..more).map(|_| Linear::pack_with(&stored, &packing).expect("sound")).chain([one]).collect()
                })
                .collect();
            for batch in [1, 32] {
                let x = Mat::from_fn(batch, cols, |r, c| ((r * 31 + c * 17) % 101) as f32 / 50.0 - 1.0);
                let mut out = Mat::zeros(batch, rows);
                let mut times = vec![Vec::new(); all.len()];
                for _ in 0..ROUNDS {
                    for (linears, times) in packed.iter().zip(&mut times) {
                        linears[0].forward(black_box(x.view()), out.view_mut());
                        let best = (0..3).map(|_| {
                            let start = Instant::now();
                            linears.iter().for_each(|l| l.forward(black_box(x.view()), out.view_mut()));
                            start.elapsed().as_secs_f64() / linears.len() as f64
                        });
                        times.push(best.fold(f64::INFINITY, f64::min));
                    }
                }
                println!("{codec} {rows} x {cols}, {batch} rows");
                for ((name, _), (t, l)) in all.iter().zip(times.iter().zip(&packed)) {
                    let mut ratios: Vec<f64> = t.iter().zip(&times[0]).map(|(t, base)| base / t).collect();
                    ratios.sort_by(f64::total_cmp);
                    println!(
                        "  {name:<18} {:>9.1} us {:>7.2} MB  speed over dense {:.2} ({:.2} to {:.2})  {:?}",
                        t.iter().copied().fold(f64::INFINITY, f64::min) * 1e6,
                        l[0].weights_bytes() as f64 / 1e6,
                        ratios[ROUNDS / 2],
                        ratios[1],
                        ratios[ROUNDS - 2],
                        l[0].describe()
                    );
                }
            }
        }
    }
}

//! What leaving channels out pays: one row's product by columns, of some channels, beside the whole product of the same
//! codec, by turns, on shapes of models. Channels are single ones by lot, or neighbours in strips of 16 KB. Times over
//! the whole product's are medians over rounds of numbers taken within one, with the second-lowest and second-highest;
//! bytes over the whole product's beside them. Words after `--` choose the codecs; `threads=N` how many threads, else as
//! many as the machine has.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::{Mat, Rng};
use lacuna_format::{Code, Float, Group, Integers, ScaleCodec, Stored, Unpacked, UnpackedPiece, UnpackedTerm};
use lacuna_kernels::{Activations, Linear, Packing, set_threads};

const ROUNDS: usize = 7;

/// f16 (`bits` 16), or integers with a scale for every 64 columns.
fn stored(rows: usize, cols: usize, bits: u8) -> Stored {
    let mut rng = Rng::new(1);
    let w = Mat::from_fn(rows, cols, |_, _| (rng.u64() >> 40) as f32 / 1e7 - 0.8);
    let mut piece = UnpackedPiece::dense(w);
    if bits < 16 {
        let codes = (0..rows * cols).map(|_| rng.u64() as u8 >> (8 - bits)).collect();
        let scales = Mat::from_fn(rows, cols / 64, |_, _| 0.0078125);
        let q = Integers { rows, cols, bits, codes, scales, zeros: None, group: Group::Run(64), offsets: None };
        piece.code = Code::Integers(q, ScaleCodec::F16);
    }
    let whole = Unpacked { main: UnpackedTerm::Piece(piece), aside: Vec::new(), input: Vec::new() };
    whole.pack(Float::F16).expect("packs")
}

/// `percent` of the channels, in runs of `strip`.
fn kept(cols: usize, percent: usize, strip: usize) -> Vec<u32> {
    let strips = cols.div_ceil(strip);
    let mut order: Vec<usize> = (0..strips).collect();
    let mut rng = Rng::new(2);
    (0..strips).for_each(|i| order.swap(i, i + rng.below(strips - i)));
    let mut all: Vec<u32> = (order[..(strips * percent).div_ceil(100)].iter())
        .flat_map(|s| s * strip..((s + 1) * strip).min(cols))
        .map(|c| c as u32)
        .collect();
    all.sort_unstable();
    all
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let number = words.iter().find_map(|w| w.strip_prefix("threads=")?.parse().ok());
    set_threads(number.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get())));
    let named: Vec<&String> = words.iter().filter(|w| !w.contains('=')).collect();
    let codecs = [("f16", 16, Activations::Exact), ("int8", 8, Activations::Int8), ("int4", 4, Activations::Int8)];
    for (codec, bits, activations) in codecs.into_iter().filter(|c| named.is_empty() || named.iter().any(|n| *n == c.0))
    {
        for (rows, cols) in [(576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048), (2048, 8192)] {
            let stored = stored(rows, cols, bits);
            let packing = Packing { activations, ..Packing::default() };
            let one = || {
                let mut l = Linear::pack_with(&stored, &packing).expect("sound");
                l.keep_columns(&stored).expect("has columns");
                l
            };
            // Beyond the caches, as a token finds the matrices of a model; few of their channels, too.
            let first = one();
            let more = ((384 << 20) / first.weights_bytes() as usize).clamp(1, 600);
            let linears: Vec<Linear> = (1..more).map(|_| one()).chain([first]).collect();
            let strip = (16 << 10) / (rows * usize::from(bits) / 8);
            let mut lists = Vec::new();
            for percent in [75, 50, 40, 30, 20, 10] {
                lists.push((format!("{percent}% single"), kept(cols, percent, 1)));
                if strip > 1 {
                    lists.push((format!("{percent}% in strips of {strip}"), kept(cols, percent, strip)));
                }
            }
            let mut out = Mat::zeros(1, rows);
            let (mut times, mut bytes) = (vec![Vec::new(); lists.len()], vec![0; lists.len()]);
            let mut whole = Vec::new();
            for _ in 0..ROUNDS {
                let x = Mat::from_fn(1, cols, |_, c| ((c * 17) % 101) as f32 / 50.0 - 1.0);
                let best = |f: &mut dyn FnMut(&Linear)| {
                    f(&linears[0]);
                    let timed = (0..2).map(|_| {
                        let start = Instant::now();
                        linears.iter().for_each(&mut *f);
                        start.elapsed().as_secs_f64() / linears.len() as f64
                    });
                    timed.fold(f64::INFINITY, f64::min)
                };
                let mut all = |l: &Linear| l.forward(black_box(x.view()), out.view_mut());
                let dense = best(&mut all);
                whole.push(dense);
                for ((_, kept), (times, bytes)) in lists.iter().zip(times.iter_mut().zip(&mut bytes)) {
                    let mut x = x.clone();
                    (0..cols).filter(|c| kept.binary_search(&(*c as u32)).is_err()).for_each(|c| x[(0, c)] = 0.0);
                    let mut some = |l: &Linear| {
                        *bytes =
                            Linear::forward_chosen(&[l], black_box(x.view()), &[Some(kept)], &mut [out.view_mut()]);
                    };
                    times.push(best(&mut some) / dense);
                }
            }
            whole.sort_by(f64::total_cmp);
            let (time, size) = (whole[ROUNDS / 2], linears[0].weights_bytes() as f64);
            println!("{codec} {rows} x {cols}: whole {:.1} us, {:.1} GB/s", 1e6 * time, size / time / 1e9);
            for ((name, _), (times, bytes)) in lists.iter().zip(times.iter_mut().zip(&bytes)) {
                times.sort_by(f64::total_cmp);
                let (low, mid, high) = (times[1], times[ROUNDS / 2], times[ROUNDS - 2]);
                println!("  {name:>24}: time {mid:.2} ({low:.2} to {high:.2}), bytes {:.2}", *bytes as f64 / size);
            }
        }
    }
}

//! GGUF's indices into a grid as they lie beside the same values unfolded into codes of 3 and 4 bits of a table, by
//! turns: milliseconds for a row of x (or ROWS) and matrices enough to come from memory.
//!
//! Run with `cargo run --release -p lacuna-kernels --example lattice -- THREADS ROWS MATRICES`.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::{Mat, Rng};
use lacuna_format::bits::pack;
use lacuna_format::gguf::ALL;
use lacuna_format::{GgufType, Group, Pattern, Piece, Scales, Stored, Tables, Values};
use lacuna_kernels::{Activations, Isa, Linear, Packing, set_threads};

const SHAPE: (usize, usize) = (4096, 8192);

fn stored(values: Values) -> Stored {
    Stored::from_piece(Piece { rows: SHAPE.0, cols: SHAPE.1, pattern: Pattern::Dense, values })
}

/// Random blocks, and the same unfolded.
fn both(kind: GgufType) -> [Stored; 2] {
    let (mut rng, size) = (Rng::new(1), kind.block_bytes());
    let blocks = SHAPE.0 * SHAPE.1 / 256;
    let mut bytes: Vec<u8> = (0..blocks * size).map(|_| rng.u64() as u8).collect();
    bytes.chunks_exact_mut(size).for_each(|b| b[1] = 0x1C);
    let l = kind.lattice().expect("of these");
    let (bits, sign) = if l.each == 8 { (3, 4) } else { (4, 8) };
    let (mut codes, mut scales, mut over) = (Vec::new(), Vec::new(), Vec::new());
    for b in bytes.chunks_exact(size) {
        let p = l.points(b);
        codes.extend((0..256).map(|i| {
            let place = l.places[usize::from(p.index[i / l.each]) * l.each + i % l.each];
            place | if p.signs[i / 8] >> (i % 8) & 1 == 1 { sign } else { 0 }
        }));
        scales.extend((0..256 / l.run).map(|r| 2 * p.scales[r] + 1));
        over.extend(p.d.to_le_bytes());
    }
    let mut table = vec![0.0; 1 << bits];
    for (i, v) in l.levels.iter().enumerate() {
        (table[i], table[i + usize::from(sign)]) = (f32::from(*v) * l.unit, -f32::from(*v) * l.unit);
    }
    let scales = Scales::Int {
        bits: 5,
        per: 256 / l.run,
        codes: pack(&scales, 5).into(),
        super_scales: over.into(),
        super_mins: None,
    };
    let (tables, scales) = (Tables::one(&table), Some((scales, Group::Run(l.run))));
    let unfolded = Values::Codebook { bits, codes: pack(&codes, bits).into(), tables, scales };
    [stored(Values::Gguf(kind, bytes.into())), stored(unfolded)]
}

fn main() {
    let mut words = std::env::args().skip(1).filter_map(|w| w.parse::<usize>().ok());
    let (threads, rows, matrices) = (words.next().unwrap_or(1), words.next().unwrap_or(1), words.next().unwrap_or(8));
    set_threads(threads);
    let x = Mat::from_fn(rows, SHAPE.1, |r, c| ((r * 31 + c * 17) % 101) as f32 / 50.0 - 1.0);
    let (n, mut out) = ((SHAPE.0 * SHAPE.1) as f64, Mat::zeros(rows, SHAPE.0));
    for isa in Isa::here().into_iter().filter(|i| *i != Isa::Portable && *i != Isa::Amx) {
        println!(
            "{isa}, {threads} threads, {rows} rows: ms a matrix, GB/s\ntype        form      activations bits       ms   GB/s  times"
        );
        for kind in ALL.into_iter().filter(|k| k.lattice().is_some()) {
            let [indices, unfolded] = both(kind);
            let four = Values::Gguf(GgufType::Q4_0, vec![0x11; SHAPE.0 * SHAPE.1 / 32 * 18].into());
            let forms = [
                ("unfolded", &unfolded, Activations::Exact),
                ("indices", &indices, Activations::Exact),
                ("indices", &indices, Activations::Int8),
                ("q4_0", &stored(four), Activations::Int8),
            ];
            let packed: Vec<Vec<Linear>> = forms
                .iter()
                .map(|(_, s, activations)| {
                    let packing = Packing { isa, activations: *activations };
                    (0..matrices).map(|_| Linear::pack_with(s, &packing).expect("good")).collect()
                })
                .collect();
            let (begun, mut best, mut turns) = (Instant::now(), [f64::INFINITY; 4], 0);
            while turns < 3 || (begun.elapsed().as_secs_f64() < 1.0 && turns < 30) {
                for (best, all) in best.iter_mut().zip(&packed) {
                    let one = Instant::now();
                    all.iter().for_each(|l| l.forward(black_box(x.view()), out.view_mut()));
                    *best = best.min(one.elapsed().as_secs_f64() / matrices as f64);
                }
                turns += 1;
            }
            for ((form, _, activations), (t, all)) in forms.iter().zip(best.iter().zip(&packed)) {
                let bytes = all[0].weights_bytes() as f64;
                println!(
                    "{:<11} {form:<9} {:<11} {:.3} {:>8.3} {:>6.2} {:>6.2}",
                    format!("{kind:?}"),
                    format!("{activations:?}"),
                    8.0 * bytes / n,
                    1e3 * t,
                    bytes / t / 1e9,
                    best[0] / t
                );
            }
        }
    }
}

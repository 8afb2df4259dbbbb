//! Multiplies one kernel row so many times, for `bench/instructions/count.py`, which counts instructions.
//!
//!     passes ROW ISA TOKENS PASSES ROWSxCOLS
//!
//! On one thread, so that nobody's waiting is counted.

use std::hint::black_box;
use std::process::exit;

use lacuna_base::Mat;
use lacuna_bench_rows::ROWS;
use lacuna_kernels::{Activations, Isa, Linear, Packing, set_threads};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [row, isa, tokens, passes, shape] = &args[..] else {
        eprintln!("passes ROW ISA TOKENS PASSES ROWSxCOLS");
        exit(2);
    };
    let number = |text: &str| text.parse::<usize>().expect("a number");
    let row = ROWS.iter().find(|r| r.name == row).expect("the name of a row of lib.rs");
    let Some(isa) = Isa::here().into_iter().find(|i| i.name() == isa) else {
        eprintln!("this processor has {:?}, not {isa}", Isa::here().iter().map(|i| i.name()).collect::<Vec<_>>());
        exit(3);
    };
    let (rows, cols) = shape.split_once('x').expect("ROWSxCOLS");
    set_threads(1);
    let packing = Packing { isa, activations: Activations::Int8 };
    let (rows, cols, tokens) = (number(rows), number(cols), number(tokens));
    let linear = Linear::pack_with(&row.matrix(rows, cols), &packing).expect("a sound matrix");
    let x = Mat::from_fn(tokens, cols, |r, c| ((c * 17 + r * 5) % 101) as f32 / 50.0 - 1.0);
    let mut out = Mat::zeros(tokens, rows);
    for _ in 0..number(passes) {
        linear.forward(black_box(x.view()), out.view_mut());
    }
    black_box(&out);
}

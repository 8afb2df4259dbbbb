//! Test help: what rounding behind maps costs at the outputs, straight from the definition.

use lacuna_base::testkit::random;
use lacuna_base::{Gram, Mat, dense};
use lacuna_contract::{Ask, Gathered, Grid, GridAsk, RoundAsk, Solve, SolveAsk, Stats, Transform};
use lacuna_format::{Axes, Float, Unpacked};

/// Weights and inputs of which a few channels are 10 times as large, where asked.
pub fn heavy(rows: usize, cols: usize, tokens: usize, in_w: bool, in_x: bool, seed: u64) -> (Mat, Mat) {
    let (mut w, mut x) = (random(rows, cols, seed), random(tokens, cols, seed + 100));
    let times = |m: &mut Mat, c: usize| (0..m.rows()).for_each(|r| m[(r, c)] *= 10.0);
    for c in (0..cols).filter(|c| c % 37 == 5) {
        if in_w {
            times(&mut w, c);
        }
        if in_x {
            times(&mut x, c);
        }
    }
    (w, x)
}

/// What a method is told of inputs.
pub fn found(x: &Mat) -> Vec<(Ask, Gathered)> {
    let mut gram = Gram::new(x.cols());
    gram.add(x.view());
    let sizes = |c: usize| (0..x.rows()).map(|t| f64::from(x[(t, c)].abs())).sum();
    let sizes = (0..x.cols()).map(sizes).collect();
    vec![(Ask::InputGram, Gathered::Gram(gram)), (Ask::InputMagnitudes, Gathered::Vector(sizes))]
}

pub fn stats(found: &[(Ask, Gathered)], tokens: usize) -> Stats<'_> {
    Stats { tokens: tokens as u64, found, gradients: &[], sequences: 0, worked: None }
}

/// The matrix with the maps that the method gives it.
pub fn with_maps(w: &Mat, x: &Mat, by: &dyn Transform) -> Unpacked {
    let seen = found(x);
    let maps = by.maps(w.view(), &stats(&seen, x.rows())).expect("maps");
    let mut m = Unpacked::dense(w.clone());
    m.turn(maps).expect("turns");
    m
}

/// How a test rounds.
#[derive(Clone, Copy)]
pub struct Rounding<'a> {
    pub bits: u8,
    pub group: usize,
    pub grid: &'a dyn Grid,
    pub solver: Option<&'a dyn Solve>,
}

/// The matrix after its weights, or those behind its maps, were rounded.
pub fn rounded(w: &Mat, x: &Mat, mapped: Option<&Unpacked>, how: &Rounding<'_>) -> Mat {
    let mut m = mapped.cloned().unwrap_or_else(|| Unpacked::dense(w.clone()));
    let axes = Axes::of(&m.input, w.cols()).expect("maps");
    let mut seen = x.clone();
    (0..x.rows()).for_each(|t| axes.inputs(seen.row_mut(t)));
    let mut inner = m.sum();
    let ask = GridAsk { bits: how.bits, symmetric: true, scale: Float::F32 };
    if let Some(solver) = how.solver {
        let found = found(&seen);
        let round = Some(RoundAsk { ask, grid: how.grid, group: how.group });
        let stats = stats(&found, x.rows());
        let ask = SolveAsk { w: inner.view(), stats: &stats, mask: None, prune: None, round };
        inner = solver.solve(&ask).expect("solves").w;
    } else {
        for r in 0..inner.rows() {
            for values in inner.row_mut(r).chunks_mut(how.group) {
                let fitted = how.grid.fit(values, &ask).expect("fits");
                values.iter_mut().for_each(|v| *v = fitted.value(fitted.code(*v, how.bits)));
            }
        }
    }
    m.main = Unpacked::dense(inner).main;
    m.to_mat()
}

/// `‖(W - W') Xᵀ‖²`.
pub fn output_error(w: &Mat, new: &Mat, x: &Mat) -> f64 {
    let delta = Mat::from_fn(w.rows(), w.cols(), |r, c| w[(r, c)] - new[(r, c)]);
    let out = dense::matmul_nt(x.view(), delta.view());
    out.data().iter().map(|v| f64::from(*v) * f64::from(*v)).sum()
}

//! SparseLLM: the matrices of an FFN are pruned for its output, by way of auxiliary activations between them.
//!
//! **Paper.** Guangji Bai, Yijiang Li, Chen Ling, Kibaek Kim, Liang Zhao, "SparseLLM: Towards Global Pruning for
//! Pre-trained Language Models", 2024, arXiv 2402.17946.
//!
//! **Idea.** `min β‖Y - W_down p‖² + γ‖p - φ(s) ⊙ z‖² + α‖z - W_up X‖² + α‖s - W_gate X‖²` over sparse weights and
//! auxiliary `p`, `z`, `s`, where `Y` is what the dense FFN puts out (without a gate: `φ(z)`, and no `s`). In turn: the
//! weights that fit their auxiliary outputs best (`W_up = z X⁺`, `W_gate = s X⁺`, `W_down = Y p⁺`), each pruned by
//! SparseGPT on its own inputs (`X`, or `p`); `p = (βWᵀW + γ1)⁻¹ (βWᵀY + γ φ(s) ⊙ z)`, `W = W_down`;
//! `z = (α W_up X + γ φ(s) ⊙ p) / (α + γ φ(s)²)`; `s`, number by number, the least of
//! `α(s - (W_gate X))² + γ(p - φ(s) z)²`, for ReLU the better of two parabolas. Matrices of attention, and of FFNs that
//! are not aimed at whole, are pruned by SparseGPT.
//!
//! **Shapes and units.** Gate and up `[width, hidden]`, down `[hidden, width]`; `rows` rows of the FFN's inputs at the
//! most, `[rows, hidden]`, and `XᵀX` of all inputs of each matrix; `alpha`, `beta`, `gamma` count by their ratios.
//!
//! **Cost.** An iteration: about 24 `rows · hidden · width` for products, `rows · width²` and `width³` (f64) for the
//! sums of `p`, and SparseGPT of each matrix. Memory: `rows` rows of `X`, `s` and `z`.
//!
//! **Departs.** (1) The least squares are damped towards the source's weights, as much as SparseGPT's Hessian is, where
//! the paper takes pseudo-inverses: targets that the source meets give the source. (2) `s` through SiLU or GELU is
//! found by a few damped Gauss-Newton steps from `W_gate X` and from where it was (the paper proposes a table, its code
//! takes two steps of gradient descent). (3) The answer is the iteration whose pruned FFN comes nearest to `Y` on the
//! rows; the first is SparseGPT alone. The paper's code takes the last, and on three layers the first. (4) All matrices
//! of a block are calibrated on its dense attention, as everywhere here. (5) No rounding.

use lacuna_base::{Gram, Mat, Mat64, MatRef, dense, factor};
use lacuna_contract::{
    Ability, Ask, Card, FfnAsk, FfnMatrix, Gathered, Made, Method, MethodError, Solve, SolveAsk, SolveFfn, Solved,
    Stats,
};
use lacuna_spec::Activation;
use serde::Deserialize;

use super::gptq;
use super::sparsegpt::SparseGpt;
use crate::activation::value_and_slope;
use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SparseLlm {
    /// Weight of what gate and up put out; above 0.
    alpha: f64,
    /// Weight of what the FFN puts out; above 0.
    beta: f64,
    /// Weight of what lies between; above 0.
    gamma: f64,
    /// Times that the weights are pruned, 1 or more; 1 is SparseGPT alone.
    iterations: usize,
    /// Rows of an FFN's inputs that are kept, 1 or more.
    rows: usize,
    /// Added to the diagonals of Gram matrices, as a fraction of their mean; above 0.
    damping: f64,
    /// Columns whose mask SparseGPT chooses together; 1 or more.
    mask_block: usize,
}

impl Default for SparseLlm {
    fn default() -> SparseLlm {
        SparseLlm { alpha: 5.0, beta: 5.0, gamma: 5.0, iterations: 4, rows: 32_768, damping: 0.01, mask_block: 128 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "sparsellm",
            paper: "Bai, Li, Ling, Kim, Zhao: SparseLLM: Towards Global Pruning for Pre-trained Language Models, 2024",
            arxiv: "2402.17946",
            summary: "The matrices of an FFN are pruned by SparseGPT for what they put out together, by way of \
                      auxiliary activations.",
            system: Some(232),
            verb: "prune",
            needs: &[Ask::InputGram],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<SparseLlm>,
        make: |given| {
            let p: SparseLlm = make::parameters("sparsellm", given)?;
            gptq::check(p.damping, p.mask_block)?;
            for (name, v) in [("alpha", p.alpha), ("beta", p.beta), ("gamma", p.gamma)] {
                if !(v > 0.0 && v.is_finite()) {
                    return Err(MethodError::new(format!("{name} is {v}; it must be above 0")));
                }
            }
            for (name, n) in [("iterations", p.iterations), ("rows", p.rows)] {
                if n == 0 {
                    return Err(MethodError::new(format!("{name} is 0; it must be 1 or more")));
                }
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

impl Solve for SparseLlm {
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        if ask.round.is_some() {
            return Err(MethodError::new("sparsellm prunes and does not round; round in a step of its own"));
        }
        SparseGpt { damping: self.damping, mask_block: self.mask_block }.solve(ask)
    }

    fn of_ffn(&self) -> Option<&dyn SolveFfn> {
        Some(self)
    }
}

impl SolveFfn for SparseLlm {
    fn rows(&self) -> usize {
        self.rows
    }

    fn solve(&self, ask: &FfnAsk<'_>) -> Result<Vec<Solved>, MethodError> {
        let ffn = Ffn::new(self, ask)?;
        let mut solved = ffn.all().map(|m| Solve::solve(self, &m.ask)).collect::<Result<Vec<Solved>, MethodError>>()?;
        if self.iterations == 1 {
            return Ok(solved);
        }
        let inverse = self.inverse(&ffn.gram())?;
        let (mut auxiliary, mut best) = (Vec::new(), None::<(f64, Vec<Solved>)>);
        for i in 1..=self.iterations {
            let last = i == self.iterations;
            let seen = ffn.pass(&solved, &mut auxiliary, last)?;
            let fitted = if last { None } else { Some(self.refit(&ffn, &seen.sums, &inverse)?) };
            if best.as_ref().is_none_or(|(error, _)| seen.error < *error) {
                best = Some((seen.error, solved));
            }
            let Some(weights) = fitted else { break };
            // What down reads from now on.
            let found = [(Ask::InputGram, Gathered::Gram(seen.sums.gram))];
            let stats = Stats { tokens: ffn.x.rows() as u64, found: &found, ..Stats::default() };
            solved = Vec::with_capacity(weights.len());
            for (j, (w, m)) in weights.iter().zip(ffn.all()).enumerate() {
                let stats = if j + 1 < weights.len() { m.ask.stats } else { &stats };
                solved.push(Solve::solve(self, &SolveAsk { w: w.view(), stats, ..m.ask })?);
            }
        }
        best.map(|(_, solved)| solved).ok_or_else(|| MethodError::new("no iteration was asked"))
    }
}

impl SparseLlm {
    /// `(XᵀX / rows + damping · mean(diag) · 1)⁻¹`.
    fn inverse(&self, gram: &Gram) -> Result<Mat64, MethodError> {
        let mut h = gram.mean();
        let n = gram.n();
        let mean = (0..n).map(|j| h[(j, j)]).sum::<f64>() / n.max(1) as f64;
        (0..n).for_each(|j| h[(j, j)] += if mean > 0.0 { self.damping * mean } else { 1.0 });
        let fault = |e| MethodError::new(format!("sums over an FFN's activations: {e}; a larger damping helps"));
        factor::spd_inverse(&h).map_err(fault)
    }

    /// The weights that fit the auxiliary activations best.
    fn refit(&self, ffn: &Ffn<'_>, sums: &Sums, inverse: &Mat64) -> Result<Vec<Mat>, MethodError> {
        let of_down = self.inverse(&sums.gram)?;
        let last = sums.crossed.len() - 1;
        let fit = |(i, (m, cross)): (usize, (&FfnMatrix<'_>, &Mat64))| {
            let step = dense::matmul_nn_f64(cross, if i == last { &of_down } else { inverse });
            let share = 1.0 / ffn.x.rows() as f64;
            Mat::from_fn(step.rows(), step.cols(), |r, c| (f64::from(m.ask.w.at(r, c)) + share * step[(r, c)]) as f32)
        };
        Ok(ffn.all().zip(&sums.crossed).enumerate().map(fit).collect())
    }

    /// The `s` of least `α(s - m)² + γ(p - φ(s) z)²`: near `m` or near `from`, the better of both.
    fn settle(&self, act: Activation, (m, from): (f64, f64), (p, z): (f64, f64)) -> f64 {
        let (a, g) = (self.alpha, self.gamma);
        let cost = |s: f64, v: f64| a * (s - m).powi(2) + g * (p - v * z).powi(2);
        if act == Activation::Relu {
            let above = ((a * m + g * z * p) / (a + g * z * z)).max(0.0);
            let below = m.min(0.0);
            return if cost(above, above) <= cost(below, 0.0) { above } else { below };
        }
        let descend = |mut s: f64| {
            let (mut v, mut slope) = value_and_slope(act, s);
            let mut least = cost(s, v);
            for _ in 0..STEPS {
                let down = a * (s - m) - g * z * slope * (p - v * z);
                let mut step = down / (a + g * (z * slope).powi(2));
                let better = (0..4).find_map(|_| {
                    let (next, to) = (value_and_slope(act, s - step), s - step);
                    let met = cost(to, next.0);
                    step *= 0.25;
                    (met < least).then_some((to, next, met))
                });
                let Some((to, next, met)) = better else { break };
                let done = least - met <= 1e-9 * least;
                (s, (v, slope), least) = (to, next, met);
                if done {
                    break;
                }
            }
            (least, s)
        };
        let (near, before) = (descend(m), descend(from));
        if near.0 <= before.0 { near.1 } else { before.1 }
    }
}

/// Steps of a descent at the most.
const STEPS: usize = 6;

/// Rows that are worked on at a time.
const CHUNK: usize = 512;

/// An FFN with the rows that go into it.
struct Ffn<'a> {
    by: &'a SparseLlm,
    /// The matrix that goes through the non-linearity, and where there is one that which multiplies it.
    writers: Vec<FfnMatrix<'a>>,
    down: FfnMatrix<'a>,
    act: Activation,
    x: &'a Mat,
}

/// What an iteration comes to.
struct Seen {
    /// `‖Y - Ŷ‖²` of the pruned FFN.
    error: f64,
    sums: Sums,
}

/// Sums over rows.
struct Sums {
    /// `pᵀp`.
    gram: Gram,
    /// For each matrix what its targets ask beyond the source's outputs, times its inputs.
    crossed: Vec<Mat64>,
}

/// `x Wᵀ + b`.
fn through(x: MatRef<'_>, w: MatRef<'_>, bias: &[f32]) -> Mat {
    let mut out = dense::matmul_nt(x, w);
    for r in 0..out.rows() {
        out.row_mut(r).iter_mut().zip(bias).for_each(|(v, b)| *v += b);
    }
    out
}

fn less(a: &mut Mat, b: &Mat) {
    a.data_mut().iter_mut().zip(b.data()).for_each(|(a, b)| *a -= b);
}

fn add_crossed(to: &mut Mat64, a: &Mat, b: MatRef<'_>) {
    let more = dense::matmul_tn(a.view(), b);
    for r in 0..to.rows() {
        to.row_mut(r).iter_mut().zip(more.row(r)).for_each(|(s, v)| *s += f64::from(*v));
    }
}

impl<'a> Ffn<'a> {
    fn new(by: &'a SparseLlm, ask: &FfnAsk<'a>) -> Result<Ffn<'a>, MethodError> {
        if ask.act == Activation::Xielu {
            return Err(MethodError::new("sparsellm does not know xIELU, whose numbers are a layer's own"));
        }
        let x = ask.up.ask.stats.matrix(Ask::InputRows(by.rows))?;
        let (width, hidden) = (ask.up.ask.w.rows(), ask.up.ask.w.cols());
        let of = |m: &FfnMatrix<'_>| {
            (m.ask.w.rows(), m.ask.w.cols(), if m.bias.is_empty() { m.ask.w.rows() } else { m.bias.len() })
        };
        let writers: Vec<FfnMatrix<'a>> = ask.gate.into_iter().chain([ask.up]).collect();
        if writers.iter().any(|m| of(m) != (width, hidden, width)) || of(&ask.down) != (hidden, width, hidden) {
            let shapes: Vec<_> = writers.iter().chain([&ask.down]).map(of).collect();
            return Err(MethodError::new(format!("matrices of (outputs, inputs, biases) {shapes:?} are no FFN")));
        }
        if x.cols() != hidden || x.rows() == 0 {
            let (rows, cols) = (x.rows(), x.cols());
            return Err(MethodError::new(format!("{rows} rows of {cols} inputs for an FFN of {hidden}")));
        }
        Ok(Ffn { by, writers, down: ask.down, act: ask.act, x })
    }

    fn all(&self) -> impl Iterator<Item = &FfnMatrix<'a>> {
        self.writers.iter().chain([&self.down])
    }

    fn gram(&self) -> Gram {
        let mut gram = Gram::new(self.x.cols());
        gram.add(self.x.view());
        gram
    }

    /// What down reads, of what the writers put out.
    fn joined(&self, of: &[Mat]) -> Mat {
        let mut a = of[0].clone();
        a.data_mut().iter_mut().for_each(|v| *v = value_and_slope(self.act, f64::from(*v)).0 as f32);
        if let Some(z) = of.get(1) {
            a.data_mut().iter_mut().zip(z.data()).for_each(|(a, z)| *a *= z);
        }
        a
    }

    /// `β (γ1 + βWWᵀ)⁻¹ W` of down: `p = φ(s) ⊙ z + (Y - W (φ(s) ⊙ z))` times it, the same as by `(βWᵀW + γ1)⁻¹` and
    /// smaller.
    fn pull(&self, w: &Mat) -> Result<Mat, MethodError> {
        let w = Mat64::from_f32(w.view());
        let mut k = dense::matmul_nt_f64(&w, &w);
        k = Mat64::from_fn(k.rows(), k.cols(), |r, c| {
            self.by.beta * k[(r, c)] + if r == c { self.by.gamma } else { 0.0 }
        });
        let solved =
            factor::spd_solve(&k, &w).map_err(|e| MethodError::new(format!("the activations' update: {e}")))?;
        Ok(Mat::from_fn(w.rows(), w.cols(), |r, c| (self.by.beta * solved[(r, c)]) as f32))
    }

    /// The error of pruned weights, and, before the last iteration, the next auxiliary activations: `s` and `z` are
    /// kept in `auxiliary`, `p` follows from them.
    fn pass(&self, pruned: &[Solved], auxiliary: &mut Vec<Vec<Mat>>, last: bool) -> Result<Seen, MethodError> {
        let down = &pruned[self.writers.len()].w;
        let pull = if last { Mat::zeros(0, 0) } else { self.pull(down)? };
        let crossed = self.all().map(|m| Mat64::zeros(m.ask.w.rows(), m.ask.w.cols())).collect();
        let mut seen = Seen { error: 0.0, sums: Sums { gram: Gram::new(down.cols()), crossed } };
        for (i, from) in (0..self.x.rows()).step_by(CHUNK).enumerate() {
            let x = self.x.view().rows_range(from, (from + CHUNK).min(self.x.rows()));
            let source: Vec<Mat> = self.writers.iter().map(|m| through(x, m.ask.w, m.bias)).collect();
            let mut y = dense::matmul_nt(self.joined(&source).view(), self.down.ask.w);
            let now: Vec<Mat> = self.writers.iter().zip(pruned).map(|(m, p)| through(x, p.w.view(), m.bias)).collect();
            let mut off = y.clone();
            dense::add_matmul_nt(off.view_mut(), -1.0, self.joined(&now).view(), down.view());
            seen.error += off.data().iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            if last {
                continue;
            }
            if auxiliary.len() == i {
                auxiliary.push(source.clone());
            }
            let mut p = self.joined(&auxiliary[i]);
            let mut rest = y.clone();
            dense::add_matmul_nt(rest.view_mut(), -1.0, p.view(), down.view());
            dense::add_matmul_nn(p.view_mut(), 1.0, rest.view(), pull.view());
            self.settle(&mut auxiliary[i], &now, &p)?;
            dense::add_matmul_nt(y.view_mut(), -1.0, p.view(), self.down.ask.w);
            let sums = &mut seen.sums;
            sums.gram.add(p.view());
            for ((z, source), cross) in auxiliary[i].iter().zip(&source).zip(&mut sums.crossed) {
                let mut more = z.clone();
                less(&mut more, source);
                add_crossed(cross, &more, x);
            }
            add_crossed(&mut sums.crossed[self.writers.len()], &y, p.view());
        }
        if !seen.error.is_finite() {
            let what = format!("the squared error of what the FFN puts out is {}, not a finite number", seen.error);
            return Err(MethodError::new(what));
        }
        Ok(seen)
    }

    /// The next `z`, then `s`, for given `p`; `now` is what the pruned writers put out.
    fn settle(&self, auxiliary: &mut [Mat], now: &[Mat], p: &Mat) -> Result<(), MethodError> {
        let (a, g) = (self.by.alpha, self.by.gamma);
        let Some((inner, more)) = auxiliary.split_first_mut() else { return Ok(()) };
        let mut none = Mat::zeros(p.rows(), 1);
        let factor = more.first_mut().unwrap_or(&mut none);
        let mut rows: Vec<usize> = (0..p.rows()).collect();
        dense::each_row(inner, factor, &mut rows, |inner, factor, &mut r| {
            for (c, s) in inner.iter_mut().enumerate() {
                let p = f64::from(p[(r, c)]);
                let mut z = 1.0;
                if let Some(now) = now.get(1) {
                    let v = value_and_slope(self.act, f64::from(*s)).0;
                    z = (a * f64::from(now[(r, c)]) + g * v * p) / (a + g * v * v);
                    factor[c] = z as f32;
                }
                *s = self.by.settle(self.act, (f64::from(now[0][(r, c)]), f64::from(*s)), (p, z)) as f32;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::obs::slow;
    use lacuna_base::testkit::random;
    use lacuna_contract::{PruneAsk, Sparsity};

    type Table = Vec<Vec<f64>>;

    /// Rows that come in kinds, with a few large channels; channel 1 (if any) is always zero.
    fn inputs(tokens: usize, n: usize, seed: u64) -> Mat {
        let (own, shared) = (random(tokens, n, seed), random(tokens, 2, seed + 1));
        Mat::from_fn(tokens, n, |t, c| match c {
            1 => 0.0,
            _ => (own[(t, c)] + shared[(t, c % 2)]) * if c % 7 == 3 { 3.0 } else { 1.0 },
        })
    }

    /// What a test asks about: gate (or none), up and down, biases of the first two, the non-linearity.
    struct Case {
        writers: Vec<Mat>,
        down: Mat,
        biases: Vec<Vec<f32>>,
        act: Activation,
    }

    impl Case {
        fn new(hidden: usize, width: usize, gated: bool, act: Activation, seed: u64) -> Case {
            let count = if gated { 2 } else { 1 };
            let writers = (0..count).map(|i| random(width, hidden, seed + i)).collect();
            let biases = (0..count).map(|i| random(1, width, seed + 20 + i).into_vec()).collect();
            Case { writers, down: random(hidden, width, seed + 10), biases, act }
        }

        fn outputs(&self, w: &[Table], x: &Table) -> (Vec<Table>, Table, Table) {
            let of = |i: usize| -> Table {
                let mut z = times(x, &transposed(&w[i]));
                z.iter_mut().for_each(|row| row.iter_mut().zip(&self.biases[i]).for_each(|(v, b)| *v += f64::from(*b)));
                z
            };
            let z: Vec<Table> = (0..self.writers.len()).map(of).collect();
            let a = self.joined(&z);
            let y = times(&a, &transposed(&w[w.len() - 1]));
            (z, a, y)
        }

        fn joined(&self, z: &[Table]) -> Table {
            let value = |r: usize, c: usize| self.value(z[0][r][c]) * z.get(1).map_or(1.0, |z| z[r][c]);
            (0..z[0].len()).map(|r| (0..z[0][r].len()).map(|c| value(r, c)).collect()).collect()
        }

        fn value(&self, s: f64) -> f64 {
            match self.act {
                Activation::Relu => s.max(0.0),
                Activation::Silu => s / (1.0 + (-s).exp()),
                other => panic!("{other:?} is not tested here"),
            }
        }

        fn all(&self) -> Vec<&Mat> {
            self.writers.iter().chain([&self.down]).collect()
        }

        fn solve(&self, by: &SparseLlm, x: &Mat, prune: PruneAsk) -> Result<Vec<Solved>, MethodError> {
            let gram = |x: &Mat| {
                let mut gram = Gram::new(x.cols());
                gram.add(x.view());
                (Ask::InputGram, Gathered::Gram(gram))
            };
            let tables: Vec<Table> = self.all().into_iter().map(table).collect();
            let a = back(&self.outputs(&tables, &table(x)).1);
            let found = [gram(x), (Ask::InputRows(by.rows), Gathered::Matrix(x.clone()))];
            let of_down = [gram(&a)];
            let stats = |found| Stats { tokens: x.rows() as u64, found, ..Stats::default() };
            let (stats, of_down) = (stats(&found[..]), stats(&of_down[..]));
            fn ask<'a>(w: &'a Mat, stats: &'a Stats<'a>, prune: PruneAsk) -> SolveAsk<'a> {
                SolveAsk { w: w.view(), stats, mask: None, prune: Some(prune), round: None }
            }
            let writer = |i: usize| FfnMatrix { ask: ask(&self.writers[i], &stats, prune), bias: &self.biases[i] };
            SolveFfn::solve(
                by,
                &FfnAsk {
                    gate: (self.writers.len() == 2).then(|| writer(0)),
                    up: writer(self.writers.len() - 1),
                    down: FfnMatrix { ask: ask(&self.down, &of_down, prune), bias: &[] },
                    act: self.act,
                },
            )
        }

        /// `‖Y - Ŷ‖²` on rows `x`.
        fn error(&self, made: &[Table], x: &Mat) -> f64 {
            let source: Vec<Table> = self.all().into_iter().map(table).collect();
            let (y, now) = (self.outputs(&source, &table(x)).2, self.outputs(made, &table(x)).2);
            distance(&y, &now)
        }
    }

    fn table(m: &Mat) -> Table {
        (0..m.rows()).map(|r| m.row(r).iter().map(|v| f64::from(*v)).collect()).collect()
    }

    fn back(t: &Table) -> Mat {
        Mat::from_fn(t.len(), t[0].len(), |r, c| t[r][c] as f32)
    }

    fn transposed(a: &Table) -> Table {
        (0..a[0].len()).map(|c| a.iter().map(|row| row[c]).collect()).collect()
    }

    fn times(a: &Table, b: &Table) -> Table {
        let at = |row: &[f64], c: usize| row.iter().zip(b).map(|(v, b)| v * b[c]).sum();
        a.iter().map(|row| (0..b[0].len()).map(|c| at(row, c)).collect()).collect()
    }

    fn distance(a: &Table, b: &Table) -> f64 {
        a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).powi(2)).sum()
    }

    /// `aᵀa / rows + 0.01 · mean(diag) · 1`.
    fn damped(a: &Table) -> (Table, f64) {
        let mut h = times(&transposed(a), a);
        let n = h.len();
        h.iter_mut().flatten().for_each(|v| *v /= a.len() as f64);
        let by = 0.01 * (0..n).map(|i| h[i][i]).sum::<f64>() / n as f64;
        (0..n).for_each(|i| h[i][i] += by);
        (h, by)
    }

    /// The weights of least `‖z - W x‖² / rows + damping ‖W - source‖²`, `z` less its bias.
    fn fit(z: &Table, x: &Table, source: &Table) -> Table {
        let (h, by) = damped(x);
        let mut right = times(&transposed(z), x);
        right.iter_mut().zip(source).for_each(|(row, source)| {
            row.iter_mut().zip(source).for_each(|(v, w)| *v = *v / x.len() as f64 + by * w);
        });
        times(&right, &slow::inverse(&h))
    }

    /// SparseGPT with all columns in one block, from its definition.
    fn sparsegpt(w: &Table, x: &Table, sparsity: f64) -> Table {
        let mut gram = Gram::new(x[0].len());
        gram.add(back(x).view());
        let (h, n) = (slow::hessian(&gram, 0.01), gram.n());
        let live = |c: usize| gram.at(c, c) != 0.0;
        let mut w = w.clone();
        w.iter_mut().for_each(|row| (0..n).filter(|c| !live(*c)).for_each(|c| row[c] = 0.0));
        let inverses: Vec<Table> = (0..n).map(|j| slow::rest(&h, j)).collect();
        let mut all: Vec<(f64, usize, usize)> = (0..w.len())
            .flat_map(|r| (0..n).map(move |c| (r, c)))
            .map(|(r, c)| (w[r][c] * w[r][c] / inverses[c][0][0], r, c))
            .collect();
        all.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
        let drop = (sparsity * all.len() as f64).round() as usize;
        let gone: std::collections::HashSet<(usize, usize)> = all[..drop].iter().map(|(_, r, c)| (*r, *c)).collect();
        for j in 0..n {
            for (r, row) in w.iter_mut().enumerate() {
                let q = if gone.contains(&(r, j)) { 0.0 } else { row[j] };
                slow::fix(row, &inverses[j], j, q);
            }
        }
        w
    }

    /// The definition, all of it: explicit inverses, and `s` by trying everything.
    fn brute(case: &Case, by: &SparseLlm, x: &Mat, sparsity: f64) -> Vec<Table> {
        let x = table(x);
        let source: Vec<Table> = case.all().into_iter().map(table).collect();
        let (mut aux, mut p, y) = case.outputs(&source, &x);
        let (mut w, mut best) = (source.clone(), (f64::INFINITY, Vec::new()));
        for i in 0..by.iterations {
            if i > 0 {
                for j in 0..aux.len() {
                    let mut z = aux[j].clone();
                    z.iter_mut().for_each(|row| {
                        row.iter_mut().zip(&case.biases[j]).for_each(|(v, b)| *v -= f64::from(*b));
                    });
                    w[j] = fit(&z, &x, &source[j]);
                }
                w[aux.len()] = fit(&y, &p, &source[aux.len()]);
            }
            for (j, w) in w.iter_mut().enumerate() {
                *w = sparsegpt(w, if j < aux.len() { &x } else { &p }, sparsity);
            }
            let (now, _, put_out) = case.outputs(&w, &x);
            let error = distance(&y, &put_out);
            if error < best.0 {
                best = (error, w.clone());
            }
            let down = &w[aux.len()];
            let mut system = times(&transposed(down), down);
            system.iter_mut().flatten().for_each(|v| *v *= by.beta);
            (0..system.len()).for_each(|i| system[i][i] += by.gamma);
            let (mut right, a) = (times(&y, down), case.joined(&aux));
            right.iter_mut().zip(&a).for_each(|(row, a)| {
                row.iter_mut().zip(a).for_each(|(v, a)| *v = by.beta * *v + by.gamma * a);
            });
            p = times(&right, &slow::inverse(&system));
            for (r, p) in p.iter().enumerate() {
                for (c, &p) in p.iter().enumerate() {
                    let mut z = 1.0;
                    if aux.len() == 2 {
                        let v = case.value(aux[0][r][c]);
                        z = (by.alpha * now[1][r][c] + by.gamma * v * p) / (by.alpha + by.gamma * v * v);
                        aux[1][r][c] = z;
                    }
                    let m = now[0][r][c];
                    let cost = |s: f64| by.alpha * (s - m).powi(2) + by.gamma * (p - case.value(s) * z).powi(2);
                    let (mut at, mut step) = (m, 100.0);
                    for _ in 0..4 {
                        let tries = (-2000..=2000).map(|i| at + step * f64::from(i) / 2000.0);
                        at = tries.min_by(|a, b| cost(*a).total_cmp(&cost(*b))).expect("some");
                        step /= 200.0;
                    }
                    aux[0][r][c] = at;
                }
            }
        }
        best.1
    }

    #[test]
    fn agrees_with_brute_force() {
        use Activation::{Relu, Silu};
        let by = SparseLlm { alpha: 2.0, beta: 3.0, gamma: 1.5, iterations: 3, ..SparseLlm::default() };
        for (hidden, width, tokens, gated, act, sparsity) in [
            (6, 9, 40, true, Silu, 0.5),
            (6, 9, 40, true, Relu, 0.7),
            (5, 8, 600, false, Relu, 0.6),
            (4, 6, 30, false, Silu, 0.5),
            (1, 3, 20, true, Silu, 0.5),
            (3, 1, 20, false, Relu, 0.5),
        ] {
            let mut case = Case::new(hidden, width, gated, act, 7);
            case.writers[0].row_mut(0).fill(0.25); // ties
            let x = inputs(tokens, hidden, 3);
            let prune = PruneAsk { sparsity, pattern: Sparsity::Unstructured };
            let made = case.solve(&by, &x, prune).expect("solves");
            let want = brute(&case, &by, &x, sparsity);
            assert_eq!(made.len(), want.len());
            for (made, want) in made.iter().zip(&want) {
                let size = want.iter().flatten().map(|v| v * v).sum::<f64>();
                let off = (distance(&table(&made.w), want) / size.max(1e-9)).sqrt();
                assert!(off < 2e-3, "{hidden} x {width} {act:?} {gated}: {off}");
            }
        }
    }

    #[test]
    fn at_70_percent_the_ffn_errs_less_than_by_sparsegpt_on_rows_it_has_not_seen() {
        let prune = PruneAsk { sparsity: 0.7, pattern: Sparsity::Unstructured };
        for (gated, act) in [(true, Activation::Silu), (false, Activation::Relu)] {
            let (mut with, mut without) = (0.0, 0.0);
            for seed in 0..4 {
                let case = Case::new(24, 60, gated, act, 100 * seed);
                // Eight directions and a little of all others, as inputs of a network are.
                let (few, mix, rest) = (random(1500, 8, seed + 1), random(8, 24, seed + 2), random(1500, 24, seed + 3));
                let mut x = dense::matmul_nn(few.view(), mix.view());
                x.data_mut().iter_mut().zip(rest.data()).for_each(|(x, r)| *x = 0.3 * (*x + 0.5 * r));
                let (seen, unseen) = (x.view().rows_range(0, 1100).to_mat(), x.view().rows_range(1100, 1500).to_mat());
                let error = |iterations: usize| {
                    let by = SparseLlm { iterations, ..SparseLlm::default() };
                    let made = case.solve(&by, &seen, prune).expect("solves");
                    for m in &made {
                        let mask = m.mask.as_ref().expect("a mask");
                        assert_eq!(mask.kept(), mask.rows() * mask.cols() - (0.7 * 1440.0f64).round() as usize);
                    }
                    case.error(&made.iter().map(|m| table(&m.w)).collect::<Vec<_>>(), &unseen)
                };
                let (one, four) = (error(1), error(4));
                (with, without) = (with + four, without + one);
            }
            assert!(with < 0.9 * without, "gated {gated}: {with} with, {without} without");
        }
    }

    #[test]
    fn a_number_through_a_non_linearity_is_settled_where_no_other_is_better() {
        use Activation::{Gelu, GeluTanh, Relu, Silu};
        let by = SparseLlm::default();
        let draws = random(400, 4, 5);
        for act in [Relu, Silu, Gelu, GeluTanh] {
            let mut missed = 0;
            for r in 0..draws.rows() {
                let [m, from, p, z] = [0, 1, 2, 3].map(|c| 2.0 * f64::from(draws[(r, c)]));
                let cost = |s: f64| by.alpha * (s - m).powi(2) + by.gamma * (p - value_and_slope(act, s).0 * z).powi(2);
                let got = cost(by.settle(act, (m, from), (p, z)));
                assert!(got <= cost(m).min(cost(from)), "{act:?} {m} {from} {p} {z}");
                let least = (-2000..=2000).map(|i| cost(f64::from(i) * 0.01)).fold(f64::INFINITY, f64::min);
                missed += usize::from(got > 1.01 * least + 1e-3);
            }
            // A second valley is rare.
            assert!(missed <= if act == Relu { 0 } else { 8 }, "{act:?}: {missed} of {}", draws.rows());
        }
    }

    #[test]
    fn what_is_no_ffn_and_numbers_out_of_range_are_refused() {
        let prune = PruneAsk { sparsity: 0.5, pattern: Sparsity::Unstructured };
        let by = SparseLlm::default();
        let mut case = Case::new(4, 6, true, Activation::Silu, 1);
        case.down = random(4, 5, 2);
        let said = case.solve(&by, &inputs(9, 4, 1), prune);
        assert!(said.is_err());
        let refused = |key: &str, v: f64| {
            let v = serde_json::Number::from_f64(v).expect("a number");
            let given: serde_json::Map<_, _> = [(key.to_owned(), serde_json::Value::Number(v))].into_iter().collect();
            let said = (method().make)(given.into()).expect_err("refused").what;
            assert!(said.contains(key), "{said}");
        };
        for key in ["alpha", "beta", "gamma", "damping"] {
            refused(key, 0.0);
        }
        for key in ["iterations", "rows", "mask_block"] {
            let said = (method().make)(serde_json::json!({ key: 0 })).expect_err("refused").what;
            assert!(said.contains("is 0; it must be 1 or more"), "{said}");
        }
    }
}

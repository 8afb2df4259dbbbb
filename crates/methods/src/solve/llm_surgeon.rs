//! LLM Surgeon: weights go by a Kronecker-factored curvature of the loss, and all that stay make up for them together.
//!
//! **Paper.** Tycho F. A. van der Ouderaa, Markus Nagel, Mart van Baalen, Yuki M. Asano, Tijmen Blankevoort, "The LLM
//! Surgeon", 2023, arXiv 2312.17244.
//!
//! **Idea.** The loss around the trained weights is `½ δᵀ F δ` with the Fisher matrix `F ≈ G ⊗ A`: `A = E[a aᵀ]` of the
//! inputs, `G = E[g gᵀ]` of the output gradients. A weight's cost is `L_ij = ½ W_ij² / ([G⁻¹]_ii [A⁻¹]_jj)`, a run's or
//! a block's the sum of its weights'. The cheapest go, and `δ` is the least of `tr(G δ A δᵀ)` with `δ = -W` where
//! weights went: the correlated update, over rows as well as columns.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` of the inputs `[in, in]`, `Σ dyᵀ dy` `[out, out]`; neither's scale
//! matters. Damping is a fraction of each mean diagonal.
//!
//! **Cost.** `out³ + in³` for the inverses; an iteration of the update takes `4 out in (out + in)`; memory 16 `out²`,
//! 16 `in²` and 48 `out in` bytes.
//!
//! **Departs.** (1) The paper solves the update in groups of up to 2000 removed weights, one group after another, and
//! sets what later groups moved back to zero; here all weights of the matrix are in one system, by conjugate gradients
//! whose preconditioner is the Kronecker inverse, `iterations` steps or until the residual is below `tolerance` of the
//! first. (2) Costs are compared within a matrix, not over the whole model. (3) With `shots` above 1, sparsity rises in
//! equal steps as in the paper, with costs of the moved weights but the same curvature; n of m goes in one. (4) `G` is
//! the source's, `A` that of the inputs as compressed earlier blocks leave them. (5) Weights of inputs that are always
//! zero become 0, as in the authors' code; rows whose gradients are zero stay, cheap by the damping.

use lacuna_base::{Mat, Mat64, dense, factor};
use lacuna_contract::{
    Ability, Ask, Card, Made, Method, MethodError, PruneAsk, Scope, Solve, SolveAsk, Solved, Sparsity, Stats,
};
use lacuna_format::Mask;
use serde::Deserialize;

use crate::family::select::{Scored, select};
use crate::make;

/// The paper's parameters, and how far the update is solved.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Surgeon {
    /// Added to the diagonal of A, as a fraction of its mean; above 0.
    damping_a: f64,
    /// Added to the diagonal of G, as a fraction of its mean; above 0.
    damping_g: f64,
    /// Steps in which the sparsity is reached; 1 or more.
    shots: usize,
    /// Whether weights that stay make up for those that go.
    update: bool,
    /// Steps of the update's solution at the most.
    iterations: usize,
    /// The residual, as a fraction of the first, at which the update is good enough; 0 or more.
    tolerance: f64,
}

impl Default for Surgeon {
    fn default() -> Surgeon {
        Surgeon { damping_a: 0.01, damping_g: 0.1, shots: 1, update: true, iterations: 30, tolerance: 1e-3 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "llm-surgeon",
            paper: "van der Ouderaa, Nagel, van Baalen, Asano, Blankevoort: The LLM Surgeon, 2023",
            arxiv: "2312.17244",
            summary: "Weights go by a Kronecker-factored curvature; those that stay make up for them, over rows and \
             columns together.",
            system: Some(194),
            verb: "prune",
            needs: &[Ask::InputGram, Ask::OutputGradientGram],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<Surgeon>,
        make: |given| {
            let p: Surgeon = make::parameters("llm-surgeon", given)?;
            for (key, value) in [("damping_a", p.damping_a), ("damping_g", p.damping_g)] {
                if !(value > 0.0 && value.is_finite()) {
                    return Err(MethodError::new(format!("{key} is {value}; it must be above 0")));
                }
            }
            if p.shots == 0 || p.tolerance.is_nan() || p.tolerance < 0.0 {
                return Err(MethodError::new(format!(
                    "shots is {} and tolerance {}; write 1 or more, and 0 or more",
                    p.shots, p.tolerance
                )));
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// A symmetric matrix with a mean diagonal of 1, damped, and its inverse.
struct Factor {
    of: Mat64,
    inverse: Mat64,
}

impl Factor {
    fn new(what: &str, n: usize, at: impl Fn(usize, usize) -> f64, damping: f64) -> Result<Factor, MethodError> {
        let mean = (0..n).map(|i| at(i, i)).sum::<f64>() / n.max(1) as f64;
        if !(mean.is_finite() && mean >= 0.0) {
            return Err(MethodError::new(format!("the mean diagonal of {what} is {mean}")));
        }
        // Nothing seen says nothing: every direction alike.
        let one = if mean > 0.0 { 1.0 / mean } else { 0.0 };
        let same = if mean > 0.0 { damping } else { 1.0 };
        let of = Mat64::from_fn(n, n, |i, j| one * at(i, j) + if i == j { same } else { 0.0 });
        let inverse = factor::spd_inverse(&of)
            .map_err(|e| MethodError::new(format!("{what}: {e}; more samples or a larger damping help")))?;
        Ok(Factor { of, inverse })
    }
}

/// The curvature of one matrix.
struct Curvature {
    g: Factor,
    a: std::sync::Arc<Factor>,
    /// Inputs that are always zero.
    dead: Vec<usize>,
}

impl Curvature {
    fn new(stats: &Stats<'_>, out: usize, cols: usize, p: &Surgeon) -> Result<Curvature, MethodError> {
        let gram = make::gram(stats, cols)?;
        let dead = (0..cols).filter(|&j| gram.at(j, j) == 0.0).collect();
        let damping = p.damping_a;
        let a = stats.shared(format!("llm-surgeon {cols} {damping}"), || {
            Factor::new("the Gram matrix of the inputs", cols, |i, j| gram.at(i, j), damping)
        })?;
        let m = stats.matrix(Ask::OutputGradientGram)?;
        if (m.rows(), m.cols()) != (out, out) {
            let (r, c) = (m.rows(), m.cols());
            return Err(MethodError::new(format!("a Gram matrix of {r} x {c} output gradients for {out} outputs")));
        }
        // The gathered one is symmetric but for its rounding.
        let half = |i: usize, j: usize| 0.5 * (f64::from(m[(i, j)]) + f64::from(m[(j, i)]));
        Ok(Curvature { g: Factor::new("the Gram matrix of the output gradients", out, half, p.damping_g)?, a, dead })
    }

    /// `G x A`, or with the inverses.
    fn times(&self, x: &Mat64, inverse: bool) -> Mat64 {
        let (g, a) = if inverse { (&self.g.inverse, &self.a.inverse) } else { (&self.g.of, &self.a.of) };
        dense::matmul_nn_f64(&dense::matmul_nn_f64(g, x), a)
    }

    /// What removing each weight alone costs.
    fn costs(&self, w: &Mat64) -> Mat {
        let cost = |r: usize, c: usize| 0.5 * w[(r, c)] * w[(r, c)] / (self.g.inverse[(r, r)] * self.a.inverse[(c, c)]);
        Mat::from_fn(w.rows(), w.cols(), |r, c| cost(r, c) as f32)
    }

    /// Moves what `mask` keeps of `w` so that `tr(G δ A δᵀ)` gets least, where the rest becomes 0.
    fn update(&self, w: &mut Mat64, mask: &Mask, p: &Surgeon) {
        let (rows, cols) = (w.rows(), w.cols());
        let kept = |mut x: Mat64| {
            for r in 0..rows {
                x.row_mut(r).iter_mut().enumerate().for_each(|(c, v)| *v = if mask.get(r, c) { *v } else { 0.0 });
            }
            x
        };
        let dot = |x: &Mat64, y: &Mat64| x.data().iter().zip(y.data()).map(|(x, y)| x * y).sum::<f64>();
        let add = |x: &mut Mat64, by: f64, y: &Mat64| {
            x.data_mut().iter_mut().zip(y.data()).for_each(|(x, y)| *x += by * y);
        };
        let gone = Mat64::from_fn(rows, cols, |r, c| if mask.get(r, c) { 0.0 } else { -w[(r, c)] });
        let mut residual = kept(self.times(&gone, false));
        residual.data_mut().iter_mut().for_each(|v| *v = -*v);
        add(w, 1.0, &gone);
        let goal = p.tolerance * p.tolerance * dot(&residual, &residual);
        let mut z = kept(self.times(&residual, true));
        let mut along = z.clone();
        let mut size = dot(&residual, &z);
        for _ in 0..p.iterations {
            if dot(&residual, &residual) <= goal || size.is_nan() || size <= 0.0 {
                break;
            }
            let moved = kept(self.times(&along, false));
            let bend = dot(&along, &moved);
            if bend.is_nan() || bend <= 0.0 {
                break;
            }
            let step = size / bend;
            add(w, step, &along);
            add(&mut residual, -step, &moved);
            z = kept(self.times(&residual, true));
            let next = dot(&residual, &z);
            let turn = next / size;
            along.data_mut().iter_mut().zip(z.data()).for_each(|(d, z)| *d = turn * *d + z);
            size = next;
        }
    }
}

impl Solve for Surgeon {
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        make::finite(ask.w)?;
        if ask.round.is_some() {
            return Err(MethodError::new("llm-surgeon does not round"));
        }
        let (rows, cols) = (ask.w.rows(), ask.w.cols());
        let curvature = Curvature::new(ask.stats, rows, cols, self)?;
        let mut w = Mat64::from_f32(ask.w);
        for &c in &curvature.dead {
            (0..rows).for_each(|r| w[(r, c)] = 0.0);
        }
        let mut mask = ask.mask.cloned();
        let shots = match ask.prune {
            Some(PruneAsk { sparsity, .. }) if !(0.0..=1.0).contains(&sparsity) => {
                return Err(MethodError::new(format!("sparsity {sparsity} is not between 0 and 1")));
            }
            Some(PruneAsk { pattern: Sparsity::Nm { .. }, .. }) | None => 1,
            Some(_) => self.shots,
        };
        for shot in 1..=shots {
            if let Some(PruneAsk { sparsity, pattern }) = ask.prune {
                let costs = curvature.costs(&w);
                let sparsity = if shot == shots { sparsity } else { sparsity * shot as f64 / shots as f64 };
                let one = Scored { scores: &costs, before: mask.as_ref(), sparsity };
                mask = Some(select(&[one], pattern, Scope::Matrix).map_err(MethodError::new)?.remove(0));
            }
            let Some(mask) = &mask else { break };
            if self.update {
                curvature.update(&mut w, mask, self);
            }
        }
        let kept = |r: usize, c: usize| mask.as_ref().is_none_or(|m| m.get(r, c));
        let new = Mat::from_fn(rows, cols, |r, c| if kept(r, c) { w[(r, c)] as f32 } else { 0.0 });
        make::finite(new.view())?;
        Ok(Solved { w: new, mask, integers: None, aside: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::obs::slow;
    use lacuna_base::Gram;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;

    const EXACT: Surgeon =
        Surgeon { damping_a: 0.01, damping_g: 0.1, shots: 1, update: true, iterations: 500, tolerance: 1e-13 };

    /// Statistics of a matrix: correlated inputs, channel 1 (if any) always zero, and output gradients.
    struct Seen {
        gram: Gram,
        g: Mat,
        found: [(Ask, Gathered); 1],
        gradients: [(Ask, Gathered); 1],
    }

    impl Seen {
        fn new(out: usize, cols: usize, seed: u64) -> Seen {
            let (gram, own, shared) =
                (slow::inputs(cols, 40, seed), random(30, out, seed + 7), random(30, 1, seed + 8));
            let dy = Mat::from_fn(30, out, |t, r| 1e-3 * (own[(t, r)] + shared[(t, 0)]));
            let g = dense::matmul_tn(dy.view(), dy.view());
            let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
            let gradients = [(Ask::OutputGradientGram, Gathered::Matrix(g.clone()))];
            Seen { gram, g, found, gradients }
        }

        fn solve(&self, p: &Surgeon, w: &Mat, prune: Option<PruneAsk>, mask: Option<&Mask>) -> Solved {
            let (found, gradients) = (&self.found, &self.gradients);
            let stats = Stats { tokens: 40, found, gradients, sequences: 3, worked: None };
            p.solve(&SolveAsk { w: w.view(), stats: &stats, mask, prune, round: None }).expect("solves")
        }

        /// The whole Fisher matrix over all weights, row by row, entry by entry.
        fn fisher(&self, out: usize, cols: usize) -> Vec<Vec<f64>> {
            let mean_g = (0..out).map(|i| f64::from(self.g[(i, i)])).sum::<f64>() / out as f64;
            let mean_a = (0..cols).map(|i| self.gram.at(i, i)).sum::<f64>() / cols as f64;
            let g = |i: usize, j: usize| f64::from(self.g[(i, j)]) / mean_g + if i == j { 0.1 } else { 0.0 };
            let a = |i: usize, j: usize| self.gram.at(i, j) / mean_a + if i == j { 0.01 } else { 0.0 };
            let n = out * cols;
            (0..n).map(|p| (0..n).map(|q| g(p / cols, q / cols) * a(p % cols, q % cols)).collect()).collect()
        }
    }

    /// The definition: `δ = -F⁻¹ E (Eᵀ F⁻¹ E)⁻¹ Eᵀ w` with the whole inverse, E the weights that go.
    fn brute(w: &[f64], inverse: &[Vec<f64>], gone: &[usize]) -> Vec<f64> {
        let part: Vec<Vec<f64>> = gone.iter().map(|&p| gone.iter().map(|&q| inverse[p][q]).collect()).collect();
        let part = slow::inverse(&part);
        let pull: Vec<f64> = (0..gone.len()).map(|i| gone.iter().zip(&part[i]).map(|(&q, v)| v * w[q]).sum()).collect();
        (0..w.len()).map(|p| w[p] - gone.iter().zip(&pull).map(|(&q, v)| inverse[p][q] * v).sum::<f64>()).collect()
    }

    #[test]
    fn agrees_with_brute_force_over_the_whole_fisher_matrix() {
        let half = |pattern| PruneAsk { sparsity: 0.5, pattern };
        let cases = [
            (3, 4, half(Sparsity::Unstructured), false),
            (5, 8, half(Sparsity::Unstructured), true),
            (1, 6, half(Sparsity::Unstructured), false),
            (4, 1, half(Sparsity::Unstructured), false),
            (3, 8, half(Sparsity::Nm { n: 2, m: 4 }), false),
            (4, 6, half(Sparsity::Block { height: 2, width: 3 }), false),
            (4, 6, half(Sparsity::Block { height: 1, width: 6 }), false),
        ];
        for (case, (out, cols, prune, masked)) in cases.into_iter().enumerate() {
            for seed in 0..5 {
                let mut w = random(out, cols, seed);
                w.row_mut(0).iter_mut().step_by(2).for_each(|v| *v = 0.25);
                let seen = Seen::new(out, cols, seed + 20);
                let earlier = masked.then(|| Mask::from_fn(out, cols, |r, c| (r + 2 * c) % 5 != 0));
                let solved = seen.solve(&EXACT, &w, Some(prune), earlier.as_ref());
                let mask = solved.mask.expect("a mask");
                let live = |p: usize| seen.gram.at(p % cols, p % cols) != 0.0;
                let start: Vec<f64> =
                    (0..out * cols).map(|p| if live(p) { f64::from(w.data()[p]) } else { 0.0 }).collect();
                let inverse = slow::inverse(&seen.fisher(out, cols));
                let gone: Vec<usize> = (0..out * cols).filter(|p| !mask.get(p / cols, p % cols)).collect();
                let want = brute(&start, &inverse, &gone);
                let want = Mat::from_fn(out, cols, |r, c| if mask.get(r, c) { want[r * cols + c] as f32 } else { 0.0 });
                let off = max_abs_diff(solved.w.view(), want.view());
                assert!(off < 1e-3, "case {case} seed {seed}: {off}");
                // Single weights go by what the whole inverse says they cost.
                if prune.pattern == Sparsity::Unstructured {
                    let cost = |p: usize| start[p] * start[p] / inverse[p][p];
                    let may = |p: &usize| earlier.as_ref().is_none_or(|m| m.get(p / cols, p % cols));
                    let (stay, go): (Vec<usize>, Vec<usize>) =
                        (0..out * cols).filter(may).partition(|p| mask.get(p / cols, p % cols));
                    let most = go.iter().map(|p| cost(*p)).fold(0.0, f64::max);
                    assert!(stay.iter().all(|p| cost(*p) >= most * (1.0 - 1e-5)), "case {case} seed {seed}");
                }
            }
        }
    }

    #[test]
    fn the_update_lowers_the_loss_and_more_iterations_lower_it_further() {
        let loss = |seen: &Seen, old: &Mat, new: &Mat| -> f64 {
            let f = seen.fisher(12, 32);
            let d: Vec<f64> = old.data().iter().zip(new.data()).map(|(a, b)| f64::from(b - a)).collect();
            (0..d.len()).map(|p| d[p] * f[p].iter().zip(&d).map(|(f, d)| f * d).sum::<f64>()).sum()
        };
        for seed in 0..3 {
            let (w, seen) = (random(12, 32, seed), Seen::new(12, 32, seed + 40));
            for pattern in [Sparsity::Unstructured, Sparsity::Nm { n: 2, m: 4 }] {
                let prune = Some(PruneAsk { sparsity: 0.5, pattern });
                let of = |p: &Surgeon| loss(&seen, &w, &seen.solve(p, &w, prune, None).w);
                let plain = of(&Surgeon { update: false, ..EXACT });
                let (few, many) = (of(&Surgeon { iterations: 3, ..EXACT }), of(&EXACT));
                assert!(few < plain && many <= few * (1.0 + 1e-6), "{pattern} seed {seed}: {plain} {few} {many}");
            }
            let prune = Some(PruneAsk { sparsity: 0.5, pattern: Sparsity::Unstructured });
            let shots = seen.solve(&Surgeon { shots: 5, ..EXACT }, &w, prune, None);
            assert_eq!(shots.mask.expect("a mask").kept(), 12 * 16);
            let mask = Mask::from_fn(12, 32, |r, c| (r + c) % 3 != 0);
            let fixed = seen.solve(&EXACT, &w, None, Some(&mask));
            assert_eq!(fixed.mask.as_ref(), Some(&mask));
        }
    }

    #[test]
    fn shapes_and_parameters_that_do_not_fit_are_refused() {
        for bad in [serde_json::json!({ "damping_a": 0 }), serde_json::json!({ "shots": 0 })] {
            assert!((method().make)(bad).is_err());
        }
        let (w, seen) = (random(3, 6, 1), Seen::new(4, 6, 2));
        let stats = Stats { tokens: 40, found: &seen.found, gradients: &seen.gradients, sequences: 3, worked: None };
        let prune = Some(PruneAsk { sparsity: 0.5, pattern: Sparsity::Unstructured });
        let ask = SolveAsk { w: w.view(), stats: &stats, mask: None, prune, round: None };
        let said = EXACT.solve(&ask).expect_err("refused").what;
        assert!(said.contains("4 x 4") && said.contains('3'), "{said}");
        let none = Stats { gradients: &[], ..stats };
        assert!(EXACT.solve(&SolveAsk { stats: &none, ..ask }).is_err());
    }
}

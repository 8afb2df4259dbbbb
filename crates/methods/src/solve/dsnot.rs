//! DSnoT: a mask is improved row by row; a dropped weight comes back, another goes, and no value changes.
//!
//! **Paper.** Yuxin Zhang, Lirui Zhao, Mingbao Lin, Yunyun Sun, Yiwu Yao, Xingjia Han, Jared Tanner, Shiwei Liu,
//! Rongrong Ji, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", 2023, arXiv 2310.08915.
//!
//! **Idea.** Row `r` of the output misses `E[ε_r] = Σ_k ¬M_rk W_rk E[A_k]` on average. Grow: of the dropped weights the
//! one with the largest `sign(E[ε_r]) W_rk E[A_k] / Var(A_k)`. Prune: of the kept weights with
//! `sign(E[ε_r]) W_rk E[A_k] < 0`, which pull the error the same way, the one with the smallest Wanda score
//! `|W_rk| ‖A_k‖₂`. So on until the error is below the threshold, would change its sign, or the cycles are over. For n
//! of m the weight that goes is the cheapest kept one of the run in which one came back, whatever its sign.
//!
//! **Shapes and units.** `w` `[out, in]`; mean and variance of each input, `[in]` each; the mask `[out, in]`. The
//! threshold is compared with the expected error summed over 2048 tokens, the length of the authors' samples.
//!
//! **Cost.** A sort of each row and at most `cycles` exchanges in it; memory two lists of a row. Starting at
//! SparseGPT's mask takes the Gram matrix and its factor, `in³`.
//!
//! **Departs.** (1) The start's rows lose shares that add up to exactly the asked number. (2) Only weights that lower
//! the error come back; the authors' code, once none is left, goes on with those that raise it and stops there by the
//! sign. (3) Where the run of a weight that would come back has no kept weight of the start left, the next one is
//! tried. The weight that goes is the cheapest by Wanda's score, wherever the mask started. (4) With a mask of an
//! earlier step and nothing asked to be pruned, that mask stays as it is.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{
    Ability, Ask, Card, Made, Method, MethodError, PruneAsk, Scope, Solve, SolveAsk, Solved, Sparsity, Stats,
};
use lacuna_format::Mask;
use serde::Deserialize;

use crate::family::select::{Scored, select};
use crate::make;
use crate::obs::Hessian;

/// Tokens of a sample of the authors.
const SAMPLE: f64 = 2048.0;

/// Whose mask is improved.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Start {
    Wanda,
    Magnitude,
    SparseGpt,
}

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DsNoT {
    /// Whose scores make the first mask: "wanda", "magnitude" or "sparsegpt".
    start: Start,
    /// Exchanges of a row at the most.
    cycles: usize,
    /// A row whose expected error over 2048 tokens is no larger stays; 0 or more, in units of the output.
    threshold: f64,
    /// For SparseGPT's scores: added to the diagonal of H, as a fraction of its mean; above 0.
    damping: f64,
}

impl Default for DsNoT {
    fn default() -> DsNoT {
        DsNoT { start: Start::Wanda, cycles: 50, threshold: 0.1, damping: 0.01 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "dsnot",
            paper: "Zhang, Zhao, Lin, Sun, Yao, Han, Tanner, Liu, Ji: Dynamic Sparse No Training: Training-Free \
             Fine-tuning for Sparse LLMs, 2023",
            arxiv: "2310.08915",
            summary: "A mask is improved by exchanges that lower each row's expected error; no weight changes.",
            system: None,
            verb: "prune",
            needs: &[Ask::InputMoments],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::FixedMask],
        },
        keys: make::keys::<DsNoT>,
        make: |given| {
            let p: DsNoT = make::parameters("dsnot", given)?;
            if !(p.threshold >= 0.0 && p.threshold.is_finite()) {
                return Err(MethodError::new(format!("threshold is {}; it must be 0 or more", p.threshold)));
            }
            if !(p.damping > 0.0 && p.damping.is_finite()) {
                return Err(MethodError::new(format!("damping is {}; it must be above 0", p.damping)));
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// Means and variances of `cols` inputs, or what is wrong with them.
fn moments<'a>(stats: &Stats<'a>, cols: usize) -> Result<(&'a [f64], &'a [f64]), MethodError> {
    let (mean, variance) = stats.moments()?;
    if mean.len() != cols || variance.len() != cols {
        return Err(MethodError::new(format!("moments of {} inputs for a matrix of {cols}", mean.len())));
    }
    match (0..cols).find(|&j| !(mean[j].is_finite() && variance[j].is_finite() && variance[j] >= 0.0)) {
        None => Ok((mean, variance)),
        Some(j) => Err(MethodError::new(format!("input {j} has mean {} and variance {}", mean[j], variance[j]))),
    }
}

impl DsNoT {
    /// The scores whose lowest go first.
    fn first(&self, w: MatRef<'_>, stats: &Stats<'_>, norms: &[f64]) -> Result<Mat, MethodError> {
        let (rows, cols) = (w.rows(), w.cols());
        let score = |f: &dyn Fn(usize, f64) -> f64| Mat::from_fn(rows, cols, |r, c| f(c, f64::from(w.at(r, c))) as f32);
        Ok(match self.start {
            Start::Wanda => score(&|c, v| v.abs() * norms[c]),
            Start::Magnitude => score(&|_, v| v.abs()),
            Start::SparseGpt => {
                let h = Hessian::new(stats, cols, false, self.damping)?;
                score(&|c, v| if h.dead.contains(&c) { 0.0 } else { (v / f64::from(h.u[(c, c)])).powi(2) })
            }
        })
    }
}

/// One row: what each weight adds to the expected output, its worth in growing and in going.
struct Row<'a> {
    /// `W_k E[A_k]`, summed over a sample.
    adds: Vec<f64>,
    variance: &'a [f64],
    /// `|W_k| ‖A_k‖₂`, per token.
    wanda: Vec<f64>,
}

impl Row<'_> {
    /// Exchanges in the row: `was` is the first mask, `before` what may be kept at all. The columns that come back and
    /// those that go, pair by pair.
    fn exchanges(
        &self,
        was: &dyn Fn(usize) -> bool,
        before: &dyn Fn(usize) -> bool,
        run: Option<usize>,
        p: &DsNoT,
    ) -> Vec<(usize, usize)> {
        let columns = 0..self.adds.len();
        let mut error: f64 = columns.clone().filter(|&k| before(k) && !was(k)).map(|k| self.adds[k]).sum();
        let sign = if error < 0.0 { -1.0 } else { 1.0 };
        let pull = |k: usize| sign * self.adds[k];
        let mut grow: Vec<usize> = columns.clone().filter(|&k| before(k) && !was(k) && pull(k) > 0.0).collect();
        let worth = |k: usize| pull(k) / self.variance[k];
        grow.sort_by(|&a, &b| worth(b).total_cmp(&worth(a)));
        let mut go: Vec<usize> = columns.filter(|&k| was(k) && (run.is_some() || pull(k) < 0.0)).collect();
        go.sort_by(|&a, &b| self.wanda[a].total_cmp(&self.wanda[b]));
        let mut done = Vec::new();
        for g in grow {
            if done.len() == p.cycles || error.abs() <= p.threshold {
                break;
            }
            let Some(at) = go.iter().position(|&k| run.is_none_or(|m| k / m == g / m)) else {
                if run.is_some() {
                    continue;
                }
                break;
            };
            let after = error - self.adds[g] + self.adds[go[at]];
            if sign * after <= 0.0 {
                break;
            }
            error = after;
            done.push((g, go.remove(at)));
        }
        done
    }
}

impl Solve for DsNoT {
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        make::finite(ask.w)?;
        if ask.round.is_some() {
            return Err(MethodError::new("dsnot does not round"));
        }
        let (rows, cols) = (ask.w.rows(), ask.w.cols());
        let mut mask = ask.mask.cloned().unwrap_or_else(|| Mask::all(rows, cols, true));
        if let Some(PruneAsk { sparsity, pattern }) = ask.prune {
            if matches!(pattern, Sparsity::Block { .. }) {
                return Err(MethodError::new("dsnot does not prune blocks"));
            }
            if !(0.0..=1.0).contains(&sparsity) {
                return Err(MethodError::new(format!("sparsity {sparsity} is not between 0 and 1")));
            }
            let (mean, variance) = moments(ask.stats, cols)?;
            let norms: Vec<f64> = mean.iter().zip(variance).map(|(m, v)| (m * m + v).sqrt()).collect();
            let scores = self.first(ask.w, ask.stats, &norms)?;
            let one = Scored { scores: &scores, before: ask.mask, sparsity };
            mask = select(&[one], pattern, Scope::Row).map_err(MethodError::new)?.remove(0);
            let run = if let Sparsity::Nm { m, .. } = pattern { Some(m) } else { None };
            for r in 0..rows {
                let of = |f: &dyn Fn(f64, usize) -> f64| -> Vec<f64> {
                    ask.w.row(r).iter().enumerate().map(|(c, v)| f(f64::from(*v), c)).collect()
                };
                let row =
                    Row { adds: of(&|v, c| v * mean[c] * SAMPLE), variance, wanda: of(&|v, c| v.abs() * norms[c]) };
                let before = |c: usize| ask.mask.is_none_or(|m| m.get(r, c));
                for (back, gone) in row.exchanges(&|c| mask.get(r, c), &before, run, self) {
                    mask.set(r, back, true);
                    mask.set(r, gone, false);
                }
            }
        }
        let w = Mat::from_fn(rows, cols, |r, c| if mask.get(r, c) { ask.w.at(r, c) } else { 0.0 });
        let mask = (ask.prune.is_some() || ask.mask.is_some()).then_some(mask);
        Ok(Solved { w, mask, integers: None, aside: Vec::new() })
    }

    fn also_needs(&self) -> &'static [Ask] {
        if self.start == Start::SparseGpt { &[Ask::InputGram] } else { &[] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Gram;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;

    /// Inputs whose means are not zero; channel 1 (if any) always zero, channel 2 constant.
    fn inputs(n: usize, tokens: usize, seed: u64) -> Mat {
        let (x, m) = (random(tokens, n, seed), random(1, n, seed + 1));
        Mat::from_fn(tokens, n, |t, c| match c {
            1 => 0.0,
            2 => 0.75,
            _ => x[(t, c)] + 1.5 * m[(0, c)],
        })
    }

    fn gathered(x: &Mat) -> Vec<(Ask, Gathered)> {
        let tokens = x.rows() as f64;
        let over = |f: &dyn Fn(f64, usize) -> f64| -> Vec<f64> {
            let column = |c: usize| (0..x.rows()).map(|t| f(f64::from(x[(t, c)]), c)).sum::<f64>() / tokens;
            (0..x.cols()).map(column).collect()
        };
        let mean = over(&|v, _| v);
        let variance = over(&|v, c| (v - mean[c]).powi(2));
        let mut gram = Gram::new(x.cols());
        gram.add(x.view());
        vec![(Ask::InputMoments, Gathered::Moments { mean, variance }), (Ask::InputGram, Gathered::Gram(gram))]
    }

    fn solve(p: &DsNoT, w: &Mat, found: &[(Ask, Gathered)], pattern: Sparsity, mask: Option<&Mask>) -> Solved {
        let stats = Stats { tokens: 40, found, ..Stats::default() };
        let prune = Some(PruneAsk { sparsity: 0.5, pattern });
        p.solve(&SolveAsk { w: w.view(), stats: &stats, mask, prune, round: None }).expect("solves")
    }

    /// The definition, cycle by cycle: everything is looked at anew, in every cycle, with plain loops over the tokens.
    fn brute(w: &Mat, x: &Mat, start: &Mask, before: Option<&Mask>, m: Option<usize>, p: &DsNoT) -> Mask {
        let tokens = x.rows() as f64;
        let mean = |k: usize| (0..x.rows()).map(|t| f64::from(x[(t, k)])).sum::<f64>() / tokens;
        let variance = |k: usize| (0..x.rows()).map(|t| (f64::from(x[(t, k)]) - mean(k)).powi(2)).sum::<f64>() / tokens;
        let norm = |k: usize| (0..x.rows()).map(|t| f64::from(x[(t, k)]).powi(2)).sum::<f64>().sqrt();
        let mut mask = start.clone();
        for r in 0..w.rows() {
            let weight = |k: usize| f64::from(w[(r, k)]);
            let may = |k: usize| before.is_none_or(|b| b.get(r, k));
            let missing = |mask: &Mask| {
                (0..w.cols()).filter(|&k| may(k) && !mask.get(r, k)).map(|k| weight(k) * mean(k)).sum::<f64>() * 2048.0
            };
            let sign = missing(start).signum();
            let mut tried = std::collections::HashSet::new();
            let mut cycle = 0;
            while cycle < p.cycles && missing(&mask).abs() > p.threshold {
                let mut best: Option<(f64, usize)> = None;
                for k in 0..w.cols() {
                    let value = sign * weight(k) * mean(k);
                    let value = if value > 0.0 { value / variance(k) } else { continue };
                    if may(k) && !start.get(r, k) && !tried.contains(&k) && best.is_none_or(|b| value > b.0) {
                        best = Some((value, k));
                    }
                }
                let Some((_, grown)) = best else { break };
                tried.insert(grown);
                let mut least: Option<(f64, usize)> = None;
                for k in 0..w.cols() {
                    let fits = match m {
                        Some(m) => k / m == grown / m,
                        None => sign * weight(k) * mean(k) < 0.0,
                    };
                    let price = weight(k).abs() * norm(k);
                    if fits && start.get(r, k) && mask.get(r, k) && least.is_none_or(|l| price < l.0) {
                        least = Some((price, k));
                    }
                }
                let Some((_, gone)) = least else {
                    if m.is_some() {
                        continue;
                    }
                    break;
                };
                let mut next = mask.clone();
                next.set(r, grown, true);
                next.set(r, gone, false);
                if missing(&next) * sign <= 0.0 {
                    break;
                }
                mask = next;
                cycle += 1;
            }
        }
        mask
    }

    #[test]
    fn agrees_with_brute_force() {
        let mut exchanged = 0;
        for seed in 0..20 {
            for (rows, cols) in [(1, 1), (3, 1), (1, 8), (4, 12), (6, 40)] {
                let mut w = random(rows, cols, seed);
                w.row_mut(0).iter_mut().step_by(2).for_each(|v| *v = 0.25); // ties
                let x = inputs(cols, 40, seed + 100);
                let found = gathered(&x);
                let earlier = Mask::from_fn(rows, cols, |r, c| (r + 2 * c) % 5 != 0);
                for (pattern, m) in [(Sparsity::Unstructured, None), (Sparsity::Nm { n: 2, m: 4 }, Some(4))] {
                    if cols % m.unwrap_or(1) != 0 {
                        continue;
                    }
                    for (mask, cycles, threshold) in
                        [(None, 50, 0.1), (None, 2, 0.1), (None, 50, 500.0), (Some(&earlier), 50, 0.1)]
                    {
                        let p = DsNoT { cycles, threshold, ..DsNoT::default() };
                        let first = solve(&DsNoT { cycles: 0, ..DsNoT::default() }, &w, &found, pattern, mask);
                        let first = first.mask.expect("a mask");
                        let got = solve(&p, &w, &found, pattern, mask);
                        let (kept, want) = (got.mask.expect("a mask"), brute(&w, &x, &first, mask, m, &p));
                        assert_eq!(kept, want, "seed {seed}, {rows} x {cols}, {pattern}, {cycles} {threshold}");
                        exchanged += usize::from(kept != first);
                        for r in 0..rows {
                            let count = |m: &Mask| (0..cols).filter(|&c| m.get(r, c)).count();
                            assert_eq!(count(&kept), count(&first), "a row's sparsity");
                            assert!((0..cols).all(|c| got.w[(r, c)] == if kept.get(r, c) { w[(r, c)] } else { 0.0 }));
                        }
                    }
                }
            }
        }
        assert!(exchanged > 50, "{exchanged}");
    }

    #[test]
    fn the_first_mask_is_its_scores() {
        let (w, x) = (random(5, 24, 3), inputs(24, 60, 4));
        let found = gathered(&x);
        let norm = |c: usize| (0..60).map(|t| f64::from(x[(t, c)]).powi(2)).sum::<f64>().sqrt();
        for start in [Start::Wanda, Start::Magnitude, Start::SparseGpt] {
            let h = Hessian::new(&Stats { tokens: 60, found: &found, ..Stats::default() }, 24, false, 0.01).expect("h");
            let score = |r: usize, c: usize| match start {
                Start::Wanda => f64::from(w[(r, c)]).abs() * norm(c),
                Start::Magnitude => f64::from(w[(r, c)]).abs(),
                Start::SparseGpt if c == 1 => 0.0,
                Start::SparseGpt => f64::from(w[(r, c)] / h.u[(c, c)]).abs(),
            };
            let p = DsNoT { start, cycles: 0, ..DsNoT::default() };
            let kept = solve(&p, &w, &found, Sparsity::Unstructured, None).mask.expect("a mask");
            for r in 0..5 {
                let mut order: Vec<usize> = (0..24).collect();
                order.sort_by(|&a, &b| score(r, a).total_cmp(&score(r, b)));
                assert!((0..24).all(|c| kept.get(r, c) == order[12..].contains(&c)), "{start:?} row {r}");
            }
        }
    }

    /// The paper's claim where it can hold: where inputs have means, the outputs are nearer.
    #[test]
    fn the_outputs_are_nearer_than_the_start_leaves_them() {
        let error = |w: &Mat, new: &Mat, x: &Mat| -> f64 {
            let off = |t: usize, r: usize| -> f64 {
                (0..w.cols()).map(|c| f64::from(w[(r, c)] - new[(r, c)]) * f64::from(x[(t, c)])).sum()
            };
            (0..x.rows()).flat_map(|t| (0..w.rows()).map(move |r| (t, r))).map(|(t, r)| off(t, r).powi(2)).sum()
        };
        for start in [Start::Wanda, Start::Magnitude, Start::SparseGpt] {
            for seed in 0..5 {
                let (w, x) = (random(16, 96, seed), inputs(96, 200, seed + 50));
                let found = gathered(&x);
                for pattern in [Sparsity::Unstructured, Sparsity::Nm { n: 2, m: 4 }] {
                    let first = solve(&DsNoT { start, cycles: 0, ..DsNoT::default() }, &w, &found, pattern, None).w;
                    let after = solve(&DsNoT { start, ..DsNoT::default() }, &w, &found, pattern, None).w;
                    let (was, is) = (error(&w, &first, &x), error(&w, &after, &x));
                    assert!(is < was, "{start:?} {pattern} seed {seed}: {is} {was}");
                }
            }
        }
    }

    #[test]
    fn bad_statistics_and_parameters_are_refused() {
        for (key, value) in [("threshold", -1.0), ("damping", 0.0), ("cycles", -3.0)] {
            assert!((method().make)(serde_json::json!({ key: value })).is_err(), "{key}");
        }
        assert!((method().make)(serde_json::json!({ "start": "none" })).is_err());
        let w = random(2, 4, 1);
        let prune = Some(PruneAsk { sparsity: 0.5, pattern: Sparsity::Unstructured });
        for (mean, variance) in [(vec![0.0; 3], vec![1.0; 3]), (vec![f64::NAN; 4], vec![1.0; 4])] {
            let found = [(Ask::InputMoments, Gathered::Moments { mean, variance })];
            let stats = Stats { tokens: 9, found: &found, ..Stats::default() };
            let ask = SolveAsk { w: w.view(), stats: &stats, mask: None, prune, round: None };
            assert!(DsNoT::default().solve(&ask).is_err());
        }
        assert!(DsNoT { start: Start::SparseGpt, ..DsNoT::default() }.also_needs().contains(&Ask::InputGram));
    }
}

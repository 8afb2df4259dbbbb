//! oBERT: weights go, alone or in blocks, by the empirical Fisher matrix of their neighbours in the row, which make up.
//!
//! **Paper.** Eldar Kurtic, Daniel Campos, Tuan Nguyen, Elias Frantar, Mark Kurtz, Benjamin Fineran, Michael Goin, Dan
//! Alistarh, "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language Models", 2022,
//! arXiv 2203.07259.
//!
//! **Idea.** `F = λ 1 + 1/N Σ g gᵀ` over the gradients of `N` samples, kept for blocks of `B` consecutive weights of a
//! row; its inverse grows by one gradient after another (Woodbury): `F⁻¹ -= F⁻¹ g gᵀ F⁻¹ / (N + gᵀ F⁻¹ g)`. A weight's
//! saliency is `w_i² / (2 [F⁻¹]_ii)`, that of weights `Q` which go together `½ w_Qᵀ ([F⁻¹]_QQ)⁻¹ w_Q`. The least go,
//! and their block answers with `δ = -F⁻¹ E_Q ([F⁻¹]_QQ)⁻¹ w_Q`, here for all that go of a block at once.
//!
//! **Shapes and units.** `w` `[out, in]`; each sequence's gradient of its mean loss `[out, in]`, one below the other.
//! Patterns of blocks as wide as they say: `block:1x4` is the paper's 4-block.
//!
//! **Cost.** Twice `N B` operations a weight, and `B²` for the update; memory two inverses of `B²` and a copy of the
//! matrix. The gradients themselves: 4 bytes a weight and sequence, in a scratch file and, for a block of the model, in
//! memory.
//!
//! **Departs.** (1) Sparsity is reached at once; the paper prunes gradually and trains in between. (2) Saliencies are
//! compared within a matrix, not over the whole model. (3) `λ` is a fraction of the matrix's mean `1/N Σ g²`, the
//! paper's is 1e-7 for every model; samples are the recipe's sequences (the paper: 1024). (4) n of m goes by single
//! saliencies; for blocks of patterns `B` is rounded down to whole ones. (5) Gradients are the source's.

use lacuna_base::{Mat, Mat64, factor};
use lacuna_contract::{
    Ability, Ask, Card, Made, Method, MethodError, PruneAsk, Scope, Solve, SolveAsk, Solved, Sparsity, Stats,
};
use serde::Deserialize;

use crate::family::select::{Scored, select};
use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Obert {
    /// B, consecutive weights of a row whose curvature is kept together; 1 to 512.
    fisher_block: usize,
    /// λ, as a fraction of the mean squared gradient; above 0.
    damping: f64,
}

impl Default for Obert {
    fn default() -> Obert {
        Obert { fisher_block: 50, damping: 0.1 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "obert",
            paper: "Kurtic, Campos, Nguyen, Frantar, Kurtz, Fineran, Goin, Alistarh: The Optimal BERT Surgeon: \
             Scalable and Accurate Second-Order Pruning for Large Language Models, 2022",
            arxiv: "2203.07259",
            summary: "Weights or blocks go by the empirical Fisher matrix of neighbours in their row, which make up.",
            system: Some(113),
            verb: "prune",
            needs: &[Ask::SequenceGradients],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<Obert>,
        make: |given| {
            let p: Obert = make::parameters("obert", given)?;
            if !(1..=512).contains(&p.fisher_block) {
                return Err(MethodError::new(format!("fisher_block is {}; it must be 1 to 512", p.fisher_block)));
            }
            if !(p.damping > 0.0 && p.damping.is_finite()) {
                return Err(MethodError::new(format!("damping is {}; it must be above 0", p.damping)));
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// Gradients of a matrix `[out, in]`.
struct Gradients<'a> {
    all: &'a Mat,
    out: usize,
    samples: f64,
    /// λ.
    damping: f64,
}

impl<'a> Gradients<'a> {
    fn new(stats: &Stats<'a>, out: usize, cols: usize, damping: f64) -> Result<Gradients<'a>, MethodError> {
        let all = stats.matrix(Ask::SequenceGradients)?;
        if all.cols() != cols || all.rows() % out.max(1) != 0 {
            return Err(MethodError::new(format!(
                "gradients of {} x {} for a matrix of {out} x {cols}",
                all.rows(),
                all.cols()
            )));
        }
        if let Some(i) = all.data().iter().position(|v| !v.is_finite()) {
            return Err(MethodError::new(format!("a gradient is {}", all.data()[i])));
        }
        let samples = stats.sequences.max(1) as f64;
        let squares: f64 = all.data().iter().map(|g| f64::from(*g).powi(2)).sum();
        let mean = squares / samples / (out * cols).max(1) as f64;
        Ok(Gradients { all, out, samples, damping: if mean > 0.0 { damping * mean } else { 1.0 } })
    }

    /// `F⁻¹` of the weights of row `r`, columns `from..to`, into `inverse`.
    fn inverse(&self, r: usize, from: usize, to: usize, inverse: &mut Mat64) {
        let n = to - from;
        inverse.data_mut().fill(0.0);
        (0..n).for_each(|i| inverse[(i, i)] = 1.0 / self.damping);
        let mut u = vec![0.0f64; n];
        for row in (r..self.all.rows()).step_by(self.out) {
            let g = &self.all.row(row)[from..to];
            for (i, u) in u.iter_mut().enumerate() {
                *u = inverse.row(i).iter().zip(g).map(|(f, g)| f * f64::from(*g)).sum();
            }
            let scale = 1.0 / (self.samples + u.iter().zip(g).map(|(u, g)| u * f64::from(*g)).sum::<f64>());
            for i in 0..n {
                let by = scale * u[i];
                inverse.row_mut(i).iter_mut().zip(&u).for_each(|(f, u)| *f -= by * u);
            }
        }
    }
}

/// `([F⁻¹]_QQ)⁻¹ w_Q`.
fn pull(inverse: &Mat64, q: &[usize], w: &[f32]) -> Result<Mat64, MethodError> {
    let part = Mat64::from_fn(q.len(), q.len(), |i, j| 0.5 * (inverse[(q[i], q[j])] + inverse[(q[j], q[i])]));
    let right = Mat64::from_fn(q.len(), 1, |i, _| f64::from(w[q[i]]));
    factor::spd_solve(&part, &right)
        .map_err(|e| MethodError::new(format!("the Fisher matrix: {e}; more samples or a larger damping help")))
}

impl Obert {
    /// Calls `f` with each row's blocks and their inverses, `unit` columns never divided.
    fn blocks(
        &self,
        g: &Gradients<'_>,
        cols: usize,
        unit: usize,
        mut f: impl FnMut(usize, std::ops::Range<usize>, &Mat64) -> Result<(), MethodError>,
    ) -> Result<(), MethodError> {
        let block = (self.fisher_block / unit).max(1) * unit;
        for from in (0..cols).step_by(block) {
            let to = (from + block).min(cols);
            let mut inverse = Mat64::zeros(to - from, to - from);
            for r in 0..g.out {
                g.inverse(r, from, to, &mut inverse);
                f(r, from..to, &inverse)?;
            }
        }
        Ok(())
    }
}

impl Solve for Obert {
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        make::finite(ask.w)?;
        if ask.round.is_some() {
            return Err(MethodError::new("obert does not round"));
        }
        let (rows, cols) = (ask.w.rows(), ask.w.cols());
        let gradients = Gradients::new(ask.stats, rows, cols, self.damping)?;
        let width = match ask.prune {
            Some(PruneAsk { pattern: Sparsity::Block { width, .. }, .. }) => width,
            _ => 1,
        };
        let mut mask = ask.mask.cloned();
        if let Some(PruneAsk { sparsity, pattern }) = ask.prune {
            if !(0.0..=1.0).contains(&sparsity) {
                return Err(MethodError::new(format!("sparsity {sparsity} is not between 0 and 1")));
            }
            let mut scores = Mat::zeros(rows, cols);
            self.blocks(&gradients, cols, width, |r, block, inverse| {
                let w = &ask.w.row(r)[block.clone()];
                for first in (0..w.len()).step_by(width) {
                    let alive = |c: &usize| ask.mask.is_none_or(|m| m.get(r, block.start + c));
                    let q: Vec<usize> = (first..(first + width).min(w.len())).filter(alive).collect();
                    // The whole saliency of weights that go together stands at the first of them.
                    let Some(&at) = q.first() else { continue };
                    let saliency = match q[..] {
                        [i] => f64::from(w[i]).powi(2) / inverse[(i, i)],
                        _ => pull(inverse, &q, w)?.data().iter().zip(&q).map(|(p, i)| p * f64::from(w[*i])).sum(),
                    };
                    scores[(r, block.start + at)] = (0.5 * saliency) as f32;
                }
                Ok(())
            })?;
            let one = Scored { scores: &scores, before: ask.mask, sparsity };
            mask = Some(select(&[one], pattern, Scope::Matrix).map_err(MethodError::new)?.remove(0));
        }
        let mut w = ask.w.to_mat();
        if let Some(mask) = &mask {
            self.blocks(&gradients, cols, width, |r, block, inverse| {
                let q: Vec<usize> = (0..block.len()).filter(|c| !mask.get(r, block.start + c)).collect();
                if q.is_empty() {
                    return Ok(());
                }
                let row = &mut w.row_mut(r)[block.clone()];
                let pull = pull(inverse, &q, row)?;
                for (c, v) in row.iter_mut().enumerate() {
                    let owed: f64 = q.iter().zip(pull.data()).map(|(&q, p)| inverse[(c, q)] * p).sum();
                    *v = if mask.get(r, block.start + c) { (f64::from(*v) - owed) as f32 } else { 0.0 };
                }
                Ok(())
            })?;
        }
        make::finite(w.view())?;
        Ok(Solved { w, mask, integers: None, aside: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::obs::slow;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::Gathered;
    use lacuna_format::Mask;

    fn solve(p: &Obert, w: &Mat, all: &Mat, prune: Option<PruneAsk>, mask: Option<&Mask>) -> Solved {
        let gradients = [(Ask::SequenceGradients, Gathered::Matrix(all.clone()))];
        let stats = Stats { gradients: &gradients, sequences: 8, ..Stats::default() };
        p.solve(&SolveAsk { w: w.view(), stats: &stats, mask, prune, round: None }).expect("solves")
    }

    /// Gradients of 7 sequences of 8: one did not reach the matrix. Those of column 1 (if any) are zero.
    fn gradients(out: usize, cols: usize, seed: u64) -> Mat {
        let (own, shared) = (random(7 * out, cols, seed), random(7 * out, 1, seed + 1));
        Mat::from_fn(7 * out, cols, |r, c| if c == 1 { 0.0 } else { 1e-3 * (own[(r, c)] + shared[(r, 0)]) })
    }

    /// The definition: `F` of a block entry by entry, and its inverse by Gauss and Jordan.
    fn inverse(all: &Mat, out: usize, r: usize, columns: &[usize], damping: f64) -> Vec<Vec<f64>> {
        let mean = all.data().iter().map(|g| f64::from(*g).powi(2)).sum::<f64>() / 8.0 / (out * all.cols()) as f64;
        let sum = |i: usize, j: usize| -> f64 {
            (0..7).map(|s| f64::from(all[(s * out + r, i)]) * f64::from(all[(s * out + r, j)])).sum()
        };
        let f = |i: usize, j: usize| sum(i, j) / 8.0 + if i == j { damping * mean } else { 0.0 };
        slow::inverse(&columns.iter().map(|&i| columns.iter().map(|&j| f(i, j)).collect()).collect::<Vec<_>>())
    }

    fn part(inv: &[Vec<f64>], q: &[usize]) -> Vec<Vec<f64>> {
        slow::inverse(&q.iter().map(|&i| q.iter().map(|&j| inv[i][j]).collect()).collect::<Vec<_>>())
    }

    #[test]
    fn agrees_with_brute_force() {
        let half = |pattern| PruneAsk { sparsity: 0.5, pattern };
        let block = |height, width| half(Sparsity::Block { height, width });
        let cases = [
            (3, 8, half(Sparsity::Unstructured), 5, 1, false),
            (4, 12, half(Sparsity::Unstructured), 50, 1, true),
            (4, 1, half(Sparsity::Unstructured), 50, 1, false),
            (1, 7, half(Sparsity::Unstructured), 3, 1, false),
            (3, 8, half(Sparsity::Nm { n: 2, m: 4 }), 6, 1, false),
            (5, 12, block(1, 4), 10, 4, false),
            (5, 12, block(1, 4), 2, 4, true),
            (4, 12, block(2, 3), 7, 3, false),
        ];
        for (case, (out, cols, prune, fisher_block, width, masked)) in cases.into_iter().enumerate() {
            for seed in 0..5 {
                let mut w = random(out, cols, seed);
                w.row_mut(0).iter_mut().step_by(2).for_each(|v| *v = 0.25);
                let all = gradients(out, cols, seed + 30);
                let earlier = masked.then(|| Mask::from_fn(out, cols, |r, c| (r + 2 * c) % 5 != 0));
                let p = Obert { fisher_block, ..Obert::default() };
                let solved = solve(&p, &w, &all, Some(prune), earlier.as_ref());
                let mask = solved.mask.expect("a mask");
                let whole = (fisher_block / width).max(1) * width;
                let mut units: Vec<(f64, bool)> = Vec::new();
                let mut want = Mat::zeros(out, cols);
                let may = |r: usize, c: usize| earlier.as_ref().is_none_or(|m| m.get(r, c));
                for r in 0..out {
                    for from in (0..cols).step_by(whole) {
                        let columns: Vec<usize> = (from..(from + whole).min(cols)).collect();
                        let inv = inverse(&all, out, r, &columns, 0.1);
                        for first in (0..columns.len()).step_by(width) {
                            let q: Vec<usize> = (first..first + width).filter(|&i| may(r, columns[i])).collect();
                            let m = part(&inv, &q);
                            let value = |i: usize| f64::from(w[(r, columns[q[i]])]);
                            let cost = (0..q.len())
                                .flat_map(|i| (0..q.len()).map(move |j| (i, j)))
                                .map(|(i, j)| 0.5 * value(i) * m[i][j] * value(j))
                                .sum();
                            if !q.is_empty() {
                                units.push((cost, mask.get(r, columns[q[0]])));
                            }
                        }
                        let q: Vec<usize> = (0..columns.len()).filter(|&i| !mask.get(r, columns[i])).collect();
                        let m = part(&inv, &q);
                        for (i, &c) in columns.iter().enumerate().filter(|(_, c)| mask.get(r, **c)) {
                            let mut v = f64::from(w[(r, c)]);
                            for (a, &x) in q.iter().enumerate() {
                                for (b, &y) in q.iter().enumerate() {
                                    v -= inv[i][x] * m[a][b] * f64::from(w[(r, columns[y])]);
                                }
                            }
                            want[(r, c)] = v as f32;
                        }
                    }
                }
                let off = max_abs_diff(solved.w.view(), want.view());
                assert!(off < 1e-3, "case {case} seed {seed}: {off}");
                if matches!(prune.pattern, Sparsity::Unstructured | Sparsity::Block { height: 1, .. }) {
                    let most = units.iter().filter(|u| !u.1).map(|u| u.0).fold(0.0, f64::max);
                    assert!(units.iter().all(|u| !u.1 || u.0 >= most * (1.0 - 1e-5)), "case {case} seed {seed}");
                }
            }
        }
    }

    #[test]
    fn the_empirical_loss_is_below_that_of_dropping_the_smallest() {
        // What the second-order model of the loss says of a change, sample by sample.
        let loss = |all: &Mat, old: &Mat, new: &Mat| -> f64 {
            let one = |s: usize, r: usize| -> f64 {
                (0..16).map(|c| f64::from(all[(s * 6 + r, c)]) * f64::from(new[(r, c)] - old[(r, c)])).sum()
            };
            (0..7).flat_map(|s| (0..6).map(move |r| (s, r))).map(|(s, r)| one(s, r).powi(2)).sum()
        };
        for seed in 0..5 {
            let (w, all) = (random(6, 16, seed), gradients(6, 16, seed + 60));
            let prune = Some(PruneAsk { sparsity: 0.5, pattern: Sparsity::Unstructured });
            let size = Mat::from_fn(6, 16, |r, c| w[(r, c)].abs());
            let one = Scored { scores: &size, before: None, sparsity: 0.5 };
            let smallest = select(&[one], Sparsity::Unstructured, Scope::Matrix).expect("masks").remove(0);
            let plain = Mat::from_fn(6, 16, |r, c| if smallest.get(r, c) { w[(r, c)] } else { 0.0 });
            let made = solve(&Obert::default(), &w, &all, prune, None).w;
            let fixed = solve(&Obert::default(), &w, &all, None, Some(&smallest)).w;
            let (plain, made, fixed) = (loss(&all, &w, &plain), loss(&all, &w, &made), loss(&all, &w, &fixed));
            assert!(made < 0.5 * plain && fixed < plain, "seed {seed}: {made} {fixed} {plain}");
        }
    }

    #[test]
    fn shapes_and_parameters_that_do_not_fit_are_refused() {
        for bad in [serde_json::json!({ "damping": 0 }), serde_json::json!({ "fisher_block": 0 })] {
            assert!((method().make)(bad).is_err());
        }
        let w = random(3, 4, 1);
        for all in [random(6, 5, 1), random(7, 4, 1), Mat::from_fn(3, 4, |_, _| f32::NAN)] {
            let gradients = [(Ask::SequenceGradients, Gathered::Matrix(all))];
            let stats = Stats { gradients: &gradients, sequences: 2, ..Stats::default() };
            let ask = SolveAsk { w: w.view(), stats: &stats, mask: None, prune: None, round: None };
            assert!(Obert::default().solve(&ask).is_err());
        }
    }
}

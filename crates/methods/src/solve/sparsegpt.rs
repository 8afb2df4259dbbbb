//! SparseGPT: weights are dropped column by column, and the columns after them make up for each loss.
//!
//! **Paper.** Elias Frantar, Dan Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
//! 2023, arXiv 2301.00774.
//!
//! **Idea.** Minimise `‖WX - ŴX‖²`. With `H = XXᵀ` and `H⁻¹ = UᵀU`, U upper, dropping `w_j` costs `(w_j / U_jj)²` once
//! the columns before it are settled. When the walk reaches a block of `mask_block` columns, the cheapest of the
//! block's weights go, over all rows together; for `n` of `m` the cheapest of each run in each row, when the walk
//! reaches the run. Then for each column: `e = (w_j - ŵ_j) / U_jj`, `w_k -= e U_jk` for all `k > j`. Rounding can be
//! asked in the same walk: a kept weight goes to its grid's nearest value.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` of its inputs `[in, in]`, used as `H = XᵀX / tokens`; `sparsity` is a
//! fraction of weights.
//!
//! **Cost.** `in³` for the factor (f64, once), `out · in²` for the walk; memory 24 `in²` bytes and two copies of the
//! matrix.
//!
//! **Departs.** (1) Exactly the asked number of weights goes: shares of the blocks are rounded so that the running
//! total is exact, equal prices fall from left to right, top to bottom. (2) Blocks of `height x width` weights go by
//! the sum of their prices. (3) What an earlier step dropped counts as the cheapest and stays dropped; with nothing
//! asked to be pruned the walk only makes up for that mask. (4) Weights of inputs that are zero in every calibration
//! token become 0 (the authors' code, too).

use std::ops::Range;

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, PruneAsk, Solve, SolveAsk, Solved, Sparsity};
use lacuna_format::Mask;
use serde::Deserialize;

use super::gptq::{self, RoundedRow, Rounder};

use crate::family::select::asked;
use crate::make;
use crate::obs::{self, Hessian};

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct SparseGpt {
    /// Added to the diagonal of H, as a fraction of its mean; above 0.
    pub damping: f64,
    /// Columns whose mask is chosen together, and after which all later ones are updated; 1 or more.
    pub mask_block: usize,
}

impl Default for SparseGpt {
    fn default() -> SparseGpt {
        SparseGpt { damping: 0.01, mask_block: 128 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "sparsegpt",
            paper: "Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, 2023",
            arxiv: "2301.00774",
            summary: "Weights are dropped column by column; the columns after them make up for each loss.",
            system: None,
            verb: "prune",
            needs: &[Ask::InputGram],
            abilities: &[
                Ability::Unstructured,
                Ability::Nm,
                Ability::Blocks,
                Ability::FixedMask,
                Ability::Round,
                Ability::PruneAndRound,
            ],
        },
        keys: make::keys::<SparseGpt>,
        make: |given| {
            let p: SparseGpt = make::parameters("sparsegpt", given)?;
            gptq::check(p.damping, p.mask_block)?;
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// What a row's decisions need: what it keeps so far, and its codes.
struct State {
    keep: Vec<bool>,
    done: RoundedRow,
}

/// Refuses what the shape does not allow.
fn fits(ask: &PruneAsk, w: MatRef<'_>) -> Result<(), MethodError> {
    let bad = |what: String| Err(MethodError::new(what));
    match ask.pattern {
        Sparsity::Nm { n, m } if m == 0 || n > m || w.cols() % m != 0 => {
            bad(format!("{n}:{m} does not fit rows of {} columns", w.cols()))
        }
        Sparsity::Block { height, width }
            if height == 0 || width == 0 || w.rows() % height != 0 || w.cols() % width != 0 =>
        {
            bad(format!("blocks of {height} x {width} do not tile a {} x {} matrix", w.rows(), w.cols()))
        }
        Sparsity::Nm { .. } => Ok(()),
        _ if !(0.0..=1.0).contains(&ask.sparsity) => bad(format!("sparsity {} is not between 0 and 1", ask.sparsity)),
        _ => Ok(()),
    }
}

/// Chooses the mask of columns `block` over all rows by cells of `height x width`: the cheapest go.
fn choose(w: &Mat, u: &Mat, block: Range<usize>, sparsity: f64, (height, width): (usize, usize), states: &mut [State]) {
    let (down, across) = (w.rows() / height, block.len() / width);
    let mut price = vec![0.0f64; down * across];
    for r in 0..w.rows() {
        for c in block.clone() {
            let e = f64::from(w[(r, c)]) / f64::from(u[(c, c)]);
            price[r / height * across + (c - block.start) / width] += if states[r].keep[c] { e * e } else { 0.0 };
        }
    }
    // A cell of which an earlier step left nothing goes first.
    let gone = |cell: usize, states: &[State]| {
        let (top, left) = (cell / across * height, block.start + cell % across * width);
        (top..top + height).all(|r| (left..left + width).all(|c| !states[r].keep[c]))
    };
    for (cell, p) in price.iter_mut().enumerate() {
        if gone(cell, states) {
            *p = -1.0;
        }
    }
    // Shares of the blocks add up to exactly the share of the whole.
    let until = |column: usize| asked(sparsity, down * (column / width));
    let drop = until(block.end) - until(block.start);
    let mut cells: Vec<usize> = (0..price.len()).collect();
    let order = |&a: &usize, &b: &usize| price[a].total_cmp(&price[b]).then(a.cmp(&b));
    if drop < cells.len() {
        cells.select_nth_unstable_by(drop, order);
    }
    for &cell in &cells[..drop] {
        let (top, left) = (cell / across * height, block.start + cell % across * width);
        for state in &mut states[top..top + height] {
            state.keep[left..left + width].fill(false);
        }
    }
}

/// Chooses which `n` of the `m` columns from `row.at` on stay, for one row.
fn choose_run(n: usize, m: usize, u: &Mat, keep: &mut [bool], row: &obs::Row<'_>) {
    let price = |c: usize, keep: &[bool]| {
        let e = row.current(c) / u[(c, c)];
        if keep[c] { e * e } else { -1.0 }
    };
    let mut run: Vec<(f32, usize)> = (row.at..row.at + m).map(|c| (price(c, keep), c)).collect();
    run.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    run[..m - n].iter().for_each(|&(_, c)| keep[c] = false);
}

impl Solve for SparseGpt {
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        make::finite(ask.w)?;
        if let Some(prune) = &ask.prune {
            fits(prune, ask.w)?;
        }
        let (out, cols) = (ask.w.rows(), ask.w.cols());
        let hessian = Hessian::new(ask.stats, cols, false, self.damping)?;
        let u = &hessian.u;
        let mut w = hessian.ordered(ask.w);
        let rounder = ask.round.map(|round| Rounder::new(round, cols).priced(&hessian.u));
        let mut states: Vec<State> = (0..out)
            .map(|r| State {
                keep: (0..cols).map(|c| ask.mask.is_none_or(|m| m.get(r, c))).collect(),
                done: RoundedRow::default(),
            })
            .collect();
        let pattern = ask.prune.map(|p| p.pattern);
        // A block of the walk holds whole runs and whole cells.
        let unit = match pattern {
            Some(Sparsity::Nm { m, .. }) => m,
            Some(Sparsity::Block { width, .. }) => width,
            _ => 1,
        };
        let block = (self.mask_block / unit).max(1) * unit;
        let before = |w: &Mat, columns: Range<usize>, states: &mut [State]| {
            match ask.prune {
                Some(PruneAsk { sparsity, pattern: Sparsity::Unstructured }) => {
                    choose(w, u, columns, sparsity, (1, 1), states)
                }
                Some(PruneAsk { sparsity, pattern: Sparsity::Block { height, width } }) => {
                    choose(w, u, columns, sparsity, (height, width), states)
                }
                _ => {}
            }
            Ok(())
        };
        obs::walk(&mut w, u, block, &mut states, before, |state, row| {
            if let Some(Sparsity::Nm { n, m }) = pattern
                && row.at % m == 0
            {
                choose_run(n, m, u, &mut state.keep, row);
            }
            match &rounder {
                Some(rounder) => rounder.round(&mut state.done, &state.keep, row),
                None => Ok(if state.keep[row.at] { row.current(row.at) } else { 0.0 }),
            }
        })?;
        let pruned = ask.prune.is_some() || ask.mask.is_some();
        let mask = pruned.then(|| Mask::from_fn(out, cols, |r, c| states[r].keep[c]));
        let rows: Vec<RoundedRow> = states.into_iter().map(|s| s.done).collect();
        let integers = rounder.map(|rounder| rounder.finish(&rows, &hessian.order)).transpose()?;
        Ok(Solved { w, mask, integers, aside: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::rtn::Rtn;
    use crate::obs::slow;
    use lacuna_base::Gram;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::{Gathered, Grid, GridAsk, RoundAsk, Stats};
    use lacuna_format::{Affine, Float};

    /// The definition: the price of every weight of the block from a fresh inverse, a full sort, then column by column
    /// with a fresh inverse.
    fn brute(
        w: &Mat,
        gram: &Gram,
        mask: Option<&Mask>,
        prune: Option<PruneAsk>,
        block: usize,
        bits: Option<(u8, usize)>,
    ) -> Mat {
        let (out, n) = (w.rows(), w.cols());
        let h = slow::hessian(gram, 0.01);
        let live = |c: usize| gram.at(c, c) != 0.0;
        let mut rows: Vec<Vec<f64>> =
            (0..out).map(|r| (0..n).map(|c| if live(c) { f64::from(w[(r, c)]) } else { 0.0 }).collect()).collect();
        let mut keep: Vec<Vec<bool>> =
            (0..out).map(|r| (0..n).map(|c| mask.is_none_or(|m| m.get(r, c))).collect()).collect();
        let cost = |rows: &[Vec<f64>], keep: &[Vec<bool>], r: usize, c: usize| {
            if keep[r][c] { (rows[r][c] * rows[r][c] / slow::rest(&h, c)[0][0]) as f32 } else { -1.0 }
        };
        let mut grids = vec![Affine { scale: 0.0, zero: 0 }; out];
        for j in 0..n {
            match prune {
                Some(PruneAsk { sparsity, pattern: Sparsity::Unstructured }) if j % block == 0 => {
                    let end = (j + block).min(n);
                    let mut all: Vec<(f32, usize, usize)> = Vec::new();
                    for r in 0..out {
                        (j..end).for_each(|c| all.push((cost(&rows, &keep, r, c), r, c)));
                    }
                    all.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
                    let goal = |c: usize| (sparsity * (out * c) as f64).round() as usize;
                    all[..goal(end) - goal(j)].iter().for_each(|&(_, r, c)| keep[r][c] = false);
                }
                Some(PruneAsk { pattern: Sparsity::Nm { n: stay, m }, .. }) if j % m == 0 => {
                    for r in 0..out {
                        let mut run: Vec<(f32, usize)> = (j..j + m).map(|c| (cost(&rows, &keep, r, c), c)).collect();
                        run.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
                        run[..m - stay].iter().for_each(|&(_, c)| keep[r][c] = false);
                    }
                }
                _ => {}
            }
            let inv = slow::rest(&h, j);
            for r in 0..out {
                let mut q = if keep[r][j] { rows[r][j] } else { 0.0 };
                if let Some((bits, group)) = bits {
                    let ask = GridAsk { bits, symmetric: false, scale: Float::F32 };
                    if j % group == 0 {
                        let values: Vec<f32> =
                            (j..(j + group).min(n)).filter(|&c| keep[r][c]).map(|c| rows[r][c] as f32).collect();
                        grids[r] = Rtn {}.fit(&values, &ask).expect("fits");
                    }
                    q = if keep[r][j] {
                        f64::from(grids[r].value(grids[r].code(rows[r][j] as f32, bits)))
                    } else {
                        0.0
                    };
                }
                slow::fix(&mut rows[r], &inv, j, q);
            }
        }
        Mat::from_fn(out, n, |r, c| rows[r][c] as f32)
    }

    #[test]
    fn agrees_with_brute_force() {
        let half = |pattern| Some(PruneAsk { sparsity: 0.5, pattern });
        let nm = |n, m| half(Sparsity::Nm { n, m });
        let cases = [
            (3, 8, half(Sparsity::Unstructured), 128, false, None),
            (5, 12, half(Sparsity::Unstructured), 5, false, None),
            (5, 12, Some(PruneAsk { sparsity: 0.3, pattern: Sparsity::Unstructured }), 4, true, None),
            (4, 1, half(Sparsity::Unstructured), 128, false, None),
            (3, 12, nm(2, 4), 8, false, None),
            (3, 12, nm(1, 3), 4, true, None),
            (3, 8, None, 128, true, None),
            (4, 12, half(Sparsity::Unstructured), 4, false, Some((4, 4))),
            (3, 12, nm(2, 4), 4, false, Some((3, 4))),
        ];
        for (case, (out, cols, prune, mask_block, masked, bits)) in cases.into_iter().enumerate() {
            let mut w = random(out, cols, 1);
            w.row_mut(0).fill(0.25); // ties
            let gram = slow::inputs(cols, 40, 2);
            let mask = masked.then(|| Mask::from_fn(out, cols, |r, c| (r + 2 * c) % 3 != 0));
            let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
            let stats = Stats { tokens: 40, found: &found, gradients: &[], sequences: 0, worked: None };
            let round = bits.map(|(bits, group)| RoundAsk {
                ask: GridAsk { bits, symmetric: false, scale: Float::F32 },
                grid: &Rtn {},
                group,
            });
            let ask = SolveAsk { w: w.view(), stats: &stats, mask: mask.as_ref(), prune, round };
            let solved = SparseGpt { mask_block, ..SparseGpt::default() }.solve(&ask).expect("solves");
            let want = brute(&w, &gram, mask.as_ref(), prune, mask_block, bits);
            assert!(max_abs_diff(solved.w.view(), want.view()) < 1e-3, "case {case}");
            let kept = solved.mask.expect("a mask");
            assert!((0..out).all(|r| (0..cols).all(|c| kept.get(r, c) || solved.w[(r, c)] == 0.0)), "case {case}");
        }
    }

    #[test]
    fn blocks_go_whole() {
        let (w, gram) = (random(8, 12, 1), slow::inputs(12, 40, 2));
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        let stats = Stats { tokens: 40, found: &found, gradients: &[], sequences: 0, worked: None };
        let prune = PruneAsk { sparsity: 0.5, pattern: Sparsity::Block { height: 4, width: 2 } };
        let ask = SolveAsk { w: w.view(), stats: &stats, mask: None, prune: Some(prune), round: None };
        let kept =
            SparseGpt { mask_block: 5, ..SparseGpt::default() }.solve(&ask).expect("solves").mask.expect("a mask");
        assert_eq!(kept.kept(), 48);
        for r in 0..8 {
            for c in 0..12 {
                assert_eq!(kept.get(r, c), kept.get(r / 4 * 4, c / 2 * 2));
            }
        }
    }

    #[test]
    fn shapes_and_numbers_that_do_not_fit_are_refused() {
        let (w, gram) = (random(3, 6, 1), slow::inputs(6, 9, 2));
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        let stats = Stats { tokens: 9, found: &found, gradients: &[], sequences: 0, worked: None };
        for prune in [
            PruneAsk { sparsity: 0.5, pattern: Sparsity::Nm { n: 2, m: 4 } },
            PruneAsk { sparsity: 0.5, pattern: Sparsity::Block { height: 2, width: 1 } },
            PruneAsk { sparsity: 1.5, pattern: Sparsity::Unstructured },
            PruneAsk { sparsity: f64::NAN, pattern: Sparsity::Unstructured },
        ] {
            let ask = SolveAsk { w: w.view(), stats: &stats, mask: None, prune: Some(prune), round: None };
            assert!(SparseGpt::default().solve(&ask).is_err(), "{prune:?}");
        }
    }
}

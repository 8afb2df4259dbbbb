//! GPTQ: weights are rounded column by column, and the columns not yet rounded make up for each error.
//!
//! **Paper.** Elias Frantar, Saleh Ashkboos, Torsten Hoefler, Dan Alistarh, "GPTQ: Accurate Post-Training Quantization
//! for Generative Pre-trained Transformers", 2022, arXiv 2210.17323.
//!
//! **Idea.** Minimise `‖WX - ŴX‖²`. With `H = XXᵀ` and `H⁻¹ = UᵀU`, U upper: for `j` = 0, 1, ...: `q = quant(w_j)`,
//! `e = (w_j - q) / U_jj`, `w_k -= e U_jk` for all `k > j`. The grid of a group of columns is fitted to the *updated*
//! weights when the walk reaches the group.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` of its inputs `[in, in]`, used as `H = XᵀX / tokens`; codes
//! `[out, in]`, scales and zeros `[out, groups]`.
//!
//! **Cost.** `in³` for the factor (f64, once), `out · in²` for the walk; memory 24 `in²` bytes and two copies of the
//! matrix.
//!
//! **Departs.** (1) With `act_order`, groups are runs in the order of the walk and the answer carries an explicit group
//! for each column, as the authors' later code does. (2) Weights of inputs that are zero in every calibration token
//! become 0 (the authors' code, too). (3) The grid sees every update, also those from columns of its own block of 128,
//! which the authors' code applies late; `late_grid` does as that code. (4) Zeros that an earlier step made stay zero
//! exactly: they are left out of the grid's fit, and their drift is made up for like any error. (5) `type` rounds to the
//! blocks of a GGUF type, which the paper does not: all scales are fitted beforehand, `act_order` is then the default,
//! and `passes` over all codes and scales after the walk lower the error further (`blocks.rs`).

use std::ops::Range;

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, RoundAsk, Solve, SolveAsk, Solved, Stats};
use lacuna_format::{Affine, GgufType, Group, Integers, Piece};
use serde::Deserialize;

use crate::blocks::{self, Walk};
use crate::make;
use crate::obs::{self, Hessian};

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Gptq {
    /// Added to the diagonal of H, as a fraction of its mean; above 0.
    damping: f64,
    /// Columns walked between two updates of all later ones; 1 or more.
    block: usize,
    /// Walk the inputs by falling `Σ x²` instead of from left to right; without a word only where `type` is asked.
    act_order: Option<bool>,
    /// Fit a group's grid to the weights as they were at the start of the block that the group starts in.
    late_grid: bool,
    /// With `type`: passes over all codes and scales after the walk, each move of which lowers the error.
    passes: usize,
}

impl Default for Gptq {
    fn default() -> Gptq {
        Gptq { damping: 0.01, block: 128, act_order: None, late_grid: false, passes: 4 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "gptq",
            paper: "Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative \
             Pre-trained Transformers, 2022",
            arxiv: "2210.17323",
            summary: "Weights are rounded column by column; the columns not yet rounded make up for each error.",
            system: None,
            verb: "quantize",
            needs: &[Ask::InputGram],
            abilities: &[Ability::Round, Ability::BlockTypes, Ability::FixedMask],
        },
        keys: make::keys::<Gptq>,
        make: |given| {
            let p: Gptq = make::parameters("gptq", given)?;
            check(p.damping, p.block)?;
            if p.passes > 100 {
                return Err(MethodError::new(format!("passes is {}; 0 to 100 are possible", p.passes)));
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// The ranges that GPTQ and SparseGPT share.
pub(super) fn check(damping: f64, block: usize) -> Result<(), MethodError> {
    if !(damping > 0.0 && damping.is_finite()) {
        return Err(MethodError::new(format!("damping is {damping}; it must be above 0 (the paper's is 0.01)")));
    }
    if block == 0 {
        return Err(MethodError::new("block is 0; it must be 1 or more (the paper's is 128)"));
    }
    Ok(())
}

/// Rounds along a walk.
pub(super) struct Rounder<'a> {
    pub ask: RoundAsk<'a>,
    pub cols: usize,
    pub group: usize,
    /// `1 / U_jj²` at each position of the walk, what an error there costs; empty where the grid does not ask.
    pub prices: Vec<f32>,
}

/// The codes and grids of one row, in the order of the walk.
#[derive(Clone, Default)]
pub(super) struct RoundedRow {
    pub codes: Vec<u8>,
    pub grids: Vec<Affine>,
}

impl<'a> Rounder<'a> {
    pub fn new(ask: RoundAsk<'a>, cols: usize) -> Rounder<'a> {
        let group = if ask.group == 0 { cols } else { ask.group.min(cols) };
        Rounder { ask, cols, group: group.max(1), prices: Vec::new() }
    }

    /// Tells a grid that asks for importance what an error costs.
    pub fn priced(mut self, u: &Mat) -> Rounder<'a> {
        if self.ask.grid.importance().is_some() {
            self.prices = (0..self.cols).map(|j| u[(j, j)].powi(-2)).collect();
        }
        self
    }

    /// Fits the grid of the group that starts at column `at`, whose weights `value` tells.
    fn fit(
        &self,
        done: &mut RoundedRow,
        keep: &[bool],
        at: usize,
        value: impl Fn(usize) -> f32,
    ) -> Result<(), MethodError> {
        let members = at..(at + self.group).min(self.cols);
        let of: Vec<(usize, f32)> = members.filter(|&c| keep[c]).map(|c| (c, value(c))).collect();
        done.grids.push(self.grid(&of)?);
        Ok(())
    }

    /// The grid for some values, each with its position in the walk.
    pub fn grid(&self, of: &[(usize, f32)]) -> Result<Affine, MethodError> {
        let values: Vec<f32> = of.iter().map(|(_, v)| *v).collect();
        let grid = if self.prices.is_empty() {
            self.ask.grid.fit(&values, &self.ask.ask)?
        } else {
            let prices: Vec<f32> = of.iter().map(|(c, _)| self.prices[*c]).collect();
            self.ask.grid.fit_weighted(&values, &prices, &self.ask.ask)?
        };
        if self.ask.ask.symmetric && u32::from(grid.zero) != 1 << (self.ask.ask.bits - 1) {
            return Err(MethodError::new(format!("a symmetric grid with its zero at code {}", grid.zero)));
        }
        Ok(grid)
    }

    /// Fits the grids of all groups that start in a block, to the weights `w` (of one row) at the block's start.
    fn fit_early(
        &self,
        done: &mut RoundedRow,
        keep: &[bool],
        block: Range<usize>,
        w: &[f32],
    ) -> Result<(), MethodError> {
        for at in block.filter(|at| at.is_multiple_of(self.group)) {
            self.fit(done, keep, at, |c| w[c])?;
        }
        Ok(())
    }

    /// The value that the row's current column is rounded to; at a group's start, the group's grid first.
    pub fn round(&self, done: &mut RoundedRow, keep: &[bool], row: &obs::Row<'_>) -> Result<f32, MethodError> {
        let at = row.at;
        if at / self.group == done.grids.len() {
            self.fit(done, keep, at, |c| row.current(c))?;
        }
        let grid = done.grids[at / self.group];
        let code = if keep[at] { grid.code(row.current(at), self.ask.ask.bits) } else { grid.zero };
        done.codes.push(code);
        Ok(if keep[at] { grid.value(code) } else { 0.0 })
    }

    /// The rows' codes in the columns' own order, `order[j]` being the `j`-th column walked.
    pub fn finish(&self, rows: &[RoundedRow], order: &[usize]) -> Result<Integers, MethodError> {
        let groups = self.cols.div_ceil(self.group);
        let walked_in_order = order.iter().enumerate().all(|(j, &c)| j == c);
        let group = if walked_in_order {
            Group::Run(self.group)
        } else {
            if groups > 1 << 16 {
                return Err(MethodError::new(format!("{groups} groups in a row; act_order allows 65536")));
            }
            let mut of = vec![0u8; 2 * self.cols];
            for (j, &c) in order.iter().enumerate() {
                of[2 * c..2 * c + 2].copy_from_slice(&((j / self.group) as u16).to_le_bytes());
            }
            Group::Index { groups, of: of.into() }
        };
        let mut codes = vec![0u8; rows.len() * self.cols];
        for (r, row) in rows.iter().enumerate() {
            order.iter().zip(&row.codes).for_each(|(&c, &code)| codes[r * self.cols + c] = code);
        }
        let zeros = || rows.iter().flat_map(|row| row.grids.iter().map(|g| g.zero)).collect();
        Ok(Integers {
            rows: rows.len(),
            cols: self.cols,
            bits: self.ask.ask.bits,
            codes,
            scales: Mat::from_fn(rows.len(), groups, |r, g| rows[r].grids[g].scale),
            zeros: if self.ask.ask.symmetric { None } else { Some(zeros()) },
            group,
            offsets: None,
        })
    }
}

impl Solve for Gptq {
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        if ask.prune.is_some() {
            return Err(MethodError::new("gptq rounds and does not prune; sparsegpt does both"));
        }
        let round = ask.round.ok_or_else(|| MethodError::new("gptq was not asked to round"))?;
        make::finite(ask.w)?;
        let (out, cols) = (ask.w.rows(), ask.w.cols());
        let hessian = Hessian::new(ask.stats, cols, self.act_order.unwrap_or(false), self.damping)?;
        let order = &hessian.order;
        let mut w = hessian.ordered(ask.w);
        let rounder = Rounder::new(round, cols).priced(&hessian.u);
        let mut rows: Vec<(Vec<bool>, RoundedRow)> = (0..out)
            .map(|r| (order.iter().map(|&c| ask.mask.is_none_or(|m| m.get(r, c))).collect(), RoundedRow::default()))
            .collect();
        obs::walk(
            &mut w,
            &hessian.u,
            self.block,
            &mut rows,
            |w, block, rows| {
                if self.late_grid {
                    for (r, (keep, done)) in rows.iter_mut().enumerate() {
                        rounder.fit_early(done, keep, block.clone(), w.row(r))?;
                    }
                }
                Ok(())
            },
            |(keep, done), row| rounder.round(done, keep, row),
        )?;
        let rows: Vec<RoundedRow> = rows.into_iter().map(|(_, done)| done).collect();
        let integers = rounder.finish(&rows, order)?;
        let mut back = vec![0; cols];
        order.iter().enumerate().for_each(|(j, &c)| back[c] = j);
        Ok(Solved {
            w: obs::permuted(w.view(), &back),
            mask: ask.mask.cloned(),
            integers: Some(integers),
            aside: Vec::new(),
        })
    }

    fn solve_blocks(&self, w: MatRef<'_>, stats: &Stats<'_>, kind: GgufType) -> Result<Piece, MethodError> {
        let act_order = self.act_order.unwrap_or(true);
        let how = Walk { damping: self.damping, block: self.block, act_order, passes: self.passes };
        blocks::solve(w, stats, kind, &how)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::rtn::Rtn;
    use crate::obs::slow;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::{Gathered, Grid, GridAsk, PruneAsk, Sparsity};
    use lacuna_format::{Float, Mask};

    fn ask4(symmetric: bool) -> GridAsk {
        GridAsk { bits: 4, symmetric, scale: Float::F32 }
    }

    /// The definition: solve for the rest after every column; the grid from all weights of the group as they are then.
    fn brute(
        w: &Mat,
        gram: &lacuna_base::Gram,
        mask: Option<&Mask>,
        ask: &GridAsk,
        group: usize,
        order: &[usize],
        late: Option<usize>,
    ) -> Mat {
        let h = slow::hessian(gram, 0.01);
        let h: Vec<Vec<f64>> = order.iter().map(|&i| order.iter().map(|&j| h[i][j]).collect()).collect();
        let mut out = Mat::zeros(w.rows(), w.cols());
        for r in 0..w.rows() {
            let live = |c: usize| gram.at(c, c) != 0.0;
            let mut row: Vec<f64> = order.iter().map(|&c| if live(c) { f64::from(w[(r, c)]) } else { 0.0 }).collect();
            let kept = |j: usize| mask.is_none_or(|m| m.get(r, order[j]));
            let mut grid = Affine { scale: 0.0, zero: 0 };
            let mut known = row.clone();
            for j in 0..row.len() {
                if j % late.unwrap_or(1) == 0 {
                    known.clone_from(&row);
                }
                if j % group == 0 {
                    let end = (j + group).min(row.len());
                    let values: Vec<f32> = (j..end).filter(|&k| kept(k)).map(|k| known[k] as f32).collect();
                    grid = Rtn {}.fit(&values, ask).expect("fits");
                }
                let q = if kept(j) { grid.value(grid.code(row[j] as f32, ask.bits)) } else { 0.0 };
                slow::fix(&mut row, &slow::rest(&h, j), j, f64::from(q));
                out[(r, order[j])] = q;
            }
        }
        out
    }

    #[test]
    fn agrees_with_brute_force() {
        for (out, cols, group, block) in [(3, 8, 4, 128), (2, 12, 5, 4), (4, 1, 1, 1), (1, 9, 0, 3), (3, 10, 64, 4)] {
            for (act_order, late_grid) in [(false, false), (true, false), (false, true), (true, true)] {
                for masked in [false, true] {
                    let (w, gram) = (random(out, cols, 1), slow::inputs(cols, 40, 2));
                    let mask = masked.then(|| Mask::from_fn(out, cols, |r, c| (r + 2 * c) % 3 != 0));
                    let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
                    let stats = Stats { tokens: 40, found: &found, gradients: &[], sequences: 0, worked: None };
                    let round = RoundAsk { ask: ask4(!masked), grid: &Rtn {}, group };
                    let gptq = Gptq { block, act_order: Some(act_order), late_grid, ..Gptq::default() };
                    let ask =
                        SolveAsk { w: w.view(), stats: &stats, mask: mask.as_ref(), prune: None, round: Some(round) };
                    let solved = gptq.solve(&ask).expect("solves");
                    let mut order: Vec<usize> = (0..cols).collect();
                    if act_order {
                        order.sort_by(|&a, &b| gram.at(b, b).total_cmp(&gram.at(a, a)));
                    }
                    let run = if group == 0 { cols } else { group };
                    let late = late_grid.then_some(block);
                    let want = brute(&w, &gram, mask.as_ref(), &ask4(!masked), run, &order, late);
                    assert!(
                        max_abs_diff(solved.w.view(), want.view()) < 1e-3,
                        "{out} {cols} {group} {act_order} {late_grid} {masked}"
                    );
                    let integers = solved.integers.expect("rounded");
                    for r in 0..out {
                        for c in 0..cols {
                            let kept = mask.as_ref().is_none_or(|m| m.get(r, c));
                            let value = if kept { integers.value(r, c) } else { 0.0 };
                            assert_eq!(solved.w[(r, c)], value, "decoded ({r}, {c})");
                        }
                    }
                }
            }
        }
    }

    /// `tr(ΔW H ΔWᵀ)` by the definition, as a sum over pairs of inputs.
    fn output_error(old: &Mat, new: &Mat, gram: &lacuna_base::Gram) -> f64 {
        let n = old.cols();
        let delta = |r: usize, c: usize| f64::from(old[(r, c)]) - f64::from(new[(r, c)]);
        let row = |r: usize| -> f64 {
            (0..n).map(|i| (0..n).map(|j| delta(r, i) * gram.at(i, j) * delta(r, j)).sum::<f64>()).sum()
        };
        (0..old.rows()).map(row).sum()
    }

    #[test]
    fn grids_that_know_the_prices_leave_less_error() {
        let made = (crate::grid::weighted_rtn::method().make)(serde_json::Value::Null).expect("made");
        let lacuna_contract::Made::Grid(weighted) = made else { panic!("a grid") };
        for (bits, symmetric, most) in [(2, false, 0.7), (2, true, 0.9), (3, false, 0.9), (3, true, 0.95)] {
            let mut ratios = 0.0;
            for seed in 0..4 {
                let (w, gram) = (random(16, 128, seed), slow::inputs(128, 300, seed + 20));
                let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
                let stats = Stats { tokens: 300, found: &found, gradients: &[], sequences: 0, worked: None };
                let lost = |grid: &dyn Grid| {
                    let ask = GridAsk { bits, symmetric, scale: Float::F16 };
                    let round = Some(RoundAsk { ask, grid, group: 64 });
                    let ask = SolveAsk { w: w.view(), stats: &stats, mask: None, prune: None, round };
                    output_error(&w, &Gptq::default().solve(&ask).expect("solves").w, &gram)
                };
                ratios += lost(weighted.as_ref()) / lost(&Rtn {}) / 4.0;
            }
            println!("{bits} bits, symmetric {symmetric}: {ratios}");
            assert!(ratios < most, "{bits} bits, symmetric {symmetric}: {ratios}");
        }
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let (w, gram) = (random(2, 4, 1), slow::inputs(4, 9, 2));
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        let stats = Stats { tokens: 9, found: &found, gradients: &[], sequences: 0, worked: None };
        let round = RoundAsk { ask: ask4(true), grid: &Rtn {}, group: 2 };
        let ask = SolveAsk { w: w.view(), stats: &stats, mask: None, prune: None, round: Some(round) };
        let fails = |ask: &SolveAsk<'_>| Gptq::default().solve(ask).expect_err("refused").what;
        assert!(fails(&SolveAsk { round: None, ..ask }).contains("not asked"));
        let prune = PruneAsk { sparsity: 0.5, pattern: Sparsity::Unstructured };
        assert!(fails(&SolveAsk { prune: Some(prune), ..ask }).contains("sparsegpt"));
        let none = [(Ask::InputGram, Gathered::Gram(lacuna_base::Gram::new(4)))];
        assert!(fails(&SolveAsk { stats: &Stats { found: &none, ..stats }, ..ask }).contains("no calibration token"));
        let bad = Mat::from_fn(2, 4, |_, c| if c == 3 { f32::NAN } else { 1.0 });
        assert!(fails(&SolveAsk { w: bad.view(), ..ask }).contains("column 3"));
        let mut wild = lacuna_base::Gram::new(4);
        wild.add(Mat::from_fn(1, 4, |_, _| f32::NAN).view());
        let wild = [(Ask::InputGram, Gathered::Gram(wild))];
        assert!(fails(&SolveAsk { stats: &Stats { found: &wild, ..stats }, ..ask }).contains("beyond the range"));
        assert!((method().make)(serde_json::json!({ "damping": 0 })).is_err());
        assert!((method().make)(serde_json::json!({ "dampening": 0.1 })).is_err());
    }
}

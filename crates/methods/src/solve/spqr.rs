//! SpQR: the few weights that rounding would hurt most stay exact in a sparse term, all others go to few bits in small
//! groups.
//!
//! **Paper.** Tim Dettmers, Ruslan Svirschevski, Vage Egiazarian, Denis Kuznedelev, Elias Frantar, Saleh Ashkboos,
//! Alexander Borzunov, Torsten Hoefler, Dan Alistarh, "SpQR: A Sparse-Quantized Representation for Near-Lossless LLM
//! Weight Compression", 2023, arXiv 2306.03078.
//!
//! **Idea.** GPTQ's walk with groups of 16. A weight of a group is sensitive if leaving it out lowers the error of the
//! rest by more than `τ`: `Σ_k ((w_k - quant(w_k)) / U_kk)² - Σ_{k≠i} ((w_k - quant_{-i}(w_k)) / U_kk)² > τ`,
//! `quant_{-i}` the grid fitted without `w_i`. The group's grid is fitted without its sensitive weights; a weight whose
//! own error `((w - q) / U_jj)²` on that grid is above `τ` is an outlier and stays as it is. Scales are rounded, too,
//! to 3 bits over runs of 16 groups.
//!
//! **Shapes and units.** `w` `[out, in]`; `XᵀX` of its inputs `[in, in]`, used as `H = XᵀX / tokens`, `H⁻¹ = UᵀU`;
//! codes `[out, in]`, scales and zeros `[out, groups]`; outliers in f16.
//! `τ = threshold · mean over columns of (mean over rows of w²) / U_jj²`.
//!
//! **Cost.** `in³` for the factor (f64, once), `out · in²` for the walk, one grid a weight for the sensitivities
//! (`out · in · group`); memory 24 `in²` bytes and two copies of the matrix.
//!
//! **Departs.** (1) Runs of groups that share a scale of scales lie along a row here, across 16 rows in the paper; so
//! the grids of a run are fitted together when the walk reaches the run. (2) Zero points are codes of the weights' own
//! bits and need no second order. (3) The mean square of a column stands for its variance in `τ`, so that one row has
//! one, too. (4) Which weights stay is decided by their own error, as in the authors' code, while the paper's
//! pseudo-code keeps every sensitive one. (5) The walk goes from left to right unless `act_order` is set; groups are
//! then runs in the order of the walk. (6) Zeros that an earlier step made stay zero and are never outliers. (7)
//! Without zero points scales have signs and keep the codec that the step asks for.

use std::ops::Range;

use lacuna_base::{Mat, float};
use lacuna_contract::{Ability, Ask, Card, GridAsk, Made, Method, MethodError, RoundedForm, Solve, SolveAsk, Solved};
use lacuna_format::{Affine, Layout, Mask, PatternKind, ScaleCodec, UnpackedPiece, pack_scales};
use serde::Deserialize;

use super::gptq::{self, RoundedRow, Rounder};
use crate::make;
use crate::obs::{self, Hessian};

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SpQr {
    /// Added to the diagonal of H, as a fraction of its mean; above 0.
    damping: f64,
    /// Columns walked between two updates of all later ones; 1 or more.
    block: usize,
    /// Walk the inputs by falling `Σ x²` instead of from left to right.
    act_order: bool,
    /// Keep outliers at all.
    outliers: bool,
    /// `τ` in units of the mean squared price of dropping a weight, above 0.
    threshold: f64,
    /// Bits of a scale, 2 to 8; 0: the step's `scale`.
    scale_bits: u8,
    /// Groups of a row that share a scale and a minimum of their scales, 2 or more.
    scale_group: usize,
}

impl Default for SpQr {
    fn default() -> SpQr {
        SpQr {
            damping: 1.0,
            block: 128,
            act_order: false,
            outliers: true,
            threshold: 0.2,
            scale_bits: 3,
            scale_group: 16,
        }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "spqr",
            paper: "Dettmers et al.: SpQR: A Sparse-Quantized Representation for Near-Lossless LLM Weight Compression, \
             2023",
            arxiv: "2306.03078",
            summary: "The weights that rounding would hurt most stay exact in a sparse term, the others go to few bits \
             in small groups.",
            system: Some(19),
            verb: "quantize",
            needs: &[Ask::InputGram],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<SpQr>,
        make: |given| {
            let p: SpQr = make::parameters("spqr", given)?;
            gptq::check(p.damping, p.block)?;
            if !(p.threshold > 0.0 && p.threshold.is_finite()) {
                return Err(MethodError::new(format!("threshold is {}; it must be above 0", p.threshold)));
            }
            if p.scale_bits != 0 && !(2..=8).contains(&p.scale_bits) {
                return Err(MethodError::new(format!("scale_bits is {}; write 0 or 2 to 8", p.scale_bits)));
            }
            if p.scale_group < 2 {
                return Err(MethodError::new(format!("scale_group is {}; it must be 2 or more", p.scale_group)));
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// A row on its way through the walk.
struct State {
    keep: Vec<bool>,
    done: RoundedRow,
    /// Column in the order of the walk, and value.
    out: Vec<(usize, f32)>,
}

/// What the rows' decisions share.
struct Walker<'a> {
    rounder: Rounder<'a>,
    u: &'a Mat,
    /// `τ`; infinite where nothing stays.
    tau: f64,
    codec: Option<ScaleCodec>,
    /// Groups whose grids are fitted together.
    run: usize,
}

/// Scales as `codec` will hold them, written and read again: values that it keeps exactly.
fn second_order(scales: &[f32], codec: ScaleCodec) -> Result<Vec<f32>, MethodError> {
    let fail = |e: lacuna_format::FormatError| MethodError::new(format!("{}; scale_bits = 0 holds it", e.what));
    let written = |values: &[f32]| -> Result<Vec<f32>, MethodError> {
        let packed = pack_scales(&Mat::from_vec(1, values.len(), values.to_vec()), codec).map_err(fail)?;
        let mut read = vec![0.0; values.len()];
        packed.row(0, &mut read);
        Ok(read)
    };
    let mut now = written(scales)?;
    // What was rounded once is kept, except where scales differ by less than f16 tells of them.
    for _ in 0..4 {
        let again = written(&now)?;
        if again == now {
            return Ok(now);
        }
        now = again;
    }
    written(&vec![now[0]; scales.len()])
}

impl Walker<'_> {
    fn span(&self, group: usize) -> Range<usize> {
        group * self.rounder.group..((group + 1) * self.rounder.group).min(self.rounder.cols)
    }

    /// `Σ ((v - quant(v)) / U)²` over `of` on a grid.
    fn price(&self, grid: Affine, of: &[(usize, f32)]) -> f64 {
        let bits = self.rounder.ask.ask.bits;
        let one = |(c, v): &(usize, f32)| {
            let e = f64::from(v - grid.value(grid.code(*v, bits))) / f64::from(self.u[(*c, *c)]);
            e * e
        };
        of.iter().map(one).sum()
    }

    /// A group's grid, fitted without its sensitive weights. `of`: columns and values.
    fn fit(&self, of: &[(usize, f32)]) -> Result<Affine, MethodError> {
        let fit = |of: &[(usize, f32)]| self.rounder.grid(of);
        let all = fit(of)?;
        if self.tau.is_infinite() {
            return Ok(all);
        }
        let total = self.price(all, of);
        let (mut plain, mut rest) = (Vec::with_capacity(of.len()), Vec::with_capacity(of.len()));
        for i in 0..of.len() {
            rest.clear();
            rest.extend(of.iter().enumerate().filter(|(k, _)| *k != i).map(|(_, x)| *x));
            if total - self.price(fit(&rest)?, &rest) <= self.tau {
                plain.push(of[i]);
            }
        }
        // Where all are sensitive they have nothing to make room for.
        if plain.len() == of.len() || plain.is_empty() { Ok(all) } else { fit(&plain) }
    }

    /// Fits the grids of the run of groups that the walk has reached.
    fn fit_run(&self, state: &mut State, row: &obs::Row<'_>) -> Result<(), MethodError> {
        let from = state.done.grids.len();
        let to = (from + self.run).min(self.rounder.cols.div_ceil(self.rounder.group));
        let mut grids = Vec::with_capacity(to - from);
        // Groups of zeros take any scale.
        let mut least = f32::INFINITY;
        let mut zeros = Vec::new();
        for g in from..to {
            let members = self.span(g).filter(|&c| state.keep[c]);
            let of: Vec<(usize, f32)> = members.map(|c| (c, row.current(c))).collect();
            grids.push(self.fit(&of)?);
            match of.iter().all(|(_, v)| *v == 0.0) {
                true => zeros.push(g - from),
                false => least = least.min(grids[g - from].scale),
            }
        }
        if let Some(codec) = self.codec {
            if least.is_finite() {
                zeros.iter().for_each(|&g| grids[g].scale = least);
            }
            let scales: Vec<f32> = grids.iter().map(|g| g.scale).collect();
            let top = (1u32 << self.rounder.ask.ask.bits) as f32 - 1.0;
            for (grid, scale) in grids.iter_mut().zip(second_order(&scales, codec)?) {
                // The middle of the grid stays where it was, so that what no longer fits is shared by both ends.
                let middle = top / 2.0;
                let ratio = if scale > 0.0 { grid.scale / scale } else { 1.0 };
                let zero = (middle + (f32::from(grid.zero) - middle) * ratio).round_ties_even().clamp(0.0, top);
                *grid = Affine { scale, zero: zero as u8 };
            }
        }
        state.done.grids.extend(grids);
        Ok(())
    }

    fn decide(&self, state: &mut State, row: &obs::Row<'_>) -> Result<f32, MethodError> {
        let at = row.at;
        if at / self.rounder.group == state.done.grids.len() {
            self.fit_run(state, row)?;
        }
        let grid = state.done.grids[at / self.rounder.group];
        if !state.keep[at] {
            state.done.codes.push(grid.zero);
            return Ok(0.0);
        }
        let v = row.current(at);
        let half = float::round_f16(v);
        if half != 0.0 && half.is_finite() && self.price(grid, &[(at, v)]) > self.tau {
            state.done.codes.push(grid.zero);
            state.out.push((at, half));
            return Ok(half);
        }
        let code = grid.code(v, self.rounder.ask.ask.bits);
        state.done.codes.push(code);
        Ok(grid.value(code))
    }
}

impl SpQr {
    fn codec(&self, ask: &GridAsk) -> Option<ScaleCodec> {
        let int = ScaleCodec::Int { bits: self.scale_bits, per: self.scale_group };
        (self.scale_bits > 0 && !ask.symmetric).then_some(int)
    }

    /// `τ` for weights whose columns are in the order of the walk.
    fn tau(&self, w: &Mat, u: &Mat) -> f64 {
        if !self.outliers {
            return f64::INFINITY;
        }
        let mut squares = vec![0.0f64; w.cols()];
        for r in 0..w.rows() {
            squares.iter_mut().zip(w.row(r)).for_each(|(s, v)| *s += f64::from(*v) * f64::from(*v));
        }
        let price = |(c, s): (usize, &f64)| s / f64::from(u[(c, c)]).powi(2);
        self.threshold * squares.iter().enumerate().map(price).sum::<f64>() / (w.rows() * w.cols()).max(1) as f64
    }
}

impl Solve for SpQr {
    fn rounded_form(&self, ask: &GridAsk) -> RoundedForm {
        // The share that the paper's thresholds lead to.
        RoundedForm { scales: self.codec(ask), aside: if self.outliers { 0.01 } else { 0.0 }, ..RoundedForm::default() }
    }

    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        if ask.prune.is_some() {
            return Err(MethodError::new("spqr rounds and does not prune; sparsegpt does both"));
        }
        let round = ask.round.ok_or_else(|| MethodError::new("spqr was not asked to round"))?;
        make::finite(ask.w)?;
        let (out, cols) = (ask.w.rows(), ask.w.cols());
        let hessian = Hessian::new(ask.stats, cols, self.act_order, self.damping)?;
        let order = &hessian.order;
        let mut w = hessian.ordered(ask.w);
        let codec = self.codec(&round.ask);
        let (rounder, tau) = (Rounder::new(round, cols).priced(&hessian.u), self.tau(&w, &hessian.u));
        let run = if codec.is_some() { self.scale_group } else { 1 };
        let walker = Walker { rounder, u: &hessian.u, tau, codec, run };
        let keeps = |r: usize| order.iter().map(|&c| ask.mask.is_none_or(|m| m.get(r, c))).collect();
        let mut rows: Vec<State> =
            (0..out).map(|r| State { keep: keeps(r), done: RoundedRow::default(), out: Vec::new() }).collect();
        let decide = |state: &mut State, row: &obs::Row<'_>| walker.decide(state, row);
        obs::walk(&mut w, &hessian.u, self.block, &mut rows, |_, _, _| Ok(()), decide)?;
        let (mut exact, mut places) = (Mat::zeros(out, cols), Mask::all(out, cols, false));
        for (r, state) in rows.iter().enumerate() {
            for &(j, v) in &state.out {
                w[(r, j)] = 0.0;
                exact[(r, order[j])] = v;
                places.set(r, order[j], true);
            }
        }
        let aside = if places.kept() == 0 {
            Vec::new()
        } else {
            let mut piece = UnpackedPiece::dense(exact);
            piece.layout = Layout::Fixed(PatternKind::Csr);
            piece.keep(places);
            vec![piece]
        };
        let done: Vec<RoundedRow> = rows.into_iter().map(|s| s.done).collect();
        let integers = walker.rounder.finish(&done, order)?;
        let mut back = vec![0; cols];
        order.iter().enumerate().for_each(|(j, &c)| back[c] = j);
        Ok(Solved { w: obs::permuted(w.view(), &back), mask: ask.mask.cloned(), integers: Some(integers), aside })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::rtn::Rtn;
    use crate::obs::slow;
    use lacuna_base::Gram;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::{Gathered, Grid, RoundAsk, Stats};
    use lacuna_format::{Float, Stored, Term, pack_integers};

    fn ask3(symmetric: bool) -> GridAsk {
        GridAsk { bits: 3, symmetric, scale: Float::F16 }
    }

    /// Weights of which a few are large.
    fn spiky(out: usize, cols: usize) -> Mat {
        let w = random(out, cols, 1);
        Mat::from_fn(out, cols, |r, c| if (r * 5 + c * 3) % 17 == 4 { 9.0 * w[(r, c)] } else { w[(r, c)] })
    }

    /// The definition, without second-order scales: `(rounded part, outliers)`, a fresh inverse for every column.
    fn brute(
        w: &Mat,
        gram: &Gram,
        mask: Option<&Mask>,
        ask: &GridAsk,
        group: usize,
        order: &[usize],
        method: &SpQr,
    ) -> (Mat, Mat) {
        let h = slow::hessian(gram, method.damping);
        let h: Vec<Vec<f64>> = order.iter().map(|&i| order.iter().map(|&j| h[i][j]).collect()).collect();
        let (out, n) = (w.rows(), w.cols());
        // The price of column j once those before it are settled: U_jj².
        let price: Vec<f64> = (0..n).map(|j| slow::rest(&h, j)[0][0]).collect();
        let live = |c: usize| gram.at(c, c) != 0.0;
        let start = |r: usize, j: usize| if live(order[j]) { f64::from(w[(r, order[j])]) } else { 0.0 };
        let tau = method.threshold
            * (0..n).map(|j| (0..out).map(|r| start(r, j).powi(2)).sum::<f64>() / out as f64 / price[j]).sum::<f64>()
            / n as f64;
        let cost = |grid: Affine, j: usize, v: f64| {
            (v - f64::from(grid.value(grid.code(v as f32, ask.bits)))).powi(2) / price[j]
        };
        let (mut rounded, mut exact) = (Mat::zeros(out, n), Mat::zeros(out, n));
        for r in 0..out {
            let mut row: Vec<f64> = (0..n).map(|j| start(r, j)).collect();
            let kept = |j: usize| mask.is_none_or(|m| m.get(r, order[j]));
            let mut grid = Affine { scale: 0.0, zero: 0 };
            for j in 0..n {
                if j % group == 0 {
                    let members: Vec<usize> = (j..(j + group).min(n)).filter(|&k| kept(k)).collect();
                    let error = |without: Option<usize>| {
                        let rest: Vec<usize> = members.iter().copied().filter(|k| Some(*k) != without).collect();
                        let values: Vec<f32> = rest.iter().map(|&k| row[k] as f32).collect();
                        let grid = Rtn {}.fit(&values, ask).expect("fits");
                        rest.iter().map(|&k| cost(grid, k, row[k])).sum::<f64>()
                    };
                    let plain = members.iter().filter(|&&k| error(None) - error(Some(k)) <= tau);
                    let plain: Vec<usize> = plain.copied().collect();
                    let used = if plain.is_empty() { &members } else { &plain };
                    let values: Vec<f32> = used.iter().map(|&k| row[k] as f32).collect();
                    grid = Rtn {}.fit(&values, ask).expect("fits");
                }
                let mut fixed = 0.0;
                if kept(j) && cost(grid, j, row[j]) > tau {
                    fixed = float::round_f16(row[j] as f32);
                    exact[(r, order[j])] = fixed;
                } else if kept(j) {
                    fixed = grid.value(grid.code(row[j] as f32, ask.bits));
                    rounded[(r, order[j])] = fixed;
                }
                slow::fix(&mut row, &slow::rest(&h, j), j, f64::from(fixed));
            }
        }
        (rounded, exact)
    }

    fn solve(method: &SpQr, w: &Mat, gram: &Gram, mask: Option<&Mask>, ask: GridAsk, group: usize) -> Solved {
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        let stats = Stats { tokens: gram.tokens(), found: &found, gradients: &[], sequences: 0, worked: None };
        let round = RoundAsk { ask, grid: &Rtn {}, group };
        method.solve(&SolveAsk { w: w.view(), stats: &stats, mask, prune: None, round: Some(round) }).expect("solves")
    }

    #[test]
    fn agrees_with_brute_force() {
        let mut set_aside = 0;
        for (out, cols, group, block) in [(3, 8, 4, 128), (2, 12, 5, 4), (4, 1, 1, 1), (1, 9, 0, 3), (3, 10, 16, 4)] {
            for (act_order, masked) in [(false, false), (true, false), (false, true), (true, true)] {
                let (w, gram) = (spiky(out, cols), slow::inputs(cols, 40, 2));
                let mask = masked.then(|| Mask::from_fn(out, cols, |r, c| (r + 2 * c) % 3 != 0));
                let method = SpQr { block, act_order, scale_bits: 0, damping: 0.1, ..SpQr::default() };
                let solved = solve(&method, &w, &gram, mask.as_ref(), ask3(masked), group);
                let mut order: Vec<usize> = (0..cols).collect();
                if act_order {
                    order.sort_by(|&a, &b| gram.at(b, b).total_cmp(&gram.at(a, a)));
                }
                let run = if group == 0 { cols } else { group };
                let (rounded, exact) = brute(&w, &gram, mask.as_ref(), &ask3(masked), run, &order, &method);
                let what = format!("{out} {cols} {group} {act_order} {masked}");
                assert!(max_abs_diff(solved.w.view(), rounded.view()) < 2e-3, "{what}");
                set_aside += solved.aside.len();
                let aside = solved.aside.first().map_or_else(|| Mat::zeros(out, cols), |p| p.w.clone());
                assert!(max_abs_diff(aside.view(), exact.view()) < 1e-2, "{what}");
            }
        }
        assert!(set_aside > 5, "{set_aside} answers with outliers");
    }

    #[test]
    fn second_order_scales_are_those_that_the_packed_form_holds() {
        for per in [2, 16] {
            for (group, cols) in [(4, 150), (16, 300), (0, 20)] {
                let (w, gram) = (spiky(5, cols), slow::inputs(cols, 400, 3));
                let method = SpQr { scale_group: per, ..SpQr::default() };
                let solved = solve(&method, &w, &gram, None, ask3(false), group);
                let codec = method.rounded_form(&ask3(false)).scales.expect("integers");
                let q = solved.integers.expect("rounded");
                let main = pack_integers(&q, None, PatternKind::Dense, codec).expect("packs");
                assert_eq!(main.to_mat(), solved.w);
                let aside = solved.aside[0].pack(Float::F32).expect("packs");
                let whole = Stored::new(5, cols, vec![Term::Piece(main), Term::Piece(aside)]).to_mat();
                for r in 0..5 {
                    for c in 0..cols {
                        assert_eq!(whole[(r, c)], solved.w[(r, c)] + solved.aside[0].w[(r, c)]);
                    }
                }
            }
        }
        // Scales so near each other that f16 cannot tell them apart, tiny ones, zeros, one alone.
        let codec = ScaleCodec::Int { bits: 3, per: 16 };
        for scales in [vec![1.0003, 1.0004, 1.00045], vec![1e-8, 3e-8], vec![0.0; 4], vec![0.37], vec![1e-7, 2.0, 0.3]]
        {
            let once = second_order(&scales, codec).expect("fits");
            assert_eq!(second_order(&once, codec), Ok(once.clone()), "{scales:?}");
        }
        for seed in 0..200 {
            let scales: Vec<f32> = random(1, 16, seed).into_vec().iter().map(|v| v.abs() * 0.01).collect();
            let once = second_order(&scales, codec).expect("fits");
            let step = scales.iter().copied().fold(0.0, f32::max) / 7.0;
            assert!(once.iter().zip(&scales).all(|(a, b)| (a - b).abs() <= 0.51 * step), "{scales:?} {once:?}");
            assert_eq!(second_order(&once, codec), Ok(once));
        }
        assert!(second_order(&[1e9], codec).is_err());
    }

    #[test]
    fn a_lower_threshold_keeps_more_and_none_keeps_nothing() {
        let (w, gram) = (spiky(20, 64), slow::inputs(64, 200, 5));
        let kept = |method: SpQr| {
            let solved = solve(&method, &w, &gram, None, ask3(false), 16);
            solved.aside.first().and_then(|p| p.mask.as_ref()).map_or(0, Mask::kept)
        };
        let at = |threshold: f64| kept(SpQr { threshold, ..SpQr::default() });
        assert!(at(0.05) > at(0.2) && at(0.2) > at(2.0), "{} {} {}", at(0.05), at(0.2), at(2.0));
        assert_eq!(kept(SpQr { outliers: false, ..SpQr::default() }), 0);
        // Without outliers and second order it is GPTQ.
        let method = SpQr { outliers: false, scale_bits: 0, ..SpQr::default() };
        let plain = serde_json::json!({ "damping": 1.0 });
        let Ok(Made::Solve(gptq)) = (gptq::method().make)(plain) else { panic!("gptq solves") };
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        let stats = Stats { tokens: 200, found: &found, gradients: &[], sequences: 0, worked: None };
        let round = Some(RoundAsk { ask: ask3(false), grid: &Rtn {}, group: 16 });
        let same = gptq.solve(&SolveAsk { w: w.view(), stats: &stats, mask: None, prune: None, round });
        assert_eq!(same.expect("solves").w, solve(&method, &w, &gram, None, ask3(false), 16).w);
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        for bad in [
            serde_json::json!({ "damping": 0 }),
            serde_json::json!({ "threshold": 0 }),
            serde_json::json!({ "scale_bits": 1 }),
            serde_json::json!({ "scale_group": 1 }),
            serde_json::json!({ "block": 0 }),
        ] {
            assert!((method().make)(bad.clone()).is_err(), "{bad}");
        }
    }
}

//! HQQ: the zero point of each group moves until rounding errs least in a norm that forgives outliers; no text is read.
//!
//! **Paper.** Hicham Badri, Appu Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (Mobius
//! Labs; a report on the web, with its program).
//!
//! **Idea.** `min_z φ(W - s (Q - z))`, `φ` the `l_p` norm with `p < 1`, `Q = round(W / s + z)`. Splitting the error off
//! as `E` makes it half quadratic: `min φ(E) + β/2 ‖E - (W - s (Q - z))‖²`, by turns `E = shrink(W - s (Q - z))` with
//! `shrink(x) = sign(x) max(|x| - |x|^(p-1) / β, 0)`, then `z = mean(Q - (W - E) / s)`, then `β ← κ β`.
//!
//! **Shapes and units.** The weights of one group; `z` `[out, groups]` in codes, any number; `β` in units of the
//! weights to the power `p - 2`; scales as the step's grid gives them.
//!
//! **Cost.** `iterations` passes over the weights, one power each.
//!
//! **Departs.** (1) Each group stops by itself, where the authors' program stops all groups of a matrix together, and
//! keeps the zero point of least `Σ |W - s (Q - z)|^p` met, the starting one among them. (2) Zero points are written as
//! scales are (f32 or f16), never as codes of 8 bits; where a mask drops weights they are codes, so that 0 is exact.
//! (3) Without zero points (`symmetric`) the scale moves instead: `s = Σ (W - E) q / Σ q²`, `q` the codes about 0.

use lacuna_base::{Mat, float};
use lacuna_contract::{
    Ability, Card, GridAsk, Made, Method, MethodError, RoundAsk, RoundedForm, Solve, SolveAsk, Solved,
};
use lacuna_format::{Float, Group, Integers};
use serde::Deserialize;

use crate::make;

/// The authors' parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Hqq {
    /// The norm, above 0 to 1.
    p: f64,
    /// `β` of the first turn, above 0.
    beta: f64,
    /// What `β` grows by in a turn, 1 or more.
    kappa: f64,
    /// Turns at the most.
    iterations: usize,
}

impl Default for Hqq {
    fn default() -> Hqq {
        Hqq { p: 0.7, beta: 10.0, kappa: 1.01, iterations: 20 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "hqq",
            paper: "Badri, Shaji: Half-Quadratic Quantization of Large Machine Learning Models, 2023",
            arxiv: "",
            summary: "Zero points that are any numbers, moved until rounding errs least in a norm that forgives \
             outliers; reads no text.",
            system: None,
            verb: "quantize",
            needs: &[],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<Hqq>,
        make: |given| {
            let p: Hqq = make::parameters("hqq", given)?;
            if !(p.p > 0.0 && p.p <= 1.0) {
                return Err(MethodError::new(format!("p is {}; write a number above 0 to 1 (the authors' 0.7)", p.p)));
            }
            if !(p.beta > 0.0 && p.beta.is_finite()) {
                return Err(MethodError::new(format!("beta is {}; it must be above 0 (the authors' is 10)", p.beta)));
            }
            if !(p.kappa >= 1.0 && p.kappa.is_finite()) {
                return Err(MethodError::new(format!("kappa is {}; write 1 or more (the authors' 1.01)", p.kappa)));
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// The grid of a group.
#[derive(Clone, Copy, Debug)]
struct Line {
    scale: f32,
    zero: f32,
    /// The highest code.
    top: f32,
}

impl Line {
    fn code(self, v: f32) -> f32 {
        let at = if self.scale == 0.0 { self.zero } else { v / self.scale + self.zero };
        at.round_ties_even().clamp(0.0, self.top)
    }

    fn value(self, code: f32) -> f32 {
        self.scale * (code - self.zero)
    }
}

/// A number as a scale of that type is written.
fn written(x: f64, as_float: Float) -> f32 {
    match as_float {
        Float::F16 => float::round_f16(x as f32),
        Float::Bf16 => float::round_bf16(x as f32),
        _ => x as f32,
    }
}

impl Hqq {
    /// Moves the zero point, or the scale of a symmetric grid, from where `line` has it. `whole`: zero points are codes.
    fn moved(&self, line: Line, values: &[f32], ask: &GridAsk, whole: bool) -> Line {
        let error = |line: Line, v: f32| f64::from(v) - f64::from(line.value(line.code(v)));
        let norm = |line: Line| values.iter().map(|v| error(line, *v).abs().powf(self.p)).sum::<f64>();
        let (mut now, mut best, mut beta) = (line, (norm(line), line), self.beta);
        for _ in 0..self.iterations {
            if values.is_empty() || now.scale == 0.0 {
                break;
            }
            let (mut sum, mut squares) = (0.0f64, 0.0f64);
            for &v in values {
                let (x, code) = (error(now, v), f64::from(now.code(v)));
                let kept = (x.abs() - x.abs().powf(self.p - 1.0) / beta).max(0.0).copysign(x);
                let rest = f64::from(v) - kept;
                if ask.symmetric {
                    let q = code - f64::from(now.zero);
                    (sum, squares) = (sum + rest * q, squares + q * q);
                } else {
                    (sum, squares) = (sum + code - rest / f64::from(now.scale), squares + 1.0);
                }
            }
            if squares == 0.0 {
                break;
            }
            let at = sum / squares;
            match (ask.symmetric, whole) {
                (true, _) => now.scale = written(at, ask.scale),
                (false, true) => now.zero = (at.round_ties_even() as f32).clamp(0.0, now.top),
                (false, false) => now.zero = written(at, ask.scale),
            }
            beta *= self.kappa;
            let lost = norm(now);
            // What is no number is no gain, either.
            if lost.is_nan() || lost >= best.0 {
                break;
            }
            best = (lost, now);
        }
        best.1
    }
}

impl Solve for Hqq {
    fn rounded_form(&self, ask: &GridAsk) -> RoundedForm {
        RoundedForm { offsets: !ask.symmetric, ..RoundedForm::default() }
    }

    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        if ask.prune.is_some() {
            return Err(MethodError::new("hqq rounds and does not prune"));
        }
        let RoundAsk { ask: asked, grid, group } =
            ask.round.ok_or_else(|| MethodError::new("hqq was not asked to round"))?;
        make::finite(ask.w)?;
        let (rows, cols) = (ask.w.rows(), ask.w.cols());
        let run = if group == 0 { cols } else { group.min(cols) }.max(1);
        let groups = cols.div_ceil(run);
        let (mut scales, mut zeros) = (Mat::zeros(rows, groups), Mat::zeros(rows, groups));
        let (mut codes, mut w) = (vec![0u8; rows * cols], Mat::zeros(rows, cols));
        let kept = |r: usize, c: usize| ask.mask.is_none_or(|m| m.get(r, c));
        let mut values = Vec::with_capacity(run);
        for r in 0..rows {
            for g in 0..groups {
                let span = g * run..((g + 1) * run).min(cols);
                values.clear();
                values.extend(span.clone().filter(|&c| kept(r, c)).map(|c| ask.w.at(r, c)));
                let start = grid.fit(&values, &asked)?;
                let top = (1u32 << asked.bits) as f32 - 1.0;
                let line = Line { scale: start.scale, zero: f32::from(start.zero), top };
                let line = self.moved(line, &values, &asked, ask.mask.is_some());
                (scales[(r, g)], zeros[(r, g)]) = (line.scale, line.zero);
                for c in span {
                    let code = if kept(r, c) { line.code(ask.w.at(r, c)) } else { line.zero.clamp(0.0, top) };
                    codes[r * cols + c] = code as u8;
                    w[(r, c)] = if kept(r, c) { line.value(code) } else { 0.0 };
                }
            }
        }
        let whole = || zeros.data().iter().map(|z| *z as u8).collect();
        let (zeros, offsets) = match (asked.symmetric, ask.mask) {
            (true, _) => (None, None),
            (false, Some(_)) => (Some(whole()), None),
            (false, None) => (None, Some(zeros)),
        };
        let group = Group::Run(run);
        let integers = Integers { rows, cols, bits: asked.bits, codes, scales, zeros, group, offsets };
        Ok(Solved { w, mask: ask.mask.cloned(), integers: Some(integers), aside: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::rtn::Rtn;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_contract::{Grid, Stats};
    use lacuna_format::Mask;

    fn ask(bits: u8, symmetric: bool) -> GridAsk {
        GridAsk { bits, symmetric, scale: Float::F32 }
    }

    fn solve(hqq: &Hqq, w: &Mat, mask: Option<&Mask>, ask: GridAsk, group: usize) -> Solved {
        let round = Some(RoundAsk { ask, grid: &Rtn {}, group });
        let stats = Stats::default();
        hqq.solve(&SolveAsk { w: w.view(), stats: &stats, mask, prune: None, round }).expect("solves")
    }

    fn norm(w: &Mat, to: &Mat, p: f64) -> f64 {
        w.data().iter().zip(to.data()).map(|(a, b)| f64::from(a - b).abs().powf(p)).sum()
    }

    fn plain(w: &Mat, ask: &GridAsk, group: usize) -> Mat {
        let mut to = w.clone();
        for r in 0..w.rows() {
            for values in to.row_mut(r).chunks_mut(group) {
                let grid = Rtn {}.fit(values, ask).expect("fits");
                values.iter_mut().for_each(|v| *v = grid.value(grid.code(*v, ask.bits)));
            }
        }
        to
    }

    /// The definition in f64, all zero points kept and the best taken at the end.
    fn brute(values: &[f32], scale: f64, zero: f64, hqq: &Hqq, bits: u8) -> Vec<f64> {
        let top = f64::from((1u32 << bits) - 1);
        let rounded = |z: f64| -> Vec<(f64, f64)> {
            let code = |v: &f32| (f64::from(*v) / scale + z).round_ties_even().clamp(0.0, top);
            values.iter().map(|v| (code(v), scale * (code(v) - z))).collect()
        };
        let lost = |z: f64| -> f64 {
            values.iter().zip(rounded(z)).map(|(v, (_, to))| (f64::from(*v) - to).abs().powf(hqq.p)).sum()
        };
        let mut met = vec![zero];
        for turn in 0..hqq.iterations {
            let z = met[turn];
            let beta = hqq.beta * hqq.kappa.powi(turn as i32);
            let at = |(v, (q, to)): (&f32, (f64, f64))| {
                let x = f64::from(*v) - to;
                let e = if x == 0.0 { 0.0 } else { x.signum() * (x.abs() - x.abs().powf(hqq.p - 1.0) / beta).max(0.0) };
                q - (f64::from(*v) - e) / scale
            };
            let next = values.iter().zip(rounded(z)).map(at).sum::<f64>() / values.len() as f64;
            if lost(next) >= lost(z) {
                break;
            }
            met.push(next);
        }
        rounded(met[met.len() - 1]).into_iter().map(|(_, to)| to).collect()
    }

    #[test]
    fn agrees_with_brute_force() {
        for seed in 0..40u64 {
            let n = 1 + (seed as usize * 5) % 23;
            let mut w = random(1, n, seed);
            w.data_mut().iter_mut().for_each(|v| *v = *v * [1.0, 0.02][seed as usize % 2] + 0.01);
            w[(0, n / 2)] = w[(0, 0)];
            for (bits, beta) in [(2, 10.0), (3, 1.0), (4, 100.0)] {
                let hqq = Hqq { beta, ..Hqq::default() };
                let start = Rtn {}.fit(w.row(0), &ask(bits, false)).expect("fits");
                let want = brute(w.row(0), f64::from(start.scale), f64::from(start.zero), &hqq, bits);
                let got = solve(&hqq, &w, None, ask(bits, false), 0).w;
                // A weight between two codes may go either way where f32 and f64 differ.
                let far = got.row(0).iter().zip(&want).filter(|(a, b)| (f64::from(**a) - **b).abs() > 1e-4).count();
                assert!(far <= n / 20, "seed {seed}, {bits} bits: {far} of {n}");
            }
        }
    }

    #[test]
    fn errs_less_than_plain_rounding_in_its_norm_and_in_squares() {
        let w = random(16, 256, 9);
        for symmetric in [false, true] {
            for bits in [2, 3, 4] {
                let got = solve(&Hqq::default(), &w, None, ask(bits, symmetric), 64).w;
                let to = plain(&w, &ask(bits, symmetric), 64);
                let what = format!("{bits} bits, {symmetric}");
                assert!(norm(&w, &got, 0.7) < norm(&w, &to, 0.7), "{what}");
                assert!(norm(&w, &got, 2.0) < norm(&w, &to, 2.0), "{what}");
            }
        }
    }

    #[test]
    fn masks_keep_zero_and_edges_do_not_trouble_it() {
        for (rows, cols, group) in [(1, 1, 0), (5, 1, 4), (1, 24, 5), (4, 40, 16)] {
            let mut w = random(rows, cols, 2);
            w.row_mut(rows - 1).fill(0.0);
            let mask = Mask::from_fn(rows, cols, |r, c| (r + 2 * c) % 3 != 0);
            for symmetric in [false, true] {
                for mask in [None, Some(&mask)] {
                    let solved = solve(&Hqq::default(), &w, mask, ask(3, symmetric), group);
                    let q = solved.integers.expect("rounded");
                    assert_eq!(q.offsets.is_some(), !symmetric && mask.is_none());
                    let kept = |r: usize, c: usize| mask.is_none_or(|m| m.get(r, c));
                    let read = Mat::from_fn(rows, cols, |r, c| if kept(r, c) { q.value(r, c) } else { 0.0 });
                    assert_eq!(read, solved.w);
                    assert!(max_abs_diff(solved.w.view(), w.view()) < 4.0);
                }
            }
        }
        for bad in [
            serde_json::json!({ "p": 0 }),
            serde_json::json!({ "p": 2 }),
            serde_json::json!({ "beta": 0 }),
            serde_json::json!({ "kappa": 0.5 }),
        ] {
            assert!((method().make)(bad.clone()).is_err(), "{bad}");
        }
    }
}

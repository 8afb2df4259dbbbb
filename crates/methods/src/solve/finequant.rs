//! FineQuant: each matrix gets groups as small as its own weights ask for.
//!
//! **Paper.** Young Jin Kim, Rawn Henry, Raffy Fahim, Hany Hassan Awadalla, "FineQuant: Unlocking Efficiency with
//! Fine-Grained Weight-Only Quantization for LLMs", 2023, arXiv 2308.09723.
//!
//! **Idea.** The step of a grid is the range of its group, so that one outlier makes every weight of its group coarser.
//! Begin with one group for each output; halve the groups where that makes the ranges, on the mean over the weights,
//! smaller by enough: at most `shrink` of what they were. The weights alone decide, one size a matrix.
//!
//! **Shapes and units.** `w` `[out, in]`; the range of a group is `max |w|` (`symmetric`) or from its least to its
//! largest weight with 0; `shrink` is a fraction for one halving.
//!
//! **Cost.** One pass over the weights for each size, at most `log2(in / group)`, and the rounding.
//!
//! **Departs.** (1) Sizes are the whole row and `group · 2^k` up to half a row, so that groups fit the kernels'; a step
//! of more than a half is held against `shrink` to the power of its halvings. (2) A size that is no gain is passed over
//! and the next one held against the last that was: outliers on both sides of a cut hide what further cuts gain. (3) The
//! step's `group` is the smallest size allowed, which makes the bytes foretold the most there can be. (4) The threshold
//! is ours: the ranges of normal weights shrink to about 0.92 in a halving from 512 to 32 columns on the mean, so that
//! 0.91 splits rows with heavier tails and leaves others whole.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Card, Made, Method, MethodError, Solve, SolveAsk, Solved};
use lacuna_format::{Group, Integers, Mask};
use serde::Deserialize;

use crate::make;

/// The threshold.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FineQuant {
    /// Groups are halved where their ranges shrink to this or less, 0 to 1. 0: never, 1: always.
    shrink: f64,
}

impl Default for FineQuant {
    fn default() -> FineQuant {
        FineQuant { shrink: 0.91 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "finequant",
            paper: "Kim, Henry, Fahim, Awadalla: FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only \
             Quantization for LLMs, 2023",
            arxiv: "2308.09723",
            summary: "Rounding in groups as small as each matrix's own weights ask for, halved while their ranges \
             shrink by enough.",
            system: Some(170),
            verb: "quantize",
            needs: &[],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<FineQuant>,
        make: |given| {
            let p: FineQuant = make::parameters("finequant", given)?;
            if !(0.0..=1.0).contains(&p.shrink) {
                return Err(MethodError::new(format!("shrink is {}; write a fraction from 0 to 1", p.shrink)));
            }
            Ok(Made::Solve(Box::new(p)))
        },
    }
}

/// Ranges of groups of `run` columns, on the mean over the weights.
fn mean_range(w: MatRef<'_>, mask: Option<&Mask>, run: usize, symmetric: bool) -> f64 {
    let mut sum = 0.0;
    for r in 0..w.rows() {
        for (g, part) in w.row(r).chunks(run).enumerate() {
            let kept = |i: &usize| mask.is_none_or(|m| m.get(r, g * run + i));
            let ends =
                (0..part.len()).filter(kept).fold((0.0f32, 0.0f32), |(a, b), i| (a.min(part[i]), b.max(part[i])));
            let range = if symmetric { ends.1.max(-ends.0) } else { ends.1 - ends.0 };
            sum += f64::from(range) * part.len() as f64;
        }
    }
    sum / (w.rows() * w.cols()).max(1) as f64
}

impl FineQuant {
    /// Columns of a group, `least` or more.
    fn size(&self, w: MatRef<'_>, mask: Option<&Mask>, least: usize, symmetric: bool) -> usize {
        let mut smaller = vec![];
        let mut size = least;
        while size > 0 && size <= w.cols() / 2 {
            smaller.push(size);
            size *= 2;
        }
        let mut run = w.cols().max(1);
        let mut range = mean_range(w, mask, run, symmetric);
        for next in smaller.into_iter().rev() {
            let (halvings, then) = ((run as f64 / next as f64).log2(), mean_range(w, mask, next, symmetric));
            if then <= self.shrink.powf(halvings) * range {
                (run, range) = (next, then);
            }
        }
        run
    }
}

impl Solve for FineQuant {
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError> {
        if ask.prune.is_some() {
            return Err(MethodError::new("finequant rounds and does not prune"));
        }
        let round = ask.round.ok_or_else(|| MethodError::new("finequant was not asked to round"))?;
        make::finite(ask.w)?;
        let (rows, cols, bits) = (ask.w.rows(), ask.w.cols(), round.ask.bits);
        let run = self.size(ask.w, ask.mask, round.group.min(cols), round.ask.symmetric);
        let groups = cols.div_ceil(run);
        let mut q = Integers {
            rows,
            cols,
            bits,
            codes: vec![0; rows * cols],
            scales: Mat::zeros(rows, groups),
            zeros: None,
            group: Group::Run(run),
            offsets: None,
        };
        let (mut w, mut zeros) = (Mat::zeros(rows, cols), vec![0; rows * groups]);
        let kept = |r: usize, c: usize| ask.mask.is_none_or(|m| m.get(r, c));
        for r in 0..rows {
            for g in 0..groups {
                let span = g * run..((g + 1) * run).min(cols);
                let values: Vec<f32> = span.clone().filter(|&c| kept(r, c)).map(|c| ask.w.at(r, c)).collect();
                let grid = round.grid.fit(&values, &round.ask)?;
                (q.scales[(r, g)], zeros[r * groups + g]) = (grid.scale, grid.zero);
                for c in span {
                    let code = if kept(r, c) { grid.code(ask.w.at(r, c), bits) } else { grid.zero };
                    q.codes[r * cols + c] = code;
                    w[(r, c)] = if kept(r, c) { grid.value(code) } else { 0.0 };
                }
            }
        }
        q.zeros = (!round.ask.symmetric).then_some(zeros);
        Ok(Solved { w, mask: ask.mask.cloned(), integers: Some(q), aside: Vec::new() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::rtn::Rtn;
    use lacuna_base::testkit::random;
    use lacuna_contract::{Grid, GridAsk, RoundAsk, Stats};
    use lacuna_format::Float;

    fn solve(by: &FineQuant, w: &Mat, mask: Option<&Mask>, symmetric: bool, group: usize) -> Solved {
        let ask = GridAsk { bits: 4, symmetric, scale: Float::F16 };
        let round = Some(RoundAsk { ask, grid: &Rtn {}, group });
        by.solve(&SolveAsk { w: w.view(), stats: &Stats::default(), mask, prune: None, round }).expect("solves")
    }

    fn size(solved: &Solved) -> usize {
        match solved.integers.as_ref().expect("rounded").group {
            Group::Run(n) => n,
            Group::Index { .. } => panic!("runs"),
        }
    }

    /// The definition, weight by weight: every weight's range is looked up in its own group.
    fn brute(w: &Mat, mask: Option<&Mask>, least: usize, symmetric: bool, shrink: f64) -> usize {
        let kept = |r: usize, c: usize| mask.is_none_or(|m| m.get(r, c));
        let range = |n: usize| {
            let mut sum = 0.0;
            for (r, c) in (0..w.rows()).flat_map(|r| (0..w.cols()).map(move |c| (r, c))) {
                let of = (0..w.cols()).filter(|&k| k / n == c / n && kept(r, k)).map(|k| f64::from(w[(r, k)]));
                let (low, high) = of.fold((0.0f64, 0.0f64), |(a, b), v| (a.min(v), b.max(v)));
                sum += if symmetric { high.max(-low) } else { high - low };
            }
            sum
        };
        let (mut at, mut seen) = (w.cols(), w.cols());
        loop {
            let next = (0..32).map(|k| least << k).filter(|n| *n > 0 && 2 * n <= w.cols() && *n < seen).max();
            let Some(next) = next else { return at };
            if range(next) <= shrink.powf((at as f64 / next as f64).log2()) * range(at) * (1.0 + 1e-12) {
                at = next;
            }
            seen = next;
        }
    }

    #[test]
    fn agrees_with_brute_force() {
        let mut sizes = std::collections::BTreeSet::new();
        for seed in 0..30u64 {
            let (rows, cols) = [(3, 64), (2, 48), (5, 20), (1, 1), (4, 1), (1, 96)][seed as usize % 6];
            let mut w = random(rows, cols, seed);
            if seed % 2 == 0 {
                w[(0, cols / 2)] = 9.0;
                w.row_mut(rows - 1).fill(0.25);
            }
            let mask = (seed % 3 == 0).then(|| Mask::from_fn(rows, cols, |r, c| (r + c) % 4 != 1));
            for (symmetric, shrink, least) in [(true, 0.91, 4), (false, 0.8, 2), (false, 1.0, 3), (true, 0.0, 8)] {
                let solved = solve(&FineQuant { shrink }, &w, mask.as_ref(), symmetric, least);
                let want = brute(&w, mask.as_ref(), least.min(cols), symmetric, shrink);
                assert_eq!(size(&solved), want, "seed {seed} {shrink}");
                sizes.insert(want);
                // Rounded on the grids of that size.
                let q = solved.integers.as_ref().expect("rounded");
                for r in 0..rows {
                    for from in (0..cols).step_by(want) {
                        let span = from..(from + want).min(cols);
                        let kept = |c: &usize| mask.as_ref().is_none_or(|m| m.get(r, *c));
                        let values: Vec<f32> = span.clone().filter(kept).map(|c| w[(r, c)]).collect();
                        let ask = GridAsk { bits: 4, symmetric, scale: Float::F16 };
                        let grid = Rtn {}.fit(&values, &ask).expect("fits");
                        for c in span {
                            let want = if kept(&c) { grid.value(grid.code(w[(r, c)], 4)) } else { 0.0 };
                            assert_eq!(solved.w[(r, c)], want);
                            assert!(!kept(&c) || q.value(r, c) == want);
                        }
                    }
                }
            }
        }
        assert!(sizes.len() > 5, "{sizes:?}");
    }

    #[test]
    fn outliers_make_groups_smaller_and_whole_rows_err_more() {
        let mut w = random(32, 512, 1);
        assert_eq!(size(&solve(&FineQuant::default(), &w, None, true, 32)), 512, "normal weights");
        for r in 0..32 {
            (0..3).for_each(|k| w[(r, (r * 37 + k * 170) % 512)] = 12.0);
        }
        let fine = solve(&FineQuant::default(), &w, None, true, 32);
        assert_eq!(size(&fine), 32, "three outliers a row");
        let coarse = solve(&FineQuant { shrink: 0.0 }, &w, None, true, 32);
        assert_eq!(size(&coarse), 512);
        let off = |to: &Mat| w.data().iter().zip(to.data()).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        assert!(off(&fine.w) < 0.5 * off(&coarse.w), "{} {}", off(&fine.w), off(&coarse.w));
        assert!((method().make)(serde_json::json!({ "shrink": 1.5 })).is_err());
    }
}

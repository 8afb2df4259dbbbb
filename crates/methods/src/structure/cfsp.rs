//! CFSP: how much a block turns its input says how much of it stays, relative activations say which channels.
//!
//! **Paper.** Yuxin Wang, Minghua Ma, Zekun Wang, Jingchang Chen, Liping Shan, Qing Yang, Dongliang Xu, Ming Liu, Bing
//! Qin, "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information", 2024,
//! arXiv 2409.13199.
//!
//! **Idea.** Coarse: `I_l` is the mean over tokens of the angle between what goes into block `l` and what comes out, in
//! half turns; with `s_l = sigmoid(α (I_l - mean I))` the block keeps `(1 - sparsity) · s_l / mean s` of its units. Were
//! that more than all, every `s_l` is drawn towards the mean until the largest fits. Fine: input `j` of the reader `W`
//! has `S_j = ‖X_j‖^c · mean_i (rel |W_ij| ‖X_j‖^b + Σ rel |V_ji|)`, `V` the writers, `i` over the residual stream; `rel`
//! is a channel's part in the sum over all channels of its layer.
//!
//! **Shapes and units.** The reader `[hidden, count * width]`, the writers `[count * rows, hidden]`, `Σ x²` of each of
//! the reader's inputs; the answer has one number a unit, in units of the inputs to the power of `c`.
//!
//! **Cost.** One forward pass over the calibration text and two passes over each matrix.
//!
//! **Departs.** The authors' code divides `|W_ij|` by the sum over `i` and then takes the mean over `i`: that is the
//! same for every channel, and `‖X_j‖` alone decides there; here the sum is over the channels, so that the weights
//! count. Their code adds angles up over 128 · 2048 tokens and divides by 10^4, which is `α = 26.2` on the mean. The
//! paper cuts FFN channels; heads can go in the same way (their columns and rows are added up). All layers are
//! calibrated on the source. The recovery by tuning is not here.

use lacuna_base::MatRef;
use lacuna_contract::{Ask, Card, Compete, Made, Method, MethodError, Stats, Structure, StructureAsk, Unit};
use serde::Deserialize;

use super::reader;
use crate::make;

/// The authors' numbers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Cfsp {
    /// How steeply the share of a block rises with its angle, per half turn, 0 to 10000; 0: every block the same.
    alpha: f64,
    /// The power of the inputs' norms beside the reader's weights, 0 to 4.
    b: f64,
    /// The power of the inputs' norms beside everything, 0 to 4.
    c: f64,
}

impl Default for Cfsp {
    fn default() -> Cfsp {
        Cfsp { alpha: 26.2, b: 1.0, c: 1.0 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "cfsp",
            paper: "Wang, Ma, Wang, Chen, Shan, Yang, Xu, Liu, Qin: CFSP: An Efficient Structured Pruning Framework \
             for LLMs with Coarse-to-Fine Activation Information, 2024",
            arxiv: "2409.13199",
            summary: "Blocks that turn their input least lose most, and in each the channels whose relative weights \
             and activations are smallest.",
            system: Some(70),
            verb: "structure",
            needs: &[Ask::InputSquares, Ask::Angle(Unit::Block)],
            abilities: &[],
        },
        keys: make::keys::<Cfsp>,
        make: |given| {
            let p: Cfsp = make::parameters("cfsp", given)?;
            for (name, value, most) in [("alpha", p.alpha, 1e4), ("b", p.b, 4.0), ("c", p.c, 4.0)] {
                if !(0.0..=most).contains(&value) {
                    return Err(MethodError::new(format!("{name} is {value}; it must be from 0 to {most}")));
                }
            }
            Ok(Made::Structure(Box::new(p)))
        },
    }
}

/// Adds to the numbers `[count]` each one's part in the sum of `of`, once.
fn add_relative(to: &mut [f64], of: &[f64], weight: f64) {
    let sum: f64 = of.iter().sum();
    if sum > 0.0 {
        to.iter_mut().zip(of).for_each(|(t, x)| *t += weight * x / sum);
    }
}

/// What each unit's rows of a writer are of all rows, for each column, the mean over columns.
fn add_rows(to: &mut [f64], w: MatRef<'_>) {
    let mut sums = vec![0.0; w.cols()];
    for r in 0..w.rows() {
        sums.iter_mut().zip(w.row(r)).for_each(|(s, v)| *s += f64::from(v.abs()));
    }
    let (rows, cols) = (w.rows() / to.len(), w.cols() as f64);
    for r in 0..w.rows() {
        let part = |(v, s): (&f32, &f64)| if *s > 0.0 { f64::from(v.abs()) / s } else { 0.0 };
        to[r / rows] += w.row(r).iter().zip(&sums).map(part).sum::<f64>() / cols;
    }
}

impl Structure for Cfsp {
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        let w = reader("cfsp", ask)?;
        let squares = ask.stats.squares()?;
        if squares.len() != w.cols() {
            return Err(MethodError::new(format!("squares of {} inputs for a matrix of {}", squares.len(), w.cols())));
        }
        let mut scores = vec![0.0; ask.count];
        let powers: Vec<f64> = squares.iter().map(|x| x.sqrt().powf(self.b)).collect();
        for r in 0..w.rows() {
            let parts: Vec<f64> = w.row(r).iter().zip(&powers).map(|(w, x)| f64::from(w.abs()) * x).collect();
            let units: Vec<f64> = parts.chunks(ask.width).map(|u| u.iter().sum()).collect();
            add_relative(&mut scores, &units, 1.0 / w.rows() as f64);
        }
        for w in ask.writers {
            make::finite(*w)?;
            if w.rows() == 0 || w.rows() % ask.count > 0 {
                let what = format!("{} units for a writer of {} rows", ask.count, w.rows());
                return Err(MethodError::new(what));
            }
            add_rows(&mut scores, *w);
        }
        let norms = squares.chunks(ask.width).map(|u| u.iter().sum::<f64>().sqrt());
        scores.iter_mut().zip(norms).for_each(|(s, x)| *s *= x.powf(self.c));
        Ok(scores)
    }

    fn compete(&self) -> Compete {
        Compete::Layer
    }

    fn keeps_means(&self) -> bool {
        false
    }

    fn look(&self, layer: &Stats<'_>) -> Result<f64, MethodError> {
        let angle = layer.angle(Unit::Block)?;
        match angle.is_finite() {
            true => Ok(angle),
            false => Err(MethodError::new(format!("the angle between a block's input and output is {angle}"))),
        }
    }

    fn shares(&self, looked: &[f64], sparsity: f64) -> Result<Vec<f64>, MethodError> {
        let n = looked.len().max(1) as f64;
        let middle = looked.iter().sum::<f64>() / n;
        let mut s: Vec<f64> = looked.iter().map(|i| 1.0 / (1.0 + (-self.alpha * (i - middle)).exp())).collect();
        let mean = s.iter().sum::<f64>() / n;
        let keep = 1.0 - sparsity;
        let over = s.iter().copied().fold(0.0, f64::max) - mean;
        if over > 0.0 && keep * (mean + over) >= mean {
            // The authors leave a twentieth of the room.
            let draw = mean * (1.0 / keep - 1.0) / over / 1.05;
            s.iter_mut().for_each(|s| *s = mean + (*s - mean) * draw);
        }
        Ok(s.iter().map(|s| (1.0 - keep * s / mean).clamp(0.0, 1.0)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;

    /// Straight from the definition, each part of each weight in its sum.
    #[test]
    fn agrees_with_brute_force_parts_of_each_sum() {
        for (unit, count, width, narrow) in
            [(Unit::Channel, 6, 1, 1), (Unit::Head, 3, 4, 2), (Unit::Channel, 1, 1, 1), (Unit::Head, 1, 2, 2)]
        {
            let (hidden, tokens, n) = (5, 7, count * width);
            let (mut down, mut x) = (random(hidden, n, 1), random(tokens, n, 2));
            let rows = if unit == Unit::Head { vec![width, narrow, narrow] } else { vec![1, 1] };
            let mut w: Vec<Mat> = rows.iter().map(|r| random(count * r, hidden, 10 + *r as u64)).collect();
            // A column that nothing writes, an output that nothing reaches, an input that is never there.
            (0..w[0].rows()).for_each(|r| w[0][(r, 2)] = 0.0);
            down.row_mut(3).fill(0.0);
            (0..tokens).for_each(|t| x[(t, 0)] = 0.0);
            let norm = |j: usize| (0..tokens).map(|t| f64::from(x[(t, j)]).powi(2)).sum::<f64>().sqrt();
            let found = [(Ask::InputSquares, Gathered::Vector((0..n).map(|j| norm(j).powi(2)).collect()))];
            let stats = Stats { tokens: tokens as u64, found: &found, gradients: &[], sequences: 0, worked: None };
            let writers: Vec<MatRef<'_>> = w.iter().map(Mat::view).collect();
            let (reader, writers) = (Some(down.view()), writers.as_slice());
            let ask = StructureAsk { unit, layer: 0, count, width, reader, writers, stats, writer_stats: &[] };
            for (b, c) in [(1.0, 1.0), (0.5, 2.0), (0.0, 0.0)] {
                let have = Cfsp { alpha: 1.0, b, c }.score(&ask).expect("scores");
                let part = |x: f64, sum: f64| if sum > 0.0 { x / sum } else { 0.0 };
                for (u, have) in have.iter().enumerate() {
                    let mut want = 0.0;
                    for i in 0..hidden {
                        let of = |j: usize| f64::from(down[(i, j)]).abs() * norm(j).powf(b);
                        let mine: f64 = (0..n).filter(|j| j / width == u).map(of).sum();
                        want += part(mine, (0..n).map(of).sum()) / hidden as f64;
                        for (w, rows) in w.iter().zip(&rows) {
                            let of = |r: usize| f64::from(w[(r, i)]).abs();
                            let mine: f64 = (0..w.rows()).filter(|r| r / rows == u).map(of).sum();
                            want += part(mine, (0..w.rows()).map(of).sum()) / hidden as f64;
                        }
                    }
                    let norm: f64 = (0..n).filter(|j| j / width == u).map(|j| norm(j).powi(2)).sum::<f64>().sqrt();
                    want *= norm.powf(c);
                    assert!((have - want).abs() < 1e-9 * (1.0 + want), "{unit:?} {u} {b} {c}: {have} {want}");
                }
            }
            assert!(Cfsp::default().score(&StructureAsk { width: 0, ..ask }).is_err());
            assert!(Cfsp::default().score(&StructureAsk { stats: Stats::default(), ..ask }).is_err());
        }
    }

    #[test]
    fn shares_fall_with_the_angle_and_their_mean_is_what_was_asked() {
        let looked = [0.4, 0.1, 0.05, 0.05, 0.12, 0.3];
        for (alpha, sparsity) in [(26.2, 0.2), (26.2, 0.5), (1.0, 0.2), (1e4, 0.3), (26.2, 0.0), (26.2, 1.0)] {
            let by = Cfsp { alpha, ..Cfsp::default() };
            let shares = by.shares(&looked, sparsity).expect("shares");
            let mean = shares.iter().sum::<f64>() / 6.0;
            assert!((mean - sparsity).abs() < 1e-12 && shares.iter().all(|s| (0.0..=1.0).contains(s)), "{shares:?}");
            for (a, b) in (0..6).flat_map(|a| (0..6).map(move |b| (a, b))) {
                assert!(looked[a] < looked[b] || shares[a] <= shares[b] + 1e-12, "{alpha} {sparsity}: {shares:?}");
            }
        }
        // By the definition, with room to spare: sigmoids of -1 and 1, one being e times the other.
        let by = Cfsp { alpha: 10.0, ..Cfsp::default() };
        let shares = by.shares(&[0.1, 0.3], 0.5).expect("shares");
        assert!(((1.0 - shares[1]) / (1.0 - shares[0]) - std::f64::consts::E).abs() < 1e-9, "{shares:?}");
        let even = Cfsp { alpha: 0.0, ..Cfsp::default() }.shares(&looked, 0.2).expect("shares");
        assert!(even.iter().all(|s| (s - 0.2).abs() < 1e-12), "{even:?}");
        assert!(by.shares(&[], 0.2).expect("none").is_empty());
        assert!((method().make)(serde_json::json!({ "alpha": -1.0 })).is_err());
    }
}

//! FLAP: what fluctuates least around its mean goes, and the mean goes into a bias.
//!
//! **Paper.** Yongqi An, Xu Zhao, Tao Yu, Ming Tang, Jinqiao Wang, "Fluctuation-based Adaptive Structured Pruning for
//! Large Language Models", 2023, arXiv 2312.11983.
//!
//! **Idea.** Where input `j` of a matrix `W` (`attn.o`, `ffn.down`) is replaced by its mean, the outputs on the
//! calibration tokens change by `S_j = Var(X_j) · ‖W_:j‖²` in the mean of squares (WIFV, the weighted variance of the
//! input feature). In each layer and kind `S` is standardized, `(S - mean) / std` over its channels, so that layers
//! compete with each other, heads with FFN channels; a head's score is the mean over its columns. What the removed
//! inputs gave on average is made up for: `b += Σ_j W_:j · mean(X_j)`.
//!
//! **Shapes and units.** The reader `W` `[hidden, count * width]`; mean and variance of each of its inputs over the
//! tokens; the answer has one number a unit, without a unit.
//!
//! **Cost.** One pass over the reader; the statistics are three numbers an input.
//!
//! **Departs.** As the authors' code does and the paper does not say: a head's channels are squared before they are
//! standardized, and the standard deviation is that of a sample. The variance is taken over all tokens at once, where
//! their code adds up the sequences and leaves the first one out. With shared key and value heads (GQA) a head is one
//! of those with all its query heads.

use lacuna_contract::{Ask, Card, Compete, Made, Method, MethodError, Structure, StructureAsk, Unit};
use serde::Deserialize;

use super::{columns, reader};
use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Flap {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "flap",
            paper: "An, Zhao, Yu, Tang, Wang: Fluctuation-based Adaptive Structured Pruning for Large Language Models, \
             2023",
            arxiv: "2312.11983",
            summary: "The heads and FFN channels go that fluctuate least around their mean, which goes into a bias.",
            system: Some(58),
            verb: "structure",
            needs: &[Ask::InputMoments],
            abilities: &[],
        },
        keys: make::keys::<Flap>,
        make: |given| Ok(Made::Structure(Box::new(make::parameters::<Flap>("flap", given)?))),
    }
}

impl Structure for Flap {
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        let w = reader("flap", ask)?;
        let (_, variance) = ask.stats.moments()?;
        if variance.len() != w.cols() {
            return Err(MethodError::new(format!(
                "variances of {} inputs for a matrix of {}",
                variance.len(),
                w.cols()
            )));
        }
        let mut s = columns(w, |x| x * x);
        s.iter_mut().zip(variance).for_each(|(s, v)| *s *= v);
        if ask.unit == Unit::Head {
            s.iter_mut().for_each(|s| *s *= *s);
        }
        let n = s.len() as f64;
        let mean = s.iter().sum::<f64>() / n;
        let deviation = (s.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
        if !deviation.is_finite() {
            return Err(MethodError::new(format!(
                "the inputs of layer {} vary beyond the range of numbers",
                ask.layer
            )));
        }
        // All alike: none stands out.
        let standard = |s: &f64| if deviation > 0.0 { (s - mean) / deviation } else { 0.0 };
        Ok(s.chunks(ask.width).map(|unit| unit.iter().map(standard).sum::<f64>() / ask.width as f64).collect())
    }

    fn compete(&self) -> Compete {
        // The scores are standardized already, before the mean over a head.
        Compete::Model
    }

    fn keeps_means(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;
    use lacuna_contract::{Gathered, Stats};

    /// The mean over tokens of the squared change of the outputs when input `j` is its mean.
    fn change(w: &Mat, x: &Mat, j: usize) -> f64 {
        let tokens = x.rows();
        let mean = (0..tokens).map(|t| f64::from(x[(t, j)])).sum::<f64>() / tokens as f64;
        let one = |t: usize, r: usize| (f64::from(w[(r, j)]) * (f64::from(x[(t, j)]) - mean)).powi(2);
        (0..tokens).flat_map(|t| (0..w.rows()).map(move |r| one(t, r))).sum::<f64>() / tokens as f64
    }

    #[test]
    fn agrees_with_brute_force_change_of_the_outputs() {
        for (unit, count, width, tokens) in
            [(Unit::Channel, 7, 1, 9), (Unit::Head, 3, 4, 9), (Unit::Channel, 1, 1, 3), (Unit::Head, 1, 2, 1)]
        {
            let n = count * width;
            let (mut w, mut x) = (random(5, n, 1), random(tokens, n, 2));
            if n > 4 {
                (0..5).for_each(|r| w[(r, 3)] = 0.0);
                (0..tokens).for_each(|t| x[(t, 1)] = 2.5);
            }
            let moments = |j: usize| {
                let all: Vec<f64> = (0..tokens).map(|t| f64::from(x[(t, j)])).collect();
                let mean = all.iter().sum::<f64>() / tokens as f64;
                (mean, all.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / tokens as f64)
            };
            let (mean, variance) = (0..n).map(moments).unzip();
            let found = [(Ask::InputMoments, Gathered::Moments { mean, variance })];
            let stats = Stats { tokens: tokens as u64, found: &found, gradients: &[], sequences: 0, worked: None };
            let ask = StructureAsk {
                unit,
                layer: 0,
                count,
                width,
                reader: Some(w.view()),
                writers: &[],
                stats,
                writer_stats: &[],
            };
            let have = Flap {}.score(&ask).expect("scores");
            let power = if unit == Unit::Head { 2 } else { 1 };
            let s: Vec<f64> = (0..n).map(|j| change(&w, &x, j).powi(power)).collect();
            let mean = s.iter().sum::<f64>() / n as f64;
            let around: f64 = s.iter().map(|s| (s - mean) * (s - mean)).sum();
            let deviation = if n > 1 { (around / (n - 1) as f64).sqrt() } else { 0.0 };
            assert_eq!(have.len(), count);
            for (u, have) in have.iter().enumerate() {
                let columns = u * width..(u + 1) * width;
                let z = |j: usize| if deviation > 0.0 { (s[j] - mean) / deviation } else { 0.0 };
                let want = columns.map(z).sum::<f64>() / width as f64;
                assert!((have - want).abs() < 1e-9, "{unit:?} {u}: {have} {want}");
            }
            let short = StructureAsk { count: count + 1, ..ask };
            assert!(Flap {}.score(&short).is_err());
            assert!(Flap {}.score(&StructureAsk { reader: None, ..ask }).is_err());
            assert!(Flap {}.score(&StructureAsk { stats: Stats::default(), ..ask }).is_err());
        }
    }
}

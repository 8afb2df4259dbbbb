//! WeLore: one threshold on the tails of all singular values says which matrices are of low rank, and of which.
//!
//! **Paper.** Ajay Jaiswal, Lu Yin, Zhenyu Zhang, Shiwei Liu, Jiawei Zhao, Yuandong Tian, Zhangyang Wang, "From GaLore
//! to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients", 2024, arXiv 2407.11239.
//!
//! **Idea.** The singular values of every matrix, brought to 0 to 1, `(σ - σ_min) / (σ_max - σ_min)`, are cut at one
//! threshold `k` for the whole model. Where the tail is heavy little is left: such a matrix is a low-rank component
//! (LRC) and becomes two thin ones, its truncated decomposition. The others (N-LRC) stay as they are. No data is looked
//! at.
//!
//! **Shapes and units.** The spectrum of each matrix, `[min(out, in)]`, and the fraction of all their parameters that
//! stays; a rank for each, or none.
//!
//! **Cost.** For the spectra about `9 min(out, in)³` operations in f64 a matrix and the Gram matrix before, a layer's
//! side by side; about `20 · out · in · min(out, in)` for each that is decomposed. Sorting otherwise.
//!
//! **Departs.** (1) The threshold is the least at which the parameters, as they are stored, are within `keep`; the
//! paper's meets a mean reduction of ranks, which says little of size: a square matrix at 60% of its rank is larger
//! than whole. (2) A matrix is an LRC where its thin ones are smaller than itself; the paper takes those that lose more
//! than about half of their rank, which for square matrices is the same. (3) A matrix whose singular values are all
//! alike has no tail and is cut last. (4) Tuning the LRCs alone afterwards, the paper's second half, is no part of
//! this.

use lacuna_contract::{Card, Made, Method, MethodError, Ranks, Spectrum};
use serde::Deserialize;

use crate::make;

/// No parameters; the fraction that stays is the family's.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WeLore {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "welore",
            paper: "Jaiswal et al.: From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank \
             Gradients, 2024",
            arxiv: "2407.11239",
            summary: "One threshold on all singular values: what has a heavy tail becomes thin, the rest stays whole.",
            system: None,
            verb: "factor",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<WeLore>,
        make: |given| Ok(Made::Ranks(Box::new(make::parameters::<WeLore>("welore", given)?))),
    }
}

/// Singular values from 0 to 1, largest first; all 1 where they are alike.
fn normalised(spectrum: &Spectrum) -> Vec<f64> {
    let most = spectrum.values.iter().copied().fold(0.0, f64::max);
    let least = spectrum.values.iter().copied().fold(most, f64::min);
    let one = |v: &f64| if most > least { (v - least) / (most - least) } else { 1.0 };
    spectrum.values.iter().map(one).collect()
}

/// The rank at a threshold, if thin matrices of it are smaller than the whole one.
fn rank((rows, cols): (usize, usize), falling: &[f64], threshold: f64) -> Option<usize> {
    let rank = falling.partition_point(|v| *v >= threshold).max(1);
    (rank * (rows + cols) < rows * cols).then_some(rank)
}

impl Ranks for WeLore {
    fn ranks(&self, spectra: &[Spectrum], keep: f64) -> Result<Vec<Option<usize>>, MethodError> {
        for s in spectra {
            if s.values.is_empty() || s.values.iter().any(|v| !v.is_finite() || *v < 0.0) {
                return Err(MethodError::new(format!(
                    "the {} singular values of a {} x {} matrix are no finite numbers of 0 or more",
                    s.values.len(),
                    s.shape.0,
                    s.shape.1
                )));
            }
        }
        let falling: Vec<Vec<f64>> = spectra.iter().map(normalised).collect();
        let at = |threshold: f64| -> Vec<Option<usize>> {
            spectra.iter().zip(&falling).map(|(s, f)| rank(s.shape, f, threshold)).collect()
        };
        let whole: usize = spectra.iter().map(|s| s.shape.0 * s.shape.1).sum();
        let held = |ranks: &[Option<usize>]| -> usize {
            let one = |(s, r): (&Spectrum, &Option<usize>)| match r {
                Some(r) => r * (s.shape.0 + s.shape.1),
                None => s.shape.0 * s.shape.1,
            };
            spectra.iter().zip(ranks).map(one).sum()
        };
        let budget = keep * whole as f64;
        // Between two neighbouring values nothing changes; above all of them every tail is cut to the last rank.
        let mut thresholds: Vec<f64> = falling.iter().flatten().copied().chain([0.0, 2.0]).collect();
        thresholds.sort_by(f64::total_cmp);
        thresholds.dedup();
        let least = thresholds.partition_point(|t| held(&at(*t)) as f64 > budget);
        let Some(threshold) = thresholds.get(least) else {
            return Err(MethodError::new(format!(
                "keep = {keep}: at rank 1 everywhere {} of {whole} parameters are still there, which is a fraction of \
                 {:.4}",
                held(&at(2.0)),
                held(&at(2.0)) as f64 / whole.max(1) as f64
            )));
        };
        Ok(at(*threshold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    fn spectra(seed: u64) -> Vec<Spectrum> {
        let mut rng = Rng::new(seed);
        let shapes = [(20, 30), (30, 20), (12, 12), (1, 40), (40, 1), (16, 16), (8, 50)];
        shapes
            .into_iter()
            .enumerate()
            .map(|(i, (m, n))| {
                // Tails of every weight; ties; one that is flat and one that is zero.
                let decay = 0.5 + 0.07 * i as f64 + 0.01 * rng.below(5) as f64;
                let value = |k: usize| match i {
                    2 => 3.0,
                    5 => 0.0,
                    _ => (10.0 * decay.powi((k / 2) as i32) * 64.0).round() / 64.0,
                };
                Spectrum { shape: (m, n), values: (0..m.min(n)).map(value).collect() }
            })
            .collect()
    }

    fn held(spectra: &[Spectrum], ranks: &[Option<usize>]) -> usize {
        let one =
            |(s, r): (&Spectrum, &Option<usize>)| r.map_or(s.shape.0 * s.shape.1, |r| r * (s.shape.0 + s.shape.1));
        spectra.iter().zip(ranks).map(one).sum()
    }

    /// From the definition: every threshold on a fine ladder is tried, from 0 up, until all is small enough.
    #[test]
    fn agrees_with_brute_force_over_thresholds() {
        for seed in 0..10 {
            let all = spectra(seed);
            let whole: usize = all.iter().map(|s| s.shape.0 * s.shape.1).sum();
            for keep in [0.5, 0.7, 0.8, 0.95, 1.0] {
                let mut want = None;
                for step in 0..=200_001 {
                    let threshold = f64::from(step) / 200_000.0;
                    let ranks: Vec<Option<usize>> = all
                        .iter()
                        .map(|s| {
                            let (most, least) = (s.values[0], s.values[s.values.len() - 1]);
                            let above = |v: &&f64| most == least || (**v - least) / (most - least) >= threshold;
                            let flat = most == least && threshold > 1.0;
                            let rank = if flat { 1 } else { s.values.iter().filter(above).count().max(1) };
                            (rank * (s.shape.0 + s.shape.1) < s.shape.0 * s.shape.1).then_some(rank)
                        })
                        .collect();
                    if held(&all, &ranks) as f64 <= keep * whole as f64 {
                        want = Some(ranks);
                        break;
                    }
                }
                let got = WeLore {}.ranks(&all, keep).ok();
                assert_eq!(got, want, "seed {seed} keep {keep}");
                assert!(got.is_none_or(|g| held(&all, &g) as f64 <= keep * whole as f64));
            }
        }
    }

    #[test]
    fn heavy_tails_become_thin_and_flat_ones_stay() {
        let falling = |by: f64| Spectrum { shape: (40, 40), values: (0..40).map(|k| f64::powi(by, k)).collect() };
        let all = [falling(0.5), falling(0.995), falling(0.8)];
        let ranks = WeLore {}.ranks(&all, 0.6).expect("found");
        assert!(ranks[1].is_none() && ranks[0] < ranks[2], "{ranks:?}");
        // At the same size, what one rank for all cuts off is more, relative to each matrix.
        let lost = |s: &Spectrum, rank: usize| {
            s.values[rank..].iter().map(|v| v * v).sum::<f64>() / s.values.iter().map(|v| v * v).sum::<f64>()
        };
        let ours: f64 = all.iter().zip(&ranks).map(|(s, r)| r.map_or(0.0, |r| lost(s, r))).sum();
        let even: f64 = all.iter().map(|s| lost(s, (0.6 * 1600.0 / 80.0) as usize)).sum();
        assert!(ours < 0.5 * even, "{ours} {even}");
        assert_eq!(WeLore {}.ranks(&all, 1.0), Ok(vec![None; 3]));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let one = Spectrum { shape: (3, 4), values: vec![3.0, 2.0, 1.0] };
        let said = WeLore {}.ranks(std::slice::from_ref(&one), 0.5).expect_err("refused").what;
        assert!(said.contains("7 of 12"), "{said}");
        let bad = Spectrum { values: vec![1.0, f64::NAN, 0.0], ..one };
        assert!(WeLore {}.ranks(&[bad], 0.9).is_err());
        assert_eq!(WeLore {}.ranks(&[], 0.5), Ok(Vec::new()));
    }
}

//! OWL: layers with many outliers are pruned less.
//!
//! **Paper.** Lu Yin, You Wu, Zhenyu Zhang, Cheng-Yu Hsieh, Yaqing Wang, Yiling Jia, Gen Li, Ajay Jaiswal, Mykola
//! Pechenizkiy, Yi Liang, Michael Bendersky, Zhangyang Wang, Shiwei Liu, "Outlier Weighed Layerwise Sparsity (OWL): A
//! Missing Secret Sauce for Pruning LLMs to High Sparsity", 2023, arXiv 2310.05175.
//!
//! **Idea.** With Wanda's scores `A_ij = |W_ij| ‖X_j‖₂` of all weights of a layer, its outlier ratio is the share of
//! those above `M` times their mean, `D = Σ 1(A_ij > M Ā) / |A|`. Sparsities are `S_l ∝ 1 - D_l`: ratios are brought to
//! `[0, 2λ]` and moved so that their mean is the asked density; every layer lies within `λ` or so of it.
//!
//! **Shapes and units.** Slots, best one a layer; `Σ x²` of each input, `[in]`; ratios are fractions.
//!
//! **Cost.** Two looks at each matrix, no trial. The levels themselves: each matrix is pruned once at each.
//!
//! **Departs.** (1) Sparsities go to the nearest levels of the step, then levels move until the bytes are used up and
//! not exceeded. (2) Scores are the source's: the authors' code, too, looks before it prunes.

use lacuna_base::Mat;
use lacuna_contract::{Ask, Assignment, Card, Lab, LayerWork, Made, Method, MethodError, Search, SearchAsk, Site};
use lacuna_spec::Place;
use serde::Deserialize;

use super::divide;
use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Owl {
    /// M, how many times the mean an outlier is; above 0.
    outlier: f64,
    /// λ, half of the range of the densities; above 0, in units of the key.
    lambda: f64,
}

impl Default for Owl {
    fn default() -> Owl {
        Owl { outlier: 5.0, lambda: 0.08 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "owl",
            paper: "Yin, Wu, Zhang, Hsieh, Wang, Jia, Li, Jaiswal, Pechenizkiy, Liang, Bendersky, Wang, Liu: Outlier \
             Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity, 2023",
            arxiv: "2310.05175",
            summary: "Layers with a larger share of outliers among their weights times inputs are pruned less.",
            system: None,
            verb: "search",
            needs: &[Ask::InputSquares],
            abilities: &[],
        },
        keys: make::keys::<Owl>,
        make: |given| {
            let p: Owl = make::parameters("owl", given)?;
            for (key, value) in [("outlier", p.outlier), ("lambda", p.lambda)] {
                if !(value > 0.0 && value.is_finite()) {
                    return Err(MethodError::new(format!("{key} is {value}; it must be above 0")));
                }
            }
            Ok(Made::Search(Box::new(p)))
        },
    }
}

/// Calls `f` with every score of a matrix.
fn scores(w: &Mat, squares: &[f64], mut f: impl FnMut(f64)) -> Result<(), MethodError> {
    if squares.len() != w.cols() {
        return Err(MethodError::new(format!("squares of {} inputs for a matrix of {}", squares.len(), w.cols())));
    }
    let norms: Vec<f64> = squares.iter().map(|s| s.sqrt()).collect();
    for r in 0..w.rows() {
        w.row(r).iter().zip(&norms).for_each(|(v, n)| f(f64::from(v.abs()) * n));
    }
    Ok(())
}

/// Sparsities for outlier ratios, around the asked one.
fn sparsities(ratios: &[f64], asked: f64, lambda: f64) -> Vec<f64> {
    let (least, most) = ratios.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), d| (a.min(*d), b.max(*d)));
    let scaled: Vec<f64> =
        ratios.iter().map(|d| if most > least { (d - least) / (most - least) * 2.0 * lambda } else { 0.0 }).collect();
    let mean = scaled.iter().sum::<f64>() / scaled.len().max(1) as f64;
    scaled.iter().map(|d| asked - (d - mean)).collect()
}

impl Search for Owl {
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        let n = lab.slots().len();
        if n == 0 {
            return Ok(Vec::new());
        }
        let even = divide::target(lab, ask.budget_bytes)?;
        let ratios: Vec<f64> = (0..n).map(|s| lab.looked(s)).collect();
        let asked = lab.levels(0)[even[0]].value;
        let (least, most) = ratios.iter().fold((f64::INFINITY, 0.0f64), |(a, b), d| (a.min(*d), b.max(*d)));
        lab.note(format!("outliers from {:.2}% to {:.2}% of a slot's weights", 100.0 * least, 100.0 * most));
        divide::nearest(lab, &sparsities(&ratios, asked, self.lambda), ask.budget_bytes)
    }

    fn look(&self, places: &[Place], work: &dyn LayerWork) -> Result<f64, MethodError> {
        let (mut sum, mut count, mut above) = (0.0, 0u64, 0u64);
        // An expert that no token reached has no scores.
        let seen = || places.iter().filter(|p| work.stats(Site::Matrix(**p)).tokens > 0);
        for p in seen() {
            let w = work.weight(p)?;
            count += w.rows() as u64 * w.cols() as u64;
            scores(&w, work.stats(Site::Matrix(*p)).squares()?, |a| sum += a)?;
        }
        let line = self.outlier * sum / count.max(1) as f64;
        for p in seen() {
            scores(&work.weight(p)?, work.stats(Site::Matrix(*p)).squares()?, |a| above += u64::from(a > line))?;
        }
        if !sum.is_finite() {
            return Err(MethodError::new(format!("the sum of weights times inputs is {sum}")));
        }
        Ok(above as f64 / count.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testkit::Known;
    use lacuna_base::testkit::random;
    use lacuna_contract::{Gathered, Stats, Vocabulary};
    use lacuna_spec::{Role, Spec};

    /// Two matrices of a layer; the second has inputs of its own.
    struct Two {
        w: [Mat; 2],
        found: [[(Ask, Gathered); 1]; 2],
        tokens: [u64; 2],
    }

    fn at(p: &Place) -> usize {
        usize::from(p.role == Role::Down)
    }

    impl LayerWork for Two {
        fn spec(&self) -> &Spec {
            unreachable!("OWL asks for matrices alone")
        }
        fn weight(&self, place: &Place) -> Result<Mat, MethodError> {
            Ok(self.w[at(place)].clone())
        }
        fn stats(&self, site: Site) -> Stats<'_> {
            let Site::Matrix(p) = site else { panic!("matrices alone are looked at") };
            Stats { tokens: self.tokens[at(&p)], found: &self.found[at(&p)], ..Stats::default() }
        }
        fn vocabulary(&self) -> Option<&Vocabulary> {
            None
        }
    }

    #[test]
    fn the_ratio_agrees_with_brute_force() {
        for seed in 0..10 {
            let xs = [random(9, 6, seed), random(9, 4, seed + 50)];
            let mut w = [random(5, 6, seed + 1), random(3, 4, seed + 2)];
            w[0].row_mut(0).fill(0.0);
            w[1][(2, 3)] = 40.0;
            let norm = |k: usize, j: usize| (0..9).map(|t| f64::from(xs[k][(t, j)]).powi(2)).sum::<f64>();
            let found =
                [0, 1].map(|k| [(Ask::InputSquares, Gathered::Vector((0..[6, 4][k]).map(|j| norm(k, j)).collect()))]);
            for reached in [[9, 9], [9, 0], [0, 0]] {
                let work = Two { w: w.clone(), found: found.clone(), tokens: reached };
                let mut all = Vec::new();
                for k in (0..2).filter(|&k| reached[k] > 0) {
                    for r in 0..w[k].rows() {
                        all.extend((0..w[k].cols()).map(|c| f64::from(w[k][(r, c)]).abs() * norm(k, c).sqrt()));
                    }
                }
                let mean = all.iter().sum::<f64>() / all.len() as f64;
                for outlier in [1.0, 5.0] {
                    let want = all.iter().filter(|a| **a > outlier * mean).count() as f64 / all.len().max(1) as f64;
                    let places = [Place::layer(0, Role::Up), Place::layer(0, Role::Down)];
                    let got = Owl { outlier, ..Owl::default() }.look(&places, &work).expect("looked");
                    assert_eq!(got, want, "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn sparsities_keep_their_mean_and_their_range() {
        let got = sparsities(&[0.01, 0.03, 0.02, 0.01], 0.7, 0.08);
        assert!((got.iter().sum::<f64>() / 4.0 - 0.7).abs() < 1e-12);
        let spread = got.iter().fold(0.0f64, |a, s| a.max((s - 0.7).abs()));
        assert!(got[1] < got[2] && got[2] < got[0] && got[0] == got[3] && spread <= 0.16, "{got:?}");
        assert!((got[0] - got[1] - 0.16).abs() < 1e-12);
        assert_eq!(sparsities(&[0.5; 3], 0.6, 0.08), [0.6; 3]);
    }

    #[test]
    fn layers_with_outliers_keep_more() {
        let mut lab = Known::new(4, &[0.62, 0.66, 0.7, 0.74, 0.78], |_| panic!("nothing is measured"));
        lab.looks = vec![0.05, 0.01, 0.01, 0.01];
        let ask = SearchAsk { budget_bytes: lab.bytes(&[2; 4]), trials: 0, tokens: 2, seed: 0 };
        let got = Owl::default().search(&mut lab, &ask).expect("found");
        assert!(got[0] == 0 && got[1..].iter().all(|l| *l >= 2) && lab.bytes(&got) <= ask.budget_bytes, "{got:?}");
        assert!(lab.notes[0].contains("1.00% to 5.00%"), "{:?}", lab.notes);
        assert!((method().make)(serde_json::json!({ "lambda": -1 })).is_err());
    }
}

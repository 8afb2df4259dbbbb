//! Constant blocks: weights go by blocks of a few outputs and one input, so that a product reads an input once for all
//! of them.
//!
//! **Paper.** Haihao Shen, Hengyu Meng, Bo Dong, Zhe Wang, Ofir Zafrir, Yi Ding, Yu Luo, Hanwen Chang, Qun Gao, Ziheng
//! Wang, Guy Boudoukh, Moshe Wasserblat, "An Efficient Sparse Inference Software Accelerator for Transformer-based
//! Language Models on CPUs", 2023, arXiv 2306.16601.
//!
//! **Idea.** A block of constant size, `4 x 1` in the paper (pattern `block:4x1`), stays or goes by the sum of its
//! weights' scores, `Σ S_ij`, with `S_ij = |W_ij|` or, as Wanda has it, `|W_ij| · ‖X_j‖₂`; `squared` takes `Σ S_ij²`:
//! for blocks one column wide and Wanda's scores the exact change of the outputs, squared, when the block alone goes.
//!
//! **Shapes and units.** `w` `[out, in]`; `Σ x²` of each input `[in]` where `by` is `wanda`; scores `[out, in]`, which
//! are summed over each block.
//!
//! **Cost.** One pass over the matrix; the statistics are one number an input.
//!
//! **Departs.** (1) The paper prunes step by step while it trains, with distillation; here once, without training.
//! (2) Blocks of Wanda's scores compete within their block row, as Wanda's weights do within a row, so that every block
//! row keeps as many; blocks of sizes within the matrix. (3) Kernels here walk blocks whose height is a multiple of 8,
//! and 16 rows or more pay best (`cargo run --release -p lacuna-kernels --example blocks`); `4 x 1` is stored in fewer
//! bytes and gains little time, so that the recipes ask for `block:16x1`.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, Scope, Score, Stats};
use serde::Deserialize;

use crate::make;

/// Whose scores are summed.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum By {
    /// Sizes of weights.
    Magnitude,
    /// Sizes of weights times the norm of their input.
    Wanda,
}

/// Which scores, and how they are summed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConstantBlocks {
    /// Whose scores: `wanda` or `magnitude`.
    by: By,
    /// Whether their squares are summed.
    squared: bool,
}

impl Default for ConstantBlocks {
    fn default() -> ConstantBlocks {
        ConstantBlocks { by: By::Wanda, squared: false }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "constant-blocks",
            paper: "Shen, Meng, Dong, Wang, Zafrir, Ding and others: An Efficient Sparse Inference Software \
                    Accelerator for Transformer-based Language Models on CPUs, 2023",
            arxiv: "2306.16601",
            summary: "Blocks of a few outputs by one input go whole, those with the least sum of sizes, or of sizes \
                      times the norm of the input.",
            system: None,
            verb: "prune",
            needs: &[],
            abilities: &[Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<ConstantBlocks>,
        make: |given| Ok(Made::Score(Box::new(make::parameters::<ConstantBlocks>("constant-blocks", given)?))),
    }
}

impl Score for ConstantBlocks {
    fn score(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Mat, MethodError> {
        make::finite(w)?;
        let norms = match self.by {
            By::Magnitude => vec![1.0; w.cols()],
            By::Wanda => stats.squares()?.iter().map(|s| s.sqrt()).collect(),
        };
        if norms.len() != w.cols() {
            return Err(MethodError::new(format!("squares of {} inputs for a matrix of {}", norms.len(), w.cols())));
        }
        if let Some(j) = norms.iter().position(|s| !s.is_finite()) {
            return Err(MethodError::new(format!("the root of the sum of squares of input {j} is {}", norms[j])));
        }
        let power = if self.squared { 2 } else { 1 };
        Ok(Mat::from_fn(w.rows(), w.cols(), |r, c| (f64::from(w.at(r, c)).abs() * norms[c]).powi(power) as f32))
    }

    fn scope(&self) -> Scope {
        match self.by {
            By::Magnitude => Scope::Matrix,
            By::Wanda => Scope::Row,
        }
    }

    fn also_needs(&self) -> &'static [Ask] {
        match self.by {
            By::Magnitude => &[],
            By::Wanda => &[Ask::InputSquares],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::select::{Scored, select};
    use lacuna_base::testkit::random;
    use lacuna_contract::{Gathered, Sparsity};
    use lacuna_format::Mask;

    fn masks(by: &ConstantBlocks, w: &Mat, x: &Mat, height: usize, sparsity: f64) -> Mask {
        let square = |j: usize| (0..x.rows()).map(|t| f64::from(x[(t, j)]).powi(2)).sum();
        let found = [(Ask::InputSquares, Gathered::Vector((0..x.cols()).map(square).collect()))];
        let stats = Stats { tokens: x.rows() as u64, found: &found, ..Stats::default() };
        let scores = by.score(w.view(), &stats).expect("scores");
        let one = Scored { scores: &scores, before: None, sparsity };
        select(&[one], Sparsity::Block { height, width: 1 }, by.scope()).expect("masks").remove(0)
    }

    /// The definition: every block's sum from the weights, or the change of the outputs when it goes, and a full sort
    /// of those that compete.
    #[test]
    fn blocks_agree_with_brute_force() {
        for (rows, cols, height, seed) in [(16, 12, 4, 1), (4, 9, 4, 2), (8, 1, 8, 3), (1, 10, 1, 4), (32, 20, 16, 5)] {
            let (mut w, mut x) = (random(rows, cols, seed), random(9, cols, seed + 9));
            w.row_mut(0).fill(0.5);
            (0..9).for_each(|t| x[(t, 0)] = 0.0);
            for (by, squared) in [(By::Magnitude, false), (By::Magnitude, true), (By::Wanda, false), (By::Wanda, true)]
            {
                let mask = masks(&ConstantBlocks { by, squared }, &w, &x, height, 0.5);
                // Outputs of the block's rows that one input alone gives.
                let change = |top: usize, c: usize| -> f64 {
                    let outputs = |r: usize| {
                        let of = move |t: &Mat, i| if by == By::Wanda { f64::from(t[(i, c)]) } else { 1.0 };
                        let tokens = if by == By::Wanda { 9 } else { 1 };
                        (0..tokens).map(|t| (f64::from(w[(r, c)]) * of(&x, t)).powi(2)).sum::<f64>()
                    };
                    (top..top + height).map(|r| if squared { outputs(r) } else { outputs(r).sqrt() }).sum()
                };
                let compete: Vec<Vec<usize>> = match by {
                    By::Magnitude => vec![(0..rows).step_by(height).collect()],
                    By::Wanda => (0..rows).step_by(height).map(|top| vec![top]).collect(),
                };
                let mut gone_before = 0;
                for (i, tops) in compete.iter().enumerate() {
                    let mut all: Vec<(f32, usize, usize)> =
                        tops.iter().flat_map(|&t| (0..cols).map(move |c| (change(t, c) as f32, t, c))).collect();
                    all.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
                    let until = (0.5 * ((i + 1) * tops.len() * cols) as f64).round() as usize;
                    let (drop, total) = (until - gone_before, all.len());
                    gone_before = until;
                    let least = all.get(drop).map_or(f32::INFINITY, |a| a.0);
                    let mut gone = 0;
                    for (score, top, c) in &all {
                        let kept = mask.get(*top, *c);
                        assert!((*top..top + height).all(|r| mask.get(r, *c) == kept), "a block goes whole");
                        gone += usize::from(!kept);
                        // Sums that differ by rounding alone may change places.
                        let near = (score - least).abs() <= 1e-5 * least.abs();
                        assert!(near || kept == (*score >= least), "{by:?} {squared} block ({top}, {c})");
                    }
                    assert_eq!(gone, drop, "of {total}");
                }
            }
        }
    }

    #[test]
    fn squares_of_wandas_scores_lose_least_of_the_outputs() {
        // Inputs of very different sizes, one at a time.
        let w = random(64, 96, 1);
        let x = Mat::from_fn(96, 96, |t, c| if t == c { 1.0 + (c % 11) as f32 } else { 0.0 });
        let lost = |by: By, squared: bool| -> f64 {
            let mask = masks(&ConstantBlocks { by, squared }, &w, &x, 4, 0.7);
            let gone = Mat::from_fn(64, 96, |r, c| if mask.get(r, c) { 0.0 } else { w[(r, c)] });
            lacuna_base::dense::matmul_nt(x.view(), gone.view()).data().iter().map(|v| f64::from(*v).powi(2)).sum()
        };
        let (squares, sums, sizes) = (lost(By::Wanda, true), lost(By::Wanda, false), lost(By::Magnitude, false));
        assert!(squares <= sums && sums < 0.8 * sizes, "{squares} {sums} {sizes}");
    }

    #[test]
    fn statistics_are_asked_where_they_are_read() {
        let made = |given| (method().make)(given);
        let needs = |given| match made(given) {
            Ok(Made::Score(score)) => score.also_needs(),
            other => panic!("{other:?}"),
        };
        assert_eq!(needs(serde_json::json!({})), [Ask::InputSquares]);
        assert_eq!(needs(serde_json::json!({ "by": "magnitude" })), []);
        assert!(made(serde_json::json!({ "by": "sizes" })).is_err());
        let w = random(4, 3, 1);
        assert!(ConstantBlocks::default().score(w.view(), &Stats::default()).is_err());
        assert!(ConstantBlocks { by: By::Magnitude, squared: false }.score(w.view(), &Stats::default()).is_ok());
        for squares in [vec![1.0, 2.0], vec![1.0, f64::NAN, 1.0], vec![1.0, -1.0, 1.0]] {
            let found = [(Ask::InputSquares, Gathered::Vector(squares))];
            let stats = Stats { tokens: 1, found: &found, ..Stats::default() };
            assert!(ConstantBlocks::default().score(w.view(), &stats).is_err());
        }
    }
}

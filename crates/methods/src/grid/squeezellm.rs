//! SqueezeLLM: each row gets a table of values, placed where the loss is most sensitive.
//!
//! **Paper.** Sehoon Kim, Coleman Hooper, Amir Gholami, Zhen Dong, Xiuyu Li, Sheng Shen, Michael W. Mahoney, Kurt
//! Keutzer, "SqueezeLLM: Dense-and-Sparse Quantization", 2023, arXiv 2306.07629.
//!
//! **Idea.** The loss moves by about `½ Σ F_ii (w_i - Q(w_i))²`, `F` the diagonal of the Fisher matrix, the mean of
//! squared gradients. So the `2^b` values of a row are the centres of a k-means clustering of its weights weighted by
//! `F_ii`. Outliers are taken out first, into a sparse term (a step of `outliers` before this one).
//!
//! **Shapes and units.** The weights of one row or group with their `F_ii`, in nats² a squared unit of weight; `2^b`
//! values, rising.
//!
//! **Cost.** `n log n` for the order and `2^b n log n` for the clustering of `n` weights; memory `2^b n` indices. The
//! statistics are one backward pass a sample.
//!
//! **Departs.** (1) The clustering is the best there is, by dynamic programming over the sorted weights, where the
//! authors iterate from a random start. (2) Outliers are other steps: in the recipe the largest 0.45% of each matrix
//! (`magnitude`), then the 0.05% with the largest `F_ii` (`fisher`).

use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, Table};
use serde::Deserialize;

use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SqueezeLlm {
    /// Weigh by the Fisher matrix; otherwise all weights count alike.
    sensitivity: bool,
}

impl Default for SqueezeLlm {
    fn default() -> SqueezeLlm {
        SqueezeLlm { sensitivity: true }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "squeezellm",
            paper: "Kim, Hooper, Gholami, Dong, Li, Shen, Mahoney, Keutzer: SqueezeLLM: Dense-and-Sparse Quantization, \
             2023",
            arxiv: "2306.07629",
            summary: "Every row is rounded to a table of its own, whose values lie where the loss is most sensitive.",
            system: Some(18),
            verb: "quantize",
            needs: &[Ask::GradientSquares],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<SqueezeLlm>,
        make: |given| Ok(Made::Table(Box::new(make::parameters::<SqueezeLlm>("squeezellm", given)?))),
    }
}

/// Sums over the first so many sorted values: of weights, of weighted values, of weighted squares.
struct Sums(Vec<[f64; 3]>);

impl Sums {
    fn new(sorted: &[(f64, f64)]) -> Sums {
        let mut all = vec![[0.0; 3]];
        for &(x, w) in sorted {
            let [a, b, c] = all[all.len() - 1];
            all.push([a + w, b + w * x, c + w * x * x]);
        }
        Sums(all)
    }

    /// Weighted squared distances of values `from..to` to their mean.
    fn cost(&self, from: usize, to: usize) -> f64 {
        let [w, x, xx] = [0, 1, 2].map(|k| self.0[to][k] - self.0[from][k]);
        if w > 0.0 { (xx - x * x / w).max(0.0) } else { 0.0 }
    }

    fn mean(&self, from: usize, to: usize) -> Option<f64> {
        let [w, x] = [0, 1].map(|k| self.0[to][k] - self.0[from][k]);
        (w > 0.0).then(|| x / w)
    }
}

/// Fills `best[lo..hi]` and `cut[lo..hi]` of one more cluster from `before`: the best cut moves right with the end,
/// which halves the search.
fn fill(
    sums: &Sums,
    before: &[f64],
    best: &mut [f64],
    cut: &mut [u32],
    (lo, hi): (usize, usize),
    (from, to): (usize, usize),
) {
    if lo >= hi {
        return;
    }
    let end = (lo + hi) / 2;
    let mut found = (f64::INFINITY, from);
    for (at, before) in before.iter().enumerate().take(to.min(end) + 1).skip(from) {
        let cost = before + sums.cost(at, end);
        if cost < found.0 {
            found = (cost, at);
        }
    }
    (best[end], cut[end]) = (found.0, found.1 as u32);
    fill(sums, before, best, cut, (lo, end), (from, found.1));
    fill(sums, before, best, cut, (end + 1, hi), (found.1, to));
}

/// The centres of the best clustering of `sorted` `(value, weight)` into at most `k` clusters, rising.
pub(super) fn centres(sorted: &[(f64, f64)], k: usize) -> Vec<f64> {
    let n = sorted.len();
    let sums = Sums::new(sorted);
    let mut best: Vec<f64> = (0..=n).map(|end| sums.cost(0, end)).collect();
    let mut cuts: Vec<Vec<u32>> = Vec::new();
    for _ in 1..k.min(n) {
        let (mut next, mut cut) = (vec![0.0; n + 1], vec![0; n + 1]);
        fill(&sums, &best, &mut next, &mut cut, (0, n + 1), (0, n));
        best = next;
        cuts.push(cut);
    }
    let mut out = Vec::with_capacity(k);
    let mut end = n;
    for cut in cuts.iter().rev() {
        let from = cut[end] as usize;
        out.extend(sums.mean(from, end));
        end = from;
    }
    out.extend(sums.mean(0, end));
    out.reverse();
    out
}

/// The values, rising, each with what it is worth.
pub(super) fn sorted(values: &[f32], importance: &[f32], weigh: bool) -> Result<Vec<(f64, f64)>, MethodError> {
    if let Some(v) = values.iter().find(|v| !v.is_finite()) {
        return Err(MethodError::new(format!("a weight is {v}, not a finite number")));
    }
    if let Some(v) = importance.iter().find(|v| !v.is_finite() || **v < 0.0) {
        return Err(MethodError::new(format!("the square of a gradient is {v}")));
    }
    if !importance.is_empty() && importance.len() != values.len() {
        return Err(MethodError::new(format!("{} importances of {} weights", importance.len(), values.len())));
    }
    // Gradients that are all zero say nothing: then all weights count alike.
    let weigh = weigh && importance.iter().any(|v| *v > 0.0);
    let of = |i: usize| if weigh { f64::from(importance[i]) } else { 1.0 };
    let mut sorted: Vec<(f64, f64)> = (0..values.len()).map(|i| (f64::from(values[i]), of(i))).collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    Ok(sorted)
}

impl Table for SqueezeLlm {
    fn table(&self, values: &[f32], importance: &[f32], bits: u8) -> Result<Vec<f32>, MethodError> {
        let size = 1usize << bits;
        let sorted = sorted(values, importance, self.sensitivity)?;
        let mut out: Vec<f32> = centres(&sorted, size).into_iter().map(|c| c as f32).collect();
        let last = out.last().copied().unwrap_or(0.0);
        out.resize(size, last);
        Ok(out)
    }

    fn importance(&self) -> Option<Ask> {
        self.sensitivity.then_some(Ask::GradientSquares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    fn loss(values: &[f32], importance: &[f32], table: &[f32]) -> f64 {
        let near = |v: f32| table.iter().map(|t| f64::from(t - v).powi(2)).fold(f64::INFINITY, f64::min);
        values.iter().zip(importance).map(|(v, w)| f64::from(*w) * near(*v)).sum()
    }

    /// Every way to cut the sorted weights into clusters.
    fn brute(sorted: &[(f64, f64)], k: usize) -> f64 {
        let spread = |part: &[(f64, f64)]| {
            let w: f64 = part.iter().map(|p| p.1).sum();
            let mean = part.iter().map(|p| p.0 * p.1).sum::<f64>() / w.max(1e-300);
            part.iter().map(|p| p.1 * (p.0 - mean).powi(2)).sum::<f64>()
        };
        if k == 1 || sorted.len() <= 1 {
            return spread(sorted);
        }
        (0..=sorted.len()).map(|at| spread(&sorted[at..]) + brute(&sorted[..at], k - 1)).fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn agrees_with_brute_force_clusterings() {
        for seed in 0..40u64 {
            let n = 1 + seed as usize % 9;
            let mut values = random(1, n, seed).into_vec();
            let mut importance: Vec<f32> = random(1, n, seed + 99).into_vec().iter().map(|x| x * x).collect();
            if n > 3 {
                values[1] = values[0];
                importance[2] = 0.0;
            }
            for bits in [1, 2] {
                let table = SqueezeLlm::default().table(&values, &importance, bits).expect("a table");
                assert!(table.len() == 1 << bits && table.windows(2).all(|w| w[0] <= w[1]));
                let mut sorted: Vec<(f64, f64)> =
                    values.iter().zip(&importance).map(|(v, w)| (f64::from(*v), f64::from(*w))).collect();
                sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
                let (got, best) = (loss(&values, &importance, &table), brute(&sorted, 1 << bits));
                assert!(got <= best * 1.0001 + 1e-9, "seed {seed}, {bits} bits: {got} {best}");
            }
        }
    }

    #[test]
    fn edges_and_refusals() {
        let s = SqueezeLlm::default();
        assert_eq!(s.table(&[], &[], 2), Ok(vec![0.0; 4]));
        assert_eq!(s.table(&[0.5; 6], &[0.0; 6], 1), Ok(vec![0.5; 2]));
        assert!(s.table(&[f32::NAN], &[], 2).is_err() && s.table(&[1.0], &[-1.0], 2).is_err());
        assert!(s.table(&[1.0, 2.0], &[1.0], 2).is_err());
        assert_eq!(SqueezeLlm { sensitivity: false }.importance(), None);
    }
}

//! Essential sparsity: a sweep of the same level everywhere, and the last one before the sharp drop.
//!
//! **Paper.** Ajay Jaiswal, Shiwei Liu, Tianlong Chen, Zhangyang Wang, "The Emergence of Essential Sparsity in Large
//! Pre-trained Models: The Weights that Matter", 2023, arXiv 2306.03805.
//!
//! **Idea.** Prune by magnitude in one shot, more and more. Up to some sparsity the performance hardly falls; beyond
//! it falls sharply: that point is the model's essential sparsity. Here `p = exp(-loss)` is the performance, and the
//! point is the level that lies highest above the chord from the first level of the sweep to the last, where the curve
//! begins to fall faster than on average.
//!
//! **Shapes and units.** Levels (sparsities, or n:m patterns) with the loss, nats a token, of the model that has each
//! everywhere. The answer is that level everywhere; the report has the table.
//!
//! **Cost.** One trial a level.
//!
//! **Departs.** (1) The paper fine-tunes on tasks after pruning and looks at their scores; here nothing is trained, and
//! the score is the language loss on the calibration text. (2) The paper finds the point by eye; the greatest height
//! above the chord is "Finding a 'Kneedle' in a Haystack" (Satopaa and others, 2011), and depends on how far the sweep
//! goes. (3) Where the level's bytes are above the budget, the next sparser one that fits is answered, and the report
//! still names the point.

use lacuna_contract::{Assignment, Card, Lab, Made, Method, MethodError, Search, SearchAsk};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sweep {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "essential-sparsity",
            paper: "Jaiswal, Liu, Chen, Wang: The Emergence of Essential Sparsity in Large Pre-trained Models: The \
             Weights that Matter, 2023",
            arxiv: "2306.03805",
            summary: "The same level everywhere, one after another: the loss at each, and the last before the sharp \
             drop.",
            system: Some(183),
            verb: "search",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Sweep>,
        make: |given| Ok(Made::Search(Box::new(make::parameters::<Sweep>("essential-sparsity", given)?))),
    }
}

/// The point of a curve, as `(x, performance)` by rising x, that lies highest above the chord of its ends; the first of
/// those alike. Where nothing lies above it, the first of a curve that falls (at once) and the last of any other.
fn knee(curve: &[(f64, f64)]) -> usize {
    let ((x0, y0), (x1, y1)) = (curve[0], curve[curve.len() - 1]);
    let height = |i: usize| {
        let (x, y) = curve[i];
        y - (y0 + (y1 - y0) * (x - x0) / (x1 - x0))
    };
    let inner = (0..curve.len()).filter(|&i| height(i) > 1e-12 * y0.abs().max(y1.abs()));
    let none = if y1 < y0 { 0 } else { curve.len() - 1 };
    inner.rev().max_by(|&a, &b| height(a).total_cmp(&height(b))).unwrap_or(none)
}

impl Search for Sweep {
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        let slots = lab.slots().len();
        let Some(common) = (0..slots).map(|s| lab.levels(s).len()).min() else { return Ok(Vec::new()) };
        let bytes = |lab: &dyn Lab, l: usize| (0..slots).map(|s| lab.levels(s)[l].bytes).sum::<u64>();
        let mut order: Vec<usize> = (0..common).collect();
        // Levels that are numbers by their numbers; patterns, which have none, as the recipe lists them.
        order.sort_by(|&a, &b| lab.levels(0)[a].value.total_cmp(&lab.levels(0)[b].value));
        if common < 3 || ask.trials < common {
            return Err(MethodError::new(format!(
                "{common} levels and {} trials; a sweep wants 3 levels or more and a trial for each",
                ask.trials
            )));
        }
        let batch: Vec<Assignment> = order.iter().map(|&l| vec![l; slots]).collect();
        let outcomes = lab.measure(&batch, ask.tokens)?;
        let value = |i: usize| lab.levels(0)[order[i]].value;
        let numbers = (1..common).all(|i| value(i) > value(i - 1));
        let curve: Vec<(f64, f64)> = outcomes
            .iter()
            .enumerate()
            .map(|(i, o)| {
                (if numbers { value(i) } else { i as f64 }, if o.loss.is_nan() { 0.0 } else { (-o.loss).exp() })
            })
            .collect();
        let found = knee(&curve);
        let table: Vec<String> = order
            .iter()
            .zip(&outcomes)
            .map(|(&l, o)| format!("{} {:.4} nats (KL {:.4})", lab.name(0, l), o.loss, o.kl))
            .collect();
        let point = match found {
            i if i + 1 < common => format!("the sharp drop comes after {}", lab.name(0, order[i])),
            _ => "there is no sharp drop within the sweep".to_owned(),
        };
        lab.note(format!("the sweep: {}; {point}", table.join(", ")));
        let fits = (found..common).find(|&i| bytes(lab, order[i]) <= ask.budget_bytes);
        let chosen = fits.ok_or_else(|| {
            MethodError::new(format!(
                "no level from {} on stays within {} bytes; name the largest as the target",
                lab.name(0, order[found]),
                ask.budget_bytes
            ))
        })?;
        Ok(vec![order[chosen]; slots])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testkit::{Bench, Known};
    use lacuna_base::testkit::random;

    /// The definition: the perpendicular distance to the chord, on its upper side.
    fn brute(curve: &[(f64, f64)]) -> usize {
        let ((x0, y0), (x1, y1)) = (curve[0], curve[curve.len() - 1]);
        let length = (x1 - x0).hypot(y1 - y0);
        let distance = |&(x, y): &(f64, f64)| ((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)) / length;
        let mut best = None;
        for (i, p) in curve.iter().enumerate() {
            if distance(p) > 1e-9 && best.is_none_or(|(_, d)| distance(p) > d + 1e-12) {
                best = Some((i, distance(p)));
            }
        }
        best.map_or(if y1 < y0 { 0 } else { curve.len() - 1 }, |b| b.0)
    }

    #[test]
    fn the_knee_agrees_with_brute_force() {
        for seed in 0..200 {
            let n = 3 + seed as usize % 9;
            let (dx, y) = (random(1, n, seed), random(1, n, seed + 999));
            let mut x = 0.0;
            let curve: Vec<(f64, f64)> = (0..n)
                .map(|i| {
                    x += f64::from(dx[(0, i)]).abs() + 0.01;
                    (x, f64::from(y[(0, i)]))
                })
                .collect();
            assert_eq!(knee(&curve), brute(&curve), "{curve:?}");
        }
        assert_eq!(knee(&[(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]), 2, "flat");
        assert_eq!(knee(&[(0.0, 1.0), (0.5, 0.2), (1.0, 0.1)]), 0, "down at once");
        assert_eq!(knee(&[(0.0, 1.0), (0.3, 0.99), (0.6, 0.97), (0.7, 0.3), (0.9, 0.01)]), 2);
    }

    #[test]
    fn the_level_before_the_drop_is_chosen_and_told() {
        let sparsity = [0.6, 0.0, 0.3, 0.7, 0.9];
        let loss = |s: f64| if s < 0.65 { 1.0 + 0.05 * s } else { 6.0 * s };
        let mut lab = Known::new(4, &sparsity, move |a| a.iter().map(|&l| loss(sparsity[l])).sum::<f64>() / 4.0);
        let ask = SearchAsk { budget_bytes: u64::MAX, trials: 5, tokens: 8, seed: 0 };
        assert_eq!(Sweep {}.search(&mut lab, &ask).expect("found"), [0; 4]);
        assert_eq!(lab.measured, 5);
        let told = lab.notes.join("");
        assert!(told.contains("after 0.6") && told.contains("0.3 1.0150 nats"), "{told}");
        // A budget below that level's bytes: the next sparser one.
        let ask = SearchAsk { budget_bytes: lab.bytes(&[3; 4]), ..ask };
        assert_eq!(Sweep {}.search(&mut lab, &ask).expect("found"), [3; 4]);
        assert!(Sweep {}.search(&mut lab, &SearchAsk { budget_bytes: 0, ..ask }).is_err());
        assert!(Sweep {}.search(&mut lab, &SearchAsk { trials: 4, ..ask }).is_err());
        let none = SearchAsk { budget_bytes: u64::MAX, trials: 9, tokens: 8, seed: 0 };
        assert!(Sweep {}.search(&mut Bench::new(3, 2, 1), &none).is_err());
    }
}

//! LLM-Pruner: the coupled structures go whose loss the gradients foretell as smallest.
//!
//! **Paper.** Xinyin Ma, Gongfan Fang, Xinchao Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models",
//! 2023, arXiv 2305.11627.
//!
//! **Idea.** Rows of the writers and columns of the reader that go together are a group `G = {W_i}`: of a head those of
//! q, k, v and o, of an FFN channel those of gate, up and down. To the first order the loss `L` changes by
//! `I_{W_i} = Σ_k |∂L/∂W_i^k · W_i^k|` where the weights `k` of `W_i` go one by one (`element`), or by
//! `Σ_n |Σ_k ∂L/∂W_i^{nk} · W_i^{nk}|` where they go row by row or column by column `n` (`vector`). A group's
//! importance is the sum, product or maximum of its `I_{W_i}`, or that of the last, the reader. The groups of lowest
//! importance go, so many in every layer.
//!
//! **Shapes and units.** Weights and mean gradients of the reader `[hidden, count * width]` and of each writer
//! `[count * rows, hidden]`; the answer is in nats (for the product to the power of the group's matrices).
//!
//! **Cost.** One pass back over the calibration text; then one pass over each matrix.
//!
//! **Departs.** The cut alone: the paper's recovery, tuning with LoRA, is not here. The gradient is that of the mean
//! loss over the calibration sequences (the paper takes ten, of 64 tokens). Matrices are aggregated for a head as a
//! whole, where the authors' code aggregates channel by channel and sums over the head: with shared key and value heads
//! the channels of q and k do not match. Biases have no gradients here and count for nothing. The second-order and
//! mixed orders are left out: the paper finds the first order as good. Layers that stay whole are the family's
//! `keep_first` and `keep_last`.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ask, Card, Compete, Made, Method, MethodError, Stats, Structure, StructureAsk};
use serde::Deserialize;

use super::reader;
use crate::make;

/// How weights become one number for a group.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LlmPruner {
    /// Of the matrices of a group: "sum", "product", "max" or "last".
    aggregate: Aggregate,
    /// Of the weights of a matrix: "element" or "vector".
    granularity: Granularity,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Aggregate {
    #[default]
    Sum,
    Product,
    Max,
    /// The reader's alone.
    Last,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Granularity {
    #[default]
    Element,
    Vector,
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "llm-pruner",
            paper: "Ma, Fang, Wang: LLM-Pruner: On the Structural Pruning of Large Language Models, 2023",
            arxiv: "2305.11627",
            summary: "The heads and FFN channels go whose weights times gradients, over all coupled matrices, are \
             smallest in their layer.",
            system: Some(65),
            verb: "structure",
            needs: &[Ask::GradientMean],
            abilities: &[],
        },
        keys: make::keys::<LlmPruner>,
        make: |given| Ok(Made::Structure(Box::new(make::parameters::<LlmPruner>("llm-pruner", given)?))),
    }
}

/// The mean gradient of a matrix.
fn gradient<'a>(w: MatRef<'_>, stats: &Stats<'a>) -> Result<&'a Mat, MethodError> {
    let g = stats.matrix(Ask::GradientMean)?;
    if (g.rows(), g.cols()) != (w.rows(), w.cols()) {
        let (have, want) = ((g.rows(), g.cols()), (w.rows(), w.cols()));
        return Err(MethodError::new(format!(
            "gradients of {} x {} for a matrix of {} x {}",
            have.0, have.1, want.0, want.1
        )));
    }
    Ok(g)
}

impl LlmPruner {
    /// The part of one weight in the sum over its row or column.
    fn part(&self, w: f32, g: f32) -> f64 {
        let product = f64::from(w) * f64::from(g);
        if self.granularity == Granularity::Element { product.abs() } else { product }
    }

    /// What each unit's columns of the reader matter.
    fn of_reader(&self, w: MatRef<'_>, g: &Mat, width: usize) -> Vec<f64> {
        let mut columns = vec![0.0; w.cols()];
        for r in 0..w.rows() {
            let both = w.row(r).iter().zip(g.row(r));
            columns.iter_mut().zip(both).for_each(|(c, (w, g))| *c += self.part(*w, *g));
        }
        columns.chunks(width).map(|unit| unit.iter().map(|x| x.abs()).sum()).collect()
    }

    /// What each unit's rows of a writer matter.
    fn of_writer(&self, w: MatRef<'_>, g: &Mat, rows: usize) -> Vec<f64> {
        let row = |r: usize| w.row(r).iter().zip(g.row(r)).map(|(w, g)| self.part(*w, *g)).sum::<f64>().abs();
        (0..w.rows() / rows).map(|u| (u * rows..(u + 1) * rows).map(row).sum()).collect()
    }
}

impl Structure for LlmPruner {
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        let w = reader("llm-pruner", ask)?;
        let mut scores = self.of_reader(w, gradient(w, &ask.stats)?, ask.width);
        if self.aggregate == Aggregate::Last {
            return Ok(scores);
        }
        if ask.writers.len() != ask.writer_stats.len() {
            let (n, m) = (ask.writer_stats.len(), ask.writers.len());
            return Err(MethodError::new(format!("gradients of {n} writers, and there are {m}")));
        }
        for (w, stats) in ask.writers.iter().zip(ask.writer_stats) {
            make::finite(*w)?;
            if w.rows() == 0 || w.rows() % ask.count > 0 {
                let what = format!("{} units for a writer of {} rows", ask.count, w.rows());
                return Err(MethodError::new(what));
            }
            let of = self.of_writer(*w, gradient(*w, stats)?, w.rows() / ask.count);
            scores.iter_mut().zip(of).for_each(|(s, i)| match self.aggregate {
                Aggregate::Product => *s *= i,
                Aggregate::Max => *s = s.max(i),
                Aggregate::Sum | Aggregate::Last => *s += i,
            });
        }
        Ok(scores)
    }

    fn compete(&self) -> Compete {
        Compete::Layer
    }

    fn keeps_means(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_contract::{Gathered, Unit};

    fn found(g: Mat) -> Vec<(Ask, Gathered)> {
        vec![(Ask::GradientMean, Gathered::Matrix(g))]
    }

    fn stats(gradients: &[(Ask, Gathered)]) -> Stats<'_> {
        Stats { tokens: 9, found: &[], gradients, sequences: 3, worked: None }
    }

    /// Straight from the definition, with a mask for each unit and matrix.
    #[test]
    fn agrees_with_brute_force_over_each_groups_weights() {
        // (units, columns of the reader, rows of q or gate, rows of k and v or up); the last has one query head for two
        // columns.
        for (unit, count, width, narrow) in
            [(Unit::Channel, 6, 1, 1), (Unit::Head, 3, 4, 2), (Unit::Channel, 1, 1, 1), (Unit::Head, 1, 2, 2)]
        {
            let hidden = 5;
            let n = count * width;
            let mut o = random(hidden, n, 1);
            (0..hidden).for_each(|r| o[(r, 0)] = 0.0);
            let rows = if unit == Unit::Head { vec![width, narrow, narrow] } else { vec![1, 1] };
            let shape = |i: usize| (count * rows[i], hidden);
            let w: Vec<Mat> = (0..rows.len()).map(|i| random(shape(i).0, shape(i).1, 10 + i as u64)).collect();
            let g: Vec<Mat> = (0..rows.len()).map(|i| random(shape(i).0, shape(i).1, 20 + i as u64)).collect();
            let go = random(hidden, n, 2);
            let (of_o, of_w) = (found(go.clone()), g.iter().cloned().map(found).collect::<Vec<_>>());
            let writer_stats: Vec<Stats<'_>> = of_w.iter().map(|f| stats(f)).collect();
            let writers: Vec<MatRef<'_>> = w.iter().map(Mat::view).collect();
            let (reader, writers, writer_stats) = (Some(o.view()), writers.as_slice(), writer_stats.as_slice());
            let stats = stats(&of_o);
            let ask = StructureAsk { unit, layer: 0, count, width, reader, writers, stats, writer_stats };
            // The matrices of a group, the reader turned so that a unit is rows everywhere.
            let turned = |m: &Mat| Mat::from_fn(m.cols(), m.rows(), |r, c| m[(c, r)]);
            let mut all = vec![(turned(&o), turned(&go), width)];
            all.extend((0..rows.len()).map(|i| (w[i].clone(), g[i].clone(), rows[i])));
            for granularity in [Granularity::Element, Granularity::Vector] {
                let one = |(w, g, rows): &(Mat, Mat, usize), u: usize| {
                    let mut sum = 0.0;
                    for r in (0..w.rows()).filter(|r| r / rows == u) {
                        let parts: Vec<f64> =
                            (0..w.cols()).map(|c| f64::from(w[(r, c)]) * f64::from(g[(r, c)])).collect();
                        sum += match granularity {
                            Granularity::Element => parts.iter().map(|p| p.abs()).sum::<f64>(),
                            Granularity::Vector => parts.iter().sum::<f64>().abs(),
                        };
                    }
                    sum
                };
                for aggregate in [Aggregate::Sum, Aggregate::Product, Aggregate::Max, Aggregate::Last] {
                    let have = LlmPruner { aggregate, granularity }.score(&ask).expect("scores");
                    assert_eq!(have.len(), count);
                    for (u, have) in have.iter().enumerate() {
                        let each: Vec<f64> = all.iter().map(|m| one(m, u)).collect();
                        let want = match aggregate {
                            Aggregate::Sum => each.iter().sum(),
                            Aggregate::Product => each.iter().product(),
                            Aggregate::Max => each.iter().copied().fold(0.0, f64::max),
                            Aggregate::Last => each[0],
                        };
                        let off = (have - want).abs();
                        assert!(off < 1e-9 * (1.0 + want), "{unit:?} {aggregate:?} {granularity:?}: {have} {want}");
                    }
                }
            }
            let by = LlmPruner::default();
            assert!(by.score(&StructureAsk { writer_stats: &writer_stats[1..], ..ask }).is_err());
            assert!(by.score(&StructureAsk { writer_stats: &[Stats::default(); 3][..writers.len()], ..ask }).is_err());
            assert!(by.score(&StructureAsk { width: 0, ..ask }).is_err());
            let other = found(random(hidden, n + 1, 5));
            assert!(by.score(&StructureAsk { stats: super::tests::stats(&other), ..ask }).is_err());
        }
    }

    /// A loss that is linear in the weights changes by no more than a unit's importance when the unit goes, and by
    /// exactly that where all its parts have one sign.
    #[test]
    fn a_linear_loss_changes_by_at_most_the_importance() {
        let (o, go, up, gu) = (random(4, 6, 1), random(4, 6, 2), random(6, 4, 3), random(6, 4, 4));
        let same = |w: &Mat, g: &Mat| Mat::from_fn(w.rows(), w.cols(), |r, c| g[(r, c)].abs().copysign(w[(r, c)]));
        for signs in [false, true] {
            let (go, gu) = if signs { (same(&o, &go), same(&up, &gu)) } else { (go.clone(), gu.clone()) };
            let (of_o, of_u) = (found(go.clone()), found(gu.clone()));
            let (reader, writers, writer_stats) = (Some(o.view()), &[up.view()][..], &[stats(&of_u)][..]);
            let (unit, stats) = (Unit::Channel, stats(&of_o));
            let ask = StructureAsk { unit, layer: 0, count: 6, width: 1, reader, writers, stats, writer_stats };
            for (u, i) in LlmPruner::default().score(&ask).expect("scores").into_iter().enumerate() {
                let change: f64 = (0..4)
                    .map(|h| {
                        f64::from(o[(h, u)]) * f64::from(go[(h, u)]) + f64::from(up[(u, h)]) * f64::from(gu[(u, h)])
                    })
                    .sum();
                assert!(change.abs() <= i + 1e-12 && (!signs || (change - i).abs() < 1e-9), "{change} {i}");
            }
        }
    }
}

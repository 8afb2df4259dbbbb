//! Wanda-sp: Wanda's score, added up over what goes as a whole.
//!
//! **Paper.** Yongqi An, Xu Zhao, Tao Yu, Ming Tang, Jinqiao Wang, "Fluctuation-based Adaptive Structured Pruning for
//! Large Language Models", 2023, arXiv 2312.11983 (its structured baseline), after Sun et al., arXiv 2306.11695.
//!
//! **Idea.** `S_j = ‖X_j‖₂ · mean_i |W_ij|` for input `j` of `attn.o` or `ffn.down`, the mean over the outputs; a head
//! has the sum over its columns. Every layer loses the same fraction; nothing is made up for.
//!
//! **Shapes and units.** The reader `W` `[hidden, count * width]`; `Σ x²` of each of its inputs over the tokens; the
//! answer has one number a unit, in units of the output times the square root of tokens.
//!
//! **Cost.** One pass over the reader; the statistics are one number an input.
//!
//! **Departs.** The authors' code runs each pruned layer before the next is calibrated; here all are calibrated on the
//! source. Their code rounds the heads and the channels of a layer each to its own fraction; here the channels make up
//! for what whole heads cannot meet.

use lacuna_contract::{Ask, Card, Compete, Made, Method, MethodError, Structure, StructureAsk};
use serde::Deserialize;

use super::{columns, reader};
use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WandaSp {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "wanda-sp",
            paper: "An, Zhao, Yu, Tang, Wang: Fluctuation-based Adaptive Structured Pruning for Large Language Models, \
             2023",
            arxiv: "2312.11983",
            summary: "The heads and FFN channels go whose weights times the norms of their inputs are smallest in \
             their layer.",
            system: None,
            verb: "structure",
            needs: &[Ask::InputSquares],
            abilities: &[],
        },
        keys: make::keys::<WandaSp>,
        make: |given| Ok(Made::Structure(Box::new(make::parameters::<WandaSp>("wanda-sp", given)?))),
    }
}

impl Structure for WandaSp {
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        let w = reader("wanda-sp", ask)?;
        let squares = ask.stats.squares()?;
        if squares.len() != w.cols() {
            return Err(MethodError::new(format!("squares of {} inputs for a matrix of {}", squares.len(), w.cols())));
        }
        let rows = w.rows().max(1) as f64;
        let mut s = columns(w, f64::abs);
        s.iter_mut().zip(squares).for_each(|(s, x)| *s *= x.sqrt() / rows);
        Ok(s.chunks(ask.width).map(|unit| unit.iter().sum()).collect())
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
    use lacuna_contract::{Gathered, Stats, Unit};

    /// Straight from the definition: the norm of each weight's own part of the outputs, its mean over the rows, its sum
    /// over a head.
    #[test]
    fn agrees_with_brute_force_parts_of_the_outputs() {
        for (unit, count, width, tokens) in [(Unit::Channel, 6, 1, 9), (Unit::Head, 3, 4, 9), (Unit::Channel, 1, 1, 1)]
        {
            let n = count * width;
            let (w, x) = (random(5, n, 1), random(tokens, n, 2));
            let part = |r: usize, j: usize| {
                let of = |t: usize| (f64::from(w[(r, j)]) * f64::from(x[(t, j)])).powi(2);
                (0..tokens).map(of).sum::<f64>().sqrt()
            };
            let squares = (0..n).map(|j| (0..tokens).map(|t| f64::from(x[(t, j)]).powi(2)).sum()).collect();
            let found = [(Ask::InputSquares, Gathered::Vector(squares))];
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
            let have = WandaSp {}.score(&ask).expect("scores");
            assert_eq!(have.len(), count);
            for (u, have) in have.iter().enumerate() {
                let column = |j: usize| (0..5).map(|r| part(r, j)).sum::<f64>() / 5.0;
                let want: f64 = (u * width..(u + 1) * width).map(column).sum();
                assert!((have - want).abs() < 1e-6 * (1.0 + want), "{unit:?} {u}: {have} {want}");
            }
            assert!(WandaSp {}.score(&StructureAsk { width: 0, ..ask }).is_err());
            assert!(WandaSp {}.score(&StructureAsk { stats: Stats::default(), ..ask }).is_err());
        }
    }
}

//! Random: heads and channels go by lot.
//!
//! **Paper.** Xinyin Ma, Gongfan Fang, Xinchao Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models",
//! 2023, arXiv 2305.11627 (its baseline "Random").
//!
//! **Idea.** `I ~ U(0, 1)` for each unit: whatever a score knows of a unit has to show as a lower loss than this.
//!
//! **Shapes and units.** A number a unit, without a unit, from the seed, the layer and the kind alone.
//!
//! **Cost.** None to speak of.
//!
//! **Departs.** The experts of a layer draw the same lots.

use lacuna_base::Rng;
use lacuna_contract::{Card, Compete, Made, Method, MethodError, Structure, StructureAsk, Unit};
use serde::Deserialize;

use super::reader;
use crate::make;

/// Where the lots come from.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Random {
    /// Any whole number.
    seed: u64,
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "random",
            paper: "Ma, Fang, Wang: LLM-Pruner: On the Structural Pruning of Large Language Models, 2023",
            arxiv: "2305.11627",
            summary: "Heads and FFN channels go by lot; what scores have to beat.",
            system: None,
            verb: "structure",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Random>,
        make: |given| Ok(Made::Structure(Box::new(make::parameters::<Random>("random", given)?))),
    }
}

impl Structure for Random {
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        reader("random", ask)?;
        let kind = u64::from(ask.unit == Unit::Head);
        let mut rng = Rng::stream(self.seed, 2 * ask.layer as u64 + kind);
        Ok((0..ask.count).map(|_| rng.f64()).collect())
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
    use lacuna_base::Mat;
    use lacuna_contract::Stats;

    /// By definition each unit is as likely to be the lowest as any other, whatever its weights, and the lots of two
    /// layers, kinds or seeds have nothing to do with each other.
    #[test]
    fn every_unit_is_lowest_as_often_by_definition() {
        let w = Mat::from_fn(3, 5, |_, c| c as f32);
        let scores = |seed: u64, layer: usize, unit: Unit| {
            let (stats, reader, writers) = (Stats::default(), Some(w.view()), &[][..]);
            let ask = StructureAsk { unit, layer, count: 5, width: 1, reader, writers, stats, writer_stats: &[] };
            Random { seed }.score(&ask).expect("scores")
        };
        let mut lowest = [0usize; 5];
        for (seed, layer) in (0..50).flat_map(|s| (0..50).map(move |l| (s, l))) {
            let all = scores(seed, layer, Unit::Channel);
            let least = (0..5).min_by(|a, b| all[*a].total_cmp(&all[*b])).expect("one");
            lowest[least] += 1;
        }
        // 500 each, give or take five deviations of 20.
        assert!(lowest.iter().all(|n| (400..600).contains(n)), "{lowest:?}");
        let one = scores(1, 2, Unit::Channel);
        assert_eq!(one, scores(1, 2, Unit::Channel));
        for other in [scores(2, 2, Unit::Channel), scores(1, 3, Unit::Channel), scores(1, 2, Unit::Head)] {
            assert!(one.iter().zip(&other).all(|(a, b)| a != b), "{one:?} {other:?}");
        }
    }
}

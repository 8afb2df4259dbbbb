//! Uniform: the same level everywhere.
//!
//! **Paper.** None: the division that every search has to beat.
//!
//! **Idea.** The level with most bytes that, taken everywhere, stays within the budget.
//!
//! **Shapes and units.** Slots with their levels; a level's index for each slot.
//!
//! **Cost.** None: nothing is measured.
//!
//! **Departs.** Nothing to depart from.

use lacuna_contract::{Assignment, Card, Lab, Made, Method, MethodError, Search, SearchAsk};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Uniform {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "uniform",
            paper: "",
            arxiv: "",
            summary: "The same level for every slot.",
            system: None,
            verb: "search",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Uniform>,
        make: |given| Ok(Made::Search(Box::new(make::parameters::<Uniform>("uniform", given)?))),
    }
}

/// The index that, the same everywhere, has most bytes within the budget.
pub(super) fn uniform(lab: &dyn Lab, budget_bytes: u64) -> Option<Assignment> {
    let slots = lab.slots().len();
    let common = (0..slots).map(|s| lab.levels(s).len()).min()?;
    let bytes = |l: usize| (0..slots).map(|s| lab.levels(s)[l].bytes).sum::<u64>();
    let best = (0..common).filter(|&l| bytes(l) <= budget_bytes).max_by_key(|&l| (bytes(l), std::cmp::Reverse(l)))?;
    Some(vec![best; slots])
}

impl Search for Uniform {
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        if lab.slots().is_empty() {
            return Ok(Vec::new());
        }
        uniform(lab, ask.budget_bytes).ok_or_else(|| {
            MethodError::new(format!("no level taken everywhere stays within {} bytes", ask.budget_bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::search::testkit::Bench;

    #[test]
    fn agrees_with_brute_force_over_the_levels() {
        for seed in 0..30 {
            let mut lab = Bench::new(4, 5, seed);
            let all: Vec<u64> = (0..5).map(|l| lab.bytes(&[l; 4])).collect();
            for budget_bytes in [all[0], all[2], all[4] + 1, all.iter().copied().min().expect("levels")] {
                let ask = SearchAsk { budget_bytes, trials: 0, tokens: 2, seed };
                let chosen = Uniform {}.search(&mut lab, &ask).expect("fits");
                assert!(chosen.windows(2).all(|w| w[0] == w[1]));
                let best = all.iter().copied().filter(|b| *b <= budget_bytes).max();
                assert_eq!(Some(lab.bytes(&chosen)), best);
            }
            let ask = SearchAsk { budget_bytes: 0, trials: 0, tokens: 2, seed };
            assert!(Uniform {}.search(&mut lab, &ask).is_err());
            assert_eq!(lab.measured, 0);
        }
    }
}

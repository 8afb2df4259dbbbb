//! StreamingLLM: the first positions stay, and the newest.
//!
//! **Paper.** Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis, "Efficient Streaming Language Models
//! with Attention Sinks", 2023, arXiv 2309.17453.
//!
//! **Idea.** A softmax has to put its weight somewhere, and models put what they do not need on the text's first
//! positions. With those (`sinks`) and a window of the newest, `budget` slots in all, a model goes on as it should.
//!
//! **Shapes and units.** Slots of each head with their absolute positions; kept slots, rising.
//!
//! **Cost.** None beside the list of slots; no statistics.
//!
//! **Departs.** The paper drops a slot with every token; here the window is cut every `every` positions, at absolute
//! ones, and grows in between. The paper turns keys anew by their place in the cache; here they stay turned by their
//! place in the text, so that a text still ends where the model's context does.

use lacuna_contract::{Card, Keep, KeepHead, KeepPlan, MadeRunning, MethodError, RunMethod};
use serde::{Deserialize, Serialize};

use crate::family::keys::Whole;
use crate::{keep, make};

/// What stays.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct StreamingLlm {
    /// Slots that a head keeps, 1 to 2^30.
    budget: Whole<1, { 1 << 30 }>,
    /// First positions among them; a slot at least is left to the newest.
    sinks: usize,
    /// Positions between two cuts, 1 to 65536.
    every: Whole<1, 65536>,
}

impl Default for StreamingLlm {
    fn default() -> StreamingLlm {
        StreamingLlm { budget: Whole(1024), sinks: 4, every: Whole(32) }
    }
}

pub(crate) fn method() -> RunMethod {
    RunMethod {
        card: Card {
            name: "streaming-llm",
            paper: "Xiao, Tian, Chen, Han, Lewis: Efficient Streaming Language Models with Attention Sinks, 2023",
            arxiv: "2309.17453",
            summary: "Keeps the keys and values of the text's first positions and of the newest.",
            system: None,
            verb: "keep",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<StreamingLlm>,
        defaults: make::defaults::<StreamingLlm>,
        make: |given, _| {
            let asked: StreamingLlm = make::parameters("streaming-llm", given)?;
            let StreamingLlm { sinks, budget, .. } = asked;
            if sinks >= budget.0 {
                let n = budget.0;
                return Err(MethodError::new(format!("sinks {sinks}: a budget of {n} slots leaves the newest none")));
            }
            Ok(MadeRunning::Keep(Box::new(asked)))
        },
    }
}

impl Keep for StreamingLlm {
    fn plan(&self) -> KeepPlan {
        KeepPlan { mass: false, every: self.every.0, budget: self.budget.0 }
    }

    fn keep(&self, heads: &[KeepHead<'_>], budget: usize) -> Result<Vec<Vec<usize>>, MethodError> {
        let one = |head: &KeepHead<'_>| {
            keep::check(head, false)?;
            let n = head.positions.len();
            let first = head.positions.partition_point(|p| *p < self.sinks).min(budget.saturating_sub(1));
            let newest = (budget - first).min(n - first);
            Ok((0..first).chain(n - newest..n).collect())
        };
        heads.iter().map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    /// Straight from the definition: a slot stays if it is a sink (one slot is not theirs), or if fewer than the rest of
    /// the budget are newer.
    #[test]
    fn agrees_with_the_definition_slot_by_slot() {
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let (sinks, budget) = (rng.below(6), 1 + rng.below(12));
            let positions: Vec<usize> = (0..30).filter(|_| rng.below(2) == 0).collect();
            let head = KeepHead { layer: 0, head: 0, positions: &positions, mass: &[] };
            let by = StreamingLlm { sinks, budget: Whole(budget), every: Whole(1) };
            let kept = by.keep(&[head, head], budget).expect("keeps");
            let n = positions.len();
            let first: Vec<usize> = (0..n).filter(|&i| positions[i] < sinks).take(budget - 1).collect();
            let stays = |i: &usize| first.contains(i) || n - 1 - i < budget - first.len();
            let want: Vec<usize> = (0..n).filter(stays).collect();
            assert_eq!(kept, [want.clone(), want], "seed {seed}");
        }
    }

    /// A text that is cut again and again holds what one cut at its end would leave.
    #[test]
    fn cuts_on_the_way_change_nothing_at_the_end() {
        let by = StreamingLlm { sinks: 2, budget: Whole(7), every: Whole(3) };
        let mut held: Vec<usize> = Vec::new();
        for position in 0..50 {
            held.push(position);
            if (position + 1) % by.plan().every == 0 {
                let head = KeepHead { layer: 0, head: 0, positions: &held, mass: &[] };
                let kept = by.keep(&[head], 7).expect("keeps").remove(0);
                held = kept.into_iter().map(|i| held[i]).collect();
                assert!(position < 7 || held.len() == 7);
            }
        }
        assert_eq!(held, [0, 1, 43, 44, 45, 46, 47, 48, 49]);
    }

    #[test]
    fn sinks_leave_room() {
        let make = |sinks: usize| (method().make)(serde_json::json!({ "budget": 8, "sinks": sinks }), 0);
        assert!(make(7).is_ok());
        let said = make(8).expect_err("refused").what;
        assert!(said.contains("sinks 8") && said.contains("budget of 8"), "{said}");
    }

    #[test]
    fn slots_out_of_order_are_refused() {
        let head = KeepHead { layer: 3, head: 1, positions: &[4, 4], mass: &[] };
        let said = StreamingLlm::default().keep(&[head], 2).expect_err("refused").what;
        assert!(said.contains("layer 3, head 1") && said.contains("position 4"), "{said}");
    }
}

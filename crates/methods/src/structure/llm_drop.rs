//! LLM-Drop: the parts go that change their input least.
//!
//! **Paper.** Shwai He, Guoheng Sun, Zheyu Shen, Ang Li, "What Matters in Transformers? Not All Attention is Needed",
//! 2024, arXiv 2406.15786.
//!
//! **Idea.** `S = 1 - mean over tokens of cos(x, y)` for a part with input `x` (the residual stream before it, norm
//! included in the part) and output `y` (the stream after it). The parts with the smallest `S` go, chosen in one shot.
//!
//! **Shapes and units.** A mean cosine for each part, from -1 to 1; the answer is `S`, from 0 to 2.
//!
//! **Cost.** None to speak of; the statistics are one pass over the calibration text.
//!
//! **Departs.** Nothing.

use lacuna_contract::{Ask, Card, Compete, Made, Method, MethodError, Structure, StructureAsk, Unit};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LlmDrop {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "llm-drop",
            paper: "He, Sun, Shen, Li: What Matters in Transformers? Not All Attention is Needed, 2024",
            arxiv: "2406.15786",
            summary: "The blocks, attentions or FFNs go whose outputs are most like their inputs.",
            system: Some(314),
            verb: "drop",
            needs: &[Ask::Similarity(Unit::Block)],
            abilities: &[],
        },
        keys: make::keys::<LlmDrop>,
        make: |given| Ok(Made::Structure(Box::new(make::parameters::<LlmDrop>("llm-drop", given)?))),
    }
}

impl Structure for LlmDrop {
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        if ask.width != 0 {
            return Err(MethodError::new("llm-drop scores whole parts, not heads or channels"));
        }
        let alike = ask.stats.similarity(ask.unit)?;
        if !alike.is_finite() {
            let what = format!("the similarity of layer {} is {alike}, not a finite number", ask.layer);
            return Err(MethodError::new(what));
        }
        Ok(vec![1.0 - alike])
    }

    fn compete(&self) -> Compete {
        Compete::Model
    }

    fn keeps_means(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_contract::{Gathered, Stats};

    #[test]
    fn agrees_with_brute_force_one_less_the_cosine() {
        for alike in [-1.0, 0.0, 0.25, 1.0, f64::NAN] {
            let found = [(Ask::Similarity(Unit::Ffn), Gathered::Number(alike))];
            let stats = Stats { tokens: 3, found: &found, gradients: &[], sequences: 0, worked: None };
            let (unit, layer, count, width, reader) = (Unit::Ffn, 2, 1, 0, None);
            let ask = StructureAsk { unit, layer, count, width, reader, writers: &[], stats, writer_stats: &[] };
            match (LlmDrop {}).score(&ask) {
                Ok(scores) => assert_eq!(scores, [1.0 - alike]),
                Err(e) => assert!(alike.is_nan() && e.what.contains("layer 2"), "{e}"),
            }
            assert!(LlmDrop {}.score(&StructureAsk { unit: Unit::Block, ..ask }).is_err(), "another part's statistic");
            assert!(LlmDrop {}.score(&StructureAsk { width: 4, ..ask }).is_err());
        }
    }
}

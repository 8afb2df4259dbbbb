//! LLM-Drop: the parts go that change their input least.
//!
//! **Paper.** Shwai He, Guoheng Sun, Zheyu Shen, Ang Li, "What Matters in Transformers? Not All Attention is Needed", 2024,
//! arXiv 2406.15786.
//!
//! **Idea.** `S = 1 - mean over tokens of cos(x, y)` for a part with input `x` (the residual stream before it, norm included in the part) and
//! output `y` (the stream after it). The parts with the smallest `S` go, chosen in one shot.
//!
//! **Shapes and units.** A mean cosine for each layer, from -1 to 1, `None` where the layer has no such part; the answer is layer indices.
//!
//! **Cost.** None to speak of; the statistics are one pass over the calibration text.
//!
//! **Departs.** Nothing.

use lacuna_contract::{Card, Drop, DropPart, DropStats, Made, Method, MethodError, Needs, Verb};
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
            verb: Verb::Drop,
            needs: Needs { similarity: true, ..Needs::default() },
        },
        make: |given| Ok(Made::Drop(Box::new(make::parameters::<LlmDrop>("llm-drop", given)?))),
    }
}

impl Drop for LlmDrop {
    fn drop(&self, part: DropPart, count: usize, stats: &DropStats<'_>) -> Result<Vec<usize>, MethodError> {
        let mut layers: Vec<(usize, f64)> =
            stats.similarity.iter().enumerate().filter_map(|(l, s)| s.map(|s| (l, s))).collect();
        if let Some((l, s)) = layers.iter().find(|(_, s)| !s.is_finite()) {
            return Err(MethodError::new(format!("the similarity of layer {l} is {s}, not a finite number")));
        }
        if count > layers.len() {
            return Err(MethodError::new(format!(
                "{count} to drop; only {} layers have the part {part:?}",
                layers.len()
            )));
        }
        layers.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut out: Vec<usize> = layers[..count].iter().map(|(l, _)| *l).collect();
        out.sort_unstable();
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    fn ask(similarity: &[Option<f64>], count: usize) -> Result<Vec<usize>, MethodError> {
        LlmDrop {}.drop(DropPart::Block, count, &DropStats { similarity })
    }

    /// No layer that stays is more similar than one that goes.
    #[test]
    fn agrees_with_brute_force_comparison() {
        let mut rng = Rng::new(5);
        for n in 1..12 {
            let all: Vec<Option<f64>> = (0..n).map(|_| (rng.below(4) > 0).then(|| rng.below(5) as f64 / 5.0)).collect();
            let present = all.iter().flatten().count();
            for count in 0..=present {
                let gone = ask(&all, count).expect("drops");
                assert_eq!(gone.len(), count);
                assert!(gone.windows(2).all(|w| w[0] < w[1]));
                for g in &gone {
                    for stays in (0..n).filter(|l| !gone.contains(l)) {
                        assert!(all[stays].is_none_or(|s| s <= all[*g].expect("present")));
                    }
                }
            }
            assert!(ask(&all, present + 1).is_err());
        }
        assert_eq!(ask(&[Some(0.5), Some(0.9), Some(0.9)], 1), Ok(vec![1]));
        assert!(ask(&[Some(f64::NAN)], 1).is_err());
    }
}

//! Multiple choice: `{id, ctx, choices, label}`. The choice of highest likelihood after the context is the model's
//! answer.

use serde_json::{Map, Value};

use super::{Answer, Kind, Measures, Question};

/// Multiple choice.
pub struct Choice;

impl Kind for Choice {
    fn name(&self) -> &'static str {
        "choice"
    }

    fn read(&self, line: &Map<String, Value>) -> Option<Result<Question, String>> {
        let (ctx, choices, label) = (line.get("ctx")?, line.get("choices")?, line.get("label")?);
        Some(question(ctx, choices, label))
    }

    fn measure(&self, answered: &[(Question, Vec<Answer>)]) -> Measures {
        let best = |weight: &dyn Fn(&str) -> f64| {
            let right = answered.iter().filter(|(q, answers)| {
                let scores = answers.iter().zip(&q.continuations).map(|(a, c)| a.log_likelihood / weight(c));
                let top = scores.enumerate().fold((0, f64::NEG_INFINITY), |t, s| if s.1 > t.1 { s } else { t });
                top.0 == q.label && top.1 > f64::NEG_INFINITY
            });
            Some(right.count() as f64 / answered.len() as f64)
        };
        Measures { acc: best(&|_| 1.0), acc_norm: best(&|c| c.trim_start().len().max(1) as f64), ppl: None }
    }
}

fn question(ctx: &Value, choices: &Value, label: &Value) -> Result<Question, String> {
    let context = ctx.as_str().ok_or("ctx is no text")?.to_string();
    let choices = choices.as_array().ok_or("choices is no list")?;
    let label = label.as_u64().ok_or("label is no whole number")? as usize;
    if label >= choices.len() {
        return Err(format!("label {label} of {} choices", choices.len()));
    }
    // A word is parted from what stands before it by one space, where the file gives none.
    let parted =
        |c: &str| context.is_empty() || context.ends_with(char::is_whitespace) || c.starts_with(char::is_whitespace);
    let continuation = |c: &Value| {
        let c = c.as_str().ok_or("a choice is no text")?;
        Ok::<_, String>(if parted(c) { c.to_string() } else { format!(" {c}") })
    };
    let continuations = choices.iter().map(continuation).collect::<Result<_, _>>()?;
    Ok(Question { context, continuations, label })
}

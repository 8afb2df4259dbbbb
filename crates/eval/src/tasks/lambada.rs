//! LAMBADA: `{text}`. The last word is right where the model finds each of its tokens likeliest.

use serde_json::{Map, Value};

use super::{Answer, Kind, Measures, Question};

/// Predicting the last word.
pub struct Lambada;

impl Kind for Lambada {
    fn name(&self) -> &'static str {
        "lambada"
    }

    fn read(&self, line: &Map<String, Value>) -> Option<Result<Question, String>> {
        let text = line.get("text").filter(|_| !line.contains_key("choices"))?;
        Some(question(text))
    }

    fn measure(&self, answered: &[(Question, Vec<Answer>)]) -> Measures {
        let n = answered.len() as f64;
        let right = answered.iter().filter(|(_, a)| a[0].greedy).count() as f64;
        let nll = -answered.iter().map(|(_, a)| a[0].log_likelihood).sum::<f64>() / n;
        Measures { acc: Some(right / n), acc_norm: None, ppl: Some(nll.exp()) }
    }
}

fn question(text: &Value) -> Result<Question, String> {
    let text = text.as_str().ok_or("text is no text")?.trim_end();
    let at = text.rfind(char::is_whitespace).filter(|&at| !text[..at].trim().is_empty());
    let at = at.ok_or_else(|| format!("'{text}' has no word before the last"))?;
    Ok(Question { context: text[..at].to_string(), continuations: vec![text[at..].to_string()], label: 0 })
}

//! Calibration texts: plain files, conversations that go through the model's own chat template, several of them mixed
//! by weight.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use lacuna_checkpoint::{ChatTemplate, TemplateError, Tokenizer};
use serde_json::Value;

use crate::common::{self, Model};

/// A file, and its share of the calibration relative to the others'.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighed {
    /// Text; conversations where the name ends in `.jsonl`.
    pub path: PathBuf,
    /// Above 0.
    pub weight: f64,
}

impl FromStr for Weighed {
    type Err = String;

    /// `FILE` or `FILE=WEIGHT`. A file whose whole name is there is that file.
    fn from_str(s: &str) -> Result<Weighed, String> {
        let whole = || Weighed { path: s.into(), weight: 1.0 };
        let Some((path, weight)) = s.rsplit_once('=').filter(|_| !Path::new(s).exists()) else { return Ok(whole()) };
        match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() && weight > 0.0 => Ok(Weighed { path: path.into(), weight }),
            Ok(_) => Err(format!("a weight of {weight}: give a number above 0, as in chats.jsonl=3")),
            Err(_) => Ok(whole()),
        }
    }
}

/// The tokens to calibrate on: of the one text, or of several in turn, `len` tokens at a time, so that every part of
/// the mixture holds them by their weights; it ends where the first of them does. Without any the carried text.
pub fn tokens(
    model: &Model,
    tokenizer: &Tokenizer,
    texts: &[Weighed],
    carried: &str,
    len: usize,
) -> anyhow::Result<Vec<u32>> {
    let mut all = Vec::new();
    for text in texts {
        all.push((read(model, tokenizer, &text.path)?, text.weight));
    }
    Ok(match all.len() {
        0 => tokenizer.encode(carried, false)?,
        1 => all.remove(0).0,
        _ => {
            if let Some(short) = all.iter().position(|t| t.0.len() < len) {
                anyhow::bail!(
                    "{}: {} tokens; a text that is mixed with others needs at least {len}",
                    texts[short].path.display(),
                    all[short].0.len()
                );
            }
            let (mixed, ended) = mix(&all, len);
            common::say_once(format!(
                "{} texts mixed by weight: {} tokens, up to where {} ends",
                texts.len(),
                mixed.len(),
                texts[ended].path.display()
            ));
            mixed
        }
    })
}

/// Pieces of `len` tokens, always of the text that is furthest behind its share; and whose end ended it.
fn mix(texts: &[(Vec<u32>, f64)], len: usize) -> (Vec<u32>, usize) {
    let sum: f64 = texts.iter().map(|t| t.1).sum();
    let mut taken = vec![0usize; texts.len()];
    let mut mixed = Vec::new();
    loop {
        let pieces = taken.iter().sum::<usize>() + 1;
        let behind = |i: &usize| texts[*i].1 / sum * pieces as f64 - taken[*i] as f64;
        let next = (0..texts.len()).rev().max_by(|a, b| behind(a).total_cmp(&behind(b))).unwrap_or(0);
        let Some(piece) = texts[next].0.get(taken[next] * len..(taken[next] + 1) * len) else { return (mixed, next) };
        mixed.extend_from_slice(piece);
        taken[next] += 1;
    }
}

/// The tokens of a file; conversations where its name ends in `.jsonl`.
pub fn read(model: &Model, tokenizer: &Tokenizer, path: &Path) -> anyhow::Result<Vec<u32>> {
    let text = common::read_text(path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if path.extension().is_none_or(|e| e != "jsonl") {
        return Ok(tokenizer.encode(text, false)?);
    }
    let template = match ChatTemplate::open(&model.checkpoint) {
        Ok(template) => Some(template),
        Err(TemplateError::Missing(_)) => None,
        Err(e) => return Err(e).with_context(|| format!("the chat template of {}", model.name)),
    };
    if template.is_none() {
        common::say_once(format!(
            "note: {} has no chat template: of the conversations in {} only what is said is read",
            model.name,
            path.display()
        ));
    }
    let mut tokens = Vec::new();
    for (at, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let one = conversation(line, template.as_ref(), tokenizer);
        let one = one.with_context(|| format!("{}, line {}", path.display(), at + 1))?;
        tokens.extend(tokenizer.encode(&one, false)?);
    }
    Ok(tokens)
}

/// A line's text: that of `text`, or `messages` as the model's template writes them.
fn conversation(line: &str, template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> anyhow::Result<String> {
    let line: Value = serde_json::from_str(line).context("this is no JSON")?;
    match (line.get("text").and_then(Value::as_str), line.get("messages")) {
        (Some(text), _) => Ok(format!("{text}\n")),
        (None, Some(messages @ Value::Array(said))) if !said.is_empty() => match template {
            Some(t) => {
                let word = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id)).unwrap_or("");
                Ok(t.render_json(messages, false, word(tokenizer.bos()), word(tokenizer.eos()), None)?)
            }
            // A model without a template has never seen one.
            None => {
                let said = said.iter().filter_map(|m| m.get("content").and_then(Value::as_str));
                Ok(said.collect::<Vec<_>>().join("\n\n") + "\n")
            }
        },
        _ => anyhow::bail!(
            "neither \"text\" nor \"messages\": a line is {{\"messages\": [{{\"role\": .., \"content\": ..}}]}}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_stand_behind_the_last_equals_sign() {
        let of = |s: &str| s.parse::<Weighed>();
        assert_eq!(of("a.txt"), Ok(Weighed { path: "a.txt".into(), weight: 1.0 }));
        assert_eq!(of("a=b.txt=2.5"), Ok(Weighed { path: "a=b.txt".into(), weight: 2.5 }));
        assert_eq!(of("a=b.txt"), Ok(Weighed { path: "a=b.txt".into(), weight: 1.0 }));
        assert!(of("a.txt=0").is_err() && of("a.txt=-1").is_err() && of("a.txt=inf").is_err());
    }

    #[test]
    fn every_part_of_a_mixture_holds_all_texts() {
        let text = |what: u32, n: usize| vec![what; n];
        let (mixed, ended) = mix(&[(text(1, 100), 1.0), (text(2, 1000), 3.0)], 10);
        let order: Vec<u32> = mixed.chunks(10).map(|c| c[0]).collect();
        assert_eq!(ended, 0);
        assert_eq!(order.iter().filter(|w| **w == 1).count(), 10);
        for part in order.chunks(4).filter(|p| p.len() == 4) {
            assert_eq!(part.iter().filter(|w| **w == 1).count(), 1, "{order:?}");
        }
        let (mixed, ended) = mix(&[(text(1, 5), 1.0), (text(2, 1000), 1.0)], 10);
        assert!(mixed.is_empty() && ended == 0);
    }
}

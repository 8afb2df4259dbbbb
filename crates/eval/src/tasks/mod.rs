//! Tasks: questions with a known answer, one JSON object a line.
//!
//! A new kind of task is a file here and a line in [`KINDS`].

mod choice;
mod lambada;

use lacuna_format::Weights;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::stream::{Means, Reader, Streams, must_spill, score, steps};
use crate::{EvalError, loss};

/// Every kind of task.
pub const KINDS: &[&dyn Kind] = &[&choice::Choice, &lambada::Lambada];

/// A kind of task, recognised by the keys of its lines.
pub trait Kind: Sync {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// The question of a line, or `None` where the keys are another kind's.
    fn read(&self, line: &Map<String, Value>) -> Option<Result<Question, String>>;

    /// Measures from all questions and their answers.
    fn measure(&self, answered: &[(Question, Vec<Answer>)]) -> Measures;
}

/// What a model is asked: how likely is each continuation?
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// What stands before.
    pub context: String,
    /// What may follow, white space at its beginning included.
    pub continuations: Vec<String>,
    /// Which of them is right.
    pub label: usize,
}

/// What a model says about a continuation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// The sum of its tokens' log likelihoods, nats.
    pub log_likelihood: f64,
    /// Whether each of its tokens was the likeliest.
    pub greedy: bool,
}

/// What a task measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Measures {
    /// Fraction answered rightly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc: Option<f64>,
    /// Fraction answered rightly where likelihoods are divided by the continuation's bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// `exp` of the mean negative log likelihood of the right continuations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ppl: Option<f64>,
}

/// A task's result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TaskResult {
    /// The kind of task.
    pub kind: &'static str,
    /// Questions.
    pub items: usize,
    /// What was measured.
    #[serde(flatten)]
    pub measures: Measures,
    /// The standard error of `acc`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_stderr: Option<f64>,
}

/// What a tokenizer does: the tokens of a text, nothing added.
pub type Encode<'a> = &'a dyn Fn(&str) -> Result<Vec<u32>, String>;

/// How to put questions to a model.
#[derive(Clone, Default)]
pub struct Exam<'a> {
    /// A token before every context.
    pub bos: Option<u32>,
    /// The most tokens of a sequence; longer contexts lose their beginning.
    pub ctx: Option<usize>,
    /// How much memory may be used.
    pub room: Means,
    /// Told how many of how many steps are done.
    pub progress: Option<&'a dyn Fn(usize, usize)>,
    /// Who reads the questions in the model's place; nobody: its weights, block by block.
    pub reader: Option<Reader<'a>>,
}

/// Reads questions, one JSON object a line; all must be of one kind.
pub fn read(jsonl: &str) -> Result<(&'static dyn Kind, Vec<Question>), EvalError> {
    let mut found: Option<&'static dyn Kind> = None;
    let mut questions = Vec::new();
    for (n, line) in jsonl.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let bad = |what: String| EvalError::new(format!("line {}: {what}", n + 1));
        let value: Map<String, Value> = lacuna_checkpoint::json::parse(line.as_bytes()).map_err(bad)?;
        let kinds = KINDS.iter().filter(|k| found.is_none_or(|f| f.name() == k.name()));
        let (kind, question) = kinds
            .filter_map(|k| Some((*k, k.read(&value)?)))
            .next()
            .ok_or_else(|| bad(format!("the keys of {} are not those of the task", keys(&value))))?;
        found = Some(kind);
        questions.push(question.map_err(bad)?);
    }
    found.map(|k| (k, questions)).ok_or_else(|| EvalError::new("the task has no questions"))
}

fn keys(map: &Map<String, Value>) -> String {
    map.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

impl Exam<'_> {
    /// Puts the questions of a file's text to a model.
    pub fn run(&self, jsonl: &str, encode: Encode<'_>, model: &dyn Weights) -> Result<TaskResult, EvalError> {
        let (kind, questions) = read(jsonl)?;
        let mut asked = Vec::new();
        for (n, q) in questions.iter().enumerate() {
            for c in &q.continuations {
                let one = self.sequence(&q.context, c, encode);
                asked.push(one.map_err(|what| EvalError::new(format!("question {}: {what}", n + 1)))?);
            }
        }
        let mut answers = self.answers(&asked, model)?.into_iter();
        let answered: Vec<_> = questions
            .into_iter()
            .map(|q| {
                let n = q.continuations.len();
                (q, answers.by_ref().take(n).collect::<Vec<_>>())
            })
            .collect();
        let measures = kind.measure(&answered);
        let items = answered.len();
        let stderr = |p: f64| (p * (1.0 - p) / (items.max(2) - 1) as f64).sqrt();
        Ok(TaskResult { kind: kind.name(), items, measures, acc_stderr: measures.acc.map(stderr) })
    }

    /// Tokens of context and continuation, and how many are the continuation's. White space at the end of the context
    /// counts as the continuation's beginning, since tokens carry the space before a word.
    fn sequence(&self, context: &str, continuation: &str, encode: Encode<'_>) -> Result<(Vec<u32>, usize), String> {
        let before = context.trim_end();
        let whole = encode(&format!("{context}{continuation}"))?;
        let head = encode(before)?.len().min(whole.len());
        let target = whole.len() - head;
        if target == 0 {
            return Err(format!("'{continuation}' adds no token"));
        }
        let mut tokens: Vec<u32> = self.bos.into_iter().chain(whole).collect();
        if let Some(most) = self.ctx.filter(|&m| m < tokens.len()) {
            // BOS stays in front of what is left.
            let keep = most.saturating_sub(usize::from(self.bos.is_some()));
            tokens = self.bos.into_iter().chain(tokens[tokens.len() - keep..].iter().copied()).collect();
        }
        if tokens.len() <= target {
            return Err(format!(
                "nothing stands before the {target} tokens of '{continuation}'; a BOS token would help"
            ));
        }
        Ok((tokens, target))
    }

    /// The answers to tokenized questions: sequences, and how many of the last tokens are the continuation's.
    fn answers(&self, asked: &[(Vec<u32>, usize)], model: &dyn Weights) -> Result<Vec<Answer>, EvalError> {
        let sequences: Vec<Vec<u32>> = asked.iter().map(|a| a.0.clone()).collect();
        let (mut done, total) = (0, steps(model, &sequences));
        let mut step = || {
            done += 1;
            if let Some(p) = self.progress {
                p(done, total);
            }
        };
        let spill = must_spill(&[model], &sequences, &self.room)?;
        let mut streams = match self.reader {
            None => Streams::run(model, &sequences, spill, &self.room, &mut step)?,
            Some(reader) => Streams::read(model, &sequences, spill, &self.room, reader)?,
        };
        let mut wanted = Vec::new();
        for (s, (tokens, target)) in asked.iter().enumerate() {
            wanted.extend((tokens.len() - target..tokens.len()).map(|p| (streams.row(s, p - 1), tokens[p])));
        }
        let rows: Vec<usize> = wanted.iter().map(|w| w.0).collect();
        let found = score(&mut [(model, &mut streams)], &rows, |i, logits| {
            let next = wanted[i].1;
            (loss::nll(logits[0], next), loss::argmax(logits[0]) == next)
        })?;
        let mut found = found.into_iter();
        let answer = |(_, target): &(Vec<u32>, usize)| {
            found.by_ref().take(*target).fold(Answer { log_likelihood: 0.0, greedy: true }, |a, (nll, hit)| Answer {
                log_likelihood: a.log_likelihood - nll,
                greedy: a.greedy && hit,
            })
        };
        Ok(asked.iter().map(answer).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(text: &str) -> Result<Vec<u32>, String> {
        Ok(text.bytes().map(u32::from).collect())
    }

    #[test]
    fn lines_find_their_kind() {
        let (kind, q) =
            read("{\"id\":1,\"ctx\":\"Two and two\",\"choices\":[\"make four\",\" make five\"],\"label\":0}\n\n")
                .unwrap();
        assert_eq!((kind.name(), q.len()), ("choice", 1));
        assert_eq!(q[0].continuations, [" make four", " make five"]);
        let (kind, q) = read("{\"text\":\"She opened the door\"}").unwrap();
        assert_eq!(
            (kind.name(), &q[0].context[..], &q[0].continuations[0][..]),
            ("lambada", "She opened the", " door")
        );
        for (text, what) in [
            ("", "no questions"),
            (
                "{\"text\":\"a b\"}\n{\"ctx\":\"\",\"choices\":[\"a\",\"b\"],\"label\":0}",
                "line 2: the keys of ctx, choices, label",
            ),
            ("{\"ctx\":\"a\",\"choices\":[\"b\",\"c\"],\"label\":2}", "line 1: label 2 of 2 choices"),
            ("{\"ctx\":\"a\",\"choices\":[],\"label\":0}", "line 1: label 0 of 0 choices"),
            ("{\"text\":\"word\"}", "line 1: "),
            ("{\"text\":", "line 1: "),
        ] {
            let e = read(text).err().unwrap().to_string();
            assert!(e.contains(what), "{e}");
        }
    }

    #[test]
    fn sequences() {
        let exam = Exam::default();
        let (tokens, target) = exam.sequence("ab ", "c", &letters).unwrap();
        assert_eq!((tokens, target), (vec![97, 98, 32, 99], 2), "the space belongs to the word");
        assert_eq!(exam.sequence("ab", " c", &letters).unwrap().1, 2);
        assert!(exam.sequence("", "c", &letters).unwrap_err().contains("BOS"));
        let exam = Exam { bos: Some(1), ctx: Some(4), ..Exam::default() };
        assert_eq!(exam.sequence("", "c", &letters).unwrap(), (vec![1, 99], 1));
        assert_eq!(exam.sequence("abcdef", "g", &letters).unwrap(), (vec![1, 101, 102, 103], 1));
        assert!(exam.sequence("a", "bcde", &letters).is_err(), "the continuation alone fills the context");
    }

    #[test]
    fn measures() {
        let q =
            |label| Question { context: "x".into(), continuations: vec![" long answer".into(), " no".into()], label };
        let a = |l: f64| Answer { log_likelihood: l, greedy: l > -1.0 };
        let answered = [(q(0), vec![a(-5.0), a(-4.0)]), (q(1), vec![a(-5.0), a(-4.0)]), (q(1), vec![a(-9.0), a(-8.0)])];
        let m = choice::Choice.measure(&answered);
        assert_eq!((m.acc, m.acc_norm), (Some(2.0 / 3.0), Some(1.0 / 3.0)));
        let q = Question { context: "x".into(), continuations: vec![" y".into()], label: 0 };
        let m = lambada::Lambada.measure(&[(q.clone(), vec![a(-0.5)]), (q, vec![a(-1.5)])]);
        assert_eq!((m.acc, m.ppl), (Some(0.5), Some(1f64.exp())));
    }
}

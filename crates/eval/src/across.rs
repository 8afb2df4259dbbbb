//! Models of different vocabularies on one text: in nats a byte, since neither tokens nor divergences are common to them.
//!
//! The text is cut in windows of the dense model's tokens. The other model reads the same letters in its own, and
//! predicts from the same byte on: the first token of a window is nobody's to predict.

use lacuna_checkpoint::Tokenizer;
use lacuna_format::Weights;
use serde::Serialize;

use crate::stream::{Reader, Streams, must_spill, score, steps};
use crate::{Eval, EvalError, loss};

/// A model and what cuts its texts.
#[derive(Clone, Copy)]
pub struct Speaker<'a> {
    /// The model.
    pub weights: &'a dyn Weights,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
}

/// What a text says about a model, told so that models of any vocabulary can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Told {
    /// Mean negative log likelihood, nats a byte of the text.
    pub nats_a_byte: f64,
    /// Mean negative log likelihood, nats a token of its own.
    pub nll: f64,
    /// Tokens of its own that were predicted.
    pub tokens: usize,
    /// Their bytes.
    pub bytes: usize,
}

impl Told {
    /// From `nll`, nats a token, over `tokens` tokens of `bytes` bytes.
    pub fn new(nll: f64, tokens: usize, bytes: usize) -> Told {
        Told { nats_a_byte: nll * tokens as f64 / bytes.max(1) as f64, nll, tokens, bytes }
    }

    /// Bits a byte.
    pub fn bits_a_byte(&self) -> f64 {
        self.nats_a_byte / std::f64::consts::LN_2
    }
}

/// Two models of different vocabularies on the same text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Across {
    /// The model.
    pub model: Told,
    /// The dense one.
    pub dense: Told,
    /// Mean over the dense model's predictions of the probability that it gives to tokens which the model lacks.
    pub missing_mass: f64,
    /// How many those are.
    pub missing: usize,
    /// Windows.
    pub windows: usize,
}

impl Across {
    /// The model's loss for as much text as a token of the dense model has: nats a token of the dense model.
    pub fn nll_in_dense_tokens(&self) -> f64 {
        self.model.nats_a_byte * self.dense.bytes as f64 / self.dense.tokens.max(1) as f64
    }
}

/// A window and the first of its tokens that is predicted.
struct Window {
    tokens: Vec<u32>,
    first: usize,
}

impl Window {
    /// The same text as `window` of another tokenizer, with as much of it to predict.
    fn retold(
        window: &[u32],
        bos: bool,
        old: &Tokenizer,
        new: &Tokenizer,
        context: usize,
    ) -> Result<Window, EvalError> {
        let length = |t: &Tokenizer, id: u32| t.token_bytes(id).len();
        let text = old.decode_with_special(&window[usize::from(bos)..]);
        // Windows begin and end anywhere, within letters of several bytes as well.
        let text = text.trim_matches('\u{FFFD}');
        let mut tokens = if bos { new.bos().into_iter().collect() } else { Vec::new() };
        let (before, seen) = (tokens.len(), if bos { 0 } else { length(old, window[0]) });
        let fresh = new.encode(text, false).map_err(|e| EvalError::new(e.to_string()))?;
        tokens.extend(fresh.into_iter().take(context.saturating_sub(before)));
        let mut first = before;
        let mut read = 0;
        while first < tokens.len() && (read < seen || first == 0) {
            read += length(new, tokens[first]);
            first += 1;
        }
        Ok(Window { tokens, first })
    }
}

impl Eval<'_> {
    /// Holds `model` against `dense` on the text of `tokens`, which are the dense model's.
    pub fn across(&self, tokens: &[u32], model: Speaker<'_>, dense: Speaker<'_>) -> Result<Across, EvalError> {
        let plain = crate::cut(tokens, self.ctx, self.windows, self.bos)?;
        let context = model.weights.spec().context;
        let bos = self.bos.is_some();
        let retold = plain
            .iter()
            .map(|w| Window::retold(w, bos, dense.tokenizer, model.tokenizer, context))
            .collect::<Result<Vec<_>, _>>()?;
        let plain: Vec<Window> = plain.into_iter().map(|tokens| Window { tokens, first: 1 }).collect();
        let lost = missing(dense, model.tokenizer);
        let mass = |row: &[f32]| match lost.as_slice() {
            [] => 0.0,
            lost => {
                let gone: Vec<f32> = lost.iter().map(|&id| row[id]).collect();
                (loss::log_sum_exp(&gone) - loss::log_sum_exp(row)).exp()
            }
        };
        let all = steps(dense.weights, &texts(&plain)) + steps(model.weights, &texts(&retold));
        let mut done = 0;
        let mut step = || {
            done += 1;
            self.progress.iter().for_each(|p| p(done, all));
        };
        let wrong = |e: EvalError| EvalError { what: format!("the dense model: {}", e.what), ..e };
        let (told, missing_mass) = self.losses(dense, None, &plain, mass, &mut step).map_err(wrong)?;
        let (model, _) = self.losses(model, self.reader, &retold, |_| 0.0, &mut step)?;
        Ok(Across { model, dense: told, missing_mass, missing: lost.len(), windows: plain.len() })
    }

    /// The loss on windows, and the mean of `also` over the rows of logits.
    fn losses(
        &self,
        of: Speaker<'_>,
        reader: Option<Reader<'_>>,
        windows: &[Window],
        also: impl Fn(&[f32]) -> f64 + Sync,
        step: &mut dyn FnMut(),
    ) -> Result<(Told, f64), EvalError> {
        let sequences = texts(windows);
        let spill = must_spill(&[of.weights], &sequences, &self.room)?;
        let mut streams = match reader {
            None => Streams::run(of.weights, &sequences, spill, &self.room, step)?,
            Some(reader) => Streams::read(of.weights, &sequences, spill, &self.room, reader)?,
        };
        let (mut rows, mut next) = (Vec::new(), Vec::new());
        for (s, w) in windows.iter().enumerate() {
            for p in w.first..w.tokens.len() {
                rows.push(streams.row(s, p - 1));
                next.push(w.tokens[p]);
            }
        }
        if rows.is_empty() {
            return Err(EvalError::new("the text leaves no token to predict"));
        }
        let found = score(&mut [(of.weights, &mut streams)], &rows, |i, logits| {
            (loss::nll(logits[0], next[i]), also(logits[0]))
        })?;
        let n = found.len();
        let mean = |k: fn(&(f64, f64)) -> f64| found.iter().map(k).sum::<f64>() / n as f64;
        let bytes = next.iter().map(|&id| of.tokenizer.token_bytes(id).len()).sum();
        Ok((Told::new(mean(|f| f.0), n, bytes), mean(|f| f.1)))
    }
}

fn texts(windows: &[Window]) -> Vec<Vec<u32>> {
    windows.iter().map(|w| w.tokens.clone()).collect()
}

/// Rows of the dense model's head whose token the other tokenizer lacks.
fn missing(dense: Speaker<'_>, other: &Tokenizer) -> Vec<usize> {
    let has = |id: &usize| dense.tokenizer.token_text(*id as u32).is_some_and(|t| other.id_of(t).is_some());
    (0..dense.weights.spec().vocab).filter(|id| !has(id)).collect()
}

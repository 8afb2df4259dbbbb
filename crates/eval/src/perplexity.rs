//! Loss on a text, and how far a model's predictions lie from the dense model's.

use lacuna_format::Weights;
use serde::Serialize;

use crate::stream::{Means, Reader, Streams, must_spill, score, steps};
use crate::{EvalError, cut, loss};

/// How to evaluate.
#[derive(Clone, Default)]
pub struct Eval<'a> {
    /// Tokens of a window, BOS included.
    pub ctx: usize,
    /// Windows; absent: all that the text gives.
    pub windows: Option<usize>,
    /// Begins each window with this token.
    pub bos: Option<u32>,
    /// How much memory may be used.
    pub room: Means,
    /// Told how many of how many steps are done.
    pub progress: Option<&'a dyn Fn(usize, usize)>,
    /// Who reads the text in the place of the model that is judged; nobody: its weights, block by block. The dense model
    /// beside it is always read so.
    pub reader: Option<Reader<'a>>,
}

/// What a text says about a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// `exp(nll)`.
    pub ppl: f64,
    /// Mean negative log likelihood, nats a token.
    pub nll: f64,
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Tokens of a window.
    pub ctx: usize,
    /// Windows.
    pub windows: usize,
    /// The comparison with the dense model, where one was made.
    #[serde(flatten)]
    pub against: Option<Against>,
    /// Mean loss of each window: what a paired comparison of two models needs.
    #[serde(skip)]
    pub window_nll: Vec<f64>,
    /// Mean KL(dense || model) of each window, where a comparison was made.
    #[serde(skip)]
    pub window_kl: Vec<f64>,
}

/// A model beside the dense one on the same text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Against {
    /// Mean KL(dense || model), nats a token.
    pub kl_mean: f64,
    /// The KL that 99 of 100 positions stay below.
    pub kl_p99: f64,
    /// Fraction of positions at which both find the same token likeliest.
    pub top1_agree: f64,
    /// Perplexity of the dense model.
    pub ppl_dense: f64,
    /// Mean loss of the dense model, nats a token.
    pub nll_dense: f64,
}

/// A dense model's answers on a text, kept for comparing models with it. Only its residual streams are kept: logits are
/// made again in chunks.
pub struct Reference<'w> {
    weights: &'w dyn Weights,
    windows: Vec<Vec<u32>>,
    streams: Streams,
}

impl Judged {
    /// From the loss of every predicted token, a list a window; none of them is empty.
    pub fn of_losses(windows: &[Vec<f64>], ctx: usize) -> Judged {
        let mean = |x: &mut dyn Iterator<Item = f64>| {
            let (n, sum) = x.fold((0usize, 0.0), |(n, sum), x| (n + 1, sum + x));
            sum / n as f64
        };
        let nll = mean(&mut windows.iter().flatten().copied());
        Judged {
            ppl: nll.exp(),
            nll,
            tokens: windows.iter().map(Vec::len).sum(),
            ctx,
            windows: windows.len(),
            against: None,
            window_nll: windows.iter().map(|w| mean(&mut w.iter().copied())).collect(),
            window_kl: Vec::new(),
        }
    }
}

impl Eval<'_> {
    /// Loss and perplexity of `model` on the tokens of a text.
    pub fn judge(&self, tokens: &[u32], model: &dyn Weights) -> Result<Judged, EvalError> {
        let windows = self.cut(tokens)?;
        self.measure(&windows, model, None, must_spill(&[model], &windows, &self.room)?)
    }

    /// The dense model's side of comparisons on this text; worth keeping where several models are compared with it.
    pub fn reference<'w>(&self, tokens: &[u32], dense: &'w dyn Weights) -> Result<Reference<'w>, EvalError> {
        let windows = self.cut(tokens)?;
        // As if for two: the model to come needs as much again.
        let spill = must_spill(&[dense, dense], &windows, &self.room)?;
        let streams = Streams::run(dense, &windows, spill, &self.room, &mut self.counter(steps(dense, &windows)))
            .map_err(|e| EvalError { what: format!("the dense model: {}", e.what), ..e })?;
        Ok(Reference { weights: dense, windows, streams })
    }

    /// Loss of `model` and its divergence from the dense model, window by window the ones that `dense` was made from.
    pub fn against(&self, model: &dyn Weights, dense: &mut Reference<'_>) -> Result<Judged, EvalError> {
        let (a, b) = (model.spec().vocab, dense.weights.spec().vocab);
        if a != b {
            return Err(EvalError::new(format!(
                "the model has {a} tokens in its vocabulary, the dense one {b}: there is no KL between them; compare \
                 them in nats a byte"
            )));
        }
        let spill = must_spill(&[model, dense.weights], &dense.windows, &self.room)?;
        let windows = std::mem::take(&mut dense.windows);
        let judged = self.measure(&windows, model, Some((dense.weights, &mut dense.streams)), spill);
        dense.windows = windows;
        judged
    }

    fn cut(&self, tokens: &[u32]) -> Result<Vec<Vec<u32>>, EvalError> {
        cut(tokens, self.ctx, self.windows, self.bos)
    }

    fn counter(&self, total: usize) -> impl FnMut() + '_ {
        let mut done = 0;
        move || {
            done += 1;
            if let Some(p) = self.progress {
                p(done, total);
            }
        }
    }

    fn measure(
        &self,
        windows: &[Vec<u32>],
        model: &dyn Weights,
        dense: Option<(&dyn Weights, &mut Streams)>,
        spill: bool,
    ) -> Result<Judged, EvalError> {
        let mut streams = match self.reader {
            None => Streams::run(model, windows, spill, &self.room, &mut self.counter(steps(model, windows)))?,
            Some(reader) => Streams::read(model, windows, spill, &self.room, reader)?,
        };
        let asked: Vec<(usize, u32)> = windows
            .iter()
            .enumerate()
            .flat_map(|(s, w)| w[1..].iter().enumerate().map(move |(p, &next)| (s, p, next)))
            .map(|(s, p, next)| (streams.row(s, p), next))
            .collect();
        let rows: Vec<usize> = asked.iter().map(|a| a.0).collect();
        let compared = dense.is_some();
        let mut nets = vec![(model, &mut streams)];
        nets.extend(dense);
        let found = score(&mut nets, &rows, |i, logits| {
            let (row, next) = (logits[0], asked[i].1);
            let beside = logits.get(1).map(|d| {
                [loss::kl(d, row), f64::from(u8::from(loss::argmax(d) == loss::argmax(row))), loss::nll(d, next)]
            });
            (loss::nll(row, next), beside.unwrap_or_default())
        })?;
        let n = found.len() as f64;
        let mean = |k: usize| found.iter().map(|f| f.1[k]).sum::<f64>() / n;
        let nll = found.iter().map(|f| f.0).sum::<f64>() / n;
        let of_window = |w: &[(f64, [f64; 3])]| w.iter().map(|f| f.0).sum::<f64>() / w.len() as f64;
        let kl_of_window = |w: &[(f64, [f64; 3])]| w.iter().map(|f| f.1[0]).sum::<f64>() / w.len() as f64;
        let each = found.len() / windows.len();
        let mut kl: Vec<f64> = found.iter().map(|f| f.1[0]).collect();
        kl.sort_by(f64::total_cmp);
        let kl_p99 = kl.get((kl.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or(0.0);
        Ok(Judged {
            ppl: nll.exp(),
            nll,
            tokens: found.len(),
            ctx: self.ctx,
            windows: windows.len(),
            against: compared.then(|| Against {
                kl_mean: mean(0),
                kl_p99,
                top1_agree: mean(1),
                ppl_dense: mean(2).exp(),
                nll_dense: mean(2),
            }),
            window_nll: found.chunks(each).map(of_window).collect(),
            window_kl: if compared { found.chunks(each).map(kl_of_window).collect() } else { Vec::new() },
        })
    }
}

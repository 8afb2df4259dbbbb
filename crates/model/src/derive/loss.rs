//! The head and the loss: mean next-token cross-entropy of one sequence, and its gradient before the final norm.

use std::rc::Rc;

use lacuna_base::{Mat, MatRef};
use lacuna_format::Weights;
use lacuna_kernels::{Activations, softmax_lanes};

use super::recorder::{Gradients, Recorder};
use super::rows::{chunks, copy, zeros};
use super::sink::GradientSink;
use crate::backend::Backend;
use crate::{Head, Lent, ModelError};

/// Bytes of logits that are there at a time, about.
const LOGITS_BYTES: usize = 16 << 20;

/// Cross-entropy of rows of logits against their targets: the sum of `-log softmax(row)[target]`, in nats; `logits`,
/// `[rows, vocab]`, become its gradient times `factor`: `(softmax - one at the target) · factor`. Panics where a target
/// is beyond the vocabulary.
#[track_caller]
pub fn cross_entropy(logits: &mut Mat, targets: &[u32], factor: f32) -> f64 {
    assert_eq!(logits.rows(), targets.len(), "a target for each row");
    let losses = chunks(logits.view_mut(), |first, mut rows| {
        let mut loss = 0.0f64;
        for i in 0..rows.rows() {
            let (row, target) = (rows.row_mut(i), targets[first + i] as usize);
            let score = f64::from(row[target]);
            loss += softmax_lanes(row) - score;
            row[target] -= 1.0;
            row.iter_mut().for_each(|x| *x *= factor);
        }
        loss
    });
    losses.iter().sum()
}

/// The head, which remembers: the decoder's own, over the recorder.
pub struct RecordedHead {
    recorder: Recorder,
    head: Head<Recorder>,
}

impl RecordedHead {
    /// Loads the final norm and the output projection (the embedding itself where they are tied).
    pub fn load(weights: &dyn Weights) -> Result<RecordedHead, ModelError> {
        let recorder = Recorder::default();
        let head = Head::load_on(&recorder, weights, Activations::Exact)?;
        Ok(RecordedHead { recorder, head })
    }

    /// The mean next-token loss of one sequence, in nats, from the residual stream `x` after the last block,
    /// `[tokens, hidden]`; with the gradient of `x`. Logits are made some rows at a time. The last token predicts
    /// nothing: its row's gradient is 0.
    #[track_caller]
    pub fn backward(
        &self,
        x: MatRef<'_>,
        tokens: &[u32],
        sink: &mut dyn GradientSink,
    ) -> Result<(f64, Lent), ModelError> {
        let step = (LOGITS_BYTES / (4 * self.head.vocab.max(1))).clamp(16, 1024);
        self.backward_by(step, x, tokens, sink)
    }

    /// The same with logits of `step` rows at a time.
    fn backward_by(
        &self,
        step: usize,
        x: MatRef<'_>,
        tokens: &[u32],
        sink: &mut dyn GradientSink,
    ) -> Result<(f64, Lent), ModelError> {
        assert_eq!(x.rows(), tokens.len(), "a row for each token");
        let (n, vocab) = (tokens.len().saturating_sub(1), self.head.vocab);
        if n == 0 {
            return Err(ModelError::Short { tokens: tokens.len() });
        }
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(ModelError::Token { token, vocab });
        }
        let read = self.recorder.upload(x);
        let h = self.head.normed(&read);
        let normed = self.recorder.take();
        let cols = h.value.cols();
        let mut dh = zeros(x.rows(), cols);
        let mut loss = 0.0;
        for from in (0..n).step_by(step) {
            let to = (from + step).min(n);
            let rows = self.recorder.upload(h.value.view().rows_range(from, to));
            let logits = self.head.project(&rows);
            let tape = self.recorder.take();
            // Memory that nothing else holds becomes the gradient's.
            let mut d = Rc::try_unwrap(logits.value).unwrap_or_else(|shared| copy(shared.view()));
            loss += cross_entropy(&mut d, &tokens[from + 1..=to], (1.0 / n as f64) as f32);
            let mut d = Gradients::of(logits.id, d);
            tape.back(&mut d, sink);
            let back = d.take(rows.id).expect("a product with every row");
            dh.data_mut()[from * cols..to * cols].copy_from_slice(back.data());
        }
        let mut d = Gradients::of(h.id, dh);
        normed.back(&mut d, sink);
        sink.end_of_sequence();
        Ok((loss / n as f64, d.take(read.id).expect("every row was read")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::naive::{linear, norm, softmax};
    use crate::derive::differences::check;
    use crate::derive::product_weight;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_format::{Float, PatternKind, Stored, WeightsError, pack_float};
    use lacuna_spec::{Norm, NormKind, Part, Place, Role, Spec};
    use std::sync::Arc;

    #[test]
    fn cross_entropy_agrees_with_finite_differences() {
        let logits = random(20, 33, 1);
        let targets: Vec<u32> = (0..20).map(|i| (i * 7 + 3) % 33).collect();
        let forward = |v: &[Vec<f64>]| {
            let one = |(row, &t): (&[f64], &u32)| -softmax(row)[t as usize].ln();
            vec![v[0].chunks(33).zip(&targets).map(one).sum::<f64>()]
        };
        let mut d = logits.clone();
        let loss = cross_entropy(&mut d, &targets, 0.25);
        let exact: Vec<f64> = logits.data().iter().map(|&x| f64::from(x)).collect();
        assert!((loss - forward(&[exact])[0]).abs() < 1e-4);
        check("cross-entropy", &[0.25], &[(logits.data(), d.data())], forward);
    }

    /// A head and nothing else.
    struct Only(Spec);

    impl Only {
        fn mat(&self, place: &Place) -> Option<Mat> {
            let (rows, cols) = self.0.shape(place)?;
            Some(random(rows, cols, if place.part == Part::Bias { 3 } else { place.role as u64 + 10 }))
        }
    }

    impl Weights for Only {
        fn spec(&self) -> &Spec {
            &self.0
        }
        fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
            let one = |m: Mat| pack_float(m.view(), None, PatternKind::Dense, Float::F32).expect("a piece");
            Ok(self.mat(place).map(|m| Arc::new(Stored::from_piece(one(m)))))
        }
    }

    /// Sums what it is shown.
    struct Sums {
        calls: usize,
        head: Mat,
        vectors: Vec<Vec<f32>>,
    }

    impl GradientSink for Sums {
        fn gradient(&mut self, _: &Place, x: MatRef<'_>, dy: MatRef<'_>) {
            self.calls += 1;
            let dw = product_weight(x, dy);
            self.head.data_mut().iter_mut().zip(dw.data()).for_each(|(s, d)| *s += d);
        }
        fn vector(&mut self, _: &Place, gradient: &[f32]) {
            self.vectors.push(gradient.to_vec());
        }
    }

    #[test]
    fn a_head_agrees_with_finite_differences_however_its_rows_are_cut() {
        let (hidden, vocab) = (6, 19);
        let n = Norm { kind: NormKind::Layer, eps: 1e-3, ..Norm::default() };
        let weights = Only(Spec {
            arch: "test".into(),
            hidden,
            vocab,
            context: 64,
            norm: n,
            logit_softcap: Some(2.5),
            logit_scale: 0.75,
            ..Spec::default()
        });
        let head = RecordedHead::load(&weights).expect("a head");
        let x = random(12, hidden, 1);
        let tokens: Vec<u32> = (0..12).map(|i| (i * 5 + 2) % vocab as u32).collect();
        let run = |step: usize| {
            let mut sums = Sums { calls: 0, head: Mat::zeros(vocab, hidden), vectors: Vec::new() };
            let (loss, dx) = head.backward_by(step, x.view(), &tokens, &mut sums).expect("tokens of the vocabulary");
            (loss, dx, sums)
        };
        let (loss, dx, sums) = run(1024);
        let (loss3, dx3, sums3) = run(3);
        assert_eq!((sums.calls, sums3.calls), (1, 4));
        assert!((loss - loss3).abs() < 1e-9 && max_abs_diff(dx.view(), dx3.view()) < 1e-6);
        assert!(max_abs_diff(sums.head.view(), sums3.head.view()) < 1e-6);
        assert!(dx.row(11).iter().all(|&d| d == 0.0), "the last token predicts nothing");
        let place = Place::global(Role::FinalNorm);
        let [scale, bias, w] =
            [place, place.bias(), Place::global(Role::Head)].map(|p| weights.mat(&p).expect("there"));
        let pairs = [
            (x.data(), dx.data()),
            (scale.data(), &sums.vectors[0][..]),
            (bias.data(), &sums.vectors[1][..]),
            (w.data(), sums.head.data()),
        ];
        check("head", &[1.0], &pairs, |v| {
            let h = norm(n, hidden, &v[1], &v[2], &v[0]);
            let logits = linear(&h, &v[3], &vec![0.0; vocab], hidden);
            let logits: Vec<f64> = logits.iter().map(|y| 2.5 * (y * 0.75 / 2.5).tanh()).collect();
            let one = |(row, &t): (&[f64], &u32)| -softmax(row)[t as usize].ln();
            vec![logits.chunks(vocab).zip(&tokens[1..]).map(one).sum::<f64>() / 11.0]
        });
    }
}

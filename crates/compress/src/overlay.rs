//! The source's weights with some replaced, and small things that the walk does with weights.

use std::collections::HashMap;
use std::sync::Arc;

use lacuna_base::Mat;
use lacuna_checkpoint::PackedWriter;
use lacuna_contract::Stats;
use lacuna_format::{Stored, Weights, WeightsError};
use lacuna_model::{Batch, Block, ContiguousKv, Tap};
use lacuna_spec::{Place, Spec};

use crate::account::{CompressError, TensorReport};
use crate::matrix::relative_error;

/// Weights of the source with some tensors, and perhaps the network, replaced.
pub(crate) struct Overlay<'a> {
    pub(crate) base: &'a dyn Weights,
    pub(crate) spec: Spec,
    pub(crate) new: HashMap<Place, Arc<Stored>>,
}

impl Weights for Overlay<'_> {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        match self.new.get(place) {
            Some(s) => Ok(Some(s.clone())),
            None => self.base.get(place),
        }
    }

    fn release(&self, place: &Place) {
        self.base.release(place);
    }
}

pub(crate) fn need(weights: &dyn Weights, place: &Place) -> Result<Arc<Stored>, CompressError> {
    weights.get(place)?.ok_or_else(|| {
        CompressError::Weights(WeightsError::Missing {
            file: "the model".into(),
            place: place.to_string(),
            hint: String::new(),
        })
    })
}

/// Values decoded at a time.
const CHUNK: usize = 1 << 20;

/// Refuses a matrix that does not decode to finite numbers alone; `whose` says what it is.
pub(crate) fn finite(place: &Place, stored: &Stored, whose: &str) -> Result<(), CompressError> {
    let step = (CHUNK / stored.cols.max(1)).max(1);
    for from in (0..stored.rows).step_by(step) {
        let to = (from + step).min(stored.rows);
        let mut m = Mat::zeros(to - from, stored.cols);
        stored.decode_rows(from, to, m.view_mut());
        if let Some(i) = m.data().iter().position(|x| !x.is_finite()) {
            let (r, c, v) = (from + i / stored.cols, i % stored.cols, m.data()[i]);
            let what = format!("{whose} at row {r}, column {c} is {v}, not a finite number");
            return Err(CompressError::NotFinite { place: place.to_string(), what });
        }
    }
    Ok(())
}

pub(crate) fn read_back(
    writer: Option<&PackedWriter>,
    places: &[Place],
) -> Result<Vec<(Place, Arc<Stored>)>, CompressError> {
    let mut out = Vec::new();
    if let Some(w) = writer {
        for p in places {
            if let Some(s) = w.read(p)? {
                out.push((*p, Arc::new(s)));
            }
        }
    }
    Ok(out)
}

pub(crate) fn release_layer(weights: &dyn Weights, l: usize) {
    for p in weights.spec().layer_places(l) {
        weights.release(&p);
    }
}

/// One sequence through one block.
pub(crate) fn forward(spec: &Spec, block: &Block, x: &mut Mat, tap: &mut dyn Tap) -> Result<(), CompressError> {
    let batch = Batch::one(0, 0..x.rows());
    let mut kv = ContiguousKv::new(spec, 1);
    block.forward(x, &batch, &mut kv, tap)?;
    Ok(())
}

/// Negative log likelihood of `target`, nats.
pub(crate) fn nll(logits: &[f32], target: usize) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
    sum.ln() - f64::from(logits[target] - top)
}

pub(crate) fn report(place: &Place, before: &Arc<Stored>, after: &Arc<Stored>, stats: &Stats<'_>) -> TensorReport {
    let error = (!Arc::ptr_eq(before, after) && before != after).then(|| {
        let (b, a) = (before.to_mat(), after.to_mat());
        relative_error(b.view(), a.view(), stats)
    });
    TensorReport {
        place: *place,
        parameters: before.rows as u64 * before.cols as u64,
        bytes_before: before.bytes(),
        bytes_after: after.bytes(),
        codec: after.codec_name(),
        sparsity: after.sparsity(),
        error,
    }
}

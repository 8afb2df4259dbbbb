//! What several of these tests run and compare.

use std::sync::Arc;

use lacuna_checkpoint::Checkpoint;
use lacuna_format::{Float, PatternKind, Stored, Weights, WeightsError, pack_float};
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, NoTap};
use lacuna_spec::{Place, Spec};

/// A model's matrices decoded, dense.
pub struct Decoded(pub Checkpoint);

impl Weights for Decoded {
    fn spec(&self) -> &Spec {
        self.0.spec()
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        let dense = |s: Arc<Stored>| {
            let piece = pack_float(s.to_mat().view(), None, PatternKind::Dense, Float::F32).unwrap();
            Arc::new(Stored::from_piece(piece))
        };
        Ok(self.0.get(place)?.map(dense))
    }
}

/// Those of a fixed text.
pub fn logits(model: &dyn Weights) -> Vec<f32> {
    let decoder = Decoder::load(model, &LoadOptions::default()).unwrap();
    let ids: Vec<u32> = (0..24).map(|i| i * 7 % model.spec().vocab as u32).collect();
    let mut kv = ContiguousKv::new(model.spec(), 1);
    let hidden = decoder.forward(&ids, &Batch::one(0, 0..ids.len()), &mut kv, &mut NoTap).unwrap();
    decoder.logits(hidden.view()).data().to_vec()
}

/// The largest difference over the largest value.
pub fn apart(a: &[f32], b: &[f32]) -> f32 {
    let most = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / most
}

//! The walk: all blocks forward, then back from the last to the first, one loaded at a time.

use lacuna_base::Mat;
use lacuna_format::Weights;
use lacuna_spec::{Place, Role, SpecError};

use super::block::RecordedBlock;
use super::loss::RecordedHead;
use super::sink::GradientSink;
use crate::{Batch, Block, ContiguousKv, Embedding, ModelError, NoTap};

/// A store of the residual stream before every block, `[tokens, hidden]` of each sequence: `slot` is a block's number,
/// or the number of blocks for what comes out of the last one. On the way back each slot is taken once and holds the
/// gradient of its values from then on.
pub trait BlockInputs {
    /// Takes what lies in a slot, which may be put back changed.
    fn take(&mut self, slot: usize, sequence: usize) -> Result<Mat, ModelError>;

    /// Puts rows into a slot, in place of what was there.
    fn put(&mut self, slot: usize, sequence: usize, x: Mat) -> Result<(), ModelError>;
}

/// Everything in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryInputs {
    /// By slot, then by sequence.
    slots: Vec<Vec<Option<Mat>>>,
}

impl BlockInputs for MemoryInputs {
    fn take(&mut self, slot: usize, sequence: usize) -> Result<Mat, ModelError> {
        let found = self.slots.get_mut(slot).and_then(|s| s.get_mut(sequence)).and_then(Option::take);
        found.ok_or_else(|| ModelError::Store { what: format!("slot {slot} holds nothing of sequence {sequence}") })
    }

    fn put(&mut self, slot: usize, sequence: usize, x: Mat) -> Result<(), ModelError> {
        if self.slots.len() <= slot {
            self.slots.resize(slot + 1, Vec::new());
        }
        let slot = &mut self.slots[slot];
        if slot.len() <= sequence {
            slot.resize(sequence + 1, None);
        }
        slot[sequence] = Some(x);
        Ok(())
    }
}

/// Shows `sink` the gradients of each sequence's mean next-token loss, and gives those losses, in nats.
///
/// One block is in memory at a time, twice in turn: for the way forward and for the way back, which makes its forward
/// again from the store. After it, slot 0 holds the gradients of the embedded sequences. `progress` is told how many
/// steps of how many are done.
///
/// Of the embedding itself no gradient is shown: a tied matrix is shown as the head alone.
pub fn gradients(
    weights: &dyn Weights,
    sequences: &[Vec<u32>],
    inputs: &mut dyn BlockInputs,
    sink: &mut dyn GradientSink,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<f64>, ModelError> {
    let spec = weights.spec();
    spec.check()?;
    if let Some(l) = spec.first_like() {
        let what = format!("layer {l} uses the weights of layer {}: gradients are of layers alone", spec.weights_of(l));
        return Err(SpecError { what }.into());
    }
    if let Some(short) = sequences.iter().find(|s| s.len() < 2) {
        return Err(ModelError::Short { tokens: short.len() });
    }
    let layers = spec.layers.len();
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, 2 * layers + 2);
    };
    let release = |layer: usize| spec.layer_places(layer).iter().for_each(|p| weights.release(p));
    {
        let embed = Embedding::load(weights)?;
        for (i, tokens) in sequences.iter().enumerate() {
            let positions: Vec<usize> = (0..tokens.len()).collect();
            inputs.put(0, i, embed.rows(tokens, &positions)?.into_mat())?;
        }
        weights.release(&Place::global(Role::Embed));
    }
    step();
    for layer in 0..layers {
        let block = Block::load(weights, layer)?;
        for (i, tokens) in sequences.iter().enumerate() {
            let mut x = inputs.take(layer, i)?;
            inputs.put(layer, i, x.clone())?;
            let mut kv = ContiguousKv::new(spec, 1);
            block.forward(&mut x, &Batch::one(0, 0..tokens.len()), &mut kv, &mut NoTap)?;
            inputs.put(layer + 1, i, x)?;
        }
        release(layer);
        step();
    }
    let mut losses = Vec::with_capacity(sequences.len());
    {
        let head = RecordedHead::load(weights)?;
        for (i, tokens) in sequences.iter().enumerate() {
            let x = inputs.take(layers, i)?;
            let (loss, dx) = head.backward(x.view(), tokens, sink)?;
            losses.push(loss);
            inputs.put(layers, i, dx.into_mat())?;
        }
        sink.end_of_part(None)?;
        weights.release(&Place::global(if spec.tied { Role::Embed } else { Role::Head }));
    }
    step();
    for layer in (0..layers).rev() {
        let block = RecordedBlock::load(weights, layer)?;
        for i in 0..sequences.len() {
            let (mut x, mut dx) = (inputs.take(layer, i)?, inputs.take(layer + 1, i)?);
            let record = block.forward(&mut x)?;
            block.backward(&record, &mut dx, sink);
            inputs.put(layer, i, dx)?;
        }
        sink.end_of_part(Some(layer))?;
        release(layer);
        step();
    }
    Ok(losses)
}

//! One block, recorded forward and walked back.

use lacuna_base::Mat;
use lacuna_format::Weights;
use lacuna_kernels::{Activations, KvFormat};
use lacuna_spec::{Experts, GateNorm, Mixer, Order, Spec};

use super::recorder::{Gradients, Recorder};
use super::rows::copy;
use super::sink::GradientSink;
use super::tape::Tape;
use crate::backend::Backend;
use crate::{Batch, Block, ContiguousKv, Lent, ModelError, NoTap};

/// A block that remembers: the decoder's own, over the recorder.
pub struct RecordedBlock {
    recorder: Recorder,
    block: Block<Recorder>,
    /// The block whose pages keys and values lie in, key heads and their width, where it has attention.
    heads: Option<(usize, (usize, usize))>,
    /// Its recurrent mixer, where it has one, and the residual stream's channels.
    mixer: Option<(Mixer, usize)>,
}

/// What one sequence left behind in a block, for its way back.
pub struct Record {
    tape: Tape,
    /// The numbers of the residual stream before the block and after it.
    start: usize,
    end: usize,
    shape: (usize, usize),
}

impl Record {
    /// Bytes that it holds.
    pub fn bytes(&self) -> u64 {
        self.tape.bytes()
    }

    /// Bytes that the record of a sequence of `tokens` in a block of the network would hold. The way back makes gradients of about the
    /// same size beside it.
    pub fn forecast(spec: &Spec, layer: usize, tokens: usize) -> u64 {
        let (block, hidden) = (&spec.layers[layer], spec.hidden);
        let beside = block.order != Order::Sequential;
        // What went into it: read by a norm, by matrices or by a shortcut.
        let first = block.attn.is_some() || block.mixer.is_some() || block.attn_shortcut;
        let start = if first || (beside && block.ffn.is_some()) { hidden } else { 0 };
        // Behind one norm the parts read the same rows.
        let shared = block.order == Order::Shared && (block.attn.is_some() || block.ffn.is_some());
        let attention = block.attn.as_ref().map_or(0, |a| {
            let (wide, narrow) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
            // Heads as a norm reads them, and as attention does where something changed them since.
            let own = if a.kv_from.is_none() { narrow } else { 0 };
            let before = if a.qk_norm { wide + own } else { 0 };
            // Values before their norm; those that are keys were counted where keys have a norm.
            let values = if a.v_norm && !(a.v_is_k && a.qk_norm) { narrow } else { 0 };
            let post = if a.post_norm { hidden } else { 0 };
            let all = wide + own + if a.v_is_k { 0 } else { own };
            let clipped = if a.clip.is_some() { all } else { 0 };
            // Beside a mixer it reads what that one's norm put out.
            let normed = if a.pre_norm && !shared && block.mixer.is_none() { hidden } else { 0 };
            // Of latent attention the narrow rows, and what heads read and write before and after it; its keys are its
            // values.
            let latent = a.latent.map(|m| 2 * m.q_rank.unwrap_or(0) + m.rank + a.heads * (m.plain + m.rank + m.value));
            let cached = latent.map_or(2 * narrow, |more| narrow + more);
            let gate = if a.gate { 2 * wide } else { 0 };
            normed + before + values + clipped + 2 * wide + cached + gate + post
        });
        let mixer = block.mixer.as_ref().map_or(0, |m| {
            let (channels, wide) = (m.channels(hidden), m.width(hidden));
            let (heads, beta, gate) = match m {
                Mixer::ShortConv(_) => return hidden + 3 * channels + wide,
                Mixer::Ssd(m) => (m.heads, 0, if m.gate == GateNorm::Gate { 3 } else { 4 }),
                Mixer::Delta(m) => (m.value_heads, m.value_heads, 4),
                // What the norms inside read, what time steps are made of, and x once more beside b and c.
                Mixer::Mamba(m) => (2 * channels + 2 * m.rank + 4 * m.state, 0, 3),
            };
            let factor = matches!(m, Mixer::Ssd(m) if m.factors.is_some_and(|f| f[4] != 1.0));
            let less = if factor { hidden } else { 0 };
            hidden + less + 3 * channels + heads + beta + gate * wide
        });
        let ffn = block.ffn.as_ref().map_or(0, |f| {
            let one = f.width * if f.gated { 3 } else { 2 };
            let post = if f.post_norm { hidden } else { 0 };
            let normed = if f.pre_norm { hidden } else { 0 };
            // What weighs a shared expert is recorded with what it weighs.
            let weighed = |on: bool| if on { hidden + 1 } else { 0 };
            let shared = |e: &Experts| e.shared.map_or(0, |s| weighed(s.gate) + s.width * if f.gated { 3 } else { 2 });
            // What a router of its own norm reads, and what both norms behind read.
            let apart = |e: &Experts| match (e.apart, e.weigh_inputs) {
                (false, _) => 0,
                (true, weighs) => (3 + usize::from(weighs)) * hidden,
            };
            let mixture = |e: Experts| e.count + e.used.min(e.count) * (2 * hidden + one) + shared(&e) + apart(&e);
            let cut = if f.sparsity.is_some() { f.width } else { 0 };
            normed + post + cut + f.experts.map_or(one, mixture)
        });
        // The stream between the parts is that before them where nothing stands in between.
        let reads = (block.ffn.is_some() && !beside) || block.ffn_shortcut;
        let middle = if reads { hidden } else { 0 };
        let normed = if shared { hidden } else { 0 };
        // The stream before the gate, gate and input, what goes out by the matrix and what comes of it.
        let input = spec.layer_inputs.map_or(0, |i| 2 * hidden + 3 * i.width);
        let laurel = block.laurel.map_or(0, |rank| rank + hidden);
        // Both times what the norm and the router read, and modalities; all streams with the weights of predictions,
        // what is new with those of corrections; what is scaled.
        let altup = spec.altup.map_or(0, |a| {
            let n = a.inputs;
            let scaled = if a.scaled && spec.layer_inputs.is_some() { hidden } else { 0 };
            2 * (2 * hidden + n) + n * hidden + n * n + hidden + n + scaled
        });
        let all = start + normed + attention + mixer + middle + ffn + input + laurel + altup;
        4 * (tokens as u64) * all as u64
    }
}

impl RecordedBlock {
    /// Loads block `layer`, for exact activations, with its matrices from both sides; the other side shares the stored
    /// buffers.
    pub fn load(weights: &dyn Weights, layer: usize) -> Result<RecordedBlock, ModelError> {
        let recorder = Recorder::default();
        let block = Block::load_on(&recorder, weights, layer, Activations::Exact)?;
        let described = weights.spec().layers.get(layer);
        let attention = described.and_then(|l| l.attn.as_ref());
        let heads = attention.map(|a| (a.kv_from.unwrap_or(layer), (a.kv_heads, a.head_dim)));
        let mixer = described.and_then(|l| l.mixer.clone()).map(|m| (m, weights.spec().hidden));
        Ok(RecordedBlock { recorder, block, heads, mixer })
    }

    /// Runs one whole sequence through the block: `x`, `[tokens, hidden]`, becomes the residual stream after it, the
    /// same bits as ever.
    pub fn forward(&self, x: &mut Mat) -> Result<Record, ModelError> {
        let layer = self.block.layer();
        let heads = (0..=layer).map(|l| self.heads.filter(|h| l == h.0).map(|h| h.1));
        let mixers = (0..=layer).map(|l| self.mixer.as_ref().filter(|_| l == layer).map(|(m, hidden)| (m, *hidden)));
        let mut kv = ContiguousKv::of(&self.recorder, heads, mixers, 1, KvFormat::F32);
        let batch = Batch::one(0, 0..x.rows());
        let mut rows = self.recorder.upload(x.view());
        let start = rows.id;
        let done = self.block.run(&mut rows, &batch, &mut kv, &mut NoTap);
        let tape = self.recorder.take();
        done?;
        x.data_mut().copy_from_slice(rows.value.data());
        Ok(Record { tape, start, end: rows.id, shape: (x.rows(), x.cols()) })
    }

    /// Walks back: `dx`, `[tokens, hidden]`, the gradient of the residual stream after the block, becomes that before
    /// it. `sink` is shown what it wants of this block and sequence.
    #[track_caller]
    pub fn backward(&self, record: &Record, dx: &mut Mat, sink: &mut dyn GradientSink) {
        assert_eq!((dx.rows(), dx.cols()), record.shape, "a gradient of another shape than the record");
        let mut d = Gradients::of(record.end, copy(dx.view()));
        record.tape.back(&mut d, sink);
        let before: Lent = d.take(record.start).expect("the stream goes through every block");
        dx.data_mut().copy_from_slice(before.data());
        sink.end_of_sequence();
    }
}

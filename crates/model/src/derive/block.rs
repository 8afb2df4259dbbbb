//! One block, recorded forward and walked back.

use std::collections::HashMap;
use std::sync::Arc;

use lacuna_base::{Mat, MatMut, MatRef};
use lacuna_format::Weights;
use lacuna_kernels as kernels;
use lacuna_kernels::{KEY_BLOCK, KvFormat, KvLayout, KvPage, KvView, Transposed};
use lacuna_spec::{Activation, LayerSpec, Place, Role};

use super::rows::{copy, dot, zeros};
use super::sink::GradientSink;
use super::{activation, attention, bias, gated_activation, norm, product, rope, routing};
use crate::block::{AttentionPart, Body, Ffn, FfnPart, route};
use crate::parts::{NormWeights, Projection, tensor};
use crate::{Batch, Block, KvStore, Lent, ModelError, Tap, Wants};

/// A block that remembers: its forward is the decoder's own, under a tap.
pub struct RecordedBlock {
    block: Block,
    matrices: HashMap<Place, Transposed>,
}

/// What one sequence left behind in a block, for its way back.
pub struct Record {
    /// The residual stream before the block, and after its attention.
    start: Lent,
    middle: Option<Lent>,
    inputs: HashMap<Place, Lent>,
    outputs: HashMap<Place, Lent>,
}

impl Record {
    /// The residual stream before the FFN.
    fn before_ffn(&self) -> MatRef<'_> {
        self.middle.as_ref().unwrap_or(&self.start).view()
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> u64 {
        let all = self.inputs.values().chain(self.outputs.values()).chain(&self.middle).chain([&self.start]);
        all.map(|m| 4 * m.data().len() as u64).sum()
    }

    /// Bytes that the record of a sequence of `tokens` in a block would hold. The way back makes gradients of about the
    /// same size beside it.
    pub fn forecast(block: &LayerSpec, hidden: usize, tokens: usize) -> u64 {
        let attention = block.attn.as_ref().map_or(0, |a| {
            let (wide, narrow) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
            3 * hidden + 2 * wide + 2 * narrow
        });
        let ffn = block.ffn.as_ref().map_or(0, |f| {
            let one = 2 * hidden + f.width * if f.gated { 3 } else { 2 };
            f.experts.map_or(one, |e| hidden + e.count + e.used.min(e.count) * one)
        });
        // What comes out of attention's shortcut is the middle of a block without attention; elsewhere it is not kept.
        let turned = if block.attn.is_none() && block.attn_shortcut { hidden } else { 0 };
        4 * (tokens as u64) * (hidden + turned + attention + ffn) as u64
    }
}

impl RecordedBlock {
    /// Loads block `layer`, for exact activations, with its matrices from both sides; the other side shares the stored
    /// buffers.
    pub fn load(weights: &dyn Weights, layer: usize) -> Result<RecordedBlock, ModelError> {
        let block = Block::load(weights, layer)?;
        let mut matrices = HashMap::new();
        for p in projections(&block) {
            let w = Transposed::new(&*tensor(weights, p.place)?).map_err(|e| ModelError::bad(&p.place, e))?;
            matrices.insert(p.place, w);
        }
        Ok(RecordedBlock { block, matrices })
    }

    /// The block itself.
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// Runs one whole sequence through the block: `x`, `[tokens, hidden]`, becomes the residual stream after it, the
    /// same bits as ever.
    pub fn forward(&self, x: &mut Mat) -> Result<Record, ModelError> {
        let start = copy(x.view());
        let mut tap = Recorder { gated: self.gated(), inputs: HashMap::new(), outputs: HashMap::new() };
        let batch = Batch::one(0, 0..x.rows());
        self.block.forward(x, &batch, &mut OneSequence::of(&self.block, x.rows()), &mut tap)?;
        let Recorder { inputs, mut outputs, .. } = tap;
        let turned = self.block.attention_shortcut.as_ref().and_then(|s| outputs.remove(&s.place));
        let middle = match &self.block.attention {
            None => turned,
            Some(a) => {
                let mut middle = copy(outputs[&a.o.place].view());
                if let Some(n) = &a.post_norm {
                    n.in_place(&mut middle);
                }
                kernels::add(middle.view_mut(), turned.as_ref().unwrap_or(&start).view());
                Some(middle)
            }
        };
        Ok(Record { start, middle, inputs, outputs })
    }

    /// Walks back: `dx`, `[tokens, hidden]`, the gradient of the residual stream after the block, becomes that before
    /// it. `sink` is shown what it wants of this block and sequence.
    #[track_caller]
    pub fn backward(&self, record: &Record, dx: &mut Mat, sink: &mut dyn GradientSink) {
        let shape = (record.start.rows(), record.start.cols());
        assert_eq!((dx.rows(), dx.cols()), shape, "a gradient of another shape than the record");
        match &self.block.ffn {
            Some(f) => self.ffn(f, record, dx, sink),
            None => self.shortcut(&self.block.ffn_shortcut, record.before_ffn(), dx, sink),
        }
        match &self.block.attention {
            Some(a) => self.attention(a, record, dx, sink),
            None => self.shortcut(&self.block.attention_shortcut, record.start.view(), dx, sink),
        }
        sink.end_of_sequence();
    }

    fn gated(&self) -> bool {
        match self.block.ffn.as_ref().map(|f| &f.body) {
            Some(Body::Dense(f)) => f.gate.is_some(),
            Some(Body::Mixture { experts, .. }) => experts.first().is_some_and(|f| f.gate.is_some()),
            None => false,
        }
    }

    /// The adjoint of one projection: shows it, and adds to the gradient of its input.
    fn project(&self, p: &Projection, x: MatRef<'_>, dy: MatRef<'_>, dx: MatMut<'_>, sink: &mut dyn GradientSink) {
        if sink.wants(&p.place) {
            sink.gradient(&p.place, x, dy);
        }
        if p.bias.is_some() && sink.wants(&p.place.bias()) {
            sink.vector(&p.place.bias(), &bias(dy));
        }
        product(&self.matrices[&p.place], dy, dx);
    }

    /// The adjoint of a shortcut that read `x`: `dx`, the gradient behind it, becomes that before it.
    fn shortcut(&self, s: &Option<Projection>, x: MatRef<'_>, dx: &mut Mat, sink: &mut dyn GradientSink) {
        let Some(s) = s else { return };
        let dy = copy(dx.view());
        dx.data_mut().fill(0.0);
        self.project(s, x, dy.view(), dx.view_mut(), sink);
    }

    fn attention(&self, a: &AttentionPart, record: &Record, dx: &mut Mat, sink: &mut dyn GradientSink) {
        let [h, mixed] = [&a.q, &a.o].map(|p| record.inputs[&p.place].view());
        let [q, k, v] = [&a.q, &a.k, &a.v].map(|p| record.outputs[&p.place].view());
        let tokens = h.rows();
        let mut dmixed = zeros(tokens, mixed.cols());
        {
            let before = post(&a.post_norm, || record.outputs[&a.o.place].view(), dx.view(), sink);
            let dy = before.as_ref().map_or(dx.view(), |d| d.view());
            self.project(&a.o, mixed, dy, dmixed.view_mut(), sink);
        }
        // Queries and keys as attention read them.
        let (mut read_q, mut read_k) = (copy(q), copy(k));
        if let Some((qn, kn)) = &a.qk_norm {
            qn.heads_in_place(&mut read_q);
            kn.heads_in_place(&mut read_k);
        }
        let at = || (0..tokens).map(|p| (p, tokens));
        if let Some(table) = &a.rope {
            table.with(at(), |angles| {
                angles.apply(a.head_dim, read_q.view_mut());
                angles.apply(a.head_dim, read_k.view_mut());
            });
        }
        let mut d = attention(&a.scores, a.head_dim, [read_q.view(), read_k.view(), v], mixed, dmixed.view());
        if let Some(table) = &a.rope {
            rope(table, at(), a.head_dim, [d.q.view_mut(), d.k.view_mut()]);
        }
        if let Some((qn, kn)) = &a.qk_norm {
            for (n, x, d) in [(qn, q, &mut d.q), (kn, k, &mut d.k)] {
                let mut before = zeros(d.rows(), d.cols());
                let (rows, dim) = (d.rows() * d.cols() / a.head_dim, a.head_dim);
                let heads = MatMut::new(rows, dim, before.data_mut());
                // Recorded outputs have no padding: heads lie one after the other.
                through_norm(n, MatRef::new(rows, dim, x.raw()), MatRef::new(rows, dim, d.data()), heads, sink);
                *d = before;
            }
        }
        let mut dh = zeros(tokens, h.cols());
        for (p, d) in [(&a.q, &d.q), (&a.k, &d.k), (&a.v, &d.v)] {
            self.project(p, h, d.view(), dh.view_mut(), sink);
        }
        self.shortcut(&self.block.attention_shortcut, record.start.view(), dx, sink);
        through_norm(&a.norm, record.start.view(), dh.view(), dx.view_mut(), sink);
    }

    fn ffn(&self, f: &FfnPart, record: &Record, dx: &mut Mat, sink: &mut dyn GradientSink) {
        let x = record.before_ffn();
        let mut dh = zeros(x.rows(), x.cols());
        match &f.body {
            Body::Dense(one) => {
                let before = post(&f.post_norm, || record.outputs[&one.down.place].view(), dx.view(), sink);
                let dy = before.as_ref().map_or(dx.view(), |d| d.view());
                self.one(f.act, one, record, dy, dh.view_mut(), sink);
            }
            Body::Mixture { router, choice, experts } => {
                let mut weights = copy(record.outputs[&router.place].view());
                let routes = route(&mut weights, *choice);
                let sum = f.post_norm.as_ref().map(|_| mixture(experts, &routes, record, x.cols()));
                let sum = || sum.as_ref().expect("made where there is a norm").view();
                let before = post(&f.post_norm, sum, dx.view(), sink);
                let dy = before.as_ref().map_or(dx.view(), |d| d.view());
                // Experts in their order, then the router.
                let back = |(e, rows): (usize, &Vec<(usize, f32)>)| {
                    self.expert((f.act, &experts[e]), rows, record, dy, &mut dh, sink)
                };
                let dweights: Vec<Vec<f32>> = routes.iter().enumerate().map(back).collect();
                let dlogits = routing(weights.view(), &routes, &dweights, *choice);
                let read = record.inputs[&router.place].view();
                self.project(router, read, dlogits.view(), dh.view_mut(), sink);
            }
        }
        self.shortcut(&self.block.ffn_shortcut, x, dx, sink);
        through_norm(&f.norm, x, dh.view(), dx.view_mut(), sink);
    }

    /// The adjoint of one feed-forward part (or expert): adds to the gradient `dx` of its input rows.
    fn one(
        &self,
        act: Activation,
        f: &Ffn,
        record: &Record,
        dy: MatRef<'_>,
        mut dx: MatMut<'_>,
        sink: &mut dyn GradientSink,
    ) {
        let inner = record.inputs[&f.down.place].view();
        let first = f.gate.as_ref().unwrap_or(&f.up);
        let x = record.inputs[&first.place].view();
        let mut dinner = zeros(inner.rows(), inner.cols());
        self.project(&f.down, inner, dy, dinner.view_mut(), sink);
        let up = record.outputs[&f.up.place].view();
        let mut dup = Lent::new(up.rows(), up.cols());
        if let Some(gate) = &f.gate {
            let mut dgate = Lent::new(up.rows(), up.cols());
            let g = record.outputs[&gate.place].view();
            gated_activation(act, g, up, dinner.view(), dgate.view_mut(), dup.view_mut());
            self.project(gate, x, dgate.view(), dx.reborrow(), sink);
        } else {
            activation(act, up, dinner.view(), dup.view_mut());
        }
        self.project(&f.up, x, dup.view(), dx, sink);
    }

    /// The adjoint of one expert over the rows routed to it: adds to `dh`, and gives the gradients of the rows'
    /// weights.
    fn expert(
        &self,
        (act, expert): (Activation, &Ffn),
        rows: &[(usize, f32)],
        record: &Record,
        dy: MatRef<'_>,
        dh: &mut Mat,
        sink: &mut dyn GradientSink,
    ) -> Vec<f32> {
        if rows.is_empty() {
            return Vec::new();
        }
        let mut mine = Lent::new(rows.len(), dy.cols());
        for (i, &(r, weight)) in rows.iter().enumerate() {
            mine.row_mut(i).iter_mut().zip(dy.row(r)).for_each(|(m, d)| *m = weight * d);
        }
        let mut back = zeros(rows.len(), dy.cols());
        self.one(act, expert, record, mine.view(), back.view_mut(), sink);
        for (i, &(r, _)) in rows.iter().enumerate() {
            dh.row_mut(r).iter_mut().zip(back.row(i)).for_each(|(h, b)| *h += b);
        }
        let out = &record.outputs[&expert.down.place];
        rows.iter().enumerate().map(|(i, &(r, _))| dot(dy.row(r), out.row(i))).collect()
    }
}

/// What a mixture puts out, before the norm after it.
fn mixture(experts: &[Ffn], routes: &[Vec<(usize, f32)>], record: &Record, cols: usize) -> Lent {
    let mut y = zeros(record.start.rows(), cols);
    for (expert, rows) in experts.iter().zip(routes).filter(|(_, rows)| !rows.is_empty()) {
        let out = &record.outputs[&expert.down.place];
        for (i, &(r, weight)) in rows.iter().enumerate() {
            kernels::add_scaled(y.row_mut(r), weight, out.row(i));
        }
    }
    y
}

/// The gradient before a part's last norm, where there is one; `x` is what the norm read.
fn post<'a>(
    n: &Option<NormWeights>,
    x: impl FnOnce() -> MatRef<'a>,
    dy: MatRef<'_>,
    sink: &mut dyn GradientSink,
) -> Option<Lent> {
    let n = n.as_ref()?;
    let mut d = zeros(dy.rows(), dy.cols());
    through_norm(n, x(), dy, d.view_mut(), sink);
    Some(d)
}

/// The adjoint of a norm with its constants: adds to `dx`, and shows the gradients of its vectors.
pub(super) fn through_norm(
    n: &NormWeights,
    x: MatRef<'_>,
    dy: MatRef<'_>,
    dx: MatMut<'_>,
    sink: &mut dyn GradientSink,
) {
    let (scale, bias) = (sink.wants(&n.place), n.has_bias() && sink.wants(&n.place.bias()));
    let Some(vectors) = norm(n.norm, &n.scale, x, dy, dx, scale || bias) else { return };
    if scale {
        sink.vector(&n.place, &vectors.scale);
    }
    if bias {
        sink.vector(&n.place.bias(), &vectors.bias);
    }
}

/// Every matrix of a block with its place.
fn projections(block: &Block) -> Vec<&Projection> {
    let mut all = Vec::new();
    if let Some(a) = &block.attention {
        all.extend([&a.q, &a.k, &a.v, &a.o]);
    }
    match block.ffn.as_ref().map(|f| &f.body) {
        Some(Body::Dense(f)) => all.extend(f.all()),
        Some(Body::Mixture { router, experts, .. }) => {
            all.push(router);
            all.extend(experts.iter().flat_map(Ffn::all));
        }
        None => {}
    }
    all.extend(block.shortcuts());
    all
}

/// Keeps inputs (those that several matrices read once) and outputs.
struct Recorder {
    gated: bool,
    inputs: HashMap<Place, Lent>,
    outputs: HashMap<Place, Lent>,
}

impl Tap for Recorder {
    fn wants(&self) -> Wants {
        Wants { inputs: true, outputs: true, ..Wants::default() }
    }

    fn input(&mut self, place: &Place, x: MatRef<'_>) {
        let again = match place.role {
            Role::K | Role::V => true,
            Role::Up => self.gated,
            // The residual stream itself, which the record has.
            role => role.is_shortcut(),
        };
        if !again {
            self.inputs.insert(*place, copy(x));
        }
    }

    fn output(&mut self, place: &Place, y: MatRef<'_>) {
        if place.role != Role::FfnShortcut {
            self.outputs.insert(*place, copy(y));
        }
    }
}

/// Keys and values of one sequence in one block, in one page.
struct OneSequence {
    pages: Vec<Arc<KvPage>>,
    tokens: usize,
}

impl OneSequence {
    fn of(block: &Block, tokens: usize) -> OneSequence {
        let page = |a: &AttentionPart| {
            let page_tokens = tokens.max(1).next_multiple_of(KEY_BLOCK);
            let layout = KvLayout { kv_heads: a.k.rows() / a.head_dim, head_dim: a.head_dim, page_tokens };
            Arc::new(KvPage::new(layout, KvFormat::F32))
        };
        OneSequence { pages: block.attention.iter().map(page).collect(), tokens: 0 }
    }
}

impl KvStore for OneSequence {
    fn write(&mut self, _: usize, batch: &Batch, keys: MatRef<'_>, values: MatRef<'_>) -> Result<(), ModelError> {
        let page = Arc::get_mut(&mut self.pages[0]).expect("nobody reads while it is written");
        for (r, &position) in batch.positions().iter().enumerate() {
            page.write(position, keys.row(r), values.row(r));
        }
        self.tokens = batch.rows();
        Ok(())
    }

    fn view(&self, _: usize, _: usize) -> Result<KvView<'_>, ModelError> {
        Ok(KvView { pages: &self.pages, tokens: self.tokens })
    }
}

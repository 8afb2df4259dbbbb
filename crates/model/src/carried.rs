//! What goes from block to block beside the residual stream: the inputs of single layers, and keys and values that
//! later blocks read.
//!
//! A decoder's step holds both where they are: inputs as rows of their own, keys and values in the pages of the block
//! that made them. Blocks that run one by one are handed rows of [`Spec::carried`] columns, which hold all of it side by
//! side, so that what walks blocks (forward or back) needs to know of nothing but rows.

use lacuna_format::Weights;
use lacuna_kernels::Activations;
use lacuna_spec::{Activation, LayerInputs, Norm, NormKind, Place, Role, Spec};

use crate::ModelError;
use crate::backend::Backend;
use crate::block::{Loader, normed};
use crate::parts::{Projection, norm, tensor};
use crate::profile::span;
use crate::tap::Look;

/// What a block is given beside the stream.
pub(crate) struct Side<B: Backend> {
    /// The inputs of all layers, `[rows, layers * width]`.
    pub(crate) inputs: Option<B::Rows>,
    /// Where blocks run one by one: keys and values of those that later ones read, by their numbers.
    pub(crate) keys: Option<Vec<(usize, [B::Rows; 2])>>,
}

impl<B: Backend> Side<B> {
    /// Of a step of the whole decoder, whose pages hold all keys and values.
    pub(crate) fn of_step(inputs: Option<B::Rows>) -> Side<B> {
        Side { inputs, keys: None }
    }

    /// What an earlier block left, where it is carried.
    pub(crate) fn keys_of(&self, layer: usize) -> Option<&[B::Rows; 2]> {
        self.keys.as_ref()?.iter().find(|(l, _)| *l == layer).map(|(_, kv)| kv)
    }

    /// Keeps what a block made, where it is carried.
    pub(crate) fn keep(&mut self, backend: &B, layer: usize, [k, v]: [&B::Rows; 2]) {
        let Some((_, mine)) = self.keys.as_mut().and_then(|all| all.iter_mut().find(|(l, _)| *l == layer)) else {
            return;
        };
        *mine = [backend.copy(k), backend.copy(v)];
    }
}

/// How rows of [`Spec::carried`] columns are cut.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    /// Columns of the residual stream, or of all of them.
    hidden: usize,
    inputs: usize,
    /// Blocks whose keys and values follow, with the columns of either.
    keys: Vec<(usize, usize)>,
}

impl Layout {
    pub(crate) fn of(spec: &Spec) -> Layout {
        let wide = |l: usize| {
            let attn = spec.layers.get(l).and_then(|l| l.attn.as_ref());
            (l, attn.map_or(0, |a| a.kv_heads * a.head_dim))
        };
        Layout {
            hidden: spec.streams(),
            inputs: spec.layer_inputs.map_or(0, |i| i.width * spec.layers.len()),
            keys: spec.shared_keys().into_iter().map(wide).collect(),
        }
    }

    /// Whether there is the stream and nothing else.
    pub(crate) fn is_plain(&self) -> bool {
        self.inputs == 0 && self.keys.is_empty()
    }

    /// All columns.
    fn width(&self) -> usize {
        self.hidden + self.inputs + self.keys.iter().map(|(_, n)| 2 * n).sum::<usize>()
    }

    /// Whether rows carry more than the stream.
    pub(crate) fn wide<B: Backend>(&self, backend: &B, x: &B::Rows) -> bool {
        !self.is_plain() && backend.shape(x).1 == self.width()
    }

    /// The residual stream alone, of rows that carry more.
    pub(crate) fn stream<B: Backend>(&self, backend: &B, x: &B::Rows) -> B::Rows {
        backend.columns(x, backend.shape(x).1, 0..self.hidden)
    }

    /// The stream of wide rows, and what lies beside it.
    pub(crate) fn split<B: Backend>(&self, backend: &B, x: &B::Rows) -> Result<(B::Rows, Side<B>), ModelError> {
        let (_, cols) = backend.shape(x);
        if cols != self.width() {
            return Err(ModelError::Carried { cols, need: self.width() });
        }
        let cut = |from: usize, n: usize| backend.columns(x, cols, from..from + n);
        let mut from = self.hidden + self.inputs;
        let mut keys = Vec::with_capacity(self.keys.len());
        for &(layer, n) in &self.keys {
            keys.push((layer, [cut(from, n), cut(from + n, n)]));
            from += 2 * n;
        }
        let inputs = (self.inputs > 0).then(|| cut(self.hidden, self.inputs));
        Ok((cut(0, self.hidden), Side { inputs, keys: Some(keys) }))
    }

    /// The way back.
    pub(crate) fn join<B: Backend>(&self, backend: &B, x: B::Rows, side: Side<B>) -> B::Rows {
        let mut out = x;
        let mut put = |y: &B::Rows| {
            let widths = [backend.shape(&out).1, backend.shape(y).1];
            out = backend.beside([&out, y], widths);
        };
        side.inputs.iter().for_each(&mut put);
        side.keys.iter().flatten().flat_map(|(_, kv)| kv).for_each(&mut put);
        out
    }
}

/// What makes the inputs of all layers.
pub(crate) struct InputsPart<B: Backend> {
    how: LayerInputs,
    table: B::Table,
    projection: Projection<B>,
    norm: B::Norm,
}

impl<B: Backend> InputsPart<B> {
    pub(crate) fn load(backend: &B, weights: &dyn Weights) -> Result<Option<InputsPart<B>>, ModelError> {
        let Some(how) = weights.spec().layer_inputs else { return Ok(None) };
        let place = Place::global(Role::LayerInputs);
        let table = tensor(weights, place)?;
        table.check().map_err(|e| ModelError::bad(&place, e))?;
        let into = Place::global(Role::InputsIn);
        Ok(Some(InputsPart {
            how,
            table: backend.table(table),
            projection: Projection::load(backend, weights, into, Activations::Exact)?,
            norm: norm(backend, weights, Place::global(Role::InputsNorm))?,
        }))
    }

    pub(crate) fn weights_bytes(&self) -> u64 {
        self.projection.measure.bytes
    }

    /// The inputs of tokens whose embeddings are `x`, `[rows, layers * width]`.
    pub(crate) fn of(&self, backend: &B, tokens: &B::Ids, x: &B::Rows) -> B::Rows {
        let scale = |x: &mut B::Rows, by: f32| {
            if by != 1.0 {
                backend.scale(x, by);
            }
        };
        let mut made = self.projection.apply(backend, x);
        scale(&mut made, self.how.projection_scale);
        let mut made = normed(backend, &self.norm, &made);
        let mut looked_up = span("embedding", || backend.embed(&self.table, tokens));
        scale(&mut looked_up, self.how.embed_scale);
        backend.add(&mut made, &looked_up);
        scale(&mut made, self.how.scale);
        made
    }
}

/// What a block does with its own input.
pub(crate) struct InputPart<B: Backend> {
    layer: usize,
    width: usize,
    act: Activation,
    gate: Projection<B>,
    out: Projection<B>,
    norm: B::Norm,
}

impl<B: Backend> InputPart<B> {
    pub(crate) fn load(from: &Loader<'_, B>, how: &LayerInputs) -> Result<InputPart<B>, ModelError> {
        Ok(InputPart {
            layer: from.layer,
            width: how.width,
            act: how.act,
            gate: from.matrix(Role::InputGate)?,
            out: from.matrix(Role::InputOut)?,
            norm: from.norm(Role::InputNorm)?,
        })
    }

    pub(crate) fn matrices(&self) -> [&Projection<B>; 2] {
        [&self.gate, &self.out]
    }

    /// What is added to the stream `x`; `inputs` are those of all layers.
    pub(crate) fn forward(&self, x: &B::Rows, inputs: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let (_, cols) = backend.shape(inputs);
        let mine = backend.columns(inputs, cols, self.layer * self.width..(self.layer + 1) * self.width);
        look.input([&self.gate.place], x)?;
        let mut inner = self.gate.apply(backend, x);
        look.output(&self.gate.place, &inner)?;
        span("activation", || backend.activate(self.act, &mut inner, Some(&mine)));
        look.input([&self.out.place], &inner)?;
        let y = self.out.apply(backend, &inner);
        look.output(&self.out.place, &y)?;
        Ok(normed(backend, &self.norm, &y))
    }
}

/// A norm of each head that has no scale: an RMS norm, whatever the network's others are.
pub(crate) fn plain_norm<B: Backend>(backend: &B, weights: &dyn Weights, place: Place, width: usize) -> B::Norm {
    let own = Norm { kind: NormKind::Rms, divisor: None, offset: 0.0, ..weights.spec().norm };
    backend.norm_of(&place, own, width, None, None)
}

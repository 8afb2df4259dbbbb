//! The whole network: embedding, blocks, head.

use std::sync::Arc;

use lacuna_base::{Mat, MatRef};
use lacuna_contract::Gate;
use lacuna_format::Weights;
use lacuna_kernels::Activations;
use lacuna_spec::{Place, Positions, Role, Spec};

use crate::altup::Streams;
use crate::backend::{Backend, Cpu, Measure, Reads};
use crate::carried::{InputsPart, Layout, Side};
use crate::gating::{GateStore, Gating};
use crate::kv::prepared;
use crate::lent::Reused;
use crate::parts::{norm, tensor, vector};
use crate::profile::span;
use crate::{Batch, Block, KvStore, Lent, ModelError, Tap};

/// Tokens to the residual stream. Rows are decoded when asked for, never the whole table.
pub struct Embedding<B: Backend = Cpu> {
    backend: B,
    table: B::Table,
    vocab: usize,
    scale: f32,
    positions: Option<Learned<B>>,
    norm: Option<B::Norm>,
    /// What makes the inputs of single layers.
    inputs: Option<InputsPart<B>>,
    /// What makes several streams of one.
    streams: Option<Streams<B>>,
    layout: Layout,
    /// Columns of keys and values that blocks which run one by one carry.
    keys: usize,
}

/// Learned positions: their table, its rows, and the row of position 0.
struct Learned<B: Backend> {
    table: B::Table,
    rows: usize,
    offset: usize,
}

impl Embedding {
    /// Loads the embedding (and learned positions) of a model for the processor.
    pub fn load(weights: &dyn Weights) -> Result<Embedding, ModelError> {
        Embedding::load_on(&Cpu, weights)
    }
}

impl<B: Backend> Embedding<B> {
    /// Loads the embedding (and learned positions) of a model on a backend.
    pub fn load_on(backend: &B, weights: &dyn Weights) -> Result<Embedding<B>, ModelError> {
        let place = Place::global(Role::Embed);
        let table = tensor(weights, place)?;
        table.check().map_err(|e| ModelError::bad(&place, e))?;
        let positions = match weights.spec().positions {
            Positions::None => None,
            Positions::Learned { offset } => {
                let place = Place::global(Role::Positions);
                let missing = || ModelError::Missing { place: place.to_string() };
                let stored = weights.get(&place)?.ok_or_else(missing)?;
                stored.check().map_err(|e| ModelError::bad(&place, e))?;
                if stored.cols != table.cols {
                    return Err(ModelError::Shape {
                        place: place.to_string(),
                        have_rows: stored.rows,
                        have_cols: stored.cols,
                        rows: stored.rows,
                        cols: table.cols,
                    });
                }
                Some(Learned { rows: stored.rows, table: backend.table(stored), offset })
            }
        };
        let (vocab, scale) = (table.rows, weights.spec().embed_scale);
        let norm =
            weights.spec().embed_norm.then(|| norm(backend, weights, Place::global(Role::EmbedNorm))).transpose()?;
        let inputs = InputsPart::load(backend, weights)?;
        let streams = Streams::load(backend, weights, Role::AltupIn)?;
        let spec = weights.spec();
        let keys = spec.carried() - spec.streams() - spec.layer_inputs.map_or(0, |i| i.width * spec.layers.len());
        let (layout, table) = (Layout::of(spec), backend.table(table));
        Ok(Embedding { backend: backend.clone(), table, vocab, scale, positions, norm, inputs, streams, layout, keys })
    }

    /// What the first block is handed where blocks run one by one: the residual stream of `tokens` at `positions`,
    /// `[tokens, hidden]`; of networks that carry more, [`Spec::carried`] columns.
    pub fn rows(&self, tokens: &[u32], positions: &[usize]) -> Result<B::Rows, ModelError> {
        self.check(tokens, positions)?;
        let (x, inputs) = self.embed(&self.backend.upload_ids(tokens), positions);
        if self.layout.is_plain() {
            return Ok(x);
        }
        let x = self.layout.join(&self.backend, x, Side::of_step(inputs));
        if self.keys == 0 {
            return Ok(x);
        }
        let none = self.backend.upload(Mat::zeros(tokens.len(), self.keys).view());
        let widths = [self.backend.shape(&x).1, self.keys];
        Ok(self.backend.beside([&x, &none], widths))
    }

    /// Bytes of weights read for one token, beside rows that are looked up.
    pub fn weights_bytes(&self) -> u64 {
        self.inputs.as_ref().map_or(0, InputsPart::weights_bytes)
            + self.streams.as_ref().map_or(0, Streams::weights_bytes)
    }

    /// Whether there are rows for all tokens and positions.
    fn check(&self, tokens: &[u32], positions: &[usize]) -> Result<(), ModelError> {
        assert_eq!(tokens.len(), positions.len(), "a position for each token");
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= self.vocab) {
            return Err(ModelError::Token { token, vocab: self.vocab });
        }
        self.check_positions(positions)
    }

    fn check_positions(&self, positions: &[usize]) -> Result<(), ModelError> {
        let Some(Learned { rows, offset, .. }) = self.positions else { return Ok(()) };
        match positions.iter().find(|&p| p + offset >= rows) {
            Some(&position) => Err(ModelError::Position { position, rows: rows.saturating_sub(offset) }),
            None => Ok(()),
        }
    }

    /// The residual stream before the first block, and the inputs of single layers, where there are some: of tokens
    /// that lie with the backend and positions that were checked.
    fn embed(&self, tokens: &B::Ids, positions: &[usize]) -> (B::Rows, Option<B::Rows>) {
        let mut x = self.backend.embed(&self.table, tokens);
        if self.scale != 1.0 {
            self.backend.scale(&mut x, self.scale);
        }
        if let Some(learned) = &self.positions {
            let mut at = Reused::<Vec<u32>>::default();
            at.extend(positions.iter().map(|p| (p + learned.offset) as u32));
            let rows = self.backend.embed(&learned.table, &self.backend.upload_ids(&at));
            self.backend.add(&mut x, &rows);
        }
        let x = match &self.norm {
            Some(n) => span("norm", || self.backend.norm(n, &x)),
            None => x,
        };
        let inputs = self.inputs.as_ref().map(|part| part.of(&self.backend, tokens, &x));
        match &self.streams {
            Some(all) => (all.spread(&self.backend, &x), inputs),
            None => (x, inputs),
        }
    }
}

/// The residual stream to logits.
pub struct Head<B: Backend = Cpu> {
    pub(crate) vocab: usize,
    backend: B,
    norm: Option<B::Norm>,
    matrix: B::Matrix,
    measure: Measure,
    scale: f32,
    softcap: Option<f32>,
    /// What makes one stream of several.
    streams: Option<Streams<B>>,
    layout: Layout,
}

impl<B: Backend> Head<B> {
    /// Loads the final norm and the output projection (the embedding itself where they are tied) on a backend.
    pub fn load_on(backend: &B, weights: &dyn Weights, activations: Activations) -> Result<Head<B>, ModelError> {
        let spec = weights.spec();
        let place = Place::global(if spec.tied { Role::Embed } else { Role::Head });
        let stored = tensor(weights, place)?;
        // By far the largest matrix of a small model.
        let bias = Place::global(Role::Head).bias();
        let bias = spec.head_bias.then(|| vector(weights, bias)).transpose()?;
        let matrix = backend.matrix(&place, &stored, bias, activations, &|| weights.release(&place))?;
        let last = Place::global(Role::FinalNorm);
        Ok(Head {
            vocab: stored.rows,
            norm: if spec.final_norm { Some(norm(backend, weights, last)?) } else { None },
            measure: backend.measure(&matrix),
            matrix,
            backend: backend.clone(),
            scale: spec.logit_scale,
            softcap: spec.logit_softcap,
            streams: Streams::load(backend, weights, Role::AltupOut)?,
            layout: Layout::of(spec),
        })
    }

    /// What multiplies the output projection: the normalised residual stream, `[rows, hidden]`; also of rows that carry
    /// more than it.
    pub fn normed(&self, x: &B::Rows) -> B::Rows {
        let stream = self.layout.wide(&self.backend, x).then(|| self.layout.stream(&self.backend, x));
        let merged = self.streams.as_ref().map(|s| s.merged(&self.backend, stream.as_ref().unwrap_or(x)));
        let x = merged.as_ref().or(stream.as_ref()).unwrap_or(x);
        match &self.norm {
            Some(norm) => span("norm", || self.backend.norm(norm, x)),
            None => self.backend.copy(x),
        }
    }

    /// Logits of rows that are normalised, `[rows, vocab]`.
    pub fn project(&self, h: &B::Rows) -> B::Rows {
        let [mut out] = span("head", || self.backend.products([&self.matrix], h));
        if self.scale != 1.0 {
            self.backend.scale(&mut out, self.scale);
        }
        if let Some(cap) = self.softcap {
            self.backend.softcap(&mut out, cap);
        }
        out
    }

    /// Bytes of weights read for one token.
    pub fn weights_bytes(&self) -> u64 {
        self.measure.bytes + self.streams.as_ref().map_or(0, Streams::weights_bytes)
    }
}

impl Head {
    /// Loads the final norm and the output projection (the embedding itself where they are tied) for the processor, for
    /// exact activations.
    pub fn load(weights: &dyn Weights) -> Result<Head, ModelError> {
        Head::load_with(weights, Activations::Exact)
    }

    /// As [`Head::load`], told how activations meet integer codes.
    pub fn load_with(weights: &dyn Weights, activations: Activations) -> Result<Head, ModelError> {
        Head::load_on(&Cpu, weights, activations)
    }

    /// What multiplies the output projection: the normalised residual stream, `[rows, hidden]`.
    pub fn input(&self, x: MatRef<'_>) -> Mat {
        self.normed(&Cpu.upload(x)).into_mat()
    }

    /// Logits of the residual stream's rows, `[rows, vocab]`. A long context times a large vocabulary is gigabytes:
    /// hand in some rows at a time.
    pub fn logits(&self, x: MatRef<'_>) -> Lent {
        self.project(&self.normed(&Cpu.upload(x)))
    }

    /// As [`Head::logits`], into `out`.
    #[track_caller]
    pub fn logits_into(&self, x: MatRef<'_>, out: &mut Mat) {
        let h = self.normed(&Cpu.upload(x));
        span("head", || Cpu.product_into(&self.matrix, h.view(), out.view_mut()));
        Cpu.finish_logits(out, self.scale, self.softcap);
    }
}

/// How to load a model.
#[derive(Clone, Copy, Default)]
pub struct LoadOptions<'a> {
    /// Told how many of how many parts (blocks and the two ends) are loaded.
    pub progress: Option<&'a dyn Fn(usize, usize)>,
    /// How activations meet integer codes.
    pub activations: Activations,
    /// Who says which channels a row needs; nobody: all.
    pub gate: Option<&'a Arc<dyn Gate>>,
}

/// A decoder-only language model, ready to compute.
pub struct Decoder<B: Backend = Cpu> {
    /// The network.
    pub spec: Spec,
    /// Tokens to the residual stream.
    pub embed: Embedding<B>,
    /// The blocks.
    pub blocks: Vec<Block<B>>,
    /// The residual stream to logits.
    pub head: Head<B>,
    gating: Option<Arc<Gating>>,
}

impl Decoder {
    /// Loads everything for the processor.
    pub fn load(weights: &dyn Weights, options: &LoadOptions<'_>) -> Result<Decoder, ModelError> {
        Decoder::load_on(&Cpu, weights, options)
    }

    /// Logits of rows of [`Decoder::forward`]'s result, `[rows, vocab]`.
    pub fn logits(&self, hidden: MatRef<'_>) -> Lent {
        self.head.logits(hidden)
    }
}

impl<B: Backend> Decoder<B> {
    /// Loads everything on a backend. Matrices are packed as it likes them: the file's mapped pages are let go as they
    /// are done with.
    pub fn load_on(backend: &B, weights: &dyn Weights, options: &LoadOptions<'_>) -> Result<Decoder<B>, ModelError> {
        let spec = weights.spec().clone();
        spec.check()?;
        let gating = options.gate.map(|gate| Gating::new(gate, &spec)).transpose()?;
        let parts = spec.layers.len() + 2;
        let tell = |done| {
            if let Some(f) = options.progress {
                f(done, parts);
            }
        };
        tell(0);
        let embed = Embedding::load_on(backend, weights)?;
        tell(1);
        let (mut blocks, mut ropes) = (Vec::with_capacity(spec.layers.len()), Vec::new());
        for layer in 0..spec.layers.len() {
            let mut block = Block::load_gated(backend, weights, layer, options.activations, gating.as_ref())?;
            block.share_rope(spec.layers[layer].attn.as_ref().and_then(|a| a.rope.as_ref()), &mut ropes);
            blocks.push(block);
            weights.spec().layer_places(layer).iter().for_each(|p| weights.release(p));
            tell(layer + 2);
        }
        let head = Head::load_on(backend, weights, options.activations)?;
        // A tied table is read row by row from here on.
        weights.release(&Place::global(if spec.tied { Role::Embed } else { Role::Head }));
        tell(parts);
        Ok(Decoder { spec, embed, blocks, head, gating })
    }

    /// The residual stream after the last block of the batch's rows, `[rows, hidden]`; `tokens` has a token for each
    /// row.
    ///
    /// One step: what the host decides is decided and handed over at its start, and what goes wrong on the backend
    /// surfaces where something is downloaded, or in [`Backend::finish`].
    pub fn forward(
        &self,
        tokens: &[u32],
        batch: &Batch,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<B::Rows, ModelError> {
        self.embed.check(tokens, batch.positions())?;
        self.step(&self.embed.backend.upload_ids(tokens), batch, kv, tap)
    }

    /// As [`Decoder::forward`], of tokens that lie with the backend, such as those of [`Decoder::greedy`]: no id comes
    /// to the host on its way from one step to the next. They must be ids of the vocabulary.
    pub fn forward_ids(
        &self,
        tokens: &B::Ids,
        batch: &Batch,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<B::Rows, ModelError> {
        self.embed.check_positions(batch.positions())?;
        self.step(tokens, batch, kv, tap)
    }

    fn step(
        &self,
        tokens: &B::Ids,
        batch: &Batch,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<B::Rows, ModelError> {
        let layers = self.blocks.iter().filter(|b| b.has_keys()).map(Block::layer);
        let mixers = self.blocks.iter().filter(|b| b.has_mixer()).map(Block::layer);
        let step = self.embed.backend.begin(batch, prepared(layers, mixers, batch, kv)?);
        let (mut x, inputs) = span("embedding", || self.embed.embed(tokens, batch.positions()));
        let mut side = Side::of_step(inputs);
        for block in &self.blocks {
            block.step(&mut x, &mut side, &step, kv, tap)?;
        }
        Ok(x)
    }

    /// The likeliest token after each of some `rows` of [`Decoder::forward`]'s result, where the backend has them; see
    /// [`Backend::argmax`].
    pub fn greedy(&self, hidden: &B::Rows, rows: &[usize]) -> B::Ids {
        let backend = &self.embed.backend;
        let logits = self.head.project(&self.head.normed(&backend.pick(hidden, rows)));
        backend.argmax(&logits)
    }

    /// Multiply-adds of one token's products in the blocks, were every matrix dense: on f32, and on 8-bit activations.
    pub fn work(&self) -> [u64; 2] {
        self.blocks.iter().map(Block::work).fold([0; 2], |[a, b], [c, d]| [a + c, b + d])
    }

    /// Whether any product takes activations of 8 bits.
    pub fn rounds_activations(&self) -> bool {
        self.work()[1] > 0 || self.head.measure.work[1] > 0
    }

    /// Who says which channels rows need.
    pub fn gate(&self) -> Option<&Arc<dyn Gate>> {
        self.gating.as_ref().map(|g| &g.gate)
    }

    /// How the matrices that the gate stands at are kept.
    pub fn gate_store(&self) -> GateStore {
        self.blocks.iter().map(Block::gate_store).fold(GateStore::default(), GateStore::join)
    }

    /// Bytes of the matrices that the gate stands at, read since the model was loaded: a step's rows that read all of a
    /// matrix read it once, together.
    pub fn gate_reads(&self) -> Reads {
        self.gating.as_ref().map_or(Reads::default(), |g| g.reads())
    }

    /// Bytes of weights read for one token.
    pub fn weights_bytes(&self) -> u64 {
        let blocks = self.blocks.iter().map(Block::weights_bytes).sum::<u64>();
        blocks + self.head.weights_bytes() + self.embed.weights_bytes()
    }

    /// Bytes of all weights that one token after the other reads: more than [`Decoder::weights_bytes`] where there are
    /// experts.
    pub fn footprint_bytes(&self) -> u64 {
        let blocks = self.blocks.iter().map(Block::footprint_bytes).sum::<u64>();
        blocks + self.head.weights_bytes() + self.embed.weights_bytes()
    }
}

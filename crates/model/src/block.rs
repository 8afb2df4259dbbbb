//! One decoder block.

mod prompt;

use std::mem;
use std::sync::Arc;

use lacuna_base::Mat;
use lacuna_format::Weights;
use lacuna_kernels::{Activations, Attention};
use lacuna_spec::{Activation, AttnSpec, Order, Place, Role, Rope, Temperature};

use crate::altup::{AltUpPart, LaurelPart};
use crate::backend::{Asks, Backend, Cpu, Decisions, Measure, PromptRead};
use crate::carried::{InputPart, Layout, Side, plain_norm};
use crate::ffn::{FfnPart, Mixture};
use crate::gating::{GateStore, Gated, Gating};
use crate::heads::read;
use crate::kv::prepared;
use crate::latent::LatentPart;
use crate::mixer::MixerPart;
use crate::parts::{Grouped, Projection, gate, norm, vector};
use crate::profile::span;
use crate::tap::Look;
use crate::{Batch, BlockPart, KvStore, Lent, ModelError, Tap};

pub use prompt::PromptPass;

/// A decoder block, ready to compute: `x + attention(x)`, then `x + ffn(x)`; with a matrix in a shortcut `x Sᵀ` instead
/// of that `x`. Where the parts stand side by side, `x + attention(x) + ffn(x)`.
pub struct Block<B: Backend = Cpu> {
    backend: B,
    layer: usize,
    attention: Option<AttentionPart<B>>,
    mixer: Option<MixerPart<B>>,
    ffn: Option<FfnPart<B>>,
    attention_shortcut: Option<Projection<B>>,
    ffn_shortcut: Option<Projection<B>>,
    /// What stands beside attention, and has its norm.
    laurel: Option<LaurelPart<B>>,
    /// What predicts and corrects several residual streams.
    altup: Option<AltUpPart<B>>,
    /// What it makes of its own input.
    input: Option<InputPart<B>>,
    /// How wide rows are cut, where blocks run one by one.
    layout: Layout,
    /// What the stream behind it is multiplied with.
    output_scale: Option<f32>,
    order: Order,
    /// The norm before both parts, where they share one.
    shared: Option<B::Norm>,
    /// Factor on what a part adds.
    scale: f32,
}

pub(crate) struct AttentionPart<B: Backend> {
    /// Beside a mixer: that one's.
    norm: Option<B::Norm>,
    /// What the mixed values are multiplied with, through a sigmoid.
    gate: Option<Projection<B>>,
    reads: Reads<B>,
    o: Projection<B>,
    /// What a gate says of q, k and v, and of o.
    pub(crate) gated: [Option<Gated>; 2],
    pub(crate) clip: Option<f32>,
    /// Of queries, and of keys where it has some.
    pub(crate) qk_norm: Option<(B::Norm, Option<B::Norm>)>,
    pub(crate) v_norm: Option<B::Norm>,
    /// The block whose keys and values it reads, where they are not its own.
    kv_from: Option<usize>,
    pub(crate) norm_after_rope: bool,
    pub(crate) temperature: Option<Temperature>,
    pub(crate) rope: Option<B::Rope>,
    pub(crate) head_dim: usize,
    scores: Attention,
    /// Factor on what o puts out.
    out_scale: f32,
    post_norm: Option<B::Norm>,
}

/// What makes queries, keys and values of the normed residual stream.
// One a block: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Reads<B: Backend> {
    /// q, k and v; no k and v where they are another block's, no v where it is k.
    Plain(Projection<B>, Option<Projection<B>>, Option<Projection<B>>),
    Latent(LatentPart<B>),
}

/// How a block is loaded.
pub(crate) struct Loader<'a, B> {
    pub(crate) backend: &'a B,
    pub(crate) weights: &'a dyn Weights,
    /// The layer whose weights are loaded.
    pub(crate) layer: usize,
    activations: Activations,
    gating: Option<&'a Arc<Gating>>,
}

impl<B: Backend> Loader<'_, B> {
    pub(crate) fn norm(&self, role: Role) -> Result<B::Norm, ModelError> {
        norm(self.backend, self.weights, Place::layer(self.layer, role))
    }

    pub(crate) fn norm_where(&self, on: bool, role: Role) -> Result<Option<B::Norm>, ModelError> {
        on.then(|| self.norm(role)).transpose()
    }

    pub(crate) fn matrix(&self, role: Role) -> Result<Projection<B>, ModelError> {
        Projection::load(self.backend, self.weights, Place::layer(self.layer, role), self.activations)
    }

    /// One whose activations are always met as they are.
    pub(crate) fn exact(&self, role: Role) -> Result<Projection<B>, ModelError> {
        Projection::load(self.backend, self.weights, Place::layer(self.layer, role), Activations::Exact)
    }

    pub(crate) fn vector(&self, role: Role) -> Result<Vec<f32>, ModelError> {
        vector(self.weights, Place::layer(self.layer, role))
    }

    pub(crate) fn grouped(&self, role: Role, experts: usize) -> Result<Grouped<B>, ModelError> {
        let places = (0..experts).map(|e| Place::expert(self.layer, role, e)).collect();
        Grouped::load(self.backend, self.weights, places, self.activations)
    }

    /// See [`gate`].
    pub(crate) fn gate<const N: usize>(
        &self,
        all: [Option<&mut Projection<B>>; N],
    ) -> Result<Option<Gated>, ModelError> {
        gate(self.backend, self.weights, self.gating, all)
    }

    fn attention(&self, a: &AttnSpec, order: Order, alone: bool) -> Result<AttentionPart<B>, ModelError> {
        let (reads, first) = match &a.latent {
            None => {
                let own = |on: bool, role| on.then(|| self.matrix(role)).transpose();
                let mut q = self.matrix(Role::Q)?;
                let mut k = own(a.kv_from.is_none(), Role::K)?;
                let mut v = own(a.kv_from.is_none() && !a.v_is_k, Role::V)?;
                let gated = self.gate([Some(&mut q), k.as_mut(), v.as_mut()])?;
                (Reads::Plain(q, k, v), gated)
            }
            Some(m) => (Reads::Latent(LatentPart::load(self, a, m)?), None),
        };
        let mut o = self.matrix(Role::O)?;
        let last = self.gate([Some(&mut o)])?;
        Ok(AttentionPart {
            norm: self.norm_where(a.pre_norm && alone && order != Order::Shared, Role::AttnNorm)?,
            gate: a.gate.then(|| self.matrix(Role::AttnGate)).transpose()?,
            reads,
            o,
            gated: [first, last],
            clip: a.clip,
            norm_after_rope: a.qk_norm_after_rope,
            temperature: a.temperature,
            qk_norm: if a.qk_norm {
                Some((self.norm(Role::QNorm)?, self.norm_where(a.kv_from.is_none(), Role::KNorm)?))
            } else {
                None
            },
            v_norm: a
                .v_norm
                .then(|| plain_norm(self.backend, self.weights, Place::layer(self.layer, Role::V), a.head_dim)),
            kv_from: a.kv_from,
            rope: a.rope.as_ref().map(|r| self.backend.rope_of(r)),
            head_dim: a.head_dim,
            scores: Attention {
                heads: a.heads,
                scale: a.scale,
                window: a.window,
                chunk: a.chunk,
                softcap: a.softcap,
                alibi: a.alibi,
                sinks: a.sinks.then(|| self.vector(Role::Sinks)).transpose()?.map(Into::into),
            },
            out_scale: a.out_scale,
            post_norm: self.norm_where(a.post_norm, Role::AttnPostNorm)?,
        })
    }
}

impl Block {
    /// Loads block `layer` of a model for the processor, for exact activations. Nothing else of it is touched.
    pub fn load(weights: &dyn Weights, layer: usize) -> Result<Block, ModelError> {
        Block::load_with(weights, layer, Activations::Exact)
    }

    /// As [`Block::load`], told how activations meet integer codes. A router's and a shortcut's always meet them as
    /// they are.
    pub fn load_with(weights: &dyn Weights, layer: usize, activations: Activations) -> Result<Block, ModelError> {
        Block::load_on(&Cpu, weights, layer, activations)
    }

    /// Runs the block: `x`, `[rows, hidden]`, is the residual stream of the batch's rows and becomes that after the
    /// block (of networks that carry more, [`Spec::carried`](lacuna_spec::Spec::carried) columns). Keys and values are written to `kv`, which must hold all earlier positions.
    pub fn forward(
        &self,
        x: &mut Mat,
        batch: &Batch,
        kv: &mut dyn KvStore,
        tap: &mut dyn Tap,
    ) -> Result<(), ModelError> {
        let mut rows = Lent::from(mem::take(x));
        let done = self.run(&mut rows, batch, kv, tap);
        let out = rows.into_mat();
        let (n, cols) = (out.rows(), out.cols());
        // Lent memory may be larger than what is kept for long.
        let mut data = out.into_vec();
        data.shrink_to_fit();
        *x = Mat::from_vec(n, cols, data);
        done
    }
}

impl<B: Backend> Block<B> {
    /// Loads block `layer` of a model on a backend.
    pub fn load_on(
        backend: &B,
        weights: &dyn Weights,
        layer: usize,
        activations: Activations,
    ) -> Result<Block<B>, ModelError> {
        Block::load_gated(backend, weights, layer, activations, None)
    }

    /// As [`Block::load_on`], where a gate says what rows need.
    pub(crate) fn load_gated(
        backend: &B,
        weights: &dyn Weights,
        layer: usize,
        activations: Activations,
        gating: Option<&Arc<Gating>>,
    ) -> Result<Block<B>, ModelError> {
        let missing = || ModelError::Missing { place: format!("layers.{layer}") };
        let described = weights.spec().layers.get(layer).ok_or_else(missing)?;
        let loader = Loader { backend, weights, layer: weights.spec().weights_of(layer), activations, gating };
        let (order, alone) = (described.order, described.mixer.is_none());
        let alone = alone && described.laurel.is_none();
        let attention = described.attn.as_ref().map(|a| loader.attention(a, order, alone)).transpose()?;
        let mixer = described.mixer.as_ref().map(|m| MixerPart::load(&loader, m)).transpose()?;
        let ffn = described.ffn.as_ref().map(|f| loader.ffn(f)).transpose()?;
        let shortcut = |on: bool, role| on.then(|| loader.exact(role)).transpose();
        let attention_shortcut = shortcut(described.attn_shortcut, Role::AttnShortcut)?;
        let ffn_shortcut = shortcut(described.ffn_shortcut, Role::FfnShortcut)?;
        let either = attention.is_some() || ffn.is_some();
        let shared = loader.norm_where(order == Order::Shared && either, Role::AttnNorm)?;
        let laurel = described.laurel.map(|_| LaurelPart::load(&loader)).transpose()?;
        let spec = weights.spec();
        let altup = spec.altup.map(|how| AltUpPart::load(&loader, spec, how)).transpose()?;
        let inputs = spec.layer_inputs.as_ref();
        let input = inputs.map(|how| InputPart::load(&loader, how)).transpose()?;
        let number = || loader.vector(Role::OutputScale).map(|v| v.first().copied().unwrap_or(1.0));
        let output_scale = described.output_scale.then(number).transpose()?;
        let layout = Layout::of(weights.spec());
        let scale = weights.spec().residual_scale;
        let backend = backend.clone();
        Ok(Block {
            backend,
            layer,
            attention,
            mixer,
            ffn,
            attention_shortcut,
            ffn_shortcut,
            laurel,
            altup,
            input,
            layout,
            output_scale,
            order,
            shared,
            scale,
        })
    }

    /// Its number in the model.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Whether it has keys and values of its own.
    pub(crate) fn has_keys(&self) -> bool {
        self.attention.as_ref().is_some_and(|a| a.kv_from.is_none())
    }

    /// Whether it keeps a state.
    pub(crate) fn has_mixer(&self) -> bool {
        self.mixer.is_some()
    }

    /// Takes over a table of the same rope, or leaves its own to the blocks after it: angles are then worked out once
    /// for all of them.
    pub(crate) fn share_rope(&mut self, described: Option<&Rope>, tables: &mut Vec<(Rope, B::Rope)>) {
        let (Some(described), Some(mine)) = (described, self.attention.as_mut().and_then(|a| a.rope.as_mut())) else {
            return;
        };
        match tables.iter().find(|(rope, _)| rope == described) {
            Some((_, table)) => *mine = table.clone(),
            None => tables.push((described.clone(), mine.clone())),
        }
    }

    /// Bytes of weights read for one token (of experts: those that a token uses).
    pub fn weights_bytes(&self) -> u64 {
        let heads = self.per_head().flat_map(|g| &g.measures).map(|m| m.bytes).sum::<u64>();
        let mixture = self.mixture().map_or(0, |m| {
            let all = m.matrices().flat_map(|g| &g.measures).map(|m| m.bytes).sum::<u64>();
            all * m.choice.used as u64 / m.choice.count as u64
        });
        mixture + heads + self.alone().map(|p| p.measure.bytes).sum::<u64>()
    }

    /// Bytes of all weights, which one token after the other reads.
    pub fn footprint_bytes(&self) -> u64 {
        let experts = self.mixture().into_iter().flat_map(Mixture::matrices);
        let experts = experts.chain(self.per_head()).flat_map(|g| &g.measures);
        experts.chain(self.alone().map(|p| &p.measure)).map(|m| m.bytes).sum()
    }

    /// Multiply-adds of one token's products, were every matrix dense: on f32, and on 8-bit activations. Of experts,
    /// those that a token uses.
    pub fn work(&self) -> [u64; 2] {
        let mut all = [0; 2];
        let mut add = |m: &Measure, num: u64, den: u64| {
            all.iter_mut().zip(m.work).for_each(|(all, w)| *all += w * num / den);
        };
        self.alone().for_each(|p| add(&p.measure, 1, 1));
        self.per_head().flat_map(|g| &g.measures).for_each(|m| add(m, 1, 1));
        if let Some(m) = self.mixture() {
            let (used, count) = (m.choice.used as u64, m.choice.count as u64);
            m.matrices().flat_map(|g| &g.measures).for_each(|m| add(m, used, count));
        }
        all
    }

    /// How the matrices that a gate stands at are kept.
    pub(crate) fn gate_store(&self) -> GateStore {
        let attention = self.attention.iter().flat_map(|a| &a.gated);
        attention
            .chain(self.ffn.iter().flat_map(FfnPart::gated))
            .flatten()
            .map(|g| g.store)
            .fold(GateStore::default(), GateStore::join)
    }

    fn mixture(&self) -> Option<&Mixture<B>> {
        self.ffn.as_ref()?.mixture()
    }

    /// The matrices that every head has of its own.
    fn per_head(&self) -> impl Iterator<Item = &Grouped<B>> {
        self.attention
            .iter()
            .flat_map(|a| match &a.reads {
                Reads::Plain(..) => [None, None],
                Reads::Latent(m) => m.per_head().map(Some),
            })
            .flatten()
    }

    /// Every matrix but those of experts and of heads.
    fn alone(&self) -> impl Iterator<Item = &Projection<B>> {
        let attention = self.attention.iter().flat_map(|a| match &a.reads {
            Reads::Plain(q, k, v) => [Some(q), k.as_ref(), v.as_ref(), Some(&a.o)],
            Reads::Latent(m) => {
                let [down, q, kv] = m.alone();
                [down, q, kv, Some(&a.o)]
            }
        });
        let ffn = self.ffn.iter().flat_map(FfnPart::alone);
        let gate = self.attention.iter().flat_map(|a| &a.gate);
        let attention = attention.flatten().chain(gate).chain(self.mixer.iter().flat_map(MixerPart::matrices));
        let input = self.input.iter().flat_map(InputPart::matrices);
        let input = input.chain(self.laurel.iter().flat_map(LaurelPart::matrices));
        let input = input.chain(self.altup.iter().flat_map(AltUpPart::matrices));
        attention.chain(ffn).chain(&self.attention_shortcut).chain(&self.ffn_shortcut).chain(input)
    }

    /// Runs the block on its backend: `x`, `[rows, hidden]`, is the residual stream of the batch's rows and becomes
    /// that after the block. Keys and values are written to `kv`, which must hold all earlier positions. What goes
    /// wrong on the backend surfaces where something is downloaded, or in [`Backend::finish`].
    pub fn run(
        &self,
        x: &mut B::Rows,
        batch: &Batch,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<(), ModelError> {
        // Keys and values of another block are written to that one's pages.
        let keys = self.attention.as_ref().map(|a| a.kv_from.unwrap_or(self.layer));
        let tables = prepared(keys, self.has_mixer().then_some(self.layer), batch, kv)?;
        let step = self.backend.begin(batch, tables);
        if self.layout.is_plain() {
            return self.step(x, &mut Side::of_step(None), &step, kv, tap);
        }
        let (mut stream, mut side) = self.layout.split(&self.backend, x)?;
        let done = self.step(&mut stream, &mut side, &step, kv, tap);
        *x = self.layout.join(&self.backend, stream, side);
        done
    }

    /// The same within a step that has begun.
    pub(crate) fn step(
        &self,
        x: &mut B::Rows,
        side: &mut Side<B>,
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<(), ModelError> {
        self.step_asked(x, (side, step), kv, tap, None)
    }

    /// As [`Block::step`]; where the rows are those of a prompt, with what they ask and read.
    fn step_asked(
        &self,
        x: &mut B::Rows,
        (side, step): (&mut Side<B>, &B::Step),
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
        asked: Option<(Asked<B>, &PromptRead)>,
    ) -> Result<(), ModelError> {
        let mut look = Look::new(&self.backend, tap);
        let keep = |x: &B::Rows, wanted: bool| wanted.then(|| self.backend.copy(x));
        // Of several streams the block computes on one.
        let predicted = match &self.altup {
            Some(part) => {
                let all = part.predicted(x, &mut look)?;
                *x = part.active(&self.backend, &all);
                Some(all)
            }
            None => None,
        };
        let start = keep(x, look.wants.residuals);
        let shared = match (&self.shared, &self.laurel) {
            (Some(n), _) => Some(normed(&self.backend, n, x)),
            (None, Some(l)) => Some(l.normed(&self.backend, x)),
            (None, None) => None,
        };
        let y = match (&self.mixer, &self.attention) {
            (Some(m), a) => {
                let h = m.normed(&self.backend, x);
                let mut y = m.forward(self.layer, &h, step, kv, &mut look)?;
                if let Some(a) = a {
                    let beside = a.forward(self.layer, (x, Some(&h)), (side, step), kv, &mut look, asked)?;
                    span("add", || self.backend.add(&mut y, &beside));
                }
                Some(y)
            }
            (None, Some(a)) => Some(a.forward(self.layer, (x, shared.as_ref()), (side, step), kv, &mut look, asked)?),
            (None, None) => None,
        };
        // Side by side the FFN reads the stream before attention is added.
        let beside = match &self.ffn {
            Some(f) if self.order != Order::Sequential => Some(f.forward((x, shared.as_ref()), &mut look)?),
            _ => None,
        };
        join(x, self.attention_shortcut.as_ref(), y, self.scale, &mut look)?;
        if let (Some(l), Some(h)) = (&self.laurel, &shared) {
            l.add(x, h, &mut look)?;
        }
        if self.attention.is_some() && self.mixer.is_none() {
            look.residual(self.layer, BlockPart::Attention, &start, x)?;
        }
        let middle = keep(x, look.wants.residuals);
        let y = match (beside, &self.ffn) {
            (None, Some(f)) => Some(f.forward((x, None), &mut look)?),
            (beside, _) => beside,
        };
        join(x, self.ffn_shortcut.as_ref(), y, self.scale, &mut look)?;
        if self.ffn.is_some() {
            look.residual(self.layer, BlockPart::Ffn, &middle, x)?;
        }
        let input = self.input.as_ref().zip(side.inputs.as_ref());
        if let (Some(part), Some(all)) = (&self.altup, &predicted) {
            *x = part.corrected(all, x, input, &mut look)?;
            // Taps see the stream that was computed on.
            let after = look.wants.residuals.then(|| part.active(&self.backend, x));
            return match after {
                Some(after) => look.residual(self.layer, BlockPart::Block, &start, &after),
                None => Ok(()),
            };
        }
        if let Some((part, inputs)) = input {
            let y = part.forward(x, inputs, &mut look)?;
            span("add", || self.backend.add(x, &y));
        }
        if let Some(by) = self.output_scale {
            self.backend.scale(x, by);
        }
        look.residual(self.layer, BlockPart::Block, &start, x)
    }
}

/// The residual stream behind a part that put out `y`: `x`, or what the shortcut's matrix makes of it, and `y` times
/// `scale`.
fn join<B: Backend>(
    x: &mut B::Rows,
    shortcut: Option<&Projection<B>>,
    y: Option<B::Rows>,
    scale: f32,
    look: &mut Look<'_, B>,
) -> Result<(), ModelError> {
    if let Some(s) = shortcut {
        look.input([&s.place], x)?;
        let turned = s.apply(look.backend, x);
        look.output(&s.place, &turned)?;
        *x = turned;
    }
    if let Some(mut y) = y {
        if scale != 1.0 {
            look.backend.scale(&mut y, scale);
        }
        span("add", || look.backend.add(x, &y));
    }
    Ok(())
}

pub(crate) fn normed<B: Backend>(backend: &B, norm: &B::Norm, x: &B::Rows) -> B::Rows {
    span("norm", || backend.norm(norm, x))
}

/// What rows ask of the keys before them: their queries, and what the mixed values are multiplied with.
struct Asked<B: Backend> {
    q: B::Rows,
    gate: Option<B::Rows>,
}

impl<B: Backend> AttentionPart<B> {
    /// The queries of rows; their keys and values are written.
    fn ask(
        &self,
        layer: usize,
        x: (&B::Rows, Option<&B::Rows>),
        (side, step): (&mut Side<B>, &B::Step),
        kv: &mut dyn KvStore<B>,
        look: &mut Look<'_, B>,
    ) -> Result<Asked<B>, ModelError> {
        let backend = look.backend;
        let mut own = None;
        let h = read(backend, self.norm.as_ref(), x, &mut own);
        let (q, own) = match &self.reads {
            Reads::Plain(q, k, v) => self.plain((q, k.as_ref(), v.as_ref()), h, step, look)?,
            Reads::Latent(m) => {
                let (q, k) = m.read(h, self.rope.as_ref(), step, look)?;
                (q, Some((k, None)))
            }
        };
        if let Some((k, Some(v))) = &own {
            side.keep(backend, layer, [k, v]);
        }
        // Pages of another block hold its keys and values already, but where that block ran apart.
        let layer = self.kv_from.unwrap_or(layer);
        let write = match (&own, side.keys_of(layer)) {
            (Some((k, v)), _) => Some([k, v.as_ref().unwrap_or(k)]),
            (None, carried) => carried.map(|[k, v]| [k, v]),
        };
        let gate = match &self.gate {
            Some(p) => {
                look.input([&p.place], h)?;
                let gate = p.apply(backend, h);
                look.output(&p.place, &gate)?;
                Some(gate)
            }
            None => None,
        };
        let pages = kv.pages(layer)?;
        if let Some([k, v]) = write {
            span("keys and values written", || backend.write(pages, layer, step, k, v));
        }
        Ok(Asked { q, gate })
    }

    fn forward(
        &self,
        layer: usize,
        x: (&B::Rows, Option<&B::Rows>),
        (side, step): (&mut Side<B>, &B::Step),
        kv: &mut dyn KvStore<B>,
        look: &mut Look<'_, B>,
        asked: Option<(Asked<B>, &PromptRead)>,
    ) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let (Asked { q, gate }, foreseen) = match asked {
            Some((asked, read)) => (asked, Some(read)),
            None => (self.ask(layer, x, (side, step), kv, look)?, None),
        };
        let layer = self.kv_from.unwrap_or(layer);
        let (mut mass, select) = (kv.lend_mass(layer), kv.selector(layer));
        let mut decisions = select.as_ref().map_or_else(Decisions::default, |_| kv.lend_decisions(layer));
        let pages = kv.pages(layer)?;
        let mixed = match (foreseen, select.as_deref()) {
            (Some(read), _) => {
                let some = || backend.attend_foreseen(&self.scores, pages, layer, step, &q, read);
                span("attention", some).map(|(mixed, reads)| (mixed, Some(reads)))
            }
            (None, None) => Ok((span("attention", || backend.attend(&self.scores, pages, layer, step, &q)), None)),
            (None, Some(select)) => {
                let asks = Asks { select, decisions: &mut decisions };
                let some = || backend.attend_chosen(&self.scores, pages, layer, step, &q, asks);
                span("attention", some).map(|(mixed, reads)| (mixed, Some(reads)))
            }
        };
        if !mass.is_empty() {
            span("attention added up", || backend.weigh(&self.scores, pages, layer, step, &q, &mut mass));
            kv.take_mass(layer, mass);
        }
        if select.is_some() {
            kv.take_decisions(layer, decisions);
        }
        let (mixed, reads) = mixed?;
        if let Some(reads) = reads {
            kv.count_reads(reads);
        }
        let mixed = match &self.reads {
            Reads::Plain(..) => mixed,
            Reads::Latent(m) => m.mixed(&mixed, look)?,
        };
        let mixed = match gate {
            Some(mut gate) => {
                span("activation", || backend.activate(Activation::Sigmoid, &mut gate, Some(&mixed)));
                gate
            }
            None => mixed,
        };
        look.input([&self.o.place], &mixed)?;
        let [mut y] = Projection::gated(backend, [&self.o], self.gated[1].as_ref(), &mixed)?;
        look.output(&self.o.place, &y)?;
        if self.out_scale != 1.0 {
            backend.scale(&mut y, self.out_scale);
        }
        Ok(match &self.post_norm {
            Some(n) => normed(backend, n, &y),
            None => y,
        })
    }
}

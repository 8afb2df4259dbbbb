//! One decoder block.

mod prompt;

use std::mem;
use std::sync::Arc;

use lacuna_base::Mat;
use lacuna_format::Weights;
use lacuna_kernels::{Activations, Attention};
use lacuna_spec::{Activation, AttnSpec, Order, Place, Role, Rope, Temperature};

use crate::backend::{Asks, Backend, Cpu, Decisions, Measure, PromptRead};
use crate::ffn::{FfnPart, Mixture};
use crate::gating::{GateStore, Gated, Gating};
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
    order: Order,
    /// The norm before both parts, where they share one.
    shared: Option<B::Norm>,
    /// Factor on what a part adds.
    scale: f32,
}

struct AttentionPart<B: Backend> {
    /// Beside a mixer: that one's.
    norm: Option<B::Norm>,
    /// What the mixed values are multiplied with, through a sigmoid.
    gate: Option<Projection<B>>,
    reads: Reads<B>,
    o: Projection<B>,
    /// What a gate says of q, k and v, and of o.
    gated: [Option<Gated>; 2],
    clip: Option<f32>,
    qk_norm: Option<(B::Norm, B::Norm)>,
    norm_after_rope: bool,
    temperature: Option<Temperature>,
    rope: Option<B::Rope>,
    head_dim: usize,
    scores: Attention,
    post_norm: Option<B::Norm>,
}

/// What makes queries, keys and values of the normed residual stream.
// One a block: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Reads<B: Backend> {
    Plain([Projection<B>; 3]),
    Latent(LatentPart<B>),
}

/// How a block is loaded.
pub(crate) struct Loader<'a, B> {
    pub(crate) backend: &'a B,
    pub(crate) weights: &'a dyn Weights,
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
                let [mut q, mut k, mut v] = [self.matrix(Role::Q)?, self.matrix(Role::K)?, self.matrix(Role::V)?];
                let gated = self.gate([Some(&mut q), Some(&mut k), Some(&mut v)])?;
                (Reads::Plain([q, k, v]), gated)
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
            qk_norm: if a.qk_norm { Some((self.norm(Role::QNorm)?, self.norm(Role::KNorm)?)) } else { None },
            rope: a.rope.as_ref().map(|r| self.backend.rope_of(r)),
            head_dim: a.head_dim,
            scores: Attention {
                heads: a.heads,
                scale: a.scale,
                window: a.window,
                softcap: a.softcap,
                alibi: a.alibi,
                sinks: a.sinks.then(|| self.vector(Role::Sinks)).transpose()?.map(Into::into),
            },
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
    /// block. Keys and values are written to `kv`, which must hold all earlier positions.
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
        let loader = Loader { backend, weights, layer, activations, gating };
        let (order, alone) = (described.order, described.mixer.is_none());
        let attention = described.attn.as_ref().map(|a| loader.attention(a, order, alone)).transpose()?;
        let mixer = described.mixer.as_ref().map(|m| MixerPart::load(&loader, m)).transpose()?;
        let ffn = described.ffn.as_ref().map(|f| loader.ffn(f)).transpose()?;
        let shortcut = |on: bool, role| on.then(|| loader.exact(role)).transpose();
        let attention_shortcut = shortcut(described.attn_shortcut, Role::AttnShortcut)?;
        let ffn_shortcut = shortcut(described.ffn_shortcut, Role::FfnShortcut)?;
        let either = attention.is_some() || ffn.is_some();
        let shared = loader.norm_where(order == Order::Shared && either, Role::AttnNorm)?;
        let scale = weights.spec().residual_scale;
        let backend = backend.clone();
        Ok(Block { backend, layer, attention, mixer, ffn, attention_shortcut, ffn_shortcut, order, shared, scale })
    }

    /// Its number in the model.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Whether it has keys and values.
    pub(crate) fn has_attention(&self) -> bool {
        self.attention.is_some()
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
                Reads::Plain(_) => [None, None],
                Reads::Latent(m) => m.per_head().map(Some),
            })
            .flatten()
    }

    /// Every matrix but those of experts and of heads.
    fn alone(&self) -> impl Iterator<Item = &Projection<B>> {
        let attention = self.attention.iter().flat_map(|a| match &a.reads {
            Reads::Plain([q, k, v]) => [Some(q), Some(k), Some(v), Some(&a.o)],
            Reads::Latent(m) => {
                let [down, q, kv] = m.alone();
                [down, q, kv, Some(&a.o)]
            }
        });
        let ffn = self.ffn.iter().flat_map(FfnPart::alone);
        let gate = self.attention.iter().flat_map(|a| &a.gate);
        let attention = attention.flatten().chain(gate).chain(self.mixer.iter().flat_map(MixerPart::matrices));
        attention.chain(ffn).chain(&self.attention_shortcut).chain(&self.ffn_shortcut)
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
        let (attention, mixer) = (self.has_attention(), self.has_mixer());
        let tables = prepared(attention.then_some(self.layer), mixer.then_some(self.layer), batch, kv)?;
        self.step(x, &self.backend.begin(batch, tables), kv, tap)
    }

    /// The same within a step that has begun.
    pub(crate) fn step(
        &self,
        x: &mut B::Rows,
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
    ) -> Result<(), ModelError> {
        self.step_asked(x, step, kv, tap, None)
    }

    /// As [`Block::step`]; where the rows are those of a prompt, with what they ask and read.
    fn step_asked(
        &self,
        x: &mut B::Rows,
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        tap: &mut dyn Tap<B>,
        asked: Option<(Asked<B>, &PromptRead)>,
    ) -> Result<(), ModelError> {
        let mut look = Look::new(&self.backend, tap);
        let keep = |x: &B::Rows, wanted: bool| wanted.then(|| self.backend.copy(x));
        let start = keep(x, look.wants.residuals);
        let shared = self.shared.as_ref().map(|n| normed(&self.backend, n, x));
        let y = match (&self.mixer, &self.attention) {
            (Some(m), a) => {
                let h = m.normed(&self.backend, x);
                let mut y = m.forward(self.layer, &h, step, kv, &mut look)?;
                if let Some(a) = a {
                    let beside = a.forward(self.layer, (x, Some(&h)), step, kv, &mut look, asked)?;
                    span("add", || self.backend.add(&mut y, &beside));
                }
                Some(y)
            }
            (None, Some(a)) => Some(a.forward(self.layer, (x, shared.as_ref()), step, kv, &mut look, asked)?),
            (None, None) => None,
        };
        // Side by side the FFN reads the stream before attention is added.
        let beside = match &self.ffn {
            Some(f) if self.order != Order::Sequential => Some(f.forward((x, shared.as_ref()), &mut look)?),
            _ => None,
        };
        join(x, self.attention_shortcut.as_ref(), y, self.scale, &mut look)?;
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

/// What a part's matrices read: rows that are normalised already, or the stream through the part's norm, where it has
/// one.
pub(crate) fn read<'a, B: Backend>(
    backend: &B,
    norm: Option<&B::Norm>,
    (x, shared): (&'a B::Rows, Option<&'a B::Rows>),
    own: &'a mut Option<B::Rows>,
) -> &'a B::Rows {
    match (shared, norm) {
        (Some(h), _) => h,
        (None, Some(n)) => own.insert(normed(backend, n, x)),
        (None, None) => x,
    }
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
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        look: &mut Look<'_, B>,
    ) -> Result<Asked<B>, ModelError> {
        let backend = look.backend;
        let mut own = None;
        let h = read(backend, self.norm.as_ref(), x, &mut own);
        let (q, k, v) = match &self.reads {
            Reads::Plain(read) => {
                let [q, k, v] = self.plain(read, h, step, look)?;
                (q, k, Some(v))
            }
            Reads::Latent(m) => {
                let (q, k) = m.read(h, self.rope.as_ref(), step, look)?;
                (q, k, None)
            }
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
        span("keys and values written", || backend.write(pages, layer, step, &k, v.as_ref().unwrap_or(&k)));
        Ok(Asked { q, gate })
    }

    fn forward(
        &self,
        layer: usize,
        x: (&B::Rows, Option<&B::Rows>),
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        look: &mut Look<'_, B>,
        asked: Option<(Asked<B>, &PromptRead)>,
    ) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let (Asked { q, gate }, foreseen) = match asked {
            Some((asked, read)) => (asked, Some(read)),
            None => (self.ask(layer, x, step, kv, look)?, None),
        };
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
            Reads::Plain(_) => mixed,
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
        let [y] = Projection::gated(backend, [&self.o], self.gated[1].as_ref(), &mixed)?;
        look.output(&self.o.place, &y)?;
        Ok(match &self.post_norm {
            Some(n) => normed(backend, n, &y),
            None => y,
        })
    }
}

impl<B: Backend> AttentionPart<B> {
    /// Queries, keys and values, each by a matrix of its own.
    fn plain(
        &self,
        read: &[Projection<B>; 3],
        h: &B::Rows,
        step: &B::Step,
        look: &mut Look<'_, B>,
    ) -> Result<[B::Rows; 3], ModelError> {
        let backend = look.backend;
        look.input(read.each_ref().map(|p| &p.place), h)?;
        let [mut q, mut k, mut v] = Projection::gated(backend, read.each_ref(), self.gated[0].as_ref(), h)?;
        for (p, y) in read.iter().zip([&q, &k, &v]) {
            look.output(&p.place, y)?;
        }
        if let Some(by) = self.clip {
            [&mut q, &mut k, &mut v].into_iter().for_each(|x| backend.clip(x, by));
        }
        let norms = |q: &mut B::Rows, k: &mut B::Rows, now: bool| {
            if let Some((qn, kn)) = self.qk_norm.as_ref().filter(|_| now) {
                *q = normed(backend, qn, q);
                *k = normed(backend, kn, k);
            }
        };
        norms(&mut q, &mut k, !self.norm_after_rope);
        if let Some(rope) = &self.rope {
            span("rope", || backend.rope(rope, self.head_dim, step, [&mut q, &mut k]));
        }
        norms(&mut q, &mut k, self.norm_after_rope);
        if let Some(t) = self.temperature {
            backend.temper(t, step, &mut q);
        }
        Ok([q, k, v])
    }
}

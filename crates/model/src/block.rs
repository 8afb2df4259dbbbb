//! One decoder block.

use std::mem;

use lacuna_base::Mat;
use lacuna_format::Weights;
use lacuna_kernels::{Activations, Attention};
use lacuna_spec::{Activation, AttnSpec, Experts, FfnSpec, Place, Role, Rope};

use crate::backend::{Backend, Cpu, Measure};
use crate::kv::prepared;
use crate::mixer::MixerPart;
use crate::parts::{Grouped, Projection, norm};
use crate::profile::span;
use crate::tap::Look;
use crate::{Batch, BlockPart, KvStore, Lent, ModelError, Tap};

/// A decoder block, ready to compute: `x + attention(x)`, then `x + ffn(x)`; with a matrix in a shortcut `x Sᵀ` instead
/// of that `x`.
pub struct Block<B: Backend = Cpu> {
    backend: B,
    layer: usize,
    attention: Option<AttentionPart<B>>,
    mixer: Option<MixerPart<B>>,
    ffn: Option<FfnPart<B>>,
    attention_shortcut: Option<Projection<B>>,
    ffn_shortcut: Option<Projection<B>>,
}

struct AttentionPart<B: Backend> {
    /// Beside a mixer: that one's.
    norm: Option<B::Norm>,
    gate: Option<Projection<B>>,
    q: Projection<B>,
    k: Projection<B>,
    v: Projection<B>,
    o: Projection<B>,
    qk_norm: Option<(B::Norm, B::Norm)>,
    rope: Option<B::Rope>,
    head_dim: usize,
    scores: Attention,
    post_norm: Option<B::Norm>,
}

struct FfnPart<B: Backend> {
    norm: B::Norm,
    act: Activation,
    body: Body<B>,
    post_norm: Option<B::Norm>,
}

// One a block: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Body<B: Backend> {
    Dense { gate: Option<Projection<B>>, up: Projection<B>, down: Projection<B> },
    Mixture(Mixture<B>),
}

struct Mixture<B: Backend> {
    router: Projection<B>,
    choice: Experts,
    gate: Option<Grouped<B>>,
    up: Grouped<B>,
    down: Grouped<B>,
}

/// How a block is loaded.
pub(crate) struct Loader<'a, B> {
    pub(crate) backend: &'a B,
    pub(crate) weights: &'a dyn Weights,
    pub(crate) layer: usize,
    activations: Activations,
}

impl<B: Backend> Loader<'_, B> {
    pub(crate) fn norm(&self, role: Role) -> Result<B::Norm, ModelError> {
        norm(self.backend, self.weights, Place::layer(self.layer, role))
    }

    pub(crate) fn matrix(&self, role: Role) -> Result<Projection<B>, ModelError> {
        Projection::load(self.backend, self.weights, Place::layer(self.layer, role), self.activations)
    }

    /// One whose activations are always met as they are.
    pub(crate) fn exact(&self, role: Role) -> Result<Projection<B>, ModelError> {
        Projection::load(self.backend, self.weights, Place::layer(self.layer, role), Activations::Exact)
    }

    fn grouped(&self, role: Role, experts: usize) -> Result<Grouped<B>, ModelError> {
        let places = (0..experts).map(|e| Place::expert(self.layer, role, e)).collect();
        Grouped::load(self.backend, self.weights, places, self.activations)
    }

    fn attention(&self, a: &AttnSpec, alone: bool) -> Result<AttentionPart<B>, ModelError> {
        Ok(AttentionPart {
            norm: alone.then(|| self.norm(Role::AttnNorm)).transpose()?,
            gate: a.gate.then(|| self.matrix(Role::AttnGate)).transpose()?,
            q: self.matrix(Role::Q)?,
            k: self.matrix(Role::K)?,
            v: self.matrix(Role::V)?,
            o: self.matrix(Role::O)?,
            qk_norm: if a.qk_norm { Some((self.norm(Role::QNorm)?, self.norm(Role::KNorm)?)) } else { None },
            rope: a.rope.as_ref().map(|r| self.backend.rope_of(r)),
            head_dim: a.head_dim,
            scores: Attention { heads: a.heads, scale: a.scale, window: a.window, softcap: a.softcap },
            post_norm: if a.post_norm { Some(self.norm(Role::AttnPostNorm)?) } else { None },
        })
    }

    fn ffn(&self, f: &FfnSpec) -> Result<FfnPart<B>, ModelError> {
        let body = match f.experts {
            None => Body::Dense {
                gate: f.gated.then(|| self.matrix(Role::Gate)).transpose()?,
                up: self.matrix(Role::Up)?,
                down: self.matrix(Role::Down)?,
            },
            Some(choice) => Body::Mixture(Mixture {
                router: self.exact(Role::Router)?,
                choice,
                gate: f.gated.then(|| self.grouped(Role::Gate, choice.count)).transpose()?,
                up: self.grouped(Role::Up, choice.count)?,
                down: self.grouped(Role::Down, choice.count)?,
            }),
        };
        let post_norm = if f.post_norm { Some(self.norm(Role::FfnPostNorm)?) } else { None };
        Ok(FfnPart { norm: self.norm(Role::FfnNorm)?, act: f.act, body, post_norm })
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
        let missing = || ModelError::Missing { place: format!("layers.{layer}") };
        let described = weights.spec().layers.get(layer).ok_or_else(missing)?;
        let loader = Loader { backend, weights, layer, activations };
        let alone = described.mixer.is_none();
        let attention = described.attn.as_ref().map(|a| loader.attention(a, alone)).transpose()?;
        let mixer = described.mixer.as_ref().map(|m| MixerPart::load(&loader, m)).transpose()?;
        let ffn = described.ffn.as_ref().map(|f| loader.ffn(f)).transpose()?;
        let shortcut = |on: bool, role| on.then(|| loader.exact(role)).transpose();
        let attention_shortcut = shortcut(described.attn_shortcut, Role::AttnShortcut)?;
        let ffn_shortcut = shortcut(described.ffn_shortcut, Role::FfnShortcut)?;
        Ok(Block { backend: backend.clone(), layer, attention, mixer, ffn, attention_shortcut, ffn_shortcut })
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
        let mixture = self.mixture().map_or(0, |m| {
            let all = m.matrices().flat_map(|g| &g.measures).map(|m| m.bytes).sum::<u64>();
            all * m.choice.used as u64 / m.choice.count as u64
        });
        mixture + self.alone().map(|p| p.measure.bytes).sum::<u64>()
    }

    /// Bytes of all weights, which one token after the other reads.
    pub fn footprint_bytes(&self) -> u64 {
        let experts = self.mixture().into_iter().flat_map(Mixture::matrices).flat_map(|g| &g.measures);
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
        if let Some(m) = self.mixture() {
            let (used, count) = (m.choice.used as u64, m.choice.count as u64);
            m.matrices().flat_map(|g| &g.measures).for_each(|m| add(m, used, count));
        }
        all
    }

    fn mixture(&self) -> Option<&Mixture<B>> {
        match &self.ffn.as_ref()?.body {
            Body::Dense { .. } => None,
            Body::Mixture(m) => Some(m),
        }
    }

    /// Every matrix but those of experts.
    fn alone(&self) -> impl Iterator<Item = &Projection<B>> {
        let attention = self.attention.iter().flat_map(|a| [&a.q, &a.k, &a.v, &a.o]);
        let ffn = self.ffn.iter().flat_map(|f| match &f.body {
            Body::Dense { gate, up, down } => [gate.as_ref(), Some(up), Some(down)],
            Body::Mixture(m) => [Some(&m.router), None, None],
        });
        let gate = self.attention.iter().flat_map(|a| &a.gate);
        let attention = attention.chain(gate).chain(self.mixer.iter().flat_map(MixerPart::matrices));
        attention.chain(ffn.flatten()).chain(&self.attention_shortcut).chain(&self.ffn_shortcut)
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
        let mut look = Look::new(&self.backend, tap);
        let keep = |x: &B::Rows, wanted: bool| wanted.then(|| self.backend.copy(x));
        let start = keep(x, look.wants.residuals);
        let y = match (&self.mixer, &self.attention) {
            (Some(m), a) => {
                let h = m.normed(&self.backend, x);
                let mut y = m.forward(self.layer, &h, step, kv, &mut look)?;
                if let Some(a) = a {
                    let beside = a.forward(self.layer, h, step, kv, &mut look)?;
                    span("add", || self.backend.add(&mut y, &beside));
                }
                Some(y)
            }
            (None, Some(a)) => {
                let h = match &a.norm {
                    Some(n) => normed(&self.backend, n, x),
                    None => self.backend.copy(x),
                };
                Some(a.forward(self.layer, h, step, kv, &mut look)?)
            }
            (None, None) => None,
        };
        join(x, self.attention_shortcut.as_ref(), y, &mut look)?;
        if self.attention.is_some() && self.mixer.is_none() {
            look.residual(self.layer, BlockPart::Attention, &start, x)?;
        }
        let middle = keep(x, look.wants.residuals);
        let y = match &self.ffn {
            Some(f) => Some(f.forward(x, &mut look)?),
            None => None,
        };
        join(x, self.ffn_shortcut.as_ref(), y, &mut look)?;
        if self.ffn.is_some() {
            look.residual(self.layer, BlockPart::Ffn, &middle, x)?;
        }
        look.residual(self.layer, BlockPart::Block, &start, x)
    }
}

/// The residual stream behind a part that put out `y`: `x`, or what the shortcut's matrix makes of it, and `y`.
fn join<B: Backend>(
    x: &mut B::Rows,
    shortcut: Option<&Projection<B>>,
    y: Option<B::Rows>,
    look: &mut Look<'_, B>,
) -> Result<(), ModelError> {
    if let Some(s) = shortcut {
        look.input([&s.place], x)?;
        let turned = s.apply(look.backend, x);
        look.output(&s.place, &turned)?;
        *x = turned;
    }
    if let Some(y) = y {
        span("add", || look.backend.add(x, &y));
    }
    Ok(())
}

pub(crate) fn normed<B: Backend>(backend: &B, norm: &B::Norm, x: &B::Rows) -> B::Rows {
    span("norm", || backend.norm(norm, x))
}

impl<B: Backend> AttentionPart<B> {
    fn forward(
        &self,
        layer: usize,
        h: B::Rows,
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        look: &mut Look<'_, B>,
    ) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let read = [&self.q, &self.k, &self.v];
        look.input(read.map(|p| &p.place), &h)?;
        let [mut q, mut k, v] = Projection::together(backend, read, &h);
        for (p, y) in read.into_iter().zip([&q, &k, &v]) {
            look.output(&p.place, y)?;
        }
        let gate = match &self.gate {
            Some(p) => {
                look.input([&p.place], &h)?;
                let gate = p.apply(backend, &h);
                look.output(&p.place, &gate)?;
                Some(gate)
            }
            None => None,
        };
        drop(h);
        if let Some((qn, kn)) = &self.qk_norm {
            q = normed(backend, qn, &q);
            k = normed(backend, kn, &k);
        }
        if let Some(rope) = &self.rope {
            span("rope", || backend.rope(rope, self.head_dim, step, [&mut q, &mut k]));
        }
        let (mut mass, select) = (kv.lend_mass(layer), kv.selector(layer));
        let pages = kv.pages(layer)?;
        span("keys and values written", || backend.write(pages, layer, step, &k, &v));
        let select = select.as_deref();
        let (mixed, reads) = match select {
            None => (span("attention", || backend.attend(&self.scores, pages, layer, step, &q)), None),
            Some(by) => {
                let some = || backend.attend_chosen(&self.scores, pages, layer, step, &q, by);
                let (mixed, reads) = span("attention", some)?;
                (mixed, Some(reads))
            }
        };
        if !mass.is_empty() {
            span("attention added up", || backend.weigh(&self.scores, pages, layer, step, &q, &mut mass));
            kv.take_mass(layer, mass);
        }
        if let Some(reads) = reads {
            kv.count_reads(reads);
        }
        let mixed = match gate {
            Some(mut gate) => {
                span("activation", || backend.activate(Activation::Sigmoid, &mut gate, Some(&mixed)));
                gate
            }
            None => mixed,
        };
        look.input([&self.o.place], &mixed)?;
        let y = self.o.apply(backend, &mixed);
        look.output(&self.o.place, &y)?;
        Ok(match &self.post_norm {
            Some(n) => normed(backend, n, &y),
            None => y,
        })
    }
}

impl<B: Backend> FfnPart<B> {
    fn forward(&self, x: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let h = normed(backend, &self.norm, x);
        let y = match &self.body {
            Body::Dense { gate, up, down } => {
                let inner = self.inner(gate.as_ref(), up, &h, look)?;
                look.input([&down.place], &inner)?;
                let y = down.apply(backend, &inner);
                look.output(&down.place, &y)?;
                y
            }
            Body::Mixture(m) => m.forward(self.act, &h, look)?,
        };
        Ok(match &self.post_norm {
            Some(n) => normed(backend, n, &y),
            None => y,
        })
    }

    /// What `down` multiplies.
    fn inner(
        &self,
        gate: Option<&Projection<B>>,
        up: &Projection<B>,
        h: &B::Rows,
        look: &mut Look<'_, B>,
    ) -> Result<B::Rows, ModelError> {
        look.input(gate.into_iter().chain([up]).map(|p| &p.place), h)?;
        let (mut inner, beside) = match gate {
            Some(gate) => {
                let [g, y] = Projection::together(look.backend, [gate, up], h);
                look.output(&gate.place, &g)?;
                look.output(&up.place, &y)?;
                (g, Some(y))
            }
            None => {
                let y = up.apply(look.backend, h);
                look.output(&up.place, &y)?;
                (y, None)
            }
        };
        span("activation", || look.backend.activate(self.act, &mut inner, beside.as_ref()));
        Ok(inner)
    }
}

impl<B: Backend> Mixture<B> {
    fn matrices(&self) -> impl Iterator<Item = &Grouped<B>> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    fn forward(&self, act: Activation, h: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        look.input([&self.router.place], h)?;
        let logits = self.router.apply(backend, h);
        look.output(&self.router.place, &logits)?;
        let routes = span("routing", || backend.route(&logits, self.choice));
        let mine = span("routing", || backend.gather(h, &routes));
        // Which rows are whose is known on the host only where somebody looks.
        let starts =
            if look.wants.inputs || look.wants.outputs { backend.download_starts(&routes)? } else { Vec::new() };
        let each = |look: &mut Look<'_, B>, of: &Grouped<B>, rows: &B::Rows, inputs: bool| {
            starts.windows(2).zip(&of.places).filter(|(w, _)| w[0] < w[1]).try_for_each(|(w, place)| {
                let which = w[0]..w[1];
                if inputs { look.input_of(place, rows, which) } else { look.output_of(place, rows, which) }
            })
        };
        for g in self.gate.iter().chain([&self.up]) {
            each(look, g, &mine, true)?;
        }
        let (mut inner, beside) = match &self.gate {
            Some(gate) => {
                let [g, y] = Grouped::together(backend, [gate, &self.up], &mine, &routes);
                each(look, gate, &g, false)?;
                each(look, &self.up, &y, false)?;
                (g, Some(y))
            }
            None => {
                let y = self.up.apply(backend, &mine, &routes);
                each(look, &self.up, &y, false)?;
                (y, None)
            }
        };
        span("activation", || backend.activate(act, &mut inner, beside.as_ref()));
        each(look, &self.down, &inner, true)?;
        let out = self.down.apply(backend, &inner, &routes);
        each(look, &self.down, &out, false)?;
        Ok(span("routing", || backend.scatter(&out, &routes)))
    }
}

//! One decoder block.

use lacuna_base::{Mat, MatRef};
use lacuna_format::Weights;
use lacuna_kernels as kernels;
use lacuna_kernels::{Activations, Attention, RopeTable};
use lacuna_spec::{Activation, Experts, Place, Role, Rope};

use crate::lent::Lent;
use crate::parts::{NormWeights, Projection};
use crate::profile::span;
use crate::{Batch, BlockPart, KvStore, ModelError, Tap, Wants};

/// A decoder block, ready to compute: `x + attention(x)`, then `x + ffn(x)`; with a matrix in a shortcut `x Sᵀ` instead
/// of that `x`.
pub struct Block {
    layer: usize,
    pub(crate) attention: Option<AttentionPart>,
    pub(crate) ffn: Option<FfnPart>,
    pub(crate) attention_shortcut: Option<Projection>,
    pub(crate) ffn_shortcut: Option<Projection>,
}

pub(crate) struct AttentionPart {
    pub(crate) norm: NormWeights,
    pub(crate) q: Projection,
    pub(crate) k: Projection,
    pub(crate) v: Projection,
    pub(crate) o: Projection,
    pub(crate) qk_norm: Option<(NormWeights, NormWeights)>,
    pub(crate) rope: Option<RopeTable>,
    pub(crate) head_dim: usize,
    pub(crate) scores: Attention,
    pub(crate) post_norm: Option<NormWeights>,
}

pub(crate) struct FfnPart {
    pub(crate) norm: NormWeights,
    pub(crate) act: Activation,
    pub(crate) body: Body,
    pub(crate) post_norm: Option<NormWeights>,
}

// One a block: its size does not matter.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Body {
    Dense(Box<Ffn>),
    Mixture { router: Projection, choice: Experts, experts: Vec<Ffn> },
}

pub(crate) struct Ffn {
    pub(crate) gate: Option<Projection>,
    pub(crate) up: Projection,
    pub(crate) down: Projection,
}

impl Block {
    /// Loads block `layer` of a model, for exact activations. Nothing else of it is touched.
    pub fn load(weights: &dyn Weights, layer: usize) -> Result<Block, ModelError> {
        Block::load_with(weights, layer, Activations::Exact)
    }

    /// As [`Block::load`], told how activations meet integer codes. A router's and a shortcut's always meet them as
    /// they are.
    pub fn load_with(weights: &dyn Weights, layer: usize, activations: Activations) -> Result<Block, ModelError> {
        let spec = weights.spec();
        let missing = || ModelError::Missing { place: format!("layers.{layer}") };
        let described = spec.layers.get(layer).ok_or_else(missing)?;
        let norm = |role| NormWeights::load(weights, Place::layer(layer, role));
        let matrix = |role| Projection::load(weights, Place::layer(layer, role), activations);
        let attention = match &described.attn {
            None => None,
            Some(a) => Some(AttentionPart {
                norm: norm(Role::AttnNorm)?,
                q: matrix(Role::Q)?,
                k: matrix(Role::K)?,
                v: matrix(Role::V)?,
                o: matrix(Role::O)?,
                qk_norm: if a.qk_norm { Some((norm(Role::QNorm)?, norm(Role::KNorm)?)) } else { None },
                rope: a.rope.as_ref().map(RopeTable::new),
                head_dim: a.head_dim,
                scores: Attention { heads: a.heads, scale: a.scale, window: a.window, softcap: a.softcap },
                post_norm: if a.post_norm { Some(norm(Role::AttnPostNorm)?) } else { None },
            }),
        };
        let ffn = match &described.ffn {
            None => None,
            Some(f) => {
                let one = |at: &dyn Fn(Role) -> Place| -> Result<Ffn, ModelError> {
                    Ok(Ffn {
                        gate: if f.gated {
                            Some(Projection::load(weights, at(Role::Gate), activations)?)
                        } else {
                            None
                        },
                        up: Projection::load(weights, at(Role::Up), activations)?,
                        down: Projection::load(weights, at(Role::Down), activations)?,
                    })
                };
                let body = match f.experts {
                    None => Body::Dense(Box::new(one(&|role| Place::layer(layer, role))?)),
                    Some(choice) => Body::Mixture {
                        router: Projection::load(weights, Place::layer(layer, Role::Router), Activations::Exact)?,
                        choice,
                        experts: (0..choice.count)
                            .map(|e| one(&|role| Place::expert(layer, role, e)))
                            .collect::<Result<_, _>>()?,
                    },
                };
                Some(FfnPart {
                    norm: norm(Role::FfnNorm)?,
                    act: f.act,
                    body,
                    post_norm: if f.post_norm { Some(norm(Role::FfnPostNorm)?) } else { None },
                })
            }
        };
        let shortcut = |on: bool, role| {
            on.then(|| Projection::load(weights, Place::layer(layer, role), Activations::Exact)).transpose()
        };
        let attention_shortcut = shortcut(described.attn_shortcut, Role::AttnShortcut)?;
        let ffn_shortcut = shortcut(described.ffn_shortcut, Role::FfnShortcut)?;
        Ok(Block { layer, attention, ffn, attention_shortcut, ffn_shortcut })
    }

    /// Its number in the model.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Takes over a table of the same rope, or leaves its own to the blocks after it: angles are then worked out once
    /// for all of them.
    pub(crate) fn share_rope(&mut self, described: Option<&Rope>, tables: &mut Vec<(Rope, RopeTable)>) {
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
        self.bytes(|all, choice| all * choice.used as u64 / choice.count as u64)
    }

    /// Bytes of all weights, which one token after the other reads.
    pub fn footprint_bytes(&self) -> u64 {
        self.bytes(|all, _| all)
    }

    /// Bytes of weights; of all experts' those that `share` says.
    fn bytes(&self, share: impl Fn(u64, &Experts) -> u64) -> u64 {
        let attention =
            self.attention.as_ref().map_or(0, |a| [&a.q, &a.k, &a.v, &a.o].map(Projection::bytes).iter().sum());
        let ffn = self.ffn.as_ref().map_or(0, |f| match &f.body {
            Body::Dense(f) => f.bytes(),
            Body::Mixture { router, choice, experts } => {
                router.bytes() + share(experts.iter().map(Ffn::bytes).sum(), choice)
            }
        });
        attention + ffn + self.shortcuts().map(Projection::bytes).sum::<u64>()
    }

    /// The matrices in its shortcuts.
    pub(crate) fn shortcuts(&self) -> impl Iterator<Item = &Projection> {
        self.attention_shortcut.iter().chain(&self.ffn_shortcut)
    }

    /// Multiply-adds of one token's products, were every matrix dense: on f32, and on 8-bit activations. Of experts,
    /// those that a token uses.
    pub fn work(&self) -> [u64; 2] {
        let mut all = [0; 2];
        let mut add = |p: &Projection, num: u64, den: u64| {
            all.iter_mut().zip(p.work()).for_each(|(all, w)| *all += w * num / den);
        };
        if let Some(a) = &self.attention {
            [&a.q, &a.k, &a.v, &a.o].into_iter().for_each(|p| add(p, 1, 1));
        }
        match self.ffn.as_ref().map(|f| &f.body) {
            Some(Body::Dense(f)) => f.all().for_each(|p| add(p, 1, 1)),
            Some(Body::Mixture { router, choice, experts }) => {
                add(router, 1, 1);
                experts.iter().flat_map(Ffn::all).for_each(|p| add(p, choice.used as u64, choice.count as u64));
            }
            None => {}
        }
        self.shortcuts().for_each(|p| add(p, 1, 1));
        all
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
        assert_eq!(x.rows(), batch.rows(), "a row of x for each row of the batch");
        let wants = tap.wants();
        let start = wants.residuals.then(|| x.clone());
        let y = match &self.attention {
            Some(a) => Some(a.forward(self.layer, x.view(), batch, kv, tap, wants)?),
            None => None,
        };
        join(x, self.attention_shortcut.as_ref(), y, tap, wants);
        let middle = wants.residuals.then(|| x.clone());
        if let (Some(a), Some(b), true) = (&start, &middle, self.attention.is_some()) {
            tap.residual(self.layer, BlockPart::Attention, a.view(), b.view());
        }
        let y = self.ffn.as_ref().map(|f| f.forward(x.view(), tap, wants));
        join(x, self.ffn_shortcut.as_ref(), y, tap, wants);
        if let (Some(b), true) = (&middle, self.ffn.is_some()) {
            tap.residual(self.layer, BlockPart::Ffn, b.view(), x.view());
        }
        if let Some(a) = &start {
            tap.residual(self.layer, BlockPart::Block, a.view(), x.view());
        }
        Ok(())
    }
}

/// The residual stream behind a part that put out `y`: `x`, or what the shortcut's matrix makes of it, and `y`.
fn join(x: &mut Mat, shortcut: Option<&Projection>, y: Option<Lent>, tap: &mut dyn Tap, wants: Wants) {
    if let Some(s) = shortcut {
        if wants.inputs {
            tap.input(&s.place, x.view());
        }
        let turned = s.apply(x.view());
        if wants.outputs {
            tap.output(&s.place, turned.view());
        }
        x.data_mut().copy_from_slice(turned.data());
    }
    if let Some(y) = y {
        span("add", || kernels::add(x.view_mut(), y.view()));
    }
}

impl AttentionPart {
    fn forward(
        &self,
        layer: usize,
        x: MatRef<'_>,
        batch: &Batch,
        kv: &mut dyn KvStore,
        tap: &mut dyn Tap,
        wants: Wants,
    ) -> Result<Lent, ModelError> {
        let h = self.norm.apply(x);
        if wants.inputs {
            for p in [&self.q, &self.k, &self.v] {
                tap.input(&p.place, h.view());
            }
        }
        let [mut q, mut k, v] = Projection::together([&self.q, &self.k, &self.v], h.view());
        if wants.outputs {
            for (p, y) in [(&self.q, &q), (&self.k, &k), (&self.v, &v)] {
                tap.output(&p.place, y.view());
            }
        }
        if let Some((qn, kn)) = &self.qk_norm {
            qn.heads_in_place(&mut q);
            kn.heads_in_place(&mut k);
        }
        if let Some(rope) = &self.rope {
            span("rope", || {
                rope.with(batch.places(), |angles| {
                    angles.apply(self.head_dim, q.view_mut());
                    angles.apply(self.head_dim, k.view_mut());
                });
            });
        }
        span("keys and values written", || kv.write(layer, batch, k.view(), v.view()))?;
        let mut mixed = Lent::new(q.rows(), q.cols());
        let width = q.cols();
        for (sequence, rows) in batch.runs() {
            let out = &mut mixed.data_mut()[rows.start * width..rows.end * width];
            let view = kv.view(layer, sequence)?;
            span("attention", || {
                self.scores.run(
                    q.view().rows_range(rows.start, rows.end),
                    &batch.positions()[rows.clone()],
                    &view,
                    lacuna_base::MatMut::new(rows.len(), width, out),
                );
            });
        }
        if wants.inputs {
            tap.input(&self.o.place, mixed.view());
        }
        let mut y = self.o.apply(mixed.view());
        if wants.outputs {
            tap.output(&self.o.place, y.view());
        }
        if let Some(n) = &self.post_norm {
            n.in_place(&mut y);
        }
        Ok(y)
    }
}

impl FfnPart {
    fn forward(&self, x: MatRef<'_>, tap: &mut dyn Tap, wants: Wants) -> Lent {
        let h = self.norm.apply(x);
        let mut y = match &self.body {
            Body::Dense(f) => f.forward(self.act, h.view(), tap, wants),
            Body::Mixture { router, choice, experts } => {
                if wants.inputs {
                    tap.input(&router.place, h.view());
                }
                let mut y = Lent::new(x.rows(), x.cols());
                y.data_mut().fill(0.0);
                let mut logits = router.apply(h.view());
                if wants.outputs {
                    tap.output(&router.place, logits.view());
                }
                let routes = route(&mut logits, *choice);
                // Experts in their order, so that a row's sum does not depend on what else is routed where.
                for (expert, rows) in experts.iter().zip(routes) {
                    if rows.is_empty() {
                        continue;
                    }
                    let mine = Mat::from_vec(
                        rows.len(),
                        h.cols(),
                        rows.iter().flat_map(|&(r, _)| h.row(r).iter().copied()).collect(),
                    );
                    let out = expert.forward(self.act, mine.view(), tap, wants);
                    for (i, &(r, weight)) in rows.iter().enumerate() {
                        kernels::add_scaled(y.row_mut(r), weight, out.row(i));
                    }
                }
                y
            }
        };
        if let Some(n) = &self.post_norm {
            n.in_place(&mut y);
        }
        y
    }
}

/// The rows of each expert with their weights: softmax over all experts, the largest `used` of a row (ties to the lower
/// number). `logits` become the softmax.
pub(crate) fn route(logits: &mut Mat, choice: Experts) -> Vec<Vec<(usize, f32)>> {
    let mut routes = vec![Vec::new(); choice.count];
    for r in 0..logits.rows() {
        let p = logits.row_mut(r);
        kernels::softmax(p);
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
        order.truncate(choice.used);
        let total: f32 = if choice.normalize { order.iter().map(|&e| p[e]).sum() } else { 1.0 };
        for e in order {
            routes[e].push((r, p[e] / total));
        }
    }
    routes
}

impl Ffn {
    fn forward(&self, act: Activation, x: MatRef<'_>, tap: &mut dyn Tap, wants: Wants) -> Lent {
        if wants.inputs {
            for p in self.gate.iter().chain([&self.up]) {
                tap.input(&p.place, x);
            }
        }
        let inner = match &self.gate {
            Some(gate) => {
                let [mut g, up] = Projection::together([gate, &self.up], x);
                if wants.outputs {
                    tap.output(&gate.place, g.view());
                    tap.output(&self.up.place, up.view());
                }
                span("activation", || kernels::gated_activation(act, g.view_mut(), up.view()));
                g
            }
            None => {
                let mut up = self.up.apply(x);
                if wants.outputs {
                    tap.output(&self.up.place, up.view());
                }
                span("activation", || kernels::activation(act, up.view_mut()));
                up
            }
        };
        if wants.inputs {
            tap.input(&self.down.place, inner.view());
        }
        let y = self.down.apply(inner.view());
        if wants.outputs {
            tap.output(&self.down.place, y.view());
        }
        y
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Projection> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    fn bytes(&self) -> u64 {
        self.all().map(Projection::bytes).sum()
    }
}

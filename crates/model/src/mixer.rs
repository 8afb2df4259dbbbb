//! The recurrent mixer of a block.

use lacuna_spec::{Activation, GateNorm, Mamba, Mixer, Place, Role};

use crate::backend::{Backend, MixerVectors};
use crate::block::{Loader, normed};
use crate::parts::{Projection, vector};
use crate::profile::span;
use crate::tap::Look;
use crate::{KvStore, ModelError};

/// What is computed in attention's place, or beside it, from one norm.
pub(crate) struct MixerPart<B: Backend> {
    pub(crate) norm: B::Norm,
    mixer: Mixer,
    own: B::Mixer,
    into: Projection<B>,
    heads: Option<Heads<B>>,
    out: Projection<B>,
}

/// What a mixer with heads has beyond its convolution.
struct Heads<B: Backend> {
    z: Projection<B>,
    dt: Projection<B>,
    beta: Option<Projection<B>>,
    norm: Option<B::Norm>,
    inner: Option<Inner<B>>,
}

/// What Mamba makes of what its convolution put out: what time steps are made of, `b` and `c`, each with its norm.
struct Inner<B: Backend> {
    all: [Projection<B>; 3],
    norms: [B::Norm; 3],
    /// Columns of x, and of b or c.
    widths: [usize; 2],
}

impl<B: Backend> Inner<B> {
    fn load(loader: &Loader<'_, B>, m: &Mamba) -> Result<Inner<B>, ModelError> {
        let [down, b, c] = [Role::MixerDtDown, Role::MixerB, Role::MixerC].map(|role| loader.exact(role));
        let norms = [Role::MixerDtNorm, Role::MixerBNorm, Role::MixerCNorm].map(|role| loader.norm(role));
        let [dt, of_b, of_c] = norms;
        Ok(Inner { all: [down?, b?, c?], norms: [dt?, of_b?, of_c?], widths: [m.channels, m.state] })
    }

    /// What time steps are made of, and `[x, b, c]`.
    fn forward(&self, x: &B::Rows, look: &mut Look<'_, B>) -> Result<[B::Rows; 2], ModelError> {
        let backend = look.backend;
        look.input(self.all.each_ref().map(|p| &p.place), x)?;
        let made = Projection::together(backend, self.all.each_ref(), x);
        self.all.iter().zip(&made).try_for_each(|(p, y)| look.output(&p.place, y))?;
        let [down, b, c] = [0, 1, 2].map(|i| normed(backend, &self.norms[i], &made[i]));
        let [channels, state] = self.widths;
        let beside = backend.beside([&b, &c], [state, state]);
        Ok([down, backend.beside([x, &beside], [channels, 2 * state])])
    }
}

impl<B: Backend> MixerPart<B> {
    pub(crate) fn load(loader: &Loader<'_, B>, mixer: &Mixer) -> Result<MixerPart<B>, ModelError> {
        let (backend, weights, layer) = (loader.backend, loader.weights, loader.layer);
        let hidden = weights.spec().hidden;
        let place = |role| Place::layer(layer, role);
        let some = |place: Place| match weights.spec().shape(&place) {
            Some(_) => vector(weights, place),
            None => Ok(Vec::new()),
        };
        let vectors = MixerVectors {
            conv: vector(weights, place(Role::MixerConv))?,
            bias: some(place(Role::MixerConv).bias())?,
            a: some(place(Role::MixerA))?,
            d: some(place(Role::MixerD))?,
        };
        let has = |role| weights.spec().shape(&place(role)).is_some();
        let heads = match mixer.heads() {
            None => None,
            // Time steps and what the delta rule writes are told by a few rows each: always exact.
            Some(_) => Some(Heads {
                z: loader.matrix(Role::MixerZ)?,
                dt: loader.exact(Role::MixerDt)?,
                beta: has(Role::MixerBeta).then(|| loader.exact(Role::MixerBeta)).transpose()?,
                norm: has(Role::MixerOutNorm).then(|| loader.norm(Role::MixerOutNorm)).transpose()?,
                inner: match mixer {
                    Mixer::Mamba(m) => Some(Inner::load(loader, m)?),
                    _ => None,
                },
            }),
        };
        Ok(MixerPart {
            norm: loader.norm(Role::MixerNorm)?,
            mixer: mixer.clone(),
            own: backend.mixer_of(&place(Role::MixerConv), mixer, hidden, vectors),
            into: loader.matrix(Role::MixerIn)?,
            heads,
            out: loader.matrix(Role::MixerOut)?,
        })
    }

    /// Every matrix.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Projection<B>> {
        let heads = self.heads.iter().flat_map(|h| [Some(&h.z), Some(&h.dt), h.beta.as_ref()]).flatten();
        let inner = self.heads.iter().filter_map(|h| h.inner.as_ref()).flat_map(|i| &i.all);
        [&self.into, &self.out].into_iter().chain(heads).chain(inner)
    }

    /// `h`: the rows that the norm put out.
    pub(crate) fn forward(
        &self,
        layer: usize,
        h: &B::Rows,
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        look: &mut Look<'_, B>,
    ) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let y = match &self.heads {
            None => {
                let x = project(&self.into, h, look)?;
                span("convolution", || {
                    Ok::<_, ModelError>(backend.convolve(&self.own, kv.states(layer)?, layer, step, &x))
                })?
            }
            Some(heads) => self.heads(heads, layer, h, step, kv, look)?,
        };
        look.input([&self.out.place], &y)?;
        let mut y = self.out.apply(backend, &y);
        look.output(&self.out.place, &y)?;
        if let Some(factor) = self.factor(5) {
            backend.scale(&mut y, factor);
        }
        Ok(y)
    }

    fn factor(&self, nth: usize) -> Option<f32> {
        let Mixer::Ssd(m) = &self.mixer else { return None };
        m.factors.map(|f| f[nth]).filter(|f| *f != 1.0)
    }

    /// What `out` multiplies.
    fn heads(
        &self,
        heads: &Heads<B>,
        layer: usize,
        h: &B::Rows,
        step: &B::Step,
        kv: &mut dyn KvStore<B>,
        look: &mut Look<'_, B>,
    ) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let read = [&self.into, &heads.z];
        look.input(read.map(|p| &p.place), h)?;
        let [x, mut z] = Projection::together(backend, read, h);
        read.iter().zip([&x, &z]).try_for_each(|(p, y)| look.output(&p.place, y))?;
        if let Some(factor) = self.factor(0) {
            backend.scale(&mut z, factor);
        }
        let dt = match (&heads.inner, self.factor(4)) {
            (Some(_), _) => None,
            (None, None) => Some(project(&heads.dt, h, look)?),
            (None, Some(factor)) => {
                // Before the bias that the product adds.
                let mut less = backend.copy(h);
                backend.scale(&mut less, factor);
                Some(project(&heads.dt, &less, look)?)
            }
        };
        let beta = heads.beta.as_ref().map(|p| project(p, h, look)).transpose()?;
        let states = kv.states(layer)?;
        let mut x = span("convolution", || backend.convolve(&self.own, states, layer, step, &x));
        span("activation", || backend.activate(Activation::Silu, &mut x, None));
        let dt = match (&heads.inner, dt) {
            (Some(inner), _) => {
                let [down, all] = inner.forward(&x, look)?;
                x = all;
                project(&heads.dt, &down, look)?
            }
            (None, Some(dt)) => dt,
            (None, None) => unreachable!("time steps are made of the stream where nothing is made of x"),
        };
        let mut y = span("state", || backend.scan(&self.own, states, layer, step, [&x, &dt], beta.as_ref()));
        let (norm, order) = match (&heads.norm, &self.mixer) {
            (Some(norm), Mixer::Ssd(m)) => (Some(norm), m.gate),
            (norm, _) => (norm.as_ref(), GateNorm::NormFirst { groups: 1 }),
        };
        let pieces = match order {
            GateNorm::GateFirst { groups } | GateNorm::NormFirst { groups } => groups,
            GateNorm::Gate => 1,
        };
        let gate = |y: &B::Rows, mut z: B::Rows| {
            span("activation", || backend.activate(Activation::Silu, &mut z, Some(y)));
            z
        };
        let first = matches!(order, GateNorm::NormFirst { .. });
        if let Some(norm) = norm.filter(|_| first) {
            y = span("norm", || backend.norm_pieces(norm, pieces, &y));
        }
        y = gate(&y, z);
        if let Some(norm) = norm.filter(|_| !first) {
            y = span("norm", || backend.norm_pieces(norm, pieces, &y));
        }
        Ok(y)
    }
}

fn project<B: Backend>(p: &Projection<B>, h: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
    look.input([&p.place], h)?;
    let y = p.apply(look.backend, h);
    look.output(&p.place, &y)?;
    Ok(y)
}

impl<B: Backend> MixerPart<B> {
    /// The norm of the residual stream.
    pub(crate) fn normed(&self, backend: &B, x: &B::Rows) -> B::Rows {
        normed(backend, &self.norm, x)
    }
}

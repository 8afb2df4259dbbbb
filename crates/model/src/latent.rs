//! Queries and keys of latent attention: see [`lacuna_spec::Latent`].

use lacuna_spec::{AttnSpec, Latent, Role};

use crate::ModelError;
use crate::backend::Backend;
use crate::block::Loader;
use crate::parts::{Grouped, Projection};
use crate::profile::span;
use crate::tap::Look;

/// What makes queries in the latent's space, and the one key of all heads, which is also its value.
pub(crate) struct LatentPart<B: Backend> {
    q_down: Option<(Projection<B>, B::Norm)>,
    q: Projection<B>,
    kv_down: Projection<B>,
    kv_norm: B::Norm,
    k_up: Grouped<B>,
    v_up: Grouped<B>,
    latent: Latent,
    /// Channels that RoPE turns.
    turned: usize,
}

impl<B: Backend> LatentPart<B> {
    pub(crate) fn load(from: &Loader<'_, B>, a: &AttnSpec, m: &Latent) -> Result<LatentPart<B>, ModelError> {
        let q_down = m.q_rank.map(|_| Ok::<_, ModelError>((from.matrix(Role::QDown)?, from.norm(Role::QDownNorm)?)));
        Ok(LatentPart {
            q_down: q_down.transpose()?,
            q: from.matrix(Role::Q)?,
            kv_down: from.matrix(Role::KvDown)?,
            kv_norm: from.norm(Role::KvDownNorm)?,
            k_up: from.grouped(Role::KUp, a.heads)?,
            v_up: from.grouped(Role::VUp, a.heads)?,
            latent: *m,
            turned: a.rope.as_ref().map_or(0, |r| r.dims),
        })
    }

    pub(crate) fn per_head(&self) -> [&Grouped<B>; 2] {
        [&self.k_up, &self.v_up]
    }

    pub(crate) fn alone(&self) -> [Option<&Projection<B>>; 3] {
        [self.q_down.as_ref().map(|(p, _)| p), Some(&self.q), Some(&self.kv_down)]
    }

    /// Queries `[rows, heads * (turned + rank)]` and the key `[rows, turned + rank]` of normed rows.
    pub(crate) fn read(
        &self,
        h: &B::Rows,
        rope: Option<&B::Rope>,
        step: &B::Step,
        look: &mut Look<'_, B>,
    ) -> Result<(B::Rows, B::Rows), ModelError> {
        let backend = look.backend;
        let first = self.q_down.as_ref().map_or(&self.q, |(down, _)| down);
        look.input([&first.place, &self.kv_down.place], h)?;
        let [q, kv] = Projection::together(backend, [first, &self.kv_down], h);
        look.output(&first.place, &q)?;
        look.output(&self.kv_down.place, &kv)?;
        let q = match &self.q_down {
            None => q,
            Some((_, norm)) => {
                let narrow = span("norm", || backend.norm(norm, &q));
                look.input([&self.q.place], &narrow)?;
                let q = self.q.apply(backend, &narrow);
                look.output(&self.q.place, &q)?;
                q
            }
        };
        let (plain, turned, rank) = (self.latent.plain, self.turned, self.latent.rank);
        let cut = |x: &B::Rows, width: usize, which| span("heads cut", || backend.columns(x, width, which));
        let mut turning = cut(&q, plain + turned, plain..plain + turned);
        let mut key = cut(&kv, rank + turned, rank..rank + turned);
        if let Some(rope) = rope {
            span("rope", || backend.rope(rope, turned, step, [&mut turning, &mut key]));
        }
        let into = cut(&q, plain + turned, 0..plain);
        let into = self.by_head(&self.k_up, &into, look)?;
        let latent = cut(&kv, rank + turned, 0..rank);
        let latent = span("norm", || backend.norm(&self.kv_norm, &latent));
        let beside = |a: &B::Rows, b: &B::Rows| span("heads cut", || backend.beside([a, b], [turned, rank]));
        Ok((beside(&turning, &into), beside(&key, &latent)))
    }

    /// What `attn.o` reads, `[rows, heads * value]`, of what attention mixed, `[rows, heads * (turned + rank)]`.
    pub(crate) fn mixed(&self, mixed: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let (turned, rank) = (self.turned, self.latent.rank);
        let latent = span("heads cut", || look.backend.columns(mixed, turned + rank, turned..turned + rank));
        self.by_head(&self.v_up, &latent, look)
    }

    fn by_head(&self, of: &Grouped<B>, x: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        // What each head's matrix meets is cut out only where somebody looks.
        let mine = |x: &B::Rows, h: usize| {
            let (_, cols) = look.backend.shape(x);
            let width = cols / of.places.len();
            look.backend.columns(x, cols, h * width..(h + 1) * width)
        };
        let shown: Vec<B::Rows> =
            if look.wants.inputs { (0..of.places.len()).map(|h| mine(x, h)).collect() } else { Vec::new() };
        let y = of.by_head(look.backend, x);
        let made: Vec<B::Rows> =
            if look.wants.outputs { (0..of.places.len()).map(|h| mine(&y, h)).collect() } else { Vec::new() };
        for (place, x) in of.places.iter().zip(&shown) {
            look.input([place], x)?;
        }
        for (place, y) in of.places.iter().zip(&made) {
            look.output(place, y)?;
        }
        Ok(y)
    }
}

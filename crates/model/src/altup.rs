//! Several residual streams: see [`lacuna_spec::AltUp`].

use lacuna_format::Weights;
use lacuna_kernels::Activations;
use lacuna_spec::{AltUp, Place, Role, Spec};

use crate::ModelError;
use crate::backend::Backend;
use crate::block::{Loader, normed};
use crate::carried::InputPart;
use crate::parts::Projection;
use crate::profile::span;
use crate::tap::Look;

/// Columns `from..from + n` of rows.
fn cut<B: Backend>(backend: &B, x: &B::Rows, from: usize, n: usize) -> B::Rows {
    backend.columns(x, backend.shape(x).1, from..from + n)
}

/// The same rows side by side, `times` times.
fn repeated<B: Backend>(backend: &B, x: &B::Rows, times: usize) -> B::Rows {
    let n = backend.shape(x).1;
    let mut out = cut(backend, x, 0, n);
    for i in 1..times {
        out = backend.beside([&out, x], [i * n, n]);
    }
    out
}

/// What makes all streams of the embedding, or one of all streams: a matrix for each but the first.
pub(crate) struct Streams<B: Backend> {
    each: Vec<Projection<B>>,
    hidden: usize,
}

impl<B: Backend> Streams<B> {
    /// Loads the matrices of `role` ([`Role::AltupIn`] or [`Role::AltupOut`]), where the network has such.
    pub(crate) fn load(backend: &B, weights: &dyn Weights, role: Role) -> Result<Option<Streams<B>>, ModelError> {
        let spec = weights.spec();
        let Some(how) = spec.altup else { return Ok(None) };
        let place = |i: usize| Place { expert: Some(i as u32), ..Place::global(role) };
        let load = |i| Projection::load(backend, weights, place(i), Activations::Exact);
        let each = (1..how.inputs).map(load).collect::<Result<_, _>>()?;
        Ok(Some(Streams { each, hidden: spec.hidden }))
    }

    pub(crate) fn weights_bytes(&self) -> u64 {
        self.each.iter().map(|p| p.measure.bytes).sum()
    }

    /// `[rows, hidden]` to `[rows, streams * hidden]`.
    pub(crate) fn spread(&self, backend: &B, x: &B::Rows) -> B::Rows {
        let mut out = cut(backend, x, 0, self.hidden);
        for (i, p) in self.each.iter().enumerate() {
            let mut y = p.apply(backend, x);
            backend.match_magnitude(&mut y, x);
            out = backend.beside([&out, &y], [(i + 1) * self.hidden, self.hidden]);
        }
        out
    }

    /// `[rows, streams * hidden]` to `[rows, hidden]`.
    pub(crate) fn merged(&self, backend: &B, x: &B::Rows) -> B::Rows {
        let first = cut(backend, x, 0, self.hidden);
        let mut out = cut(backend, x, 0, self.hidden);
        for (i, p) in self.each.iter().enumerate() {
            let mut y = p.apply(backend, &cut(backend, x, (i + 1) * self.hidden, self.hidden));
            backend.match_magnitude(&mut y, &first);
            backend.add(&mut out, &y);
        }
        backend.scale(&mut out, 1.0 / (self.each.len() + 1) as f32);
        out
    }
}

/// What predicts the streams before a block and corrects them behind it.
pub(crate) struct AltUpPart<B: Backend> {
    how: AltUp,
    hidden: usize,
    layer: usize,
    norm: B::Norm,
    router: Projection<B>,
    predict: Projection<B>,
    correct: Projection<B>,
    scale: Option<B::Rows>,
}

impl<B: Backend> AltUpPart<B> {
    pub(crate) fn load(from: &Loader<'_, B>, spec: &Spec, how: AltUp) -> Result<AltUpPart<B>, ModelError> {
        let scale = how.scaled.then(|| from.vector(Role::AltupScale)).transpose()?;
        Ok(AltUpPart {
            how,
            hidden: spec.hidden,
            layer: from.layer,
            norm: from.norm(Role::AltupRouterNorm)?,
            router: from.exact(Role::AltupRouter)?,
            predict: from.exact(Role::AltupPredict)?,
            correct: from.exact(Role::AltupCorrect)?,
            scale: scale.map(|s| from.backend.upload(lacuna_base::MatRef::new(1, s.len(), &s))),
        })
    }

    pub(crate) fn matrices(&self) -> [&Projection<B>; 3] {
        [&self.router, &self.predict, &self.correct]
    }

    /// The active one of all streams.
    pub(crate) fn active(&self, backend: &B, all: &B::Rows) -> B::Rows {
        cut(backend, all, self.how.active * self.hidden, self.hidden)
    }

    /// The weights that `by` makes of the modalities of a stream.
    fn weights(&self, by: &Projection<B>, x: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let h = normed(backend, &self.norm, x);
        look.input([&self.router.place], &h)?;
        let mut m = self.router.apply(backend, &h);
        look.output(&self.router.place, &m)?;
        backend.scale(&mut m, self.how.router_scale);
        // A cap of 1 is the hyperbolic tangent.
        backend.softcap(&mut m, 1.0);
        look.input([&by.place], &m)?;
        let out = by.apply(backend, &m);
        look.output(&by.place, &out)?;
        Ok(out)
    }

    /// What all streams are predicted to be.
    pub(crate) fn predicted(&self, all: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let by = self.weights(&self.predict, &self.active(look.backend, all), look)?;
        let mut out = span("streams", || look.backend.mix(all, self.how.inputs, &by));
        look.backend.add(&mut out, all);
        Ok(out)
    }

    /// All streams behind a block that made `x` of the active prediction; with what comes of its input.
    pub(crate) fn corrected(
        &self,
        predicted: &B::Rows,
        x: &B::Rows,
        input: Option<(&InputPart<B>, &B::Rows)>,
        look: &mut Look<'_, B>,
    ) -> Result<B::Rows, ModelError> {
        let (backend, n, h) = (look.backend, self.how.inputs, self.hidden);
        let by = self.weights(&self.correct, x, look)?;
        let mut more = self.active(backend, predicted);
        backend.scale(&mut more, -1.0);
        backend.add(&mut more, x);
        let mut out = span("streams", || backend.mix(&more, 1, &by));
        backend.add(&mut out, &repeated(backend, &more, n));
        backend.add(&mut out, predicted);
        let Some((part, inputs)) = input else { return Ok(out) };
        let mut first = self.active(backend, &out);
        if let Some(scale) = &self.scale {
            backend.scale_columns(&Place::layer(self.layer, Role::AltupScale), &mut first, scale);
        }
        let y = part.forward(&first, inputs, look)?;
        let mut others = cut(backend, &out, h, (n - 1) * h);
        backend.add(&mut others, &repeated(backend, &y, n - 1));
        Ok(backend.beside([&cut(backend, &out, 0, h), &others], [h, (n - 1) * h]))
    }
}

/// LAuReL: what two narrow matrices add behind attention.
pub(crate) struct LaurelPart<B: Backend> {
    before: B::Norm,
    into: Projection<B>,
    out: Projection<B>,
    norm: B::Norm,
}

impl<B: Backend> LaurelPart<B> {
    pub(crate) fn load(from: &Loader<'_, B>) -> Result<LaurelPart<B>, ModelError> {
        Ok(LaurelPart {
            before: from.norm(Role::AttnNorm)?,
            into: from.matrix(Role::LaurelIn)?,
            out: from.matrix(Role::LaurelOut)?,
            norm: from.norm(Role::LaurelNorm)?,
        })
    }

    pub(crate) fn matrices(&self) -> [&Projection<B>; 2] {
        [&self.into, &self.out]
    }

    /// What it and attention read.
    pub(crate) fn normed(&self, backend: &B, x: &B::Rows) -> B::Rows {
        normed(backend, &self.before, x)
    }

    /// Adds to the stream behind attention what it makes of attention's normed input `h`.
    pub(crate) fn add(&self, x: &mut B::Rows, h: &B::Rows, look: &mut Look<'_, B>) -> Result<(), ModelError> {
        let backend = look.backend;
        look.input([&self.into.place], h)?;
        let narrow = self.into.apply(backend, h);
        look.output(&self.into.place, &narrow)?;
        look.input([&self.out.place], &narrow)?;
        let y = self.out.apply(backend, &narrow);
        look.output(&self.out.place, &y)?;
        let mut y = normed(backend, &self.norm, &y);
        backend.add(&mut y, h);
        backend.add(x, &y);
        backend.scale(x, std::f32::consts::FRAC_1_SQRT_2);
        Ok(())
    }
}

//! The feed-forward part of a block: one network, or experts of which each row chooses some.

use lacuna_base::MatRef;
use lacuna_spec::{Activation, Experts, FfnSpec, Place, Role, SharedExpert};

use crate::ModelError;
use crate::backend::{Backend, Xielu};
use crate::block::{Loader, normed};
use crate::gating::Gated;
use crate::heads::read;
use crate::parts::{Grouped, Projection, vector};
use crate::profile::span;
use crate::tap::Look;

/// The feed-forward part of a block.
pub(crate) struct FfnPart<B: Backend> {
    norm: Option<B::Norm>,
    act: Activation,
    /// How many standard deviations above its mean a gate is cut off.
    cutoff: Option<f32>,
    /// What it learned, where the activation is xIELU.
    xielu: Option<Xielu>,
    body: Body<B>,
    /// Factors on what gate and down put out.
    scales: [f32; 2],
    post_norm: Option<B::Norm>,
}

// One a block: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Body<B: Backend> {
    /// `gated`: what a gate says of the first two, and of `down`.
    Dense {
        gate: Option<Projection<B>>,
        up: Projection<B>,
        down: Projection<B>,
        gated: [Option<Gated>; 2],
    },
    Mixture(Mixture<B>),
}

/// Experts, of which each row chooses some.
pub(crate) struct Mixture<B: Backend> {
    router: Projection<B>,
    pub(crate) choice: Experts,
    correction: Option<B::Rows>,
    /// Factors on the experts' weights.
    scale: Option<B::Rows>,
    /// Norms of router, experts and the shared one, where each has its own.
    apart: Option<Apart<B>>,
    gate: Option<Grouped<B>>,
    up: Grouped<B>,
    down: Grouped<B>,
    shared: Option<Shared<B>>,
}

/// Norms of a mixture whose parts read and write through their own.
struct Apart<B: Backend> {
    router: B::Norm,
    experts: B::Norm,
    experts_out: B::Norm,
    shared_out: B::Norm,
}

/// The expert of every token, and what its output is weighed by.
struct Shared<B: Backend> {
    router: Option<Projection<B>>,
    gate: Option<Projection<B>>,
    up: Projection<B>,
    down: Projection<B>,
}

impl<B: Backend> Loader<'_, B> {
    fn xielu(&self) -> Result<Xielu, ModelError> {
        let number = |role| vector(self.weights, Place::layer(self.layer, role)).map(|v| v[0]);
        Ok(Xielu { layer: self.layer, above: number(Role::ActAbove)?, below: number(Role::ActBelow)? })
    }

    fn shared(&self, f: &FfnSpec, s: SharedExpert) -> Result<Shared<B>, ModelError> {
        Ok(Shared {
            router: s.gate.then(|| self.exact(Role::SharedRouter)).transpose()?,
            gate: f.gated.then(|| self.matrix(Role::SharedGate)).transpose()?,
            up: self.matrix(Role::SharedUp)?,
            down: self.matrix(Role::SharedDown)?,
        })
    }

    fn apart(&self) -> Result<Apart<B>, ModelError> {
        Ok(Apart {
            router: self.norm(Role::RouterNorm)?,
            experts: self.norm(Role::ExpertsNorm)?,
            experts_out: self.norm(Role::ExpertsPostNorm)?,
            shared_out: self.norm(Role::SharedPostNorm)?,
        })
    }

    pub(crate) fn ffn(&self, f: &FfnSpec) -> Result<FfnPart<B>, ModelError> {
        let body = match f.experts {
            None => {
                let mut gate = f.gated.then(|| self.matrix(Role::Gate)).transpose()?;
                let (mut up, mut down) = (self.matrix(Role::Up)?, self.matrix(Role::Down)?);
                let gated = [self.gate([gate.as_mut(), Some(&mut up)])?, self.gate([Some(&mut down)])?];
                Body::Dense { gate, up, down, gated }
            }
            Some(choice) => Body::Mixture(Mixture {
                router: self.exact(Role::Router)?,
                choice,
                correction: choice
                    .correction
                    .then(|| self.vector(Role::Correction))
                    .transpose()?
                    .map(|c| self.backend.upload(MatRef::new(1, c.len(), &c))),
                scale: choice
                    .expert_scale
                    .then(|| self.vector(Role::ExpertScale))
                    .transpose()?
                    .map(|c| self.backend.upload(MatRef::new(1, c.len(), &c))),
                apart: choice.apart.then(|| self.apart()).transpose()?,
                shared: choice.shared.map(|s| self.shared(f, s)).transpose()?,
                gate: f.gated.then(|| self.grouped(Role::Gate, choice.count)).transpose()?,
                up: self.grouped(Role::Up, choice.count)?,
                down: self.grouped(Role::Down, choice.count)?,
            }),
        };
        let norm = self.norm_where(f.pre_norm, Role::FfnNorm)?;
        let post_norm = self.norm_where(f.post_norm, Role::FfnPostNorm)?;
        let xielu = (f.act == Activation::Xielu).then(|| self.xielu()).transpose()?;
        let (cutoff, scales) = (f.sparsity.map(|s| deviations(f64::from(s)) as f32), [f.gate_scale, f.down_scale]);
        Ok(FfnPart { norm, act: f.act, cutoff, xielu, body, scales, post_norm })
    }
}

impl<B: Backend> FfnPart<B> {
    /// What a gate says of its matrices.
    pub(crate) fn gated(&self) -> &[Option<Gated>] {
        match &self.body {
            Body::Dense { gated, .. } => gated,
            Body::Mixture(_) => &[],
        }
    }

    /// Its experts, where it has some.
    pub(crate) fn mixture(&self) -> Option<&Mixture<B>> {
        match &self.body {
            Body::Dense { .. } => None,
            Body::Mixture(m) => Some(m),
        }
    }

    /// Every matrix but those of experts.
    pub(crate) fn alone(&self) -> impl Iterator<Item = &Projection<B>> {
        let all = match &self.body {
            Body::Dense { gate, up, down, .. } => [gate.as_ref(), Some(up), Some(down), None, None],
            Body::Mixture(m) => {
                let s = m.shared.as_ref();
                let of = |f: fn(&Shared<B>) -> Option<&Projection<B>>| s.and_then(f);
                let (router, gate) = (of(|s| s.router.as_ref()), of(|s| s.gate.as_ref()));
                [Some(&m.router), router, gate, of(|s| Some(&s.up)), of(|s| Some(&s.down))]
            }
        };
        all.into_iter().flatten()
    }

    pub(crate) fn forward(
        &self,
        x: (&B::Rows, Option<&B::Rows>),
        look: &mut Look<'_, B>,
    ) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let mut own = None;
        let h = read(backend, self.norm.as_ref(), x, &mut own);
        let y = match &self.body {
            Body::Dense { gate, up, down, gated: [first, last] } => {
                let (gated, scales) = ([first.as_ref(), last.as_ref()], self.scales);
                let (cutoff, xielu) = (self.cutoff, self.xielu);
                Net { act: self.act, cutoff, xielu, gate: gate.as_ref(), up, down, gated, scales }.forward(h, look)?
            }
            Body::Mixture(m) => m.forward(self.act, (x.0, h), look)?,
        };
        Ok(match &self.post_norm {
            Some(n) => normed(backend, n, &y),
            None => y,
        })
    }
}

/// How many standard deviations above the mean of a normal distribution that share of it lies below.
fn deviations(share: f64) -> f64 {
    // The distribution function by its series, P(x) = 1/2 + φ(x) Σ x^(2k+1) / (2k+1)!!, which rises: halving finds it.
    let below = |x: f64| {
        let (mut term, mut sum) = (x, x);
        for k in 1..400 {
            term *= x * x / f64::from(2 * k + 1);
            sum += term;
        }
        0.5 + sum * (-x * x / 2.0).exp() / std::f64::consts::TAU.sqrt()
    };
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..100 {
        let middle = 0.5 * (low + high);
        if below(middle) < share { low = middle } else { high = middle }
    }
    0.5 * (low + high)
}

/// One feed-forward network, not chosen from several.
struct Net<'a, B: Backend> {
    act: Activation,
    cutoff: Option<f32>,
    xielu: Option<Xielu>,
    gate: Option<&'a Projection<B>>,
    up: &'a Projection<B>,
    down: &'a Projection<B>,
    /// What a gate says of the first two, and of `down`.
    gated: [Option<&'a Gated>; 2],
    /// Factors on what `gate` and `down` put out.
    scales: [f32; 2],
}

impl<B: Backend> Net<'_, B> {
    fn forward(&self, h: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let Net { act, cutoff, xielu, gate, up, down, gated: [first, last], scales } = *self;
        let scaled = |y: &mut B::Rows, by: f32, look: &Look<'_, B>| {
            if by != 1.0 {
                look.backend.scale(y, by);
            }
        };
        look.input(gate.into_iter().chain([up]).map(|p| &p.place), h)?;
        let (mut inner, beside) = match gate {
            Some(gate) => {
                let [mut g, y] = Projection::gated(look.backend, [gate, up], first, h)?;
                look.output(&gate.place, &g)?;
                look.output(&up.place, &y)?;
                scaled(&mut g, scales[0], look);
                (g, Some(y))
            }
            None => {
                let [y] = Projection::gated(look.backend, [up], first, h)?;
                look.output(&up.place, &y)?;
                (y, None)
            }
        };
        if let Some(by) = cutoff {
            span("activation", || look.backend.cut_off(&mut inner, by));
        }
        span("activation", || match xielu {
            Some(of) => look.backend.xielu(of, &mut inner),
            None => look.backend.activate(act, &mut inner, beside.as_ref()),
        });
        look.input([&down.place], &inner)?;
        let [mut y] = Projection::gated(look.backend, [down], last, &inner)?;
        look.output(&down.place, &y)?;
        scaled(&mut y, scales[1], look);
        Ok(y)
    }
}

impl<B: Backend> Shared<B> {
    fn forward(&self, act: Activation, h: &B::Rows, look: &mut Look<'_, B>) -> Result<B::Rows, ModelError> {
        let Shared { router, gate, up, down } = self;
        let (gated, scales) = ([None, None], [1.0, 1.0]);
        let mut y =
            Net { act, cutoff: None, xielu: None, gate: gate.as_ref(), up, down, gated, scales }.forward(h, look)?;
        if let Some(router) = router {
            look.input([&router.place], h)?;
            let by = router.apply(look.backend, h);
            look.output(&router.place, &by)?;
            span("routing", || look.backend.weigh_rows(&mut y, &by));
        }
        Ok(y)
    }
}

impl<B: Backend> Mixture<B> {
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Grouped<B>> {
        self.gate.iter().chain([&self.up, &self.down])
    }

    /// Of the residual stream `x`, and of what the part's norm made of it.
    fn forward(
        &self,
        act: Activation,
        (x, h): (&B::Rows, &B::Rows),
        look: &mut Look<'_, B>,
    ) -> Result<B::Rows, ModelError> {
        let backend = look.backend;
        let own = self.apart.as_ref().map(|n| (normed(backend, &n.router, x), normed(backend, &n.experts, x)));
        let (asks, reads) = own.as_ref().map_or((h, h), |(a, r)| (a, r));
        look.input([&self.router.place], asks)?;
        let mut logits = self.router.apply(backend, asks);
        look.output(&self.router.place, &logits)?;
        if self.choice.router_scale != 1.0 {
            backend.scale(&mut logits, self.choice.router_scale);
        }
        let (correction, scale) = (self.correction.as_ref(), self.scale.as_ref());
        let routes = span("routing", || backend.route(&logits, self.choice, correction, scale));
        let mine = span("routing", || backend.gather(reads, &routes));
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
        let mut out = span("routing", || backend.scatter(&out, &routes));
        if let Some(n) = &self.apart {
            out = normed(backend, &n.experts_out, &out);
        }
        if let Some(shared) = &self.shared {
            let mut y = shared.forward(act, h, look)?;
            if let Some(n) = &self.apart {
                y = normed(backend, &n.shared_out, &y);
            }
            span("add", || backend.add(&mut out, &y));
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::deviations;

    #[test]
    fn shares_of_a_normal_distribution() {
        // From tables of the distribution.
        for (share, want) in
            [(0.95, 1.6448536269514722), (0.5, 0.0), (0.975, 1.959963984540054), (0.1, -1.2815515655446)]
        {
            assert!((deviations(share) - want).abs() < 1e-9, "{share}: {}", deviations(share));
        }
    }
}

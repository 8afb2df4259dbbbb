//! Statistics gathered in forward passes: one reducer a file, over the events that the model emits.

pub(crate) mod gradients;
mod gram;
mod magnitudes;
pub(crate) mod mapped;
mod moments;
mod rows;
mod similarity;
mod squares;

use std::collections::{BTreeMap, HashMap};

use lacuna_base::MatRef;
use lacuna_checkpoint::Imatrix;
use lacuna_contract::{Ask, Gathered, Site, Stats, Unit, Worked};
use lacuna_model::{Backend, BlockPart, ModelError, Shown, Tap, Wants};
use lacuna_spec::{Place, Role, Spec};

/// What a reducer is shown.
pub(crate) enum Event<'a> {
    /// Rows that multiply a matrix, `[rows, in]`.
    Input(MatRef<'a>),
    /// The residual stream before and after a part of a block, `[rows, hidden]` each.
    Residual(Unit, MatRef<'a>, MatRef<'a>),
}

/// Turns events into a statistic, in the order in which the tokens come.
pub(crate) trait Reducer: Send {
    /// Takes an event in.
    fn see(&mut self, event: &Event<'_>);

    /// What came of all of them.
    fn gathered(self: Box<Self>) -> Gathered;
}

/// The reducer of a statistic; `None` for one that forward passes do not give. A new statistic is a file and a line
/// here.
fn reducer(ask: Ask) -> Option<Box<dyn Reducer>> {
    Some(match ask {
        Ask::InputGram => Box::new(gram::InputGram::default()),
        Ask::InputSquares => Box::new(squares::InputSquares::default()),
        Ask::InputMagnitudes => Box::new(magnitudes::InputMagnitudes::default()),
        Ask::InputMoments => Box::new(moments::InputMoments::default()),
        Ask::InputRows(most) => Box::new(rows::InputRows::new(most)),
        Ask::Similarity(unit) => Box::new(similarity::Similarity::new(unit, |cos| cos)),
        Ask::Angle(unit) => Box::new(similarity::Similarity::new(unit, similarity::angle)),
        Ask::GradientAbsolute
        | Ask::GradientSquares
        | Ask::GradientMean
        | Ask::GradientRowGram
        | Ask::GradientColumnGram
        | Ask::OutputGradientGram
        | Ask::SequenceGradients => return None,
    })
}

/// Bytes of a statistic of a matrix with `inputs` inputs.
fn bytes(ask: Ask, inputs: u64) -> u64 {
    match ask {
        // And as much again for what methods make of it and share.
        Ask::InputGram => 16 * inputs * inputs,
        Ask::InputSquares | Ask::InputMagnitudes => 8 * inputs,
        Ask::InputMoments => 24 * inputs,
        Ask::InputRows(most) => 4 * most as u64 * inputs,
        _ => 0,
    }
}

/// Gathers statistics of one block. Matrices that read the same input share one entry.
pub(crate) struct Gather {
    sites: BTreeMap<Site, Running>,
    /// What nothing has to run for: it is known from elsewhere.
    known: Vec<(Site, u64, (Ask, Gathered))>,
}

struct Running {
    tokens: u64,
    reducers: Vec<(Ask, Box<dyn Reducer>)>,
}

/// The matrix in whose name the input of `place` is gathered: q for k, v and attention's gate, gate for up, the shared
/// expert's with them; what makes the queries' latent, or the queries, for what makes that of keys and values; a mixer's
/// first projection for its others (time steps apart, whose input may have a factor of its own).
pub(crate) fn reader(spec: &Spec, place: &Place) -> Place {
    let layer = place.layer.and_then(|l| spec.layers.get(l as usize));
    let gated = layer.and_then(|l| l.ffn.as_ref()).is_some_and(|f| f.gated);
    let narrow = layer.and_then(|l| l.attn.as_ref()?.latent?.q_rank).is_some();
    let role = match place.role {
        Role::K | Role::V | Role::AttnGate => Role::Q,
        Role::KvDown if narrow => Role::QDown,
        Role::KvDown => Role::Q,
        Role::MixerZ | Role::MixerBeta => Role::MixerIn,
        Role::MixerB | Role::MixerC => Role::MixerDtDown,
        Role::Up if gated => Role::Gate,
        Role::SharedUp if gated => Role::SharedGate,
        r => r,
    };
    Place { role, ..*place }
}

fn shared(spec: &Spec, site: Site) -> Site {
    match site {
        Site::Matrix(place) => Site::Matrix(reader(spec, &place)),
        layer => layer,
    }
}

impl Gather {
    /// For the union of what is asked; what a forward pass does not give is left out.
    pub(crate) fn new(spec: &Spec, asks: impl IntoIterator<Item = (Site, Ask)>) -> Gather {
        Gather::knowing(None, spec, asks)
    }

    /// The same; the squares of inputs that `imatrix` tells of are taken from there.
    pub(crate) fn knowing(
        imatrix: Option<&Imatrix>,
        spec: &Spec,
        asks: impl IntoIterator<Item = (Site, Ask)>,
    ) -> Gather {
        let mut sites: BTreeMap<Site, Running> = BTreeMap::new();
        let mut known: Vec<(Site, u64, (Ask, Gathered))> = Vec::new();
        for (site, ask) in asks {
            let Some(made) = reducer(ask) else { continue };
            let at = shared(spec, site);
            let told = match (ask, at) {
                (Ask::InputSquares, Site::Matrix(place)) => imatrix.and_then(|m| m.get(&place)),
                _ => None,
            };
            if let Some((tokens, squares)) = told {
                if known.iter().all(|k| k.0 != at) {
                    known.push((at, *tokens, (ask, Gathered::Vector(squares.clone()))));
                }
                continue;
            }
            let entry = sites.entry(at).or_insert(Running { tokens: 0, reducers: Vec::new() });
            if entry.reducers.iter().all(|(a, _)| *a != ask) {
                entry.reducers.push((ask, made));
            }
        }
        Gather { sites, known }
    }

    /// Whether anything is to be gathered.
    pub(crate) fn is_needed(&self) -> bool {
        !self.sites.is_empty()
    }

    /// Bytes that the statistics of a block take at the most.
    pub(crate) fn bytes(spec: &Spec, asks: impl IntoIterator<Item = (Site, Ask)>) -> u64 {
        let gather = Gather::new(spec, asks);
        let one = |(site, running): (&Site, &Running)| {
            let Site::Matrix(place) = site else { return 0 };
            let inputs = spec.shape(place).map_or(0, |(_, n)| n as u64);
            running.reducers.iter().map(|(ask, _)| bytes(*ask, inputs)).sum::<u64>()
        };
        gather.sites.iter().map(one).sum()
    }

    /// What was gathered.
    pub(crate) fn finish(self) -> Statistics {
        let done = |r: Running| {
            (r.tokens, r.reducers.into_iter().map(|(a, r)| (a, r.gathered())).collect(), Worked::default())
        };
        let mut found: HashMap<Site, Found> = self.sites.into_iter().map(|(site, r)| (site, done(r))).collect();
        for (site, tokens, what) in self.known {
            let at = found.entry(site).or_insert_with(|| (0, Vec::new(), Worked::default()));
            at.0 = at.0.max(tokens);
            at.1.push(what);
        }
        Statistics { found, gradients: HashMap::new(), tokens: 0, sequences: 0 }
    }
}

/// Tokens seen at an input, what was gathered of them, and what methods worked out of that.
type Found = (u64, Vec<(Ask, Gathered)>, Worked);

/// The statistics of one block.
#[derive(Default)]
pub(crate) struct Statistics {
    found: HashMap<Site, Found>,
    gradients: HashMap<Place, Vec<(Ask, Gathered)>>,
    /// Tokens and sequences of the backward passes.
    tokens: u64,
    sequences: u64,
}

impl Statistics {
    /// Those of a site.
    pub(crate) fn of(&self, spec: &Spec, site: Site) -> Stats<'_> {
        let gradients: &[_] = match site {
            Site::Matrix(place) => self.gradients.get(&place).map_or(&[], Vec::as_slice),
            Site::Layer(_) => &[],
        };
        match self.found.get(&shared(spec, site)) {
            // What saw nothing has nothing to say.
            Some((tokens, found, worked)) if *tokens > 0 => {
                Stats { tokens: *tokens, found, gradients, sequences: self.sequences, worked: Some(worked) }
            }
            Some(_) => Stats::default(),
            None => {
                let tokens = if gradients.is_empty() { 0 } else { self.tokens };
                Stats { tokens, found: &[], gradients, sequences: self.sequences, worked: None }
            }
        }
    }

    /// Adds what backward passes over so many tokens and sequences gave.
    pub(crate) fn with_gradients(
        self,
        gradients: HashMap<Place, Vec<(Ask, Gathered)>>,
        (tokens, sequences): (u64, u64),
    ) -> Statistics {
        Statistics { gradients, tokens, sequences, ..self }
    }
}

impl Gather {
    /// Takes in rows that multiply the matrix at `place`.
    pub(crate) fn see(&mut self, place: &Place, x: MatRef<'_>) {
        let Some(running) = self.sites.get_mut(&Site::Matrix(*place)) else { return };
        running.tokens += x.rows() as u64;
        running.reducers.iter_mut().for_each(|(_, r)| r.see(&Event::Input(x)));
    }
}

impl<B: Backend> Tap<B> for Gather {
    fn wants(&self) -> Wants {
        Wants {
            inputs: self.sites.keys().any(|s| matches!(s, Site::Matrix(_))),
            outputs: false,
            residuals: self.sites.keys().any(|s| matches!(s, Site::Layer(_))),
        }
    }

    fn input(&mut self, place: &Place, x: Shown<'_, B>) -> Result<(), ModelError> {
        if self.sites.contains_key(&Site::Matrix(*place)) {
            self.see(place, x.download()?.view());
        }
        Ok(())
    }

    fn residual(
        &mut self,
        layer: usize,
        part: BlockPart,
        before: Shown<'_, B>,
        after: Shown<'_, B>,
    ) -> Result<(), ModelError> {
        let Some(running) = self.sites.get_mut(&Site::Layer(layer)) else { return Ok(()) };
        let unit = match part {
            BlockPart::Block => Unit::Block,
            BlockPart::Attention => Unit::Attention,
            BlockPart::Ffn => Unit::Ffn,
        };
        if unit == Unit::Block {
            running.tokens += before.rows() as u64;
        }
        let (before, after) = (before.download()?, after.download()?);
        let event = Event::Residual(unit, before.view(), after.view());
        running.reducers.iter_mut().for_each(|(_, r)| r.see(&event));
        Ok(())
    }
}

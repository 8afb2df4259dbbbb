//! Where a gate stands in a network, and what it goes by there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lacuna_contract::{Gate, GateSide, MethodError};
use lacuna_spec::{Part, Place, Role, Spec, Target};

use crate::ModelError;
use crate::backend::{GateAsk, Reads};

/// A model's gate: one for all matrices that it stands at, with what was read of these.
pub(crate) struct Gating {
    pub(crate) gate: Arc<dyn Gate>,
    targets: Vec<Target>,
    /// Whether the user named them: see [`lacuna_contract::GatePlan::named`].
    named: bool,
    read: AtomicU64,
    all: AtomicU64,
}

/// How the matrices that a gate stands at are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateStore {
    /// Matrices.
    pub matrices: usize,
    /// Of these, those that are there by columns as well, so that a row reads the channels it needs; of the others it
    /// reads all, and what it does not need counts as zero.
    pub by_columns: usize,
    /// Bytes of memory that columns take.
    pub bytes: u64,
}

impl GateStore {
    pub(crate) fn add(&mut self, columns: Option<u64>) {
        self.matrices += 1;
        self.by_columns += usize::from(columns.is_some());
        self.bytes += columns.unwrap_or(0);
    }

    pub(crate) fn join(self, other: GateStore) -> GateStore {
        GateStore {
            matrices: self.matrices + other.matrices,
            by_columns: self.by_columns + other.by_columns,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// Matrices that read the same rows, those of them that share a gate's answer.
pub(crate) struct Gated {
    pub(crate) gating: Arc<Gating>,
    /// The first of them, for errors.
    pub(crate) place: Place,
    /// What [`Gate::norms`] made of their weights.
    pub(crate) norms: Vec<f32>,
    /// Which of the matrices they are.
    pub(crate) which: Vec<usize>,
    pub(crate) store: GateStore,
}

/// An error with the place it is about.
pub(crate) fn refused(place: &Place, e: &MethodError) -> ModelError {
    ModelError::Gate { what: format!("{place}: {e}") }
}

/// Whether a gate can stand at the matrix at `place`.
fn gateable(place: &Place) -> bool {
    let plain = matches!(place.role, Role::Q | Role::K | Role::V | Role::O | Role::Gate | Role::Up | Role::Down);
    plain && place.expert.is_none()
}

impl Gating {
    /// Says by name what of the network a gate cannot stand at.
    pub(crate) fn new(gate: &Arc<dyn Gate>, spec: &Spec) -> Result<Arc<Gating>, ModelError> {
        let refuse = |what: String| Err(ModelError::Gate { what });
        let plan = gate.plan();
        if plan.side == GateSide::Outputs {
            return refuse("it leaves out outputs of matrices; only inputs can be left out".into());
        }
        let places: Vec<Place> = spec.places().into_iter().filter(|p| p.part == Part::Weight).collect();
        let gating =
            Gating { gate: Arc::clone(gate), targets: plan.targets, named: plan.named, read: 0.into(), all: 0.into() };
        if !plan.named {
            return match places.iter().any(|p| gating.stands_at(p)) {
                true => Ok(Arc::new(gating)),
                false => refuse(
                    "none of the model's matrices can have one; attn.q, k, v and o and ffn.gate, up and \
                                 down could, where they are no experts'"
                        .into(),
                ),
            };
        }
        if let Some(Target(none)) = gating.targets.iter().find(|t| !places.iter().any(|p| t.matches(p))) {
            return refuse(format!("the model has no matrix '{none}'"));
        }
        for p in places.iter().filter(|p| gating.targets.iter().any(|t| t.matches(p))) {
            if p.expert.is_some() {
                return refuse(format!(
                    "{p} is an expert's or a head's own, of which a row reads few anyway; name others as targets \
                     (targets=attn.*)"
                ));
            }
            if !gateable(p) {
                return refuse(format!("{p}: it can stand at attn.q, k, v and o and at ffn.gate, up and down"));
            }
        }
        Ok(Arc::new(gating))
    }

    /// Whether it stands at the matrix at `place`.
    pub(crate) fn stands_at(&self, place: &Place) -> bool {
        (self.named || gateable(place)) && self.targets.iter().any(|t| t.matches(place))
    }

    /// Counts what rows read.
    pub(crate) fn count(&self, reads: Reads) {
        self.read.fetch_add(reads.read, Ordering::Relaxed);
        self.all.fetch_add(reads.all, Ordering::Relaxed);
    }

    /// What was counted.
    pub(crate) fn reads(&self) -> Reads {
        Reads { read: self.read.load(Ordering::Relaxed), all: self.all.load(Ordering::Relaxed) }
    }
}

impl Gated {
    /// What a backend is told.
    pub(crate) fn ask(&self) -> GateAsk<'_> {
        GateAsk { place: &self.place, gate: self.gating.gate.as_ref(), norms: &self.norms }
    }
}

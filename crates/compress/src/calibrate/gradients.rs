//! Gradients of the source's loss: one pass back over the whole model before the walk, what it gave in a scratch file.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ask, Gathered};
use lacuna_format::{Float, PatternKind, Stored, Weights, pack_float};
use lacuna_model::ModelError;
use lacuna_model::derive::stats::{Each, Mean, Norms, OutputGrams, Sides, WeightGradients};
use lacuna_model::derive::{BlockInputs, GradientSink, gradients};
use lacuna_spec::Place;

use crate::account::CompressError;
use crate::activations::SpilledInputs;
use crate::drive::finite_stream;
use crate::scratch::Scratch;

/// What a backward pass gave, by matrix and statistic.
pub(crate) struct Gradients {
    kept: HashMap<(Place, Ask), usize>,
    scratch: Scratch,
    dir: PathBuf,
    /// Tokens and number of the sequences.
    pub(crate) seen: (u64, u64),
}

/// Bytes that what the pass over so many `sequences` gives takes on disk.
pub(crate) fn given_bytes(asked: impl Iterator<Item = (Ask, (usize, usize))>, sequences: usize) -> u64 {
    let one = |(ask, (m, n)): (Ask, (usize, usize))| match ask {
        Ask::OutputGradientGram | Ask::GradientRowGram => 4 * (m * m) as u64,
        Ask::GradientColumnGram => 4 * (n * n) as u64,
        Ask::SequenceGradients => 4 * (m * n) as u64 * sequences as u64,
        _ => 4 * (m * n) as u64,
    };
    asked.map(one).sum()
}

/// Whether it is of how rows or columns go together.
fn of_sides(ask: Ask) -> bool {
    matches!(ask, Ask::GradientRowGram | Ask::GradientColumnGram)
}

/// Bytes that a square statistic of a matrix `[m, n]` takes while a block is walked back, in f64.
pub(crate) fn square_bytes(ask: Ask, (m, n): (usize, usize)) -> u64 {
    match ask {
        Ask::GradientRowGram | Ask::OutputGradientGram => 8 * (m * m) as u64,
        Ask::GradientColumnGram => 8 * (n * n) as u64,
        _ => 0,
    }
}

impl Gradients {
    /// Runs the pass over `sequences` for what is `asked`. Block inputs lie in files in `dir` where `spill` is set,
    /// else in memory.
    pub(crate) fn gather(
        weights: &dyn Weights,
        sequences: &[Vec<u32>],
        asked: &BTreeSet<(Place, Ask)>,
        dir: &Path,
        spill: bool,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Gradients, CompressError> {
        let fault = |source| CompressError::Scratch { dir: dir.display().to_string(), source };
        let lens: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let (layers, hidden) = (weights.spec().layers.len(), weights.spec().carried());
        let inner = SpilledInputs::new(layers, &lens, hidden, spill.then_some(dir)).map_err(fault)?;
        let mut inputs = Checked { inner, layers, forward: true, failed: None };
        let of =
            |want: &dyn Fn(Ask) -> bool| asked.iter().filter(|(_, a)| want(*a)).map(|(p, _)| *p).collect::<Vec<_>>();
        let mut sink = Sink {
            asked,
            folds: WeightGradients::new(of(&|a| {
                a != Ask::OutputGradientGram && a != Ask::SequenceGradients && !of_sides(a)
            })),
            sides: WeightGradients::new(of(&of_sides)),
            each: WeightGradients::new(of(&|a| a == Ask::SequenceGradients)),
            grams: OutputGrams::new(of(&|a| a == Ask::OutputGradientGram)),
            kept: HashMap::new(),
            scratch: Scratch::new(dir).map_err(fault)?,
            not_finite: None,
        };
        let done = gradients(weights, sequences, &mut inputs, &mut sink, progress);
        if let Some(e) = inputs.failed.take().or(sink.not_finite.take()) {
            return Err(e);
        }
        done?;
        let seen = (lens.iter().map(|n| *n as u64).sum(), lens.len() as u64);
        Ok(Gradients { kept: sink.kept, scratch: sink.scratch, dir: dir.to_owned(), seen })
    }

    /// What was gathered for some matrices.
    pub(crate) fn of(&mut self, places: &[Place]) -> Result<HashMap<Place, Vec<(Ask, Gathered)>>, CompressError> {
        let mut out: HashMap<Place, Vec<(Ask, Gathered)>> = HashMap::new();
        let mut wanted: Vec<((Place, Ask), usize)> =
            self.kept.iter().filter(|((p, _), _)| places.contains(p)).map(|(k, n)| (*k, *n)).collect();
        wanted.sort_unstable();
        for ((place, ask), number) in wanted {
            let stored = self.scratch.get(number);
            let stored =
                stored.map_err(|source| CompressError::Scratch { dir: self.dir.display().to_string(), source })?;
            out.entry(place).or_default().push((ask, Gathered::Matrix(stored.to_mat())));
        }
        Ok(out)
    }
}

/// Block inputs that are finite on the way forward; the block that puts out others is named.
struct Checked {
    inner: SpilledInputs,
    layers: usize,
    /// Until the head takes what comes out of the last block.
    forward: bool,
    failed: Option<CompressError>,
}

impl BlockInputs for Checked {
    fn take(&mut self, slot: usize, sequence: usize) -> Result<Mat, ModelError> {
        self.forward &= slot < self.layers;
        self.inner.take(slot, sequence)
    }

    fn put(&mut self, slot: usize, sequence: usize, x: Mat) -> Result<(), ModelError> {
        if self.forward
            && let Err(e) = finite_stream(slot.saturating_sub(1), &x)
        {
            let stopped = ModelError::Store { what: e.to_string() };
            self.failed = Some(e);
            return Err(stopped);
        }
        self.inner.put(slot, sequence, x)
    }
}

fn store(e: io::Error) -> ModelError {
    ModelError::Store { what: e.to_string() }
}

/// Folds gradients block by block and puts what came of them aside.
struct Sink<'a> {
    asked: &'a BTreeSet<(Place, Ask)>,
    folds: WeightGradients<(Mean, Norms)>,
    sides: WeightGradients<Sides>,
    each: WeightGradients<Each>,
    grams: OutputGrams,
    kept: HashMap<(Place, Ask), usize>,
    scratch: Scratch,
    /// What stopped the pass, in words of its own.
    not_finite: Option<CompressError>,
}

impl Sink<'_> {
    fn keep(&mut self, place: Place, ask: Ask, m: &Mat) -> Result<(), ModelError> {
        let bad = |what: String| ModelError::Store { what: format!("gradients of {place}: {what}") };
        if let Some(i) = m.data().iter().position(|x| !x.is_finite()) {
            let (r, c) = (i / m.cols(), i % m.cols());
            let what = format!("the gradient at row {r}, column {c} is {}, beyond the range of numbers", m.data()[i]);
            let e = bad(what.clone());
            self.not_finite = Some(CompressError::NotFinite { place: place.to_string(), what });
            return Err(e);
        }
        let piece = pack_float(m.view(), None, PatternKind::Dense, Float::F32).map_err(|e| bad(e.what))?;
        let number = self.scratch.put(&Stored::from_piece(piece)).map_err(store)?;
        self.kept.insert((place, ask), number);
        Ok(())
    }
}

impl GradientSink for Sink<'_> {
    fn wants(&self, place: &Place) -> bool {
        self.folds.wants(place) || self.sides.wants(place) || self.each.wants(place) || self.grams.wants(place)
    }

    fn gradient(&mut self, place: &Place, x: MatRef<'_>, dy: MatRef<'_>) {
        self.folds.gradient(place, x, dy);
        self.sides.gradient(place, x, dy);
        self.each.gradient(place, x, dy);
        self.grams.gradient(place, x, dy);
    }

    fn end_of_sequence(&mut self) {
        self.folds.end_of_sequence();
        self.sides.end_of_sequence();
        self.each.end_of_sequence();
        self.grams.end_of_sequence();
    }

    fn end_of_part(&mut self, layer: Option<usize>) -> Result<(), ModelError> {
        self.folds.end_of_part(layer)?;
        self.sides.end_of_part(layer)?;
        self.each.end_of_part(layer)?;
        self.grams.end_of_part(layer)?;
        let n = self.folds.sequences();
        let asked = self.asked;
        for (place, (mean, norms)) in self.folds.take() {
            for ask in asked.iter().filter(|(p, _)| *p == place).map(|(_, a)| *a) {
                let m = match ask {
                    Ask::GradientMean => mean.mean(n),
                    Ask::GradientAbsolute => norms.mean_abs(n),
                    Ask::GradientSquares => {
                        let root = norms.root_sum_of_squares();
                        Mat::from_fn(root.rows(), root.cols(), |r, c| root[(r, c)] * root[(r, c)] / n.max(1) as f32)
                    }
                    _ => continue,
                };
                self.keep(place, ask, &m)?;
            }
        }
        let n = self.sides.sequences();
        for (place, sides) in self.sides.take() {
            for ask in asked.iter().filter(|(p, _)| *p == place).map(|(_, a)| *a) {
                match ask {
                    Ask::GradientRowGram => self.keep(place, ask, &sides.rows(n))?,
                    Ask::GradientColumnGram => self.keep(place, ask, &sides.columns(n))?,
                    _ => {}
                }
            }
        }
        for (place, each) in self.each.take() {
            self.keep(place, Ask::SequenceGradients, &each.into_mat())?;
        }
        for (place, gram) in self.grams.take() {
            let m = Mat::from_fn(gram.n(), gram.n(), |i, j| gram.at(i, j) as f32);
            self.keep(place, Ask::OutputGradientGram, &m)?;
        }
        Ok(())
    }
}

//! Steps: what a family makes of its keys and a method, and the driver drives.

use lacuna_base::Mat;
use lacuna_format::{Stored, Unpacked};
use lacuna_spec::{LayerSpec, Place, Spec};
use serde_json::Value;

use crate::card::MethodError;
use crate::lab::{Assignment, Lab};
use crate::questions::{Unit, Vocabulary};
use crate::stats::{Ask, Site, Stats};

/// A step of a recipe, by how it walks.
pub enum Step {
    /// Matrix by matrix, or block by block, each calibrated on what the compressed earlier blocks put out.
    Local(Box<dyn Local>),
    /// The whole model, before the blocks.
    Model(Box<dyn ModelWide>),
    /// Chooses a key of another step place by place, before the blocks.
    Search(Box<dyn Searching>),
}

impl std::fmt::Debug for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Step::Local(_) => "Local",
            Step::Model(_) => "Model",
            Step::Search(_) => "Search",
        })
    }
}

/// A change to the model. A whole list is held against [`Spec::check`] and the shapes before one is applied.
// A list of edits holds few, and each is taken apart at once.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Edit {
    /// New terms for a matrix.
    Matrix(Place, Unpacked),
    /// New values for a norm's scale or a bias, `[1, n]`.
    Vector(Place, Vec<f32>),
    /// Rows and columns of a matrix that stay, rising; `None`: all. A vector has columns only.
    Keep {
        /// The tensor.
        place: Place,
        /// Rows that stay.
        rows: Option<Vec<usize>>,
        /// Columns that stay.
        cols: Option<Vec<usize>>,
    },
    /// The network from now on.
    Spec(Box<Spec>),
    /// The ids of the tokens that stay, rising; each gets its place among them as its new id. Rows of the tensors and
    /// the network's `vocab` come as edits of their own.
    Vocabulary(Vec<usize>),
}

/// What a step leaves of a matrix, for the steps after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Zeros that must stay.
    Masked,
    /// Codes.
    Rounded,
    /// Thin matrices in place of the one.
    Factored,
    /// Some weights in a term of their own, the rest as it was.
    Aside,
    /// A term beside what was there.
    Corrected,
    /// Weights of mapped inputs: statistics are then those of the inputs as mapped.
    Mapped {
        /// Whether the maps mix inputs, and not only move and scale them.
        mixes: bool,
    },
}

impl Left {
    /// Whether the maps that steps left at a matrix's input mix inputs; `None` where there are none.
    pub fn mixes(earlier: &[Left]) -> Option<bool> {
        let maps = earlier.iter().filter_map(|l| if let Left::Mapped { mixes } = l { Some(*mixes) } else { None });
        maps.reduce(|a, b| a || b)
    }
}

/// One matrix at a local step.
pub struct Work<'a> {
    /// Which.
    pub place: Place,
    /// The matrix as earlier steps left it.
    pub matrix: Unpacked,
    /// As it came.
    pub source: &'a Stored,
    /// Statistics of its inputs, as the matrix's maps leave them.
    pub stats: Stats<'a>,
    /// What is added to its outputs, as it came.
    pub bias: Option<&'a Stored>,
    /// The network that it is part of.
    pub spec: &'a Spec,
}

/// A step that works on the matrices of one decoder block at a time.
pub trait Local: Send + Sync {
    /// Whether the matrices of a block compete, so that they must come together; else each comes alone, several at once
    /// in parallel.
    fn together(&self) -> bool;

    /// Statistics that the step reads at a matrix.
    fn needs(&self, place: &Place) -> Vec<Ask>;

    /// Refuses what a matrix of `shape` `(rows, cols)` does not allow, or what cannot come after `earlier`; says what
    /// the step leaves.
    fn check(&self, shape: (usize, usize), earlier: &[Left]) -> Result<Left, MethodError>;

    /// Brings a matrix of random values into the form that the step gives: bytes and speed are foretold from it. No
    /// statistics.
    fn foretell(&self, sample: Unpacked, seed: u64) -> Result<Unpacked, MethodError>;

    /// Where the form hangs on how the matrix is stored and not on its shape alone: what comes of `source`. `None`:
    /// [`Local::foretell`] says it.
    fn foretell_of(&self, source: &Stored) -> Option<Result<Unpacked, MethodError>> {
        let _ = source;
        None
    }

    /// Bytes that one matrix of `shape` takes while the step works on it, beside itself and its statistics.
    fn scratch_bytes(&self, shape: (usize, usize)) -> u64;

    /// Works on one matrix, or on all that compete.
    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError>;
}

/// A step that looks at the whole model before it decides.
pub trait ModelWide: Send + Sync {
    /// Statistics that the step reads at a layer of a network; where it turns the residual stream, those at the head,
    /// too, which stands behind the last layer.
    fn needs(&self, spec: &Spec, layer: usize) -> Vec<(Site, Ask)>;

    /// Refuses a network that the step cannot work on.
    fn check(&self, spec: &Spec) -> Result<(), MethodError>;

    /// Whether the step reads the tokens of the model's tokenizer.
    fn reads_vocabulary(&self) -> bool {
        false
    }

    /// Whether matrices that stay get other rows, columns or axes: what was gathered of the source is then not of them.
    fn reshapes(&self) -> bool {
        false
    }

    /// Begins a walk over the layers.
    fn begin(&self, spec: &Spec) -> Result<Box<dyn Walker>, MethodError>;

    /// Bytes that a walk takes at once, beside a layer and its statistics.
    fn scratch_bytes(&self, spec: &Spec) -> u64 {
        let _ = spec;
        0
    }

    /// Whether the walk changes the residual stream as it goes, so that what is gathered further on has seen it: the
    /// walker is then asked [`Walker::turn`] before every reader of the stream, and visits no layer.
    fn turns(&self) -> bool {
        false
    }
}

/// Who reads the residual stream next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// The attention of a layer.
    Attention(usize),
    /// The FFN of a layer.
    Ffn(usize),
    /// The head.
    Head,
}

/// What a walk does before a reader.
#[derive(Debug, Default)]
pub struct Turn {
    /// `[hidden, hidden]`, for the rest of the walk: rows `x` of the stream become `x · map`.
    pub map: Option<Mat>,
    /// Edits, kept aside by the driver until the walk ends.
    pub edits: Vec<Edit>,
}

/// What a model-wide step sees: at a visit the layer with its statistics, at the end the network as it was throughout,
/// without any.
pub trait LayerWork {
    /// The network.
    fn spec(&self) -> &Spec;

    /// A tensor's values, `[rows, cols]`.
    fn weight(&self, place: &Place) -> Result<Mat, MethodError>;

    /// The statistics of a site.
    fn stats(&self, site: Site) -> Stats<'_>;

    /// The tokens, where the step reads them.
    fn vocabulary(&self) -> Option<&Vocabulary>;
}

/// A walk over the layers of a model, first to last.
pub trait Walker {
    /// Looks at a layer. Edits given here are kept aside by the driver until the walk ends.
    fn visit(&mut self, layer: usize, work: &dyn LayerWork) -> Result<Vec<Edit>, MethodError>;

    /// Looks at what a reader is about to be given, first to last; for steps that turn the stream.
    fn turn(&mut self, before: Reader, work: &dyn LayerWork) -> Result<Turn, MethodError> {
        let _ = (before, work);
        Ok(Turn::default())
    }

    /// Decides. What depends on the decision is worked out of weights read once more.
    fn finish(self: Box<Self>, work: &dyn LayerWork) -> Result<Finished, MethodError>;
}

/// What a walk came to.
#[derive(Default)]
pub struct Finished {
    /// The last edits.
    pub edits: Vec<Edit>,
    /// What was decided, for the report.
    pub note: String,
    /// A walk that goes over the layers once more, with what this one learned and without statistics. Edits take effect
    /// after the last.
    pub again: Option<Box<dyn Walker>>,
}

/// What a search varies.
#[derive(Clone, Debug)]
pub enum Varied {
    /// Values of a key of the step called so.
    Key {
        /// The step.
        step: String,
        /// Its key.
        key: String,
        /// The values, each a level.
        values: Vec<Value>,
        /// Whether all matrices of a decoder block are one slot.
        by_layer: bool,
    },
    /// Whether attentions and FFNs are there at all.
    Parts,
    /// How many heads attentions and how many channels FFNs have; each is a slot, and all have as many levels.
    Sizes,
}

/// An attention or an FFN at one size.
#[derive(Debug)]
pub struct AtSize {
    /// The consecutive levels that it stands for, as shares of what there was.
    pub shares: Vec<f64>,
    /// What the budget counts.
    pub bytes: u64,
    /// Relative error of what the part puts out on the calibration text.
    pub error: f64,
    /// The same, not relative.
    pub lost: f64,
    /// Edits of the layer's tensors; none where the part stays whole or goes.
    pub edits: Vec<Edit>,
    /// The layer with its part at this size.
    pub layer: LayerSpec,
}

/// A step that chooses levels.
pub trait Searching: Send + Sync {
    /// What varies.
    fn varies(&self) -> Varied;

    /// Most trials, each of them one assignment measured.
    fn trials(&self) -> usize;

    /// Statistics of a matrix that it looks at, beside those that the step that varies reads.
    fn needs(&self) -> &'static [Ask];

    /// Looks at the matrices of a slot as they are in the source: a number that the lab keeps for it.
    fn look(&self, places: &[Place], work: &dyn LayerWork) -> Result<f64, MethodError>;

    /// Where sizes vary: the statistics of a layer that cutting its parts reads.
    fn sizes_need(&self, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
        let _ = (spec, layer);
        Vec::new()
    }

    /// Where sizes vary: hands `each` a part of a layer at all its sizes, the whole one first; none where it is not
    /// there.
    fn sizes(
        &self,
        layer: usize,
        part: Unit,
        work: &dyn LayerWork,
        each: &mut dyn FnMut(AtSize) -> Result<(), MethodError>,
    ) -> Result<(), MethodError> {
        let _ = (layer, part, work, each);
        Ok(())
    }

    /// Bytes that cutting the parts of a layer takes at once, beside its weights and statistics.
    fn scratch_bytes(&self, spec: &Spec) -> u64 {
        let _ = spec;
        0
    }

    /// Chooses.
    fn search(&self, lab: &mut dyn Lab) -> Result<Assignment, MethodError>;
}

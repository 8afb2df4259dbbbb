//! The questions.

use std::fmt;
use std::str::FromStr;

use lacuna_base::{Mat, Mat64, MatRef};
use lacuna_format::{
    Affine, Float, GgufType, Integers, Map, Mask, Piece, ScaleCodec, Stored, UnpackedPiece, UnpackedSigned,
};
use lacuna_spec::{Activation, Place};
use serde::{Deserialize, Serialize};

use crate::card::MethodError;
use crate::lab::{Assignment, Lab};
use crate::stats::{Ask, Stats};
use crate::step::LayerWork;

/// Which weights compete when the lowest scores go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Those of one output row.
    Row,
    /// Those of one matrix.
    Matrix,
    /// Those of all targeted matrices of one decoder block.
    Layer,
}

/// Score: how much does each weight matter?
pub trait Score: Send + Sync {
    /// Importance of each weight of `w` `[out, in]`: larger = keep.
    fn score(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Mat, MethodError>;

    /// The group the paper compares in.
    fn scope(&self) -> Scope;

    /// Statistics that its parameters make it read, beside those on its card.
    fn also_needs(&self) -> &'static [Ask] {
        &[]
    }
}

/// What a grid is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GridAsk {
    /// Bits of a code, 2 to 8.
    pub bits: u8,
    /// Without zero points: the code of 0 is `2^(bits-1)`.
    pub symmetric: bool,
    /// How the scale will be written (f32 or f16): a grid answers with a scale that this codec keeps exactly.
    pub scale: Float,
}

impl GridAsk {
    /// How scales of such a grid are packed.
    pub fn codec(&self) -> ScaleCodec {
        if self.scale == Float::F32 { ScaleCodec::F32 } else { ScaleCodec::F16 }
    }
}

/// Grid: which values may the weights of one group take?
pub trait Grid: Send + Sync {
    /// The grid for one group's `values` (those that pruning removed left out). Empty or all-zero values: any scale,
    /// exact zero kept.
    fn fit(&self, values: &[f32], ask: &GridAsk) -> Result<Affine, MethodError>;

    /// The same where each value's `importance` is known (as long as `values`, none negative).
    fn fit_weighted(&self, values: &[f32], importance: &[f32], ask: &GridAsk) -> Result<Affine, MethodError> {
        let _ = importance;
        self.fit(values, ask)
    }

    /// The statistic of the inputs, `[in]`, that says how much the weights of each column matter; `None`: all the same.
    /// A solver gives its own importance to a grid that asks for one.
    fn importance(&self) -> Option<Ask> {
        None
    }
}

/// Table: which values may the weights of one row or group take, evenly spaced or not?
pub trait Table: Send + Sync {
    /// `2^bits` values, rising, for `values` with their `importance` (as long as `values`, none negative, or empty: all
    /// the same). No values: zeros.
    fn table(&self, values: &[f32], importance: &[f32], bits: u8) -> Result<Vec<f32>, MethodError>;

    /// The statistic `[out, in]` that says how much each weight matters; `None`: all the same.
    fn importance(&self) -> Option<Ask>;

    /// Where one table serves the whole matrix and each group takes a multiple of it: by whom; [`Table::table`] is then
    /// not asked.
    fn scaled(&self) -> Option<&dyn Scaled> {
        None
    }
}

/// What a table of scaled values is asked.
#[derive(Clone, Copy)]
pub struct ScaledAsk<'a> {
    /// The weights, `[out, in]`.
    pub w: MatRef<'a>,
    /// What stays (all, where absent); the rest stays zero.
    pub mask: Option<&'a Mask>,
    /// Bits, and how scales are written where the answer does not say otherwise.
    pub ask: GridAsk,
    /// Consecutive columns that share a scale, 1 or more.
    pub group: usize,
}

/// One table for a matrix, and the multiples of it that groups take.
#[derive(Clone, Debug, PartialEq)]
pub struct ScaledTable {
    /// `2^bits` values, rising.
    pub table: Vec<f32>,
    /// `[out, groups]`, values that `codec` keeps exactly.
    pub scales: Mat,
    /// How scales are written.
    pub codec: ScaleCodec,
}

/// Scaled: a table fixed for the matrix, times a scale for each group.
pub trait Scaled: Send + Sync {
    /// The table and the scales.
    fn fit(&self, ask: &ScaledAsk<'_>) -> Result<ScaledTable, MethodError>;
}

/// Recode: how are the numbers beside the codes of a rounded matrix written?
pub trait Recode: Send + Sync {
    /// The matrix with the same codes and other numbers beside them; `None` where it has none that can be written so.
    fn recode(&self, stored: &Stored) -> Result<Option<Stored>, MethodError>;
}

/// Stack: which one-bit blocks add up to a matrix, so that any number of them from the first on comes near it?
pub trait Stack: Send + Sync {
    /// The maps of a matrix's inputs behind which it is taken apart; without statistics, maps of the same form with any
    /// numbers.
    fn maps(&self, inputs: usize, stats: Option<&Stats<'_>>) -> Result<Vec<Map>, MethodError>;

    /// `count` blocks of `w`, `[out, in]`, whose inputs are mapped: each is of what those before it leave.
    fn blocks(&self, w: MatRef<'_>, count: usize) -> Result<Vec<UnpackedSigned>, MethodError>;

    /// Blocks of the same form for a matrix of `(rows, cols)`, with any numbers.
    fn form(&self, shape: (usize, usize), count: usize, seed: u64) -> Result<Vec<UnpackedSigned>, MethodError>;
}

/// Which zeros are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparsity {
    /// Anywhere.
    Unstructured,
    /// `n` kept of every `m` consecutive columns.
    Nm {
        /// Kept.
        n: usize,
        /// Of.
        m: usize,
    },
    /// Blocks of `height` rows by `width` columns, kept or dropped whole.
    Block {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
}

impl fmt::Display for Sparsity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sparsity::Unstructured => f.write_str("unstructured"),
            Sparsity::Nm { n, m } => write!(f, "{n}:{m}"),
            Sparsity::Block { height, width } => write!(f, "block:{height}x{width}"),
        }
    }
}

impl FromStr for Sparsity {
    type Err = String;
    fn from_str(s: &str) -> Result<Sparsity, String> {
        let bad = || format!("'{s}' is no pattern; write \"unstructured\", \"2:4\", \"4:8\" or \"block:8x1\"");
        let two = |t: &str, by: char| -> Result<(usize, usize), String> {
            let (a, b) = t.split_once(by).ok_or_else(bad)?;
            Ok((a.parse().map_err(|_| bad())?, b.parse().map_err(|_| bad())?))
        };
        if s == "unstructured" {
            Ok(Sparsity::Unstructured)
        } else if let Some(t) = s.strip_prefix("block:") {
            let (height, width) = two(t, 'x')?;
            if height == 0 || width == 0 || height > 1024 || width > 1024 {
                return Err(bad());
            }
            Ok(Sparsity::Block { height, width })
        } else {
            let (n, m) = two(s, ':')?;
            if n == 0 || n > m || !(2..=32).contains(&m) {
                return Err(bad());
            }
            Ok(Sparsity::Nm { n, m })
        }
    }
}

/// How much to prune.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PruneAsk {
    /// Fraction of zeros wanted (N:M patterns state their own).
    pub sparsity: f64,
    /// Which zeros.
    pub pattern: Sparsity,
}

/// How to round.
#[derive(Clone, Copy)]
pub struct RoundAsk<'a> {
    /// Bits, symmetry, scale codec.
    pub ask: GridAsk,
    /// The grid to fit to each group.
    pub grid: &'a dyn Grid,
    /// Consecutive columns that share a scale; 0 or `in`: a whole row.
    pub group: usize,
}

/// What a solver is asked.
#[derive(Clone, Copy)]
pub struct SolveAsk<'a> {
    /// The weights, `[out, in]`.
    pub w: MatRef<'a>,
    /// Statistics of the inputs.
    pub stats: &'a Stats<'a>,
    /// What earlier steps kept: the rest is zero and stays zero.
    pub mask: Option<&'a Mask>,
    /// Prune, if asked.
    pub prune: Option<PruneAsk>,
    /// Round, if asked.
    pub round: Option<RoundAsk<'a>>,
}

/// A solver's answer.
#[derive(Clone, Debug)]
pub struct Solved {
    /// The new weights, `[out, in]`; where `integers` are given, exactly their decoded values.
    pub w: Mat,
    /// What is kept, where anything was pruned now or before.
    pub mask: Option<Mask>,
    /// The rounded form, where rounding was asked.
    pub integers: Option<Integers>,
    /// Weights in a term of their own, beside `w`.
    pub aside: Vec<UnpackedPiece>,
}

/// How a solver's rounded answers differ in form from what it was asked: they are packed by it, and bytes are foretold
/// from it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundedForm {
    /// How scales are written, where not as the grid's ask says; the scales answered are values that this codec keeps
    /// exactly.
    pub scales: Option<ScaleCodec>,
    /// Whether zero points are any numbers, written as the scales are, where no mask drops weights.
    pub offsets: bool,
    /// The fraction of the weights that will lie in sparse terms aside, as far as that can be known before the weights
    /// are.
    pub aside: f64,
}

/// Solve: choose what stays, and compensate with the rest.
pub trait Solve: Send + Sync {
    /// New weights for the request.
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError>;

    /// The matrix `w`, `[out, in]`, in blocks of a GGUF type; those that cannot refuse.
    fn solve_blocks(&self, w: MatRef<'_>, stats: &Stats<'_>, kind: GgufType) -> Result<Piece, MethodError> {
        let _ = (w, stats);
        Err(MethodError::new(format!("the method does not round to {kind:?}")))
    }

    /// The form of its answers where it rounds.
    fn rounded_form(&self, _: &GridAsk) -> RoundedForm {
        RoundedForm::default()
    }

    /// Statistics that its parameters make it read, beside those on its card.
    fn also_needs(&self) -> &'static [Ask] {
        &[]
    }

    /// Where it prunes the matrices of an FFN together: by whom.
    fn of_ffn(&self) -> Option<&dyn SolveFfn> {
        None
    }
}

/// A matrix of an FFN.
#[derive(Clone, Copy)]
pub struct FfnMatrix<'a> {
    /// What is asked of it.
    pub ask: SolveAsk<'a>,
    /// What is added to its outputs, `[out]`; nothing where empty.
    pub bias: &'a [f32],
}

/// An FFN, whose output is `down · (act(gate · x) * (up · x))`, or `down · act(up · x)`.
#[derive(Clone, Copy)]
pub struct FfnAsk<'a> {
    /// The matrix that goes through the non-linearity where the FFN is gated.
    pub gate: Option<FfnMatrix<'a>>,
    /// The other that reads the inputs.
    pub up: FfnMatrix<'a>,
    /// The matrix that reads what these write.
    pub down: FfnMatrix<'a>,
    /// The non-linearity.
    pub act: Activation,
}

/// SolveFfn: choose what stays of all matrices of an FFN, and compensate with the rest.
pub trait SolveFfn: Send + Sync {
    /// Rows of the FFN's inputs that it reads, at the most ([`Ask::InputRows`], among the statistics of gate and up).
    fn rows(&self) -> usize;

    /// Answers for gate (where there is one), up and down, in this order.
    fn solve(&self, ask: &FfnAsk<'_>) -> Result<Vec<Solved>, MethodError>;
}

/// Factor: thin matrices instead of one.
pub trait Factor: Send + Sync {
    /// `(a, b)` with `a` `[out, rank]`, `b` `[rank, in]` and `a · b` near `w`, which is a matrix or the error of the
    /// terms so far.
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError>;

    /// Bytes that it takes for a matrix of `(rows, cols)`, beside the matrix and its statistics: a few matrices
    /// `[in, in]` and some copies in f64.
    fn scratch_bytes(&self, (rows, cols): (usize, usize)) -> u64 {
        32 * (cols as u64) * (cols as u64) + 48 * (rows as u64) * (cols as u64)
    }
}

/// The singular values of one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum {
    /// Rows and columns.
    pub shape: (usize, usize),
    /// The values, largest first, as many as its shorter side.
    pub values: Vec<f64>,
}

/// Ranks: how thin may each matrix of a model become?
pub trait Ranks: Send + Sync {
    /// The rank of each, 1 or more, or `None` where the matrix stays whole. With `rank · (rows + cols)` parameters for
    /// a thin one all together hold no more than `keep` of what they held.
    fn ranks(&self, spectra: &[Spectrum], keep: f64) -> Result<Vec<Option<usize>>, MethodError>;
}

/// Transform: which maps of a matrix's inputs make it easier to write with few bits?
pub trait Transform: Send + Sync {
    /// The maps for `w`, `[out, in]`, in the order in which they are applied. Each has an inverse: the weights become
    /// those of the mapped inputs, and nothing else changes.
    fn maps(&self, w: MatRef<'_>, stats: &Stats<'_>) -> Result<Vec<Map>, MethodError>;

    /// Maps of the same form with any numbers, or why there are none for so many inputs.
    fn form(&self, inputs: usize) -> Result<Vec<Map>, MethodError>;
}

/// What can go as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Attention and FFN of a decoder block.
    Block,
    /// An attention.
    Attention,
    /// An FFN.
    Ffn,
    /// A key and value head with the query heads that read it.
    Head,
    /// A channel of an FFN.
    Channel,
}

/// What a structural method is asked about one layer.
#[derive(Clone, Copy)]
pub struct StructureAsk<'a> {
    /// Of what.
    pub unit: Unit,
    /// The layer.
    pub layer: usize,
    /// How many there are in it (1 for a whole part).
    pub count: usize,
    /// Columns of `reader` that a unit writes; 0 for a whole part.
    pub width: usize,
    /// The matrix that reads what the units write, `[hidden, count * width]`: `attn.o` or `ffn.down`. Absent for a
    /// whole part.
    pub reader: Option<MatRef<'a>>,
    /// The matrices that write it: for heads q, k, v, for channels gate (where there is one) and up.
    pub writers: &'a [MatRef<'a>],
    /// Statistics of the reader's inputs; for a whole part those of the layer.
    pub stats: Stats<'a>,
    /// What backward passes gave of the writers, in their order.
    pub writer_stats: &'a [Stats<'a>],
}

/// Whose units compete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Compete {
    /// Those of one kind in one layer: every layer loses the asked fraction, or the share that the method gives it.
    Layer,
    /// Those of the whole model, by their scores as they are.
    Model,
    /// Those of the whole model, by their scores less the mean of their layer and kind, over its standard deviation.
    Standardized,
}

/// Structure: which heads, channels or whole parts go?
pub trait Structure: Send + Sync {
    /// Importance of each unit, `[count]`: larger = keep.
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError>;

    /// Whose units compete.
    fn compete(&self) -> Compete;

    /// Whether what the units that go wrote on average (the mean of the reader's inputs) is put into the reader's bias.
    fn keeps_means(&self) -> bool;

    /// Looks at a layer as a whole, whose statistics these are: a number that is kept for [`Structure::shares`].
    fn look(&self, layer: &Stats<'_>) -> Result<f64, MethodError> {
        let _ = layer;
        Ok(0.0)
    }

    /// Where units compete in their layer: the fraction, 0 to 1, that goes of each, by what was seen of it, so that
    /// layers of one size lose `sparsity` on average.
    fn shares(&self, looked: &[f64], sparsity: f64) -> Result<Vec<f64>, MethodError> {
        Ok(vec![sparsity; looked.len()])
    }

    /// Where it learns from the weights of all layers before it scores them: who does. It reads no statistics.
    fn learner(&self) -> Option<Box<dyn Learner>> {
        None
    }
}

/// What learns from a model's units, walk after walk over its layers, before it scores them.
pub trait Learner {
    /// Looks at the units of one reader, of which the fraction `sparsity` will go.
    fn look(&mut self, ask: &StructureAsk<'_>, sparsity: f64) -> Result<(), MethodError>;

    /// A walk is over: whether it wants another before it scores.
    fn again(&mut self) -> bool;

    /// Importance of each unit, `[count]`: larger = keep.
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError>;
}

/// The heads or channels of a part cut to a size.
#[derive(Clone, Debug, PartialEq)]
pub struct Cut {
    /// The units that stay, rising.
    pub kept: Vec<usize>,
    /// What now reads them, `[hidden, kept * width]`.
    pub reader: Mat,
    /// `‖(W - W') X‖² / ‖W X‖²` on the calibration text; 1 where all are gone.
    pub error: f64,
    /// The same as it is, not relative, over all tokens.
    pub lost: f64,
}

/// Shrink: what is left of heads or channels at each of several sizes?
pub trait Shrink: Send + Sync {
    /// The sizes, as shares of the units that there are, falling from 1 (all) to 0 (the part is gone).
    fn shares(&self) -> Vec<f64>;

    /// Statistics of the reader's inputs that it reads.
    fn needs(&self) -> &'static [Ask];

    /// Begins with all units.
    fn begin(&self, ask: &StructureAsk<'_>) -> Result<Box<dyn Shrinking>, MethodError>;
}

/// Heads or channels that become fewer and fewer.
pub trait Shrinking {
    /// Cuts what is left to `size` units, no more than there are.
    fn cut(&mut self, size: usize) -> Result<Cut, MethodError>;
}

/// Basis: which change of axes first?
pub trait Basis: Send + Sync {
    /// Orthonormal columns, `[n, width]`, for rows whose mean outer product is `gram`, `[n, n]`: a row `x` becomes
    /// `x · basis`.
    fn basis(&self, gram: &Mat64, width: usize) -> Result<Mat64, MethodError>;
}

/// The tokens of a vocabulary, as a shortlist needs to know them; the index is the id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Vocabulary {
    /// How often each stands in the calibration text.
    pub counts: Vec<u64>,
    /// The bytes of text that each stands for; none where no token has the id.
    pub bytes: Vec<Vec<u8>>,
    /// Whether it stays whatever is chosen: special and added tokens, bytes, what the chat template writes.
    pub must: Vec<bool>,
    /// Tokens without which it cannot be reached: the two that its last merge joins, the letters that it is made of.
    pub pieces: Vec<Vec<u32>>,
}

/// What a shortlist is asked.
#[derive(Clone, Copy, Debug)]
pub struct ShortlistAsk<'a> {
    /// The tokens there are.
    pub vocabulary: &'a Vocabulary,
    /// Most tokens that may stay.
    pub most: usize,
}

/// Shortlist: which tokens does the model still need?
pub trait Shortlist: Send + Sync {
    /// Ids that stay, rising: those that must, the wanted ones, and with each its pieces, theirs and so on.
    fn shortlist(&self, ask: &ShortlistAsk<'_>) -> Result<Vec<usize>, MethodError>;
}

/// What a search is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SearchAsk {
    /// Most bytes of all slots together (of what their levels count as such).
    pub budget_bytes: u64,
    /// Most trials.
    pub trials: usize,
    /// Tokens of a trial at the most.
    pub tokens: usize,
    /// Where randomness comes from.
    pub seed: u64,
}

/// Search: how much for each place? Statistics on its card are those that `look` reads.
pub trait Search: Send + Sync {
    /// A level for each slot whose bytes stay within the budget.
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError>;

    /// Looks at the matrices of a slot as they are in the source: a number that the lab keeps for it.
    fn look(&self, places: &[Place], work: &dyn LayerWork) -> Result<f64, MethodError> {
        let _ = (places, work);
        Ok(0.0)
    }

    /// How its paper cuts heads and channels to the sizes that are chosen from, where it says so.
    fn shrinker(&self) -> Option<&dyn Shrink> {
        None
    }
}

//! The questions.

use std::fmt;
use std::str::FromStr;

use lacuna_base::{Mat, MatRef, dense::Gram};
use lacuna_format::{Affine, Float, Mask};
use serde::{Deserialize, Serialize};

use crate::answers::{DropPart, MethodError, Outcome, Slot, Solved};

/// Who a method is and what it needs.
#[derive(Clone, Debug, Serialize)]
pub struct Card {
    /// The name recipes use.
    pub name: &'static str,
    /// Authors, title, year.
    pub paper: &'static str,
    /// arXiv id, or empty.
    pub arxiv: &'static str,
    /// One sentence: what it does.
    pub summary: &'static str,
    /// The step it makes by default.
    pub verb: Verb,
    /// The statistics it reads.
    pub needs: Needs,
}

/// What a recipe's step does with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verb {
    /// Sets weights to zero.
    Prune,
    /// Writes weights with few bits.
    Quantize,
    /// Replaces a matrix by a product of thin ones.
    Factor,
    /// Moves the weights that score highest into a sparse term of their own.
    Outliers,
    /// Removes whole blocks, attentions or FFNs.
    Drop,
    /// Divides sparsity among matrices.
    Budget,
}

/// Statistics of the inputs of a matrix, or of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Needs {
    /// `XᵀX` of the matrix's inputs, `[in, in]`.
    pub gram: bool,
    /// `Σ x²` of every input channel, `[in]`.
    pub squares: bool,
    /// Cosine similarity of what goes into a block, attention or FFN and what comes out.
    pub similarity: bool,
}

impl Needs {
    /// What either needs.
    pub fn union(self, other: Needs) -> Needs {
        Needs {
            gram: self.gram || other.gram,
            squares: self.squares || other.squares,
            similarity: self.similarity || other.similarity,
        }
    }
}

/// Statistics of one matrix's inputs over the calibration tokens; what was not asked for is absent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats<'a> {
    /// Rows of `X` seen (for an expert: those routed to it).
    pub tokens: u64,
    /// `XᵀX`, `[in, in]`.
    pub gram: Option<&'a Gram>,
    /// `Σ x²`, `[in]`.
    pub squares: Option<&'a [f64]>,
}

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

/// Grid: which values may the weights of one group take?
pub trait Grid: Send + Sync {
    /// The grid for one group's `values` (those that pruning removed left out). Empty or all-zero values: any scale, exact zero kept.
    fn fit(&self, values: &[f32], ask: &GridAsk) -> Result<Affine, MethodError>;
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

/// Solve: choose what stays, and compensate with the rest.
pub trait Solve: Send + Sync {
    /// New weights for the request.
    fn solve(&self, ask: &SolveAsk<'_>) -> Result<Solved, MethodError>;
}

/// Factor: thin matrices instead of one.
pub trait Factor: Send + Sync {
    /// `(a, b)` with `a` `[out, rank]`, `b` `[rank, in]` and `a · b` near `w`.
    fn factor(&self, w: MatRef<'_>, stats: &Stats<'_>, rank: usize) -> Result<(Mat, Mat), MethodError>;
}

/// What a dropping method may look at.
#[derive(Clone, Copy, Debug)]
pub struct DropStats<'a> {
    /// Mean cosine of input and output of the part, by layer; `None` where a layer lacks the part.
    pub similarity: &'a [Option<f64>],
}

/// Drop: which whole pieces go?
pub trait Drop: Send + Sync {
    /// The layers whose `part` goes, `count` of them, rising.
    fn drop(&self, part: DropPart, count: usize, stats: &DropStats<'_>) -> Result<Vec<usize>, MethodError>;
}

/// Budget: how much for each place?
pub trait Budget: Send {
    /// A sparsity for each slot such that the whole meets `target`, or `None` when the search is over.
    fn ask(&mut self, slots: &[Slot], target: f64) -> Result<Option<Vec<f64>>, MethodError>;

    /// What the assignment asked last led to.
    fn tell(&mut self, assignment: &[f64], outcome: &Outcome);
}

//! The questions of run time: what may come next, which cached entries stay, which keys a query reads, which channels a
//! row needs. Decisions are plain data; who asks carries them out.

use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_spec::Target;
use serde::{Deserialize, Serialize};

use crate::card::MethodError;
use crate::tree::Tree;

/// The most likely tokens after each of some positions.
#[derive(Clone, Copy, Debug)]
pub struct TopK<'a> {
    /// The token at each position: committed, or a node of a draft that was verified, taken over or not. Where a token
    /// stands twice, the later row counts.
    pub tokens: &'a [u32],
    /// Ids of what may follow each, most likely first, the lower id first where two are alike: `[tokens, k]`.
    pub ids: &'a [u32],
    /// Ids a position; as many as [`Draft::top`] says, fewer where the vocabulary is smaller.
    pub k: usize,
}

impl<'a> TopK<'a> {
    /// Each position's token with its followers.
    pub fn rows(&self) -> impl Iterator<Item = (u32, &'a [u32])> {
        self.tokens.iter().copied().zip(self.ids.chunks_exact(self.k.max(1)))
    }
}

/// Draft: what may come next?
pub trait Draft: Send + Sync {
    /// How many of the most likely ids it reads at each position, 0 for none.
    fn top(&self) -> usize;

    /// Most bytes that the state of one text takes, with a vocabulary of `vocab` tokens and `context` positions.
    fn bytes(&self, vocab: usize, context: usize) -> u64;

    /// The state of a text that begins, over ids below `vocab`.
    fn begin(&self, vocab: usize) -> Box<dyn Drafting>;
}

/// What a draft carries from token to token of one text.
pub trait Drafting: Send {
    /// Tells the tokens that were committed, in order (the prompt's first), and what was likely at these positions and
    /// at those of nodes that were verified.
    fn observe(&mut self, committed: &[u32], top: Option<TopK<'_>>);

    /// A tree of at most `most` tokens that continues `text`, the whole of it. Its first `n` nodes are the answer for
    /// `most = n`, so that whoever has room for fewer rows takes a beginning.
    fn propose(&mut self, text: &[u32], most: usize) -> Tree;
}

/// When a keeper decides, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepPlan {
    /// Whether it reads the attention mass of slots.
    pub mass: bool,
    /// It decides whenever a text's length is a multiple of this, 1 or more: between two decisions a head holds up to
    /// `budget + every` slots.
    pub every: usize,
    /// Slots that a head may keep.
    pub budget: usize,
}

/// What one key head holds.
#[derive(Clone, Copy, Debug)]
pub struct KeepHead<'a> {
    /// The layer.
    pub layer: usize,
    /// The key head in it.
    pub head: usize,
    /// Absolute positions of its slots, rising.
    pub positions: &'a [usize],
    /// The attention that each slot got from all committed queries since it was written, over all query heads that read
    /// this key head, as long as `positions`; empty where the plan reads none.
    pub mass: &'a [f32],
}

/// Keep: which cached entries stay?
pub trait Keep: Send + Sync {
    /// When it decides, and what for.
    fn plan(&self) -> KeepPlan;

    /// The slots that stay of each head, indices into its positions, rising: all heads' together are at most `budget`
    /// times the heads.
    fn keep(&self, heads: &[KeepHead<'_>], budget: usize) -> Result<Vec<Vec<usize>>, MethodError>;
}

/// How the keys of a block become few numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// The mean of each component.
    Mean,
    /// The least and the greatest of each component.
    #[default]
    Bounds,
}

/// Pooled keys: a row a block, `[blocks, head_dim]`.
#[derive(Clone, Copy)]
pub enum Pooled<'a> {
    /// See [`Pool::Mean`].
    Mean(MatRef<'a>),
    /// See [`Pool::Bounds`].
    Bounds {
        /// The least.
        low: MatRef<'a>,
        /// The greatest.
        high: MatRef<'a>,
    },
}

/// Which queries read by one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SelectScope {
    /// Those of one row.
    Row,
    /// Those of so many positions, counted from the text's first; the first of them is asked, so that none waits for a
    /// later one. What it was answered belongs to the text and goes wherever its keys go.
    Tile(usize),
}

/// What a selector reads, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectPlan {
    /// How the keys of a block are pooled.
    pub pool: Pool,
    /// Positions of a block.
    pub block: usize,
    /// Which queries share an answer.
    pub scope: SelectScope,
}

/// What a selector is asked.
#[derive(Clone, Copy)]
pub struct SelectAsk<'a> {
    /// The layer.
    pub layer: usize,
    /// The key head in it.
    pub head: usize,
    /// The queries of the row that read this head, `[queries, head_dim]`, as they meet the keys (turned by RoPE where
    /// those are).
    pub queries: MatRef<'a>,
    /// Whole blocks that end before the row. What lies behind them is read in any case, and nobody asks.
    pub pooled: Pooled<'a>,
}

/// Select: which keys does this query read?
pub trait Select: Send + Sync {
    /// What it reads, and how often.
    fn plan(&self) -> SelectPlan;

    /// The blocks that are read, rising.
    fn select(&self, ask: &SelectAsk<'_>) -> Result<Vec<usize>, MethodError>;
}

/// What a selector that sees a whole prompt is asked, once for each key head of a layer.
#[derive(Clone, Copy)]
pub struct PromptAsk<'a> {
    /// The layer.
    pub layer: usize,
    /// The key head in it.
    pub head: usize,
    /// The factor on products of queries and keys before their softmax.
    pub scale: f32,
    /// The queries of every row, `[tokens, heads * head_dim]`: those of the query heads that read this key head side by
    /// side, as they meet the keys.
    pub queries: MatRef<'a>,
    /// The keys of every row as they are kept, `[tokens, head_dim]`.
    pub keys: MatRef<'a>,
}

/// Select, where the end of the prompt must be seen first: which keys does each part of it read? Such a prompt is
/// computed layer by layer and shares no beginning with others; rows behind it read all.
pub trait SelectPrompt: Send + Sync {
    /// Positions of a tile, of queries as of keys, counted from the text's first.
    fn tile(&self) -> usize;

    /// For each tile of queries the tiles of keys that it reads, rising, of those before its own, which it reads in any
    /// case.
    fn select(&self, ask: &PromptAsk<'_>) -> Result<Vec<Vec<usize>>, MethodError>;
}

/// Who says which keys are read, and when it is asked.
#[derive(Clone)]
pub enum Selector {
    /// At rows, as they come.
    Rows(Arc<dyn Select>),
    /// When all of a prompt is there.
    Prompt(Arc<dyn SelectPrompt>),
}

/// On which side of a matrix channels are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateSide {
    /// Columns of the matrix, with the inputs they meet.
    Inputs,
    /// Rows of the matrix, whose outputs count as zero.
    Outputs,
}

/// Where a gate stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatePlan {
    /// The matrices, as recipes write them. Those that read the same input share one answer.
    pub targets: Vec<Target>,
    /// Whether they were named by the user: where a gate cannot stand at one of them, that is an error. Else it stands
    /// where it can.
    pub named: bool,
    /// On which side.
    pub side: GateSide,
}

/// Gate: which channels does this token need?
pub trait Gate: Send + Sync {
    /// Where it stands.
    fn plan(&self) -> GatePlan;

    /// A number for each channel that [`Gate::channels`] wants to know, from the decoded weights of all matrices that
    /// share the answer; computed once.
    fn norms(&self, weights: &[MatRef<'_>]) -> Result<Vec<f32>, MethodError>;

    /// The channels that one row needs, rising; `activations` and `norms` have a number for each.
    fn channels(&self, activations: &[f32], norms: &[f32]) -> Result<Vec<u32>, MethodError>;
}

//! The seam under the decoder: what a processor, a GPU, the slow twin and the recorder of derivatives each do.
//!
//! The network's walk asks a [`Backend`] for each operation and never sees where rows lie. The rules:
//!
//! - What a step reads from the host (token ids, positions, block tables) is handed over at its start, once
//!   ([`Backend::begin`], [`Backend::upload_ids`]); operations may then be enqueued, so that a GPU can capture a step
//!   and play it again. What goes wrong inside surfaces in [`Backend::finish`] or a download, which wait.
//! - Shapes are known on the host without a download. Nothing comes back but what a tap or a caller downloads: which
//!   rows go to which expert ([`Backend::route`]) and the likeliest token ([`Backend::argmax`]) are decided where the
//!   rows lie.
//! - Pages never cross: a store of keys and values owns a backend's [`Pages`] of each layer, and names them by block
//!   numbers in [`Tables`].
//! - A row's result depends on the row, what it is met by and the backend alone, never on its company.

mod cpu;
mod frequencies;
mod gate;
pub mod naive;
mod naive_mixer;
mod select;
mod states;
mod tables;

use std::ops::Range;
use std::sync::Arc;

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Pool, SelectPrompt};
use lacuna_format::Stored;
use lacuna_kernels::{Activations, Attention, KvFormat, KvLayout, Mass};
use lacuna_spec::{Activation, Experts, Mixer, Norm, Place, Rope, Temperature};

pub use cpu::Cpu;
pub(crate) use cpu::{Matrix, NormOf, factors, grouped, heads, mean_square, route, spread};
pub use gate::GateAsk;
pub use naive::Naive;
pub use select::{Asks, Decided, Decisions, PromptRead, Reads};
pub use states::{SlotStates, States};
pub use tables::{Table, Tables};

use crate::{Batch, ModelError};

/// Operations of a decoder's step, and what they work on. A clone is another handle of the same backend.
pub trait Backend: Clone {
    /// A stored matrix ready to multiply, `[outputs, inputs]`, with its maps, its terms and the bias after it.
    type Matrix;
    /// The same matrix of every expert of a mixture.
    type Experts;
    /// A normalisation with its vectors.
    type Norm;
    /// A stored matrix whose rows are looked up.
    type Table;
    /// The frequencies of a rope. A clone shares what was worked out.
    type Rope: Clone;
    /// Rows of numbers, `[rows, columns]`.
    type Rows;
    /// Row numbers, such as token ids.
    type Ids;
    /// Which rows go to which expert, and with which weights.
    type Routes;
    /// The pages of keys and values of one layer.
    type Pages: Pages;
    /// A recurrent mixer's own vectors.
    type Mixer;
    /// The states of the mixer of one layer.
    type States: States;
    /// What a step reads from the host.
    type Step;

    /// Packs a matrix, whose `bias` has a value for each output. `release` may be called whenever some of what is
    /// stored has been taken over, so that its pages can leave memory.
    fn matrix(
        &self,
        place: &Place,
        stored: &Stored,
        bias: Option<Vec<f32>>,
        activations: Activations,
        release: &dyn Fn(),
    ) -> Result<Self::Matrix, ModelError>;

    /// Keeps a matrix in a form of which [`Backend::products_gated`] reads few channels for less, if there is one, beside
    /// the one that reads all: bytes that this takes. `stored` is what it was packed from.
    fn keep_columns(&self, _matrix: &mut Self::Matrix, _stored: &Stored) -> Option<u64> {
        None
    }

    /// Puts the matrices of all experts together, in their order.
    fn experts(&self, all: Vec<Self::Matrix>) -> Self::Experts;

    /// What one row's product with a matrix takes.
    fn measure(&self, matrix: &Self::Matrix) -> Measure;

    /// A normalisation of pieces of `width` columns. `scale` and `bias` have a value for each of them, or for each of
    /// several pieces, which take turns; without a scale it is 1.
    fn norm_of(
        &self,
        place: &Place,
        norm: Norm,
        width: usize,
        scale: Option<Vec<f32>>,
        bias: Option<Vec<f32>>,
    ) -> Self::Norm;

    /// A table of rows, checked by the caller.
    fn table(&self, stored: Arc<Stored>) -> Self::Table;

    /// A rope's frequencies.
    fn rope_of(&self, rope: &Rope) -> Self::Rope;

    /// No pages yet, for one layer.
    fn pages(&self, layout: KvLayout, format: KvFormat) -> Self::Pages;

    /// A recurrent mixer with its vectors, in a network of `hidden` channels; `place`: its convolution's.
    fn mixer_of(&self, place: &Place, mixer: &Mixer, hidden: usize, vectors: MixerVectors) -> Self::Mixer;

    /// No states yet, for the mixer of one layer.
    fn states(&self, mixer: &Mixer, hidden: usize) -> Self::States;

    /// Begins a step: its rows' places, and the block tables of every layer that it runs.
    fn begin(&self, batch: &Batch, tables: Tables) -> Self::Step;

    /// Waits for everything that was asked for, and tells what went wrong with it.
    fn finish(&self) -> Result<(), ModelError>;

    /// Rows from the host.
    fn upload(&self, x: MatRef<'_>) -> Self::Rows;

    /// Row numbers from the host.
    fn upload_ids(&self, ids: &[u32]) -> Self::Ids;

    /// Some of the rows on the host: waits for them.
    fn download<'a>(&self, x: &'a Self::Rows, rows: Range<usize>) -> Result<Host<'a>, ModelError>;

    /// Row numbers on the host: waits for them.
    fn download_ids(&self, ids: &Self::Ids) -> Result<Vec<u32>, ModelError>;

    /// Where each expert's rows begin among those gathered, and the end, on the host: waits for them.
    fn download_starts(&self, routes: &Self::Routes) -> Result<Vec<usize>, ModelError>;

    /// Rows and columns.
    fn shape(&self, x: &Self::Rows) -> (usize, usize);

    /// A copy.
    fn copy(&self, x: &Self::Rows) -> Self::Rows;

    /// Some rows, in the order asked for.
    fn pick(&self, x: &Self::Rows, rows: &[usize]) -> Self::Rows;

    /// Rows of a table; row 0 for numbers beyond it, where the caller has not seen that they are there.
    fn embed(&self, table: &Self::Table, ids: &Self::Ids) -> Self::Rows;

    /// `x · Wᵀ + b` of several matrices and the same rows.
    fn products<const N: usize>(&self, all: [&Self::Matrix; N], x: &Self::Rows) -> [Self::Rows; N];

    /// As [`Backend::products`] of rows that count as zero outside of the channels that a gate says, each row asked
    /// for by itself; where these are all, the results are those of `products`, bit for bit.
    ///
    /// A backend that lets the host choose waits for the rows. A GPU had better find the largest `|x| · norm` of every
    /// row where it lies (the norms are there from the start, how many stay is known on the host) and let a block of
    /// threads read one column after the other; it needs the gate's rule as data then. Backends that never run for
    /// people may refuse.
    fn products_gated(
        &self,
        _all: &[&Self::Matrix],
        _x: &Self::Rows,
        ask: &GateAsk<'_>,
    ) -> Result<(Vec<Self::Rows>, Reads), ModelError> {
        Err(ModelError::Gate { what: format!("{}: this backend reads all channels", ask.place) })
    }

    /// Each piece of as many columns as the norm has, normalised on its own: whole rows, or every head of a row.
    fn norm(&self, norm: &Self::Norm, x: &Self::Rows) -> Self::Rows;

    /// As [`Backend::norm`] with a scale of whole rows, of which each of `pieces` equal parts is normalised on its own;
    /// one piece: the same as [`Backend::norm`].
    fn norm_pieces(&self, norm: &Self::Norm, pieces: usize, x: &Self::Rows) -> Self::Rows;

    /// Turns heads of `head_dim` columns by their rows' positions.
    fn rope<const N: usize>(&self, rope: &Self::Rope, head_dim: usize, step: &Self::Step, x: [&mut Self::Rows; N]);

    /// `x = act(x)`, or `act(x) · up`.
    fn activate(&self, act: Activation, x: &mut Self::Rows, up: Option<&Self::Rows>);

    /// `x = xielu(x)` with a layer's learned numbers.
    fn xielu(&self, of: Xielu, x: &mut Self::Rows);

    /// `x` cut to `-by ..= by`.
    fn clip(&self, x: &mut Self::Rows, by: f32);

    /// Multiplies each row with the factor of its position.
    fn temper(&self, by: Temperature, step: &Self::Step, x: &mut Self::Rows);

    /// `x += y`.
    fn add(&self, x: &mut Self::Rows, y: &Self::Rows);

    /// `x *= by`.
    fn scale(&self, x: &mut Self::Rows, by: f32);

    /// `x = cap · tanh(x / cap)`.
    fn softcap(&self, x: &mut Self::Rows, cap: f32);

    /// Multiplies each row with the sigmoid of its number in `by`, `[rows, 1]`.
    fn weigh_rows(&self, x: &mut Self::Rows, by: &Self::Rows);

    /// Streams of equal width out of others: with `by`, `[rows, outs * ins]`, stream `i` of a row becomes
    /// `Σ_j by[i * ins + j] · x_j`: `[rows, ins * width]` to `[rows, outs * width]`.
    fn mix(&self, x: &Self::Rows, ins: usize, by: &Self::Rows) -> Self::Rows;

    /// Multiplies each column with its number in `by`, `[1, columns]`, the vector at `place`.
    fn scale_columns(&self, place: &Place, x: &mut Self::Rows, by: &Self::Rows);

    /// Brings each row's root mean square to that of its row in `like`: `x · rms(like) / sqrt(max(mean(x²), 1e-5))`.
    fn match_magnitude(&self, x: &mut Self::Rows, like: &Self::Rows);

    /// Cuts each row off below its mean and `by` times its standard deviation: `max(x - cutoff, 0)`.
    fn cut_off(&self, x: &mut Self::Rows, by: f32);

    /// Of each piece of `width` columns the columns `which`: `[rows, n * width]` to `[rows, n * which.len()]`.
    fn columns(&self, x: &Self::Rows, width: usize, which: Range<usize>) -> Self::Rows;

    /// Pieces of both side by side, those of the first and then those of the second: `[rows, n * widths[0]]` and
    /// `[rows, n * widths[1]]` to `[rows, n * (widths[0] + widths[1])]`.
    fn beside(&self, all: [&Self::Rows; 2], widths: [usize; 2]) -> Self::Rows;

    /// [`Backend::products`] of each head's columns with its own matrix, of as many heads as there are experts:
    /// `[rows, heads * inputs]` to `[rows, heads * outputs]`.
    fn head_products(&self, all: &Self::Experts, x: &Self::Rows) -> Self::Rows;

    /// Writes the keys and values of the step's rows, `[rows, kv_heads * head_dim]` each, to block `layer`'s pages.
    fn write(&self, pages: &mut Self::Pages, layer: usize, step: &Self::Step, keys: &Self::Rows, values: &Self::Rows);

    /// Attention of the step's rows over what is written, theirs included: `q` is `[rows, heads * head_dim]`, and so is
    /// what comes out.
    fn attend(
        &self,
        how: &Attention,
        pages: &Self::Pages,
        layer: usize,
        step: &Self::Step,
        q: &Self::Rows,
    ) -> Self::Rows;

    /// As [`Backend::attend`], where each row reads only some blocks of keys of each key head: `select` is asked by the
    /// queries that read the head and the pooled keys of the whole blocks before the row's own, and what lies behind
    /// those is read in any case. Where it names all of them, the result is that of [`Backend::attend`], bit for bit.
    /// Where several positions share an answer, the first of them asks, and the others read what is kept of that.
    /// Slots are positions. A backend that lets the host choose waits for the queries. Those that never run for people
    /// may refuse.
    fn attend_chosen(
        &self,
        _how: &Attention,
        _pages: &Self::Pages,
        layer: usize,
        _step: &Self::Step,
        _q: &Self::Rows,
        _asks: Asks<'_>,
    ) -> Result<(Self::Rows, Reads), ModelError> {
        Err(ModelError::Select { what: format!("layer {layer}: this backend reads all keys") })
    }

    /// What the tiles of a prompt read: `by` is asked once for each key head, with the queries of all its rows, which lie
    /// in `q` part after part, and all keys. The prompt is the one sequence of `step`, whose keys are written up to its
    /// end. Such backends wait for the queries; those that never run for people may refuse.
    fn foresee(
        &self,
        _how: &Attention,
        _pages: &Self::Pages,
        layer: usize,
        _step: &Self::Step,
        _q: &[&Self::Rows],
        _by: &dyn SelectPrompt,
    ) -> Result<PromptRead, ModelError> {
        Err(ModelError::Select { what: format!("layer {layer}: this backend reads all keys") })
    }

    /// As [`Backend::attend`] of rows of a prompt, which read what [`Backend::foresee`] found; where that is everything,
    /// the result is that of `attend`, bit for bit.
    fn attend_foreseen(
        &self,
        _how: &Attention,
        _pages: &Self::Pages,
        layer: usize,
        _step: &Self::Step,
        _q: &Self::Rows,
        _read: &PromptRead,
    ) -> Result<(Self::Rows, Reads), ModelError> {
        Err(ModelError::Select { what: format!("layer {layer}: this backend reads all keys") })
    }

    /// Adds the attention that the same rows give to slots, row by row: `mass` has one for each of the step's runs of
    /// rows of one sequence. Asked only where somebody goes by it.
    fn weigh(
        &self,
        how: &Attention,
        pages: &Self::Pages,
        layer: usize,
        step: &Self::Step,
        q: &Self::Rows,
        mass: &mut [Mass],
    );

    /// A mixer's convolution of the step's rows over its sequences' states in block `layer`, `[rows, channels]`: of a
    /// short convolution with both its gates. A run of rows that begins its sequence finds a state of zeros.
    fn convolve(
        &self,
        mixer: &Self::Mixer,
        states: &mut Self::States,
        layer: usize,
        step: &Self::Step,
        x: &Self::Rows,
    ) -> Self::Rows;

    /// The heads of a mixer over the same states, `[rows, heads * columns of a state]`, from what the convolution put
    /// out (its activation applied; Mamba's b and c beside it), time steps, `[rows, steps]`, their bias added, and the
    /// delta rule's `beta`.
    /// Comes after [`Backend::convolve`] of the same rows.
    fn scan(
        &self,
        mixer: &Self::Mixer,
        states: &mut Self::States,
        layer: usize,
        step: &Self::Step,
        x_dt: [&Self::Rows; 2],
        beta: Option<&Self::Rows>,
    ) -> Self::Rows;

    /// Chooses experts by the router's logits, `[rows, experts]`: their scores, the largest `used` of a row where
    /// `correction`, `[1, experts]`, is added, from its best groups where there are some, ties to the lower number.
    /// `scale`, `[1, experts]`: factors on the weights.
    fn route(
        &self,
        logits: &Self::Rows,
        choice: Experts,
        correction: Option<&Self::Rows>,
        scale: Option<&Self::Rows>,
    ) -> Self::Routes;

    /// The rows of every expert, one expert after the other: `[rows * used, columns]`; times their weights, where those
    /// are for what experts read.
    fn gather(&self, x: &Self::Rows, routes: &Self::Routes) -> Self::Rows;

    /// [`Backend::products`] of gathered rows, each with its own expert's matrices.
    fn expert_products<const N: usize>(
        &self,
        all: [&Self::Experts; N],
        x: &Self::Rows,
        routes: &Self::Routes,
    ) -> [Self::Rows; N];

    /// The opposite of [`Backend::gather`]: the weighted sum of what the experts made of each row, `[rows, columns]`,
    /// summed in the experts' order; the plain sum where the rows were weighed before.
    fn scatter(&self, y: &Self::Rows, routes: &Self::Routes) -> Self::Rows;

    /// The column of each row's largest value, the first of several; [`NO_CHOICE`] where one is NaN or infinite upward.
    fn argmax(&self, x: &Self::Rows) -> Self::Ids;
}

/// The pages of one layer, each of `page_tokens` positions of its layout, known by block numbers.
pub trait Pages {
    /// Bytes of one.
    fn block_bytes(&self) -> usize;

    /// Keeps the pooled keys of whole key blocks in every page made from here on; nothing where they are not read from
    /// there.
    fn pool_keys(&mut self, _pool: Pool) {}

    /// Makes a page, where it is not there yet; its content is unspecified. Where memory is short, the end of the step
    /// tells.
    fn reserve(&mut self, block: u32);

    /// Gives a page's memory back.
    fn release(&mut self, block: u32);

    /// Copies all of page `from` to page `to`; both are there.
    fn copy(&mut self, from: u32, to: u32);

    /// Fills page `to` from the pages of a table: its slot `i` becomes slot `kept[head][i]` of the table, for each key
    /// head, in the order of `i`. Page `to` may be one of the table's, where no slot moves to a later one.
    fn gather(&mut self, table: &[u32], to: u32, kept: &[&[usize]]);
}

/// A layer's xIELU: what it learned, see [`Activation::Xielu`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Xielu {
    /// The layer.
    pub layer: usize,
    /// The number for what lies above 0, before its softplus.
    pub above: f32,
    /// The same for what lies below.
    pub below: f32,
}

impl Xielu {
    /// The factors that multiply.
    pub(crate) fn factors(&self) -> [f64; 2] {
        let softplus = |x: f32| f64::from(x).max(0.0) + (-f64::from(x).abs()).exp().ln_1p();
        [softplus(self.above), 0.5 + softplus(self.below)]
    }
}

/// What a row's mean square counts at least where it is divided by its root.
pub(crate) const LEAST_SQUARE: f64 = 1e-5;

/// In place of a row number: there was nothing to choose by.
pub const NO_CHOICE: u32 = u32::MAX;

/// A recurrent mixer's vectors as they are stored; empty where it has none.
#[derive(Clone, Debug, Default)]
pub struct MixerVectors {
    /// The convolution, `[channels, kernel]`.
    pub conv: Vec<f32>,
    /// Its bias, `[channels]`.
    pub bias: Vec<f32>,
    /// `mixer.a`, `[heads]`, or `[channels * state]`.
    pub a: Vec<f32>,
    /// `mixer.d`, `[heads]`, or `[channels]`.
    pub d: Vec<f32>,
}

/// What one row's product takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Multiply-adds, were the matrix dense: on f32, and on 8-bit activations.
    pub work: [u64; 2],
    /// Bytes of weights read.
    pub bytes: u64,
}

/// Rows on the host: where they lay already, or brought there.
pub enum Host<'a> {
    /// Where they lie.
    There(MatRef<'a>),
    /// Brought.
    Brought(Mat),
}

impl Host<'_> {
    /// The rows.
    pub fn view(&self) -> MatRef<'_> {
        match self {
            Host::There(m) => *m,
            Host::Brought(m) => m.view(),
        }
    }
}

/// Rows by expert: those of expert `e` are `starts[e]..starts[e + 1]` of `rows`, each with its weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Routes<W = f32> {
    /// Where each expert's rows begin, and the end.
    pub(crate) starts: Vec<usize>,
    /// Numbers of rows, rising within an expert.
    pub(crate) rows: Vec<usize>,
    /// A weight for each of them.
    pub(crate) weights: Vec<W>,
    /// Rows that were routed.
    pub(crate) routed: usize,
    /// Whether weights are for what experts read.
    pub(crate) weigh_inputs: bool,
}

/// The experts that a row chooses, best first: of `scores`, one for each, corrections included, those of the best
/// groups. The slow twin has its own.
pub(crate) fn chosen(scores: &[f32], choice: Experts) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let best_first = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]);
    if let Some(g) = choice.groups.filter(|g| g.used < g.count) {
        let each = scores.len() / g.count;
        let of_group = |i: usize| -> f32 {
            let mut mine = scores[i * each..(i + 1) * each].to_vec();
            mine.sort_by(|a, b| b.total_cmp(a));
            mine[..g.by].iter().sum()
        };
        let groups: Vec<f32> = (0..g.count).map(of_group).collect();
        let mut best: Vec<usize> = (0..g.count).collect();
        best.sort_by(|&a, &b| groups[b].total_cmp(&groups[a]));
        best.truncate(g.used);
        order.retain(|e| best.contains(&(e / each)));
    }
    order.sort_by(best_first);
    order.truncate(choice.used);
    order
}

impl<W: Copy> Routes<W> {
    /// From each row's experts with their weights.
    pub(crate) fn new(choice: Experts, chosen: &[Vec<(usize, W)>]) -> Routes<W> {
        let mut by_expert = vec![Vec::new(); choice.count];
        for (r, of_row) in chosen.iter().enumerate() {
            of_row.iter().for_each(|&(e, weight)| by_expert[e].push((r, weight)));
        }
        let mut starts = vec![0];
        starts.extend(by_expert.iter().scan(0, |end, rows| {
            *end += rows.len();
            Some(*end)
        }));
        let (rows, weights) = by_expert.into_iter().flatten().unzip();
        Routes { starts, rows, weights, routed: chosen.len(), weigh_inputs: choice.weigh_inputs }
    }

    /// Each expert that has rows, with where they lie among those gathered.
    pub(crate) fn busy(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let all = self.starts.windows(2).map(|w| w[0]..w[1]).enumerate();
        all.filter(|(_, rows)| !rows.is_empty())
    }
}

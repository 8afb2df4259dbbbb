//! Where keys and values are kept.

use std::sync::Arc;

use lacuna_contract::{Select, SelectPrompt};
use lacuna_kernels::{KvFormat, KvLayout, Mass};
use lacuna_spec::{LayerSpec, Mixer, Spec};

use crate::backend::{Backend, Cpu, Decisions, Pages, Reads, States, Table, Tables};
use crate::{Batch, ModelError};

/// A store of keys and values for several sequences: it owns the pages of a backend and says which of them, by their
/// block numbers, are whose. What lies in them only the backend sees.
pub trait KvStore<B: Backend = Cpu> {
    /// Makes room in block `layer` for the positions of a batch's rows, which count as written from here on: a step
    /// that fails is taken back by whoever asked for it.
    fn prepare(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError>;

    /// The block table of `sequence` in block `layer`.
    fn table(&self, layer: usize, sequence: usize) -> Result<Table<'_>, ModelError>;

    /// The pages of block `layer`.
    fn pages(&mut self, layer: usize) -> Result<&mut B::Pages, ModelError>;

    /// Makes sure that the states of a batch's sequences in block `layer`, one with a recurrent mixer, stand before their
    /// first rows (or begin with them); they count as behind the last ones from here on.
    fn prepare_states(&mut self, layer: usize, _batch: &Batch) -> Result<(), ModelError> {
        Err(no_states(layer))
    }

    /// The slot of `sequence`'s state in block `layer`.
    fn state(&self, layer: usize, _sequence: usize) -> Result<u32, ModelError> {
        Err(no_states(layer))
    }

    /// The slot in which a sequence's state goes on apart ([`Batch::part_state`]) in block `layer`.
    fn apart(&self, layer: usize, _sequence: usize) -> Result<u32, ModelError> {
        Err(no_states(layer))
    }

    /// The states of block `layer`.
    fn states(&mut self, layer: usize) -> Result<&mut B::States, ModelError> {
        Err(no_states(layer))
    }

    /// Lends, for each run of rows of the batch that was prepared last, what adds up the attention to its sequence's
    /// slots in block `layer`; none where nobody goes by it.
    fn lend_mass(&mut self, _layer: usize) -> Vec<Mass> {
        Vec::new()
    }

    /// Takes them back.
    fn take_mass(&mut self, _layer: usize, _mass: Vec<Mass>) {}

    /// What says which blocks of keys rows read in block `layer`; none where they read all. Its pages keep the pooled
    /// keys that it reads ([`Pages::pool_keys`]).
    fn selector(&self, _layer: usize) -> Option<Arc<dyn Select>> {
        None
    }

    /// Lends what it answered in block `layer` where tiles of several positions begin; a store whose selectors say
    /// such tiles keeps it beside its pages.
    fn lend_decisions(&mut self, _layer: usize) -> Decisions {
        Decisions::default()
    }

    /// Takes it back, with what was decided since.
    fn take_decisions(&mut self, _layer: usize, _decisions: Decisions) {}

    /// What says, when all of a prompt is there, which keys its tiles read in block `layer`; none where they read all.
    fn prompt_selector(&self, _layer: usize) -> Option<Arc<dyn SelectPrompt>> {
        None
    }

    /// Told what rows read where it had one.
    fn count_reads(&mut self, _reads: Reads) {}
}

/// Prepares a store for a step of some layers with attention and some with recurrent mixers, and gives their tables.
pub(crate) fn prepared<B: Backend>(
    layers: impl IntoIterator<Item = usize>,
    mixers: impl IntoIterator<Item = usize>,
    batch: &Batch,
    kv: &mut dyn KvStore<B>,
) -> Result<Tables, ModelError> {
    let mut tables = Tables::default();
    for layer in layers {
        kv.prepare(layer, batch)?;
        tables.push(layer, batch.runs().map(|(sequence, _)| kv.table(layer, sequence)))?;
    }
    for layer in mixers {
        kv.prepare_states(layer, batch)?;
        let own = batch.runs().map(|(sequence, _)| kv.state(layer, sequence));
        tables.push_states(layer, own.chain(batch.apart_runs().map(|(_, sequence, _)| kv.apart(layer, sequence))))?;
    }
    tables.place(batch);
    Ok(tables)
}

/// Positions by which a sequence's room grows.
pub const STEP_TOKENS: usize = 128;

/// The plain store: every sequence keeps everything, its room growing in steps of [`STEP_TOKENS`] positions.
#[derive(Clone, Debug)]
pub struct ContiguousKv<B: Backend = Cpu> {
    /// Of each block; `None` where attention was dropped, or reads another block's.
    layers: Vec<Option<Layer<B::Pages>>>,
    /// Of each block with a recurrent mixer: its states, a slot for each sequence, and the positions behind which they
    /// stand.
    mixers: Vec<Option<(B::States, Vec<usize>)>>,
    sequences: usize,
}

/// One layer's pages, and the tables of every sequence.
#[derive(Clone, Debug)]
struct Layer<P> {
    pages: P,
    /// Blocks in use or given back, and those given back.
    made: u32,
    free: Vec<u32>,
    tables: Vec<Vec<u32>>,
    /// Positions written, by sequence.
    tokens: Vec<usize>,
}

impl ContiguousKv {
    /// An empty store for `sequences` sequences of a model, in f32.
    pub fn new(spec: &Spec, sequences: usize) -> ContiguousKv {
        ContiguousKv::with_format(spec, sequences, KvFormat::F32)
    }

    /// An empty store of the given format.
    pub fn with_format(spec: &Spec, sequences: usize, format: KvFormat) -> ContiguousKv {
        ContiguousKv::on(&Cpu, spec, sequences, format)
    }
}

impl<B: Backend> ContiguousKv<B> {
    /// An empty store for `sequences` sequences of a model, in pages of `backend`.
    pub fn on(backend: &B, spec: &Spec, sequences: usize, format: KvFormat) -> ContiguousKv<B> {
        let own = |l: &LayerSpec| l.attn.as_ref().filter(|a| a.kv_from.is_none()).map(|a| (a.kv_heads, a.head_dim));
        let heads = spec.layers.iter().map(own);
        let mixers = spec.layers.iter().map(|l| l.mixer.as_ref().map(|m| (m, spec.hidden)));
        ContiguousKv::of(backend, heads, mixers, sequences, format)
    }

    /// The same from each block's key heads and their width, and its mixer and the residual stream's channels.
    pub(crate) fn of<'m>(
        backend: &B,
        heads: impl Iterator<Item = Option<(usize, usize)>>,
        mixers: impl Iterator<Item = Option<(&'m Mixer, usize)>>,
        sequences: usize,
        format: KvFormat,
    ) -> ContiguousKv<B> {
        let layer = |(kv_heads, head_dim)| Layer {
            pages: backend.pages(KvLayout { kv_heads, head_dim, page_tokens: STEP_TOKENS }, format),
            made: 0,
            free: Vec::new(),
            tables: vec![Vec::new(); sequences],
            tokens: vec![0; sequences],
        };
        let states = |(mixer, hidden): (&Mixer, usize)| {
            let mut states = backend.states(mixer, hidden);
            (0..sequences).for_each(|s| states.reserve(s as u32));
            (states, vec![0; sequences])
        };
        let (layers, mixers) = (heads.map(|h| h.map(layer)).collect(), mixers.map(|m| m.map(states)).collect());
        ContiguousKv { layers, mixers, sequences }
    }

    /// Positions of `sequence` that every block has written.
    pub fn len(&self, sequence: usize) -> usize {
        let written = self.layers.iter().flatten().map(|l| l.tokens[sequence]);
        written.chain(self.mixers.iter().flatten().map(|m| m.1[sequence])).min().unwrap_or(0)
    }

    /// Whether nothing of `sequence` is written.
    pub fn is_empty(&self, sequence: usize) -> bool {
        self.len(sequence) == 0
    }

    /// Forgets the positions of `sequence` from `len` on. Room beyond the next step is given back. The state of a
    /// recurrent mixer cannot go back: where there is one, and it stands behind `len`, the whole sequence is forgotten,
    /// as [`ContiguousKv::len`] then tells.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        let beyond = self.mixers.iter().flatten().any(|m| m.1[sequence] > len);
        let len = if beyond { 0 } else { len };
        self.mixers.iter_mut().flatten().for_each(|m| m.1[sequence] = m.1[sequence].min(len));
        for l in self.layers.iter_mut().flatten() {
            let tokens = &mut l.tokens[sequence];
            *tokens = (*tokens).min(len);
            let keep = tokens.div_ceil(STEP_TOKENS);
            let table = &mut l.tables[sequence];
            for block in table.drain(keep.min(table.len())..).rev() {
                l.pages.release(block);
                l.free.push(block);
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let blocks = |l: &Layer<B::Pages>| l.tables.iter().map(Vec::len).sum::<usize>();
        let pages: usize = self.layers.iter().flatten().map(|l| blocks(l) * l.pages.block_bytes()).sum();
        pages + self.mixers.iter().flatten().map(|m| self.sequences * m.0.slot_bytes()).sum::<usize>()
    }

    fn layer(&self, layer: usize) -> Result<&Layer<B::Pages>, ModelError> {
        self.layers.get(layer).and_then(Option::as_ref).ok_or_else(|| no_attention(layer))
    }

    fn layer_mut(&mut self, layer: usize) -> Result<&mut Layer<B::Pages>, ModelError> {
        self.layers.get_mut(layer).and_then(Option::as_mut).ok_or_else(|| no_attention(layer))
    }

    fn known(&self, sequence: usize) -> Result<(), ModelError> {
        if sequence < self.sequences {
            return Ok(());
        }
        Err(ModelError::Store { what: format!("sequence {sequence} of {}", self.sequences) })
    }
}

fn no_states(layer: usize) -> ModelError {
    ModelError::Store { what: format!("no state of a recurrent mixer is kept for block {layer}") }
}

fn no_attention(layer: usize) -> ModelError {
    ModelError::Store { what: format!("block {layer} has no attention") }
}

impl<B: Backend> KvStore<B> for ContiguousKv<B> {
    fn prepare(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError> {
        batch.runs().try_for_each(|(sequence, _)| self.known(sequence))?;
        let l = self.layer_mut(layer)?;
        for (sequence, rows) in batch.runs() {
            for position in batch.written(sequence, rows).map(|r| batch.positions()[r]) {
                let have = l.tokens[sequence];
                if position > have {
                    return Err(ModelError::Store {
                        what: format!("position {position} of sequence {sequence} in block {layer} after only {have}"),
                    });
                }
                if position / STEP_TOKENS == l.tables[sequence].len() {
                    let block = l.free.pop().unwrap_or(l.made);
                    l.made = l.made.max(block + 1);
                    l.pages.reserve(block);
                    l.tables[sequence].push(block);
                }
                l.tokens[sequence] = have.max(position + 1);
            }
        }
        Ok(())
    }

    fn table(&self, layer: usize, sequence: usize) -> Result<Table<'_>, ModelError> {
        self.known(sequence)?;
        let l = self.layer(layer)?;
        Ok(Table { blocks: &l.tables[sequence], tokens: l.tokens[sequence], shift: 0 })
    }

    fn pages(&mut self, layer: usize) -> Result<&mut B::Pages, ModelError> {
        Ok(&mut self.layer_mut(layer)?.pages)
    }

    fn prepare_states(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError> {
        batch.runs().try_for_each(|(sequence, _)| self.known(sequence))?;
        let (_, at) = self.mixers.get_mut(layer).and_then(Option::as_mut).ok_or_else(|| no_states(layer))?;
        for (sequence, rows) in batch.runs() {
            let positions = &batch.positions()[rows];
            if let (Some(&first), Some(last)) = (positions.first(), positions.last()) {
                if first != 0 && first != at[sequence] {
                    return Err(ModelError::Store {
                        what: format!(
                            "position {first} of sequence {sequence} in block {layer}, whose state stands behind {}",
                            at[sequence]
                        ),
                    });
                }
                at[sequence] = last + 1;
            }
        }
        Ok(())
    }

    fn state(&self, _: usize, sequence: usize) -> Result<u32, ModelError> {
        self.known(sequence)?;
        Ok(sequence as u32)
    }

    fn states(&mut self, layer: usize) -> Result<&mut B::States, ModelError> {
        let mixer = self.mixers.get_mut(layer).and_then(Option::as_mut);
        Ok(&mut mixer.ok_or_else(|| no_states(layer))?.0)
    }
}

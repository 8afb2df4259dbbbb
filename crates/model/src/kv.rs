//! Where keys and values are kept.

use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_kernels::{KvFormat, KvLayout, KvPage, KvView};
use lacuna_spec::Spec;

use crate::{Batch, ModelError};

/// A store of keys and values for several sequences.
pub trait KvStore {
    /// Writes the keys and values of a call's rows in block `layer`, `[rows, kv_heads * head_dim]` each.
    fn write(&mut self, layer: usize, batch: &Batch, keys: MatRef<'_>, values: MatRef<'_>) -> Result<(), ModelError>;

    /// What attention of block `layer` reads of `sequence`.
    fn view(&self, layer: usize, sequence: usize) -> Result<KvView<'_>, ModelError>;
}

/// Positions by which a sequence's room grows.
pub const STEP_TOKENS: usize = 128;

/// The plain store: every sequence keeps everything, its room growing in steps of [`STEP_TOKENS`] positions.
#[derive(Clone, Debug)]
pub struct ContiguousKv {
    format: KvFormat,
    /// Of each block; `None` where attention was dropped.
    layouts: Vec<Option<KvLayout>>,
    sequences: Vec<Sequence>,
}

#[derive(Clone, Debug)]
struct Sequence {
    layers: Vec<Vec<Arc<KvPage>>>,
    /// Positions written, by layer.
    tokens: Vec<usize>,
}

impl ContiguousKv {
    /// An empty store for `sequences` sequences of a model, in f32.
    pub fn new(spec: &Spec, sequences: usize) -> ContiguousKv {
        ContiguousKv::with_format(spec, sequences, KvFormat::F32)
    }

    /// An empty store of the given format.
    pub fn with_format(spec: &Spec, sequences: usize, format: KvFormat) -> ContiguousKv {
        let layouts: Vec<Option<KvLayout>> = spec
            .layers
            .iter()
            .map(|l| {
                l.attn.as_ref().map(|a| KvLayout {
                    kv_heads: a.kv_heads,
                    head_dim: a.head_dim,
                    page_tokens: STEP_TOKENS,
                })
            })
            .collect();
        let n = layouts.len();
        let empty = Sequence { layers: vec![Vec::new(); n], tokens: vec![0; n] };
        ContiguousKv { format, layouts, sequences: vec![empty; sequences] }
    }

    /// Positions of `sequence` that every block has written.
    pub fn len(&self, sequence: usize) -> usize {
        let s = &self.sequences[sequence];
        self.layouts.iter().zip(&s.tokens).filter(|(l, _)| l.is_some()).map(|(_, &t)| t).min().unwrap_or(0)
    }

    /// Whether nothing of `sequence` is written.
    pub fn is_empty(&self, sequence: usize) -> bool {
        self.len(sequence) == 0
    }

    /// Forgets the positions of `sequence` from `len` on. Room beyond the next step is given back.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        let s = &mut self.sequences[sequence];
        for (pages, tokens) in s.layers.iter_mut().zip(&mut s.tokens) {
            *tokens = (*tokens).min(len);
            pages.truncate(tokens.div_ceil(STEP_TOKENS));
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let page = |l: &Option<KvLayout>| l.map_or(0, |l| l.page_bytes(self.format));
        self.sequences
            .iter()
            .map(|s| s.layers.iter().zip(&self.layouts).map(|(pages, l)| pages.len() * page(l)).sum::<usize>())
            .sum()
    }

    fn sequence(&self, layer: usize, sequence: usize) -> Result<(&Sequence, KvLayout), ModelError> {
        let store = |what: String| ModelError::Store { what };
        let layout = self
            .layouts
            .get(layer)
            .copied()
            .flatten()
            .ok_or_else(|| store(format!("block {layer} has no attention")))?;
        let s = self
            .sequences
            .get(sequence)
            .ok_or_else(|| store(format!("sequence {sequence} of {}", self.sequences.len())))?;
        Ok((s, layout))
    }
}

impl KvStore for ContiguousKv {
    fn write(&mut self, layer: usize, batch: &Batch, keys: MatRef<'_>, values: MatRef<'_>) -> Result<(), ModelError> {
        for r in 0..batch.rows() {
            let (sequence, position) = (batch.sequence(r), batch.positions()[r]);
            let (s, layout) = self.sequence(layer, sequence)?;
            let have = s.tokens[layer];
            if position > have {
                return Err(ModelError::Store {
                    what: format!("position {position} of sequence {sequence} in block {layer} after only {have}"),
                });
            }
            let s = &mut self.sequences[sequence];
            let pages = &mut s.layers[layer];
            if position / STEP_TOKENS == pages.len() {
                pages.push(Arc::new(KvPage::new(layout, self.format)));
            }
            // A page that a copy of this store shares is copied before it changes.
            Arc::make_mut(&mut pages[position / STEP_TOKENS]).write(position % STEP_TOKENS, keys.row(r), values.row(r));
            s.tokens[layer] = have.max(position + 1);
        }
        Ok(())
    }

    fn view(&self, layer: usize, sequence: usize) -> Result<KvView<'_>, ModelError> {
        let (s, _) = self.sequence(layer, sequence)?;
        Ok(KvView { pages: &s.layers[layer], tokens: s.tokens[layer] })
    }
}

//! The whole network: embedding, blocks, head.

use std::sync::Arc;

use lacuna_base::{Mat, MatMut, MatRef};
use lacuna_format::{Stored, Weights};
use lacuna_kernels as kernels;
use lacuna_kernels::{Activations, Linear, Packing};
use lacuna_spec::{Place, Positions, Role, Spec};

use crate::parts::{NormWeights, tensor};
use crate::profile::span;
use crate::{Batch, Block, KvStore, Lent, ModelError, Tap};

/// Tokens to the residual stream. Rows are decoded when asked for, never the whole table.
pub struct Embedding {
    table: Arc<Stored>,
    scale: f32,
    positions: Option<(Arc<Stored>, usize)>,
}

impl Embedding {
    /// Loads the embedding (and learned positions) of a model.
    pub fn load(weights: &dyn Weights) -> Result<Embedding, ModelError> {
        let place = Place::global(Role::Embed);
        let table = tensor(weights, place)?;
        table.check().map_err(|e| ModelError::bad(&place, e))?;
        let positions = match weights.spec().positions {
            Positions::None => None,
            Positions::Learned { offset } => {
                let place = Place::global(Role::Positions);
                let missing = || ModelError::Missing { place: place.to_string() };
                let stored = weights.get(&place)?.ok_or_else(missing)?;
                stored.check().map_err(|e| ModelError::bad(&place, e))?;
                if stored.cols != table.cols {
                    return Err(ModelError::Shape {
                        place: place.to_string(),
                        have_rows: stored.rows,
                        have_cols: stored.cols,
                        rows: stored.rows,
                        cols: table.cols,
                    });
                }
                Some((stored, offset))
            }
        };
        Ok(Embedding { table, scale: weights.spec().embed_scale, positions })
    }

    /// The residual stream of `tokens` at `positions` before the first block, `[tokens, hidden]`.
    pub fn rows(&self, tokens: &[u32], positions: &[usize]) -> Result<Lent, ModelError> {
        assert_eq!(tokens.len(), positions.len(), "a position for each token");
        let hidden = self.table.cols;
        let mut out = Lent::new(tokens.len(), hidden);
        let mut learned = Lent::new(1, if self.positions.is_some() { hidden } else { 0 });
        for (r, (&token, &position)) in tokens.iter().zip(positions).enumerate() {
            let t = token as usize;
            if t >= self.table.rows {
                return Err(ModelError::Token { token, vocab: self.table.rows });
            }
            let row = out.row_mut(r);
            self.table.decode_rows(t, t + 1, MatMut::new(1, hidden, row));
            if self.scale != 1.0 {
                row.iter_mut().for_each(|x| *x *= self.scale);
            }
            if let Some((table, offset)) = &self.positions {
                let p = position + offset;
                if p >= table.rows {
                    return Err(ModelError::Position { position, rows: table.rows.saturating_sub(*offset) });
                }
                table.decode_rows(p, p + 1, learned.view_mut());
                row.iter_mut().zip(learned.data()).for_each(|(x, y)| *x += y);
            }
        }
        Ok(out)
    }
}

/// The residual stream to logits.
pub struct Head {
    pub(crate) place: Place,
    pub(crate) norm: Option<NormWeights>,
    pub(crate) linear: Linear,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
}

impl Head {
    /// Loads the final norm and the output projection (the embedding itself where they are tied), for exact
    /// activations.
    pub fn load(weights: &dyn Weights) -> Result<Head, ModelError> {
        Head::load_with(weights, Activations::Exact)
    }

    /// As [`Head::load`], told how activations meet integer codes.
    pub fn load_with(weights: &dyn Weights, activations: Activations) -> Result<Head, ModelError> {
        let spec = weights.spec();
        let place = Place::global(if spec.tied { Role::Embed } else { Role::Head });
        let packing = Packing { activations, ..Packing::default() };
        // By far the largest matrix of a small model.
        let linear = Linear::pack_releasing(&*tensor(weights, place)?, &packing, &|| weights.release(&place))
            .map_err(|e| ModelError::bad(&place, e))?;
        let norm =
            if spec.final_norm { Some(NormWeights::load(weights, Place::global(Role::FinalNorm))?) } else { None };
        Ok(Head { place, norm, linear, scale: spec.logit_scale, softcap: spec.logit_softcap })
    }

    /// What multiplies the output projection: the normalised residual stream, `[rows, hidden]`.
    pub fn input(&self, x: MatRef<'_>) -> Mat {
        self.norm.as_ref().map_or_else(|| x.to_mat(), |n| n.apply(x).into_mat())
    }

    /// Logits of the residual stream's rows, `[rows, vocab]`. A long context times a large vocabulary is gigabytes:
    /// hand in some rows at a time.
    pub fn logits(&self, x: MatRef<'_>) -> Lent {
        let mut out = Lent::new(x.rows(), self.linear.rows());
        self.logits_into(x, &mut out);
        out
    }

    /// As [`Head::logits`], into `out`.
    #[track_caller]
    pub fn logits_into(&self, x: MatRef<'_>, out: &mut Mat) {
        match &self.norm {
            Some(norm) => {
                let h = norm.apply(x);
                self.project(h.view(), out);
            }
            None => self.project(x, out),
        }
    }

    /// As [`Head::logits_into`], of rows that are normalised already.
    #[track_caller]
    pub(crate) fn project(&self, h: MatRef<'_>, out: &mut Mat) {
        span("head", || self.linear.forward(h, out.view_mut()));
        if self.scale != 1.0 {
            out.data_mut().iter_mut().for_each(|x| *x *= self.scale);
        }
        if let Some(c) = self.softcap {
            kernels::softcap(c, out.view_mut());
        }
    }

    /// Bytes of weights read for one token.
    pub fn weights_bytes(&self) -> u64 {
        self.linear.weights_bytes()
    }
}

/// How to load a model.
#[derive(Clone, Copy, Default)]
pub struct LoadOptions<'a> {
    /// Told how many of how many parts (blocks and the two ends) are loaded.
    pub progress: Option<&'a dyn Fn(usize, usize)>,
    /// How activations meet integer codes.
    pub activations: Activations,
}

/// A decoder-only language model, ready to compute.
pub struct Decoder {
    /// The network.
    pub spec: Spec,
    /// Tokens to the residual stream.
    pub embed: Embedding,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// The residual stream to logits.
    pub head: Head,
}

impl Decoder {
    /// Loads everything. Matrices are repacked for the processor: the file's mapped pages are let go as they are done
    /// with.
    pub fn load(weights: &dyn Weights, options: &LoadOptions<'_>) -> Result<Decoder, ModelError> {
        let spec = weights.spec().clone();
        spec.check()?;
        let parts = spec.layers.len() + 2;
        let tell = |done| {
            if let Some(f) = options.progress {
                f(done, parts);
            }
        };
        tell(0);
        let embed = Embedding::load(weights)?;
        tell(1);
        let (mut blocks, mut ropes) = (Vec::with_capacity(spec.layers.len()), Vec::new());
        for layer in 0..spec.layers.len() {
            let mut block = Block::load_with(weights, layer, options.activations)?;
            block.share_rope(spec.layers[layer].attn.as_ref().and_then(|a| a.rope.as_ref()), &mut ropes);
            blocks.push(block);
            weights.spec().layer_places(layer).iter().for_each(|p| weights.release(p));
            tell(layer + 2);
        }
        let head = Head::load_with(weights, options.activations)?;
        // A tied table is read row by row from here on.
        weights.release(&Place::global(if spec.tied { Role::Embed } else { Role::Head }));
        tell(parts);
        Ok(Decoder { spec, embed, blocks, head })
    }

    /// The residual stream after the last block of the batch's rows, `[rows, hidden]`; `tokens` has a token for each
    /// row.
    pub fn forward(
        &self,
        tokens: &[u32],
        batch: &Batch,
        kv: &mut dyn KvStore,
        tap: &mut dyn Tap,
    ) -> Result<Lent, ModelError> {
        let mut x = span("embedding", || self.embed.rows(tokens, batch.positions()))?;
        for block in &self.blocks {
            block.forward(&mut x, batch, kv, tap)?;
        }
        Ok(x)
    }

    /// Logits of rows of [`Decoder::forward`]'s result, `[rows, vocab]`.
    pub fn logits(&self, hidden: MatRef<'_>) -> Lent {
        self.head.logits(hidden)
    }

    /// Multiply-adds of one token's products in the blocks, were every matrix dense: on f32, and on 8-bit activations.
    pub fn work(&self) -> [u64; 2] {
        self.blocks.iter().map(Block::work).fold([0; 2], |[a, b], [c, d]| [a + c, b + d])
    }

    /// Whether any product takes activations of 8 bits.
    pub fn rounds_activations(&self) -> bool {
        self.work()[1] > 0 || self.head.linear.work()[1] > 0
    }

    /// Bytes of weights read for one token.
    pub fn weights_bytes(&self) -> u64 {
        self.blocks.iter().map(Block::weights_bytes).sum::<u64>() + self.head.weights_bytes()
    }

    /// Bytes of all weights that one token after the other reads: more than [`Decoder::weights_bytes`] where there are
    /// experts.
    pub fn footprint_bytes(&self) -> u64 {
        self.blocks.iter().map(Block::footprint_bytes).sum::<u64>() + self.head.weights_bytes()
    }
}

//! A loaded model, and how it is run: its context, the form of its keys and values.

use std::sync::Arc;

use lacuna_checkpoint::{TemplateError, TokenizerError};
use lacuna_contract::MethodError;
use lacuna_kernels::KvFormat;
use lacuna_model::{Decoder, ModelError};
use lacuna_spec::RopeScaling;

use crate::RunPlan;
use crate::blocks::{keep, select};

/// What can go wrong while running a model.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The model could not compute.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The text could not be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The conversation could not be rendered.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// There is nothing to continue.
    #[error("the prompt is empty; a model without a beginning token needs at least one token to continue")]
    Empty,
    /// The text does not fit.
    #[error("{tokens} tokens do not fit the context of {context} tokens{hint}")]
    Context {
        /// Tokens there are.
        tokens: usize,
        /// Tokens that fit.
        context: usize,
        /// What to do.
        hint: &'static str,
    },
    /// The model computed no numbers.
    #[error(
        "the logit of token {token} is {value} after {tokens} tokens: the model is broken or its weights were damaged"
    )]
    Logits {
        /// The token.
        token: usize,
        /// The value.
        value: f32,
        /// Tokens before.
        tokens: usize,
    },
    /// The model computed no numbers for an embedding.
    #[error("the embedding of {tokens} tokens holds {value}: the model is broken or its weights were damaged")]
    Embedding {
        /// The value.
        value: f64,
        /// Tokens of the text.
        tokens: usize,
    },
    /// A sampling setting out of its range.
    #[error("{setting} is {value}; it must be {range}")]
    Setting {
        /// Which.
        setting: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// A request that asks for nothing measurable.
    #[error("{0}")]
    Request(String),
}

/// A model ready to continue texts. It holds nothing that changes; a [`crate::Scheduler`] runs it.
pub struct Engine {
    model: Decoder,
    context: usize,
    kv: KvFormat,
    /// LongRoPE's original contexts.
    originals: Vec<usize>,
    plan: RunPlan,
}

impl Engine {
    /// An engine over a loaded model, with the model's own context.
    pub fn new(model: Decoder) -> Engine {
        let context = model.spec.context;
        let ropes = model.spec.layers.iter().filter_map(|l| l.attn.as_ref()?.rope.as_ref());
        let mut originals: Vec<usize> = ropes
            .filter_map(|r| match r.scaling {
                RopeScaling::Longrope { original, .. } => Some(original),
                _ => None,
            })
            .collect();
        originals.sort_unstable();
        originals.dedup();
        Engine { model, context, kv: KvFormat::F32, originals, plan: RunPlan::none() }
    }

    /// Another form of the cached keys and values; by default they are exactly what was computed.
    #[must_use]
    pub fn with_kv(mut self, kv: KvFormat) -> Engine {
        self.kv = kv;
        self
    }

    /// Another limit on a text's length. A longer one than the model was made for is the caller's risk.
    #[must_use]
    pub fn with_context(mut self, tokens: usize) -> Engine {
        self.context = tokens;
        self
    }

    /// What is drafted and what is left out; by default nothing.
    #[must_use]
    pub fn with_plan(mut self, plan: RunPlan) -> Engine {
        self.plan = plan;
        self
    }

    /// What is drafted and what is left out.
    pub fn plan(&self) -> &RunPlan {
        &self.plan
    }

    /// Says why the model cannot run under the plan.
    pub fn check_plan(&self) -> Result<(), RunError> {
        let kept = self.keep_plan();
        let checked = kept.map_or(Ok(()), |plan| keep::check(plan, &self.model.spec, self.context));
        let checked =
            checked.and_then(|()| self.plan.select().map_or(Ok(()), |by| select::check(by, &self.model.spec, kept)));
        let (meant, loaded) = (self.plan.gate(), self.model.gate());
        let same = meant.map(Arc::as_ptr).zip(loaded.map(Arc::as_ptr)).is_some_and(|(a, b)| std::ptr::addr_eq(a, b));
        let checked = checked.and_then(|()| match (meant, loaded) {
            (None, None) => Ok(()),
            _ if same => Ok(()),
            (None, Some(_)) => Err(MethodError::new("gate: the model was loaded with one that the plan lacks")),
            (Some(_), _) => Err(MethodError::new("gate: the model was loaded without it")),
        });
        checked.map_err(|e| RunError::Request(format!("the run plan: {e}")))
    }

    /// How keys and values are kept.
    pub fn kv_format(&self) -> KvFormat {
        self.kv
    }

    /// The model.
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// Most tokens that a text may have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// The class of a text of `length` tokens. Texts of different classes have no keys in common: LongRoPE turns a text
    /// that is longer than the original context by other factors, from its first token on. A text that outgrows its
    /// class is read again, so that what it says is what one pass over the whole of it says, however it was cut. In
    /// transformers Phi-3 does the same; other architectures keep the short keys beside long ones there, and what they
    /// say depends on how the text was cut.
    pub fn class(&self, length: usize) -> u32 {
        self.originals.iter().filter(|&&original| length > original).count() as u32
    }
}

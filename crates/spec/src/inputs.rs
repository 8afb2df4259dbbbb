//! What goes from block to block beside one residual stream, as data: inputs of single layers, and several streams.

use serde::{Deserialize, Serialize};

use crate::place::{Part, Role};
use crate::spec::{Activation, MAX_DIM, SpecError};

/// What every block is given of each token beside the residual stream: `width` numbers, looked up in a table of its own
/// and put together with what a matrix makes of the embedding,
/// `(norm(projection_scale · W e) + embed_scale · row) · scale`. Behind its FFN the block adds
/// `norm(out (act(gate x) · input))` to the stream (Gemma 3n, Gemma 4).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerInputs {
    /// Numbers of a layer's input.
    pub width: usize,
    /// Rows of the table; a token beyond them has the row of token 0.
    pub vocab: usize,
    /// Factor on the table's rows.
    pub embed_scale: f32,
    /// Factor on what the matrix makes of the embedding.
    pub projection_scale: f32,
    /// Factor on the sum of both.
    pub scale: f32,
    /// The non-linearity behind a block's gate.
    pub act: Activation,
}

/// Alternating updates (Gemma 3n): several residual streams, of which a block computes on one and corrects them all.
/// With modalities `m(x) = tanh(router_scale · R norm(x))` a block predicts `p_i = x_i + Σ_j P(m(x_a))_ij x_j`, makes
/// `y` of `p_a`, and leaves `p_i + (1 + C(m(y))_i) (y - p_a)`; what comes of its input is added to all but the first.
/// The embedding gives the first stream, and matrices of it the others, brought to its magnitude; before the last norm
/// matrices bring the others back, to its magnitude again, and the mean of all goes on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AltUp {
    /// How many streams there are.
    pub inputs: usize,
    /// The one that blocks compute on.
    pub active: usize,
    /// Factor on the router's logits.
    pub router_scale: f32,
    /// Whether a learned vector scales what a block's gate of inputs reads.
    pub scaled: bool,
}

impl AltUp {
    pub(crate) fn check(&self, hidden: usize) -> Result<(), SpecError> {
        let fail = |what: String| Err(SpecError { what: format!("altup: {what}") });
        if self.inputs < 2 || self.inputs > 64 || self.inputs.saturating_mul(hidden) > MAX_DIM {
            return fail(format!("{} streams of {hidden} channels", self.inputs));
        }
        if self.active >= self.inputs {
            return fail(format!("stream {} of {}", self.active, self.inputs));
        }
        if !self.router_scale.is_finite() {
            return fail(format!("router_scale is {}", self.router_scale));
        }
        Ok(())
    }

    /// The shapes of tensors of a block, and of those of single streams.
    pub(crate) fn shape(&self, role: Role, part: Part, hidden: usize) -> Option<(usize, usize)> {
        let n = self.inputs;
        match (role, part) {
            (Role::AltupRouter, Part::Weight) => Some((n, hidden)),
            (Role::AltupRouterNorm, Part::Weight) => Some((1, hidden)),
            (Role::AltupPredict, Part::Weight) => Some((n * n, n)),
            (Role::AltupCorrect, Part::Weight) => Some((n, n)),
            (Role::AltupScale, Part::Weight) if self.scaled => Some((1, hidden)),
            (Role::AltupIn | Role::AltupOut, Part::Weight) => Some((hidden, hidden)),
            _ => None,
        }
    }
}

impl LayerInputs {
    pub(crate) fn check(&self, layers: usize) -> Result<(), SpecError> {
        let all = self.width.saturating_mul(layers);
        if self.width == 0 || all > MAX_DIM || self.vocab == 0 || self.vocab > MAX_DIM {
            let what = format!(
                "layer_inputs: {} rows of {layers} layers' {} numbers; each must be 1 to {MAX_DIM}",
                self.vocab, self.width
            );
            return Err(SpecError { what });
        }
        for (name, x) in
            [("embed_scale", self.embed_scale), ("projection_scale", self.projection_scale), ("scale", self.scale)]
        {
            if !x.is_finite() {
                return Err(SpecError { what: format!("layer_inputs.{name} is {x}") });
            }
        }
        if matches!(self.act, Activation::Xielu | Activation::SwigluOai) {
            return Err(SpecError {
                what: "layer_inputs.act is xielu or swiglu_oai, which no gate of inputs has".into(),
            });
        }
        Ok(())
    }

    /// The shapes of tensors outside of the blocks.
    pub(crate) fn shape(&self, role: Role, part: Part, layers: usize, hidden: usize) -> Option<(usize, usize)> {
        match (role, part) {
            (Role::LayerInputs, Part::Weight) => Some((self.vocab, layers * self.width)),
            (Role::InputsIn, Part::Weight) => Some((layers * self.width, hidden)),
            (Role::InputsNorm, Part::Weight) => Some((1, self.width)),
            _ => None,
        }
    }
}

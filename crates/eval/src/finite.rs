//! Where the numbers of a network stop being finite.

use lacuna_base::MatRef;
use lacuna_checkpoint::Found;
use lacuna_format::Weights;
use lacuna_model::{Backend, BlockPart, Head, ModelError, Shown, Tap, Wants};
use lacuna_spec::{Place, Role};

use crate::EvalError;

/// The first row with a number that is not finite.
pub(crate) fn first(x: MatRef<'_>) -> Option<usize> {
    (0..x.rows()).find(|&r| x.row(r).iter().any(|v| !v.is_finite()))
}

/// Looks on while a block that is known to break is computed once more, and keeps where it breaks.
#[derive(Default)]
pub(crate) struct Watch {
    place: Option<String>,
}

impl Watch {
    fn see<B: Backend>(&mut self, x: &Shown<'_, B>, place: impl FnOnce() -> String) -> Result<(), ModelError> {
        if self.place.is_none() && first(x.download()?.view()).is_some() {
            self.place = Some(place());
        }
        Ok(())
    }

    /// The error of the model: what was seen first in block `layer`, for the token at `position` of sequence
    /// `sequence`.
    pub fn error(self, weights: &dyn Weights, layer: usize, sequence: usize, position: usize) -> EvalError {
        let place = self.place.unwrap_or_else(|| "the sum of its parts".to_owned());
        let mine: Vec<Place> = weights.spec().places().into_iter().filter(|p| p.layer == Some(layer as u32)).collect();
        let at = format!("in layer {layer}, {place}, for token {position} of window {sequence}");
        broken(weights, &at, &mine)
    }
}

impl<B: Backend> Tap<B> for Watch {
    fn wants(&self) -> Wants {
        Wants { inputs: true, residuals: true, ..Wants::default() }
    }

    fn input(&mut self, place: &Place, x: Shown<'_, B>) -> Result<(), ModelError> {
        let part = match place.role {
            role if role.is_attention() => "attention",
            role if role.is_mixer() => "mixer",
            role if role.is_shortcut() => "shortcut",
            _ => "feed-forward part",
        };
        self.see(&x, || format!("{part}, what goes into {place}"))
    }

    fn residual(&mut self, _: usize, part: BlockPart, _: Shown<'_, B>, after: Shown<'_, B>) -> Result<(), ModelError> {
        self.see(&after, || match part {
            BlockPart::Attention => "attention, what comes out of it".to_owned(),
            BlockPart::Ffn => "feed-forward part, what comes out of it".to_owned(),
            BlockPart::Block => "what comes out of it".to_owned(),
        })
    }
}

/// The error of a model whose embedding of `token` is not finite.
pub(crate) fn embedding(weights: &dyn Weights, token: u32) -> EvalError {
    let all = [Role::Embed, Role::Positions, Role::EmbedNorm, Role::LayerInputs, Role::InputsIn, Role::InputsNorm];
    let mine = all.map(Place::global);
    broken(weights, &format!("in the embedding of token {token}"), &mine)
}

/// The error of a model whose logits are not finite although the residual stream `x` is.
pub(crate) fn logits(weights: &dyn Weights, head: &Head, x: MatRef<'_>) -> EvalError {
    if first(head.input(x).view()).is_some() {
        return broken(weights, "in the final norm", &[Place::global(Role::FinalNorm)]);
    }
    let tied = weights.spec().tied;
    let (name, role) =
        if tied { ("in the head, which is the embedding", Role::Embed) } else { ("in the head", Role::Head) };
    broken(weights, name, &[Place::global(role)])
}

/// Says where, and whether it is the weights' fault.
fn broken(weights: &dyn Weights, at: &str, places: &[Place]) -> EvalError {
    let bad = places.iter().find_map(|p| {
        let n = Found::of(&*weights.get(p).ok()??).not_finite;
        (n > 0).then(|| format!("{p} holds {n} weights that are not finite"))
    });
    let why = bad.unwrap_or_else(|| "its weights are finite, so what is computed with them grows too large".to_owned());
    EvalError {
        what: format!("the model computes numbers that are not finite, the first {at}: {why}"),
        not_finite: true,
    }
}

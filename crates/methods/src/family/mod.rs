//! Families: one recipe verb a file. A family holds what its methods share — the keys of recipes, selection, the form
//! of the answer — and makes the step that the driver drives.

mod blocks;
pub(crate) mod drop;
pub(crate) mod factor;
pub(crate) mod keys;
pub(crate) mod outliers;
pub(crate) mod prune;
pub(crate) mod quantize;
pub(crate) mod recode;
pub(crate) mod search;
pub(crate) mod select;
mod sizes;
pub(crate) mod slice;
pub(crate) mod stack;
pub(crate) mod structure;
mod tables;
pub(crate) mod transform;
pub(crate) mod vocabulary;

use lacuna_base::{Mat, Rng};
use lacuna_contract::{Edit, Left, Made, Making, MethodError, Work};
use lacuna_format::{Code, Unpacked, UnpackedPiece, UnpackedTerm};
use lacuna_spec::{Place, Role, Spec};

/// A step whose method answers another question than the family asks.
fn wrong(making: &Making<'_>, made: &Made) -> MethodError {
    let card = &making.method.card;
    MethodError::new(format!(
        "{} answers the question {made:?}, which this step cannot use; its own verb is '{}'",
        card.name, card.verb
    ))
}

/// Refuses networks whose blocks are more than attention of heads and an FFN: what can be cut out of those is not known.
fn plain_blocks(spec: &Spec) -> Result<(), MethodError> {
    let gated = |l: &lacuna_spec::LayerSpec| l.attn.as_ref().is_some_and(|a| a.gate);
    own_weights(spec)?;
    for (l, layer) in spec.layers.iter().enumerate() {
        let role = match (&layer.mixer, gated(layer)) {
            (Some(_), _) => Role::MixerIn,
            (None, true) => Role::AttnGate,
            (None, false) => {
                more_than_blocks(spec, l)?;
                continue;
            }
        };
        return Err(MethodError::new(format!(
            "{} is a part that this step does not know: networks with recurrent mixers or gated attention keep their \
             structure; steps on matrices (prune, quantize, factor) work on them",
            Place::layer(l, role)
        )));
    }
    Ok(())
}

/// Refuses a network with layers that share weights: what changes one layer would change another.
fn own_weights(spec: &Spec) -> Result<(), MethodError> {
    match spec.first_like() {
        None => Ok(()),
        Some(l) => Err(MethodError::new(format!(
            "layer {l} uses the weights of layer {}: steps on a network's structure come before layers share weights",
            spec.weights_of(l)
        ))),
    }
}

/// Refuses networks whose layers read what earlier ones, or the embedding, made beside the stream.
fn more_than_blocks(spec: &Spec, l: usize) -> Result<(), MethodError> {
    let layer = &spec.layers[l];
    let of = |f: fn(&lacuna_spec::AttnSpec) -> bool| layer.attn.as_ref().is_some_and(f);
    let what = if spec.layer_inputs.is_some() {
        "has an input of its own beside the residual stream"
    } else if of(|a| a.kv_from.is_some()) {
        "reads another layer's keys and values"
    } else if of(|a| a.v_is_k) {
        "has values that are its keys"
    } else if spec.altup.is_some() || layer.laurel.is_some() {
        "computes on one of several streams, or beside attention"
    } else if layer.output_scale {
        "multiplies the stream behind it"
    } else {
        return Ok(());
    };
    Err(MethodError::new(format!(
        "layer {l} {what}, which this step does not know: such networks keep their structure; steps on matrices (prune, \
         quantize, factor) work on them"
    )))
}

/// Refuses a step that `wants` one piece of floats after steps that leave something else.
fn wants_floats(what: &str, earlier: &[Left]) -> Result<(), MethodError> {
    for left in earlier {
        match left {
            Left::Rounded => {
                return Err(MethodError::new(format!("{what} after rounding would undo it; put it before")));
            }
            Left::Factored => {
                return Err(MethodError::new(format!(
                    "{what} after factoring has no matrix to work on; put it before"
                )));
            }
            Left::Corrected => {
                return Err(MethodError::new(format!("{what} after a correction would undo it; put it before")));
            }
            Left::Masked | Left::Aside | Left::Mapped { .. } => {}
        }
    }
    Ok(())
}

/// The main piece, which must be one of floats.
fn floats(m: &mut Unpacked) -> Result<&mut UnpackedPiece, MethodError> {
    match &mut m.main {
        UnpackedTerm::Piece(p) if matches!(p.code, Code::Float) => Ok(p),
        _ => Err(MethodError::new("the matrix is rounded or factored already")),
    }
}

/// Refuses new weights that are not finite numbers.
fn finite(w: &Mat) -> Result<(), MethodError> {
    match w.data().iter().position(|x| !x.is_finite()) {
        Some(i) => {
            let (r, c) = (i / w.cols(), i % w.cols());
            Err(MethodError::new(format!("the new weight at ({r}, {c}) is {}", w.data()[i])))
        }
        None => Ok(()),
    }
}

/// Each work by itself.
fn one_by_one(
    work: Vec<Work<'_>>,
    mut edit: impl FnMut(&mut Work<'_>) -> Result<(), MethodError>,
) -> Result<Vec<Edit>, MethodError> {
    work.into_iter()
        .map(|mut w| {
            edit(&mut w)?;
            Ok(Edit::Matrix(w.place, w.matrix))
        })
        .collect()
}

/// Scores drawn by lot, for samples.
fn chance(rows: usize, cols: usize, seed: u64) -> Mat {
    let mut rng = Rng::new(seed);
    Mat::from_fn(rows, cols, |_, _| rng.normal())
}

/// Bytes that a column-by-column solver takes: three square f64 matrices of the inputs, the matrix and its errors.
fn solver_bytes((rows, cols): (usize, usize)) -> u64 {
    24 * (cols as u64) * (cols as u64) + 24 * (rows as u64) * (cols as u64)
}

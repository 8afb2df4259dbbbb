//! Models of different vocabularies side by side: in nats a byte, and never by KL.

use anyhow::Result;
use lacuna_checkpoint::Tokenizer;
use lacuna_eval::{Across, Eval, EvalError, Speaker, Table, Told};
use lacuna_format::Weights;
use lacuna_judge::Measured;
use serde_json::{Map, Value, json};

use crate::common::Model;

/// Why there is no divergence.
pub const NO_KL: &str = "The vocabularies differ, so there is no KL between the models: they are compared in nats a \
 byte, and where losses and perplexities stand beside the source's, they are for as much text as one of the source's \
 tokens has.";

/// Whether both models have the same tokens: as many, with the same texts. A model without a tokenizer has the other's.
pub fn same_tokens((model, tokenizer): (&Model, &Tokenizer), other: &Model) -> Result<bool> {
    let rows = model.checkpoint.spec().vocab;
    if other.checkpoint.spec().vocab != rows {
        return Ok(false);
    }
    let Ok(theirs) = other.tokenizer() else { return Ok(true) };
    Ok((0..rows as u32).all(|id| tokenizer.token_text(id) == theirs.token_text(id)))
}

/// Holds `model` against `dense` on `tokens`, which are the dense model's.
pub fn hold(
    eval: &Eval<'_>,
    tokens: &[u32],
    model: (&dyn Weights, &Tokenizer),
    dense: (&dyn Weights, &Tokenizer),
) -> Result<Across, EvalError> {
    let speaker = |(weights, tokenizer)| Speaker { weights, tokenizer };
    eval.across(tokens, speaker(model), speaker(dense))
}

/// Puts what the comparison says in place of a result's loss, and beside the losses of its baselines, which are the
/// source's text in the source's tokens.
pub fn in_bytes<'a>(x: &Across, result: &mut Measured, others: impl Iterator<Item = &'a mut Measured>) {
    let tokens_a_byte = x.dense.tokens as f64 / x.dense.bytes.max(1) as f64;
    (result.loss, result.nats_a_byte) = (x.nll_in_dense_tokens(), Some(x.model.nats_a_byte));
    result.ppl = result.loss.exp();
    others.for_each(|b| b.nats_a_byte = Some(b.loss * tokens_a_byte));
}

/// The comparison's keys of a JSON answer.
pub fn keys(x: &Across) -> Map<String, Value> {
    let pairs = [
        ("nats_a_byte", json!(x.model.nats_a_byte)),
        ("bits_a_byte", json!(x.model.bits_a_byte())),
        ("nats_a_byte_dense", json!(x.dense.nats_a_byte)),
        ("bits_a_byte_dense", json!(x.dense.bits_a_byte())),
        ("missing_tokens", json!(x.missing)),
        ("missing_mass", json!(x.missing_mass)),
        ("text_bytes", json!(x.model.bytes)),
    ];
    pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// The comparison in a sentence.
pub fn words(x: &Across) -> String {
    format!(
        "held-out loss {:.5} nats a byte (dense {:.5}), {:.4} bits a byte (dense {:.4}); the dense model gives {:.3}% of \
         its probability to the {} tokens that went\n{NO_KL}\n",
        x.model.nats_a_byte,
        x.dense.nats_a_byte,
        x.model.bits_a_byte(),
        x.dense.bits_a_byte(),
        100.0 * x.missing_mass,
        x.missing
    )
}

/// The comparison's rows of a table.
pub fn rows(table: &mut Table, x: &Across) {
    by_the_byte(table, &x.model);
    table.row(["loss of the dense model".to_owned(), format!("{:.5} nats a byte", x.dense.nats_a_byte)]);
    let mass = format!("{:.3}%, {} tokens", 100.0 * x.missing_mass, x.missing);
    table.row(["the dense model's mass on missing tokens".to_owned(), mass]);
    table.row(["KL(dense || model)".to_owned(), "none: other vocabularies".to_owned()]);
}

/// The row of a loss that no vocabulary is in.
pub fn by_the_byte(table: &mut Table, told: &Told) {
    let said = format!("{:.5} nats, {:.4} bits", told.nats_a_byte, told.bits_a_byte());
    table.row(["loss a byte of text".to_owned(), said]);
}

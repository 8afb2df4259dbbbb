//! Granite 3 and 4 (dense): Llama with factors on the embedding, the scores, what a part adds, and the logits.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, llama_like, llama_source, num, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, rope};
use lacuna_spec::{RopeStyle, Spec, SpecError};

/// Granite.
pub(super) const GRANITE: Family = Family {
    name: "granite",
    model_types: &["granite"],
    gguf: &["granite"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "granite")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "granite", "hidden_act", rope::common)?;
    spec.embed_scale = c.f64("embedding_multiplier")? as f32;
    spec.residual_scale = c.f64("residual_multiplier")? as f32;
    spec.logit_scale = (1.0 / c.f64("logits_scaling")?) as f32;
    let (scale, bias) = (c.f64("attention_multiplier")? as f32, c.bool("attention_bias")?);
    attns(&mut spec).for_each(|a| (a.scale, a.qkv_bias, a.o_bias) = (scale, bias, bias));
    let bias = c.bool("mlp_bias")?;
    ffns(&mut spec).for_each(|f| f.bias = bias);
    Ok(spec)
}

/// The divisor of logits by `scale`: a plain number where one gives the same factor.
pub(super) fn divisor(scale: f32) -> f64 {
    let exact = 1.0 / f64::from(scale);
    let plain = (exact * 1e4).round() / 1e4;
    if (1.0 / plain) as f32 == scale { plain } else { exact }
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "granite", "GraniteForCausalLM")?;
    let (a, f) = first(spec)?;
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("embedding_multiplier", num(spec.embed_scale));
    set("residual_multiplier", num(spec.residual_scale));
    set("attention_multiplier", num(a.scale));
    set("logits_scaling", json!(divisor(spec.logit_scale)));
    set("attention_bias", json!(a.qkv_bias));
    set("mlp_bias", json!(f.bias));
    verified(spec, out, from_config)
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let own = ["embedding_scale", "residual_scale"];
    let mut spec = gguf::reading(head, "granite", RopeStyle::Interleaved, &own)?;
    let factor = |key: &str| Ok::<_, SpecError>(head.f32(key)?.filter(|x| *x != 0.0).unwrap_or(1.0));
    spec.embed_scale = factor("embedding_scale")?;
    spec.residual_scale = factor("residual_scale")?;
    // What the file calls a scale divides here.
    spec.logit_scale = (1.0 / f64::from(factor("logit_scale")?)) as f32;
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(&Spec { logit_scale: 1.0, ..spec.clone() }, "granite")?;
    keys.set("logit_scale", GgufValue::F32(divisor(spec.logit_scale) as f32));
    keys.set("embedding_scale", GgufValue::F32(spec.embed_scale));
    keys.set("residual_scale", GgufValue::F32(spec.residual_scale));
    keys.set("attention.scale", GgufValue::F32(first(spec)?.0.scale));
    gguf_out::verified(spec, keys, from_gguf)
}

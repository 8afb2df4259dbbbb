//! ERNIE 4.5 (dense): Llama whose RoPE turns neighbours, and one word for all biases.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, interleave, llama_like, llama_source, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, rope};
use lacuna_spec::{RopeStyle, Spec, SpecError};

/// ERNIE 4.5.
pub(super) const ERNIE4_5: Family = Family {
    name: "ernie4_5",
    model_types: &["ernie4_5"],
    gguf: &["ernie4_5"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "ernie4_5")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "ernie4_5", "hidden_act", rope::common)?;
    interleave(&mut spec);
    let bias = c.bool("use_bias")?;
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (bias, bias));
    ffns(&mut spec).for_each(|f| f.bias = bias);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "ernie4_5", "Ernie4_5ForCausalLM")?;
    out.insert("use_bias".into(), json!(first(spec)?.0.qkv_bias));
    verified(spec, out, from_config)
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    gguf::standard(head, "ernie4_5", RopeStyle::Interleaved)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "ernie4_5")?, from_gguf)
}

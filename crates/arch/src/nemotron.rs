//! Nemotron 3, 4 and Minitron: LayerNorms whose files keep the scale less one, relu² without a gate, a part of each
//! head turns.

use serde_json::{Value, json};

use super::config::{
    Config, attns, ffns, first, llama_like, llama_source, named_back, renamed, to_llama_like, verified,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, rope};
use lacuna_spec::{Activation, NormKind, RopeStyle, Spec, SpecError};

/// Nemotron.
pub(super) const NEMOTRON: Family = Family {
    name: "nemotron",
    model_types: &["nemotron"],
    gguf: &["nemotron"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "nemotron")?;
    renamed(&mut filled, "norm_eps", "rms_norm_eps");
    let c = Config(&filled);
    let mut spec = llama_like(&c, "nemotron", "hidden_act", rope::part)?;
    (spec.norm.kind, spec.norm.offset) = (NormKind::Layer, 1.0);
    let (attention, mlp) = (c.bool("attention_bias")?, c.bool("mlp_bias")?);
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (attention, attention));
    ffns(&mut spec).for_each(|f| (f.gated, f.bias) = (false, mlp));
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "nemotron", "NemotronForCausalLM")?;
    named_back(&mut out, "rms_norm_eps", "norm_eps");
    let (a, f) = first(spec)?;
    out.insert("attention_bias".into(), json!(a.qkv_bias));
    out.insert("mlp_bias".into(), json!(f.bias));
    out.entry("partial_rotary_factor").or_insert(json!(1.0));
    verified(spec, out, from_config)
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "nemotron", RopeStyle::Half)?;
    ffns(&mut spec).for_each(|f| (f.gated, f.act) = (false, Activation::Relu2));
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "nemotron")?, from_gguf)
}

//! Llama 2 and 3, SmolLM2 and everything that calls itself llama; Mistral, which adds a window.

use serde_json::{Value, json};

use super::Family;
use super::config::{Config, attns, ffns, first, llama_like, llama_source, to_llama_like, verified, window};
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use crate::spec::{RopeStyle, Spec, SpecError};

/// Llama.
pub(super) const LLAMA: Family = Family {
    name: "llama",
    model_types: &["llama"],
    gguf: &["llama"],
    from_config: from_llama,
    to_config: to_llama,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

/// Mistral: windows on every layer. Its GGUF files call themselves llama.
pub(super) const MISTRAL: Family = Family {
    name: "mistral",
    model_types: &["mistral"],
    gguf: &[],
    from_config: from_mistral,
    to_config: to_mistral,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_llama(config: &Value) -> Result<Spec, SpecError> {
    let c = Config(config);
    c.only("partial_rotary_factor", json!(1.0))?;
    let mut spec = llama_like(&c, "llama")?;
    let (attention, mlp) = (c.bool_or("attention_bias", false)?, c.bool_or("mlp_bias", false)?);
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (attention, attention));
    ffns(&mut spec).for_each(|f| f.bias = mlp);
    Ok(spec)
}

fn to_llama(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "llama", "LlamaForCausalLM")?;
    let (a, f) = first(spec)?;
    out.insert("attention_bias".into(), json!(a.qkv_bias));
    out.insert("mlp_bias".into(), json!(f.bias));
    verified(spec, out, from_llama)
}

fn from_mistral(config: &Value) -> Result<Spec, SpecError> {
    let c = Config(config);
    let mut spec = llama_like(&c, "mistral")?;
    // Absent is not null here: transformers' default is a window of 4096.
    let window = if config.get("sliding_window").is_some() { c.opt_usize("sliding_window")? } else { Some(4096) };
    let windows = c.windows(spec.layers.len(), window, |_| true)?;
    attns(&mut spec).zip(windows).for_each(|(a, w)| a.window = w);
    Ok(spec)
}

fn to_mistral(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "mistral", "MistralForCausalLM")?;
    out.insert("sliding_window".into(), json!(window(spec)));
    verified(spec, out, from_mistral)
}

/// Rows of q and k lie in llama.cpp's own order, so that RoPE pairs neighbours.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let arch = if head.usize("expert_count")?.unwrap_or(0) > 0 { "mixtral" } else { "llama" };
    gguf::standard(head, arch, RopeStyle::Interleaved)
}

/// Mistral and Mixtral, too: their files call themselves llama.
pub(super) fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "llama")?;
    if let Some(w) = window(spec).filter(|w| *w < spec.context) {
        keys.notes.push(format!(
            "llama.cpp computes no windows in llama files: beyond {w} tokens it sees more than this network"
        ));
    }
    gguf_out::verified(spec, keys, from_gguf)
}

//! Llama 2 and 3, SmolLM2 and everything that calls itself llama; Mistral, which adds a window.

use serde_json::{Value, json};

use super::config::{
    Config, attns, ffns, first, layer_types, llama_like, llama_source, to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, rope};
use lacuna_spec::{RopeStyle, Spec, SpecError};

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

/// Mistral: windows on every layer, or on those that `layer_types` names (Ministral). Its GGUF files call themselves
/// llama.
pub(super) const MISTRAL: Family = Family {
    name: "mistral",
    model_types: &["mistral", "ministral"],
    gguf: &[],
    from_config: from_mistral,
    to_config: to_mistral,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_llama(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "llama")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "llama", "hidden_act", rope::common)?;
    let (attention, mlp) = (c.bool("attention_bias")?, c.bool("mlp_bias")?);
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
    let filled = filled(config, "mistral")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "mistral", "hidden_act", rope::common)?;
    // Absent is not null here (4096). With layer_types transformers takes the file for a Ministral's, whose layers may
    // differ.
    let windows = c.windows(spec.layers.len(), c.opt_usize("sliding_window")?, |_| true)?;
    attns(&mut spec).zip(windows).for_each(|(a, w)| a.window = w);
    Ok(spec)
}

fn to_mistral(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "mistral", "MistralForCausalLM")?;
    out.insert("sliding_window".into(), json!(window(spec)));
    let mut windows = spec.layers.iter().filter_map(|l| Some(l.attn.as_ref()?.window.is_some()));
    let first = windows.next();
    if windows.any(|w| Some(w) != first) {
        out.insert("layer_types".into(), layer_types(spec));
    }
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

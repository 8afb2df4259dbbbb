//! Llama 2 and 3, SmolLM2 and everything that calls itself llama; Mistral, which adds a window.

use serde_json::{Value, json};

use super::config::{
    Config, attns, bad, ffns, first, layer_types, llama_like, llama_source, num, renamed, to_llama_like, verified,
    window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, rope};
use lacuna_spec::{RopeScaling, RopeStyle, Spec, SpecError, Temperature};

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

/// Ministral 3: queries grow with their position.
pub(super) const MINISTRAL3: Family = Family {
    name: "ministral3",
    model_types: &["ministral3"],
    gguf: &["mistral3"],
    from_config: from_ministral3,
    to_config: to_ministral3,
    source: llama_source,
    from_gguf: gguf_ministral3,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf_ministral3,
};

/// What the class takes where the file says nothing of RoPE.
fn usual_rope() -> Value {
    json!({
        "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
    })
}

fn from_ministral3(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "ministral3")?;
    renamed(&mut filled, "rope_scaling", "rope_parameters");
    if Config(&filled).get("rope_parameters").is_none() {
        filled["rope_parameters"] = usual_rope();
    }
    let c = Config(&filled);
    let mut spec = llama_like(&c, "ministral3", "hidden_act", rope::common)?;
    let set = Config(&filled["rope_parameters"]);
    let (beta, period) = (set.opt_f32("llama_4_scaling_beta")?, set.opt_usize("original_max_position_embeddings")?);
    let (Some(beta), Some(period)) = (beta, period) else {
        return bad(
            "rope_parameters lacks llama_4_scaling_beta or original_max_position_embeddings, and transformers fails",
        );
    };
    let window = c.opt_usize("sliding_window")?;
    for a in attns(&mut spec) {
        (a.window, a.temperature) = (window, Some(Temperature { beta, period, shift: 0 }));
    }
    Ok(spec)
}

fn to_ministral3(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "ministral3", "Ministral3ForCausalLM")?;
    let mut set = out.shift_remove("rope_scaling").unwrap_or(json!({"rope_type": "default"}));
    set["rope_theta"] = out.shift_remove("rope_theta").unwrap_or(json!(1e6));
    if let Some(t) = first(spec)?.0.temperature {
        set["llama_4_scaling_beta"] = num(t.beta);
        set["original_max_position_embeddings"] = json!(t.period);
    }
    out.insert("rope_parameters".into(), set);
    out.insert("sliding_window".into(), json!(window(spec)));
    verified(spec, out, from_ministral3)
}

/// llama.cpp takes YaRN's factor on cos and sin back in these files, and the context before stretching for the period.
fn gguf_ministral3(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::reading(head, "ministral3", RopeStyle::Interleaved, &["attention.temperature_scale"])?;
    let beta = head.f32("attention.temperature_scale")?.unwrap_or(0.0);
    for a in attns(&mut spec) {
        if let Some(RopeScaling::Yarn { attention_factor, original, .. }) = a.rope.as_mut().map(|r| &mut r.scaling) {
            *attention_factor = 1.0;
            a.temperature = Some(Temperature { beta, period: *original, shift: 0 });
        }
    }
    Ok(spec)
}

fn to_gguf_ministral3(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "mistral3")?;
    keys.pairs.retain(|(key, _)| key != "mistral3.rope.scaling.attn_factor");
    if let Some(t) = first(spec)?.0.temperature {
        keys.set("attention.temperature_scale", GgufValue::F32(t.beta));
    }
    keys.set("rope.scaling.yarn_log_multiplier", GgufValue::F32(1.0));
    gguf_out::verified(spec, keys, gguf_ministral3)
}

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

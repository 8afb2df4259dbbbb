//! Qwen2 and 2.5 (biases on q, k and v), Qwen3 (norms on each head), Qwen3-MoE.

use serde_json::{Map, Value, json};

use super::config::{
    Config, attns, bad, ffns, first, layer_types, llama_like, llama_source, to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, rope};
use lacuna_spec::{Experts, RopeStyle, Spec, SpecError};

/// Qwen2.
pub(super) const QWEN2: Family = Family {
    name: "qwen2",
    model_types: &["qwen2"],
    gguf: &["qwen2"],
    from_config: from_qwen2,
    to_config: to_qwen2,
    source: llama_source,
    from_gguf: gguf_qwen2,
    gguf_source: gguf::standard_source,
    to_gguf: |spec| to_gguf(spec, "qwen2", gguf_qwen2),
};

/// Qwen3.
pub(super) const QWEN3: Family = Family {
    name: "qwen3",
    model_types: &["qwen3"],
    gguf: &["qwen3"],
    from_config: from_qwen3,
    to_config: to_qwen3,
    source: llama_source,
    from_gguf: |head| with_norms(head, "qwen3"),
    gguf_source: gguf::standard_source,
    to_gguf: |spec| to_gguf(spec, "qwen3", |head| with_norms(head, "qwen3")),
};

/// Qwen3 with experts.
pub(super) const QWEN3_MOE: Family = Family {
    name: "qwen3_moe",
    model_types: &["qwen3_moe"],
    gguf: &["qwen3moe"],
    from_config: from_moe,
    to_config: to_moe,
    source: llama_source,
    from_gguf: |head| with_norms(head, "qwen3_moe"),
    gguf_source: gguf::standard_source,
    to_gguf: |spec| to_gguf(spec, "qwen3moe", |head| with_norms(head, "qwen3_moe")),
};

fn gguf_qwen2(head: &GgufHead) -> Result<Spec, SpecError> {
    gguf::standard(head, "qwen2", RopeStyle::Half)
}

fn to_gguf(spec: &Spec, name: &str, read: fn(&GgufHead) -> Result<Spec, SpecError>) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, name)?;
    if let Some(w) = window(spec).filter(|w| *w < spec.context) {
        keys.notes.push(format!(
            "llama.cpp computes no windows in {name} files: beyond {w} tokens it sees more than this network"
        ));
    }
    gguf_out::verified(spec, keys, read)
}

fn with_norms(head: &GgufHead, arch: &str) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, arch, RopeStyle::Half)?;
    attns(&mut spec).for_each(|a| a.qk_norm = true);
    Ok(spec)
}

fn common(c: &Config, arch: &str) -> Result<Spec, SpecError> {
    if c.get("dual_chunk_attention_config").is_some() {
        return bad("dual_chunk_attention_config is set, which Lacuna does not compute");
    }
    llama_like(c, arch, "hidden_act", rope::common)
}

/// The last layers slide, from `max_window_layers` on; only where `use_sliding_window` says so.
fn set_windows(c: &Config, spec: &mut Spec) -> Result<(), SpecError> {
    let window = if c.bool("use_sliding_window")? { c.opt_usize("sliding_window")? } else { None };
    let from = if window.is_some() { c.usize("max_window_layers")? } else { 0 };
    let windows = c.windows(spec.layers.len(), window, |l| l >= from)?;
    attns(spec).zip(windows).for_each(|(a, w)| a.window = w);
    Ok(())
}

fn write_windows(spec: &Spec, out: &mut Map<String, Value>) {
    out.insert("use_sliding_window".into(), json!(window(spec).is_some()));
    out.insert("sliding_window".into(), json!(window(spec)));
    out.insert("layer_types".into(), layer_types(spec));
}

fn from_qwen2(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "qwen2")?;
    let c = Config(&filled);
    let mut spec = common(&c, "qwen2")?;
    set_windows(&c, &mut spec)?;
    attns(&mut spec).for_each(|a| a.qkv_bias = true);
    Ok(spec)
}

fn to_qwen2(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "qwen2", "Qwen2ForCausalLM")?;
    write_windows(spec, &mut out);
    verified(spec, out, from_qwen2)
}

fn heads_with_norms(c: &Config, arch: &str) -> Result<Spec, SpecError> {
    let mut spec = common(c, arch)?;
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qk_norm, a.qkv_bias, a.o_bias) = (true, bias, bias));
    Ok(spec)
}

fn from_qwen3(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "qwen3")?;
    let c = Config(&filled);
    c.usize("head_dim")?;
    let mut spec = heads_with_norms(&c, "qwen3")?;
    set_windows(&c, &mut spec)?;
    Ok(spec)
}

fn to_qwen3(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "qwen3", "Qwen3ForCausalLM")?;
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    write_windows(spec, &mut out);
    verified(spec, out, from_qwen3)
}

fn from_moe(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "qwen3_moe")?;
    let c = Config(&filled);
    c.usize("num_key_value_heads")?;
    let mut spec = heads_with_norms(&c, "qwen3_moe")?;
    // Here the window, where used, is every layer's.
    let window = if c.bool("use_sliding_window")? { c.opt_usize("sliding_window")? } else { None };
    attns(&mut spec).for_each(|a| a.window = window);
    let experts = Experts {
        count: c.usize("num_experts")?,
        used: c.usize("num_experts_per_tok")?,
        normalize: c.bool("norm_topk_prob")?,
        ..Experts::default()
    };
    let (step, dense) = (c.usize("decoder_sparse_step")?, c.usizes("mlp_only_layers")?);
    let width = c.usize("moe_intermediate_size")?;
    for (l, f) in ffns(&mut spec).enumerate() {
        if experts.count > 0 && step > 0 && (l + 1).is_multiple_of(step) && !dense.contains(&l) {
            (f.width, f.experts) = (width, Some(experts));
        }
    }
    Ok(spec)
}

fn to_moe(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "qwen3_moe", "Qwen3MoeForCausalLM")?;
    let ffns = || spec.layers.iter().enumerate().filter_map(|(l, s)| Some((l, s.ffn.as_ref()?)));
    let Some((f, e)) = ffns().find_map(|(_, f)| Some((f, f.experts?))) else {
        return bad("qwen3_moe without experts");
    };
    let dense: Vec<usize> = ffns().filter(|(_, f)| f.experts.is_none()).map(|(l, _)| l).collect();
    let dense_width = ffns().find(|(_, f)| f.experts.is_none()).map_or(f.width, |(_, f)| f.width);
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("intermediate_size", json!(dense_width));
    set("moe_intermediate_size", json!(f.width));
    set("num_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("norm_topk_prob", json!(e.normalize));
    set("decoder_sparse_step", json!(1));
    set("mlp_only_layers", json!(dense));
    set("attention_bias", json!(first(spec)?.0.qkv_bias));
    set("use_sliding_window", json!(window(spec).is_some()));
    set("sliding_window", json!(window(spec)));
    verified(spec, out, from_moe)
}

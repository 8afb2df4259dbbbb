//! Command R (cohere) and Command R7B (cohere2): attention and FFN side by side behind one LayerNorm without a bias, a
//! factor on the logits, RoPE of neighbours. The first may norm q and k with a scale of its own for each head; in the
//! second most layers see a window, and those that see everything know no positions.

use serde_json::{Map, Value, json};

use super::config::{
    Config, attns, bad, ffns, first, interleave, layer_types, llama_like, llama_source, named_back, num, renamed,
    to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, rope};
use lacuna_spec::{NormKind, NormVectors, Order, QkNorm, RopeStyle, Spec, SpecError};

/// Command R.
pub(super) const COHERE: Family = Family {
    name: "cohere",
    model_types: &["cohere"],
    gguf: &["command-r"],
    from_config: from_cohere,
    to_config: to_cohere,
    source: llama_source,
    from_gguf: gguf_cohere,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf_cohere,
};

/// Command R7B and A.
pub(super) const COHERE2: Family = Family {
    name: "cohere2",
    model_types: &["cohere2"],
    gguf: &["cohere2"],
    from_config: from_cohere2,
    to_config: to_cohere2,
    source: llama_source,
    from_gguf: gguf_cohere2,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf_cohere2,
};

/// What both are, however the file says it.
fn beside(spec: &mut Spec) {
    (spec.norm.kind, spec.norm.vectors) = (NormKind::Layer, NormVectors::Scale);
    spec.layers.iter_mut().for_each(|l| l.order = Order::Shared);
    ffns(spec).for_each(|f| f.pre_norm = false);
}

fn common(mut filled: Value, arch: &str) -> Result<Spec, SpecError> {
    renamed(&mut filled, "layer_norm_eps", "rms_norm_eps");
    let c = Config(&filled);
    let mut spec = llama_like(&c, arch, "hidden_act", rope::common)?;
    interleave(&mut spec);
    beside(&mut spec);
    spec.logit_scale = c.f64("logit_scale")? as f32;
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (bias, bias));
    Ok(spec)
}

fn keys_of(spec: &Spec, model_type: &str, class: &str) -> Result<Map<String, Value>, SpecError> {
    let mut out = to_llama_like(spec, model_type, class)?;
    named_back(&mut out, "rms_norm_eps", "layer_norm_eps");
    out.insert("logit_scale".into(), num(spec.logit_scale));
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    Ok(out)
}

fn own_norms(spec: &mut Spec) {
    attns(spec).for_each(|a| (a.qk_norm, a.qk_norm_over) = (true, QkNorm::Heads));
}

fn from_cohere(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "cohere")?;
    let normed = Config(&filled).bool("use_qk_norm")?;
    let mut spec = common(filled, "cohere")?;
    if normed {
        own_norms(&mut spec);
    }
    Ok(spec)
}

fn to_cohere(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = keys_of(spec, "cohere", "CohereForCausalLM")?;
    out.insert("use_qk_norm".into(), json!(first(spec)?.0.qk_norm));
    verified(spec, out, from_cohere)
}

fn from_cohere2(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "cohere2")?;
    // The class works the heads' width out, whatever the file says.
    filled["head_dim"] = Value::Null;
    let mut spec = common(filled.clone(), "cohere2")?;
    let c = Config(&filled);
    let every = c.usize("sliding_window_pattern")?.max(1);
    let window = c.opt_usize("sliding_window")?;
    if window.is_none() {
        return bad("sliding_window is null, of which transformers makes nothing here");
    }
    let windows = c.windows(spec.layers.len(), window, |l| !(l + 1).is_multiple_of(every))?;
    for (a, w) in attns(&mut spec).zip(windows) {
        a.window = w;
        if w.is_none() {
            a.rope = None;
        }
    }
    Ok(spec)
}

fn to_cohere2(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = keys_of(spec, "cohere2", "Cohere2ForCausalLM")?;
    out.insert("sliding_window".into(), json!(window(spec).unwrap_or(4096)));
    out.insert("layer_types".into(), layer_types(spec));
    verified(spec, out, from_cohere2)
}

fn gguf_cohere(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "cohere", RopeStyle::Interleaved)?;
    beside(&mut spec);
    if head.tensors.contains("blk.0.attn_q_norm.weight") {
        own_norms(&mut spec);
    }
    Ok(spec)
}

fn to_gguf_cohere(spec: &Spec) -> Result<GgufKeys, SpecError> {
    if first(spec)?.0.qk_norm && spec.layers.len() < 64 {
        let what = "llama.cpp reads norms of q and k in command-r files of 64 layers and more alone";
        return Err(SpecError { what: what.into() });
    }
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "command-r")?, gguf_cohere)
}

fn gguf_cohere2(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "cohere2", RopeStyle::Interleaved)?;
    beside(&mut spec);
    let slides = gguf::slides(head, spec.layers.len(), 4)?;
    for (a, slides) in attns(&mut spec).zip(slides).filter(|(_, slides)| !slides) {
        (a.window, a.rope) = (a.window.filter(|_| slides), None);
    }
    Ok(spec)
}

fn to_gguf_cohere2(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "cohere2")?;
    gguf_out::pattern(&mut keys, spec, 4)?;
    gguf_out::verified(spec, keys, gguf_cohere2)
}

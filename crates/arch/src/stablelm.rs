//! StableLM: LayerNorm, a part of each head turns; attention and FFN one after the other, or side by side behind one
//! norm.

use serde_json::{Value, json};

use super::config::{
    Config, attns, bad, ffns, first, llama_like, llama_source, named_back, renamed, to_llama_like, verified,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, rope};
use lacuna_spec::{NormKind, Order, QkNorm, RopeStyle, Spec, SpecError};

/// StableLM.
pub(super) const STABLELM: Family = Family {
    name: "stablelm",
    model_types: &["stablelm"],
    gguf: &["stablelm"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn side_by_side(spec: &mut Spec) {
    spec.layers.iter_mut().for_each(|l| l.order = Order::Shared);
    ffns(spec).for_each(|f| f.pre_norm = false);
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "stablelm")?;
    renamed(&mut filled, "layer_norm_eps", "rms_norm_eps");
    // The class works the heads' width out, whatever the file says.
    filled["head_dim"] = Value::Null;
    let c = Config(&filled);
    if c.bool("qk_layernorm")? {
        return bad("qk_layernorm is true: norms whose every head lies in a tensor of its own are not supported");
    }
    let mut spec = llama_like(&c, "stablelm", "hidden_act", rope::part)?;
    spec.norm.kind = NormKind::Layer;
    let bias = c.bool("use_qkv_bias")?;
    attns(&mut spec).for_each(|a| a.qkv_bias = bias);
    if c.bool("use_parallel_residual")? {
        side_by_side(&mut spec);
    }
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "stablelm", "StableLmForCausalLM")?;
    named_back(&mut out, "rms_norm_eps", "layer_norm_eps");
    out.insert("use_qkv_bias".into(), json!(first(spec)?.0.qkv_bias));
    out.insert("use_parallel_residual".into(), json!(spec.layers.iter().any(|l| l.order == Order::Shared)));
    out.entry("partial_rotary_factor").or_insert(json!(1.0));
    verified(spec, out, from_config)
}

/// llama.cpp goes by the norm before the FFN: where there is none, the parts stand side by side.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::reading(head, "stablelm", RopeStyle::Half, &["use_parallel_residual"])?;
    if !head.tensors.contains("blk.0.ffn_norm.weight") {
        side_by_side(&mut spec);
    }
    if head.tensors.contains("blk.0.attn_q_norm.weight") {
        attns(&mut spec).for_each(|a| (a.qk_norm, a.qk_norm_over) = (true, QkNorm::Heads));
    }
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "stablelm")?;
    let beside = spec.layers.iter().any(|l| l.order == Order::Shared);
    keys.set("use_parallel_residual", GgufValue::Bool(beside));
    gguf_out::verified(spec, keys, from_gguf)
}

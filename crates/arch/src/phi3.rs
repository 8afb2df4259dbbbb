//! Phi-3 and Phi-4-mini: Llama with q, k, v in one matrix and gate, up in another, and longrope.

use serde_json::{Value, json};

use super::config::{Config, attns, llama_like, llama_source, named, to_llama_like, verified, window};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, rope};
use lacuna_spec::{Place, Role};
use lacuna_spec::{RopeStyle, Spec, SpecError};

/// Phi-3.
pub(super) const PHI3: Family = Family {
    name: "phi3",
    model_types: &["phi3"],
    gguf: &["phi3"],
    from_config,
    to_config,
    source: |spec, place| {
        fused(spec, place, "self_attn.qkv_proj", "mlp.gate_up_proj", "model.", "layers", llama_source)
    },
    from_gguf,
    gguf_source: |spec, place| fused(spec, place, "attn_qkv", "ffn_up", "", "blk", gguf::standard_source),
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "phi3")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "phi3", "hidden_act", rope::phi3)?;
    // The class never asks for layer_types.
    let window = c.opt_usize("sliding_window")?;
    attns(&mut spec).for_each(|a| a.window = window);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "phi3", "Phi3ForCausalLM")?;
    out.shift_remove("head_dim");
    out.insert("sliding_window".into(), json!(window(spec)));
    // Without it Phi-3's own class assumes 4096.
    out.entry("original_max_position_embeddings").or_insert(json!(spec.context));
    verified(spec, out, from_config)
}

fn fused(
    spec: &Spec,
    place: &Place,
    qkv: &str,
    gate_up: &str,
    prefix: &str,
    layers: &str,
    others: fn(&Spec, &Place) -> Option<Source>,
) -> Option<Source> {
    let layer = place.layer.and_then(|l| spec.layers.get(l as usize));
    let (module, from, n) = match (place.role, layer.and_then(|l| l.attn.as_ref()), layer.and_then(|l| l.ffn.as_ref()))
    {
        (Role::Q, Some(a), _) => (qkv, 0, a.heads * a.head_dim),
        (Role::K, Some(a), _) => (qkv, a.heads * a.head_dim, a.kv_heads * a.head_dim),
        (Role::V, Some(a), _) => (qkv, (a.heads + a.kv_heads) * a.head_dim, a.kv_heads * a.head_dim),
        (Role::Gate, _, Some(f)) => (gate_up, 0, f.width),
        (Role::Up, _, Some(f)) => (gate_up, f.width, f.width),
        _ => return others(spec, place),
    };
    Some(Source::rows(named(place, prefix, layers, module).name, from, n))
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    gguf::standard(head, "phi3", RopeStyle::Half)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "phi3")?, from_gguf)
}

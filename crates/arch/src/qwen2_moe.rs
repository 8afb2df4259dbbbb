//! Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, and one for every token behind a gate of its own.

use serde_json::{Value, json};

use super::config::{Config, attns, bad, first as first_of, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, moe, rope};
use lacuna_spec::{Experts, Place, Role, RopeStyle, SharedExpert, Spec, SpecError};

/// Qwen2-MoE.
pub(super) const QWEN2_MOE: Family = Family {
    name: "qwen2_moe",
    model_types: &["qwen2_moe"],
    gguf: &["qwen2moe"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "qwen2_moe")?;
    let c = Config(&filled);
    if c.get("dual_chunk_attention_config").is_some() {
        return bad("dual_chunk_attention_config is set, which Lacuna does not compute");
    }
    // The two versions of the class disagree on which layers a window would be for.
    c.only("use_sliding_window", json!(false))?;
    let mut spec = llama_like(&c, "qwen2_moe", "hidden_act", rope::common)?;
    c.windows(spec.layers.len(), None, |_| false)?;
    let bias = c.bool("qkv_bias")?;
    attns(&mut spec).for_each(|a| a.qkv_bias = bias);
    let shared = c.usize("shared_expert_intermediate_size")?;
    let experts = Experts {
        count: c.usize("num_experts")?,
        used: c.usize("num_experts_per_tok")?,
        normalize: c.bool("norm_topk_prob")?,
        shared: Some(SharedExpert { width: shared, gate: true }),
        ..Experts::default()
    };
    let (step, dense) = (c.usize("decoder_sparse_step")?, c.usizes("mlp_only_layers")?);
    let sparse = |l: usize| experts.count > 0 && step > 0 && (l + 1).is_multiple_of(step) && !dense.contains(&l);
    moe::put(&mut spec, c.usize("moe_intermediate_size")?, experts, sparse);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "qwen2_moe", "Qwen2MoeForCausalLM")?;
    let (e, width) = moe::first(spec)?;
    let ffns = || spec.layers.iter().enumerate().filter_map(|(l, s)| Some((l, s.ffn.as_ref()?)));
    let dense: Vec<usize> = ffns().filter(|(_, f)| f.experts.is_none()).map(|(l, _)| l).collect();
    let dense_width = ffns().find(|(_, f)| f.experts.is_none()).map_or(width, |(_, f)| f.width);
    out.remove("head_dim");
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("intermediate_size", json!(dense_width));
    set("moe_intermediate_size", json!(width));
    set("shared_expert_intermediate_size", json!(e.shared.map_or(0, |s| s.width)));
    set("num_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("norm_topk_prob", json!(e.normalize));
    set("decoder_sparse_step", json!(1));
    set("mlp_only_layers", json!(dense));
    set("qkv_bias", json!(first_of(spec)?.0.qkv_bias));
    set("use_sliding_window", json!(false));
    verified(spec, out, from_config)
}

/// Qwen's name of the expert of every token, and Llama's of the rest.
pub(super) fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::SharedGate => "mlp.shared_expert.gate_proj",
        Role::SharedUp => "mlp.shared_expert.up_proj",
        Role::SharedDown => "mlp.shared_expert.down_proj",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(&head.without(&moe::KEYS)?, "qwen2_moe", RopeStyle::Half)?;
    moe::from_gguf(head, &mut spec, false)?;
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    if moe::dense(spec)?.0 > 0 {
        return Err(SpecError { what: "layer 0 has no experts, which all layers of llama.cpp's qwen2moe have".into() });
    }
    let mut k = moe::plain_keys(spec, "qwen2moe")?;
    moe::to_gguf(spec, &mut k)?;
    if moe::first(spec)?.0.normalize {
        k.notes.push("llama.cpp does not make the weights of qwen2moe's experts sum to 1, as this network does".into());
    }
    gguf_out::verified(spec, k, from_gguf)
}

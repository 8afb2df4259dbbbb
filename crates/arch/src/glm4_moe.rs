//! GLM-4.5: experts chosen by sigmoids and a correction, one for every token, a part of each head turned.

use serde_json::{Value, json};

use super::config::{Config, attns, first, llama_like, llama_source, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, moe, rope};
use lacuna_spec::{Place, Role, RopeStyle, RouterScore, Spec, SpecError};

/// GLM-4.5, GLM-4.5-Air, GLM-4.6.
pub(super) const GLM4_MOE: Family = Family {
    name: "glm4_moe",
    model_types: &["glm4_moe"],
    gguf: &["glm4moe"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "glm4_moe")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "glm4_moe", "hidden_act", rope::part)?;
    let (norms, bias) = (c.bool("use_qk_norm")?, c.bool("attention_bias")?);
    attns(&mut spec).for_each(|a| (a.qk_norm, a.qkv_bias) = (norms, bias));
    let mut experts = moe::routing(&c, c.usize("n_routed_experts")?, RouterScore::Sigmoid)?;
    (experts.correction, experts.groups) = (true, moe::groups(&c, 2)?);
    let before = c.usize("first_k_dense_replace")?;
    moe::put(&mut spec, c.usize("moe_intermediate_size")?, experts, |l| l >= before);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "glm4_moe", "Glm4MoeForCausalLM")?;
    let a = first(spec)?.0;
    moe::write_routing(spec, &mut out)?;
    let part = a.rope.as_ref().map_or(1.0, |r| r.dims as f64 / a.head_dim as f64);
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("use_qk_norm", json!(a.qk_norm));
    set("attention_bias", json!(a.qkv_bias));
    set("partial_rotary_factor", json!(part));
    set("num_nextn_predict_layers", json!(0));
    verified(spec, out, from_config)
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    // Its last blocks predict further tokens, which nobody here asks.
    let more = head.usize("nextn_predict_layers")?.unwrap_or(0);
    let layers = head.must("block_count")?.saturating_sub(more);
    let plain = head.without(&moe::KEYS)?.with("block_count", layers)?;
    let mut spec = gguf::standard(&plain, "glm4_moe", RopeStyle::Half)?;
    let norms = head.tensors.contains("blk.0.attn_q_norm.weight");
    attns(&mut spec).for_each(|a| a.qk_norm = norms);
    moe::from_gguf(head, &mut spec, true)?;
    Ok(spec)
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    match place.role {
        // llama.cpp's name for the norm that stands before the FFN here.
        Role::FfnNorm => gguf::standard_source(spec, &Place { role: Role::AttnPostNorm, ..*place }),
        _ => gguf::standard_source(spec, place),
    }
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = moe::plain_keys(spec, "glm4moe")?;
    moe::to_gguf(spec, &mut k)?;
    gguf_out::verified(spec, k, from_gguf)
}

//! HunYuan 1 with experts: norms of heads behind RoPE, one expert for every token.

use serde_json::{Value, json};

use super::config::{Config, attns, first, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::hunyuan::stretched;
use super::{Family, Source, moe, rope};
use lacuna_spec::{Experts, Place, Role, RopeStyle, SharedExpert, Spec, SpecError};

/// HunYuan with experts.
pub(super) const HUNYUAN_MOE: Family = Family {
    name: "hunyuan_v1_moe",
    model_types: &["hunyuan_v1_moe"],
    gguf: &["hunyuan-moe"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn normed(spec: &mut Spec) {
    attns(spec).for_each(|a| (a.qk_norm, a.qk_norm_after_rope) = (true, true));
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "hunyuan_v1_moe")?;
    stretched(&mut filled)?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "hunyuan_v1_moe", "hidden_act", rope::common)?;
    normed(&mut spec);
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (bias, bias));
    let width = c.usize("intermediate_size")?;
    // A number for all layers; lists by layer are refused by their type.
    let (count, used) = (c.usize("num_experts")?, c.usize("moe_topk")?);
    let shared = Some(SharedExpert { width, gate: false });
    moe::put(&mut spec, width, Experts { count, used, normalize: true, shared, ..Experts::default() }, |_| true);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM")?;
    let (e, _) = moe::first(spec)?;
    out.insert("num_experts".into(), json!(e.count));
    out.insert("moe_topk".into(), json!(e.used));
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::QNorm => "self_attn.query_layernorm",
        Role::KNorm => "self_attn.key_layernorm",
        Role::Router => "mlp.gate.wg",
        Role::SharedGate => "mlp.shared_mlp.gate_proj",
        Role::SharedUp => "mlp.shared_mlp.up_proj",
        Role::SharedDown => "mlp.shared_mlp.down_proj",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(&head.without(&moe::KEYS)?, "hunyuan_v1_moe", RopeStyle::Half)?;
    normed(&mut spec);
    moe::from_gguf(head, &mut spec, true)?;
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = moe::plain_keys(spec, "hunyuan-moe")?;
    moe::to_gguf(spec, &mut k)?;
    gguf_out::verified(spec, k, from_gguf)
}

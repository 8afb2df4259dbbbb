//! OLMoE: experts behind one norm over all heads of q and one over all of k.

use serde_json::{Value, json};

use super::config::{Config, attns, first, llama_like, llama_source, num, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, moe, rope};
use lacuna_spec::{Experts, QkNorm, RopeStyle, Spec, SpecError};

/// OLMoE.
pub(super) const OLMOE: Family = Family {
    name: "olmoe",
    model_types: &["olmoe"],
    gguf: &["olmoe"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn normed(spec: &mut Spec) {
    attns(spec).for_each(|a| (a.qk_norm, a.qk_norm_over) = (true, QkNorm::Whole));
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "olmoe")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "olmoe", "hidden_act", rope::common)?;
    normed(&mut spec);
    let (bias, clip) = (c.bool("attention_bias")?, c.opt_f32("clip_qkv")?);
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias, a.clip) = (bias, bias, clip));
    let experts = Experts {
        count: c.usize("num_experts")?,
        used: c.usize("num_experts_per_tok")?,
        normalize: c.bool("norm_topk_prob")?,
        ..Experts::default()
    };
    moe::put(&mut spec, c.usize("intermediate_size")?, experts, |_| true);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "olmoe", "OlmoeForCausalLM")?;
    let ((e, width), a) = (moe::first(spec)?, first(spec)?.0);
    out.remove("head_dim");
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("intermediate_size", json!(width));
    set("num_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("norm_topk_prob", json!(e.normalize));
    set("attention_bias", json!(a.qkv_bias));
    set("clip_qkv", a.clip.map_or(Value::Null, num));
    verified(spec, out, from_config)
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(&head.without(&moe::KEYS)?, "olmoe", RopeStyle::Half)?;
    normed(&mut spec);
    moe::from_gguf(head, &mut spec, false)?;
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = moe::plain_keys(spec, "olmoe")?;
    moe::to_gguf(spec, &mut k)?;
    gguf_out::verified(spec, k, from_gguf)
}

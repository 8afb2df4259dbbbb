//! Seed-OSS: Llama with biases on q, k and v, and apart from them on o.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, rope};
use lacuna_spec::{Place, Role, RopeStyle, Spec, SpecError};

/// Seed-OSS.
pub(super) const SEED_OSS: Family = Family {
    name: "seed_oss",
    model_types: &["seed_oss"],
    gguf: &["seed_oss"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "seed_oss")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "seed_oss", "hidden_act", rope::common)?;
    let (qkv, o, mlp) = (c.bool("attention_bias")?, c.bool("attention_out_bias")?, c.bool("mlp_bias")?);
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (qkv, o));
    ffns(&mut spec).for_each(|f| f.bias = mlp);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "seed_oss", "SeedOssForCausalLM")?;
    let (a, f) = first(spec)?;
    out.insert("attention_bias".into(), json!(a.qkv_bias));
    out.insert("attention_out_bias".into(), json!(a.o_bias));
    out.insert("mlp_bias".into(), json!(f.bias));
    verified(spec, out, from_config)
}

/// The norm before the FFN goes by the name of one behind attention.
fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    match place.role {
        Role::FfnNorm => Some(named(place, "", "blk", "post_attention_norm")),
        _ => gguf::standard_source(spec, place),
    }
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    gguf::standard(head, "seed_oss", RopeStyle::Half)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "seed_oss")?, from_gguf)
}

//! Apertus: norms of heads and xIELU, whose two numbers each layer learns. llama.cpp keeps those among the metadata
//! and not as tensors: GGUF files are refused.

use serde_json::{Value, json};

use super::config::{Config, attns, bad, ffns, first, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::{Family, Source, gguf, rope};
use lacuna_spec::{Activation, Part, Place, Role, RopeScaling, Spec, SpecError};

/// Apertus.
pub(super) const APERTUS: Family = Family {
    name: "apertus",
    model_types: &["apertus"],
    gguf: &["apertus"],
    from_config,
    to_config,
    source,
    from_gguf: |_| Err(SpecError { what: IN_METADATA.into() }),
    gguf_source: gguf::standard_source,
    to_gguf: |_| Err(SpecError { what: IN_METADATA.into() }),
};

const IN_METADATA: &str = "GGUF files of Apertus keep what xIELU learned among the metadata, which Lacuna neither \
                           reads nor writes";

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "apertus")?;
    if let Some(v) = Config(&filled).get("hidden_act").filter(|v| **v != json!("xielu")) {
        return bad(format!("hidden_act is {v}; only \"xielu\" is supported"));
    }
    filled["hidden_act"] = json!("silu");
    let c = Config(&filled);
    let mut spec = llama_like(&c, "apertus", "hidden_act", rope::common)?;
    // What the class takes where the file says nothing of RoPE.
    if c.get("rope_parameters").is_none() && c.get("rope_scaling").is_none() {
        let scaling = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 };
        attns(&mut spec).filter_map(|a| a.rope.as_mut()).for_each(|r| r.scaling = scaling.clone());
    }
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qk_norm, a.qkv_bias, a.o_bias) = (true, bias, bias));
    ffns(&mut spec).for_each(|f| (f.gated, f.act) = (false, Activation::Xielu));
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "apertus", "ApertusForCausalLM")?;
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    out.entry("rope_scaling").or_insert(json!({"rope_type": "default"}));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let number = |name: &str| Some(Source::whole(format!("model.layers.{}.mlp.act_fn.{name}", place.layer?)));
    let module = match (place.role, place.part) {
        (Role::ActAbove, Part::Weight) => return number("alpha_p"),
        (Role::ActBelow, Part::Weight) => return number("alpha_n"),
        (Role::AttnNorm, _) => "attention_layernorm",
        (Role::FfnNorm, _) => "feedforward_layernorm",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

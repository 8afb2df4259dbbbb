//! Helium: Llama whose RoPE turns neighbours. llama.cpp does not know it.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, interleave, llama_like, llama_source, to_llama_like, verified};
use super::defaults::filled;
use super::{Family, gguf, rope};
use lacuna_spec::{Spec, SpecError};

/// Helium.
pub(super) const HELIUM: Family = Family {
    name: "helium",
    model_types: &["helium"],
    gguf: &[],
    from_config,
    to_config,
    source: llama_source,
    from_gguf: |_| Err(SpecError { what: "GGUF files of Helium do not exist".into() }),
    gguf_source: gguf::standard_source,
    to_gguf: |_| Err(SpecError { what: "GGUF files of Helium do not exist".into() }),
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "helium")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "helium", "hidden_act", rope::common)?;
    interleave(&mut spec);
    let (attention, mlp) = (c.bool("attention_bias")?, c.bool("mlp_bias")?);
    attns(&mut spec).for_each(|a| a.qkv_bias = attention);
    ffns(&mut spec).for_each(|f| f.bias = mlp);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "helium", "HeliumForCausalLM")?;
    let (a, f) = first(spec)?;
    out.insert("attention_bias".into(), json!(a.qkv_bias));
    out.insert("mlp_bias".into(), json!(f.bias));
    verified(spec, out, from_config)
}

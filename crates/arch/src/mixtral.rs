//! Mixtral: Mistral with experts. Its GGUF files call themselves llama and are read there.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, llama_like, llama_source, named, to_llama_like, verified, window};
use super::defaults::filled;
use super::{Family, Source, gguf, rope};
use lacuna_spec::{Experts, RopeStyle, Spec, SpecError};
use lacuna_spec::{Place, Role};

/// Mixtral.
pub(super) const MIXTRAL: Family = Family {
    name: "mixtral",
    model_types: &["mixtral"],
    gguf: &[],
    from_config,
    to_config,
    source,
    from_gguf: |head| gguf::standard(head, "mixtral", RopeStyle::Interleaved),
    gguf_source: gguf::standard_source,
    to_gguf: super::llama::to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "mixtral")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "mixtral", "hidden_act", rope::common)?;
    // The softmax runs over the chosen experts only, which is the same as making the chosen ones' shares sum to 1.
    let (count, used) = (c.usize("num_local_experts")?, c.usize("num_experts_per_tok")?);
    let experts = Experts { count, used, normalize: true, ..Experts::default() };
    ffns(&mut spec).for_each(|f| f.experts = Some(experts));
    // The class never asks for layer_types.
    let window = c.opt_usize("sliding_window")?;
    attns(&mut spec).for_each(|a| a.window = window);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "mixtral", "MixtralForCausalLM")?;
    if let Some(e) = first(spec)?.1.experts {
        out.insert("num_local_experts".into(), json!(e.count));
        out.insert("num_experts_per_tok".into(), json!(e.used));
    }
    out.insert("sliding_window".into(), json!(window(spec)));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match (place.role, place.expert) {
        (Role::Router, _) => "block_sparse_moe.gate".into(),
        (Role::Gate, Some(e)) => format!("block_sparse_moe.experts.{e}.w1"),
        (Role::Down, Some(e)) => format!("block_sparse_moe.experts.{e}.w2"),
        (Role::Up, Some(e)) => format!("block_sparse_moe.experts.{e}.w3"),
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", &module))
}

//! ERNIE 4.5 with experts: chosen by a softmax and a correction, one for every token; RoPE pairs neighbours.

use serde_json::{Value, json};

use super::config::{Config, attns, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, moe, rope};
use lacuna_spec::{Experts, Place, Role, RopeStyle, SharedExpert, Spec, SpecError};

/// ERNIE-4.5-21B-A3B and its relatives.
pub(super) const ERNIE4_5_MOE: Family = Family {
    name: "ernie4_5_moe",
    model_types: &["ernie4_5_moe"],
    gguf: &["ernie4_5-moe"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "ernie4_5_moe")?;
    let c = Config(&filled);
    // The two versions of the class disagree on what has one.
    c.only("use_bias", json!(false))?;
    let mut spec = llama_like(&c, "ernie4_5_moe", "hidden_act", rope::common)?;
    attns(&mut spec).for_each(|a| a.rope.iter_mut().for_each(|r| r.style = RopeStyle::Interleaved));
    let (width, count) = (c.usize("moe_intermediate_size")?, c.usize("moe_num_experts")?);
    let shared = c.usize("moe_num_shared_experts")?.saturating_mul(width);
    let experts = Experts {
        count,
        used: c.usize("moe_k")?,
        normalize: true,
        correction: true,
        shared: (shared > 0).then_some(SharedExpert { width: shared, gate: false }),
        ..Experts::default()
    };
    let (first, step) = (c.usize("moe_layer_start_index")?, c.usize("moe_layer_interval")?);
    // -1: the last one.
    let last = c.get("moe_layer_end_index").filter(|v| **v != json!(-1));
    let last = if last.is_some() { c.usize("moe_layer_end_index")? } else { usize::MAX };
    moe::put(&mut spec, width, experts, |l| step > 0 && (l + 1).is_multiple_of(step) && l >= first && l <= last);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    // Written as a class that turns halves would be.
    let mut plain = spec.clone();
    attns(&mut plain).for_each(|a| a.rope.iter_mut().for_each(|r| r.style = RopeStyle::Half));
    let mut out = to_llama_like(&plain, "ernie4_5_moe", "Ernie4_5_MoeForCausalLM")?;
    let ((e, width), (before, dense_width)) = (moe::first(spec)?, moe::dense(spec)?);
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("intermediate_size", json!(dense_width));
    set("moe_intermediate_size", json!(width));
    set("moe_num_experts", json!(e.count));
    set("moe_k", json!(e.used));
    set("moe_num_shared_experts", json!(e.shared.map_or(0, |s| s.width / width.max(1))));
    set("moe_layer_start_index", json!(before));
    set("moe_layer_end_index", json!(-1));
    set("moe_layer_interval", json!(1));
    set("use_bias", json!(false));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    match place.role {
        Role::Correction => {
            let mut s = named(place, "model.", "layers", "mlp.moe_statics.e_score_correction_bias");
            s.name = s.name.trim_end_matches(".weight").into();
            Some(s)
        }
        _ => llama_source(spec, place),
    }
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    if let Some(n) = head.usize("interleave_moe_layer_step")?.filter(|n| *n > 1) {
        return Err(SpecError { what: format!("metadata: interleave_moe_layer_step is {n}; only 1 is read") });
    }
    let mut spec = gguf::standard(&head.without(&moe::KEYS)?, "ernie4_5_moe", RopeStyle::Interleaved)?;
    moe::from_gguf(head, &mut spec, true)?;
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = moe::plain_keys(spec, "ernie4_5-moe")?;
    moe::to_gguf(spec, &mut k)?;
    k.number("interleave_moe_layer_step", 1)?;
    if k.pairs.iter().all(|(key, _)| !key.ends_with(".leading_dense_block_count")) {
        k.number("leading_dense_block_count", 0)?;
    }
    gguf_out::verified(spec, k, from_gguf)
}

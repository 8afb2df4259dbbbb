//! GLM-4 of 2024 (glm) and of 2025 (glm4): half of each head turns, neighbours together; gate and up in one matrix. The
//! newer one has norms before and after each part.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, interleave, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out;
use super::{Family, Source, rope};
use lacuna_spec::{Place, Role, RopeStyle, Spec, SpecError};

/// GLM. llama.cpp calls it chatglm.
pub(super) const GLM: Family = Family {
    name: "glm",
    model_types: &["glm"],
    gguf: &["chatglm"],
    from_config: |config| from_config(config, "glm"),
    to_config: |spec| verified(spec, keys_of(spec, "glm", "GlmForCausalLM")?, |c| from_config(c, "glm")),
    source: |spec, place| fused(spec, place, "model.", "layers", "mlp.gate_up_proj", llama_source),
    from_gguf: from_chatglm,
    gguf_source: |spec, place| fused(spec, place, "", "blk", "ffn_up", gguf::standard_source),
    to_gguf: |spec| gguf_out::verified(spec, gguf_out::standard_keys(spec, "chatglm")?, from_chatglm),
};

/// GLM-4-0414.
pub(super) const GLM4: Family = Family {
    name: "glm4",
    model_types: &["glm4"],
    gguf: &["glm4"],
    from_config: |config| from_config(config, "glm4"),
    to_config: |spec| verified(spec, keys_of(spec, "glm4", "Glm4ForCausalLM")?, |c| from_config(c, "glm4")),
    source: |spec, place| fused(spec, place, "model.", "layers", "mlp.gate_up_proj", newer),
    from_gguf: from_glm4,
    gguf_source: |spec, place| fused(spec, place, "", "blk", "ffn_up", gguf::standard_source),
    to_gguf: |spec| gguf_out::verified(spec, gguf_out::standard_keys(spec, "glm4")?, from_glm4),
};

fn sandwich(spec: &mut Spec) {
    attns(spec).for_each(|a| a.post_norm = true);
    ffns(spec).for_each(|f| f.post_norm = true);
}

fn from_config(config: &Value, arch: &str) -> Result<Spec, SpecError> {
    let filled = filled(config, arch)?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, arch, "hidden_act", rope::part)?;
    interleave(&mut spec);
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| a.qkv_bias = bias);
    if arch == "glm4" {
        sandwich(&mut spec);
    }
    Ok(spec)
}

fn keys_of(spec: &Spec, model_type: &str, class: &str) -> Result<serde_json::Map<String, Value>, SpecError> {
    let mut out = to_llama_like(spec, model_type, class)?;
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    out.entry("partial_rotary_factor").or_insert(json!(1.0));
    Ok(out)
}

/// Gate and up lie in one matrix.
fn fused(
    spec: &Spec,
    place: &Place,
    prefix: &str,
    layers: &str,
    module: &str,
    others: fn(&Spec, &Place) -> Option<Source>,
) -> Option<Source> {
    let from = match place.role {
        Role::Gate => 0,
        Role::Up => 1,
        _ => return others(spec, place),
    };
    let width = spec.layers.get(place.layer? as usize)?.ffn.as_ref()?.width;
    Some(Source::rows(named(place, prefix, layers, module).name, from * width, width))
}

fn newer(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::AttnPostNorm => "post_self_attn_layernorm",
        Role::FfnPostNorm => "post_mlp_layernorm",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn from_chatglm(head: &GgufHead) -> Result<Spec, SpecError> {
    gguf::standard(head, "glm", RopeStyle::Interleaved)
}

fn from_glm4(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "glm4", RopeStyle::Interleaved)?;
    sandwich(&mut spec);
    Ok(spec)
}

//! Granite 3 with experts: Granite's factors, experts in tensors of three axes with gate above up.

use serde_json::{Value, json};

use super::config::{Config, attns, first, llama_like, llama_source, num, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::granite::divisor;
use super::{Family, Source, moe, rope};
use lacuna_spec::{Experts, Part, Place, Role, RopeStyle, Spec, SpecError};

/// Granite with experts.
pub(super) const GRANITEMOE: Family = Family {
    name: "granitemoe",
    model_types: &["granitemoe"],
    gguf: &["granitemoe"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "granitemoe")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "granitemoe", "hidden_act", rope::common)?;
    spec.embed_scale = c.f64("embedding_multiplier")? as f32;
    spec.residual_scale = c.f64("residual_multiplier")? as f32;
    spec.logit_scale = (1.0 / c.f64("logits_scaling")?) as f32;
    let (scale, bias) = (c.f64("attention_multiplier")? as f32, c.bool("attention_bias")?);
    attns(&mut spec).for_each(|a| (a.scale, a.qkv_bias, a.o_bias) = (scale, bias, bias));
    // A softmax over the chosen logits is one over all made to sum to 1.
    let (count, used) = (c.usize("num_local_experts")?, c.usize("num_experts_per_tok")?);
    let experts = Experts { count, used, normalize: true, ..Experts::default() };
    moe::put(&mut spec, c.usize("intermediate_size")?, experts, |_| true);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "granitemoe", "GraniteMoeForCausalLM")?;
    let ((e, width), a) = (moe::first(spec)?, first(spec)?.0);
    out.remove("head_dim");
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("intermediate_size", json!(width));
    set("num_local_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("embedding_multiplier", num(spec.embed_scale));
    set("residual_multiplier", num(spec.residual_scale));
    set("attention_multiplier", num(a.scale));
    set("logits_scaling", json!(divisor(spec.logit_scale)));
    set("attention_bias", json!(a.qkv_bias));
    verified(spec, out, from_config)
}

/// Experts of a layer in two tensors, gate above up.
pub(super) fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let l = place.layer;
    let width = l.and_then(|l| spec.layers.get(l as usize)?.ffn.as_ref()).map_or(0, |f| f.width);
    let (module, rows) = match place.role {
        Role::Router => ("router.layer", None),
        Role::Gate => ("input_linear", Some((0, width))),
        Role::Up => ("input_linear", Some((width, 2 * width))),
        Role::Down => ("output_linear", None),
        _ => return llama_source(spec, place),
    };
    let name = format!("model.layers.{}.block_sparse_moe.{module}.weight", l?);
    let slice = place.expert.map(|e| e as usize);
    (place.part == Part::Weight).then_some(Source { rows, slice, ..Source::whole(name) })
}

const KEYS: [&str; 2] = ["embedding_scale", "residual_scale"];

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let plain = head.without(&moe::KEYS)?.without(&KEYS)?;
    let mut spec = gguf::standard(&plain, "granitemoe", RopeStyle::Interleaved)?;
    let factor = |key: &str| Ok::<_, SpecError>(head.f32(key)?.filter(|x| *x != 0.0).unwrap_or(1.0));
    spec.embed_scale = factor("embedding_scale")?;
    spec.residual_scale = factor("residual_scale")?;
    // What the file calls a scale divides here.
    spec.logit_scale = (1.0 / f64::from(factor("logit_scale")?)) as f32;
    moe::from_gguf(head, &mut spec, true)?;
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = moe::plain_keys(&Spec { logit_scale: 1.0, ..spec.clone() }, "granitemoe")?;
    k.set("logit_scale", GgufValue::F32(divisor(spec.logit_scale) as f32));
    k.set("embedding_scale", GgufValue::F32(spec.embed_scale));
    k.set("residual_scale", GgufValue::F32(spec.residual_scale));
    k.set("attention.scale", GgufValue::F32(first(spec)?.0.scale));
    moe::to_gguf(spec, &mut k)?;
    gguf_out::verified(spec, k, from_gguf)
}

//! OLMo 1, 2 and 3. The first has LayerNorms that learn nothing and may cut q, k and v; the others have norms behind
//! their parts only, and one over all heads of q and of k; in the third most layers see a window.

use serde_json::{Map, Value, json};

use super::config::{
    Config, attns, ffns, first, layer_types, llama_like, llama_source, named, num, to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, Source, rope};
use lacuna_spec::{NormKind, NormVectors, Place, QkNorm, Role, RopeScaling, RopeStyle, Spec, SpecError};

/// OLMo.
pub(super) const OLMO: Family = Family {
    name: "olmo",
    model_types: &["olmo"],
    gguf: &["olmo"],
    from_config: from_olmo,
    to_config: to_olmo,
    source: llama_source,
    from_gguf: gguf_olmo,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf_olmo,
};

/// OLMo 2.
pub(super) const OLMO2: Family = Family {
    name: "olmo2",
    model_types: &["olmo2"],
    gguf: &["olmo2"],
    from_config: from_olmo2,
    to_config: to_olmo2,
    source,
    from_gguf: gguf_behind,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf_behind,
};

/// OLMo 3. Its GGUF files call themselves olmo2.
pub(super) const OLMO3: Family = Family {
    name: "olmo3",
    model_types: &["olmo3"],
    gguf: &[],
    from_config: from_olmo3,
    to_config: to_olmo3,
    source,
    from_gguf: gguf_behind,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf_behind,
};

/// LayerNorms without vectors; the class knows one epsilon alone.
fn bare(spec: &mut Spec) {
    (spec.norm.kind, spec.norm.vectors) = (NormKind::Layer, NormVectors::None);
}

fn from_olmo(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "olmo")?;
    filled["rms_norm_eps"] = json!(1e-5);
    let c = Config(&filled);
    let mut spec = llama_like(&c, "olmo", "hidden_act", rope::common)?;
    bare(&mut spec);
    let (bias, clip) = (c.bool("attention_bias")?, c.opt_f32("clip_qkv")?);
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias, a.clip) = (bias, bias, clip));
    Ok(spec)
}

fn to_olmo(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "olmo", "OlmoForCausalLM")?;
    out.shift_remove("rms_norm_eps");
    let a = first(spec)?.0;
    out.insert("attention_bias".into(), json!(a.qkv_bias));
    out.insert("clip_qkv".into(), a.clip.map_or(Value::Null, num));
    verified(spec, out, from_olmo)
}

fn gguf_olmo(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::reading(head, "olmo", RopeStyle::Interleaved, &["attention.clamp_kqv"])?;
    bare(&mut spec);
    let clip = head.f32("attention.clamp_kqv")?.filter(|c| *c > 0.0);
    attns(&mut spec).for_each(|a| a.clip = clip);
    Ok(spec)
}

fn to_gguf_olmo(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "olmo")?;
    if let Some(clip) = first(spec)?.0.clip {
        keys.set("attention.clamp_kqv", GgufValue::F32(clip));
    }
    gguf_out::verified(spec, keys, gguf_olmo)
}

/// Norms behind the parts and over all heads.
fn behind(spec: &mut Spec) {
    for a in attns(spec) {
        (a.pre_norm, a.post_norm, a.qk_norm, a.qk_norm_over) = (false, true, true, QkNorm::Whole);
    }
    ffns(spec).for_each(|f| (f.pre_norm, f.post_norm) = (false, true));
}

fn from_olmo2(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "olmo2")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "olmo2", "hidden_act", rope::common)?;
    behind(&mut spec);
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (bias, bias));
    Ok(spec)
}

fn to_olmo2(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "olmo2", "Olmo2ForCausalLM")?;
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    verified(spec, out, from_olmo2)
}

fn from_olmo3(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "olmo3")?;
    // The class takes `rope_theta` for the layers that see everything; the others have its default.
    filled["theta of windows"] = json!(5e5);
    let c = Config(&filled);
    let mut spec = llama_like(&c, "olmo3", "hidden_act", rope::of_full_layers)?;
    behind(&mut spec);
    let bias = c.bool("attention_bias")?;
    let windows = c.windows(spec.layers.len(), c.opt_usize("sliding_window")?, |l| !(l + 1).is_multiple_of(4))?;
    for (a, w) in attns(&mut spec).zip(windows) {
        (a.qkv_bias, a.o_bias, a.window) = (bias, bias, w);
        if w.is_some() {
            a.rope = Some(rope::of_sliding_layers(&c, a.head_dim, "theta of windows")?);
        }
    }
    Ok(spec)
}

fn to_olmo3(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "olmo3", "Olmo3ForCausalLM")?;
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    out.insert("sliding_window".into(), json!(window(spec)));
    out.insert("layer_types".into(), layer_types(spec));
    out.insert("rope_parameters".into(), by_type(spec)?);
    ["rope_theta", "rope_scaling"].iter().for_each(|key| drop(out.shift_remove(*key)));
    verified(spec, out, from_olmo3)
}

/// A set of RoPE for each type of layer that there is.
fn by_type(spec: &Spec) -> Result<Value, SpecError> {
    let mut sets = Map::new();
    for a in spec.layers.iter().filter_map(|l| l.attn.as_ref()) {
        let kind = if a.window.is_some() { "sliding_attention" } else { "full_attention" };
        let Some(r) = a.rope.as_ref().filter(|_| !sets.contains_key(kind)) else { continue };
        let mut one = Map::new();
        rope::to_config(r, (a.head_dim, false), spec.context, &mut one)?;
        let mut set = one.shift_remove("rope_scaling").unwrap_or(json!({"rope_type": "default"}));
        set["rope_theta"] = num(r.theta);
        sets.insert(kind.into(), set);
    }
    Ok(Value::Object(sets))
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::AttnPostNorm => "post_attention_layernorm",
        Role::FfnPostNorm => "post_feedforward_layernorm",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

/// With a window it is an OLMo 3, whose layers with one turn without scaling.
fn gguf_behind(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "olmo2", RopeStyle::Half)?;
    behind(&mut spec);
    let Some(w) = window(&spec) else { return Ok(spec) };
    spec.arch = "olmo3".into();
    let slides = gguf::slides(head, spec.layers.len(), 4)?;
    for (a, slides) in attns(&mut spec).zip(slides) {
        a.window = slides.then_some(w);
        if let Some(r) = a.rope.as_mut().filter(|_| slides) {
            r.scaling = RopeScaling::Default;
        }
    }
    Ok(spec)
}

fn to_gguf_behind(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "olmo2")?;
    if window(spec).is_some() {
        gguf_out::pattern(&mut keys, spec, 4)?;
    }
    gguf_out::verified(spec, keys, gguf_behind)
}

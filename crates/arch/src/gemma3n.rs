//! Gemma 3n, its text part: several residual streams (AltUp), LAuReL beside attention, gates that are cut off, inputs of
//! single layers, last layers that read the keys and values of earlier ones.
//!
//! Of factors on embeddings `gemma.rs` says what is rounded. Norms keep their scale itself here.

use serde_json::{Map, Value, json};

use super::config::{self, Config, attns, bad, ffns, first, layer_types, named, num, to_llama_like, verified, window};
use super::defaults::filled;
use super::gemma::{dtype_of, embed_scale};
use super::gemma4;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::llama4::text_part;
use super::{Family, Source, rope};
use lacuna_spec::{Activation, AltUp, Place, Role, RopeScaling, RopeStyle, Spec, SpecError};

/// Gemma 3n.
pub(super) const GEMMA3N: Family = Family {
    name: "gemma3n",
    model_types: &["gemma3n_text", "gemma3n"],
    gguf: &["gemma3n"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

/// What every layer has, and which read the keys of earlier ones.
fn finish(spec: &mut Spec, shared: usize, laurel: usize) -> Result<(), SpecError> {
    let first = spec.layers.len() - shared;
    let sliding: Vec<bool> = attns(spec).map(|a| a.window.is_some()).collect();
    for (l, a) in attns(spec).enumerate() {
        (a.scale, a.qk_norm, a.post_norm, a.v_norm) = (1.0, true, true, true);
        if shared > 0 && l >= first {
            let Some(from) = (0..first).rev().find(|s| sliding[*s] == sliding[l]) else {
                return bad(format!("num_kv_shared_layers: layer {l} finds no earlier layer of its type to read from"));
            };
            (a.kv_from, a.v_norm) = (Some(from), false);
        }
    }
    ffns(spec).for_each(|f| f.post_norm = true);
    spec.layers.iter_mut().for_each(|l| l.laurel = Some(laurel));
    Ok(())
}

fn altup(hidden: usize, inputs: usize, active: usize, scaled: bool) -> AltUp {
    AltUp { inputs, active, router_scale: (1.0 / hidden as f64) as f32, scaled }
}

/// One number for all layers, or a list of them.
fn each(c: &Config, key: &str, layers: usize) -> Result<Vec<usize>, SpecError> {
    if c.get(key).is_some_and(Value::is_array) {
        let list = c.usizes(key)?;
        if list.len() != layers {
            return bad(format!("{key} has {} entries for {layers} layers", list.len()));
        }
        return Ok(list);
    }
    let one = c.usize(key)?;
    Ok(vec![one; layers.min(4096)])
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(&text_part(config)?, "gemma3n")?;
    let widths = {
        let c = Config(&filled);
        each(&c, "intermediate_size", c.usize("num_hidden_layers")?)?
    };
    filled["intermediate_size"] = json!(widths.first().copied().unwrap_or(1));
    let c = Config(&filled);
    let mut spec = config::llama_like(&c, "gemma3n", "hidden_activation", rope::of_full_layers)?;
    let layers = spec.layers.len();
    spec.embed_scale = embed_scale(spec.hidden, dtype_of(&c)?);
    spec.logit_softcap = c.opt_f32("final_logit_softcapping")?;
    let windows = c.windows(layers, c.opt_usize("sliding_window")?, |l| !(l + 1).is_multiple_of(5))?;
    let local = rope::of_sliding_layers(&c, c.usize("head_dim")?, "rope_local_base_freq")?;
    let bias = c.bool("attention_bias")?;
    for (a, w) in attns(&mut spec).zip(windows) {
        (a.window, a.qkv_bias, a.o_bias) = (w, bias, bias);
        if w.is_some() {
            a.rope = Some(local.clone());
        }
    }
    let cut: Vec<f32> = match c.get("activation_sparsity_pattern") {
        None => (0..layers).map(|l| if layers > 10 && l < 10 { 0.95 } else { 0.0 }).collect(),
        Some(_) => c.f32s("activation_sparsity_pattern")?,
    };
    if cut.len() != layers {
        return bad(format!("activation_sparsity_pattern has {} entries for {layers} layers", cut.len()));
    }
    for ((f, width), cut) in ffns(&mut spec).zip(widths).zip(cut) {
        (f.width, f.sparsity) = (width, Some(cut).filter(|s| *s > 0.0));
    }
    let shared = c.opt_usize("num_kv_shared_layers")?.unwrap_or(0);
    if shared >= layers.max(1) {
        return bad(format!("num_kv_shared_layers is {shared} of {layers} layers: none is left to read from"));
    }
    finish(&mut spec, shared, c.usize("laurel_rank")?)?;
    let (n, active) = (c.usize("altup_num_inputs")?, c.usize("altup_active_idx")?);
    spec.altup = Some(altup(spec.hidden, n, active, c.bool("altup_correct_scale")?));
    let (width, vocab) = (c.usize("hidden_size_per_layer_input")?, c.usize("vocab_size_per_layer_input")?);
    let act = c.activation("hidden_activation")?;
    let inputs = gemma4::layer_inputs(width, vocab, spec.hidden, dtype_of(&c)?);
    spec.layer_inputs = Some(lacuna_spec::LayerInputs { act, ..inputs });
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out: Map<String, Value> = to_llama_like(spec, "gemma3n_text", "Gemma3nForCausalLM")?;
    let (Some(how), Some(inputs)) = (spec.altup, spec.layer_inputs) else {
        return Err(SpecError { what: "gemma3n without several streams, or without inputs of layers".into() });
    };
    let ffns = || spec.layers.iter().filter_map(|l| l.ffn.as_ref());
    let act = out.shift_remove("hidden_act");
    for key in ["rope_theta", "rope_scaling", "partial_rotary_factor"] {
        out.shift_remove(key);
    }
    let mut sets = Map::new();
    for (kind, sliding) in [("full_attention", false), ("sliding_attention", true)] {
        if let Some(a) = gemma4::some_attn(spec, sliding) {
            sets.insert(kind.into(), rope::set_for(a.rope.as_ref(), spec)?);
        }
    }
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("hidden_activation", json!(act));
    set("rope_parameters", Value::Object(sets));
    set("intermediate_size", ffns().map(|f| f.width).collect());
    set("activation_sparsity_pattern", ffns().map(|f| f.sparsity.map_or(json!(0.0), num)).collect());
    set("dtype", json!(gemma4::dtype_for(spec)));
    set("attention_bias", json!(first(spec)?.0.qkv_bias));
    set("sliding_window", json!(window(spec).unwrap_or(512)));
    set("layer_types", layer_types(spec));
    set("final_logit_softcapping", spec.logit_softcap.map_or(Value::Null, num));
    set("num_kv_shared_layers", json!(gemma4::shared_layers(spec)));
    set("laurel_rank", json!(spec.layers.iter().find_map(|l| l.laurel)));
    set("altup_num_inputs", json!(how.inputs));
    set("altup_active_idx", json!(how.active));
    set("altup_correct_scale", json!(how.scaled));
    set("hidden_size_per_layer_input", json!(inputs.width));
    set("vocab_size_per_layer_input", json!(inputs.vocab));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let stream = |name: &str| Some(Source::whole(format!("model.{name}.{}.weight", place.expert?.checked_sub(1)?)));
    let module = match place.role {
        Role::AltupIn => return stream("altup_projections"),
        Role::AltupOut => return stream("altup_unembed_projections"),
        Role::AltupScale => {
            return Some(Source::whole(format!("model.layers.{}.altup.correct_output_scale", place.layer?)));
        }
        Role::AltupRouter => "altup.modality_router",
        Role::AltupRouterNorm => "altup.router_norm",
        Role::AltupPredict => "altup.prediction_coefs",
        Role::AltupCorrect => "altup.correction_coefs",
        Role::LaurelIn => "laurel.linear_left",
        Role::LaurelOut => "laurel.linear_right",
        Role::LaurelNorm => "laurel.post_laurel_norm",
        _ => return gemma4::source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

/// What llama.cpp knows by the name alone.
const STREAMS: usize = 4;
const RANK: usize = 64;
const INPUT: usize = 256;
const OWN_KEYS: usize = 20;
const CUT_LAYERS: usize = 10;
const CUT: f32 = 0.95;

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::reading(head, "gemma3n", RopeStyle::Half, &["attention.shared_kv_layers"])?;
    spec.embed_scale = embed_scale(spec.hidden, "float32");
    let layers = spec.layers.len();
    let slides = gguf::slides(head, layers, 5)?;
    let local = head.f32("rope.freq_base_swa")?.unwrap_or(10000.0);
    let window = head.must("attention.sliding_window")?;
    for (l, a) in attns(&mut spec).enumerate() {
        a.window = slides.get(l).copied().unwrap_or(false).then_some(window);
        if let Some(r) = a.rope.as_mut().filter(|_| a.window.is_some()) {
            (r.theta, r.scaling) = (local, RopeScaling::Default);
        }
    }
    for (l, f) in ffns(&mut spec).enumerate() {
        (f.act, f.sparsity) = (Activation::GeluTanh, (l < CUT_LAYERS).then_some(CUT));
    }
    finish(&mut spec, layers.saturating_sub(OWN_KEYS), RANK)?;
    spec.altup = Some(altup(spec.hidden, STREAMS, 0, true));
    spec.layer_inputs = Some(gemma4::layer_inputs(INPUT, spec.vocab, spec.hidden, "float32"));
    Ok(spec)
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    let stream = |name: &str| {
        let slice = Some(place.expert?.checked_sub(1)? as usize);
        Some(Source { slice, ..Source::whole(format!("{name}.weight")) })
    };
    let module = match place.role {
        Role::AltupIn => return stream("altup_proj"),
        Role::AltupOut => return stream("altup_unembd_proj"),
        Role::AltupScale => "altup_correct_scale",
        Role::AltupRouter => "altup_router",
        Role::AltupRouterNorm => "altup_router_norm",
        Role::AltupPredict => "altup_predict_coef",
        Role::AltupCorrect => "altup_correct_coef",
        Role::LaurelIn => "laurel_l",
        Role::LaurelOut => "laurel_r",
        Role::LaurelNorm => "laurel_post_norm",
        _ => return gemma4::gguf_source(spec, place),
    };
    Some(named(place, "", "blk", module))
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    if !spec.shared_keys().is_empty() {
        let what =
            "llama.cpp wants k and v of layers that read those of earlier ones, which this network does not have";
        return Err(SpecError { what: what.into() });
    }
    let mut k = gguf_out::standard_keys(spec, "gemma3n")?;
    let local = gemma4::some_attn(spec, true).and_then(|a| a.rope.as_ref()).map_or(10000.0, |r| r.theta);
    k.set("rope.freq_base_swa", GgufValue::F32(local));
    gguf_out::pattern(&mut k, spec, 5)?;
    k.number("embedding_length_per_layer_input", spec.layer_inputs.map_or(0, |i| i.width))?;
    k.number("altup.num_inputs", spec.altup.map_or(0, |a| a.inputs))?;
    k.number("altup.active_idx", spec.altup.map_or(0, |a| a.active))?;
    gguf_out::verified(spec, k, from_gguf)
}

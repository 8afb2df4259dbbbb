//! Gemma 1, 2 and 3: scaled embeddings; from the second on norms before and after each part, layers that see a window
//! and layers that see everything.
//!
//! The embedding's factor is `sqrt(hidden)` as transformers applies it: rounded to the dtype that the configuration
//! names (bf16 for the published files, which were trained so). llama.cpp keeps it in f32, and so do GGUF files here.
//! Safetensors keep a norm's scale minus one; GGUF files keep the scale itself.

use serde_json::{Map, Value, json};

use super::config::{
    Config, attns, bad, ffns, first, inverse_root, layer_types, llama_like, llama_source, num, to_llama_like,
};
use super::config::{named, verified, window};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, Source, rope};
use lacuna_spec::{Activation, RopeScaling, RopeStyle, Spec, SpecError};
use lacuna_spec::{Place, Role};

/// Gemma.
pub(super) const GEMMA: Family = Family {
    name: "gemma",
    model_types: &["gemma"],
    gguf: &["gemma"],
    from_config: from_gemma,
    to_config: to_gemma,
    source: llama_source,
    from_gguf: from_gguf1,
    gguf_source: gguf::standard_source,
    to_gguf: |spec| gguf_out::verified(spec, gguf_out::standard_keys(spec, "gemma")?, from_gguf1),
};

/// Gemma 2.
pub(super) const GEMMA2: Family = Family {
    name: "gemma2",
    model_types: &["gemma2"],
    gguf: &["gemma2"],
    from_config: from_gemma2,
    to_config: to_gemma2,
    source,
    from_gguf: from_gguf2,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf2,
};

/// Gemma 3, its text part.
pub(super) const GEMMA3: Family = Family {
    name: "gemma3",
    model_types: &["gemma3_text", "gemma3"],
    gguf: &["gemma3"],
    from_config: from_gemma3,
    to_config: to_gemma3,
    source,
    from_gguf: from_gguf3,
    gguf_source: gguf::standard_source,
    to_gguf: to_gguf3,
};

/// `sqrt(hidden)` rounded to a dtype by its name.
pub(super) fn embed_scale(hidden: usize, dtype: &str) -> f32 {
    let x = (hidden as f64).sqrt() as f32;
    match dtype {
        "bfloat16" => lacuna_base::float::round_bf16(x),
        "float16" => lacuna_base::float::round_f16(x),
        _ => x,
    }
}

/// What both share; `c` has its defaults.
fn common(c: &Config, arch: &str, rope: rope::Reader) -> Result<Spec, SpecError> {
    c.only("use_bidirectional_attention", json!(false))?;
    for key in ["num_key_value_heads", "head_dim"] {
        c.usize(key)?;
    }
    let mut spec = llama_like(c, arch, "hidden_activation", rope)?;
    spec.embed_scale = embed_scale(spec.hidden, dtype_of(c)?);
    spec.norm.offset = 1.0;
    spec.logit_softcap = c.opt_f32("final_logit_softcapping")?;
    let scale = inverse_root(c.f64("query_pre_attn_scalar")?);
    let bias = c.bool("attention_bias")?;
    ffns(&mut spec).for_each(|f| f.post_norm = true);
    for a in attns(&mut spec) {
        (a.scale, a.post_norm, a.qkv_bias, a.o_bias) = (scale, true, bias, bias);
    }
    Ok(spec)
}

fn from_gemma(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "gemma")?;
    // The first files said gelu and meant the one through tanh.
    if filled["hidden_act"] == json!("gelu") {
        filled["hidden_act"] = json!("gelu_pytorch_tanh");
    }
    let c = Config(&filled);
    c.only("use_bidirectional_attention", json!(false))?;
    let mut spec = llama_like(&c, "gemma", "hidden_act", rope::common)?;
    spec.embed_scale = embed_scale(spec.hidden, dtype_of(&c)?);
    spec.norm.offset = 1.0;
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (bias, bias));
    Ok(spec)
}

fn to_gemma(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "gemma", "GemmaForCausalLM")?;
    out.insert("dtype".into(), json!(dtype_for(spec)));
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    verified(spec, out, from_gemma)
}

fn from_gguf1(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "gemma", RopeStyle::Half)?;
    spec.embed_scale = embed_scale(spec.hidden, "float32");
    ffns(&mut spec).for_each(|f| f.act = Activation::GeluTanh);
    Ok(spec)
}

/// The dtype that a configuration names.
pub(super) fn dtype_of<'a>(c: &Config<'a>) -> Result<&'a str, SpecError> {
    let dtype = c.opt_str("dtype")?.map_or_else(|| c.opt_str("torch_dtype"), |d| Ok(Some(d)))?;
    Ok(dtype.unwrap_or("float32"))
}

/// The dtype in which the embedding's factor is rounded as the network has it.
fn dtype_for(spec: &Spec) -> &'static str {
    let dtypes = ["float32", "bfloat16", "float16"];
    dtypes.into_iter().find(|d| embed_scale(spec.hidden, d) == spec.embed_scale).unwrap_or("float32")
}

fn from_gemma2(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "gemma2")?;
    let c = Config(&filled);
    let mut spec = common(&c, "gemma2", rope::common)?;
    let softcap = c.opt_f32("attn_logit_softcapping")?;
    let windows = c.windows(spec.layers.len(), c.opt_usize("sliding_window")?, |l| l % 2 == 0)?;
    attns(&mut spec).zip(windows).for_each(|(a, w)| (a.window, a.softcap) = (w, softcap));
    Ok(spec)
}

fn from_gemma3(config: &Value) -> Result<Spec, SpecError> {
    // A model that also sees images keeps its text part one level deeper.
    let seeing = config.get("text_config").filter(|t| !t.is_null());
    let text = seeing.unwrap_or(config);
    if !text.is_object() {
        return bad("text_config is no object");
    }
    let mut filled = filled(text, "gemma3")?;
    if seeing.is_some() {
        // Such a model is loaded in the outer dtype, ties its head by the outer word, and caps no logits.
        let outer = |key: &str| config.get(key).filter(|v| !v.is_null());
        if let Some(dtype) = outer("dtype").or(outer("torch_dtype")) {
            filled["dtype"] = dtype.clone();
        }
        if let Some(tied) = outer("tie_word_embeddings") {
            filled["tie_word_embeddings"] = tied.clone();
        }
        filled["final_logit_softcapping"] = Value::Null;
    }
    let c = Config(&filled);
    // The class keeps attn_logit_softcapping and never uses it.
    let mut spec = common(&c, "gemma3", rope::of_full_layers)?;
    let pattern = c.usize("sliding_window_pattern")?.max(1);
    let window = c.opt_usize("sliding_window")?;
    let windows = c.windows(spec.layers.len(), window, |l| !(l + 1).is_multiple_of(pattern))?;
    let local = rope::of_sliding_layers(&c, c.usize("head_dim")?, "rope_local_base_freq")?;
    for (a, w) in attns(&mut spec).zip(windows) {
        (a.qk_norm, a.window) = (true, w);
        if w.is_some() {
            a.rope = Some(local.clone());
        }
    }
    Ok(spec)
}

fn to_common(spec: &Spec, model_type: &str, class: &str) -> Result<Map<String, Value>, SpecError> {
    let mut out = to_llama_like(spec, model_type, class)?;
    let (a, _) = first(spec)?;
    let hidden_act = out.shift_remove("hidden_act");
    let scalar = 1.0 / f64::from(a.scale).powi(2);
    // The scalar is a whole number in every published file; squaring the rounded root would leave a tail of digits.
    let scalar = if inverse_root(scalar.round()) == a.scale { scalar.round() } else { scalar };
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("hidden_activation", json!(hidden_act));
    set("dtype", json!(dtype_for(spec)));
    set("query_pre_attn_scalar", if scalar.fract() == 0.0 { json!(scalar as u64) } else { json!(scalar) });
    set("attn_logit_softcapping", a.softcap.map_or(Value::Null, num));
    set("final_logit_softcapping", spec.logit_softcap.map_or(Value::Null, num));
    set("attention_bias", json!(a.qkv_bias));
    set("sliding_window", json!(window(spec).unwrap_or(4096)));
    set("layer_types", layer_types(spec));
    Ok(out)
}

fn to_gemma2(spec: &Spec) -> Result<Value, SpecError> {
    verified(spec, to_common(spec, "gemma2", "Gemma2ForCausalLM")?, from_gemma2)
}

fn to_gemma3(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_common(spec, "gemma3_text", "Gemma3ForCausalLM")?;
    let attns = || spec.layers.iter().filter_map(|l| l.attn.as_ref());
    let rope_of = |local: bool| attns().find(|a| a.window.is_some() == local).and_then(|a| Some((a, a.rope.as_ref()?)));
    out.shift_remove("rope_scaling");
    if let Some((a, r)) = rope_of(false) {
        rope::to_config(r, (a.head_dim, false), spec.context, &mut out)?;
    }
    if let Some((_, r)) = rope_of(true) {
        out.insert("rope_local_base_freq".into(), num(r.theta));
    }
    verified(spec, out, from_gemma3)
}

pub(super) fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::AttnPostNorm => "post_attention_layernorm",
        Role::FfnNorm => "pre_feedforward_layernorm",
        Role::FfnPostNorm => "post_feedforward_layernorm",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn gguf_common(head: &GgufHead, arch: &str, large: usize) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, arch, RopeStyle::Half)?;
    spec.embed_scale = embed_scale(spec.hidden, "float32");
    ffns(&mut spec).for_each(|f| (f.act, f.post_norm) = (Activation::GeluTanh, true));
    // The files do not say it: of each generation, only the 27B model scales by its hidden width a head.
    let (layers, hidden) = (spec.layers.len(), spec.hidden);
    for a in attns(&mut spec) {
        if layers == large {
            a.scale = inverse_root((hidden / a.heads) as f64);
        }
        a.post_norm = true;
    }
    Ok(spec)
}

fn from_gguf2(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf_common(head, "gemma2", 46)?;
    let softcap = head.f32("attn_logit_softcapping")?.or(Some(50.0)).filter(|c| *c != 0.0);
    spec.logit_softcap = head.f32("final_logit_softcapping")?.or(Some(30.0)).filter(|c| *c != 0.0);
    let window = head.usize("attention.sliding_window")?.unwrap_or(4096);
    for (l, a) in attns(&mut spec).enumerate() {
        a.softcap = softcap;
        a.window = (l % 2 == 0).then_some(window);
    }
    Ok(spec)
}

fn from_gguf3(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf_common(head, "gemma3", 62)?;
    let local = head.f32("rope.freq_base_swa")?.unwrap_or(10000.0);
    let layers = spec.layers.len();
    let slides = gguf::slides(head, layers, 6)?;
    if spec.layers.iter().all(|l| l.attn.as_ref().is_none_or(|a| a.window.is_none())) && slides.contains(&true) {
        return bad("metadata: gemma3.attention.sliding_window is missing");
    }
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        let Some(a) = &mut layer.attn else { continue };
        a.qk_norm = true;
        if !slides[l] {
            a.window = None;
        } else if let Some(r) = &mut a.rope {
            (r.theta, r.scaling) = (local, RopeScaling::Default);
        }
    }
    Ok(spec)
}

fn to_gguf2(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "gemma2")?;
    let softcap = spec.layers.iter().find_map(|l| l.attn.as_ref()).and_then(|a| a.softcap);
    keys.set("attn_logit_softcapping", GgufValue::F32(softcap.unwrap_or(0.0)));
    if spec.logit_softcap.is_none() {
        keys.set("final_logit_softcapping", GgufValue::F32(0.0));
    }
    gguf_out::verified(spec, keys, from_gguf2)
}

fn to_gguf3(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "gemma3")?;
    let attns = || spec.layers.iter().filter_map(|l| l.attn.as_ref());
    let local = attns().find(|a| a.window.is_some()).and_then(|a| a.rope.as_ref()).map_or(10000.0, |r| r.theta);
    if local != 10000.0 {
        keys.set("rope.freq_base_swa", GgufValue::F32(local));
    }
    gguf_out::pattern(&mut keys, spec, 6)?;
    gguf_out::verified(spec, keys, from_gguf3)
}

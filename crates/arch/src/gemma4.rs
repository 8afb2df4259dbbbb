//! Gemma 4, its text part: Gemma's norms around the parts, heads of another width on layers that see everything, where
//! values may be keys; values normed; a number behind each block; inputs of single layers; last layers that read the
//! keys and values of earlier ones; in one member experts beside the dense part.
//!
//! Of factors on embeddings `gemma.rs` says what is rounded. Norms keep their scale itself here.

use serde_json::{Map, Value, json};

use super::config::{Config, activation_name, attns, bad, ffns, first, layer_types, named, num, verified, window};
use super::defaults::filled;
use super::gemma::{dtype_of, embed_scale};
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::llama4::text_part;
use super::{Family, Source, config, rope};
use lacuna_spec::{
    AttnSpec, Experts, LayerInputs, Part, Place, Role, Rope, RopeScaling, RopeStyle, SharedExpert, Spec, SpecError,
};

/// Gemma 4.
pub(super) const GEMMA4: Family = Family {
    name: "gemma4",
    model_types: &["gemma4_text", "gemma4"],
    gguf: &["gemma4"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

/// What layers of one of the two types are.
struct Heads {
    kv_heads: usize,
    head_dim: usize,
}

/// The widths of layers that see everything: transformers writes them by layer, published files by two words.
fn full_heads(c: &Config, slides: &[bool], sliding: &Heads) -> Result<Heads, SpecError> {
    let k_is_v = c.bool("attention_k_eq_v")?;
    let Some(by_layer) = c.get("per_layer_config").and_then(Value::as_object).filter(|o| !o.is_empty()) else {
        let more = c.opt_usize("num_global_key_value_heads")?.filter(|_| k_is_v);
        let head_dim = c.opt_usize("global_head_dim")?.unwrap_or(512);
        return Ok(Heads { kv_heads: more.unwrap_or(sliding.kv_heads), head_dim });
    };
    // Numbers of layers, zeros before them as it may be.
    let number = |key: &String| key.parse::<usize>().ok().filter(|l| *l < slides.len());
    if let Some(key) = by_layer.keys().find(|k| number(k).is_none()) {
        return bad(format!("per_layer_config has \"{key}\", which is no number of a layer"));
    }
    let mut found: Option<Heads> = None;
    for (l, slides) in slides.iter().enumerate() {
        let own = by_layer.iter().find(|(k, _)| number(k) == Some(l)).map(|(_, v)| v);
        let keys = own.and_then(Value::as_object).into_iter().flatten().map(|(k, _)| k.as_str());
        if let Some(key) = keys.into_iter().find(|k| !matches!(*k, "head_dim" | "num_key_value_heads")) {
            return bad(format!("per_layer_config of layer {l} has {key}, which Lacuna does not read"));
        }
        let own = Config(own.unwrap_or(&Value::Null));
        let here = Heads {
            kv_heads: own.opt_usize("num_key_value_heads")?.unwrap_or(sliding.kv_heads),
            head_dim: own.opt_usize("head_dim")?.unwrap_or(sliding.head_dim),
        };
        let like = |other: &Heads| (here.kv_heads, here.head_dim) == (other.kv_heads, other.head_dim);
        if !like(if *slides { sliding } else { found.as_ref().unwrap_or(&here) }) {
            return bad(format!("per_layer_config makes layer {l} unlike others of its type"));
        }
        if !slides {
            found = Some(here);
        }
    }
    Ok(found.unwrap_or(Heads { kv_heads: sliding.kv_heads, head_dim: sliding.head_dim }))
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut text = text_part(config)?;
    // A null is as good as absent here, and so are the sets of RoPE.
    if let Some(o) = text.as_object_mut().filter(|o| o.get("rope_parameters").is_some_and(Value::is_null)) {
        o.shift_remove("rope_parameters");
    }
    let filled = filled(&text, "gemma4")?;
    let c = Config(&filled);
    // Images alone are seen both ways by the other word.
    if let Some(v) = c.get("use_bidirectional_attention").filter(|v| **v != json!("vision")) {
        return bad(format!("use_bidirectional_attention is {v}; only null and \"vision\" are supported"));
    }
    let sliding = Heads { kv_heads: c.usize("num_key_value_heads")?, head_dim: c.usize("head_dim")? };
    let local = rope::of_sliding_layers(&c, sliding.head_dim, "rope_local_base_freq")?;
    let mut spec = config::llama_like(&c, "gemma4", "hidden_activation", |_, _| {
        Ok(Rope { theta: 1.0, dims: 2, style: RopeStyle::Half, scaling: RopeScaling::Default })
    })?;
    let layers = spec.layers.len();
    let mut windows = c.windows(layers, c.opt_usize("sliding_window")?, |l| !(l + 1).is_multiple_of(6))?;
    // The class makes the last layer see everything, whatever the file says.
    windows.iter_mut().next_back().into_iter().for_each(|w| *w = None);
    let slides: Vec<bool> = windows.iter().map(Option::is_some).collect();
    let full = full_heads(&c, &slides, &sliding)?;
    let global = rope::proportional_layers(&c, full.head_dim)?;
    spec.embed_scale = embed_scale(spec.hidden, dtype_of(&c)?);
    spec.logit_softcap = c.opt_f32("final_logit_softcapping")?;
    let shared = c.opt_usize("num_kv_shared_layers")?.unwrap_or(0);
    if shared > layers || (shared == layers && layers > 0) {
        return bad(format!("num_kv_shared_layers is {shared} of {layers} layers: none is left to read from"));
    }
    let (k_is_v, bias) = (c.bool("attention_k_eq_v")?, c.bool("attention_bias")?);
    let inputs = c.opt_usize("hidden_size_per_layer_input")?.filter(|n| *n > 0);
    let wide = c.bool("use_double_wide_mlp")?;
    let experts = if c.bool("enable_moe_block")? {
        Some((c.usize("num_experts")?, c.usize("top_k_experts")?, c.usize("moe_intermediate_size")?))
    } else {
        None
    };
    for (a, window) in attns(&mut spec).zip(windows) {
        let (heads, rope) = if window.is_some() { (&sliding, &local) } else { (&full, &global) };
        (a.kv_heads, a.head_dim, a.window, a.rope) = (heads.kv_heads, heads.head_dim, window, Some(rope.clone()));
        (a.qkv_bias, a.o_bias) = (bias, bias);
        a.v_is_k = k_is_v && window.is_none();
    }
    finish(&mut spec, Said { shared, wide, experts })?;
    spec.layer_inputs = inputs
        .map(|width| {
            let vocab = c.usize("vocab_size_per_layer_input")?;
            let act = c.activation("hidden_activation")?;
            let dtype = dtype_of(&c)?;
            Ok::<_, SpecError>(LayerInputs { act, ..layer_inputs(width, vocab, spec.hidden, dtype) })
        })
        .transpose()?;
    Ok(spec)
}

/// What a file says of single layers.
struct Said {
    /// How many of the last layers read the keys and values of earlier ones.
    shared: usize,
    /// Whether those have an FFN of twice the width.
    wide: bool,
    /// How many experts there are, how many a token uses, and their width.
    experts: Option<(usize, usize, usize)>,
}

/// What every layer has, and what some have.
fn finish(spec: &mut Spec, said: Said) -> Result<(), SpecError> {
    let first = spec.layers.len() - said.shared;
    let router_scale = config::inverse_root(spec.hidden as f64);
    let sliding: Vec<bool> = attns(spec).map(|a| a.window.is_some()).collect();
    for (l, a) in attns(spec).enumerate() {
        (a.scale, a.qk_norm, a.post_norm, a.v_norm) = (1.0, true, true, true);
        if said.shared > 0 && l >= first {
            let Some(from) = (0..first).rev().find(|s| sliding[*s] == sliding[l]) else {
                return bad(format!("num_kv_shared_layers: layer {l} finds no earlier layer of its type to read from"));
            };
            (a.kv_from, a.v_norm, a.v_is_k) = (Some(from), false, false);
        }
    }
    for (l, f) in ffns(spec).enumerate() {
        f.post_norm = true;
        if said.wide && said.shared > 0 && l >= first {
            f.width *= 2;
        }
        if let Some((count, used, width)) = said.experts {
            let shared = Some(SharedExpert { width: f.width, gate: false });
            let all = Experts { count, used, normalize: true, shared, ..Experts::default() };
            f.experts = Some(Experts { expert_scale: true, router_scale, apart: true, ..all });
            f.width = width;
        }
    }
    spec.layers.iter_mut().for_each(|l| l.output_scale = true);
    Ok(())
}

pub(super) fn layer_inputs(width: usize, vocab: usize, hidden: usize, dtype: &str) -> LayerInputs {
    LayerInputs {
        width,
        vocab,
        embed_scale: embed_scale(width, dtype),
        projection_scale: config::inverse_root(hidden as f64),
        scale: std::f32::consts::FRAC_1_SQRT_2,
        act: lacuna_spec::Activation::GeluTanh,
    }
}

/// The dtype in which both embeddings' factors are rounded as the network has them.
pub(super) fn dtype_for(spec: &Spec) -> &'static str {
    let fits = |d: &&str| {
        let inputs = |i: LayerInputs| embed_scale(i.width, d) == i.embed_scale;
        embed_scale(spec.hidden, d) == spec.embed_scale && spec.layer_inputs.is_none_or(inputs)
    };
    ["float32", "bfloat16", "float16"].into_iter().find(fits).unwrap_or("float32")
}

pub(super) fn some_attn(spec: &Spec, sliding: bool) -> Option<&AttnSpec> {
    spec.layers.iter().filter_map(|l| l.attn.as_ref()).find(|a| a.window.is_some() == sliding)
}

pub(super) fn shared_layers(spec: &Spec) -> usize {
    spec.layers.iter().filter(|l| l.attn.as_ref().is_some_and(|a| a.kv_from.is_some())).count()
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let (a, f) = first(spec)?;
    let (sliding, full) = (some_attn(spec, true), some_attn(spec, false));
    let Some(full) = full else {
        return Err(SpecError { what: "gemma4 without a layer that sees everything".into() });
    };
    let local = sliding.unwrap_or(full);
    let dense = |f: &lacuna_spec::FfnSpec| f.experts.and_then(|e| e.shared).map_or(f.width, |s| s.width);
    let last = spec.layers.iter().rev().find_map(|l| l.ffn.as_ref()).map_or(0, dense);
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["Gemma4ForCausalLM"]));
    set("model_type", json!("gemma4_text"));
    set("vocab_size", json!(spec.vocab));
    set("hidden_size", json!(spec.hidden));
    set("intermediate_size", json!(dense(f)));
    set("num_hidden_layers", json!(spec.layers.len()));
    set("num_attention_heads", json!(a.heads));
    set("num_key_value_heads", json!(local.kv_heads));
    set("head_dim", json!(local.head_dim));
    set("global_head_dim", json!(full.head_dim));
    let k_is_v = spec.layers.iter().any(|l| l.attn.as_ref().is_some_and(|a| a.v_is_k));
    set("num_global_key_value_heads", if k_is_v { json!(full.kv_heads) } else { Value::Null });
    set("attention_k_eq_v", json!(k_is_v));
    set("hidden_activation", json!(activation_name(f.act)));
    set("max_position_embeddings", json!(spec.context));
    set("rms_norm_eps", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    set("dtype", json!(dtype_for(spec)));
    set("attention_bias", json!(a.qkv_bias));
    set("sliding_window", json!(window(spec).unwrap_or(512)));
    set("layer_types", layer_types(spec));
    set("final_logit_softcapping", spec.logit_softcap.map_or(Value::Null, num));
    set("num_kv_shared_layers", json!(shared_layers(spec)));
    set("use_double_wide_mlp", json!(shared_layers(spec) > 0 && last == 2 * dense(f)));
    set("hidden_size_per_layer_input", json!(spec.layer_inputs.map_or(0, |i| i.width)));
    set("vocab_size_per_layer_input", json!(spec.layer_inputs.map_or(spec.vocab, |i| i.vocab)));
    let experts = f.experts;
    set("enable_moe_block", json!(experts.is_some()));
    set("num_experts", json!(experts.map(|e| e.count)));
    set("top_k_experts", json!(experts.map(|e| e.used)));
    set("moe_intermediate_size", json!(experts.map(|_| f.width)));
    let mut sets = Map::new();
    for (kind, a) in [("full_attention", full), ("sliding_attention", local)] {
        sets.insert(kind.into(), rope::set_for(a.rope.as_ref(), spec)?);
    }
    set("rope_parameters", Value::Object(sets));
    verified(spec, out, from_config)
}

pub(super) fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let l = place.layer;
    let ffn = l.and_then(|l| spec.layers.get(l as usize)?.ffn.as_ref());
    let beside = ffn.is_some_and(|f| f.experts.is_some());
    // Parameters of modules that are no matrices: nothing stands behind their names.
    let bare = |name: &str| Some(Source::whole(format!("model.layers.{}.{name}", l?)));
    let module = match place.role {
        Role::OutputScale => return bare("layer_scalar"),
        Role::RouterNorm => return bare("router.scale"),
        Role::ExpertScale => return bare("router.per_expert_scale"),
        Role::Router => "router.proj",
        Role::Gate | Role::Up | Role::Down if beside => {
            let width = ffn?.width;
            let (module, rows) = match place.role {
                Role::Gate => ("gate_up_proj", Some((0, width))),
                Role::Up => ("gate_up_proj", Some((width, 2 * width))),
                _ => ("down_proj", None),
            };
            let slice = Some(place.expert? as usize);
            return Some(Source { rows, slice, ..bare(&format!("experts.{module}"))? });
        }
        Role::SharedGate => "mlp.gate_proj",
        Role::SharedUp => "mlp.up_proj",
        Role::SharedDown => "mlp.down_proj",
        Role::ExpertsNorm => "pre_feedforward_layernorm_2",
        Role::SharedPostNorm => "post_feedforward_layernorm_1",
        Role::ExpertsPostNorm => "post_feedforward_layernorm_2",
        Role::LayerInputs => "embed_tokens_per_layer",
        Role::InputsIn => "per_layer_model_projection",
        Role::InputsNorm => "per_layer_projection_norm",
        Role::InputGate => "per_layer_input_gate",
        Role::InputOut => "per_layer_projection",
        Role::InputNorm => "post_per_layer_input_norm",
        _ => return super::gemma::source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

/// Keys that are read here and refused elsewhere.
const KEYS: [&str; 2] = ["attention.shared_kv_layers", "expert_shared_count"];

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let layers = head.must("block_count")?;
    let slides = gguf::slides(head, layers, 6)?;
    let swa = head.usize("attention.key_length_swa")?;
    let factors = head.rope_lists.get("rope_freqs.weight");
    let wide = head.usize("attention.key_length")?.unwrap_or(0);
    if let Some(n) = factors.map(Vec::len).filter(|n| 2 * n != wide) {
        return bad_gguf(format!("rope_freqs.weight has {n} factors for heads of {wide} channels"));
    }
    let mut plain = head.clone();
    plain.rope_lists.clear();
    let mut spec = gguf::reading(&plain, "gemma4", RopeStyle::Half, &KEYS)?;
    spec.embed_scale = embed_scale(spec.hidden, "float32");
    let window = head.must("attention.sliding_window")?;
    let local = head.f32("rope.freq_base_swa")?.unwrap_or(10000.0);
    let has = |l: usize, name: &str| head.tensors.contains(&format!("blk.{l}.{name}.weight"));
    for (l, a) in attns(&mut spec).enumerate() {
        a.window = slides.get(l).copied().unwrap_or(false).then_some(window);
        let Some(rope) = &mut a.rope else { continue };
        if a.window.is_some() {
            a.head_dim = swa.unwrap_or(a.head_dim);
            rope.theta = local;
            rope.dims = head.usize("rope.dimension_count_swa")?.unwrap_or(a.head_dim);
            rope.scaling = RopeScaling::Default;
        } else {
            rope.dims = head.usize("rope.dimension_count")?.unwrap_or(a.head_dim);
            if let Some(list) = factors {
                rope.scaling = turning(list)?;
            }
            a.v_is_k = !has(l, "attn_v");
        }
    }
    let shared = head.usize("attention.shared_kv_layers")?.unwrap_or(0);
    if shared >= layers.max(1) {
        return bad_gguf(format!("attention.shared_kv_layers is {shared} of {layers} layers"));
    }
    let Some(widths) = head.each("feed_forward_length", layers)? else {
        return bad_gguf("feed_forward_length is missing".into());
    };
    for (f, width) in ffns(&mut spec).zip(widths) {
        (f.width, f.act, f.experts) = (width, lacuna_spec::Activation::GeluTanh, None);
    }
    let experts = match head.usize("expert_count")?.filter(|n| *n > 0) {
        Some(count) => Some((count, head.must("expert_used_count")?, head.must("expert_feed_forward_length")?)),
        None => None,
    };
    finish(&mut spec, Said { shared, wide: false, experts })?;
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        layer.output_scale = has(l, "layer_output_scale");
    }
    let width = head.usize("embedding_length_per_layer_input")?.unwrap_or(0);
    spec.layer_inputs = (width > 0).then(|| layer_inputs(width, spec.vocab, spec.hidden, "float32"));
    Ok(spec)
}

fn bad_gguf<T>(what: String) -> Result<T, SpecError> {
    Err(SpecError { what: format!("metadata: {what}") })
}

/// What stands still in llama.cpp's lists of factors.
const STILL: f32 = 1e30;

/// The first pairs turn as they are, the others not at all.
fn turning(factors: &[f32]) -> Result<RopeScaling, SpecError> {
    let pairs = factors.iter().take_while(|f| **f == 1.0).count();
    if factors[pairs..].iter().any(|f| *f != STILL) || pairs == 0 {
        return bad_gguf(format!("rope_freqs.weight: after {pairs} factors of 1 come others than {STILL:e}"));
    }
    Ok(if pairs == factors.len() { RopeScaling::Default } else { RopeScaling::Proportional { pairs, factor: 1.0 } })
}

pub(super) fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    let l = place.layer;
    let beside = l.and_then(|l| spec.layers.get(l as usize)?.ffn.as_ref()).is_some_and(|f| f.experts.is_some());
    let bare = |name: &str| Some(Source::whole(format!("blk.{}.{name}", l?)));
    let module = match place.role {
        Role::RouterNorm => return bare("ffn_gate_inp.scale"),
        Role::ExpertScale => return bare("ffn_down_exps.scale"),
        Role::Gate | Role::Up if beside && place.part == Part::Weight => {
            let width = spec.layers.get(l? as usize)?.ffn.as_ref()?.width;
            let rows = if place.role == Role::Gate { (0, width) } else { (width, 2 * width) };
            let slice = Some(place.expert? as usize);
            return Some(Source { rows: Some(rows), slice, ..bare("ffn_gate_up_exps.weight")? });
        }
        Role::SharedGate => "ffn_gate",
        Role::SharedUp => "ffn_up",
        Role::SharedDown => "ffn_down",
        Role::ExpertsNorm => "pre_ffw_norm_2",
        Role::SharedPostNorm => "post_ffw_norm_1",
        Role::ExpertsPostNorm => "post_ffw_norm_2",
        Role::OutputScale => "layer_output_scale",
        Role::LayerInputs => "per_layer_token_embd",
        Role::InputsIn => "per_layer_model_proj",
        Role::InputsNorm => "per_layer_proj_norm",
        Role::InputGate => "inp_gate",
        Role::InputOut => "proj",
        Role::InputNorm => "post_norm",
        _ => return gguf::standard_source(spec, place),
    };
    Some(named(place, "", "blk", module))
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let (Some(full), Some(local)) = (some_attn(spec, false), some_attn(spec, true)) else {
        let what = "gemma4 files of llama.cpp have layers that see a window, and layers that see everything";
        return Err(SpecError { what: what.into() });
    };
    // Everything that differs by layer is said apart: here all layers are as those that see everything.
    let mut plain = spec.clone();
    for a in attns(&mut plain) {
        (a.kv_heads, a.head_dim, a.rope, a.window) = (full.kv_heads, full.head_dim, full.rope.clone(), local.window);
    }
    let dense = |f: &lacuna_spec::FfnSpec| f.experts.and_then(|e| e.shared).map_or(f.width, |s| s.width);
    let widths: Vec<usize> = spec.layers.iter().filter_map(|l| l.ffn.as_ref()).map(dense).collect();
    let most = widths.iter().copied().max().unwrap_or(0);
    ffns(&mut plain).for_each(|f| (f.width, f.experts) = (most, None));
    for a in attns(&mut plain) {
        if let Some(r) = &mut a.rope {
            r.scaling = RopeScaling::Default;
        }
    }
    let mut k = gguf_out::standard_keys(&plain, "gemma4")?;
    let u32s = |list: Vec<usize>| -> Result<GgufValue, SpecError> {
        let list: Option<Vec<u32>> = list.into_iter().map(|n| u32::try_from(n).ok()).collect();
        list.map(GgufValue::U32s).ok_or_else(|| SpecError { what: "a width is beyond 32 bits".into() })
    };
    if widths.iter().any(|w| *w != most) {
        k.put("feed_forward_length", u32s(widths)?);
    }
    let kv: Vec<usize> = spec.layers.iter().filter_map(|l| l.attn.as_ref()).map(|a| a.kv_heads).collect();
    if kv.iter().any(|n| *n != full.kv_heads) {
        k.put("attention.head_count_kv", u32s(kv)?);
    }
    k.number("attention.key_length_swa", local.head_dim)?;
    k.number("attention.value_length_swa", local.head_dim)?;
    k.number("rope.dimension_count_swa", local.rope.as_ref().map_or(local.head_dim, |r| r.dims))?;
    if let Some(r) = &local.rope {
        k.set("rope.freq_base_swa", GgufValue::F32(r.theta));
    }
    let slides = spec.layers.iter().filter_map(|l| l.attn.as_ref()).map(|a| a.window.is_some()).collect();
    k.set("attention.sliding_window_pattern", GgufValue::Bools(slides));
    k.number("attention.shared_kv_layers", shared_layers(spec))?;
    k.number("embedding_length_per_layer_input", spec.layer_inputs.map_or(0, |i| i.width))?;
    if let Some((e, width)) = spec.layers.iter().find_map(|l| l.ffn.as_ref().and_then(|f| Some((f.experts?, f.width))))
    {
        k.number("expert_count", e.count)?;
        k.number("expert_used_count", e.used)?;
        k.number("expert_feed_forward_length", width)?;
    }
    let Some(r) = &full.rope else {
        return Err(SpecError { what: "gemma4 whose layers that see everything know no positions".into() });
    };
    let pairs = match r.scaling {
        RopeScaling::Proportional { pairs, factor: 1.0 } => pairs,
        RopeScaling::Default => r.dims / 2,
        _ => return Err(SpecError { what: "gemma4 files of llama.cpp know no stretched RoPE".into() }),
    };
    let factors = (0..r.dims / 2).map(|i| if i < pairs { 1.0 } else { STILL }).collect();
    k.rope_lists.push(("rope_freqs.weight".into(), factors));
    gguf_out::verified(spec, k, from_gguf)
}

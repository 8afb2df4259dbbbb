//! Qwen3-Next and Qwen3.5: three layers of the gated delta rule to one of gated attention, each followed by a
//! feed-forward part or by experts with a gated one for every token.
//!
//! Qwen3-Next keeps the rows of q, k, v and z by key head in one matrix, and so those of time steps and beta; Qwen3.5
//! keeps four matrices. Both keep each head's gate behind its query.

use serde_json::{Map, Value, json};

use super::config::{Config, attns, bad, ffns, first, llama_like, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, Source, mixers, moe, qwen2_moe, rope};
use lacuna_spec::{Delta, Experts, Mixer, Part, Place, Role, RopeStyle, SharedExpert, Spec, SpecError};

/// Qwen3-Next.
pub(super) const QWEN3_NEXT: Family = Family {
    name: "qwen3_next",
    model_types: &["qwen3_next"],
    gguf: &["qwen3next"],
    from_config: from_next,
    to_config: to_next,
    source: next_source,
    from_gguf: |head| from_gguf(head, "qwen3_next"),
    gguf_source: gguf_next_source,
    to_gguf: to_gguf_next,
};

/// Qwen3.5, its text part, without experts.
pub(super) const QWEN3_5: Family = Family {
    name: "qwen3_5",
    model_types: &["qwen3_5_text", "qwen3_5"],
    gguf: &["qwen35"],
    from_config: from_35,
    to_config: to_35,
    source: source_35,
    from_gguf: |head| from_gguf(head, "qwen3_5"),
    gguf_source: gguf_source_35,
    to_gguf: |spec| to_gguf_35(spec, "qwen35", |head| from_gguf(head, "qwen3_5")),
};

/// The same with experts.
pub(super) const QWEN3_5_MOE: Family = Family {
    name: "qwen3_5_moe",
    model_types: &["qwen3_5_moe_text", "qwen3_5_moe"],
    gguf: &["qwen35moe"],
    from_config: from_35_moe,
    to_config: to_35_moe,
    source: source_35_moe,
    from_gguf: |head| from_gguf(head, "qwen3_5_moe"),
    gguf_source: gguf_source_35,
    to_gguf: |spec| to_gguf_35(spec, "qwen35moe", |head| from_gguf(head, "qwen3_5_moe")),
};

/// What both share.
fn common(c: &Config, arch: &str) -> Result<Spec, SpecError> {
    // The rows of biases of queries and gates stand by turns.
    c.only("attention_bias", json!(false))?;
    c.only("hidden_act", json!("silu"))?;
    for key in ["head_dim", "num_key_value_heads"] {
        c.usize(key)?;
    }
    let mut spec = llama_like(c, arch, "hidden_act", rope::part)?;
    spec.norm.offset = 1.0;
    let delta = Delta {
        key_heads: c.usize("linear_num_key_heads")?,
        value_heads: c.usize("linear_num_value_heads")?,
        key_dim: c.usize("linear_key_head_dim")?,
        value_dim: c.usize("linear_value_head_dim")?,
        kernel: c.usize("linear_conv_kernel_dim")?,
        log: true,
        tiled: false,
    };
    let interval = c.opt_usize("full_attention_interval")?.unwrap_or(4);
    let attends = match mixers::attends(c, spec.layers.len(), &["linear_attention"])? {
        Some(list) => list,
        None if interval == 0 => return bad("full_attention_interval is 0"),
        None => (0..spec.layers.len()).map(|l| (l + 1).is_multiple_of(interval)).collect(),
    };
    attns(&mut spec).for_each(|a| (a.qk_norm, a.gate) = (true, true));
    for (layer, _) in spec.layers.iter_mut().zip(attends).filter(|(_, attends)| !attends) {
        (layer.attn, layer.mixer) = (None, Some(Mixer::Delta(delta)));
    }
    Ok(spec)
}

/// Experts and the one beside them, as both name them.
fn experts(c: &Config, normalize: bool) -> Result<Experts, SpecError> {
    Ok(Experts {
        count: c.usize("num_experts")?,
        used: c.usize("num_experts_per_tok")?,
        normalize,
        shared: Some(SharedExpert { width: c.usize("shared_expert_intermediate_size")?, gate: true }),
        ..Experts::default()
    })
}

fn from_next(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "qwen3_next")?;
    let c = Config(&filled);
    let mut spec = common(&c, "qwen3_next")?;
    let (step, dense) = (c.usize("decoder_sparse_step")?, c.usizes("mlp_only_layers")?);
    let experts = experts(&c, c.bool("norm_topk_prob")?)?;
    let sparse = |l: usize| experts.count > 0 && step > 0 && (l + 1).is_multiple_of(step) && !dense.contains(&l);
    moe::put(&mut spec, c.usize("moe_intermediate_size")?, experts, sparse);
    Ok(spec)
}

fn first_delta(spec: &Spec) -> Option<Delta> {
    spec.layers.iter().find_map(|l| match l.mixer {
        Some(Mixer::Delta(m)) => Some(m),
        _ => None,
    })
}

fn to_common(spec: &Spec, model_type: &str, class: &str) -> Result<Map<String, Value>, SpecError> {
    let mut out = to_llama_like(spec, model_type, class)?;
    let Some(m) = first_delta(spec) else { return bad(format!("{model_type} without a recurrent mixer")) };
    // Beside the base: the classes look for it in rope_parameters, and with an older one in rope_scaling.
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("linear_num_key_heads", json!(m.key_heads));
    set("linear_num_value_heads", json!(m.value_heads));
    set("linear_key_head_dim", json!(m.key_dim));
    set("linear_value_head_dim", json!(m.value_dim));
    set("linear_conv_kernel_dim", json!(m.kernel));
    set("attention_bias", json!(false));
    set("layer_types", mixers::layer_types(spec, "linear_attention"));
    Ok(out)
}

/// Writes what [`experts`] reads.
fn write_experts(spec: &Spec, out: &mut Map<String, Value>) -> Result<Experts, SpecError> {
    let (e, width) = moe::first(spec)?;
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("num_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("moe_intermediate_size", json!(width));
    set("shared_expert_intermediate_size", json!(e.shared.map_or(0, |s| s.width)));
    Ok(e)
}

fn to_next(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_common(spec, "qwen3_next", "Qwen3NextForCausalLM")?;
    let dense = |l: &usize| spec.layers[*l].ffn.as_ref().is_some_and(|f| f.experts.is_none());
    let dense: Vec<usize> = (0..spec.layers.len()).filter(dense).collect();
    if let Some(f) = dense.first().and_then(|l| spec.layers[*l].ffn.as_ref()) {
        out.insert("intermediate_size".into(), json!(f.width));
    }
    match write_experts(spec, &mut out) {
        Ok(e) => out.insert("norm_topk_prob".into(), json!(e.normalize)),
        Err(_) => out.insert("num_experts".into(), json!(0)),
    };
    out.insert("decoder_sparse_step".into(), json!(1));
    out.insert("mlp_only_layers".into(), json!(dense));
    verified(spec, out, from_next)
}

/// The text part, and what a model that also sees says outside it.
fn text_of(config: &Value, class: &str) -> Result<Value, SpecError> {
    let seeing = config.get("text_config").filter(|t| !t.is_null());
    let text = seeing.unwrap_or(config);
    if !text.is_object() {
        return bad("text_config is no object");
    }
    let mut filled = filled(text, class)?;
    if let Some(tied) = config.get("tie_word_embeddings").filter(|v| seeing.is_some() && !v.is_null()) {
        filled["tie_word_embeddings"] = tied.clone();
    }
    for key in ["rope_parameters", "rope_scaling"] {
        if let Some(set) = filled.get_mut(key).and_then(Value::as_object_mut) {
            // Of text alone all three positions of a token are one: the sections make no difference.
            set.shift_remove("mrope_section");
            set.shift_remove("mrope_interleaved");
        }
    }
    Ok(filled)
}

fn from_35(config: &Value) -> Result<Spec, SpecError> {
    let filled = text_of(config, "qwen3_5")?;
    common(&Config(&filled), "qwen3_5")
}

fn to_35(spec: &Spec) -> Result<Value, SpecError> {
    verified(spec, to_common(spec, "qwen3_5_text", "Qwen3_5ForCausalLM")?, from_35)
}

fn from_35_moe(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = text_of(config, "qwen3_5_moe")?;
    // The class has no other width.
    filled["intermediate_size"] = json!(Config(&filled).usize("moe_intermediate_size")?);
    let c = Config(&filled);
    let mut spec = common(&c, "qwen3_5_moe")?;
    moe::put(&mut spec, c.usize("moe_intermediate_size")?, experts(&c, true)?, |_| true);
    Ok(spec)
}

fn to_35_moe(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_common(spec, "qwen3_5_moe_text", "Qwen3_5MoeForCausalLM")?;
    out.shift_remove("intermediate_size");
    write_experts(spec, &mut out)?;
    verified(spec, out, from_35_moe)
}

/// Ranges of rows of a matrix that keeps `each` rows for each of `heads` heads: `n` of them, from `at` on.
fn by_head(heads: usize, each: usize, at: usize, n: usize) -> Vec<(usize, usize)> {
    (0..heads).map(|h| (h * each + at, h * each + at + n)).collect()
}

/// Queries and gates: each head's gate behind its query.
fn with_gates(spec: &Spec, place: &Place, whole: Source) -> Option<Source> {
    let a = spec.layers.get(place.layer? as usize)?.attn.as_ref()?;
    let at = if place.role == Role::AttnGate { a.head_dim } else { 0 };
    Some(Source { order: by_head(a.heads, 2 * a.head_dim, at, a.head_dim), ..whole })
}

fn hf_common(spec: &Spec, place: &Place) -> Option<Source> {
    let at = |module: &str| Some(named(place, "model.", "layers", module));
    match place.role {
        Role::MixerNorm => at("input_layernorm"),
        Role::Q | Role::AttnGate => with_gates(spec, place, named(place, "model.", "layers", "self_attn.q_proj")),
        Role::MixerDt if place.part == Part::Bias => mixers::bare(place, "model.", "layers", "linear_attn.dt_bias"),
        Role::MixerA => mixers::bare(place, "model.", "layers", "linear_attn.A_log"),
        Role::MixerConv => mixers::conv(spec, place, "model.", "layers", "linear_attn.conv1d"),
        Role::MixerOutNorm => at("linear_attn.norm"),
        Role::MixerOut => at("linear_attn.out_proj"),
        _ => qwen2_moe::source(spec, place),
    }
}

fn next_source(spec: &Spec, place: &Place) -> Option<Source> {
    let Some(Mixer::Delta(m)) = mixers::of(spec, place) else { return hf_common(spec, place) };
    if place.part == Part::Bias {
        return hf_common(spec, place);
    }
    let (heads, each) = (m.key_heads, m.value_heads / m.key_heads);
    let values = each * m.value_dim;
    let all = 2 * m.key_dim + 2 * values;
    let qkvz = |order| Some(Source { order, ..named(place, "model.", "layers", "linear_attn.in_proj_qkvz") });
    let ba = |order| Some(Source { order, ..named(place, "model.", "layers", "linear_attn.in_proj_ba") });
    match place.role {
        Role::MixerIn => {
            let parts = [(0, m.key_dim), (m.key_dim, m.key_dim), (2 * m.key_dim, values)];
            qkvz(parts.into_iter().flat_map(|(at, n)| by_head(heads, all, at, n)).collect())
        }
        Role::MixerZ => qkvz(by_head(heads, all, 2 * m.key_dim + values, values)),
        Role::MixerBeta => ba(by_head(heads, 2 * each, 0, each)),
        Role::MixerDt => ba(by_head(heads, 2 * each, each, each)),
        _ => hf_common(spec, place),
    }
}

fn source_35(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match (place.role, place.part) {
        (Role::MixerIn, _) => "in_proj_qkv",
        (Role::MixerZ, _) => "in_proj_z",
        (Role::MixerBeta, _) => "in_proj_b",
        (Role::MixerDt, Part::Weight) => "in_proj_a",
        _ => return hf_common(spec, place),
    };
    Some(named(place, "model.", "layers", &format!("linear_attn.{module}")))
}

/// All experts of a layer in two tensors, as published files and the class have them.
fn source_35_moe(spec: &Spec, place: &Place) -> Option<Source> {
    match place.role {
        Role::Gate | Role::Up | Role::Down => super::stacked(spec, place),
        _ => source_35(spec, place),
    }
}

/// Qwen3-Next's time steps and beta lie by key head in these files, too.
fn gguf_next_source(spec: &Spec, place: &Place) -> Option<Source> {
    match (place.role, place.part) {
        (Role::MixerBeta | Role::MixerDt, Part::Weight) => {
            let of = next_source(spec, place)?;
            Some(Source { order: of.order, ..named(place, "", "blk", "ssm_ba") })
        }
        _ => gguf_source_35(spec, place),
    }
}

fn gguf_source_35(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match (place.role, place.part) {
        (Role::Q | Role::AttnGate, _) => return with_gates(spec, place, named(place, "", "blk", "attn_q")),
        (Role::FfnNorm, _) => "post_attention_norm",
        (Role::MixerIn, _) => "attn_qkv",
        (Role::MixerZ, _) => "attn_gate",
        (Role::MixerBeta, _) => "ssm_beta",
        (Role::MixerDt, Part::Weight) => "ssm_alpha",
        (Role::MixerDt, Part::Bias) => "ssm_dt",
        (role, _) if role.is_mixer() => return mixers::gguf_source(spec, place),
        _ => return gguf::standard_source(spec, place),
    };
    Some(named(place, "", "blk", module))
}

fn from_gguf(head: &GgufHead, name: &str) -> Result<Spec, SpecError> {
    // Sections of positions, of which text has one: they make no difference.
    let plain = head.without(&moe::KEYS)?.without(&["rope.dimension_sections"])?;
    let mut spec = gguf::standard(&plain, name, RopeStyle::Half)?;
    if name != "qwen3_5" {
        moe::from_gguf(head, &mut spec, true)?;
    }
    let value_heads = head.must("ssm.time_step_rank")?;
    let key_heads = head.must("ssm.group_count")?;
    let delta = Delta {
        key_heads,
        value_heads,
        key_dim: head.must("ssm.state_size")?,
        value_dim: head.must("ssm.inner_size")?.checked_div(value_heads).unwrap_or(0),
        kernel: head.must("ssm.conv_kernel")?,
        log: false,
        tiled: name != "qwen3_next" && key_heads != value_heads,
    };
    if let Some(n) = head.usize("nextn_predict_layers")?.filter(|n| *n > 0) {
        // They stand behind the others and draft; nothing else reads them.
        let kept = spec.layers.len().saturating_sub(n);
        spec.layers.truncate(kept);
    }
    let interval = head.usize("full_attention_interval")?.unwrap_or(4);
    let mixes: Vec<bool> = match head.each("attention.recurrent_layers", spec.layers.len())? {
        Some(list) => list.into_iter().map(|x| x == 1).collect(),
        None => (0..spec.layers.len()).map(|l| interval == 0 || !(l + 1).is_multiple_of(interval)).collect(),
    };
    for (layer, mixes) in spec.layers.iter_mut().zip(mixes) {
        if let Some(a) = &mut layer.attn {
            (a.qk_norm, a.gate) = (true, true);
        }
        if mixes {
            (layer.attn, layer.mixer) = (None, Some(Mixer::Delta(delta)));
        }
    }
    Ok(spec)
}

/// What all three write.
fn gguf_keys(spec: &Spec, arch: &str) -> Result<GgufKeys, SpecError> {
    let fail = |what: String| Err(SpecError { what });
    let Some(m) = first_delta(spec) else { return fail(format!("{arch} without a recurrent mixer")) };
    if m.key_dim != m.value_dim {
        return fail(format!(
            "keys of {} and values of {} channels: llama.cpp reads one width for both in {arch} files",
            m.key_dim, m.value_dim
        ));
    }
    let a = first(spec)?.0;
    let mut plain = spec.clone();
    if arch != "qwen35" {
        let (e, _) = moe::first(spec)?;
        if let Some(l) = spec.layers.iter().position(|l| l.ffn.as_ref().is_some_and(|f| f.experts.is_none())) {
            return fail(format!("layer {l} has no experts, which all layers of llama.cpp's {arch} have"));
        }
        if e.shared.is_none_or(|s| !s.gate) {
            return fail(format!("experts without a gated one beside them, which llama.cpp's {arch} has"));
        }
        ffns(&mut plain).for_each(|f| f.experts = None);
    }
    let mut keys = gguf_out::hybrid_keys(&plain, arch, a.kv_heads)?;
    if arch != "qwen35" {
        moe::to_gguf(spec, &mut keys)?;
        if !moe::first(spec)?.0.normalize {
            let what = format!("llama.cpp makes the weights of {arch}'s experts sum to 1, which this network does not");
            keys.notes.push(what);
        }
    }
    keys.number("ssm.conv_kernel", m.kernel)?;
    keys.number("ssm.state_size", m.key_dim)?;
    keys.number("ssm.group_count", m.key_heads)?;
    keys.number("ssm.time_step_rank", m.value_heads)?;
    keys.number("ssm.inner_size", m.value_dim * m.value_heads)?;
    let mixes = |l: usize| spec.layers[l].mixer.is_some();
    let fits = |n: &usize| (0..spec.layers.len()).all(|l| mixes(l) != (l + 1).is_multiple_of(*n));
    match (2..=spec.layers.len() + 1).find(fits) {
        Some(interval) => keys.number("full_attention_interval", interval)?,
        None => {
            let list = (0..spec.layers.len()).map(mixes).collect();
            keys.set("attention.recurrent_layers", GgufValue::Bools(list));
        }
    }
    Ok(keys)
}

fn to_gguf_next(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_keys(spec, "qwen3next")?, |head| from_gguf(head, "qwen3_next"))
}

fn to_gguf_35(spec: &Spec, arch: &str, read: fn(&GgufHead) -> Result<Spec, SpecError>) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_keys(spec, arch)?;
    // What the classes split positions into; text has one.
    keys.set("rope.dimension_sections", GgufValue::U32s(vec![11, 11, 10, 0]));
    gguf_out::verified(spec, keys, read)
}

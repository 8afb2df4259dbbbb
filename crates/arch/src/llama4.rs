//! Llama 4, its text part: chunks of positions on layers that turn, every position on those that do not, whose queries
//! grow with theirs; sigmoid routing that weighs what an expert reads, beside an expert for every token.

use serde_json::{Map, Value, json};

use super::config::{
    Config, attns, bad, ffns, first, interleave, llama_like, llama_source, named, num, to_llama_like, verified,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, moe, rope};
use lacuna_spec::{
    AttnSpec, Experts, Place, QkNorm, Role, RopeStyle, RouterScore, SharedExpert, Spec, SpecError, Temperature,
};

/// Llama 4.
pub(super) const LLAMA4: Family = Family {
    name: "llama4",
    model_types: &["llama4_text", "llama4"],
    gguf: &["llama4"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

/// What llama.cpp knows by the name alone: the chunk, and the temperature of layers without positions.
const CHUNK: usize = 8192;
const TUNED: Temperature = Temperature { beta: 0.1, period: 8192, shift: 1 };

/// What experts and the one of every token are.
fn mixture(count: usize, used: usize, width: usize) -> Experts {
    Experts {
        count,
        used,
        score: RouterScore::Sigmoid,
        shared: Some(SharedExpert { width, gate: false }),
        weigh_inputs: true,
        ..Experts::default()
    }
}

/// An attention of a layer that turns, or of one that does not.
fn set(a: &mut AttnSpec, turns: bool, chunk: Option<usize>, norms: bool, tuned: Option<Temperature>) {
    a.chunk = chunk;
    if turns {
        if norms {
            (a.qk_norm, a.qk_norm_over, a.qk_norm_after_rope) = (true, QkNorm::Plain, true);
        }
    } else {
        (a.rope, a.temperature) = (None, tuned);
    }
}

/// The text part, where there is a whole around it, with the words outside of it that count.
pub(super) fn text_part(config: &Value) -> Result<Value, SpecError> {
    let Some(text) = config.get("text_config").filter(|t| !t.is_null()) else { return Ok(config.clone()) };
    let mut out = text.clone();
    let Some(object) = out.as_object_mut() else { return bad("text_config is no object") };
    for key in ["tie_word_embeddings", "dtype", "torch_dtype"] {
        if let Some(v) = config.get(key).filter(|v| !v.is_null()) {
            object.insert(key.into(), v.clone());
        }
    }
    if object.contains_key("dtype") && config.get("torch_dtype").is_some_and(|v| !v.is_null()) {
        object.shift_remove("torch_dtype");
    }
    Ok(out)
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(&text_part(config)?, "llama4")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "llama4", "hidden_act", rope::common)?;
    interleave(&mut spec);
    let layers = spec.layers.len();
    // A 1 for each layer that turns; the name says the opposite. An empty list is as good as none.
    let listed = c.usizes("no_rope_layers")?;
    let turns: Vec<bool> = if listed.is_empty() {
        let every = c.usize("no_rope_layer_interval")?.max(1);
        (0..layers).map(|l| !(l + 1).is_multiple_of(every)).collect()
    } else {
        listed.into_iter().map(|n| n != 0).collect()
    };
    if turns.len() < layers {
        return bad(format!("no_rope_layers has {} entries for {layers} layers", turns.len()));
    }
    let chunk = c.opt_usize("attention_chunk_size")?;
    let chunked = chunked(&c, layers, |l| turns[l] && chunk.is_some())?;
    if chunked.contains(&true) && chunk.is_none() {
        return bad("layer_types has chunked_attention, but attention_chunk_size is missing");
    }
    // Once a number.
    let tuning = c.get("attn_temperature_tuning").is_some_and(|v| v.as_bool().unwrap_or(v.as_f64() != Some(0.0)));
    let tuned = tuning
        .then(|| {
            let (period, beta) = (c.usize("floor_scale")?, c.f64("attn_scale")? as f32);
            Ok::<_, SpecError>(Temperature { beta, period, shift: 1 })
        })
        .transpose()?;
    let (norms, bias) = (c.bool("use_qk_norm")?, c.bool("attention_bias")?);
    for (l, a) in attns(&mut spec).enumerate() {
        (a.qkv_bias, a.o_bias) = (bias, bias);
        set(a, turns[l], chunk.filter(|_| chunked[l]), norms, tuned);
    }
    let (width, dense) = (c.usize("intermediate_size")?, c.usize("intermediate_size_mlp")?);
    let sparse: Vec<bool> = match c.get("moe_layers") {
        Some(_) => {
            let listed = c.usizes("moe_layers")?;
            (0..layers).map(|l| listed.contains(&l)).collect()
        }
        None => {
            let step = c.usize("interleave_moe_layer_step")?;
            (0..layers).map(|l| step > 0 && (l + 1).is_multiple_of(step)).collect()
        }
    };
    let experts = mixture(c.usize("num_local_experts")?, c.usize("num_experts_per_tok")?, width);
    for (l, f) in ffns(&mut spec).enumerate() {
        (f.width, f.experts) = if sparse[l] { (width, Some(experts)) } else { (dense, None) };
    }
    Ok(spec)
}

/// Which layers see chunks: `layer_types` says so where it stands.
fn chunked(c: &Config, layers: usize, otherwise: impl Fn(usize) -> bool) -> Result<Vec<bool>, SpecError> {
    let Some(v) = c.get("layer_types") else { return Ok((0..layers).map(otherwise).collect()) };
    let kind = |v: &Value| match v.as_str() {
        Some("full_attention") => Ok(false),
        Some("chunked_attention") => Ok(true),
        _ => bad(format!("layer_types has {v}; known are \"full_attention\" and \"chunked_attention\"")),
    };
    let list = v.as_array().map_or_else(|| bad(format!("layer_types is {v}, not a list")), Ok)?;
    if list.len() != layers {
        return bad(format!("layer_types has {} entries for {layers} layers", list.len()));
    }
    list.iter().map(kind).collect()
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out: Map<String, Value> = to_llama_like(spec, "llama4_text", "Llama4ForCausalLM")?;
    let attns = || spec.layers.iter().filter_map(|l| l.attn.as_ref());
    let ffns = || spec.layers.iter().enumerate().filter_map(|(l, s)| Some((l, s.ffn.as_ref()?)));
    let (e, width) = moe::first(spec)?;
    let dense = ffns().find(|(_, f)| f.experts.is_none()).map_or(width, |(_, f)| f.width);
    let tuned = attns().find_map(|a| a.temperature);
    let kind = |a: &AttnSpec| if a.chunk.is_some() { "chunked_attention" } else { "full_attention" };
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("intermediate_size", json!(width));
    set("intermediate_size_mlp", json!(dense));
    set("num_local_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("moe_layers", ffns().filter(|(_, f)| f.experts.is_some()).map(|(l, _)| l).collect());
    set("no_rope_layers", attns().map(|a| u8::from(a.rope.is_some())).collect());
    set("layer_types", attns().map(kind).collect());
    set("attention_chunk_size", json!(attns().find_map(|a| a.chunk)));
    set("use_qk_norm", json!(attns().any(|a| a.qk_norm)));
    set("attn_temperature_tuning", json!(tuned.is_some()));
    if let Some(t) = tuned {
        set("floor_scale", json!(t.period));
        set("attn_scale", num(t.beta));
    }
    set("attention_bias", json!(first(spec)?.0.qkv_bias));
    verified(spec, out, from_config)
}

/// Experts lie in tensors of three axes, `[experts, inputs, outputs]`, gates before ups.
fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let ffn = || spec.layers.get(place.layer? as usize)?.ffn.as_ref();
    let module = match (place.role, place.expert) {
        (Role::Router, _) => "feed_forward.router",
        (Role::SharedGate, _) => "feed_forward.shared_expert.gate_proj",
        (Role::SharedUp, _) => "feed_forward.shared_expert.up_proj",
        (Role::SharedDown, _) => "feed_forward.shared_expert.down_proj",
        (Role::Gate, None) => "feed_forward.gate_proj",
        (Role::Up, None) => "feed_forward.up_proj",
        (Role::Down, None) => "feed_forward.down_proj",
        (Role::Gate | Role::Up | Role::Down, Some(e)) => {
            let width = ffn()?.width;
            let (module, rows) = match place.role {
                Role::Gate => ("gate_up_proj", Some((0, width))),
                Role::Up => ("gate_up_proj", Some((width, 2 * width))),
                _ => ("down_proj", None),
            };
            return Some(Source {
                rows,
                transposed: true,
                slice: Some(e as usize),
                ..Source::whole(format!("model.layers.{}.feed_forward.experts.{module}", place.layer?))
            });
        }
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    if head.usize("attention.sliding_window")? == Some(0) {
        let what = "metadata: llama4.attention.sliding_window is 0, of which llama.cpp makes a network without chunks \
                    that Lacuna does not read";
        return Err(SpecError { what: what.into() });
    }
    let mut spec = gguf::standard(&head.without(&["expert_shared_count"])?, "llama4", RopeStyle::Interleaved)?;
    let step = head.must("interleave_moe_layer_step")?;
    let (width, dense) = (head.must("expert_feed_forward_length")?, head.must("feed_forward_length")?);
    let every = head.usize("attention.sliding_window_pattern")?.unwrap_or(4);
    let (count, used) = (head.must("expert_count")?, head.must("expert_used_count")?);
    for (l, a) in attns(&mut spec).enumerate() {
        let turns = !(l + 1).is_multiple_of(4);
        let chunk = (every > 0 && !(l + 1).is_multiple_of(every)).then_some(CHUNK);
        a.window = None;
        set(a, turns, chunk, count != 128, Some(TUNED));
    }
    for (l, f) in ffns(&mut spec).enumerate() {
        let sparse = step > 0 && (l + 1).is_multiple_of(step);
        (f.width, f.experts) = if sparse { (width, Some(mixture(count, used, width))) } else { (dense, None) };
    }
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = moe::plain_keys(spec, "llama4")?;
    let (e, width) = moe::first(spec)?;
    let sparse = |l: &lacuna_spec::LayerSpec| l.ffn.as_ref().is_some_and(|f| f.experts.is_some());
    let step = spec.layers.iter().position(sparse).unwrap_or(0) + 1;
    k.number("expert_count", e.count)?;
    k.number("expert_used_count", e.used)?;
    k.number("expert_feed_forward_length", width)?;
    k.number("interleave_moe_layer_step", step)?;
    gguf_out::verified(spec, k, from_gguf)
}

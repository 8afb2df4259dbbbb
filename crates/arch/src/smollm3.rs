//! SmolLM3: Llama whose every fourth layer knows no positions.

use serde_json::{Value, json};

use super::config::{
    Config, attns, bad, ffns, first, layer_types, llama_like, llama_source, to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, rope};
use lacuna_spec::{RopeStyle, Spec, SpecError};

/// SmolLM3.
pub(super) const SMOLLM3: Family = Family {
    name: "smollm3",
    model_types: &["smollm3"],
    gguf: &["smollm3"],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "smollm3")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "smollm3", "hidden_act", rope::common)?;
    let layers = spec.layers.len();
    // A 1 for each layer that turns; the name says the opposite.
    let turns: Vec<bool> = match c.get("no_rope_layers") {
        None => {
            let every = c.usize("no_rope_layer_interval")?.max(1);
            (0..layers).map(|l| !(l + 1).is_multiple_of(every)).collect()
        }
        Some(_) => c.usizes("no_rope_layers")?.into_iter().map(|n| n != 0).collect(),
    };
    if turns.len() != layers {
        return bad(format!("no_rope_layers has {} entries for {layers} layers", turns.len()));
    }
    let window = if c.bool("use_sliding_window")? { c.opt_usize("sliding_window")? } else { None };
    let windows = c.windows(layers, window, |l| !turns[l])?;
    let (attention, mlp) = (c.bool("attention_bias")?, c.bool("mlp_bias")?);
    for ((a, w), turns) in attns(&mut spec).zip(windows).zip(turns) {
        (a.window, a.qkv_bias, a.o_bias) = (w, attention, attention);
        if !turns {
            a.rope = None;
        }
    }
    ffns(&mut spec).for_each(|f| f.bias = mlp);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "smollm3", "SmolLM3ForCausalLM")?;
    let (a, f) = first(spec)?;
    let turns = |l: &lacuna_spec::LayerSpec| u8::from(l.attn.as_ref().is_some_and(|a| a.rope.is_some()));
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("no_rope_layers", spec.layers.iter().map(turns).collect());
    set("use_sliding_window", json!(window(spec).is_some()));
    set("sliding_window", json!(window(spec)));
    set("layer_types", layer_types(spec));
    set("attention_bias", json!(a.qkv_bias));
    set("mlp_bias", json!(f.bias));
    verified(spec, out, from_config)
}

/// llama.cpp knows every fourth layer, and no other.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "smollm3", RopeStyle::Interleaved)?;
    attns(&mut spec).enumerate().filter(|(l, _)| (l + 1).is_multiple_of(4)).for_each(|(_, a)| a.rope = None);
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "smollm3")?, from_gguf)
}

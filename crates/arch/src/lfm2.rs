//! LFM2: short convolutions and a few layers of attention, each followed by a gated feed-forward part.

use serde_json::{Value, json};

use super::config::{
    Config, attns, bad, first, llama_like, llama_source, named, num, renamed, to_llama_like, verified,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, mixers, rope};
use lacuna_spec::{Mixer, Place, RopeStyle, ShortConv, Spec, SpecError};
use lacuna_spec::{Part, Role};

/// LFM2.
pub(super) const LFM2: Family = Family {
    name: "lfm2",
    model_types: &["lfm2"],
    gguf: &["lfm2"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

/// The width that the class makes of `intermediate_size`.
fn width(c: &Config) -> Result<usize, SpecError> {
    let said = match c.opt_usize("block_ff_dim")? {
        Some(n) => n,
        None => c.usize("intermediate_size")?,
    };
    if !c.bool("block_auto_adjust_ff_dim")? {
        return Ok(said);
    }
    let mut width = said.saturating_mul(2) / 3;
    let Some(factor) = c.opt_f64("block_ffn_dim_multiplier")? else { return Ok(width) };
    width = (factor * width as f64) as usize;
    let unit = c.usize("block_multiple_of")?;
    if unit == 0 {
        return bad("block_multiple_of is 0");
    }
    Ok(width.div_ceil(unit).saturating_mul(unit))
}

/// Which layers convolve.
fn convolves(c: &Config, layers: usize) -> Result<Vec<bool>, SpecError> {
    if let Some(attends) = mixers::attends(c, layers, &["conv"])? {
        return Ok(attends.into_iter().map(|a| !a).collect());
    }
    let (attends, all) = (c.usizes("full_attn_idxs")?, c.get("full_attn_idxs").is_none());
    Ok((0..layers).map(|l| !all && !attends.contains(&l)).collect())
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "lfm2")?;
    // The class's own names.
    renamed(&mut filled, "norm_eps", "rms_norm_eps");
    filled["hidden_act"] = json!("silu");
    if config.get("tie_embedding").is_some_and(|t| !t.is_null()) {
        renamed(&mut filled, "tie_embedding", "tie_word_embeddings");
    }
    let c = Config(&filled);
    let width = width(&c)?;
    let mut spec = llama_like(&c, "lfm2", "hidden_act", rope::common)?;
    let conv = ShortConv { kernel: c.usize("conv_L_cache")?, bias: c.bool("conv_bias")? };
    attns(&mut spec).for_each(|a| a.qk_norm = true);
    let convolves = convolves(&c, spec.layers.len())?;
    for (layer, convolves) in spec.layers.iter_mut().zip(convolves) {
        if let Some(f) = &mut layer.ffn {
            f.width = width;
        }
        if convolves {
            (layer.attn, layer.mixer) = (None, Some(Mixer::ShortConv(conv)));
        }
    }
    Ok(spec)
}

fn short(spec: &Spec) -> Option<ShortConv> {
    spec.layers.iter().find_map(|l| match l.mixer {
        Some(Mixer::ShortConv(m)) => Some(m),
        _ => None,
    })
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "lfm2", "Lfm2ForCausalLM")?;
    out.shift_remove("hidden_act");
    out.shift_remove("rms_norm_eps");
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("norm_eps", num(spec.norm.eps));
    let conv = short(spec);
    set("conv_L_cache", json!(conv.map_or(3, |m| m.kernel)));
    set("conv_bias", json!(conv.is_some_and(|m| m.bias)));
    set("block_auto_adjust_ff_dim", json!(false));
    set("block_multiple_of", json!(256));
    set("block_ffn_dim_multiplier", json!(1.0));
    set("layer_types", mixers::layer_types(spec, "conv"));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::FinalNorm => "embedding_norm",
        Role::AttnNorm | Role::MixerNorm => "operator_norm",
        Role::FfnNorm => "ffn_norm",
        Role::O => "self_attn.out_proj",
        Role::QNorm => "self_attn.q_layernorm",
        Role::KNorm => "self_attn.k_layernorm",
        Role::Gate => "feed_forward.w1",
        Role::Up => "feed_forward.w3",
        Role::Down => "feed_forward.w2",
        Role::MixerIn => "conv.in_proj",
        Role::MixerOut => "conv.out_proj",
        Role::MixerConv => return mixers::conv(spec, place, "model.", "layers", "conv.conv"),
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "lfm2", RopeStyle::Half)?;
    attns(&mut spec).for_each(|a| a.qk_norm = true);
    let has = |l: usize, name: &str| head.tensors.contains(&format!("blk.{l}.{name}"));
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        // No key heads: a convolution.
        if layer.attn.as_ref().is_some_and(|a| a.kv_heads == 0) {
            let Some(kernel) = head.usize("shortconv.l_cache")? else {
                return Err(SpecError { what: "metadata: lfm2.shortconv.l_cache is missing".into() });
            };
            let bias = has(l, "shortconv.in_proj.bias");
            (layer.attn, layer.mixer) = (None, Some(Mixer::ShortConv(ShortConv { kernel, bias })));
        }
    }
    Ok(spec)
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    if place.role.is_mixer() {
        return mixers::gguf_source(spec, place);
    }
    if (place.role, place.part) == (Role::FinalNorm, Part::Weight) {
        return Some(Source::whole("token_embd_norm.weight"));
    }
    gguf::standard_source(spec, place)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    first(spec)?;
    let mut keys = gguf_out::standard_keys(spec, "lfm2")?;
    if let Some(conv) = short(spec) {
        keys.number("shortconv.l_cache", conv.kernel)?;
    }
    gguf_out::verified(spec, keys, from_gguf)
}

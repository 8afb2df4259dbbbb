//! MPT: ALiBi in place of positions, LayerNorm with a scale alone, no biases, q, k and v in one matrix, an FFN four times
//! as wide as the stream.

use serde_json::{Map, Value, json};

use super::config::{Config, attns, ffns, first, inverse_root, named, num, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, Source, bad, three_in_one};
use lacuna_spec::{
    Activation, AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, NormVectors, Place, Role, RopeStyle, Spec, SpecError,
};

/// MPT.
pub(super) const MPT: Family = Family {
    name: "mpt",
    model_types: &["mpt"],
    gguf: &["mpt"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: |spec, place| match three_in_one(spec, place) {
        Some(rows) => Some(Source { rows: Some(rows), ..named(place, "", "blk", "attn_qkv") }),
        None => gguf::standard_source(spec, place),
    },
    to_gguf,
};

/// By which power of 2 the slopes end, whatever a file says: the class never asks.
const ALIBI: f32 = 8.0;

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "mpt")?;
    let c = Config(&filled);
    // The class passes these over; files that say otherwise were made for another program.
    c.only("no_bias", json!(true))?;
    c.only("expansion_ratio", json!(4))?;
    if let Some(v) = c.get("logit_scale") {
        return bad(format!("logit_scale is {v}, which Lacuna does not compute"));
    }
    let none = json!({});
    let a = Config(c.get("attn_config").unwrap_or(&none));
    if !a.0.is_object() || a.0.get("__float__").is_some() {
        return bad(format!("attn_config is {}, no object", a.0));
    }
    for (key, only) in [("alibi", json!(true)), ("prefix_lm", json!(false)), ("qk_ln", json!(false))] {
        a.only(key, only)?;
    }
    a.only("attn_uses_sequence_id", json!(false))?;
    a.only("attn_type", json!("multihead_attention"))?;
    if let Some(n) = a.opt_f64("alibi_bias_max")?.filter(|n| *n != f64::from(ALIBI)) {
        return bad(format!("attn_config.alibi_bias_max is {n}; only 8 is supported"));
    }
    let (hidden, heads) = (c.usize("d_model")?, c.usize("n_heads")?);
    let head_dim = hidden.checked_div(heads).unwrap_or(0);
    if head_dim * heads != hidden {
        return bad(format!("d_model {hidden} does not divide into {heads} heads"));
    }
    let attn = AttnSpec {
        heads,
        kv_heads: heads,
        head_dim,
        scale: a.opt_f32("softmax_scale")?.unwrap_or(inverse_root(head_dim as f64)),
        // None and 0 are one to the class.
        clip: a.opt_f32("clip_qkv")?.filter(|c| *c != 0.0),
        alibi: Some(ALIBI),
        ..AttnSpec::default()
    };
    let ffn = FfnSpec { width: hidden.saturating_mul(4), gated: false, act: Activation::Gelu, ..FfnSpec::default() };
    let layers = c.usize("n_layers")?.min(1 << 16);
    Ok(Spec {
        arch: "mpt".into(),
        hidden,
        vocab: c.usize("vocab_size")?,
        context: c.usize("max_seq_len")?,
        tied: c.bool("tie_word_embeddings")?,
        norm: Norm {
            kind: NormKind::Layer,
            eps: c.f64("layer_norm_epsilon")? as f32,
            vectors: NormVectors::Scale,
            ..Norm::default()
        },
        layers: vec![LayerSpec { attn: Some(attn), ffn: Some(ffn), ..LayerSpec::default() }; layers],
        ..Spec::default()
    })
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let a = first(spec)?.0;
    let mut attn = Map::new();
    attn.insert("alibi".into(), json!(true));
    attn.insert("alibi_bias_max".into(), json!(8));
    attn.insert("clip_qkv".into(), a.clip.map_or(Value::Null, num));
    let usual = inverse_root(a.head_dim as f64);
    attn.insert("softmax_scale".into(), if a.scale == usual { Value::Null } else { num(a.scale) });
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["MptForCausalLM"]));
    set("model_type", json!("mpt"));
    set("vocab_size", json!(spec.vocab));
    set("d_model", json!(spec.hidden));
    set("n_layers", json!(spec.layers.len()));
    set("n_heads", json!(a.heads));
    set("expansion_ratio", json!(4));
    set("max_seq_len", json!(spec.context));
    set("no_bias", json!(true));
    set("layer_norm_epsilon", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    set("attn_config", Value::Object(attn));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::Head => return Some(named(place, "", "", "lm_head")),
        Role::Embed => "wte",
        Role::FinalNorm => "norm_f",
        Role::AttnNorm => "norm_1",
        Role::FfnNorm => "norm_2",
        Role::Q | Role::K | Role::V => "attn.Wqkv",
        Role::O => "attn.out_proj",
        Role::Up => "ffn.up_proj",
        Role::Down => "ffn.down_proj",
        _ => return None,
    };
    Some(Source { rows: three_in_one(spec, place), ..named(place, "transformer.", "blocks", module) })
}

const KEYS: [&str; 2] = ["attention.max_alibi_bias", "attention.clamp_kqv"];

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::reading(head, "mpt", RopeStyle::Half, &KEYS)?;
    if !head.tensors.contains("output_norm.bias") {
        spec.norm.vectors = NormVectors::Scale;
    }
    if head.tensors.contains("position_embd.weight") || head.tensors.contains("blk.0.attn_q_norm.weight") {
        let what = "an MPT with learned positions or norms of queries and keys, which Lacuna does not read";
        return Err(SpecError { what: what.into() });
    }
    let (alibi, clip) = (head.f32(KEYS[0])?.filter(|n| *n > 0.0), head.f32(KEYS[1])?.filter(|c| *c > 0.0));
    attns(&mut spec).for_each(|a| (a.rope, a.alibi, a.clip) = (None, alibi, clip));
    ffns(&mut spec).for_each(|f| (f.gated, f.act) = (false, Activation::Gelu));
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = gguf_out::standard_keys(spec, "mpt")?;
    let a = first(spec)?.0;
    k.set(KEYS[0], GgufValue::F32(a.alibi.unwrap_or(0.0)));
    if let Some(c) = a.clip {
        k.set(KEYS[1], GgufValue::F32(c));
    }
    k.notes.push("llama.cpp computes MPT's GELU through tanh; this network has it through the error function".into());
    gguf_out::verified(spec, k, from_gguf)
}

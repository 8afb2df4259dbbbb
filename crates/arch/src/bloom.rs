//! BLOOM: ALiBi in place of positions, a norm behind the embedding, LayerNorm and biases everywhere, q, k and v head by
//! head in one matrix.

use serde_json::{Map, Value, json};

use super::config::{Config, attns, ffns, first, inverse_root, named, num, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, three_in_one};
use lacuna_spec::{Activation, AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, Place, Role, RopeStyle, Spec, SpecError};

/// BLOOM.
pub(super) const BLOOM: Family = Family {
    name: "bloom",
    model_types: &["bloom"],
    gguf: &["bloom"],
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

/// By which power of 2 the slopes end.
const ALIBI: f32 = 8.0;

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "bloom")?;
    let c = Config(&filled);
    c.only("apply_residual_connection_post_layernorm", json!(false))?;
    let hidden = c.opt_usize("n_embed")?.map_or_else(|| c.usize("hidden_size"), Ok)?;
    let heads = c.usize("n_head")?;
    let head_dim = hidden.checked_div(heads).unwrap_or(0);
    let attn = AttnSpec {
        heads,
        kv_heads: heads,
        head_dim,
        scale: inverse_root(head_dim as f64),
        qkv_bias: true,
        o_bias: true,
        alibi: Some(ALIBI),
        ..AttnSpec::default()
    };
    let ffn = FfnSpec {
        width: hidden.saturating_mul(4),
        gated: false,
        act: Activation::GeluTanh,
        bias: true,
        ..FfnSpec::default()
    };
    let layers = c.usize("n_layer")?.min(1 << 16);
    Ok(Spec {
        arch: "bloom".into(),
        hidden,
        vocab: c.usize("vocab_size")?,
        // Nothing in the network ends there.
        context: c.usize("seq_length")?,
        tied: c.bool("tie_word_embeddings")?,
        norm: Norm { kind: NormKind::Layer, eps: c.f64("layer_norm_epsilon")? as f32, ..Norm::default() },
        embed_norm: true,
        layers: vec![LayerSpec { attn: Some(attn), ffn: Some(ffn), ..LayerSpec::default() }; layers],
        ..Spec::default()
    })
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["BloomForCausalLM"]));
    set("model_type", json!("bloom"));
    set("vocab_size", json!(spec.vocab));
    set("hidden_size", json!(spec.hidden));
    set("n_layer", json!(spec.layers.len()));
    set("n_head", json!(first(spec)?.0.heads));
    set("seq_length", json!(spec.context));
    set("layer_norm_epsilon", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::Head => return Some(named(place, "", "", "lm_head")),
        Role::Embed => "word_embeddings",
        Role::EmbedNorm => "word_embeddings_layernorm",
        Role::FinalNorm => "ln_f",
        Role::AttnNorm => "input_layernorm",
        Role::FfnNorm => "post_attention_layernorm",
        Role::Q | Role::K | Role::V => "self_attention.query_key_value",
        Role::O => "self_attention.dense",
        Role::Up => "mlp.dense_h_to_4h",
        Role::Down => "mlp.dense_4h_to_h",
        _ => return None,
    };
    let rows = three_in_one(spec, place);
    let groups = match (rows, place.layer) {
        (Some(_), Some(l)) => spec.layers.get(l as usize)?.attn.as_ref()?.heads,
        _ => 1,
    };
    Some(Source { rows, groups, ..named(place, "transformer.", "h", module) })
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "bloom", RopeStyle::Half)?;
    spec.embed_norm = true;
    attns(&mut spec).for_each(|a| (a.rope, a.alibi) = (None, Some(ALIBI)));
    ffns(&mut spec).for_each(|f| (f.gated, f.act) = (false, Activation::GeluTanh));
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "bloom")?, from_gguf)
}

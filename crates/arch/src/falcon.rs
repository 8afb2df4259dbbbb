//! Falcon: LayerNorm, attention and FFN side by side behind one norm (7B), behind two (40B, 180B and Falcon 2), or one
//! after the other; q, k and v in one matrix, by groups of heads.

use serde_json::{Map, Value, json};

use super::config::{Config, activation_name, attns, bad, ffns, first, inverse_root, named, num, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, rope, three_in_one};
use lacuna_spec::{
    Activation, AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, Order, Place, Role, RopeStyle, Spec, SpecError,
};

/// Falcon.
pub(super) const FALCON: Family = Family {
    name: "falcon",
    model_types: &["falcon"],
    gguf: &["falcon"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "falcon")?;
    let c = Config(&filled);
    if c.bool("alibi")? {
        return bad("alibi is true: Falcon rounds those distances to 16 bits in a way of its own; not supported");
    }
    let (newer, beside) = (c.bool("new_decoder_architecture")?, c.bool("parallel_attn")?);
    let (hidden, heads) =
        (c.opt_usize("n_embed")?.map_or_else(|| c.usize("hidden_size"), Ok)?, c.usize("num_attention_heads")?);
    let kv_heads = match (newer, c.bool("multi_query")?) {
        (true, _) => c.opt_usize("num_kv_heads")?.unwrap_or(heads),
        (false, true) => 1,
        (false, false) => heads,
    };
    let norms = c.opt_usize("num_ln_in_parallel_attn")?.unwrap_or(if newer { 2 } else { 1 });
    let order = match (newer, beside, norms) {
        (true, true, 2) => Order::Parallel,
        (_, true, 1) => Order::Shared,
        (false, false, _) => Order::Sequential,
        _ => {
            return bad(format!(
                "new_decoder_architecture {newer} with parallel_attn {beside} and {norms} norms is not supported"
            ));
        }
    };
    let head_dim = hidden.checked_div(heads).unwrap_or(0);
    let bias = c.bool("bias")?;
    let attn = AttnSpec {
        heads,
        kv_heads,
        head_dim,
        scale: inverse_root(head_dim as f64),
        rope: Some(rope::common(&c, head_dim)?),
        qkv_bias: bias,
        o_bias: bias,
        ..AttnSpec::default()
    };
    let ffn = FfnSpec {
        width: c.opt_usize("ffn_hidden_size")?.unwrap_or(hidden.saturating_mul(4)),
        gated: false,
        act: c.activation("activation")?,
        bias,
        pre_norm: order != Order::Shared,
        ..FfnSpec::default()
    };
    let layers = c.usize("num_hidden_layers")?.min(1 << 16);
    Ok(Spec {
        arch: "falcon".into(),
        hidden,
        vocab: c.usize("vocab_size")?,
        context: c.usize("max_position_embeddings")?,
        tied: c.bool("tie_word_embeddings")?,
        norm: Norm { kind: NormKind::Layer, eps: c.f64("layer_norm_epsilon")? as f32, ..Norm::default() },
        layers: vec![LayerSpec { attn: Some(attn), ffn: Some(ffn), order, ..LayerSpec::default() }; layers],
        ..Spec::default()
    })
}

fn order(spec: &Spec) -> Order {
    spec.layers.first().map_or(Order::Sequential, |l| l.order)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let (a, f) = first(spec)?;
    let mut out = Map::new();
    let order = order(spec);
    // Groups of heads, or two norms, need the newer form.
    let newer = order == Order::Parallel || !(a.kv_heads == 1 || a.kv_heads == a.heads);
    if let Some(r) = &a.rope {
        rope::to_config(r, (a.head_dim, false), spec.context, &mut out)?;
    }
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["FalconForCausalLM"]));
    set("model_type", json!("falcon"));
    set("vocab_size", json!(spec.vocab));
    set("hidden_size", json!(spec.hidden));
    set("num_hidden_layers", json!(spec.layers.len()));
    set("num_attention_heads", json!(a.heads));
    set("num_kv_heads", json!(a.kv_heads));
    set("ffn_hidden_size", json!(f.width));
    set("activation", json!(activation_name(f.act)));
    set("max_position_embeddings", json!(spec.context));
    set("layer_norm_epsilon", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    set("alibi", json!(false));
    set("bias", json!(f.bias));
    set("new_decoder_architecture", json!(newer));
    set("multi_query", json!(a.kv_heads == 1));
    set("parallel_attn", json!(order != Order::Sequential));
    set("num_ln_in_parallel_attn", json!(if order == Order::Parallel { 2 } else { 1 }));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let order = spec.layers.get(place.layer.unwrap_or(0) as usize).map_or(Order::Sequential, |l| l.order);
    let module = match place.role {
        Role::Head => return Some(named(place, "", "", "lm_head")),
        Role::Embed => "word_embeddings",
        Role::FinalNorm => "ln_f",
        Role::AttnNorm if order == Order::Parallel => "ln_attn",
        Role::AttnNorm => "input_layernorm",
        Role::FfnNorm if order == Order::Parallel => "ln_mlp",
        Role::FfnNorm => "post_attention_layernorm",
        Role::Q | Role::K | Role::V => "self_attention.query_key_value",
        Role::O => "self_attention.dense",
        Role::Up => "mlp.dense_h_to_4h",
        Role::Down => "mlp.dense_4h_to_h",
        _ => return None,
    };
    let rows = three_in_one(spec, place);
    let groups = match (rows, place.layer) {
        (Some(_), Some(l)) => spec.layers.get(l as usize)?.attn.as_ref()?.kv_heads,
        _ => 1,
    };
    Some(Source { rows, groups, ..named(place, "transformer.", "h", module) })
}

/// llama.cpp calls the norm before attention a second one where the FFN has its own.
fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    let order = spec.layers.get(place.layer.unwrap_or(0) as usize).map_or(Order::Sequential, |l| l.order);
    let module = match (place.role, order) {
        (Role::AttnNorm, Order::Parallel) => "attn_norm_2",
        (Role::FfnNorm, Order::Parallel) => "attn_norm",
        (Role::Q | Role::K | Role::V, _) => "attn_qkv",
        _ => return gguf::standard_source(spec, place),
    };
    Some(Source { rows: three_in_one(spec, place), ..named(place, "", "blk", module) })
}

/// The files do not say which GELU: the models were made with the one through the error function, llama.cpp computes
/// the one through tanh.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "falcon", RopeStyle::Half)?;
    let two = head.tensors.contains("blk.0.attn_norm_2.weight");
    spec.layers.iter_mut().for_each(|l| l.order = if two { Order::Parallel } else { Order::Shared });
    ffns(&mut spec).for_each(|f| (f.gated, f.act, f.pre_norm) = (false, Activation::Gelu, two));
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (false, false));
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    if order(spec) == Order::Sequential {
        return Err(SpecError { what: "llama.cpp knows Falcon with attention and FFN side by side alone".into() });
    }
    let mut keys = gguf_out::standard_keys(spec, "falcon")?;
    keys.notes.push("llama.cpp computes GELU through tanh here; the network's is through the error function".into());
    gguf_out::verified(spec, keys, from_gguf)
}

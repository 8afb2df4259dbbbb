//! GPT-NeoX and Pythia: LayerNorm, attention and FFN side by side behind norms of their own (or one after the other),
//! q, k and v head by head in one matrix; a part of each head turns.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, llama_like, named, named_back, renamed, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, Source, rope, three_in_one};
use lacuna_spec::{Activation, NormKind, Order, Place, Role, RopeStyle, Spec, SpecError};

/// GPT-NeoX.
pub(super) const GPT_NEOX: Family = Family {
    name: "gpt_neox",
    model_types: &["gpt_neox"],
    gguf: &["gptneox"],
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

fn shaped(spec: &mut Spec, beside: bool) {
    spec.norm.kind = NormKind::Layer;
    if beside {
        spec.layers.iter_mut().for_each(|l| l.order = Order::Parallel);
    }
    ffns(spec).for_each(|f| (f.gated, f.bias, f.down_bias) = (false, true, false));
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "gpt_neox")?;
    renamed(&mut filled, "layer_norm_eps", "rms_norm_eps");
    renamed(&mut filled, "rotary_emb_base", "rope_theta");
    renamed(&mut filled, "rotary_pct", "partial_rotary_factor");
    // The class knows neither.
    (filled["head_dim"], filled["num_key_value_heads"]) = (Value::Null, Value::Null);
    let c = Config(&filled);
    let mut spec = llama_like(&c, "gpt_neox", "hidden_act", rope::part)?;
    shaped(&mut spec, c.bool("use_parallel_residual")?);
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (bias, bias));
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "gpt_neox", "GPTNeoXForCausalLM")?;
    named_back(&mut out, "rms_norm_eps", "layer_norm_eps");
    named_back(&mut out, "rope_theta", "rotary_emb_base");
    out.entry("partial_rotary_factor").or_insert(json!(1.0));
    named_back(&mut out, "partial_rotary_factor", "rotary_pct");
    ["head_dim", "num_key_value_heads"].iter().for_each(|key| drop(out.shift_remove(*key)));
    out.insert("use_parallel_residual".into(), json!(spec.layers.iter().any(|l| l.order == Order::Parallel)));
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::Head => return Some(named(place, "", "", "embed_out")),
        Role::Embed => "embed_in",
        Role::FinalNorm => "final_layer_norm",
        Role::AttnNorm => "input_layernorm",
        Role::FfnNorm => "post_attention_layernorm",
        Role::Q | Role::K | Role::V => "attention.query_key_value",
        Role::O => "attention.dense",
        Role::Up => "mlp.dense_h_to_4h",
        Role::Down => "mlp.dense_4h_to_h",
        _ => return None,
    };
    let rows = three_in_one(spec, place);
    let groups = match (rows, place.layer) {
        (Some(_), Some(l)) => spec.layers.get(l as usize)?.attn.as_ref()?.heads,
        _ => 1,
    };
    Some(Source { rows, groups, ..named(place, "gpt_neox.", "layers", module) })
}

/// The files do not say which GELU: the models were made with the one through the error function, llama.cpp computes
/// the one through tanh.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::reading(head, "gpt_neox", RopeStyle::Half, &["use_parallel_residual"])?;
    shaped(&mut spec, head.each("use_parallel_residual", 1)?.is_none_or(|l| l[0] != 0));
    ffns(&mut spec).for_each(|f| f.act = Activation::Gelu);
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "gptneox")?;
    let beside = spec.layers.iter().any(|l| l.order == Order::Parallel);
    keys.set("use_parallel_residual", GgufValue::Bool(beside));
    keys.notes.push("llama.cpp computes GELU through tanh here; the network's is through the error function".into());
    if !first(spec)?.0.qkv_bias {
        return Err(SpecError { what: "llama.cpp reads no gptneox file without biases on q, k, v and o".into() });
    }
    gguf_out::verified(spec, keys, from_gguf)
}

//! GPT-J: attention and FFN side by side behind one LayerNorm, a part of each head turns, neighbours together; biases on
//! the FFN and the logits. llama.cpp does not compute it.

use serde_json::{Map, Value, json};

use super::config::{Config, activation_name, bad, first, inverse_root, named, num, verified};
use super::defaults::filled;
use super::{Family, Source, gguf};
use lacuna_spec::{
    Activation, AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, Order, Place, Role, Rope, RopeScaling, RopeStyle, Spec,
    SpecError,
};

/// GPT-J.
pub(super) const GPTJ: Family = Family {
    name: "gptj",
    model_types: &["gptj"],
    gguf: &[],
    from_config,
    to_config,
    source,
    from_gguf: |_| Err(SpecError { what: "GGUF files of GPT-J do not exist".into() }),
    gguf_source: gguf::standard_source,
    to_gguf: |_| Err(SpecError { what: "GGUF files of GPT-J do not exist".into() }),
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "gptj")?;
    let c = Config(&filled);
    let (hidden, heads) = (c.usize("n_embd")?, c.usize("n_head")?);
    let head_dim = hidden.checked_div(heads).unwrap_or(0);
    let Some(dims) = c.opt_usize("rotary_dim")? else {
        return bad("rotary_dim is null: angles then go by the width of the whole stream, which is not supported");
    };
    let attn = AttnSpec {
        heads,
        kv_heads: heads,
        head_dim,
        scale: inverse_root(head_dim as f64),
        rope: Some(Rope { theta: 1e4, dims, style: RopeStyle::Interleaved, scaling: RopeScaling::Default }),
        ..AttnSpec::default()
    };
    let ffn = FfnSpec {
        width: c.opt_usize("n_inner")?.unwrap_or(hidden.saturating_mul(4)),
        gated: false,
        act: c.activation("activation_function")?,
        bias: true,
        pre_norm: false,
        ..FfnSpec::default()
    };
    let layer = LayerSpec { attn: Some(attn), ffn: Some(ffn), order: Order::Shared, ..LayerSpec::default() };
    Ok(Spec {
        arch: "gptj".into(),
        hidden,
        vocab: c.usize("vocab_size")?,
        context: c.usize("n_positions")?,
        tied: c.bool("tie_word_embeddings")?,
        norm: Norm { kind: NormKind::Layer, eps: c.f64("layer_norm_epsilon")? as f32, ..Norm::default() },
        head_bias: true,
        layers: vec![layer; c.usize("n_layer")?.min(1 << 16)],
        ..Spec::default()
    })
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let (a, f) = first(spec)?;
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["GPTJForCausalLM"]));
    set("model_type", json!("gptj"));
    set("vocab_size", json!(spec.vocab));
    set("n_positions", json!(spec.context));
    set("n_embd", json!(spec.hidden));
    set("n_layer", json!(spec.layers.len()));
    set("n_head", json!(a.heads));
    set("rotary_dim", json!(a.rope.as_ref().map(|r| r.dims)));
    set("n_inner", json!(f.width));
    set("activation_function", json!(if f.act == Activation::GeluTanh { "gelu_new" } else { activation_name(f.act) }));
    set("layer_norm_epsilon", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    verified(spec, out, from_config)
}

fn source(_: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::Head => return Some(named(place, "", "", "lm_head")),
        Role::Embed => "wte",
        Role::FinalNorm => "ln_f",
        Role::AttnNorm => "ln_1",
        Role::Q => "attn.q_proj",
        Role::K => "attn.k_proj",
        Role::V => "attn.v_proj",
        Role::O => "attn.out_proj",
        Role::Up => "mlp.fc_in",
        Role::Down => "mlp.fc_out",
        _ => return None,
    };
    Some(named(place, "transformer.", "h", module))
}

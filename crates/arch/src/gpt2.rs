//! GPT-2: LayerNorm, learned positions, biases everywhere, q, k and v in one matrix that the safetensors keep as
//! `[in, out]`.

use serde_json::{Map, Value, json};

use super::config::{Config, activation_name, first, inverse_root, named, num, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source};
use lacuna_spec::{Activation, AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, Positions, RopeStyle, Spec, SpecError};
use lacuna_spec::{Part, Place, Role};

/// GPT-2.
pub(super) const GPT2: Family = Family {
    name: "gpt2",
    model_types: &["gpt2"],
    gguf: &["gpt2"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "gpt2")?;
    let c = Config(&filled);
    c.only("add_cross_attention", json!(false))?;
    let (hidden, heads) = (c.usize("n_embd")?, c.usize("n_head")?);
    let head_dim = hidden.checked_div(heads).unwrap_or(0);
    let scaled = c.bool("scale_attn_weights")?;
    let by_layer = c.bool("scale_attn_by_inverse_layer_idx")?;
    let layer = |l: usize| LayerSpec {
        attn: Some(AttnSpec {
            heads,
            kv_heads: heads,
            head_dim,
            scale: match (scaled, by_layer) {
                (true, false) => inverse_root(head_dim as f64),
                (true, true) => inverse_root(head_dim as f64) / (l + 1) as f32,
                (false, true) => 1.0 / (l + 1) as f32,
                (false, false) => 1.0,
            },
            window: None,
            rope: None,
            qk_norm: false,
            softcap: None,
            qkv_bias: true,
            o_bias: true,
            post_norm: false,
            gate: false,
        }),
        ..LayerSpec::default()
    };
    let ffn = FfnSpec {
        width: c.opt_usize("n_inner")?.unwrap_or(hidden.saturating_mul(4)),
        gated: false,
        act: c.activation("activation_function")?,
        bias: true,
        down_bias: false,
        post_norm: false,
        experts: None,
    };
    Ok(Spec {
        arch: "gpt2".into(),
        hidden,
        vocab: c.usize("vocab_size")?,
        context: c.usize("n_positions")?,
        embed_scale: 1.0,
        tied: c.bool("tie_word_embeddings")?,
        positions: Positions::Learned { offset: 0 },
        norm: Norm { kind: NormKind::Layer, eps: c.f64("layer_norm_epsilon")? as f32, offset: 0.0, divisor: None },
        final_norm: true,
        layers: (0..c.usize("n_layer")?.min(1 << 16))
            .map(|l| LayerSpec { ffn: Some(ffn.clone()), ..layer(l) })
            .collect(),
        logit_softcap: None,
        logit_scale: 1.0,
    })
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let (a, f) = first(spec)?;
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["GPT2LMHeadModel"]));
    set("model_type", json!("gpt2"));
    set("vocab_size", json!(spec.vocab));
    set("n_positions", json!(spec.context));
    set("n_embd", json!(spec.hidden));
    set("n_layer", json!(spec.layers.len()));
    set("n_head", json!(a.heads));
    set("n_inner", json!(f.width));
    set("activation_function", json!(if f.act == Activation::GeluTanh { "gelu_new" } else { activation_name(f.act) }));
    set("layer_norm_epsilon", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    set("scale_attn_weights", json!(a.scale != 1.0));
    let second = spec.layers.get(1).and_then(|l| l.attn.as_ref());
    set("scale_attn_by_inverse_layer_idx", json!(second.is_some_and(|b| b.scale != a.scale)));
    verified(spec, out, from_config)
}

/// Rows of q, k or v in the fused matrix.
fn third(role: Role, hidden: usize) -> Option<(usize, usize)> {
    let i = [Role::Q, Role::K, Role::V].iter().position(|r| *r == role)?;
    Some((i * hidden, (i + 1) * hidden))
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::Head => return Some(named(place, "", "", "lm_head")),
        Role::Embed => "wte",
        Role::Positions => "wpe",
        Role::FinalNorm => "ln_f",
        Role::AttnNorm => "ln_1",
        Role::FfnNorm => "ln_2",
        Role::Q | Role::K | Role::V => "attn.c_attn",
        Role::O => "attn.c_proj",
        Role::Up => "mlp.c_fc",
        Role::Down => "mlp.c_proj",
        _ => return None,
    };
    Some(Source {
        rows: third(place.role, spec.hidden),
        transposed: place.role.is_linear() && place.part == Part::Weight,
        ..named(place, "transformer.", "h", module)
    })
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    match third(place.role, spec.hidden) {
        Some(rows) => Some(Source { rows: Some(rows), ..named(place, "", "blk", "attn_qkv") }),
        None => gguf::standard_source(spec, place),
    }
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "gpt2")?;
    for (key, _) in &mut keys.pairs {
        if key == "gpt2.attention.layer_norm_rms_epsilon" {
            *key = "gpt2.attention.layer_norm_epsilon".into();
        }
    }
    gguf_out::verified(spec, keys, from_gguf)
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut with_eps = head.clone();
    if let Some(eps) = head.keys.get("gpt2.attention.layer_norm_epsilon") {
        with_eps.keys.insert("gpt2.attention.layer_norm_rms_epsilon".into(), eps.clone());
    }
    let mut spec = gguf::standard(&with_eps, "gpt2", RopeStyle::Half)?;
    spec.norm.kind = NormKind::Layer;
    spec.positions = Positions::Learned { offset: 0 };
    for layer in &mut spec.layers {
        if let Some(a) = &mut layer.attn {
            a.rope = None;
        }
        if let Some(f) = &mut layer.ffn {
            (f.gated, f.act) = (false, Activation::GeluTanh);
        }
    }
    Ok(spec)
}

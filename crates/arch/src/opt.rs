//! OPT: LayerNorm before each part, ReLU, learned positions that begin at row 2. llama.cpp does not know it.

use serde_json::{Map, Value, json};

use super::config::{Config, activation_name, bad, first, inverse_root, named, verified};
use super::defaults::filled;
use super::{Family, Source, gguf};
use lacuna_spec::{AttnSpec, FfnSpec, LayerSpec, Norm, NormKind, Positions, Spec, SpecError};
use lacuna_spec::{Place, Role};

/// OPT.
pub(super) const OPT: Family = Family {
    name: "opt",
    model_types: &["opt"],
    gguf: &[],
    from_config,
    to_config,
    source,
    from_gguf: |_| Err(SpecError { what: "GGUF files of OPT do not exist".into() }),
    gguf_source: gguf::standard_source,
    to_gguf: |_| Err(SpecError { what: "GGUF files of OPT do not exist".into() }),
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "opt")?;
    let c = Config(&filled);
    for key in ["do_layer_norm_before", "layer_norm_elementwise_affine"] {
        if !c.bool(key)? {
            return bad(format!("{key} is false; only true is supported"));
        }
    }
    let (hidden, heads) = (c.usize("hidden_size")?, c.usize("num_attention_heads")?);
    if let Some(n) = c.opt_usize("word_embed_proj_dim")?.filter(|n| *n != hidden) {
        return bad(format!(
            "word_embed_proj_dim is {n}, not hidden_size {hidden}; projected embeddings are not supported"
        ));
    }
    let head_dim = hidden.checked_div(heads).unwrap_or(0);
    let bias = c.bool("enable_bias")?;
    let attn = AttnSpec {
        heads,
        kv_heads: heads,
        head_dim,
        scale: inverse_root(head_dim as f64),
        window: None,
        rope: None,
        qk_norm: false,
        softcap: None,
        qkv_bias: bias,
        o_bias: bias,
        post_norm: false,
        gate: false,
    };
    let ffn = FfnSpec {
        width: c.usize("ffn_dim")?,
        gated: false,
        act: c.activation("activation_function")?,
        bias,
        down_bias: false,
        post_norm: false,
        experts: None,
    };
    let layers = c.usize("num_hidden_layers")?.min(1 << 16);
    Ok(Spec {
        arch: "opt".into(),
        hidden,
        vocab: c.usize("vocab_size")?,
        context: c.usize("max_position_embeddings")?,
        embed_scale: 1.0,
        tied: c.bool("tie_word_embeddings")?,
        positions: Positions::Learned { offset: 2 },
        norm: Norm { kind: NormKind::Layer, eps: 1e-5, offset: 0.0, divisor: None },
        final_norm: !c.bool("_remove_final_layer_norm")?,
        layers: vec![LayerSpec { attn: Some(attn), ffn: Some(ffn), ..LayerSpec::default() }; layers],
        logit_softcap: None,
        logit_scale: 1.0,
    })
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let (a, f) = first(spec)?;
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["OPTForCausalLM"]));
    set("model_type", json!("opt"));
    set("vocab_size", json!(spec.vocab));
    set("max_position_embeddings", json!(spec.context));
    set("hidden_size", json!(spec.hidden));
    set("word_embed_proj_dim", json!(spec.hidden));
    set("num_hidden_layers", json!(spec.layers.len()));
    set("num_attention_heads", json!(a.heads));
    set("ffn_dim", json!(f.width));
    set("activation_function", json!(activation_name(f.act)));
    set("enable_bias", json!(a.qkv_bias));
    set("do_layer_norm_before", json!(true));
    set("_remove_final_layer_norm", json!(!spec.final_norm));
    set("tie_word_embeddings", json!(spec.tied));
    verified(spec, out, from_config)
}

fn source(_: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::Head => return Some(named(place, "", "", "lm_head")),
        Role::Embed => "embed_tokens",
        Role::Positions => "embed_positions",
        Role::FinalNorm => "final_layer_norm",
        Role::AttnNorm => "self_attn_layer_norm",
        Role::FfnNorm => "final_layer_norm",
        Role::Q => "self_attn.q_proj",
        Role::K => "self_attn.k_proj",
        Role::V => "self_attn.v_proj",
        Role::O => "self_attn.out_proj",
        Role::Up => "fc1",
        Role::Down => "fc2",
        _ => return None,
    };
    Some(named(place, "model.decoder.", "layers", module))
}

//! Phi 1, 1.5 and 2: attention and FFN side by side behind one LayerNorm, biases everywhere, on the logits too; a part
//! of each head turns.

use serde_json::{Value, json};

use super::config::{
    Config, attns, ffns, first, llama_like, llama_source, named, named_back, renamed, to_llama_like, verified,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, rope};
use lacuna_spec::{Activation, NormKind, Order, Place, Role, RopeStyle, Spec, SpecError};

/// Phi.
pub(super) const PHI: Family = Family {
    name: "phi",
    model_types: &["phi"],
    gguf: &["phi2"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn shaped(spec: &mut Spec) {
    spec.norm.kind = NormKind::Layer;
    spec.head_bias = true;
    spec.layers.iter_mut().for_each(|l| l.order = Order::Shared);
    attns(spec).for_each(|a| (a.qkv_bias, a.o_bias) = (true, true));
    ffns(spec).for_each(|f| (f.gated, f.bias, f.down_bias, f.pre_norm) = (false, true, false, false));
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "phi")?;
    renamed(&mut filled, "layer_norm_eps", "rms_norm_eps");
    let c = Config(&filled);
    let mut spec = llama_like(&c, "phi", "hidden_act", rope::part)?;
    shaped(&mut spec);
    let norms = c.bool("qk_layernorm")?;
    attns(&mut spec).for_each(|a| a.qk_norm = norms);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "phi", "PhiForCausalLM")?;
    named_back(&mut out, "rms_norm_eps", "layer_norm_eps");
    let (a, f) = first(spec)?;
    if f.act == Activation::GeluTanh {
        out.insert("hidden_act".into(), json!("gelu_new"));
    }
    out.insert("qk_layernorm".into(), json!(a.qk_norm));
    out.entry("partial_rotary_factor").or_insert(json!(1.0));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::FinalNorm => "final_layernorm",
        Role::O => "self_attn.dense",
        Role::QNorm => "self_attn.q_layernorm",
        Role::KNorm => "self_attn.k_layernorm",
        Role::Up => "mlp.fc1",
        Role::Down => "mlp.fc2",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

/// Files hold q, k and v apart, or in one matrix, as older ones do.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    if head.tensors.contains("blk.0.attn_qkv.weight") {
        return Err(SpecError {
            what: "attn_qkv holds q, k and v in one matrix, as old files of Phi-2 do; convert the \
             model anew"
                .into(),
        });
    }
    let mut spec = gguf::standard(head, "phi", RopeStyle::Half)?;
    shaped(&mut spec);
    ffns(&mut spec).for_each(|f| f.act = Activation::GeluTanh);
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "phi2")?, from_gguf)
}

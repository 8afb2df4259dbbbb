//! StarCoder2: LayerNorm, an FFN without a gate, biases everywhere or nowhere, windows.

use serde_json::{Value, json};

use super::config::{
    Config, attns, ffns, first, llama_like, llama_source, named, named_back, renamed, to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, rope};
use lacuna_spec::{Activation, NormKind, Place, Role, RopeStyle, Spec, SpecError};

/// StarCoder2.
pub(super) const STARCODER2: Family = Family {
    name: "starcoder2",
    model_types: &["starcoder2"],
    gguf: &["starcoder2"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "starcoder2")?;
    renamed(&mut filled, "norm_epsilon", "rms_norm_eps");
    let c = Config(&filled);
    let mut spec = llama_like(&c, "starcoder2", "hidden_act", rope::common)?;
    spec.norm.kind = NormKind::Layer;
    // The class never asks for layer_types.
    let (bias, window) = (c.bool("use_bias")?, c.opt_usize("sliding_window")?);
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias, a.window) = (bias, bias, window));
    ffns(&mut spec).for_each(|f| (f.gated, f.bias) = (false, bias));
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "starcoder2", "Starcoder2ForCausalLM")?;
    named_back(&mut out, "rms_norm_eps", "norm_epsilon");
    out.insert("use_bias".into(), json!(first(spec)?.0.qkv_bias));
    out.insert("sliding_window".into(), json!(window(spec)));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::Up => "mlp.c_fc",
        Role::Down => "mlp.c_proj",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "starcoder2", RopeStyle::Half)?;
    ffns(&mut spec).for_each(|f| (f.gated, f.act) = (false, Activation::GeluTanh));
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut keys = gguf_out::standard_keys(spec, "starcoder2")?;
    if let Some(w) = window(spec).filter(|w| *w < spec.context) {
        keys.notes.push(format!(
            "llama.cpp computes no windows in starcoder2 files: beyond {w} tokens it sees more than this network"
        ));
    }
    gguf_out::verified(spec, keys, from_gguf)
}

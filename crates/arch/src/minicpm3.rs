//! MiniCPM3: dense layers with DeepSeek's latent attention, and factors on embedding, parts and logits.

use serde_json::{Value, json};

use super::Family;
use super::config::{Config, bad, llama_like, llama_source, num, verified};
use super::deepseek::{latent, to_latent, turned};
use super::defaults::filled;
use super::gguf::{GgufHead, standard_source};
use super::gguf_out::GgufKeys;
use lacuna_spec::{RopeStyle, Spec, SpecError};

/// MiniCPM3.
pub(super) const MINICPM3: Family = Family {
    name: "minicpm3",
    model_types: &["minicpm3"],
    gguf: &[],
    from_config,
    to_config,
    source: llama_source,
    from_gguf,
    gguf_source: standard_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "minicpm3")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "minicpm3", "hidden_act", turned)?;
    latent(&c, &mut spec, RopeStyle::Half)?;
    if c.bool("mlp_bias")? {
        return bad("mlp_bias is true, which is not read");
    }
    spec.embed_scale = c.f64("scale_emb")? as f32;
    // Nulls are no factors.
    let layers = spec.layers.len() as f64;
    spec.residual_scale = c.opt_f64("scale_depth")?.map_or(1.0, |s| (s / layers.sqrt()) as f32);
    let hidden = spec.hidden as f64;
    spec.logit_scale = c.opt_f64("dim_model_base")?.map_or(1.0, |base| (base / hidden) as f32);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_latent(spec, "minicpm3", "MiniCPM3ForCausalLM")?;
    let round = |x: f64| (x * 1e5).round() / 1e5;
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("scale_emb", num(spec.embed_scale));
    set("scale_depth", json!(round(f64::from(spec.residual_scale) * (spec.layers.len() as f64).sqrt())));
    set("dim_model_base", json!((f64::from(spec.logit_scale) * spec.hidden as f64).round() as usize));
    verified(spec, out, from_config)
}

/// llama.cpp's files say none of the factors: they are constants of its code.
fn from_gguf(_: &GgufHead) -> Result<Spec, SpecError> {
    Err(SpecError { what: "minicpm3 GGUF files are not read: they say none of the network's factors".into() })
}

fn to_gguf(_: &Spec) -> Result<GgufKeys, SpecError> {
    Err(SpecError { what: "a minicpm3 GGUF file cannot say the network's factors".into() })
}

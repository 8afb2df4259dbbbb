//! HunYuan 1 (dense): Llama with norms of heads behind RoPE, whose base may be stretched by `alpha`.

use serde_json::{Value, json};

use super::config::{Config, attns, bad, first, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, rope};
use lacuna_spec::{Place, Role, RopeStyle, Spec, SpecError};

/// HunYuan.
pub(super) const HUNYUAN: Family = Family {
    name: "hunyuan_v1_dense",
    model_types: &["hunyuan_v1_dense"],
    gguf: &["hunyuan-dense"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

/// What `alpha` makes of the base, once and for all positions; the type of such a set is called dynamic.
pub(super) fn stretched(filled: &mut Value) -> Result<(), SpecError> {
    for key in ["rope_scaling", "rope_parameters"] {
        let c = Config(filled);
        let Some(set) = c.get(key).map(Config) else { continue };
        if !set.0.is_object() {
            continue;
        }
        let kind = set.opt_str("rope_type")?.map_or_else(|| set.opt_str("type"), |k| Ok(Some(k)))?;
        let alpha = set.opt_f64("alpha")?.filter(|a| *a != 0.0);
        let (Some("dynamic"), Some(alpha)) = (kind, alpha) else { continue };
        let Some(dim) = c.opt_usize("head_dim")?.filter(|d| *d > 2) else {
            return bad("alpha stretches RoPE by a power of head_dim, which is missing or too small");
        };
        let theta = set.opt_f64("rope_theta")?.map_or_else(|| c.f64("rope_theta"), Ok)?;
        let theta = theta * alpha.powf(dim as f64 / (dim as f64 - 2.0));
        filled[key] = json!({"rope_type": "default", "rope_theta": theta});
    }
    Ok(())
}

fn normed(spec: &mut Spec) {
    attns(spec).for_each(|a| (a.qk_norm, a.qk_norm_after_rope) = (true, true));
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "hunyuan_v1_dense")?;
    stretched(&mut filled)?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "hunyuan_v1_dense", "hidden_act", rope::common)?;
    normed(&mut spec);
    let bias = c.bool("attention_bias")?;
    attns(&mut spec).for_each(|a| (a.qkv_bias, a.o_bias) = (bias, bias));
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM")?;
    out.insert("attention_bias".into(), json!(first(spec)?.0.qkv_bias));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::QNorm => "self_attn.query_layernorm",
        Role::KNorm => "self_attn.key_layernorm",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "hunyuan_v1_dense", RopeStyle::Half)?;
    normed(&mut spec);
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "hunyuan-dense")?, from_gguf)
}

//! DeepSeek-V2 and V3 (and R1): latent attention, experts in groups, one for every token.

use serde_json::{Value, json};

use super::config::{Config, attn_parts, attns, bad, inverse_root, llama_like, llama_source, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, moe, rope};
use lacuna_spec::{AttnSpec, Latent, Rope, RopeScaling, RopeStyle, RouterScore, Spec, SpecError};

/// DeepSeek-V2.
pub(super) const DEEPSEEK_V2: Family = Family {
    name: "deepseek_v2",
    model_types: &["deepseek_v2"],
    gguf: &[],
    from_config: from_v2,
    to_config: to_v2,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

/// DeepSeek-V3 and R1.
pub(super) const DEEPSEEK_V3: Family = Family {
    name: "deepseek_v3",
    model_types: &["deepseek_v3"],
    gguf: &["deepseek2"],
    from_config: from_v3,
    to_config: to_v3,
    source: llama_source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

/// The classes' own: they do not hand the configuration's on to the latents' norms.
const LATENT_EPS: f32 = 1e-6;

/// The factor by which YaRN scales scores, beside that on cos and sin.
fn mscale(factor: f64, all: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * all * factor.ln() + 1.0 }
}

/// What latent attention has in common: the configuration says the parts of heads.
pub(super) fn latent(c: &Config, spec: &mut Spec, style: RopeStyle) -> Result<(), SpecError> {
    let (plain, turned) = (c.usize("qk_nope_head_dim")?, c.usize("qk_rope_head_dim")?);
    let m = Latent {
        rank: c.usize("kv_lora_rank")?,
        q_rank: c.opt_usize("q_lora_rank")?,
        plain,
        value: match c.opt_usize("v_head_dim")? {
            Some(n) => n,
            None => c.usize("hidden_size")?.checked_div(c.usize("num_attention_heads")?).unwrap_or(0),
        },
        eps: LATENT_EPS,
    };
    let heads = c.usize("num_attention_heads")?;
    if c.opt_usize("num_key_value_heads")?.is_some_and(|n| n != heads) {
        return bad("num_key_value_heads is not num_attention_heads, which latent attention needs");
    }
    let set = c.get("rope_scaling").or(c.get("rope_parameters")).map(Config);
    let all = set.map_or(Ok(None), |s| s.opt_f64("mscale_all_dim"))?.unwrap_or(0.0);
    let bias = c.bool("attention_bias")?;
    for a in attns(spec) {
        let scaled = match a.rope.as_ref().map(|r| &r.scaling) {
            Some(RopeScaling::Yarn { factor, .. }) if all != 0.0 => mscale(f64::from(*factor), all),
            None | Some(RopeScaling::Default | RopeScaling::Yarn { .. }) => 1.0,
            _ if all != 0.0 => return bad("mscale_all_dim under another scaling than yarn"),
            _ => 1.0,
        };
        a.scale = (scaled * scaled / (plain as f64 + turned as f64).sqrt()) as f32;
        (a.kv_heads, a.head_dim, a.latent) = (1, m.rank.saturating_add(turned), Some(m));
        (a.qkv_bias, a.o_bias) = (bias, bias);
        a.rope.iter_mut().for_each(|r| r.style = style);
    }
    Ok(())
}

/// RoPE of the channels that turn, whatever a head's width is.
pub(super) fn turned(c: &Config, _: usize) -> Result<Rope, SpecError> {
    rope::common(c, c.usize("qk_rope_head_dim")?)
}

fn from_v2(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "deepseek_v2")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "deepseek_v2", "hidden_act", turned)?;
    latent(&c, &mut spec, RopeStyle::Interleaved)?;
    if c.bool("mlp_bias")? {
        return bad("mlp_bias is true; the experts of the class have no biases, and dense layers alone are not read");
    }
    let mut experts = moe::routing(&c, c.usize("n_routed_experts")?, RouterScore::Softmax)?;
    // Written in published files, and not read by the class.
    experts.normalize = false;
    experts.groups = match c.opt_str("topk_method")? {
        Some("greedy") => None,
        Some("group_limited_greedy") => moe::groups(&c, 1)?,
        other => return bad(format!("topk_method is {other:?}; known are greedy and group_limited_greedy")),
    };
    let before = c.usize("first_k_dense_replace")?;
    moe::put(&mut spec, c.usize("moe_intermediate_size")?, experts, |l| l >= before);
    Ok(spec)
}

fn from_v3(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "deepseek_v3")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "deepseek_v3", "hidden_act", turned)?;
    let style = if c.bool("rope_interleave")? { RopeStyle::Interleaved } else { RopeStyle::Half };
    latent(&c, &mut spec, style)?;
    c.only("topk_method", json!("noaux_tc"))?;
    c.only("scoring_func", json!("sigmoid"))?;
    let mut experts = moe::routing(&c, c.usize("n_routed_experts")?, RouterScore::Sigmoid)?;
    (experts.correction, experts.groups) = (true, moe::groups(&c, 2)?);
    let before = c.usize("first_k_dense_replace")?;
    moe::put(&mut spec, c.usize("moe_intermediate_size")?, experts, |l| l >= before);
    Ok(spec)
}

/// Writes what [`latent`] reads, beside what all families write.
pub(super) fn to_latent(
    spec: &Spec,
    model_type: &str,
    class: &str,
) -> Result<serde_json::Map<String, Value>, SpecError> {
    // Written as if heads were what turns of them.
    let mut plain = spec.clone();
    for a in attns(&mut plain) {
        a.head_dim = a.rope.as_ref().map_or(0, |r| r.dims);
        a.rope.iter_mut().for_each(|r| r.style = RopeStyle::Half);
    }
    let mut out = to_llama_like(&plain, model_type, class)?;
    let a: &AttnSpec = attn_parts(spec)?[0];
    let Some(m) = a.latent else { return bad(format!("{model_type} without latent attention")) };
    let turned = a.rope.as_ref().map_or(0, |r| r.dims);
    out.remove("head_dim");
    // What scales scores beside 1 / sqrt(head) is YaRN's.
    let over = f64::from(a.scale) * ((m.plain + turned) as f64).sqrt();
    if let (Some(RopeScaling::Yarn { factor, attention_factor, .. }), Some(set)) =
        (a.rope.as_ref().map(|r| &r.scaling), out.get_mut("rope_scaling").and_then(Value::as_object_mut))
    {
        let factor = f64::from(*factor);
        if (over - 1.0).abs() > 1e-6 && factor > 1.0 {
            let all = (over.sqrt() - 1.0) / (0.1 * factor.ln());
            set.insert("mscale_all_dim".into(), json!((all * 1e5).round() / 1e5));
        }
        set.insert("attention_factor".into(), json!(attention_factor.to_string().parse::<f64>().unwrap_or(1.0)));
    }
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("num_key_value_heads", json!(a.heads));
    set("kv_lora_rank", json!(m.rank));
    set("q_lora_rank", json!(m.q_rank));
    set("qk_nope_head_dim", json!(m.plain));
    set("qk_rope_head_dim", json!(turned));
    set("v_head_dim", json!(m.value));
    set("attention_bias", json!(a.qkv_bias));
    Ok(out)
}

fn to_v2(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_latent(spec, "deepseek_v2", "DeepseekV2ForCausalLM")?;
    moe::write_routing(spec, &mut out)?;
    let method = if moe::first(spec)?.0.groups.is_some() { "group_limited_greedy" } else { "greedy" };
    out.insert("topk_method".into(), json!(method));
    verified(spec, out, from_v2)
}

fn to_v3(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_latent(spec, "deepseek_v3", "DeepseekV3ForCausalLM")?;
    moe::write_routing(spec, &mut out)?;
    let style = attn_parts(spec)?[0].rope.as_ref().map(|r| r.style);
    out.insert("rope_interleave".into(), json!(style == Some(RopeStyle::Interleaved)));
    out.insert("num_nextn_predict_layers".into(), json!(0));
    verified(spec, out, from_v3)
}

const KEYS: [&str; 3] = ["attention.q_lora_rank", "attention.key_length", "attention.value_length"];

/// Files of V2 and V3 have one name; those of V3 weigh experts by sigmoids.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let more = head.usize("nextn_predict_layers")?.unwrap_or(0);
    let (layers, turned) = (head.must("block_count")?.saturating_sub(more), head.must("rope.dimension_count")?);
    let plain = head.without(&moe::KEYS)?.without(&KEYS)?;
    let plain = plain.with("attention.key_length", turned)?.with("block_count", layers)?;
    let arch = if head.usize("expert_gating_func")?.unwrap_or(1) == 2 { "deepseek_v3" } else { "deepseek_v2" };
    let mut spec = gguf::standard(&plain, arch, RopeStyle::Interleaved)?;
    let rank = head.must("attention.kv_lora_rank")?;
    // Older files say what heads are, newer ones what is cached, and heads beside it.
    let of = |newer: &str, older: &str| match head.usize(newer)? {
        Some(n) => Ok(n),
        None => head.must(older),
    };
    let key = of("attention.key_length_mla", "attention.key_length")?;
    let value = of("attention.value_length_mla", "attention.value_length")?;
    let Some(apart) = key.checked_sub(turned) else {
        return bad(format!("attention.key_length {key} is less than rope.dimension_count {turned}"));
    };
    let q_rank = head.usize("attention.q_lora_rank")?.filter(|n| *n > 0);
    let m = Latent { rank, q_rank, plain: apart, value, eps: spec.norm.eps };
    // YaRN's factor on scores, by which llama.cpp makes up for none on cos and sin.
    let log_mul = f64::from(head.f32("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0));
    for a in attns(&mut spec) {
        let mut scaled = 1.0;
        if let Some(RopeScaling::Yarn { factor, attention_factor, .. }) = a.rope.as_mut().map(|r| &mut r.scaling) {
            scaled = 1.0 + log_mul * f64::from(*factor).ln();
            *attention_factor = 1.0;
        }
        a.scale = (scaled * scaled * f64::from(inverse_root(key as f64))) as f32;
        (a.kv_heads, a.head_dim, a.latent) = (1, rank.saturating_add(turned), Some(m));
    }
    moe::from_gguf(head, &mut spec, false)?;
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let a: &AttnSpec = attn_parts(spec)?[0];
    let Some(m) = a.latent else { return bad("deepseek2 without latent attention") };
    let turned = a.rope.as_ref().map_or(0, |r| r.dims);
    let mut k = moe::plain_keys(spec, "deepseek2")?;
    k.put("attention.value_length", GgufValue::U32(u32::try_from(m.rank).unwrap_or(u32::MAX)));
    k.number("attention.kv_lora_rank", m.rank)?;
    match m.q_rank {
        Some(n) => k.number("attention.q_lora_rank", n)?,
        None if spec.layers.len() == 27 => {}
        None => k.notes.push(format!(
            "llama.cpp knows queries without a latent in deepseek2 files of 27 layers alone (DeepSeek-V2-Lite); this \
             network has {} and will not load there",
            spec.layers.len()
        )),
    }
    k.number("attention.key_length_mla", m.plain + turned)?;
    k.number("attention.value_length_mla", m.value)?;
    if let Some(RopeScaling::Yarn { factor, .. }) = a.rope.as_ref().map(|r| &r.scaling) {
        let over = (f64::from(a.scale) * ((m.plain + turned) as f64).sqrt()).sqrt();
        let log_mul = if *factor > 1.0 { (over - 1.0) / f64::from(*factor).ln() } else { 0.0 };
        k.set("rope.scaling.yarn_log_multiplier", GgufValue::F32(((log_mul * 1e6).round() / 1e6) as f32));
        k.pairs.retain(|(key, _)| !key.ends_with("rope.scaling.attn_factor"));
    }
    moe::to_gguf(spec, &mut k)?;
    gguf_out::verified(spec, k, from_gguf)
}

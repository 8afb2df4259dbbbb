//! GPT-OSS: sinks, windows on every other layer, and experts whose gate and up take turns row by row, with biases.

use serde_json::{Value, json};

use super::config::{
    Config, attns, bad, ffns, first, layer_types, llama_like, llama_source, to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, moe, rope};
use lacuna_spec::{Activation, Experts, Part, Place, Role, RopeScaling, RopeStyle, Spec, SpecError};

/// GPT-OSS.
pub(super) const GPT_OSS: Family = Family {
    name: "gpt_oss",
    model_types: &["gpt_oss"],
    gguf: &["gpt-oss"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

/// What every layer has.
fn oss(spec: &mut Spec, biases: bool) {
    attns(spec).for_each(|a| (a.sinks, a.qkv_bias, a.o_bias) = (true, biases, biases));
    ffns(spec).for_each(|f| {
        (f.act, f.bias, f.down_bias) = (Activation::SwigluOai, true, false);
        // A softmax over the chosen logits is one over all made to sum to 1.
        f.experts.iter_mut().for_each(|e| (e.normalize, e.router_bias) = (true, true));
    });
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "gpt_oss")?;
    if ["rope_scaling", "rope_parameters"].iter().all(|k| Config(&filled).get(k).is_none()) {
        filled["rope_scaling"] = json!({
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
            "original_max_position_embeddings": 4096,
        });
    }
    let c = Config(&filled);
    c.only("swiglu_alpha", json!(1.702))?;
    c.only("swiglu_limit", json!(7.0))?;
    c.only("hidden_act", json!("silu"))?;
    let mut spec = llama_like(&c, "gpt_oss", "hidden_act", rope::common)?;
    let experts =
        Experts { count: c.usize("num_local_experts")?, used: c.usize("num_experts_per_tok")?, ..Experts::default() };
    ffns(&mut spec).for_each(|f| f.experts = Some(experts));
    oss(&mut spec, c.bool("attention_bias")?);
    let windows = c.windows(spec.layers.len(), c.opt_usize("sliding_window")?, |l| l.is_multiple_of(2))?;
    attns(&mut spec).zip(windows).for_each(|(a, w)| a.window = w);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut plain = spec.clone();
    ffns(&mut plain).for_each(|f| f.act = Activation::Silu);
    let mut out = to_llama_like(&plain, "gpt_oss", "GptOssForCausalLM")?;
    let (e, _) = moe::first(spec)?;
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("num_local_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("attention_bias", json!(first(spec)?.0.qkv_bias));
    set("sliding_window", json!(window(spec)));
    set("layer_types", layer_types(spec));
    set("swiglu_alpha", json!(1.702));
    set("swiglu_limit", json!(7.0));
    if !out.contains_key("rope_scaling") {
        // Absent it would be YaRN.
        out.insert("rope_scaling".into(), json!({"rope_type": "default"}));
    }
    verified(spec, out, from_config)
}

/// Experts lie in tensors of three axes, `[experts, inputs, outputs]`; of gate and up every second output.
fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let l = place.layer;
    let ffn = l.and_then(|l| spec.layers.get(l as usize)?.ffn.as_ref());
    let width = ffn.map_or(0, |f| f.width);
    let (module, from) = match place.role {
        Role::Gate => ("gate_up_proj", Some(0)),
        Role::Up => ("gate_up_proj", Some(1)),
        Role::Down => ("down_proj", None),
        Role::Router => {
            let part = if place.part == Part::Bias { "bias" } else { "weight" };
            return Some(Source::whole(format!("model.layers.{}.mlp.router.{part}", l?)));
        }
        _ => return llama_source(spec, place),
    };
    let (end, transposed) = if place.part == Part::Bias { ("_bias", false) } else { ("", true) };
    Some(Source {
        rows: from.map(|from| (from, 2 * width)),
        step: if from.is_some() { 2 } else { 1 },
        transposed,
        slice: Some(place.expert? as usize),
        ..Source::whole(format!("model.layers.{}.mlp.experts.{module}{end}", l?))
    })
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(&head.without(&moe::KEYS)?, "gpt_oss", RopeStyle::Half)?;
    moe::from_gguf(head, &mut spec, true)?;
    if spec.layers.iter().any(|l| l.ffn.as_ref().is_some_and(|f| !f.bias)) {
        return bad("a gpt-oss file without biases of its experts");
    }
    let biases = head.tensors.contains("blk.0.attn_q.bias");
    oss(&mut spec, biases);
    // llama.cpp knows the pattern by the name alone.
    for (l, a) in attns(&mut spec).enumerate() {
        a.window = a.window.filter(|_| l.is_multiple_of(2));
        if let Some(RopeScaling::Yarn { truncate, .. }) = a.rope.as_mut().map(|r| &mut r.scaling) {
            *truncate = false;
        }
    }
    Ok(spec)
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    match place.role {
        // llama.cpp's name for the norm that stands before the FFN here.
        Role::FfnNorm => gguf::standard_source(spec, &Place { role: Role::AttnPostNorm, ..*place }),
        _ => gguf::standard_source(spec, place),
    }
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let mut k = moe::plain_keys(spec, "gpt-oss")?;
    moe::to_gguf(spec, &mut k)?;
    k.notes.push("llama.cpp rounds the bounds of YaRN's ramp to whole channels, which this network does not".into());
    gguf_out::verified(spec, k, from_gguf)
}

//! Granite 4: Mamba-2 in most layers and attention, mostly without positions, in the others, each followed by experts
//! with one beside them for every token, or by that one alone; Granite's factors.

use serde_json::{Value, json};

use super::config::{Config, attns, first, llama_like, llama_source, named, num, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::granite::divisor;
use super::{Family, Source, granitemoe, mixers, moe, rope};
use lacuna_spec::{Experts, GateNorm, Mixer, Part, Place, Role, RopeStyle, SharedExpert, Spec, SpecError, Ssd};

/// Granite 4. Where no layer has a mixer, its GGUF files are Granite's.
pub(super) const GRANITEMOEHYBRID: Family = Family {
    name: "granitemoehybrid",
    model_types: &["granitemoehybrid"],
    gguf: &["granitehybrid"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "granitemoehybrid")?;
    let count = Config(&filled).opt_usize("num_local_experts")?.unwrap_or(0);
    if count == 0 {
        // The class has what is shared alone.
        filled["intermediate_size"] = json!(Config(&filled).usize("shared_intermediate_size")?);
    }
    let c = Config(&filled);
    c.only("hidden_act", json!("silu"))?;
    let mut spec = llama_like(&c, "granitemoehybrid", "hidden_act", rope::common)?;
    spec.embed_scale = c.f64("embedding_multiplier")? as f32;
    spec.residual_scale = c.f64("residual_multiplier")? as f32;
    spec.logit_scale = (1.0 / c.f64("logits_scaling")?) as f32;
    let (scale, bias) = (c.f64("attention_multiplier")? as f32, c.bool("attention_bias")?);
    attns(&mut spec).for_each(|a| (a.scale, a.qkv_bias, a.o_bias) = (scale, bias, bias));
    if c.opt_str("position_embedding_type")? != Some("rope") {
        attns(&mut spec).for_each(|a| a.rope = None);
    }
    if count > 0 {
        // A softmax over the chosen logits is one over all made to sum to 1.
        let experts = Experts {
            count,
            used: c.usize("num_experts_per_tok")?,
            normalize: true,
            shared: Some(SharedExpert { width: c.usize("shared_intermediate_size")?, gate: false }),
            ..Experts::default()
        };
        moe::put(&mut spec, c.usize("intermediate_size")?, experts, |_| true);
    }
    let layers = spec.layers.len();
    let attends = mixers::attends(&c, layers, &["mamba", "linear_attention"])?.unwrap_or(vec![false; layers]);
    if attends.contains(&false) {
        let width = c.usize("mamba_expand")?.saturating_mul(spec.hidden);
        let ssd = mixers::ssd(&c, width, GateNorm::GateFirst { groups: c.usize("mamba_n_groups")? })?;
        for (layer, _) in spec.layers.iter_mut().zip(attends).filter(|(_, attends)| !attends) {
            (layer.attn, layer.mixer) = (None, Some(Mixer::Ssd(ssd.clone())));
        }
    }
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "granitemoehybrid", "GraniteMoeHybridForCausalLM")?;
    let (a, f) = first(spec)?;
    out.shift_remove("head_dim");
    if let Some(m) = mixers::first_ssd(spec) {
        mixers::of_ssd(m, &mut out);
        out.insert("mamba_expand".into(), json!((m.heads * m.head_dim).checked_div(spec.hidden).unwrap_or(0)));
    }
    let shared = f.experts.map_or(Some(f.width), |e| e.shared.map(|s| s.width)).unwrap_or(0);
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("shared_intermediate_size", json!(shared));
    set("num_local_experts", json!(f.experts.map_or(0, |e| e.count)));
    set("num_experts_per_tok", json!(f.experts.map_or(0, |e| e.used)));
    set("position_embedding_type", a.rope.as_ref().map_or(Value::Null, |_| json!("rope")));
    set("embedding_multiplier", num(spec.embed_scale));
    set("residual_multiplier", num(spec.residual_scale));
    set("attention_multiplier", num(a.scale));
    set("logits_scaling", json!(divisor(spec.logit_scale)));
    set("attention_bias", json!(a.qkv_bias));
    let kind = |l: &lacuna_spec::LayerSpec| if l.mixer.is_some() { "mamba" } else { "attention" };
    set("layer_types", spec.layers.iter().map(kind).collect());
    verified(spec, out, from_config)
}

/// Gate above up, and down, of what every token goes through.
fn shared(place: &Place, width: usize) -> Option<Source> {
    let whole = |module: &str| named(place, "model.", "layers", &format!("shared_mlp.{module}"));
    let rows = |rows| Source { rows: Some(rows), ..whole("input_linear") };
    (place.part == Part::Weight).then(|| match place.role {
        Role::Gate | Role::SharedGate => rows((0, width)),
        Role::Up | Role::SharedUp => rows((width, 2 * width)),
        _ => whole("output_linear"),
    })
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let ffn = place.layer.and_then(|l| spec.layers.get(l as usize)?.ffn.as_ref());
    match (place.role, ffn.and_then(|f| f.experts)) {
        (Role::MixerNorm, _) => Some(named(place, "model.", "layers", "input_layernorm")),
        (role, _) if role.is_mixer() => mixers::mamba(spec, place, "model.", "layers", "mamba"),
        (Role::Gate | Role::Up | Role::Down, None) => shared(place, ffn?.width),
        (Role::SharedGate | Role::SharedUp | Role::SharedDown, Some(e)) => shared(place, e.shared?.width),
        (Role::Router | Role::Gate | Role::Up | Role::Down, Some(_)) => granitemoe::source(spec, place),
        _ => llama_source(spec, place),
    }
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    let mixer = place.role.is_mixer();
    if mixer { mixers::gguf_mamba(spec, place) } else { gguf::standard_source(spec, place) }
}

const KEYS: [&str; 2] = ["embedding_scale", "residual_scale"];

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let plain = head.without(&moe::KEYS)?.without(&KEYS)?;
    let mut spec = gguf::standard(&plain, "granitemoehybrid", RopeStyle::Interleaved)?;
    let factor = |key: &str| Ok::<_, SpecError>(head.f32(key)?.filter(|x| *x != 0.0).unwrap_or(1.0));
    spec.embed_scale = factor("embedding_scale")?;
    spec.residual_scale = factor("residual_scale")?;
    // What the file calls a scale divides here.
    spec.logit_scale = (1.0 / f64::from(factor("logit_scale")?)) as f32;
    if head.usize("expert_count")?.is_some_and(|n| n > 0) {
        moe::from_gguf(head, &mut spec, true)?;
    }
    if head.bool("rope.scaling.finetuned")? == Some(false) {
        attns(&mut spec).for_each(|a| a.rope = None);
    }
    for l in 0..spec.layers.len() {
        // No key heads: a mixer.
        if spec.layers[l].attn.as_ref().is_none_or(|a| a.kv_heads == 0) {
            let ssd = ssd_of_gguf(head, l)?;
            let layer = &mut spec.layers[l];
            (layer.attn, layer.mixer) = (None, Some(Mixer::Ssd(ssd)));
        }
    }
    Ok(spec)
}

/// Mamba-2 of layer `l` as GGUF files of hybrids describe it.
pub(super) fn ssd_of_gguf(head: &GgufHead, l: usize) -> Result<Ssd, SpecError> {
    let (heads, groups) = (head.must("ssm.time_step_rank")?, head.must("ssm.group_count")?);
    let has = |name: &str| head.tensors.contains(&format!("blk.{l}.{name}"));
    Ok(Ssd {
        heads,
        head_dim: head.must("ssm.inner_size")?.checked_div(heads).unwrap_or(0),
        state: head.must("ssm.state_size")?,
        groups,
        kernel: head.must("ssm.conv_kernel")?,
        conv_bias: has("ssm_conv1d.bias"),
        dt_limit: (0.0, None),
        gate: if has("ssm_norm.weight") { GateNorm::GateFirst { groups } } else { GateNorm::Gate },
        log: false,
        factors: None,
    })
}

/// The keys that [`ssd_of_gguf`] reads.
pub(super) fn ssd_to_gguf(m: &Ssd, k: &mut GgufKeys) -> Result<(), SpecError> {
    k.number("ssm.conv_kernel", m.kernel)?;
    k.number("ssm.inner_size", m.heads * m.head_dim)?;
    k.number("ssm.state_size", m.state)?;
    k.number("ssm.time_step_rank", m.heads)?;
    k.number("ssm.group_count", m.groups)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let fail = |what: String| Err(SpecError { what });
    let Some(m) = mixers::first_ssd(spec) else { return fail("granitehybrid without a recurrent mixer".into()) };
    if m.heads * m.head_dim != 2 * spec.hidden {
        return fail(format!(
            "a mixer of {} channels over a stream of {}: llama.cpp reads twice as many only",
            m.heads * m.head_dim,
            spec.hidden
        ));
    }
    let plain = Spec { logit_scale: 1.0, ..spec.clone() };
    let mixture = spec.layers.iter().any(|l| l.ffn.as_ref().is_some_and(|f| f.experts.is_some()));
    let mut k = match mixture {
        true => moe::plain_keys(&plain, "granitehybrid")?,
        false => gguf_out::standard_keys(&plain, "granitehybrid")?,
    };
    let a = first(spec)?.0;
    k.set("logit_scale", GgufValue::F32(divisor(spec.logit_scale) as f32));
    k.set("embedding_scale", GgufValue::F32(spec.embed_scale));
    k.set("residual_scale", GgufValue::F32(spec.residual_scale));
    k.set("attention.scale", GgufValue::F32(a.scale));
    k.set("rope.scaling.finetuned", GgufValue::Bool(a.rope.is_some()));
    if mixture {
        moe::to_gguf(spec, &mut k)?;
    }
    ssd_to_gguf(m, &mut k)?;
    gguf_out::verified(spec, k, from_gguf)
}

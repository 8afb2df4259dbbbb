//! Jamba: Mamba in most layers, attention without positions in every so many-th, and experts in every so many-th.

use serde_json::{Value, json};

use super::config::{Config, attns, first, llama_like, llama_source, named, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, bad, mixers, moe, rope};
use lacuna_spec::{Experts, Mamba, Mixer, Place, Role, RopeStyle, Spec, SpecError};

/// Jamba.
pub(super) const JAMBA: Family = Family {
    name: "jamba",
    model_types: &["jamba"],
    gguf: &["jamba"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

/// Which layers are meant by a period and the first of them.
fn every(c: &Config, period: &str, offset: &str) -> Result<impl Fn(usize) -> bool + use<>, SpecError> {
    let (every, first) = (c.usize(period)?, c.usize(offset)?);
    if first >= every {
        return bad(format!("{offset} is {first}, {period} is {every}; the first must be less"));
    }
    Ok(move |l: usize| l % every == first)
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "jamba")?;
    let c = Config(&filled);
    c.only("hidden_act", json!("silu"))?;
    c.only("mamba_proj_bias", json!(false))?;
    c.only("mamba_inner_layernorms", json!(true))?;
    if let Some(v) = c.get("sliding_window") {
        return bad(format!("sliding_window is {v}; only null is supported"));
    }
    let mut spec = llama_like(&c, "jamba", "hidden_act", rope::common)?;
    attns(&mut spec).for_each(|a| a.rope = None);
    let (count, used) = (c.usize("num_experts")?, c.usize("num_experts_per_tok")?);
    if count > 1 {
        let sparse = every(&c, "expert_layer_period", "expert_layer_offset")?;
        let experts = Experts { count, used, ..Experts::default() };
        moe::put(&mut spec, c.usize("intermediate_size")?, experts, sparse);
    }
    let rank = match c.get("mamba_dt_rank") {
        Some(v) if v.as_str() == Some("auto") => spec.hidden.div_ceil(16),
        _ => c.usize("mamba_dt_rank")?,
    };
    let mamba = Mamba {
        channels: c.usize("mamba_expand")?.saturating_mul(spec.hidden),
        state: c.usize("mamba_d_state")?,
        rank,
        kernel: c.usize("mamba_d_conv")?,
        conv_bias: c.bool("mamba_conv_bias")?,
        log: true,
    };
    let attends = every(&c, "attn_layer_period", "attn_layer_offset")?;
    for (_, layer) in spec.layers.iter_mut().enumerate().filter(|(l, _)| !attends(*l)) {
        (layer.attn, layer.mixer) = (None, Some(Mixer::Mamba(mamba)));
    }
    Ok(spec)
}

fn mamba(spec: &Spec) -> Option<Mamba> {
    spec.layers.iter().find_map(|l| match l.mixer {
        Some(Mixer::Mamba(m)) => Some(m),
        _ => None,
    })
}

/// The least period that names these layers and no others, and the first of them; one that is beyond all where there
/// are none.
fn period(layers: usize, has: impl Fn(usize) -> bool) -> (usize, usize) {
    let fits = |n: &usize| {
        let first = (0..*n).find(|first| (0..layers).all(|l| has(l) == (l % n == *first)));
        first.map(|first| (*n, first))
    };
    (1..=layers + 1).find_map(|n| fits(&n)).unwrap_or((layers + 1, layers))
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "jamba", "JambaForCausalLM")?;
    let Some(m) = mamba(spec) else { return bad("jamba without a recurrent mixer") };
    out.shift_remove("head_dim");
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    let layers = spec.layers.len();
    let (every, first) = period(layers, |l| spec.layers[l].mixer.is_none());
    set("attn_layer_period", json!(every));
    set("attn_layer_offset", json!(first));
    let experts = moe::first(spec).ok().map(|e| e.0);
    set("num_experts", json!(experts.map_or(1, |e| e.count)));
    set("num_experts_per_tok", json!(experts.map_or(1, |e| e.used)));
    let sparse = |l: usize| spec.layers[l].ffn.as_ref().is_some_and(|f| f.experts.is_some());
    let (every, first) = period(layers, sparse);
    set("expert_layer_period", json!(every));
    set("expert_layer_offset", json!(first));
    set("mamba_d_state", json!(m.state));
    set("mamba_d_conv", json!(m.kernel));
    set("mamba_expand", json!(m.channels.checked_div(spec.hidden).unwrap_or(0)));
    set("mamba_dt_rank", json!(m.rank));
    set("mamba_conv_bias", json!(m.conv_bias));
    set("mamba_proj_bias", json!(false));
    verified(spec, out, from_config)
}

/// Names of a mixer's tensors, of which two lie in one and three in another, in both layouts.
fn of_mixer(place: &Place, m: &Mamba, of: impl Fn(&str) -> Source, names: [&str; 2]) -> Option<Source> {
    let rows = |name: &str, from: usize, n: usize| Source { rows: Some((from, from + n)), ..of(name) };
    match place.role {
        Role::MixerIn => Some(rows(names[0], 0, m.channels)),
        Role::MixerZ => Some(rows(names[0], m.channels, m.channels)),
        Role::MixerDtDown => Some(rows(names[1], 0, m.rank)),
        Role::MixerB => Some(rows(names[1], m.rank, m.state)),
        Role::MixerC => Some(rows(names[1], m.rank + m.state, m.state)),
        _ => None,
    }
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let at = |module: &str| named(place, "model.", "layers", module);
    let ffn = |name: &str| match place.expert {
        Some(e) => at(&format!("feed_forward.experts.{e}.{name}")),
        None => at(&format!("feed_forward.{name}")),
    };
    let mixer = |name: &str| at(&format!("mamba.{name}"));
    Some(match (place.role, mixers::of(spec, place)) {
        (Role::FinalNorm, _) => at("final_layernorm"),
        (Role::MixerNorm, _) => at("input_layernorm"),
        (Role::FfnNorm, _) => at("pre_ff_layernorm"),
        (Role::Router, _) => at("feed_forward.router"),
        (Role::Gate, _) => ffn("gate_proj"),
        (Role::Up, _) => ffn("up_proj"),
        (Role::Down, _) => ffn("down_proj"),
        (Role::MixerConv, _) => mixers::conv(spec, place, "model.", "layers", "mamba.conv1d")?,
        (Role::MixerDt, _) => mixer("dt_proj"),
        (Role::MixerDtNorm, _) => mixer("dt_layernorm"),
        (Role::MixerBNorm, _) => mixer("b_layernorm"),
        (Role::MixerCNorm, _) => mixer("c_layernorm"),
        (Role::MixerOut, _) => mixer("out_proj"),
        (Role::MixerA, Some(Mixer::Mamba(m))) => {
            Source { axes: vec![m.channels, m.state], ..mixers::bare(place, "model.", "layers", "mamba.A_log")? }
        }
        (Role::MixerD, _) => mixers::bare(place, "model.", "layers", "mamba.D")?,
        (role, Some(Mixer::Mamba(m))) if role.is_mixer() => of_mixer(place, m, mixer, ["in_proj", "x_proj"])?,
        _ => llama_source(spec, place)?,
    })
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    let at = |module: &str| named(place, "", "blk", module);
    Some(match (place.role, mixers::of(spec, place)) {
        (Role::MixerDt, _) => at("ssm_dt"),
        (Role::MixerDtNorm, _) => at("ssm_dt_norm"),
        (Role::MixerBNorm, _) => at("ssm_b_norm"),
        (Role::MixerCNorm, _) => at("ssm_c_norm"),
        (Role::MixerA, Some(Mixer::Mamba(m))) => {
            Source { axes: vec![m.channels, m.state], ..mixers::bare(place, "", "blk", "ssm_a")? }
        }
        (role, Some(Mixer::Mamba(m))) if role.is_mixer() => {
            of_mixer(place, m, at, ["ssm_in", "ssm_x"]).or_else(|| mixers::gguf_source(spec, place))?
        }
        _ => gguf::standard_source(spec, place)?,
    })
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "jamba", RopeStyle::Half)?;
    attns(&mut spec).for_each(|a| a.rope = None);
    let has = |l: usize, name: &str| head.tensors.contains(&format!("blk.{l}.{name}"));
    for (l, layer) in spec.layers.iter_mut().enumerate() {
        if let Some(f) = &mut layer.ffn {
            let experts = f.experts.filter(|_| has(l, "ffn_gate_inp.weight"));
            f.experts = experts.map(|e| Experts { normalize: false, ..e });
        }
        // No key heads: a mixer.
        if layer.attn.as_ref().is_none_or(|a| a.kv_heads == 0) {
            let mamba = Mamba {
                channels: head.must("ssm.inner_size")?,
                state: head.must("ssm.state_size")?,
                rank: head.must("ssm.time_step_rank")?,
                kernel: head.must("ssm.conv_kernel")?,
                conv_bias: has(l, "ssm_conv1d.bias"),
                log: false,
            };
            (layer.attn, layer.mixer) = (None, Some(Mixer::Mamba(mamba)));
        }
    }
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let fail = |what: String| Err(SpecError { what });
    let Some(m) = mamba(spec) else { return fail("jamba without a recurrent mixer".into()) };
    if m.channels != 2 * spec.hidden {
        let of = (m.channels, spec.hidden);
        return fail(format!(
            "a mixer of {} channels over a stream of {}: llama.cpp reads twice as many only",
            of.0, of.1
        ));
    }
    if !m.conv_bias {
        return fail("no bias on the convolution: llama.cpp's jamba files have one".into());
    }
    let a = first(spec)?.0;
    if a.heads * a.head_dim != spec.hidden {
        return fail(format!(
            "heads of {} channels in all: llama.cpp reads as many as the stream has",
            a.heads * a.head_dim
        ));
    }
    let mut plain = spec.clone();
    super::config::ffns(&mut plain).for_each(|f| f.experts = None);
    let mut k = gguf_out::standard_keys(&plain, "jamba")?;
    if let Ok((e, _)) = moe::first(spec) {
        k.number("expert_count", e.count)?;
        k.number("expert_used_count", e.used)?;
    }
    k.number("ssm.conv_kernel", m.kernel)?;
    k.number("ssm.inner_size", m.channels)?;
    k.number("ssm.state_size", m.state)?;
    k.number("ssm.time_step_rank", m.rank)?;
    gguf_out::verified(spec, k, from_gguf)
}

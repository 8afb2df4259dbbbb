//! Mamba-2, which is mixers alone, and Bamba, which has a few layers of attention among them and a gated feed-forward
//! part in each.

use serde_json::{Map, Value, json};

use super::config::{Config, bad, first, llama_like, llama_source, named, num, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys, GgufValue};
use super::{Family, Source, mixers, rope};
use lacuna_spec::{GateNorm, LayerSpec, Mixer, Norm, RopeStyle, Spec, SpecError, Ssd};
use lacuna_spec::{Part, Place, Role};

/// Mamba-2.
pub(super) const MAMBA2: Family = Family {
    name: "mamba2",
    model_types: &["mamba2"],
    gguf: &["mamba2"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

/// Bamba.
pub(super) const BAMBA: Family = Family {
    name: "bamba",
    model_types: &["bamba"],
    gguf: &[],
    from_config: from_bamba,
    to_config: to_bamba,
    source: bamba_source,
    // llama.cpp reads it as Granite 4, and so do we: `gguf_spec` gives it that name.
    from_gguf: |_| Err(SpecError { what: "GGUF files of Bamba call themselves granitehybrid".into() }),
    gguf_source: |_, _| None,
    to_gguf: |_| Err(SpecError { what: "GGUF files of Bamba call themselves granitehybrid".into() }),
};

/// Such a network has no longest text; files of others say this much (as llama.cpp's converter does).
const CONTEXT: usize = 1 << 20;

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "mamba2")?;
    let c = Config(&filled);
    c.only("use_bias", json!(false))?;
    c.only("hidden_act", json!("silu"))?;
    let (hidden, layers) = (c.usize("hidden_size")?, c.usize("num_hidden_layers")?);
    if layers > 4096 {
        return bad(format!("num_hidden_layers is {layers}; at most 4096 are accepted"));
    }
    let groups = c.usize("n_groups")?;
    let ssd = Ssd {
        heads: c.usize("num_heads")?,
        head_dim: c.usize("head_dim")?,
        state: c.usize("state_size")?,
        groups,
        kernel: c.usize("conv_kernel")?,
        conv_bias: c.bool("use_conv_bias")?,
        dt_limit: mixers::dt_limit(&c)?,
        gate: GateNorm::GateFirst { groups },
        log: true,
        factors: None,
    };
    let width = c.f64("expand")? * hidden as f64;
    if width != (ssd.heads as f64) * (ssd.head_dim as f64) {
        return bad(format!(
            "num_heads {} times head_dim {} is not expand * hidden_size, {width}",
            ssd.heads, ssd.head_dim
        ));
    }
    let layer = LayerSpec { mixer: Some(Mixer::Ssd(ssd)), ..LayerSpec::default() };
    Ok(network(
        "mamba2",
        hidden,
        c.usize("vocab_size")?,
        c.bool("tie_word_embeddings")?,
        c.f64("layer_norm_epsilon")? as f32,
        vec![layer; layers],
    ))
}

/// A network without positions, of layers with mixers.
fn network(arch: &str, hidden: usize, vocab: usize, tied: bool, eps: f32, layers: Vec<LayerSpec>) -> Spec {
    Spec {
        arch: arch.into(),
        hidden,
        vocab,
        context: CONTEXT,
        tied,
        norm: Norm { eps, ..Norm::default() },
        layers,
        ..Spec::default()
    }
}

fn ssd_of(spec: &Spec) -> Result<&Ssd, SpecError> {
    mixers::first_ssd(spec).map_or_else(|| bad(format!("{} without a recurrent mixer", spec.arch)), Ok)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let m = ssd_of(spec)?;
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!(["Mamba2ForCausalLM"]));
    set("model_type", json!("mamba2"));
    set("vocab_size", json!(spec.vocab));
    set("hidden_size", json!(spec.hidden));
    set("num_hidden_layers", json!(spec.layers.len()));
    set("num_heads", json!(m.heads));
    set("head_dim", json!(m.head_dim));
    set("state_size", json!(m.state));
    set("n_groups", json!(m.groups));
    set("conv_kernel", json!(m.kernel));
    set("use_conv_bias", json!(m.conv_bias));
    set("use_bias", json!(false));
    // transformers 4 cannot read how transformers 5 writes what is unbounded, the class's default.
    if m.dt_limit != (0.0, None) {
        set("time_step_limit", mixers::of_dt_limit(m.dt_limit));
    }
    let (width, hidden) = (m.heads * m.head_dim, spec.hidden.max(1));
    let whole = width.is_multiple_of(hidden);
    set("expand", if whole { json!(width / hidden) } else { json!(width as f64 / hidden as f64) });
    set("layer_norm_epsilon", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    match place.role {
        Role::Head => Some(named(place, "", "", "lm_head")),
        Role::Embed => Some(named(place, "backbone.", "", "embeddings")),
        Role::FinalNorm => Some(named(place, "backbone.", "", "norm_f")),
        Role::MixerNorm => Some(named(place, "backbone.", "layers", "norm")),
        _ => mixers::mamba(spec, place, "backbone.", "layers", "mixer"),
    }
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    if place.role.is_mixer() { mixers::gguf_mamba(spec, place) } else { gguf::standard_source(spec, place) }
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let spec = gguf::standard(head, "mamba2", RopeStyle::Half)?;
    if let Some(l) = spec.layers.iter().position(|l| l.attn.is_some() || l.ffn.is_some()) {
        return Err(SpecError { what: format!("metadata: layer {l} of a mamba2 file has attention or an FFN") });
    }
    let must = |key: &str| match head.usize(key)? {
        Some(n) => Ok(n),
        None => Err(SpecError { what: format!("metadata: mamba2.{key} is missing") }),
    };
    let (heads, groups) = (must("ssm.time_step_rank")?, must("ssm.group_count")?);
    let layer = |l: usize| -> Result<LayerSpec, SpecError> {
        let ssd = Ssd {
            heads,
            head_dim: must("ssm.inner_size")?.checked_div(heads).unwrap_or(0),
            state: must("ssm.state_size")?,
            groups,
            kernel: must("ssm.conv_kernel")?,
            conv_bias: head.tensors.contains(&format!("blk.{l}.ssm_conv1d.bias")),
            dt_limit: (0.0, None),
            gate: GateNorm::GateFirst { groups },
            log: false,
            factors: None,
        };
        Ok(LayerSpec { mixer: Some(Mixer::Ssd(ssd)), ..LayerSpec::default() })
    };
    let layers = (0..spec.layers.len()).map(layer).collect::<Result<_, _>>()?;
    Ok(Spec { layers, ..spec })
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let m = ssd_of(spec)?;
    let mut k = GgufKeys::default();
    k.pairs.push(("general.architecture".into(), GgufValue::Str("mamba2".into())));
    k.number("block_count", spec.layers.len())?;
    k.number("context_length", spec.context)?;
    k.number("embedding_length", spec.hidden)?;
    k.number("vocab_size", spec.vocab)?;
    k.number("feed_forward_length", 0)?;
    k.number("attention.head_count", 0)?;
    k.set("attention.layer_norm_rms_epsilon", GgufValue::F32(spec.norm.eps));
    k.number("ssm.conv_kernel", m.kernel)?;
    k.number("ssm.inner_size", m.heads * m.head_dim)?;
    k.number("ssm.state_size", m.state)?;
    k.number("ssm.time_step_rank", m.heads)?;
    k.number("ssm.group_count", m.groups)?;
    if !m.conv_bias {
        return Err(SpecError { what: "no bias on the convolution: llama.cpp's mamba2 files have one".into() });
    }
    gguf_out::verified(spec, k, from_gguf)
}

fn from_bamba(config: &Value) -> Result<Spec, SpecError> {
    let mut filled = filled(config, "bamba")?;
    // The class turns half of each head, whatever the file says.
    filled["partial_rotary_factor"] = json!(0.5);
    for key in ["rope_parameters", "rope_scaling"] {
        if let Some(set) = filled.get_mut(key).and_then(Value::as_object_mut) {
            set.insert("partial_rotary_factor".into(), json!(0.5));
        }
    }
    let c = Config(&filled);
    for key in ["attention_bias", "mlp_bias"] {
        c.only(key, json!(false))?;
    }
    c.only("hidden_act", json!("silu"))?;
    let mut spec = llama_like(&c, "bamba", "hidden_act", rope::part)?;
    let width = c.usize("mamba_expand")?.saturating_mul(spec.hidden);
    let groups = c.usize("mamba_n_groups")?;
    let ssd = mixers::ssd(&c, width, GateNorm::GateFirst { groups })?;
    let attends = c.usizes("attn_layer_indices")?;
    for (_, layer) in spec.layers.iter_mut().enumerate().filter(|(l, _)| !attends.contains(l)) {
        (layer.attn, layer.mixer) = (None, Some(Mixer::Ssd(ssd.clone())));
    }
    Ok(spec)
}

fn to_bamba(spec: &Spec) -> Result<Value, SpecError> {
    first(spec)?;
    let mut out = to_llama_like(spec, "bamba", "BambaForCausalLM")?;
    let m = ssd_of(spec)?;
    mixers::of_ssd(m, &mut out);
    let attends: Vec<usize> = (0..spec.layers.len()).filter(|l| spec.layers[*l].mixer.is_none()).collect();
    out.insert("attn_layer_indices".into(), json!(attends));
    out.insert("mamba_expand".into(), json!((m.heads * m.head_dim).checked_div(spec.hidden).unwrap_or(0)));
    verified(spec, out, from_bamba)
}

fn bamba_source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match (place.role, place.part) {
        (Role::FinalNorm, Part::Weight) => "final_layernorm",
        (Role::AttnNorm | Role::MixerNorm, _) => "input_layernorm",
        (Role::FfnNorm, _) => "pre_ff_layernorm",
        (Role::Gate, _) => "feed_forward.gate_proj",
        (Role::Up, _) => "feed_forward.up_proj",
        (Role::Down, _) => "feed_forward.down_proj",
        (role, _) if role.is_mixer() => return mixers::mamba(spec, place, "model.", "layers", "mamba"),
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

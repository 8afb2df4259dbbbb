//! What families with recurrent mixers share: how their files keep a mixer's tensors.

use serde_json::{Map, Value, json};

use super::Source;
use super::config::{Config, bad, named, num};
use lacuna_spec::{GateNorm, Mixer, Part, Place, Role, Spec, SpecError, Ssd};

/// How files keep a mixer: `ln A` or `-A`; value heads of the delta rule in llama.cpp's order or not (which are the same
/// where every key head has one value head).
pub(super) fn set_form(mixer: &mut Mixer, log: bool, tiled: bool) {
    match mixer {
        Mixer::ShortConv(_) => {}
        Mixer::Ssd(m) => m.log = log,
        Mixer::Mamba(m) => m.log = log,
        Mixer::Delta(m) => (m.log, m.tiled) = (log, tiled && m.key_heads != m.value_heads),
    }
}

/// The mixer of a place's layer.
pub(super) fn of<'a>(spec: &'a Spec, place: &Place) -> Option<&'a Mixer> {
    spec.layers.get(place.layer? as usize)?.mixer.as_ref()
}

/// The tensor of a convolution in the Hugging Face layout: `[channels, 1, kernel]`.
pub(super) fn conv(spec: &Spec, place: &Place, prefix: &str, layers: &str, module: &str) -> Option<Source> {
    let mixer = of(spec, place)?;
    let axes = match place.part {
        Part::Weight => vec![mixer.channels(spec.hidden), 1, mixer.kernel()],
        Part::Bias => Vec::new(),
    };
    Some(Source { axes, ..named(place, prefix, layers, module) })
}

/// A tensor of a name without `.weight`: `A_log`, `D`, `dt_bias`.
pub(super) fn bare(place: &Place, prefix: &str, layers: &str, name: &str) -> Option<Source> {
    Some(Source::whole(format!("{prefix}{layers}.{}.{name}", place.layer?)))
}

/// Names of llama.cpp's tensors that mixers of all kinds share.
pub(super) fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match (place.role, of(spec, place)?) {
        (Role::MixerNorm, _) => "attn_norm",
        (Role::MixerIn, Mixer::ShortConv(_)) => "shortconv.in_proj",
        (Role::MixerConv, Mixer::ShortConv(_)) => "shortconv.conv",
        (Role::MixerOut, Mixer::ShortConv(_)) => "shortconv.out_proj",
        (Role::MixerConv, _) => "ssm_conv1d",
        (Role::MixerOut, _) => "ssm_out",
        (Role::MixerOutNorm, _) => "ssm_norm",
        (Role::MixerA, _) => return bare(place, "", "blk", "ssm_a"),
        (Role::MixerD, _) => return bare(place, "", "blk", "ssm_d"),
        _ => return None,
    };
    Some(named(place, "", "blk", module))
}

/// Mamba-2's tensors in the Hugging Face layout, below `module`: one projection for z, what goes into the convolution,
/// and time steps.
pub(super) fn mamba(spec: &Spec, place: &Place, prefix: &str, layers: &str, module: &str) -> Option<Source> {
    let mixer = of(spec, place)?;
    let of_input = |from: usize, n: usize| {
        let whole = named(place, prefix, layers, &format!("{module}.in_proj"));
        Some(Source { rows: Some((from, from + n)), ..whole })
    };
    let (width, channels, heads) = (mixer.width(spec.hidden), mixer.channels(spec.hidden), mixer.heads()?.0);
    match (place.role, place.part) {
        (Role::MixerZ, _) => of_input(0, width),
        (Role::MixerIn, _) => of_input(width, channels),
        (Role::MixerDt, Part::Weight) => of_input(width + channels, heads),
        (Role::MixerDt, Part::Bias) => bare(place, prefix, layers, &format!("{module}.dt_bias")),
        (Role::MixerA, _) => bare(place, prefix, layers, &format!("{module}.A_log")),
        (Role::MixerD, _) => bare(place, prefix, layers, &format!("{module}.D")),
        (Role::MixerConv, _) => conv(spec, place, prefix, layers, &format!("{module}.conv1d")),
        (Role::MixerOutNorm, _) => Some(named(place, prefix, layers, &format!("{module}.norm"))),
        (Role::MixerOut, _) => Some(named(place, prefix, layers, &format!("{module}.out_proj"))),
        _ => None,
    }
}

/// The same in GGUF files.
pub(super) fn gguf_mamba(spec: &Spec, place: &Place) -> Option<Source> {
    let mixer = of(spec, place)?;
    let (width, channels, heads) = (mixer.width(spec.hidden), mixer.channels(spec.hidden), mixer.heads()?.0);
    let of_input =
        |from: usize, n: usize| Some(Source { rows: Some((from, from + n)), ..named(place, "", "blk", "ssm_in") });
    let groups = match mixer {
        Mixer::Ssd(Ssd { gate: GateNorm::GateFirst { groups } | GateNorm::NormFirst { groups }, .. }) => *groups,
        _ => 1,
    };
    match (place.role, place.part) {
        (Role::MixerZ, _) => of_input(0, width),
        (Role::MixerIn, _) => of_input(width, channels),
        (Role::MixerDt, Part::Weight) => of_input(width + channels, heads),
        (Role::MixerDt, Part::Bias) => Some(named(place, "", "blk", "ssm_dt")),
        (Role::MixerA | Role::MixerD, _) => Some(Source { axes: vec![heads, 1], ..gguf_source(spec, place)? }),
        (Role::MixerOutNorm, _) => Some(Source { axes: vec![groups, width / groups], ..gguf_source(spec, place)? }),
        _ => gguf_source(spec, place),
    }
}

/// Bounds of time steps: `[least, most]`, the most infinite for most.
pub(super) fn dt_limit(c: &Config) -> Result<(f32, Option<f32>), SpecError> {
    let Some(v) = c.get("time_step_limit") else { return Ok((0.0, None)) };
    // Infinity is no number in JSON; transformers writes it as an object, or, as Python does, bare.
    let infinite = |v: &Value| {
        let word = v.get("__float__").unwrap_or(v);
        matches!(word.as_str(), Some("Infinity" | "inf"))
    };
    match v.as_array().map(Vec::as_slice) {
        Some([low, high]) => {
            let least = low.as_f64().map_or_else(|| bad(format!("time_step_limit is {v}")), |x| Ok(x as f32))?;
            match high.as_f64() {
                Some(x) => Ok((least, Some(x as f32))),
                None if infinite(high) => Ok((least, None)),
                None => bad(format!("time_step_limit is {v}")),
            }
        }
        _ => bad(format!("time_step_limit is {v}, not two numbers")),
    }
}

/// The same as a value.
pub(super) fn of_dt_limit((least, most): (f32, Option<f32>)) -> Value {
    let most = most.map_or_else(|| json!({"__float__": "Infinity"}), num);
    json!([num(least), most])
}

/// Mamba-2 as configurations of hybrids describe it (`mamba_n_heads` and so on); `width`: its channels.
pub(super) fn ssd(c: &Config, width: usize, gate: GateNorm) -> Result<Ssd, SpecError> {
    c.only("mamba_proj_bias", json!(false))?;
    let heads = c.usize("mamba_n_heads")?;
    let head_dim = match c.get("mamba_d_head") {
        Some(v) if v.as_str() == Some("auto") => width.checked_div(heads).unwrap_or(0),
        _ => c.usize("mamba_d_head")?,
    };
    if heads.saturating_mul(head_dim) != width {
        return bad(format!("mamba_n_heads {heads} times mamba_d_head {head_dim} is not the mixer's width {width}"));
    }
    Ok(Ssd {
        heads,
        head_dim,
        state: c.usize("mamba_d_state")?,
        groups: c.usize("mamba_n_groups")?,
        kernel: c.usize("mamba_d_conv")?,
        conv_bias: c.bool("mamba_conv_bias")?,
        dt_limit: dt_limit(c)?,
        gate,
        log: true,
        factors: None,
    })
}

/// The keys that [`ssd`] reads.
pub(super) fn of_ssd(m: &Ssd, out: &mut Map<String, Value>) {
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("mamba_n_heads", json!(m.heads));
    set("mamba_d_head", json!(m.head_dim));
    set("mamba_d_state", json!(m.state));
    set("mamba_n_groups", json!(m.groups));
    set("mamba_d_conv", json!(m.kernel));
    set("mamba_conv_bias", json!(m.conv_bias));
    set("mamba_proj_bias", json!(false));
    if m.dt_limit != (0.0, None) {
        set("time_step_limit", of_dt_limit(m.dt_limit));
    }
}

/// The first mixer that is Mamba-2.
pub(super) fn first_ssd(spec: &Spec) -> Option<&Ssd> {
    spec.layers.iter().find_map(|l| match &l.mixer {
        Some(Mixer::Ssd(m)) => Some(m),
        _ => None,
    })
}

/// Which layers have attention, by `layer_types`; elsewhere a mixer stands. None where the key is absent.
pub(super) fn attends(c: &Config, layers: usize, mixer: &[&str]) -> Result<Option<Vec<bool>>, SpecError> {
    let Some(types) = c.get("layer_types") else { return Ok(None) };
    let kind = |v: &Value| match v.as_str() {
        Some("full_attention" | "attention") => Ok(true),
        Some(s) if mixer.contains(&s) => Ok(false),
        _ => bad(format!("layer_types has {v}; known are \"full_attention\" and \"{}\"", mixer[0])),
    };
    let list = types.as_array().map_or_else(|| bad(format!("layer_types is {types}, not a list")), Ok)?;
    let list: Vec<bool> = list.iter().map(kind).collect::<Result<_, _>>()?;
    if list.len() != layers {
        return bad(format!("layer_types has {} entries for {layers} layers", list.len()));
    }
    Ok(Some(list))
}

/// `layer_types` as the network has them.
pub(super) fn layer_types(spec: &Spec, mixer: &str) -> Value {
    spec.layers.iter().map(|l| if l.mixer.is_some() { mixer } else { "full_attention" }).collect()
}

//! Falcon-H1: attention and Mamba-2 side by side behind one norm, and a factor wherever something is projected.
//!
//! Factors that meet without anything between them are one here: of attention's input and its keys in the scale of
//! scores, of its input and its output behind o. GGUF files have all of them in the weights.

use serde_json::{Value, json};

use super::config::{Config, attns, ffns, first, llama_like, llama_source, named, num, to_llama_like, verified};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::granitemoehybrid::{ssd_of_gguf, ssd_to_gguf};
use super::{Family, Source, bad, mixers, rope};
use lacuna_spec::{GateNorm, LayerSpec, Mixer, Part, Place, Role, RopeStyle, Spec, SpecError};

/// Falcon-H1.
pub(super) const FALCON_H1: Family = Family {
    name: "falcon_h1",
    model_types: &["falcon_h1"],
    gguf: &["falcon-h1"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source,
    to_gguf,
};

fn factors<const N: usize>(c: &Config, key: &str) -> Result<[f32; N], SpecError> {
    if c.get(key).is_none() {
        return Ok([1.0; N]);
    }
    let list = c.f32s(key)?;
    let n = list.len();
    list.try_into().map_or_else(|_| bad(format!("{key} has {n} numbers; {N} are expected")), Ok)
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "falcon_h1")?;
    let c = Config(&filled);
    for key in ["attention_bias", "mlp_bias", "projectors_bias"] {
        c.only(key, json!(false))?;
    }
    c.only("hidden_act", json!("silu"))?;
    let mut spec = llama_like(&c, "falcon_h1", "hidden_act", rope::common)?;
    spec.embed_scale = c.f64("embedding_multiplier")? as f32;
    spec.logit_scale = c.f64("lm_head_multiplier")? as f32;
    let (read, out) = (c.f64("attention_in_multiplier")?, c.f64("attention_out_multiplier")?);
    let key = c.f64("key_multiplier")?;
    for a in attns(&mut spec) {
        a.scale = (read * read * key / (a.head_dim as f64).sqrt()) as f32;
        a.out_scale = (read * out) as f32;
    }
    let [gate, down] = factors(&c, "mlp_multipliers")?;
    ffns(&mut spec).for_each(|f| (f.gate_scale, f.down_scale) = (gate, down));
    let width = match c.opt_usize("mamba_d_ssm")? {
        Some(n) => n,
        None => c.usize("mamba_expand")?.saturating_mul(spec.hidden),
    };
    let groups = c.usize("mamba_n_groups")?;
    let form = match (c.bool("mamba_rms_norm")?, c.bool("mamba_norm_before_gate")?) {
        (false, _) => GateNorm::Gate,
        (true, true) => GateNorm::NormFirst { groups },
        (true, false) => GateNorm::GateFirst { groups },
    };
    let mut ssd = mixers::ssd(&c, width, form)?;
    let (read, out) = (c.f64("ssm_in_multiplier")?, c.f64("ssm_out_multiplier")? as f32);
    let [z, x, b, c, dt] = factors::<5>(&c, "ssm_multipliers")?.map(|f| (f64::from(f) * read) as f32);
    ssd.factors = Some([z, x, b, c, dt, out]).filter(|all| *all != [1.0; 6]);
    spec.layers.iter_mut().for_each(|l| l.mixer = Some(Mixer::Ssd(ssd.clone())));
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "falcon_h1", "FalconH1ForCausalLM")?;
    let (a, f) = first(spec)?;
    let Some(m) = mixers::first_ssd(spec) else { return bad("falcon_h1 without a recurrent mixer") };
    mixers::of_ssd(m, &mut out);
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("mamba_d_ssm", json!(m.heads * m.head_dim));
    set("mamba_rms_norm", json!(m.gate != GateNorm::Gate));
    set("mamba_norm_before_gate", json!(matches!(m.gate, GateNorm::NormFirst { .. })));
    set("embedding_multiplier", num(spec.embed_scale));
    set("lm_head_multiplier", num(spec.logit_scale));
    set("attention_in_multiplier", json!(1.0));
    set("key_multiplier", json!(f64::from(a.scale) * (a.head_dim as f64).sqrt()));
    set("attention_out_multiplier", num(a.out_scale));
    set("mlp_multipliers", json!([num(f.gate_scale), num(f.down_scale)]));
    let factors = m.factors.unwrap_or([1.0; 6]).map(num);
    set("ssm_in_multiplier", json!(1.0));
    set("ssm_out_multiplier", factors[5].clone());
    set("ssm_multipliers", json!(factors[..5]));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match (place.role, place.part) {
        (Role::FinalNorm, Part::Weight) => "final_layernorm",
        (Role::MixerNorm, _) => "input_layernorm",
        (Role::FfnNorm, _) => "pre_ff_layernorm",
        (Role::Gate, _) => "feed_forward.gate_proj",
        (Role::Up, _) => "feed_forward.up_proj",
        (Role::Down, _) => "feed_forward.down_proj",
        (role, _) if role.is_mixer() => return mixers::mamba(spec, place, "model.", "layers", "mamba"),
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

fn gguf_source(spec: &Spec, place: &Place) -> Option<Source> {
    match place.role {
        // llama.cpp asks for it by a name that ends here.
        Role::FfnNorm => mixers::bare(place, "", "blk", "ffn_norm"),
        role if role.is_mixer() => mixers::gguf_mamba(spec, place),
        _ => gguf::standard_source(spec, place),
    }
}

fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "falcon_h1", RopeStyle::Half)?;
    for l in 0..spec.layers.len() {
        spec.layers[l].mixer = Some(Mixer::Ssd(ssd_of_gguf(head, l)?));
    }
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    let Some(m) = mixers::first_ssd(spec) else {
        return Err(SpecError { what: "falcon-h1 without a recurrent mixer".into() });
    };
    if matches!(m.gate, GateNorm::NormFirst { .. }) {
        return Err(SpecError { what: "the mixer's norm stands before its gate; llama.cpp has it behind that".into() });
    }
    let mut k = gguf_out::standard_keys(spec, "falcon-h1")?;
    ssd_to_gguf(m, &mut k)?;
    gguf_out::verified(spec, k, from_gguf)
}

/// The network as GGUF files hold it: no factor stands beside the weights. A head that is the embedding gets its own.
pub(super) fn folded(spec: &mut Spec) {
    if (spec.embed_scale, spec.logit_scale) != (1.0, 1.0) {
        spec.tied = false;
    }
    (spec.embed_scale, spec.logit_scale) = (1.0, 1.0);
    for layer in &mut spec.layers {
        if let Some(a) = &mut layer.attn {
            (a.scale, a.out_scale) = (super::config::inverse_root(a.head_dim as f64), 1.0);
        }
        if let Some(f) = &mut layer.ffn {
            (f.gate_scale, f.down_scale) = (1.0, 1.0);
        }
        if let Some(Mixer::Ssd(m)) = &mut layer.mixer {
            m.factors = None;
        }
    }
}

/// What row `row` of a matrix is multiplied with where its factor goes into the values: `from` and `to` are the two
/// networks, `[from, to]` of layers that of the place.
pub(super) fn fold(place: &Place, row: usize, specs: [&Spec; 2], layers: Option<[&LayerSpec; 2]>) -> f32 {
    let ratio = |of: fn(&LayerSpec) -> Option<f32>| match layers.map(|both| both.map(of)) {
        Some([Some(from), Some(to)]) => from / to,
        _ => 1.0,
    };
    if place.part == Part::Bias {
        return 1.0;
    }
    let factors = |l: &LayerSpec| match &l.mixer {
        Some(Mixer::Ssd(m)) => Some((m.heads * m.head_dim, m.groups * m.state, m.factors.unwrap_or([1.0; 6]))),
        _ => None,
    };
    let mixer = |nth: fn(usize, usize, usize) -> usize| match layers.map(|both| both.map(factors)) {
        Some([Some((x, each, from)), Some((.., to))]) => from[nth(row, x, each)] / to[nth(row, x, each)],
        _ => 1.0,
    };
    match place.role {
        Role::Embed => specs[0].embed_scale / specs[1].embed_scale,
        Role::Head => specs[0].logit_scale / specs[1].logit_scale,
        Role::K => ratio(|l| Some(l.attn.as_ref()?.scale)),
        Role::O => ratio(|l| Some(l.attn.as_ref()?.out_scale)),
        Role::Gate => ratio(|l| Some(l.ffn.as_ref()?.gate_scale)),
        Role::Down => ratio(|l| Some(l.ffn.as_ref()?.down_scale)),
        Role::MixerZ => mixer(|_, _, _| 0),
        Role::MixerIn => mixer(|row, x, each| if row < x { 1 } else { 2 + (row - x) / each.max(1) }),
        Role::MixerDt => mixer(|_, _, _| 4),
        Role::MixerOut => mixer(|_, _, _| 5),
        _ => 1.0,
    }
}

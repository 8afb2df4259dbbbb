//! EXAONE 4: norms behind the parts only and on each head; where layers see a window, those that see everything know no
//! positions.

use serde_json::{Value, json};

use super::config::{
    Config, attns, bad, ffns, layer_types, llama_like, llama_source, named, to_llama_like, verified, window,
};
use super::defaults::filled;
use super::gguf::{self, GgufHead};
use super::gguf_out::{self, GgufKeys};
use super::{Family, Source, rope};
use lacuna_spec::{Place, Role, RopeStyle, Spec, SpecError};

/// EXAONE 4.
pub(super) const EXAONE4: Family = Family {
    name: "exaone4",
    model_types: &["exaone4"],
    gguf: &["exaone4"],
    from_config,
    to_config,
    source,
    from_gguf,
    gguf_source: gguf::standard_source,
    to_gguf,
};

/// Norms behind the parts; without windows every layer turns.
fn shaped(spec: &mut Spec) {
    let windows = window(spec).is_some();
    for a in attns(spec) {
        (a.pre_norm, a.post_norm, a.qk_norm) = (false, true, true);
        if windows && a.window.is_none() {
            a.rope = None;
        }
    }
    ffns(spec).for_each(|f| (f.pre_norm, f.post_norm) = (false, true));
}

fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let filled = filled(config, "exaone4")?;
    let c = Config(&filled);
    let mut spec = llama_like(&c, "exaone4", "hidden_act", rope::common)?;
    let (layers, window) = (spec.layers.len(), c.opt_usize("sliding_window")?);
    // A period, whose last layer sees everything; a text ("LLLG") the class cannot count with.
    let every = match c.get("layer_types") {
        Some(_) => 1,
        None if window.is_none() => 1,
        None => c.usize("sliding_window_pattern")?,
    };
    if every == 0 {
        return bad("sliding_window_pattern is 0");
    }
    let windows = c.windows(layers, window, |l| !(l + 1).is_multiple_of(every))?;
    if window.is_some() && windows.iter().all(Option::is_none) {
        return bad("no layer sees the sliding_window, and so none would turn; that is not supported");
    }
    attns(&mut spec).zip(windows).for_each(|(a, w)| a.window = w);
    shaped(&mut spec);
    Ok(spec)
}

fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    let mut out = to_llama_like(spec, "exaone4", "Exaone4ForCausalLM")?;
    out.insert("sliding_window".into(), json!(window(spec)));
    out.insert("layer_types".into(), layer_types(spec));
    verified(spec, out, from_config)
}

fn source(spec: &Spec, place: &Place) -> Option<Source> {
    let module = match place.role {
        Role::AttnPostNorm => "post_attention_layernorm",
        Role::FfnPostNorm => "post_feedforward_layernorm",
        _ => return llama_source(spec, place),
    };
    Some(named(place, "model.", "layers", module))
}

/// llama.cpp knows windows in the model of 64 layers alone: of every four layers the last sees everything.
fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let mut spec = gguf::standard(head, "exaone4", RopeStyle::Half)?;
    let large = spec.layers.len() == 64;
    for (l, a) in attns(&mut spec).enumerate() {
        a.window = a.window.filter(|_| large && !(l + 1).is_multiple_of(4));
    }
    shaped(&mut spec);
    Ok(spec)
}

fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    gguf_out::verified(spec, gguf_out::standard_keys(spec, "exaone4")?, from_gguf)
}

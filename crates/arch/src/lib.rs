//! Architectures: each file maps one family's configuration and tensor names to a [`Spec`] and back. No arithmetic.
//!
//! A mapping never touches values. Where a file stores a tensor in another arrangement, [`Source`] says which rows of
//! which stored tensor are meant and whether they lie transposed; the reader does the rest.
//!
//! An option of a configuration that would change results and that the decoder does not know is refused, never passed
//! over.

mod config;
mod defaults;
mod export;
mod gemma;
mod gguf;
mod gguf_out;
mod gpt2;
mod lfm2;
mod llama;
mod mamba;
mod mixers;
mod mixtral;
mod opt;
mod phi3;
mod qwen;
mod qwen_next;
mod rope;

use serde_json::{Value, json};

pub use export::{Target, Whole, gguf_spec, gguf_targets, hf_spec, hf_targets, norm_factor, to_gguf, whole};
pub use gguf::GgufHead;
pub use gguf_out::{GgufKeys, GgufValue};

use config::{Config, bad};

use lacuna_spec::{Part, Role};
use lacuna_spec::{Place, Spec, SpecError};

/// Where a tensor of the model lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The stored tensor's name.
    pub name: String,
    /// Rows `from..to` of the stored tensor (after the transpose, if any), or entries of a stored vector; `None`: all.
    pub rows: Option<(usize, usize)>,
    /// The file keeps `[in, out]` instead of `[out, in]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// Index into the first of three axes (stacked experts of GGUF files).
    pub slice: Option<usize>,
    /// Instead of `rows`: ranges of the stored tensor's rows, one behind the other.
    pub order: Vec<(usize, usize)>,
    /// The stored tensor's axes, slowest first, where they are not the place's own: a convolution's with an axis of 1
    /// between channels and positions, a vector as a column.
    pub axes: Vec<usize>,
}

impl Source {
    /// A tensor stored as the model means it.
    pub fn whole(name: impl Into<String>) -> Source {
        let name = name.into();
        Source { name, rows: None, transposed: false, slice: None, order: Vec::new(), axes: Vec::new() }
    }

    /// Rows `from..from + n` of a tensor.
    pub fn rows(name: impl Into<String>, from: usize, n: usize) -> Source {
        Source { rows: Some((from, from + n)), ..Source::whole(name) }
    }
}

/// Says where the tensor of a place lies.
pub type SourceOf = fn(&Spec, &Place) -> Option<Source>;

/// One family of models: how its files describe a network.
pub struct Family {
    /// [`Spec::arch`].
    pub name: &'static str,
    /// `model_type` in config.json.
    pub model_types: &'static [&'static str],
    /// `general.architecture` in GGUF files.
    pub gguf: &'static [&'static str],
    /// Reads a config.json.
    pub from_config: fn(&Value) -> Result<Spec, SpecError>,
    /// Writes a config.json, refusing networks that such a file cannot describe.
    pub to_config: fn(&Spec) -> Result<Value, SpecError>,
    /// The tensor behind a place in the Hugging Face layout.
    pub source: SourceOf,
    /// Reads a GGUF file's metadata.
    pub from_gguf: fn(&GgufHead) -> Result<Spec, SpecError>,
    /// The tensor behind a place in a GGUF file.
    pub gguf_source: SourceOf,
    /// Writes a GGUF file's metadata, refusing networks that such a file cannot describe.
    pub to_gguf: fn(&Spec) -> Result<GgufKeys, SpecError>,
}

/// Every family. Where two answer to one GGUF name, the first does.
pub const FAMILIES: &[Family] = &[
    llama::LLAMA,
    llama::MISTRAL,
    mixtral::MIXTRAL,
    qwen::QWEN2,
    qwen::QWEN3,
    qwen::QWEN3_MOE,
    gemma::GEMMA2,
    gemma::GEMMA3,
    phi3::PHI3,
    gpt2::GPT2,
    opt::OPT,
    lfm2::LFM2,
    qwen_next::QWEN3_NEXT,
    qwen_next::QWEN3_5,
    mamba::MAMBA2,
    mamba::BAMBA,
];

fn family(spec: &Spec) -> Result<&'static Family, SpecError> {
    FAMILIES
        .iter()
        .find(|f| f.name == spec.arch)
        .ok_or_else(|| SpecError { what: format!("'{}' is no family of models that Lacuna knows", spec.arch) })
}

fn known(names: fn(&Family) -> &'static [&'static str]) -> String {
    FAMILIES.iter().flat_map(names).copied().collect::<Vec<_>>().join(", ")
}

/// The network that a config.json describes.
pub fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let Some(name) = config.get("model_type").and_then(Value::as_str) else {
        return Err(SpecError { what: "config.json has no model_type".into() });
    };
    let Some(family) = FAMILIES.iter().find(|f| f.model_types.contains(&name)) else {
        let known = known(|f| f.model_types);
        return Err(SpecError { what: format!("config.json: model_type is \"{name}\"; known are {known}") });
    };
    for part in [Some(config), config.get("text_config")].into_iter().flatten() {
        // A null is as good as false to transformers here.
        if let Some(v) = part.get("is_causal").filter(|v| **v != json!(true)) {
            return bad(format!("is_causal is {v}; only true is supported"));
        }
        let differ = Config(part).get("per_layer_config");
        if differ.is_some_and(|v| v.as_object().is_none_or(|o| !o.is_empty())) {
            return bad("per_layer_config makes layers differ in ways that Lacuna does not read");
        }
    }
    let spec = (family.from_config)(config)?;
    spec.check()?;
    Ok(spec)
}

/// A config.json for the network, or why there can be none.
pub fn to_config(spec: &Spec) -> Result<Value, SpecError> {
    (family(spec)?.to_config)(spec)
}

/// The network that a GGUF file's metadata describe.
pub fn from_gguf(head: &GgufHead) -> Result<Spec, SpecError> {
    let name = head.str("general.architecture")?;
    let Some(family) = FAMILIES.iter().find(|f| f.gguf.contains(&name)) else {
        let known = known(|f| f.gguf);
        return Err(SpecError { what: format!("general.architecture is \"{name}\"; known are {known}") });
    };
    let spec = (family.from_gguf)(head)?;
    spec.check()?;
    Ok(spec)
}

/// Where the tensor at `place` may lie in a Hugging Face checkpoint: the first name that the file has is the one. Empty
/// where the network has no such tensor.
///
/// Files saved from a bare model lack the outer `model.` or `transformer.`; those of a model that also sees images wrap
/// the names once more. transformers 5 can save all experts of a layer in two tensors, as its classes hold them.
pub fn sources(spec: &Spec, place: &Place) -> Vec<Source> {
    let Some(own) = of_place(spec, place, |f| f.source) else { return Vec::new() };
    let mut out = Vec::new();
    for first in [Some(own), stacked(spec, place)].into_iter().flatten() {
        let mut names = vec![first.name.clone(), format!("language_model.{}", first.name)];
        if let Some(bare) = ["model.", "transformer."].iter().find_map(|p| first.name.strip_prefix(p)) {
            names.push(bare.to_owned());
            names.push(format!("model.language_model.{bare}"));
        }
        out.extend(names.into_iter().map(|name| Source { name, ..first.clone() }));
    }
    out
}

/// Where a layer's experts lie stacked: gate above up in `[experts, 2 * width, hidden]`, and down. The router beside
/// them has one name in all classes.
fn stacked(spec: &Spec, place: &Place) -> Option<Source> {
    let l = place.layer?;
    let ffn = spec.layers.get(l as usize)?.ffn.as_ref().filter(|f| f.experts.is_some())?;
    let (module, rows) = match place.role {
        Role::Router => ("gate.weight", None),
        Role::Gate => ("experts.gate_up_proj", Some((0, ffn.width))),
        Role::Up => ("experts.gate_up_proj", Some((ffn.width, 2 * ffn.width))),
        Role::Down => ("experts.down_proj", None),
        _ => return None,
    };
    let slice = place.expert.map(|e| e as usize);
    let name = format!("model.layers.{l}.mlp.{module}");
    (place.part == Part::Weight).then_some(Source { rows, slice, ..Source::whole(name) })
}

/// Where the tensor at `place` may lie in a GGUF file, as [`sources`]: experts stacked, or one by one as older files
/// have them.
pub fn gguf_sources(spec: &Spec, place: &Place) -> Vec<Source> {
    let Some(first) = of_place(spec, place, |f| f.gguf_source) else { return Vec::new() };
    match first.slice {
        Some(e) => {
            let older = first.name.replace("_exps.", &format!(".{e}."));
            vec![first, Source::whole(older)]
        }
        None => vec![first],
    }
}

fn of_place(spec: &Spec, place: &Place, of: fn(&Family) -> SourceOf) -> Option<Source> {
    spec.shape(place)?;
    of(family(spec).ok()?)(spec, place)
}

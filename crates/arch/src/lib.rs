//! Architectures: each file maps one family's configuration and tensor names to a [`Spec`] and back. No arithmetic.
//!
//! A mapping never touches values. Where a file stores a tensor in another arrangement, [`Source`] says which rows of
//! which stored tensor are meant and whether they lie transposed; the reader does the rest.
//!
//! An option of a configuration that would change results and that the decoder does not know is refused, never passed
//! over.

mod apertus;
mod bloom;
mod cohere;
mod config;
mod deepseek;
mod defaults;
mod ernie4_5;
mod ernie4_5_moe;
mod exaone4;
mod export;
mod falcon;
mod falcon_h1;
mod gemma;
mod gemma3n;
mod gemma4;
mod gguf;
mod gguf_out;
mod glm;
mod glm4_moe;
mod gpt2;
mod gpt_neox;
mod gpt_oss;
mod gptj;
mod granite;
mod granitemoe;
mod granitemoehybrid;
mod helium;
mod hunyuan;
mod hunyuan_v1_moe;
mod jamba;
mod lfm2;
mod llama;
mod llama4;
mod mamba;
mod minicpm3;
mod mixers;
mod mixtral;
mod moe;
mod mpt;
mod nemotron;
mod olmo;
mod olmoe;
mod opt;
mod phi;
mod phi3;
mod qwen;
mod qwen2_moe;
mod qwen_next;
mod rope;
mod seed_oss;
mod smollm3;
mod stablelm;
mod starcoder2;

use serde_json::{Value, json};

pub use export::{
    Target, Whole, fold, gguf_spec, gguf_targets, hf_rope_style, hf_spec, hf_targets, norm_factor, to_gguf, whole,
};
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
    /// Of those rows every so many-th, from the first on: 1 for most (GPT-OSS's gates and ups take turns).
    pub step: usize,
    /// The file keeps `[in, out]` instead of `[out, in]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// Those rows hold the transpose of what is meant (a head's part of DeepSeek's kv_b).
    pub turned: bool,
    /// Index into the first of three axes, of a vector's two (stacked experts).
    pub slice: Option<usize>,
    /// The stored rows lie in so many groups, each with its share of every part: of the first, of the second and so on.
    /// `rows` counts as if the parts lay whole, one below the other.
    pub groups: usize,
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
        let (order, axes) = (Vec::new(), Vec::new());
        Source { name, rows: None, step: 1, transposed: false, turned: false, slice: None, groups: 1, order, axes }
    }

    /// Rows `from..from + n` of a tensor.
    pub fn rows(name: impl Into<String>, from: usize, n: usize) -> Source {
        Source { rows: Some((from, from + n)), ..Source::whole(name) }
    }
}

/// Rows of q, k or v where they lie in one matrix, one below the other.
fn three_in_one(spec: &Spec, place: &Place) -> Option<(usize, usize)> {
    let a = spec.layers.get(place.layer? as usize)?.attn.as_ref()?;
    let (wide, narrow) = (a.heads * a.head_dim, a.kv_heads * a.head_dim);
    match place.role {
        Role::Q => Some((0, wide)),
        Role::K => Some((wide, wide + narrow)),
        Role::V => Some((wide + narrow, wide + 2 * narrow)),
        _ => None,
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
    qwen2_moe::QWEN2_MOE,
    gpt_oss::GPT_OSS,
    glm4_moe::GLM4_MOE,
    deepseek::DEEPSEEK_V2,
    deepseek::DEEPSEEK_V3,
    olmoe::OLMOE,
    granitemoe::GRANITEMOE,
    hunyuan_v1_moe::HUNYUAN_MOE,
    minicpm3::MINICPM3,
    ernie4_5_moe::ERNIE4_5_MOE,
    gemma::GEMMA2,
    gemma::GEMMA3,
    phi3::PHI3,
    gpt2::GPT2,
    opt::OPT,
    olmo::OLMO,
    olmo::OLMO2,
    olmo::OLMO3,
    smollm3::SMOLLM3,
    glm::GLM,
    glm::GLM4,
    granite::GRANITE,
    cohere::COHERE,
    cohere::COHERE2,
    exaone4::EXAONE4,
    seed_oss::SEED_OSS,
    llama::MINISTRAL3,
    ernie4_5::ERNIE4_5,
    hunyuan::HUNYUAN,
    phi::PHI,
    starcoder2::STARCODER2,
    stablelm::STABLELM,
    nemotron::NEMOTRON,
    gemma::GEMMA,
    gpt_neox::GPT_NEOX,
    falcon::FALCON,
    helium::HELIUM,
    apertus::APERTUS,
    gptj::GPTJ,
    bloom::BLOOM,
    lfm2::LFM2,
    qwen_next::QWEN3_NEXT,
    qwen_next::QWEN3_5,
    qwen_next::QWEN3_5_MOE,
    mamba::MAMBA2,
    mamba::BAMBA,
    granitemoehybrid::GRANITEMOEHYBRID,
    falcon_h1::FALCON_H1,
    jamba::JAMBA,
    mpt::MPT,
    llama4::LLAMA4,
    gemma4::GEMMA4,
    gemma3n::GEMMA3N,
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

/// Every known `model_type`, in words.
pub fn known_types() -> String {
    known(|f| f.model_types)
}

/// The network that a config.json describes.
pub fn from_config(config: &Value) -> Result<Spec, SpecError> {
    let Some(name) = config.get("model_type").and_then(Value::as_str) else {
        return Err(SpecError { what: "config.json has no model_type".into() });
    };
    let Some(family) = FAMILIES.iter().find(|f| f.model_types.contains(&name)) else {
        let what = format!("config.json: model_type is \"{name}\"; the nearest known one is \"{}\"", nearest(name));
        return Err(SpecError { what });
    };
    for part in [Some(config), config.get("text_config")].into_iter().flatten() {
        // A null is as good as false to transformers here.
        if let Some(v) = part.get("is_causal").filter(|v| **v != json!(true)) {
            return bad(format!("is_causal is {v}; only true is supported"));
        }
        // Read where a class writes it.
        let differ = Config(part).get("per_layer_config").filter(|_| family.name != "gemma4");
        if differ.is_some_and(|v| v.as_object().is_none_or(|o| !o.is_empty())) {
            return bad("per_layer_config makes layers differ in ways that Lacuna does not read");
        }
    }
    let spec = (family.from_config)(config)?;
    spec.check()?;
    Ok(spec)
}

/// Of an unknown `model_type` the known one that it is written most like; `None` where it is known, or none at all.
pub fn nearest_to(config: &Value) -> Option<&'static str> {
    let name = config.get("model_type")?.as_str()?;
    (!FAMILIES.iter().any(|f| f.model_types.contains(&name))).then(|| nearest(name))
}

/// The longest that the name begins with (qwen3_omni is a qwen3); else names that begin alike first (qwen4 is a qwen),
/// then the fewest letters to change; of equals the later one.
fn nearest(name: &str) -> &'static str {
    let begun = FAMILIES.iter().flat_map(|f| f.model_types).filter(|k| name.starts_with(**k));
    if let Some(whole) = begun.max_by_key(|k| k.len()) {
        return whole;
    }
    let alike = |k: &str| k.bytes().zip(name.bytes()).take_while(|(a, b)| a.eq_ignore_ascii_case(b)).count();
    let all = FAMILIES.iter().flat_map(|f| f.model_types).copied();
    let best = all.max_by_key(|k| {
        let begins = alike(k).min(name.trim_end_matches(|c: char| !c.is_alphabetic()).len());
        (begins, std::cmp::Reverse(distance(k, name)))
    });
    best.unwrap_or("llama")
}

/// Least number of letters to insert, delete or replace.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut corner = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let here = (corner + usize::from(x != y)).min(row[j] + 1).min(row[j + 1] + 1);
            corner = row[j + 1];
            row[j + 1] = here;
        }
    }
    row[b.len()]
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
/// the names once more. transformers 5 can save all experts of a layer in two tensors, as its classes hold them, and MLX
/// saves them in three.
pub fn sources(spec: &Spec, place: &Place) -> Vec<Source> {
    let Some(own) = of_place(spec, place, |f| f.source) else { return Vec::new() };
    let mut out = Vec::new();
    // transformers 5 gives GPT-NeoX's head the name that all others have.
    let newer = (own.name == "embed_out.weight").then(|| Source::whole("lm_head.weight"));
    let switched = switched(place, &own.name);
    for first in [Some(own), newer, stacked(spec, place)].into_iter().flatten().chain(switched) {
        let mut names = vec![first.name.clone(), format!("language_model.{}", first.name)];
        if let Some(bare) = ["model.", "transformer.", "gpt_neox."].iter().find_map(|p| first.name.strip_prefix(p)) {
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
        Role::Correction => ("gate.moe_statics.e_score_correction_bias", None),
        Role::Gate => ("experts.gate_up_proj", Some((0, ffn.width))),
        Role::Up => ("experts.gate_up_proj", Some((ffn.width, 2 * ffn.width))),
        Role::Down => ("experts.down_proj", None),
        _ => return None,
    };
    let slice = place.expert.map(|e| e as usize);
    let part = if spec.arch == "jamba" { "feed_forward" } else { "mlp" };
    let name = format!("model.layers.{l}.{part}.{module}");
    (place.part == Part::Weight).then_some(Source { rows, slice, ..Source::whole(name) })
}

/// Where an expert's tensor lies in a checkpoint of MLX, whose classes hold gates, ups and downs in a tensor of three
/// axes each: in `switch_mlp` of the module that holds the experts, or in `experts` where that is what other programs
/// stack, too. `own`: the tensor's name elsewhere.
fn switched(place: &Place, own: &str) -> Vec<Source> {
    let part = match place.role {
        Role::Gate => "gate_proj",
        Role::Up => "up_proj",
        Role::Down => "down_proj",
        _ => return Vec::new(),
    };
    let holder = [".experts.", ".input_linear", ".output_linear"].iter().find_map(|m| Some(own.split_once(m)?.0));
    let (Some(holder), Some(expert)) = (holder, place.expert) else { return Vec::new() };
    let end = if place.part == Part::Bias { "bias" } else { "weight" };
    let name = |module: &str| format!("{holder}.{module}.{part}.{end}");
    let slice = Some(expert as usize);
    ["switch_mlp", "experts"].map(|m| Source { slice, ..Source::whole(name(m)) }).to_vec()
}

/// Where the tensor at `place` may lie in a GGUF file, as [`sources`]: experts stacked, or one by one as older files
/// have them.
pub fn gguf_sources(spec: &Spec, place: &Place) -> Vec<Source> {
    let Some(first) = of_place(spec, place, |f| f.gguf_source) else { return Vec::new() };
    let latent = place.layer.and_then(|l| spec.layers.get(l as usize)?.attn.as_ref()?.latent);
    match first.slice {
        Some(_) if place.role.is_per_head() => {
            // Older files keep the two in one, as checkpoints do.
            let whole = config::named(place, "", "blk", "attn_kv_b");
            [Some(first), latent.and_then(|m| config::of_head(whole, place, m))].into_iter().flatten().collect()
        }
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

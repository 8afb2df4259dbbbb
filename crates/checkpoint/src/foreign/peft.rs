//! PEFT's LoRA adapters: two thin matrices beside each of some matrices of a base model, and what PEFT lets lie beside
//! those: magnitudes (DoRA), biases, rows of single tokens, whole tensors that were trained along, and the base's own
//! embedding.

mod apply;
mod fit;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
pub(crate) use fit::Fitted;
use lacuna_format::{Float, FormatError, WeightsError};
use serde_json::{Map, Value};

use super::config::Pattern as Name;
use crate::OpenError;
use crate::content::{self, Content};
use crate::json;
use crate::map::Mapped;
use crate::tensor::{TensorInfo, TensorType};
use crate::torch;

/// What a configuration may say that changes nothing here, or is read.
const KNOWN: [&str; 32] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Most tokens with rows of their own, and most names in a list.
const MOST: usize = 1 << 20;

/// An adapter's files, read and checked but for the base they belong to.
pub struct Adapter {
    dir: PathBuf,
    file: Mapped,
    tensors: HashMap<String, TensorInfo>,
    base: Option<String>,
    said: Said,
}

/// What the configuration says of the tensors.
struct Said {
    rank: usize,
    alpha: f64,
    ranks: Vec<(Name, usize)>,
    alphas: Vec<(Name, f64)>,
    by_root: bool,
    dora: bool,
    /// Ends of the names of modules that are there whole.
    saved: Vec<String>,
    /// Ends of the names of tensors that are aimed at themselves, not as a module's weight.
    parameters: Vec<String>,
    /// Tokens with rows of their own, by the end of a module's name; `None`: the embedding.
    tokens: Vec<(Option<String>, Vec<usize>)>,
    /// Whether what is done to the embedding is done to a head that it shares.
    keeps_tied: bool,
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adapter").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Adapter {
    /// Whether a directory holds an adapter and no model.
    pub fn is_at(path: &Path) -> bool {
        path.join("adapter_config.json").is_file() && !path.join("config.json").is_file()
    }

    /// Reads an adapter: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`) in a directory.
    pub fn open(dir: impl AsRef<Path>) -> Result<Adapter, OpenError> {
        let dir = dir.as_ref();
        let config_path = dir.join("adapter_config.json");
        let config = crate::json::read(&config_path)?;
        let config = config.as_object().ok_or_else(|| OpenError::bad(&config_path, "not an object"))?;
        let bad = |what: String| OpenError::bad(&config_path, what);
        refused(config).map_or(Ok(()), |what| Err(bad(what)))?;
        let said = Said::read(config).map_err(bad)?;
        let (mut weights, bin) = (dir.join("adapter_model.safetensors"), dir.join("adapter_model.bin"));
        if !weights.is_file() && bin.is_file() {
            weights = bin;
        }
        let file = Mapped::open(&weights)?;
        let tensors = match content::of(file.bytes()) {
            Content::Pickle => torch::parse(file.bytes()).map_err(|e| OpenError::bad(&weights, e))?,
            _ => content::safetensors(&weights, file.bytes())?,
        };
        if tensors.is_empty() {
            return Err(OpenError::bad(&weights, "it holds no tensors"));
        }
        Ok(Adapter {
            dir: dir.to_owned(),
            file,
            tensors: tensors.into_iter().map(|t| (t.name.clone(), t)).collect(),
            base: config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
            said,
        })
    }

    /// The directory it lies in.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// The model it was made for, as its maker named it.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    fn bad<T>(&self, tensor: &str, what: impl Into<String>) -> Result<T, WeightsError> {
        let file = self.file.path.display().to_string();
        Err(WeightsError::bad(file, tensor, FormatError::new(what.into())))
    }

    /// A tensor of floats: its type, shape and bytes.
    fn floats(&self, name: &str) -> Result<(Float, &[usize], Bytes), WeightsError> {
        let Some(t) = self.tensors.get(name) else { return self.bad(name, "is missing beside its other half") };
        match t.dtype {
            TensorType::Float(f) if t.shape.iter().all(|n| *n > 0) => {
                Ok((f, &t.shape, self.file.bytes().slice(t.bytes.clone())))
            }
            dtype => self.bad(name, format!("{} of shape {:?}, expected floats", dtype.name(), t.shape)),
        }
    }

    /// A matrix of the adapter: its type, axes and bytes.
    fn matrix(&self, name: &str) -> Result<(Float, usize, usize, Bytes), WeightsError> {
        match self.floats(name)? {
            (f, [a, b], bytes) => Ok((f, *a, *b, bytes)),
            (_, shape, _) => self.bad(name, format!("shape {shape:?}, expected two axes")),
        }
    }

    /// The entries of a vector of `n`.
    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>, WeightsError> {
        match self.floats(name)? {
            (f, [have], bytes) if *have == n => Ok(decoded(f, &bytes)),
            (_, shape, _) => self.bad(name, format!("shape {shape:?}, expected [{n}]")),
        }
    }
}

fn decoded(float: Float, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / float.bytes()];
    float.decode(bytes, &mut out);
    out
}

impl Said {
    fn read(c: &Map<String, Value>) -> Result<Said, String> {
        let rank = |v: &Value| v.as_u64().filter(|r| (1..=MOST as u64).contains(r)).map(|r| r as usize);
        let alpha = |v: &Value| v.as_f64().filter(|a| a.is_finite());
        Ok(Said {
            rank: one(c, "r", rank, 8)?,
            alpha: one(c, "lora_alpha", alpha, 8.0)?,
            ranks: pattern(c, "rank_pattern", rank)?,
            alphas: pattern(c, "alpha_pattern", alpha)?,
            by_root: one(c, "use_rslora", Value::as_bool, false)?,
            dora: one(c, "use_dora", Value::as_bool, false)?,
            saved: one(c, "modules_to_save", texts, Vec::new())?,
            parameters: one(c, "target_parameters", texts, Vec::new())?,
            tokens: one(c, "trainable_token_indices", tokens, Vec::new())?,
            keeps_tied: one(c, "ensure_weight_tying", Value::as_bool, false)?,
        })
    }

    /// The factor on the product of a module's two matrices, and their rank.
    fn scaling(&self, module: &str) -> (f64, usize) {
        let rank = nearest(&self.ranks, module).unwrap_or(self.rank);
        let alpha = nearest(&self.alphas, module).unwrap_or(self.alpha);
        let by = if self.by_root { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / by, rank)
    }

    /// Whether a tensor is aimed at by its own name.
    fn aims_at(&self, parameter: &str) -> bool {
        self.parameters.iter().any(|p| ends_with_words(parameter, p))
    }
}

/// Whether a name ends in whole words of it.
fn ends_with_words(name: &str, end: &str) -> bool {
    name.strip_suffix(end).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn one<T>(c: &Map<String, Value>, key: &str, read: impl Fn(&Value) -> Option<T>, default: T) -> Result<T, String> {
    match c.get(key).filter(|v| !v.is_null()) {
        None => Ok(default),
        Some(v) => read(v).ok_or_else(|| format!("{key} is {}", json::shown(v))),
    }
}

fn texts(v: &Value) -> Option<Vec<String>> {
    v.as_array().filter(|a| a.len() <= MOST)?.iter().map(|s| s.as_str().map(str::to_owned)).collect()
}

fn tokens(v: &Value) -> Option<Vec<(Option<String>, Vec<usize>)>> {
    let list = |v: &Value| -> Option<Vec<usize>> {
        v.as_array().filter(|a| a.len() <= MOST)?.iter().map(|n| usize::try_from(n.as_u64()?).ok()).collect()
    };
    match v {
        Value::Object(of) => of.iter().map(|(k, v)| Some((Some(k.clone()), list(v)?))).collect(),
        of => Some(vec![(None, list(of)?)]),
    }
}

fn pattern<T>(c: &Map<String, Value>, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Name, T)>, String> {
    let Some(v) = c.get(key).filter(|v| !v.is_null()) else { return Ok(Vec::new()) };
    let list = v.as_object().filter(|o| o.len() <= 1 << 14).ok_or_else(|| format!("{key} is no object"))?;
    let one = |(k, v): (&String, &Value)| {
        // The end of a module's name, whole words of it, as PEFT matches.
        let name = || Name::new(&format!("(?:.*\\.)?(?:{k})$"));
        read(v).map(|t| (name(), t)).ok_or_else(|| format!("{key}: {k} is {}", json::shown(v)))
    };
    list.iter().map(one).collect()
}

/// The value of the first pattern that is the end of a module's name.
fn nearest<T: Copy>(list: &[(Name, T)], module: &str) -> Option<T> {
    list.iter().find(|(p, _)| p.matches(module)).map(|(_, t)| *t)
}

/// Why an adapter cannot be read.
fn refused(c: &Map<String, Value>) -> Option<String> {
    match c.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => return Some(format!("peft_type is {}; only LORA is read", other.unwrap_or("missing"))),
    }
    let set = |v: &Value| match v {
        Value::Null | Value::Bool(false) => false,
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
        _ => true,
    };
    if let Some((key, v)) = c.iter().find(|(k, v)| !KNOWN.contains(&k.as_str()) && set(v)) {
        return Some(format!("{key} is {}, which changes what the adapter computes and is not read", json::shown(v)));
    }
    let on = |key: &str| c.get(key).is_some_and(set);
    if on("use_dora") && on("lora_bias") {
        return Some("use_dora and lora_bias are both set: what PEFT computes then is no matrix and a bias".into());
    }
    match c.get("bias").and_then(Value::as_str).unwrap_or("none") {
        "none" | "all" | "lora_only" => {}
        other => return Some(format!("bias is \"{other}\"; none, all and lora_only are read")),
    }
    // These begin by changing the base itself.
    match c.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => None,
        Some(Value::String(s)) if ["gaussian", "eva", "orthogonal"].contains(&s.as_str()) => None,
        Some(v) => {
            Some(format!("init_lora_weights is {}: such adapters fit a changed base, and are not read", json::shown(v)))
        }
    }
}

//! What config.json, or a file beside it, says about a checkpoint that another tool compressed.

mod others;

use std::path::Path;

use serde_json::{Map, Value};

use crate::OpenError;

/// Who wrote the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// The compressed-tensors package.
    CompressedTensors,
    /// AutoGPTQ, GPTQModel and their relatives.
    Gptq,
    /// AutoAWQ and its relatives.
    Awq,
    /// GPT-OSS's experts: MXFP4 blocks beside their scales.
    Mxfp4,
    /// Floats of 8 or 4 bits with scales beside them: fp8 of DeepSeek and Qwen, FBGEMM, ModelOpt.
    Scaled,
    /// bitsandbytes.
    Bitsandbytes,
    /// Apple's MLX.
    Mlx,
}

/// How one group of modules was quantized, as the configuration says it.
#[derive(Debug, Clone)]
pub(super) struct Args {
    pub bits: u8,
    pub float: bool,
    pub symmetric: bool,
    /// Columns that share a scale; `None`: a row, a tensor or a block.
    pub group: Option<usize>,
    /// Rows and columns that share a scale.
    pub block: Option<(usize, usize)>,
    /// Whether columns were put in an order that a tensor beside the codes must tell.
    pub ordered: bool,
    pub targets: Vec<Target>,
}

/// Which modules are meant: a name, a class (`Linear`) or a pattern.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// As it is written.
    Name(String),
    /// `re:` and a Python pattern.
    Pattern(Pattern),
}

/// A Python pattern that must match from the beginning of a name. One that cannot be read, or takes too long, matches
/// nothing.
#[derive(Debug, Clone)]
pub(super) struct Pattern(Option<fancy_regex::Regex>);

impl Pattern {
    pub fn new(pattern: &str) -> Pattern {
        // Names are short: what steps back more often than this was written to take long.
        let made = fancy_regex::RegexBuilder::new(&format!("^(?:{pattern})")).backtrack_limit(20_000).build();
        Pattern(made.ok().filter(|_| pattern.len() <= 1000))
    }

    pub fn matches(&self, name: &str) -> bool {
        self.0.as_ref().is_some_and(|r| r.is_match(name).unwrap_or(false))
    }
}

/// What a checkpoint says about its compression.
#[derive(Debug, Clone)]
pub struct Quantized {
    pub(super) method: Method,
    /// The producer's name for the method: `compressed-tensors`, `gptq`, `awq` or another.
    pub producer: String,
    /// The format named, `pack-quantized` or the like.
    pub format: String,
    /// Format of a sparsity configuration, where one is given.
    pub sparsity_format: Option<String>,
    /// Whether the sparsity configuration has targets, so that its readers look for compressed tensors.
    pub sparsity_targets: bool,
    /// A sentence for each thing that was recorded and is not done here.
    pub notes: Vec<String>,
    pub(super) groups: Vec<Args>,
    /// Release that wrote a compressed-tensors checkpoint, as (major, minor).
    pub(super) version: Option<(u64, u64)>,
    /// GPTQ: zero points are stored less one.
    pub(super) zeros_less_one: bool,
    /// GPTQ: single modules may have other bits than the configuration says of all.
    pub(super) mixed: bool,
    /// AWQ: the layout named.
    pub(super) layout: String,
}

/// Groups of modules accepted: a bound against hostile files.
const MAX_GROUPS: usize = 4096;
/// Targets accepted in all groups together.
const MAX_TARGETS: usize = 1 << 16;

/// Reads what a checkpoint says about its compression: `quantization_config` or the older `compression_config` in
/// config.json, MLX's `quantization`, else the files that GPTQ, AWQ and ModelOpt write beside it. `None`: a plain
/// checkpoint.
pub(crate) fn read(dir: &Path, config_path: &Path, config: &Value) -> Result<Option<Quantized>, OpenError> {
    // MLX says the same again under the name that others use, where their readers find no method.
    let unnamed = config.get("quantization_config").is_none_or(|q| q.get("quant_method").is_none());
    if let Some(q) = config.get("quantization").and_then(Value::as_object).filter(|_| unnamed) {
        let bad = |e| OpenError::bad(config_path, format!("quantization (MLX): {e}"));
        return Ok(Some(others::mlx(q).map_err(bad)?));
    }
    for key in ["quantization_config", "compression_config"] {
        if let Some(q) = config.get(key).filter(|q| !q.is_null()) {
            let method = q.get("quant_method").and_then(Value::as_str).unwrap_or("of no named method");
            let made = parse(q).map_err(|e| OpenError::bad(config_path, format!("{key} ({method}): {e}")))?;
            return Ok(Some(made));
        }
    }
    for (file, method) in
        [("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt")]
    {
        let path = dir.join(file);
        if path.is_file() {
            let mut q = crate::json::read(&path)?;
            if let Some(map) = q.as_object_mut() {
                map.entry("quant_method").or_insert_with(|| method.into());
            }
            return Ok(Some(parse(&q).map_err(|e| OpenError::bad(&path, e))?));
        }
    }
    Ok(None)
}

fn text<'a>(q: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, String> {
    match q.get(key).filter(|v| !v.is_null()) {
        None => Ok(None),
        Some(v) => v.as_str().map_or_else(|| Err(format!("{key} is {v}, not a string")), |s| Ok(Some(s))),
    }
}

fn flag(q: &Map<String, Value>, key: &str, default: bool) -> Result<bool, String> {
    match q.get(key).filter(|v| !v.is_null()) {
        None => Ok(default),
        Some(v) => v.as_bool().ok_or_else(|| format!("{key} is {v}, not true or false")),
    }
}

fn bits(q: &Map<String, Value>, keys: &[&str], default: Option<u8>) -> Result<u8, String> {
    for key in keys {
        if let Some(v) = q.get(*key).filter(|v| !v.is_null()) {
            let bits = v.as_u64().filter(|b| (1..=32).contains(b));
            return bits.map_or_else(|| Err(format!("{key} is {v}, expected 1 to 32")), |b| Ok(b as u8));
        }
    }
    default.ok_or_else(|| format!("{} is missing", keys[0]))
}

/// Columns that share a scale; -1 and absence mean a whole row.
fn group(q: &Map<String, Value>, keys: &[&str]) -> Result<Option<usize>, String> {
    for key in keys {
        if let Some(v) = q.get(*key).filter(|v| !v.is_null()) {
            return match v.as_i64() {
                Some(-1) => Ok(None),
                Some(n) if (1..=1 << 24).contains(&n) => Ok(Some(n as usize)),
                _ => Err(format!("{key} is {v}, expected -1 or a positive number")),
            };
        }
    }
    Ok(None)
}

fn parse(q: &Value) -> Result<Quantized, String> {
    let Some(q) = q.as_object() else { return Err(format!("{q} is no object")) };
    // Old compressed-tensors files name no method.
    let named = text(q, "quant_method")?;
    let ours = ["config_groups", "sparsity_config"].iter().any(|k| q.contains_key(*k));
    match named.unwrap_or(if ours { "compressed-tensors" } else { "" }) {
        "compressed-tensors" | "compressed_tensors" | "sparseml" => compressed_tensors(q),
        "gptq" => gptq(q),
        "awq" => awq(q),
        "mxfp4" => Ok(base(Method::Mxfp4, "MXFP4", "mxfp4".into())),
        method @ ("fp8" | "fbgemm_fp8") => others::fp8(q, method),
        "modelopt" | "modelopt_fp4" | "nvfp4" => others::modelopt(q),
        "bitsandbytes" => others::bitsandbytes(q),
        "auto-round" | "intel/auto-round" | "auto_round" => others::auto_round(q),
        "" => Err("no quant_method is named; use the original model or a GGUF file".into()),
        other => Err(format!(
            "quant_method \"{other}\" is not read (compressed-tensors, gptq, awq, auto-round, fp8, fbgemm_fp8, \
             mxfp4, modelopt, bitsandbytes and MLX's are); use the original model or a GGUF file"
        )),
    }
}

fn base(method: Method, producer: &str, format: String) -> Quantized {
    Quantized {
        method,
        producer: producer.into(),
        format,
        sparsity_format: None,
        sparsity_targets: false,
        notes: Vec::new(),
        groups: Vec::new(),
        version: None,
        zeros_less_one: false,
        mixed: false,
        layout: String::new(),
    }
}

/// Both spellings that were ever written: `sparse_bitmask` and `sparse-bitmask`.
fn spelled(format: &str) -> String {
    match format {
        "dense_sparsity" => "dense".into(),
        other => other.replace('_', "-"),
    }
}

fn compressed_tensors(q: &Map<String, Value>) -> Result<Quantized, String> {
    const KNOWN: [&str; 12] = [
        "dense",
        "sparse-bitmask",
        "sparse-24-bitmask",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "pack-quantized",
        "marlin-24",
        "mixed-precision",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "",
    ];
    let format = text(q, "format")?.map(spelled).unwrap_or_default();
    if !KNOWN.contains(&format.as_str()) {
        return Err(format!("format \"{format}\" is not read; known are {}", KNOWN[..11].join(", ")));
    }
    let mut out = base(Method::CompressedTensors, "compressed-tensors", format);
    out.version = text(q, "version")?.and_then(|v| {
        let mut n = v.split('.').map(|x| x.parse::<u64>().ok());
        Some((n.next()??, n.next()??))
    });
    if let Some(t) = q.get("transform_config").and_then(Value::as_object)
        && t.get("config_groups").is_some_and(|g| g.as_object().is_none_or(|g| !g.is_empty()))
    {
        return Err("transform_config: weights stored in rotated axes are not read".into());
    }
    if q.get("kv_cache_scheme").is_some_and(|v| !v.is_null()) {
        out.notes.push("kv_cache_scheme is recorded; keys and values are kept as --kv says".into());
    }
    if let Some(s) = q.get("sparsity_config").filter(|s| !s.is_null()) {
        let s = s.as_object().ok_or("sparsity_config is no object")?;
        out.sparsity_format = text(s, "format")?.map(spelled);
        out.sparsity_targets = s.get("targets").is_some_and(|t| t.as_array().is_some_and(|t| !t.is_empty()));
        if let Some(f) = &out.sparsity_format
            && !["dense", "sparse-bitmask", "sparse-24-bitmask"].contains(&f.as_str())
        {
            return Err(format!(
                "sparsity_config.format \"{f}\" is not read; known are dense, sparse-bitmask, sparse-24-bitmask"
            ));
        }
        // A number, or a string in the oldest files.
        if let Some(v) = s.get("global_sparsity").filter(|v| !v.is_null())
            && v.as_f64().or_else(|| v.as_str()?.parse().ok()).is_none()
        {
            return Err(format!("sparsity_config.global_sparsity is {v}, not a number"));
        }
    }
    let none = Map::new();
    let groups = match q.get("config_groups").filter(|g| !g.is_null()) {
        None => &none,
        Some(g) => g.as_object().ok_or_else(|| format!("config_groups is {g}, not an object"))?,
    };
    if groups.len() > MAX_GROUPS {
        return Err(format!("{} config_groups; at most {MAX_GROUPS} are accepted", groups.len()));
    }
    let mut targets = 0;
    for (name, g) in groups {
        let inside = |e: String| format!("config_groups.{name}: {e}");
        let g = g.as_object().ok_or_else(|| inside("not an object".into()))?;
        if let Some(f) = text(g, "format").map_err(inside)?.map(spelled)
            && !KNOWN.contains(&f.as_str())
        {
            return Err(inside(format!("format \"{f}\" is not read")));
        }
        let rounded =
            ["input_activations", "output_activations"].iter().any(|k| g.get(*k).is_some_and(|v| !v.is_null()));
        if rounded {
            out.notes.push(format!("{name} records rounding of activations, which is not done here"));
        }
        let Some(w) = g.get("weights").filter(|w| !w.is_null()) else { continue };
        let w = w.as_object().ok_or_else(|| inside("weights is no object".into()))?;
        let mut args = weights(w).map_err(inside)?;
        if let Some(list) = g.get("targets").and_then(Value::as_array) {
            targets += list.len();
            if targets > MAX_TARGETS {
                return Err(format!("{targets} targets in all; at most {MAX_TARGETS} are accepted"));
            }
            args.targets = list.iter().filter_map(Value::as_str).map(target).collect();
        }
        out.groups.push(args);
    }
    Ok(out)
}

fn target(text: &str) -> Target {
    match text.strip_prefix("re:") {
        Some(p) => Target::Pattern(Pattern::new(p)),
        None => Target::Name(text.to_owned()),
    }
}

fn weights(w: &Map<String, Value>) -> Result<Args, String> {
    let kind = text(w, "type")?.unwrap_or("int");
    let float = match kind {
        "int" => false,
        "float" => true,
        other => return Err(format!("weights.type is \"{other}\", expected int or float")),
    };
    let block = match (text(w, "strategy")?, w.get("block_structure").filter(|b| !b.is_null())) {
        (Some("block"), Some(b)) => {
            let numbers: Vec<u64> = match b {
                Value::String(s) => s.split('x').filter_map(|n| n.parse().ok()).collect(),
                other => other.as_array().map(|l| l.iter().filter_map(Value::as_u64).collect()).unwrap_or_default(),
            };
            match numbers[..] {
                [r, c] if (1..=1 << 24).contains(&r) && (1..=1 << 24).contains(&c) => Some((r as usize, c as usize)),
                _ => return Err(format!("block_structure is {b}, expected two sizes")),
            }
        }
        (Some("block"), None) => return Err("strategy is \"block\" without a block_structure".into()),
        _ => None,
    };
    Ok(Args {
        bits: bits(w, &["num_bits"], Some(8))?,
        float,
        symmetric: flag(w, "symmetric", true)?,
        group: group(w, &["group_size"])?,
        block,
        // Its writers leave the order of a matrix out where it is that of the columns.
        ordered: false,
        targets: Vec::new(),
    })
}

fn gptq(q: &Map<String, Value>) -> Result<Quantized, String> {
    let format = text(q, "checkpoint_format")?.unwrap_or("gptq");
    let less_one = match format {
        "gptq" => true,
        "gptq_v2" => false,
        other => return Err(format!("checkpoint_format \"{other}\" is not read; known are gptq and gptq_v2")),
    };
    if flag(q, "is_marlin_format", false)? {
        return Err("is_marlin_format: matrices repacked for one GPU kernel are not read".into());
    }
    if let Some(p) = text(q, "pack_dtype")?
        && p != "int32"
    {
        return Err(format!("pack_dtype \"{p}\" is not read; int32 is"));
    }
    let mut out = base(Method::Gptq, "gptq", format.into());
    out.zeros_less_one = less_one;
    // GPTQModel's patterns of names.
    out.mixed = q.get("dynamic").and_then(Value::as_object).is_some_and(|d| !d.is_empty());
    out.groups.push(Args {
        bits: bits(q, &["bits"], None)?,
        float: false,
        symmetric: flag(q, "sym", true)?,
        group: group(q, &["group_size"])?,
        block: None,
        ordered: flag(q, "desc_act", false)?,
        targets: Vec::new(),
    });
    Ok(out)
}

fn awq(q: &Map<String, Value>) -> Result<Quantized, String> {
    let layout = text(q, "version")?.unwrap_or("gemm").to_lowercase();
    if !["gemm", "gemv", "exllama"].contains(&layout.as_str()) {
        return Err(format!("version \"{layout}\" of AWQ is not read; gemm, gemv and exllama are"));
    }
    let mut out = base(Method::Awq, "awq", layout.clone());
    let bits = bits(q, &["bits", "w_bit"], None)?;
    if bits != 4 {
        return Err(format!("AWQ of {bits} bits is not read; 4 bits are"));
    }
    out.layout = layout;
    out.groups.push(Args {
        bits,
        float: false,
        symmetric: !flag(q, "zero_point", true)?,
        group: group(q, &["group_size", "q_group_size"])?,
        block: None,
        ordered: false,
        targets: Vec::new(),
    });
    Ok(out)
}

impl Quantized {
    /// The group of `module`: named exactly, by a pattern, or by the class of its kind (`Linear`), the nearest first.
    pub(super) fn args(&self, module: &str) -> Option<&Args> {
        let by = |hit: &dyn Fn(&Target) -> bool| self.groups.iter().find(|g| g.targets.iter().any(hit));
        by(&|t| matches!(t, Target::Name(n) if n == module))
            .or_else(|| by(&|t| matches!(t, Target::Pattern(p) if p.matches(module))))
            .or_else(|| by(&|t| matches!(t, Target::Name(n) if !n.contains('.'))))
    }

    /// Whether any group of modules is said to be quantized.
    pub(crate) fn quantizes(&self) -> bool {
        !self.groups.is_empty()
    }

    /// Bits that a group is said to have.
    pub(crate) fn said_bits(&self) -> impl Iterator<Item = u8> + '_ {
        self.groups.iter().map(|g| g.bits)
    }

    /// Sizes of groups of columns that are named.
    pub(crate) fn said_groups(&self) -> impl Iterator<Item = usize> + '_ {
        self.groups.iter().filter_map(|g| g.group)
    }

    /// A line for people: `pack-quantized, int4 g128`.
    pub fn describe(&self) -> String {
        let mut parts = vec![self.producer.clone()];
        if !self.format.is_empty() && self.format != self.producer {
            parts.push(self.format.clone());
        }
        for g in &self.groups {
            let kind = if g.float { "float" } else { "int" };
            let group = g.group.map_or_else(String::new, |n| format!(" g{n}"));
            let zero = if g.symmetric { "" } else { ", zero points" };
            let part = format!("{kind}{}{group}{zero}", g.bits);
            // A checkpoint may name every module in a group of its own.
            if !parts.contains(&part) {
                parts.push(part);
            }
        }
        if let Some(s) = &self.sparsity_format {
            parts.push(format!("sparsity {s}"));
        }
        parts.join(", ")
    }
}

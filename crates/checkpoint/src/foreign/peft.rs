//! PEFT's LoRA adapters: two thin matrices beside each of some matrices of a base model.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use lacuna_format::{Float, FormatError, Pattern, PatternKind, Piece, Stored, Term, Values, WeightsError, pack_float};
use lacuna_spec::{Place, Role, RopeStyle, Spec, arch};
use serde_json::{Map, Value};

use super::config::Pattern as Name;
use crate::OpenError;
use crate::content::{self, Content};
use crate::map::Mapped;
use crate::tensor::{TensorInfo, TensorType};

/// What a configuration may say that changes nothing here, or is read.
const KNOWN: [&str; 27] = [
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
    "task_type",
];

/// An adapter's files, read and checked but for the base they belong to.
pub struct Adapter {
    dir: PathBuf,
    file: Mapped,
    tensors: HashMap<String, TensorInfo>,
    base: Option<String>,
    rank: usize,
    alpha: f64,
    ranks: Vec<(Name, usize)>,
    alphas: Vec<(Name, f64)>,
    by_root: bool,
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

    /// Reads an adapter: `adapter_config.json` and `adapter_model.safetensors` in a directory.
    pub fn open(dir: impl AsRef<Path>) -> Result<Adapter, OpenError> {
        let dir = dir.as_ref();
        let config_path = dir.join("adapter_config.json");
        let config = crate::json::read(&config_path)?;
        let config = config.as_object().ok_or_else(|| OpenError::bad(&config_path, "not an object"))?;
        let bad = |what: String| OpenError::bad(&config_path, what);
        refused(config).map_or(Ok(()), |what| Err(bad(what)))?;
        let (mut weights, bin) = (dir.join("adapter_model.safetensors"), dir.join("adapter_model.bin"));
        if !weights.is_file() && bin.is_file() {
            if content::look(&bin)? == Content::Pickle {
                let what = "a Python pickle, which may run code, and is not read; save the adapter once more as safetensors: \
                            PeftModel.from_pretrained(base, DIR).save_pretrained(DIR, safe_serialization=True)";
                return Err(OpenError::bad(&bin, what));
            }
            weights = bin;
        }
        let file = Mapped::open(&weights)?;
        let tensors = content::safetensors(&weights, file.bytes())?;
        let rank = |v: &Value| v.as_u64().filter(|r| (1..=1 << 20).contains(r)).map(|r| r as usize);
        let alpha = |v: &Value| v.as_f64().filter(|a| a.is_finite());
        Ok(Adapter {
            dir: dir.to_owned(),
            file,
            tensors: tensors.into_iter().map(|t| (t.name.clone(), t)).collect(),
            base: config.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
            rank: number(config, "r", rank, 8).map_err(bad)?,
            alpha: number(config, "lora_alpha", alpha, 8.0).map_err(bad)?,
            ranks: pattern(config, "rank_pattern", rank).map_err(bad)?,
            alphas: pattern(config, "alpha_pattern", alpha).map_err(bad)?,
            by_root: config.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
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

    /// The factor on the product of a module's two matrices, and their rank.
    fn scaling(&self, module: &str) -> (f64, usize) {
        let rank = nearest(&self.ranks, module).unwrap_or(self.rank);
        let alpha = nearest(&self.alphas, module).unwrap_or(self.alpha);
        let by = if self.by_root { (rank as f64).sqrt() } else { rank as f64 };
        (alpha / by, rank)
    }

    fn bad<T>(&self, tensor: &str, what: impl Into<String>) -> Result<T, WeightsError> {
        let file = self.file.path.display().to_string();
        Err(WeightsError::bad(file, tensor, FormatError::new(what.into())))
    }

    /// A matrix of the adapter: its name, type, axes and bytes.
    fn matrix(&self, name: &str) -> Result<(Float, usize, usize, Bytes), WeightsError> {
        let Some(t) = self.tensors.get(name) else { return self.bad(name, "is missing beside its other half") };
        match (t.dtype, &t.shape[..]) {
            (TensorType::Float(f), [a, b]) if *a > 0 && *b > 0 => {
                Ok((f, *a, *b, self.file.bytes().slice(t.bytes.clone())))
            }
            (dtype, shape) => {
                self.bad(name, format!("{} of shape {shape:?}, expected floats on two axes", dtype.name()))
            }
        }
    }
}

fn number<T>(c: &Map<String, Value>, key: &str, read: impl Fn(&Value) -> Option<T>, default: T) -> Result<T, String> {
    match c.get(key).filter(|v| !v.is_null()) {
        None => Ok(default),
        Some(v) => read(v).ok_or_else(|| format!("{key} is {v}")),
    }
}

fn pattern<T>(c: &Map<String, Value>, key: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Vec<(Name, T)>, String> {
    let Some(v) = c.get(key).filter(|v| !v.is_null()) else { return Ok(Vec::new()) };
    let list = v.as_object().filter(|o| o.len() <= 1 << 14).ok_or_else(|| format!("{key} is no object"))?;
    let one = |(k, v): (&String, &Value)| {
        // The end of a module's name, whole words of it, as PEFT matches.
        let name = || Name::new(&format!("(?:.*\\.)?(?:{k})$"));
        read(v).map(|t| (name(), t)).ok_or_else(|| format!("{key}: {k} is {v}"))
    };
    list.iter().map(one).collect()
}

/// The value of the first pattern that is the end of a module's name.
fn nearest<T: Copy>(list: &[(Name, T)], module: &str) -> Option<T> {
    list.iter().find(|(p, _)| p.matches(module)).map(|(_, t)| *t)
}

/// Why an adapter cannot be read as two thin matrices beside each of some matrices.
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
    if let Some((key, v)) = c.iter().find(|(k, v)| !KNOWN.contains(&k.as_str()) && *k != "use_rslora" && set(v)) {
        return Some(format!("{key} is {v}, which changes what the adapter computes and is not read"));
    }
    match c.get("bias").and_then(Value::as_str).unwrap_or("none") {
        "none" => {}
        other => return Some(format!("bias is \"{other}\"; adapters with biases of their own are not read")),
    }
    // These begin by changing the base itself.
    match c.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => None,
        Some(Value::String(s)) if ["gaussian", "eva", "orthogonal"].contains(&s.as_str()) => None,
        Some(v) => Some(format!("init_lora_weights is {v}: such adapters fit a changed base, and are not read")),
    }
}

/// What an adapter does at one place.
enum Change {
    /// Adds a product: names of both halves, the factor, and the rows meant; `paired`: width of heads whose rows the base keeps in pairs.
    Adds { down: String, up: String, scale: f32, rows: Range<usize>, embedding: bool, paired: Option<usize> },
    /// Stands in its stead.
    Replaces(String),
}

/// An adapter fitted to a network.
pub(crate) struct Fitted {
    pub adapter: Adapter,
    pub merge: bool,
    changes: HashMap<Place, Change>,
    held: Mutex<HashMap<Place, Weak<Stored>>>,
}

const ROOT: &str = "base_model.model.";

impl Fitted {
    /// Finds the place of everything in the adapter.
    pub fn new(adapter: Adapter, spec: &Spec, merge: bool) -> Result<Fitted, OpenError> {
        let mut used = HashSet::new();
        let mut changes = HashMap::new();
        for place in spec.places() {
            for source in arch::sources(spec, &place) {
                let paired = paired(spec, &place);
                let whole = source.rows.is_none() && !source.transposed && paired.is_none();
                let kept = format!("{ROOT}{}", source.name);
                if adapter.tensors.contains_key(&kept) {
                    let Some(shape) = spec.shape(&place).filter(|_| whole) else {
                        return adapter.bad(&kept, format!("{place} is a part of it and cannot be replaced alone"))?;
                    };
                    let have = adapter.tensors[&kept].shape.clone();
                    if have != [shape.0, shape.1] && (shape.0 != 1 || have != [shape.1]) {
                        return adapter.bad(&kept, format!("shape {have:?}, but {place} is {shape:?}"))?;
                    }
                    if !matches!(adapter.tensors[&kept].dtype, TensorType::Float(_)) {
                        return adapter.bad(&kept, "it holds no floats")?;
                    }
                    tied(&adapter, spec, &place, &kept)?;
                    used.insert(kept.clone());
                    changes.insert(place, Change::Replaces(kept));
                }
                let Some(module) = source.name.strip_suffix(".weight") else { continue };
                for (a, b, embedding) in
                    [("lora_A.weight", "lora_B.weight", false), ("lora_embedding_A", "lora_embedding_B", true)]
                {
                    let (down, up) = (format!("{ROOT}{module}.{a}"), format!("{ROOT}{module}.{b}"));
                    if !adapter.tensors.contains_key(&down) && !adapter.tensors.contains_key(&up) {
                        continue;
                    }
                    let (_, rank, cols, _) = adapter.matrix(&down)?;
                    let (_, rows, wide, _) = adapter.matrix(&up)?;
                    let (scale, said) = adapter.scaling(module);
                    let Some(shape) = spec.shape(&place) else { continue };
                    let range = source.rows.map_or(0..shape.0, |(from, to)| from..to);
                    let (rows, cols) = if embedding { (cols, rows) } else { (rows, cols) };
                    if wide != rank || rank != said {
                        let what = format!("rank {wide}, the other half has {rank}, the configuration {said}");
                        return adapter.bad(&up, what)?;
                    }
                    let fits = if source.rows.is_some() { range.end <= rows } else { rows == shape.0 };
                    if cols != shape.1 || !fits {
                        return adapter.bad(&up, format!("a change of {rows} x {cols} to {place} of {shape:?}"))?;
                    }
                    tied(&adapter, spec, &place, &up)?;
                    used.extend([down.clone(), up.clone()]);
                    changes
                        .insert(place, Change::Adds { down, up, scale: scale as f32, rows: range, embedding, paired });
                }
            }
        }
        let mut left: Vec<&String> = adapter.tensors.keys().filter(|k| !used.contains(*k)).collect();
        left.sort();
        if let Some(name) = left.first() {
            return adapter.bad(name, format!("belongs to nothing in the base ({} such tensors)", left.len()))?;
        }
        Ok(Fitted { adapter, merge, changes, held: Mutex::default() })
    }

    /// A sentence about what it does.
    pub fn describe(&self) -> String {
        let how = if self.merge { "merged into them" } else { "kept as low-rank terms beside them" };
        let n = self.changes.len();
        format!("an adapter ({}) changes {n} matrices, {how}", self.adapter.dir.display())
    }

    /// The matrix of a place with its change, where there is one.
    pub fn apply(&self, place: &Place, base: Arc<Stored>) -> Result<Arc<Stored>, WeightsError> {
        let Some(change) = self.changes.get(place) else { return Ok(base) };
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = held.get(place).and_then(Weak::upgrade) {
            return Ok(made);
        }
        let made = Arc::new(match change {
            Change::Replaces(name) => {
                let t = &self.adapter.tensors[name];
                let TensorType::Float(f) = t.dtype else { return self.adapter.bad(name, "it holds no floats") };
                piece(base.rows, base.cols, f, self.adapter.file.bytes().slice(t.bytes.clone()))
            }
            Change::Adds { down, up, scale, rows, embedding, paired } => {
                let (left, right) = self.halves(down, up, *scale, rows, (*embedding, *paired))?;
                let mut sum = Stored { terms: base.terms.clone(), ..*base };
                sum.terms.push(Term::Product(left, right));
                if self.merge { self.merged(up, &base, &sum)? } else { sum }
            }
        });
        if let Err(e) = made.check() {
            return self.adapter.bad(&place.to_string(), e.what);
        }
        held.insert(*place, Arc::downgrade(&made));
        Ok(made)
    }

    /// `[rows, rank]` with the factor in it, and `[rank, cols]`.
    fn halves(
        &self,
        down: &str,
        up: &str,
        scale: f32,
        rows: &Range<usize>,
        (embedding, paired): (bool, Option<usize>),
    ) -> Result<(Piece, Piece), WeightsError> {
        let (fa, a0, a1, a) = self.adapter.matrix(down)?;
        let (fb, b0, b1, b) = self.adapter.matrix(up)?;
        let floats = |f: Float, bytes: &[u8]| {
            let mut out = vec![0.0; bytes.len() / f.bytes()];
            f.decode(bytes, &mut out);
            out
        };
        let bytes = |v: Vec<f32>| Bytes::from(v.into_iter().flat_map(f32::to_le_bytes).collect::<Vec<u8>>());
        let one = |rows, cols, f, bytes| Piece { rows, cols, pattern: Pattern::Dense, values: Values::Float(f, bytes) };
        let (mut left, right, rank, cols) = if embedding {
            let turned = |v: Vec<f32>, high: usize, wide: usize| -> Vec<f32> {
                (0..wide).flat_map(|c| (0..high).map(move |r| (r, c))).map(|(r, c)| v[r * wide + c]).collect()
            };
            let right = one(b1, b0, Float::F32, bytes(turned(floats(fb, &b), b0, b1)));
            (turned(floats(fa, &a), a0, a1), right, a0, b0)
        } else {
            let size = b1 * fb.bytes();
            let mut chosen = floats(fb, &b[rows.start * size..rows.end * size]);
            if let Some(dim) = paired.filter(|_| b1 > 0) {
                chosen.chunks_mut(dim * b1).for_each(|head| pair(head, b1));
            }
            (chosen, one(a0, a1, fa, a), a0, a1)
        };
        debug_assert_eq!((right.rows, right.cols), (rank, cols));
        left.iter_mut().for_each(|v| *v *= scale);
        Ok((one(rows.len(), rank, Float::F32, bytes(left)), right))
    }

    /// The sum as one matrix, in the base's own floats; f16 where the base has codes.
    fn merged(&self, name: &str, base: &Stored, sum: &Stored) -> Result<Stored, WeightsError> {
        let float = match &base.terms[..] {
            [Term::Piece(Piece { values: Values::Float(f @ (Float::F32 | Float::F16 | Float::Bf16), _), .. })] => *f,
            _ => Float::F16,
        };
        match pack_float(sum.to_mat().view(), None, PatternKind::Dense, float) {
            Ok(p) => Ok(Stored::from_piece(p)),
            Err(e) => self.adapter.bad(name, e.what),
        }
    }
}

/// The width of heads where the base keeps rows of q and k in pairs that turn together, as GGUF files of Llama do, and adapters do not.
fn paired(spec: &Spec, place: &Place) -> Option<usize> {
    let attn = spec.layers.get(place.layer? as usize)?.attn.as_ref()?;
    let style = attn.rope.as_ref()?.style;
    (style == RopeStyle::Interleaved && matches!(place.role, Role::Q | Role::K)).then_some(attn.head_dim)
}

/// Brings the rows of a head, `wide` entries each, from halves to pairs.
fn pair(head: &mut [f32], wide: usize) {
    let (old, half) = (head.to_vec(), head.len() / wide / 2);
    for (r, row) in head.chunks_exact_mut(wide).enumerate() {
        let from = r / 2 + r % 2 * half;
        row.copy_from_slice(&old[from * wide..][..wide]);
    }
}

fn piece(rows: usize, cols: usize, float: Float, bytes: Bytes) -> Stored {
    Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values: Values::Float(float, bytes) })
}

/// A change to one of two that share a matrix would be a change to both.
fn tied(adapter: &Adapter, spec: &Spec, place: &Place, tensor: &str) -> Result<(), WeightsError> {
    if spec.tied && place.role == Role::Embed {
        return adapter.bad(tensor, "the base's head is its embedding; an adapter of one of them is not read");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two orders hold the same channels: those that turn together are `i` and `i + d/2` in one, `2i` and `2i + 1` in the other.
    #[test]
    fn rows_of_a_gguf_base_are_paired() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/foreign");
        let half = crate::open(golden.join("peft_base")).unwrap().spec_of().clone();
        let mut pairs = half.clone();
        let rope = pairs.layers[0].attn.as_mut().unwrap().rope.as_mut().unwrap();
        rope.style = RopeStyle::Interleaved;
        let dim = half.layers[0].attn.as_ref().unwrap().head_dim;
        let delta = |spec: &Spec, role: Role| {
            let fitted = Fitted::new(Adapter::open(golden.join("peft_lora")).unwrap(), spec, false).unwrap();
            let place = Place::layer(0, role);
            let (rows, cols) = spec.shape(&place).unwrap();
            fitted.apply(&place, Arc::new(Stored { rows, cols, terms: vec![] })).unwrap().to_mat()
        };
        let (a, b) = (delta(&half, Role::Q), delta(&pairs, Role::Q));
        for head in 0..a.rows() / dim {
            for i in 0..dim / 2 {
                assert_eq!(b.row(head * dim + 2 * i), a.row(head * dim + i));
                assert_eq!(b.row(head * dim + 2 * i + 1), a.row(head * dim + i + dim / 2));
            }
        }
        assert_ne!(a, b);
        assert_eq!(delta(&half, Role::V), delta(&pairs, Role::V));
    }
}

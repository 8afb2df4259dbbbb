//! Opening a checkpoint of any format.

mod gguf_file;
mod head;
mod index;
mod left_out;
mod lie;
mod like;
mod locate;
mod within;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lacuna_arch as arch;
use lacuna_format::{Descriptor, Pattern, Piece, Stored, Values, Weights, WeightsError};
use lacuna_spec::{Place, Spec, SpecError};
use serde_json::Value;

pub(crate) use lie::transpose;
use lie::{Lie, every};

use crate::content::{self, Content};
use crate::examine::{Problem, REPAIR};
use crate::foreign::{self, Adapter, Fitted, Lazy, Quantized};
use crate::map::Mapped;
use crate::packed::{self, PackedConfig};
use crate::repair::mendable;
use crate::tensor::{TensorInfo, TensorType};
use crate::{Tokenizer, gguf, json};
use gguf_file::open_gguf;
pub(crate) use gguf_file::open_parsed;
pub use like::open_like;

/// Why a checkpoint cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file cannot be read.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// A file is damaged or of no known kind.
    #[error("{file}: {what}")]
    Bad {
        /// The file.
        file: String,
        /// What is wrong, with names and numbers.
        what: String,
    },
    /// The network described is none, or none that Lacuna knows.
    #[error("{file}: {source}")]
    Spec {
        /// The file.
        file: String,
        /// What is wrong.
        source: SpecError,
    },
    /// A tensor is missing or not as it should be.
    #[error(transparent)]
    Tensor(#[from] WeightsError),
    /// One of those, in a checkpoint that `repair` mends.
    #[error("{0} {REPAIR} mends that")]
    Mendable(Box<OpenError>),
}

impl OpenError {
    pub(crate) fn bad(file: &Path, what: impl Into<String>) -> OpenError {
        OpenError::Bad { file: file.display().to_string(), what: what.into() }
    }
}

/// The layout of an opened checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Hugging Face: config.json and safetensors.
    HuggingFace,
    /// A GGUF file, or the parts of one.
    Gguf,
    /// Lacuna's packed model.
    Packed,
}

/// An opened checkpoint: a network and its weights, mapped.
pub struct Checkpoint {
    path: PathBuf,
    kind: Kind,
    spec: Spec,
    files: Vec<Mapped>,
    /// Every tensor and the file it lies in.
    tensors: Vec<(usize, TensorInfo)>,
    places: HashMap<Place, Located>,
    metadata: Option<gguf::Metadata>,
    packed: Option<PackedConfig>,
    quantized: Option<Quantized>,
    fitted: Option<Fitted>,
    /// Of a matrix how many terms are loaded, where not all are.
    loaded: HashMap<Place, usize>,
    /// Of codes into tables how many bits are loaded, where not all are.
    bits: Option<u8>,
    /// What was gone around; `None` where the first thing wrong ends the opening.
    problems: Option<Vec<Problem>>,
    /// What is odd and keeps nobody from running it, where problems are not gathered.
    notes: Vec<String>,
}

enum Located {
    /// A part of one tensor.
    Plain {
        tensor: usize,
        bytes: Range<usize>,
        rows: usize,
        cols: usize,
        lie: Lie,
        /// The tensor's rows lie in so many groups; `rows` of them from this one on are meant, counted as if the parts of
        /// all groups lay together.
        groups: Option<(usize, usize)>,
    },
    /// Rows of one tensor, put together when they are asked for.
    Gathered {
        tensor: usize,
        /// Where each run of rows lies in the file, in their order.
        runs: Vec<Range<usize>>,
        rows: usize,
        cols: usize,
    },
    /// Buffers of a packed matrix by suffix; put together, and checked, when first asked for.
    Packed { desc: Descriptor, buffers: BTreeMap<String, usize>, whole: OnceLock<Arc<Stored>> },
    /// Tensors that another tool compressed.
    Foreign(Lazy),
}

/// The list of a sharded checkpoint's tensors and files.
const INDEX: &str = "model.safetensors.index.json";

/// Opens a checkpoint: a directory (Hugging Face layout or packed), a GGUF file, or a safetensors file with its
/// config.json beside it. Files are known by their bytes, whatever their names.
///
/// Afterwards every place of the network has its tensor, of the right shape and of a type that can be decoded.
pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint, OpenError> {
    let path = path.as_ref();
    open_path(path, None).map_err(|e| if mendable(path).is_ok() { OpenError::Mendable(Box::new(e)) } else { e })
}

/// Opens a checkpoint as far as it can be: what [`open`] would refuse and can be gone around is in
/// [`Checkpoint::problems`], and places without a usable tensor have none. To look at, not to run.
pub fn examine(path: impl AsRef<Path>) -> Result<Checkpoint, OpenError> {
    let mut c = open_path(path.as_ref(), Some(Vec::new()))?;
    c.look_around();
    // What is recommended must work.
    if c.problems().iter().any(Problem::asks_for_repair) && mendable(path.as_ref()).is_err() {
        c.problems.iter_mut().flatten().for_each(Problem::by_hand);
    }
    Ok(c)
}

fn open_path(path: &Path, problems: Option<Vec<Problem>>) -> Result<Checkpoint, OpenError> {
    let io = |source| OpenError::Io { file: path.display().to_string(), source };
    if std::fs::metadata(path).map_err(io)?.is_dir() {
        if path.join("config.json").is_file() {
            return open_dir(path, path, None, problems);
        }
        return match content::only(path, Content::Gguf)? {
            Some(one) => open_gguf(&one, problems),
            None => Err(OpenError::bad(path, "neither a config.json nor a GGUF file is in this directory")),
        };
    }
    match content::look(path)? {
        Content::Gguf => open_gguf(path, problems),
        Content::Safetensors => open_dir(path, path.parent().unwrap_or(Path::new(".")), Some(path), problems),
        Content::Json => Err(OpenError::bad(path, "JSON text and no weights; give the directory it lies in")),
        other => Err(OpenError::bad(path, format!("neither a GGUF nor a safetensors file but {other}"))),
    }
}

fn open_dir(
    path: &Path,
    dir: &Path,
    only: Option<&Path>,
    problems: Option<Vec<Problem>>,
) -> Result<Checkpoint, OpenError> {
    let config_path = dir.join("config.json");
    let json = json::bytes(&config_path)?;
    let config: Value = json::parse(&json).map_err(|e| OpenError::bad(&config_path, e))?;
    if config.get("format").and_then(Value::as_str) == Some(packed::FORMAT) {
        return open_packed(dir, &config_path, &json, problems);
    }
    open_as(path, dir, only, &config, &str::to_owned, problems)
}

/// Opens a directory in the Hugging Face layout as if its configuration were another one, and its tensors had other
/// names.
pub(crate) fn open_as(
    path: &Path,
    dir: &Path,
    only: Option<&Path>,
    config: &Value,
    rename: &dyn Fn(&str) -> String,
    problems: Option<Vec<Problem>>,
) -> Result<Checkpoint, OpenError> {
    let config_path = dir.join("config.json");
    let found = if only.is_none() { weights_in(dir)? } else { None };
    if let Some((gguf, Content::Gguf)) = &found {
        return open_gguf(gguf, problems);
    }
    let only = only.or(found.as_ref().map(|f| f.0.as_path()));
    let quantized = foreign::read(dir, &config_path, config)?;
    let file = config_path.display().to_string();
    let spec = match arch::from_config(config) {
        Ok(spec) => spec,
        Err(mut source) => {
            if let Some(near) = arch::nearest_to(config).filter(|_| only.is_none()) {
                source.what += &like::would_fit(path, near);
                source.what += &format!(" (known are {})", arch::known_types());
            }
            return Err(OpenError::Spec { file, source });
        }
    };
    let mut c = Checkpoint { quantized, problems, ..Checkpoint::new(path, Kind::HuggingFace, spec) };
    c.add_safetensors(dir, only, rename)?;
    c.untie();
    c.locate(arch::sources)?;
    c.left_out()?;
    Ok(c)
}

/// The file that holds the weights of a directory, and what it is, where none has the name that is looked for first.
fn weights_in(dir: &Path) -> Result<Option<(PathBuf, Content)>, OpenError> {
    if ["model.safetensors", INDEX].iter().any(|name| dir.join(name).is_file()) {
        return Ok(None);
    }
    for content in [Content::Safetensors, Content::Gguf] {
        if let Some(one) = content::only(dir, content)? {
            return Ok(Some((one, content)));
        }
    }
    let what = "there is no model.safetensors and no index of shards";
    let others = content::others(dir)?;
    Err(OpenError::bad(dir, others.map_or_else(|| what.to_owned(), |o| format!("{what}; {o}"))))
}

fn open_packed(
    dir: &Path,
    config_path: &Path,
    json: &[u8],
    problems: Option<Vec<Problem>>,
) -> Result<Checkpoint, OpenError> {
    let config = packed::parse(json).map_err(|e| OpenError::bad(config_path, e))?;
    let mut c = Checkpoint::new(dir, Kind::Packed, config.spec.clone());
    for name in &config.files {
        c.add_file(&dir.join(name), |_| true)?;
    }
    for (place, desc) in &config.weights {
        let located = Located::Packed { desc: desc.clone(), buffers: BTreeMap::new(), whole: OnceLock::new() };
        c.places.insert(*place, located);
    }
    for (i, (_, t)) in c.tensors.iter().enumerate() {
        // The longest beginning that names a place: `layers.0.attn.q.bias` before `layers.0.attn.q`.
        let cuts = t.name.rmatch_indices('.').map(|(at, _)| (&t.name[..at], &t.name[at + 1..]));
        for (place, suffix) in cuts {
            let Some(Located::Packed { buffers, .. }) = place.parse().ok().and_then(|p: Place| c.places.get_mut(&p))
            else {
                continue;
            };
            if buffers.insert(suffix.to_owned(), i).is_some() {
                return Err(OpenError::bad(dir, format!("tensor {} lies in two files", t.name)));
            }
            break;
        }
    }
    let tokens = dir.join("tokenizer.gguf");
    if tokens.is_file() {
        let map = Mapped::open(&tokens)?;
        c.metadata = Some(gguf::parse(map.bytes()).map_err(|e| OpenError::bad(&tokens, e.what))?.metadata);
    }
    (c.packed, c.problems) = (Some(config), problems);
    Ok(c)
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("path", &self.path).field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl Checkpoint {
    fn new(path: &Path, kind: Kind, spec: Spec) -> Checkpoint {
        let (files, tensors, places) = (Vec::new(), Vec::new(), HashMap::new());
        Checkpoint {
            path: path.to_owned(),
            kind,
            spec,
            files,
            tensors,
            places,
            metadata: None,
            packed: None,
            quantized: None,
            fitted: None,
            loaded: HashMap::new(),
            bits: None,
            problems: None,
            notes: Vec::new(),
        }
    }

    /// Ends the opening, or notes what is gone around.
    fn fault(&mut self, e: OpenError, help: Option<&str>) -> Result<(), OpenError> {
        match &mut self.problems {
            None => Err(e),
            Some(list) => {
                list.push(Problem::broken(e.to_string(), help));
                Ok(())
            }
        }
    }

    fn add_file(&mut self, path: &Path, keep: impl Fn(&str) -> bool) -> Result<(), OpenError> {
        let map = Mapped::open(path)?;
        let tensors = content::safetensors(path, map.bytes())?;
        let file = self.files.len();
        self.tensors.extend(tensors.into_iter().filter(|t| keep(&t.name)).map(|t| (file, t)));
        self.files.push(map);
        Ok(())
    }

    fn file_of(&self, tensor: usize) -> String {
        self.files[self.tensors[tensor].0].path.display().to_string()
    }

    pub(crate) fn spec_of(&self) -> &Spec {
        &self.spec
    }

    /// Places whose tensors another tool compressed.
    pub(crate) fn foreign_places(&self) -> usize {
        self.places.values().filter(|l| matches!(l, Located::Foreign(_))).count()
    }

    /// The bytes of a tensor.
    pub(crate) fn data(&self, tensor: usize) -> Bytes {
        let (file, t) = &self.tensors[tensor];
        self.files[*file].part(t.dtype, t.bytes.clone())
    }

    /// Where the checkpoint was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory that holds its files: where a tokenizer may lie.
    pub fn dir(&self) -> &Path {
        if self.path.is_dir() { &self.path } else { self.path.parent().unwrap_or(Path::new(".")) }
    }

    /// Its layout.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Metadata of a GGUF file, or those that a packed model carries for its tokenizer.
    pub fn metadata(&self) -> Option<&gguf::Metadata> {
        self.metadata.as_ref()
    }

    /// What a packed model says about itself.
    pub fn packed(&self) -> Option<&PackedConfig> {
        self.packed.as_ref()
    }

    /// What it says about its compression, where another tool compressed it.
    pub fn quantized(&self) -> Option<&Quantized> {
        self.quantized.as_ref()
    }

    /// The same model with an adapter on it: as low-rank terms beside the matrices it changes, or merged into them.
    pub fn with_adapter(self, adapter: Adapter, merge: bool) -> Result<Checkpoint, OpenError> {
        let fitted = Fitted::new(adapter, &self.spec, merge)?;
        // A model that has lost tokens numbers the others anew: rows for more tokens than it has are of the source's.
        if let (Some(rows), Some(_)) = (fitted.rows(), &self.packed)
            && let Ok(tokenizer) = Tokenizer::open(&self)
            && rows > self.spec.vocab.max(tokenizer.vocab_size())
        {
            return fitted.other_tokens(rows, self.spec.vocab);
        }
        Ok(Checkpoint { spec: fitted.spec.clone(), fitted: Some(fitted), ..self })
    }

    /// The directory of the adapter in force, and whether it is merged.
    pub fn adapter(&self) -> Option<(&Path, bool)> {
        self.fitted.as_ref().map(|f| (f.adapter.path(), f.merge))
    }

    /// Everything that makes it differ from what its files hold alone, or from what they were written for: a sentence
    /// each.
    pub fn remarks(&self) -> Vec<String> {
        let mut out = self.quantized.as_ref().map_or_else(Vec::new, |q| q.notes.clone());
        out.extend(self.notes.iter().cloned());
        out.extend(self.fitted.as_ref().map(Fitted::describe));
        out
    }

    /// What is wrong with it: only after [`examine`].
    pub fn problems(&self) -> &[Problem] {
        self.problems.as_deref().unwrap_or_default()
    }

    pub(crate) fn note(&mut self, p: Problem) {
        self.problems.get_or_insert_default().push(p);
    }

    /// Something odd that is told whenever the model is opened.
    fn remark(&mut self, what: String, help: Option<&str>) {
        match &mut self.problems {
            Some(list) => list.push(Problem::odd(what, help)),
            None => self.notes.push(what),
        }
    }

    /// Every tensor of the files.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.tensors.iter().map(|t| &t.1)
    }

    /// Sizes of all weight files together.
    pub fn source_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes().len() as u64).sum()
    }

    /// Tensors that no place of the network uses; constants that some writers put beside the weights (masks, RoPE
    /// tables) apart.
    pub fn unused(&self) -> Vec<&TensorInfo> {
        let used = self.used();
        let constant = |n: &str| {
            let ends = [
                "rotary_emb.inv_freq",
                ".attn.bias",
                ".attn.masked_bias",
                ".attention.bias",
                ".attention.masked_bias",
                "act_fn.beta",
                "act_fn.eps",
            ];
            let rounding = self.quantized.is_some() && foreign::about_activations(n);
            ends.iter().any(|e| n.ends_with(e)) || n.starts_with("rope_f") || rounding
        };
        let tensors = self.tensors.iter().enumerate().filter(|(i, t)| !used.contains(i) && !constant(&t.1.name));
        tensors.map(|(_, t)| &t.1).collect()
    }

    fn used(&self) -> HashSet<usize> {
        let mut used = HashSet::new();
        for located in self.places.values() {
            match located {
                Located::Plain { tensor, .. } | Located::Gathered { tensor, .. } => drop(used.insert(*tensor)),
                Located::Packed { buffers, .. } => used.extend(buffers.values().copied()),
                Located::Foreign(lazy) => used.extend(lazy.tensors()),
            }
        }
        used
    }

    /// The file that holds this checkpoint's GGUF metadata, where there is one: itself, or the packed model's
    /// `tokenizer.gguf`.
    pub(crate) fn gguf_file(&self) -> Result<Option<Bytes>, OpenError> {
        match self.kind {
            Kind::Gguf => Ok(self.files.first().map(|f| f.turned.as_ref().unwrap_or(f.bytes()).clone())),
            Kind::Packed if self.metadata.is_some() => {
                Ok(Some(Mapped::open(&self.path.join("tokenizer.gguf"))?.bytes().clone()))
            }
            _ => Ok(None),
        }
    }

    /// A tensor of the files by its name.
    pub(crate) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().map(|t| &t.1).find(|t| t.name == name)
    }

    /// The bytes of a tensor of the files by its name, and how its values are written.
    pub(crate) fn raw(&self, name: &str) -> Option<(&TensorInfo, Bytes)> {
        let (file, t) = self.tensors.iter().find(|t| t.1.name == name)?;
        Some((t, self.files[*file].part(t.dtype, t.bytes.clone())))
    }

    /// The bytes of a GGUF file that holds nothing but this checkpoint's tokenizer, where that lies in GGUF metadata.
    pub(crate) fn tokenizer_gguf(&self) -> Result<Option<Vec<u8>>, OpenError> {
        let path = match self.kind {
            Kind::Gguf => self.path.clone(),
            Kind::Packed => self.path.join("tokenizer.gguf"),
            Kind::HuggingFace => return Ok(None),
        };
        if !path.is_file() {
            return Ok(None);
        }
        let map = Mapped::open(&path)?;
        let parsed = gguf::parse(map.bytes()).map_err(|e| OpenError::bad(&path, e.what))?;
        // The name belongs to the tokenizer: by it some have special tokens that take white space away.
        let keep = |key: &str| key.starts_with("tokenizer.") || matches!(key, "general.architecture" | "general.name");
        Ok(Some(gguf::metadata_only(map.bytes(), &parsed, keep)))
    }

    /// The tensor of a place as its files hold it.
    fn stored(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        match self.places.get(place) {
            None => Ok(None),
            Some(Located::Plain { tensor, rows, cols, groups: Some((n, from)), .. }) => {
                Ok(Some(Arc::new(self.grouped(*tensor, *rows, *cols, (*n, *from)))))
            }
            Some(Located::Plain { tensor, bytes, rows, cols, lie, groups: None }) => {
                Ok(Some(Arc::new(self.plain(*tensor, bytes, *rows, *cols, *lie))))
            }
            Some(Located::Gathered { tensor, runs, rows, cols }) => {
                Ok(Some(Arc::new(self.gathered(*tensor, runs, (*rows, *cols)))))
            }
            Some(Located::Packed { desc, buffers, whole }) => {
                let some = |all: &Arc<Stored>| match self.loaded.get(place) {
                    Some(n) if *n < all.terms.len() => Arc::new(all.first_terms(*n)),
                    _ => all.clone(),
                };
                if let Some(done) = whole.get() {
                    return Ok(Some(some(done)));
                }
                let stored = Stored::from_parts(desc, |suffix| {
                    let (file, t) = &self.tensors[*buffers.get(suffix)?];
                    Some((t.dtype.elem()?, t.shape.clone(), self.files[*file].bytes().slice(t.bytes.clone())))
                });
                let file = self.path.display().to_string();
                let stored = match self.bits {
                    Some(bits) => stored.and_then(|s| s.narrowed(bits)),
                    None => stored,
                };
                let stored = stored.map_err(|e| WeightsError::bad(file, place.to_string(), e))?;
                Ok(Some(some(whole.get_or_init(|| Arc::new(stored)))))
            }
            Some(Located::Foreign(lazy)) => {
                let stored = lazy.get(&|i| self.data(i));
                Ok(Some(stored.map_err(|f| self.foreign_fault(f))?))
            }
        }
    }

    fn let_go(&self, tensor: usize) {
        let (file, t) = &self.tensors[tensor];
        self.files[*file].release(t.bytes.clone());
    }

    fn plain(&self, tensor: usize, bytes: &Range<usize>, rows: usize, cols: usize, lie: Lie) -> Stored {
        let (file, t) = &self.tensors[tensor];
        let data = self.files[*file].part(t.dtype, bytes.clone());
        let Lie { transposed, step } = lie;
        let values = match (t.dtype, transposed) {
            (TensorType::Float(f), None) if step == 1 => Values::Float(f, data),
            (TensorType::Float(f), None) => {
                let size = if rows == 1 { f.bytes() } else { cols * f.bytes() };
                Values::Float(f, every(&data, size, step))
            }
            (TensorType::Float(f), Some(from)) => {
                let all = transpose(&data, (rows - 1) * step + 1, cols, from, f.bytes());
                Values::Float(f, if step == 1 { all } else { every(&all, cols * f.bytes(), step) })
            }
            (TensorType::Block(b), _) if step > 1 => {
                let size = cols / b.block() * b.block_bytes();
                Values::Gguf(b, every(&data, size, step))
            }
            (TensorType::Block(b), _) => Values::Gguf(b, data),
            (TensorType::Uint(_) | TensorType::Grid(_) | TensorType::Other(_), _) => {
                unreachable!("refused when the file was opened")
            }
        };
        Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values })
    }
}

impl Weights for Checkpoint {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        let Some(f) = &self.fitted else { return self.stored(place) };
        let base = if f.needs_base(place) { self.stored(&f.base_of(place))? } else { None };
        f.apply(place, base)
    }

    fn release(&self, place: &Place) {
        let place = self.fitted.as_ref().map_or(*place, |f| f.base_of(place));
        match self.places.get(&place) {
            Some(Located::Plain { tensor, bytes, .. }) => self.files[self.tensors[*tensor].0].release(bytes.clone()),
            // Its rows stand among those of others, which may not have been taken yet.
            Some(Located::Gathered { .. }) => {}
            Some(Located::Packed { buffers, .. }) => buffers.values().for_each(|i| self.let_go(*i)),
            Some(Located::Foreign(lazy)) => lazy.tensors().for_each(|i| self.let_go(i)),
            None => {}
        }
    }
}

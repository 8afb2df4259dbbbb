//! Known breakages of checkpoints made by other programs: what is wrong, and the same model mended.
//!
//! - A `sparsity_config` left over beside dense weights: today's readers refuse it, and it says nothing.
//! - More layers announced than there are: pruning took layers away and left the count, and lists with an entry for
//!   each layer, behind.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::along::copy_named_templates;
use crate::content::{self, Content};
use crate::map::Mapped;
use crate::open::{open_as, open_parsed};
use crate::save::OutDir;
use crate::save::{OutFile, Pairs, Progress};
use crate::writer::io_at;
use crate::{Checkpoint, OpenError, SaveError, gguf, json, safetensors};

/// Something wrong with a checkpoint that [`repair`] mends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What, in a sentence with names and numbers.
    pub what: String,
}

fn fault(what: String) -> Fault {
    Fault { what }
}

/// What of the known breakages a checkpoint has. Nothing is said about files that this program cannot read at all:
/// opening does that.
pub fn diagnose(path: &Path) -> Result<Vec<Fault>, OpenError> {
    Ok(Broken::look(path)?.map_or_else(Vec::new, |b| b.faults()))
}

/// What [`repair`] would mend, where the mended model opens; otherwise why it is refused. Nothing is written.
pub fn mendable(path: &Path) -> Result<Vec<Fault>, SaveError> {
    Broken::to_mend(path).map(|b| b.faults())
}

/// Writes the mended model to `out` (a directory, or a file for GGUF) and says what was mended.
pub fn repair(path: &Path, out: &Path, overwrite: bool, progress: Progress<'_>) -> Result<Vec<Fault>, SaveError> {
    match Broken::to_mend(path)? {
        Broken::Hf(b) => b.mend(out, overwrite, progress),
        Broken::Gguf(b) => b.mend(out, overwrite, progress),
    }
}

enum Broken {
    Hf(Hf),
    Gguf(Box<Gguf>),
}

impl Broken {
    /// A checkpoint with a fault, which opens once it is mended.
    fn to_mend(path: &Path) -> Result<Broken, SaveError> {
        let refused = |what: String| SaveError::Refused(format!("{}: {what}", path.display()));
        let broken = Broken::look(path)?.filter(|b| !b.faults().is_empty());
        let broken = broken.ok_or_else(|| refused("none of the known breakages is there".into()))?;
        let opened = match &broken {
            Broken::Hf(b) => {
                let renumber = b.renumber();
                let rename = |n: &str| renumber.as_ref().map_or_else(|| n.to_owned(), |r| r.rename(n));
                open_as(path, path, None, &b.mended_config()?, &rename, None)
            }
            Broken::Gguf(b) => b.mended()?,
        };
        match opened {
            Ok(_) => Ok(broken),
            Err(e) => Err(refused(format!("even mended it would not open: {e}"))),
        }
    }

    fn faults(&self) -> Vec<Fault> {
        match self {
            Broken::Hf(b) => b.faults(),
            Broken::Gguf(b) => b.faults(),
        }
    }

    fn look(path: &Path) -> Result<Option<Broken>, OpenError> {
        if path.is_dir() {
            return Ok(Hf::look(path)?.map(Broken::Hf));
        }
        if content::look(path)? == Content::Gguf {
            let map = Mapped::open(path)?;
            let parsed = gguf::parse(map.bytes()).map_err(|e| OpenError::bad(path, e.what))?;
            let split = parsed.metadata.get_u64("split.count").ok().flatten().is_some_and(|n| n > 1);
            if split || parsed.turned.is_some() {
                let what = "repair takes whole, little-endian GGUF files; convert MODEL --to gguf makes one of parts \
                            and of a big-endian one";
                return Err(OpenError::bad(path, what));
            }
            return Ok(Some(Broken::Gguf(Box::new(Gguf { path: path.to_owned(), map, parsed }))));
        }
        Ok(None)
    }
}

/// The layers that names speak of: the number behind `layers.`, `h.` or `blk.`.
fn layers<'a>(names: impl Iterator<Item = &'a str>) -> BTreeSet<usize> {
    names.filter_map(|n| number(n).map(|x| x.1)).collect()
}

/// The parts of a name around its layer's number.
fn number(name: &str) -> Option<(&str, usize, &str)> {
    let parts: Vec<&str> = name.split('.').collect();
    let i = parts.iter().position(|p| ["layers", "h", "blk"].contains(p))?;
    let l = parts.get(i + 1)?.parse().ok()?;
    let before = parts[..=i].iter().map(|p| p.len() + 1).sum::<usize>();
    let after = before + parts[i + 1].len();
    Some((&name[..before], l, &name[after..]))
}

/// What became of each layer's number, where layers are missing.
struct Renumber {
    announced: usize,
    present: Vec<usize>,
}

impl Renumber {
    fn of(announced: Option<usize>, present: BTreeSet<usize>) -> Option<Renumber> {
        // A bound against hostile counts, far above any model.
        let announced = announced.filter(|n| *n <= 4096)?;
        let present: Vec<usize> = present.into_iter().collect();
        (!present.is_empty() && present.len() < announced).then_some(Renumber { announced, present })
    }

    /// Whether names show which layers are gone. Where the others moved up, nobody can tell.
    fn told(&self) -> bool {
        self.present.iter().enumerate().any(|(i, l)| i != *l)
    }

    fn fault(&self, key: &str) -> Fault {
        let (n, have) = (self.announced, self.present.len());
        let gone: Vec<usize> = (0..n).filter(|l| !self.present.contains(l)).collect();
        let which = if self.told() { format!(" (layers {gone:?} are gone)") } else { String::new() };
        fault(format!("{key} is {n}, but tensors of {have} layers are there{which}"))
    }

    fn rename(&self, name: &str) -> String {
        match number(name).and_then(|(a, l, b)| Some((a, self.present.binary_search(&l).ok()?, b))) {
            Some((before, new, after)) => format!("{before}{new}{after}"),
            None => name.to_owned(),
        }
    }

    /// A list with an entry for each announced layer, with those of the present ones alone.
    fn filter<T: Clone + PartialEq>(&self, key: &str, list: &[T]) -> Result<Vec<T>, SaveError> {
        let alike = list.windows(2).all(|w| w[0] == w[1]);
        if !self.told() && !alike {
            let what = "has different entries, and nothing tells which layers were taken away";
            return Err(SaveError::Refused(format!("{key} {what}; write the list by hand")));
        }
        Ok(self.present.iter().filter_map(|&l| list.get(l).cloned()).collect())
    }
}

/// A directory in the Hugging Face layout.
struct Hf {
    dir: PathBuf,
    config: Value,
    /// Weight files with their headers.
    files: Vec<(String, Mapped, Map<String, Value>)>,
}

impl Hf {
    fn look(dir: &Path) -> Result<Option<Hf>, OpenError> {
        let path = dir.join("config.json");
        if !path.is_file() {
            return Ok(None);
        }
        let config = json::read(&path)?;
        if config.get("format").and_then(Value::as_str) == Some(crate::packed::FORMAT) {
            return Ok(None);
        }
        let index = dir.join("model.safetensors.index.json");
        let names: BTreeSet<String> = match index.is_file() {
            true => safetensors::parse_index(&json::list_bytes(&index)?)
                .map_err(|e| OpenError::bad(&index, e))?
                .into_iter()
                .map(|t| t.1)
                .collect(),
            false => ["model.safetensors".to_owned()].into_iter().filter(|n| dir.join(n).is_file()).collect(),
        };
        let mut files = Vec::new();
        for name in names {
            let path = dir.join(&name);
            let map = Mapped::open(&path)?;
            // The parser checks everything; the header itself is then only read once more.
            content::safetensors(&path, map.bytes())?;
            let n = u64::from_le_bytes(map.bytes()[..8].try_into().unwrap_or_default()) as usize;
            let header =
                serde_json::from_slice(&map.bytes()[8..8 + n]).map_err(|e| OpenError::bad(&path, e.to_string()))?;
            files.push((name, map, header));
        }
        Ok(Some(Hf { dir: dir.to_owned(), config, files }))
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.files.iter().flat_map(|f| f.2.keys()).map(String::as_str).filter(|n| *n != "__metadata__")
    }

    /// Where the configuration speaks of a dead `sparsity_config`.
    fn dead(&self) -> Vec<&'static str> {
        let sparse = [".bitmask", ".compressed", ".row_offsets", ".meta"];
        if self.names().any(|n| sparse.iter().any(|s| n.ends_with(s))) {
            return Vec::new();
        }
        let full = |v: &Value| v.as_object().is_some_and(|o| !o.is_empty());
        let mut out = Vec::new();
        for key in ["quantization_config", "compression_config"] {
            if full(&self.config[key]["sparsity_config"]) {
                out.push(key);
            }
        }
        if full(&self.config["sparsity_config"]) {
            out.push("");
        }
        out
    }

    /// The part of the configuration that counts layers, and its key.
    fn counted(&self) -> (bool, &'static str) {
        let nested = self.config["text_config"].is_object();
        let of = if nested { &self.config["text_config"] } else { &self.config };
        let key = if of.get("n_layer").is_some() { "n_layer" } else { "num_hidden_layers" };
        (nested, key)
    }

    fn renumber(&self) -> Option<Renumber> {
        let (nested, key) = self.counted();
        let of = if nested { &self.config["text_config"] } else { &self.config };
        // A model that also sees images counts the layers of its eyes apart.
        let seen = |n: &&str| !n.contains("vision");
        Renumber::of(of[key].as_u64().map(|n| n as usize), layers(self.names().filter(seen)))
    }

    fn faults(&self) -> Vec<Fault> {
        let mut out = Vec::new();
        for key in self.dead() {
            let at = if key.is_empty() { String::new() } else { format!("{key}.") };
            out.push(fault(format!(
                "config.json: {at}sparsity_config describes sparse storage, but the weights are stored densely"
            )));
        }
        if let Some(r) = self.renumber() {
            out.push(r.fault(&format!("config.json: {}", self.counted().1)));
        }
        out
    }

    fn mended_config(&self) -> Result<Value, SaveError> {
        let mut config = self.config.clone();
        for key in self.dead() {
            if key.is_empty() {
                config.as_object_mut().and_then(|c| c.shift_remove("sparsity_config"));
                continue;
            }
            // Quantization of its own stays; without any, the whole entry said nothing.
            let quantized = config[key]["config_groups"].as_object().is_some_and(|g| !g.is_empty());
            if quantized {
                config[key]["sparsity_config"] = json!({});
            } else {
                config.as_object_mut().and_then(|c| c.shift_remove(key));
            }
        }
        let Some(r) = self.renumber() else { return Ok(config) };
        let (nested, key) = self.counted();
        let of = if nested { &mut config["text_config"] } else { &mut config };
        of[key] = json!(r.present.len());
        let Some(object) = of.as_object_mut() else { return Ok(config) };
        for (name, value) in object.iter_mut() {
            match value {
                Value::Array(list) if name == "mlp_only_layers" => {
                    let new = |l: &Value| r.present.binary_search(&(l.as_u64()? as usize)).ok();
                    *list = list.iter().filter_map(new).map(|l| json!(l)).collect();
                }
                Value::Array(list) if list.len() == r.announced => {
                    *list = r.filter(&format!("config.json: {name}"), list)?
                }
                Value::Number(n) if name == "max_window_layers" => {
                    let most = n.as_u64().unwrap_or(0) as usize;
                    *value = json!(r.present.iter().filter(|l| **l < most).count());
                }
                _ => {}
            }
        }
        Ok(config)
    }

    fn mend(&self, out: &Path, overwrite: bool, progress: Progress<'_>) -> Result<Vec<Fault>, SaveError> {
        let (config, renumber) = (self.mended_config()?, self.renumber());
        let rename = |n: &str| renumber.as_ref().map_or_else(|| n.to_owned(), |r| r.rename(n));
        OutDir::create(out, overwrite)?
            .write_with(|dir| {
                dir.json("config.json", &config)?;
                let mut map = Map::new();
                for (i, (name, file, header)) in self.files.iter().enumerate() {
                    let renamed: Map<String, Value> = header.iter().map(|(n, v)| (rename(n), v.clone())).collect();
                    map.extend(renamed.keys().filter(|n| *n != "__metadata__").map(|n| (n.clone(), json!(name))));
                    let mut text = Value::Object(renamed).to_string().into_bytes();
                    text.resize(text.len().next_multiple_of(8), b' ');
                    let had = 8 + u64::from_le_bytes(file.bytes()[..8].try_into().unwrap_or_default()) as usize;
                    let path = dir.path(name);
                    let mut to = BufWriter::new(File::create(&path).map_err(io_at(&path))?);
                    let io = io_at(&path);
                    to.write_all(&(text.len() as u64).to_le_bytes()).map_err(&io)?;
                    to.write_all(&text).map_err(&io)?;
                    for from in (had..file.bytes().len()).step_by(1 << 24) {
                        let end = (from + (1 << 24)).min(file.bytes().len());
                        to.write_all(&file.bytes()[from..end]).map_err(&io)?;
                        file.release(from..end);
                    }
                    to.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(&io)?;
                    progress(i + 1, self.files.len());
                }
                if self.files.len() > 1 || self.dir.join("model.safetensors.index.json").is_file() {
                    let total: u64 = self.files.iter().map(|f| f.1.bytes().len() as u64).sum();
                    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
                    dir.json("model.safetensors.index.json", &index)?;
                }
                self.others(dir)?;
                Ok(self.faults())
            })
            .map(|done| done.1)
    }

    /// Everything else in the directory goes along: tokenizer, templates, words about the model.
    fn others(&self, dir: &OutDir) -> Result<(), SaveError> {
        for entry in fs::read_dir(&self.dir).map_err(io_at(&self.dir))? {
            let path = entry.map_err(io_at(&self.dir))?.path();
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
            let ours = name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".index.json");
            if ours || !path.is_file() {
                continue;
            }
            let copy = || -> io::Result<()> {
                fs::copy(&path, dir.path(name))?;
                File::open(dir.path(name))?.sync_all()
            };
            copy().map_err(io_at(&path))?;
        }
        copy_named_templates(&self.dir, &dir.path(""))
    }
}

/// A GGUF file.
struct Gguf {
    path: PathBuf,
    map: Mapped,
    parsed: gguf::Gguf,
}

impl Gguf {
    fn key(&self, name: &str) -> String {
        let arch = self.parsed.metadata.get_str("general.architecture").ok().flatten().unwrap_or("");
        format!("{arch}.{name}")
    }

    fn usize(&self, name: &str) -> Option<usize> {
        self.parsed.metadata.get_u64(&self.key(name)).ok().flatten().map(|n| n as usize)
    }

    fn renumber(&self) -> Option<Renumber> {
        let names = self.parsed.tensors.iter().map(|t| t.name.as_str());
        Renumber::of(self.usize("block_count"), layers(names.filter(|n| n.starts_with("blk."))))
    }

    fn faults(&self) -> Vec<Fault> {
        self.renumber().map(|r| r.fault(&self.key("block_count"))).into_iter().collect()
    }

    /// Rows of a layer's tensor, as a count of `unit`s.
    fn count(&self, layer: usize, name: &str, unit: usize) -> Option<u32> {
        let name = format!("blk.{layer}.{name}.weight");
        let t = self.parsed.tensors.iter().find(|t| t.name == name)?;
        u32::try_from(t.shape.first()? / unit.max(1)).ok()
    }

    /// A list that the tensors' own shapes tell, whichever layers are gone.
    fn measured(&self, key: &str, r: &Renumber) -> Option<Vec<u32>> {
        let head = self.usize("attention.key_length");
        let of = |name: &str, unit: usize| r.present.iter().map(|&l| self.count(l, name, unit)).collect();
        match key.split_once('.')?.1 {
            "attention.head_count" => of("attn_q", head?),
            "attention.head_count_kv" => of("attn_k", head?),
            "feed_forward_length" => of("ffn_up", 1),
            _ => None,
        }
    }

    fn mended_pairs(&self, r: &Renumber) -> Result<Pairs, SaveError> {
        let (file, mut pairs) = (self.map.bytes(), Pairs::default());
        let count = self.key("block_count");
        for (key, pair) in self.parsed.metadata.raw(file) {
            if key == count {
                pairs.u32(key, r.present.len() as u32);
                continue;
            }
            // A list: the key, the type 9, the entries' type, their number, the entries.
            let head = 8 + key.len();
            let word = |at: usize| pair.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default()));
            let size = match word(head + 4) {
                Some(0 | 1 | 7) => 1,
                Some(2 | 3) => 2,
                Some(4..=6) => 4,
                Some(10..=12) => 8,
                _ => 0,
            };
            let listed = word(head) == Some(9) && size > 0 && pair.len() == head + 16 + size * r.announced;
            if !listed || key.starts_with("tokenizer.") {
                pairs.raw(pair);
                continue;
            }
            let entries: Vec<&[u8]> = pair[head + 16..].chunks_exact(size).collect();
            match r.filter(key, &entries) {
                Ok(kept) => {
                    let mut new = pair[..head + 8].to_vec();
                    new.extend((kept.len() as u64).to_le_bytes());
                    kept.iter().for_each(|e| new.extend(*e));
                    pairs.raw(&new);
                }
                Err(e) => match self.measured(key, r) {
                    Some(list) => pairs.value(key, &lacuna_arch::GgufValue::U32s(list)),
                    None => return Err(e),
                },
            }
        }
        Ok(pairs)
    }

    /// The mended file, opened without being written.
    fn mended(&self) -> Result<Result<Checkpoint, OpenError>, SaveError> {
        let mut parsed = self.parsed.clone();
        if let Some(r) = self.renumber() {
            let pairs = self.mended_pairs(&r)?;
            let head = [b"GGUF", &3u32.to_le_bytes()[..], &[0; 8], &pairs.count.to_le_bytes(), &pairs.bytes].concat();
            parsed.metadata = gguf::parse(&head).map_err(|e| OpenError::bad(&self.path, e.what))?.metadata;
            parsed.tensors.iter_mut().for_each(|t| t.name = r.rename(&t.name));
        }
        Ok(open_parsed(&self.path, vec![(Mapped::open(&self.path)?, parsed)], None))
    }

    fn mend(&self, out: &Path, overwrite: bool, progress: Progress<'_>) -> Result<Vec<Fault>, SaveError> {
        let Some(r) = self.renumber() else { return Ok(Vec::new()) };
        let mut pairs = self.mended_pairs(&r)?;
        let align = self.parsed.metadata.get_u32("general.alignment").ok().flatten().unwrap_or(32);
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((self.parsed.tensors.len() as u64).to_le_bytes());
        header.extend(pairs.count.to_le_bytes());
        header.append(&mut pairs.bytes);
        let mut offset = 0u64;
        for t in &self.parsed.tensors {
            let name = r.rename(&t.name);
            let Some(id) = gguf::type_id(&t.dtype.name()) else {
                return Err(SaveError::Refused(format!(
                    "tensor {}: the type {} has no number",
                    t.name,
                    t.dtype.name()
                )));
            };
            gguf::put_info(&mut header, &name, &t.shape, id, offset);
            offset = (offset + t.bytes.len() as u64).next_multiple_of(align.into());
        }
        let mut file = OutFile::create(out, overwrite, b"GGUF")?;
        file.write(&header)?;
        file.pad(align.into())?;
        for (i, t) in self.parsed.tensors.iter().enumerate() {
            file.write(&self.map.bytes()[t.bytes.clone()])?;
            file.pad(align.into())?;
            self.map.release(t.bytes.clone());
            progress(i + 1, self.parsed.tensors.len());
        }
        file.finish().map(|_| self.faults())
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        assert_eq!(number("model.layers.12.mlp.up_proj.weight"), Some(("model.layers.", 12, ".mlp.up_proj.weight")));
        assert_eq!(number("transformer.h.0.ln_1.bias"), Some(("transformer.h.", 0, ".ln_1.bias")));
        assert_eq!(number("blk.3.attn_q.weight"), Some(("blk.", 3, ".attn_q.weight")));
        assert_eq!(number("model.norm.weight"), None);
        let r = Renumber::of(Some(4), [0, 2, 3].into()).unwrap();
        assert_eq!(r.rename("blk.3.attn_q.weight"), "blk.2.attn_q.weight");
        assert_eq!(r.filter("k", &[1, 2, 3, 4]).unwrap(), [1, 3, 4]);
        let moved = Renumber::of(Some(4), [0, 1, 2].into()).unwrap();
        assert!(moved.filter("k", &[1, 1, 2, 1]).is_err() && moved.filter("k", &[5; 4]).unwrap() == [5; 3]);
        assert!(Renumber::of(Some(3), [0, 1, 2].into()).is_none());
    }
}

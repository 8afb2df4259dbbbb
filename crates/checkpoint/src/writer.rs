//! Writing a packed model: shard by shard, atomically, resumable.
//!
//! A model is written into `.NAME.partial` beside its destination. Matrices go one after the other into a data file; a journal gets a
//! line for each that is complete. When a data file is full it is sealed: its header, known only now, is written and the data copied
//! behind it. [`PackedWriter::finish`] writes config.json and renames the directory. A run that was killed goes on behind the journal's
//! last line, and the result is the same to the last byte.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use lacuna_base::unfinished;
use lacuna_format::{Bytes, Descriptor, Elem, FormatError, Stored};
use lacuna_spec::{Place, Spec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::packed::{FORMAT, PackedConfig, VERSION, fits};
use crate::{Checkpoint, Kind, OpenError};

/// Why a model cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A file cannot be written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// The system's word.
        source: io::Error,
    },
    /// Something stands in the way, or the call is not in order.
    #[error("{0}")]
    Refused(String),
    /// A matrix that does not fit its place or itself.
    #[error("{place}: {source}")]
    Matrix {
        /// Whose it is.
        place: String,
        /// What is wrong.
        source: FormatError,
    },
    /// The source's tokenizer cannot be read.
    #[error(transparent)]
    Source(#[from] OpenError),
}

pub(crate) fn io_at(path: &Path) -> impl Fn(io::Error) -> SaveError {
    move |source| SaveError::Io { file: path.display().to_string(), source }
}

/// Files beside the weights that a model takes along unchanged.
pub(crate) const SIDE_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// Bytes of data after which a file is sealed.
const SHARD_BYTES: u64 = 2_000_000_000;

/// One line of the journal: a matrix that is complete.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Line {
    place: Place,
    shard: usize,
    /// Bytes of the shard's data up to and with this matrix.
    end: u64,
    desc: Descriptor,
    parts: Vec<(String, Elem, Vec<usize>, u64)>,
}

/// A packed model being written.
#[derive(Debug)]
pub struct PackedWriter {
    out: PathBuf,
    dir: PathBuf,
    overwrite: bool,
    shard_bytes: u64,
    lines: Vec<Line>,
    done: HashSet<Place>,
    journal: File,
    data: Option<File>,
    shard: usize,
    end: u64,
}

impl PackedWriter {
    /// Begins a model at `out`; an earlier attempt at the same place is thrown away. An existing `out` is refused unless `overwrite`
    /// is set, and even then unless it is a packed model itself.
    pub fn create(out: &Path, overwrite: bool) -> Result<PackedWriter, SaveError> {
        let dir = partial(out)?;
        refuse_existing(out, overwrite)?;
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(io_at(&dir))?;
        }
        PackedWriter::begin(out, dir, overwrite)
    }

    /// Goes on with an interrupted model at `out` after the last complete matrix, or begins it where there is none.
    pub fn resume(out: &Path, overwrite: bool) -> Result<PackedWriter, SaveError> {
        let dir = partial(out)?;
        refuse_existing(out, overwrite)?;
        let mut w = PackedWriter::begin(out, dir, overwrite)?;
        w.recover()?;
        Ok(w)
    }

    fn begin(out: &Path, dir: PathBuf, overwrite: bool) -> Result<PackedWriter, SaveError> {
        fs::create_dir_all(&dir).map_err(io_at(&dir))?;
        let path = dir.join("journal");
        let journal = OpenOptions::new().create(true).append(true).open(&path).map_err(io_at(&path))?;
        let (lines, done) = (Vec::new(), HashSet::new());
        let out = out.to_owned();
        let shard_bytes = SHARD_BYTES;
        Ok(PackedWriter { out, dir, overwrite, shard_bytes, lines, done, journal, data: None, shard: 1, end: 0 })
    }

    /// Seals files after `bytes` of data instead of 2 GB. A resumed writer must be given the same.
    pub fn shard_bytes(mut self, bytes: u64) -> PackedWriter {
        self.shard_bytes = bytes.max(1);
        self
    }

    fn data_path(&self, shard: usize) -> PathBuf {
        self.dir.join(format!("shard-{shard:05}.data"))
    }

    fn sealed_path(&self, shard: usize) -> PathBuf {
        self.dir.join(format!("shard-{shard:05}.safetensors"))
    }

    fn recover(&mut self) -> Result<(), SaveError> {
        // A run killed within `finish` may have named its shards for good already.
        for entry in fs::read_dir(&self.dir).map_err(io_at(&self.dir))? {
            let path = entry.map_err(io_at(&self.dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let number = name.strip_prefix("model-").and_then(|r| r.split_once("-of-")).map(|r| r.0.parse());
            match (name, number) {
                _ if name.ends_with(".sealing") => fs::remove_file(&path).map_err(io_at(&path))?,
                ("model.safetensors", _) => fs::rename(&path, self.sealed_path(1)).map_err(io_at(&path))?,
                (_, Some(Ok(n))) => fs::rename(&path, self.sealed_path(n)).map_err(io_at(&path))?,
                _ => {}
            }
        }
        let path = self.dir.join("journal");
        let mut kept = 0;
        let mut reader = BufReader::new(File::open(&path).map_err(io_at(&path))?);
        let mut text = String::new();
        // A torn last line, or data that never reached the disk, end what is kept.
        while reader.read_line(&mut text).is_ok_and(|n| n > 0) {
            let Some(line) = text.ends_with('\n').then(|| serde_json::from_str::<Line>(&text).ok()).flatten() else {
                break;
            };
            let have = fs::metadata(self.data_path(line.shard)).map_or(0, |m| m.len());
            if have < line.end && !self.sealed_path(line.shard).is_file() {
                break;
            }
            kept += text.len() as u64;
            (self.shard, self.end) = (line.shard, line.end);
            self.done.insert(line.place);
            self.lines.push(line);
            text.clear();
        }
        self.journal.set_len(kept).map_err(io_at(&path))?;
        let data = self.data_path(self.shard);
        if self.sealed_path(self.shard).is_file() {
            if data.is_file() {
                fs::remove_file(&data).map_err(io_at(&data))?;
            }
            (self.shard, self.end) = (self.shard + 1, 0);
        } else if data.is_file() {
            let file = OpenOptions::new().append(true).open(&data).map_err(io_at(&data))?;
            file.set_len(self.end).map_err(io_at(&data))?;
            self.data = Some(file);
        }
        Ok(())
    }

    /// The directory being written, for what else a run wants to keep until it finishes: whatever does not belong to the model must
    /// be gone by then.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the matrix of `place` is complete, from this run or the one that it resumes.
    pub fn is_done(&self, place: &Place) -> bool {
        self.done.contains(place)
    }

    /// Writes the matrix of `place`.
    pub fn put(&mut self, place: &Place, stored: &Stored) -> Result<(), SaveError> {
        let fault = |source| SaveError::Matrix { place: place.to_string(), source };
        stored.check().map_err(fault)?;
        if self.is_done(place) {
            return Err(SaveError::Refused(format!("{place} was written before")));
        }
        let (desc, parts) = stored.to_parts();
        let size: u64 = parts.iter().map(|p| p.bytes.len() as u64).sum();
        if self.end > 0 && self.end + size > self.shard_bytes {
            self.seal()?;
        }
        let path = self.data_path(self.shard);
        let data = match &mut self.data {
            Some(data) => data,
            empty => empty.insert(File::create(&path).map_err(io_at(&path))?),
        };
        for p in &parts {
            data.write_all(&p.bytes).map_err(io_at(&path))?;
        }
        // The line may say that the matrix is complete only once it is.
        data.sync_data().map_err(io_at(&path))?;
        self.end += size;
        let parts = parts.into_iter().map(|p| (p.suffix, p.elem, p.shape, p.bytes.len() as u64)).collect();
        let line = Line { place: *place, shard: self.shard, end: self.end, desc, parts };
        let mut text = serde_json::to_vec(&line).map_err(|e| SaveError::Refused(e.to_string()))?;
        text.push(b'\n');
        let path = self.dir.join("journal");
        self.journal.write_all(&text).map_err(io_at(&path))?;
        self.done.insert(*place);
        self.lines.push(line);
        Ok(())
    }

    /// Reads back the matrix of `place`, if it is complete.
    pub fn read(&self, place: &Place) -> Result<Option<Stored>, SaveError> {
        let Some(line) = self.lines.iter().find(|l| l.place == *place) else { return Ok(None) };
        let size: u64 = line.parts.iter().map(|p| p.3).sum();
        let sealed = self.sealed_path(line.shard);
        let (path, header) = if sealed.is_file() {
            let mut n = [0; 8];
            File::open(&sealed).and_then(|mut f| f.read_exact(&mut n)).map_err(io_at(&sealed))?;
            (sealed, 8 + u64::from_le_bytes(n))
        } else {
            (self.data_path(line.shard), 0)
        };
        let mut file = File::open(&path).map_err(io_at(&path))?;
        file.seek(SeekFrom::Start(header + line.end - size)).map_err(io_at(&path))?;
        let mut buffers = Vec::with_capacity(line.parts.len());
        for (suffix, elem, shape, bytes) in &line.parts {
            let mut buf = vec![0; *bytes as usize];
            file.read_exact(&mut buf).map_err(io_at(&path))?;
            buffers.push((suffix, *elem, shape, Bytes::from(buf)));
        }
        let get = |name: &str| {
            let (_, elem, shape, bytes) = buffers.iter().find(|b| b.0 == name)?;
            Some((*elem, (*shape).clone(), bytes.clone()))
        };
        let stored = Stored::from_parts(&line.desc, get);
        stored.map(Some).map_err(|source| SaveError::Matrix { place: place.to_string(), source })
    }

    /// Turns the current data file into a safetensors file and begins the next.
    fn seal(&mut self) -> Result<(), SaveError> {
        let Some(data) = self.data.take() else { return Ok(()) };
        drop(data);
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": FORMAT}));
        let mut at = 0;
        for line in self.lines.iter().filter(|l| l.shard == self.shard) {
            for (suffix, elem, shape, bytes) in &line.parts {
                let entry = json!({"dtype": elem, "shape": shape, "data_offsets": [at, at + bytes]});
                header.insert(format!("{}.{suffix}", line.place), entry);
                at += bytes;
            }
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let (from, to) = (self.data_path(self.shard), self.sealed_path(self.shard));
        let tmp = to.with_extension("sealing");
        let mut file = File::create(&tmp).map_err(io_at(&tmp))?;
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io_at(&tmp))?;
        file.write_all(&header).map_err(io_at(&tmp))?;
        io::copy(&mut File::open(&from).map_err(io_at(&from))?, &mut file).map_err(io_at(&tmp))?;
        file.sync_all().map_err(io_at(&tmp))?;
        fs::rename(&tmp, &to).map_err(io_at(&to))?;
        fs::remove_file(&from).map_err(io_at(&from))?;
        (self.shard, self.end) = (self.shard + 1, 0);
        Ok(())
    }

    /// Completes the model: every place of `spec` must have been put. Tokenizer files come from `source` unchanged; of a GGUF file its
    /// tokenizer's metadata go into `tokenizer.gguf`.
    pub fn finish(
        mut self,
        spec: Spec,
        recipe: Value,
        source_note: Value,
        approximations: Vec<String>,
        source: Option<&Checkpoint>,
    ) -> Result<PathBuf, SaveError> {
        refuse_existing(&self.out, self.overwrite)?;
        spec.check().map_err(|e| SaveError::Refused(e.what))?;
        let mut weights = BTreeMap::new();
        for line in &self.lines {
            weights.insert(line.place, line.desc.clone());
        }
        for place in spec.places() {
            match (weights.get(&place), spec.shape(&place)) {
                (None, _) => return Err(SaveError::Refused(format!("{place} was never written"))),
                (Some(d), Some(want)) if !fits(&place, (d.rows, d.cols), want) => {
                    let what = format!("[{}, {}] was written, the network wants {want:?}", d.rows, d.cols);
                    return Err(SaveError::Matrix { place: place.to_string(), source: FormatError::new(what) });
                }
                _ => {}
            }
        }
        if let Some(extra) = weights.keys().find(|p| spec.shape(p).is_none()) {
            return Err(SaveError::Refused(format!("{extra} was written, but the network has no such tensor")));
        }
        self.seal()?;
        let shards = self.shard - 1;
        let name = |i: usize| match shards {
            1 => "model.safetensors".to_owned(),
            n => format!("model-{i:05}-of-{n:05}.safetensors"),
        };
        let files: Vec<String> = (1..=shards).map(name).collect();
        for (i, name) in files.iter().enumerate() {
            fs::rename(self.sealed_path(i + 1), self.dir.join(name)).map_err(io_at(&self.dir.join(name)))?;
        }
        if let Some(source) = source {
            self.take_along(source)?;
        }
        let (format, source) = (FORMAT.to_owned(), source_note);
        let config = PackedConfig { format, version: VERSION, spec, recipe, source, approximations, files, weights };
        let json = serde_json::to_vec_pretty(&config).map_err(|e| SaveError::Refused(e.to_string()))?;
        self.write("config.json", &json)?;
        let journal = self.dir.join("journal");
        fs::remove_file(&journal).map_err(io_at(&journal))?;
        sync_dir(&self.dir)?;
        unfinished::replace(&self.dir, &self.out).map_err(io_at(&self.out))?;
        if let Some(parent) = self.out.parent().filter(|p| !p.as_os_str().is_empty()) {
            sync_dir(parent)?;
        }
        Ok(self.out)
    }

    fn take_along(&self, source: &Checkpoint) -> Result<(), SaveError> {
        if let Some(bytes) = source.tokenizer_gguf()? {
            self.write("tokenizer.gguf", &bytes)?;
        }
        if source.kind() == Kind::Gguf {
            return Ok(());
        }
        for name in SIDE_FILES {
            let path = source.dir().join(name);
            if path.is_file() {
                self.write(name, &fs::read(&path).map_err(io_at(&path))?)?;
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        let path = self.dir.join(name);
        let mut file = File::create(&path).map_err(io_at(&path))?;
        file.write_all(bytes).map_err(io_at(&path))?;
        file.sync_all().map_err(io_at(&path))
    }
}

pub(crate) fn sync_dir(dir: &Path) -> Result<(), SaveError> {
    #[cfg(unix)]
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_at(dir))?;
    Ok(())
}

pub(crate) fn beside(out: &Path, what: &str) -> Result<PathBuf, SaveError> {
    match out.file_name().and_then(|n| n.to_str()) {
        Some(_) => Ok(unfinished::beside(out, what)),
        None => Err(SaveError::Refused(format!("{} names no directory to write", out.display()))),
    }
}

/// The folder in which a model for `out` waits to be gone on with after its run was interrupted. One in which no matrix is complete is taken away.
pub fn left_behind(out: &Path) -> Option<PathBuf> {
    let dir = partial(out).ok()?;
    let begun = fs::metadata(dir.join("journal")).is_ok_and(|m| m.len() > 0);
    if !begun {
        let _ = fs::remove_dir_all(&dir);
    }
    begun.then_some(dir)
}

fn partial(out: &Path) -> Result<PathBuf, SaveError> {
    beside(out, "partial")
}

fn refuse_existing(out: &Path, overwrite: bool) -> Result<(), SaveError> {
    if !out.exists() {
        return Ok(());
    }
    let show = out.display();
    if !overwrite {
        return Err(SaveError::Refused(format!("{show} exists; --overwrite replaces it")));
    }
    let ours = fs::read(out.join("config.json")).is_ok_and(|json| crate::packed::parse(&json).is_ok());
    let empty = fs::read_dir(out).is_ok_and(|mut d| d.next().is_none());
    if ours || empty {
        return Ok(());
    }
    Err(SaveError::Refused(format!("{show} is no packed model of Lacuna and will not be overwritten")))
}

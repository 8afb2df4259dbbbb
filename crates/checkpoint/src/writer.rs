//! Writing a packed model: shard by shard, atomically, resumable.
//!
//! A model is written into `.NAME.partial` beside its destination. Whenever the process ends, the destination holds the
//! old model whole or the new one whole, and what is unfinished can be gone on with by a run of the same identity and
//! by no other. This is the order:
//!
//! 1. The journal is written under another name, with the run's identity as its first line, brought to the disk and
//!    renamed. A directory without a journal holds nothing to go on with. As long as the run lives it holds a lock on
//!    the journal.
//! 2. Matrices go one after the other into a data file. The data are on the disk before the journal gets the line that
//!    says so.
//! 3. A full data file is sealed: its header, known only now, is written into the room kept for it at the start; where
//!    that is too small, into a new file with the data copied behind it. File and journal are on the disk before the
//!    file gets its name.
//! 4. [`PackedWriter::finish`] gives sealed files their last names and adds the tokenizer's files and config.json; all
//!    is brought to the disk.
//! 5. The directory comes into its place, journal and all. Where a model stood there, the two exchange their names at
//!    once; where the system has no such call, the old one steps aside to `.NAME.old` first, and whoever next writes to
//!    the same place brings it back if need be.
//! 6. The parent directory is brought to the disk; the journal goes; the old model goes.
//!
//! A run that was killed goes on behind the journal's last line, and the result is the same to the last byte.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use lacuna_base::unfinished;
use lacuna_format::{Bytes, Descriptor, Elem, FormatError, Stored};
use lacuna_spec::{Place, Spec};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::packed::{FORMAT, PackedConfig, fits, version_of};
use crate::{Checkpoint, Kind, OpenError, along, files};

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

/// Bytes of data after which a file is sealed.
const SHARD_BYTES: u64 = 2_000_000_000;

/// What the journal is called.
const JOURNAL: &str = "journal";

/// The first line of the journal: whose it is.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Head {
    identity: Value,
}

/// Every other line of the journal: a matrix that is complete.
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
    /// Index of each matrix's line.
    done: HashMap<Place, usize>,
    /// Lines that the journal has.
    journaled: usize,
    journal: File,
    data: Option<File>,
    shard: usize,
    end: u64,
    /// Bytes kept free at the start of a data file for its header.
    reserved: u64,
    /// The source's tokens that stay, where not all do.
    kept: Option<Vec<usize>>,
}

/// Bytes of a tensor's entries in a file's header at the most, as far as most tensors go.
const HEADER_ENTRY: u64 = 512;

impl PackedWriter {
    /// Begins a model at `out`; an earlier attempt at the same place is thrown away. An existing `out` is refused
    /// unless `overwrite` is set, and even then unless it is a packed model itself.
    pub fn create(out: &Path, overwrite: bool) -> Result<PackedWriter, SaveError> {
        PackedWriter::open(out, overwrite, false, &Value::Null, 0)
    }

    /// As [`create`](PackedWriter::create); with `resume`, goes on after the last complete matrix of an interrupted run
    /// at `out`, where there is one. `identity` is what must be equal for that: a run of another identity is refused.
    ///
    /// Room for the header of `tensors` tensors is kept at the start of each data file, so that sealing it writes the
    /// header there instead of copying all data behind a new one. It follows from what is compressed, and so is the
    /// same when a run goes on.
    pub fn open(
        out: &Path,
        overwrite: bool,
        resume: bool,
        identity: &Value,
        tensors: usize,
    ) -> Result<PackedWriter, SaveError> {
        let reserved = if tensors == 0 { 0 } else { (8 + tensors as u64 * HEADER_ENTRY).next_multiple_of(4096) };
        let dir = partial(out)?;
        bring_back(out)?;
        refuse_existing(out, overwrite)?;
        let head = serde_json::to_string(&Head { identity: identity.clone() });
        let head = head.map_err(|e| SaveError::Refused(e.to_string()))? + "\n";
        let path = dir.join(JOURNAL);
        if !(resume && path.is_file()) {
            clear(out)?;
            files::create_dir(&dir)?;
            // Renamed when it is whole: there is no journal that does not say whose it is.
            let new = dir.join("journal.new");
            let journal = files::create(&new)?;
            lock(&journal, out)?;
            files::append(&journal, &new, head.as_bytes())?;
            files::sync(&journal, &new)?;
            files::rename(&new, &path)?;
            return Ok(PackedWriter { reserved, ..PackedWriter::begin(out, dir, overwrite, journal) });
        }
        let journal = OpenOptions::new().append(true).open(&path).map_err(io_at(&path))?;
        lock(&journal, out)?;
        let mut w = PackedWriter { reserved, ..PackedWriter::begin(out, dir, overwrite, journal) };
        w.recover(&head)?;
        Ok(w)
    }

    fn begin(out: &Path, dir: PathBuf, overwrite: bool, journal: File) -> PackedWriter {
        let (lines, done) = (Vec::new(), HashMap::new());
        let (out, shard_bytes) = (out.to_owned(), SHARD_BYTES);
        PackedWriter {
            out,
            dir,
            overwrite,
            shard_bytes,
            lines,
            done,
            journaled: 0,
            journal,
            data: None,
            shard: 1,
            end: 0,
            reserved: 0,
            kept: None,
        }
    }

    /// The model has the source's tokens `kept` alone (their ids rise): its tokenizer's files are written so.
    pub fn keep_tokens(&mut self, kept: &[usize]) {
        self.kept = Some(kept.to_vec());
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

    fn recover(&mut self, head: &str) -> Result<(), SaveError> {
        let path = self.dir.join(JOURNAL);
        let mut reader = BufReader::new(File::open(&path).map_err(io_at(&path))?);
        let mut text = String::new();
        let read = reader.read_line(&mut text).unwrap_or(0);
        let same = |a: &str, b: &str| Some(serde_json::from_str::<Head>(a).ok()? == serde_json::from_str(b).ok()?);
        if read == 0 || same(&text, head) != Some(true) {
            return Err(SaveError::Refused(format!(
                "{}: was left by a run with another recipe, source, text, seed or version of this program; run without \
                 --resume to \
                 start anew",
                self.dir.display()
            )));
        }
        // A run killed within `finish` may have named its shards for good already.
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(io_at(&self.dir))? {
            let path = entry.map_err(io_at(&self.dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let number = match name.strip_prefix("model-").and_then(|r| r.split_once("-of-")) {
                None => (name == "model.safetensors").then_some(1),
                Some((n, _)) => n.parse().ok(),
            };
            if let Some(n) = number {
                files::rename(&path, &self.sealed_path(n))?;
            }
            names.push(number.map_or(path, |n| self.sealed_path(n)));
        }
        let mut kept = text.len() as u64;
        text.clear();
        // A torn last line, or data that never reached the disk, end what is kept.
        while reader.read_line(&mut text).is_ok_and(|n| n > 0) {
            let Some(line) = text.ends_with('\n').then(|| serde_json::from_str::<Line>(&text).ok()).flatten() else {
                break;
            };
            let have = fs::metadata(self.data_path(line.shard)).map_or(0, |m| m.len());
            if have < self.reserved + line.end && !self.sealed_path(line.shard).is_file() {
                break;
            }
            kept += text.len() as u64;
            (self.shard, self.end) = (line.shard, line.end);
            self.done.insert(line.place, self.lines.len());
            self.lines.push(line);
            text.clear();
        }
        self.journaled = self.lines.len();
        files::cut(&self.journal, &path, kept)?;
        let data = self.data_path(self.shard);
        let sealed: HashSet<PathBuf> = self.lines.iter().map(|l| self.sealed_path(l.shard)).collect();
        let whole = sealed.contains(&self.sealed_path(self.shard)) && self.sealed_path(self.shard).is_file();
        // What no line speaks of would travel into the model.
        for name in names.iter().filter(|n| n.exists()) {
            if !(*name == path || sealed.contains(name) || (*name == data && !whole)) {
                files::remove(name)?;
            }
        }
        if whole {
            (self.shard, self.end) = (self.shard + 1, 0);
        } else if data.is_file() {
            let file = OpenOptions::new().append(true).open(&data).map_err(io_at(&data))?;
            files::cut(&file, &data, self.reserved + self.end)?;
            self.data = Some(file);
        }
        Ok(())
    }

    /// The directory being written.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the matrix of `place` is complete, from this run or the one that it resumes.
    pub fn is_done(&self, place: &Place) -> bool {
        self.done.contains_key(place)
    }

    /// Writes the matrix of `place`.
    pub fn put(&mut self, place: &Place, stored: &Stored) -> Result<(), SaveError> {
        self.append(place, stored)?;
        self.commit()
    }

    /// Writes those of `all` that are not written yet, and brings them to the disk once for all of them.
    pub fn put_all(&mut self, all: &[(Place, std::sync::Arc<Stored>)]) -> Result<(), SaveError> {
        for (place, stored) in all {
            if !self.is_done(place) {
                self.append(place, stored)?;
            }
        }
        self.commit()
    }

    /// Appends a matrix to the data; [`commit`](Self::commit) says so in the journal.
    fn append(&mut self, place: &Place, stored: &Stored) -> Result<(), SaveError> {
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
            empty => {
                let data = files::create(&path)?;
                if self.reserved > 0 {
                    files::append(&data, &path, &vec![b' '; self.reserved as usize])?;
                }
                empty.insert(data)
            }
        };
        for p in &parts {
            files::append(data, &path, &p.bytes)?;
        }
        self.end += size;
        let parts = parts.into_iter().map(|p| (p.suffix, p.elem, p.shape, p.bytes.len() as u64)).collect();
        self.done.insert(*place, self.lines.len());
        self.lines.push(Line { place: *place, shard: self.shard, end: self.end, desc, parts });
        Ok(())
    }

    /// Journals every matrix appended since the last time.
    fn commit(&mut self) -> Result<(), SaveError> {
        if self.journaled == self.lines.len() {
            return Ok(());
        }
        // The lines may say that the matrices are complete only once they are.
        if let Some(data) = &self.data {
            files::sync(data, &self.data_path(self.shard))?;
        }
        let mut text = Vec::new();
        for line in &self.lines[self.journaled..] {
            serde_json::to_writer(&mut text, line).map_err(|e| SaveError::Refused(e.to_string()))?;
            text.push(b'\n');
        }
        files::append(&self.journal, &self.dir.join(JOURNAL), &text)?;
        self.journaled = self.lines.len();
        Ok(())
    }

    /// Reads back the matrix of `place`, if it is complete.
    pub fn read(&self, place: &Place) -> Result<Option<Stored>, SaveError> {
        let Some(line) = self.done.get(place).and_then(|&i| self.lines.get(i)) else { return Ok(None) };
        let size: u64 = line.parts.iter().map(|p| p.3).sum();
        let sealed = self.sealed_path(line.shard);
        let (path, header) = if sealed.is_file() {
            let mut n = [0; 8];
            File::open(&sealed).and_then(|mut f| f.read_exact(&mut n)).map_err(io_at(&sealed))?;
            (sealed, 8 + u64::from_le_bytes(n))
        } else {
            (self.data_path(line.shard), self.reserved)
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
        // Before the data go under another name, the journal has all their lines.
        self.commit()?;
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
        let (from, to) = (self.data_path(self.shard), self.sealed_path(self.shard));
        // A sealed file says that all its lines are there.
        files::sync(&self.journal, &self.dir.join(JOURNAL))?;
        if 8 + header.len() as u64 <= self.reserved {
            header.resize(self.reserved as usize - 8, b' ');
            let mut head = (header.len() as u64).to_le_bytes().to_vec();
            head.append(&mut header);
            let file = OpenOptions::new().write(true).open(&from).map_err(io_at(&from))?;
            files::append(&file, &from, &head)?;
            files::sync(&file, &from)?;
            files::rename(&from, &to)?;
            (self.shard, self.end) = (self.shard + 1, 0);
            return Ok(());
        }
        header.resize(header.len().next_multiple_of(8), b' ');
        let tmp = to.with_extension("sealing");
        let file = files::create(&tmp)?;
        files::append(&file, &tmp, &(header.len() as u64).to_le_bytes())?;
        files::append(&file, &tmp, &header)?;
        files::append_file(&file, &tmp, &from, self.reserved)?;
        files::sync(&file, &tmp)?;
        files::rename(&tmp, &to)?;
        files::remove(&from)?;
        (self.shard, self.end) = (self.shard + 1, 0);
        Ok(())
    }

    /// Completes the model: every place of `spec` must have been put. Tokenizer files come from `source`, unchanged where
    /// all its tokens stay; of
    /// a GGUF file its tokenizer's metadata go into `tokenizer.gguf`.
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
            files::rename(&self.sealed_path(i + 1), &self.dir.join(name))?;
        }
        if let Some(source) = source {
            self.take_along(source)?;
        }
        let (format, source) = (FORMAT.to_owned(), source_note);
        let version = version_of(&spec, &weights);
        let config = PackedConfig { format, version, spec, recipe, source, approximations, files, weights };
        let json = serde_json::to_vec_pretty(&config).map_err(|e| SaveError::Refused(e.to_string()))?;
        self.write("config.json", &json)?;
        files::sync_dir(&self.dir)?;
        // The work took its time: what stands there by now?
        refuse_existing(&self.out, self.overwrite)?;
        unfinished::undisturbed(|| into_place(&self.out))?;
        files::remove(&self.out.join(JOURNAL))?;
        clear(&self.out)?;
        Ok(self.out)
    }

    fn take_along(&self, source: &Checkpoint) -> Result<(), SaveError> {
        for (name, bytes) in along::files(source, self.kept.as_deref())? {
            self.write(&name, &bytes)?;
        }
        if source.kind() == Kind::Gguf { Ok(()) } else { along::copy_named_templates(source.dir(), &self.dir) }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        files::write(&self.dir.join(name), bytes)
    }
}

pub(crate) fn beside(out: &Path, what: &str) -> Result<PathBuf, SaveError> {
    match out.file_name().and_then(|n| n.to_str()) {
        Some(_) => Ok(unfinished::beside(out, what)),
        None => Err(SaveError::Refused(format!("{} names no directory to write", out.display()))),
    }
}

/// The folder in which a model for `out` waits to be gone on with after its run was interrupted. One in which no matrix
/// is complete is taken away.
pub fn left_behind(out: &Path) -> Option<PathBuf> {
    let dir = partial(out).ok()?;
    // Its first line is the run's identity; each one more is a matrix.
    let begun = fs::read_to_string(dir.join(JOURNAL)).is_ok_and(|lines| lines.lines().count() > 1);
    if !begun {
        let _ = fs::remove_dir_all(&dir);
    }
    begun.then_some(dir)
}

fn partial(out: &Path) -> Result<PathBuf, SaveError> {
    beside(out, "partial")
}

/// Holds a journal for as long as it is open, or says that another run does.
fn lock(journal: &File, out: &Path) -> Result<(), SaveError> {
    match journal.try_lock() {
        Err(TryLockError::WouldBlock) => {
            Err(SaveError::Refused(format!("{}: another run is writing there; wait for it or end it", out.display())))
        }
        // Some network file systems have no locks; a run alone is still safe there.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
    }
}

/// Takes away what earlier runs left beside `out`: unfinished work, and an old model that stepped aside for the one
/// that is there.
pub(crate) fn clear(out: &Path) -> Result<(), SaveError> {
    let (dir, old) = (partial(out)?, beside(out, "old")?);
    if dir.exists() {
        let path = dir.join(JOURNAL);
        if path.is_file() {
            let journal = File::options().append(true).open(&path).map_err(io_at(&path))?;
            lock(&journal, out)?;
            // It goes first: without it nobody takes what is left of the rest for unfinished work.
            files::remove(&path)?;
        }
        files::remove_dir(&dir)?;
    }
    if old.exists() && out.exists() {
        files::remove_dir(&old)?;
    }
    Ok(())
}

/// Brings an old model back that stepped aside for one that never came.
pub(crate) fn bring_back(out: &Path) -> Result<(), SaveError> {
    let old = beside(out, "old")?;
    if old.is_dir() && !out.exists() { files::rename(&old, out) } else { Ok(()) }
}

/// Gives the directory that was written the name `out`. An old one lies beside it afterwards, until [`clear`].
pub(crate) fn into_place(out: &Path) -> Result<(), SaveError> {
    let (new, old) = (partial(out)?, beside(out, "old")?);
    let parent = match out.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    if out.exists() {
        // Of a run that was killed when all but this was done.
        let journal = out.join(JOURNAL);
        if journal.exists() {
            files::remove(&journal)?;
        }
        if files::exchange(&new, out)? {
            return files::sync_dir(parent);
        }
        if old.exists() {
            files::remove_dir(&old)?;
        }
        files::rename(out, &old)?;
        files::sync_dir(parent)?;
    }
    files::rename(&new, out)?;
    files::sync_dir(parent)
}

/// Refuses to put a packed model where something stands that is none, or, unless asked to `overwrite`, where one does.
pub fn refuse_existing(out: &Path, overwrite: bool) -> Result<(), SaveError> {
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

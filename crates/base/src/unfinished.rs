//! Outputs that are not whole yet, and what becomes of them when the work fails or the program is told to stop.
//!
//! A file or folder is written under a temporary name and gets its own once it is whole. [`Temporary`] takes it away
//! where that never happens; whoever hears a signal calls [`end`], which does the same for all that is under way. Both
//! hold one lock while they rename or take away, so what stands under its own name is whole, whenever the signal comes.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

type Act = Box<dyn FnOnce() -> Option<String> + Send>;

/// What is to be done when the program is told to stop, each with a number of its own.
static ACTS: Mutex<(u64, Vec<(u64, Act)>)> = Mutex::new((0, Vec::new()));

fn acts() -> MutexGuard<'static, (u64, Vec<(u64, Act)>)> {
    ACTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something to be done when the program is told to stop, forgotten when this is dropped.
#[derive(Debug)]
#[must_use]
pub struct OnEnd(u64);

/// Has `act` done when the program is told to stop while the returned value lives. What it returns is said to the user.
pub fn on_end(act: impl FnOnce() -> Option<String> + Send + 'static) -> OnEnd {
    let mut acts = acts();
    acts.0 += 1;
    let number = acts.0;
    acts.1.push((number, Box::new(act)));
    OnEnd(number)
}

impl Drop for OnEnd {
    fn drop(&mut self) {
        acts().1.retain(|a| a.0 != self.0);
    }
}

/// Does everything asked for by [`on_end`], the latest first, and hands what is to be said to `then`, which should end
/// the program: until it returns, nobody begins, renames or gives up an output.
pub fn end<T>(then: impl FnOnce(Vec<String>) -> T) -> T {
    let mut acts = acts();
    let said = acts.1.drain(..).rev().filter_map(|(_, act)| act()).collect();
    then(said)
}

/// Does `f` whole: the end of the program waits for it.
pub fn undisturbed<T>(f: impl FnOnce() -> T) -> T {
    let _lock = acts();
    f()
}

/// A file or folder under a temporary name: taken away when it is dropped, and when the program is told to stop.
#[derive(Debug)]
pub struct Temporary {
    path: PathBuf,
    whole: bool,
    _end: OnEnd,
}

impl Temporary {
    /// What will be, or is, at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Temporary {
        let path = path.into();
        let mine = path.clone();
        let end =
            on_end(move || remove(&mine).then(|| format!("{} was not finished and is taken away", mine.display())));
        Temporary { path, whole: false, _end: end }
    }

    /// Its temporary name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it the name `to`, in the place of what stands there.
    pub fn put(mut self, to: &Path) -> io::Result<()> {
        replace(&self.path, to)?;
        self.whole = true;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.whole {
            remove(&self.path);
        }
    }
}

/// Takes a file or folder away and says whether there was one. Another thread may still be writing into the folder: it
/// is given a few tries.
fn remove(path: &Path) -> bool {
    let Ok(meta) = fs::symlink_metadata(path) else { return false };
    for _ in 0..5 {
        let done = if meta.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        if done.is_ok() {
            break;
        }
    }
    true
}

/// Renames a file or folder to `to`, in the place of what stands there: a folder that cannot be put there leaves the
/// one that was. A file never takes a folder's place: whoever named a folder by mistake keeps what is in it.
pub fn replace(from: &Path, to: &Path) -> io::Result<()> {
    if to.is_dir() && !from.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "a directory stands there, where a file is to go"));
    }
    let old = beside(to, "old");
    {
        let _lock = acts();
        if !to.is_dir() {
            return fs::rename(from, to);
        }
        remove(&old);
        fs::rename(to, &old)?;
        if let Err(e) = fs::rename(from, to) {
            fs::rename(&old, to)?;
            return Err(e);
        }
    }
    drop(Temporary::new(old));
    Ok(())
}

/// `.NAME.WHAT` in the folder of `path`.
pub fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{what}"))
}

/// Writes a small file so that whoever reads it finds all of it or what was there before.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = Temporary::new(beside(path, &format!("{}.partial", std::process::id())));
    let mut file = File::create(new.path())?;
    file.write_all(bytes)?;
    file.sync_all()?;
    new.put(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, since there is one list for the whole program.
    #[test]
    fn what_is_not_whole_goes() {
        let dir = std::env::temp_dir().join(format!("lacuna-unfinished-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let names = || {
            let mut names: Vec<String> =
                fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        // A file does not take a folder's place.
        fs::create_dir(dir.join("kept")).unwrap();
        fs::write(dir.join("kept/a"), "precious").unwrap();
        let refused = write(&dir.join("kept"), b"x").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::IsADirectory);
        assert_eq!(fs::read_to_string(dir.join("kept/a")).unwrap(), "precious");
        assert_eq!(names(), ["kept"]);
        fs::remove_dir_all(dir.join("kept")).unwrap();
        // Given up, put, and put over another.
        let out = dir.join("out");
        let folder = |text: &str| {
            let new = Temporary::new(beside(&out, "partial"));
            fs::create_dir(new.path()).unwrap();
            fs::write(new.path().join("a"), text).unwrap();
            new
        };
        drop(folder("0"));
        assert!(names().is_empty());
        folder("1").put(&out).unwrap();
        folder("2").put(&out).unwrap();
        assert_eq!((fs::read_to_string(out.join("a")).unwrap().as_str(), names()), ("2", vec!["out".to_owned()]));
        // What cannot be put leaves the one that was.
        assert!(Temporary::new(dir.join("nothing")).put(&out).is_err());
        assert_eq!((fs::read_to_string(out.join("a")).unwrap().as_str(), names()), ("2", vec!["out".to_owned()]));
        // A small file, and one that cannot be written.
        let small = dir.join("small");
        write(&small, b"1").unwrap();
        write(&small, b"22").unwrap();
        assert_eq!(fs::read(&small).unwrap(), b"22");
        assert!(write(&dir.join("no/where"), b"1").is_err());
        assert_eq!(names(), ["out", "small"]);
        // The end: what is under way goes, what was whole or given up before stays as it is, and nothing is begun
        // meanwhile.
        let (new, kept) = (folder("3"), on_end(|| Some("kept".to_owned())));
        drop(on_end(|| Some("forgotten".to_owned())));
        let beginning = end(|said| {
            assert_eq!(
                said,
                ["kept".to_owned(), format!("{} was not finished and is taken away", new.path().display())]
            );
            assert_eq!(names(), ["out", "small"]);
            let other = std::thread::spawn(|| drop(on_end(|| None)));
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert!(!other.is_finished());
            other
        });
        beginning.join().unwrap();
        drop((new, kept));
        fs::remove_dir_all(&dir).unwrap();
    }
}

//! Changes of the file system by which a packed model is written and comes to its place. All go through here, so that a
//! test can stop a run at each; without the feature `faults`, which tests alone ask for, nothing stands between a call
//! and the system.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use crate::SaveError;
use crate::writer::io_at;

/// Stops the present thread's changes of files, for tests.
#[cfg(feature = "faults")]
pub mod faults {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
        static EXCHANGES: Cell<bool> = const { Cell::new(true) };
    }

    /// Leaves the `n`-th change from now half done and lets none happen after it, as a kill would; `None`: all happen.
    pub fn stop_at(n: Option<u64>) {
        LEFT.set(n);
    }

    /// Whether a change was stopped.
    pub fn stopped() -> bool {
        LEFT.get() == Some(0)
    }

    /// Whether this is a file system on which two directories can exchange their names.
    pub fn exchanges(yes: bool) {
        EXCHANGES.set(yes);
    }

    pub(super) fn can_exchange() -> bool {
        EXCHANGES.get()
    }

    pub(super) fn pass(half: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        match LEFT.get() {
            None => return Ok(()),
            Some(0) => {}
            Some(1) => {
                LEFT.set(Some(0));
                half()?;
            }
            Some(n) => {
                LEFT.set(Some(n - 1));
                return Ok(());
            }
        }
        Err(io::Error::other("stopped by a test"))
    }
}

/// One change, and what it comes to where the process dies in its midst.
fn change<T>(
    path: &Path,
    whole: impl FnOnce() -> io::Result<T>,
    half: impl FnOnce() -> io::Result<()>,
) -> Result<T, SaveError> {
    #[cfg(feature = "faults")]
    faults::pass(half).map_err(io_at(path))?;
    #[cfg(not(feature = "faults"))]
    drop(half);
    whole().map_err(io_at(path))
}

/// A change that happens or does not.
fn atomic<T>(path: &Path, whole: impl FnOnce() -> io::Result<T>) -> Result<T, SaveError> {
    change(path, whole, || Ok(()))
}

pub(crate) fn create(path: &Path) -> Result<File, SaveError> {
    atomic(path, || File::create(path))
}

pub(crate) fn create_dir(path: &Path) -> Result<(), SaveError> {
    atomic(path, || fs::create_dir_all(path))
}

/// Appends to an open file.
pub(crate) fn append(file: &File, path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    change(path, || { file }.write_all(bytes), || { file }.write_all(&bytes[..bytes.len() / 2]))
}

/// Appends the file at `from`, its first `skip` bytes left out, to an open one.
pub(crate) fn append_file(file: &File, path: &Path, from: &Path, skip: u64) -> Result<(), SaveError> {
    let mut source = File::open(from).map_err(io_at(from))?;
    source.seek(SeekFrom::Start(skip)).map_err(io_at(from))?;
    change(path, || io::copy(&mut source, &mut { file }).map(drop), || Ok(()))
}

pub(crate) fn cut(file: &File, path: &Path, bytes: u64) -> Result<(), SaveError> {
    atomic(path, || file.set_len(bytes))
}

/// Brings a file's bytes to the disk.
pub(crate) fn sync(file: &File, path: &Path) -> Result<(), SaveError> {
    atomic(path, || file.sync_all())
}

/// Brings the names in a directory to the disk.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), SaveError> {
    #[cfg(unix)]
    atomic(dir, || File::open(dir)?.sync_all())?;
    Ok(())
}

/// A whole new file, on the disk.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), SaveError> {
    let file = create(path)?;
    append(&file, path, bytes)?;
    sync(&file, path)
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), SaveError> {
    atomic(to, || fs::rename(from, to))
}

pub(crate) fn remove(path: &Path) -> Result<(), SaveError> {
    atomic(path, || fs::remove_file(path))
}

pub(crate) fn remove_dir(dir: &Path) -> Result<(), SaveError> {
    let some = || fs::read_dir(dir)?.step_by(2).try_for_each(|entry| fs::remove_file(entry?.path()));
    change(dir, || fs::remove_dir_all(dir), some)
}

/// Gives each of two directories the other's name, at once; false where the system cannot.
pub(crate) fn exchange(a: &Path, b: &Path) -> Result<bool, SaveError> {
    #[cfg(feature = "faults")]
    if !faults::can_exchange() {
        return Ok(false);
    }
    #[cfg(any(target_os = "linux", target_os = "macos"))]
    return atomic(b, || {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        // Not every file system knows it; whatever else is wrong, the plain renames that follow meet it too.
        Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).is_ok())
    });
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    Ok(false)
}

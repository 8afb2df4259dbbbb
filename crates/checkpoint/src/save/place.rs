//! Where a saved model goes: a temporary name beside its own until it is whole.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::SaveError;
use crate::files::sync_dir;
use crate::writer::{beside, io_at};

/// One file being written.
pub(crate) struct OutFile {
    out: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    bytes: u64,
}

impl OutFile {
    /// Begins a file at `out`. What stands there is refused unless `overwrite` is set and it begins with `magic`.
    pub fn create(out: &Path, overwrite: bool, magic: &[u8]) -> Result<OutFile, SaveError> {
        let show = out.display();
        if out.is_dir() {
            return Err(SaveError::Refused(format!("{show} is a directory; name a file")));
        }
        if out.exists() {
            if !overwrite {
                return Err(SaveError::Refused(format!("{show} exists; --overwrite replaces it")));
            }
            let mut first = vec![0; magic.len()];
            let read = File::open(out).and_then(|mut f| f.read_exact(&mut first));
            if read.is_err() || first != magic {
                return Err(SaveError::Refused(format!(
                    "{show} is no file of this format and will not be overwritten"
                )));
            }
        }
        let partial = beside(out, "partial")?;
        let file = BufWriter::with_capacity(1 << 20, File::create(&partial).map_err(io_at(&partial))?);
        Ok(OutFile { out: out.to_owned(), partial, file, bytes: 0 })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), SaveError> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(io_at(&self.partial))
    }

    /// Zeros up to the next multiple of `n`.
    pub fn pad(&mut self, n: u64) -> Result<(), SaveError> {
        let more = self.bytes.next_multiple_of(n) - self.bytes;
        self.write(&vec![0; more as usize])
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Brings the file to the disk and gives it its name.
    pub fn finish(self) -> Result<PathBuf, SaveError> {
        let file = self.file.into_inner().map_err(|e| io_at(&self.partial)(e.into_error()))?;
        file.sync_all().map_err(io_at(&self.partial))?;
        fs::rename(&self.partial, &self.out).map_err(io_at(&self.out))?;
        if let Some(parent) = self.out.parent().filter(|p| !p.as_os_str().is_empty()) {
            sync_dir(parent)?;
        }
        Ok(self.out)
    }

    /// Takes the unfinished file away.
    pub fn abandon(self) {
        drop(self.file);
        let _ = fs::remove_file(&self.partial);
    }
}

//! Where a saved model goes: a temporary name beside its own until it is whole.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use lacuna_base::unfinished::Temporary;

use crate::SaveError;
use crate::files::sync_dir;
use crate::writer::{beside, io_at};

/// One file being written; unless it is finished, nothing of it stays.
pub(crate) struct OutFile {
    out: PathBuf,
    file: BufWriter<File>,
    partial: Temporary,
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
        let partial = Temporary::new(beside(out, "partial")?);
        let file = File::create(partial.path()).map_err(io_at(partial.path()))?;
        Ok(OutFile { out: out.to_owned(), file: BufWriter::with_capacity(1 << 20, file), partial, bytes: 0 })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), SaveError> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(io_at(self.partial.path()))
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
        let OutFile { out, file, partial, .. } = self;
        let file = file.into_inner().map_err(|e| io_at(partial.path())(e.into_error()))?;
        file.sync_all().map_err(io_at(partial.path()))?;
        partial.put(&out).map_err(io_at(&out))?;
        if let Some(parent) = out.parent().filter(|p| !p.as_os_str().is_empty()) {
            sync_dir(parent)?;
        }
        Ok(out)
    }
}

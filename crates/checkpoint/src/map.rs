//! Files mapped into memory.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::Mmap;

use crate::tensor::TensorType;
use crate::{OpenError, gguf};

/// A whole file, mapped for reading.
///
/// Whoever cuts the file short while it is mapped ends the process (the system's SIGBUS); no reader of mapped files can
/// prevent that.
pub(crate) struct Mapped {
    pub path: PathBuf,
    map: Arc<Mmap>,
    bytes: Bytes,
    /// Of a big-endian GGUF file its metadata as a little-endian file without tensors.
    pub turned: Option<Bytes>,
}

struct Owner(Arc<Mmap>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Mapped {
    pub fn open(path: &Path) -> Result<Mapped, OpenError> {
        let io = |source| OpenError::Io { file: path.display().to_string(), source };
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(io(std::io::Error::other("not a file")));
        }
        // SAFETY: the map is read-only and only ever seen as bytes, for which any value is valid; the file is not
        // written by this process.
        let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(io)?);
        let bytes = Bytes::from_owner(Owner(map.clone()));
        Ok(Mapped { path: path.to_owned(), map, bytes, turned: None })
    }

    /// The file's bytes; slices of them keep the map alive.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The bytes of values of `dtype` at `range`, whole ones, in little-endian order.
    pub fn part(&self, dtype: TensorType, range: Range<usize>) -> Bytes {
        let bytes = self.bytes.slice(range);
        if self.turned.is_some() { gguf::little(dtype, &bytes) } else { bytes }
    }

    /// Lets the pages that lie wholly within `range` leave memory. They come back from the file when touched again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            // SAFETY: sysconf only reads a constant of the system.
            let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(4096);
            let (from, to) = (range.start.next_multiple_of(page), range.end.min(self.map.len()) / page * page);
            if from < to {
                // SAFETY: the map is read-only and backed by a file, so dropped pages are read again, never lost.
                let advice =
                    unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from) };
                if let Err(e) = advice {
                    tracing::debug!("madvise on {}: {e}", self.path.display());
                }
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

//! Tensors set aside on disk while a walk or a search goes on: an unnamed file, gone with the process.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use lacuna_format::{Bytes, Descriptor, Elem, FormatError, Stored};

/// An append-only store of packed tensors, found again by the number that [`Scratch::put`] gave.
pub(crate) struct Scratch {
    file: File,
    end: u64,
    kept: Vec<Kept>,
}

struct Kept {
    at: u64,
    desc: Descriptor,
    parts: Vec<(String, Elem, Vec<usize>, u64)>,
}

impl Scratch {
    /// Empty, in `dir`.
    pub(crate) fn new(dir: &Path) -> io::Result<Scratch> {
        Ok(Scratch { file: tempfile::tempfile_in(dir)?, end: 0, kept: Vec::new() })
    }

    /// Bytes on disk.
    pub(crate) fn bytes(&self) -> u64 {
        self.end
    }

    /// Keeps a tensor.
    pub(crate) fn put(&mut self, stored: &Stored) -> io::Result<usize> {
        let (desc, parts) = stored.to_parts();
        let at = self.end;
        self.file.seek(SeekFrom::Start(at))?;
        for p in &parts {
            self.file.write_all(&p.bytes)?;
            self.end += p.bytes.len() as u64;
        }
        let parts = parts.into_iter().map(|p| (p.suffix, p.elem, p.shape, p.bytes.len() as u64)).collect();
        self.kept.push(Kept { at, desc, parts });
        Ok(self.kept.len() - 1)
    }

    /// Reads a tensor.
    pub(crate) fn get(&mut self, number: usize) -> io::Result<Stored> {
        let kept = self.kept.get(number).ok_or_else(|| io::Error::other(format!("nothing is kept as {number}")))?;
        self.file.seek(SeekFrom::Start(kept.at))?;
        let mut buffers = Vec::with_capacity(kept.parts.len());
        for (suffix, elem, shape, bytes) in &kept.parts {
            let mut buf = vec![0; *bytes as usize];
            self.file.read_exact(&mut buf)?;
            buffers.push((suffix, *elem, shape, Bytes::from(buf)));
        }
        let get = |name: &str| {
            let (_, elem, shape, bytes) = buffers.iter().find(|b| b.0 == name)?;
            Some((*elem, (*shape).clone(), bytes.clone()))
        };
        Stored::from_parts(&kept.desc, get).map_err(|e: FormatError| io::Error::other(e.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_format::{Float, Unpacked};

    #[test]
    fn what_is_put_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut scratch = Scratch::new(dir.path()).unwrap();
        let all: Vec<Stored> =
            (1..5).map(|i| Unpacked::dense(random(i, 3 * i, i as u64)).pack(Float::F32).unwrap()).collect();
        let numbers: Vec<usize> = all.iter().map(|s| scratch.put(s).unwrap()).collect();
        for i in [2, 0, 3, 1, 2] {
            assert_eq!(scratch.get(numbers[i]).unwrap(), all[i]);
        }
        assert!(scratch.get(9).is_err());
        assert_eq!(scratch.bytes(), all.iter().map(Stored::bytes).sum::<u64>());
    }
}

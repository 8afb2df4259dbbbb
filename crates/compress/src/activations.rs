//! Activations of the calibration sequences between two blocks: in memory, or in a scratch file where a ceiling asks for it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use lacuna_base::Mat;

/// `[tokens, hidden]` of each sequence.
pub struct Activations {
    hidden: usize,
    lens: Vec<usize>,
    store: Store,
}

enum Store {
    Memory(Vec<Option<Mat>>),
    Scratch(File),
}

impl Activations {
    /// Room for sequences of `lens` tokens. With `scratch`, in an unnamed file in that directory.
    pub fn new(lens: Vec<usize>, hidden: usize, scratch: Option<&Path>) -> io::Result<Activations> {
        let store = match scratch {
            None => Store::Memory(lens.iter().map(|_| None).collect()),
            Some(dir) => Store::Scratch(tempfile::tempfile_in(dir)?),
        };
        Ok(Activations { hidden, lens, store })
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.lens.len()
    }

    /// Bytes that sequences of `lens` tokens take.
    pub fn bytes(lens: &[usize], hidden: usize) -> u64 {
        lens.iter().map(|n| *n as u64).sum::<u64>() * hidden as u64 * 4
    }

    fn offset(&self, i: usize) -> u64 {
        Activations::bytes(&self.lens[..i], self.hidden)
    }

    /// Takes sequence `i` out, to be put back changed or unchanged.
    pub fn take(&mut self, i: usize) -> io::Result<Mat> {
        let (offset, rows) = (self.offset(i), self.lens[i]);
        match &mut self.store {
            Store::Memory(all) => {
                all[i].take().ok_or_else(|| io::Error::other(format!("activations of sequence {i} are out")))
            }
            Store::Scratch(f) => {
                let mut m = Mat::zeros(rows, self.hidden);
                f.seek(SeekFrom::Start(offset))?;
                f.read_exact(bytemuck::cast_slice_mut(m.data_mut()))?;
                Ok(m)
            }
        }
    }

    /// Puts sequence `i` back.
    pub fn put(&mut self, i: usize, m: Mat) -> io::Result<()> {
        let offset = self.offset(i);
        match &mut self.store {
            Store::Memory(all) => all[i] = Some(m),
            Store::Scratch(f) => {
                f.seek(SeekFrom::Start(offset))?;
                f.write_all(bytemuck::cast_slice(m.data()))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    #[test]
    fn memory_and_scratch_agree() {
        let dir = tempfile::tempdir().unwrap();
        let lens = vec![3, 1, 5];
        for scratch in [None, Some(dir.path())] {
            let mut a = Activations::new(lens.clone(), 4, scratch).unwrap();
            for (i, n) in lens.iter().enumerate() {
                a.put(i, random(*n, 4, i as u64)).unwrap();
            }
            for i in [2, 0, 1] {
                let m = a.take(i).unwrap();
                assert_eq!(m, random(lens[i], 4, i as u64));
                a.put(i, m).unwrap();
            }
        }
        assert_eq!(Activations::bytes(&lens, 4), 144);
    }
}

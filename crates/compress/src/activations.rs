//! Activations of the calibration sequences between two blocks: in memory, or in a scratch file where a ceiling asks
//! for it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use lacuna_base::Mat;
use lacuna_model::ModelError;
use lacuna_model::derive::BlockInputs;

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

/// The residual stream before every block, for the way back of gradients: as many [`Activations`] as blocks, and one.
pub struct SpilledInputs(Vec<Activations>);

impl SpilledInputs {
    /// Room for sequences of `lens` tokens in a model of `layers` blocks. With `scratch`, in unnamed files in that
    /// directory.
    pub fn new(layers: usize, lens: &[usize], hidden: usize, scratch: Option<&Path>) -> io::Result<SpilledInputs> {
        let one = |_| Activations::new(lens.to_vec(), hidden, scratch);
        Ok(SpilledInputs((0..=layers).map(one).collect::<io::Result<_>>()?))
    }

    /// Bytes that they take, in memory or on the disk.
    pub fn bytes(layers: usize, lens: &[usize], hidden: usize) -> u64 {
        (layers as u64 + 1) * Activations::bytes(lens, hidden)
    }

    fn slot(&mut self, slot: usize, sequence: usize) -> Result<&mut Activations, ModelError> {
        let slots = self.0.len();
        let found = self.0.get_mut(slot).filter(|a| sequence < a.len());
        found.ok_or_else(|| ModelError::Store { what: format!("sequence {sequence} in slot {slot} of {slots}") })
    }
}

impl BlockInputs for SpilledInputs {
    fn take(&mut self, slot: usize, sequence: usize) -> Result<Mat, ModelError> {
        self.slot(slot, sequence)?.take(sequence).map_err(|e| ModelError::Store { what: e.to_string() })
    }

    fn put(&mut self, slot: usize, sequence: usize, x: Mat) -> Result<(), ModelError> {
        let found = self.slot(slot, sequence)?;
        if (x.rows(), x.cols()) != (found.lens[sequence], found.hidden) {
            let what = format!("{} x {} rows of sequence {sequence}, another shape", x.rows(), x.cols());
            return Err(ModelError::Store { what });
        }
        found.put(sequence, x).map_err(|e| ModelError::Store { what: e.to_string() })
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
    #[test]
    fn slots_are_apart_and_refuse_what_does_not_fit() {
        let dir = tempfile::tempdir().unwrap();
        for scratch in [None, Some(dir.path())] {
            let mut a = SpilledInputs::new(2, &[3, 1], 4, scratch).unwrap();
            for (slot, sequence, n) in [(0, 0, 3), (2, 0, 3), (2, 1, 1)] {
                a.put(slot, sequence, random(n, 4, slot as u64)).unwrap();
            }
            assert_eq!(a.take(0, 0).unwrap(), random(3, 4, 0));
            assert_eq!(a.take(2, 0).unwrap(), random(3, 4, 2));
            assert!(a.put(3, 0, random(3, 4, 0)).is_err() && a.take(0, 2).is_err());
            assert!(a.put(0, 0, random(3, 5, 0)).is_err() && a.put(0, 1, random(3, 4, 0)).is_err());
        }
        assert_eq!(SpilledInputs::bytes(2, &[3, 1], 4), 192);
    }
}

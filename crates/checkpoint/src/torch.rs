//! PyTorch's own files (`torch.save`, since 1.6), as far as they hold named tensors: a zip file whose members lie as
//! they are, one for the bytes of each storage and a Python pickle that says which tensor is which part of which.
//!
//! A pickle is a program. This one is never run: [`pickle`] knows the few instructions and names that a dictionary of
//! tensors is made of, and refuses all others by name.

mod pickle;
mod zip;

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use lacuna_format::{Elem, Float};

use crate::tensor::{TensorInfo, TensorType};

/// Longest pickle read, bytes: far more than the names of any model's tensors.
const MAX_PICKLE: usize = 16 << 20;

/// Classes of storages, what their values are, and bytes a value.
const STORAGES: [(&str, TensorType, usize); 10] = [
    ("FloatStorage", TensorType::Float(Float::F32), 4),
    ("HalfStorage", TensorType::Float(Float::F16), 2),
    ("BFloat16Storage", TensorType::Float(Float::Bf16), 2),
    ("ByteStorage", TensorType::Uint(Elem::U8), 1),
    ("DoubleStorage", TensorType::Other("F64"), 8),
    ("LongStorage", TensorType::Other("I64"), 8),
    ("IntStorage", TensorType::Other("I32"), 4),
    ("ShortStorage", TensorType::Other("I16"), 2),
    ("CharStorage", TensorType::Other("I8"), 1),
    ("BoolStorage", TensorType::Other("BOOL"), 1),
];

/// A part of a storage with axes.
#[derive(Debug, Clone)]
struct View<'a> {
    /// The storage's member of the zip file.
    key: &'a str,
    /// Its class, an index into [`STORAGES`].
    class: usize,
    /// Values in the storage.
    length: usize,
    /// Values before the first.
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl View<'_> {
    /// Where its values lie in a storage of `length` bytes.
    fn range(&self, length: usize) -> Result<Range<usize>, String> {
        let (_, dtype, size) = STORAGES[self.class];
        let dtype = dtype.name();
        if self.length.checked_mul(size) != Some(length) {
            return Err(format!("{} values of {dtype} in a storage of {length} bytes", self.length));
        }
        let mut next = Some(1usize);
        for (n, stride) in self.shape.iter().zip(&self.strides).rev() {
            if *n > 1 && next != Some(*stride) {
                let (shape, strides) = (&self.shape, &self.strides);
                return Err(format!("shape {shape:?} with strides {strides:?}: only what lies in one piece is read"));
            }
            next = next.and_then(|x| x.checked_mul(*n));
        }
        let end = next.and_then(|n| self.offset.checked_add(n)).filter(|end| *end <= self.length);
        match end {
            Some(end) => Ok(self.offset * size..end * size),
            None => Err(format!("shape {:?} from value {} of {}", self.shape, self.offset, self.length)),
        }
    }
}

struct Members<'a> {
    file: &'a [u8],
    by_name: HashMap<String, zip::Member>,
    /// Where members begin and end whose checksums hold.
    sound: HashSet<(usize, usize)>,
    /// Bytes read for checksums: no more than the file has, whatever its members claim.
    read: usize,
}

impl Members<'_> {
    /// Where a member's bytes lie, once its checksum has been held against them.
    fn get(&mut self, name: &str) -> Result<Range<usize>, String> {
        let Some(member) = self.by_name.get(name) else { return Err(format!("{name} is missing in the zip file")) };
        let range = member.range.clone();
        if self.sound.insert((range.start, range.end)) {
            self.read = self.read.saturating_add(range.len());
            if self.read > self.file.len() {
                return Err(format!("{name} and members before it share bytes"));
            }
            if zip::checksum(&self.file[range.clone()]) != member.checksum {
                return Err(format!("the checksum of {name} does not hold: the file is damaged"));
            }
        }
        Ok(range)
    }
}

/// Parses a whole file's bytes (mapped, usually). Every tensor is a run of the file's bytes; checksums hold. The error
/// is a sentence without the file's name.
pub fn parse(file: &[u8]) -> Result<Vec<TensorInfo>, String> {
    if !file.starts_with(b"PK") {
        return Err(
            "no zip file: what torch.save wrote before PyTorch 1.6 is not read; load it there and save it once more, \
                    best as safetensors"
                .into(),
        );
    }
    let mut members = Members { file, by_name: zip::members(file)?, sound: HashSet::new(), read: 0 };
    let mut roots = members.by_name.keys().filter_map(|n| n.strip_suffix("/data.pkl"));
    let (Some(root), None) = (roots.next().map(str::to_owned), roots.next()) else {
        return Err("not just one data.pkl lies in the zip file: torch.save did not write it".into());
    };
    let order = format!("{root}/byteorder");
    if members.by_name.contains_key(&order) && members.get(&order).map(|r| &file[r] != b"little")? {
        return Err("the bytes of its numbers do not lie little end first".into());
    }
    let range = members.get(&format!("{root}/data.pkl"))?;
    if range.len() > MAX_PICKLE {
        return Err(format!("data.pkl has {} bytes; at most {MAX_PICKLE} are read", range.len()));
    }
    let mut tensors = Vec::new();
    for (name, view) in pickle::tensors(&file[range]).map_err(|e| format!("data.pkl: {e}"))? {
        let storage = members.get(&format!("{root}/data/{}", view.key)).map_err(|e| format!("tensor {name}: {e}"))?;
        let within = view.range(storage.len()).map_err(|e| format!("tensor {name}: {e}"))?;
        let bytes = storage.start + within.start..storage.start + within.end;
        tensors.push(TensorInfo { name: name.into(), shape: view.shape, dtype: STORAGES[view.class].1, bytes });
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden() -> Vec<u8> {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/foreign/peft_bin");
        std::fs::read(dir.join("adapter_model.bin")).unwrap()
    }

    #[test]
    fn what_torch_saved() {
        let file = golden();
        let tensors = parse(&file).unwrap();
        assert_eq!(tensors.len(), 4);
        let up = tensors.iter().find(|t| t.name.ends_with("up_proj.lora_B.weight")).unwrap();
        assert_eq!(
            (up.shape.as_slice(), up.dtype, up.bytes.len()),
            (&[64, 4][..], TensorType::Float(Float::F32), 1024)
        );
        // Values of 0.2 times a normal distribution, in the place where they should be.
        let values = file[up.bytes.clone()].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        assert!(values.clone().all(|v| v.abs() < 1.0) && values.filter(|v| v.abs() > 0.05).count() > 128);
    }

    #[test]
    fn cut_short_or_with_any_bit_turned() {
        let file = golden();
        let good = parse(&file).unwrap();
        for n in 0..file.len() {
            assert!(parse(&file[..n]).is_err(), "{n} bytes");
        }
        // Dates and the like are nobody's business; whatever else is turned, no tensor may move or change unseen.
        let mut refused = 0;
        for bit in (0..file.len()).map(|byte| 8 * byte + byte % 8) {
            let mut turned = file.clone();
            turned[bit / 8] ^= 1 << (bit % 8);
            match parse(&turned) {
                Ok(t) => {
                    assert_eq!(t, good, "bit {bit}");
                    let same = |t: &TensorInfo| turned[t.bytes.clone()] == file[t.bytes.clone()];
                    assert!(t.iter().all(same), "bit {bit}");
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > file.len() / 2, "{refused}");
    }

    /// A file with a pickle and one storage of four floats.
    fn zipped(pickle: &[u8], members: &[(&str, &[u8])]) -> Vec<u8> {
        zip::tests::zipped(&[&[("a/data.pkl", pickle), ("a/data/0", &[0; 16][..])], members].concat())
    }

    /// `{"w": a tensor}` with the numbers of its storage and its axes.
    fn tensor(length: u8, offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
        let tuple = |n: &[u8]| [b"(".to_vec(), n.iter().flat_map(|x| [b'K', *x]).collect(), b"t".to_vec()].concat();
        let text = |s: &str| [b"X".to_vec(), (s.len() as u32).to_le_bytes().to_vec(), s.into()].concat();
        let storage =
            [b"(".to_vec(), text("storage"), b"ctorch\nFloatStorage\n".to_vec(), text("0"), text("cpu")].concat();
        [
            b"\x80\x02}(".to_vec(),
            text("w"),
            b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
            [storage, vec![b'K', length], b"tQ".to_vec(), vec![b'K', offset], tuple(shape), tuple(strides)].concat(),
            b"\x89ccollections\nOrderedDict\n)RtRu.".to_vec(),
        ]
        .concat()
    }

    #[test]
    fn a_pickle_that_is_too_long() {
        let e = parse(&zipped(&vec![b'N'; MAX_PICKLE + 1], &[])).unwrap_err();
        assert!(e.contains("data.pkl has 16777217 bytes; at most 16777216"), "{e}");
    }

    #[test]
    fn views_that_lie() {
        let read =
            |length, offset, shape: &[u8], strides: &[u8]| parse(&zipped(&tensor(length, offset, shape, strides), &[]));
        assert_eq!(read(4, 1, &[1, 3], &[9, 1]).unwrap()[0].bytes.len(), 12);
        for (have, words) in [
            (read(4, 0, &[2, 2], &[1, 2]), "strides [1, 2]"),
            (read(4, 2, &[3], &[1]), "from value 2 of 4"),
            (read(5, 0, &[4], &[1]), "5 values of F32 in a storage of 16 bytes"),
            (read(4, 0, &[255, 255], &[255, 1]), "[255, 255]"),
            (parse(&zipped(&tensor(4, 0, &[4], &[1]), &[("a/byteorder", b"big")])), "little"),
            (parse(b"\x80\x02}."), "PyTorch 1.6"),
        ] {
            let e = have.unwrap_err();
            assert!(e.contains(words), "{words}: {e}");
        }
    }
}

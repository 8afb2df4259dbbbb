//! GGUF v2 and v3: metadata and the table of tensors, parsed from untrusted bytes.
//!
//! Every count is checked against the bytes that are left before anything is allocated, so a small file can never ask
//! for a lot of memory. A big-endian file is read as its little-endian twin: numbers are turned as they are met, data
//! when they are asked for.

mod grid;
mod order;
mod parts;

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;
use lacuna_format::{Float, GgufType};

pub use grid::GridType;
pub(crate) use grid::{FP4, GridMatrix, powers_of_two, shifted};
pub(crate) use order::little;
pub(crate) use parts::{Part, first_of, siblings};

use crate::tensor::{TensorInfo, TensorType};

/// A file that is not GGUF as the format's description has it, or a metadata value of another type than asked for.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct GgufError {
    /// What is wrong, with names and numbers.
    pub what: String,
}

fn fail<T>(what: impl Into<String>) -> Result<T, GgufError> {
    Err(GgufError { what: what.into() })
}

/// A metadata value. Integers and floats of all widths are widened, which loses nothing.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    Uint(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    Uints(Vec<u64>),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Strs(Vec<String>),
    Arrays(Vec<Value>),
}

impl Value {
    /// The value's kind in words, for errors.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::Uint(_) | Value::Int(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Bool(_) => "a bool",
            Value::Str(_) => "a string",
            Value::Uints(_) | Value::Ints(_) => "an array of integers",
            Value::Floats(_) => "an array of floats",
            Value::Bools(_) => "an array of bools",
            Value::Strs(_) => "an array of strings",
            Value::Arrays(_) => "an array of arrays",
        }
    }
}

/// The key-value pairs of a GGUF file, in its order.
///
/// Each getter answers `Ok(None)` where the key is absent and an error that names the key where its value has another
/// type.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
}

#[derive(Debug, Clone)]
struct Entry {
    key: String,
    value: Value,
    /// Where the whole pair lies in the file, for copying it unchanged.
    bytes: Range<usize>,
}

impl Metadata {
    /// The value at `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.index.get(key).map(|&i| &self.entries[i].value)
    }

    /// Every key with the bytes of its whole pair in `file`, which these metadata were read from, in its order.
    pub(crate) fn raw<'a>(&'a self, file: &'a [u8]) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.entries.iter().map(|e| (e.key.as_str(), &file[e.bytes.clone()]))
    }

    /// All pairs, in the file's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|e| (e.key.as_str(), &e.value))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        want: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(v) = self.get(key) else { return Ok(None) };
        match read(v) {
            Some(t) => Ok(Some(t)),
            None => fail(format!("metadata {key} is {}, not {want}", v.kind())),
        }
    }

    /// A string.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |v| if let Value::Str(s) = v { Some(s.as_str()) } else { None })
    }

    /// An integer that is not negative.
    pub fn get_u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a non-negative integer", |v| match v {
            Value::Uint(n) => Some(*n),
            Value::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        })
    }

    /// An integer within 32 bits that is not negative.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "an integer of 0 to 2^32 - 1", |v| match v {
            Value::Uint(n) => u32::try_from(*n).ok(),
            Value::Int(n) => u32::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A float; integers are taken, too.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a number", |v| match v {
            Value::Float(x) => Some(*x as f32),
            Value::Uint(n) => Some(*n as f32),
            Value::Int(n) => Some(*n as f32),
            _ => None,
        })
    }

    /// A bool.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a bool", |v| if let Value::Bool(b) = v { Some(*b) } else { None })
    }

    /// An array of strings.
    pub fn get_strs(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |v| if let Value::Strs(s) = v { Some(s.as_slice()) } else { None })
    }

    /// An array of floats.
    pub fn get_f32s(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.typed(key, "an array of floats", |v| match v {
            Value::Floats(x) => Some(x.iter().map(|&x| x as f32).collect()),
            _ => None,
        })
    }

    /// An array of integers within 64 signed bits.
    pub fn get_ints(&self, key: &str) -> Result<Option<Vec<i64>>, GgufError> {
        self.typed(key, "an array of integers", |v| match v {
            Value::Ints(x) => Some(x.clone()),
            Value::Uints(x) => x.iter().map(|&n| i64::try_from(n).ok()).collect(),
            _ => None,
        })
    }
}

/// A parsed GGUF header.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// 2 or 3.
    pub version: u32,
    /// The key-value pairs.
    pub metadata: Metadata,
    /// The tensors, in the file's order.
    pub tensors: Vec<TensorInfo>,
    /// Of a big-endian file the header with its numbers turned: everything lies where it lies in the file.
    pub turned: Option<Bytes>,
}

impl Gguf {
    /// The header in little-endian order, of the `file` that was parsed.
    fn header<'a>(&'a self, file: &'a [u8]) -> &'a [u8] {
        self.turned.as_deref().unwrap_or(file)
    }
}

/// (id, name, values a block, bytes a block) of every tensor type that `ggml.h` knows and has not withdrawn.
const TYPES: &[(u32, &str, usize, usize)] = &[
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

/// The number of a tensor type by its name.
pub(crate) fn type_id(name: &str) -> Option<u32> {
    TYPES.iter().find(|t| t.1 == name).map(|t| t.0)
}

/// A line of the table of tensors.
pub(crate) fn put_info(header: &mut Vec<u8>, name: &str, shape: &[usize], id: u32, offset: u64) {
    header.extend((name.len() as u64).to_le_bytes());
    header.extend(name.as_bytes());
    header.extend((shape.len() as u32).to_le_bytes());
    shape.iter().rev().for_each(|d| header.extend((*d as u64).to_le_bytes()));
    header.extend(id.to_le_bytes());
    header.extend(offset.to_le_bytes());
}

fn tensor_type(name: &'static str) -> TensorType {
    match name {
        "F32" => return TensorType::Float(Float::F32),
        "F16" => return TensorType::Float(Float::F16),
        "BF16" => return TensorType::Float(Float::Bf16),
        _ => {}
    }
    let block = lacuna_format::gguf::ALL.into_iter().find(|t: &GgufType| format!("{t:?}") == name);
    let grid = || grid::ALL.into_iter().find(|t| format!("{t:?}") == name);
    block.map(TensorType::Block).or_else(|| grid().map(TensorType::Grid)).unwrap_or(TensorType::Other(name))
}

/// Longest accepted key or tensor name; the format itself says 65535 and 64.
const MAX_NAME: usize = 65535;

/// Parses a whole file's bytes (mapped, usually): only the header is read.
pub fn parse(file: &[u8]) -> Result<Gguf, GgufError> {
    let mut r = Reader { file, at: 0, turned: None };
    let magic = r.take(4, "the magic number")?;
    // Older writers keep the magic number in big-endian files and turn what follows it, newer ones turn it, too.
    if magic != b"GGUF" && magic != b"FUGG" {
        return fail("no GGUF file: it does not begin with 'GGUF'");
    }
    if magic == b"FUGG" || file.get(4..8).is_some_and(|v| v[0] == 0 && v[1] == 0 && v[3] != 0) {
        r.turned = Some(b"GGUF".to_vec());
    }
    let big = r.turned.is_some();
    let version = r.u32("the version")?;
    if version != 2 && version != 3 {
        return fail(format!("GGUF version {version}; 2 and 3 are read"));
    }
    let tensor_count = r.u64("the tensor count")?;
    let pair_count = r.u64("the metadata count")?;
    // The least a pair takes: an empty key, a type and one byte; the least a tensor takes: an empty name, no axis, type
    // and offset.
    r.afford(pair_count, 8 + 4 + 1, "metadata pairs")?;
    r.afford(tensor_count, 8 + 4 + 4 + 8, "tensors")?;

    let mut metadata = Metadata::default();
    for i in 0..pair_count {
        let start = r.at;
        let key = r.string(MAX_NAME, &format!("key {i}"))?;
        let kind = r.u32(&key)?;
        let value = r.value(kind, &key, 0)?;
        if metadata.index.insert(key.clone(), metadata.entries.len()).is_some() {
            return fail(format!("metadata {key} stands twice"));
        }
        metadata.entries.push(Entry { key, value, bytes: start..r.at });
    }
    let alignment = metadata.get_u32("general.alignment")?.unwrap_or(32) as usize;
    if !alignment.is_power_of_two() {
        return fail(format!("general.alignment is {alignment}; it must be a power of two"));
    }

    let mut raw = Vec::new();
    let mut names = HashMap::new();
    for i in 0..tensor_count {
        let name = r.string(MAX_NAME, &format!("the name of tensor {i}"))?;
        let n_dims = r.u32(&name)?;
        if n_dims > 4 {
            return fail(format!("tensor {name} has {n_dims} axes; at most 4 are possible"));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let d = r.u64(&name)?;
            shape.push(usize::try_from(d).or_else(|_| fail(format!("tensor {name} has an axis of {d}")))?);
        }
        shape.reverse();
        let id = r.u32(&name)?;
        let Some(&(_, type_name, block, block_bytes)) = TYPES.iter().find(|t| t.0 == id) else {
            return fail(format!("tensor {name} has the unknown type {id}"));
        };
        if big && !order::known(type_name) {
            return fail(format!(
                "tensor {name} is {type_name} in a big-endian file; of such, {} are read",
                order::KNOWN.join(", ")
            ));
        }
        let offset = r.u64(&name)?;
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(block) {
            return fail(format!(
                "tensor {name}: rows of {row} values do not divide into {type_name} blocks of {block}"
            ));
        }
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let Some(size) = count.and_then(|n| (n / block).checked_mul(block_bytes)) else {
            return fail(format!("tensor {name}: the shape {shape:?} is larger than any file"));
        };
        if !offset.is_multiple_of(alignment as u64) {
            return fail(format!("tensor {name} begins at {offset}, which is no multiple of {alignment}"));
        }
        if names.insert(name.clone(), i).is_some() {
            return fail(format!("tensor {name} stands twice"));
        }
        raw.push((name, shape, tensor_type(type_name), offset, size));
    }

    let data = r.at.next_multiple_of(alignment);
    let mut tensors = Vec::with_capacity(raw.len());
    for (name, shape, dtype, offset, size) in raw {
        let start = usize::try_from(offset).ok().and_then(|o| o.checked_add(data));
        match start.and_then(|s| Some(s..s.checked_add(size)?)) {
            Some(bytes) if bytes.end <= file.len() => tensors.push(TensorInfo { name, shape, dtype, bytes }),
            _ => {
                return fail(format!(
                    "tensor {name} needs {size} bytes at {data} + {offset}, but the file has {}; is it cut short?",
                    file.len()
                ));
            }
        }
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().filter(|t| !t.bytes.is_empty()).collect();
    order.sort_by_key(|t| t.bytes.start);
    for pair in order.windows(2) {
        if pair[0].bytes.end > pair[1].bytes.start {
            return fail(format!("tensors {} and {} overlap", pair[0].name, pair[1].name));
        }
    }
    Ok(Gguf { version, metadata, tensors, turned: r.turned.map(Bytes::from) })
}

/// A GGUF file without tensors that holds the pairs of `file` (whose parsed header is `of`) that `keep` names, byte for
/// byte.
pub fn metadata_only(file: &[u8], of: &Gguf, keep: impl Fn(&str) -> bool) -> Vec<u8> {
    let file = of.header(file);
    let kept: Vec<&Entry> = of.metadata.entries.iter().filter(|e| keep(&e.key)).collect();
    let mut out = b"GGUF".to_vec();
    out.extend(of.version.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend((kept.len() as u64).to_le_bytes());
    for e in kept {
        out.extend(&file[e.bytes.clone()]);
    }
    out
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
    /// Of a big-endian file what has been read so far, its numbers turned.
    turned: Option<Vec<u8>>,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, n: usize, of: &str) -> Result<&'a [u8], GgufError> {
        if n > self.left() {
            return fail(format!(
                "the file ends within {of}: {n} bytes wanted at {}, {} left; is it cut short?",
                self.at,
                self.left()
            ));
        }
        self.at += n;
        let taken = &self.file[self.at - n..self.at];
        if let Some(turned) = &mut self.turned {
            turned.extend_from_slice(taken);
        }
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, of: &str) -> Result<[u8; N], GgufError> {
        let mut a = [0; N];
        a.copy_from_slice(self.take(N, of)?);
        if let Some(turned) = &mut self.turned {
            a.reverse();
            let from = turned.len() - N;
            turned[from..].copy_from_slice(&a);
        }
        Ok(a)
    }

    fn u32(&mut self, of: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(of)?))
    }

    fn u64(&mut self, of: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(of)?))
    }

    /// Refuses `n` things of at least `each` bytes that the rest of the file cannot hold.
    fn afford(&self, n: u64, each: usize, of: &str) -> Result<usize, GgufError> {
        match usize::try_from(n) {
            Ok(n) if n.checked_mul(each).is_some_and(|b| b <= self.left()) => Ok(n),
            _ => fail(format!(
                "{n} {of} are announced at byte {}, but only {} bytes are left; is the file cut short?",
                self.at,
                self.left()
            )),
        }
    }

    fn string(&mut self, longest: usize, of: &str) -> Result<String, GgufError> {
        let n = self.u64(of)?;
        let n = self.afford(n, 1, &format!("bytes of {of}"))?;
        if n > longest {
            return fail(format!("{of} is {n} bytes long; at most {longest} are accepted"));
        }
        let bytes = self.take(n, of)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_owned()),
            Err(e) => fail(format!("{of}, at byte {}, is no UTF-8: {e}", self.at - n)),
        }
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value, GgufError> {
        Ok(match kind {
            0 => Value::Uint(self.array::<1>(key)?[0].into()),
            1 => Value::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Uint(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Uint(self.u32(key)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::Str(self.string(usize::MAX, key)?),
            9 => self.list(key, depth)?,
            10 => Value::Uint(self.u64(key)?),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            _ => return fail(format!("metadata {key} has the unknown type {kind}")),
        })
    }

    fn bool(&mut self, key: &str) -> Result<bool, GgufError> {
        match self.array::<1>(key)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            b => fail(format!("metadata {key} is a bool of value {b}")),
        }
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<Value, GgufError> {
        let kind = self.u32(key)?;
        let n = self.u64(key)?;
        let n = self.afford(
            n,
            match kind {
                0 | 1 | 7 => 1,
                2 | 3 => 2,
                4..=6 => 4,
                9 => 12,
                _ => 8,
            },
            &format!("values of {key}"),
        )?;
        Ok(match kind {
            0 => Value::Uints(self.many::<1, _>(n, key, |b| b[0].into())?),
            1 => Value::Ints(self.many(n, key, |b| i8::from_le_bytes(b).into())?),
            2 => Value::Uints(self.many(n, key, |b| u16::from_le_bytes(b).into())?),
            3 => Value::Ints(self.many(n, key, |b| i16::from_le_bytes(b).into())?),
            4 => Value::Uints(self.many(n, key, |b| u32::from_le_bytes(b).into())?),
            5 => Value::Ints(self.many(n, key, |b| i32::from_le_bytes(b).into())?),
            6 => Value::Floats(self.many(n, key, |b| f32::from_le_bytes(b).into())?),
            7 => Value::Bools((0..n).map(|_| self.bool(key)).collect::<Result<_, _>>()?),
            8 => Value::Strs((0..n).map(|_| self.string(usize::MAX, key)).collect::<Result<_, _>>()?),
            // Nested arrays are legal and nobody writes them; the depth is bounded so that a hostile file cannot
            // exhaust the stack.
            9 if depth < 4 => Value::Arrays((0..n).map(|_| self.list(key, depth + 1)).collect::<Result<_, _>>()?),
            9 => return fail(format!("metadata {key} nests arrays more than 4 deep")),
            10 => Value::Uints(self.many(n, key, u64::from_le_bytes)?),
            11 => Value::Ints(self.many(n, key, i64::from_le_bytes)?),
            12 => Value::Floats(self.many(n, key, f64::from_le_bytes)?),
            _ => return fail(format!("metadata {key} is an array of the unknown type {kind}")),
        })
    }

    fn many<const N: usize, T>(
        &mut self,
        n: usize,
        key: &str,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let numbers = self.take(n * N, key)?.as_chunks::<N>().0;
        let Some(turned) = &mut self.turned else { return Ok(numbers.iter().map(|&b| read(b)).collect()) };
        let from = turned.len() - n * N;
        let numbers = turned[from..].as_chunks_mut::<N>().0;
        numbers.iter_mut().for_each(|b| b.reverse());
        Ok(numbers.iter().map(|&b| read(b)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(s: &str) -> Vec<u8> {
        [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
    }

    fn header(tensors: u64, pairs: u64) -> Vec<u8> {
        [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &pairs.to_le_bytes()].concat()
    }

    /// One pair of every type and two tensors.
    fn sample() -> Vec<u8> {
        let mut f = header(2, 5);
        f.extend([string("a"), 4u32.to_le_bytes().to_vec(), 7u32.to_le_bytes().to_vec()].concat());
        f.extend([string("s"), 8u32.to_le_bytes().to_vec(), string("text")].concat());
        f.extend([string("f"), 6u32.to_le_bytes().to_vec(), 0.5f32.to_le_bytes().to_vec()].concat());
        f.extend([string("b"), 7u32.to_le_bytes().to_vec(), vec![1]].concat());
        f.extend([string("l"), 9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().to_vec()].concat());
        f.extend([2u64.to_le_bytes().to_vec(), string("x"), string("y")].concat());
        for (name, dims, kind, offset) in [("t", &[32u64, 2][..], 8u32, 0u64), ("v", &[3], 0, 96)] {
            f.extend(string(name));
            f.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| f.extend(d.to_le_bytes()));
            f.extend(kind.to_le_bytes());
            f.extend(offset.to_le_bytes());
        }
        f.resize(f.len().next_multiple_of(32) + 96 + 12, 1);
        f
    }

    #[test]
    fn reads_what_was_written() {
        let f = sample();
        let g = parse(&f).unwrap();
        let m = &g.metadata;
        assert_eq!(m.get_u32("a"), Ok(Some(7)));
        assert_eq!(m.get_str("s"), Ok(Some("text")));
        assert_eq!(m.get_f32("f"), Ok(Some(0.5)));
        assert_eq!(m.get_bool("b"), Ok(Some(true)));
        assert_eq!(m.get_strs("l").unwrap().unwrap(), ["x", "y"]);
        assert_eq!(m.get_u32("none"), Ok(None));
        assert_eq!(m.get_u32("s").unwrap_err().what, "metadata s is a string, not an integer of 0 to 2^32 - 1");
        assert_eq!(g.tensors[0].shape, [2, 32]);
        assert_eq!(g.tensors[0].bytes.len(), 68);
        assert_eq!(g.tensors[1].bytes.end, f.len());
        let only = metadata_only(&f, &g, |k| k == "l" || k == "a");
        let back = parse(&only).unwrap();
        assert_eq!(back.metadata.iter().map(|e| e.0).collect::<Vec<_>>(), ["a", "l"]);
        assert_eq!(back.metadata.get("l"), m.get("l"));
    }

    #[test]
    fn every_truncation_and_any_flipped_byte_is_survived() {
        let f = sample();
        for n in 0..f.len() {
            assert!(parse(&f[..n]).is_err(), "{n} of {} bytes", f.len());
        }
        for i in 0..f.len() - 108 {
            for x in [0x01, 0x80, 0xff] {
                let mut g = f.clone();
                g[i] ^= x;
                let _ = parse(&g);
            }
        }
    }

    #[test]
    fn hostile_headers_are_refused_in_words() {
        let refuse = |f: &[u8], words: &str| {
            let e = parse(f).unwrap_err().what;
            assert!(e.contains(words), "{e}");
        };
        refuse(b"GGML", "does not begin");
        refuse(&header(u64::MAX, 0), "announced");
        refuse(&header(0, u64::MAX / 13), "announced");
        let long = [header(0, 1), u64::MAX.to_le_bytes().to_vec(), vec![0; 64]].concat();
        refuse(&long, "announced");
        let pair = [string("k"), 4u32.to_le_bytes().to_vec(), 1u32.to_le_bytes().to_vec()].concat();
        refuse(&[header(0, 2), pair.clone(), pair].concat(), "stands twice");
        let tensor = |dims: &[u64], kind: u32, offset: u64| {
            let mut f = [header(1, 0), string("t"), (dims.len() as u32).to_le_bytes().to_vec()].concat();
            dims.iter().for_each(|d| f.extend(d.to_le_bytes()));
            f.extend(kind.to_le_bytes());
            f.extend(offset.to_le_bytes());
            f.resize(256, 0);
            f
        };
        refuse(&tensor(&[1 << 40, 1 << 40], 0, 0), "larger than any file");
        refuse(&tensor(&[33], 8, 0), "do not divide");
        refuse(&tensor(&[4], 99, 0), "unknown type 99");
        refuse(&tensor(&[4], 0, 1), "no multiple of 32");
        refuse(&tensor(&[4], 0, u64::MAX - 31), "cut short");
        refuse(&tensor(&[1; 5], 0, 0), "5 axes");
        let deep = (0..8).fold(header(0, 1), |mut f, i| {
            if i == 0 {
                f.extend([string("d"), 9u32.to_le_bytes().to_vec()].concat());
            }
            f.extend([9u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec()].concat());
            f
        });
        refuse(&[deep, vec![0; 64]].concat(), "nests arrays");
        let utf8 = [header(0, 1), string("s"), 8u32.to_le_bytes().to_vec(), 1u64.to_le_bytes().to_vec(), vec![0xff; 9]];
        refuse(&utf8.concat(), "no UTF-8");
    }
}

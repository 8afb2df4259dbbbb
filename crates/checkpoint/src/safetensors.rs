//! The header of a safetensors file and the index of a sharded checkpoint, parsed from untrusted bytes.
//!
//! Types and their sizes are those of the `safetensors` crate. The header is read here all the same: the crate lets a
//! name stand twice, adds untrusted offsets unchecked, and its errors name neither tensor nor number.

use std::fmt;
use std::marker::PhantomData;

use lacuna_format::{Elem, Float};
use safetensors::tensor::{Dtype, TensorInfo as Entry};
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use crate::tensor::{TensorInfo, TensorType};

/// Longest header accepted, bytes: the format's own limit.
pub(crate) const MAX_HEADER: usize = 100_000_000;

/// A JSON object in its own order, in which no key stands twice.
pub(crate) struct Unique<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Pairs<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Pairs<V> {
            type Value = Unique<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut pairs = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if !seen.insert(key.clone()) {
                        return Err(de::Error::custom(format!("'{key}' stands twice")));
                    }
                    pairs.push((key, value));
                }
                Ok(Unique(pairs))
            }
        }
        d.deserialize_map(Pairs(PhantomData))
    }
}

/// An entry of the header: a tensor, or the free text beside them.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Item {
    Tensor(Entry),
    Text {},
}

/// Parses a whole file's bytes (mapped, usually): only the header is read. The error is a sentence without the file's
/// name.
pub fn parse(file: &[u8]) -> Result<Vec<TensorInfo>, String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("{} bytes are no safetensors file", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER as u64 {
        return Err(format!("the header claims {length} bytes; at most {MAX_HEADER} are accepted"));
    }
    let length = length as usize;
    let Some((header, data)) = rest.split_at_checked(length) else {
        return Err(format!("the header claims {length} bytes, the file has {}; is it cut short?", rest.len()));
    };
    let Unique(items) = serde_json::from_slice::<Unique<Item>>(header).map_err(|e| format!("header: {e}"))?;
    let mut tensors = Vec::new();
    for (name, item) in items {
        match item {
            Item::Tensor(entry) => tensors.push(tensor(name, entry, data.len(), 8 + length)?),
            Item::Text {} if name == "__metadata__" => {}
            Item::Text {} => return Err(format!("tensor {name} has no dtype, shape and data_offsets that make sense")),
        }
    }
    // The format knows no holes: sorted by offset, tensors follow each other from the first byte to the last.
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| (t.bytes.start, t.bytes.end));
    let mut at = 8 + length;
    for t in order {
        if t.bytes.start != at {
            let what = if t.bytes.start < at { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return Err(format!("tensor {} begins at {}, expected {at}: it {what}", t.name, t.bytes.start));
        }
        at = t.bytes.end;
    }
    if at != file.len() {
        return Err(format!("{} bytes follow the last tensor", file.len() - at));
    }
    Ok(tensors)
}

fn tensor(name: String, entry: Entry, data: usize, at: usize) -> Result<TensorInfo, String> {
    let (from, to) = entry.data_offsets;
    if from > to || to > data {
        return Err(format!("tensor {name} lies at {from}..{to} of {data} bytes; is the file cut short?"));
    }
    let bits = entry.shape.iter().try_fold(entry.dtype.bitsize(), |n, d| n.checked_mul(*d));
    if bits != (to - from).checked_mul(8) {
        let (dtype, shape) = (entry.dtype, entry.shape);
        return Err(format!("tensor {name}: {} bytes for {dtype:?} of shape {shape:?}", to - from));
    }
    let dtype = match entry.dtype {
        Dtype::F32 => TensorType::Float(Float::F32),
        Dtype::F16 => TensorType::Float(Float::F16),
        Dtype::BF16 => TensorType::Float(Float::Bf16),
        Dtype::F8_E4M3 => TensorType::Float(Float::F8E4m3),
        Dtype::F8_E5M2 => TensorType::Float(Float::F8E5m2),
        Dtype::U8 => TensorType::Uint(Elem::U8),
        Dtype::U16 => TensorType::Uint(Elem::U16),
        Dtype::U32 => TensorType::Uint(Elem::U32),
        Dtype::BOOL => TensorType::Other("BOOL"),
        Dtype::I8 => TensorType::Other("I8"),
        Dtype::I16 => TensorType::Other("I16"),
        Dtype::I32 => TensorType::Other("I32"),
        Dtype::I64 => TensorType::Other("I64"),
        Dtype::U64 => TensorType::Other("U64"),
        Dtype::F64 => TensorType::Other("F64"),
        Dtype::F8_E8M0 => TensorType::Other("F8_E8M0"),
        _ => TensorType::Other("an exotic type"),
    };
    Ok(TensorInfo { name, shape: entry.shape, dtype, bytes: at + from..at + to })
}

/// Parses `model.safetensors.index.json`: pairs of a tensor's name and the file that holds it, a plain name beside the
/// index.
pub fn parse_index(json: &[u8]) -> Result<Vec<(String, String)>, String> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: Unique<String>,
    }
    let index: Index = crate::json::parse(json)?;
    for (tensor, file) in &index.weight_map.0 {
        plain_name(file).map_err(|e| format!("tensor {tensor}: {e}"))?;
    }
    Ok(index.weight_map.0)
}

/// Refuses names of shards that could lead out of the checkpoint's own directory.
pub(crate) fn plain_name(file: &str) -> Result<(), String> {
    let plain = !file.contains(['/', '\\', ':', '\0']) && !file.starts_with('.') && file.ends_with(".safetensors");
    if plain { Ok(()) } else { Err(format!("'{file}' is no name of a safetensors file in the same directory")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
    }

    #[test]
    fn reads_and_refuses() {
        let good = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,2],"data_offsets":[4,20]},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}  "#;
        let f = file(good, 20);
        let t = parse(&f).unwrap();
        assert_eq!((t[0].name.as_str(), t[0].shape.as_slice(), t[0].bytes.len()), ("b", &[2, 2][..], 16));
        assert_eq!(t[1].dtype.name(), "BF16");
        for n in 0..f.len() {
            assert!(parse(&f[..n]).is_err(), "{n} bytes");
        }
        let refuse = |header: &str, data: usize, words: &str| {
            let e = parse(&file(header, data)).unwrap_err();
            assert!(e.contains(words), "{e}");
        };
        refuse(good, 21, "1 bytes follow");
        refuse(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
            4,
            "twice",
        );
        refuse(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#,
            6,
            "overlaps",
        );
        refuse(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[1,5]}}"#, 5, "hole");
        refuse(r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#, 4, "4 bytes for F32");
        refuse(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4, "4 bytes for F32");
        refuse(r#"{"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,4]}}"#, 4, "tensor a has no dtype");
        refuse(
            r#"{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#,
            4,
            "cut short",
        );
        refuse("[]", 0, "header");
        assert!(parse(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat()).unwrap_err().contains("at most"));
    }

    #[test]
    fn an_index_stays_in_its_directory() {
        let index = |file: &str| parse_index(format!(r#"{{"weight_map":{{"a":{file:?}}}}}"#).as_bytes());
        assert!(index("model-00001-of-00002.safetensors").is_ok());
        for bad in ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "model.safetensors.index.json", ""] {
            assert!(index(bad).unwrap_err().contains("tensor a"), "{bad}");
        }
        assert!(parse_index(br#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#).is_err());
    }
}

//! GGUF files, whole or in parts.

use std::path::Path;

use lacuna_arch::{self as arch, GgufHead};
use lacuna_format::Float;
use serde_json::Value;

use super::{Checkpoint, Kind, OpenError};
use crate::examine::Problem;
use crate::gguf;
use crate::map::Mapped;
use crate::tensor::TensorType;

pub(super) fn open_gguf(path: &Path, problems: Option<Vec<Problem>>) -> Result<Checkpoint, OpenError> {
    let files = open_parts(path)?;
    // Whichever part was given: the first holds the metadata.
    let path = files.first().map_or_else(|| path.to_owned(), |f| f.0.path.clone());
    open_parsed(&path, files, problems)
}

/// A GGUF file and its header; all of its parts where it is one of several.
fn open_parts(path: &Path) -> Result<Vec<(Mapped, gguf::Gguf)>, OpenError> {
    let one = |path: &Path| -> Result<(Mapped, gguf::Gguf), OpenError> {
        let bad = |e: gguf::GgufError| OpenError::bad(path, e.what);
        let mut map = Mapped::open(path)?;
        let mut parsed = gguf::parse(map.bytes()).map_err(bad)?;
        if parsed.turned.is_some() {
            let only = gguf::metadata_only(map.bytes(), &parsed, |_| true);
            parsed.metadata = gguf::parse(&only).map_err(bad)?.metadata;
            map.turned = Some(only.into());
        }
        Ok((map, parsed))
    };
    let bad = |e: gguf::GgufError| OpenError::bad(path, e.what);
    let given = one(path)?;
    let Some(part) = gguf::Part::of(&given.1.metadata).map_err(bad)? else { return Ok(vec![given]) };
    let paths = gguf::siblings(path, part).map_err(bad)?;
    if let Some(i) = paths.iter().position(|p| !p.is_file()) {
        let (name, count) = (paths[i].file_name().unwrap_or_default().to_string_lossy(), part.count);
        let what = format!("part {} of {count} of this model is missing: {name} should lie beside it", i + 1);
        return Err(OpenError::bad(path, what));
    }
    let mut files = Vec::with_capacity(paths.len());
    for (i, path) in paths.iter().enumerate() {
        let file = one(path)?;
        file.1.must_be(i, part).map_err(|e| OpenError::bad(path, e.what))?;
        files.push(file);
    }
    let tensors: usize = files.iter().map(|f| f.1.tensors.len()).sum();
    if tensors as u64 != part.tensors {
        let what = format!("{tensors} tensors in {} parts, but split.tensors.count is {}", part.count, part.tensors);
        return Err(OpenError::bad(path, what));
    }
    Ok(files)
}

/// Opens a GGUF file whose headers, of all parts, have been read; the metadata are the first part's.
pub(crate) fn open_parsed(
    path: &Path,
    files: Vec<(Mapped, gguf::Gguf)>,
    problems: Option<Vec<Problem>>,
) -> Result<Checkpoint, OpenError> {
    let head = gguf_head(&files);
    let file = path.display().to_string();
    let spec = arch::from_gguf(&head).map_err(|source| OpenError::Spec { file, source })?;
    let mut c = Checkpoint::new(path, Kind::Gguf, spec);
    for (i, (map, parsed)) in files.into_iter().enumerate() {
        c.files.push(map);
        c.tensors.extend(parsed.tensors.into_iter().map(|t| (i, t)));
        c.metadata.get_or_insert(parsed.metadata);
    }
    c.problems = problems;
    c.locate(arch::gguf_sources)?;
    c.left_out()?;
    Ok(c)
}

fn gguf_head(files: &[(Mapped, gguf::Gguf)]) -> GgufHead {
    let mut head = GgufHead::default();
    let keys = files.iter().take(1).flat_map(|f| f.1.metadata.iter());
    for (key, value) in keys.filter(|(k, _)| !k.starts_with("tokenizer.") && !k.starts_with("split.")) {
        head.keys.insert(key.to_owned(), json_of(value));
    }
    for (file, t) in files.iter().flat_map(|(m, p)| p.tensors.iter().map(move |t| (m, t))) {
        if t.name == "token_embd.weight" && t.shape.len() == 2 {
            head.vocab = t.shape[0];
        }
        if t.name.starts_with("rope_f") && t.dtype == TensorType::Float(Float::F32) {
            let values =
                file.part(t.dtype, t.bytes.clone()).as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            head.rope_lists.insert(t.name.clone(), values);
        }
        head.tensors.insert(t.name.clone());
    }
    head
}

fn json_of(v: &gguf::Value) -> Value {
    match v {
        gguf::Value::Uint(x) => (*x).into(),
        gguf::Value::Int(x) => (*x).into(),
        gguf::Value::Float(x) => (*x).into(),
        gguf::Value::Bool(x) => (*x).into(),
        gguf::Value::Str(x) => x.as_str().into(),
        gguf::Value::Uints(x) => x.clone().into(),
        gguf::Value::Ints(x) => x.clone().into(),
        gguf::Value::Floats(x) => x.clone().into(),
        gguf::Value::Bools(x) => x.clone().into(),
        gguf::Value::Strs(x) => x.clone().into(),
        gguf::Value::Arrays(x) => x.iter().map(json_of).collect(),
    }
}

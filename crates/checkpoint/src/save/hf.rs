//! The Hugging Face layout: config.json, dense safetensors, the tokenizer's files.

use std::path::Path;

use lacuna_arch::{self as arch, Target};
use lacuna_format::{Float, Pattern, Stored, Values, Weights};
use lacuna_spec::{Place, Role};
use serde_json::{Map, Value, json};

use super::arrange::{Arranged, Encoding};
use super::dir::{Entry, OutDir, SHARD_BYTES};
use super::{Progress, Saved, Written};
use crate::along::{SIDE_FILES, copy_named_templates};
use crate::writer::io_at;
use crate::{Checkpoint, Kind, SaveError, Tokenizer, TokenizerError};

/// Writes a dense model into the directory `out`. `float`: its type; absent: that of the source's embedding where it is
/// one, else f16.
pub fn save_hf(
    source: &Checkpoint,
    out: &Path,
    float: Option<Float>,
    overwrite: bool,
    progress: Progress<'_>,
) -> Result<Saved, SaveError> {
    let dir = OutDir::create(out, overwrite)?;
    let (path, mut saved) = dir.write_with(|dir| dense(dir, source, source, float, SHARD_BYTES, progress))?;
    saved.path = path;
    Ok(saved)
}

/// The type that a dense model of this source has unless another is asked for.
pub(crate) fn natural(weights: &dyn Weights) -> Result<Float, SaveError> {
    let embed = weights.get(&Place::global(Role::Embed))?;
    Ok(match embed.as_deref().and_then(Stored::single) {
        Some(p) if p.pattern == Pattern::Dense => match p.values {
            Values::Float(f @ (Float::F32 | Float::Bf16), _) => f,
            _ => Float::F16,
        },
        _ => Float::F16,
    })
}

/// The types' names in safetensors and in config.json.
pub(crate) fn names(float: Float) -> (&'static str, &'static str) {
    match float {
        Float::F32 => ("F32", "float32"),
        Float::Bf16 => ("BF16", "bfloat16"),
        _ => ("F16", "float16"),
    }
}

/// Writes `weights` densely into `dir`, with the files of `source`.
pub(crate) fn dense(
    dir: &OutDir,
    source: &Checkpoint,
    weights: &dyn Weights,
    float: Option<Float>,
    shard_bytes: u64,
    progress: Progress<'_>,
) -> Result<Saved, SaveError> {
    let (arranged, mut notes) = Arranged::new(weights, arch::hf_spec)?;
    let float = float.map_or_else(|| natural(weights), Ok)?;
    let config = config(&arranged, source, float)?;
    let targets = arch::hf_targets(&arranged.spec).map_err(|e| SaveError::Refused(e.what))?;
    let entries: Vec<Entry> = targets.iter().map(|t| entry(t, float)).collect();
    let mut tensors = Vec::new();
    let bytes = dir.safetensors("model", &entries, shard_bytes, &mut |i, sink| {
        let from = arranged.codec(&targets[i])?;
        let loss = arranged.write(&targets[i], Encoding::Float(float), sink)?;
        tensors.push(Written {
            name: targets[i].name.clone(),
            from,
            to: names(float).0.into(),
            instead_of: None,
            loss,
        });
        progress(i + 1, targets.len());
        Ok(())
    })?;
    dir.json("config.json", &Value::Object(config))?;
    side_files(dir, source, arranged.spec.context, &mut notes)?;
    Ok(Saved { path: Default::default(), bytes, tensors, notes })
}

/// A dense tensor's entry.
pub(crate) fn entry(target: &Target, float: Float) -> Entry {
    let n: usize = target.shape.iter().product();
    let bytes = (n * float.bytes()) as u64;
    Entry { name: target.name.clone(), dtype: names(float).0, shape: target.shape.clone(), bytes }
}

/// config.json for the network as it will be, with what else the source's says that any reader needs.
pub(crate) fn config(
    arranged: &Arranged<'_>,
    source: &Checkpoint,
    float: Float,
) -> Result<Map<String, Value>, SaveError> {
    let config = arch::to_config(&arranged.spec).map_err(|e| SaveError::Refused(e.what))?;
    let Value::Object(mut config) = config else { return Err(SaveError::Refused("config.json is no object".into())) };
    // Where a family's arithmetic hangs on this name (Gemma's embedding factor), it was set already.
    config.entry("dtype").or_insert(json!(names(float).1));
    let dtype = config["dtype"].clone();
    config.insert("torch_dtype".into(), dtype);
    let ids = ["bos_token_id", "eos_token_id", "pad_token_id"];
    let own = match source.kind() {
        Kind::HuggingFace => crate::json::read(&source.dir().join("config.json"))?,
        _ => {
            let t = Tokenizer::open(source).ok();
            let id = |f: fn(&Tokenizer) -> Option<u32>| t.as_ref().and_then(f);
            let padding = source.metadata().and_then(|m| m.get_u32("tokenizer.ggml.padding_token_id").ok().flatten());
            // A null says that there is none; without the key some classes take a number of their own, beyond a small
            // vocabulary.
            json!({"bos_token_id": id(Tokenizer::bos), "eos_token_id": id(Tokenizer::eos), "pad_token_id": padding})
        }
    };
    for key in ids {
        if let Some(id) = own.get(key) {
            config.insert(key.into(), id.clone());
        }
    }
    Ok(config)
}

/// The tokenizer's files and the settings of generation: copied, or made from GGUF metadata.
pub(crate) fn side_files(
    dir: &OutDir,
    source: &Checkpoint,
    context: usize,
    notes: &mut Vec<String>,
) -> Result<(), SaveError> {
    if source.metadata().is_some() {
        match crate::tokenizer::hf_files(source, context) {
            Ok(files) => files.iter().try_for_each(|(name, bytes)| dir.file(name, bytes))?,
            Err(TokenizerError::Missing(what)) => notes.push(format!("no tokenizer goes along: {what}")),
            Err(e) => return Err(SaveError::Refused(format!("no tokenizer.json can be made: {e}"))),
        }
        return Ok(());
    }
    for name in SIDE_FILES {
        let path = source.dir().join(name);
        if path.is_file() {
            dir.file(name, &std::fs::read(&path).map_err(io_at(&path))?)?;
        }
    }
    copy_named_templates(source.dir(), &dir.path(""))
}

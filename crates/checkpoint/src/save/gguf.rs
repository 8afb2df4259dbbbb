//! GGUF version 3, as llama.cpp reads it.
//!
//! Which tensor gets which type follows llama.cpp's own choices. Vectors (norms, biases), routers and tables of
//! positions stay f32. With a quantized type, the matrix that makes the logits (`output.weight`, or the embedding where
//! it serves as the head) gets Q6_K, or Q8_0 where that was asked for; `q4_k` is the mixture called Q4_K_M: Q6_K for
//! `attn_v` and `ffn_down` in the first and last eighth of the layers and every third between. Rows that a block does
//! not divide fall back: Q4_K to Q5_0, Q6_K to Q8_0, blocks of 32 to f16.

use std::path::Path;

use lacuna_arch::{self as arch, Target};
use lacuna_format::{Float, GgufType, Pattern, Stored, Values};
use lacuna_spec::{Place, Role, Spec};

use super::arrange::{Arranged, Encoding};
use super::gguf_pairs::Pairs;
use super::{Loss, OutFile, Progress, Saved, Written};
use crate::tokenizer::{Export, general_name};
use crate::{Checkpoint, Kind, SaveError, TensorInfo, TensorType, Vocabulary, gguf};

/// Where data begin: every tensor at a multiple of this.
const ALIGNMENT: u64 = 32;

/// What the matrices become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(non_camel_case_types, missing_docs)]
pub enum GgufKind {
    /// As they are stored, where GGUF has a form for it; f16 where not.
    Source,
    F32,
    F16,
    Q8_0,
    Q4_0,
    Q4_K,
    Q6_K,
}

impl GgufKind {
    fn block(self) -> Option<GgufType> {
        match self {
            GgufKind::Source | GgufKind::F32 | GgufKind::F16 => None,
            GgufKind::Q8_0 => Some(GgufType::Q8_0),
            GgufKind::Q4_0 => Some(GgufType::Q4_0),
            GgufKind::Q4_K => Some(GgufType::Q4_K),
            GgufKind::Q6_K => Some(GgufType::Q6_K),
        }
    }

    /// `general.file_type`.
    fn file_type(self) -> Option<u32> {
        match self {
            GgufKind::Source => None,
            GgufKind::F32 => Some(0),
            GgufKind::F16 => Some(1),
            GgufKind::Q4_0 => Some(2),
            GgufKind::Q8_0 => Some(7),
            GgufKind::Q4_K => Some(15),
            GgufKind::Q6_K => Some(18),
        }
    }
}

/// Writes a GGUF file at `out`. Metadata of a GGUF source are kept; of others what the format has keys for.
pub fn save_gguf(
    source: &Checkpoint,
    out: &Path,
    kind: GgufKind,
    overwrite: bool,
    progress: Progress<'_>,
) -> Result<Saved, SaveError> {
    let refused = |e: lacuna_spec::SpecError| SaveError::Refused(e.what);
    let from_gguf = source.kind() == Kind::Gguf;
    let (arranged, mut notes) = match from_gguf {
        true => (Arranged::as_it_is(source), Vec::new()),
        false => Arranged::new(source, arch::gguf_spec)?,
    };
    let spec = &arranged.spec;
    let targets = arch::gguf_targets(spec).map_err(refused)?;
    let mut lists: Vec<(String, Vec<f32>)> = Vec::new();
    let mut pairs = match from_gguf {
        true => kept_pairs(source)?,
        false => {
            let keys = arch::to_gguf(spec).map_err(refused)?;
            notes.extend(keys.notes.iter().cloned());
            lists = keys.rope_lists.clone();
            made_pairs(source, spec, &keys.pairs, &mut notes)?
        }
    };
    if let Some(n) = kind.file_type().or_else(|| of_source(source)) {
        pairs.u32("general.file_type", n);
    }
    pairs.u32("general.quantization_version", 2);

    let (mut planned, mut blocks) = (Vec::new(), Vec::new());
    for target in targets {
        // What is read as codes into a table goes along as its blocks are.
        let same = |t: &&TensorInfo| matches!(t.dtype, TensorType::Grid(_)) && t.shape == target.shape;
        let whole = source.tensor(&target.name).filter(|_| from_gguf && kind == GgufKind::Source).filter(same);
        match whole {
            Some(t) => blocks.push(t.name.clone()),
            None => {
                let (form, wanted) = form_of(&arranged, &target, kind)?;
                planned.push((target, form, wanted));
            }
        }
    }
    // What describes RoPE is small, f32 and no weight; a GGUF source may carry more that no place of the network uses.
    let extra: Vec<String> = match from_gguf {
        true => {
            let used: std::collections::HashSet<&str> = planned.iter().map(|p| p.0.name.as_str()).collect();
            let factors = |name: &str| {
                let of = name.strip_suffix(".scale").map(|n| format!("{n}.weight"));
                of.is_some_and(|of| blocks.contains(&of))
            };
            let beside =
                |t: &&TensorInfo| t.name.starts_with("rope_f") && !used.contains(t.name.as_str()) || factors(&t.name);
            source.tensors().filter(beside).map(|t| t.name.clone()).chain(blocks.iter().cloned()).collect()
        }
        false => Vec::new(),
    };
    if from_gguf && !source.unused().is_empty() {
        let names: Vec<&str> = source.unused().iter().map(|t| t.name.as_str()).collect();
        notes.push(format!("tensors that no part of the network uses are left out: {}", names.join(", ")));
    }

    let mut header = b"GGUF".to_vec();
    header.extend(3u32.to_le_bytes());
    header.extend(((planned.len() + lists.len() + extra.len()) as u64).to_le_bytes());
    header.extend(pairs.count.to_le_bytes());
    header.append(&mut pairs.bytes);
    let mut offset = 0u64;
    let mut info = |header: &mut Vec<u8>, name: &str, shape: &[usize], kind: &str, bytes: usize| {
        let Some(id) = gguf::type_id(kind) else {
            return Err(SaveError::Refused(format!("tensor {name}: GGUF has no type {kind}")));
        };
        gguf::put_info(header, name, shape, id, offset);
        offset = (offset + bytes as u64).next_multiple_of(ALIGNMENT);
        Ok(())
    };
    for (name, list) in &lists {
        info(&mut header, name, &[list.len()], "F32", list.len() * 4)?;
    }
    for name in &extra {
        if let Some((t, bytes)) = source.raw(name) {
            info(&mut header, name, &t.shape, &t.dtype.name(), bytes.len())?;
        }
    }
    for (target, form, _) in &planned {
        let n: usize = target.shape.iter().product();
        info(&mut header, &target.name, &target.shape, &form.name(), form.bytes(n))?;
    }

    let mut file = OutFile::create(out, overwrite, b"GGUF")?;
    file.write(&header)?;
    file.pad(ALIGNMENT)?;
    for (_, list) in &lists {
        file.write(&list.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        file.pad(ALIGNMENT)?;
    }
    for name in &extra {
        if let Some((_, bytes)) = source.raw(name) {
            file.write(&bytes)?;
            file.pad(ALIGNMENT)?;
        }
    }
    let mut tensors = Vec::with_capacity(planned.len() + blocks.len());
    for name in &blocks {
        let Some(t) = source.tensor(name) else { continue };
        let loss = Loss { values: t.shape.iter().product::<usize>() as u64, ..Loss::default() };
        let kind = t.dtype.name();
        tensors.push(Written { name: name.clone(), from: kind.clone(), to: kind, instead_of: None, loss });
    }
    for (i, (target, form, wanted)) in planned.iter().enumerate() {
        let from = arranged.codec(target)?;
        let loss = arranged.write(target, *form, &mut |bytes| file.write(bytes))?;
        file.pad(ALIGNMENT)?;
        let (to, instead_of) = (form.name(), wanted.map(|w| format!("{w:?}")));
        tensors.push(Written { name: target.name.clone(), from, to, instead_of, loss });
        progress(i + 1, planned.len());
    }
    let bytes = file.bytes();
    Ok(Saved { path: file.finish()?, bytes, tensors, notes })
}

/// The metadata of a GGUF source, without what this file says anew.
fn kept_pairs(source: &Checkpoint) -> Result<Pairs, SaveError> {
    let mut pairs = Pairs::default();
    if let (Some(file), Some(metadata)) = (source.gguf_file()?, source.metadata()) {
        let anew = ["general.alignment", "general.file_type", "general.quantization_version"];
        for (key, pair) in metadata.raw(&file) {
            if !anew.contains(&key) && !key.starts_with("split.") {
                pairs.raw(pair);
            }
        }
    }
    Ok(pairs)
}

/// `general.file_type` of a GGUF source whose forms stay.
fn of_source(source: &Checkpoint) -> Option<u32> {
    source.metadata().filter(|_| source.kind() == Kind::Gguf)?.get_u32("general.file_type").ok().flatten()
}

fn made_pairs(
    source: &Checkpoint,
    spec: &Spec,
    keys: &[(String, arch::GgufValue)],
    notes: &mut Vec<String>,
) -> Result<Pairs, SaveError> {
    let mut pairs = Pairs::default();
    let export = match source.metadata() {
        Some(_) => None,
        None => match Export::of_dir(source.dir(), spec.vocab) {
            Ok(mut export) => {
                notes.append(&mut export.notes);
                Some(export)
            }
            Err(crate::TokenizerError::Missing(what)) => {
                notes.push(format!("no tokenizer goes along: {what}"));
                None
            }
            Err(e) => return Err(SaveError::Refused(e.to_string())),
        },
    };
    let phi3 = match (&export, source.metadata()) {
        (Some(export), _) => export.vocabulary.phi3,
        (None, Some(metadata)) => Vocabulary::from_gguf(metadata).is_ok_and(|v| v.phi3),
        (None, None) => false,
    };
    let name = source.dir().canonicalize().ok().and_then(|d| Some(d.file_name()?.to_str()?.to_owned()));
    let (name, renamed) = general_name(name, phi3);
    notes.extend(renamed);
    let (first, rest) = keys.split_at(1.min(keys.len()));
    first.iter().for_each(|(k, v)| pairs.value(k, v));
    pairs.str("general.type", "model");
    name.iter().for_each(|n| pairs.str("general.name", n));
    rest.iter().for_each(|(k, v)| pairs.value(k, v));
    if let (Some(file), Some(metadata)) = (source.gguf_file()?, source.metadata()) {
        for (_, pair) in metadata.raw(&file).filter(|(k, _)| k.starts_with("tokenizer.")) {
            pairs.raw(pair);
        }
        return Ok(pairs);
    }
    match export {
        Some(export) => pairs.tokenizer(&export),
        None => pairs.str("tokenizer.ggml.model", "none"),
    }
    Ok(pairs)
}

/// The type of a tensor, and what was wanted where its rows do not allow it.
fn form_of(
    arranged: &Arranged<'_>,
    target: &Target,
    kind: GgufKind,
) -> Result<(Encoding, Option<GgufType>), SaveError> {
    let spec = &arranged.spec;
    let first = target.parts[0];
    let cols = target.shape.last().copied().unwrap_or(0);
    // What is no matrix stays so in any shape: llama.cpp's operations on such tensors know 32 bits alone.
    let matrix = (first.role.is_linear() && !first.role.is_router()) || first.role.is_lookup();
    let f32_always = target.shape.len() == 1 || !matrix;
    if f32_always || kind == GgufKind::F32 {
        return Ok((Encoding::Float(Float::F32), None));
    }
    let Some(block) = kind.block() else {
        let form = match kind {
            GgufKind::Source => as_stored(arranged, target)?,
            _ => None,
        };
        return Ok((form.unwrap_or(Encoding::Float(Float::F16)), None));
    };
    let head = first.role == Role::Head || (first.role == Role::Embed && spec.tied);
    let wanted = match block {
        GgufType::Q8_0 => GgufType::Q8_0,
        _ if head => GgufType::Q6_K,
        GgufType::Q4_K if finer(spec, &first) => GgufType::Q6_K,
        b => b,
    };
    let form = match wanted {
        b if cols.is_multiple_of(b.block()) => return Ok((Encoding::Block(b), None)),
        GgufType::Q4_K if cols.is_multiple_of(32) => Encoding::Block(GgufType::Q5_0),
        GgufType::Q6_K if cols.is_multiple_of(32) => Encoding::Block(GgufType::Q8_0),
        _ => Encoding::Float(Float::F16),
    };
    Ok((form, Some(wanted)))
}

/// The layers in which llama.cpp's Q4_K_M gives `attn_v` and `ffn_down` six bits.
fn finer(spec: &Spec, place: &Place) -> bool {
    let (Some(l), true) = (place.layer, matches!(place.role, Role::V | Role::Down)) else { return false };
    let (l, n) = (l as usize, spec.layers.len());
    l < n / 8 || l >= 7 * n / 8 || (l - n / 8) % 3 == 2
}

/// The form that holds every part of a tensor as its source does.
fn as_stored(arranged: &Arranged<'_>, target: &Target) -> Result<Option<Encoding>, SaveError> {
    let cols = target.shape.last().copied().unwrap_or(0);
    let mut common = None;
    for place in &target.parts {
        let form = arranged.stored(place)?.and_then(|s| native(&s, cols));
        if form.is_none() || common.is_some_and(|c| Some(c) != form) {
            return Ok(None);
        }
        common = form;
    }
    Ok(common)
}

fn native(stored: &Stored, cols: usize) -> Option<Encoding> {
    if let Some(piece) = stored.single()
        && piece.pattern == Pattern::Dense
    {
        match &piece.values {
            Values::Gguf(b, _) => return Some(Encoding::Block(*b)),
            Values::Float(f @ (Float::F32 | Float::F16 | Float::Bf16), _) => return Some(Encoding::Float(*f)),
            _ => {}
        }
    }
    let ints = stored.integers()?;
    let fits = |kind: &GgufType| cols.is_multiple_of(32) && ints.row_as_blocks(0, *kind).is_some();
    [GgufType::Q4_0, GgufType::Q5_0, GgufType::Q8_0].into_iter().find(fits).map(Encoding::Block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mixture_spends_its_bits_where_llama_cpp_does() {
        let layers = |n: usize| {
            let config = serde_json::json!({
                "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": n,
                "num_attention_heads": 4, "max_position_embeddings": 128,
            });
            let spec = arch::from_config(&config).unwrap();
            (0..n).filter(|&l| finer(&spec, &Place::layer(l, Role::Down))).collect::<Vec<_>>()
        };
        // The 9 layers of 18 that a published Q4_K_M file of Gemma 3 270M has in Q6_K.
        assert_eq!(layers(18), [0, 1, 4, 7, 10, 13, 15, 16, 17]);
        assert_eq!(layers(2), [1]);
    }
}

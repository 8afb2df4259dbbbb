//! compressed-tensors, format pack-quantized: grouped integers packed into words of 32 bits, as vLLM and transformers
//! read them.
//!
//! Written for 4 and 8 bits alone, at which the two packings that exist agree. `sparsity_config` is always empty:
//! today's readers refuse anything else, and zeros need no word of their own.

use std::path::Path;

use lacuna_arch::{self as arch, Target};
use lacuna_format::{Affine, Float, Group};
use lacuna_spec::Role;
use serde_json::{Value, json};

use super::arrange::{Arranged, Encoding};
use super::dir::{Entry, OutDir, SHARD_BYTES};
use super::{Loss, Progress, Saved, Written, hf};
use crate::{Checkpoint, SaveError};

/// How matrices are rounded that are not stored as grouped integers already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rounding {
    /// 4 or 8.
    pub bits: u8,
    /// Columns that share a scale; must divide every matrix's columns.
    pub group: usize,
}

/// What [`save_compressed_tensors`] makes of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackQuantized {
    /// How matrices of the blocks are rounded that are not integers yet; `None` leaves them dense.
    pub rounding: Option<Rounding>,
    /// Keeps the zero points of integers that have them. transformers (4.57 and 5.23 were tried) loads no model with
    /// zero points, whoever wrote it, so without this codes of up to 7 bits are written less their zero point, which
    /// are symmetric codes of 8 bits with the same values.
    pub zero_points: bool,
}

/// What the matrices of one config group share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Scheme {
    bits: u8,
    /// Columns that share a scale.
    group: usize,
    /// One scale a row.
    channel: bool,
    symmetric: bool,
    /// Columns were grouped in the order of their importance.
    by_index: bool,
}

/// One matrix as integers, `[rows, cols]`.
struct Ints {
    codes: Vec<u8>,
    /// `[rows, groups]`.
    scales: Vec<f32>,
    zeros: Vec<u8>,
    groups: usize,
    index: Option<Vec<u8>>,
    loss: Loss,
}

/// What becomes of a tensor.
enum Fate {
    Dense,
    Packed(Scheme),
}

/// Which of a matrix's tensors an entry is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Field {
    Dense,
    Packed,
    Scale,
    Zero,
    Shape,
    Index,
}

/// Writes a model into the directory `out`. Values of grouped integers stay what they are to the last bit.
pub fn save_compressed_tensors(
    source: &Checkpoint,
    out: &Path,
    how: PackQuantized,
    overwrite: bool,
    progress: Progress<'_>,
) -> Result<Saved, SaveError> {
    let (arranged, notes) = Arranged::new(source, arch::hf_spec)?;
    let targets = arch::hf_targets(&arranged.spec).map_err(|e| SaveError::Refused(e.what))?;
    let fates = targets.iter().map(|t| fate(&arranged, t, how)).collect::<Result<Vec<_>, _>>()?;
    if !fates.iter().any(|f| matches!(f, Fate::Packed(_))) {
        let what = "no matrix is stored as grouped integers of up to 8 bits; --type int4 or int8 rounds them";
        return Err(SaveError::Refused(what.into()));
    }
    let plan = Plan { arranged, targets, fates, how };
    let dir = OutDir::create(out, overwrite)?;
    let (path, mut saved) = dir.write_with(|dir| write(dir, source, &plan, notes, progress))?;
    saved.path = path;
    Ok(saved)
}

fn is_linear(target: &Target) -> bool {
    let first = target.parts[0];
    let table =
        matches!(first.role, Role::Embed | Role::LayerInputs | Role::Positions | Role::Head) || first.role.is_router();
    // What is turned, and rows of several matrices by turns, stay as they are.
    let moved = target.turned.contains(&true) || !target.order.is_empty();
    target.shape.len() == 2 && first.role.is_linear() && !table && !moved
}

fn fate(arranged: &Arranged<'_>, target: &Target, how: PackQuantized) -> Result<Fate, SaveError> {
    if !is_linear(target) {
        return Ok(Fate::Dense);
    }
    if target.groups > 1 {
        let what = "holds q, k and v head by head, which are not packed together";
        return Err(SaveError::Refused(format!("tensor {} {what}", target.name)));
    }
    if target.transposed {
        let what = "is kept the other way round (Conv1D), which compressed-tensors does not know";
        return Err(SaveError::Refused(format!("tensor {} {what}", target.name)));
    }
    if let Some(s) = stored_scheme(arranged, target, how.zero_points)? {
        return Ok(Fate::Packed(s));
    }
    let Some(Rounding { bits, group }) = how.rounding else { return Ok(Fate::Dense) };
    let cols = target.shape[1];
    if group == 0 || !cols.is_multiple_of(group) {
        let fits: Vec<String> =
            [256, 128, 64, 32, 16].iter().filter(|g| cols.is_multiple_of(**g)).map(usize::to_string).collect();
        return Err(SaveError::Refused(format!(
            "tensor {}: its {cols} columns do not divide into groups of {group}; {} would fit",
            target.name,
            if fits.is_empty() { "no usual group".into() } else { fits.join(", ") }
        )));
    }
    Ok(Fate::Packed(Scheme { bits, group, channel: false, symmetric: true, by_index: false }))
}

/// The scheme under which every part of a tensor lies already.
fn stored_scheme(arranged: &Arranged<'_>, target: &Target, zero_points: bool) -> Result<Option<Scheme>, SaveError> {
    let mut common = None;
    for place in &target.parts {
        let Some(stored) = arranged.stored(place)? else { return Ok(None) };
        let Some(ints) = stored.integers() else { return Ok(None) };
        let cols = stored.cols;
        let (group, channel, by_index) = match &ints.group {
            Group::Run(n) if *n >= cols => (cols, true, false),
            Group::Run(n) if cols.is_multiple_of(*n) => (*n, false, false),
            Group::Index { groups, .. } if cols.is_multiple_of(*groups) => (cols / groups, false, true),
            _ => return Ok(None),
        };
        let symmetric = ints.symmetric || (!zero_points && ints.bits < 8);
        let bits = if ints.bits <= 4 && symmetric == ints.symmetric { 4 } else { 8 };
        let scheme = Scheme { bits, group, channel, symmetric, by_index };
        if common.is_some_and(|c| c != scheme) || (by_index && target.parts.len() > 1) {
            return Ok(None);
        }
        common = Some(scheme);
    }
    Ok(common)
}

/// Codes and scales of a matrix: as they are stored, or rounded.
fn integers(arranged: &Arranged<'_>, target: &Target, s: &Scheme) -> Result<Ints, SaveError> {
    let (rows, cols) = (target.shape[0], target.shape[1]);
    let groups = if s.channel { 1 } else { cols / s.group };
    let mut out = Ints {
        codes: Vec::with_capacity(rows * cols),
        scales: Vec::with_capacity(rows * groups),
        zeros: Vec::new(),
        groups,
        index: None,
        loss: Loss::default(),
    };
    let kept = stored_scheme(arranged, target, !s.symmetric)? == Some(*s);
    for place in &target.parts {
        let Some(stored) = arranged.stored(place)? else {
            let n = arranged.spec.shape(place).unwrap_or_default().0;
            out.codes.resize(out.codes.len() + n * cols, 1 << (s.bits - 1));
            out.scales.resize(out.scales.len() + n * groups, 0.0);
            continue;
        };
        if let Some(ints) = stored.integers().filter(|_| kept) {
            let (mut codes, mut scales, mut zeros) = (vec![0; cols], vec![0.0; groups], vec![0; groups]);
            let middle = 1u8 << (s.bits - 1);
            for r in 0..stored.rows {
                ints.row(arranged.row_of(place, r), &mut codes, &mut scales, &mut zeros);
                if s.symmetric {
                    // The distance from the zero point (without one: from the middle of fewer bits) becomes that from
                    // the middle.
                    let distance = |(c, code): (usize, &u8)| code.wrapping_sub(zeros[ints.group.of(c)]);
                    out.codes.extend(codes.iter().enumerate().map(|c| middle.wrapping_add(distance(c))));
                } else {
                    out.codes.extend(&codes);
                }
                out.scales.extend(&scales);
                out.zeros.extend(&zeros);
            }
            if let Group::Index { of, .. } = &ints.group {
                let of = of.chunks_exact(2).map(|g| i32::from(u16::from_le_bytes([g[0], g[1]])));
                out.index = Some(of.flat_map(i32::to_le_bytes).collect());
            }
            out.loss.values += (stored.rows * cols) as u64;
            continue;
        }
        for (from, to) in arranged.chunks(place) {
            let m = arranged.decode(place, Some(&stored), from, to);
            for r in 0..to - from {
                for run in m.row(r).chunks(s.group) {
                    round(run, s.bits, &mut out)
                        .map_err(|e| SaveError::Refused(format!("tensor {}: {e}", target.name)))?;
                }
            }
        }
        arranged.release(place);
    }
    Ok(out)
}

/// One group: the scale is the signed extreme over minus half the codes, in f16, so that the lowest code is the
/// extreme.
fn round(run: &[f32], bits: u8, out: &mut Ints) -> Result<(), String> {
    let top = run.iter().fold(0.0f32, |t, &x| if x.abs() > t.abs() { x } else { t });
    if run.iter().any(|x| !x.is_finite()) {
        return Err("a value is no finite number".into());
    }
    let middle = 1u8 << (bits - 1);
    let scale = lacuna_base::float::round_f16(top / -f32::from(middle));
    if !scale.is_finite() {
        return Err(format!("the value {top} needs a scale beyond f16"));
    }
    let grid = Affine { scale, zero: middle };
    let codes: Vec<u8> = run.iter().map(|&x| grid.code(x, bits)).collect();
    out.loss.count(run, &codes.iter().map(|c| grid.value(*c)).collect::<Vec<_>>());
    out.scales.push(scale);
    out.codes.extend(codes);
    Ok(())
}

/// Words of 32 bits from runs of codes, the first code lowest; a last word is filled with zeros.
fn words(codes: impl Iterator<Item = u8>, bits: u8) -> Vec<u8> {
    let per = 32 / usize::from(bits);
    let codes: Vec<u8> = codes.collect();
    let word = |run: &[u8]| run.iter().rev().fold(0u32, |w, &c| w << bits | u32::from(c));
    // A short last run lies in the low bits.
    codes.chunks(per).flat_map(|run| word(run).to_le_bytes()).collect()
}

/// What is to be written, tensor by tensor.
struct Plan<'a> {
    arranged: Arranged<'a>,
    targets: Vec<Target>,
    fates: Vec<Fate>,
    how: PackQuantized,
}

fn write(
    dir: &OutDir,
    source: &Checkpoint,
    plan: &Plan<'_>,
    mut notes: Vec<String>,
    progress: Progress<'_>,
) -> Result<Saved, SaveError> {
    let Plan { arranged, targets, fates, how } = plan;
    let float = hf::natural(arranged.weights)?;
    // Readers multiply in the scales' own type: in f16 for a model of f16, else in f32, in which every product is
    // exact.
    let scale = if float == Float::F16 { ("F16", 2) } else { ("F32", 4) };
    let (mut entries, mut of) = (Vec::new(), Vec::new());
    for (i, (target, fate)) in targets.iter().zip(fates).enumerate() {
        match fate {
            Fate::Dense => {
                entries.push(hf::entry(target, float));
                of.push((i, Field::Dense));
            }
            Fate::Packed(s) => {
                let (rows, cols) = (target.shape[0], target.shape[1]);
                let module = module(target);
                let groups = if s.channel { 1 } else { cols / s.group };
                let packed = |n: usize| n.div_ceil(32 / usize::from(s.bits));
                let mut add = |part: Field, name: &str, dtype: &'static str, shape: Vec<usize>, each: usize| {
                    let bytes = (shape.iter().product::<usize>() * each) as u64;
                    entries.push(Entry { name: format!("{module}.{name}"), dtype, shape, bytes });
                    of.push((i, part));
                };
                add(Field::Packed, "weight_packed", "I32", vec![rows, packed(cols)], 4);
                add(Field::Scale, "weight_scale", scale.0, vec![rows, groups], scale.1);
                if !s.symmetric {
                    add(Field::Zero, "weight_zero_point", "I32", vec![packed(rows), groups], 4);
                }
                if s.by_index {
                    add(Field::Index, "weight_g_idx", "I32", vec![cols], 4);
                }
                add(Field::Shape, "weight_shape", "I64", vec![2], 8);
            }
        }
    }
    let mut tensors: Vec<Written> = Vec::new();
    let mut now: Option<(usize, Ints)> = None;
    let bytes = dir.safetensors("model", &entries, SHARD_BYTES, &mut |e, sink| {
        let (i, part) = of[e];
        let target = &targets[i];
        let Fate::Packed(s) = &fates[i] else {
            let from = arranged.codec(target)?;
            let loss = arranged.write(target, Encoding::Float(float), sink)?;
            let to = hf::names(float).0.into();
            tensors.push(Written { name: target.name.clone(), from, to, instead_of: None, loss });
            return Ok(());
        };
        if now.as_ref().is_none_or(|n| n.0 != i) {
            now = Some((i, integers(arranged, target, s)?));
            progress(i + 1, targets.len());
        }
        let Some((_, ints)) = &now else { return Ok(()) };
        let cols = target.shape[1];
        match part {
            Field::Packed => {
                for row in ints.codes.chunks(cols) {
                    sink(&words(row.iter().copied(), s.bits))?;
                }
                let to = format!("int{} g{}", s.bits, s.group);
                tensors.push(Written {
                    name: target.name.clone(),
                    from: arranged.codec(target)?,
                    to,
                    instead_of: None,
                    loss: ints.loss,
                });
                Ok(())
            }
            Field::Scale => {
                let scales = if scale.1 == 2 { Float::F16 } else { Float::F32 }.encode(&ints.scales);
                sink(&scales.map_err(|i| {
                    let what = format!("tensor {}: scale {} is beyond f16", target.name, ints.scales[i]);
                    SaveError::Refused(what)
                })?)
            }
            // Zero points are packed along the rows.
            Field::Zero => {
                let (rows, per) = (target.shape[0], 32 / usize::from(s.bits));
                for band in (0..rows).step_by(per) {
                    for g in 0..ints.groups {
                        let zeros = (band..(band + per).min(rows)).map(|r| ints.zeros[r * ints.groups + g]);
                        sink(&words(zeros, s.bits))?;
                    }
                }
                Ok(())
            }
            Field::Index => sink(ints.index.as_deref().unwrap_or_default()),
            Field::Shape => sink(&target.shape.iter().flat_map(|n| (*n as i64).to_le_bytes()).collect::<Vec<u8>>()),
            Field::Dense => Ok(()),
        }
    })?;
    let mut config = hf::config(arranged, source, float)?;
    config.insert("quantization_config".into(), quantization(targets, fates));
    dir.json("config.json", &Value::Object(config))?;
    hf::side_files(dir, source, arranged.spec.context, &mut notes)?;
    let dense = targets.iter().zip(fates).filter(|(t, f)| is_linear(t) && matches!(f, Fate::Dense)).count();
    if dense > 0 {
        let why = if how.rounding.is_none() {
            "they are not stored as grouped integers"
        } else {
            "rounding does not fit them"
        };
        notes.push(format!("{dense} matrices of the blocks stay dense: {why}"));
    }
    notes.extend(about_zero_points(arranged, targets, fates)?);
    Ok(Saved { path: Default::default(), bytes, tensors, notes })
}

/// What became of zero points, where the source has any.
fn about_zero_points(arranged: &Arranged<'_>, targets: &[Target], fates: &[Fate]) -> Result<Option<String>, SaveError> {
    let (mut kept, mut without) = (0, 0);
    for (target, fate) in targets.iter().zip(fates) {
        match fate {
            Fate::Packed(s) if !s.symmetric => kept += 1,
            Fate::Packed(s) if s.bits == 8 => {
                let first = arranged.stored(&target.parts[0])?;
                without += usize::from(first.as_ref().and_then(|s| s.integers()).is_some_and(|i| !i.symmetric));
            }
            _ => {}
        }
    }
    let known = "transformers (4.57 and 5.23 were tried) loads no model with zero points";
    Ok(if without > 0 {
        Some(format!(
            "{without} matrices are written as symmetric codes of 8 bits, with the same values, since {known}; \
             --zero-points keeps them as they are"
        ))
    } else if kept > 0 {
        Some(format!(
            "{kept} matrices have zero points: the compressed-tensors package reads them, but {known}, whoever wrote it"
        ))
    } else {
        None
    })
}

fn module(target: &Target) -> &str {
    target.name.strip_suffix(".weight").unwrap_or(&target.name)
}

/// `quantization_config`, one group for each scheme.
fn quantization(targets: &[Target], fates: &[Fate]) -> Value {
    let mut schemes: Vec<(Scheme, Vec<&str>)> = Vec::new();
    let mut ignore = vec!["lm_head".to_owned()];
    for (target, fate) in targets.iter().zip(fates) {
        match fate {
            Fate::Packed(s) => match schemes.iter_mut().find(|g| g.0 == *s) {
                Some(g) => g.1.push(module(target)),
                None => schemes.push((*s, vec![module(target)])),
            },
            // Routers are modules of their own kind in some models and Linear in others.
            Fate::Dense if is_linear(target) || target.parts[0].role.is_router() => {
                ignore.push(module(target).to_owned());
            }
            Fate::Dense => {}
        }
    }
    let one = schemes.len() == 1;
    let groups = schemes.iter().enumerate().map(|(i, (s, modules))| {
        let targets = if one { json!(["Linear"]) } else { json!(modules) };
        let weights = json!({
            "num_bits": s.bits, "type": "int", "symmetric": s.symmetric, "strategy": if s.channel { "channel" } else { "group" },
            "group_size": if s.channel { Value::Null } else { json!(s.group) }, "dynamic": false, "block_structure": null,
            "actorder": if s.by_index { json!("group") } else { Value::Null }, "observer": "minmax", "observer_kwargs": {},
        });
        let group = json!({"targets": targets, "weights": weights, "input_activations": null, "output_activations": null});
        (format!("group_{i}"), group)
    });
    json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": null, "ignore": ignore, "kv_cache_scheme": null, "sparsity_config": {},
        "config_groups": groups.collect::<serde_json::Map<String, Value>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_fill_words_from_the_lowest_bits() {
        assert_eq!(words((0..8u8).rev(), 4), 0x0123_4567u32.to_le_bytes());
        assert_eq!(words([1, 2, 3].into_iter(), 8), [1, 2, 3, 0]);
        assert_eq!(words([15; 9].into_iter(), 4), [255, 255, 255, 255, 15, 0, 0, 0]);
    }
}

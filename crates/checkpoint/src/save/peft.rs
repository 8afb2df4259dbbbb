//! A PEFT adapter (LoRA) from the low-rank parts of a model, and the dense base that it belongs to.
//!
//! `W = base + B A`: what a matrix stores beside its products becomes the base, the products become `lora_B` and
//! `lora_A`. With `lora_alpha` equal to the rank the factor between them is 1.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lacuna_arch::{self as arch, Target};
use lacuna_base::Mat;
use lacuna_format::{Float, Stored, Term, Weights, WeightsError};
use lacuna_spec::{Place, Role, Spec};
use serde_json::{Value, json};

use super::arrange::Arranged;
use super::dir::{Entry, OutDir, SHARD_BYTES};
use super::{Progress, Saved, Written, hf};
use crate::{Checkpoint, SaveError};

/// A model without its low-rank parts.
struct Base<'a>(&'a Checkpoint);

impl Weights for Base<'_> {
    fn spec(&self) -> &Spec {
        self.0.spec()
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        let Some(stored) = self.0.get(place)? else { return Ok(None) };
        if rank(&stored) == 0 {
            return Ok(Some(stored));
        }
        let terms = stored.terms.iter().filter(|t| matches!(t, Term::Piece(_))).cloned().collect();
        Ok(Some(Arc::new(Stored::new(stored.rows, stored.cols, terms))))
    }

    fn release(&self, place: &Place) {
        self.0.release(place);
    }
}

/// The rank of all products of a matrix together; none between maps, which are part of the base.
fn rank(stored: &Stored) -> usize {
    if stored.has_maps() {
        return 0;
    }
    let of = |t: &Term| if let Term::Product(_, right) = t { right.rows } else { 0 };
    stored.terms.iter().map(of).sum()
}

/// Writes the adapter into the directory `out` and its base, dense, into `out/base`.
pub fn save_peft(
    source: &Checkpoint,
    out: &Path,
    float: Option<Float>,
    overwrite: bool,
    progress: Progress<'_>,
) -> Result<Saved, SaveError> {
    let (arranged, _) = Arranged::new(source, arch::hf_spec)?;
    let targets = arch::hf_targets(&arranged.spec).map_err(|e| SaveError::Refused(e.what))?;
    let mut adapted = Vec::new();
    for target in targets {
        let mut most = 0;
        for place in &target.parts {
            most = most.max(arranged.stored(place)?.map_or(0, |s| rank(&s)));
        }
        let first = target.parts[0];
        if most == 0 {
            continue;
        }
        if target.parts.len() > 1 || target.transposed || !first.role.is_linear() || target.shape.len() != 2 {
            let what = match first.role {
                Role::Embed => "the embedding has a low-rank part",
                _ => "is one of several in a fused or turned matrix, and has a low-rank part",
            };
            return Err(SaveError::Refused(format!("{first}: {what}, which this adapter cannot say")));
        }
        adapted.push((target, most));
    }
    if adapted.is_empty() {
        let what = "no matrix of this model has a low-rank part, so there is nothing to make an adapter of";
        return Err(SaveError::Refused(what.into()));
    }
    let dir = OutDir::create(out, overwrite)?;
    let (path, mut saved) = dir.write_with(|dir| {
        let mut saved = hf::dense(&dir.inner("base")?, source, &Base(source), float, SHARD_BYTES, progress)?;
        let mut entries = Vec::new();
        for (target, rank) in &adapted {
            let (rows, cols) = (target.shape[0], target.shape[1]);
            let name = format!("base_model.model.{}", module(target));
            let entry = |part: &str, a: usize, b: usize| Entry {
                name: format!("{name}.{part}.weight"),
                dtype: "F32",
                shape: vec![a, b],
                bytes: (a * b * 4) as u64,
            };
            entries.push(entry("lora_A", *rank, cols));
            entries.push(entry("lora_B", rows, *rank));
        }
        saved.bytes += dir.safetensors("adapter_model", &entries, u64::MAX, &mut |e, sink| {
            let (target, rank) = &adapted[e / 2];
            let m = factor(&arranged, target, *rank, e % 2 == 0)?;
            sink(&m.data().iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
            if e % 2 == 1 {
                let from = arranged.codec(target)?;
                let to = format!("base + LoRA of rank {rank}");
                saved.tensors.push(Written {
                    name: module(target).into(),
                    from,
                    to,
                    instead_of: None,
                    loss: Default::default(),
                });
            }
            Ok(())
        })?;
        dir.json("adapter_config.json", &config(&adapted))?;
        let bare = adapted.iter().filter(|(t, _)| {
            arranged
                .stored(&t.parts[0])
                .ok()
                .flatten()
                .is_some_and(|s| !s.terms.iter().any(|t| matches!(t, Term::Piece(_))))
        });
        let bare = bare.count();
        if bare > 0 {
            saved.notes.push(format!("{bare} matrices are nothing but a low-rank part: their base is zeros"));
        }
        Ok(saved)
    })?;
    saved.path = path;
    Ok(saved)
}

fn module(target: &Target) -> &str {
    target.name.strip_suffix(".weight").unwrap_or(&target.name)
}

/// `lora_A`, `[rank, cols]`, or `lora_B`, `[rows, rank]`: the factors of all products, beside each other.
fn factor(arranged: &Arranged<'_>, target: &Target, rank: usize, right: bool) -> Result<Mat, SaveError> {
    let (rows, cols) = (target.shape[0], target.shape[1]);
    let place = &target.parts[0];
    let mut out = if right { Mat::zeros(rank, cols) } else { Mat::zeros(rows, rank) };
    let Some(stored) = arranged.stored(place)? else { return Ok(out) };
    let mut at = 0;
    for term in &stored.terms {
        let Term::Product(l, r) = term else { continue };
        if right {
            let m = r.to_mat();
            (0..r.rows).for_each(|k| out.row_mut(at + k).copy_from_slice(m.row(k)));
        } else {
            let m = l.to_mat();
            (0..rows).for_each(|i| out.row_mut(i)[at..at + r.rows].copy_from_slice(m.row(arranged.row_of(place, i))));
        }
        at += r.rows;
    }
    Ok(out)
}

/// `adapter_config.json`: the commonest rank for all, a pattern for each other.
fn config(adapted: &[(Target, usize)]) -> Value {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    adapted.iter().for_each(|(_, r)| *counts.entry(*r).or_default() += 1);
    let common = counts.iter().max_by_key(|c| c.1).map_or(1, |c| *c.0);
    let others: serde_json::Map<String, Value> =
        adapted.iter().filter(|a| a.1 != common).map(|(t, r)| (module(t).replace('.', r"\."), json!(r))).collect();
    let modules: Vec<&str> = adapted.iter().map(|a| module(&a.0)).collect();
    json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "auto_mapping": null, "base_model_name_or_path": "base", "revision": null,
        "inference_mode": true, "r": common, "lora_alpha": common, "lora_dropout": 0.0, "target_modules": modules, "bias": "none",
        "fan_in_fan_out": false, "use_rslora": false, "use_dora": false, "modules_to_save": null, "init_lora_weights": true,
        "layers_to_transform": null, "layers_pattern": null, "rank_pattern": others.clone(), "alpha_pattern": others,
    })
}

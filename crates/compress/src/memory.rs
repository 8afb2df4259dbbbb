//! The ceiling: what the work needs at the least, and what must go to a scratch file.

use lacuna_base::units::show_bytes;
use lacuna_contract::Step;
use lacuna_spec::{Part, Spec};

use crate::account::CompressError;
use crate::activations::Activations;
use crate::calibrate::Gather;
use crate::local::{Chosen, asks};
use crate::recipe::{Recipe, RecipeStep};

/// How the work keeps below the ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Activations of the calibration sequences go to a scratch file.
    pub spill: bool,
    /// Least bytes of the whole process that the work runs in.
    pub floor: u64,
    /// Bytes that steps on several matrices may take at once.
    pub scratch_bytes: u64,
}

/// For what no formula counts: thread stacks, allocator slack, journals.
const SLACK: u64 = 48 << 20;

/// Plans the memory of a run, or refuses a ceiling below the floor.
pub fn plan(spec: &Spec, recipe: &Recipe, sequences: &[Vec<u32>], max_ram: Option<u64>) -> Result<Plan, CompressError> {
    let lens: Vec<usize> = sequences.iter().map(Vec::len).collect();
    // A search keeps what goes into the first block and what comes out of the last.
    let copies = if recipe.steps.iter().any(|s| s.is_model_wide()) { 3 } else { 1 };
    let all = copies * Activations::bytes(&lens, spec.hidden);
    let floor = floor(spec, recipe, lens.iter().copied().max().unwrap_or(0)) + in_use();
    let Some(max) = max_ram else {
        let scratch_bytes = available().map_or(1 << 30, |free| free / 4);
        return Ok(Plan { spill: false, floor, scratch_bytes });
    };
    if max < floor {
        // Rounded up to a whole MiB, so that the number printed is one that works.
        let least = floor.div_ceil(1 << 20);
        return Err(CompressError::Memory { asked: show_bytes(max), floor: format!("{least}MiB") });
    }
    let spill = floor + all > max;
    let scratch_bytes = max - floor - if spill { 0 } else { all };
    Ok(Plan { spill, floor, scratch_bytes })
}

/// Bytes in use now, before the work begins: the process's resident memory, mapped files included.
fn in_use() -> u64 {
    resident().unwrap_or(64 << 20)
}

/// Resident bytes of this process, where the system tells.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// The process's high-water mark of resident bytes, where the system tells.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// Bytes that processes may still take before the system has to swap, where it tells.
pub fn available() -> Option<u64> {
    told("/proc/meminfo", "MemAvailable:")
}

fn status(key: &str) -> Option<u64> {
    told("/proc/self/status", key)
}

fn told(file: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    let kb: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kb * 1024)
}

/// The largest block: its matrices decoded once as f32 and once more as new weights, its statistics, what the step that needs most takes
/// for the matrices it works on at once, and the activations of one sequence inside the block; or the embedding being rewritten.
fn floor(spec: &Spec, recipe: &Recipe, seq_len: usize) -> u64 {
    let mut most = 0u64;
    for (l, layer) in spec.layers.iter().enumerate() {
        let whole = |s: &RecipeStep| match s.step() {
            Step::Model(model) => Gather::bytes(spec, model.needs(spec, l)),
            _ => 0,
        };
        let whole = recipe.steps.iter().map(whole).max().unwrap_or(0);
        let grams = Gather::bytes(spec, asks(recipe, &Chosen::default(), spec, l)).max(whole);
        let (mut weights, mut scratch) = (0u64, 0u64);
        let mut together = vec![0u64; recipe.steps.len()];
        for p in spec.layer_places(l).into_iter().filter(|p| p.part == Part::Weight) {
            let Some(shape) = spec.shape(&p) else { continue };
            weights += shape.0 as u64 * shape.1 as u64;
            for (i, step) in recipe.local() {
                let Some(local) = step.local(&p) else { continue };
                let bytes = local.scratch_bytes(shape);
                together[i] = if local.together() { together[i] + bytes } else { together[i].max(bytes) };
                scratch = scratch.max(together[i]);
            }
        }
        let attn = layer.attn.as_ref().map_or(0, |a| (a.heads + 2 * a.kv_heads) * a.head_dim + a.heads * a.head_dim);
        let ffn = layer.ffn.as_ref().map_or(0, |f| 3 * f.width);
        let rows = seq_len as u64 * 4 * (5 * spec.hidden + attn.max(ffn) + attn) as u64;
        most = most.max(2 * 4 * weights + grams + scratch + rows);
    }
    let embed = (spec.vocab as u64) * (spec.hidden as u64);
    let changes = |p: &lacuna_spec::Place| p.layer.is_none() && recipe.local().any(|(_, s)| s.local(p).is_some());
    let embed = if spec.places().iter().any(changes) { embed * 10 } else { embed };
    SLACK + most.max(embed)
}

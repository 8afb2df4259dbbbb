//! The ceiling: what the work needs at the least, and what must go to a scratch file.

use lacuna_base::units::show_bytes;
use lacuna_contract::Needs;
use lacuna_spec::{Part, Spec};

use crate::account::CompressError;
use crate::activations::Activations;
use crate::drive::step_needs;
use crate::recipe::Recipe;
use crate::stats::Gather;

/// How the work keeps below the ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Activations of the calibration sequences go to a scratch file.
    pub spill: bool,
    /// Least bytes of the whole process that the work runs in.
    pub floor: u64,
}

/// For what no formula counts: thread stacks, allocator slack, journals.
const SLACK: u64 = 48 << 20;

/// Plans the memory of a run, or refuses a ceiling below the floor.
pub fn plan(spec: &Spec, recipe: &Recipe, sequences: &[Vec<u32>], max_ram: Option<u64>) -> Result<Plan, CompressError> {
    let lens: Vec<usize> = sequences.iter().map(Vec::len).collect();
    let all = Activations::bytes(&lens, spec.hidden);
    let floor = floor(spec, recipe, lens.iter().copied().max().unwrap_or(0)) + in_use();
    let Some(max) = max_ram else { return Ok(Plan { spill: false, floor }) };
    if max < floor {
        // Rounded up to a whole MiB, so that the number printed is one that works.
        let least = floor.div_ceil(1 << 20);
        return Err(CompressError::Memory { asked: show_bytes(max), floor: format!("{least}MiB") });
    }
    Ok(Plan { spill: floor + all > max, floor })
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

/// The largest block: its matrices decoded once as f32 and once more as new weights, its statistics, a solver's three square f64 matrices
/// beside one matrix in f64, and the activations of one sequence inside the block; or the embedding being rewritten.
fn floor(spec: &Spec, recipe: &Recipe, seq_len: usize) -> u64 {
    let local: Vec<_> = recipe.steps.iter().filter(|s| !s.is_model_wide()).collect();
    let mut most = 0u64;
    for (l, layer) in spec.layers.iter().enumerate() {
        let places: Vec<_> = spec.layer_places(l).into_iter().filter(|p| p.part == Part::Weight).collect();
        let asks = places
            .iter()
            .flat_map(|p| local.iter().filter(|s| s.aims_at(p)).map(|s| (*p, step_needs(s))).collect::<Vec<_>>());
        let grams = Gather::bytes(spec, l, asks);
        let (mut weights, mut largest, mut widest) = (0u64, 0u64, 0u64);
        for p in &places {
            if let Some((r, c)) = spec.shape(p) {
                let n = r as u64 * c as u64;
                weights += n;
                largest = largest.max(n);
                if local.iter().any(|s| s.aims_at(p) && step_needs(s) != Needs::default()) {
                    widest = widest.max(c as u64);
                }
            }
        }
        let attn = layer.attn.as_ref().map_or(0, |a| (a.heads + 2 * a.kv_heads) * a.head_dim + a.heads * a.head_dim);
        let ffn = layer.ffn.as_ref().map_or(0, |f| 3 * f.width);
        let rows = seq_len as u64 * 4 * (5 * spec.hidden + attn.max(ffn) + attn) as u64;
        let solver = 3 * 8 * widest * widest + 8 * largest + 16 * largest;
        most = most.max(2 * 4 * weights + grams + solver + rows);
    }
    let embed = (spec.vocab as u64) * (spec.hidden as u64);
    let embed_changes = spec.places().iter().any(|p| p.layer.is_none() && local.iter().any(|s| s.aims_at(p)));
    let embed = if embed_changes { embed * 10 } else { embed };
    SLACK + most.max(embed)
}

//! The ceiling: what the work needs at the least, and what must go to a scratch file.

use std::collections::BTreeSet;

use lacuna_base::units::show_bytes;
use lacuna_contract::{Ask, Site, Step};
use lacuna_spec::{Part, Place, Role, Spec};

use crate::account::CompressError;
use crate::activations::{Activations, SpilledInputs};
use crate::calibrate::mapped::Mapped;
use crate::calibrate::{Gather, gradients};
use crate::local::{Chosen, asks, locals_of};
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

/// The statistics of backward passes that a recipe's steps read of a network.
pub(crate) fn gradients_asked(spec: &Spec, recipe: &Recipe) -> BTreeSet<(Place, Ask)> {
    let mut out = BTreeSet::new();
    let mut take = |site: Site, ask: Ask| {
        if let (Site::Matrix(place), true) = (site, ask.is_gradient()) {
            out.insert((place, ask));
        }
    };
    for l in 0..spec.layers.len() {
        asks(recipe, &Chosen::default(), spec, l).into_iter().for_each(|(site, ask)| take(site, ask));
        for step in &recipe.steps {
            if let Step::Model(model) = step.step() {
                model.needs(spec, l).into_iter().for_each(|(site, ask)| take(site, ask));
            }
        }
    }
    out
}

/// For what no formula counts: thread stacks, allocator slack, journals.
const SLACK: u64 = 48 << 20;

/// Plans the memory of a run, or refuses a ceiling below the floor.
pub fn plan(spec: &Spec, recipe: &Recipe, sequences: &[Vec<u32>], max_ram: Option<u64>) -> Result<Plan, CompressError> {
    let lens: Vec<usize> = sequences.iter().map(Vec::len).collect();
    // A search keeps what goes into the first block and what comes out of the last; a pass back what goes into each.
    let copies = if recipe.steps.iter().any(|s| s.is_model_wide()) { 3 } else { 1 };
    let one = Activations::bytes(&lens, spec.carried());
    let asked = gradients_asked(spec, recipe);
    let shapes = asked.iter().filter_map(|(p, ask)| Some((*ask, spec.shape(p)?)));
    let inputs = SpilledInputs::bytes(spec.layers.len(), &lens, spec.carried());
    let back = if asked.is_empty() { 0 } else { inputs + gradients::given_bytes(shapes, lens.len()) };
    let all = (copies * one).max(back);
    let floor = floor(spec, recipe, &lens) + in_use();
    let Some(max) = max_ram else {
        let free = available().unwrap_or(4 << 30);
        // Nobody set a ceiling: what the machine has free is one.
        return Ok(Plan { spill: all > free / 2, floor, scratch_bytes: free / 4 });
    };
    if max < floor {
        // Rounded up to whole MB, so that the number printed is one that works.
        let least = floor.div_ceil(1_000_000);
        return Err(CompressError::Memory { asked: show_bytes(max), floor: format!("{least}MB") });
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

/// The largest block: its matrices decoded once as f32 and once more as new weights, its statistics, what the step that
/// needs most takes for the matrices it works on at once, and the activations of one sequence inside the block; or the
/// embedding being rewritten.
fn floor(spec: &Spec, recipe: &Recipe, lens: &[usize]) -> u64 {
    let (mut most, seq_len) = (0u64, lens.iter().copied().max().unwrap_or(0));
    let asked = gradients_asked(spec, recipe);
    let backward = !asked.is_empty();
    for (l, layer) in spec.layers.iter().enumerate() {
        let whole = |s: &RecipeStep| match s.step() {
            Step::Model(model) => Gather::bytes(spec, model.needs(spec, l)) + model.scratch_bytes(spec),
            Step::Search(search) => {
                let matrices = spec.layer_places(l).into_iter().filter(|p| p.part == Part::Weight);
                let looks = |p| search.needs().iter().map(move |ask| (Site::Matrix(p), *ask));
                let all = asks(recipe, &Chosen::default(), spec, l).into_iter().chain(matrices.flat_map(looks));
                Gather::bytes(spec, all)
                    .max(Gather::bytes(spec, search.sizes_need(spec, l)) + search.scratch_bytes(spec))
            }
            Step::Local(_) => 0,
        };
        let whole = recipe.steps.iter().map(whole).max().unwrap_or(0);
        let grams = Gather::bytes(spec, asks(recipe, &Chosen::default(), spec, l)).max(whole);
        let (mut weights, mut scratch) = (0u64, 0u64);
        let mut together = vec![0u64; recipe.steps.len()];
        for p in spec.layer_places(l).into_iter().filter(|p| p.part == Part::Weight) {
            let Some(shape) = spec.shape(&p) else { continue };
            weights += shape.0 as u64 * shape.1 as u64;
            for (i, local, mixes) in locals_of(recipe, &Chosen::default(), spec, &p) {
                let mapped = mixes.map_or(0, |mixes| Mapped::bytes(&local.needs(&p), mixes, shape.1));
                let bytes = local.scratch_bytes(shape) + mapped;
                together[i] = if local.together() { together[i] + bytes } else { together[i].max(bytes) };
                scratch = scratch.max(together[i]);
            }
        }
        let attn = layer.attn.as_ref().map_or(0, |a| (a.heads + 2 * a.kv_heads) * a.head_dim + a.heads * a.head_dim);
        let ffn = layer.ffn.as_ref().map_or(0, |f| 3 * f.width);
        let mixer = layer.mixer.as_ref().map_or(0, |m| 3 * m.channels(spec.hidden) + 4 * m.width(spec.hidden));
        let state = layer.mixer.as_ref().map_or(0, |m| 4 * m.state_values(spec.hidden) as u64);
        let rows =
            seq_len as u64 * 4 * (3 * spec.hidden + 2 * spec.carried() + attn.max(ffn) + attn + mixer) as u64 + state;
        // On the way back a block's gradients stand beside it, with two sums of each, and what its forward kept of one
        // sequence.
        let mine = asked.iter().filter(|(p, _)| p.layer == Some(l as u32));
        let mine: Vec<_> = mine.filter_map(|(p, ask)| Some((*ask, spec.shape(p)?))).collect();
        let square = mine.iter().map(|(ask, shape)| gradients::square_bytes(*ask, *shape)).sum::<u64>();
        let given = gradients::given_bytes(mine.into_iter(), lens.len());
        let back = if backward { 4 * 4 * weights + 6 * rows + square } else { 0 };
        // Gradients kept one by one are there on the way back and again while the block's matrices are worked on, where
        // they come out of the scratch file as packed bytes first.
        let here = asked.iter().filter(|(p, ask)| p.layer == Some(l as u32) && *ask == Ask::SequenceGradients);
        let each: u64 = here.filter_map(|(p, _)| spec.shape(p)).map(|(m, n)| 4 * (m * n * lens.len()) as u64).sum();
        most = most.max(2 * 4 * weights + (grams + given + scratch + rows).max(back) + each);
    }
    let inputs = spec.shape(&Place::global(Role::LayerInputs)).map_or(0, |(r, c)| r as u64 * c as u64);
    let embed = ((spec.vocab as u64) * (spec.hidden as u64)).max(inputs);
    let changes = |p: &lacuna_spec::Place| p.layer.is_none() && recipe.local().any(|(_, s)| s.local(p).is_some());
    let mut embed = if spec.places().iter().any(changes) { embed * 10 } else { embed };
    if recipe.local().count() > 0 {
        let ends = spec.places().into_iter().filter(|p| p.layer.is_none() && p.part == Part::Weight);
        let scratch = |p: Place| {
            let shape = spec.shape(&p)?;
            recipe.local().filter_map(|(_, s)| s.local(&p)).map(|l| l.scratch_bytes(shape)).max()
        };
        embed += ends.filter_map(scratch).max().unwrap_or(0) + Gather::bytes(spec, recipe.at_head(spec));
    }
    SLACK + most.max(embed)
}

//! Local steps on the matrices of one block, from their sources to their stored form.

use std::collections::HashMap;
use std::sync::Arc;

use lacuna_contract::{Ask, Edit, Left, Local, MethodError, Site, Stats, Work};
use lacuna_format::{Float, Map, Piece, Stored, Term, Unpacked, Values};
use lacuna_spec::{Part, Place, Role, Spec};
use rayon::prelude::*;

use crate::account::CompressError;
use crate::calibrate::mapped::Mapped;
use crate::calibrate::{Statistics, reader};
use crate::drive::{SOURCE, Walk, at_step};
use crate::overlay::{finite, finite_rows, packing};
use crate::recipe::{Recipe, RecipeStep};

/// What searches chose: for a step (by index) the variant at each place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chosen(pub(crate) HashMap<usize, HashMap<Place, usize>>);

/// What works on `place` at the step of index `i`.
pub(crate) fn local_of<'a>(step: &'a RecipeStep, i: usize, chosen: &Chosen, place: &Place) -> Option<&'a dyn Local> {
    match chosen.0.get(&i).and_then(|of| of.get(place)) {
        Some(&variant) => step.variants.get(variant)?.local(place),
        None => step.local(place),
    }
}

/// Whether the steps of a recipe that aim at `place` can all work there, one after the other; false where none aims.
pub(crate) fn fits(recipe: &Recipe, spec: &Spec, place: &Place) -> bool {
    let Some(shape) = spec.shape(place) else { return false };
    let mut earlier = Vec::new();
    for (_, step) in recipe.local() {
        let Some(local) = step.local(place) else { continue };
        if place.layer.is_none() && !local.needs(place).is_empty() && !has_inputs(spec, place) {
            return false;
        }
        match local.check(shape, &earlier) {
            Ok(left) => earlier.push(left),
            Err(_) => return false,
        }
    }
    !earlier.is_empty()
}

/// Whether a matrix outside the blocks is multiplied, so that there are statistics of its inputs: the head, or the
/// embedding where that is the head, too.
pub(crate) fn has_inputs(spec: &Spec, place: &Place) -> bool {
    place.part == Part::Weight && (place.role == Role::Head || place.role == Role::Embed && spec.tied)
}

/// The steps at a place in their order: their index, what works there, and where maps of the inputs stand before it,
/// whether these mix them.
pub(crate) fn locals_of<'a>(
    recipe: &'a Recipe,
    chosen: &Chosen,
    spec: &Spec,
    place: &Place,
) -> Vec<(usize, &'a dyn Local, Option<bool>)> {
    let mut earlier: Vec<Left> = Vec::new();
    let mut out = Vec::new();
    for (i, step) in recipe.local() {
        let Some(local) = local_of(step, i, chosen, place) else { continue };
        out.push((i, local, Left::mixes(&earlier)));
        // What refuses the shape is told by the recipe's own check.
        earlier.extend(spec.shape(place).and_then(|shape| local.check(shape, &earlier).ok()));
    }
    out
}

/// The statistics that local steps read in a block.
pub(crate) fn asks(recipe: &Recipe, chosen: &Chosen, spec: &Spec, layer: usize) -> Vec<(Site, Ask)> {
    let mut out = Vec::new();
    for place in spec.layer_places(layer).into_iter().filter(|p| p.part == Part::Weight) {
        for (_, local, mixes) in locals_of(recipe, chosen, spec, &place) {
            out.extend(gathered_for(local, &place, mixes).map(|ask| (Site::Matrix(place), ask)));
        }
    }
    out
}

/// What has to be gathered for what a step reads at a place behind maps, if any.
pub(crate) fn gathered_for(local: &dyn Local, place: &Place, mixes: Option<bool>) -> impl Iterator<Item = Ask> {
    let behind = move |ask: Ask| mixes.map_or(Some(ask), |mixes| ask.behind(mixes));
    local.needs(place).into_iter().filter_map(behind)
}

/// Matrices that one call of a step works on.
struct Group<'a> {
    local: &'a dyn Local,
    places: Vec<Place>,
    scratch_bytes: u64,
}

/// Whether a matrix that was made here has floats of another type than f16.
fn is_wide(stored: &Stored) -> bool {
    let one = |p: &Piece| matches!(p.values, Values::Float(f, _) if f != Float::F16);
    stored.terms.iter().any(|t| match t {
        Term::Piece(p) => one(p),
        Term::Product(a, b) => one(a) || one(b),
        Term::Signed(s) => one(&s.left) || one(&s.right),
    })
}

/// The codec of floats that f16 cannot say: the source's own bf16, else f32.
fn wide_of(source: &Stored) -> Float {
    let bf16 = |t: &Term| matches!(t, Term::Piece(p) if matches!(p.values, Values::Float(Float::Bf16, _)));
    if source.terms.iter().all(bf16) { Float::Bf16 } else { Float::F32 }
}

impl Walk<'_> {
    /// The local steps on one block's matrices, step after step. Answers with the matrices that changed.
    pub(crate) fn local_steps(
        &mut self,
        spec: &Spec,
        places: &[Place],
        sources: &HashMap<Place, Arc<Stored>>,
        statistics: &Statistics,
    ) -> Result<Vec<(Place, Arc<Stored>)>, CompressError> {
        let recipe = self.recipe;
        let stats = |p: &Place| statistics.of(spec, Site::Matrix(*p));
        // An expert that no token reached says nothing of how its weights are used: a method that asks must not guess.
        let mut work: HashMap<Place, Unpacked> = HashMap::new();
        let mut aimed: Vec<Place> = Vec::new();
        for p in places {
            let locals: Vec<_> = recipe.local().filter_map(|(i, s)| local_of(s, i, &self.chosen, p)).collect();
            let blind = |l: &&dyn Local| !l.needs(p).is_empty() && stats(p).tokens == 0;
            if locals.iter().any(blind) {
                self.unreached.insert(*p);
            } else if !locals.is_empty() {
                aimed.push(*p);
            }
        }
        let decoded: Vec<_> = places
            .par_iter()
            .map(|p| {
                if !aimed.contains(p) {
                    return finite(p, &sources[p], SOURCE).map(|()| None);
                }
                let w = sources[p].to_mat();
                finite_rows(p, &w, 0, SOURCE)?;
                Ok(Some((*p, Unpacked::dense(w))))
            })
            .collect::<Result<Vec<_>, CompressError>>()?;
        work.extend(decoded.into_iter().flatten());
        for (i, step) in recipe.local() {
            let groups = self.groups(step, i, &aimed, spec, &work);
            for batch in in_turn(groups, self.scratch_bytes) {
                let mapped = mapped(step, &batch, &work, spec, &stats)?;
                let stats = |p: &Place| mapped.get(p).map_or_else(|| stats(p), Mapped::stats);
                let batch: Vec<(Group<'_>, Vec<Work<'_>>)> = batch
                    .into_iter()
                    .map(|g| {
                        let take = |p: &Place| {
                            let matrix = work.remove(p)?;
                            let bias = sources.get(&Place { part: Part::Bias, ..*p }).map(Arc::as_ref);
                            Some(Work { place: *p, matrix, source: &sources[p], stats: stats(p), bias, spec })
                        };
                        let taken = g.places.iter().filter_map(take).collect();
                        (g, taken)
                    })
                    .collect();
                let edited = batch
                    .into_par_iter()
                    .map(|(g, work)| {
                        let whose = work.first().map(|w| w.place.to_string()).unwrap_or_default();
                        g.local.edit(work).map_err(|e| at_step(step, whose, e))
                    })
                    .collect::<Result<Vec<_>, CompressError>>()?;
                for edit in edited.into_iter().flatten() {
                    match edit {
                        Edit::Matrix(p, m) if Some(m.shape()) == spec.shape(&p) => work.insert(p, m),
                        other => {
                            let what = format!("a step on single matrices cannot make this change: {other:?}");
                            return Err(at_step(step, "the block", MethodError::new(what)));
                        }
                    };
                }
            }
        }
        let packed = aimed
            .par_iter()
            .map(|p| {
                let m = work.get(p).ok_or_else(|| lost(p))?;
                for piece in m.pieces() {
                    finite_rows(p, &piece.w, 0, "the new weight")?;
                }
                let stored = m.pack(wide_of(&sources[p])).map_err(|e| packing(p, e))?;
                // A sum or a product of finite numbers need not be finite.
                if stored.terms.len() > 1
                    || matches!(stored.terms[..], [Term::Product(..) | Term::Signed(..)])
                    || stored.has_maps()
                {
                    finite(p, &stored, &format!("the weight as {}", stored.codec_name()))?;
                }
                Ok((*p, Arc::new(stored)))
            })
            .collect::<Result<Vec<_>, CompressError>>()?;
        self.wide.extend(packed.iter().filter(|(_, s)| is_wide(s)).map(|(p, _)| *p));
        Ok(packed)
    }

    /// The calls of a step on a block: one for each matrix, or one for all that compete.
    fn groups<'s>(
        &self,
        step: &'s RecipeStep,
        i: usize,
        aimed: &[Place],
        spec: &Spec,
        work: &HashMap<Place, Unpacked>,
    ) -> Vec<Group<'s>> {
        let mut out: Vec<Group<'s>> = Vec::new();
        for p in aimed {
            let Some(local) = local_of(step, i, &self.chosen, p) else { continue };
            let bytes = spec.shape(p).map_or(0, |shape| {
                let maps = work.get(p).map_or(&[][..], |m| &m.input);
                let mapped = if maps.is_empty() { 0 } else { Mapped::bytes(&local.needs(p), is_mixed(maps), shape.1) };
                local.scratch_bytes(shape) + mapped
            });
            let same = |g: &&mut Group<'_>| std::ptr::addr_eq(g.local, local);
            match out.iter_mut().find(same).filter(|_| local.together()) {
                Some(g) => {
                    g.places.push(*p);
                    g.scratch_bytes += bytes;
                }
                None => out.push(Group { local, places: vec![*p], scratch_bytes: bytes }),
            }
        }
        out
    }
}

fn is_mixed(maps: &[Map]) -> bool {
    !maps.iter().all(Map::moves_only)
}

/// The statistics of those matrices of a batch whose inputs are mapped. Matrices of one input with the same maps share
/// them, and what methods make of them.
fn mapped<'s>(
    step: &RecipeStep,
    batch: &[Group<'_>],
    work: &HashMap<Place, Unpacked>,
    spec: &Spec,
    stats: &impl Fn(&Place) -> Stats<'s>,
) -> Result<HashMap<Place, Mapped>, CompressError> {
    let mut out: HashMap<Place, Mapped> = HashMap::new();
    let mut known: Vec<(Place, Vec<Ask>, Place)> = Vec::new();
    for (g, p) in batch.iter().flat_map(|g| g.places.iter().map(move |p| (g, p))) {
        let Some(m) = work.get(p).filter(|m| !m.input.is_empty()) else { continue };
        let (asks, of) = (g.local.needs(p), reader(spec, p));
        let same = |(other, a, other_of): &&(Place, Vec<Ask>, Place)| {
            *other_of == of && *a == asks && work.get(other).is_some_and(|w| w.input == m.input)
        };
        let like = known.iter().find(same).and_then(|(other, ..)| out.get(other));
        let made = Mapped::of(&stats(p), &asks, &m.input, m.shape().1, like).map_err(|e| at_step(step, p, e))?;
        known.push((*p, asks, of));
        out.insert(*p, made);
    }
    Ok(out)
}

/// Groups that go at once, batch after batch: as many as the scratch memory holds, at least one.
fn in_turn(groups: Vec<Group<'_>>, scratch_bytes: u64) -> Vec<Vec<Group<'_>>> {
    let mut out: Vec<Vec<Group<'_>>> = Vec::new();
    let mut sum = 0u64;
    for g in groups {
        sum = sum.saturating_add(g.scratch_bytes);
        match out.last_mut().filter(|_| sum <= scratch_bytes) {
            Some(batch) => batch.push(g),
            None => {
                sum = g.scratch_bytes;
                out.push(vec![g]);
            }
        }
    }
    out
}

fn lost(place: &Place) -> CompressError {
    let what = "a step took the matrix and gave nothing back".into();
    CompressError::Method { place: place.to_string(), step: "pack".into(), what }
}

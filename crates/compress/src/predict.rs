//! What a recipe will come to, before any of it is done: random matrices packed as each place will
//! have.

use std::collections::HashMap;
use std::sync::Arc;

use lacuna_base::{Mat, Rng};
use lacuna_format::{Float, PatternKind, Stored, Unpacked, Weights, WeightsError, pack_float};
use lacuna_spec::{Part, Place, Role, Spec};

use crate::CompressError;
use crate::drive::at_step;
use crate::overlay::packing;
use crate::recipe::{Recipe, RecipeStep, Rest};

/// Weights of a sample at the most; of larger matrices, some rows stand for all.
const SAMPLE: usize = 1 << 22;

/// A form that matrices of the model will have.
#[derive(Clone)]
pub struct Planned {
    /// One of them: random values in that form, or an untouched matrix as it came.
    pub sample: Arc<Stored>,
    /// Rows of the matrix over rows of the sample.
    pub scale: f64,
    /// How many there are.
    pub matrices: usize,
    /// How many of them a token is multiplied with: of experts, those it uses; of an embedding that is no head, none.
    pub used: f64,
    /// Whether they are written anew and not as they came.
    pub touched: bool,
    /// Weights of each.
    pub weights: u64,
}

/// The forms of all matrices of `source` after `recipe`, parts that it drops included. An error where a method refuses
/// its own grid.
pub fn forms(source: &dyn Weights, recipe: &Recipe) -> Result<Vec<Planned>, CompressError> {
    let spec = source.spec();
    recipe.check(spec)?;
    let mut known: HashMap<String, usize> = HashMap::new();
    let mut out: Vec<Planned> = Vec::new();
    for place in spec.places() {
        let (Part::Weight, Some((rows, cols)), Some(used)) = (place.part, spec.shape(&place), uses(spec, &place))
        else {
            continue;
        };
        let steps: Vec<&RecipeStep> = recipe.local().map(|(_, s)| s).filter(|s| s.local(&place).is_some()).collect();
        let kept = steps.is_empty() && recipe.rest == Rest::Source;
        let stored = if kept { source.get(&place)? } else { None };
        let (stored, remade) = match recoded(source, &place, &steps)? {
            Some(made) => (Some(made), true),
            None => (stored, false),
        };
        let form = stored.as_ref().map_or_else(|| steps.iter().map(|s| asked(s, &place)).collect(), |s| s.codec_name());
        let key = format!("{rows} {cols} {kept} {form}");
        let at = match known.get(&key) {
            Some(&at) => at,
            None => {
                let (sample, scale) = match stored {
                    Some(stored) => (stored, 1.0),
                    None => sample(&place, &steps, rows, cols)?,
                };
                let touched = !kept || remade;
                out.push(Planned { sample, scale, matrices: 0, used: 0.0, touched, weights: (rows * cols) as u64 });
                known.insert(key, out.len() - 1);
                out.len() - 1
            }
        };
        out[at].matrices += 1;
        out[at].used += used;
        source.release(&place);
    }
    Ok(out)
}

/// What comes of a matrix whose only step says it by how the matrix is stored.
fn recoded(source: &dyn Weights, place: &Place, steps: &[&RecipeStep]) -> Result<Option<Arc<Stored>>, CompressError> {
    let [step] = steps else { return Ok(None) };
    let (Some(local), Some(stored)) = (step.local(place), source.get(place)?) else { return Ok(None) };
    let Some(made) = local.foretell_of(&stored) else { return Ok(None) };
    let made = made.map_err(|e| at_step(step, place, e))?;
    made.pack(Float::F32).map(|s| Some(Arc::new(s))).map_err(|e| packing(place, e))
}

/// How often a token is multiplied with a place's matrix; none for what is no matrix.
pub fn uses(spec: &Spec, place: &Place) -> Option<f64> {
    match place.role {
        Role::LayerInputs => Some(0.0),
        Role::Embed => Some(if spec.tied { 1.0 } else { 0.0 }),
        role if !role.is_linear() => None,
        role if role.is_per_head() => Some(1.0),
        _ if place.expert.is_some() => {
            let ffn = spec.layers.get(place.layer? as usize)?.ffn.as_ref()?;
            Some(ffn.experts.map_or(1.0, |e| e.used as f64 / e.count as f64))
        }
        _ => Some(1.0),
    }
}

/// Random weights in a network's shape, every matrix in the form that a recipe gives it: for clocks, which see bytes
/// and not values.
pub struct Shaped {
    spec: Spec,
    tensors: HashMap<Place, Arc<Stored>>,
}

impl Shaped {
    /// Weights for `spec`; f16 where no step of the recipe aims. Matrices of one form share their values. An error
    /// where a method refuses its own grid, or a step drops or budgets whole parts, which takes a real model.
    pub fn new(spec: Spec, recipe: &Recipe) -> Result<Shaped, CompressError> {
        if let Some(step) = recipe.steps.iter().find(|s| s.is_model_wide()) {
            let what = "drops or budgets by what a real model does; random weights have nothing to say to it".into();
            return Err(CompressError::Method { place: "the whole model".into(), step: step.name.clone(), what });
        }
        recipe.check(&spec)?;
        let mut known: HashMap<String, Arc<Stored>> = HashMap::new();
        let mut tensors = HashMap::new();
        for place in spec.places() {
            let Some((rows, cols)) = spec.shape(&place) else { continue };
            if place.part != Part::Weight || !(place.role.is_linear() || place.role.is_lookup()) {
                let ones = Mat::from_fn(rows, cols, |_, _| if place.part == Part::Weight { 1.0 } else { 0.0 });
                let made = pack_float(ones.view(), None, PatternKind::Dense, Float::F32);
                let made = made.map_err(|e| packing(&place, e))?;
                tensors.insert(place, Arc::new(Stored::from_piece(made)));
                continue;
            }
            let steps: Vec<&RecipeStep> =
                recipe.local().map(|(_, s)| s).filter(|s| s.local(&place).is_some()).collect();
            let key = format!("{rows} {cols} {}", steps.iter().map(|s| asked(s, &place)).collect::<String>());
            let stored = match known.get(&key) {
                Some(stored) => stored.clone(),
                None => {
                    let made = sampled(&place, &steps, rows, cols)?;
                    known.insert(key, made.clone());
                    made
                }
            };
            tensors.insert(place, stored);
        }
        Ok(Shaped { spec, tensors })
    }
}

impl Weights for Shaped {
    fn spec(&self) -> &Spec {
        &self.spec
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        Ok(self.tensors.get(place).cloned())
    }
}

/// What a step does at a place, as text that tells forms apart.
fn asked(s: &RecipeStep, place: &Place) -> String {
    // One object stands for one set of keys.
    format!("{} {:p} ", s.name, s.local(place).map_or(std::ptr::null(), |l| std::ptr::from_ref(l).cast::<u8>()))
}

/// Random values in the form that `steps` give, and how many times more rows the matrix has.
fn sample(place: &Place, steps: &[&RecipeStep], rows: usize, cols: usize) -> Result<(Arc<Stored>, f64), CompressError> {
    let few = rows.min((SAMPLE / cols.max(1)).next_multiple_of(64));
    Ok((sampled(place, steps, few, cols)?, rows as f64 / few.max(1) as f64))
}

/// The same, `few` rows of it and no more.
fn sampled(place: &Place, steps: &[&RecipeStep], few: usize, cols: usize) -> Result<Arc<Stored>, CompressError> {
    let mut rng = Rng::new(0);
    let mut m = Unpacked::dense(Mat::from_fn(few, cols, |_, _| rng.normal()));
    for (i, step) in steps.iter().enumerate() {
        if let Some(local) = step.local(place) {
            m = local.foretell(m, i as u64 + 1).map_err(|e| at_step(step, place, e))?;
        }
    }
    m.pack(Float::F32).map(Arc::new).map_err(|e| packing(place, e))
}

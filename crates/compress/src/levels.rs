//! A database of levels: every matrix as each of several recipes leaves it, calibrated on the source, kept in a scratch
//! file; and models stitched from it.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use lacuna_checkpoint::{Checkpoint, Imatrix};
use lacuna_contract::{Ask, Site};
use lacuna_format::{Stored, Weights, WeightsError};
use lacuna_model::{Block, NoTap};
use lacuna_spec::{Part, Place, Role, Spec};
use serde_json::{Value, json};

use crate::account::{CompressError, Options, Progress};
use crate::calibrate::Statistics;
use crate::drive::{SOURCE, Walk};
use crate::error::relative_error;
use crate::local::{Chosen, asks, fits};
use crate::memory;
use crate::overlay::{Overlay, finite, need, release_layer};
use crate::recipe::Recipe;
use crate::scratch::Scratch;
use crate::sequences::cut;

/// A matrix at one level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AtLevel {
    /// The recipe, by index; `None`: as it came.
    pub recipe: Option<usize>,
    /// Bytes as stored.
    pub bytes: u64,
    /// `‖(W - W') X‖² / ‖W X‖²` on the calibration text, where the statistics tell; else of the weights alone.
    pub error: f64,
    kept: usize,
}

/// A matrix and its levels: as it came, the first, and everything smaller that a recipe makes of it.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Which.
    pub place: Place,
    /// Its weights.
    pub parameters: u64,
    /// What it may become.
    pub levels: Vec<AtLevel>,
}

/// The database.
pub struct Levels<'a> {
    source: &'a Checkpoint,
    /// The matrices that can change, in the order of the network.
    pub choices: Vec<Choice>,
    /// Bytes of all that cannot.
    pub rest_bytes: u64,
    /// Matrices of experts that no calibration token reached: they may only become what needs no statistics.
    pub unreached: BTreeSet<Place>,
    /// What there is to say of the calibration.
    pub notes: Vec<String>,
    scratch: Mutex<Scratch>,
}

/// The model that an assignment stitches together.
pub struct Stitch<'a> {
    levels: &'a Levels<'a>,
    chosen: HashMap<Place, usize>,
}

impl Weights for Stitch<'_> {
    fn spec(&self) -> &Spec {
        self.levels.source.spec()
    }

    fn get(&self, place: &Place) -> Result<Option<Arc<Stored>>, WeightsError> {
        let Some(&kept) = self.chosen.get(place) else { return self.levels.source.get(place) };
        let mut scratch = self.levels.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let bad = |e: std::io::Error| WeightsError::Bad {
            file: "scratch".into(),
            tensor: place.to_string(),
            what: e.to_string(),
        };
        scratch.get(kept).map(|s| Some(Arc::new(s))).map_err(bad)
    }

    fn release(&self, place: &Place) {
        self.levels.source.release(place);
    }
}

impl Levels<'_> {
    /// The model in which choice `i` is at level `assignment[i]`. Panics for another number of choices.
    #[track_caller]
    pub fn stitch(&self, assignment: &[usize]) -> Stitch<'_> {
        assert_eq!(assignment.len(), self.choices.len(), "an assignment for other choices");
        let all = self.choices.iter().zip(assignment).map(|(c, &l)| (c.place, c.levels[l]));
        let chosen = all.filter(|(_, l)| l.recipe.is_some()).map(|(p, l)| (p, l.kept)).collect();
        Stitch { levels: self, chosen }
    }

    /// Bytes of the whole model at an assignment.
    pub fn bytes(&self, assignment: &[usize]) -> u64 {
        self.rest_bytes + self.choices.iter().zip(assignment).map(|(c, &l)| c.levels[l].bytes).sum::<u64>()
    }

    /// Choice `i` at level `l`.
    pub fn stored(&self, i: usize, l: usize) -> Result<Arc<Stored>, WeightsError> {
        let c = &self.choices[i];
        let chosen = c.levels[l].recipe.map(|_| (c.place, c.levels[l].kept)).into_iter().collect();
        let stored = Stitch { levels: self, chosen }.get(&c.place)?;
        stored.ok_or_else(|| WeightsError::Bad {
            file: "scratch".into(),
            tensor: c.place.to_string(),
            what: "it is not there".into(),
        })
    }

    /// Bytes on disk.
    pub fn scratch_bytes(&self) -> u64 {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).bytes()
    }
}

/// Where levels are made, and of what beside the text.
#[derive(Clone, Copy, Debug)]
pub struct Room<'a> {
    /// The folder of the scratch file.
    pub scratch: &'a Path,
    /// Ceiling of the whole process in bytes.
    pub max_ram: Option<u64>,
    /// Put before each calibration sequence.
    pub bos: Option<u32>,
    /// Squares of inputs, in the place of the text's.
    pub imatrix: Option<&'a Imatrix>,
}

/// Makes every matrix that a recipe aims at as that recipe's steps leave it, each from the source and calibrated on it
/// (`tokens`). Recipes hold steps on single matrices only, and share one calibration: that of the first. A place that a
/// recipe's steps cannot work on (its shape does not divide) has no such level.
pub fn levels<'a>(
    source: &'a Checkpoint,
    tokens: &[u32],
    recipes: &[Recipe],
    room: &Room<'_>,
    progress: &mut dyn Progress,
) -> Result<Levels<'a>, CompressError> {
    let Room { scratch, max_ram, bos, imatrix } = *room;
    let overlay = Overlay::new(source);
    let spec = overlay.spec.clone();
    let mut notes = Vec::new();
    let sequences = match recipes.iter().find(|r| r.calibrates(&spec)) {
        Some(recipe) => cut(tokens, recipe, bos, &mut notes)?,
        None => Vec::new(),
    };
    let mut plan: Option<memory::Plan> = None;
    for recipe in recipes {
        let mine = memory::plan(&spec, recipe, &sequences, max_ram)?;
        plan = Some(plan.map_or(mine, |p| memory::Plan {
            spill: p.spill || mine.spill,
            floor: p.floor.max(mine.floor),
            scratch_bytes: p.scratch_bytes.min(mine.scratch_bytes),
        }));
    }
    let Some(plan) = plan else {
        return Ok(Levels {
            source,
            choices: Vec::new(),
            rest_bytes: 0,
            unreached: BTreeSet::new(),
            notes,
            scratch: Mutex::new(Scratch::new(scratch).map_err(|e| fault(scratch, e))?),
        });
    };
    let (identity, nowhere) = (Value::Null, scratch.join("levels"));
    let options = Options {
        out: &nowhere,
        overwrite: false,
        resume: false,
        scratch: Some(scratch),
        max_ram,
        bos,
        imatrix,
        source: json!(null),
    };
    let mut walk = Walk::new(&recipes[0], &options, progress, source, tokens, sequences, plan, &identity);
    let mut made = Making {
        recipes,
        kept: Scratch::new(scratch).map_err(|e| fault(scratch, e))?,
        choices: Vec::new(),
        rest_bytes: 0,
    };
    let wants = |l: usize| recipes.iter().flat_map(|r| asks(r, &Chosen::default(), &spec, l)).collect::<Vec<_>>();
    let head = walk.of_head(&overlay, &at_head(&spec, recipes))?;
    let mut x = walk.embedded(&overlay)?;
    walk.progress.phase("every matrix at every level", spec.layers.len() as u64);
    for place in spec.places().into_iter().filter(|p| p.layer.is_none()) {
        made.places(&mut walk, &overlay, &[place], &head)?;
    }
    for l in 0..spec.layers.len() {
        let places = spec.layer_places(l);
        let mut gather = walk.gather(&spec, wants(l));
        if gather.is_needed() {
            for p in &places {
                finite(p, &*need(&overlay, p)?, SOURCE)?;
            }
            let block = Block::load(&overlay, l)?;
            walk.through(&spec, &block, &mut x, &mut gather, true)?;
        } else if !walk.sequences.is_empty() && (l..spec.layers.len()).any(|l| walk.gather(&spec, wants(l)).is_needed())
        {
            let block = Block::load(&overlay, l)?;
            walk.through(&spec, &block, &mut x, &mut NoTap, true)?;
        }
        made.places(&mut walk, &overlay, &places, &gather.finish())?;
        release_layer(&overlay, l);
        walk.progress.step(l as u64 + 1, &format!("layer {l}"));
    }
    let Making { kept, mut choices, rest_bytes, .. } = made;
    choices.sort_by_key(|c| c.place);
    Ok(Levels { source, choices, rest_bytes, unreached: walk.unreached, notes, scratch: Mutex::new(kept) })
}

fn fault(dir: &Path, source: std::io::Error) -> CompressError {
    CompressError::Scratch { dir: dir.display().to_string(), source }
}

/// What recipes read of what multiplies the output projection.
fn at_head(spec: &Spec, recipes: &[Recipe]) -> Vec<(Site, Ask)> {
    recipes.iter().flat_map(|r| r.at_head(spec)).collect()
}

struct Making<'r> {
    recipes: &'r [Recipe],
    kept: Scratch,
    choices: Vec<Choice>,
    rest_bytes: u64,
}

impl<'r> Making<'r> {
    /// Makes the levels of places whose statistics are known.
    fn places(
        &mut self,
        walk: &mut Walk<'r>,
        overlay: &Overlay<'_>,
        places: &[Place],
        statistics: &Statistics,
    ) -> Result<(), CompressError> {
        let spec = &overlay.spec;
        let mut sources = HashMap::new();
        for p in places {
            sources.insert(*p, need(overlay, p)?);
        }
        let mut found: HashMap<Place, Vec<AtLevel>> = HashMap::new();
        for (i, recipe) in self.recipes.iter().enumerate() {
            walk.recipe = recipe;
            let aimed: Vec<Place> =
                places.iter().copied().filter(|p| p.part == Part::Weight && fits(recipe, spec, p)).collect();
            for (place, stored) in walk.local_steps(spec, &aimed, &sources, statistics)? {
                let stats = statistics.of(spec, Site::Matrix(place));
                let error = relative_error(&sources[&place], &stored, &stats).unwrap_or(0.0);
                let kept = self.kept.put(&stored).map_err(walk.scratch_error())?;
                let level = AtLevel { recipe: Some(i), bytes: stored.bytes(), error, kept };
                found.entry(place).or_default().push(level);
            }
        }
        for p in places {
            let source = &sources[p];
            match found.remove(p) {
                None => self.rest_bytes += source.bytes(),
                Some(more) => {
                    let mut levels =
                        vec![AtLevel { recipe: None, bytes: source.bytes(), error: 0.0, kept: usize::MAX }];
                    // What is no smaller than the source is no choice.
                    levels.extend(more.into_iter().filter(|l| l.bytes < source.bytes()));
                    if levels.len() == 1 {
                        self.rest_bytes += source.bytes();
                        continue;
                    }
                    let parameters = source.rows as u64 * source.cols as u64;
                    self.choices.push(Choice { place: *p, parameters, levels });
                }
            }
            overlay.release(p);
        }
        Ok(())
    }
}

impl Walk<'_> {
    /// Statistics of what multiplies the output projection, gathered on the source; none where nobody asks.
    pub(crate) fn of_head(
        &mut self,
        overlay: &Overlay<'_>,
        asked: &[(Site, Ask)],
    ) -> Result<Statistics, CompressError> {
        let mut gather = self.gather(&overlay.spec, asked.iter().copied());
        if !gather.is_needed() || self.sequences.is_empty() {
            return Ok(gather.finish());
        }
        let layers = overlay.spec.layers.len();
        let mut x = self.embedded(overlay)?;
        self.progress.phase("what the output projection reads", layers as u64);
        for l in 0..layers {
            for p in overlay.spec.layer_places(l) {
                finite(&p, &*need(overlay, &p)?, SOURCE)?;
            }
            let block = Block::load(overlay, l)?;
            self.through(&overlay.spec, &block, &mut x, &mut NoTap, true)?;
            release_layer(overlay, l);
            self.progress.step(l as u64 + 1, &format!("layer {l}"));
        }
        let head = lacuna_model::Head::load(overlay)?;
        let place = Place::global(if overlay.spec.tied { Role::Embed } else { Role::Head });
        for i in 0..x.len() {
            let m = x.take(i).map_err(self.scratch_error())?;
            gather.see(&place, head.input(m.view()).view());
        }
        Ok(gather.finish())
    }
}

//! The walk: model-wide steps, then block after block, each calibrated on what the compressed earlier blocks put out.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lacuna_base::Mat;
use lacuna_checkpoint::{Checkpoint, Imatrix, PackedWriter};
use lacuna_contract::{Ask, MethodError, Site};
use lacuna_format::{Float, FormatError, PatternKind, Stored, Weights, pack_float};
use lacuna_model::{Block, Embedding, NoTap, Tap};
use lacuna_spec::{Place, Role, Spec};
use serde_json::{Value, json};
use sha2::Digest;

use crate::account::{CompressError, Options, Outcomes, Progress, TensorReport};
use crate::activations::Activations;
use crate::calibrate::gradients::Gradients;
use crate::calibrate::{Gather, Statistics};
use crate::error::relative_error;
use crate::identity;
use crate::local::{Chosen, asks};
use crate::memory;
use crate::overlay::{Overlay, finite, forward, need, packing, read_back, release_layer, report};
use crate::recipe::{Recipe, RecipeStep, Rest};
use crate::sequences::{cut, fingerprint};
use crate::trials;

/// Compresses `source` by `recipe`, calibrating on `tokens`, into a packed model at `options.out`.
pub fn compress(
    source: &Checkpoint,
    tokens: &[u32],
    recipe: &Recipe,
    options: &Options<'_>,
    progress: &mut dyn Progress,
) -> Result<Outcomes, CompressError> {
    recipe.check(source.spec())?;
    let mut notes = Vec::new();
    let sequences =
        if recipe.calibrates(source.spec()) { cut(tokens, recipe, options.bos, &mut notes)? } else { Vec::new() };
    let mut overlay = Overlay::new(source);
    let plan = memory::plan(&overlay.spec, recipe, &sequences, options.max_ram)?;
    let calibration = (sequences.len(), sequences.first().map_or(0, Vec::len));
    let mut identity = json!({
        "recipe": recipe.resolved, "source": options.source, "files": identity::fingerprint(source), "bos": options.bos,
        "sequences": calibration, "text": fingerprint(&sequences), "program": identity::revision(),
    });
    if recipe.steps.iter().any(RecipeStep::reads_vocabulary) {
        // Which tokens stay depends on all of the text.
        identity["tokens"] = fingerprint(&[tokens.to_vec()]).into();
    }
    if let Some(m) = options.imatrix {
        identity["imatrix"] = imatrix_fits(m, recipe, source.spec())?.into();
    }
    let mut writer =
        PackedWriter::open(options.out, options.overwrite, options.resume, &identity, source.spec().places().len())?;
    let mut walk = Walk::new(recipe, options, progress, source, tokens, sequences, plan, &identity);
    walk.backward(&overlay, &mut notes)?;
    walk.model_wide(&mut overlay, &mut notes)?;
    recipe.check_local(&overlay.spec)?;
    walk.kept.iter().for_each(|kept| writer.keep_tokens(kept));
    let asked = recipe.at_head(&overlay.spec);
    let head = walk.of_head(&overlay, &asked)?;
    if !asked.is_empty() {
        notes.push("the output projection is calibrated on what the source's blocks put out".into());
    }
    let mut tensors = Vec::new();
    let first = [
        Role::Embed,
        Role::Positions,
        Role::EmbedNorm,
        Role::LayerInputs,
        Role::InputsIn,
        Role::InputsNorm,
        Role::AltupIn,
    ];
    walk.globals(&mut overlay, &mut writer, &first, &head, &mut tensors)?;
    walk.blocks(&mut overlay, &mut writer, &mut tensors)?;
    walk.globals(&mut overlay, &mut writer, &[Role::AltupOut, Role::FinalNorm, Role::Head], &head, &mut tensors)?;
    if let Some(first) = walk.unreached.first() {
        let n = walk.unreached.len();
        notes.push(format!("{n} matrices, {first} the first, keep what they were: no calibration token reached them"));
    }
    if let Some(first) = walk.wide.first() {
        let n = walk.wide.len();
        notes.push(format!("{n} matrices, {first} the first, have values beyond f16: they are stored as bf16 or f32"));
    }
    let recipe_json = serde_json::to_value(&recipe.resolved).unwrap_or(Value::Null);
    let approximations = recipe.steps.iter().map(RecipeStep::describe).collect();
    let path =
        writer.finish(overlay.spec.clone(), recipe_json, options.source.clone(), approximations, Some(source))?;
    recipe.steps.iter().filter(|s| s.is_model_wide()).for_each(|s| trials::forget(options.out, &s.name));
    let bytes = tensors.iter().map(|t| t.bytes_after).sum();
    Ok(Outcomes { path, bytes, spec: overlay.spec, tensors, calibration, kept: walk.kept, notes })
}

/// Whether any step reads what an imatrix tells.
pub fn reads_imatrix(recipe: &Recipe, spec: &Spec) -> bool {
    let reads = |l| asks(recipe, &Chosen::default(), spec, l);
    let mut all = (0..spec.layers.len()).flat_map(reads).chain(recipe.at_head(spec));
    all.any(|(_, ask)| ask == Ask::InputSquares)
}

/// The sha256 of an imatrix's numbers; an error where a recipe makes matrices that it does not know, or reads none of it.
pub(crate) fn imatrix_fits(imatrix: &Imatrix, recipe: &Recipe, spec: &Spec) -> Result<String, CompressError> {
    let refuse = |what: String| Err(CompressError::Imatrix { what });
    if let Some(s) = recipe.steps.iter().find(|s| s.is_model_wide()) {
        return refuse(format!("step '{}' changes the network that the imatrix is of", s.name));
    }
    if !reads_imatrix(recipe, spec) {
        return refuse(
            "no step of the recipe reads the squares of inputs; weighted-rtn, wanda and `importance = true` do".into(),
        );
    }
    let mut h = sha2::Sha256::new();
    for (place, (tokens, squares)) in imatrix.all() {
        h.update(format!("{place} {tokens}"));
        squares.iter().for_each(|s| h.update(s.to_le_bytes()));
    }
    Ok(identity::hex(h))
}

/// Whose weights are looked at before anything is done to them.
pub(crate) const SOURCE: &str = "the source's weight";

pub(crate) struct Walk<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) options: &'a Options<'a>,
    pub(crate) progress: &'a mut dyn Progress,
    /// The model as it came, and all of the calibration text in its tokens.
    pub(crate) source: &'a Checkpoint,
    pub(crate) tokens: &'a [u32],
    /// The source's tokens that stay, where some went.
    pub(crate) kept: Option<Vec<usize>>,
    /// What is calibrated on, in the tokens that the model has by now.
    pub(crate) sequences: Vec<Vec<u32>>,
    pub(crate) spill: bool,
    /// Bytes that steps may take at once, beside matrices and statistics.
    pub(crate) scratch_bytes: u64,
    /// What searches chose.
    pub(crate) chosen: Chosen,
    /// What backward passes gave, where a step asked for it.
    pub(crate) gradients: Option<Gradients>,
    /// What must be equal for a run to be gone on with.
    pub(crate) identity: &'a Value,
    /// Matrices (of experts) that a step left alone since no calibration token reached them.
    pub(crate) unreached: BTreeSet<Place>,
    /// Matrices whose values f16 cannot say.
    pub(crate) wide: BTreeSet<Place>,
}

impl<'a> Walk<'a> {
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        recipe: &'a Recipe,
        options: &'a Options<'a>,
        progress: &'a mut dyn Progress,
        source: &'a Checkpoint,
        tokens: &'a [u32],
        sequences: Vec<Vec<u32>>,
        plan: memory::Plan,
        identity: &'a Value,
    ) -> Walk<'a> {
        Walk {
            recipe,
            options,
            progress,
            source,
            tokens,
            kept: None,
            sequences,
            spill: plan.spill,
            scratch_bytes: plan.scratch_bytes,
            chosen: Chosen::default(),
            gradients: None,
            identity,
            unreached: BTreeSet::new(),
            wide: BTreeSet::new(),
        }
    }
}

impl Walk<'_> {
    pub(crate) fn scratch_dir(&self) -> PathBuf {
        if let Some(dir) = self.options.scratch {
            return dir.to_owned();
        }
        let parent = self.options.out.parent().filter(|p| !p.as_os_str().is_empty());
        parent.map_or_else(|| PathBuf::from("."), Path::to_owned)
    }

    pub(crate) fn scratch_error(&self) -> impl Fn(std::io::Error) -> CompressError + use<> {
        let dir = self.scratch_dir().display().to_string();
        move |source| CompressError::Scratch { dir: dir.clone(), source }
    }

    /// A gathering that knows what the user's imatrix tells.
    pub(crate) fn gather(&self, spec: &Spec, asks: impl IntoIterator<Item = (Site, Ask)>) -> Gather {
        Gather::knowing(self.options.imatrix, spec, asks)
    }

    /// The embedded sequences.
    pub(crate) fn embedded(&self, weights: &dyn Weights) -> Result<Activations, CompressError> {
        let dir = self.scratch_dir();
        let lens = self.sequences.iter().map(Vec::len).collect();
        let mut x = Activations::new(lens, weights.spec().carried(), self.spill.then_some(dir.as_path()))
            .map_err(self.scratch_error())?;
        if self.sequences.is_empty() {
            return Ok(x);
        }
        let embed = Embedding::load(weights)?;
        for (i, s) in self.sequences.iter().enumerate() {
            let positions: Vec<usize> = (0..s.len()).collect();
            x.put(i, embed.rows(s, &positions)?.into_mat()).map_err(self.scratch_error())?;
        }
        Ok(x)
    }

    /// Gradients of the source, where any step reads them: taken before anything changes.
    fn backward(&mut self, overlay: &Overlay<'_>, notes: &mut Vec<String>) -> Result<(), CompressError> {
        let asked = memory::gradients_asked(&overlay.spec, self.recipe);
        if asked.is_empty() {
            return Ok(());
        }
        for l in 0..overlay.spec.layers.len() {
            for place in overlay.spec.layer_places(l) {
                finite(&place, &*need(overlay, &place)?, SOURCE)?;
            }
            release_layer(overlay, l);
        }
        let dir = self.scratch_dir();
        let progress = &mut self.progress;
        let mut begun = false;
        let mut tell = |at: usize, all: usize| {
            if !std::mem::replace(&mut begun, true) {
                progress.phase("gradients of the source", all as u64);
            }
            progress.step(at as u64, "there and back");
        };
        let made = Gradients::gather(overlay, &self.sequences, &asked, &dir, self.spill, &mut tell)?;
        notes.push(
            "gradients are those of the source: steps that read them do not see what earlier blocks became".into(),
        );
        self.gradients = Some(made);
        Ok(())
    }

    /// Statistics with what backward passes gave for the same matrices.
    pub(crate) fn with_gradients(
        &mut self,
        statistics: Statistics,
        places: &[Place],
    ) -> Result<Statistics, CompressError> {
        match &mut self.gradients {
            None => Ok(statistics),
            Some(g) => Ok(statistics.with_gradients(g.of(places)?, g.seen)),
        }
    }

    /// Runs every sequence through `block`, keeping what comes out if `keep`.
    pub(crate) fn through(
        &self,
        spec: &Spec,
        block: &Block,
        x: &mut Activations,
        tap: &mut dyn Tap,
        keep: bool,
    ) -> Result<(), CompressError> {
        for i in 0..x.len() {
            let mut m = x.take(i).map_err(self.scratch_error())?;
            let before = if keep { None } else { Some(m.clone()) };
            forward(spec, block, &mut m, tap)?;
            finite_stream(block.layer(), &m)?;
            x.put(i, before.unwrap_or(m)).map_err(self.scratch_error())?;
        }
        Ok(())
    }

    /// Tensors outside the blocks.
    fn globals(
        &mut self,
        overlay: &mut Overlay<'_>,
        writer: &mut PackedWriter,
        roles: &[Role],
        statistics: &Statistics,
        tensors: &mut Vec<TensorReport>,
    ) -> Result<(), CompressError> {
        let places: Vec<Place> =
            overlay.spec.places().into_iter().filter(|p| p.layer.is_none() && roles.contains(&p.role)).collect();
        for place in places {
            let source = need(overlay, &place)?;
            let stored = match writer.read(&place)? {
                Some(s) => Arc::new(s),
                None => {
                    let sources = HashMap::from([(place, source.clone())]);
                    let made = self.local_steps(&overlay.spec, &[place], &sources, statistics)?;
                    let new = self.finished(made.into_iter().next().map(|(_, s)| s), &source, &place)?;
                    writer.put(&place, &new)?;
                    new
                }
            };
            let stats = statistics.of(&overlay.spec, Site::Matrix(place));
            tensors.push(report(&place, &source, &stored, relative_error(&source, &stored, &stats)));
            overlay.new.insert(place, stored);
            overlay.release(&place);
        }
        Ok(())
    }

    /// What is saved of a tensor that steps made into `made`, or left alone.
    fn finished(
        &self,
        made: Option<Arc<Stored>>,
        source: &Arc<Stored>,
        place: &Place,
    ) -> Result<Arc<Stored>, CompressError> {
        let stored = made.unwrap_or_else(|| source.clone());
        if !Arc::ptr_eq(&stored, source) || self.recipe.rest != Rest::F16 {
            return Ok(stored);
        }
        let float = if stored.rows == 1 { Float::F32 } else { Float::F16 };
        let piece = pack_float(source.to_mat().view(), None, PatternKind::Dense, float).map_err(|e: FormatError| {
            packing(place, FormatError::new(format!("{}; rest = \"source\" keeps it as it is", e.what)))
        })?;
        Ok(Arc::new(Stored::from_piece(piece)))
    }

    /// The blocks, first to last.
    fn blocks(
        &mut self,
        overlay: &mut Overlay<'_>,
        writer: &mut PackedWriter,
        tensors: &mut Vec<TensorReport>,
    ) -> Result<(), CompressError> {
        let layers = overlay.spec.layers.len();
        let mut x = self.embedded(overlay)?;
        let calibrates =
            |spec: &Spec, l: usize| self.gather(spec, asks(self.recipe, &self.chosen, spec, l)).is_needed();
        let last = (0..layers).rev().find(|&l| calibrates(&overlay.spec, l));
        self.progress.phase("compressing", layers as u64);
        for l in 0..layers {
            let places = overlay.spec.layer_places(l);
            let done = places.iter().all(|p| writer.is_done(p));
            let mut sources = HashMap::new();
            for p in &places {
                sources.insert(*p, need(overlay, p)?);
            }
            let mut gather = self.gather(&overlay.spec, asks(self.recipe, &self.chosen, &overlay.spec, l));
            if !done && gather.is_needed() {
                for (p, source) in &sources {
                    finite(p, source, SOURCE)?;
                }
                let block = Block::load(overlay, l)?;
                self.through(&overlay.spec, &block, &mut x, &mut gather, false)?;
            }
            let statistics = if done { Statistics::default() } else { self.with_gradients(gather.finish(), &places)? };
            let made = if done {
                read_back(Some(writer), &places)?
            } else {
                let mut made: HashMap<Place, Arc<Stored>> =
                    self.local_steps(&overlay.spec, &places, &sources, &statistics)?.into_iter().collect();
                let finished = |p: &Place| Ok((*p, self.finished(made.remove(p), &sources[p], p)?));
                let made = places.iter().map(finished).collect::<Result<Vec<_>, CompressError>>()?;
                writer.put_all(&made)?;
                made
            };
            for (place, stored) in &made {
                let stats = statistics.of(&overlay.spec, Site::Matrix(*place));
                tensors.push(report(place, &sources[place], stored, relative_error(&sources[place], stored, &stats)));
            }
            drop(statistics);
            drop(sources);
            // Later blocks see this one as it is stored.
            if last.is_some_and(|last| l < last) {
                overlay.new.extend(made);
                let block = Block::load(overlay, l)?;
                self.through(&overlay.spec, &block, &mut x, &mut NoTap, true)?;
                overlay.new.retain(|p, _| p.layer.is_none());
            }
            release_layer(overlay, l);
            self.progress.step(l as u64 + 1, &format!("layer {l}"));
        }
        Ok(())
    }
}

/// Refuses what comes out of a block where it is not finite: every later block would be blamed for it.
pub(crate) fn finite_stream(layer: usize, x: &Mat) -> Result<(), CompressError> {
    match x.data().iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => {
            let (token, v) = (i / x.cols().max(1), x.data()[i]);
            let what =
                format!("what the block puts out at token {token} of the calibration text is {v}, not a finite number");
            Err(CompressError::NotFinite { place: format!("layers.{layer}"), what })
        }
    }
}

pub(crate) fn at_step(step: &RecipeStep, place: impl std::fmt::Display, e: MethodError) -> CompressError {
    CompressError::Method { place: place.to_string(), step: step.name.clone(), what: e.what }
}

//! Recipes: ordered steps in TOML, checked against the registry before anything runs.
//!
//! A step's own keys are its family's and its method's: they are made into a [`Step`] by the family and never looked at
//! here.

use std::collections::BTreeMap;

use lacuna_contract::{Ask, Card, Left, Local, Making, Method, MethodError, Registry, Site, Step, Varied};
use lacuna_spec::{Part, Place, Role, Spec, Target};
use serde::{Deserialize, Serialize};
use serde_json::Map;
use toml::{Table, Value};

use crate::calibrate::mapped::lost;
use crate::local::has_inputs;

/// A recipe that cannot be followed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct RecipeError {
    /// What is wrong, naming the step and the key.
    pub what: String,
}

fn err<T>(what: impl Into<String>) -> Result<T, RecipeError> {
    Err(RecipeError { what: what.into() })
}

/// How calibration text is cut.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Sequences.
    #[serde(default = "default_samples")]
    pub samples: usize,
    /// Tokens of a sequence.
    #[serde(default = "default_seq_len")]
    pub seq_len: usize,
    /// 0: the first sequences of the text, one after the other. Otherwise random starts drawn from this seed.
    #[serde(default)]
    pub seed: u64,
    /// Put in by Lacuna when it saves the resolved recipe: the sha256 of the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_sha256: Option<String>,
}

fn default_samples() -> usize {
    32
}

fn default_seq_len() -> usize {
    1024
}

impl Default for Calibration {
    fn default() -> Calibration {
        Calibration { samples: default_samples(), seq_len: default_seq_len(), seed: 0, text_sha256: None }
    }
}

/// What happens to tensors that no step touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rest {
    /// They keep their source encoding bit for bit.
    #[default]
    Source,
    /// Matrices are written as f16, vectors as f32.
    F16,
}

/// A parsed recipe whose steps are made.
pub struct Recipe {
    /// How to calibrate.
    pub calibration: Calibration,
    /// What happens to untouched tensors.
    pub rest: Rest,
    /// The steps, in order.
    pub steps: Vec<RecipeStep>,
    /// The recipe as resolved (defaults and `--set` applied), for saving.
    pub resolved: Table,
}

/// One step.
pub struct RecipeStep {
    /// Unique; the verb unless given.
    pub name: String,
    /// Who answers.
    pub card: Card,
    /// What it aims at.
    pub targets: Vec<Target>,
    step: Step,
    /// Places where other keys hold, or where the step does nothing; the last one that matches decides.
    except: Vec<(Vec<Target>, Option<Step>)>,
    made_from: MadeFrom,
    /// The step with each value that a search varies.
    pub(crate) variants: Vec<RecipeStep>,
    /// In a variant: the value, where it is a number.
    varied: f64,
}

/// What a step was made from: a search makes it again with a key changed.
#[derive(Clone)]
struct MadeFrom {
    method: Method,
    keys: Keys,
    except: Vec<(Vec<Target>, Option<Keys>)>,
}

/// A step's own keys.
type Keys = Map<String, serde_json::Value>;

impl RecipeStep {
    /// The step itself, as it is where no exception holds.
    pub fn step(&self) -> &Step {
        &self.step
    }

    /// For a local step: what works on `place`, if it aims there.
    pub fn local(&self, place: &Place) -> Option<&dyn Local> {
        if !self.targets.iter().any(|t| t.matches(place)) {
            return None;
        }
        let over = self.except.iter().rev().find(|(targets, _)| targets.iter().any(|t| t.matches(place)));
        match over.map_or(Some(&self.step), |(_, step)| step.as_ref())? {
            Step::Local(local) => Some(local.as_ref()),
            _ => None,
        }
    }

    /// Whether it asks for gradients anywhere.
    fn reads_gradients(&self) -> bool {
        self.asks(Ask::is_gradient)
    }

    /// Whether it asks, at any of its matrices, for a statistic that is `such`.
    fn asks(&self, such: impl Fn(Ask) -> bool) -> bool {
        let asks = |s: &Step| {
            let Step::Local(local) = s else { return false };
            local.needs(&Place::layer(0, Role::Up)).into_iter().any(&such)
        };
        asks(&self.step) || self.except.iter().any(|(_, s)| s.as_ref().is_some_and(asks))
    }

    /// Refuses patterns that mean nothing in any network, or nothing in this one.
    fn check_targets(&self, spec: &Spec) -> Result<(), RecipeError> {
        if self.is_model_wide() {
            return Ok(());
        }
        let places = spec.places();
        let means = |t: &Target| places.iter().any(|p| t.matches(p));
        let role = |t: &&Target| !means(t) && !Role::ALL.iter().any(|r| t.matches(&Place::global(*r)));
        let unknown = self.targets.iter().find(role);
        match unknown.or(self.targets.first().filter(|_| !self.targets.iter().any(means))) {
            None => Ok(()),
            Some(t) => {
                let known = Role::ALL.iter().filter(|r| places.iter().any(|p| p.role == **r && p.part == Part::Weight));
                let known: Vec<&str> = known.map(|r| r.name()).filter(|r| !r.contains("norm")).collect();
                err(format!(
                    "step '{}': the target \"{}\" is no matrix of this model; it has {} (write \"attn.*\", or \
                     \"layers.0.*\" for one layer)",
                    self.name,
                    t.0,
                    known.join(", ")
                ))
            }
        }
    }

    /// Whether the step works on the whole model before the blocks.
    pub fn is_model_wide(&self) -> bool {
        !matches!(self.step, Step::Local(_))
    }

    /// In words, for whoever loads the model.
    pub(crate) fn describe(&self) -> String {
        match self.step {
            Step::Local(_) => {
                let targets: Vec<&str> = self.targets.iter().map(|t| t.0.as_str()).collect();
                format!("{} by {} on {}", self.name, self.card.name, targets.join(", "))
            }
            _ => format!("{} by {}", self.name, self.card.name),
        }
    }

    /// The numbers that a search varies, where they are numbers.
    pub(crate) fn variant_values(&self) -> Vec<f64> {
        self.variants.iter().map(|v| v.varied).collect()
    }

    /// The statistics that it reads at `place`.
    pub fn needs(&self, place: &Place) -> Vec<Ask> {
        self.local(place).map_or_else(Vec::new, |l| l.needs(place))
    }

    /// Whether it reads any statistics of a network at all.
    fn calibrates(&self, spec: &Spec) -> bool {
        match &self.step {
            Step::Search(_) => true,
            Step::Model(model) => (0..spec.layers.len()).any(|l| !model.needs(spec, l).is_empty()),
            // Keys may ask for statistics that the method alone does not.
            Step::Local(_) => self.asks(|_| true) || self.variants.iter().any(|v| v.asks(|_| true)),
        }
    }

    /// Whether it reads the model's tokens and how often each stands in the calibration text.
    pub(crate) fn reads_vocabulary(&self) -> bool {
        matches!(&self.step, Step::Model(model) if model.reads_vocabulary())
    }

    fn make(name: &str, targets: Vec<Target>, from: MadeFrom, registry: &Registry) -> Result<RecipeStep, RecipeError> {
        let card = from.method.card.clone();
        let verb = from.keys.get("verb").and_then(|v| v.as_str()).unwrap_or(card.verb).to_owned();
        let fail = |e: MethodError| RecipeError { what: format!("step '{name}': {}", e.what) };
        let Some(family) = registry.family(&verb) else {
            let all: Vec<_> = registry.families.iter().map(|f| f.verb).collect();
            return err(format!("step '{name}': verb = \"{verb}\" is none of {}", all.join(", ")));
        };
        let one = |keys: &Keys| {
            let mut keys = keys.clone();
            keys.remove("verb");
            (family.make)(&Making { method: &from.method, keys: &keys, registry }).map_err(fail)
        };
        let step = one(&from.keys)?;
        let mut except = Vec::new();
        for (targets, over) in &from.except {
            let over = match over {
                None => None,
                Some(over) => {
                    let mut keys = from.keys.clone();
                    keys.extend(over.clone());
                    Some(one(&keys)?)
                }
            };
            except.push((targets.clone(), over));
        }
        if !except.is_empty() && !matches!(step, Step::Local(_)) {
            return err(format!("step '{name}' works on the whole model: it has no exceptions"));
        }
        Ok(RecipeStep {
            name: name.to_owned(),
            card,
            targets,
            step,
            except,
            made_from: from,
            variants: Vec::new(),
            varied: 0.0,
        })
    }

    /// The same step with `key` set to `value`, exceptions that set it themselves apart.
    fn with(&self, key: &str, value: &serde_json::Value, registry: &Registry) -> Result<RecipeStep, RecipeError> {
        let mut from = self.made_from.clone();
        from.keys.insert(key.to_owned(), value.clone());
        let made = RecipeStep::make(&self.name, self.targets.clone(), from, registry)?;
        Ok(RecipeStep { varied: value.as_f64().unwrap_or(0.0), ..made })
    }
}

fn targets(v: Option<Value>, at: &str) -> Result<Option<Vec<Target>>, RecipeError> {
    let Some(v) = v else { return Ok(None) };
    let list: Option<Vec<Target>> =
        v.as_array().and_then(|a| a.iter().map(|t| t.as_str().map(|s| Target(s.to_owned()))).collect());
    match list {
        Some(l) if !l.is_empty() => Ok(Some(l)),
        _ => err(format!("{at}: targets must be a list of roles or patterns like [\"attn.*\", \"ffn.down\"]")),
    }
}

impl Recipe {
    /// Reads a recipe. `sets` are `STEP.KEY=VALUE` overrides (`calibration.KEY=VALUE` works too).
    pub fn parse(text: &str, registry: &Registry, sets: &[String]) -> Result<Recipe, RecipeError> {
        let mut root: Table = text
            .parse()
            .map_err(|e: toml::de::Error| RecipeError { what: format!("not valid TOML: {}", e.message()) })?;
        apply_sets(&mut root, registry, sets)?;
        let resolved = root.clone();
        match root.remove("version").as_ref().and_then(Value::as_integer) {
            Some(1) => {}
            Some(v) => return err(format!("version = {v}: this Lacuna reads version 1")),
            None => return err("version = 1 is missing"),
        }
        let calibration: Calibration = match root.remove("calibration") {
            Some(v) => v
                .try_into()
                .map_err(|e: toml::de::Error| RecipeError { what: format!("calibration: {}", e.message()) })?,
            None => Calibration::default(),
        };
        if calibration.samples == 0
            || calibration.seq_len < 2
            || calibration.samples > 1 << 20
            || calibration.seq_len > 1 << 20
        {
            return err(format!(
                "calibration: {} samples of {} tokens; at least 1 of 2, at most a million each",
                calibration.samples, calibration.seq_len
            ));
        }
        let rest = match root.remove("rest") {
            Some(v) => v.try_into().map_err(|_| RecipeError { what: "rest must be \"source\" or \"f16\"".into() })?,
            None => Rest::Source,
        };
        for note in ["description", "source"] {
            root.remove(note);
        }
        let steps = match root.remove("step") {
            Some(Value::Array(a)) => a,
            Some(_) => return err("steps are written [[step]]"),
            None => Vec::new(),
        };
        if let Some(k) = root.keys().next() {
            return err(format!(
                "unknown key '{k}'; a recipe has version, description, calibration, rest and [[step]]"
            ));
        }
        let mut steps: Vec<RecipeStep> =
            steps.into_iter().enumerate().map(|(i, v)| step(i, v, registry)).collect::<Result<_, _>>()?;
        check_order(&steps)?;
        vary(&mut steps, registry)?;
        Ok(Recipe { calibration, rest, steps, resolved })
    }

    /// What steps read of what multiplies the output projection.
    pub(crate) fn at_head(&self, spec: &Spec) -> Vec<(Site, Ask)> {
        let places = spec.places().into_iter().filter(|p| p.layer.is_none() && has_inputs(spec, p));
        let of =
            |p: Place| self.local().flat_map(move |(_, s)| s.needs(&p).into_iter().map(move |a| (Site::Matrix(p), a)));
        places.flat_map(of).collect()
    }

    /// The steps that work on blocks, with their index.
    pub(crate) fn local(&self) -> impl Iterator<Item = (usize, &RecipeStep)> {
        self.steps.iter().enumerate().filter(|(_, s)| !s.is_model_wide())
    }

    /// Whether any step reads statistics of a network.
    pub fn calibrates(&self, spec: &Spec) -> bool {
        self.steps.iter().any(|s| s.calibrates(spec))
    }

    /// Holds every step against a network before work begins: shapes, and what cannot come after what.
    pub fn check(&self, spec: &Spec) -> Result<(), RecipeError> {
        self.check_local(spec)?;
        for step in &self.steps {
            step.check_targets(spec)?;
            if let Step::Model(m) = &step.step {
                let fail = |e: MethodError| RecipeError { what: format!("step '{}': {}", step.name, e.what) };
                m.check(spec).map_err(fail)?;
            }
        }
        Ok(())
    }

    /// The same for the steps that work on blocks: once more after model-wide steps, which change shapes.
    pub(crate) fn check_local(&self, spec: &Spec) -> Result<(), RecipeError> {
        for place in spec.places() {
            let (Part::Weight, Some(shape)) = (place.part, spec.shape(&place)) else { continue };
            let mut earlier: Vec<Left> = Vec::new();
            for (_, step) in self.local() {
                let Some(local) = step.local(&place) else { continue };
                let fail = |what: String| RecipeError { what: format!("step '{}' on {place}: {what}", step.name) };
                let needs = local.needs(&place);
                let none = !has_inputs(spec, &place) || needs.iter().any(|a| a.is_gradient());
                if place.layer.is_none() && !needs.is_empty() && none {
                    let why = "and nothing is multiplied with this matrix; use rtn";
                    return Err(fail(format!("{} needs statistics of its inputs, {why}", step.card.name)));
                }
                if let Some(mixes) = Left::mixes(&earlier) {
                    let mut needs = local.needs(&place).into_iter();
                    if let Some(ask) = needs.find(|ask| ask.behind(mixes).is_none()) {
                        return Err(fail(lost(ask)));
                    }
                }
                let left = local.check(shape, &earlier).map_err(|e| fail(e.what))?;
                for variant in &step.variants {
                    if let Some(local) = variant.local(&place) {
                        local.check(shape, &earlier).map_err(|e| fail(e.what))?;
                    }
                }
                earlier.push(left);
            }
        }
        Ok(())
    }
}

fn step(i: usize, v: Value, registry: &Registry) -> Result<RecipeStep, RecipeError> {
    let Value::Table(mut t) = v else { return err("steps are written [[step]]") };
    let at = format!("step {}", i + 1);
    let Some(name) = t.get("method").and_then(Value::as_str).map(str::to_owned) else {
        return err(format!("{at}: method = \"...\" is missing"));
    };
    let Some(method) = registry.method(&name) else {
        let all: Vec<_> = registry.methods.iter().map(|m| m.card.name).collect();
        return err(format!("{at}: no method is called '{name}'; there are {}", all.join(", ")));
    };
    let name = match t.get("name").or(t.get("verb")) {
        None => method.card.verb.to_owned(),
        Some(v) => {
            v.as_str().map(str::to_owned).ok_or_else(|| RecipeError { what: format!("{at}: name must be a text") })?
        }
    };
    let at = format!("step '{name}'");
    t.remove("method");
    t.remove("name");
    let aimed = t.contains_key("targets");
    let all = || ["attn.*", "mixer.*", "ffn.*"].map(|t| Target(t.into())).to_vec();
    let aims = targets(t.remove("targets"), &at)?.unwrap_or_else(all);
    let mut except = Vec::new();
    match t.remove("except") {
        None => {}
        Some(Value::Array(list)) => {
            for e in list {
                let Value::Table(mut e) = e else { return err(format!("{at}: except holds tables")) };
                let Some(tg) = targets(e.remove("targets"), &at)? else {
                    return err(format!("{at}: an exception needs targets"));
                };
                match e.remove("skip") {
                    None => except.push((tg, Some(keys(e, &at)?))),
                    Some(Value::Boolean(skip)) => except.push((tg, (!skip).then(|| keys(e, &at)).transpose()?)),
                    Some(v) => return err(format!("{at}: skip = {v} is neither true nor false")),
                }
            }
        }
        Some(_) => return err(format!("{at}: except is a list of tables")),
    }
    let from = MadeFrom { method: method.clone(), keys: keys(t, &at)?, except };
    let made = RecipeStep::make(&name, aims, from, registry)?;
    if aimed && made.is_model_wide() {
        return err(format!("{at}: works on the whole model and takes no targets"));
    }
    Ok(made)
}

fn keys(table: Table, at: &str) -> Result<Keys, RecipeError> {
    match serde_json::to_value(table) {
        Ok(serde_json::Value::Object(map)) => Ok(map),
        other => err(format!("{at}: {other:?} is no table of keys")),
    }
}

fn check_order(steps: &[RecipeStep]) -> Result<(), RecipeError> {
    let mut seen = BTreeMap::new();
    let (mut local, mut reshaped): (Option<&str>, Option<&str>) = (None, None);
    for s in steps {
        if seen.insert(s.name.as_str(), ()).is_some() {
            return err(format!("two steps are called '{}'; give one of them a name", s.name));
        }
        match (s.is_model_wide(), local) {
            (true, Some(before)) => {
                return err(format!("step '{}' works on the whole model and must come before '{before}'", s.name));
            }
            (false, _) => local = Some(&s.name),
            _ => {}
        }
        let reshapes = match &s.step {
            Step::Model(m) => m.reshapes(),
            Step::Search(search) => matches!(search.varies(), Varied::Sizes),
            Step::Local(_) => false,
        };
        if reshapes {
            reshaped.get_or_insert(&s.name);
        }
        if let (Some(before), true) = (reshaped, s.reads_gradients()) {
            return err(format!(
                "step '{}' reads gradients of the source's matrices, to which '{before}' gives other rows, columns or \
                 axes; compress in two commands, with '{before}' in the first",
                s.name
            ));
        }
    }
    Ok(())
}

/// Makes each step that a search varies once more for each value.
fn vary(steps: &mut [RecipeStep], registry: &Registry) -> Result<(), RecipeError> {
    for i in 0..steps.len() {
        let Step::Search(search) = &steps[i].step else { continue };
        let Varied::Key { step: name, key, values, .. } = search.varies() else { continue };
        let by = steps[i].name.clone();
        let Some(at) = steps.iter().position(|s| s.name == name && matches!(s.step, Step::Local(_))) else {
            return err(format!("step '{by}' varies a step called '{name}', and there is none"));
        };
        if !steps[at].variants.is_empty() {
            return err(format!("step '{by}' varies '{name}', which another search varies already"));
        }
        let made = values.iter().map(|v| steps[at].with(&key, v, registry)).collect::<Result<_, _>>();
        steps[at].variants = made.map_err(|e| RecipeError { what: format!("step '{by}' varies {key}: {}", e.what) })?;
    }
    Ok(())
}

fn apply_sets(root: &mut Table, registry: &Registry, sets: &[String]) -> Result<(), RecipeError> {
    for set in sets {
        let bad = || RecipeError { what: format!("--set {set}: write STEP.KEY=VALUE, for example prune.sparsity=0.6") };
        let (path, value) = set.split_once('=').ok_or_else(bad)?;
        let (name, key) = path.split_once('.').ok_or_else(bad)?;
        let value: Value = match format!("v = {value}").parse::<Table>() {
            Ok(mut t) => t.remove("v").ok_or_else(bad)?,
            Err(_) => Value::String(value.to_owned()),
        };
        if name == "calibration" {
            let table = root.entry("calibration").or_insert_with(|| Value::Table(Table::new()));
            table.as_table_mut().ok_or_else(bad)?.insert(key.to_owned(), value);
            continue;
        }
        let mut names = Vec::new();
        let mut done = false;
        if let Some(Value::Array(steps)) = root.get_mut("step") {
            for s in steps.iter_mut().filter_map(Value::as_table_mut) {
                let own =
                    s.get("name").or(s.get("verb")).and_then(Value::as_str).map(str::to_owned).or_else(|| {
                        Some(registry.method(s.get("method").and_then(Value::as_str)?)?.card.verb.to_owned())
                    });
                names.extend(own.clone());
                if own.as_deref() == Some(name) {
                    s.insert(key.to_owned(), value.clone());
                    done = true;
                }
            }
        }
        if !done {
            return err(format!("--set {set}: no step is called '{name}'; there are {}", names.join(", ")));
        }
    }
    Ok(())
}

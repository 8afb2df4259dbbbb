//! Recipes: ordered steps in TOML, checked against the registry before anything runs.
//!
//! Keys that a whole family understands (`sparsity`, `bits`, `keep`, ...) are read here; what is left of a step belongs to its method,
//! which refuses what it does not know.

use std::collections::BTreeMap;

use lacuna_contract::{DropPart, Made, Method, Scope, Sparsity, Verb};
use lacuna_format::Float;
use lacuna_spec::{Place, Target};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

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

/// A parsed recipe whose methods exist.
pub struct Recipe {
    /// How to calibrate.
    pub calibration: Calibration,
    /// What happens to untouched tensors.
    pub rest: Rest,
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// The recipe as resolved (defaults and `--set` applied), for saving.
    pub resolved: Table,
}

/// One step.
pub struct Step {
    /// Unique; the verb unless given.
    pub name: String,
    /// What is done with the answer.
    pub verb: Verb,
    /// Who answers.
    pub method: Method,
    /// The method, made from its own keys.
    pub made: Made,
    /// The grid for solvers that round.
    pub grid: Option<Made>,
    /// What it aims at.
    pub targets: Vec<Target>,
    keys: Keys,
    except: Vec<(Vec<Target>, Keys)>,
}

/// The keys of all families; each verb accepts its own.
#[derive(Clone, Debug, Default, PartialEq)]
struct Keys {
    sparsity: Option<f64>,
    pattern: Option<Sparsity>,
    scope: Option<Scope>,
    bits: Option<u8>,
    group: Option<usize>,
    symmetric: Option<bool>,
    scale: Option<Float>,
    part: Option<String>,
    keep: Option<f64>,
    count: Option<usize>,
    fraction: Option<f64>,
    step: Option<String>,
    skip: Option<bool>,
}

/// What a prune step asks of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PruneKeys {
    /// Fraction of zeros.
    pub sparsity: f64,
    /// Which zeros.
    pub pattern: Sparsity,
    /// Who competes; `None`: as the paper says.
    pub scope: Option<Scope>,
}

/// What a quantize step asks of one matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizeKeys {
    /// 2 to 8.
    pub bits: u8,
    /// Columns that share a scale; 0: a whole row.
    pub group: usize,
    /// Without zero points.
    pub symmetric: bool,
    /// How scales are written.
    pub scale: Float,
    /// Whether the step is meant for the factors of an earlier step; `None`: whatever the matrix is.
    pub factors: Option<bool>,
}

impl Step {
    fn of(&self, place: &Place) -> Option<Keys> {
        if !self.targets.iter().any(|t| t.matches(place)) {
            return None;
        }
        let mut keys = self.keys.clone();
        for (targets, over) in &self.except {
            if targets.iter().any(|t| t.matches(place)) {
                keys = keys.overridden(over);
            }
        }
        (keys.skip != Some(true)).then_some(keys)
    }

    /// Whether the step aims at `place` (and no exception skips it).
    pub fn aims_at(&self, place: &Place) -> bool {
        self.of(place).is_some()
    }

    /// For a prune step: what it asks of `place`.
    pub fn prune(&self, place: &Place) -> Option<PruneKeys> {
        let k = self.of(place)?;
        let pattern = k.pattern.unwrap_or(Sparsity::Unstructured);
        let sparsity = match (pattern, k.sparsity) {
            (Sparsity::Nm { n, m }, _) => 1.0 - n as f64 / m as f64,
            (_, s) => s.unwrap_or(0.5),
        };
        Some(PruneKeys { sparsity, pattern, scope: k.scope })
    }

    /// For a quantize step: what it asks of `place`.
    pub fn quantize(&self, place: &Place) -> Option<QuantizeKeys> {
        let k = self.of(place)?;
        Some(QuantizeKeys {
            bits: k.bits.unwrap_or(4),
            group: k.group.unwrap_or(64),
            symmetric: k.symmetric.unwrap_or(false),
            scale: k.scale.unwrap_or(Float::F16),
            factors: k.part.map(|p| p == "factors"),
        })
    }

    /// For a factor step: the fraction of the matrix's parameters kept.
    pub fn keep(&self, place: &Place) -> Option<f64> {
        Some(self.of(place)?.keep.unwrap_or(0.8))
    }

    /// The rank of two thin matrices that hold the fraction `keep` of a matrix's parameters.
    pub(crate) fn rank(keep: f64, rows: usize, cols: usize) -> usize {
        let rank = ((keep * (rows * cols) as f64) / (rows + cols) as f64).floor() as usize;
        rank.clamp(1, rows.min(cols))
    }

    /// For an outliers step: the fraction of weights moved.
    pub fn fraction(&self, place: &Place) -> Option<f64> {
        Some(self.of(place)?.fraction.unwrap_or(0.005))
    }

    /// For a drop step: which part, how many.
    pub fn drop_part(&self) -> Result<(DropPart, usize), RecipeError> {
        let part = self.keys.part.as_deref().unwrap_or("block");
        let part = part.parse().map_err(|e| RecipeError { what: format!("step '{}': {e}", self.name) })?;
        Ok((part, self.keys.count.unwrap_or(1)))
    }

    /// For a budget step: the prune step whose sparsity it divides.
    pub fn budget_for(&self) -> &str {
        self.keys.step.as_deref().unwrap_or("prune")
    }

    /// Whether the step works on the whole model before the blocks.
    pub fn is_model_wide(&self) -> bool {
        matches!(self.verb, Verb::Drop | Verb::Budget)
    }
}

impl Keys {
    fn overridden(&self, o: &Keys) -> Keys {
        Keys {
            sparsity: o.sparsity.or(self.sparsity),
            pattern: o.pattern.or(self.pattern),
            scope: o.scope.or(self.scope),
            bits: o.bits.or(self.bits),
            group: o.group.or(self.group),
            symmetric: o.symmetric.or(self.symmetric),
            scale: o.scale.or(self.scale),
            part: o.part.clone().or(self.part.clone()),
            keep: o.keep.or(self.keep),
            count: o.count.or(self.count),
            fraction: o.fraction.or(self.fraction),
            step: o.step.clone().or(self.step.clone()),
            skip: o.skip.or(self.skip),
        }
    }

    /// Takes the keys of `verb` out of `table`; what other keys there are stays behind for the method.
    fn take(verb: Verb, table: &mut Table, at: &str) -> Result<Keys, RecipeError> {
        let names: &[&str] = match verb {
            Verb::Prune => &["sparsity", "pattern", "scope", "skip"],
            Verb::Quantize => &["bits", "group", "symmetric", "scale", "part", "skip"],
            Verb::Factor => &["keep", "skip"],
            Verb::Outliers => &["fraction", "skip"],
            Verb::Drop => &["part", "count"],
            Verb::Budget => &["step"],
        };
        let mut k = Keys::default();
        for name in names {
            let Some(v) = table.remove(*name) else { continue };
            let bad = |want: &str| RecipeError { what: format!("{at}: {name} = {v} is not {want}") };
            let fraction = |v: &Value| match v.as_float().or(v.as_integer().map(|i| i as f64)) {
                Some(x) if (0.0..=1.0).contains(&x) => Ok(x),
                _ => Err(bad("a fraction from 0 to 1")),
            };
            let whole = |low: i64, high: i64, want: &str| match v.as_integer() {
                Some(i) if (low..=high).contains(&i) => Ok(i as usize),
                _ => Err(bad(want)),
            };
            let text = || v.as_str().ok_or_else(|| bad("a text"));
            match *name {
                "sparsity" => k.sparsity = Some(fraction(&v)?),
                "keep" => k.keep = Some(fraction(&v)?),
                "fraction" => k.fraction = Some(fraction(&v)?),
                "pattern" => {
                    k.pattern = Some(text()?.parse().map_err(|e| RecipeError { what: format!("{at}: {e}") })?);
                }
                "scope" => {
                    k.scope = Some(match text()? {
                        "row" => Scope::Row,
                        "matrix" => Scope::Matrix,
                        "layer" => Scope::Layer,
                        _ => return Err(bad("\"row\", \"matrix\" or \"layer\"")),
                    });
                }
                "bits" => k.bits = Some(whole(2, 8, "a whole number from 2 to 8")? as u8),
                "group" => k.group = Some(whole(0, 1 << 24, "a number of columns (0: a whole row)")?),
                "count" => k.count = Some(whole(0, 4096, "a number of layers")?),
                "symmetric" => k.symmetric = Some(v.as_bool().ok_or_else(|| bad("true or false"))?),
                "skip" => k.skip = Some(v.as_bool().ok_or_else(|| bad("true or false"))?),
                "scale" => {
                    k.scale = Some(match text()? {
                        "f32" => Float::F32,
                        "f16" => Float::F16,
                        _ => return Err(bad("\"f32\" or \"f16\"")),
                    });
                }
                "part" => {
                    let part = text()?;
                    if verb == Verb::Quantize && !["weights", "factors"].contains(&part) {
                        return Err(bad("\"weights\" or \"factors\""));
                    }
                    k.part = Some(part.to_owned());
                }
                _ => k.step = Some(text()?.to_owned()),
            }
        }
        Ok(k)
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
    pub fn parse(text: &str, registry: &[Method], sets: &[String]) -> Result<Recipe, RecipeError> {
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
        let steps: Vec<Step> =
            steps.into_iter().enumerate().map(|(i, v)| step(i, v, registry)).collect::<Result<_, _>>()?;
        check_order(&steps)?;
        Ok(Recipe { calibration, rest, steps, resolved })
    }
}

fn find<'a>(registry: &'a [Method], name: &str, at: &str) -> Result<&'a Method, RecipeError> {
    registry.iter().find(|m| m.card.name == name).ok_or_else(|| RecipeError {
        what: format!(
            "{at}: no method is called '{name}'; there are {}",
            registry.iter().map(|m| m.card.name).collect::<Vec<_>>().join(", ")
        ),
    })
}

fn make(method: &Method, keys: Table, at: &str) -> Result<Made, RecipeError> {
    let json = serde_json::to_value(keys).map_err(|e| RecipeError { what: format!("{at}: {e}") })?;
    (method.make)(json).map_err(|e| RecipeError { what: format!("{at}: {e}") })
}

fn verb_of(table: &Table, method: &Method, at: &str) -> Result<Verb, RecipeError> {
    match table.get("verb") {
        None => Ok(method.card.verb),
        Some(v) => v.clone().try_into().map_err(|_| RecipeError {
            what: format!("{at}: verb = {v}; verbs are prune, quantize, factor, outliers, drop, budget"),
        }),
    }
}

fn verb_name(v: Verb) -> &'static str {
    match v {
        Verb::Prune => "prune",
        Verb::Quantize => "quantize",
        Verb::Factor => "factor",
        Verb::Outliers => "outliers",
        Verb::Drop => "drop",
        Verb::Budget => "budget",
    }
}

fn step(i: usize, v: Value, registry: &[Method]) -> Result<Step, RecipeError> {
    let Value::Table(mut t) = v else { return err("steps are written [[step]]") };
    let at = format!("step {}", i + 1);
    let Some(name) = t.get("method").and_then(Value::as_str).map(str::to_owned) else {
        return err(format!("{at}: method = \"...\" is missing"));
    };
    let method = find(registry, &name, &at)?.clone();
    let verb = verb_of(&t, &method, &at)?;
    let name = match t.get("name") {
        None => verb_name(verb).to_owned(),
        Some(v) => {
            v.as_str().map(str::to_owned).ok_or_else(|| RecipeError { what: format!("{at}: name must be a text") })?
        }
    };
    let at = format!("step '{name}'");
    for k in ["method", "verb", "name"] {
        t.remove(k);
    }
    let targets_here =
        targets(t.remove("targets"), &at)?.unwrap_or_else(|| vec![Target("attn.*".into()), Target("ffn.*".into())]);
    let mut except = Vec::new();
    match t.remove("except") {
        None => {}
        Some(Value::Array(list)) => {
            for e in list {
                let Value::Table(mut e) = e else { return err(format!("{at}: except holds tables")) };
                let Some(tg) = targets(e.remove("targets"), &at)? else {
                    return err(format!("{at}: an exception needs targets"));
                };
                let keys = Keys::take(verb, &mut e, &at)?;
                if let Some(k) = e.keys().next() {
                    return err(format!("{at}: an exception cannot set '{k}'"));
                }
                except.push((tg, keys));
            }
        }
        Some(_) => return err(format!("{at}: except is a list of tables")),
    }
    let keys = Keys::take(verb, &mut t, &at)?;
    let grid = match (verb, t.remove("grid")) {
        (Verb::Quantize, Some(g)) => {
            let g = g.as_str().ok_or_else(|| RecipeError { what: format!("{at}: grid names a method") })?.to_owned();
            Some(make(find(registry, &g, &at)?, Table::new(), &at)?)
        }
        (Verb::Quantize, None) => match registry.iter().find(|m| m.card.name == "rtn") {
            Some(m) => Some(make(m, Table::new(), &at)?),
            None => None,
        },
        (_, Some(_)) => return err(format!("{at}: grid belongs to quantize steps")),
        (_, None) => None,
    };
    let made = make(&method, t, &at)?;
    let fits = match verb {
        Verb::Prune => matches!(made, Made::Score(_) | Made::Solve(_)),
        Verb::Quantize => {
            matches!(made, Made::Grid(_)) || (matches!(made, Made::Solve(_)) && matches!(grid, Some(Made::Grid(_))))
        }
        Verb::Factor => matches!(made, Made::Factor(_)),
        Verb::Outliers => matches!(made, Made::Score(_)),
        Verb::Drop => matches!(made, Made::Drop(_)),
        Verb::Budget => matches!(made, Made::Budget(_)),
    };
    if !fits {
        return err(format!(
            "{at}: {} answers the question {made:?}, which a {} step cannot use",
            method.card.name,
            verb_name(verb)
        ));
    }
    if targets_here.iter().any(|t| t.0 == "embed") && method.card.needs != lacuna_contract::Needs::default() {
        return err(format!(
            "{at}: {} needs statistics of inputs, and an embedding has none; use rtn there",
            method.card.name
        ));
    }
    Ok(Step { name, verb, method, made, grid, targets: targets_here, keys, except })
}

fn check_order(steps: &[Step]) -> Result<(), RecipeError> {
    let mut seen = BTreeMap::new();
    let mut local: Option<&str> = None;
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
        s.drop_part().map(|_| ()).or_else(|e| if s.verb == Verb::Drop { Err(e) } else { Ok(()) })?;
    }
    for s in steps.iter().filter(|s| s.verb == Verb::Budget) {
        if !steps.iter().any(|p| p.verb == Verb::Prune && p.name == s.budget_for()) {
            return err(format!(
                "step '{}' divides the sparsity of a prune step called '{}', and there is none",
                s.name,
                s.budget_for()
            ));
        }
    }
    Ok(())
}

fn apply_sets(root: &mut Table, registry: &[Method], sets: &[String]) -> Result<(), RecipeError> {
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
                let own = s.get("name").and_then(Value::as_str).map(str::to_owned).or_else(|| {
                    let m = registry.iter().find(|m| Some(m.card.name) == s.get("method").and_then(Value::as_str))?;
                    verb_of(s, m, "").ok().map(|v| verb_name(v).to_owned())
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

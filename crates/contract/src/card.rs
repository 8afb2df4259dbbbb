//! The registry: methods with their cards, and families.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::questions::{
    Basis, Factor, Grid, Ranks, Recode, Score, Search, Shortlist, Solve, Stack, Structure, Table, Transform,
};
use crate::running::{Draft, Gate, Keep, Selector};
use crate::stats::Ask;
use crate::step::Step;

/// Who a method is, what it needs and what can be asked of it together.
#[derive(Clone, Debug, Serialize)]
pub struct Card {
    /// The name recipes use.
    pub name: &'static str,
    /// Authors, title, year.
    pub paper: &'static str,
    /// arXiv id, or empty.
    pub arxiv: &'static str,
    /// One sentence: what it does.
    pub summary: &'static str,
    /// Its id in the list of published systems, where it is there.
    pub system: Option<u32>,
    /// The verb of its family by default; of a method of run time its question, as run plans write it.
    pub verb: &'static str,
    /// The statistics it reads, of the inputs of each matrix or, for whole parts, of each decoder block.
    pub needs: &'static [Ask],
    /// What can be asked of it; a step that asks for more is refused before work begins.
    pub abilities: &'static [Ability],
}

impl Card {
    /// Whether it can do `what`.
    pub fn can(&self, what: Ability) -> bool {
        self.abilities.contains(&what)
    }
}

/// Something that can be asked of a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ability {
    /// Weights go anywhere.
    Unstructured,
    /// `n` of every `m` consecutive columns stay.
    Nm,
    /// Blocks of weights go whole.
    Blocks,
    /// Zeros of an earlier step are kept, and their drift is made up for or left out.
    FixedMask,
    /// Kept weights are rounded to a grid.
    Round,
    /// Weights are rounded to the blocks of a GGUF type.
    BlockTypes,
    /// Pruning and rounding in one walk.
    PruneAndRound,
    /// The error that earlier terms leave is approximated, and not the matrix alone.
    Error,
}

/// A method that could not answer, or a step that cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct MethodError {
    /// What is wrong, with the numbers; the driver adds the names of the step and the matrix.
    pub what: String,
}

impl MethodError {
    /// An error that says `what`.
    pub fn new(what: impl Into<String>) -> MethodError {
        MethodError { what: what.into() }
    }
}

/// A method ready to answer: its question and itself.
pub enum Made {
    /// See [`Score`].
    Score(Box<dyn Score>),
    /// See [`Grid`].
    Grid(Box<dyn Grid>),
    /// See [`Table`].
    Table(Box<dyn Table>),
    /// See [`Recode`].
    Recode(Box<dyn Recode>),
    /// See [`Stack`].
    Stack(Box<dyn Stack>),
    /// See [`Solve`].
    Solve(Box<dyn Solve>),
    /// See [`Factor`].
    Factor(Box<dyn Factor>),
    /// See [`Ranks`].
    Ranks(Box<dyn Ranks>),
    /// See [`Transform`].
    Transform(Box<dyn Transform>),
    /// See [`Structure`].
    Structure(Box<dyn Structure>),
    /// See [`Basis`].
    Basis(Box<dyn Basis>),
    /// See [`Shortlist`].
    Shortlist(Box<dyn Shortlist>),
    /// See [`Search`].
    Search(Box<dyn Search>),
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Made::Score(_) => "Score",
            Made::Grid(_) => "Grid",
            Made::Table(_) => "Table",
            Made::Recode(_) => "Recode",
            Made::Stack(_) => "Stack",
            Made::Solve(_) => "Solve",
            Made::Factor(_) => "Factor",
            Made::Ranks(_) => "Ranks",
            Made::Transform(_) => "Transform",
            Made::Structure(_) => "Structure",
            Made::Basis(_) => "Basis",
            Made::Shortlist(_) => "Shortlist",
            Made::Search(_) => "Search",
        })
    }
}

/// A method's row of the registry.
#[derive(Clone)]
pub struct Method {
    /// Who it is.
    pub card: Card,
    /// Names of its own parameters.
    pub keys: fn() -> &'static [&'static str],
    /// Makes it from its own parameters (a JSON object; the family's keys are not among them). Unknown keys are
    /// refused.
    pub make: fn(Value) -> Result<Made, MethodError>,
}

/// A method of run time, ready to answer: its question and itself.
pub enum MadeRunning {
    /// See [`Draft`].
    Draft(Box<dyn Draft>),
    /// See [`Keep`].
    Keep(Box<dyn Keep>),
    /// See [`Selector`]; asked wherever keys and values are kept.
    Select(Selector),
    /// See [`Gate`]; asked wherever it stands.
    Gate(Arc<dyn Gate>),
}

impl MadeRunning {
    /// Its question, as run plans, flags and cards write it.
    pub fn question(&self) -> &'static str {
        match self {
            MadeRunning::Draft(_) => "draft",
            MadeRunning::Keep(_) => "keep",
            MadeRunning::Select(_) => "select",
            MadeRunning::Gate(_) => "gate",
        }
    }
}

impl fmt::Debug for MadeRunning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.question())
    }
}

/// The row of a method of run time: it leaves something out, or drafts, while the model runs.
#[derive(Clone)]
pub struct RunMethod {
    /// Who it is; its verb is its question.
    pub card: Card,
    /// Names of its parameters.
    pub keys: fn() -> &'static [&'static str],
    /// The values that parameters have beside some that are given, where nothing is said of them (JSON objects).
    pub defaults: fn(&Map<String, Value>) -> Map<String, Value>,
    /// Makes it from its parameters (a JSON object) and a seed. Unknown keys are refused.
    pub make: fn(Value, u64) -> Result<MadeRunning, MethodError>,
}

/// A family's row of the registry: a verb of recipes.
#[derive(Clone)]
pub struct Family {
    /// The verb: `prune`, `quantize`, ...
    pub verb: &'static str,
    /// Names of the keys that its methods share.
    pub keys: fn() -> &'static [&'static str],
    /// Makes a step. Errors name the key.
    pub make: fn(&Making<'_>) -> Result<Step, MethodError>,
}

/// What a step is made from.
pub struct Making<'a> {
    /// The method that the step names.
    pub method: &'a Method,
    /// The step's keys, the family's and the method's together; those of every step (`targets`, ...) are gone.
    pub keys: &'a Map<String, Value>,
    /// Everybody else, for keys that name another method.
    pub registry: &'a Registry,
}

/// Every method and every family, handed to the driver and to the engine by the binary.
#[derive(Clone, Default)]
pub struct Registry {
    /// Methods, in the order in which they are listed.
    pub methods: Vec<Method>,
    /// Families.
    pub families: Vec<Family>,
    /// Methods of run time, in the order in which they are listed.
    pub running: Vec<RunMethod>,
}

impl Registry {
    /// The method of that name.
    pub fn method(&self, name: &str) -> Option<&Method> {
        self.methods.iter().find(|m| m.card.name == name)
    }

    /// The family of that verb.
    pub fn family(&self, verb: &str) -> Option<&Family> {
        self.families.iter().find(|f| f.verb == verb)
    }

    /// The draft of that name, made from its parameters.
    pub fn draft(&self, name: &str, keys: Value, seed: u64) -> Result<Box<dyn Draft>, MethodError> {
        match self.make_running("draft", name, keys, seed)? {
            MadeRunning::Draft(made) => Ok(made),
            other => Err(mismade(name, "draft", &other)),
        }
    }

    /// The keeper of that name, made from its parameters.
    pub fn keep(&self, name: &str, keys: Value, seed: u64) -> Result<Box<dyn Keep>, MethodError> {
        match self.make_running("keep", name, keys, seed)? {
            MadeRunning::Keep(made) => Ok(made),
            other => Err(mismade(name, "keep", &other)),
        }
    }

    /// The selector of that name, made from its parameters.
    pub fn select(&self, name: &str, keys: Value, seed: u64) -> Result<Selector, MethodError> {
        match self.make_running("select", name, keys, seed)? {
            MadeRunning::Select(made) => Ok(made),
            other => Err(mismade(name, "select", &other)),
        }
    }

    /// The gate of that name, made from its parameters.
    pub fn gate(&self, name: &str, keys: Value, seed: u64) -> Result<Arc<dyn Gate>, MethodError> {
        match self.make_running("gate", name, keys, seed)? {
            MadeRunning::Gate(made) => Ok(made),
            other => Err(mismade(name, "gate", &other)),
        }
    }

    fn make_running(&self, question: &str, name: &str, keys: Value, seed: u64) -> Result<MadeRunning, MethodError> {
        let of = |m: &&RunMethod| m.card.verb == question;
        if let Some(method) = self.running.iter().filter(of).find(|m| m.card.name == name) {
            return (method.make)(keys, seed);
        }
        if let Some(other) = self.running.iter().find(|m| m.card.name == name) {
            return Err(MethodError::new(format!("'{name}' answers '{}', not '{question}'", other.card.verb)));
        }
        let names: Vec<&str> = self.running.iter().filter(of).map(|m| m.card.name).collect();
        Err(MethodError::new(format!("'{name}' is no method of '{question}'; there are {}", names.join(", "))))
    }
}

/// A method whose card says another question than it answers: our own mistake, told and not panicked over.
fn mismade(name: &str, question: &str, made: &MadeRunning) -> MethodError {
    MethodError::new(format!("'{name}' is listed under '{question}' and answers '{made:?}'"))
}

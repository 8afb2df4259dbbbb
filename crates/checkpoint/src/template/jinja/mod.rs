//! The language of chat templates: Jinja as `transformers` runs it, with Python's values and in its immutable sandbox.
//!
//! A program is parsed into a tree once and run on values of its own. Everything that it does is paid for: steps, and
//! bytes held at one time ([`meter`]). It sees no files, no other templates and no clock but the one that it is given.
//!
//! Departs from Jinja: whole numbers end at 128 bits; `include`, `import`, `extends` and `block` are refused, as are
//! the filters that make HTML or draw lots; a generator can be walked twice, and is not printed; `safe` marks nothing,
//! so that what is added to its text is not escaped; what Python prints with an address is printed without.

mod checks;
mod eval;
mod filters;
mod format;
mod json;
mod lex;
mod meter;
mod methods;
mod ops;
mod parse;
mod parse_expr;
mod print;
mod same;
mod sorting;
mod text;
mod time;
mod tree;
mod value;

use std::time::SystemTime;

use meter::{Builder, Meter};
use value::{Row, Str, Value, cut};

/// Bytes of a message.
const MAX_MESSAGE: usize = 1000;

/// Why a program ended early.
#[derive(Debug)]
pub(super) struct Fault {
    pub kind: FaultKind,
    /// Where, counted from 1.
    pub line: Option<u32>,
    pub what: String,
}

/// What kind of end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// No program of the language.
    Syntax,
    /// The program called `raise_exception`.
    Raised,
    /// Anything else.
    Error,
}

pub(super) type Outcome<T> = Result<T, Fault>;

impl Fault {
    /// A message may quote what a program made, which has any length.
    fn of(kind: FaultKind, what: &str) -> Fault {
        Fault { kind, line: None, what: cut(what, MAX_MESSAGE).to_owned() }
    }

    fn error(what: impl Into<String>) -> Fault {
        Fault::of(FaultKind::Error, &what.into())
    }

    fn syntax(what: impl Into<String>) -> Fault {
        Fault::of(FaultKind::Syntax, &what.into())
    }

    /// At `line`, unless a line nearer to it is known.
    fn at(mut self, line: u32) -> Fault {
        self.line.get_or_insert(line);
        self
    }
}

/// A parsed template.
pub(super) struct Program(Vec<tree::Stmt>);

impl Program {
    pub fn parse(source: &str) -> Outcome<Program> {
        parse::parse(source).map(Program)
    }

    /// What it writes with the variables of `context`. `now` is what `strftime_now` tells.
    pub fn render(&self, context: &[(&str, &serde_json::Value)], now: SystemTime) -> Outcome<String> {
        let meter = Meter::new();
        let machine = eval::Machine::new(meter.clone(), now);
        let scope = eval::Scope::new(None);
        for (name, value) in context {
            scope.set(&(*name).into(), json::value(&meter, value)?);
        }
        let mut out = Builder::new(&meter)?;
        machine.block(&self.0, &scope, &mut out)?;
        Ok(out.into_string())
    }
}

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Program of {} statements", self.0.len())
    }
}

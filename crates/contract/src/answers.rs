//! Plain answers, and the registry's row.

use std::fmt;
use std::str::FromStr;

use lacuna_base::Mat;
use lacuna_format::{Integers, Mask};
use lacuna_spec::Place;
use serde::{Deserialize, Serialize};

use crate::questions::{Budget, Card, Drop, Factor, Grid, Score, Solve};

/// A solver's answer.
#[derive(Clone, Debug)]
pub struct Solved {
    /// The new weights, `[out, in]`; where `integers` are given, exactly their decoded values.
    pub w: Mat,
    /// What is kept, where anything was pruned now or before.
    pub mask: Option<Mask>,
    /// The rounded form, where rounding was asked.
    pub integers: Option<Integers>,
}

/// A part of a decoder block that can go as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropPart {
    /// Attention and FFN.
    Block,
    /// Attention.
    Attention,
    /// FFN.
    Ffn,
}

impl FromStr for DropPart {
    type Err = String;
    fn from_str(s: &str) -> Result<DropPart, String> {
        match s {
            "block" => Ok(DropPart::Block),
            "attention" => Ok(DropPart::Attention),
            "ffn" => Ok(DropPart::Ffn),
            _ => Err(format!("'{s}' is no part of a decoder block; write \"block\", \"attention\" or \"ffn\"")),
        }
    }
}

/// A matrix that a budget decides on.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Which.
    pub place: Place,
    /// Its entries.
    pub parameters: u64,
}

/// What an assignment led to.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Nats a token on calibration text.
    pub loss: f64,
    /// Bytes of the model.
    pub bytes: u64,
}

/// A method that could not answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{what}")]
pub struct MethodError {
    /// What is wrong, with the numbers; the driver adds the matrix's name.
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
    /// See [`Solve`].
    Solve(Box<dyn Solve>),
    /// See [`Factor`].
    Factor(Box<dyn Factor>),
    /// See [`Drop`].
    Drop(Box<dyn Drop>),
    /// See [`Budget`].
    Budget(Box<dyn Budget>),
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Made::Score(_) => "Score",
            Made::Grid(_) => "Grid",
            Made::Solve(_) => "Solve",
            Made::Factor(_) => "Factor",
            Made::Drop(_) => "Drop",
            Made::Budget(_) => "Budget",
        })
    }
}

/// A row of the registry.
#[derive(Clone)]
pub struct Method {
    /// Who it is.
    pub card: Card,
    /// Makes it from its own parameters (a JSON object; the family's keys are not among them). Unknown keys are refused.
    pub make: fn(serde_json::Value) -> Result<Made, MethodError>,
}

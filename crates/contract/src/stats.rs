//! Statistics: what is gathered, of which event, and how a method reads it.

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use lacuna_base::{Mat, dense::Gram};
use lacuna_spec::Place;
use serde::Serialize;

use crate::card::MethodError;
use crate::questions::Unit;

/// A statistic over the calibration tokens. One line here and one reducer in `compress/calibrate` make a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// `XᵀX` of a matrix's inputs, `[in, in]`.
    InputGram,
    /// `Σ x²` of every input channel of a matrix, `[in]`.
    InputSquares,
    /// `Σ |x|` of every input channel of a matrix, `[in]`.
    InputMagnitudes,
    /// Mean and variance of every input channel of a matrix, `[in]` each.
    InputMoments,
    /// Rows that multiplied a matrix, `[rows, in]`: so many of them at the most, drawn evenly from all.
    InputRows(usize),
    /// Mean over tokens of the cosine of what goes into a part of a decoder block and what comes out.
    Similarity(Unit),
    /// Mean over tokens of the angle between the two, 0 to 1 in half turns.
    Angle(Unit),
    /// The mean of `|G|` over sequences, `G` the gradient of one sequence's mean loss on the source, `[out, in]`.
    GradientAbsolute,
    /// The mean of `G²` over sequences, `[out, in]`: the diagonal of the empirical Fisher matrix, a sample being a
    /// sequence.
    GradientSquares,
    /// The mean of `G` over sequences, `[out, in]`.
    GradientMean,
    /// The mean of `G Gᵀ` over sequences, `[out, out]`.
    GradientRowGram,
    /// The mean of `Gᵀ G` over sequences, `[in, in]`.
    GradientColumnGram,
    /// `Σ dyᵀ dy` of a matrix's output gradients, `[out, out]`.
    OutputGradientGram,
    /// Each sequence's `G`, one below the other, `[sequences * out, in]`; those that did not reach the matrix, whose `G`
    /// is 0, are left out.
    SequenceGradients,
}

impl Ask {
    /// Whether it is of a decoder block or a part of it, and not of a matrix.
    pub fn is_of_layer(self) -> bool {
        matches!(self, Ask::Similarity(_) | Ask::Angle(_))
    }

    /// Whether it takes a backward pass.
    pub fn is_gradient(self) -> bool {
        use Ask::*;
        matches!(
            self,
            GradientAbsolute
                | GradientSquares
                | GradientMean
                | GradientRowGram
                | GradientColumnGram
                | OutputGradientGram
                | SequenceGradients
        )
    }

    /// The statistic of inputs `x` from which this one of `M x` follows, `M` being maps at a matrix's input that mix
    /// inputs or only move and scale them. `None`: no other says it.
    pub fn behind(self, mixes: bool) -> Option<Ask> {
        match self {
            Ask::InputSquares if mixes => Some(Ask::InputGram),
            Ask::InputMagnitudes | Ask::InputMoments | Ask::GradientAbsolute | Ask::GradientSquares if mixes => None,
            Ask::GradientRowGram | Ask::GradientColumnGram => None,
            other => Some(other),
        }
    }

    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            Ask::InputGram => "the Gram matrix of its inputs",
            Ask::InputSquares => "the squares of its inputs",
            Ask::InputMagnitudes => "the sizes of its inputs",
            Ask::InputMoments => "mean and variance of its inputs",
            Ask::InputRows(_) => "rows of its inputs",
            Ask::Similarity(_) => "how like its input a part's output is",
            Ask::Angle(_) => "the angle between a part's input and output",
            Ask::GradientAbsolute => "the sizes of its gradients",
            Ask::GradientSquares => "the squares of its gradients",
            Ask::GradientMean => "its mean gradient",
            Ask::GradientRowGram => "how the rows of its gradients go together",
            Ask::GradientColumnGram => "how the columns of its gradients go together",
            Ask::OutputGradientGram => "the Gram matrix of its output gradients",
            Ask::SequenceGradients => "its gradients, sequence by sequence",
        }
    }
}

/// Where an event happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// At a matrix.
    Matrix(Place),
    /// In a decoder block as a whole.
    Layer(usize),
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Site::Matrix(p) => p.fmt(f),
            Site::Layer(l) => write!(f, "layers.{l}"),
        }
    }
}

/// What was gathered.
#[derive(Clone, Debug)]
pub enum Gathered {
    /// A sum of outer products.
    Gram(Gram),
    /// A number for each channel.
    Vector(Vec<f64>),
    /// Mean and variance of each channel.
    Moments {
        /// Means.
        mean: Vec<f64>,
        /// Variances (of the tokens seen, not of a sample).
        variance: Vec<f64>,
    },
    /// A number for each weight, or rows of inputs.
    Matrix(Mat),
    /// One number.
    Number(f64),
}

/// Statistics of one site; what was not asked for is absent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats<'a> {
    /// Rows seen (for an expert: those routed to it).
    pub tokens: u64,
    /// What forward passes gave: matrices of one input share it.
    pub found: &'a [(Ask, Gathered)],
    /// What backward passes gave, of this matrix alone.
    pub gradients: &'a [(Ask, Gathered)],
    /// Sequences of the backward passes.
    pub sequences: u64,
    /// What methods worked out of `found`; absent where nobody else reads it.
    pub worked: Option<&'a Worked>,
}

/// Answers that methods worked out of the statistics of one input, for the other matrices that read it.
#[derive(Default)]
pub struct Worked(Mutex<HashMap<String, Arc<Slot>>>);

/// An answer, once somebody has worked it out.
type Slot = Mutex<Option<Arc<dyn Any + Send + Sync>>>;

impl fmt::Debug for Worked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Worked")
    }
}

impl<'a> Stats<'a> {
    /// What `work` makes of the statistics that all matrices of this input share, worked out once for each `key`, which
    /// names the method and all of its parameters that the answer depends on. `work` must not wait for other threads.
    pub fn shared<T: Any + Send + Sync>(
        &self,
        key: String,
        work: impl FnOnce() -> Result<T, MethodError>,
    ) -> Result<Arc<T>, MethodError> {
        let Some(worked) = self.worked else { return work().map(Arc::new) };
        let slot = Arc::clone(worked.0.lock().unwrap_or_else(|e| e.into_inner()).entry(key).or_default());
        let mut slot = slot.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(Ok(found)) = slot.clone().map(Arc::downcast::<T>) {
            return Ok(found);
        }
        let made = Arc::new(work()?);
        *slot = Some(Arc::clone(&made) as Arc<dyn Any + Send + Sync>);
        Ok(made)
    }

    /// What was gathered for `ask`.
    pub fn get(&self, ask: Ask) -> Option<&'a Gathered> {
        self.found.iter().chain(self.gradients).find(|(a, _)| *a == ask).map(|(_, g)| g)
    }

    fn need<T>(&self, ask: Ask, of: impl Fn(&'a Gathered) -> Option<T>) -> Result<T, MethodError> {
        let missing = || MethodError::new(format!("{} was not gathered", ask.describe()));
        self.get(ask).and_then(of).ok_or_else(missing)
    }

    /// `XᵀX` of the inputs.
    pub fn gram(&self) -> Result<&'a Gram, MethodError> {
        self.need(Ask::InputGram, |g| if let Gathered::Gram(g) = g { Some(g) } else { None })
    }

    /// `Σ x²` of each input.
    pub fn squares(&self) -> Result<&'a [f64], MethodError> {
        self.need(Ask::InputSquares, |g| if let Gathered::Vector(v) = g { Some(v.as_slice()) } else { None })
    }

    /// `Σ |x|` of each input.
    pub fn magnitudes(&self) -> Result<&'a [f64], MethodError> {
        self.need(Ask::InputMagnitudes, |g| if let Gathered::Vector(v) = g { Some(v.as_slice()) } else { None })
    }

    /// Mean and variance of each input.
    pub fn moments(&self) -> Result<(&'a [f64], &'a [f64]), MethodError> {
        self.need(Ask::InputMoments, |g| {
            if let Gathered::Moments { mean, variance } = g {
                Some((mean.as_slice(), variance.as_slice()))
            } else {
                None
            }
        })
    }

    /// The mean cosine of a part's input and output.
    pub fn similarity(&self, unit: Unit) -> Result<f64, MethodError> {
        self.need(Ask::Similarity(unit), |g| if let Gathered::Number(x) = g { Some(*x) } else { None })
    }

    /// The mean angle between a part's input and output, in half turns.
    pub fn angle(&self, unit: Unit) -> Result<f64, MethodError> {
        self.need(Ask::Angle(unit), |g| if let Gathered::Number(x) = g { Some(*x) } else { None })
    }

    /// A statistic of gradients: a number for each weight, or for each pair of rows or columns; or rows of inputs.
    pub fn matrix(&self, ask: Ask) -> Result<&'a Mat, MethodError> {
        self.need(ask, |g| if let Gathered::Matrix(m) = g { Some(m) } else { None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_is_worked_out_once_a_key_and_errors_are_not_kept() {
        let worked = Worked::default();
        let stats = Stats { worked: Some(&worked), ..Stats::default() };
        let refused = stats.shared::<u32>("a".into(), || Err(MethodError::new("not now")));
        assert!(refused.is_err());
        let first = stats.shared("a".into(), || Ok(1u32)).unwrap();
        let again = stats.shared("a".into(), || -> Result<u32, MethodError> { panic!("once is enough") }).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        assert_eq!(*stats.shared("b".into(), || Ok(2u32)).unwrap(), 2);
        assert_eq!(*Stats::default().shared("a".into(), || Ok(3u32)).unwrap(), 3, "nobody shares");
    }
}

//! `outliers`: the weights that score highest move into a sparse term of floats of their own.

use lacuna_contract::{
    Ask, Card, Edit, Family, Left, Local, Made, Making, MethodError, Scope, Score, Sparsity, Step, Work,
};
use lacuna_format::{Layout, Mask, PatternKind, Unpacked, UnpackedPiece, UnpackedTerm};
use lacuna_spec::Place;
use serde::Deserialize;

use super::keys::Fraction;
use super::select::{Scored, select};
use super::{chance, floats, one_by_one, wants_floats, wrong};
use crate::make;
use lacuna_base::Mat;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Fraction of the weights that move.
    fraction: Fraction,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { fraction: Fraction(0.005) }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "outliers", keys: make::keys::<Keys>, make: outliers }
}

struct Outliers {
    fraction: f64,
    by: Box<dyn Score>,
    card: Card,
}

fn outliers(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let Made::Score(by) = made else { return Err(wrong(making, &made)) };
    Ok(Step::Local(Box::new(Outliers { fraction: keys.fraction.0, by, card: making.method.card.clone() })))
}

/// Moves the `fraction` of weights of highest score into a sparse term aside.
pub(super) fn set_aside(m: &mut Unpacked, scores: &Mat, fraction: f64) -> Result<(), MethodError> {
    let piece = floats(m)?;
    let (rows, cols) = (piece.w.rows(), piece.w.cols());
    let one = Scored { scores, before: piece.mask.as_ref(), sparsity: 1.0 - fraction };
    let out = select(&[one], Sparsity::Unstructured, Scope::Matrix).map_err(MethodError::new)?.remove(0);
    if out.kept() == 0 {
        return Ok(());
    }
    let mut left = Mask::from_fn(rows, cols, |r, c| !out.get(r, c));
    if let Some(before) = &piece.mask {
        left.intersect(before);
    }
    let mut moved = UnpackedPiece::dense(piece.w.clone());
    moved.layout = Layout::Fixed(PatternKind::Csr);
    moved.keep(out);
    piece.keep(left);
    m.aside.push(UnpackedTerm::Piece(moved));
    Ok(())
}

impl Local for Outliers {
    fn together(&self) -> bool {
        false
    }

    fn needs(&self, _: &Place) -> Vec<Ask> {
        self.card.needs.to_vec()
    }

    fn check(&self, _: (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        wants_floats("taking outliers out", earlier)?;
        Ok(Left::Aside)
    }

    fn foretell(&self, mut sample: Unpacked, seed: u64) -> Result<Unpacked, MethodError> {
        let (rows, cols) = sample.shape();
        set_aside(&mut sample, &chance(rows, cols, seed), self.fraction)?;
        Ok(sample)
    }

    fn scratch_bytes(&self, shape: (usize, usize)) -> u64 {
        24 * shape.0 as u64 * shape.1 as u64
    }

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        one_by_one(work, |w| {
            let scores = self.by.score(floats(&mut w.matrix)?.w.view(), &w.stats)?;
            set_aside(&mut w.matrix, &scores, self.fraction)
        })
    }
}

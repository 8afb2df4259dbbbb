//! `outliers`: the weights that score highest move into a sparse term of floats of their own.

use lacuna_contract::{
    Ask, Card, Edit, Family, Left, Local, Made, Making, MethodError, Scope, Score, Sparsity, Step, Work,
};
use lacuna_format::{Code, Layout, Mask, PatternKind, Unpacked, UnpackedPiece, UnpackedTerm};
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
    for term in &mut m.aside {
        if let UnpackedTerm::Piece(before) = term
            && join(before, &moved)
        {
            return Ok(());
        }
    }
    m.aside.push(UnpackedTerm::Piece(moved));
    Ok(())
}

/// Takes what another step moved aside into the same sparse term: one is read faster than two. False where `into` is
/// something else.
fn join(into: &mut UnpackedPiece, more: &UnpackedPiece) -> bool {
    let (Some(a), Some(b)) = (&into.mask, &more.mask) else { return false };
    let sparse = |p: &UnpackedPiece| matches!((&p.layout, &p.code), (Layout::Fixed(PatternKind::Csr), Code::Float));
    if !sparse(into) || !sparse(more) {
        return false;
    }
    let both = Mask::from_fn(into.w.rows(), into.w.cols(), |r, c| a.get(r, c) || b.get(r, c));
    // A weight is in one of them at most: where it is not, there is a zero.
    let sum = Mat::from_fn(into.w.rows(), into.w.cols(), |r, c| into.w[(r, c)] + more.w[(r, c)]);
    (into.w, into.mask) = (sum, Some(both));
    true
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

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    #[test]
    fn two_steps_share_one_sparse_term_and_the_sum_stays() {
        let (w, by_size, by_other) = (random(6, 20, 1), random(6, 20, 2), random(6, 20, 3));
        let mut m = Unpacked::dense(w.clone());
        set_aside(&mut m, &by_size, 0.05).expect("moves");
        set_aside(&mut m, &by_other, 0.1).expect("moves");
        assert_eq!(m.aside.len(), 1);
        let UnpackedTerm::Piece(p) = &m.aside[0] else { panic!("a piece") };
        let kept = p.mask.as_ref().expect("sparse");
        assert_eq!(kept.kept(), 6 + 12);
        let main = floats(&mut m.clone()).expect("floats").clone();
        for (r, c) in (0..6).flat_map(|r| (0..20).map(move |c| (r, c))) {
            let left = main.mask.as_ref().expect("a mask").get(r, c);
            assert_ne!(left, kept.get(r, c), "({r}, {c})");
        }
        let back = m.pack(lacuna_format::Float::F32).expect("packs").to_mat();
        assert!(back.data().iter().zip(w.data()).all(|(a, b)| (a - b).abs() < 1e-3), "a weight was lost");
    }
}

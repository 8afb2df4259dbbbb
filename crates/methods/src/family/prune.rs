//! `prune`: weights are set to zero, by a score or by a solver that makes up for them.

use lacuna_base::Mat;
use lacuna_contract::{
    Ability, Ask, Card, Edit, Family, Left, Local, Made, Making, MethodError, PruneAsk, Scope, Score, Solve, SolveAsk,
    Sparsity, Stats, Step, Work,
};
use lacuna_format::{Layout, Mask, Unpacked, UnpackedPiece};
use lacuna_spec::Place;
use serde::Deserialize;

use super::keys::{Fraction, Pattern};
use super::select::{Scored, select};
use super::{chance, finite, floats, one_by_one, solver_bytes, wants_floats, wrong};
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Fraction of zeros; N:M patterns state their own.
    sparsity: Fraction,
    /// Which zeros.
    pattern: Pattern,
    /// Which weights compete when the lowest scores go; as the paper says where absent.
    scope: Option<Scope>,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { sparsity: Fraction(0.5), pattern: Pattern(Sparsity::Unstructured), scope: None }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "prune", keys: make::keys::<Keys>, make: prune }
}

enum By {
    Score(Box<dyn Score>),
    Solve(Box<dyn Solve>),
}

struct Prune {
    ask: PruneAsk,
    scope: Option<Scope>,
    by: By,
    card: Card,
}

fn prune(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let by = match made {
        Made::Score(score) => By::Score(score),
        Made::Solve(solve) => By::Solve(solve),
        other => return Err(wrong(making, &other)),
    };
    let card = making.method.card.clone();
    let pattern = keys.pattern.0;
    let (needed, what) = match pattern {
        Sparsity::Unstructured => (Ability::Unstructured, "single weights"),
        Sparsity::Nm { .. } => (Ability::Nm, "n of m"),
        Sparsity::Block { .. } => (Ability::Blocks, "blocks"),
    };
    if !card.can(needed) {
        return Err(MethodError::new(format!("{} does not prune {what}", card.name)));
    }
    if keys.scope.is_some() && matches!(by, By::Solve(_)) {
        return Err(MethodError::new(format!("{} chooses as it walks: scope has no meaning for it", card.name)));
    }
    let sparsity = match pattern {
        Sparsity::Nm { n, m } => 1.0 - n as f64 / m as f64,
        _ => keys.sparsity.0,
    };
    Ok(Step::Local(Box::new(Prune { ask: PruneAsk { sparsity, pattern }, scope: keys.scope, by, card })))
}

impl Prune {
    fn scope(&self) -> Scope {
        match &self.by {
            By::Score(s) => self.scope.unwrap_or(s.scope()),
            By::Solve(_) => Scope::Matrix,
        }
    }

    /// The lowest scores go, of matrices that compete where there are several.
    fn lowest(&self, scored: Vec<(&mut UnpackedPiece, Mat)>) -> Result<(), MethodError> {
        let list: Vec<Scored<'_>> = scored
            .iter()
            .map(|(p, s)| Scored { scores: s, before: p.mask.as_ref(), sparsity: self.ask.sparsity })
            .collect();
        let masks = select(&list, self.ask.pattern, self.scope()).map_err(MethodError::new)?;
        drop(list);
        for ((piece, _), mask) in scored.into_iter().zip(masks) {
            keep(piece, mask, self.ask.pattern);
        }
        Ok(())
    }
}

fn keep(piece: &mut UnpackedPiece, mask: Mask, pattern: Sparsity) {
    piece.layout = Layout::Cheapest(match pattern {
        Sparsity::Block { height, width } => Some((height, width)),
        _ => None,
    });
    piece.keep(mask);
}

fn solve(solver: &dyn Solve, m: &mut Unpacked, stats: &Stats<'_>, ask: PruneAsk) -> Result<(), MethodError> {
    let piece = floats(m)?;
    let solved = solver.solve(&SolveAsk {
        w: piece.w.view(),
        stats,
        mask: piece.mask.as_ref(),
        prune: Some(ask),
        round: None,
    })?;
    let mask = solved.mask.ok_or_else(|| MethodError::new("the method pruned nothing"))?;
    finite(&solved.w)?;
    piece.w = solved.w;
    keep(piece, mask, ask.pattern);
    Ok(())
}

impl Local for Prune {
    fn together(&self) -> bool {
        self.scope() == Scope::Layer
    }

    fn needs(&self, _: &Place) -> Vec<Ask> {
        let also: &[Ask] = match &self.by {
            By::Score(_) => &[],
            By::Solve(solver) => solver.also_needs(),
        };
        [self.card.needs, also].concat()
    }

    fn check(&self, (rows, cols): (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        wants_floats("pruning", earlier)?;
        if earlier.contains(&Left::Masked) && !self.card.can(Ability::FixedMask) {
            return Err(MethodError::new(format!("{} cannot keep the zeros of an earlier step", self.card.name)));
        }
        match self.ask.pattern {
            Sparsity::Nm { m, .. } if cols % m != 0 => {
                Err(MethodError::new(format!("{cols} columns do not divide into runs of {m}")))
            }
            Sparsity::Block { height, width } if rows % height != 0 || cols % width != 0 => Err(MethodError::new(
                format!("a {rows} x {cols} matrix does not divide into blocks of {height} x {width}"),
            )),
            _ => Ok(Left::Masked),
        }
    }

    fn foretell(&self, mut sample: Unpacked, seed: u64) -> Result<Unpacked, MethodError> {
        let piece = floats(&mut sample)?;
        let scores = chance(piece.w.rows(), piece.w.cols(), seed);
        let one = Scored { scores: &scores, before: piece.mask.as_ref(), sparsity: self.ask.sparsity };
        let mask = select(&[one], self.ask.pattern, Scope::Row).map_err(MethodError::new)?.remove(0);
        keep(piece, mask, self.ask.pattern);
        Ok(sample)
    }

    fn scratch_bytes(&self, shape: (usize, usize)) -> u64 {
        match self.by {
            By::Score(_) => 24 * shape.0 as u64 * shape.1 as u64,
            By::Solve(_) if self.card.needs.contains(&Ask::OutputGradientGram) => {
                // As much of the outputs as of the inputs, and f64 copies of the matrix.
                let (rows, cols) = (shape.0 as u64, shape.1 as u64);
                solver_bytes(shape) + 24 * rows * rows + 40 * rows * cols
            }
            By::Solve(_) => solver_bytes(shape),
        }
    }

    fn edit(&self, mut work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        match &self.by {
            By::Solve(solver) => one_by_one(work, |w| solve(solver.as_ref(), &mut w.matrix, &w.stats, self.ask)),
            By::Score(score) => {
                let mut scored = Vec::new();
                for w in &mut work {
                    let piece = floats(&mut w.matrix)?;
                    let scores = score.score(piece.w.view(), &w.stats)?;
                    scored.push((piece, scores));
                }
                self.lowest(scored)?;
                one_by_one(work, |_| Ok(()))
            }
        }
    }
}

//! `quantize`: weights are written with few bits, each to the nearest value of a grid or by a solver that makes up for
//! the errors.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{
    Ability, Ask, Card, Edit, Family, Grid, GridAsk, Left, Local, Made, Making, MethodError, RoundAsk, RoundedForm,
    Solve, SolveAsk, Stats, Step, Table, Work,
};
use lacuna_format::{Affine, Code, Float, Group, Integers, Mask, ScaleCodec, Unpacked, UnpackedPiece, UnpackedTerm};
use lacuna_spec::Place;
use serde::Deserialize;
use serde_json::Value;

use super::blocks::Blocks;
use super::keys::{BlockType, Scale, Whole};
use super::outliers::set_aside;
use super::tables;
use super::{chance, finite, floats, one_by_one, solver_bytes, wrong};
use crate::make;

/// What the methods share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    /// Bits of a code.
    bits: Whole<2, 8>,
    /// Columns that share a scale; 0: a whole row.
    group: Whole<0, { 1 << 24 }>,
    /// Without zero points.
    symmetric: bool,
    /// How scales are written.
    scale: Scale,
    /// What is rounded: the weights, or the thin matrices of a factor step; whatever the matrix is where absent.
    part: Option<Applies>,
    /// The grid that a solver rounds to.
    grid: String,
    /// The GGUF block type that is written instead of grouped integers.
    r#type: Option<BlockType>,
    /// With `type` and rounding to nearest: an error counts as much as the mean square of its input.
    importance: bool,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Applies {
    Weights,
    Factors,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys {
            bits: Whole(4),
            group: Whole(64),
            symmetric: false,
            scale: Scale(Float::F16),
            part: None,
            grid: "rtn".into(),
            r#type: None,
            importance: false,
        }
    }
}

pub(crate) fn family() -> Family {
    Family { verb: "quantize", keys: make::keys::<Keys>, make: quantize }
}

struct Quantize {
    ask: GridAsk,
    group: usize,
    part: Option<Applies>,
    values: Values,
    solver: Option<Box<dyn Solve>>,
    blocks: Option<Blocks>,
    card: Card,
}

/// Which values weights are rounded to.
enum Values {
    /// Evenly spaced ones.
    Grid(Box<dyn Grid>),
    /// Those of a table for each row or group.
    Table(Box<dyn Table>),
}

fn quantize(making: &Making<'_>) -> Result<Step, MethodError> {
    let (keys, made) = make::split::<Keys>(making)?;
    let card = making.method.card.clone();
    let blocks = Blocks::of(making, keys.r#type.map(|t| t.0), keys.importance, &made)?;
    let (values, solver) = match made {
        Made::Grid(_) if making.keys.contains_key("grid") => {
            return Err(MethodError::new(format!("{} is a grid itself; grid belongs to solvers", card.name)));
        }
        Made::Grid(grid) => (Values::Grid(grid), None),
        Made::Table(table) => (Values::Table(table), None),
        Made::Solve(solver) => {
            let named = making.registry.method(&keys.grid);
            match named.map(|m| (m.make)(Value::Null)).transpose()? {
                Some(Made::Grid(grid)) => (Values::Grid(grid), Some(solver)),
                Some(_) => return Err(MethodError::new(format!("grid = \"{}\" is a method but no grid", keys.grid))),
                None => return Err(MethodError::new(format!("grid = \"{}\": no method is called so", keys.grid))),
            }
        }
        other => return Err(wrong(making, &other)),
    };
    if blocks.is_none() && !card.can(Ability::Round) {
        return Err(MethodError::new(format!("{} does not round", card.name)));
    }
    let ask = GridAsk { bits: keys.bits.0 as u8, symmetric: keys.symmetric, scale: keys.scale.0 };
    Ok(Step::Local(Box::new(Quantize { ask, group: keys.group.0, part: keys.part, values, solver, blocks, card })))
}

impl Quantize {
    /// Rounds a piece of floats, each value to the nearest of its group's grid or table.
    fn nearest(&self, piece: &mut UnpackedPiece, stats: &Stats<'_>) -> Result<(), MethodError> {
        if !matches!(piece.code, Code::Float) {
            return Err(MethodError::new("already rounded"));
        }
        if let Some(blocks) = &self.blocks {
            return blocks.write(piece, blocks.nearest(piece.w.view(), stats)?);
        }
        match &self.values {
            Values::Grid(grid) => {
                let mask = piece.mask.as_ref();
                let importance = match grid.importance() {
                    Some(ask) if stats.tokens > 0 => mean_squares(ask, stats, piece.w.cols())?,
                    _ => Vec::new(),
                };
                let (w, grid) = (piece.w.view(), grid.as_ref());
                let q = round_to_nearest(w, mask, grid, &importance, &self.ask, self.group)?;
                piece.w = values(&q, mask);
                piece.code = Code::Integers(q, self.ask.codec());
            }
            Values::Table(table) if table.scaled().is_some() => {
                let Some(by) = table.scaled() else { return Ok(()) };
                let (mask, shape) = (piece.mask.as_ref(), (piece.w.rows(), piece.w.cols()));
                let (q, codec) = tables::scaled(piece.w.view(), mask, by, &self.ask, self.group)?;
                piece.w = tables::values(&q, mask, shape);
                piece.code = Code::Codebook(q, Float::F32, codec);
            }
            Values::Table(table) => {
                let importance = match table.importance() {
                    // A sample, or a thin matrix, has no statistics of its own.
                    Some(ask) if stats.tokens > 0 => Some(stats.matrix(ask)?),
                    _ => None,
                };
                let mask = piece.mask.as_ref();
                let float = self.ask.scale;
                let bits = self.ask.bits;
                let q = tables::round(piece.w.view(), mask, table.as_ref(), importance, (bits, self.group, float))?;
                piece.w = tables::values(&q, mask, (piece.w.rows(), piece.w.cols()));
                piece.code = Code::Codebook(q, float, self.ask.codec());
            }
        }
        finite(&piece.w)
    }

    /// How the solver's answer will look, where weights meet one.
    fn form(&self) -> RoundedForm {
        self.solver.as_ref().map_or_else(RoundedForm::default, |s| s.rounded_form(&self.ask))
    }

    fn codec(&self) -> ScaleCodec {
        self.form().scales.unwrap_or_else(|| self.ask.codec())
    }

    /// The thin matrices of the last product: the main term, or a correction set aside.
    fn factors(m: &mut Unpacked) -> Option<&mut (UnpackedPiece, UnpackedPiece)> {
        let all = std::iter::once(&mut m.main).chain(&mut m.aside);
        let products = all.filter_map(|t| match t {
            UnpackedTerm::Product(p) => Some(p.as_mut()),
            UnpackedTerm::Piece(_) | UnpackedTerm::Signed(_) => None,
        });
        products.last()
    }

    fn round(&self, m: &mut Unpacked, solver: Option<&dyn Solve>, stats: &Stats<'_>) -> Result<(), MethodError> {
        let product = matches!(m.main, UnpackedTerm::Product(_));
        if product || self.part == Some(Applies::Factors) {
            let factors = Quantize::factors(m).ok_or_else(|| MethodError::new("there are no factors to round"))?;
            self.nearest(&mut factors.0, &Stats::default())?;
            return self.nearest(&mut factors.1, &Stats::default());
        }
        let UnpackedTerm::Piece(piece) = &mut m.main else {
            return Err(MethodError::new("the matrix was factored; write part = \"factors\""));
        };
        let (Some(solver), Values::Grid(grid)) = (solver, &self.values) else { return self.nearest(piece, stats) };
        if !matches!(piece.code, Code::Float) {
            return Err(MethodError::new("the matrix is already rounded"));
        }
        if let Some(blocks) = &self.blocks {
            return blocks.write(piece, solver.solve_blocks(piece.w.view(), stats, blocks.kind)?);
        }
        let round = RoundAsk { ask: self.ask, grid: grid.as_ref(), group: self.group };
        let ask = SolveAsk { w: piece.w.view(), stats, mask: piece.mask.as_ref(), prune: None, round: Some(round) };
        let solved = solver.solve(&ask)?;
        let q = solved.integers.ok_or_else(|| MethodError::new("the method rounded nothing"))?;
        finite(&solved.w)?;
        piece.w = solved.w;
        piece.code = Code::Integers(q, self.codec());
        m.aside.extend(solved.aside.into_iter().map(UnpackedTerm::Piece));
        Ok(())
    }
}

impl Local for Quantize {
    fn together(&self) -> bool {
        false
    }

    fn needs(&self, _: &Place) -> Vec<Ask> {
        let own = self.card.needs.iter().copied();
        own.chain(self.blocks.filter(|b| b.importance).map(|_| Ask::InputSquares)).collect()
    }

    fn check(&self, shape: (usize, usize), earlier: &[Left]) -> Result<Left, MethodError> {
        let fail = |what: String| Err(MethodError::new(what));
        let thin = earlier.iter().any(|l| matches!(l, Left::Factored | Left::Corrected));
        let factored = earlier.contains(&Left::Factored);
        match self.part {
            Some(Applies::Factors) if !thin => {
                return fail("there are no factors to round; put a factor step before".into());
            }
            Some(Applies::Weights) if factored => {
                return fail("the matrix was factored; write part = \"factors\"".into());
            }
            None | Some(Applies::Weights) if !factored && earlier.contains(&Left::Corrected) => {
                return fail(
                    "rounding after a correction would undo it; write part = \"factors\" or put it before".into(),
                );
            }
            _ => {}
        }
        let factors = factored || self.part == Some(Applies::Factors);
        if factors && self.solver.is_some() {
            return fail("a solver that needs the inputs' statistics cannot round factors; use rtn".into());
        }
        if !factors && earlier.contains(&Left::Rounded) {
            return fail("the matrix is already rounded".into());
        }
        if let Some(blocks) = &self.blocks {
            blocks.check(shape.1, earlier, factors)?;
        }
        if earlier.contains(&Left::Masked) && !self.card.can(Ability::FixedMask) {
            return fail(format!("{} cannot keep the zeros of an earlier step", self.card.name));
        }
        Ok(Left::Rounded)
    }

    fn foretell(&self, mut sample: Unpacked, seed: u64) -> Result<Unpacked, MethodError> {
        if let (Some(blocks), UnpackedTerm::Piece(piece)) = (&self.blocks, &mut sample.main)
            && self.part != Some(Applies::Factors)
        {
            blocks.foretell(piece)?;
            return Ok(sample);
        }
        let form = self.form();
        if form.aside > 0.0 && matches!(sample.main, UnpackedTerm::Piece(_)) {
            // The solver sets weights aside and keeps their places in the rest.
            let before = floats(&mut sample)?.mask.clone();
            let (rows, cols) = sample.shape();
            set_aside(&mut sample, &chance(rows, cols, seed), form.aside)?;
            floats(&mut sample)?.mask = before;
        }
        self.round(&mut sample, None, &Stats::default())?;
        if let UnpackedTerm::Piece(UnpackedPiece { code: Code::Integers(q, codec), mask, .. }) = &mut sample.main {
            *codec = self.codec();
            if form.offsets && mask.is_none() {
                let zeros = q.zeros.take();
                q.offsets = zeros
                    .map(|z| Mat::from_vec(q.scales.rows(), q.scales.cols(), z.into_iter().map(f32::from).collect()));
            }
        }
        Ok(sample)
    }

    fn scratch_bytes(&self, shape: (usize, usize)) -> u64 {
        if self.solver.is_some() { solver_bytes(shape) } else { 8 * shape.0 as u64 * shape.1 as u64 }
    }

    fn edit(&self, work: Vec<Work<'_>>) -> Result<Vec<Edit>, MethodError> {
        one_by_one(work, |w| self.round(&mut w.matrix, self.solver.as_deref(), &w.stats))
    }
}

/// The values that integers stand for; what the mask drops is 0.
fn values(q: &Integers, mask: Option<&Mask>) -> Mat {
    Mat::from_fn(q.rows, q.cols, |r, c| if mask.is_none_or(|m| m.get(r, c)) { q.value(r, c) } else { 0.0 })
}

/// What each column matters to a grid.
fn mean_squares(ask: Ask, stats: &Stats<'_>, cols: usize) -> Result<Vec<f32>, MethodError> {
    if ask != Ask::InputSquares {
        return Err(MethodError::new(format!("a grid that weighs by {}; only the inputs' squares do", ask.describe())));
    }
    let squares = stats.squares()?;
    if squares.len() != cols {
        return Err(MethodError::new(format!("squares of {} inputs for a matrix of {cols}", squares.len())));
    }
    Ok(squares.iter().map(|s| (s / stats.tokens as f64) as f32).collect())
}

/// Each group of each row on its own grid, each value to the nearest point; `importance` of each column, or empty.
fn round_to_nearest(
    w: MatRef<'_>,
    mask: Option<&Mask>,
    grid: &dyn Grid,
    importance: &[f32],
    ask: &GridAsk,
    group: usize,
) -> Result<Integers, MethodError> {
    let (rows, cols) = (w.rows(), w.cols());
    let run = if group == 0 { cols } else { group.min(cols) };
    let groups = cols.div_ceil(run.max(1));
    let mut scales = Mat::zeros(rows, groups);
    let mut zeros = vec![0u8; rows * groups];
    let mut codes = vec![0u8; rows * cols];
    let (mut kept, mut worth) = (Vec::with_capacity(run), Vec::with_capacity(run));
    for r in 0..rows {
        let row = w.row(r);
        for g in 0..groups {
            let span = g * run..((g + 1) * run).min(cols);
            kept.clear();
            worth.clear();
            for c in span.clone().filter(|&c| mask.is_none_or(|m| m.get(r, c))) {
                kept.push(row[c]);
                worth.extend(importance.get(c));
            }
            let a: Affine = match importance {
                [] => grid.fit(&kept, ask)?,
                _ => grid.fit_weighted(&kept, &worth, ask)?,
            };
            scales[(r, g)] = a.scale;
            zeros[r * groups + g] = a.zero;
            for c in span {
                codes[r * cols + c] = if mask.is_none_or(|m| m.get(r, c)) { a.code(row[c], ask.bits) } else { a.zero };
            }
        }
    }
    let zeros = (!ask.symmetric).then_some(zeros);
    Ok(Integers { rows, cols, bits: ask.bits, codes, scales, zeros, group: Group::Run(run), offsets: None })
}

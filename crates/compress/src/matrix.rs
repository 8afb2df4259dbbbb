//! One matrix on its way through a recipe's local steps, from its source to its stored form.

use std::sync::Arc;

use lacuna_base::{Mat, MatRef, dense};
use lacuna_contract::{Grid, GridAsk, PruneAsk, RoundAsk, Score, Solve, SolveAsk, Sparsity, Stats};
use lacuna_format::{
    Affine, Float, FormatError, Group, Integers, Mask, PatternKind, Piece, ScaleCodec, Stored, Term, Values,
    cheapest_pattern, pack_float, pack_integers,
};

use crate::recipe::QuantizeKeys;
use crate::select::{Scored, select};

/// A matrix between two steps.
pub struct Matrix {
    source: Arc<Stored>,
    w: Mat,
    mask: Option<Mask>,
    pattern: Option<Sparsity>,
    form: Form,
    outliers: Vec<Term>,
    changed: bool,
}

enum Form {
    /// `w` as it is.
    Dense,
    /// `w` is the decoded value of these.
    Integers(Integers, Float),
    /// `w` was replaced by `left · right`.
    Factors(Box<(Thin, Thin)>),
}

/// One factor, with its rounded form if it has one.
struct Thin {
    w: Mat,
    integers: Option<(Integers, Float)>,
}

impl Matrix {
    /// Decodes `source` and begins.
    pub fn new(source: Arc<Stored>) -> Matrix {
        let w = source.to_mat();
        Matrix { source, w, mask: None, pattern: None, form: Form::Dense, outliers: Vec::new(), changed: false }
    }

    /// The weights as they stand, `[out, in]`.
    pub fn w(&self) -> MatRef<'_> {
        self.w.view()
    }

    /// What earlier steps kept.
    pub fn mask(&self) -> Option<&Mask> {
        self.mask.as_ref()
    }

    fn needs_dense(&self, step: &str) -> Result<(), String> {
        match self.form {
            Form::Dense => Ok(()),
            Form::Integers(..) => Err(format!("{step} after rounding would undo it; put it before")),
            Form::Factors(_) => Err(format!("{step} after factoring has no matrix to work on; put it before")),
        }
    }

    /// Prunes to a mask that `select` chose.
    pub fn prune_to(&mut self, mask: Mask, pattern: Sparsity) -> Result<(), String> {
        self.needs_dense("pruning")?;
        let cols = self.w.cols();
        for (i, v) in self.w.data_mut().iter_mut().enumerate() {
            if !mask.get(i / cols, i % cols) {
                *v = 0.0;
            }
        }
        self.mask = Some(mask);
        self.pattern = Some(pattern);
        self.changed = true;
        Ok(())
    }

    /// Prunes by a solver that compensates.
    pub fn prune_solved(&mut self, solver: &dyn Solve, stats: &Stats<'_>, ask: PruneAsk) -> Result<(), String> {
        self.needs_dense("pruning")?;
        let solved = solver
            .solve(&SolveAsk { w: self.w.view(), stats, mask: self.mask.as_ref(), prune: Some(ask), round: None })
            .map_err(|e| e.what)?;
        let mask = solved.mask.ok_or("the method pruned nothing")?;
        self.w = solved.w;
        finite(&self.w)?;
        self.prune_to(mask, ask.pattern)
    }

    /// Moves the `fraction` of weights that score highest into a sparse term of floats.
    pub fn extract(&mut self, score: &dyn Score, stats: &Stats<'_>, fraction: f64) -> Result<(), String> {
        self.needs_dense("taking outliers out")?;
        let scores = score.score(self.w.view(), stats).map_err(|e| e.what)?;
        let stay = 1.0 - fraction;
        let one = Scored { scores: &scores, before: self.mask.as_ref(), sparsity: stay };
        let out = select(&[one], Sparsity::Unstructured, lacuna_contract::Scope::Matrix)?.remove(0);
        if out.kept() == 0 {
            return Ok(());
        }
        let piece = self.floats(self.w.view(), Some(&out), |_| PatternKind::Csr).map_err(|e| e.what)?;
        self.outliers.push(Term::Piece(piece));
        let (rows, cols) = (self.w.rows(), self.w.cols());
        let mut left = Mask::from_fn(rows, cols, |r, c| !out.get(r, c));
        if let Some(m) = &self.mask {
            left.intersect(m);
        }
        for (i, v) in self.w.data_mut().iter_mut().enumerate() {
            if out.get(i / cols, i % cols) {
                *v = 0.0;
            }
        }
        self.mask = Some(left);
        self.changed = true;
        Ok(())
    }

    /// Replaces the matrix by two thin ones.
    pub fn factored(&mut self, left: Mat, right: Mat) -> Result<(), String> {
        self.needs_dense("factoring")?;
        if self.mask.is_some() {
            return Err("factoring would fill the zeros of an earlier step; put it first".into());
        }
        finite(&left)?;
        finite(&right)?;
        let thin = |w| Thin { w, integers: None };
        self.form = Form::Factors(Box::new((thin(left), thin(right))));
        self.changed = true;
        Ok(())
    }

    /// Rounds each group to its grid.
    pub fn round(&mut self, grid: &dyn Grid, keys: &QuantizeKeys) -> Result<(), String> {
        self.changed = true;
        match &mut self.form {
            Form::Dense if keys.factors == Some(true) => {
                Err("there are no factors to round; put a factor step before".into())
            }
            Form::Factors(_) if keys.factors == Some(false) => {
                Err("the matrix was factored; write part = \"factors\"".into())
            }
            Form::Integers(..) => Err("the matrix is already rounded".into()),
            Form::Factors(f) => {
                for thin in [&mut f.0, &mut f.1] {
                    if thin.integers.is_some() {
                        return Err("the factors are already rounded".into());
                    }
                    let ints = round_to_nearest(thin.w.view(), None, grid, keys)?;
                    thin.w = values(&ints, None);
                    finite(&thin.w)?;
                    thin.integers = Some((ints, keys.scale));
                }
                Ok(())
            }
            Form::Dense => {
                let ints = round_to_nearest(self.w.view(), self.mask.as_ref(), grid, keys)?;
                self.w = values(&ints, self.mask.as_ref());
                finite(&self.w)?;
                self.form = Form::Integers(ints, keys.scale);
                Ok(())
            }
        }
    }

    /// Rounds by a solver that compensates.
    pub fn round_solved(
        &mut self,
        solver: &dyn Solve,
        grid: &dyn Grid,
        stats: &Stats<'_>,
        keys: &QuantizeKeys,
    ) -> Result<(), String> {
        match self.form {
            Form::Dense => {}
            Form::Integers(..) => return Err("the matrix is already rounded".into()),
            Form::Factors(_) => {
                return Err("a solver that needs the inputs' statistics cannot round factors; use rtn".into());
            }
        }
        let round = RoundAsk { ask: grid_ask(keys), grid, group: keys.group };
        let solved = solver
            .solve(&SolveAsk { w: self.w.view(), stats, mask: self.mask.as_ref(), prune: None, round: Some(round) })
            .map_err(|e| e.what)?;
        let ints = solved.integers.ok_or("the method rounded nothing")?;
        self.w = solved.w;
        finite(&self.w)?;
        self.form = Form::Integers(ints, keys.scale);
        self.changed = true;
        Ok(())
    }

    /// The stored form. A matrix that no step changed is its source, bit for bit.
    pub fn finish(self) -> Result<Arc<Stored>, String> {
        if !self.changed {
            return Ok(self.source);
        }
        let e = |e: FormatError| e.what;
        let mask = self.mask.as_ref();
        let term = match &self.form {
            Form::Dense => Term::Piece(self.floats(self.w.view(), mask, |bits| self.kind(bits)).map_err(e)?),
            Form::Integers(ints, scale) => {
                let kind = self.kind(f64::from(ints.bits));
                Term::Piece(pack_integers(ints, mask, kind, codec(*scale)).map_err(e)?)
            }
            Form::Factors(f) => Term::Product(self.thin(&f.0).map_err(e)?, self.thin(&f.1).map_err(e)?),
        };
        let mut terms = vec![term];
        terms.extend(self.outliers);
        let stored = Stored::new(self.source.rows, self.source.cols, terms);
        stored.check().map_err(e)?;
        Ok(Arc::new(stored))
    }

    /// Floats in f16; where that cannot say all of them, in the source's own bf16 or else in f32. `kind` gives the pattern for so many bits a value.
    fn floats(
        &self,
        w: MatRef<'_>,
        mask: Option<&Mask>,
        kind: impl Fn(f64) -> PatternKind,
    ) -> Result<Piece, FormatError> {
        let pack = |float: Float| pack_float(w, mask, kind(8.0 * float.bytes() as f64), float);
        let own = |t: &Term| matches!(t, Term::Piece(p) if matches!(p.values, Values::Float(Float::Bf16, _)));
        let wide = if self.source.terms.iter().all(own) { Float::Bf16 } else { Float::F32 };
        pack(Float::F16).or_else(|_| pack(wide))
    }

    fn thin(&self, t: &Thin) -> Result<Piece, FormatError> {
        match &t.integers {
            Some((ints, scale)) => pack_integers(ints, None, PatternKind::Dense, codec(*scale)),
            None => self.floats(t.w.view(), None, |_| PatternKind::Dense),
        }
    }

    /// The pattern of fewest bytes that the mask allows.
    fn kind(&self, bits: f64) -> PatternKind {
        let blocks = match self.pattern {
            Some(Sparsity::Block { height, width }) => Some((height, width)),
            _ => None,
        };
        self.mask.as_ref().map_or(PatternKind::Dense, |mask| cheapest_pattern(mask, bits, blocks))
    }
}

fn codec(scale: Float) -> ScaleCodec {
    if scale == Float::F32 { ScaleCodec::F32 } else { ScaleCodec::F16 }
}

fn grid_ask(keys: &QuantizeKeys) -> GridAsk {
    GridAsk { bits: keys.bits, symmetric: keys.symmetric, scale: keys.scale }
}

fn finite(w: &Mat) -> Result<(), String> {
    match w.data().iter().position(|x| !x.is_finite()) {
        Some(i) => Err(format!("the new weight at ({}, {}) is {}", i / w.cols(), i % w.cols(), w.data()[i])),
        None => Ok(()),
    }
}

/// The values that integers stand for; what the mask drops is 0.
fn values(ints: &Integers, mask: Option<&Mask>) -> Mat {
    Mat::from_fn(ints.rows, ints.cols, |r, c| if mask.is_none_or(|m| m.get(r, c)) { ints.value(r, c) } else { 0.0 })
}

/// Each group of each row on its own grid, each value to the nearest point.
fn round_to_nearest(
    w: MatRef<'_>,
    mask: Option<&Mask>,
    grid: &dyn Grid,
    keys: &QuantizeKeys,
) -> Result<Integers, String> {
    let (rows, cols) = (w.rows(), w.cols());
    let run = if keys.group == 0 { cols } else { keys.group.min(cols) };
    let groups = cols.div_ceil(run.max(1));
    let ask = grid_ask(keys);
    let mut scales = Mat::zeros(rows, groups);
    let mut zeros = vec![0u8; rows * groups];
    let mut codes = vec![0u8; rows * cols];
    let mut kept = Vec::with_capacity(run);
    for r in 0..rows {
        let row = w.row(r);
        for g in 0..groups {
            let span = g * run..((g + 1) * run).min(cols);
            kept.clear();
            kept.extend(span.clone().filter(|&c| mask.is_none_or(|m| m.get(r, c))).map(|c| row[c]));
            let a: Affine = grid.fit(&kept, &ask).map_err(|e| e.what)?;
            scales[(r, g)] = a.scale;
            zeros[r * groups + g] = a.zero;
            for c in span {
                codes[r * cols + c] = if mask.is_none_or(|m| m.get(r, c)) { a.code(row[c], keys.bits) } else { a.zero };
            }
        }
    }
    let zeros = (!keys.symmetric).then_some(zeros);
    Ok(Integers { rows, cols, bits: keys.bits, codes, scales, zeros, group: Group::Run(run) })
}

/// How far `after` is from `before` on what the calibration text feeds them: `‖(W - W') X‖² / ‖W X‖²` where the Gram matrix is known, with
/// its diagonal alone where only squares are, else `‖W - W'‖² / ‖W‖²`. 0 for a matrix of zeros.
pub fn relative_error(before: MatRef<'_>, after: MatRef<'_>, stats: &Stats<'_>) -> f64 {
    let delta = Mat::from_fn(before.rows(), before.cols(), |r, c| before.at(r, c) - after.at(r, c));
    let energy = |w: MatRef<'_>| -> f64 {
        if let Some(gram) = stats.gram {
            let n = gram.n();
            let scale = gram.mean_diag().max(f64::MIN_POSITIVE);
            let g = Mat::from_fn(n, n, |i, j| (gram.at(i, j) / scale) as f32);
            let wg = dense::matmul_nn(w, g.view());
            (0..w.rows()).map(|r| dot(w.row(r), wg.row(r))).sum()
        } else if let Some(sq) = stats.squares {
            let mean = (sq.iter().sum::<f64>() / sq.len().max(1) as f64).max(f64::MIN_POSITIVE);
            (0..w.rows())
                .map(|r| w.row(r).iter().zip(sq).map(|(x, s)| f64::from(*x) * f64::from(*x) * s / mean).sum::<f64>())
                .sum()
        } else {
            (0..w.rows()).map(|r| dot(w.row(r), w.row(r))).sum()
        }
    };
    let whole = energy(before);
    if whole <= 0.0 { 0.0 } else { (energy(delta.view()) / whole).max(0.0) }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

//! Products with a stored matrix from its other side: `dY · W`, the way back of a derivative.

use std::sync::Arc;

use lacuna_base::{MatMut, MatRef, dense};
use lacuna_format::{Float, FormatError, Pattern, PatternKind, Piece, Stored, Term, Values, pack_float};
use rayon::prelude::*;

use crate::scratch;

/// Rows of `W` that are decoded and multiplied at a time: what they make in f32 is this many rows of inputs.
const PANEL: usize = 256;
/// Values that a task decodes at least.
const DECODE: usize = 1 << 14;

/// A stored matrix `W`, `[outputs, inputs]`, from its other side: `dY · W`. It shares the stored buffers and holds
/// nothing of its own.
///
/// The order of summation follows from the shapes alone: the same bits with any number of threads.
#[derive(Clone, Debug)]
pub struct Transposed {
    rows: usize,
    cols: usize,
    terms: Vec<Summand>,
}

/// A summand.
#[derive(Clone, Debug)]
enum Summand {
    Piece(Arc<Stored>),
    /// Left factor first, then right: the rank is between them.
    Product(Box<Transposed>, Box<Transposed>),
}

impl Transposed {
    /// For a stored matrix in any form, which is checked first.
    pub fn new(stored: &Stored) -> Result<Transposed, FormatError> {
        stored.check()?;
        if stored.has_maps() {
            // From the other side the maps would come in turn, each turned round; nothing that is derived has any, so
            // what they make of the matrix is multiplied.
            let dense = pack_float(stored.to_mat().view(), None, PatternKind::Dense, Float::F32)?;
            return Transposed::new(&Stored::from_piece(dense));
        }
        let one = |piece: &Piece| Transposed {
            rows: piece.rows,
            cols: piece.cols,
            terms: vec![Summand::Piece(Arc::new(Stored::from_piece(piece.clone())))],
        };
        let terms = stored.terms.iter().map(|term| match term {
            Term::Piece(p) => Summand::Piece(Arc::new(Stored::from_piece(p.clone()))),
            Term::Product(l, r) => Summand::Product(Box::new(one(l)), Box::new(one(r))),
            // Decoded: signs and a product are no product of their own from any side.
            Term::Signed(_) => Summand::Piece(Arc::new(Stored::new(stored.rows, stored.cols, vec![term.clone()]))),
        });
        Ok(Transposed { rows: stored.rows, cols: stored.cols, terms: terms.collect() })
    }

    /// Outputs of `W`: columns of `dY`.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs of `W`: columns of `dX`.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `dx += dy · W`: `dy` is `[n, outputs]`, `dx` `[n, inputs]`. Panics where the shapes do not fit.
    #[track_caller]
    pub fn add_product(&self, dy: MatRef<'_>, mut dx: MatMut<'_>) {
        assert_eq!(dy.cols(), self.rows, "dY has {} columns, the matrix {} rows", dy.cols(), self.rows);
        assert_eq!((dx.rows(), dx.cols()), (dy.rows(), self.cols), "the result has another shape");
        if dy.rows() == 0 || self.rows == 0 || self.cols == 0 {
            return;
        }
        for term in &self.terms {
            match term {
                Summand::Piece(stored) => piece(stored, dy, dx.reborrow()),
                Summand::Product(left, right) => scratch::with(dy.rows() * left.cols, |inner| {
                    let inner = &mut inner[..dy.rows() * left.cols];
                    inner.fill(0.0);
                    left.add_product(dy, MatMut::new(dy.rows(), left.cols, inner));
                    right.add_product(MatRef::new(dy.rows(), left.cols, inner), dx.reborrow());
                }),
            }
        }
    }
}

/// `dx += dy · W` of one piece, panel by panel of its rows.
fn piece(stored: &Stored, dy: MatRef<'_>, mut dx: MatMut<'_>) {
    let (rows, cols) = (stored.rows, stored.cols);
    // Plain floats are multiplied where they lie; cut into the same panels, so that the bits do not depend on how they
    // were stored.
    if let Some(w) = plain(stored) {
        let w = MatRef::new(rows, cols, w);
        for from in (0..rows).step_by(PANEL) {
            let to = (from + PANEL).min(rows);
            dense::add_matmul_nn(dx.reborrow(), 1.0, dy.columns(from, to), w.rows_range(from, to));
        }
        return;
    }
    scratch::with(PANEL.min(rows) * cols, |panel| {
        for from in (0..rows).step_by(PANEL) {
            let to = (from + PANEL).min(rows);
            let panel = &mut panel[..(to - from) * cols];
            let step = DECODE.div_ceil(cols).min(PANEL);
            panel.par_chunks_mut(step * cols).enumerate().for_each(|(i, part)| {
                let (first, n) = (from + i * step, part.len() / cols);
                stored.decode_rows(first, first + n, MatMut::new(n, cols, part));
            });
            dense::add_matmul_nn(dx.reborrow(), 1.0, dy.columns(from, to), MatRef::new(to - from, cols, panel));
        }
    });
}

/// The values of a dense piece in f32 that lie as this processor reads them.
fn plain(stored: &Stored) -> Option<&[f32]> {
    match &stored.terms[..] {
        [Term::Piece(Piece { pattern: Pattern::Dense, values: Values::Float(Float::F32, bytes), .. })]
            if cfg!(target_endian = "little") =>
        {
            bytemuck::try_cast_slice(bytes).ok()
        }
        _ => None,
    }
}

//! A stored matrix ready to multiply.

mod bodies;
mod chosen;
mod form;
mod fused;
mod maps;
mod prepare;
mod products;
#[cfg(test)]
mod tests;
mod transposed;

use std::sync::{Arc, Mutex, PoisonError};

use lacuna_base::{MatMut, MatRef};
use lacuna_format::{FormatError, Map, Piece, Stored, Term};

use crate::op::matmul::Out;
use crate::panel::columns::Columns;
use crate::{Isa, Simulated, parallel, scratch};
use form::Packed;
pub(crate) use form::codecs;
use maps::{Turn, mapped, mapping};
pub use transposed::Transposed;

/// How activations meet a matrix of integer codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Activations {
    /// As they are, in f32.
    #[default]
    Exact,
    /// As signed bytes with a scale for every 32 columns of a row (to the nearest, the largest magnitude at 124 to 127,
    /// whichever of these loses least), where the codec's values are whole numbers times a scale; elsewhere as they
    /// are.
    Int8,
    /// Rounded to a format and multiplied as if they were exact, whatever the codec: a measurement, not a faster way.
    Simulated(Simulated),
}

/// How a matrix is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packing {
    /// The instruction set that multiplies.
    pub isa: Isa,
    /// How activations meet integer codes.
    pub activations: Activations,
}

impl Default for Packing {
    /// The best instruction set here, exact activations.
    fn default() -> Packing {
        Packing { isa: Isa::best(), activations: Activations::Exact }
    }
}

/// A matrix `W`, `[outputs, inputs]`, ready to multiply: `x · Wᵀ`.
///
/// A result depends on its own row of `x`, on the matrix and on how it was packed: not on the other rows, their number
/// or the threads.
#[derive(Clone)]
pub struct Linear {
    rows: usize,
    cols: usize,
    terms: Vec<PackedTerm>,
    input: Vec<Turn>,
    output: Vec<Turn>,
    packing: Packing,
    /// The matrix by columns as well, where that was asked for.
    columns: Option<Arc<Columns>>,
}

/// Matrices of the same rows.
pub struct Group<'a, const N: usize> {
    /// The matrices.
    pub all: [&'a Linear; N],
    /// What they multiply, `[n, inputs]`.
    pub x: MatRef<'a>,
    /// What comes out of each, `[n, outputs]`, overwritten.
    pub out: [MatMut<'a>; N],
}

/// A packed summand.
#[derive(Clone)]
enum PackedTerm {
    Piece(Packed),
    /// Right factor first, then left.
    Product {
        left: Box<Linear>,
        right: Box<Linear>,
    },
}

impl Linear {
    /// Packs a stored matrix for this processor, with exact activations. It is repacked: what it was read from
    /// may go.
    pub fn pack(stored: &Stored) -> Result<Linear, FormatError> {
        Linear::pack_with(stored, &Packing::default())
    }

    /// As [`Linear::pack`], told how. Panics later, at the product, where the processor lacks the instruction set.
    pub fn pack_with(stored: &Stored, packing: &Packing) -> Result<Linear, FormatError> {
        Linear::pack_releasing(stored, packing, &|| ())
    }

    /// As [`Linear::pack_with`]; `release` is called whenever a few megabytes have been repacked, so that the pages of
    /// what they were read from can leave memory: matrix and source are never there as a whole together.
    pub fn pack_releasing(stored: &Stored, packing: &Packing, release: &dyn Fn()) -> Result<Linear, FormatError> {
        stored.check()?;
        release();
        let one = |piece: &Piece| Stored::from_piece(piece.clone());
        let mut terms = Vec::with_capacity(stored.terms.len());
        for (i, term) in stored.terms.iter().enumerate() {
            terms.push(match term {
                Term::Piece(p) => PackedTerm::Piece(Packed::of(p, i > 0, release)),
                Term::Signed(s) => PackedTerm::Piece(Packed::signed(s, release)),
                Term::Product(l, r) => PackedTerm::Product {
                    left: Box::new(Linear::pack_releasing(&one(l), packing, release)?),
                    right: Box::new(Linear::pack_releasing(&one(r), packing, release)?),
                },
            });
        }
        let maps = |maps: &[Map], n: usize| maps.iter().map(|m| Turn::of(m, n, packing)).collect::<Result<Vec<_>, _>>();
        let (rows, cols) = (stored.rows, stored.cols);
        let (input, output) = (maps(&stored.input, cols)?, maps(&stored.output, rows)?);
        Ok(Linear { rows, cols, terms, input, output, packing: *packing, columns: None })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of weights read for one row of `x`, padding included.
    pub fn weights_bytes(&self) -> u64 {
        let terms = self.terms.iter().map(|t| match t {
            PackedTerm::Piece(form) => form.body.bytes(),
            PackedTerm::Product { left, right } => left.weights_bytes() + right.weights_bytes(),
        });
        terms.chain(self.input.iter().chain(&self.output).map(Turn::bytes)).sum()
    }

    /// Multiply-adds of one row of `x`, were every stored matrix dense: those on f32, maps among them, and those on
    /// 8-bit activations.
    pub fn work(&self) -> [u64; 2] {
        let of = |maps: &[Turn], n: usize| maps.iter().map(|m| m.work(n)).sum::<u64>();
        let mut all = [of(&self.input, self.cols) + of(&self.output, self.rows), 0];
        for t in &self.terms {
            match t {
                PackedTerm::Piece(form) => {
                    let int8 = self.packing.activations == Activations::Int8 && form.body.integer();
                    all[usize::from(int8)] += (self.rows * self.cols) as u64 * form.body.work();
                }
                PackedTerm::Product { left, right } => {
                    for (all, (l, r)) in all.iter_mut().zip(left.work().iter().zip(right.work())) {
                        *all += l + r;
                    }
                }
            }
        }
        all
    }

    /// How each term multiplies, then the maps of the input and of the output, for reports.
    pub fn describe(&self) -> Vec<&'static str> {
        let terms = self.terms.iter().map(|t| match t {
            PackedTerm::Piece(form) => form.name(self.packing.activations),
            PackedTerm::Product { .. } => "product",
        });
        terms.chain(self.input.iter().chain(&self.output).map(Turn::name)).collect()
    }

    /// `x · Wᵀ`: `x` is `[n, inputs]`, `out` `[n, outputs]`, overwritten. Panics where the shapes do not fit.
    ///
    /// A NaN or infinity in a row of `x` reaches results of that row only: those whose weights take part in it, zeros
    /// that are stored included; with [`Activations::Int8`] all that have a stored weight within its 32 columns. One in
    /// `W` reaches its own output only.
    #[track_caller]
    pub fn forward(&self, x: MatRef<'_>, out: MatMut<'_>) {
        self.run(x, out, false);
    }

    /// As [`Linear::forward`] for several matrices and the same rows: their rows are prepared once, and the work is
    /// shared out as one.
    #[track_caller]
    pub fn forward_all<const N: usize>(all: [&Linear; N], x: MatRef<'_>, out: &mut [MatMut<'_>; N]) {
        for (l, out) in all.iter().zip(out.iter()) {
            assert_eq!(x.cols(), l.cols, "x has {} columns, the matrix {}", x.cols(), l.cols);
            assert_eq!((out.rows(), out.cols()), (x.rows(), l.rows), "the result has another shape");
        }
        let first = all[0];
        let alike = |l: &&Linear| {
            let same = l.input.len() == first.input.len() && l.input.iter().zip(&first.input).all(|(a, b)| a.same(b));
            same && l.packing.isa == first.packing.isa
        };
        if N > 1 && x.rows() > 0 && !first.input.is_empty() && all.iter().all(alike) {
            // Rows are mapped once for all of them.
            mapped(first.packing.isa, &first.input, x, |x| Linear::all_behind(all, x, out, true));
        } else {
            Linear::all_behind(all, x, out, false);
        }
    }

    /// [`Linear::forward_all`] of several groups, each with rows and results of its own. Groups enough for all threads
    /// are shared out whole; fewer come one after the other, each shared out.
    #[track_caller]
    pub fn forward_groups<const N: usize>(groups: Vec<Group<'_, N>>) {
        let work = |g: &Group<'_, N>| g.x.rows() * g.all.iter().map(|l| l.rows * l.cols).sum::<usize>();
        let (count, cost) = (groups.len(), groups.iter().map(work).sum::<usize>() / groups.len().max(1));
        let run = |mut g: Group<'_, N>| Linear::forward_all(g.all, g.x, &mut g.out);
        if count < parallel::threads().max(2) {
            return groups.into_iter().for_each(run);
        }
        let groups: Vec<_> = groups.into_iter().map(|g| Mutex::new(Some(g))).collect();
        parallel::ranges(count, 1, 1, cost, |from, to| {
            for group in &groups[from..to] {
                let group = group.lock().unwrap_or_else(PoisonError::into_inner).take();
                group.into_iter().for_each(run);
            }
        });
    }

    /// As [`Linear::forward_all`]; with `done`, `x` has been through the maps of the inputs.
    fn all_behind<const N: usize>(all: [&Linear; N], x: MatRef<'_>, out: &mut [MatMut<'_>; N], done: bool) {
        let single = |l: &Linear| match &l.terms[..] {
            _ if matches!(l.packing.activations, Activations::Simulated(_)) => None,
            [PackedTerm::Piece(form)] if l.rows > 0 && (done || l.input.is_empty()) && l.output.is_empty() => {
                form.body.plan(&l.packing, x.rows())
            }
            _ => None,
        };
        let plan = single(all[0]);
        let same = |l: &&Linear| l.packing == all[0].packing && single(l) == plan;
        let (Some(plan), true) = (plan, N > 1 && x.rows() > 0 && all.iter().all(same)) else {
            for (l, out) in all.iter().zip(out) {
                l.run_behind(x, out.reborrow(), false, done);
            }
            return;
        };
        let parts: [(&Packed, Out); N] = std::array::from_fn(|i| {
            let out = Out { stride: out[i].stride(), data: out[i].raw_mut().as_mut_ptr(), add: false };
            let [PackedTerm::Piece(form)] = &all[i].terms[..] else { unreachable!("a plan is for one piece") };
            (form, out)
        });
        form::together(&all[0].packing, plan, parts, x);
    }

    #[track_caller]
    fn run(&self, x: MatRef<'_>, out: MatMut<'_>, add: bool) {
        self.run_behind(x, out, add, false);
    }

    /// With `done`, `x` has been through the maps of the input.
    #[track_caller]
    fn run_behind(&self, x: MatRef<'_>, out: MatMut<'_>, add: bool, done: bool) {
        assert_eq!(x.cols(), self.cols, "x has {} columns, the matrix {}", x.cols(), self.cols);
        assert_eq!((out.rows(), out.cols()), (x.rows(), self.rows), "the result has another shape");
        if x.rows() == 0 || self.rows == 0 {
            return;
        }
        let input = if done { &[] } else { &self.input[..] };
        if !input.is_empty() || !self.output.is_empty() {
            // Only factors of products are added to what is there, and these have no maps.
            debug_assert!(!add);
            let isa = self.packing.isa;
            return mapped(isa, input, x, |x| mapping(isa, &self.output, out, |out| self.sum(x, out, false)));
        }
        self.sum(x, out, add);
    }

    /// The sum of terms.
    fn sum(&self, x: MatRef<'_>, mut out: MatMut<'_>, mut add: bool) {
        if self.terms.is_empty() && !add {
            (0..out.rows()).for_each(|r| out.row_mut(r).fill(0.0));
        }
        let rounded = match self.packing.activations {
            Activations::Simulated(format) => {
                let mut rounded = x.to_mat();
                (0..rounded.rows()).for_each(|r| format.round(rounded.row_mut(r)));
                Some(rounded)
            }
            _ => None,
        };
        if x.rows() == 1 && self.terms.len() > 1 && rounded.is_none() {
            let out = Out { stride: out.stride(), data: out.raw_mut().as_mut_ptr(), add };
            if fused::fused(&self.packing, &self.terms, x, out) {
                return;
            }
        }
        for term in &self.terms {
            match term {
                PackedTerm::Piece(form) => {
                    let out = Out { stride: out.stride(), data: out.raw_mut().as_mut_ptr(), add };
                    form.body.multiply(&self.packing, rounded.as_ref().map_or(x, |m| m.view()), out);
                }
                // Its factors round what each of them meets.
                PackedTerm::Product { left, right } => scratch::with(x.rows() * right.rows, |inner| {
                    let inner = &mut inner[..x.rows() * right.rows];
                    right.run(x, MatMut::new(x.rows(), right.rows, inner), false);
                    left.run(MatRef::new(x.rows(), right.rows, inner), out.reborrow(), add);
                }),
            }
            add = true;
        }
    }
}

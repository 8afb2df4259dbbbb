//! One row of x times all terms of a matrix in one pass over its rows: a task multiplies its panels of the first term,
//! then the same rows of the others, while x and their results are near. There is one hand-over to the threads and one
//! wait for them, whatever the number of terms; of a product of two factors the first is multiplied before.
//!
//! Every output gets the same sums in the same order as term by term, so a row alone has the bits that it has among
//! others.

use lacuna_base::{MatMut, MatRef};

use super::form::{Given, Packed, Plan};
use super::prepare::{AsBytes, Work, quantized, quantized_room, quantized_row};
use super::products::unit;
use super::{PackedTerm, Packing};
use crate::op::matmul::Out;
use crate::panel::rowtables::STEP;
use crate::panel::{BLOCK, Opening, ROWS};
use crate::{parallel, scratch};

/// Terms at most; more are multiplied one after the other.
const MOST: usize = 6;

/// A term's part of the pass; what it multiplies by, where that is not x as bytes.
type Joined<'a> = Option<(&'a Packed, Option<Given>)>;

/// The piece of a term that takes part in the pass, the length of what it multiplies by, and how it wants it.
fn joining<'a>(packing: &Packing, term: &'a PackedTerm) -> Option<(&'a Packed, usize, Plan)> {
    match term {
        PackedTerm::Piece(form) => Some((form, 0, form.body.joins(packing)?)),
        PackedTerm::Product { left, right } => match &left.terms[..] {
            [PackedTerm::Piece(form)] => Some((form, right.rows, form.body.joins(packing)?)),
            _ => None,
        },
    }
}

/// A row's length with zeros after it for whoever reads on: whole blocks of every kind, and one more column.
fn padded_len(len: usize) -> usize {
    (len.next_multiple_of(STEP) + 1).next_multiple_of(16)
}

/// `out = x · Wᵀ` for one row of x; false, and nothing done, where the terms cannot be multiplied in one pass.
pub(super) fn fused(packing: &Packing, terms: &[PackedTerm], x: MatRef<'_>, out: Out) -> bool {
    let cols = x.cols();
    let (mut bytes, mut room) = (None::<AsBytes>, padded_len(cols));
    if terms.len() > MOST {
        return false;
    }
    for term in terms {
        let Some((_, rank, plan)) = joining(packing, term) else { return false };
        match (term, plan) {
            (PackedTerm::Piece(_), Plan::Bytes(kind)) if bytes.is_some_and(|b| b != kind) => return false,
            (PackedTerm::Piece(_), Plan::Bytes(kind)) => bytes = Some(kind),
            (PackedTerm::Piece(_), Plan::Row { .. }) => {}
            (PackedTerm::Product { .. }, plan) => {
                room += padded_len(rank);
                if let Plan::Bytes(kind) = plan {
                    room += quantized_room(kind).next_multiple_of(16);
                }
            }
        }
    }
    scratch::with(room, |room| {
        let (row, mut rest) = room.split_at_mut(padded_len(cols));
        row[..cols].copy_from_slice(x.row(0));
        row[cols..].fill(0.0);
        let row = row.as_ptr();
        let mut parts: [Joined<'_>; MOST] = [None; MOST];
        for (part, term) in parts.iter_mut().zip(terms) {
            let (form, rank, plan) = joining(packing, term).expect("as before");
            let given = match (term, plan) {
                (PackedTerm::Piece(_), Plan::Bytes(_)) => None,
                (PackedTerm::Piece(_), Plan::Row { .. }) => Some(Given::Row(row)),
                (PackedTerm::Product { right, .. }, plan) => {
                    let (inner, after) = rest.split_at_mut(padded_len(rank));
                    right.run(x, MatMut::new(1, rank, &mut inner[..rank]), false);
                    inner[rank..].fill(0.0);
                    rest = after;
                    Some(match plan {
                        Plan::Row { .. } => Given::Row(inner.as_ptr()),
                        Plan::Bytes(kind) => {
                            let (codes, after) = rest.split_at_mut(quantized_room(kind).next_multiple_of(16));
                            rest = after;
                            Given::Bytes(quantized_row(packing.isa, inner, kind, codes))
                        }
                    })
                }
            };
            *part = Some((form, given));
        }
        let all = |given: Option<Given>, from: usize, to: usize| {
            for (i, (form, own)) in parts.iter().flatten().enumerate() {
                if let Some(given) = own.or(given) {
                    form.body.some(packing.isa, (from, to), given, if i > 0 { out.added() } else { out });
                }
            }
        };
        let count = parts.iter().flatten().next().map_or(0, |(form, _)| form.body.count());
        let (unit, cost) = (unit(count), ROWS * cols.next_multiple_of(BLOCK));
        match (bytes, &parts[0]) {
            (Some(kind), first) => {
                let opening = |from, to| match first {
                    Some((form, None)) => form.body.opening((from, to)),
                    _ => Opening::NONE,
                };
                let work = Work { count, unit, cost: cost / 2 };
                quantized(packing.isa, x, kind, work, opening, |x, from, to| all(Some(Given::Bytes(x)), from, to));
            }
            (None, _) => parallel::ranges(count, unit, usize::MAX, cost, |from, to| all(None, from, to)),
        }
    });
    true
}

//! Maps at a matrix's ends, applied to rows.
//!
//! Every row is mapped by the same operations in the same order, whatever its company.

use std::sync::Arc;

use lacuna_base::{MatMut, MatRef};
use lacuna_format::{Float, FormatError, Map, Pattern, Piece, Stored, Values, hadamard_core, hadamard_parts};

use super::{Activations, Linear, Packing};
use crate::op::rotate::{Factors, Rotate};
use crate::simd::dispatch;
use crate::{Isa, parallel, scratch};

/// A map of rows.
#[derive(Clone)]
pub(super) struct Turn {
    kind: Kind,
    bytes: u64,
}

#[derive(Clone)]
enum Kind {
    Permutation(Arc<[u32]>),
    Diagonal(Arc<[f32]>),
    Hadamard { h: usize, m: usize, core: Arc<[f32]>, signs: Arc<[f32]> },
    Dense(Box<Linear>),
}

impl Turn {
    /// A map of `n` values that has passed its check.
    pub(super) fn of(map: &Map, n: usize, packing: &Packing) -> Result<Turn, FormatError> {
        let floats = |float: &Float, bytes: &[u8]| {
            let mut out = vec![0.0; n];
            float.decode(bytes, &mut out);
            out.into()
        };
        let kind = match map {
            Map::Permutation(index) => {
                Kind::Permutation(index.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
            Map::Diagonal(float, bytes) => Kind::Diagonal(floats(float, bytes)),
            Map::Hadamard { size, signs } => {
                let Some((h, m)) = hadamard_parts(*size) else {
                    return Err(FormatError::new(format!("no Hadamard matrix of order {size}")));
                };
                let signs = signs.as_ref().map_or(Vec::new(), |s| {
                    (0..n).map(|i| if s[i / 8] >> (i % 8) & 1 == 1 { -1.0 } else { 1.0 }).collect()
                });
                Kind::Hadamard {
                    h,
                    m,
                    core: hadamard_core(h).into_iter().map(f32::from).collect(),
                    signs: signs.into(),
                }
            }
            Map::Dense { size, float, values } => {
                let values = Values::Float(*float, values.clone());
                let piece = Piece { rows: *size, cols: *size, pattern: Pattern::Dense, values };
                let packing = Packing { activations: Activations::Exact, ..*packing };
                Kind::Dense(Box::new(Linear::pack_with(&Stored::from_piece(piece), &packing)?))
            }
        };
        Ok(Turn { kind, bytes: map.bytes() })
    }

    /// Whether `other` is known to map rows the same way. (Nobody asks two dense maps: they count as different.)
    pub(super) fn same(&self, other: &Turn) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::Permutation(a), Kind::Permutation(b)) => a == b,
            (Kind::Diagonal(a), Kind::Diagonal(b)) => a == b,
            (Kind::Hadamard { h, m, signs, .. }, Kind::Hadamard { h: other_h, m: other_m, signs: other_signs, .. }) => {
                (h, m, signs) == (other_h, other_m, other_signs)
            }
            _ => false,
        }
    }

    /// Bytes that one row reads.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its name in reports.
    pub(super) fn name(&self) -> &'static str {
        match self.kind {
            Kind::Permutation(_) => "permutation",
            Kind::Diagonal(_) => "diagonal",
            Kind::Hadamard { .. } => "hadamard",
            Kind::Dense(_) => "dense map",
        }
    }

    /// Multiply-adds of one row of `n` values.
    pub(super) fn work(&self, n: usize) -> u64 {
        let each = match &self.kind {
            Kind::Permutation(_) => 0,
            Kind::Diagonal(_) => 1,
            Kind::Hadamard { h, m, .. } => h + m.trailing_zeros() as usize,
            Kind::Dense(l) => l.cols,
        };
        (n * each) as u64
    }

    /// Maps `rows` rows of `n` values that lie one after the other in `v`; `room` is as long.
    fn apply(&self, isa: Isa, n: usize, v: &mut [f32], room: &mut [f32]) {
        let rows = v.len() / n.max(1);
        let at = Rows(v.as_mut_ptr());
        // SAFETY: tasks take rows that do not overlap.
        let row = |r: usize| unsafe { std::slice::from_raw_parts_mut(at.get().add(r * n), n) };
        match &self.kind {
            Kind::Permutation(index) => {
                room.copy_from_slice(v);
                parallel::ranges(rows, 1, usize::MAX, 2 * n, |from, to| {
                    for r in from..to {
                        let given = &room[r * n..(r + 1) * n];
                        row(r).iter_mut().zip(index.iter()).for_each(|(v, &i)| *v = given[i as usize]);
                    }
                });
            }
            Kind::Diagonal(d) => parallel::ranges(rows, 1, usize::MAX, n, |from, to| {
                for r in from..to {
                    row(r).iter_mut().zip(d.iter()).for_each(|(v, d)| *v *= d);
                }
            }),
            Kind::Hadamard { h, m, core, signs } => {
                let size = h * m;
                let factors = Factors { h: *h, m: *m, core, signs };
                let (cost, by) = (self.work(size) as usize, 1.0 / (size as f32).sqrt());
                parallel::ranges(rows * n / size, 1, usize::MAX, cost, |from, to| {
                    scratch::with(size, |scratch| {
                        dispatch(isa, Rotate { data: at.get(), from, to, factors, by, scratch });
                    });
                });
            }
            Kind::Dense(l) => {
                room.copy_from_slice(v);
                let (size, all) = (l.cols, v.len());
                l.forward(MatRef::new(all / size, size, room), MatMut::new(all / size, size, v));
            }
        }
    }
}

struct Rows(*mut f32);
// SAFETY: used for rows that do not overlap.
unsafe impl Sync for Rows {}

impl Rows {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Calls `f` with `maps` applied to the rows of `x`.
pub(super) fn mapped(isa: Isa, maps: &[Turn], x: MatRef<'_>, f: impl FnOnce(MatRef<'_>)) {
    if maps.is_empty() {
        return f(x);
    }
    let (rows, n) = (x.rows(), x.cols());
    scratch::with(2 * rows * n, |room| {
        let (v, room) = room[..2 * rows * n].split_at_mut(rows * n);
        v.chunks_exact_mut(n.max(1)).enumerate().for_each(|(r, v)| v.copy_from_slice(x.row(r)));
        maps.iter().for_each(|map| map.apply(isa, n, v, room));
        f(MatRef::new(rows, n, v));
    });
}

/// `out` becomes what `f` writes, with `maps` applied to its rows.
pub(super) fn mapping(isa: Isa, maps: &[Turn], mut out: MatMut<'_>, f: impl FnOnce(MatMut<'_>)) {
    if maps.is_empty() {
        return f(out);
    }
    let (rows, n) = (out.rows(), out.cols());
    scratch::with(2 * rows * n, |room| {
        let (v, room) = room[..2 * rows * n].split_at_mut(rows * n);
        f(MatMut::new(rows, n, v));
        maps.iter().for_each(|map| map.apply(isa, n, v, room));
        v.chunks_exact(n.max(1)).enumerate().for_each(|(r, v)| out.row_mut(r).copy_from_slice(v));
    });
}

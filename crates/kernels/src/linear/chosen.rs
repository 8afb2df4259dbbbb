//! Products of rows that are zero but in some channels: by columns, where that reads less.

use std::marker::PhantomData;
use std::sync::Arc;

use lacuna_base::{MatMut, MatRef};
use lacuna_format::{Stored, Term};

use super::prepare::{AsBytes, padded, quantized_room, quantized_row};
use super::{Activations, Linear};
use crate::op::columns::{Batch, Block, ByColumns, batches, meet, scratch};
use crate::panel::columns::{ByteUnit, Columns, FloatUnit, NibbleUnit, UNIT, Unit, Written};
use crate::panel::float::{Bf16, F16, F32};
use crate::panel::ints::META;
use crate::panel::{BLOCK, SPAN};
use crate::simd::dispatch;
use crate::{Isa, parallel, scratch as room};

/// What a byte of single columns costs, in quarters of a byte that the whole product reads (`examples/columns.rs`).
const COST: u64 = 5;
/// The same where codes meet bytes: the whole product multiplies four of them at once, columns one by one.
const COST_BYTES: u64 = 12;

impl Linear {
    /// Keeps the matrix by columns as well, for [`Linear::forward_chosen`]: bytes that this takes, none where its form
    /// has no columns (anything but one dense term of floats, or of codes under a scale of their group, with a zero or
    /// a float minimum, without maps) and products read all of it as before. `stored` is what it was packed from.
    pub fn keep_columns(&mut self, stored: &Stored) -> Option<u64> {
        assert_eq!((self.rows, self.cols), (stored.rows, stored.cols), "another matrix");
        let plain = stored.input.is_empty() && stored.output.is_empty();
        let ([Term::Piece(piece)], true) = (&stored.terms[..], plain) else { return None };
        if matches!(self.packing.activations, Activations::Simulated(_)) {
            return None;
        }
        self.columns = Columns::of(piece).map(Arc::new);
        self.columns.as_ref().map(|c| c.held())
    }

    /// As [`Linear::forward`] for several matrices and the same rows, which are zero but in the channels of `kept`
    /// (rising; none: anywhere), a list for each row: the same bits, as long as no weight is NaN or infinite. Where
    /// columns are kept and that reads less, the channels that a row lacks are not read. Gives the bytes of weights that
    /// are read.
    #[track_caller]
    pub fn forward_chosen(all: &[&Linear], x: MatRef<'_>, kept: &[Option<&[u32]>], out: &mut [MatMut<'_>]) -> u64 {
        assert_eq!((all.len(), x.rows()), (out.len(), kept.len()), "a result of each matrix, a list for each row");
        for (l, out) in all.iter().zip(out.iter()) {
            assert_eq!(x.cols(), l.cols, "x has {} columns, the matrix {}", x.cols(), l.cols);
            assert_eq!((out.rows(), out.cols()), (x.rows(), l.rows), "the result has another shape");
            let fits =
                |k: &&[u32]| k.windows(2).all(|w| w[0] < w[1]) && k.last().is_none_or(|c| (*c as usize) < l.cols);
            assert!(kept.iter().flatten().all(fits), "channels rise and are those of the matrix");
        }
        // What each matrix reads by columns, where that is less than all of it.
        let less = |l: &Linear| {
            let columns = l.columns.as_deref()?;
            let read = kept.iter().map(|k| k.map(|k| columns.bytes(k))).sum::<Option<u64>>()?;
            let cost = if l.meets_bytes(columns) { COST_BYTES } else { COST };
            (x.rows() > 0 && read * cost < l.weights_bytes() * 4).then_some(read)
        };
        let by: Vec<Option<u64>> = all.iter().map(|l| less(l)).collect();
        let mut bytes = 0;
        for r in 0..x.rows() {
            let Some(kept) = kept[r] else { continue };
            let parts = all.iter().zip(&by).zip(out.iter_mut()).filter(|((_, by), _)| by.is_some());
            let parts: Vec<Part<'_>> = parts
                .filter_map(|((l, _), out)| {
                    let columns = l.columns.as_deref()?;
                    let (batches, bytes) = l.batches(columns, x.row(r), kept);
                    Some(Part { columns, batches, bytes, isa: l.packing.isa, out: out.row_mut(r).as_mut_ptr() })
                })
                .collect();
            by_columns(&parts, kept.len());
        }
        let mut i = 0;
        while i < all.len() {
            // Neighbours that are read whole share one preparation of the rows.
            let n = match &by[i..] {
                [None, None, None, ..] => 3,
                [None, None, ..] => 2,
                _ => 1,
            };
            match &mut out[i..i + n] {
                [a, b, c] => {
                    let mut out = [a.reborrow(), b.reborrow(), c.reborrow()];
                    Linear::forward_all([all[i], all[i + 1], all[i + 2]], x, &mut out);
                }
                [a, b] => Linear::forward_all([all[i], all[i + 1]], x, &mut [a.reborrow(), b.reborrow()]),
                [a] if by[i].is_none() => all[i].forward(x, a.reborrow()),
                _ => {}
            }
            bytes += (i..i + n).map(|i| by[i].unwrap_or(all[i].weights_bytes())).sum::<u64>();
            i += n;
        }
        bytes
    }

    /// Whether rows come as bytes to its columns, as they do to its panels.
    fn meets_bytes(&self, columns: &Columns) -> bool {
        columns.groups.is_some() && self.packing.activations == Activations::Int8
    }

    /// The kept channels of a row in the order in which they are multiplied, and whether x comes as bytes.
    fn batches(&self, columns: &Columns, x: &[f32], kept: &[u32]) -> (Vec<Batch>, bool) {
        let none = |_: u32| Block::default();
        let Some(groups) = &columns.groups else {
            return (batches(kept, |c| (c / SPAN as u32, 0), |c| x[c as usize], none), false);
        };
        let (run, zero) = (groups.run as u32, groups.zero);
        if !self.meets_bytes(columns) {
            return (batches(kept, |c| (c / SPAN as u32, c / run), |c| x[c as usize], none), false);
        }
        let kind = AsBytes { zero, sixteens: false, blocks: x.len().div_ceil(BLOCK), tiled: false };
        let made = padded(x, kind.blocks, |x| {
            room::with(quantized_room(kind), |room| {
                // SAFETY: padded to whole blocks.
                let x = unsafe { std::slice::from_raw_parts(x, kind.blocks * BLOCK) };
                let row = quantized_row(self.packing.isa, x, kind, room);
                // SAFETY: the row has a byte for each channel.
                let byte = |c: u32| f32::from(unsafe { *row.codes.add(c as usize) });
                // SAFETY: the row has four numbers for each block, the second and the third whole ones.
                let block = |b: u32| unsafe {
                    let meta = row.meta.add(b as usize * META);
                    let whole = |i: usize| meta.add(i).cast::<i32>().read() as f32;
                    Block { bias: whole(1), sum: whole(2), scale: *meta, scaled: *meta.add(3) }
                };
                batches(kept, |c| (c / BLOCK as u32, c / run), byte, block)
            })
        });
        (made, true)
    }
}

/// One matrix's product with one row.
struct Part<'a> {
    columns: &'a Columns,
    batches: Vec<Batch>,
    bytes: bool,
    isa: Isa,
    out: *mut f32,
}

// SAFETY: tasks write the results of different outputs.
unsafe impl Sync for Part<'_> {}

/// Shares the outputs of all parts out, `kept` channels each.
fn by_columns(parts: &[Part<'_>], kept: usize) {
    let all: usize = parts.iter().map(|p| p.columns.units()).sum();
    // Whole columns lie together: threads take long pieces of them.
    let unit = all.div_ceil(2 * parallel::threads()).max(4);
    parallel::ranges(all, unit, usize::MAX, UNIT * kept.max(1), |from, to| {
        let mut first = 0;
        for p in parts {
            let units = p.columns.units();
            let within = |at: usize| at.clamp(first, first + units) - first;
            let (from, to) = (within(from), within(to));
            if from < to {
                p.some(from, to);
            }
            first += units;
        }
    });
}

impl Part<'_> {
    fn some(&self, from: usize, to: usize) {
        match (self.columns.written, self.bytes) {
            (Written::F32, _) => self.run::<FloatUnit<F32>, { meet::FLOATS }>(from, to),
            (Written::F16, _) => self.run::<FloatUnit<F16>, { meet::FLOATS }>(from, to),
            (Written::Bf16, _) => self.run::<FloatUnit<Bf16>, { meet::FLOATS }>(from, to),
            (Written::Bytes, false) => self.run::<ByteUnit, { meet::CODES }>(from, to),
            (Written::Bytes, true) => self.run::<ByteUnit, { meet::BYTES }>(from, to),
            (Written::Nibbles, false) => self.run::<NibbleUnit, { meet::CODES }>(from, to),
            (Written::Nibbles, true) => self.run::<NibbleUnit, { meet::BYTES }>(from, to),
        }
    }

    fn run<U: Unit, const MEET: usize>(&self, from: usize, to: usize) {
        let (columns, batches, out) = (self.columns, &self.batches[..], self.out);
        room::with(scratch(to - from), |sums| {
            let op: ByColumns<'_, U, MEET> = ByColumns { columns, batches, from, to, sums, out, _unit: PhantomData };
            dispatch(self.isa, op);
        });
    }
}

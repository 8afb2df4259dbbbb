//! One row of x that is zero but in some channels, times a matrix by columns.
//!
//! The sums are those of the products by panels, in their order, without what adds zero: in f32, spans of 256 columns
//! are summed apart, one chain of fused operations over the channels in rising order, and added one after the other;
//! of bytes, blocks of 32 columns are summed exactly and then scaled. So a row gets the bits that the whole product
//! gives it, and who multiplies may choose by what is read.

use std::marker::PhantomData;

use crate::panel::columns::{Columns, Second, UNIT, Unit};
use crate::panel::fetch;
use crate::simd::{Op, Simd};

/// Columns that are read side by side.
pub(crate) const SIDE: usize = 4;

/// Bytes of each thread's columns that are prefetched ahead of what is multiplied, about: which comes next is known, and
/// no processor would guess it.
const AHEAD: usize = 6 << 10;

/// Some channels that are multiplied together, all of one group and of one span or block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    /// The channels; one that stands again has an `x` of zero there.
    pub(crate) channels: [u32; SIDE],
    /// What stands in the row, or its byte.
    pub(crate) x: [f32; SIDE],
    /// Their group.
    pub(crate) group: u32,
    /// Whether they are the first, and the last, of their span or block.
    pub(crate) first: bool,
    pub(crate) last: bool,
    pub(crate) block: Block,
}

/// What belongs to a block of bytes; zeros elsewhere.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Block {
    /// Minus the matrix's zero times the sum of its bytes.
    pub(crate) bias: f32,
    /// That sum.
    pub(crate) sum: f32,
    /// The row's scale there, and the sum times it.
    pub(crate) scale: f32,
    pub(crate) scaled: f32,
}

/// Cuts the kept channels of a row into batches: `within` gives a channel's span or block, and its group; `x` its number
/// in the row.
pub(crate) fn batches(
    kept: &[u32],
    within: impl Fn(u32) -> (u32, u32),
    x: impl Fn(u32) -> f32,
    block: impl Fn(u32) -> Block,
) -> Vec<Batch> {
    let mut out: Vec<Batch> = Vec::with_capacity(kept.len() / 2 + 8);
    let (mut have, mut at) = (SIDE, (u32::MAX, u32::MAX));
    for &c in kept {
        let place = within(c);
        if have == SIDE || place != at {
            let first = place.0 != at.0;
            if let Some(before) = out.last_mut() {
                before.last = first;
            }
            let block = block(place.0);
            out.push(Batch { channels: [c; SIDE], x: [0.0; SIDE], group: place.1, first, last: true, block });
            (have, at) = (0, place);
        }
        if let Some(batch) = out.last_mut() {
            batch.channels[have..].fill(c);
            batch.x[have] = x(c);
        }
        have += 1;
    }
    out
}

/// How values meet x.
pub(crate) mod meet {
    /// Floats, as they are.
    pub(crate) const FLOATS: usize = 0;
    /// Codes as numbers, `scale * (code - zero)` or `scale * code + minimum`.
    pub(crate) const CODES: usize = 1;
    /// Codes as they are, with bytes of x: exact sums, below 2^24, which f32 holds.
    pub(crate) const BYTES: usize = 2;
}

/// Units `from..to` of the outputs.
pub(crate) struct ByColumns<'a, U, const MEET: usize> {
    pub(crate) columns: &'a Columns,
    pub(crate) batches: &'a [Batch],
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Room for [`scratch`].
    pub(crate) sums: &'a mut [f32],
    /// The row's results, as many as the matrix has outputs.
    pub(crate) out: *mut f32,
    pub(crate) _unit: PhantomData<U>,
}

/// Scratch for so many units.
pub(crate) fn scratch(units: usize) -> usize {
    2 * units * UNIT
}

impl<U: Unit, const MEET: usize> Op for ByColumns<'_, U, MEET> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let n = (self.to - self.from) * UNIT;
        assert!(self.sums.len() >= 2 * n && self.to <= self.columns.units(), "room for the sums");
        let (open, total) = self.sums.split_at_mut(n);
        total[..n].fill(0.0);
        let (open, total) = (open.as_mut_ptr(), total.as_mut_ptr());
        let each = SIDE * (self.to - self.from) * U::BYTES;
        let ahead = (AHEAD / each.max(1)).clamp(1, 16);
        let mut i = 0;
        while i < self.batches.len() {
            let then = &self.batches[(i + ahead).min(self.batches.len() - 1)];
            let pass = Pass { columns: self.columns, now: &self.batches[i], then, from: self.from, to: self.to };
            // SAFETY: the maker has these units, channels and groups; the sums are as long.
            unsafe { self::pass::<S, U, MEET>(s, pass, open, total) };
            i += 1;
        }
        let have = n.min(self.columns.rows - self.from * UNIT);
        // SAFETY: the maker has that many results from this unit on.
        unsafe { std::ptr::copy_nonoverlapping(total, self.out.add(self.from * UNIT), have) };
    }
}

/// A batch and the one that is prefetched meanwhile.
struct Pass<'a> {
    columns: &'a Columns,
    now: &'a Batch,
    then: &'a Batch,
    from: usize,
    to: usize,
}

/// Adds a batch to the sums of its span or block, `open`, and what is complete to `total`.
/// # Safety
/// The matrix has these units, channels and groups, and there is room for a sum of each output.
#[inline(always)]
unsafe fn pass<S: Simd, U: Unit, const MEET: usize>(s: S, p: Pass<'_>, open: *mut f32, total: *mut f32) {
    let (n, b) = (UNIT / S::LANES, p.now);
    let mut at = [p.columns.at(0); SIDE];
    let mut then = at;
    let mut x = [s.splat(0.0); SIDE];
    let mut j = 0;
    while j < SIDE {
        at[j] = p.columns.at(b.channels[j] as usize);
        then[j] = p.columns.at(p.then.channels[j] as usize);
        x[j] = s.splat(b.x[j]);
        j += 1;
    }
    let group = b.group as usize;
    let (zeros, minima) = match &p.columns.groups {
        Some(g) => (g.second == Second::Zeros, g.second == Second::Minima),
        None => (false, false),
    };
    let mut u = p.from;
    while u < p.to {
        let place = u * U::BYTES;
        let mut line = place.next_multiple_of(64);
        while line < place + U::BYTES {
            let mut j = 0;
            while j < SIDE {
                fetch(then[j].wrapping_add(line));
                j += 1;
            }
            line += 64;
        }
        // SAFETY: as the caller promises.
        unsafe {
            let here = (u - p.from) * UNIT;
            let mut sum = [s.splat(b.block.bias); 4];
            let (mut scale, mut second) = ([s.splat(0.0); 4], [s.splat(0.0); 4]);
            let mut v = 0;
            while v < n {
                if !b.first {
                    sum[v] = s.load(open.add(here + v * S::LANES));
                }
                let scaled = MEET == meet::CODES || (MEET == meet::BYTES && b.last);
                if let (true, Some(g)) = (scaled, &p.columns.groups) {
                    scale[v] = g.scale(s, group, u, v);
                    second[v] = g.second(s, group, u, v, p.columns.units());
                }
                v += 1;
            }
            let mut j = 0;
            while j < SIDE {
                let w = U::load(s, at[j].add(place));
                let mut v = 0;
                while v < n {
                    let w = match (MEET, minima) {
                        (meet::CODES, false) => s.mul(s.sub(w[v], second[v]), scale[v]),
                        (meet::CODES, true) => s.add(s.mul(w[v], scale[v]), second[v]),
                        _ => w[v],
                    };
                    sum[v] = s.fma(x[j], w, sum[v]);
                    v += 1;
                }
                j += 1;
            }
            let mut v = 0;
            while v < n {
                let to = if b.last { total } else { open }.add(here + v * S::LANES);
                let done = if !b.last {
                    sum[v]
                } else if MEET == meet::BYTES {
                    // Whole numbers that f32 holds, so that these are exact, too.
                    let sum = if zeros { s.sub(sum[v], s.mul(second[v], s.splat(b.block.sum))) } else { sum[v] };
                    let done = s.fused(sum, s.mul(scale[v], s.splat(b.block.scale)), s.load(to));
                    if minima { s.fused(second[v], s.splat(b.block.scaled), done) } else { done }
                } else {
                    s.add(s.load(to), sum[v])
                };
                s.store(to, done);
                v += 1;
            }
        }
        u += 1;
    }
}

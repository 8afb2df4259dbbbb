//! Products with panels whose rows share their columns: x is gathered to a panel's columns, and what remains is dense.
//!
//! Rows of x are taken one by one, so that a row's result cannot depend on others. In f32 every output has four chains of fused operations,
//! for the four columns of each quad, which are added in the end; in bytes, pieces in rising order as in [`super::dot`]. Bytes are quantized
//! before they are gathered, once for all panels.

use super::dot::Rows;
use super::matmul::Out;
use crate::panel::gathered::{Layout, cut};
use crate::panel::ints::{Bytes, META};
use crate::panel::{Ahead, BLOCK, Codec, ROWS, View};
use crate::simd::{Op, Simd};

/// Scratch of a task, in f32 values: two gathered groups, the gathered row, what belongs to pieces, and their octets.
pub(crate) fn scratch(layout: &Layout) -> usize {
    2 * (layout.group * BLOCK + 2 * BLOCK)
        + 2 * (layout.octets * 8 + BLOCK)
        + 2 * META * layout.pieces
        + layout.pieces
        + 64
}

/// Panels `from..to` times all rows of x.
pub(crate) struct Gathered<'a, C> {
    pub(crate) panels: View,
    pub(crate) codec: &'a C,
    pub(crate) layout: Layout,
    pub(crate) from: usize,
    pub(crate) to: usize,
    /// Padded with zeros to whole blocks, `blocks * 32` apart.
    pub(crate) x: *const f32,
    pub(crate) rows: usize,
    pub(crate) out: Out,
    pub(crate) scratch: &'a mut [f32],
}

/// The same with quantized rows, every scale group of the layout with one scale.
pub(crate) struct GatheredBytes<'a, C> {
    pub(crate) panels: View,
    pub(crate) codec: &'a C,
    pub(crate) layout: Layout,
    /// The matrix's zero.
    pub(crate) zero: i32,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) x: Rows,
    pub(crate) rows: usize,
    pub(crate) out: Out,
    pub(crate) scratch: &'a mut [f32],
}

/// Where a task's scratch is cut.
#[derive(Clone, Copy)]
struct Room {
    groups: [*mut f32; 2],
    x: *mut f32,
    meta: *mut f32,
    /// Octets of each piece.
    counts: *mut u32,
}

/// Values on the way to f32.
impl<C: Codec> Op for Gathered<'_, C> {
    type Out = ();
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let room = room(self.scratch, &self.layout);
        let (blocks, l) = (self.panels.blocks, self.layout);
        let ahead = self.panels.ahead_of(l.pieces);
        let mut r = 0;
        while r < self.rows {
            let (mut p, mut pieces) = (self.from, 0);
            while p < self.to {
                // SAFETY: the maker has these panels and rows, and room in `out`.
                unsafe {
                    let (panel, x) = (self.panels.at(p), self.x.add(r * blocks * BLOCK));
                    // What the panel before gathered serves this one, too, where they share their columns.
                    let fresh = p == self.from || p.is_multiple_of(l.share);
                    let v = if l.pair {
                        pieces = gather::<S, true>(s, panel, blocks, &l, x, room);
                        floats::<S, C, true>(s, self.codec, panel, &l, (pieces, ahead), room)
                    } else {
                        if fresh {
                            pieces = gather::<S, false>(s, panel, blocks, &l, x, room);
                        }
                        floats::<S, C, false>(s, self.codec, panel, &l, (pieces, ahead), room)
                    };
                    put(s, self.out, r, p, self.panels.rows, v, l.pair);
                }
                p += 1;
            }
            r += 1;
        }
    }
}

/// Codes against quantized activations.
impl<C: Bytes> Op for GatheredBytes<'_, C> {
    type Out = ();
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let room = room(self.scratch, &self.layout);
        let (blocks, zero, l) = (self.panels.blocks, self.zero, self.layout);
        let ahead = self.panels.ahead_of(l.pieces);
        let mut r = 0;
        while r < self.rows {
            let (mut p, mut pieces) = (self.from, 0);
            while p < self.to {
                // SAFETY: the maker has these panels and rows, and room in `out`.
                unsafe {
                    let panel = self.panels.at(p);
                    let x = self.x.codes.add(r * blocks * BLOCK);
                    let meta = self.x.meta.add(r * blocks.div_ceil(l.group) * META);
                    // What the panel before gathered serves this one, too, where they share their columns.
                    let fresh = p == self.from || p.is_multiple_of(l.share);
                    let v = if l.pair {
                        pieces = gather_bytes::<S, true>(s, panel, blocks, &l, (x, meta), zero, room);
                        bytes::<S, C, true>(s, self.codec, panel, &l, (pieces, ahead), room)
                    } else {
                        if fresh {
                            pieces = gather_bytes::<S, false>(s, panel, blocks, &l, (x, meta), zero, room);
                        }
                        bytes::<S, C, false>(s, self.codec, panel, &l, (pieces, ahead), room)
                    };
                    put(s, self.out, r, p, self.panels.rows, v, l.pair);
                }
                p += 1;
            }
            r += 1;
        }
    }
}

fn room(scratch: &mut [f32], l: &Layout) -> Room {
    assert!(scratch.len() >= self::scratch(l), "room for a gathered row");
    let group = l.group * BLOCK + 2 * BLOCK;
    let (a, rest) = scratch.split_at_mut(group);
    let (b, rest) = rest.split_at_mut(group);
    let (x, rest) = rest.split_at_mut(2 * (l.octets * 8 + BLOCK));
    let (meta, counts) = rest.split_at_mut(2 * META * l.pieces);
    Room {
        groups: [a.as_mut_ptr(), b.as_mut_ptr()],
        x: x.as_mut_ptr(),
        meta: meta.as_mut_ptr(),
        counts: counts.as_mut_ptr().cast(),
    }
}

/// Gathers x to the panel's columns; gives the number of pieces.
/// # Safety
/// The panel and x are as long as `blocks` says, the room as `layout` does.
#[inline(always)]
unsafe fn gather<S: Simd, const PAIR: bool>(
    s: S,
    panel: *const u8,
    blocks: usize,
    layout: &Layout,
    x: *const f32,
    room: Room,
) -> usize {
    let (mut pieces, mut octets, mut b) = (0, 0, 0);
    while b < blocks {
        let end = (b + layout.group).min(blocks);
        // SAFETY: as the caller promises.
        unsafe {
            let mut n = group(s, panel, x, b, end, room.groups[0]);
            if PAIR {
                let m = group(s, panel.add(blocks * 4), x, b, end, room.groups[1]);
                // The shorter half must be zeros as far as the longer goes.
                let (short, from, to) = if m < n { (1, m, n) } else { (0, n, m) };
                zeros(s, room.groups[short].add(from), to + BLOCK - from);
                n = n.max(m);
            }
            let (count, parts) = cut(n);
            let mut i = 0;
            while i < parts {
                let at = octets + 4 * i;
                *room.counts.add(pieces + i) = (count - 4 * i).min(4) as u32;
                let mut j = 0;
                while j < BLOCK {
                    if PAIR {
                        *room.x.add(2 * (8 * at + j)) = *room.groups[0].add(BLOCK * i + j);
                        *room.x.add(2 * (8 * at + j) + 1) = *room.groups[1].add(BLOCK * i + j);
                        j += 1;
                    } else {
                        s.store(room.x.add(8 * at + j), s.load(room.groups[0].add(BLOCK * i + j)));
                        j += S::LANES;
                    }
                }
                i += 1;
            }
            (octets, pieces, b) = (octets + count, pieces + parts, end);
        }
    }
    pieces
}

/// The same with codes of x, whose units are the layout's groups.
/// # Safety
/// As for [`gather`]; `x` are the row's codes and what belongs to its units.
#[inline(always)]
unsafe fn gather_bytes<S: Simd, const PAIR: bool>(
    s: S,
    panel: *const u8,
    blocks: usize,
    layout: &Layout,
    (x, units): (*const i8, *const f32),
    zero: i32,
    room: Room,
) -> usize {
    let (mut pieces, mut octets, mut b, mut u) = (0, 0, 0, 0);
    let halves = [room.groups[0].cast::<i8>(), room.groups[1].cast::<i8>()];
    while b < blocks {
        let end = (b + layout.group).min(blocks);
        // SAFETY: as the caller promises.
        unsafe {
            let scale = *units.add(u * META);
            let to = room.x.cast::<i8>().add(8 * octets * if PAIR { 2 } else { 1 });
            // Of one half the bytes go to their place at once.
            let first = if PAIR { halves[0] } else { to };
            let mut n = group_bytes(s, panel, x, b, end, first);
            if PAIR {
                let m = group_bytes(s, panel.add(blocks * 4), x, b, end, halves[1]);
                let (short, from, to) = if m < n { (1, m, n) } else { (0, n, m) };
                halves[short].add(from).write_bytes(0, to + BLOCK - from);
                n = n.max(m);
            }
            let (count, parts) = cut(n);
            let mut i = 0;
            while i < parts {
                *room.counts.add(pieces + i) = (count - 4 * i).min(4) as u32;
                let meta = room.meta.add((pieces + i) * META * 2);
                let a = of_piece(scale, s.sum_bytes(first.add(BLOCK * i)), zero);
                if PAIR {
                    let both = of_piece(scale, s.sum_bytes(halves[1].add(BLOCK * i)), zero);
                    let mut k = 0;
                    while k < META {
                        *meta.add(2 * k) = a[k];
                        *meta.add(2 * k + 1) = both[k];
                        k += 1;
                    }
                    let quads = [halves[0].add(BLOCK * i).cast::<u32>(), halves[1].add(BLOCK * i).cast::<u32>()];
                    let to = to.add(2 * BLOCK * i).cast::<u64>();
                    let mut q = 0;
                    while q < BLOCK / 4 {
                        let (a, b) = (quads[0].add(q).read_unaligned(), quads[1].add(q).read_unaligned());
                        to.add(q).write_unaligned(u64::from(a) | u64::from(b) << 32);
                        q += 1;
                    }
                } else {
                    meta.cast::<[f32; META]>().write_unaligned(a);
                }
                i += 1;
            }
            (octets, pieces, b, u) = (octets + count, pieces + parts, end, u + 1);
        }
    }
    pieces
}

/// What belongs to a piece of this scale and sum, see [`META`]. A scale of NaN makes every result of the row NaN.
#[inline(always)]
fn of_piece(scale: f32, sum: i32, zero: i32) -> [f32; META] {
    [scale, f32::from_bits((-zero * sum) as u32), f32::from_bits(sum as u32), scale * sum as f32]
}

/// Moves the bytes of blocks `from..to` whose bit is set together, with 32 zeros after them; gives how many.
/// # Safety
/// The bits, x and `out` are as long.
#[inline(always)]
unsafe fn group_bytes<S: Simd>(s: S, bits: *const u8, x: *const i8, from: usize, to: usize, out: *mut i8) -> usize {
    let (mut n, mut b) = (0, from);
    // SAFETY: as the caller promises.
    unsafe {
        while b < to {
            let mask = bits.add(4 * b).cast::<u32>().read_unaligned();
            n += s.compress_bytes(x.add(b * BLOCK), mask, out.add(n));
            b += 1;
        }
        out.add(n).write_bytes(0, BLOCK);
    }
    n
}

/// Moves the columns of blocks `from..to` whose bit is set together, with 32 zeros after them; gives how many.
/// # Safety
/// The bits, x and `out` are as long.
#[inline(always)]
unsafe fn group<S: Simd>(s: S, bits: *const u8, x: *const f32, from: usize, to: usize, out: *mut f32) -> usize {
    let (mut n, mut c) = (0, from * BLOCK);
    // SAFETY: as the caller promises.
    unsafe {
        while c < to * BLOCK {
            let at = bits.add(c / 8);
            let mask = if S::LANES == 16 { u32::from(at.cast::<u16>().read_unaligned()) } else { u32::from(*at) };
            s.store(out.add(n), s.compress(s.load(x.add(c)), mask));
            n += mask.count_ones() as usize;
            c += S::LANES;
        }
        zeros(s, out.add(n), BLOCK);
    }
    n
}

/// `n` zeros, rounded up to vectors.
/// # Safety
/// There is room.
#[inline(always)]
unsafe fn zeros<S: Simd>(s: S, out: *mut f32, n: usize) {
    let mut i = 0;
    while i < n {
        // SAFETY: as the caller promises.
        unsafe { s.store(out.add(i), s.splat(0.0)) };
        i += S::LANES;
    }
}

/// # Safety
/// The room holds x gathered to the panel.
#[inline(always)]
unsafe fn floats<S: Simd, C: Codec, const PAIR: bool>(
    s: S,
    codec: &C,
    panel: *const u8,
    layout: &Layout,
    (pieces, ahead): (usize, Ahead),
    room: Room,
) -> [S::V; 2] {
    let step = if PAIR { 2 } else { 1 };
    let mut acc = [[s.splat(0.0); 4]; 2];
    let (mut i, mut octets) = (0, 0);
    while i < pieces {
        // SAFETY: as the caller promises.
        unsafe {
            let count = *room.counts.add(i) as usize;
            ahead.fetch(panel, i);
            let mut h = 0;
            while h < ROWS / S::LANES {
                let mut block = codec.piece(s, panel, layout.values_at, i, octets, h);
                let mut o = 0;
                while o < count {
                    let w = codec.eight(s, &mut block, o);
                    let x = room.x.add((octets + o) * 8 * step);
                    let mut j = 0;
                    while j < 8 {
                        acc[h][j % 4] = s.fma(s.spread::<PAIR>(x.add(j * step)), w[j], acc[h][j % 4]);
                        j += 1;
                    }
                    o += 1;
                }
                h += 1;
            }
            (i, octets) = (i + 1, octets + count);
        }
    }
    [0, 1].map(|h: usize| s.add(s.add(acc[h][0], acc[h][1]), s.add(acc[h][2], acc[h][3])))
}

/// # Safety
/// The room holds x gathered to the panel, as bytes.
#[inline(always)]
unsafe fn bytes<S: Simd, C: Bytes, const PAIR: bool>(
    s: S,
    codec: &C,
    panel: *const u8,
    layout: &Layout,
    (pieces, ahead): (usize, Ahead),
    room: Room,
) -> [S::V; 2] {
    let step = if PAIR { 2 } else { 1 };
    let mut out = [s.splat(0.0); 2];
    let mut h = 0;
    while h < ROWS / S::LANES {
        let (mut i, mut octets, mut acc) = (0, 0, s.splat(0.0));
        while i < pieces {
            // SAFETY: as the caller promises.
            unsafe {
                let (count, meta) = (*room.counts.add(i) as usize, room.meta.add(i * META * 2));
                if h == 0 {
                    ahead.fetch(panel, i);
                }
                let mut sum = [s.spread_i::<PAIR>(meta.add(step).cast()), s.splat_i(0)];
                let (values, x) = (panel.add(layout.values_at), room.x.cast::<i8>().add(octets * 8 * step));
                let mut o = 0;
                if count == BLOCK / 8 {
                    // A whole piece, as most are: a loop of known length.
                    while o < BLOCK / 8 {
                        let codes = codec.octet(s, values, 0, octets + o, h);
                        sum = s.dot8::<PAIR>(C::BITS, sum, codes, x.add(o * 8 * step));
                        o += 1;
                    }
                }
                while o < count {
                    let codes = codec.octet(s, values, 0, octets + o, h);
                    sum = s.dot8::<PAIR>(C::BITS, sum, codes, x.add(o * 8 * step));
                    o += 1;
                }
                let shared = codec.shared::<S, false>(s, panel, i, h);
                acc = codec.close::<S, PAIR, false>(s, &shared, s.total(C::BITS, sum), meta, acc);
                (i, octets) = (i + 1, octets + count);
            }
        }
        out[h] = acc;
        h += 1;
    }
    out
}

/// Writes a panel's results, the lanes of a pair put back in the order of rows.
/// # Safety
/// As for [`Out::put`].
#[inline(always)]
unsafe fn put<S: Simd>(s: S, out: Out, r: usize, p: usize, rows: usize, v: [S::V; 2], pair: bool) {
    let mut v = v;
    // SAFETY: as the caller promises.
    unsafe {
        if pair {
            let (mut mixed, mut sorted) = ([0.0f32; ROWS], [0.0f32; ROWS]);
            let mut h = 0;
            while h < ROWS / S::LANES {
                s.store(mixed.as_mut_ptr().add(h * S::LANES), v[h]);
                h += 1;
            }
            let mut i = 0;
            while i < ROWS {
                sorted[i] = mixed[2 * (i % 8) + i / 8];
                i += 1;
            }
            h = 0;
            while h < ROWS / S::LANES {
                v[h] = s.load(sorted.as_ptr().add(h * S::LANES));
                h += 1;
            }
        }
        out.put(s, r, p, rows, v);
    }
}

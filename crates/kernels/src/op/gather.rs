//! Products with panels whose rows share their columns: x is gathered to a panel's columns, and what remains is dense.
//!
//! Every row of x is gathered for itself, so that its result cannot depend on others. In f32 every output has four chains of fused operations,
//! for the four columns of each quad, which are added in the end. Bytes are quantized before they are gathered, once for all panels; an octet
//! of columns is summed exactly, and its sum times both scales added to the output, octets in rising order.

use super::dot::Rows;
use super::matmul::Out;
use crate::panel::gathered::Layout;
use crate::panel::ints::{Bytes, META};
use crate::panel::{BLOCK, Codec, FETCH, ROWS, View, fetch, fetch_far};
use crate::simd::{Op, Simd};

/// Room after a gathered row that is written without being meant.
const OVER: usize = 2 * BLOCK;

/// Scratch of a task, in f32 values: two gathered runs, the gathered row, the group and the scale of every octet.
pub(crate) fn scratch(layout: &Layout) -> usize {
    2 * (layout.run * BLOCK + OVER) + 2 * (layout.octets * 8 + OVER) + 2 * (layout.octets + 8)
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

/// The same with quantized rows.
pub(crate) struct GatheredBytes<'a, C> {
    pub(crate) panels: View,
    pub(crate) codec: &'a C,
    pub(crate) layout: Layout,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) x: Rows,
    pub(crate) out: Out,
    pub(crate) scratch: &'a mut [f32],
}

/// Where a task's scratch is cut.
#[derive(Clone, Copy)]
struct Room {
    /// The columns of a run that each half keeps.
    halves: [*mut f32; 2],
    /// The gathered row; in bytes, its codes, and the sum of every quad of them.
    x: *mut f32,
    sums: *mut i32,
    /// Each octet's scale group.
    groups: *mut u32,
    /// Each octet's scale of x.
    scales: *mut f32,
}

fn room(scratch: &mut [f32], l: &Layout) -> Room {
    assert!(scratch.len() >= self::scratch(l), "room for a gathered row");
    let (a, rest) = scratch.split_at_mut(l.run * BLOCK + OVER);
    let (b, rest) = rest.split_at_mut(l.run * BLOCK + OVER);
    let (x, rest) = rest.split_at_mut(2 * (l.octets * 8 + OVER));
    let (groups, scales) = rest.split_at_mut(l.octets + 8);
    let x = x.as_mut_ptr();
    // Codes take a quarter of their part of x, sums another.
    let sums = x.wrapping_add((l.octets * 8 + OVER) / 2).cast();
    let halves = [a.as_mut_ptr(), b.as_mut_ptr()];
    Room { halves, x, sums, groups: groups.as_mut_ptr().cast(), scales: scales.as_mut_ptr() }
}

/// How panels are asked for from memory, at an even pace while x is gathered and while products are summed: either alone would leave memory
/// idle for as long as the other takes. Lines come into the second-level cache well ahead, and into the first a little ahead.
#[derive(Clone, Copy)]
struct Flow {
    /// What is asked for first.
    from: *const u8,
    /// Lines for the gathering.
    gathering: usize,
    /// Bytes for each octet.
    each: usize,
}

/// Bytes from an octet to the one that is brought into the first-level cache.
const NEAR: usize = 1024;

/// Brings what lies a little after the octet's values into the first-level cache.
#[inline(always)]
fn near(octet: *const u8, bytes: usize) {
    let mut at = 0;
    while at < bytes {
        fetch(octet.wrapping_add(NEAR + at));
        at += 64;
    }
}

impl Flow {
    fn of(panels: &View, l: &Layout, panel: *const u8, gathering: usize) -> Flow {
        let lines = panels.stride / 64;
        // Where nothing is gathered between two panels, they are read at a stretch.
        let far = if l.share > 1 { 4 * FETCH } else { FETCH };
        let gathering = gathering.min(lines);
        let each = (64 * (lines - gathering)).div_ceil(l.octets.max(1));
        Flow { from: panel.wrapping_add(far.min(panels.stride)), gathering, each }
    }
    /// While block `b` is gathered.
    #[inline(always)]
    fn gather(&self, b: usize) {
        fetch_far(self.from.wrapping_add(64 * b));
    }
    /// While octet `o` is multiplied.
    #[inline(always)]
    fn octet(&self, o: usize) {
        let mut at = 64 * self.gathering + o * self.each;
        let to = at + self.each;
        while at < to {
            fetch_far(self.from.wrapping_add(at));
            at += 64;
        }
    }
}

/// Calls `$one(panel, row, fresh)` for panels that share their columns side by side, and rows of x within them: `fresh` where the row has not been
/// gathered to these columns yet.
macro_rules! walk {
    ($g:expr, $rows:expr, |$p:ident, $r:ident, $fresh:ident| $one:expr) => {
        let mut first = $g.from;
        while first < $g.to {
            let end = (first + $g.layout.share - first % $g.layout.share).min($g.to);
            let mut $r = 0;
            while $r < $rows {
                let mut $p = first;
                while $p < end {
                    let $fresh = $p == first;
                    $one;
                    $p += 1;
                }
                $r += 1;
            }
            first = end;
        }
    };
}

/// Values on the way to f32.
impl<C: Codec> Op for Gathered<'_, C> {
    type Out = ();
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.layout.pair { floats_all::<S, C, true>(s, self) } else { floats_all::<S, C, false>(s, self) }
    }
}

#[inline(always)]
fn floats_all<S: Simd, C: Codec, const PAIR: bool>(s: S, g: Gathered<'_, C>) {
    let room = room(g.scratch, &g.layout);
    let (blocks, l) = (g.panels.blocks, g.layout);
    let mut octets = 0;
    walk!(g, g.rows, |p, r, fresh| {
        // SAFETY: the maker has these panels and rows, and room in `out`.
        unsafe {
            let panel = g.panels.at(p);
            // Floats are gathered half by half, a line for every block of each.
            let flow = Flow::of(&g.panels, &l, panel, if fresh { blocks * if PAIR { 2 } else { 1 } } else { 0 });
            if fresh {
                octets = gather::<S, PAIR>(s, panel, blocks, &l, g.x.add(r * blocks * BLOCK), (room, flow));
            }
            let v = floats::<S, C, PAIR>(s, g.codec, panel, &l, octets, (room, flow));
            put::<S, PAIR>(s, g.out, r, p, g.panels.rows, v);
        }
    });
}

/// Codes against quantized activations.
impl<C: Bytes> Op for GatheredBytes<'_, C> {
    type Out = ();
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match (self.layout.pair, self.codec.plain()) {
            (false, false) => bytes_all::<S, C, false, false>(s, self),
            (false, true) => bytes_all::<S, C, false, true>(s, self),
            (true, false) => bytes_all::<S, C, true, false>(s, self),
            (true, true) => bytes_all::<S, C, true, true>(s, self),
        }
    }
}

#[inline(always)]
fn bytes_all<S: Simd, C: Bytes, const PAIR: bool, const PLAIN: bool>(s: S, g: GatheredBytes<'_, C>) {
    let room = room(g.scratch, &g.layout);
    let (blocks, l, grid) = (g.panels.blocks, g.layout, g.codec.grid());
    // What sums are for: the zero of all groups is taken off at once, others ask for the sums themselves.
    let by = if grid.kind.zeros() || grid.kind.minima() { 1 } else { -i32::from(grid.zero) };
    let mut octets = 0;
    walk!(g, g.x.rows, |p, r, fresh| {
        // SAFETY: the maker has these panels and rows, and room in `out`.
        unsafe {
            let panel = g.panels.at(p);
            let flow = Flow::of(&g.panels, &l, panel, if fresh { blocks } else { 0 });
            if fresh {
                let x = (g.x.codes.add(r * blocks * BLOCK), g.x.meta.add(r * blocks * META));
                octets = gather_bytes::<S, PAIR>(s, panel, blocks, &l, x, by, (room, flow));
            }
            let v = bytes::<S, C, PAIR, PLAIN>(s, g.codec, panel, &l, octets, (room, flow));
            put::<S, PAIR>(s, g.out, r, p, g.panels.rows, v);
        }
    });
}

/// Gathers x to the panel's columns; gives the number of octets.
/// # Safety
/// The panel and x are as long as `blocks` says, the room as `layout` does.
#[inline(always)]
unsafe fn gather<S: Simd, const PAIR: bool>(
    s: S,
    panel: *const u8,
    blocks: usize,
    layout: &Layout,
    x: *const f32,
    (room, flow): (Room, Flow),
) -> usize {
    let (mut octets, mut b) = (0, 0);
    while b < blocks {
        let end = (b + layout.run).min(blocks);
        // SAFETY: as the caller promises.
        unsafe {
            let to = room.x.add(8 * octets * if PAIR { 2 } else { 1 });
            let n = if PAIR {
                let second = Flow { from: flow.from.wrapping_add(64 * blocks), ..flow };
                let n = run(s, panel, flow, x, b, end, room.halves[0]);
                let m = run(s, panel.add(blocks * 4), second, x, b, end, room.halves[1]);
                // The shorter half must be zeros as far as the longer goes.
                let (short, from, most) = if m < n { (1, m, n) } else { (0, n, m) };
                zeros(s, room.halves[short].add(from), most + BLOCK - from);
                let mut c = 0;
                while c < most {
                    let [low, high] = s.interleave(s.load(room.halves[0].add(c)), s.load(room.halves[1].add(c)));
                    s.store(to.add(2 * c), low);
                    s.store(to.add(2 * c + S::LANES), high);
                    c += S::LANES;
                }
                most
            } else {
                run(s, panel, flow, x, b, end, to)
            };
            let count = n.div_ceil(8);
            let (mut i, group) = (0, (b / layout.per) as u32);
            while i < count {
                *room.groups.add(octets + i) = group;
                i += 1;
            }
            (octets, b) = (octets + count, end);
        }
    }
    octets
}

/// Gathers codes of x to the panel's columns, block by block; gives the number of octets.
/// # Safety
/// As for [`gather`]; `x` are the row's codes and what belongs to its blocks.
#[inline(always)]
unsafe fn gather_bytes<S: Simd, const PAIR: bool>(
    s: S,
    panel: *const u8,
    blocks: usize,
    layout: &Layout,
    (x, meta): (*const i8, *const f32),
    by: i32,
    (room, flow): (Room, Flow),
) -> usize {
    let step = if PAIR { 2 } else { 1 };
    let (codes, masks) = (room.x.cast::<i8>(), panel.cast::<u32>());
    let per = layout.per;
    let (mut octets, mut b, mut group, mut left) = (0usize, 0, 0u32, per);
    while b < blocks {
        // SAFETY: as the caller promises.
        unsafe {
            flow.gather(b);
            let mine = masks.add(b).read_unaligned();
            let other = if PAIR { masks.add(blocks + b).read_unaligned() } else { 0 };
            let (to, sums) = (codes.add(8 * step * octets), room.sums.add(2 * step * octets));
            s.gather::<PAIR>(x.add(b * BLOCK), [mine, other], by, to, sums);
            // A block has four octets at most; those it lacks are written over by the next.
            room.scales.add(octets).cast::<[f32; 4]>().write_unaligned([*meta.add(b * META); 4]);
            room.groups.add(octets).cast::<[u32; 4]>().write_unaligned([group; 4]);
            octets += mine.count_ones().max(other.count_ones()).div_ceil(8) as usize;
            let last = left == 1;
            group += u32::from(last);
            left = if last { per } else { left - 1 };
        }
        b += 1;
    }
    octets
}

/// Moves the columns of blocks `from..to` whose bit is set together, with 32 zeros after them; gives how many.
/// # Safety
/// The bits, x and `out` are as long.
#[inline(always)]
unsafe fn run<S: Simd>(
    s: S,
    bits: *const u8,
    flow: Flow,
    x: *const f32,
    from: usize,
    to: usize,
    out: *mut f32,
) -> usize {
    let (mut n, mut c) = (0, from * BLOCK);
    // SAFETY: as the caller promises.
    unsafe {
        while c < to * BLOCK {
            if c.is_multiple_of(BLOCK) {
                flow.gather(c / BLOCK);
            }
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
    octets: usize,
    (room, flow): (Room, Flow),
) -> [S::V; 2] {
    let step = if PAIR { 2 } else { 1 };
    let mut acc = [[s.splat(0.0); 4]; 2];
    let mut o = 0;
    while o < octets {
        // SAFETY: as the caller promises.
        unsafe {
            let values = panel.add(layout.values_at);
            flow.octet(o);
            near(values.add(o * layout.octet_bytes), layout.octet_bytes);
            let x = room.x.add(o * 8 * step);
            let mut h = 0;
            while h < ROWS / S::LANES {
                let group = *room.groups.add(o) as usize;
                let w = codec.gathered(s, panel, values.add(o * layout.octet_bytes), group, h);
                let mut j = 0;
                while j < 8 {
                    acc[h][j % 4] = s.fma(s.spread::<PAIR>(x.add(j * step)), w[j], acc[h][j % 4]);
                    j += 1;
                }
                h += 1;
            }
        }
        o += 1;
    }
    [0, 1].map(|h: usize| s.add(s.add(acc[h][0], acc[h][1]), s.add(acc[h][2], acc[h][3])))
}

/// # Safety
/// The room holds x gathered to the panel, as bytes.
#[inline(always)]
unsafe fn bytes<S: Simd, C: Bytes, const PAIR: bool, const PLAIN: bool>(
    s: S,
    codec: &C,
    panel: *const u8,
    layout: &Layout,
    octets: usize,
    (room, flow): (Room, Flow),
) -> [S::V; 2] {
    let step = if PAIR { 2 } else { 1 };
    let mut out = [s.splat(0.0); 2];
    let mut o = 0;
    while o < octets {
        // SAFETY: as the caller promises.
        unsafe {
            let values = panel.add(layout.values_at);
            flow.octet(o);
            let (x, sums) = (room.x.cast::<i8>().add(o * 8 * step), room.sums.add(2 * o * step));
            let group = *room.groups.add(o) as usize;
            let mut h = 0;
            while h < ROWS / S::LANES {
                let codes = codec.octet(s, values, 0, o, h);
                let given = s.add_i(s.spread_i::<PAIR>(sums), s.spread_i::<PAIR>(sums.add(step)));
                let shared = codec.shared::<S, PLAIN>(s, panel, group, h);
                let scale = room.scales.add(o);
                out[h] = codec.close_octet::<S, PAIR, PLAIN>(s, &shared, codes, (x, given, *scale), out[h]);
                h += 1;
            }
        }
        o += 1;
    }
    out
}

/// Writes a panel's results, the lanes of a pair put back in the order of rows.
/// # Safety
/// As for [`Out::put`].
#[inline(always)]
unsafe fn put<S: Simd, const PAIR: bool>(s: S, out: Out, r: usize, p: usize, rows: usize, v: [S::V; 2]) {
    let mut v = v;
    // SAFETY: as the caller promises.
    unsafe {
        if PAIR {
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

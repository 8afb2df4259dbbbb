//! Products with panels whose rows share their columns: x is gathered to a panel's columns, and what remains is dense.
//!
//! Every row of x is gathered for itself, so that its result cannot depend on others. In f32 every output has four
//! chains of fused operations, for the four columns of each quad, which are added in the end; octets of large panels
//! come from their four quarters by turns. Bytes are quantized before they are gathered, once for all panels; a block
//! of 32 columns is summed exactly, and its sum times both scales added to the output, blocks in rising order: the same
//! bits as [`super::dot`] gives for the same matrix with zeros written out. So where many rows of x come, that is what
//! is done ([`crate::panel::gathered::Fill`]).

use super::dot::Rows;
use super::matmul::Out;
use crate::panel::gathered::Layout;
use crate::panel::ints::{Bytes, META};
use crate::panel::{BLOCK, Codec, Prefetch, ROWS, View, fetch, fetch_far};
use crate::simd::{Op, Simd};

/// Room after a gathered row that is written without being meant.
const OVER: usize = 2 * BLOCK;

/// Scratch of a task, in f32 values: two gathered runs, the gathered row, the group of every octet or the octets of
/// every block.
pub(crate) fn scratch(layout: &Layout, blocks: usize) -> usize {
    2 * (layout.run * BLOCK + OVER) + 2 * (layout.octets * 8 + OVER) + layout.octets.max(blocks) + 8
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
struct Scratch {
    /// The columns of a run that each half keeps.
    halves: [*mut f32; 2],
    /// The gathered row; in bytes, its codes.
    x: *mut f32,
    /// In bytes, the codes that each half keeps.
    codes: [*mut i8; 2],
    /// Each octet's scale group; in bytes, each block's number of octets.
    counts: *mut u32,
}

fn room(scratch: &mut [f32], l: &Layout, blocks: usize) -> Scratch {
    assert!(scratch.len() >= self::scratch(l, blocks), "room for a gathered row");
    let slots = l.octets * 8 + OVER;
    let (a, rest) = scratch.split_at_mut(l.run * BLOCK + OVER);
    let (b, rest) = rest.split_at_mut(l.run * BLOCK + OVER);
    let (x, counts) = rest.split_at_mut(2 * slots);
    let x = x.as_mut_ptr();
    // Of the eight bytes for each slot, gathered codes take one or two, and halves of their own one each.
    let codes = [2, 3].map(|n| x.cast::<i8>().wrapping_add(n * slots));
    Scratch { halves: [a.as_mut_ptr(), b.as_mut_ptr()], x, codes, counts: counts.as_mut_ptr().cast() }
}

/// How a panel of floats is read, at one place or at four, and asked for: at an even pace while x is gathered and while
/// octets are multiplied. Only of four places that one mask serves all that gathering has time for is prefetched then,
/// and the rest is left to the processor's own guesses and to what is prefetched nearby.
#[derive(Clone, Copy)]
struct Parts {
    /// Where the panel's values begin.
    values: *const u8,
    /// Octets of each part, and its bytes.
    octets: usize,
    bytes: usize,
    /// Bytes from the end of a part to where it begins in the next panel.
    jump: usize,
    /// Whether there are four.
    four: bool,
    policy: Prefetch,
    /// What is prefetched first, and how far that is beyond the first part's begin.
    from: *const u8,
    far: usize,
    /// Lines of the panel that are asked for while x is gathered, and bytes while an octet is multiplied.
    gathering: usize,
    each: usize,
}

impl Parts {
    /// `gathered` blocks of x are gathered before octets are multiplied.
    fn of(policy: Prefetch, panels: &View, l: &Layout, panel: *const u8, gathered: usize) -> Parts {
        let values = panel.wrapping_add(l.values_at);
        let bytes = l.octets * l.octet_bytes;
        let four = bytes >= policy.large;
        let octets = if four { l.octets.div_ceil(4) } else { l.octets };
        let (lines, far) = match (four, l.pair) {
            (true, true) => (octets * l.octet_bytes / 16, policy.part),
            (true, false) => (policy.lines * gathered, policy.near),
            // Where nothing is gathered between two panels, they are read at a stretch. Masks and scales are asked for,
            // too.
            (false, _) => {
                (panels.stride / 64, (if l.share > 1 { 4 * policy.stretch } else { policy.stretch }).min(panels.stride))
            }
        };
        let from = if four { values } else { panel }.wrapping_add(far);
        let gathering = (policy.lines * gathered).min(lines);
        let each = (64 * (lines - gathering)).div_ceil(l.octets.max(1));
        let bytes = octets * l.octet_bytes;
        Parts { values, octets, bytes, jump: panels.stride - bytes, four, policy, from, far, gathering, each }
    }
    /// Asks for the `n`th line.
    #[inline(always)]
    fn ask(&self, n: usize) {
        fetch_far(if self.four {
            let at = n / 4 * 64;
            let at = if self.far + at < self.bytes { at } else { at + self.jump };
            self.from.wrapping_add(n % 4 * self.bytes + at)
        } else {
            self.from.wrapping_add(64 * n)
        });
    }
    /// While the `b`th block is gathered.
    #[inline(always)]
    fn gather(&self, b: usize) {
        let mut n = self.policy.lines * b;
        while n < self.policy.lines * (b + 1) {
            self.ask(n);
            n += 1;
        }
    }
    /// While the `n`th octet is multiplied.
    #[inline(always)]
    fn step(&self, n: usize) {
        let mut at = 64 * self.gathering + n * self.each;
        let to = at + self.each;
        while at < to {
            self.ask(at / 64);
            at += 64;
        }
    }
    /// Bytes from octet `i` of a part to what comes into the first-level cache meanwhile.
    #[inline(always)]
    fn near(&self, i: usize, octet_bytes: usize) -> usize {
        let near = self.policy.near;
        if i * octet_bytes + near < self.bytes { near } else { near + self.jump }
    }
}

/// Calls `$one(panel, row, fresh)` for panels that share their columns side by side, and rows of x within them: `fresh`
/// where the row has not been gathered to these columns yet.
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
    let (blocks, l) = (g.panels.blocks, g.layout);
    let room = room(g.scratch, &l, blocks);
    let mut octets = 0;
    walk!(g, g.rows, |p, r, fresh| {
        // SAFETY: the maker has these panels and rows, and room in `out`.
        unsafe {
            let panel = g.panels.at(p);
            // Floats are gathered half by half.
            let gathered = if fresh { if PAIR { 2 * blocks } else { blocks } } else { 0 };
            let parts = Parts::of(C::GATHERED, &g.panels, &l, panel, gathered);
            if fresh {
                octets = gather::<S, PAIR>(s, panel, blocks, &l, g.x.add(r * blocks * BLOCK), (room, parts));
            }
            let v = floats::<S, C, PAIR>(s, g.codec, panel, octets, (room, parts));
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
    let (blocks, l) = (g.panels.blocks, g.layout);
    let room = room(g.scratch, &l, blocks);
    walk!(g, g.x.rows, |p, r, fresh| {
        // SAFETY: the maker has these panels and rows, and room in `out`.
        unsafe {
            let panel = g.panels.at(p);
            if fresh {
                gather_bytes::<S, PAIR>(s, panel, &l, blocks, g.x.codes.add(r * blocks * BLOCK), room);
            }
            let meta = g.x.meta.add(r * blocks * META);
            let v = bytes::<S, C, PAIR, PLAIN>(s, g.codec, panel, &l, (blocks, meta), room);
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
    (room, parts): (Scratch, Parts),
) -> usize {
    let (mut octets, mut b) = (0, 0);
    while b < blocks {
        let end = (b + layout.run).min(blocks);
        // SAFETY: as the caller promises.
        unsafe {
            let to = room.x.add(8 * octets * if PAIR { 2 } else { 1 });
            let n = if PAIR {
                let n = run(s, panel, (parts, b), x, b, end, room.halves[0]);
                let m = run(s, panel.add(blocks * 4), (parts, blocks + b), x, b, end, room.halves[1]);
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
                run(s, panel, (parts, b), x, b, end, to)
            };
            let count = n.div_ceil(8);
            let (mut i, group) = (0, (b / layout.per) as u32);
            while i < count {
                *room.counts.add(octets + i) = group;
                i += 1;
            }
            (octets, b) = (octets + count, end);
        }
    }
    octets
}

/// Gathers codes of x to the panel's columns, block by block.
/// # Safety
/// As for [`gather`]; `x` are the row's codes.
#[inline(always)]
unsafe fn gather_bytes<S: Simd, const PAIR: bool>(
    s: S,
    panel: *const u8,
    layout: &Layout,
    blocks: usize,
    x: *const i8,
    room: Scratch,
) {
    let (out, masks) = (room.x.cast::<i8>(), panel.cast::<u32>());
    let (mut octets, mut b) = (0usize, 0);
    while b < blocks {
        // SAFETY: as the caller promises.
        unsafe {
            // Memory must not be idle meanwhile.
            fetch_far(panel.wrapping_add(layout.values_at + 64 * b));
            let (x, mine) = (x.add(b * BLOCK), masks.add(b).read_unaligned());
            let mut count = mine.count_ones();
            if PAIR {
                let other = masks.add(blocks + b).read_unaligned();
                count = count.max(other.count_ones());
                s.keep(x, mine, room.codes[0].add(8 * octets));
                s.keep(x, other, room.codes[1].add(8 * octets));
            } else {
                s.keep(x, mine, out.add(8 * octets));
            }
            let count = count.div_ceil(8);
            *room.counts.add(b) = count;
            octets += count as usize;
        }
        b += 1;
    }
    let mut o = 0;
    while PAIR && o < octets {
        // SAFETY: four octets of each half, and after the last ones room for three more.
        unsafe { s.turns(room.codes[0].add(8 * o), room.codes[1].add(8 * o), out.add(16 * o)) };
        o += 4;
    }
}

/// Moves the columns of blocks `from..to` whose bit is set together, with 32 zeros after them; gives how many. For
/// every block [`Prefetch::lines`] of the panel are asked for, so that memory is not idle meanwhile; `first` blocks
/// have been before.
/// # Safety
/// The bits, x and `out` are as long.
#[inline(always)]
unsafe fn run<S: Simd>(
    s: S,
    bits: *const u8,
    (parts, first): (Parts, usize),
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
                parts.gather(first + c / BLOCK - from);
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
    octets: usize,
    (room, parts): (Scratch, Parts),
) -> [S::V; 2] {
    let step = if PAIR { 2 } else { 1 };
    let mut acc = [[s.splat(0.0); 4]; 2];
    // The first octet of every part, then the second, and so on: one loop, which a loop of loops would not come out as
    // fast as.
    let (mut i, mut o, mut near, mut n) = (0, 0, parts.near(0, C::OCTET), 0);
    while n < octets {
        parts.step(n);
        // SAFETY: as the caller promises.
        unsafe {
            let octet = parts.values.add(o * C::OCTET);
            let mut line = 0;
            while line < C::OCTET {
                fetch(octet.wrapping_add(near + line));
                line += 64;
            }
            let (x, group) = (room.x.add(o * 8 * step), *room.counts.add(o) as usize);
            let mut h = 0;
            while h < ROWS / S::LANES {
                let w = codec.gathered(s, panel, octet, group, h);
                let mut j = 0;
                while j < 8 {
                    acc[h][j % 4] = s.fma(s.spread::<PAIR>(x.add(j * step)), w[j], acc[h][j % 4]);
                    j += 1;
                }
                h += 1;
            }
        }
        o += parts.octets;
        if o >= octets {
            i += 1;
            (o, near) = (i, parts.near(i, C::OCTET));
        }
        n += 1;
    }
    [0, 1].map(|h: usize| s.add(s.add(acc[h][0], acc[h][1]), s.add(acc[h][2], acc[h][3])))
}

/// # Safety
/// The room holds x gathered to the panel, as bytes; `meta` leads to what belongs to the blocks of x.
#[inline(always)]
unsafe fn bytes<S: Simd, C: Bytes, const PAIR: bool, const PLAIN: bool>(
    s: S,
    codec: &C,
    panel: *const u8,
    layout: &Layout,
    (blocks, meta): (usize, *const f32),
    room: Scratch,
) -> [S::V; 2] {
    let (step, kind) = (if PAIR { 2 } else { 1 }, codec.grid().kind);
    // What is summed of x itself: its product with the zero of all groups, or else, for each to use it as it must, with
    // one.
    let each = if !PLAIN && (kind.zeros() || kind.minima()) { 1 } else { codec.grid().zero };
    let each = s.and_i(s.splat_i(-1), each);
    // SAFETY: as the caller promises.
    unsafe {
        let mut values = panel.add(layout.values_at);
        let scales = panel.wrapping_add(codec.grid().scales_at);
        let Prefetch { near, far, large, .. } = C::GATHERED;
        let far = if layout.octets * layout.octet_bytes < large { far.1 } else { far.0 };
        let mut x = room.x.cast::<i8>().cast_const();
        let mut out = [s.splat(0.0); 2];
        let (mut group, mut left) = (0, layout.per);
        let mut b = 0;
        while b < blocks {
            fetch(scales.wrapping_add(group * kind.entry() + near));
            let mut sums = [[s.splat_i(0); 2]; 2];
            let mut given = [s.splat_i(0); 2];
            let mut o = *room.counts.add(b);
            while o > 0 {
                let mut at = 0;
                while at < 16 * C::BITS {
                    fetch(values.wrapping_add(near + at));
                    fetch_far(values.wrapping_add(far + at));
                    at += 64;
                }
                given = s.dot8::<PAIR>(C::BITS, given, [each; 2], x);
                let mut h = 0;
                while h < ROWS / S::LANES {
                    let codes = codec.octet(s, values, 0, h);
                    sums[h] = s.dot8::<PAIR>(C::BITS, sums[h], codes, x);
                    h += 1;
                }
                values = values.add(layout.octet_bytes);
                x = x.add(8 * step);
                o -= 1;
            }
            let (given, scale) = (s.total(C::BITS, given), s.splat(*meta.add(b * META)));
            let mut h = 0;
            while h < ROWS / S::LANES {
                let shared = codec.shared::<S, PLAIN>(s, panel, group, h);
                let sum = s.total(C::BITS, sums[h]);
                out[h] = codec.close_gathered::<S, PLAIN>(s, &shared, sum, (given, scale), out[h]);
                h += 1;
            }
            left -= 1;
            if left == 0 {
                (group, left) = (group + 1, layout.per);
            }
            b += 1;
        }
        out
    }
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

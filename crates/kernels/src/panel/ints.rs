//! Panels of integer codes with their scales.
//!
//! A vector of codes is 16 rows of 4 consecutive columns, a byte each: what the processor's dot products of bytes take.
//! Codes of fewer bits are kept in planes of 4, 2 and 1 bits (6 bits: a plane of 4 and one of 2) and put together in
//! registers. A block of 32 columns is `64 * bits` bytes. Two groups' entries stand before the codes of both, and what
//! is over eight of them before these: a panel is read from its start to its end, without a glance elsewhere, so that
//! processors guess what comes.

use std::sync::Arc;

use half::f16;

use super::source::{Line, Source};
use super::{BLOCK, Codec, Panels, ROWS};
use crate::simd::Simd;

/// What stands beside the codes of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// f16 scales; `scale * (code - zero)` with one zero for the matrix.
    F16,
    /// The same with f32 scales.
    F32,
    /// f16 scales and a zero of 8 bits each.
    F16Zeros,
    /// f32 scales and a zero of 8 bits each.
    F32Zeros,
    /// f32 scales and zeros that are any numbers, f32.
    F32Off,
    /// f16 scales and minima: `scale * code + min`.
    F16Min,
    /// The same with both f32.
    F32Min,
    /// 8-bit scales and minima under an f16 scale and minimum for 8 blocks: `d * s * code - m * t`.
    Super,
    /// Two signed 8-bit scales, for 16 columns each, under an f16 scale for 8 blocks: `d * s * (code - zero)`.
    Sixteens,
    /// Two f32 scales, for 16 columns each: of codes into a table.
    F32Two,
    /// The codec's own.
    Own,
}

impl Kind {
    /// Bytes of a group's entry.
    pub(crate) fn entry(self) -> usize {
        match self {
            Kind::F16 | Kind::Super | Kind::Sixteens => 2 * ROWS,
            Kind::F32 | Kind::F16Min => 4 * ROWS,
            Kind::F16Zeros => 3 * ROWS,
            Kind::F32Zeros => 5 * ROWS,
            Kind::F32Off | Kind::F32Min | Kind::F32Two => 8 * ROWS,
            Kind::Own => 0,
        }
    }
    /// Whether something is added to the scaled code: a group's second number, or what its zero comes to.
    pub(crate) fn minima(self) -> bool {
        matches!(self, Kind::F16Min | Kind::F32Min | Kind::Super | Kind::F32Off)
    }
    /// Whether groups lie under others, eight blocks each.
    pub(crate) fn supers(self) -> bool {
        matches!(self, Kind::Super | Kind::Sixteens)
    }
    /// Whether every group has a zero of its own.
    pub(crate) fn zeros(self) -> bool {
        matches!(self, Kind::F16Zeros | Kind::F32Zeros)
    }
}

/// How codes become values, and where in a panel the groups' entries are.
#[derive(Clone)]
pub(crate) struct GroupLayout {
    pub(crate) kind: Kind,
    /// The zero of all groups, where they have none of their own.
    pub(crate) zero: u8,
    /// Blocks of 32 columns in a group.
    per: usize,
    /// Where the groups' entries begin in a panel, and bytes from two of them to the next two.
    pub(crate) scales_at: usize,
    pair: usize,
    /// Where the entries over 8 blocks begin, bytes from one to the next, and how many of these lie among the groups'
    /// entries.
    supers_at: usize,
    over: usize,
    among: usize,
    /// The values of the codes, where they are not the codes themselves.
    pub(crate) table: Option<Arc<[f32]>>,
}

/// Bytes of an entry over 8 blocks.
const SUPER: usize = 4 * ROWS;

impl GroupLayout {
    /// For panels with all groups' entries together, at byte `at`; `b` is then a group, wherever a block is asked for.
    pub(crate) fn together(source: &Source, groups: usize, at: usize) -> GroupLayout {
        let (kind, zero) = (source.kind, source.zero);
        let table = source.table.as_ref().map(|t| Arc::from(&t[..]));
        let (pair, supers_at) = (2 * kind.entry(), at + groups * kind.entry());
        GroupLayout { kind, zero, per: 1, scales_at: at, pair, supers_at, over: SUPER, among: 0, table }
    }

    /// For panels whose every 8 blocks, `eight` bytes, come after `head` bytes that are the codec's own.
    pub(super) fn indexed(zero: u8, head: usize, eight: usize) -> GroupLayout {
        let (kind, over) = (Kind::Own, head + eight);
        GroupLayout { kind, zero, per: 1, scales_at: head, pair: 0, supers_at: 0, over, among: head, table: None }
    }

    /// Bytes of the entries of so many groups.
    pub(crate) fn together_bytes(kind: Kind, groups: usize) -> usize {
        groups * kind.entry() + if kind.supers() { groups.div_ceil(8) * SUPER } else { 0 }
    }

    /// For dense panels, whose groups have `per` blocks of `block` bytes of codes each.
    pub(super) fn dense(source: &Source, per: usize, block: usize) -> GroupLayout {
        GroupLayout::together(source, 0, 0).beside(per, block)
    }

    /// The same values in dense panels.
    pub(super) fn beside(&self, per: usize, block: usize) -> GroupLayout {
        let among = if self.kind.supers() { SUPER } else { 0 };
        let pair = 2 * (self.kind.entry() + per * block);
        GroupLayout { per, scales_at: among, pair, supers_at: 0, over: among + 4 * pair, among, ..self.clone() }
    }

    /// Bytes of a dense panel of `blocks` blocks of `block` bytes of codes.
    pub(super) fn dense_bytes(&self, blocks: usize, block: usize) -> usize {
        if blocks == 0 { 0 } else { self.codes::<false>(blocks - 1, block) + block }
    }

    /// Where the codes of block `b` are in a dense panel whose blocks have `block` bytes of codes; `PLAIN` where the
    /// codec is.
    #[inline(always)]
    pub(crate) fn codes<const PLAIN: bool>(&self, b: usize, block: usize) -> usize {
        if PLAIN {
            return b * block + (b / 2 + 1) * 4 * ROWS;
        }
        self.scales_at + b * block + (self.group(b) / 2 + 1) * 2 * self.kind.entry() + b / 8 * self.among
    }

    /// The group of block `b`; in 32 bits, where division is fast.
    #[inline(always)]
    fn group(&self, b: usize) -> usize {
        (b as u32 / self.per as u32) as usize
    }

    /// Where the entry of group `g` is.
    #[inline(always)]
    pub(crate) fn entry(&self, g: usize) -> usize {
        self.scales_at + g / 2 * self.pair + g % 2 * self.kind.entry() + g / 8 * self.among
    }

    /// Where the entry over block `b` and others is.
    #[inline(always)]
    fn above(&self, b: usize) -> usize {
        self.supers_at + b / 8 * self.over
    }

    /// Scales of block `b`.
    /// # Safety
    /// The panel has this block.
    #[inline(always)]
    pub(crate) unsafe fn scale<S: Simd>(&self, s: S, panel: *const u8, b: usize, h: usize) -> S::V {
        // SAFETY: as the caller promises.
        unsafe {
            let entry = panel.add(self.entry(self.group(b)));
            match self.kind {
                Kind::F16 | Kind::F16Zeros | Kind::F16Min => s.load_f16(entry.add(2 * h * S::LANES)),
                Kind::F32 | Kind::F32Zeros | Kind::F32Off | Kind::F32Min => s.load(entry.add(4 * h * S::LANES).cast()),
                Kind::Super => {
                    let d = s.load_f16(panel.add(self.above(b) + 2 * h * S::LANES));
                    s.mul(d, s.float(s.widen(entry.add(h * S::LANES))))
                }
                Kind::Sixteens | Kind::F32Two => self.sixteen(s, panel, b, 0, h),
                Kind::Own => unreachable!("asked of the codec"),
            }
        }
    }

    /// Scales of the first or second (`part`) sixteen columns of block `b`, for the kinds that have them.
    /// # Safety
    /// As for `scale`.
    #[inline(always)]
    unsafe fn sixteen<S: Simd>(&self, s: S, panel: *const u8, b: usize, part: usize, h: usize) -> S::V {
        // SAFETY: as the caller promises.
        unsafe {
            if self.kind == Kind::F32Two {
                return s.load(panel.add(self.entry(b) + 4 * (part * ROWS + h * S::LANES)).cast());
            }
            let entry = panel.add(self.entry(b) + part * ROWS + h * S::LANES);
            s.mul(s.load_f16(panel.add(self.above(b) + 2 * h * S::LANES)), s.load_i8(entry.cast()))
        }
    }

    /// Zeros of block `b`, for kinds that have them.
    /// # Safety
    /// As for `scale`.
    #[inline(always)]
    unsafe fn zeros<S: Simd>(&self, s: S, panel: *const u8, b: usize, h: usize) -> S::I {
        // SAFETY: as the caller promises.
        unsafe {
            let entry = panel.add(self.entry(self.group(b)));
            let after = if self.kind == Kind::F16Zeros { 2 * ROWS } else { 4 * ROWS };
            s.widen(entry.add(after + h * S::LANES))
        }
    }

    /// Zeros of block `b` that are any numbers.
    /// # Safety
    /// As for `scale`.
    #[inline(always)]
    unsafe fn off<S: Simd>(&self, s: S, panel: *const u8, b: usize, h: usize) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load(panel.add(self.entry(self.group(b)) + 4 * ROWS + 4 * h * S::LANES).cast()) }
    }

    /// Minima of block `b`, for kinds that have them.
    /// # Safety
    /// As for `scale`.
    #[inline(always)]
    unsafe fn minima<S: Simd>(&self, s: S, panel: *const u8, b: usize, h: usize) -> S::V {
        // SAFETY: as the caller promises.
        unsafe {
            let entry = panel.add(self.entry(self.group(b)));
            if self.kind == Kind::F32Off {
                return s.mul(s.sub(s.splat(0.0), self.off(s, panel, b, h)), self.scale(s, panel, b, h));
            }
            if self.kind == Kind::F32Min {
                return s.load(entry.add(4 * ROWS + 4 * h * S::LANES).cast());
            }
            if self.kind == Kind::F16Min {
                return s.load_f16(entry.add(2 * ROWS + 2 * h * S::LANES));
            }
            let m = s.load_f16(panel.add(self.above(b) + 2 * ROWS + 2 * h * S::LANES));
            s.mul(s.sub(s.splat(0.0), m), s.float(s.widen(entry.add(ROWS + h * S::LANES))))
        }
    }
}

/// Where a row of quantized activations keeps what belongs to a block: its scale, minus the matrix's zero times the sum
/// of its bytes, that sum, and the sum times the scale. Where a block has two scales: its scale, and the second of
/// these for each sixteen of its columns.
pub(crate) const META: usize = 4;

/// Codes that come as unsigned bytes, eight columns at a time, for dot products with quantized activations.
pub(crate) trait Bytes: Send + Sync {
    /// Bits of the largest code.
    const BITS: usize;
    /// Bytes of a block's codes.
    const BLOCK_BYTES: usize = 64 * Self::BITS;
    /// Whether a block has two scales, for 16 columns each.
    const SIXTEENS: bool = false;
    /// Whether a single row of x is brought to the codes ([`Bytes::picks`]) and not the codes to their columns.
    const PICKS: bool = false;
    /// Whether its octets cost so much that many rows meet panels that were brought to bytes ([`super::unfolded`]).
    const UNFOLDS: bool = false;
    /// Whether codes, the zero and scales have so few bits that no product of theirs is rounded.
    const FOLDS: bool = false;
    /// How codes become values.
    fn grid(&self) -> &GroupLayout;
    /// Columns `8 * o..` of the block whose codes are at `block`.
    /// # Safety
    /// They are there.
    unsafe fn octet<S: Simd>(&self, s: S, block: *const u8, o: usize, h: usize) -> [S::I; 2];

    /// Two vectors of codes that were kept of the first or second (`part`) 16 columns of a block, and which of those
    /// columns each is.
    /// # Safety
    /// As for `octet`.
    #[inline(always)]
    unsafe fn picks<S: Simd>(&self, _: S, _: *const u8, _: usize, _: usize) -> [[S::I; 2]; 2] {
        unreachable!("asked only of what picks")
    }

    /// Whether groups are single blocks with f16 scales alone: what is worth products of its own.
    #[inline(always)]
    fn plain(&self) -> bool {
        self.grid().kind == Kind::F16 && self.grid().per == 1
    }

    /// A block's exact sum of `code * x`, made the sum of `(code - zero) * x`, times both scales onto `acc`. `sum`
    /// comes with the block's `bias` (see [`META`]) in it.
    /// # Safety
    /// As for `octet`; `meta` leads to the block's four numbers.
    #[inline(always)]
    unsafe fn close<S: Simd, const PLAIN: bool>(
        &self,
        s: S,
        shared: &Shared<S>,
        sum: S::I,
        meta: *const f32,
        acc: S::V,
    ) -> S::V {
        // SAFETY: as the caller promises.
        unsafe {
            let kind = if PLAIN { Kind::F16 } else { self.grid().kind };
            let sum = if kind.zeros() {
                s.less_product(sum, shared.zeros, s.spread_i::<false>(meta.add(2).cast()))
            } else {
                sum
            };
            let scale = s.mul(shared.scale, s.splat(*meta));
            let acc = s.fused(s.float(sum), scale, acc);
            if kind.minima() { s.fused(shared.minima, s.splat(*meta.add(3)), acc) } else { acc }
        }
    }

    /// As `close` for x that was gathered: `given` is the block's sum of what was kept of x, times the zero of all
    /// groups where there is one for all.
    #[inline(always)]
    fn close_gathered<S: Simd, const PLAIN: bool>(
        &self,
        s: S,
        shared: &Shared<S>,
        sum: S::I,
        (given, scale): (S::I, S::V),
        acc: S::V,
    ) -> S::V {
        let kind = if PLAIN { Kind::F16 } else { self.grid().kind };
        let sum = if kind.zeros() {
            s.less_product(sum, shared.zeros, given)
        } else if kind.minima() {
            sum
        } else {
            s.sub_i(sum, given)
        };
        let acc = s.fused(s.float(sum), s.mul(shared.scale, scale), acc);
        if kind.minima() { s.fused(shared.minima, s.mul(s.float(given), scale), acc) } else { acc }
    }

    /// What the first or second (`part`) sixteen columns of block `b` share, for codecs with two scales.
    /// # Safety
    /// As for `shared`.
    #[inline(always)]
    unsafe fn shared_half<S: Simd>(&self, s: S, panel: *const u8, b: usize, part: usize, h: usize) -> Shared<S> {
        // SAFETY: as the caller promises.
        let scale = unsafe { self.grid().sixteen(s, panel, b, part, h) };
        Shared { scale, zeros: s.splat_i(0), minima: s.splat(0.0) }
    }

    /// What block `b` shares; `PLAIN` where the codec is.
    /// # Safety
    /// `panel` is a whole panel of this codec and has this block.
    #[inline(always)]
    unsafe fn shared<S: Simd, const PLAIN: bool>(&self, s: S, panel: *const u8, b: usize, h: usize) -> Shared<S> {
        let grid = self.grid();
        if PLAIN {
            // SAFETY: as the caller promises.
            let scale = unsafe {
                s.load_f16(panel.add(grid.scales_at + b / 2 * grid.pair + b % 2 * 2 * ROWS + 2 * h * S::LANES))
            };
            return Shared { scale, zeros: s.splat_i(0), minima: s.splat(0.0) };
        }
        // SAFETY: as the caller promises.
        unsafe {
            Shared {
                scale: grid.scale(s, panel, b, h),
                zeros: if grid.kind.zeros() { grid.zeros(s, panel, b, h) } else { s.splat_i(0) },
                minima: if grid.kind.minima() { grid.minima(s, panel, b, h) } else { s.splat(0.0) },
            }
        }
    }
}

/// What a block's codes share.
#[derive(Clone, Copy)]
pub(crate) struct Shared<S: Simd> {
    pub(crate) scale: S::V,
    pub(crate) zeros: S::I,
    pub(crate) minima: S::V,
}

/// Dense codes of `BITS` bits.
#[derive(Clone)]
pub(crate) struct Ints<const BITS: usize>(pub(crate) GroupLayout);

/// Where the planes of 4, 2 and 1 bits of octet `o` are in a block of codes of so many bits, of those that it has: what
/// is read first comes first.
#[inline(always)]
const fn planes(bits: usize, o: usize) -> [usize; 3] {
    let (two, four) = ((bits >> 1 & 1) * 64, (bits >> 2 & 1) * 128);
    let at = (bits & 1) * 64 + o / 2 * (two + four);
    [at + two + o % 2 * 64, at, 0]
}

/// Columns `8 * o..` of the block of codes at `block`.
/// # Safety
/// The block is there; it has been moved to half `h` already.
#[inline(always)]
pub(crate) unsafe fn octet<S: Simd, const BITS: usize>(s: S, block: *const u8, o: usize) -> [S::I; 2] {
    // SAFETY: as the caller promises.
    unsafe {
        if BITS == 8 {
            return [s.load_i(block.add(128 * o)), s.load_i(block.add(128 * o + 64))];
        }
        let plane = |bit: usize, at: usize| if BITS & bit != 0 { s.load_i(block.add(at)) } else { s.splat_i(0) };
        // In the order in which they lie.
        let [four, two, one] = planes(BITS, o);
        let (one, two, four) = (plane(1, one), plane(2, two), plane(4, four));
        let (mut out, mut to) = ([s.splat_i(0); 2], 0);
        if BITS & 4 != 0 {
            out = [s.and_i(four, 15), s.moved(four, 4, 0, 15)];
            to = 4;
        }
        if BITS & 2 != 0 {
            let first = o % 2 * 4;
            let two = [s.moved(two, first, to, 3), s.moved(two, first + 2, to, 3)];
            out = if BITS & 4 != 0 { [s.or_i(out[0], two[0]), s.or_i(out[1], two[1])] } else { two };
            to += 2;
        }
        if BITS & 1 != 0 {
            let one = [s.moved(one, 2 * o, to, 1), s.moved(one, 2 * o + 1, to, 1)];
            out = [s.or_i(out[0], one[0]), s.or_i(out[1], one[1])];
        }
        out
    }
}

/// Puts `code` of lane `lane` and column `c` of its block into the block's planes.
pub(crate) fn put_code(block: &mut [u8], bits: usize, lane: usize, c: usize, code: u8) {
    let (o, q, byte) = (c / 8, c % 8 / 4, 4 * lane + c % 4);
    if bits == 8 {
        block[64 * (2 * o + q) + byte] = code;
        return;
    }
    let ([four, two, one], mut from) = (planes(bits, o), 0);
    if bits & 4 != 0 {
        block[four + byte] |= (code & 15) << (4 * q);
        from = 4;
    }
    if bits & 2 != 0 {
        block[two + byte] |= (code >> from & 3) << (o % 2 * 4 + 2 * q);
        from += 2;
    }
    if bits & 1 != 0 {
        block[one + byte] |= (code >> from & 1) << (2 * o + q);
    }
}

impl<const BITS: usize> Bytes for Ints<BITS> {
    const BITS: usize = BITS;
    #[inline(always)]
    fn grid(&self) -> &GroupLayout {
        &self.0
    }
    #[inline(always)]
    unsafe fn octet<S: Simd>(&self, s: S, block: *const u8, o: usize, h: usize) -> [S::I; 2] {
        // SAFETY: as the caller promises.
        unsafe { octet::<S, BITS>(s, block.add(h * 4 * S::LANES), o) }
    }
}

/// Dense codes of `BITS` bits with two scales a block.
#[derive(Clone)]
pub(crate) struct Halves<const BITS: usize>(pub(crate) GroupLayout);

impl<const BITS: usize> Bytes for Halves<BITS> {
    const BITS: usize = BITS;
    const SIXTEENS: bool = true;
    #[inline(always)]
    fn grid(&self) -> &GroupLayout {
        &self.0
    }
    #[inline(always)]
    unsafe fn octet<S: Simd>(&self, s: S, block: *const u8, o: usize, h: usize) -> [S::I; 2] {
        // SAFETY: as the caller promises.
        unsafe { octet::<S, BITS>(s, block.add(h * 4 * S::LANES), o) }
    }
}

/// A block of codes on the way to f32.
#[derive(Clone, Copy)]
pub(crate) struct IntBlock<S: Simd> {
    codes: *const u8,
    h: usize,
    scale: S::V,
    /// Zero or minimum; the scale of the second sixteen columns where there are two.
    second: S::V,
}

impl<T: Bytes> Codec for T {
    const OCTET: usize = 16 * T::BITS;
    type Block<S: Simd> = IntBlock<S>;
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, s: S, panel: *const u8, b: usize, h: usize) -> IntBlock<S> {
        // SAFETY: as the caller promises.
        unsafe {
            let shared = self.shared::<S, false>(s, panel, b, h);
            let grid = self.grid();
            let second = if T::SIXTEENS {
                self.shared_half(s, panel, b, 1, h).scale
            } else if grid.kind == Kind::F32Off {
                grid.off(s, panel, b, h)
            } else if grid.kind.minima() {
                shared.minima
            } else if grid.kind.zeros() {
                s.float(shared.zeros)
            } else {
                s.splat(f32::from(grid.zero))
            };
            let codes = panel.wrapping_add(grid.codes::<false>(b, T::BLOCK_BYTES));
            IntBlock { codes, h, scale: shared.scale, second }
        }
    }
    #[inline(always)]
    unsafe fn gathered<S: Simd>(&self, s: S, panel: *const u8, octet: *const u8, group: usize, h: usize) -> [S::V; 8] {
        // SAFETY: as the caller promises: an octet reads as the first one of a block.
        unsafe {
            let mut block = IntBlock { codes: octet, ..self.block(s, panel, group, h) };
            self.eight(s, &mut block, 0)
        }
    }
    #[inline(always)]
    unsafe fn eight<S: Simd>(&self, s: S, block: &mut IntBlock<S>, o: usize) -> [S::V; 8] {
        // SAFETY: as the caller promises; codes are below the table's length.
        unsafe {
            let codes = self.octet(s, block.codes, o, block.h);
            let grid = self.grid();
            let mut out = [s.splat(0.0); 8];
            let mut j = 0;
            if T::FOLDS {
                // `(code - zero) * scale`, in one step.
                let scale = if T::SIXTEENS && o >= 2 { block.second } else { block.scale };
                let less = s.mul(s.splat(-f32::from(grid.zero)), scale);
                while j < 8 {
                    out[j] = s.fma(s.float(s.byte(codes[j / 4], j % 4)), scale, less);
                    j += 1;
                }
                return out;
            }
            while j < 8 {
                let code = s.byte(codes[j / 4], j % 4);
                // The same roundings as the format's decoder has, kind by kind.
                out[j] = if let Some(table) = &grid.table {
                    let scale = if T::SIXTEENS && o >= 2 { block.second } else { block.scale };
                    s.mul(s.lookup(table.as_ptr(), 1 << T::BITS, code), scale)
                } else if T::SIXTEENS {
                    let scale = if o < 2 { block.scale } else { block.second };
                    s.mul(s.sub(s.float(code), s.splat(f32::from(grid.zero))), scale)
                } else if grid.kind.minima() && grid.kind != Kind::F32Off {
                    s.add(s.mul(s.float(code), block.scale), block.second)
                } else {
                    s.mul(s.sub(s.float(code), block.second), block.scale)
                };
                j += 1;
            }
            out
        }
    }
}

/// Writes group `g`'s entry of lane `lane` from entry `from` of `line`.
pub(crate) fn put_scale(panel: &mut [u8], grid: &GroupLayout, lane: usize, g: usize, line: &Line, from: usize) {
    let entry = &mut panel[grid.entry(g)..][..grid.kind.entry()];
    let scale = line.scales[from];
    let two = |x: f32| f16::from_f32(x).to_le_bytes();
    match grid.kind {
        Kind::F16 | Kind::F16Zeros | Kind::F16Min => entry[2 * lane..][..2].copy_from_slice(&two(scale)),
        Kind::F32 | Kind::F32Zeros | Kind::F32Off | Kind::F32Min | Kind::F32Two => {
            entry[4 * lane..][..4].copy_from_slice(&scale.to_le_bytes())
        }
        Kind::Super => entry[lane] = scale as u8,
        Kind::Sixteens => entry[lane] = scale as i8 as u8,
        Kind::Own => unreachable!("written by the codec"),
    }
    match grid.kind {
        Kind::F16 | Kind::F32 | Kind::Own => {}
        Kind::F16Zeros => entry[2 * ROWS + lane] = line.seconds[from] as u8,
        Kind::F32Zeros => entry[4 * ROWS + lane] = line.seconds[from] as u8,
        Kind::F32Off | Kind::F32Min | Kind::F32Two => {
            entry[4 * ROWS + 4 * lane..][..4].copy_from_slice(&line.seconds[from].to_le_bytes());
        }
        Kind::F16Min => entry[2 * ROWS + 2 * lane..][..2].copy_from_slice(&two(line.seconds[from])),
        Kind::Super => entry[ROWS + lane] = line.seconds[from] as u8,
        Kind::Sixteens => entry[ROWS + lane] = line.seconds[from] as i8 as u8,
    }
    if grid.kind.supers() && g.is_multiple_of(8) {
        let over = &mut panel[grid.above(g)..][..SUPER];
        over[2 * lane..][..2].copy_from_slice(&two(line.supers[from / 8]));
        over[2 * ROWS + 2 * lane..][..2].copy_from_slice(&two(line.super_seconds[from / 8]));
    }
}

/// Dense panels of `source`, `[rows, cols]`.
pub(crate) fn dense(rows: usize, cols: usize, source: &Source, read: &dyn Fn()) -> (Panels, GroupLayout) {
    let bits = usize::from(source.bits);
    let blocks = cols.div_ceil(BLOCK);
    let per = (source.run / BLOCK).clamp(1, blocks.max(1));
    let groups = blocks.div_ceil(per);
    let grid = GroupLayout::dense(source, per, 64 * bits);
    let panels = Panels::build(rows, cols, grid.dense_bytes(blocks, 64 * bits), read, |first, n, panel| {
        let mut line = Line::default();
        for lane in 0..n {
            (source.read)(first + lane, &mut line);
            for (c, &code) in line.codes[..cols].iter().enumerate() {
                put_code(&mut panel[grid.codes::<false>(c / BLOCK, 64 * bits)..], bits, lane, c % BLOCK, code);
            }
            for g in 0..groups {
                put_scale(panel, &grid, lane, g, &line, g);
            }
        }
    });
    (panels, grid)
}

//! Panels: a matrix repacked once for this processor.
//!
//! A panel is 16 rows (outputs) of the matrix, and its columns run inside it, so that a lane is an output and no
//! product ever needs a sum across lanes. The layout is the same for every instruction set: those with eight lanes take
//! a panel's vectors in two halves (`h`). Columns are padded to whole blocks of 32 and the last panel to 16 rows, with
//! weights of zero.

pub(crate) mod columns;
pub(crate) mod float;
pub(crate) mod gathered;
pub(crate) mod halved;
pub(crate) mod ints;
pub(crate) mod lattice;
pub(crate) mod rowtables;
pub(crate) mod signs;
pub(crate) mod slices;
pub(crate) mod source;
pub(crate) mod unfolded;

use std::sync::Arc;

use crate::memory::Memory;
use crate::parallel;
use crate::simd::Simd;

/// Rows of a panel.
pub(crate) const ROWS: usize = 16;
/// Columns of a block: what shares a scale of quantized activations, and the unit of padding.
pub(crate) const BLOCK: usize = 32;
/// Columns of a span: sums of spans are made apart and added in order.
pub(crate) const SPAN: usize = 256;

/// Rows of x that meet a panel at once where the processor multiplies tiles.
pub(crate) const TILE: usize = 16;

/// Bytes of panels that are filled between two calls of `read`.
const STRIP: usize = 16 << 20;

/// Panels of equal size in one piece of memory.
#[derive(Clone)]
pub(crate) struct Panels {
    memory: Arc<Memory>,
    /// Bytes from one panel to the next.
    pub(crate) stride: usize,
    /// Rows of the matrix.
    pub(crate) rows: usize,
    /// Blocks of 32 columns.
    pub(crate) blocks: usize,
}

impl Panels {
    /// Panels for `rows` rows of `cols` columns, each of `stride` bytes filled by `fill(first row, rows, panel)` on
    /// whatever thread. `read` is called from time to time: what was filled before is no longer needed in its old form.
    pub(crate) fn build(
        rows: usize,
        cols: usize,
        stride: usize,
        read: &dyn Fn(),
        fill: impl Fn(usize, usize, &mut [u8]) + Sync,
    ) -> Panels {
        let stride = stride.next_multiple_of(64);
        let count = rows.div_ceil(ROWS);
        let mut memory = Memory::zeroed(count * stride);
        let base = Base(memory.bytes_mut().as_mut_ptr());
        let strip = (STRIP / stride.max(1)).max(1);
        for first in (0..count).step_by(strip) {
            parallel::ranges(strip.min(count - first), 1, usize::MAX, ROWS * cols * 4, |from, to| {
                let base = &base;
                for p in first + from..first + to {
                    // SAFETY: panels do not overlap, and each is handed out once.
                    let panel = unsafe { std::slice::from_raw_parts_mut(base.0.add(p * stride), stride) };
                    fill(p * ROWS, ROWS.min(rows - p * ROWS), panel);
                }
            });
            read();
        }
        Panels { memory: Arc::new(memory), stride, rows, blocks: cols.div_ceil(BLOCK) }
    }

    /// What products read.
    pub(crate) fn view(&self) -> View {
        View { base: self.memory.ptr(), stride: self.stride, rows: self.rows, blocks: self.blocks }
    }

    /// Bytes of all panels.
    pub(crate) fn bytes(&self) -> u64 {
        self.memory.len() as u64
    }
}

/// Panels where they lie.
#[derive(Clone, Copy)]
pub(crate) struct View {
    pub(crate) base: *const u8,
    /// Bytes from one panel to the next.
    pub(crate) stride: usize,
    /// Rows of the matrix.
    pub(crate) rows: usize,
    /// Blocks of 32 columns.
    pub(crate) blocks: usize,
}

// SAFETY: only read, while what it leads to is kept.
unsafe impl Send for View {}
// SAFETY: see above.
unsafe impl Sync for View {}

impl View {
    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Where panel `p` begins.
    #[inline(always)]
    pub(crate) fn at(&self, p: usize) -> *const u8 {
        debug_assert!(p < self.count());
        // SAFETY: inside the memory.
        unsafe { self.base.add(p * self.stride) }
    }
}

/// How far ahead of what is being read panels are prefetched, at most; of smaller ones the next is.
pub(crate) const FETCH: usize = 8192;
/// The same for codes, and for what stands beside them, and for what is read as it lies: several streams need no more.
pub(crate) const NEAR: usize = 1024;

/// How far ahead a row of panels that share their columns is prefetched, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Prefetch {
    /// From what is multiplied to what comes into the first-level cache meanwhile.
    pub(crate) near: usize,
    /// From the codes that are multiplied to those that come into the second-level cache meanwhile: in large panels,
    /// and in others, of which it must not pass over several, whose masks and scales lie between.
    pub(crate) far: (usize, usize),
    /// Bytes of a panel's values from which it is large. Of floats it is read at four places at once then: at one alone
    /// some processors fetch two thirds of what memory gives, but short runs end before they notice.
    pub(crate) large: usize,
    /// Lines that are asked for while a block of floats is gathered.
    pub(crate) lines: usize,
    /// From what is read of a part of a large panel of floats with two masks to what is asked for.
    pub(crate) part: usize,
    /// From what is read of a panel of floats that is not large to what is asked for; four times as far where panels
    /// share their columns.
    pub(crate) stretch: usize,
}

impl Prefetch {
    /// What serves every codec measured so far.
    pub(crate) const GATHERED: Prefetch =
        Prefetch { near: 1024, far: (16 << 10, 2 << 10), large: 32 << 10, lines: 2, part: 4096, stretch: FETCH };
}

/// How panels that are read once, from memory, are prefetched: what the processor's own guesses miss at
/// every page.
#[derive(Clone, Copy)]
pub(crate) struct Prefetcher {
    /// Bytes of a block, about.
    block: usize,
    /// Bytes of a panel.
    stride: usize,
    /// How far ahead.
    far: usize,
    /// Bytes passed over where one panel ends: others are read beside it.
    jump: usize,
}

impl View {
    /// For panels read `side` at a time, prefetched as far ahead as `most`.
    #[inline(always)]
    pub(crate) fn ahead(&self, side: usize, most: usize) -> Prefetcher {
        let stride = self.stride;
        Prefetcher { block: stride / self.blocks.max(1), stride, far: stride.min(most), jump: (side - 1) * stride }
    }

    /// Prefetches what lies `far` ahead of block `b` of `panel`, no nearer than the second-level cache, where panels
    /// are read one after another.
    #[inline(always)]
    pub(crate) fn ask_in_line(&self, panel: *const u8, b: usize, block: usize, far: usize) {
        let mut at = (b * block).next_multiple_of(64);
        while at < (b + 1) * block {
            fetch_far(panel.wrapping_add(far + at));
            at += 64;
        }
    }
}

impl Prefetcher {
    /// While block `b` of `panel` is read.
    #[inline(always)]
    pub(crate) fn fetch(&self, panel: *const u8, b: usize) {
        let mut at = b * self.block + self.far;
        let to = at + self.block;
        while at < to {
            fetch(panel.wrapping_add(if at < self.stride { at } else { at + self.jump }));
            at += 64;
        }
    }
}

/// What a task reads first, prefetched while its row of x is prepared: memory would have nothing to do then.
#[derive(Clone, Copy)]
pub(crate) struct Opening {
    /// The first of the places that are read side by side, how many they are and bytes from one to the next.
    at: *const u8,
    side: usize,
    step: usize,
    /// Bytes of each that are asked for.
    len: usize,
}

/// Lines that are prefetched while a block of x is prepared; more hold it up.
const OPENING: usize = 4;
/// Bytes of each place that are: from there on processors have guessed what comes.
const OPENED: usize = 4096;

impl Opening {
    /// Nothing.
    pub(crate) const NONE: Opening = Opening { at: std::ptr::null(), side: 1, step: 0, len: 0 };

    /// The next of what is asked for, in the place of block `b` of x.
    #[inline(always)]
    pub(crate) fn fetch(&self, b: usize) {
        let each = OPENING * 64 / self.side.next_power_of_two();
        let (from, to) = (b * each, ((b + 1) * each).min(self.len));
        let mut side = 0;
        while from < to && side < self.side {
            let mut at = from;
            while at < to {
                fetch_far(self.at.wrapping_add(side * self.step + at));
                at += 64;
            }
            side += 1;
        }
    }
}

impl View {
    /// Of panels from `p` on, read at `side` places, `apart` panels from one to the next.
    pub(crate) fn opening(&self, p: usize, side: usize, apart: usize) -> Opening {
        Opening {
            at: self.at(p),
            side: side.max(1),
            step: apart * self.stride,
            len: OPENED.min(apart.max(1) * self.stride),
        }
    }
}

/// Prefetches the cache line at `p`, whatever is there.
#[inline(always)]
pub(crate) fn fetch(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that touches nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint that touches nothing.
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

/// As `fetch`, no nearer than the second-level cache.
#[inline(always)]
pub(crate) fn fetch_far(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that touches nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint that touches nothing.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) p, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = p;
}

struct Base(*mut u8);
// SAFETY: used for panels that do not overlap.
unsafe impl Sync for Base {}
// SAFETY: see above.
unsafe impl Send for Base {}

/// A codec whose panels become f32 vectors, eight columns at a time.
pub(crate) trait Codec: Send + Sync {
    /// Whether its panels are prefetched as far ahead as can be. What is read as it lies, several panels at once, is
    /// prefetched nearer, and with eight lanes not at all: the processor's own guesses bring it as fast as memory gives
    /// it, and asking costs as many instructions as reading.
    const PREFETCH: bool = true;
    /// Whether reading it uses what `Isa::Avx512Vnni` has beyond `Isa::Avx512`.
    const EXPANDS: bool = false;
    /// Bytes of an octet of a gathered panel; none where columns that rows share are not panels of this codec.
    const OCTET: usize = 0;
    /// How far ahead its gathered panels are prefetched.
    const GATHERED: Prefetch = Prefetch::GATHERED;
    /// Bytes that every panel reads beside its own.
    fn beside(&self) -> u64 {
        0
    }
    /// Multiply-adds that a weight takes.
    fn work(&self) -> u64 {
        1
    }
    /// What a block of 32 columns needs to be read.
    type Block<S: Simd>: Copy;
    /// Reads what block `b` shares, for half `h` of the lanes.
    /// # Safety
    /// `panel` is a whole panel of this codec and has this block.
    unsafe fn block<S: Simd>(&self, s: S, panel: *const u8, b: usize, h: usize) -> Self::Block<S>;
    /// The octet of a gathered panel whose values lie at `octet`, in scale group `group`.
    /// # Safety
    /// `panel` is a whole gathered panel of this codec and has this octet and group.
    unsafe fn gathered<S: Simd>(&self, s: S, panel: *const u8, octet: *const u8, group: usize, h: usize) -> [S::V; 8];
    /// Columns `8 * o..8 * o + 8` of the block; called for `o` = 0, 1, 2, 3 in this order.
    /// # Safety
    /// As for `block`.
    unsafe fn eight<S: Simd>(&self, s: S, block: &mut Self::Block<S>, o: usize) -> [S::V; 8];
    /// Where it [`EXPANDS`](Self::EXPANDS): the next column of a block read for half 0, both halves of its lanes.
    /// # Safety
    /// As for `block`; there is a next column.
    #[inline(always)]
    unsafe fn both<S: Simd>(&self, _: S, _: &mut Self::Block<S>) -> [S::V; 2] {
        unreachable!("asked only of what expands")
    }
}

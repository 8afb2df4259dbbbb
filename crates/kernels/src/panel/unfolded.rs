//! A panel whose codes were brought to bytes for many rows of x: what its blocks share is read where it was.

use super::ints::{Bytes, GroupLayout, Shared};
use super::{BLOCK, ROWS};
use crate::simd::{Op, Simd};

/// Bytes of a block.
pub(crate) const UNFOLDED: usize = ROWS * BLOCK;

/// The codec of such a panel.
pub(crate) struct Unfolded<'a, C> {
    codec: &'a C,
    panel: *const u8,
    grid: GroupLayout,
}

// SAFETY: the panel is only read.
unsafe impl<C: Sync> Sync for Unfolded<'_, C> {}
// SAFETY: see above.
unsafe impl<C: Sync> Send for Unfolded<'_, C> {}

/// Brings `blocks` blocks of a whole panel to bytes.
pub(crate) struct Unfold<'a, C> {
    pub(crate) panel: *const u8,
    pub(crate) codec: &'a C,
    pub(crate) blocks: usize,
    /// [`UNFOLDED`] bytes of each.
    pub(crate) out: *mut u8,
}

impl<'a, C: Bytes> Op for Unfold<'a, C> {
    type Out = Unfolded<'a, C>;
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Unfolded<'a, C> {
        let grid = self.codec.grid();
        let mut b = 0;
        while b < self.blocks {
            let mut h = 0;
            while h < ROWS / S::LANES {
                // SAFETY: the maker has these blocks of the panel and room for them.
                unsafe {
                    let block = self.panel.add(grid.codes::<false>(b, C::BLOCK_BYTES));
                    let out = self.out.add(b * UNFOLDED + 4 * h * S::LANES);
                    // One by one and not in a loop: what an octet is cut out of is then known in every place.
                    octet(s, self.codec, block, out, (0, h));
                    octet(s, self.codec, block, out, (1, h));
                    octet(s, self.codec, block, out, (2, h));
                    octet(s, self.codec, block, out, (3, h));
                }
                h += 1;
            }
            b += 1;
        }
        Unfolded { codec: self.codec, panel: self.panel, grid: GroupLayout::indexed(grid.zero, 0, 0) }
    }
}

/// # Safety
/// The block is there, and room.
#[inline(always)]
unsafe fn octet<S: Simd, C: Bytes>(s: S, codec: &C, block: *const u8, out: *mut u8, (o, h): (usize, usize)) {
    // SAFETY: as the caller promises.
    unsafe {
        let [first, second] = codec.octet(s, block, o, h);
        s.store_i(out.add(8 * ROWS * o), first);
        s.store_i(out.add(8 * ROWS * o + 4 * ROWS), second);
    }
}

impl<C: Bytes> Bytes for Unfolded<'_, C> {
    const BITS: usize = C::BITS;
    const BLOCK_BYTES: usize = UNFOLDED;
    const SIXTEENS: bool = C::SIXTEENS;
    #[inline(always)]
    fn grid(&self) -> &GroupLayout {
        &self.grid
    }
    #[inline(always)]
    fn plain(&self) -> bool {
        false
    }
    #[inline(always)]
    unsafe fn octet<S: Simd>(&self, s: S, block: *const u8, o: usize, h: usize) -> [S::I; 2] {
        // SAFETY: as the caller promises.
        unsafe {
            let at = block.add(8 * ROWS * o + 4 * h * S::LANES);
            [s.load_i(at), s.load_i(at.add(4 * ROWS))]
        }
    }
    #[inline(always)]
    unsafe fn shared<S: Simd, const PLAIN: bool>(&self, s: S, _: *const u8, b: usize, h: usize) -> Shared<S> {
        // SAFETY: as the caller promises; the panel it was brought to bytes from is whole.
        unsafe { self.codec.shared::<S, PLAIN>(s, self.panel, b, h) }
    }
    #[inline(always)]
    unsafe fn shared_half<S: Simd>(&self, s: S, _: *const u8, b: usize, part: usize, h: usize) -> Shared<S> {
        // SAFETY: as above.
        unsafe { self.codec.shared_half(s, self.panel, b, part, h) }
    }
}

//! Panels of floats: dense, and with a mask of rows for every column.

use lacuna_format::{Float, Piece};

use super::{BLOCK, Codec, Panels, ROWS};
use crate::simd::Simd;

/// How a float is written: the sizes of f32, f16 and bf16.
pub(crate) trait Width: Send + Sync + Clone + Copy {
    /// Bytes of a value.
    const BYTES: usize;
    /// `LANES` values.
    /// # Safety
    /// `p` is readable for them.
    unsafe fn lanes<S: Simd>(s: S, p: *const u8) -> S::V;
    /// Packed values to the lanes whose bit is set.
    /// # Safety
    /// `p` is readable for `LANES` of them.
    unsafe fn expand<S: Simd>(s: S, p: *const u8, mask: u32) -> S::V;
    /// As `expand` for two columns of 16 rows, one after the other, where a vector has 16 lanes.
    /// # Safety
    /// `p` is readable for 32 of them.
    #[inline(always)]
    unsafe fn expand_two<S: Simd>(s: S, p: *const u8, mask: u32) -> [S::V; 2] {
        let first = (mask & 0xFFFF).count_ones() as usize;
        // SAFETY: as the caller promises.
        unsafe { [Self::expand(s, p, mask & 0xFFFF), Self::expand(s, p.add(first * Self::BYTES), mask >> 16)] }
    }
}

macro_rules! width {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $load:ident, $expand:ident $(, $two:ident)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name;

        impl Width for $name {
            const BYTES: usize = $bytes;
            #[inline(always)]
            unsafe fn lanes<S: Simd>(s: S, p: *const u8) -> S::V {
                // SAFETY: as the caller promises.
                unsafe { s.$load(p.cast()) }
            }
            #[inline(always)]
            unsafe fn expand<S: Simd>(s: S, p: *const u8, mask: u32) -> S::V {
                // SAFETY: as the caller promises.
                unsafe { s.$expand(p, mask) }
            }
            $(
                #[inline(always)]
                unsafe fn expand_two<S: Simd>(s: S, p: *const u8, mask: u32) -> [S::V; 2] {
                    // SAFETY: as the caller promises.
                    unsafe { s.$two(p, mask) }
                }
            )?
        }
    };
}

width!(
    /// 32 bits.
    F32,
    4,
    load,
    expand_f32
);
width!(
    /// IEEE half.
    F16,
    2,
    load_f16,
    expand_f16,
    expand_two_f16
);

/// bfloat16, dense only.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Width for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn lanes<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: as the caller promises.
        unsafe { s.load_bf16(p) }
    }
    unsafe fn expand<S: Simd>(_: S, _: *const u8, _: u32) -> S::V {
        unreachable!("bf16 under a mask is packed as f32")
    }
}

/// Every column's 16 values, one column after the other.
#[derive(Clone, Copy)]
pub(crate) struct Dense<W>(pub(crate) W);

impl<W: Width> Codec for Dense<W> {
    const PREFETCH: bool = false;
    const OCTET: usize = 8 * ROWS * W::BYTES;
    type Block<S: Simd> = *const u8;
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, _: S, panel: *const u8, b: usize, h: usize) -> *const u8 {
        // SAFETY: the caller promises the block.
        unsafe { panel.add((b * BLOCK * ROWS + h * S::LANES) * W::BYTES) }
    }
    #[inline(always)]
    unsafe fn gathered<S: Simd>(&self, s: S, _: *const u8, octet: *const u8, _: usize, h: usize) -> [S::V; 8] {
        // SAFETY: the caller promises the octet, which reads as the first one of a block.
        unsafe { self.eight(s, &mut self.block(s, octet, 0, h), 0) }
    }
    #[inline(always)]
    unsafe fn eight<S: Simd>(&self, s: S, block: &mut *const u8, o: usize) -> [S::V; 8] {
        let mut out = [s.splat(0.0); 8];
        let mut j = 0;
        while j < 8 {
            // SAFETY: the caller promises the block.
            out[j] = unsafe { W::lanes(s, block.add((8 * o + j) * ROWS * W::BYTES)) };
            j += 1;
        }
        out
    }
}

/// A mask of 16 rows for every column, then the values that are there.
///
/// A panel: where each block begins (u32, in bytes from the first one), then block by block its masks (u16) and its
/// values, so that one stream is read from memory and not two.
#[derive(Clone, Copy)]
pub(crate) struct Masked<W> {
    /// How its values are written.
    pub(crate) _width: W,
    pub(crate) blocks: usize,
}

/// Where a block of a masked panel is being read.
#[derive(Clone, Copy)]
pub(crate) struct Reader {
    masks: *const u8,
    values: *const u8,
    half: usize,
}

/// Bytes of a block's masks.
const MASKS: usize = 2 * BLOCK;

impl<W: Width> Codec for Masked<W> {
    const EXPANDS: bool = true;
    type Block<S: Simd> = Reader;
    #[inline(always)]
    unsafe fn block<S: Simd>(&self, _: S, panel: *const u8, b: usize, h: usize) -> Reader {
        // SAFETY: the caller promises the block.
        unsafe {
            let start = panel.add(4 * b).cast::<u32>().read_unaligned() as usize;
            let masks = panel.add(4 * self.blocks + start);
            Reader { masks, values: masks.add(MASKS), half: h }
        }
    }
    unsafe fn gathered<S: Simd>(&self, _: S, _: *const u8, _: *const u8, _: usize, _: usize) -> [S::V; 8] {
        unreachable!("columns that rows share are not masked")
    }
    #[inline(always)]
    unsafe fn both<S: Simd>(&self, s: S, r: &mut Reader) -> [S::V; 2] {
        let mut out = [s.splat(0.0); 2];
        let mut h = 0;
        while h < 2 {
            // SAFETY: as for `eight`.
            unsafe {
                let mask = u32::from(*r.masks.add(h));
                out[h] = W::expand(s, r.values, mask);
                r.values = r.values.add(mask.count_ones() as usize * W::BYTES);
            }
            h += 1;
        }
        r.masks = r.masks.wrapping_add(2);
        out
    }
    #[inline(always)]
    unsafe fn eight<S: Simd>(&self, s: S, r: &mut Reader, o: usize) -> [S::V; 8] {
        let mut out = [s.splat(0.0); 8];
        let mut j = 0;
        // SAFETY: the caller promises the block; after the last value of the last panel there is room for a vector's
        // overhang.
        unsafe {
            while j < 8 {
                let masks = r.masks.add(2 * (8 * o + j));
                if S::LANES == 16 {
                    let mask = masks.cast::<u32>().read_unaligned();
                    [out[j], out[j + 1]] = W::expand_two(s, r.values, mask);
                    r.values = r.values.add(mask.count_ones() as usize * W::BYTES);
                    j += 2;
                    continue;
                }
                let mask = u32::from(masks.cast::<u16>().read_unaligned());
                let first = if r.half == 0 { 0 } else { (mask & 255).count_ones() as usize };
                out[j] = W::expand(s, r.values.add(first * W::BYTES), mask >> (8 * r.half) & 255);
                r.values = r.values.add(mask.count_ones() as usize * W::BYTES);
                j += 1;
            }
        }
        out
    }
}

/// Bytes of dense panels of `bytes`-wide values.
pub(crate) fn dense_stride(cols: usize, bytes: usize) -> usize {
    cols.div_ceil(BLOCK) * BLOCK * ROWS * bytes
}

/// Dense panels of a row-major float buffer, values moved and not read.
pub(crate) fn dense(rows: usize, cols: usize, bytes: &[u8], width: usize, read: &dyn Fn()) -> Panels {
    Panels::build(rows, cols, dense_stride(cols, width), read, |first, n, panel| {
        for i in 0..n {
            let row = &bytes[(first + i) * cols * width..][..cols * width];
            for (k, v) in row.chunks_exact(width).enumerate() {
                panel[(k * ROWS + i) * width..][..width].copy_from_slice(v);
            }
        }
    })
}

/// Masked panels of a sparse float piece, in f16 where that is exactly what is stored, else in f32; gives whether it is
/// f16.
pub(crate) fn masked(piece: &Piece, read: &dyn Fn()) -> (Panels, bool) {
    let half = matches!(piece.values, lacuna_format::Values::Float(Float::F16, _));
    let width = if half { 2 } else { 4 };
    let (rows, cols, blocks) = (piece.rows, piece.cols, piece.cols.div_ceil(BLOCK));
    let kept = |p: usize| (p..rows.min(p + ROWS)).map(|r| piece.pattern.span(r, cols).len()).sum::<usize>();
    let most = (0..rows).step_by(ROWS).map(kept).max().unwrap_or(0);
    let head = 4 * blocks;
    let panels = Panels::build(rows, cols, head + MASKS * blocks + most * width, read, |first, n, panel| {
        let mut lines = vec![vec![0.0f32; cols]; n];
        let mut there = vec![0u16; blocks * BLOCK];
        for (i, line) in lines.iter_mut().enumerate() {
            piece.for_row(first + i, |c, v| {
                line[c] = v;
                there[c] |= 1 << i;
            });
        }
        let mut at = head;
        for (b, block) in there.chunks_exact(BLOCK).enumerate() {
            panel[4 * b..][..4].copy_from_slice(&((at - head) as u32).to_le_bytes());
            for mask in block {
                panel[at..at + 2].copy_from_slice(&mask.to_le_bytes());
                at += 2;
            }
            for (c, &mask) in (b * BLOCK..).zip(block) {
                for (_, line) in lines.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1) {
                    if half {
                        panel[at..at + 2].copy_from_slice(&half::f16::from_f32(line[c]).to_le_bytes());
                    } else {
                        panel[at..at + 4].copy_from_slice(&line[c].to_le_bytes());
                    }
                    at += width;
                }
            }
        }
    });
    (panels, half)
}

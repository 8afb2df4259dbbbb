//! The product skeleton: rows of `x` times rows of a tile.
//!
//! Lanes run along the columns. Every (row of x, output) pair owns one vector of sums, to which blocks of 32 columns are added in rising
//! order, and one fixed tree adds its lanes at the end. How many pairs are computed side by side (`M x N`) changes speed, never a bit.

use crate::simd::{Op, Simd};
use crate::tile::{BLOCK, Plain, Tile};

/// Where results go: output `(r, n)` lies at `out[r * stride + n]`.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub(crate) data: *mut f32,
    pub(crate) stride: usize,
    /// Add to what is there instead of overwriting it.
    pub(crate) add: bool,
}

// SAFETY: tasks that share it write disjoint columns.
unsafe impl Send for Out {}
// SAFETY: see above.
unsafe impl Sync for Out {}

/// Rows of `x` and where the first starts.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) data: *const f32,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

// SAFETY: it is only read.
unsafe impl Send for Rows {}
// SAFETY: see above.
unsafe impl Sync for Rows {}

/// Rows of f32 times all rows of x: the register-blocked product.
pub(crate) struct Product {
    /// The tile; its row 0 gives output column `column`.
    pub(crate) tile: Plain,
    pub(crate) rows: usize,
    pub(crate) column: usize,
    pub(crate) x: Rows,
    pub(crate) out: Out,
}

impl Op for Product {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: the maker of the product checked shapes.
        unsafe {
            let mut r = 0;
            if S::LANES == 16 {
                while r + 6 <= self.x.rows {
                    some_rows::<S, Plain, 6>(s, &self.tile, 0, self.rows, self.x, r, self.out, self.column);
                    r += 6;
                }
            }
            while r + 3 <= self.x.rows {
                some_rows::<S, Plain, 3>(s, &self.tile, 0, self.rows, self.x, r, self.out, self.column);
                r += 3;
            }
            while r < self.x.rows {
                some_rows::<S, Plain, 1>(s, &self.tile, 0, self.rows, self.x, r, self.out, self.column);
                r += 1;
            }
        }
    }
}

/// Rows `from..to` of a tile times one row of x, straight from its codes.
pub(crate) struct Direct<'a, T> {
    pub(crate) tile: &'a T,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) x: Rows,
    pub(crate) out: Out,
}

impl<T: Tile> Op for Direct<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in 0..self.x.rows {
            // SAFETY: the maker checked shapes; rows from..to are the tile's.
            unsafe {
                some_rows::<S, T, 1>(s, self.tile, self.from, self.to - self.from, self.x, r, self.out, self.from)
            };
        }
    }
}

/// Decodes rows `from..from + n` of a tile to f32, `stride` values apart.
pub(crate) struct Decode<'a, T> {
    pub(crate) tile: &'a T,
    pub(crate) from: usize,
    pub(crate) n: usize,
    pub(crate) cols: usize,
    pub(crate) out: &'a mut [f32],
    pub(crate) stride: usize,
}

impl<T: Tile> Op for Decode<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(
            self.stride >= self.cols.next_multiple_of(BLOCK) && self.out.len() >= self.n * self.stride,
            "room for a tile"
        );
        let whole = self.cols / BLOCK * BLOCK;
        for r in 0..self.n {
            let row = &mut self.out[r * self.stride..(r + 1) * self.stride];
            // SAFETY: the maker checked that the tile has these rows of `cols` columns; the row was cut to hold them in whole blocks.
            unsafe {
                let mut k = 0;
                while k < whole {
                    let shared = self.tile.shared(s, self.from + r, k);
                    let mut off = 0;
                    while off < BLOCK {
                        s.store(row.as_mut_ptr().add(k + off), self.tile.lanes(s, &shared, self.from + r, k, off));
                        off += S::LANES;
                    }
                    k += BLOCK;
                }
            }
            if whole < self.cols {
                self.tile.tail(self.from + r, whole, &mut row[whole..self.cols]);
            }
        }
    }
}

/// Columns of a decoded row: whole blocks, and not a multiple of 4 KiB, where rows would fight for the same cache sets.
pub(crate) fn padded(cols: usize) -> usize {
    let p = cols.next_multiple_of(BLOCK);
    if p.is_multiple_of(1024) { p + BLOCK } else { p }
}

/// Rows of a decoded tile: about 256 KiB, a quarter of a typical second-level cache, and whole groups of four.
pub(crate) fn tile_rows(cols: usize) -> usize {
    (65_536 / padded(cols).max(1)).clamp(4, 128) & !3
}

/// `M` rows of x from `r` on times `n` tile rows, four at a time.
/// # Safety
/// The tile has those rows of `x.cols` columns, `x` has rows `r..r + M`, and `out` has room.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn some_rows<S: Simd, T: Tile, const M: usize>(
    s: S,
    tile: &T,
    first: usize,
    n: usize,
    x: Rows,
    r: usize,
    out: Out,
    column: usize,
) {
    let mut c = 0;
    while c < n {
        // The last group may be short: its missing rows repeat its first one and are not written.
        let have = (n - c).min(4);
        let mut rows = [first + c; 4];
        let mut i = 1;
        while i < have {
            rows[i] = first + c + i;
            i += 1;
        }
        // SAFETY: as the caller promises.
        let sums = unsafe { block::<S, T, M>(s, tile, rows, x, r) };
        for (m, sums) in sums.iter().enumerate() {
            for (i, &v) in sums.iter().enumerate().take(have) {
                // SAFETY: the caller promises room for these outputs.
                unsafe {
                    let o = out.data.add((r + m) * out.stride + column + c + i);
                    *o = if out.add { *o + v } else { v };
                }
            }
        }
        c += 4;
    }
}

/// `M` rows of x times four tile rows.
/// # Safety
/// The tile has those rows of `x.cols` columns, `x` has rows `r..r + M`, and `out` has room.
#[inline(always)]
unsafe fn block<S: Simd, T: Tile, const M: usize>(
    s: S,
    tile: &T,
    rows: [usize; 4],
    x: Rows,
    r: usize,
) -> [[f32; 4]; M] {
    let whole = x.cols / BLOCK * BLOCK;
    let mut acc = [[s.splat(0.0); 4]; M];
    // SAFETY: as the caller promises; the padded copies of the last columns are whole blocks.
    unsafe {
        let base = x.data.add(r * x.stride);
        let mut k = 0;
        while k < whole {
            let mut shared = [tile.shared(s, rows[0], k); 4];
            let mut i = 1;
            while i < 4 {
                shared[i] = tile.shared(s, rows[i], k);
                i += 1;
            }
            let mut off = 0;
            while off < BLOCK {
                let mut w = [tile.lanes(s, &shared[0], rows[0], k, off); 4];
                let mut i = 1;
                while i < 4 {
                    w[i] = tile.lanes(s, &shared[i], rows[i], k, off);
                    i += 1;
                }
                let mut m = 0;
                while m < M {
                    let v = s.load(base.add(m * x.stride + k + off));
                    let mut i = 0;
                    while i < 4 {
                        acc[m][i] = s.fma(v, w[i], acc[m][i]);
                        i += 1;
                    }
                    m += 1;
                }
                off += S::LANES;
            }
            k += BLOCK;
        }
        if whole < x.cols {
            let rest = x.cols - whole;
            let mut w = [[0.0f32; BLOCK]; 4];
            for (w, &row) in w.iter_mut().zip(&rows) {
                tile.tail(row, whole, &mut w[..rest]);
            }
            let mut m = 0;
            while m < M {
                let mut v = [0.0f32; BLOCK];
                std::ptr::copy_nonoverlapping(base.add(m * x.stride + whole), v.as_mut_ptr(), rest);
                let mut off = 0;
                while off < BLOCK {
                    let v = s.load(v.as_ptr().add(off));
                    let mut i = 0;
                    while i < 4 {
                        acc[m][i] = s.fma(v, s.load(w[i].as_ptr().add(off)), acc[m][i]);
                        i += 1;
                    }
                    off += S::LANES;
                }
                m += 1;
            }
        }
    }
    let mut out = [[0.0; 4]; M];
    let mut m = 0;
    while m < M {
        out[m] = s.sum4(acc[m]);
        m += 1;
    }
    out
}

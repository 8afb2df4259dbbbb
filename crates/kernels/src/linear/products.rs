//! The products of forms: how x is prepared, how work is cut, and what runs.

use lacuna_base::{MatMut, MatRef};
use lacuna_format::Stored;

use super::Packing;
use super::prepare::{AsBytes, Work, in_tiles, padded, quantized, tiled};
use crate::op::dot::{self, Dots, Rows};
use crate::op::gather::{self, Gathered, GatheredBytes};
use crate::op::lookup::{self, Lookups};
use crate::op::matmul::{self, Batch, Gemv, Out};
use crate::op::sparse::Sparse;
#[cfg(any(test, target_arch = "x86_64"))]
use crate::op::tiles;
use crate::panel::float::{Dense, F32, Width};
use crate::panel::gathered::{self, Layout};
use crate::panel::ints::{Bytes, Ints};
use crate::panel::rowtables::{RowTables, STEP};
use crate::panel::slices::Lists;
use crate::panel::unfolded::{UNFOLDED, Unfold};
use crate::panel::{BLOCK, Codec, Opening, ROWS, View};
use crate::simd::dispatch;
use crate::{Isa, parallel, scratch};

/// Panels a task should be a multiple of, so that several run side by side in it.
pub(super) fn unit(count: usize) -> usize {
    match count {
        0..8 => 1,
        8..32 => 4,
        _ => 8,
    }
}

pub(super) fn exact<C: Codec>(packing: &Packing, view: View, codec: &C, x: MatRef<'_>, out: Out) {
    let (isa, cols) = (packing.isa, view.blocks * BLOCK);
    if x.rows() == 1 {
        return padded(x.row(0), view.blocks, |x| {
            let x = Shared(x);
            parallel::ranges(view.count(), unit(view.count()), usize::MAX, ROWS * cols, |from, to| {
                dispatch(isa, Gemv { panels: view, codec, from, to, x: x.get(), out });
            });
        });
    }
    tiled(isa, x, view.blocks, |first, rows, x| {
        let (x, out) = (Shared(x), out.below(first));
        parallel::ranges(view.count(), matmul::side(isa), usize::MAX, ROWS * cols * (rows + 4), |from, to| {
            scratch::with(matmul::scratch(rows), |scratch| {
                Batch { panels: view, codec, from, to, x: x.get(), rows, out, scratch }.run(isa);
            });
        });
    });
}

pub(super) fn bytes<C: Bytes>(packing: &Packing, view: View, codec: &C, x: MatRef<'_>, out: Out) {
    let tiled = in_tiles(packing.isa, x.rows(), view.blocks);
    let kind = AsBytes { zero: codec.grid().zero, sixteens: C::SIXTEENS, blocks: view.blocks, tiled };
    // A single row meets four panels side by side.
    let unit = if x.rows() == 1 { unit(view.count()).div_ceil(2) } else { 1 };
    let work = Work { count: view.count(), unit, cost: ROWS * view.blocks * BLOCK * x.rows() / 2 };
    quantized(
        packing.isa,
        x,
        kind,
        work,
        |from, to| opening(view, from, to),
        |x, from, to| dots(packing.isa, view, codec, (from, to), x, out),
    );
}

/// Panels `from..to` times quantized rows, in tiles or not; `out` begins with the call's first row.
pub(super) fn dots<C: Bytes>(isa: Isa, panels: View, codec: &C, (from, to): (usize, usize), x: Rows, out: Out) {
    let out = out.below(x.first);
    #[cfg(any(test, target_arch = "x86_64"))]
    if x.tiled {
        return tiles::multiply(isa, panels, codec, (from, to), x, out);
    }
    debug_assert!(!x.tiled);
    if !C::UNFOLDS || x.rows < UNFOLD {
        return dispatch(isa, Dots { panels, codec, from, to, x, out });
    }
    let blocks = panels.blocks;
    scratch::with(blocks * UNFOLDED / 4, |room| {
        let room = room.as_mut_ptr().cast::<u8>();
        for p in from..to {
            let codec = &dispatch(isa, Unfold { panel: panels.at(p), codec, blocks, out: room });
            let panels = View { base: room, stride: 0, rows: ROWS.min(panels.rows - p * ROWS), blocks };
            dispatch(isa, Dots { panels, codec, from: 0, to: 1, x, out: out.beside(p * ROWS) });
        }
    });
}

/// From how many rows of x on panels that unfold do: as many as meet a panel at once, and some.
const UNFOLD: usize = 9;

/// What is read first of panels `from..to`.
pub(super) fn opening(view: View, from: usize, to: usize) -> Opening {
    let (side, apart) = dot::side(to - from);
    view.opening(from, side, apart)
}

/// Rows of x in their own memory, padded to whole blocks and `more` zeros.
fn rows_padded(x: MatRef<'_>, blocks: usize, more: usize, f: impl FnOnce(Shared)) {
    if x.rows() == 1 && more == 0 {
        return padded(x.row(0), blocks, |x| f(Shared(x)));
    }
    let cols = blocks * BLOCK + more;
    scratch::with(x.rows() * cols, |room| {
        for (r, row) in room.chunks_exact_mut(cols.max(1)).take(x.rows()).enumerate() {
            row[..x.cols()].copy_from_slice(x.row(r));
            row[x.cols()..].fill(0.0);
        }
        f(Shared(room.as_ptr()));
    });
}

/// Lists of entries times rows of x.
pub(super) fn sparse<W: Width>(packing: &Packing, lists: &Lists, width: W, x: MatRef<'_>, out: Out) {
    let rows = x.rows();
    rows_padded(x, lists.blocks, 1, |x| {
        // A gathered entry costs about as much as eight that lie side by side.
        let entry = if lists.wide { 4 } else { 2 } + W::BYTES;
        let cost = 8 * rows * (lists.bytes() as usize / lists.count().max(1)) / entry;
        parallel::ranges(lists.count(), 1, usize::MAX, cost, |from, to| {
            dispatch(packing.isa, Sparse { lists, _width: width, from, to, x: x.get(), rows, out });
        });
    });
}

/// Rows of x that meet four decoded rows of weights at a time: half a megabyte of them, which stays in the second-level
/// cache.
fn beside(cols: usize) -> usize {
    ((1 << 17) / cols.max(1)).clamp(6, 96) / 6 * 6
}

/// Codes into tables of rows.
pub(super) fn tabled<const BITS: usize>(packing: &Packing, w: &RowTables, x: MatRef<'_>, out: Out) {
    let (isa, panels, steps) = (packing.isa, w.panels.view(), w.steps());
    let (cols, half) = (steps * STEP, w.half);
    rows_padded(x, cols / BLOCK, 0, |all| {
        let most = beside(cols);
        for first in (0..x.rows()).step_by(most) {
            let rows = most.min(x.rows() - first);
            parallel::ranges(panels.count(), unit(panels.count()), usize::MAX, ROWS * cols * rows, |from, to| {
                scratch::with(if x.rows() == 1 { 0 } else { lookup::scratch(steps) }, |scratch| {
                    // SAFETY: rows from `first` on are there.
                    let x = unsafe { all.get().add(first * cols) };
                    let out = out.below(first);
                    let op: Lookups<'_, BITS> = Lookups { panels, half, steps, from, to, x, rows, out, scratch };
                    dispatch(isa, op);
                });
            });
        }
    });
}

pub(super) fn shared<C: Codec>(packing: &Packing, view: View, codec: &C, layout: &Layout, x: MatRef<'_>, out: Out) {
    let (isa, rows) = (packing.isa, x.rows());
    rows_padded(x, view.blocks, 0, |x| {
        parallel::ranges(view.count(), layout.share, usize::MAX, ROWS * layout.octets * 8 * rows, |from, to| {
            gather_floats(isa, view, codec, layout, (from, to), (x.get(), rows), out);
        });
    });
}

pub(super) fn shared_bytes<const BITS: usize>(
    packing: &Packing,
    view: View,
    codec: &Ints<BITS>,
    layout: &Layout,
    x: MatRef<'_>,
    out: Out,
) where
    Ints<BITS>: Bytes,
{
    let isa = packing.isa;
    let kind = AsBytes { zero: codec.grid().zero, sixteens: false, blocks: view.blocks, tiled: false };
    let work = Work { count: view.count(), unit: layout.share, cost: ROWS * layout.octets * 8 * x.rows() };
    quantized(
        isa,
        x,
        kind,
        work,
        |from, _| view.opening(from, 1, 1),
        |x, from, to| {
            gather_bytes(isa, view, codec, layout, (from, to), x, out);
        },
    );
}

/// Panels `from..to` times rows of x, `blocks * 32` apart.
pub(super) fn gather_floats<C: Codec>(
    isa: Isa,
    panels: View,
    codec: &C,
    layout: &Layout,
    (from, to): (usize, usize),
    (x, rows): (*const f32, usize),
    out: Out,
) {
    scratch::with(gather::scratch(layout, panels.blocks), |scratch| {
        dispatch(isa, Gathered { panels, codec, layout: *layout, from, to, x, rows, out, scratch });
    });
}

/// From how many rows of x on panels with columns of their own are filled in: that takes as long as multiplying some
/// thirty rows, but then a row is multiplied in half the time.
const FILL: usize = 64;

/// Panels `from..to` times quantized rows.
pub(super) fn gather_bytes<const BITS: usize>(
    isa: Isa,
    panels: View,
    codec: &Ints<BITS>,
    layout: &Layout,
    (from, to): (usize, usize),
    x: Rows,
    out: Out,
) where
    Ints<BITS>: Bytes,
{
    let blocks = panels.blocks;
    if x.rows < FILL || layout.share > 1 || !gathered::fills(codec.grid()) {
        scratch::with(gather::scratch(layout, blocks), |scratch| {
            dispatch(isa, GatheredBytes { panels, codec, layout: *layout, from, to, x, out, scratch });
        });
        return;
    }
    let bytes = gathered::filled_bytes::<BITS>(codec.grid(), layout, blocks);
    scratch::with(bytes.div_ceil(4) + BLOCK, |room| {
        let room = room.as_mut_ptr().cast::<u8>();
        for p in from..to {
            // SAFETY: a panel is as long as the stride, and there is room for as many bytes as asked for.
            let (panel, dense) = unsafe {
                let filled = std::slice::from_raw_parts_mut(room, bytes);
                (std::slice::from_raw_parts(panels.at(p), panels.stride), filled)
            };
            let codec = &dispatch(isa, gathered::Fill { panel, codec, layout, blocks, out: dense });
            let panels = View { base: room, stride: 0, rows: ROWS.min(panels.rows - p * ROWS), blocks };
            dispatch(isa, Dots { panels, codec, from: 0, to: 1, x, out: out.beside(p * ROWS) });
        }
    });
}

/// As f32 panels that are made when they are needed, one at a time.
pub(super) fn decoded(packing: &Packing, stored: &Stored, x: MatRef<'_>, out: Out) {
    let (isa, blocks, cols) = (packing.isa, stored.cols.div_ceil(BLOCK), stored.cols);
    let count = stored.rows.div_ceil(ROWS);
    let panel_of = |p: usize, f: &mut dyn FnMut(View, Out)| {
        scratch::with(blocks * BLOCK * ROWS, |panel| {
            let n = ROWS.min(stored.rows - p * ROWS);
            scratch::with(ROWS * cols, |rows| {
                stored.decode_rows(p * ROWS, p * ROWS + n, MatMut::new(n, cols, &mut rows[..n * cols]));
                let panel = &mut panel[..blocks * BLOCK * ROWS];
                panel.fill(0.0);
                for (i, row) in rows[..n * cols].chunks_exact(cols.max(1)).enumerate() {
                    panel[i..].iter_mut().step_by(ROWS).zip(row).for_each(|(o, v)| *o = *v);
                }
            });
            let view = View { base: panel.as_ptr().cast(), stride: 0, rows: n, blocks };
            f(view, out.beside(p * ROWS));
        });
    };
    let codec = &Dense(F32);
    if x.rows() == 1 {
        return padded(x.row(0), blocks, |x| {
            let x = Shared(x);
            parallel::ranges(count, 1, usize::MAX, 8 * ROWS * cols, |from, to| {
                for p in from..to {
                    panel_of(p, &mut |panels, out| {
                        dispatch(isa, Gemv { panels, codec, from: 0, to: 1, x: x.get(), out });
                    });
                }
            });
        });
    }
    tiled(isa, x, blocks, |first, rows, x| {
        let x = Shared(x);
        parallel::ranges(count, 1, usize::MAX, ROWS * cols * (rows + 8), |from, to| {
            for p in from..to {
                panel_of(p, &mut |panels, out| {
                    scratch::with(matmul::scratch(rows), |scratch| {
                        let out = out.below(first);
                        Batch { panels, codec, from: 0, to: 1, x: x.get(), rows, out, scratch }.run(isa);
                    });
                });
            }
        });
    });
}

/// Rows of x that tasks read.
pub(super) struct Shared(*const f32);
// SAFETY: only read.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

impl Shared {
    fn get(&self) -> *const f32 {
        self.0
    }
}

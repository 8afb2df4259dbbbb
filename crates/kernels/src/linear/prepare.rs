//! Preparing rows of x: padded, in tiles, as bytes.

use lacuna_base::MatRef;

use crate::op::dot::{Rows, SPARE};
use crate::op::matmul::tiles;
use crate::op::quantize::Quantize;
use crate::panel::ints::META;
use crate::panel::{BLOCK, Opening, TILE};
use crate::simd::dispatch;
use crate::{Isa, parallel, scratch};

/// A row padded with zeros to whole blocks; the row itself where it is as long.
pub(super) fn padded<T>(x: &[f32], blocks: usize, f: impl FnOnce(*const f32) -> T) -> T {
    if x.len() == blocks * BLOCK {
        return f(x.as_ptr());
    }
    scratch::with(blocks * BLOCK, |room| {
        room[..x.len()].copy_from_slice(x);
        room[x.len()..blocks * BLOCK].fill(0.0);
        f(room.as_ptr())
    })
}

/// Rows of x that are packed and multiplied at a time: about a megabyte of them, which stays in the second-level cache.
fn chunk(cols: usize) -> usize {
    ((1 << 18) / cols.max(1)).clamp(48, 480).next_multiple_of(12)
}

/// Calls `f(first row, rows, tiles)` for chunks of x in the tiles that the float product reads.
pub(super) fn tiled(isa: Isa, x: MatRef<'_>, blocks: usize, mut f: impl FnMut(usize, usize, *const f32)) {
    let cols = blocks * BLOCK;
    let step = chunk(cols);
    for first in (0..x.rows()).step_by(step) {
        let rows = step.min(x.rows() - first);
        scratch::with((rows + 12) * cols, |room| {
            let room = SharedMut(room.as_mut_ptr());
            // A task is a row of tiles' worth: all tiles but the last have the same number of rows.
            let mut cuts = [(0, 0); 64 + 16];
            let mut n = 0;
            tiles(rows, isa.lanes(), |r, m| {
                cuts[n] = (r, m);
                n += 1;
            });
            parallel::ranges(n, 1, usize::MAX, 16 * cols, |from, to| {
                let room = &room;
                for &(r, m) in &cuts[from..to] {
                    // SAFETY: tiles do not overlap, and `rows + 12` rows are there.
                    let tile = unsafe { std::slice::from_raw_parts_mut(room.0.add(r * cols), m * cols) };
                    fill(tile, x, first + r, m.min(rows - r), m);
                }
            });
            f(first, rows, room.0);
        });
    }
}

/// Rows `r..r + have` of x as one tile of `m`, column by column; the rows it lacks are zeros.
fn fill(tile: &mut [f32], x: MatRef<'_>, r: usize, have: usize, m: usize) {
    tile[x.cols() * m..].fill(0.0);
    if have < m {
        tile.fill(0.0);
        for i in 0..have {
            tile[i..].iter_mut().step_by(m).zip(x.row(r + i)).for_each(|(t, v)| *t = *v);
        }
        return;
    }
    match m {
        2 => whole::<2>(tile, x, r),
        4 => whole::<4>(tile, x, r),
        6 => whole::<6>(tile, x, r),
        8 => whole::<8>(tile, x, r),
        12 => whole::<12>(tile, x, r),
        _ => unreachable!("tiles of {m}"),
    }
}

/// Rows `r..r + M` of x, column by column: all rows of a column at once, since their places lie together.
fn whole<const M: usize>(tile: &mut [f32], x: MatRef<'_>, r: usize) {
    let cols = x.cols();
    let rows: [&[f32]; M] = std::array::from_fn(|i| &x.row(r + i)[..cols]);
    for (c, places) in tile.as_chunks_mut::<M>().0[..cols].iter_mut().enumerate() {
        *places = std::array::from_fn(|i| rows[i][c]);
    }
}

struct SharedMut(*mut f32);
// SAFETY: used for parts that do not overlap.
unsafe impl Sync for SharedMut {}
// SAFETY: see above.
unsafe impl Send for SharedMut {}

/// Blocks of a row that are brought to bytes in one go.
const PART: usize = 64;
/// What bringing a value to a byte costs, in multiply-adds.
const COST: usize = 64;

/// From how many values on, all threads' together, a row is brought to bytes by all threads in parts; below, each
/// thread does the whole of it for itself, which two threads finish before they would have exchanged parts, and asks
/// for what it will read meanwhile.
const OWN: usize = 1 << 15;

/// A call's panels as [`parallel::ranges`] wants them.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub(super) count: usize,
    pub(super) unit: usize,
    pub(super) cost: usize,
}

/// How rows of x become bytes: for a matrix with this zero, so many blocks, and where `sixteens` two scales in each.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct AsBytes {
    pub(super) zero: u8,
    pub(super) sixteens: bool,
    pub(super) blocks: usize,
    /// Whether they lie in tiles.
    pub(super) tiled: bool,
}

/// From how many rows on panels of codes meet them in tiles: the fewest of those measured at which none lost
/// (`bench/record/sapphire-rapids-16c/amx`).
const TILED: usize = 64;

/// Whether so many rows of so many blocks meet panels in tiles.
pub(super) fn in_tiles(isa: Isa, rows: usize, blocks: usize) -> bool {
    #[cfg(test)]
    if crate::simd::unit::everywhere::on() {
        return rows > 1 && blocks > 0;
    }
    isa == Isa::Amx && rows >= TILED && blocks > 0
}

/// f32 values of room for [`quantized_row`].
pub(super) fn quantized_room(kind: AsBytes) -> usize {
    (1 + SPARE) * kind.blocks * (BLOCK / 4 + META)
}

/// One row, padded with zeros to whole blocks, as signed bytes in `room`.
pub(super) fn quantized_row(isa: Isa, x: &[f32], kind: AsBytes, room: &mut [f32]) -> Rows {
    let AsBytes { zero, sixteens, blocks, .. } = kind;
    assert!(x.len() >= blocks * BLOCK && room.len() >= quantized_room(kind), "room for a row of bytes");
    let (codes, meta) = room.split_at_mut((1 + SPARE) * blocks * BLOCK / 4);
    let (codes, meta) = (codes.as_mut_ptr().cast(), meta.as_mut_ptr());
    let (x, zero, opening) = (x.as_ptr(), i32::from(zero), Opening::NONE);
    dispatch(isa, Quantize { x, blocks, codes, meta, beside: 1, zero, sixteens, opening });
    Rows { codes, meta, rows: 1, first: 0, tiled: false }
}

/// Calls `f(rows, from, to)` over ranges of panels, with the rows of x as signed bytes. `opening` tells what is read
/// first from a panel on up to another.
pub(super) fn quantized(
    isa: Isa,
    x: MatRef<'_>,
    kind: AsBytes,
    work: Work,
    opening: impl Fn(usize, usize) -> Opening + Sync,
    f: impl Fn(Rows, usize, usize) + Sync,
) {
    if kind.tiled {
        return quantized_tiles(isa, x, kind, work, f);
    }
    let AsBytes { zero, sixteens, blocks, .. } = kind;
    let Work { count, unit, cost } = work;
    // Codes first, a quarter of an f32 each, then what belongs to their blocks.
    let (codes, meta) = (blocks * BLOCK / 4, blocks * META);
    let rows = x.rows() + SPARE;
    // Blocks `b..b + n` of row `r`.
    let fill = |room: &SharedMut, r: usize, b: usize, n: usize, opening: Opening| {
        padded(x.row(r), blocks, |row| {
            // SAFETY: parts of rows do not overlap in the room, which holds all of them.
            let (x, codes, meta) = unsafe {
                let (codes, meta) = (room.0.add(r * codes), room.0.add(rows * codes + r * meta));
                (row.add(b * BLOCK), codes.cast::<i8>().add(b * BLOCK), meta.add(b * META))
            };
            let zero = i32::from(zero);
            dispatch(isa, Quantize { x, blocks: n, codes, meta, beside: 1, zero, sixteens, opening });
        });
    };
    let ready = |room: &SharedMut| {
        // SAFETY: inside the room.
        let meta = unsafe { room.0.add(rows * codes) };
        Rows { codes: room.0.cast(), meta, rows: x.rows(), first: 0, tiled: false }
    };
    if x.rows() == 1 && blocks * BLOCK * parallel::threads() <= OWN {
        parallel::each(count, unit, usize::MAX, cost, |first, more| {
            scratch::with(rows * (codes + meta), |room| {
                let room = SharedMut(room.as_mut_ptr());
                fill(&room, 0, 0, blocks, opening(first.0, first.1));
                let ready = ready(&room);
                std::iter::once(first).chain(more).for_each(|(from, to)| f(ready, from, to));
            });
        });
        return;
    }
    scratch::with(rows * (codes + meta), |room| {
        let room = SharedMut(room.as_mut_ptr());
        // A long row is shared among threads, but not one that has to be padded first.
        let part = if x.cols() == blocks * BLOCK { PART } else { blocks.max(1) };
        let parts = blocks.div_ceil(part);
        parallel::ranges(x.rows() * parts, 1, usize::MAX, COST * BLOCK * part.min(blocks), |from, to| {
            for i in from..to {
                let (r, b) = (i / parts, i % parts * part);
                fill(&room, r, b, part.min(blocks - b), Opening::NONE);
            }
        });
        let ready = ready(&room);
        parallel::ranges(count, unit, usize::MAX, cost, |from, to| f(ready, from, to));
    });
}

/// Blocks of a tile of rows that are brought to bytes in one go.
const TILE_PART: usize = 16;
/// Bytes of rows in tiles that should stay in the second-level cache while panels pass by; and tiles that meet a panel
/// at least, since its codes are brought to bytes anew for every part of the rows.
const PASSED: usize = 768 << 10;
const LEAST: usize = 4;
/// Tasks for each thread, as far as there are tiles for them: a short last one keeps no other waiting for long.
const SHARES: usize = 8;

/// Tiles that meet a panel in one task, of so many blocks, of so many in all, where there are `count` panels.
fn tiles_at_once(tiles: usize, blocks: usize, count: usize) -> usize {
    let near = (PASSED / (TILE * blocks * (BLOCK + 4)).max(1)).max(LEAST);
    let shared = tiles.div_ceil((SHARES * parallel::threads()).div_ceil(count.max(1))).max(LEAST);
    // Parts of like size.
    tiles.div_ceil(tiles.div_ceil(near.min(shared)).max(1))
}

/// As [`quantized`] with rows in tiles: tasks are panels times parts of the rows.
fn quantized_tiles(isa: Isa, x: MatRef<'_>, kind: AsBytes, work: Work, f: impl Fn(Rows, usize, usize) + Sync) {
    let AsBytes { zero, sixteens, blocks, .. } = kind;
    let (tiles, count) = (x.rows().div_ceil(TILE), work.count);
    // Of a tile, in f32 values.
    let (codes, meta) = (TILE * blocks * BLOCK / 4, TILE * blocks * META);
    scratch::with(tiles * (codes + meta), |room| {
        let room = SharedMut(room.as_mut_ptr());
        // SAFETY: inside the room.
        let places = |room: &SharedMut, t: usize| unsafe {
            (room.0.add(t * codes).cast::<i8>(), room.0.add(tiles * codes + t * meta))
        };
        // Rows of a tile share cache lines: one thread makes them all.
        let part = if x.cols() == blocks * BLOCK { TILE_PART } else { blocks };
        let parts = blocks.div_ceil(part);
        parallel::ranges(tiles * parts, 1, usize::MAX, COST * TILE * BLOCK * part.min(blocks), |from, to| {
            for i in from..to {
                let (t, b) = (i / parts, i % parts * part);
                let n = part.min(blocks - b);
                let (codes, meta) = places(&room, t);
                // SAFETY: inside the tile.
                let (codes, meta) = unsafe { (codes.add(b * TILE * BLOCK), meta.add(b * TILE * META)) };
                let have = TILE.min(x.rows() - t * TILE);
                if have < TILE {
                    // SAFETY: the tile has these blocks, which no other task writes.
                    unsafe {
                        codes.write_bytes(0, n * TILE * BLOCK);
                        meta.write_bytes(0, n * TILE * META);
                    }
                }
                for m in 0..have {
                    padded(x.row(t * TILE + m), blocks, |row| {
                        // SAFETY: the row has these blocks, and so has the tile.
                        let (x, codes, meta) = unsafe { (row.add(b * BLOCK), codes.add(m * BLOCK), meta.add(m)) };
                        let (zero, opening) = (i32::from(zero), Opening::NONE);
                        dispatch(isa, Quantize { x, blocks: n, codes, meta, beside: TILE, zero, sixteens, opening });
                    });
                }
            }
        });
        let some = tiles_at_once(tiles, blocks, count);
        let parts = tiles.div_ceil(some);
        parallel::ranges(parts * count, 1, usize::MAX, work.cost / parts, |from, to| {
            let mut i = from;
            while i < to {
                let (part, p) = (i / count, i % count);
                let end = count.min(p + to - i);
                let (codes, meta) = places(&room, part * some);
                let first = part * some * TILE;
                let rows = (x.rows() - first).min(some * TILE);
                f(Rows { codes, meta, rows, first, tiled: true }, p, end);
                i += end - p;
            }
        });
    });
}

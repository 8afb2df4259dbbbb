//! Preparing rows of x: padded, in tiles, as bytes.

use lacuna_base::MatRef;

use crate::op::dot::{Rows, SPARE};
use crate::op::matmul::tiles;
use crate::op::quantize::Quantize;
use crate::panel::ints::META;
use crate::panel::{BLOCK, Opening};
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
}

/// f32 values of room for [`quantized_row`].
pub(super) fn quantized_room(kind: AsBytes) -> usize {
    (1 + SPARE) * kind.blocks * (BLOCK / 4 + META)
}

/// One row, padded with zeros to whole blocks, as signed bytes in `room`.
pub(super) fn quantized_row(isa: Isa, x: &[f32], kind: AsBytes, room: &mut [f32]) -> Rows {
    let AsBytes { zero, sixteens, blocks } = kind;
    assert!(x.len() >= blocks * BLOCK && room.len() >= quantized_room(kind), "room for a row of bytes");
    let (codes, meta) = room.split_at_mut((1 + SPARE) * blocks * BLOCK / 4);
    let (codes, meta) = (codes.as_mut_ptr().cast(), meta.as_mut_ptr());
    let (x, zero, opening) = (x.as_ptr(), i32::from(zero), Opening::NONE);
    dispatch(isa, Quantize { x, blocks, codes, meta, zero, sixteens, opening });
    Rows { codes, meta, rows: 1 }
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
    let AsBytes { zero, sixteens, blocks } = kind;
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
            dispatch(isa, Quantize { x, blocks: n, codes, meta, zero: i32::from(zero), sixteens, opening });
        });
    };
    let ready = |room: &SharedMut| {
        // SAFETY: inside the room.
        let meta = unsafe { room.0.add(rows * codes) };
        Rows { codes: room.0.cast(), meta, rows: x.rows() }
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

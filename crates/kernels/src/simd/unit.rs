//! What multiplies tiles of bytes: the processor's AMX, and in tests plain loops in its place.

use crate::panel::{BLOCK, ROWS, TILE};

/// Products that are asked for at once: they do not wait for each other.
pub(crate) const GROUP: usize = 4;
/// Sums of a product.
pub(crate) const SUMS: usize = TILE * ROWS;

/// Multiplies tiles: 16 rows of x, `COLUMNS` (16 or 32) columns of a block each, times 16 outputs.
pub(crate) trait Unit: Copy {
    /// Sums of products `step..step + n` of a tile of rows, `[16 rows][16 outputs]` of each, at `sums` one after the
    /// other. Exact. With `SIGNED` the codes are signed bytes, else unsigned ones; x is signed.
    ///
    /// Product `i` is of block `i` of x, or where `COLUMNS` is 16 of a half of block `i / 2`, and of codes
    /// `[COLUMNS / 4][16 outputs][4 columns]`.
    /// # Safety
    /// `n` is at most [`GROUP`] and `step` a multiple of it. `x` leads to blocks of `[16 rows][32 columns]` and `codes`
    /// to codes enough for these products, `sums` to room for them. The unit was made for as many columns.
    unsafe fn products<const COLUMNS: usize, const SIGNED: bool>(
        self,
        x: *const i8,
        codes: *const u8,
        sums: *mut i32,
        step: usize,
        n: usize,
    );
}

/// Where product `step` finds its part of x, in bytes.
#[inline(always)]
pub(crate) fn part<const COLUMNS: usize>(step: usize) -> usize {
    if COLUMNS == BLOCK { step * TILE * BLOCK } else { step / 2 * TILE * BLOCK + step % 2 * COLUMNS }
}

/// The definition.
#[cfg(test)]
#[derive(Clone, Copy)]
pub(crate) struct Slow;

#[cfg(test)]
impl Unit for Slow {
    unsafe fn products<const COLUMNS: usize, const SIGNED: bool>(
        self,
        x: *const i8,
        codes: *const u8,
        sums: *mut i32,
        step: usize,
        n: usize,
    ) {
        assert!(n <= GROUP && step.is_multiple_of(GROUP) && (COLUMNS == 16 || COLUMNS == BLOCK));
        for i in 0..n {
            for (m, o) in (0..TILE).flat_map(|m| (0..ROWS).map(move |o| (m, o))) {
                let product = |k: usize| {
                    // SAFETY: as the caller promises.
                    let (x, code) = unsafe {
                        let code = codes.add((step + i) * COLUMNS * ROWS + k / 4 * 4 * ROWS + 4 * o + k % 4);
                        (x.add(part::<COLUMNS>(step + i) + m * BLOCK + k).read(), code.read())
                    };
                    i32::from(x) * if SIGNED { i32::from(code as i8) } else { i32::from(code) }
                };
                // SAFETY: as the caller promises.
                unsafe { sums.add(i * SUMS + m * ROWS + o).write((0..COLUMNS).map(product).sum()) };
            }
        }
    }
}

/// Whether products of this thread go through tiles whatever the processor: so that all that is said of them is asked
/// of the plain loops, too.
#[cfg(test)]
pub(crate) mod everywhere {
    use std::cell::Cell;

    thread_local! {
        static ON: Cell<bool> = const { Cell::new(false) };
    }

    pub(crate) fn on() -> bool {
        ON.get()
    }

    /// Runs `f` with them.
    pub(crate) fn with<T>(f: impl FnOnce() -> T) -> T {
        struct Off;
        impl Drop for Off {
            fn drop(&mut self) {
                ON.set(false);
            }
        }
        let _off = Off;
        ON.set(true);
        f()
    }
}

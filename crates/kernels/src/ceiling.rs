//! What this machine allows at most: bytes read and multiply-adds done a second by all threads, measured.

use std::hint::black_box;
use std::time::Instant;

use crate::memory::Memory;
#[cfg(target_arch = "x86_64")]
use crate::simd::amx::{Amx, PEAK};
use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, cpu, parallel};

/// Runs of which the best counts.
const RUNS: usize = 7;
/// Bytes of a task of the stream.
const TASK: usize = 1 << 20;
/// Bytes that are read at least, however few are read over and over.
const READ: usize = 2 << 30;
/// The least and the most that counts as beyond caches.
const BEYOND: (usize, usize) = (512 << 20, 2 << 30);

/// So many bytes are beyond any cache of this machine: read over and over, they come from memory.
pub fn beyond_caches() -> usize {
    cpu::last_level_cache().unwrap_or(0).saturating_mul(2).clamp(BEYOND.0, BEYOND.1)
}

/// Memory to read, for the best read-only stream: in the same kind of pages as packed weights.
pub struct Reads(Memory);

impl Reads {
    /// `bytes` to read, rounded up to whole tasks of a megabyte: [`beyond_caches`] for the speed of memory.
    pub fn new(bytes: usize) -> Reads {
        let mut memory = Memory::zeroed(bytes.next_multiple_of(TASK));
        // Pages that nobody wrote are all one page.
        memory.bytes_mut().fill(1);
        Reads(memory)
    }

    /// Bytes a second of two read-only streams over all of it, by all [`crate::threads`]: one place of each task at a
    /// time, and four.
    pub fn pass(&self) -> [f64; 2] {
        let (base, len, isa) = (Start(self.0.ptr()), self.0.len(), Isa::best());
        [false, true].map(|wide| {
            let start = Instant::now();
            parallel::ranges(len / TASK, 1, usize::MAX, TASK, |from, to| {
                let at = base.get().wrapping_add(from * TASK);
                black_box(dispatch(isa, Stream { at, bytes: (to - from) * TASK, wide }));
            });
            len as f64 / start.elapsed().as_secs_f64()
        })
    }
}

/// Bytes a second of the best of several passes of [`Reads`] over `bytes`, as many to each thread: from the cache that
/// holds them, or from memory. A model that is read over and over for one token after the other has them from there,
/// too.
pub fn bandwidth(bytes: usize) -> f64 {
    let reads = Reads::new(bytes.max(1).next_multiple_of(TASK * parallel::threads()));
    (0..RUNS.max(READ / bytes.max(TASK) / 2)).flat_map(|_| reads.pass()).fold(0.0, f64::max)
}

/// Multiply-adds a second on f32, and on 8-bit codes and activations (of rows enough for tiles where there are some), by
/// all threads, out of registers.
pub fn arithmetic() -> (f64, f64) {
    const STEPS: usize = 1 << 16;
    let isa = Isa::best();
    let tasks = 8 * parallel::threads();
    let (mut floats, mut bytes) = (0.0f64, 0.0f64);
    for _ in 0..RUNS {
        let timed = |per_step: usize, run: &(dyn Fn() + Sync)| {
            let start = Instant::now();
            parallel::ranges(tasks, 1, 1, STEPS * per_step, |from, to| (from..to).for_each(|_| run()));
            (tasks * STEPS * per_step) as f64 / start.elapsed().as_secs_f64()
        };
        floats = floats.max(timed(CHAINS * isa.lanes(), &|| {
            black_box(dispatch(isa, Floats(STEPS)));
        }));
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Amx {
            bytes = bytes.max(timed(PEAK, &|| Amx::peak(STEPS)));
            continue;
        }
        bytes = bytes.max(timed(CHAINS * isa.lanes() * 8, &|| {
            black_box(dispatch(isa, Dots(STEPS)));
        }));
    }
    (floats, bytes)
}

struct Start(*const u8);
// SAFETY: only read.
unsafe impl Sync for Start {}

impl Start {
    fn get(&self) -> *const u8 {
        self.0
    }
}

/// Sums memory as vectors.
struct Stream {
    at: *const u8,
    /// A multiple of [`TASK`].
    bytes: usize,
    /// Four places at once, as products read four panels: some processors fetch more where they see several streams,
    /// some less.
    wide: bool,
}

impl Op for Stream {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        // SAFETY: the maker has these bytes, a multiple of sixteen lines.
        unsafe {
            if self.wide { sum::<S, 4, 1>(s, self.at, self.bytes) } else { sum::<S, 1, 4>(s, self.at, self.bytes) }
        }
    }
}

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// The sum of `bytes` bytes as f32, read in `SIDE` parts side by side, `LINES` lines of each at a time.
/// # Safety
/// They are there, a multiple of `SIDE * LINES` lines.
#[inline(always)]
unsafe fn sum<S: Simd, const SIDE: usize, const LINES: usize>(s: S, at: *const u8, bytes: usize) -> f32 {
    let part = bytes / SIDE;
    let mut acc = [[[s.splat(0.0); 2]; LINES]; SIDE];
    let mut b = 0;
    while b < part {
        let mut i = 0;
        while i < SIDE * LINES {
            let (side, line) = (i / LINES, i % LINES);
            let mut h = 0;
            while h < LINE / 4 / S::LANES {
                // SAFETY: as the caller promises.
                let v = unsafe { s.load(at.add(side * part + b + line * LINE).cast::<f32>().add(h * S::LANES)) };
                acc[side][line][h] = s.add(acc[side][line][h], v);
                h += 1;
            }
            i += 1;
        }
        b += LINES * LINE;
    }
    let mut total = s.splat(0.0);
    let mut i = 0;
    while i < SIDE * LINES {
        let [a, b] = acc[i / LINES][i % LINES];
        total = s.add(total, s.add(a, b));
        i += 1;
    }
    s.sum(total)
}

/// Sums side by side: enough to hide the latency of each.
const CHAINS: usize = 12;

/// So many steps of [`CHAINS`] fused multiply-adds of vectors.
struct Floats(usize);

impl Op for Floats {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut acc = [s.splat(1.0); CHAINS];
        let (a, b) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        let mut step = 0;
        while step < self.0 {
            let mut i = 0;
            while i < CHAINS {
                acc[i] = s.fma(acc[i], a, b);
                i += 1;
            }
            step += 1;
        }
        let mut total = 0.0;
        let mut i = 0;
        while i < CHAINS {
            total += s.sum(acc[i]);
            i += 1;
        }
        total
    }
}

/// So many steps of [`CHAINS`] dot products of eight bytes in each lane.
struct Dots(usize);

impl Op for Dots {
    type Out = f32;
    const INTEGER: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let x = black_box([1i8; 8 * CHAINS]);
        let mut codes = [s.splat_i(black_box(0x0102_0304)), s.splat_i(black_box(0x0403_0201))];
        let turn = s.splat_i(black_box(0));
        let mut acc = [[s.splat_i(0); 2]; CHAINS];
        let mut step = 0;
        while step < self.0 {
            // Other codes every step, and other x for every chain, for all the compiler can tell: it would take
            // repeated products out of the loop.
            codes[0] = s.xor_i(codes[0], turn);
            codes[1] = s.xor_i(codes[1], codes[0]);
            let mut i = 0;
            while i < CHAINS {
                // SAFETY: x has 8 bytes for every chain.
                acc[i] = unsafe { s.dot8::<false>(4, acc[i], codes, x.as_ptr().add(8 * i)) };
                i += 1;
            }
            step += 1;
        }
        let mut total = 0.0;
        let mut i = 0;
        while i < CHAINS {
            total += s.sum(s.float(s.total(4, acc[i])));
            i += 1;
        }
        total
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn ceilings_are_some_number() {
        let (floats, bytes) = super::arithmetic();
        assert!(floats.is_finite() && floats > 1e6 && bytes.is_finite() && bytes > 1e6);
        assert!(super::bandwidth(4 << 20) > 1e6);
    }
}

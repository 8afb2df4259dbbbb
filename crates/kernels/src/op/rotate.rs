//! Hadamard maps of rows: butterflies over runs of values.

use crate::simd::{Op, Simd};

/// The factors of a run: `core`, `[h, h]` of 1 and -1, over the Walsh matrix of `m`, a power of two.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    pub(crate) h: usize,
    pub(crate) m: usize,
    pub(crate) core: &'a [f32],
    /// 1 or -1 for every value of a row, a whole number of runs; none: all 1.
    pub(crate) signs: &'a [f32],
}

/// Runs `from..to` of rows that lie one after the other, in place.
pub(crate) struct Rotate<'a> {
    pub(crate) data: *mut f32,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) factors: Factors<'a>,
    /// The norm: one over the root of a run's length.
    pub(crate) by: f32,
    /// As long as a run.
    pub(crate) scratch: &'a mut [f32],
}

impl Op for Rotate<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let f = self.factors;
        let size = f.h * f.m;
        assert!(self.scratch.len() >= size, "room for a run");
        let runs = f.signs.len() / size;
        let by = self.by;
        let mut i = self.from;
        while i < self.to {
            // SAFETY: the maker has these runs, and signs of whole rows.
            unsafe {
                let v = self.data.add(i * size);
                // Without signs there are no runs of them to count by.
                let signs = match i.checked_rem(runs) {
                    Some(run) => f.signs.as_ptr().add(run * size),
                    None => std::ptr::null(),
                };
                let by = s.splat(by);
                let mut c = 0;
                while c + S::LANES <= size {
                    let at = v.add(c);
                    let sign = if signs.is_null() { s.splat(1.0) } else { s.load(signs.add(c)) };
                    s.store(at, s.mul(s.load(at), s.mul(by, sign)));
                    c += S::LANES;
                }
                while c < size {
                    let sign = if signs.is_null() { 1.0 } else { *signs.add(c) };
                    *v.add(c) *= self.by * sign;
                    c += 1;
                }
                let mut a = 0;
                while a < f.h {
                    walsh(s, v.add(a * f.m), f.m);
                    a += 1;
                }
                if f.h > 1 {
                    mix(s, v, (f.h, f.m), f.core, self.scratch.as_mut_ptr());
                }
            }
            i += 1;
        }
    }
}

/// The Walsh matrix of `m` times `m` values, without its norm.
/// # Safety
/// `v` has them.
#[inline(always)]
unsafe fn walsh<S: Simd>(s: S, v: *mut f32, m: usize) {
    let two = 2 * S::LANES;
    let mut half = 1;
    // SAFETY: as the caller promises.
    unsafe {
        if m >= two {
            // Two vectors at a time: the sums and differences of their halves, put by turns, bring the next bit of the
            // index to the top, and after as many rounds as there are bits all are done and in their places.
            let mut c = 0;
            while c < m {
                let (mut a, mut b) = (s.load(v.add(c)), s.load(v.add(c + S::LANES)));
                let mut n = 1;
                while n < two {
                    [a, b] = s.interleave(s.add(a, b), s.sub(a, b));
                    n *= 2;
                }
                s.store(v.add(c), a);
                s.store(v.add(c + S::LANES), b);
                c += two;
            }
            half = two;
        }
        while half < m {
            let mut first = 0;
            while first < m {
                let mut c = first;
                while half < two && c < first + half {
                    let (a, b) = (*v.add(c), *v.add(c + half));
                    *v.add(c) = a + b;
                    *v.add(c + half) = a - b;
                    c += 1;
                }
                while c < first + half {
                    let (a, b) = (s.load(v.add(c)), s.load(v.add(c + half)));
                    s.store(v.add(c), s.add(a, b));
                    s.store(v.add(c + half), s.sub(a, b));
                    c += S::LANES;
                }
                first += 2 * half;
            }
            half *= 2;
        }
    }
}

/// `h` rows of `m` values become their sums by `core`.
/// # Safety
/// `v` and `room` have `h * m` values.
#[inline(always)]
unsafe fn mix<S: Simd>(s: S, v: *mut f32, (h, m): (usize, usize), core: &[f32], room: *mut f32) {
    // SAFETY: as the caller promises.
    unsafe {
        std::ptr::copy_nonoverlapping(v, room, h * m);
        let mut i = 0;
        while i < h {
            let core = core.as_ptr().add(i * h);
            let mut c = 0;
            while c + S::LANES <= m {
                let (mut acc, mut j) = (s.splat(0.0), 0);
                while j < h {
                    acc = s.fma(s.splat(*core.add(j)), s.load(room.add(j * m + c)), acc);
                    j += 1;
                }
                s.store(v.add(i * m + c), acc);
                c += S::LANES;
            }
            while c < m {
                let (mut acc, mut j) = (0.0f32, 0);
                while j < h {
                    acc += *core.add(j) * *room.add(j * m + c);
                    j += 1;
                }
                *v.add(i * m + c) = acc;
                c += 1;
            }
            i += 1;
        }
    }
}

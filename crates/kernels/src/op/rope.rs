//! Rotary positions.

use std::sync::{Arc, Mutex};

use lacuna_base::MatMut;
use lacuna_spec::{Rope, RopeScaling, RopeStyle};

use crate::simd::{Op, Simd, dispatch};
use crate::{Isa, parallel};

/// The frequencies of a [`Rope`], worked out once. Clones share the angles of the rows that they were last asked for:
/// the blocks of a model ask for the same ones in turn.
#[derive(Clone, Debug)]
pub struct RopeTable {
    last: Arc<Mutex<Last>>,
    dims: usize,
    /// Angle per position of each channel pair, `[dims / 2]`.
    short: Vec<f32>,
    /// The same for long sequences, and the length above which a sequence is long.
    long: Option<(Vec<f32>, usize)>,
    /// Factor on cos and sin.
    attention_factor: f32,
}

impl RopeTable {
    /// The table of `rope`. Frequencies are rounded to f32 where transformers rounds them.
    pub fn new(rope: &Rope) -> RopeTable {
        let pairs = rope.dims / 2;
        let power = |i: usize| f64::from(rope.theta).powf(2.0 * i as f64 / rope.dims as f64);
        let plain = |i: usize| (1.0 / power(i)) as f32;
        let divided = |by: &[f32]| (0..pairs).map(|i| (1.0 / (f64::from(by[i]) * power(i))) as f32).collect::<Vec<_>>();
        let mut long = None;
        let mut attention_factor = 1.0;
        let short: Vec<f32> = match &rope.scaling {
            RopeScaling::Default => (0..pairs).map(plain).collect(),
            RopeScaling::Linear { factor } => (0..pairs).map(|i| plain(i) / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => (0..pairs)
                .map(|i| {
                    let f = plain(i);
                    let wavelength = std::f32::consts::TAU / f;
                    let original = *original as f32;
                    if wavelength < original / high_freq_factor {
                        f
                    } else if wavelength > original / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor: a, original, truncate } => {
                attention_factor = *a;
                // The channel that turns `rotations` times over the original context.
                let channel = |rotations: f32| {
                    rope.dims as f64 * (*original as f64 / (f64::from(rotations) * std::f64::consts::TAU)).ln()
                        / (2.0 * f64::from(rope.theta).ln())
                };
                let (mut low, mut high) = (channel(*beta_fast), channel(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(rope.dims as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                (0..pairs)
                    .map(|i| {
                        let ramp = (((i as f64 - low) / (high - low)).clamp(0.0, 1.0)) as f32;
                        let f = plain(i);
                        f / factor * ramp + f * (1.0 - ramp)
                    })
                    .collect()
            }
            RopeScaling::Longrope { short, long: l, attention_factor: a, original } => {
                attention_factor = *a;
                long = Some((divided(l), *original));
                divided(short)
            }
            RopeScaling::Factors { factors } => divided(factors),
            RopeScaling::Proportional { pairs: turning, factor } => {
                (0..pairs).map(|i| if i < *turning { plain(i) / factor } else { 0.0 }).collect()
            }
        };
        let last = Last {
            at: Vec::new(),
            rows: RopeRows { style: rope.style, half: pairs, cos: Vec::new(), sin: Vec::new() },
        };
        RopeTable { last: Arc::new(Mutex::new(last)), dims: rope.dims, short, long, attention_factor }
    }

    /// cos and sin of every pair at `position` of a sequence of `length` tokens, `[dims / 2]` each. The length matters
    /// for LongRoPE only.
    pub fn angles(&self, position: usize, length: usize, cos: &mut [f32], sin: &mut [f32]) {
        let freq = match &self.long {
            Some((long, original)) if length > *original => long,
            _ => &self.short,
        };
        for ((c, s), f) in cos.iter_mut().zip(sin).zip(freq) {
            // The product in f32, as the models were trained; its cosine exact.
            let (b, a) = f64::from(position as f32 * f).sin_cos();
            *c = a as f32 * self.attention_factor;
            *s = b as f32 * self.attention_factor;
        }
    }

    /// Calls `f` with the cos and sin of many rows, from (position, length of the sequence) of every row.
    pub fn with<T>(
        &self,
        at: impl ExactSizeIterator<Item = (usize, usize)> + Clone,
        f: impl FnOnce(&RopeRows) -> T,
    ) -> T {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        let half = self.dims / 2;
        if !last.at.iter().copied().eq(at.clone()) {
            let Last { at: known, rows } = &mut *last;
            known.clear();
            known.extend(at);
            rows.cos.resize(known.len() * half, 0.0);
            rows.sin.resize(known.len() * half, 0.0);
            let (cos, sin) = (Shared(rows.cos.as_mut_ptr()), Shared(rows.sin.as_mut_ptr()));
            parallel::ranges(known.len(), 1, usize::MAX, 64 * half, |from, to| {
                let (cos, sin) = (&cos, &sin);
                for (r, &(p, n)) in known.iter().enumerate().take(to).skip(from) {
                    // SAFETY: rows do not overlap, and both have room for all of them.
                    let of = |x: &Shared| unsafe { std::slice::from_raw_parts_mut(x.0.add(r * half), half) };
                    self.angles(p, n, of(cos), of(sin));
                }
            });
        }
        f(&last.rows)
    }
}

/// The angles that were last asked for.
#[derive(Debug)]
struct Last {
    /// Position and length of every row.
    at: Vec<(usize, usize)>,
    rows: RopeRows,
}

struct Shared(*mut f32);
// SAFETY: used for disjoint rows only.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

/// cos and sin of the rows of one call.
#[derive(Clone, Debug)]
pub struct RopeRows {
    style: RopeStyle,
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeRows {
    /// The turns backward, which is what a derivative takes: the transpose of every turn, its factor kept.
    pub fn transposed(&self) -> RopeRows {
        RopeRows { sin: self.sin.iter().map(|x| -x).collect(), ..self.clone() }
    }

    /// Turns the heads of every row of `x`, `[rows, heads * head_dim]`, in place. Channels beyond the table's stay.
    #[track_caller]
    pub fn apply(&self, head_dim: usize, mut x: MatMut<'_>) {
        let h = self.half;
        assert!(head_dim >= 2 * h && x.cols().is_multiple_of(head_dim), "{} columns in heads of {head_dim}", x.cols());
        assert!(x.rows() * h <= self.cos.len(), "angles for {} rows, got {}", self.cos.len() / h.max(1), x.rows());
        let (isa, rows, cols, stride) = (Isa::best(), x.rows(), x.cols(), x.stride());
        let base = Shared(x.raw_mut().as_mut_ptr());
        parallel::ranges(rows, 1, usize::MAX, 2 * cols, |from, to| {
            let base = &base;
            for r in from..to {
                for at in (0..cols).step_by(head_dim) {
                    // SAFETY: tasks take disjoint rows of a matrix that this call borrows mutably; a head has two
                    // halves.
                    let head = unsafe { base.0.add(r * stride + at) };
                    let (cos, sin) = (self.cos[r * h..].as_ptr(), self.sin[r * h..].as_ptr());
                    match self.style {
                        RopeStyle::Half => dispatch(isa, Turn { head, cos, sin, half: h }),
                        RopeStyle::Interleaved => {
                            // SAFETY: as above.
                            let head = unsafe { std::slice::from_raw_parts_mut(head, 2 * h) };
                            let (cos, sin) = (&self.cos[r * h..][..h], &self.sin[r * h..][..h]);
                            for ((p, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                                (p[0], p[1]) = (p[0] * c - p[1] * s, p[1] * c + p[0] * s);
                            }
                        }
                    }
                }
            }
        });
    }
}

/// Turns the pairs `(i, i + half)` of one head.
struct Turn {
    head: *mut f32,
    cos: *const f32,
    sin: *const f32,
    half: usize,
}

impl Op for Turn {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let whole = self.half / S::LANES * S::LANES;
        let mut i = 0;
        // SAFETY: the maker has a head of two halves, and as many cos and sin as pairs.
        unsafe {
            while i < whole {
                let (a, b) = (s.load(self.head.add(i)), s.load(self.head.add(self.half + i)));
                let (cos, sin) = (s.load(self.cos.add(i)), s.load(self.sin.add(i)));
                s.store(self.head.add(i), s.sub(s.mul(a, cos), s.mul(b, sin)));
                s.store(self.head.add(self.half + i), s.add(s.mul(b, cos), s.mul(a, sin)));
                i += S::LANES;
            }
            while i < self.half {
                let (a, b) = (*self.head.add(i), *self.head.add(self.half + i));
                let (cos, sin) = (*self.cos.add(i), *self.sin.add(i));
                *self.head.add(i) = a * cos - b * sin;
                *self.head.add(self.half + i) = b * cos + a * sin;
                i += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    fn rope(style: RopeStyle, scaling: RopeScaling) -> Rope {
        Rope { theta: 10_000.0, dims: 8, style, scaling }
    }

    #[test]
    fn styles_turn_the_same_pairs_in_another_order_and_keep_lengths() {
        let x = random(5, 2 * 12, 3);
        let half = RopeTable::new(&rope(RopeStyle::Half, RopeScaling::Default));
        let inter = RopeTable::new(&rope(RopeStyle::Interleaved, RopeScaling::Default));
        let at = || [0usize, 1, 7, 100, 5000].into_iter().map(|p| (p, p + 1));
        let mut a = x.clone();
        half.with(at(), |rows| rows.apply(12, a.view_mut()));
        // The same vector with its channels reordered: pair (i, i + 4) becomes (2i, 2i + 1).
        let order = |c: usize| (c / 12) * 12 + if c % 12 < 8 { (c % 12 % 2) * 4 + c % 12 / 2 } else { c % 12 };
        let mut b = lacuna_base::Mat::from_fn(5, 24, |r, c| x[(r, order(c))]);
        inter.with(at(), |rows| rows.apply(12, b.view_mut()));
        for r in 0..5 {
            for c in 0..24 {
                assert_eq!(b[(r, c)], a[(r, order(c))]);
            }
            let n = |m: &lacuna_base::Mat| m.row(r).iter().map(|v| v * v).sum::<f32>();
            assert!((n(&a) - n(&x)).abs() < 1e-4);
        }
        assert_eq!(a.row(0), x.row(0), "position 0 turns nothing");
        let want = f64::from(x[(1, 0)]) * 1f64.cos() - f64::from(x[(1, 4)]) * 1f64.sin();
        assert!((f64::from(a[(1, 0)]) - want).abs() < 1e-6);
    }

    #[test]
    fn longrope_switches_by_the_length_of_the_sequence() {
        let t = RopeTable::new(&rope(
            RopeStyle::Half,
            RopeScaling::Longrope { short: vec![1.0; 4], long: vec![2.0; 4], attention_factor: 1.0, original: 10 },
        ));
        let angle = |p: usize, n: usize| {
            let (mut c, mut s) = ([0.0; 4], [0.0; 4]);
            t.angles(p, n, &mut c, &mut s);
            s[0].atan2(c[0])
        };
        assert!((angle(2, 3) - 2.0).abs() < 1e-6 && (angle(2, 11) - 1.0).abs() < 1e-6);
        assert!((angle(3, 10) - 3.0).abs() < 1e-6 && (angle(3, 11) - 1.5).abs() < 1e-6);
    }
}

//! Maps at a matrix's ends: changes of axes that are cheap to apply.
//!
//! A matrix with maps is `y = Out_k( .. Out_1( W · In_k( .. In_1(x) ) ) )`: the maps of its input in their order, the
//! sum `W` of its terms, the maps of its output in theirs. All are square. What it decodes to is the product of all of
//! them, dense.

use std::ops::{Add, Mul, Sub};

use bytes::Bytes;
use lacuna_base::MatMut;

use crate::pattern::u32_at;
use crate::{Float, FormatError, Piece, Stored, Term};

/// Maps at one end of a matrix, at most.
pub const MOST_MAPS: usize = 4;
/// Rows of a dense map, at most.
pub const MOST_DENSE: usize = 4096;

/// A linear map of `n` values to `n`.
#[derive(Clone, Debug, PartialEq)]
pub enum Map {
    /// `y[i] = x[index[i]]`. u32 little-endian, `[n]`, each of `0..n` once.
    Permutation(Bytes),
    /// `y[i] = d[i] * x[i]`. f32 or f16, `[n]`, finite.
    Diagonal(Float, Bytes),
    /// Every run of `size` values is `y = H · (s ∘ x)`, `H` orthogonal: a matrix of 1 and -1 over `sqrt(size)`. `n`
    /// divides by `size`.
    ///
    /// `size` is `h * 2^k` with `h` of 1, 12, 20, 28, 36 or 44 ([`hadamard_parts`]), and `H` the Kronecker product of
    /// `H_h` ([`hadamard_core`]) and the Walsh matrix of `2^k`, whose entry `(i, j)` is -1 where `i & j` has an odd
    /// number of bits. So 3 x 128 is `size` 128 over 384 values.
    Hadamard {
        /// Values of a run.
        size: usize,
        /// A bit for each of the `n` values, the first lowest, unused ones 0: set where `s` is -1. Absent: all 1.
        signs: Option<Bytes>,
    },
    /// Every run of `size` values is `y = M · x`. `n` divides by `size`.
    Dense {
        /// Rows and columns of `M`, 1 to [`MOST_DENSE`].
        size: usize,
        /// f32 or f16.
        float: Float,
        /// `[size, size]`, row-major, finite.
        values: Bytes,
    },
}

/// The two factors `(h, 2^k)` of a block's size; `None` where there is no such matrix here.
pub fn hadamard_parts(size: usize) -> Option<(usize, usize)> {
    if size == 0 {
        return None;
    }
    let twos = size.trailing_zeros();
    match size >> twos {
        1 => Some((1, size)),
        odd @ (3 | 5 | 7 | 9 | 11) if twos >= 2 => Some((4 * odd, 1 << (twos - 2))),
        _ => None,
    }
}

/// The matrix of 1 and -1 of order 1, 12, 20, 28, 36 or 44, `[h, h]`, row-major, whose rows are orthogonal; panics for
/// any other.
///
/// Paley's: with `chi(a)` 1 for a square modulo the prime `q`, -1 for any other and 0 for 0, `Q[i, j] = chi(i - j)`.
/// For 12, 20, 44 (`q` = 11, 19, 43): `H = I + S`, where `S` has 1 in its first row and -1 in its first column, 0 where
/// they meet, and `Q` in the rest. For 28, 36 (`q` = 13, 17): `C` has 1 in its first row and column, 0 where they meet,
/// and `Q` in the rest; `H = [[C + I, C - I], [C - I, -C - I]]`.
pub fn hadamard_core(h: usize) -> Vec<i8> {
    let (q, two) = match h {
        1 => return vec![1],
        12 | 20 | 44 => (h - 1, false),
        28 | 36 => (h / 2 - 1, true),
        _ => panic!("no such matrix of order {h}"),
    };
    let chi = |a: usize| {
        if a == 0 {
            0
        } else if (1..q).any(|b| b * b % q == a) {
            1
        } else {
            -1i8
        }
    };
    let with_border = |first: i8, i: usize, j: usize| match (i, j) {
        (0, 0) => 0,
        (0, _) => 1,
        (_, 0) => first,
        _ => chi((i + q - j) % q),
    };
    let one = |i: usize, j: usize| i8::from(i == j);
    let entry = |i: usize, j: usize| {
        if !two {
            return one(i, j) + with_border(-1, i, j);
        }
        let (p, a, b) = (q + 1, i % (q + 1), j % (q + 1));
        let c = with_border(1, a, b);
        match (i < p, j < p) {
            (true, true) => c + one(a, b),
            (false, false) => -c - one(a, b),
            _ => c - one(a, b),
        }
    };
    (0..h * h).map(|k| entry(k / h, k % h)).collect()
}

/// Whether value `i` is negated by packed signs.
fn negative(signs: &[u8], i: usize) -> bool {
    signs[i / 8] >> (i % 8) & 1 == 1
}

impl Map {
    /// A permutation, `y[i] = x[index[i]]`.
    pub fn permutation(index: &[u32]) -> Map {
        Map::Permutation(index.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<u8>>().into())
    }

    /// A diagonal in f32 or f16, rounded to nearest.
    pub fn diagonal(d: &[f32], float: Float) -> Result<Map, FormatError> {
        let bytes = float.encode(d).map_err(|i| FormatError::new(format!("diagonal: {} at {i} does not fit", d[i])))?;
        Ok(Map::Diagonal(float, bytes.into()))
    }

    /// Blocks of a Hadamard matrix; `negative[i]` where value `i` changes its sign first.
    pub fn hadamard(size: usize, negative: Option<&[bool]>) -> Map {
        let pack = |b: &[bool]| b.iter().enumerate().fold(0u8, |byte, (i, &n)| byte | u8::from(n) << i);
        let signs = negative.map(|n| n.chunks(8).map(pack).collect::<Vec<u8>>().into());
        Map::Hadamard { size, signs }
    }

    /// A dense matrix, `[size, size]` row-major, in f32 or f16, rounded to nearest.
    pub fn dense(size: usize, m: &[f32], float: Float) -> Result<Map, FormatError> {
        let bytes = float.encode(m).map_err(|i| FormatError::new(format!("map: {} at {i} does not fit", m[i])))?;
        Ok(Map::Dense { size, float, values: bytes.into() })
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        match self {
            Map::Permutation(b) | Map::Diagonal(_, b) | Map::Dense { values: b, .. } => b.len() as u64,
            Map::Hadamard { signs, .. } => signs.as_ref().map_or(0, |s| s.len() as u64),
        }
    }

    /// A short name: `permutation`, `hadamard 128`.
    pub fn name(&self) -> String {
        match self {
            Map::Permutation(_) => "permutation".into(),
            Map::Diagonal(..) => "diagonal".into(),
            Map::Hadamard { size, .. } => format!("hadamard {size}"),
            Map::Dense { size, .. } => format!("dense {size}"),
        }
    }

    /// Whether every result is one value times a number: zeros stay zeros.
    pub fn moves_only(&self) -> bool {
        matches!(self, Map::Permutation(_) | Map::Diagonal(..))
    }

    /// Values that a result depends on lie within its own run of so many; `None`: anywhere.
    fn run(&self) -> Option<usize> {
        match self {
            Map::Permutation(_) => None,
            Map::Diagonal(..) => Some(1),
            Map::Hadamard { size, .. } | Map::Dense { size, .. } => Some(*size),
        }
    }

    /// The map of `n` values with its numbers read. It must have passed a check.
    fn open(&self, n: usize) -> Open {
        let floats = |float: &Float, bytes: &[u8], n: usize| {
            let mut out = vec![0.0; n];
            float.decode(bytes, &mut out);
            out
        };
        match self {
            Map::Permutation(index) => Open::Permutation((0..n).map(|i| u32_at(index, i)).collect()),
            Map::Diagonal(float, bytes) => Open::Diagonal(floats(float, bytes, n)),
            Map::Hadamard { size, signs } => {
                let (h, m) = hadamard_parts(*size).expect("a size that has passed its check");
                let sign = |i| if signs.as_ref().is_some_and(|s| negative(s, i)) { -1.0 } else { 1.0 };
                let core = hadamard_core(h).into_iter().map(f32::from).collect();
                Open::Hadamard { h, m, core, signs: (0..n).map(sign).collect() }
            }
            Map::Dense { size, float, values } => Open::Dense { size: *size, m: floats(float, values, size * size) },
        }
    }
}

/// A map with its numbers read.
enum Open {
    Permutation(Vec<usize>),
    Diagonal(Vec<f32>),
    Hadamard { h: usize, m: usize, core: Vec<f32>, signs: Vec<f32> },
    Dense { size: usize, m: Vec<f32> },
}

/// What maps apply to: f32 and f64.
pub trait Number: Copy + From<f32> + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> {}

impl Number for f32 {}
impl Number for f64 {}

impl Open {
    /// Applies the map, or with `transposed` its transpose, to values `first..` of it, each a row of `width`: `v` is
    /// `[values, width]`, whole runs (all values for a permutation).
    fn apply<T: Number>(&self, first: usize, v: &mut [T], width: usize, transposed: bool) {
        let row = |i: usize| i * width..(i + 1) * width;
        let scale = |v: &mut [T], by: &[f32]| {
            for (v, &by) in v.chunks_exact_mut(width.max(1)).zip(&by[first..]) {
                v.iter_mut().for_each(|v| *v = *v * by.into());
            }
        };
        match self {
            Open::Permutation(index) => {
                let from = v.to_vec();
                for (i, &at) in index.iter().enumerate() {
                    let (to, i) = if transposed { (at, i) } else { (i, at) };
                    v[row(to)].copy_from_slice(&from[row(i)]);
                }
            }
            Open::Diagonal(d) => scale(v, d),
            Open::Hadamard { h, m, core, signs } => {
                if !transposed {
                    scale(v, signs);
                }
                v.chunks_exact_mut((h * m * width).max(1)).for_each(|v| rotate(v, (*h, *m), core, width, transposed));
                if transposed {
                    scale(v, signs);
                }
            }
            Open::Dense { size, m } => {
                v.chunks_exact_mut((size * width).max(1)).for_each(|v| mix(v, *size, width, m, transposed));
            }
        }
    }
}

/// Every of the `n` rows of `v`, `[n, width]`, becomes the sum over `j`, rising, of `m[i, j]`, or `m[j, i]`, times row
/// `j`.
fn mix<T: Number>(v: &mut [T], n: usize, width: usize, m: &[f32], transposed: bool) {
    let from = v.to_vec();
    for (i, v) in v.chunks_exact_mut(width).enumerate() {
        v.fill(0.0.into());
        for (j, from) in from.chunks_exact(width).enumerate() {
            let a: T = if transposed { m[j * n + i] } else { m[i * n + j] }.into();
            v.iter_mut().zip(from).for_each(|(v, &x)| *v = *v + a * x);
        }
    }
}

/// One run of a Hadamard map without its signs.
fn rotate<T: Number>(v: &mut [T], (h, m): (usize, usize), core: &[f32], width: usize, transposed: bool) {
    let mut half = 1;
    while half < m {
        for pair in v.chunks_exact_mut(2 * half * width) {
            let (a, b) = pair.split_at_mut(half * width);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    if h > 1 {
        mix(v, h, m * width, core, transposed);
    }
    let by: T = (1.0 / ((h * m) as f32).sqrt()).into();
    v.iter_mut().for_each(|v| *v = *v * by);
}

/// The maps of a matrix's input with their numbers read: `M = In_k · .. · In_1`.
pub struct Axes(Vec<Open>);

impl Axes {
    /// Of `maps` of `n` values. Errors name the map.
    pub fn of(maps: &[Map], n: usize) -> Result<Axes, FormatError> {
        for (i, map) in maps.iter().enumerate() {
            map.check(n).map_err(|e| FormatError { what: format!("map {i}: {e}") })?;
        }
        Ok(Axes(maps.iter().map(|m| m.open(n)).collect()))
    }

    /// `x <- M x`.
    pub fn inputs<T: Number>(&self, x: &mut [T]) {
        self.0.iter().for_each(|map| map.apply(0, x, 1, false));
    }

    /// `w <- w M`: a row that meets `M x`, as one that meets `x`.
    pub fn back(&self, w: &mut [f32]) {
        self.0.iter().rev().for_each(|map| map.apply(0, w, 1, true));
    }

    /// `w <- w M⁻¹`: a row that meets `x`, as one that meets `M x`. Refused for dense maps, whose inverse is not
    /// known, and for a diagonal with a 0.
    pub fn weights(&self, w: &mut [f32]) -> Result<(), FormatError> {
        for (i, map) in self.0.iter().enumerate() {
            match map {
                // The inverse of an orthogonal map is its transpose.
                Open::Permutation(_) | Open::Hadamard { .. } => map.apply(0, w, 1, false),
                Open::Diagonal(d) => {
                    if let Some(at) = d.iter().position(|d| *d == 0.0) {
                        return Err(FormatError::new(format!("map {i}: the factor of value {at} is 0")));
                    }
                    w.iter_mut().zip(d).for_each(|(w, d)| *w /= d);
                }
                Open::Dense { .. } => {
                    return Err(FormatError::new(format!("map {i}: the inverse of a dense map is not known here")));
                }
            }
        }
        Ok(())
    }
}

/// The values that values `from..to` behind each of these maps come of, whole runs of it, and in the end `from..to`
/// themselves.
fn reaches(maps: &[Map], from: usize, to: usize, n: usize) -> Vec<(usize, usize)> {
    let mut out = vec![(from, to)];
    for map in maps.iter().rev() {
        let (from, to) = out[out.len() - 1];
        out.push(match map.run() {
            Some(run) => (from / run * run, to.next_multiple_of(run)),
            None => (0, n),
        });
    }
    out.reverse();
    out
}

impl Stored {
    /// The same matrix between maps: `input` before it and `output` behind it, each in the order in which they are
    /// applied.
    pub fn with_maps(self, input: Vec<Map>, output: Vec<Map>) -> Stored {
        Stored { input, output, ..self }
    }

    /// Whether there are maps at its ends.
    pub fn has_maps(&self) -> bool {
        !self.input.is_empty() || !self.output.is_empty()
    }

    /// The piece that this matrix is, where it is nothing but one: no other terms, no maps.
    pub fn single(&self) -> Option<&Piece> {
        match &self.terms[..] {
            [Term::Piece(p)] if !self.has_maps() => Some(p),
            _ => None,
        }
    }

    /// Rows `from..to` of a matrix with maps.
    pub(crate) fn mapped_rows(&self, from: usize, to: usize, mut out: MatMut<'_>) {
        let (rows, cols) = (self.rows, self.cols);
        let [input, output] = [(&self.input, cols), (&self.output, rows)]
            .map(|(maps, n)| maps.iter().map(|m| m.open(n)).collect::<Vec<Open>>());
        // Rows of the sum of terms times the maps of the input: a row times a map is the map's transpose times the row.
        let inner = |from: usize, to: usize, mut out: MatMut<'_>| {
            self.sum_rows(from, to, out.reborrow());
            for r in 0..to - from {
                input.iter().rev().for_each(|map| map.apply(0, out.row_mut(r), 1, true));
            }
        };
        if self.output.iter().all(Map::moves_only) {
            for r in from..to {
                // Back through the maps to the row it comes of, then forward.
                let mut at = vec![r];
                for map in output.iter().rev() {
                    let i = at[at.len() - 1];
                    at.push(if let Open::Permutation(index) = map { index[i] } else { i });
                }
                let (last, row) = (at[at.len() - 1], out.row_mut(r - from));
                inner(last, last + 1, MatMut::new(1, cols, row));
                for (map, &i) in output.iter().zip(at.iter().rev().skip(1)) {
                    if let Open::Diagonal(..) = map {
                        map.apply(i, row, cols, false);
                    }
                }
            }
            return;
        }
        let ranges = reaches(&self.output, from, to, rows);
        let (mut first, mut end) = ranges[0];
        let mut m = vec![0.0; (end - first) * cols];
        inner(first, end, MatMut::new(end - first, cols, &mut m));
        for (map, &(next, last)) in output.iter().zip(&ranges[1..]) {
            map.apply(first, &mut m, cols, false);
            m.truncate((last - first) * cols);
            m.drain(..(next - first) * cols);
            (first, end) = (next, last);
        }
        debug_assert_eq!((first, end), (from, to));
        for (r, row) in m.chunks_exact(cols.max(1)).enumerate() {
            out.row_mut(r).copy_from_slice(row);
        }
    }
}

//! Decoding to f32: any row of any piece, any range of rows of a stored matrix.
//!
//! Panics only where data fail [`Stored::check`] or a shape given by the caller does not fit.

use std::sync::LazyLock;

use lacuna_base::float::{bf16_to_f32, f8_e4m3, f8_e5m2, f16_to_f32, f32_from_le};
use lacuna_base::{Mat, MatMut};

use crate::bits::{unpack_map, unpack_trits};
use crate::{Float, Group, Owner, Pattern, Piece, Scales, Signed, Stored, Term, Values, Zeros};

/// Room for one row at work, kept between rows.
#[derive(Default)]
struct Scratch {
    columns: Vec<u32>,
    values: Vec<f32>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    tables: Vec<f32>,
}

/// Scales, the group they count in, and zero points with the bits of a code.
type Scaling<'a> = (&'a Scales, &'a Group, Option<(&'a Zeros, u8)>);

impl Float {
    /// Little-endian bytes to f32; `out.len()` values are read.
    #[track_caller]
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Float::F32 => f32_from_le(bytes, out),
            Float::F16 => f16_to_f32(bytes, out),
            Float::Bf16 => bf16_to_f32(bytes, out),
            Float::F8E4m3 => eight(bytes, out, &E4M3),
            Float::F8E5m2 => eight(bytes, out, &E5M2),
        }
    }
}

static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|b| f8_e4m3(b as u8)));
static E5M2: LazyLock<[f32; 256]> = LazyLock::new(|| std::array::from_fn(|b| f8_e5m2(b as u8)));

#[track_caller]
fn eight(bytes: &[u8], out: &mut [f32], table: &[f32; 256]) {
    assert_eq!(bytes.len(), out.len(), "one byte a value");
    for (o, &b) in out.iter_mut().zip(bytes) {
        *o = table[usize::from(b)];
    }
}

impl Scales {
    /// The scales of row `r`, `[out.len()]` of them a row.
    pub fn row(&self, r: usize, out: &mut [f32]) {
        let groups = out.len();
        match self {
            Scales::Float(float, bytes) => {
                let size = groups * float.bytes();
                float.decode(&bytes[r * size..(r + 1) * size], out);
            }
            Scales::Int { bits, per, codes, super_scales, super_mins } => {
                unpack_map(codes, *bits, r * groups, out, f32::from);
                let supers = groups.div_ceil(*per);
                for (i, run) in out.chunks_mut(*per).enumerate() {
                    let (mut scale, mut min) = ([0.0], [0.0]);
                    let at = (r * supers + i) * 2;
                    f16_to_f32(&super_scales[at..at + 2], &mut scale);
                    if let Some(m) = super_mins {
                        f16_to_f32(&m[at..at + 2], &mut min);
                    }
                    run.iter_mut().for_each(|s| *s = scale[0] * *s + min[0]);
                }
            }
        }
    }
}

impl Zeros {
    /// The zero points, or the minima, of row `r`, `[out.len()]` of them a row, of codes of `bits` bits.
    pub fn row(&self, r: usize, bits: u8, out: &mut [f32]) {
        match self {
            Zeros::Codes(stream) => unpack_map(stream, bits, r * out.len(), out, f32::from),
            Zeros::Real(scales) | Zeros::Minima(scales) => scales.row(r, out),
        }
    }
}

impl Values {
    /// Stored values `start..start + out.len()`, those of row `r` at `columns` (`None`: at every column), before scales
    /// and zero points: a float itself, an integer code (less its offset where it is symmetric), a table's entry, -1, 0
    /// or 1.
    fn levels(
        &self,
        (r, cols): (usize, usize),
        columns: Option<&[u32]>,
        start: usize,
        out: &mut [f32],
        room: &mut Vec<f32>,
    ) {
        let end = start + out.len();
        match self {
            Values::Float(float, bytes) => float.decode(&bytes[start * float.bytes()..end * float.bytes()], out),
            Values::Int { bits, codes, zeros, .. } => {
                let offset = if zeros.is_some() { 0.0 } else { f32::from(1u8 << (bits - 1)) };
                unpack_map(codes, *bits, start, out, |c| f32::from(c) - offset);
            }
            Values::Codebook { bits, codes, tables, .. } => {
                tables.row(r, cols, *bits, room);
                let Owner::Group(n) = tables.owner else {
                    return unpack_map(codes, *bits, start, out, |c| room[usize::from(c)]);
                };
                unpack_map(codes, *bits, start, out, f32::from);
                for (i, v) in out.iter_mut().enumerate() {
                    let c = columns.map_or(i, |at| at[i] as usize);
                    *v = room[((c / n) << bits) + *v as usize];
                }
            }
            Values::Ternary { codes, .. } => unpack_trits(codes, start, out),
            Values::Gguf(kind, bytes) => {
                let (n, size) = (kind.block(), kind.block_bytes());
                kind.decode(&bytes[start / n * size..end / n * size], out);
            }
        }
    }

    fn scales(&self) -> Option<Scaling<'_>> {
        match self {
            Values::Int { scales, group, zeros, bits, .. } => Some((scales, group, zeros.as_ref().map(|z| (z, *bits)))),
            Values::Codebook { scales, .. } => scales.as_ref().map(|(s, g)| (s, g, None)),
            Values::Ternary { scales, group, .. } => Some((scales, group, None)),
            Values::Float(..) | Values::Gguf(..) => None,
        }
    }

    /// Applies row `r`'s zero points and scales to `levels`, the values at `columns` (`None`: at every column).
    fn scale(
        &self,
        r: usize,
        cols: usize,
        columns: Option<&[u32]>,
        levels: &mut [f32],
        room: (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        let Some((scales, group, zeros)) = self.scales() else { return };
        let (s, z) = room;
        let groups = group.count(cols);
        s.resize(groups, 0.0);
        scales.row(r, s);
        z.clear();
        z.resize(groups, 0.0);
        if let Some((zeros, bits)) = zeros {
            zeros.row(r, bits, z);
        }
        if let Some((Zeros::Minima(_), _)) = zeros {
            let at = |i: usize| group.of(columns.map_or(i, |c| c[i] as usize));
            levels.iter_mut().enumerate().for_each(|(i, v)| *v = *v * s[at(i)] - z[at(i)]);
            return;
        }
        match (columns, group) {
            (None, Group::Run(n)) => {
                for ((run, s), z) in levels.chunks_mut(*n).zip(s.iter()).zip(z.iter()) {
                    let (s, z) = (*s, *z);
                    run.iter_mut().for_each(|v| *v = (*v - z) * s);
                }
            }
            (None, Group::Index { of, .. }) => {
                for (v, g) in levels.iter_mut().zip(of.chunks_exact(2)) {
                    let g = usize::from(u16::from_le_bytes([g[0], g[1]]));
                    *v = (*v - z[g]) * s[g];
                }
            }
            (Some(columns), group) => {
                for (v, &c) in levels.iter_mut().zip(columns) {
                    let g = group.of(c as usize);
                    *v = (*v - z[g]) * s[g];
                }
            }
        }
    }
}

impl Piece {
    /// How many values are stored.
    pub fn stored_values(&self) -> usize {
        if self.rows == 0 { 0 } else { self.pattern.span(self.rows - 1, self.cols).end }
    }

    /// Row `r` into `out`, `[cols]`, overwritten: zeros where nothing is stored.
    #[track_caller]
    pub fn row(&self, r: usize, out: &mut [f32]) {
        self.row_with(r, out, &mut Scratch::default());
    }

    /// Calls `f(column, value)` for every stored value of row `r`, by rising column; nothing for the others.
    pub fn for_row(&self, r: usize, mut f: impl FnMut(usize, f32)) {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        let mut s = Scratch::default();
        self.pattern.columns(r, self.cols, &mut s.columns);
        self.sparse(r, &mut s);
        s.columns.iter().zip(&s.values).for_each(|(&c, &v)| f(c as usize, v));
    }

    /// The values of row `r` at `s.columns` into `s.values`.
    fn sparse(&self, r: usize, s: &mut Scratch) {
        s.values.resize(s.columns.len(), 0.0);
        let start = self.pattern.span(r, self.cols).start;
        self.values.levels((r, self.cols), Some(&s.columns), start, &mut s.values, &mut s.tables);
        self.values.scale(r, self.cols, Some(&s.columns), &mut s.values, (&mut s.scales, &mut s.zeros));
    }

    #[track_caller]
    fn row_with(&self, r: usize, out: &mut [f32], s: &mut Scratch) {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "room for {} of {} columns", out.len(), self.cols);
        if self.pattern == Pattern::Dense {
            self.values.levels((r, self.cols), None, r * self.cols, out, &mut s.tables);
            self.values.scale(r, self.cols, None, out, (&mut s.scales, &mut s.zeros));
            return;
        }
        self.pattern.columns(r, self.cols, &mut s.columns);
        self.sparse(r, s);
        out.fill(0.0);
        for (&c, &v) in s.columns.iter().zip(&s.values) {
            out[c as usize] = v;
        }
    }

    /// The whole piece as a dense matrix.
    pub fn to_mat(&self) -> Mat {
        let (mut m, mut s) = (Mat::zeros(self.rows, self.cols), Scratch::default());
        for r in 0..self.rows {
            self.row_with(r, m.row_mut(r), &mut s);
        }
        m
    }
}

impl Stored {
    /// Rows `from..to` of what is multiplied by, maps included, into `out`, `[to - from, cols]`, overwritten. Terms are
    /// added in their order; a product's row is the sum over its rank, rising, in f32: the same bits for a row whatever
    /// the range. Maps of the output that mix rows make all rows of their runs for any of them.
    #[track_caller]
    pub fn decode_rows(&self, from: usize, to: usize, out: MatMut<'_>) {
        assert!(from <= to && to <= self.rows, "rows {from}..{to} of {}", self.rows);
        assert_eq!((out.rows(), out.cols()), (to - from, self.cols), "room of another shape");
        if self.has_maps() { self.mapped_rows(from, to, out) } else { self.sum_rows(from, to, out) }
    }

    /// Rows `from..to` of the sum of terms.
    pub(crate) fn sum_rows(&self, from: usize, to: usize, mut out: MatMut<'_>) {
        let mut s = Scratch::default();
        let mut row = vec![0.0; if self.terms.len() > 1 { self.cols } else { 0 }];
        if self.terms.is_empty() {
            (0..to - from).for_each(|r| out.row_mut(r).fill(0.0));
        }
        for (i, term) in self.terms.iter().enumerate() {
            match term {
                Term::Piece(p) => {
                    for r in from..to {
                        write(i, out.row_mut(r - from), &mut row, |o| p.row_with(r, o, &mut s));
                    }
                }
                Term::Product(left, right) | Term::Signed(Signed { left, right, .. }) => {
                    let right = right.to_mat();
                    let mut factors = vec![0.0; left.cols];
                    for r in from..to {
                        left.row_with(r, &mut factors, &mut s);
                        write(i, out.row_mut(r - from), &mut row, |o| {
                            combine(&factors, &right, o);
                            if let Term::Signed(signs) = term {
                                signs.turn(r, o);
                            }
                        });
                    }
                }
            }
        }
    }

    /// The whole matrix, dense.
    pub fn to_mat(&self) -> Mat {
        let mut m = Mat::zeros(self.rows, self.cols);
        self.decode_rows(0, self.rows, m.view_mut());
        m
    }
}

/// The first term overwrites `out`, the others are made in `room` and added.
fn write(term: usize, out: &mut [f32], room: &mut [f32], make: impl FnOnce(&mut [f32])) {
    if term == 0 {
        return make(out);
    }
    make(room);
    for (o, x) in out.iter_mut().zip(room) {
        *o += *x;
    }
}

fn combine(factors: &[f32], right: &Mat, out: &mut [f32]) {
    out.fill(0.0);
    for (k, &a) in factors.iter().enumerate() {
        for (o, &x) in out.iter_mut().zip(right.row(k)) {
            *o += a * x;
        }
    }
}

//! A matrix by columns, beside its panels: what a product reads where most channels of a row of x are left out.
//!
//! A column's values lie together, in units of 32 outputs, and every column begins at a cache line: one that is left out
//! is not touched. Values are what panels hold, to the bit: floats as they are stored, codes of up to 4 bits in nibbles
//! (the outputs of a unit from the 16th on in the upper ones), others in bytes. What a group of columns shares, scales
//! and then zeros or minima, lies apart, group by group.
//!
//! Single columns are read, however short: which come next is known long before, so that they are prefetched, and a strip
//! reads what nobody needs. Whether strips would be faster still is open: `examples/columns.rs` has them beside these.

use std::sync::Arc;

use half::f16;
use lacuna_format::{Float, Pattern, Piece, Values};

use super::ints::Kind;
use super::source::{self, Line, Source};
use crate::memory::Memory;
use crate::parallel;
use crate::simd::Simd;

use super::float::Width;

/// Outputs of a unit.
pub(crate) const UNIT: usize = 32;

/// How values are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    F32,
    F16,
    Bf16,
    Bytes,
    Nibbles,
}

impl Written {
    /// Bytes of a unit.
    fn unit_bytes(self) -> usize {
        match self {
            Written::F32 => 4 * UNIT,
            Written::F16 | Written::Bf16 => 2 * UNIT,
            Written::Bytes => UNIT,
            Written::Nibbles => UNIT / 2,
        }
    }
}

/// What groups have beside scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Second {
    /// Nothing.
    None,
    /// Zeros, a byte each.
    Zeros,
    /// Minima, f16 each: `scale * code + minimum`.
    Minima,
}

impl Second {
    fn bytes(self) -> usize {
        match self {
            Second::None => 0,
            Second::Zeros => 1,
            Second::Minima => 2,
        }
    }
}

/// A matrix by columns.
#[derive(Clone)]
pub(crate) struct Columns {
    memory: Arc<Memory>,
    pub(crate) written: Written,
    /// Outputs.
    pub(crate) rows: usize,
    /// Bytes from one column to the next.
    stride: usize,
    /// Of codes.
    pub(crate) groups: Option<Groups>,
}

/// What the columns of a group share.
#[derive(Clone)]
pub(crate) struct Groups {
    memory: Arc<Memory>,
    /// Columns of a group.
    pub(crate) run: usize,
    /// Whether scales are f16, else f32.
    half: bool,
    /// The zero of all groups, where they have none of their own.
    pub(crate) zero: u8,
    pub(crate) second: Second,
    stride: usize,
}

impl Columns {
    /// Those of a checked piece, where it can be kept so: dense floats, and dense codes that are whole numbers times a
    /// scale.
    pub(crate) fn of(piece: &Piece) -> Option<Columns> {
        if piece.pattern != Pattern::Dense || piece.rows == 0 || piece.cols == 0 {
            return None;
        }
        let written = match &piece.values {
            Values::Float(Float::F32, _) => Written::F32,
            Values::Float(Float::F16, _) => Written::F16,
            Values::Float(Float::Bf16, _) => Written::Bf16,
            _ => return codes(piece.rows, piece.cols, &source::of(piece)?),
        };
        let Values::Float(float, bytes) = &piece.values else { return None };
        let width = float.bytes();
        let (memory, stride) = filled(piece.rows, piece.cols, written, |first, n, put| {
            for c in 0..piece.cols {
                put(c, &mut |unit| {
                    for i in 0..n {
                        let from = ((first + i) * piece.cols + c) * width;
                        unit[i * width..][..width].copy_from_slice(&bytes[from..][..width]);
                    }
                });
            }
        });
        Some(Columns { memory, written, rows: piece.rows, stride, groups: None })
    }

    /// Units of outputs.
    pub(crate) fn units(&self) -> usize {
        self.rows.div_ceil(UNIT)
    }

    /// Bytes that the product of one row reads of these channels, rising.
    pub(crate) fn bytes(&self, kept: &[u32]) -> u64 {
        let shared = self.groups.as_ref().map_or(0, |g| {
            let (mut last, mut n) = (usize::MAX, 0);
            for &c in kept {
                let group = c as usize / g.run;
                n += usize::from(group != last);
                last = group;
            }
            n * g.stride
        });
        (kept.len() * self.stride + shared) as u64
    }

    /// Bytes held.
    pub(crate) fn held(&self) -> u64 {
        (self.memory.len() + self.groups.as_ref().map_or(0, |g| g.memory.len())) as u64
    }

    /// Where column `c` begins.
    #[inline(always)]
    pub(crate) fn at(&self, c: usize) -> *const u8 {
        debug_assert!((c + 1) * self.stride <= self.memory.len());
        // SAFETY: inside the memory, as is every column.
        unsafe { self.memory.ptr().add(c * self.stride) }
    }
}

impl Groups {
    /// Scales of vector `v` of unit `u` in group `g`.
    /// # Safety
    /// The group has this unit.
    #[inline(always)]
    pub(crate) unsafe fn scale<S: Simd>(&self, s: S, g: usize, u: usize, v: usize) -> S::V {
        let at = u * UNIT + v * S::LANES;
        // SAFETY: as the caller promises.
        unsafe {
            let group = self.memory.ptr().add(g * self.stride);
            if self.half { s.load_f16(group.add(2 * at)) } else { s.load(group.add(4 * at).cast()) }
        }
    }

    /// Its zeros or minima; the zero of all groups where they have none.
    /// # Safety
    /// As for `scale`; `units` are all there are.
    #[inline(always)]
    pub(crate) unsafe fn second<S: Simd>(&self, s: S, g: usize, u: usize, v: usize, units: usize) -> S::V {
        let (behind, at) = (units * UNIT * if self.half { 2 } else { 4 }, u * UNIT + v * S::LANES);
        // SAFETY: as the caller promises.
        unsafe {
            let group = self.memory.ptr().add(g * self.stride + behind);
            match self.second {
                Second::None => s.splat(f32::from(self.zero)),
                Second::Zeros => s.float(s.widen(group.add(at))),
                Second::Minima => s.load_f16(group.add(2 * at)),
            }
        }
    }
}

/// Codes by columns, for kinds whose values are `scale * (code - zero)` or `scale * code + minimum`.
fn codes(rows: usize, cols: usize, source: &Source<'_>) -> Option<Columns> {
    let (half, second) = match source.kind {
        Kind::F16 => (true, Second::None),
        Kind::F32 => (false, Second::None),
        Kind::F16Zeros => (true, Second::Zeros),
        Kind::F32Zeros => (false, Second::Zeros),
        Kind::F16Min => (true, Second::Minima),
        Kind::F32Off | Kind::F32Min | Kind::F32Two | Kind::Super | Kind::Sixteens | Kind::Own => return None,
    };
    if source.table.is_some() {
        return None;
    }
    let written = if source.bits <= 4 { Written::Nibbles } else { Written::Bytes };
    let (units, groups, width) = (rows.div_ceil(UNIT), cols.div_ceil(source.run), if half { 2 } else { 4 });
    let shared_stride = (units * UNIT * (width + second.bytes())).next_multiple_of(64);
    let mut shared = Memory::zeroed(groups * shared_stride);
    let base = Base(shared.bytes_mut().as_mut_ptr());
    let (memory, stride) = filled(rows, cols, written, |first, n, put| {
        let lines: Vec<Line> = (first..first + n)
            .map(|r| {
                let mut line = Line::default();
                (source.read)(r, &mut line);
                line
            })
            .collect();
        for c in 0..cols {
            put(c, &mut |unit| {
                for (i, line) in lines.iter().enumerate() {
                    match written {
                        Written::Nibbles => unit[i % 16] |= line.codes[c] << (4 * (i / 16)),
                        _ => unit[i] = line.codes[c],
                    }
                }
            });
        }
        let base = &base;
        for (i, line) in lines.iter().enumerate() {
            for g in 0..groups {
                // SAFETY: the group's entry of this output, which nobody else has.
                let entry = |at: usize, len: usize| unsafe {
                    std::slice::from_raw_parts_mut(base.0.add(g * shared_stride + at), len)
                };
                let scale = entry((first + i) * width, width);
                if half {
                    scale.copy_from_slice(&f16::from_f32(line.scales[g]).to_le_bytes());
                } else {
                    scale.copy_from_slice(&line.scales[g].to_le_bytes());
                }
                let entry = entry(units * UNIT * width + (first + i) * second.bytes(), second.bytes());
                match second {
                    Second::None => {}
                    Second::Zeros => entry[0] = line.seconds[g] as u8,
                    Second::Minima => entry.copy_from_slice(&f16::from_f32(line.seconds[g]).to_le_bytes()),
                }
            }
        }
    });
    let zero = source.zero;
    let groups = Groups { memory: Arc::new(shared), run: source.run, half, zero, second, stride: shared_stride };
    Some(Columns { memory, written, rows, stride, groups: Some(groups) })
}

/// Hands out a column's bytes of one unit.
type Put<'a> = &'a dyn Fn(usize, &mut dyn FnMut(&mut [u8]));

/// Memory for columns, and bytes from one to the next: `fill(first row, rows, put)` is called for every unit, on
/// whatever thread.
fn filled(
    rows: usize,
    cols: usize,
    written: Written,
    fill: impl Fn(usize, usize, Put<'_>) + Sync,
) -> (Arc<Memory>, usize) {
    let (units, bytes) = (rows.div_ceil(UNIT), written.unit_bytes());
    let stride = (units * bytes).next_multiple_of(64);
    let mut memory = Memory::zeroed(cols * stride);
    let base = Base(memory.bytes_mut().as_mut_ptr());
    parallel::ranges(units, 1, usize::MAX, UNIT * cols * 4, |from, to| {
        let base = &base;
        for u in from..to {
            let put = |c: usize, write: &mut dyn FnMut(&mut [u8])| {
                assert!(c < cols, "a column of the matrix");
                // SAFETY: this unit of the column, which nobody else has; units do not overlap.
                write(unsafe { std::slice::from_raw_parts_mut(base.0.add(c * stride + u * bytes), bytes) });
            };
            fill(u * UNIT, UNIT.min(rows - u * UNIT), &put);
        }
    });
    (Arc::new(memory), stride)
}

struct Base(*mut u8);
// SAFETY: used for parts that do not overlap.
unsafe impl Sync for Base {}
// SAFETY: see above.
unsafe impl Send for Base {}

/// How the values of a unit become vectors.
pub(crate) trait Unit: Send + Sync {
    /// Bytes of one.
    const BYTES: usize;
    /// Its 32 values, as many vectors as that takes.
    /// # Safety
    /// `p` leads to a unit.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::V; 4];
}

/// Floats.
pub(crate) struct FloatUnit<W>(W);

impl<W: Width> Unit for FloatUnit<W> {
    const BYTES: usize = UNIT * W::BYTES;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        let mut out = [s.splat(0.0); 4];
        let mut v = 0;
        while v < UNIT / S::LANES {
            // SAFETY: as the caller promises.
            out[v] = unsafe { W::lanes(s, p.add(v * S::LANES * W::BYTES)) };
            v += 1;
        }
        out
    }
}

/// Codes in bytes.
pub(crate) struct ByteUnit;

impl Unit for ByteUnit {
    const BYTES: usize = UNIT;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        let mut out = [s.splat(0.0); 4];
        let mut v = 0;
        while v < UNIT / S::LANES {
            // SAFETY: as the caller promises.
            out[v] = unsafe { s.float(s.widen(p.add(v * S::LANES))) };
            v += 1;
        }
        out
    }
}

/// Codes in nibbles.
pub(crate) struct NibbleUnit;

impl Unit for NibbleUnit {
    const BYTES: usize = UNIT / 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        let mut out = [s.splat(0.0); 4];
        let half = UNIT / S::LANES / 2;
        let mut v = 0;
        while v < half {
            // SAFETY: as the caller promises.
            let both = unsafe { s.widen(p.add(v * S::LANES)) };
            out[v] = s.float(s.and_i(both, 15));
            out[half + v] = s.float(s.and_i(s.shr_i(both, 4), 15));
            v += 1;
        }
        out
    }
}

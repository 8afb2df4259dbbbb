//! The forms a piece is packed into, and their products.

use std::sync::Arc;

use lacuna_base::{MatMut, MatRef};
use lacuna_format::{Float, GgufType, Pattern, Piece, Stored, Values};

use super::prepare::{padded, quantized, tiled};
use super::{Activations, Packing};
use crate::op::dot::{Dots, Rows};
use crate::op::gather::{self, Gathered, GatheredBytes};
use crate::op::matmul::{self, Batch, Gemv, Out};
use crate::panel::float::{Bf16, Dense, F16, F32, Masked};
use crate::panel::gathered::Layout;
use crate::panel::halved::Halved;
use crate::panel::ints::{Bytes, Grid, Ints};
use crate::panel::{BLOCK, Codec, Panels, ROWS, View, float, gathered, halved, ints, source};
use crate::simd::dispatch;
use crate::{Isa, parallel, scratch};

/// A piece ready to multiply.
#[derive(Clone)]
pub(super) struct Form {
    name: &'static str,
    body: Body,
}

#[derive(Clone)]
enum Body {
    F32(Panels, Dense<F32>),
    F16(Panels, Dense<F16>),
    Bf16(Panels, Dense<Bf16>),
    Masked32(Panels, Masked<F32>),
    Masked16(Panels, Masked<F16>),
    Int2(Panels, Ints<2>),
    Int3(Panels, Ints<3>),
    Int4(Panels, Ints<4>),
    Int5(Panels, Ints<5>),
    Int6(Panels, Ints<6>),
    Int7(Panels, Ints<7>),
    Int8(Panels, Ints<8>),
    Halved(Panels, Halved),
    Shared32(Panels, Dense<F32>, Layout),
    Shared16(Panels, Dense<F16>, Layout),
    SharedInt4(Panels, Ints<4>, Layout),
    SharedInt8(Panels, Ints<8>, Layout),
    /// Decoded by `lacuna-format` a panel at a time.
    Decoded(Arc<Stored>, u64),
}

/// Dense codecs that have panels of their own.
pub(crate) const FLOAT_PATH: [&str; 20] = [
    "f32",
    "f16",
    "bf16",
    "f8",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "int8",
    "ternary",
    "codebook",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q4_k, q5_k",
    "iq4_nl",
];

/// Those that multiply as bytes where activations are quantized.
pub(crate) const INTEGER_PATH: [&str; 14] = [
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "int8",
    "ternary",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q4_k, q5_k",
];

/// The same with what they do, for reports.
const AS_BYTES: [&str; 14] = [
    "int2 bytes",
    "int3 bytes",
    "int4 bytes",
    "int5 bytes",
    "int6 bytes",
    "int7 bytes",
    "int8 bytes",
    "ternary bytes",
    "q4_0 bytes",
    "q4_1 bytes",
    "q5_0 bytes",
    "q5_1 bytes",
    "q8_0 bytes",
    "q4_k, q5_k bytes",
];

fn name(values: &Values) -> &'static str {
    match values {
        Values::Float(Float::F32, _) => "f32",
        Values::Float(Float::F16, _) => "f16",
        Values::Float(Float::Bf16, _) => "bf16",
        Values::Float(..) => "f8",
        Values::Int { bits, .. } => {
            ["int2", "int3", "int4", "int5", "int6", "int7", "int8"][usize::from(*bits).clamp(2, 8) - 2]
        }
        Values::Codebook { .. } => "codebook",
        Values::Ternary { .. } => "ternary",
        Values::Gguf(kind, _) => match kind {
            GgufType::Q4_0 => "q4_0",
            GgufType::Q4_1 => "q4_1",
            GgufType::Q5_0 => "q5_0",
            GgufType::Q5_1 => "q5_1",
            GgufType::Q8_0 => "q8_0",
            GgufType::Q4_K | GgufType::Q5_K => "q4_k, q5_k",
            _ => "iq4_nl",
        },
    }
}

/// Runs an expression for whichever body has panels.
macro_rules! with_panels {
    ($body:expr, $panels:ident, $codec:ident => $float:expr, $int:expr,
     $layout:ident => $shared:expr, $shared_int:expr, $stored:ident => $decoded:expr) => {
        match $body {
            Body::F32($panels, $codec) => $float,
            Body::F16($panels, $codec) => $float,
            Body::Bf16($panels, $codec) => $float,
            Body::Masked32($panels, $codec) => $float,
            Body::Masked16($panels, $codec) => $float,
            Body::Int2($panels, $codec) => $int,
            Body::Int3($panels, $codec) => $int,
            Body::Int4($panels, $codec) => $int,
            Body::Int5($panels, $codec) => $int,
            Body::Int6($panels, $codec) => $int,
            Body::Int7($panels, $codec) => $int,
            Body::Int8($panels, $codec) => $int,
            Body::Halved($panels, $codec) => $int,
            Body::Shared32($panels, $codec, $layout) => $shared,
            Body::Shared16($panels, $codec, $layout) => $shared,
            Body::SharedInt4($panels, $codec, $layout) => $shared_int,
            Body::SharedInt8($panels, $codec, $layout) => $shared_int,
            Body::Decoded($stored, _) => $decoded,
        }
    };
}

/// The names of panels whose rows share columns.
const SHARED: [&str; 2] = ["gathered", "gathered bytes"];

impl Body {
    fn gathered(&self) -> bool {
        matches!(self, Body::Shared32(..) | Body::Shared16(..) | Body::SharedInt4(..) | Body::SharedInt8(..))
    }
}

impl Form {
    /// The form of a piece that has passed its check. `read`: see [`Panels::build`].
    pub(super) fn of(piece: &Piece, read: &dyn Fn()) -> Form {
        let (rows, cols) = (piece.rows, piece.cols);
        let body = match (&piece.pattern, &piece.values) {
            (Pattern::Dense, Values::Float(Float::F32, b)) => {
                Some(Body::F32(float::dense(rows, cols, b, 4, read), Dense(F32)))
            }
            (Pattern::Dense, Values::Float(Float::F16, b)) => {
                Some(Body::F16(float::dense(rows, cols, b, 2, read), Dense(F16)))
            }
            (Pattern::Dense, Values::Float(Float::Bf16, b)) => {
                Some(Body::Bf16(float::dense(rows, cols, b, 2, read), Dense(Bf16)))
            }
            (Pattern::Dense, _) => source::of(piece).map(|source| {
                let bits = source.bits;
                let (panels, grid) = ints::dense(rows, cols, &source, read);
                match bits {
                    2 => Body::Int2(panels, Ints(grid)),
                    3 => Body::Int3(panels, Ints(grid)),
                    4 => Body::Int4(panels, Ints(grid)),
                    5 => Body::Int5(panels, Ints(grid)),
                    6 => Body::Int6(panels, Ints(grid)),
                    7 => Body::Int7(panels, Ints(grid)),
                    _ => Body::Int8(panels, Ints(grid)),
                }
            }),
            (pattern, Values::Float(..)) if gathered::fits(pattern) => {
                let (panels, layout, half) = gathered::floats(piece, read);
                Some(if half {
                    Body::Shared16(panels, Dense(F16), layout)
                } else {
                    Body::Shared32(panels, Dense(F32), layout)
                })
            }
            (pattern, _) if gathered::fits(pattern) => source::of(piece).filter(|s| s.table.is_none()).map(|source| {
                if source.bits <= 4 {
                    let (panels, grid, layout) = gathered::ints(piece, &source, 4, read);
                    Body::SharedInt4(panels, Ints(grid), layout)
                } else {
                    let (panels, grid, layout) = gathered::ints(piece, &source, 8, read);
                    Body::SharedInt8(panels, Ints(grid), layout)
                }
            }),
            (Pattern::Nm { .. }, Values::Int { .. }) => {
                source::of(piece).filter(|source| halved::fits(piece, source)).map(|source| {
                    let (panels, grid) = halved::halved(piece, &source, read);
                    Body::Halved(panels, Halved(grid))
                })
            }
            (Pattern::Mask { .. } | Pattern::Nm { .. }, Values::Float(..)) => {
                let (panels, half) = float::masked(piece, read);
                let blocks = panels.blocks;
                Some(if half {
                    Body::Masked16(panels, Masked { _width: F16, blocks })
                } else {
                    Body::Masked32(panels, Masked { _width: F32, blocks })
                })
            }
            _ => None,
        };
        let (name, body) = match body {
            Some(body) => (if body.gathered() { SHARED[0] } else { name(&piece.values) }, body),
            None => ("decoded", Body::Decoded(Arc::new(Stored::from_piece(piece.clone())), piece.bytes())),
        };
        Form { name, body }
    }

    /// The name of its codec, and how it multiplies where that is not from its own panels in f32.
    pub(super) fn name(&self, activations: Activations) -> &'static str {
        if activations == Activations::Exact || !self.integer() {
            return self.name;
        }
        if self.body.gathered() {
            return SHARED[1];
        }
        let i = INTEGER_PATH.iter().position(|n| *n == self.name);
        i.map_or("bytes", |i| AS_BYTES[i])
    }

    /// Whether it multiplies as bytes where activations are quantized.
    pub(super) fn integer(&self) -> bool {
        with_panels!(&self.body, _panels, codec => { let _ = codec; false }, codec.grid().table.is_none(),
            _layout => { let _ = codec; false }, codec.grid().table.is_none(), _stored => false)
    }

    pub(super) fn bytes(&self) -> u64 {
        if let Body::Decoded(_, bytes) = &self.body {
            return *bytes;
        }
        with_panels!(&self.body, panels, _codec => panels.bytes(), panels.bytes(),
            layout => { let _ = panels; layout.bytes }, { let _ = panels; layout.bytes }, _stored => 0)
    }

    /// `out (+)= x · Wᵀ`. Shapes fit.
    pub(super) fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        with_panels!(
            &self.body, panels, codec =>
            exact(packing, panels.view(), codec, x, out),
            if packing.activations == Activations::Int8 && codec.grid().table.is_none() {
                bytes(packing, panels.view(), codec, x, out);
            } else {
                exact(packing, panels.view(), codec, x, out);
            },
            layout =>
            shared(packing, panels.view(), codec, layout, x, out),
            if packing.activations == Activations::Int8 {
                shared_bytes(packing, panels.view(), codec, layout, x, out);
            } else {
                shared(packing, panels.view(), codec, layout, x, out);
            },
            stored => decoded(packing, stored, x, out)
        );
    }
}

/// What several forms must agree on to share rows made ready once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Rows as bytes, for matrices with this zero and so many blocks.
    Bytes { zero: u8, blocks: usize },
    /// One row as it is.
    Row { blocks: usize },
}

/// Rows made ready by a [`Plan`].
#[derive(Clone, Copy)]
enum Given {
    Bytes(Rows),
    Row(*const f32),
}

// SAFETY: only read.
unsafe impl Sync for Given {}

impl Form {
    /// How it could share `rows` rows with others, if at all.
    pub(super) fn plan(&self, packing: &Packing, rows: usize) -> Option<Plan> {
        let row = |panels: &Panels| (rows == 1).then_some(Plan::Row { blocks: panels.blocks });
        let int = |panels: &Panels, grid: &Grid| match packing.activations {
            Activations::Int8 if grid.table.is_none() => Some(Plan::Bytes { zero: grid.zero, blocks: panels.blocks }),
            _ => row(panels),
        };
        with_panels!(
            &self.body, panels, codec =>
            { let _ = codec; row(panels) }, int(panels, codec.grid()),
            _layout => { let _ = codec; row(panels) }, int(panels, codec.grid()),
            _stored => None
        )
    }

    /// Panels of the matrix; none where it has none of its own.
    fn count(&self) -> usize {
        with_panels!(&self.body, panels, _codec => panels.view().count(), panels.view().count(),
            _layout => panels.view().count(), panels.view().count(), _stored => 0)
    }

    /// Panels `from..to` times rows that a plan of this form made ready.
    fn some(&self, isa: Isa, (from, to): (usize, usize), given: Given, out: Out) {
        with_panels!(
            &self.body, panels, codec =>
            if let Given::Row(x) = given {
                dispatch(isa, Gemv { panels: panels.view(), codec, from, to, x, out });
            },
            match given {
                Given::Bytes(x) => dispatch(isa, Dots { panels: panels.view(), codec, from, to, x, out }),
                Given::Row(x) => dispatch(isa, Gemv { panels: panels.view(), codec, from, to, x, out }),
            },
            layout =>
            if let Given::Row(x) = given {
                gather_floats(isa, panels.view(), codec, layout, (from, to), (x, 1), out);
            },
            match given {
                Given::Bytes(x) => gather_bytes(isa, panels.view(), codec, layout, (from, to), x, out),
                Given::Row(x) => gather_floats(isa, panels.view(), codec, layout, (from, to), (x, 1), out),
            },
            _stored => {}
        );
    }
}

/// Several forms of one plan times the same rows.
pub(super) fn together<const N: usize>(packing: &Packing, plan: Plan, parts: [(&Form, Out); N], x: MatRef<'_>) {
    let counts = parts.map(|(form, _)| form.count());
    let share = |blocks: usize, given: Given| {
        let (unit, cost) = match given {
            Given::Bytes(_) => (1, ROWS * blocks * BLOCK * x.rows() / 2),
            Given::Row(_) => (8, ROWS * blocks * BLOCK),
        };
        parallel::ranges(counts.iter().sum(), unit, usize::MAX, cost, |from, to| {
            let mut first = 0;
            for ((form, out), count) in parts.iter().zip(counts) {
                let (from, to) = (from.clamp(first, first + count) - first, to.clamp(first, first + count) - first);
                if from < to {
                    form.some(packing.isa, (from, to), given, *out);
                }
                first += count;
            }
        });
    };
    match plan {
        Plan::Bytes { zero, blocks } => {
            quantized(packing.isa, x, blocks, zero, |rows| share(blocks, Given::Bytes(rows)));
        }
        Plan::Row { blocks } => padded(x.row(0), blocks, |row| share(blocks, Given::Row(row))),
    }
}

/// Panels a task should be a multiple of, so that several run side by side in it.
fn unit(count: usize) -> usize {
    match count {
        0..8 => 1,
        8..32 => 4,
        _ => 8,
    }
}

fn exact<C: Codec>(packing: &Packing, view: View, codec: &C, x: MatRef<'_>, out: Out) {
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
        parallel::ranges(view.count(), 2, usize::MAX, ROWS * cols * (rows + 4), |from, to| {
            scratch::with(matmul::scratch(rows), |scratch| {
                Batch { panels: view, codec, from, to, x: x.get(), rows, out, scratch }.run(isa);
            });
        });
    });
}

fn bytes<C: Bytes>(packing: &Packing, view: View, codec: &C, x: MatRef<'_>, out: Out) {
    quantized(packing.isa, x, view.blocks, codec.grid().zero, |rows| {
        let cost = ROWS * view.blocks * BLOCK * x.rows() / 2;
        parallel::ranges(view.count(), 1, usize::MAX, cost, |from, to| {
            dispatch(packing.isa, Dots { panels: view, codec, from, to, x: rows, out });
        });
    });
}

/// Rows of x in their own memory, padded to whole blocks.
fn rows_padded(x: MatRef<'_>, blocks: usize, f: impl FnOnce(Shared)) {
    if x.rows() == 1 {
        return padded(x.row(0), blocks, |x| f(Shared(x)));
    }
    let cols = blocks * BLOCK;
    scratch::with(x.rows() * cols, |room| {
        for (r, row) in room.chunks_exact_mut(cols.max(1)).take(x.rows()).enumerate() {
            row[..x.cols()].copy_from_slice(x.row(r));
            row[x.cols()..].fill(0.0);
        }
        f(Shared(room.as_ptr()));
    });
}

fn shared<C: Codec>(packing: &Packing, view: View, codec: &C, layout: &Layout, x: MatRef<'_>, out: Out) {
    let (isa, rows) = (packing.isa, x.rows());
    rows_padded(x, view.blocks, |x| {
        parallel::ranges(view.count(), layout.share, usize::MAX, ROWS * layout.octets * 8 * rows, |from, to| {
            gather_floats(isa, view, codec, layout, (from, to), (x.get(), rows), out);
        });
    });
}

fn shared_bytes<C: Bytes>(packing: &Packing, view: View, codec: &C, layout: &Layout, x: MatRef<'_>, out: Out) {
    let isa = packing.isa;
    quantized(isa, x, view.blocks, codec.grid().zero, |x| {
        parallel::ranges(view.count(), layout.share, usize::MAX, ROWS * layout.octets * 8 * x.rows, |from, to| {
            gather_bytes(isa, view, codec, layout, (from, to), x, out);
        });
    });
}

/// Panels `from..to` times rows of x, `blocks * 32` apart.
fn gather_floats<C: Codec>(
    isa: Isa,
    panels: View,
    codec: &C,
    layout: &Layout,
    (from, to): (usize, usize),
    (x, rows): (*const f32, usize),
    out: Out,
) {
    scratch::with(gather::scratch(layout), |scratch| {
        dispatch(isa, Gathered { panels, codec, layout: *layout, from, to, x, rows, out, scratch });
    });
}

/// Panels `from..to` times quantized rows.
fn gather_bytes<C: Bytes>(
    isa: Isa,
    panels: View,
    codec: &C,
    layout: &Layout,
    (from, to): (usize, usize),
    x: Rows,
    out: Out,
) {
    scratch::with(gather::scratch(layout), |scratch| {
        dispatch(isa, GatheredBytes { panels, codec, layout: *layout, from, to, x, out, scratch });
    });
}

/// As f32 panels that are made when they are needed, one at a time.
fn decoded(packing: &Packing, stored: &Stored, x: MatRef<'_>, out: Out) {
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
struct Shared(*const f32);
// SAFETY: only read.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

impl Shared {
    fn get(&self) -> *const f32 {
        self.0
    }
}

//! The forms a piece is packed into, and their products.

use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_format::{Float, GgufType, Pattern, Piece, Stored, Values};

use super::prepare::{AsBytes, Work, padded, quantized};
use super::products::{bytes, decoded, exact, gather_bytes, gather_floats, opening, shared, shared_bytes, sparse};
use super::{Activations, Packing};
use crate::op::dot::{Dots, Rows};
use crate::op::matmul::{Gemv, Out};
use crate::panel::float::{Bf16, Dense, F16, F32, Masked};
use crate::panel::gathered::Layout;
use crate::panel::halved::Halved;
use crate::panel::ints::{Bytes, Grid, Halves, Ints, Kind};
use crate::panel::slices::{self, Lists};
use crate::panel::{BLOCK, Opening, Panels, ROWS, float, gathered, halved, ints, source};
use crate::simd::dispatch;
use crate::{Isa, parallel};

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
    Halves3(Panels, Halves<3>),
    Halves6(Panels, Halves<6>),
    Halved(Panels, Halved),
    Shared32(Panels, Dense<F32>, Layout),
    Shared16(Panels, Dense<F16>, Layout),
    SharedInt4(Panels, Ints<4>, Layout),
    SharedInt8(Panels, Ints<8>, Layout),
    Sparse32(Lists),
    Sparse16(Lists),
    /// Decoded by `lacuna-format` a panel at a time.
    Decoded(Arc<Stored>, u64),
}

/// Dense codecs that have panels of their own.
pub(crate) const FLOAT_PATH: [&str; 21] = [
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
    "q3_k, q6_k",
    "iq4_nl, iq4_xs",
];

/// Those that multiply as bytes where activations are quantized.
pub(crate) const INTEGER_PATH: [&str; 15] = [
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
    "q3_k, q6_k",
];

/// The same with what they do, for reports.
const AS_BYTES: [&str; 15] = [
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
    "q3_k, q6_k bytes",
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
            GgufType::Q3_K | GgufType::Q6_K => "q3_k, q6_k",
            _ => "iq4_nl, iq4_xs",
        },
    }
}

/// Runs an expression for whichever body has panels.
macro_rules! with_panels {
    ($body:expr, $panels:ident, $codec:ident => $float:expr, $int:expr,
     $layout:ident => $shared:expr, $shared_int:expr, $other:ident => $rest:expr) => {
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
            Body::Halves3($panels, $codec) => $int,
            Body::Halves6($panels, $codec) => $int,
            Body::Halved($panels, $codec) => $int,
            Body::Shared32($panels, $codec, $layout) => $shared,
            Body::Shared16($panels, $codec, $layout) => $shared,
            Body::SharedInt4($panels, $codec, $layout) => $shared_int,
            Body::SharedInt8($panels, $codec, $layout) => $shared_int,
            $other @ (Body::Sparse32(..) | Body::Sparse16(..) | Body::Decoded(..)) => $rest,
        }
    };
}

/// The name of lists of entries.
const LISTS: &str = "lists";

/// Dense panels of codes.
fn dense_ints(rows: usize, cols: usize, source: &source::Source, read: &dyn Fn()) -> Body {
    let (panels, grid) = ints::dense(rows, cols, source, read);
    match source.bits {
        3 if grid.kind == Kind::Sixteens => Body::Halves3(panels, Halves(grid)),
        6 if grid.kind == Kind::Sixteens => Body::Halves6(panels, Halves(grid)),
        2 => Body::Int2(panels, Ints(grid)),
        3 => Body::Int3(panels, Ints(grid)),
        4 => Body::Int4(panels, Ints(grid)),
        5 => Body::Int5(panels, Ints(grid)),
        6 => Body::Int6(panels, Ints(grid)),
        7 => Body::Int7(panels, Ints(grid)),
        _ => Body::Int8(panels, Ints(grid)),
    }
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
            (Pattern::Dense, _) => source::of(piece).map(|source| dense_ints(rows, cols, &source, read)),
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
            (Pattern::Csr { .. }, Values::Float(..)) => {
                let (lists, half) = slices::lists(piece, read);
                Some(if half { Body::Sparse16(lists) } else { Body::Sparse32(lists) })
            }
            (_, Values::Float(..)) => {
                let (panels, half) = float::masked(piece, read);
                let blocks = panels.blocks;
                Some(if half {
                    Body::Masked16(panels, Masked { _width: F16, blocks })
                } else {
                    Body::Masked32(panels, Masked { _width: F32, blocks })
                })
            }
            // Of codes only halves are cheaper to place than to have in full, with zeros where nothing is.
            _ => source::of(piece).and_then(|source| {
                if halved::fits(piece, &source) {
                    let (panels, grid) = halved::halved(piece, &source, read);
                    return Some(Body::Halved(panels, Halved(grid)));
                }
                source::filled(piece, source).map(|source| dense_ints(rows, cols, &source, read))
            }),
        };
        let (name, body) = match body {
            Some(body) if body.gathered() => (SHARED[0], body),
            Some(body @ (Body::Sparse32(..) | Body::Sparse16(..))) => (LISTS, body),
            Some(body) => (name(&piece.values), body),
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
            _layout => { let _ = codec; false }, codec.grid().table.is_none(), _other => false)
    }

    pub(super) fn bytes(&self) -> u64 {
        match &self.body {
            Body::Sparse32(lists) | Body::Sparse16(lists) => return lists.bytes(),
            Body::Decoded(_, bytes) => return *bytes,
            _ => {}
        }
        with_panels!(&self.body, panels, _codec => panels.bytes(), panels.bytes(),
            layout => { let _ = panels; layout.bytes }, { let _ = panels; layout.bytes }, _other => 0)
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
            other => match other {
                Body::Sparse32(lists) => sparse(packing, lists, F32, x, out),
                Body::Sparse16(lists) => sparse(packing, lists, F16, x, out),
                Body::Decoded(stored, _) => decoded(packing, stored, x, out),
                _ => unreachable!("all others have codecs"),
            }
        );
    }
}

/// What several forms must agree on to share rows made ready once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Rows as bytes.
    Bytes(AsBytes),
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
            Activations::Int8 if grid.table.is_none() => {
                let sixteens = grid.kind == Kind::Sixteens;
                Some(Plan::Bytes(AsBytes { zero: grid.zero, sixteens, blocks: panels.blocks }))
            }
            _ => row(panels),
        };
        with_panels!(
            &self.body, panels, codec =>
            { let _ = codec; row(panels) }, int(panels, codec.grid()),
            _layout => { let _ = codec; row(panels) }, int(panels, codec.grid()),
            _other => None
        )
    }

    /// Panels of the matrix; none where it has none of its own.
    fn count(&self) -> usize {
        with_panels!(&self.body, panels, _codec => panels.view().count(), panels.view().count(),
            _layout => panels.view().count(), panels.view().count(), _other => 0)
    }

    /// What a product reads first of panels `from..to`.
    fn opening(&self, (from, to): (usize, usize)) -> Opening {
        with_panels!(
            &self.body, panels, codec =>
            { let _ = (panels, codec); Opening::NONE }, { let _ = codec; opening(panels.view(), from, to) },
            _layout => { let _ = (panels, codec); Opening::NONE }, { let _ = codec; panels.view().opening(from, 1, 1) },
            _other => Opening::NONE
        )
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
            _other => {}
        );
    }
}

/// Several forms of one plan times the same rows.
pub(super) fn together<const N: usize>(packing: &Packing, plan: Plan, parts: [(&Form, Out); N], x: MatRef<'_>) {
    let counts = parts.map(|(form, _)| form.count());
    // Forms, their results and their panels in a range of all panels.
    let cut = |from: usize, to: usize| {
        let parts = parts.iter().zip(counts).scan(0, move |first, ((form, out), count)| {
            let within = |p: usize| p.clamp(*first, *first + count) - *first;
            let panels = (within(from), within(to));
            *first += count;
            Some((*form, *out, panels))
        });
        parts.filter(|(.., (from, to))| from < to)
    };
    let some = |given: Given, from: usize, to: usize| {
        cut(from, to).for_each(|(form, out, panels)| form.some(packing.isa, panels, given, out));
    };
    let (count, row) = (counts.iter().sum(), x.rows() == 1);
    match plan {
        Plan::Bytes(kind) => {
            let cost = ROWS * kind.blocks * BLOCK * x.rows() / 2;
            let opening =
                |from, to| cut(from, to).next().map_or(Opening::NONE, |(form, _, panels)| form.opening(panels));
            let work = Work { count, unit: if row { 4 } else { 1 }, cost };
            quantized(packing.isa, x, kind, work, opening, |rows, from, to| some(Given::Bytes(rows), from, to));
        }
        Plan::Row { blocks } => padded(x.row(0), blocks, |row| {
            let given = Given::Row(row);
            parallel::ranges(count, 8, usize::MAX, ROWS * blocks * BLOCK, |from, to| some(given, from, to));
        }),
    }
}

//! The forms a piece is packed into: what each of them must be able to do, and the table of those there are.

use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_format::{Float, GgufType, Piece, Signed, Values};

use super::bodies::{self, Maker};
use super::prepare::{AsBytes, Work, padded, quantized};
use super::{Activations, Packing};
use crate::op::dot::Rows;
use crate::op::matmul::Out;
use crate::panel::{BLOCK, Opening, ROWS};
use crate::{Isa, parallel};

/// A packed piece behind its name.
#[derive(Clone)]
pub(super) struct Packed {
    name: &'static str,
    pub(super) body: Arc<dyn Body>,
}

/// What packed pieces do, whatever they are packed into.
pub(super) trait Body: Send + Sync {
    /// Whether it multiplies as bytes where activations are quantized.
    fn integer(&self) -> bool {
        false
    }
    /// Bytes that one row of x reads.
    fn bytes(&self) -> u64;
    /// Multiply-adds that a weight takes for one row of x.
    fn work(&self) -> u64 {
        1
    }
    /// `out (+)= x · Wᵀ`. Shapes fit.
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out);
    /// How it could share `rows` rows with others, if at all.
    fn plan(&self, _: &Packing, _rows: usize) -> Option<Plan> {
        None
    }
    /// What one row must be for it to join the pass of another term over panels of 16 rows, if it can.
    fn joins(&self, packing: &Packing) -> Option<Plan> {
        self.plan(packing, 1)
    }
    /// Panels of the matrix; none where it has none of its own.
    fn count(&self) -> usize {
        0
    }
    /// What a product reads first of panels `from..to`.
    fn opening(&self, _: (usize, usize)) -> Opening {
        Opening::NONE
    }
    /// Panels `from..to` times rows that a plan of this form prepared.
    fn some(&self, _: Isa, _: (usize, usize), _: Given, _: Out) {}
}

/// The codecs that have panels of their own, and what those are called that multiply as bytes where activations are
/// quantized.
const CODECS: [(&str, Option<&str>); 23] = [
    ("f32", None),
    ("f16", None),
    ("bf16", None),
    ("f8", None),
    ("int2", Some("int2 bytes")),
    ("int3", Some("int3 bytes")),
    ("int4", Some("int4 bytes")),
    ("int5", Some("int5 bytes")),
    ("int6", Some("int6 bytes")),
    ("int7", Some("int7 bytes")),
    ("int8", Some("int8 bytes")),
    ("ternary", Some("ternary bytes")),
    ("codebook", None),
    ("q4_0", Some("q4_0 bytes")),
    ("q4_1", Some("q4_1 bytes")),
    ("q5_0", Some("q5_0 bytes")),
    ("q5_1", Some("q5_1 bytes")),
    ("q8_0", Some("q8_0 bytes")),
    ("q4_k, q5_k", Some("q4_k, q5_k bytes")),
    ("q3_k, q6_k", Some("q3_k, q6_k bytes")),
    ("iq4_nl, iq4_xs", None),
    ("iq2", Some("iq2 bytes")),
    ("iq3", Some("iq3 bytes")),
];

/// Codecs with dense panels; those that multiply as bytes where activations are quantized.
pub(crate) fn codecs(bytes: bool) -> impl Iterator<Item = &'static str> {
    CODECS.into_iter().filter(move |c| !bytes || c.1.is_some()).map(|c| c.0)
}

/// The name of a codec, one of `CODECS` or of what is decoded first.
pub(super) fn name(values: &Values) -> &'static str {
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
            GgufType::IQ2_XXS | GgufType::IQ2_XS | GgufType::IQ2_S => "iq2",
            GgufType::IQ3_XXS | GgufType::IQ3_S => "iq3",
            _ => "iq4_nl, iq4_xs",
        },
    }
}

/// A row of the table of forms: what it is called (by its codec, where that is not said) and what makes it of the
/// pieces that it takes.
struct Row {
    name: Option<&'static str>,
    make: Maker,
}

/// The name of panels whose rows share columns.
const SHARED: (&str, &str) = ("gathered", "gathered bytes");

/// Every form; a piece is packed into the first that takes it, and the last takes all.
const FORMS: [Row; 10] = [
    Row { name: None, make: bodies::dense_floats },
    Row { name: Some("row tables"), make: bodies::row_tables },
    Row { name: None, make: bodies::dense_codes },
    Row { name: None, make: bodies::indexed },
    Row { name: Some(SHARED.0), make: bodies::gathered_floats },
    Row { name: Some(SHARED.0), make: bodies::gathered_codes },
    Row { name: Some("lists"), make: bodies::lists },
    Row { name: None, make: bodies::masked },
    Row { name: None, make: bodies::sparse_codes },
    Row { name: Some("decoded"), make: bodies::decoded_first },
];

impl Packed {
    /// The form of a piece that has passed its check. `beside`: another term of 16-row panels comes before it in the
    /// sum. `read`: see [`Panels::build`](crate::panel::Panels::build).
    pub(super) fn of(piece: &Piece, beside: bool, read: &dyn Fn()) -> Packed {
        let made = FORMS.iter().find_map(|row| Some((row, (row.make)(piece, beside, read)?)));
        let (row, body) = made.expect("the last form takes every piece");
        Packed { name: row.name.unwrap_or_else(|| name(&piece.values)), body }
    }

    /// The form of signs times a product, checked.
    pub(super) fn signed(signed: &Signed, read: &dyn Fn()) -> Packed {
        Packed { name: "signs", body: bodies::signed(signed, read) }
    }

    /// The name of its codec, and how it multiplies where that is not from its own panels in f32.
    pub(super) fn name(&self, activations: Activations) -> &'static str {
        if activations != Activations::Int8 || !self.body.integer() {
            return self.name;
        }
        if self.name == SHARED.0 {
            return SHARED.1;
        }
        CODECS.iter().find(|c| c.0 == self.name).and_then(|c| c.1).unwrap_or("bytes")
    }
}

/// What several forms must agree on to share rows prepared once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// Rows as bytes.
    Bytes(AsBytes),
    /// One row as it is.
    Row { blocks: usize },
}

/// Rows prepared by a [`Plan`].
#[derive(Clone, Copy)]
pub(super) enum Given {
    Bytes(Rows),
    /// Padded with zeros to whole blocks; for one that joins a pass, to whole blocks of every kind and one value more.
    Row(*const f32),
}

// SAFETY: only read.
unsafe impl Sync for Given {}

/// Several forms of one plan times the same rows.
pub(super) fn together<const N: usize>(packing: &Packing, plan: Plan, parts: [(&Packed, Out); N], x: MatRef<'_>) {
    let counts = parts.map(|(form, _)| form.body.count());
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
        cut(from, to).for_each(|(form, out, panels)| form.body.some(packing.isa, panels, given, out));
    };
    let (count, row) = (counts.iter().sum(), x.rows() == 1);
    match plan {
        Plan::Bytes(kind) => {
            let cost = ROWS * kind.blocks * BLOCK * x.rows() / 2;
            let opening =
                |from, to| cut(from, to).next().map_or(Opening::NONE, |(form, _, panels)| form.body.opening(panels));
            let work = Work { count, unit: if row { 4 } else { 1 }, cost };
            quantized(packing.isa, x, kind, work, opening, |rows, from, to| some(Given::Bytes(rows), from, to));
        }
        Plan::Row { blocks } => padded(x.row(0), blocks, |row| {
            let given = Given::Row(row);
            parallel::ranges(count, 8, usize::MAX, ROWS * blocks * BLOCK, |from, to| some(given, from, to));
        }),
    }
}

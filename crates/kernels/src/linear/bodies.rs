//! What pieces are packed into, one kind of panel a type, and what makes each.

use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_format::{Float, Owner, Pattern, Piece, Signed, Stored, Values};

use super::form::{Body, Given, Plan};
use super::prepare::{AsBytes, in_tiles};
use super::products::{
    bytes, decoded, dots, exact, gather_bytes, gather_floats, opening, shared, shared_bytes, sparse, unit,
};
use super::{Activations, Packing, products};
use crate::Isa;
use crate::op::lookup::Lookups;
use crate::op::matmul::{Gemv, Out};
use crate::op::sparse::Sparse;
use crate::panel::float::{Bf16, Dense, F16, F32, Masked, Width};
use crate::panel::gathered::Layout;
use crate::panel::halved::Halved;
use crate::panel::ints::{Bytes, GroupLayout, Halves, Ints, Kind};
use crate::panel::rowtables::{self, RowTables};
use crate::panel::slices::{self, Lists};
use crate::panel::{Codec, Opening, Panels, ROWS, float, gathered, halved, ints, lattice, signs, source};
use crate::simd::dispatch;

/// Makes a form of a piece, where it takes such a piece. `beside` and `read` as in
/// [`Packed::of`](super::form::Packed::of).
pub(super) type Maker = fn(&Piece, bool, &dyn Fn()) -> Option<Arc<dyn Body>>;

/// What most bodies do with one row as it is.
fn row_plan(panels: &Panels, rows: usize) -> Option<Plan> {
    (rows == 1).then_some(Plan::Row { blocks: panels.blocks })
}

/// What bodies of codes do.
fn codes_plan<C: Bytes>(panels: &Panels, codec: &C, packing: &Packing, rows: usize, tiled: bool) -> Option<Plan> {
    let (grid, sixteens) = (codec.grid(), C::SIXTEENS);
    if !as_bytes(packing, grid) {
        return row_plan(panels, rows);
    }
    Some(Plan::Bytes(AsBytes { zero: grid.zero, sixteens, blocks: panels.blocks, tiled }))
}

fn as_bytes(packing: &Packing, grid: &GroupLayout) -> bool {
    packing.activations == Activations::Int8 && grid.table.is_none()
}

/// Floats, all of them or under masks.
struct Floats<C>(Panels, C);

impl<C: Codec> Body for Floats<C> {
    fn bytes(&self) -> u64 {
        self.0.bytes() + self.1.beside()
    }
    fn work(&self) -> u64 {
        self.1.work()
    }
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        exact(packing, self.0.view(), &self.1, x, out);
    }
    fn plan(&self, _: &Packing, rows: usize) -> Option<Plan> {
        row_plan(&self.0, rows)
    }
    fn count(&self) -> usize {
        self.0.view().count()
    }
    fn some(&self, isa: Isa, (from, to): (usize, usize), given: Given, out: Out) {
        if let Given::Row(x) = given {
            dispatch(isa, Gemv { panels: self.0.view(), codec: &self.1, from, to, x, out });
        }
    }
}

/// Integer codes in every column.
struct Codes<C>(Panels, C);

impl<C: Bytes> Body for Codes<C> {
    fn integer(&self) -> bool {
        self.1.grid().table.is_none()
    }
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        if as_bytes(packing, self.1.grid()) {
            bytes(packing, self.0.view(), &self.1, x, out);
        } else {
            exact(packing, self.0.view(), &self.1, x, out);
        }
    }
    fn plan(&self, packing: &Packing, rows: usize) -> Option<Plan> {
        codes_plan(&self.0, &self.1, packing, rows, in_tiles(packing.isa, rows, self.0.blocks))
    }
    fn count(&self) -> usize {
        self.0.view().count()
    }
    fn opening(&self, (from, to): (usize, usize)) -> Opening {
        opening(self.0.view(), from, to)
    }
    fn some(&self, isa: Isa, (from, to): (usize, usize), given: Given, out: Out) {
        let (panels, codec) = (self.0.view(), &self.1);
        match given {
            Given::Bytes(x) => dots(isa, panels, codec, (from, to), x, out),
            Given::Row(x) => dispatch(isa, Gemv { panels, codec, from, to, x, out }),
        }
    }
}

/// Floats in panels whose rows share columns.
struct SharedFloats<C>(Panels, C, Layout);

impl<C: Codec> Body for SharedFloats<C> {
    fn bytes(&self) -> u64 {
        self.2.bytes
    }
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        shared(packing, self.0.view(), &self.1, &self.2, x, out);
    }
    fn plan(&self, _: &Packing, rows: usize) -> Option<Plan> {
        row_plan(&self.0, rows)
    }
    fn count(&self) -> usize {
        self.0.view().count()
    }
    fn some(&self, isa: Isa, range: (usize, usize), given: Given, out: Out) {
        if let Given::Row(x) = given {
            gather_floats(isa, self.0.view(), &self.1, &self.2, range, (x, 1), out);
        }
    }
}

/// Codes in such panels.
struct SharedCodes<const BITS: usize>(Panels, Ints<BITS>, Layout);

impl<const BITS: usize> Body for SharedCodes<BITS> {
    fn integer(&self) -> bool {
        true
    }
    fn bytes(&self) -> u64 {
        self.2.bytes
    }
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        if packing.activations == Activations::Int8 {
            shared_bytes(packing, self.0.view(), &self.1, &self.2, x, out);
        } else {
            shared(packing, self.0.view(), &self.1, &self.2, x, out);
        }
    }
    fn plan(&self, packing: &Packing, rows: usize) -> Option<Plan> {
        codes_plan(&self.0, &self.1, packing, rows, false)
    }
    fn count(&self) -> usize {
        self.0.view().count()
    }
    fn opening(&self, (from, _): (usize, usize)) -> Opening {
        self.0.view().opening(from, 1, 1)
    }
    fn some(&self, isa: Isa, range: (usize, usize), given: Given, out: Out) {
        match given {
            Given::Bytes(x) => gather_bytes(isa, self.0.view(), &self.1, &self.2, range, x, out),
            Given::Row(x) => gather_floats(isa, self.0.view(), &self.1, &self.2, range, (x, 1), out),
        }
    }
}

/// Lists of entries.
struct Entries<W>(Lists, W);

impl<W: Width> Body for Entries<W> {
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        sparse(packing, &self.0, self.1, x, out);
    }
    fn joins(&self, _: &Packing) -> Option<Plan> {
        self.0.windowed.then_some(Plan::Row { blocks: self.0.blocks })
    }
    fn count(&self) -> usize {
        self.0.count()
    }
    fn some(&self, isa: Isa, (from, to): (usize, usize), given: Given, out: Out) {
        if let Given::Row(x) = given {
            dispatch(isa, Sparse { lists: &self.0, _width: self.1, from, to, x, rows: 1, out });
        }
    }
}

/// Codes whose rows have tables of their own.
struct Tabled<const BITS: usize>(RowTables);

impl<const BITS: usize> Body for Tabled<BITS> {
    fn bytes(&self) -> u64 {
        self.0.panels.bytes()
    }
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        products::tabled::<BITS>(packing, &self.0, x, out);
    }
    fn joins(&self, _: &Packing) -> Option<Plan> {
        Some(Plan::Row { blocks: self.0.panels.blocks })
    }
    fn count(&self) -> usize {
        self.0.panels.view().count()
    }
    fn some(&self, isa: Isa, (from, to): (usize, usize), given: Given, out: Out) {
        if let Given::Row(x) = given {
            let (panels, steps, half) = (self.0.panels.view(), self.0.steps(), self.0.half);
            let scratch = &mut [];
            let op: Lookups<'_, BITS> = Lookups { panels, half, steps, from, to, x, rows: 1, out, scratch };
            dispatch(isa, op);
        }
    }
}

/// Decoded by `lacuna-format` a panel at a time.
struct Decoded(Stored);

impl Body for Decoded {
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }
    fn multiply(&self, packing: &Packing, x: MatRef<'_>, out: Out) {
        decoded(packing, &self.0, x, out);
    }
}

fn body(b: impl Body + 'static) -> Option<Arc<dyn Body>> {
    Some(Arc::new(b))
}

/// f32, f16 and bf16 as they lie.
pub(super) fn dense_floats(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    let (Pattern::Dense, Values::Float(float, bytes)) = (&piece.pattern, &piece.values) else { return None };
    let panels = || float::dense(piece.rows, piece.cols, bytes, float.bytes(), read);
    match float {
        Float::F32 => body(Floats(panels(), Dense(F32))),
        Float::F16 => body(Floats(panels(), Dense(F16))),
        Float::Bf16 => body(Floats(panels(), Dense(Bf16))),
        Float::F8E4m3 | Float::F8E5m2 => None,
    }
}

/// Signs times a product.
pub(super) fn signed(signed: &Signed, read: &dyn Fn()) -> Arc<dyn Body> {
    if signs::fits(signed) {
        let (panels, codec) = signs::pack::<true>(signed, read);
        Arc::new(Floats(panels, codec))
    } else {
        let (panels, codec) = signs::pack::<false>(signed, read);
        Arc::new(Floats(panels, codec))
    }
}

/// Codes of 3 and 4 bits into tables of rows.
pub(super) fn row_tables(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    let Values::Codebook { bits, tables, scales: None, .. } = &piece.values else { return None };
    if piece.pattern != Pattern::Dense || tables.owner != Owner::Row {
        return None;
    }
    match bits {
        3 => body(Tabled::<3>(rowtables::pack(piece, read))),
        4 => body(Tabled::<4>(rowtables::pack(piece, read))),
        _ => None,
    }
}

/// Codes in every column.
pub(super) fn dense_codes(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    if piece.pattern != Pattern::Dense {
        return None;
    }
    codes(piece, &source::of(piece)?, read)
}

fn codes(piece: &Piece, source: &source::Source<'_>, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    let (panels, grid) = ints::dense(piece.rows, piece.cols, source, read);
    let halves = matches!(grid.kind, Kind::Sixteens | Kind::F32Two);
    match source.bits {
        3 if halves => body(Codes(panels, Halves::<3>(grid))),
        4 if halves => body(Codes(panels, Halves::<4>(grid))),
        6 if halves => body(Codes(panels, Halves::<6>(grid))),
        2 => body(Codes(panels, Ints::<2>(grid))),
        3 => body(Codes(panels, Ints::<3>(grid))),
        4 => body(Codes(panels, Ints::<4>(grid))),
        5 => body(Codes(panels, Ints::<5>(grid))),
        6 => body(Codes(panels, Ints::<6>(grid))),
        7 => body(Codes(panels, Ints::<7>(grid))),
        _ => body(Codes(panels, Ints::<8>(grid))),
    }
}

/// Indices into a grid.
pub(super) fn indexed(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    fn of<const T: usize>(piece: &Piece, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
        let (panels, codec) = lattice::pack::<T>(piece, read);
        body(Codes(panels, codec))
    }
    match lattice::kind(piece)? {
        lattice::IQ2_XXS => of::<{ lattice::IQ2_XXS }>(piece, read),
        lattice::IQ2_XS => of::<{ lattice::IQ2_XS }>(piece, read),
        lattice::IQ2_S => of::<{ lattice::IQ2_S }>(piece, read),
        lattice::IQ3_XXS => of::<{ lattice::IQ3_XXS }>(piece, read),
        _ => of::<{ lattice::IQ3_S }>(piece, read),
    }
}

/// Floats under masks and blocks that rows share.
pub(super) fn gathered_floats(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    if !gathered::fits(&piece.pattern) || !matches!(piece.values, Values::Float(..)) {
        return None;
    }
    let (panels, layout, half) = gathered::floats(piece, read);
    if half { body(SharedFloats(panels, Dense(F16), layout)) } else { body(SharedFloats(panels, Dense(F32), layout)) }
}

/// Codes under such.
pub(super) fn gathered_codes(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    if !gathered::fits(&piece.pattern) {
        return None;
    }
    let source = source::of(piece).filter(|s| s.table.is_none())?;
    if source.bits <= 4 {
        let (panels, grid, layout) = gathered::ints(piece, &source, 4, read);
        body(SharedCodes::<4>(panels, Ints(grid), layout))
    } else {
        let (panels, grid, layout) = gathered::ints(piece, &source, 8, read);
        body(SharedCodes::<8>(panels, Ints(grid), layout))
    }
}

/// Floats in compressed rows.
pub(super) fn lists(piece: &Piece, beside: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    let (Pattern::Csr { .. }, Values::Float(..)) = (&piece.pattern, &piece.values) else { return None };
    let window = beside.then(|| unit(piece.rows.div_ceil(ROWS)));
    let (lists, half) = slices::lists(piece, window, read);
    if half { body(Entries(lists, F16)) } else { body(Entries(lists, F32)) }
}

/// Floats under any other pattern.
pub(super) fn masked(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    if piece.pattern == Pattern::Dense || gathered::fits(&piece.pattern) || !matches!(piece.values, Values::Float(..)) {
        return None;
    }
    let (panels, half) = float::masked(piece, read);
    let blocks = panels.blocks;
    if half {
        body(Floats(panels, Masked { _width: F16, blocks }))
    } else {
        body(Floats(panels, Masked { _width: F32, blocks }))
    }
}

/// Codes under any other pattern. Only halves are cheaper to place than to have in full, with zeros where nothing is.
pub(super) fn sparse_codes(piece: &Piece, _: bool, read: &dyn Fn()) -> Option<Arc<dyn Body>> {
    if piece.pattern == Pattern::Dense || gathered::fits(&piece.pattern) || matches!(piece.values, Values::Float(..)) {
        return None;
    }
    let source = source::of(piece)?;
    if halved::fits(piece, &source) {
        let (panels, grid) = halved::halved(piece, &source, read);
        return body(Codes(panels, Halved(grid)));
    }
    codes(piece, &source::filled(piece, source)?, read)
}

/// Anything.
pub(super) fn decoded_first(piece: &Piece, _: bool, _: &dyn Fn()) -> Option<Arc<dyn Body>> {
    body(Decoded(Stored::from_piece(piece.clone())))
}

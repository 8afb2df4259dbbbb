//! Looking at activations as they pass.

use std::ops::Range;

use lacuna_spec::Place;

use crate::ModelError;
use crate::backend::{Backend, Cpu, Host};

/// A piece of a decoder block that adds to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockPart {
    /// The whole block.
    Block,
    /// Its attention, norms included.
    Attention,
    /// Its feed-forward part, norms included.
    Ffn,
}

/// What a tap wants to be shown; nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Inputs of matrices.
    pub inputs: bool,
    /// What matrices put out.
    pub outputs: bool,
    /// The residual stream before and after each part: it costs a copy.
    pub residuals: bool,
}

/// Rows that lie with a backend, as a tap is shown them.
pub struct Shown<'a, B: Backend = Cpu> {
    backend: &'a B,
    rows: &'a B::Rows,
    which: Range<usize>,
}

impl<'a, B: Backend> Shown<'a, B> {
    pub(crate) fn all(backend: &'a B, rows: &'a B::Rows) -> Shown<'a, B> {
        Shown { backend, rows, which: 0..backend.shape(rows).0 }
    }

    pub(crate) fn some(backend: &'a B, rows: &'a B::Rows, which: Range<usize>) -> Shown<'a, B> {
        Shown { backend, rows, which }
    }

    /// How many there are.
    pub fn rows(&self) -> usize {
        self.which.len()
    }

    /// Their columns.
    pub fn cols(&self) -> usize {
        self.backend.shape(self.rows).1
    }

    /// The rows on the host: on a device this waits for them and brings them, so whoever does not need them had better
    /// not ask.
    pub fn download(&self) -> Result<Host<'a>, ModelError> {
        self.backend.download(self.rows, self.which.clone())
    }
}

/// Someone who looks on during a forward pass. Bodies do nothing by default. An error ends the pass.
pub trait Tap<B: Backend = Cpu> {
    /// What should be shown; asked once a block. Everything by default.
    fn wants(&self) -> Wants {
        Wants { inputs: true, outputs: true, residuals: true }
    }

    /// The rows that multiply the matrix at `place`, `[rows, inputs]`: called once for each matrix, also where several
    /// share one input. An expert sees the rows routed to it only.
    fn input(&mut self, place: &Place, x: Shown<'_, B>) -> Result<(), ModelError> {
        let _ = (place, x);
        Ok(())
    }

    /// What the matrix at `place` makes of its input, `[rows, outputs]`, its bias added and nothing done to it yet.
    fn output(&mut self, place: &Place, y: Shown<'_, B>) -> Result<(), ModelError> {
        let _ = (place, y);
        Ok(())
    }

    /// The residual stream before and after a part of block `layer`, `[rows, hidden]`.
    fn residual(
        &mut self,
        layer: usize,
        part: BlockPart,
        before: Shown<'_, B>,
        after: Shown<'_, B>,
    ) -> Result<(), ModelError> {
        let _ = (layer, part, before, after);
        Ok(())
    }
}

/// Nobody looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTap;

impl<B: Backend> Tap<B> for NoTap {
    fn wants(&self) -> Wants {
        Wants::default()
    }
}

/// A backend and who looks on while it computes.
pub(crate) struct Look<'a, B: Backend> {
    pub(crate) backend: &'a B,
    tap: &'a mut dyn Tap<B>,
    pub(crate) wants: Wants,
}

impl<'a, B: Backend> Look<'a, B> {
    pub(crate) fn new(backend: &'a B, tap: &'a mut dyn Tap<B>) -> Look<'a, B> {
        Look { wants: tap.wants(), backend, tap }
    }

    /// Shows what several matrices read.
    pub(crate) fn input<'p>(
        &mut self,
        places: impl IntoIterator<Item = &'p Place>,
        x: &B::Rows,
    ) -> Result<(), ModelError> {
        if !self.wants.inputs {
            return Ok(());
        }
        places.into_iter().try_for_each(|p| self.tap.input(p, Shown::all(self.backend, x)))
    }

    /// Shows what a matrix put out.
    pub(crate) fn output(&mut self, place: &Place, y: &B::Rows) -> Result<(), ModelError> {
        if self.wants.outputs { self.tap.output(place, Shown::all(self.backend, y)) } else { Ok(()) }
    }

    /// The same of some rows, those that an expert read.
    pub(crate) fn input_of(&mut self, place: &Place, x: &B::Rows, rows: Range<usize>) -> Result<(), ModelError> {
        if self.wants.inputs { self.tap.input(place, Shown::some(self.backend, x, rows)) } else { Ok(()) }
    }

    /// The same of what it put out.
    pub(crate) fn output_of(&mut self, place: &Place, y: &B::Rows, rows: Range<usize>) -> Result<(), ModelError> {
        if self.wants.outputs { self.tap.output(place, Shown::some(self.backend, y, rows)) } else { Ok(()) }
    }

    /// Shows the residual stream around a part, where it was kept.
    pub(crate) fn residual(
        &mut self,
        layer: usize,
        part: BlockPart,
        before: &Option<B::Rows>,
        after: &B::Rows,
    ) -> Result<(), ModelError> {
        let Some(before) = before else { return Ok(()) };
        self.tap.residual(layer, part, Shown::all(self.backend, before), Shown::all(self.backend, after))
    }
}

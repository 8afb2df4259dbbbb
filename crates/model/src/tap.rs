//! Looking at activations as they pass.

use lacuna_base::MatRef;
use lacuna_spec::Place;

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

/// Someone who looks on during a forward pass. Bodies do nothing by default.
pub trait Tap {
    /// What should be shown; asked once a block. Everything by default.
    fn wants(&self) -> Wants {
        Wants { inputs: true, outputs: true, residuals: true }
    }

    /// The rows that multiply the matrix at `place`, `[rows, inputs]`: called once for each matrix, also where several
    /// share one input. An expert sees the rows routed to it only.
    fn input(&mut self, place: &Place, x: MatRef<'_>) {
        let _ = (place, x);
    }

    /// What the matrix at `place` makes of its input, `[rows, outputs]`, its bias added and nothing done to it yet.
    fn output(&mut self, place: &Place, y: MatRef<'_>) {
        let _ = (place, y);
    }

    /// The residual stream before and after a part of block `layer`, `[rows, hidden]`.
    fn residual(&mut self, layer: usize, part: BlockPart, before: MatRef<'_>, after: MatRef<'_>) {
        let _ = (layer, part, before, after);
    }
}

/// Nobody looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoTap;

impl Tap for NoTap {
    fn wants(&self) -> Wants {
        Wants::default()
    }
}

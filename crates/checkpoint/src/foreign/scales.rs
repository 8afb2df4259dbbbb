//! Scales as compressed-tensors writes them: for a tensor, a row, a group of columns or a block.

use std::ops::Range;

use bytes::Bytes;
use lacuna_format::{Float, Group, Scales};

use super::{Args, Data, Fault, Tensor};
use crate::tensor::TensorType;

/// How the entries of a tensor of scales spread over a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Spread {
    /// One for all.
    One,
    /// A row of them for each row.
    Rows,
    /// A row of them for so many rows.
    Blocks(usize),
}

/// Checked scales of a matrix.
#[derive(Clone, Debug)]
pub(super) struct ScaleTensor {
    pub tensor: Tensor,
    float: Float,
    spread: Spread,
    /// Scales of a row.
    pub groups: usize,
    /// Columns that share one.
    pub run: usize,
}

impl ScaleTensor {
    /// Checks that `tensor` can be the scales of a `[rows, cols]` matrix, quantized as `args` say.
    pub fn new(tensor: Tensor, (rows, cols): (usize, usize), args: Option<&Args>) -> Result<ScaleTensor, Fault> {
        let float = match tensor.dtype {
            TensorType::Float(f @ (Float::F32 | Float::F16 | Float::Bf16)) => f,
            // Powers of two, a byte each.
            TensorType::Other("F8_E8M0") => Float::Bf16,
            other => return tensor.bad(format!("{} cannot be scales; F32, F16 and BF16 can", other.name())),
        };
        let wrong = || tensor.bad(format!("shape {:?} does not fit a matrix of {rows} x {cols}", tensor.shape));
        let (high, groups) = match tensor.shape[..] {
            [] | [1] => (1, 1),
            [n] => (n, 1),
            [a, b] | [a, 1, b, 1] => (a, b),
            _ => return wrong(),
        };
        let block = args.and_then(|a| a.block);
        let (spread, run) = match block {
            Some((r, c)) if high == rows.div_ceil(r) && groups == cols.div_ceil(c) => (Spread::Blocks(r), c),
            _ if (high, groups) == (1, 1) && rows != 1 => (Spread::One, cols),
            _ if high != rows || groups == 0 || groups > cols => return wrong(),
            _ if groups == 1 => (Spread::Rows, cols),
            _ => match args.and_then(|a| a.group).filter(|g| cols.div_ceil(*g) == groups) {
                Some(g) => (Spread::Rows, g),
                // The tensors count, not the configuration.
                None if cols.is_multiple_of(groups) => (Spread::Rows, cols / groups),
                None => return wrong(),
            },
        };
        Ok(ScaleTensor { tensor, float, spread, groups, run: run.max(1) })
    }

    /// Scales of some rows.
    pub fn read(&self, rows: Range<usize>, data: Data<'_>) -> Scales {
        let mut bytes = data(self.tensor.index);
        if self.tensor.is("F8_E8M0") {
            bytes = bytes.iter().flat_map(|e| power_of_two(*e).to_le_bytes()).collect::<Vec<u8>>().into();
        }
        let size = self.groups * self.float.bytes();
        let chosen = match self.spread {
            Spread::Rows => bytes.slice(rows.start * size..rows.end * size),
            Spread::One => Bytes::from(bytes.repeat(rows.len())),
            Spread::Blocks(high) => {
                let row = |r: usize| &bytes[r / high * size..(r / high + 1) * size];
                Bytes::from(rows.flat_map(|r| row(r).iter().copied()).collect::<Vec<u8>>())
            }
        };
        Scales::Float(self.float, chosen)
    }

    /// Which row of a tensor of the same shape belongs to row `r` of the matrix.
    pub fn row(&self, r: usize) -> usize {
        match self.spread {
            Spread::One => 0,
            Spread::Rows => r,
            Spread::Blocks(high) => r / high,
        }
    }

    /// Rows of the tensor of scales.
    pub fn high(&self, rows: usize) -> usize {
        self.row(rows - 1) + 1
    }

    /// Which columns share a scale.
    pub fn group(&self) -> Group {
        Group::Run(self.run)
    }
}

/// `2^(e - 127)` as bf16; 255 is no number.
fn power_of_two(e: u8) -> u16 {
    match e {
        0 => 1 << 6,
        255 => 0x7fc0,
        e => u16::from(e) << 7,
    }
}

/// Signed bytes to codes counted from -128 on.
pub(super) fn unsigned(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|b| b ^ 0x80).collect()
}

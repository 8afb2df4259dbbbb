//! Experts in MXFP4 as GPT-OSS's checkpoints hold them: for each tensor of three axes `blocks`, `[experts, outputs,
//! inputs / 32, 16]` of two codes a byte, the low one first, and `scales`, `[experts, outputs, inputs / 32]`, powers of 2
//! with a bias of 127.
//!
//! Codes stay as they are, under a table of the sixteen numbers of E2M1; scales become bf16, which holds every power.

use std::ops::Range;

use lacuna_arch::Source;
use lacuna_format::{Elem, Float, Group, Pattern, Piece, Scales, Stored, Tables, Values};

use super::config::{Method, Quantized};
use super::{Data, Fault, Module, Tensor, Tensors};
use crate::tensor::TensorType;

/// The values of the sixteen codes: a sign bit, two of an exponent, one of a mantissa.
const E2M1: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Columns that share a scale.
const RUN: usize = 32;

/// One expert's matrix, or every second row of it.
pub(crate) struct Mxfp4 {
    blocks: Tensor,
    scales: Tensor,
    /// Rows of an expert.
    high: usize,
    expert: usize,
    from: usize,
    step: usize,
    rows: usize,
    cols: usize,
}

/// The matrix behind `source`, where it is one of the file's blocks.
pub(crate) fn find(q: &Quantized, t: &Tensors<'_>, source: &Source) -> Result<Option<Mxfp4>, Fault> {
    let (Method::Mxfp4, Some(expert)) = (q.method, source.slice) else { return Ok(None) };
    let named = |end: &str| {
        let name = format!("{}_{end}", source.name);
        let index = *t.names.get(&name)?;
        let info = (t.info)(index);
        Some(Tensor { index, name, shape: info.shape.clone(), dtype: info.dtype })
    };
    let Some(blocks) = named("blocks") else { return Ok(None) };
    let Some(scales) = named("scales") else {
        return blocks.bad(format!("{}_scales should lie beside it and is missing", source.name));
    };
    for tensor in [&blocks, &scales] {
        if tensor.dtype != TensorType::Uint(Elem::U8) {
            return tensor.bad(format!("{}, expected U8", tensor.dtype.name()));
        }
    }
    let (experts, high, runs) = match blocks.shape[..] {
        [e, n, g, 16] => (e, n, g),
        _ => return blocks.bad(format!("shape {:?}, expected four axes, the last of 16", blocks.shape)),
    };
    scales.must_have(&[experts, high, runs])?;
    let (from, to) = source.rows.unwrap_or((0, high));
    if expert >= experts || to > high || from >= to {
        return blocks.bad(format!("rows {from} to {to} of expert {expert}, but it has {high} of {experts}"));
    }
    let (step, cols) = (source.step, runs * RUN);
    Ok(Some(Mxfp4 { blocks, scales, high, expert, from, step, rows: (to - from).div_ceil(step), cols }))
}

impl Module for Mxfp4 {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        [&self.blocks, &self.scales].map(|t| (t.index, t.name.as_str())).to_vec()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let (blocks, scales) = (data(self.blocks.index), data(self.scales.index));
        let (line, runs) = (self.cols / 2, self.cols / RUN);
        let at = |r: usize| self.expert * self.high + self.from + r * self.step;
        let codes: Vec<u8> = rows.clone().flat_map(|r| &blocks[at(r) * line..(at(r) + 1) * line]).copied().collect();
        let exponents = rows.clone().flat_map(|r| &scales[at(r) * runs..(at(r) + 1) * runs]);
        // Of bf16 the exponent's bits are these; the least of them lies below its normal numbers.
        let scale = |e: &u8| if *e == 0 { 0x40u16 } else { u16::from(*e) << 7 };
        if let Some(i) = exponents.clone().position(|e| *e == 255) {
            return self.scales.bad(format!("the scale of a run of row {} is no number", rows.start + i / runs));
        }
        let bytes: Vec<u8> = exponents.flat_map(|e| scale(e).to_le_bytes()).collect();
        let values = Values::Codebook {
            bits: 4,
            codes: codes.into(),
            tables: Tables::one(&E2M1),
            scales: Some((Scales::Float(Float::Bf16, bytes.into()), Group::Run(RUN))),
        };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols: self.cols, pattern: Pattern::Dense, values }))
    }
}

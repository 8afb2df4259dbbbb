//! AWQ checkpoints of 4 bits: gemm packs along the outputs in an order of its own, gemv along the inputs.

use std::ops::Range;

use lacuna_format::bits::pack;
use lacuna_format::{Float, Group, Pattern, Piece, Scales, Stored, Values};

use super::config::Quantized;
use super::gptq::{packed_zeros, scale_type, turned};
use super::{Data, Fault, Module, Tensor, Tensors, unpack_row};

/// Which of the eight nibbles of a word holds output 0, 1, 2 ... of its eight.
const NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// A matrix of `outputs x inputs`.
pub(super) struct Awq {
    weight: Tensor,
    zeros: Option<Tensor>,
    scales: Tensor,
    float: Float,
    inputs: usize,
    outputs: usize,
    run: usize,
    groups: usize,
    /// gemv: packed along the inputs, and scales padded to whole words of zeros.
    along: bool,
}

pub(super) fn find(q: &Quantized, t: &Tensors<'_>, module: &str) -> Result<Option<Awq>, Fault> {
    let Some(weight) = t.get(module, "qweight") else { return Ok(None) };
    if weight.is("I16") {
        return weight.bad("I16: AWQ's gemv_fast layout is not read; gemm and gemv are");
    }
    weight.must_be("I32")?;
    let scales = t.need(module, "scales", &weight)?;
    let float = scale_type(&scales)?;
    let (high, words) = weight.two()?;
    let (a, b) = scales.two()?;
    let along = q.layout == "gemv";
    let wide = words.saturating_mul(8);
    let (inputs, outputs) = if along { (wide, high) } else { (high, wide) };
    let args = q.args(module).or(q.groups.first());
    let run = args.and_then(|g| g.group).unwrap_or(inputs).max(1);
    let groups = inputs.div_ceil(run);
    let wrong = |want: [usize; 2]| {
        scales.bad(format!("shape [{a}, {b}], expected {want:?} for groups of {run} of {inputs} inputs"))
    };
    let fits = if along { a == outputs && b >= groups && b.is_multiple_of(8) } else { (a, b) == (groups, outputs) };
    if !fits || groups == 0 || outputs == 0 {
        return wrong(if along { [outputs, groups.next_multiple_of(8)] } else { [groups, outputs] });
    }
    let zeros = match t.get(module, "qzeros") {
        None if args.is_some_and(|g| g.symmetric) => None,
        None => return weight.bad(format!("asymmetric by its configuration, and {module}.qzeros is missing")),
        Some(z) => {
            z.must_be("I32")?;
            z.must_have(&[a, b / 8])?;
            Some(z)
        }
    };
    Ok(Some(Awq { weight, zeros, scales, float, inputs, outputs, run, groups, along }))
}

/// The codes of one line of gemm's words, in their natural order.
fn ordered(words: &[u8], line: &mut [u8], codes: &mut [u8]) {
    unpack_row(words, 4, line);
    for (eight, out) in line.chunks_exact(8).zip(codes.chunks_exact_mut(8)) {
        for (o, i) in out.iter_mut().zip(NIBBLE) {
            *o = eight[i];
        }
    }
}

impl Awq {
    /// `[high, outputs]` nibbles of gemm as `[rows, high]` codes.
    fn turned(&self, bytes: &[u8], high: usize, rows: &Range<usize>) -> Vec<u8> {
        let mut all = vec![0u8; rows.len() * high];
        let (mut line, mut codes) = (vec![0; self.outputs], vec![0; self.outputs]);
        for (i, words) in bytes.chunks_exact(self.outputs / 2).enumerate() {
            ordered(words, &mut line, &mut codes);
            for (c, out) in codes[rows.clone()].iter().zip(all.iter_mut().skip(i).step_by(high)) {
                *out = *c;
            }
        }
        all
    }
}

impl Module for Awq {
    fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let all = [Some(&self.weight), Some(&self.scales), self.zeros.as_ref()];
        all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let (weight, scale) = (data(self.weight.index), data(self.scales.index));
        let size = self.float.bytes();
        let (codes, scales, zeros) = if self.along {
            let line = self.inputs / 2;
            let padded = scale.len() / size / self.outputs;
            let of = |r: usize| &scale[r * padded * size..][..self.groups * size];
            let scales = rows.clone().flat_map(|r| of(r).iter().copied()).collect::<Vec<u8>>().into();
            let zeros = self.zeros.as_ref().map(|z| {
                let (bytes, mut all) = (data(z.index), vec![0; rows.len() * self.groups]);
                for (r, out) in rows.clone().zip(all.chunks_exact_mut(self.groups)) {
                    unpack_row(&bytes[r * padded / 2..], 4, out);
                }
                all
            });
            (weight.slice(rows.start * line..rows.end * line), scales, zeros)
        } else {
            let zeros = self.zeros.as_ref().map(|z| self.turned(&data(z.index), self.groups, &rows));
            let codes = pack(&self.turned(&weight, self.inputs, &rows), 4).into();
            (codes, turned(&scale, self.outputs, rows.clone(), size), zeros)
        };
        let values = Values::Int {
            bits: 4,
            codes,
            scales: Scales::Float(self.float, scales),
            zeros: zeros.and_then(|z| packed_zeros(&z, 4)).map(Into::into),
            group: Group::Run(self.run),
        };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols: self.inputs, pattern: Pattern::Dense, values }))
    }
}

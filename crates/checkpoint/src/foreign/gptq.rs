//! GPTQ checkpoints: `qweight` packed down the inputs, `qzeros` along the outputs, `scales`, `g_idx`.

use std::ops::Range;

use bytes::Bytes;
use lacuna_format::bits::pack;
use lacuna_format::{Float, Group, Pattern, Piece, Scales, Stored, Values};

use super::compressed_tensors::order;
use super::config::Quantized;
use super::{Data, Fault, Module, Tensor, Tensors, i32s, unpack_row};
use crate::tensor::TensorType;

/// A matrix of `outputs x inputs`.
pub(super) struct Gptq {
    weight: Tensor,
    zeros: Option<Tensor>,
    scales: Tensor,
    order: Option<Tensor>,
    float: Float,
    bits: u8,
    inputs: usize,
    outputs: usize,
    groups: usize,
    run: usize,
    less_one: bool,
}

pub(super) fn find(q: &Quantized, t: &Tensors<'_>, module: &str) -> Result<Option<Gptq>, Fault> {
    let Some(weight) = t.get(module, "qweight") else { return Ok(None) };
    weight.must_be("I32")?;
    let (words, outputs) = weight.two()?;
    let scales = t.need(module, "scales", &weight)?;
    let float = scale_type(&scales)?;
    let (groups, wide) = scales.two()?;
    let args = q.args(module).or(q.groups.first());
    let told = args.map_or(4, |a| a.bits);
    // How many inputs there are is told by the order; else by the bits of the configuration.
    let order = t.get(module, "g_idx").filter(|o| o.shape != [0]);
    if order.is_none() && args.is_some_and(|a| a.ordered) && groups > 1 {
        return weight.bad(format!("ordered by its configuration (desc_act), and {module}.g_idx is missing"));
    }
    let zeros = t.get(module, "qzeros");
    if order.is_none() {
        let fits = |b: usize| {
            let inputs = words.saturating_mul(32) / b;
            let wide = zeros.as_ref().map(|z| z.shape == [groups, (outputs.saturating_mul(b)).div_ceil(32)]);
            words.saturating_mul(32).is_multiple_of(b)
                && args.and_then(|a| a.group).is_none_or(|g| inputs.div_ceil(g) == groups)
                && wide.unwrap_or(true)
        };
        if let Some(b) = [2, 3, 4, 8].into_iter().find(|b| fits(*b)).filter(|_| !fits(usize::from(told.max(1)))) {
            return weight.bad(format!(
                "{words} words down {groups} groups of inputs are {b} bits, but the configuration says {told}"
            ));
        }
    }
    let inputs = match &order {
        Some(o) => {
            o.must_be("I32")?;
            match o.shape[..] {
                [n] => n,
                _ => return o.bad(format!("shape {:?}, expected one axis", o.shape)),
            }
        }
        None => words.saturating_mul(32) / usize::from(told),
    };
    let bits = match words.checked_mul(32).and_then(|b| b.checked_div(inputs)) {
        Some(b @ (2 | 3 | 4 | 8)) if inputs * b == words * 32 => b as u8,
        _ => return weight.bad(format!("{words} words down {inputs} inputs are no packing of 2, 3, 4 or 8 bits")),
    };
    if bits != told && !q.mixed {
        return weight
            .bad(format!("{words} words down {inputs} inputs: {bits} bits, but the configuration says {told}"));
    }
    if wide != outputs || groups == 0 || groups > inputs || outputs == 0 {
        return scales.bad(format!("shape [{groups}, {wide}] for {inputs} inputs and {outputs} outputs"));
    }
    let run = match args.and_then(|a| a.group).filter(|g| inputs.div_ceil(*g) == groups) {
        Some(g) => g,
        None if inputs.is_multiple_of(groups) => inputs / groups,
        None => return scales.bad(format!("{groups} groups for {inputs} inputs")),
    };
    let zeros = match zeros {
        None if args.is_some_and(|a| a.symmetric) => None,
        None => return weight.bad(format!("asymmetric by its configuration, and {module}.qzeros is missing")),
        Some(z) => {
            z.must_be("I32")?;
            z.must_have(&[groups, (outputs * usize::from(bits)).div_ceil(32)])?;
            Some(z)
        }
    };
    if let Some(o) = order.as_ref().filter(|_| groups > 1 << 16) {
        return o.bad(format!("{groups} groups; at most {} can be named by column", 1 << 16));
    }
    let less_one = q.zeros_less_one;
    Ok(Some(Gptq { weight, zeros, scales, order, float, bits, inputs, outputs, groups, run, less_one }))
}

/// The type of scales, refused where it is none.
pub(super) fn scale_type(scales: &Tensor) -> Result<Float, Fault> {
    match scales.dtype {
        TensorType::Float(f @ (Float::F32 | Float::F16 | Float::Bf16)) => Ok(f),
        other => scales.bad(format!("{} cannot be scales; F32, F16 and BF16 can", other.name())),
    }
}

/// Columns `columns` of a `[high, wide]` matrix of `size`-byte entries as rows.
pub(super) fn turned(data: &[u8], wide: usize, columns: Range<usize>, size: usize) -> Bytes {
    let high = data.len() / size / wide;
    let mut out = vec![0; columns.len() * high * size];
    // A few columns at a time, so that a page is not fetched anew for every entry.
    for some in columns.clone().step_by(16) {
        let end = (some + 16).min(columns.end);
        for r in 0..high {
            for c in some..end {
                let (from, to) = ((r * wide + c) * size, ((c - columns.start) * high + r) * size);
                out[to..to + size].copy_from_slice(&data[from..from + size]);
            }
        }
    }
    out.into()
}

/// Zero points as codes, `None` where all are in the middle.
pub(super) fn packed_zeros(zeros: &[u8], bits: u8) -> Option<Bytes> {
    if zeros.iter().all(|&z| z == 1 << (bits - 1)) { None } else { Some(pack(zeros, bits).into()) }
}

impl Module for Gptq {
    fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    fn doubt(&self, cols: usize) -> Option<String> {
        let words = self.weight.shape.first()?;
        let bits = words.checked_mul(32)?.checked_div(cols).filter(|b| b * cols == words * 32 && *b <= 8)?;
        Some(format!("{words} words down {cols} inputs are {bits} bits, but the configuration says {}", self.bits))
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let all = [Some(&self.weight), Some(&self.scales), self.zeros.as_ref(), self.order.as_ref()];
        all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        // The words down a column are one stream of codes: turned, they are the stored form.
        let codes = turned(&data(self.weight.index), self.outputs, rows.clone(), 4);
        let scales = turned(&data(self.scales.index), self.outputs, rows.clone(), self.float.bytes());
        let zeros = self.zeros.as_ref().and_then(|z| {
            let bytes = data(z.index);
            let mut all = vec![0u8; rows.len() * self.groups];
            let mut line = vec![0; self.outputs];
            for (g, words) in bytes.chunks_exact(bytes.len() / self.groups).enumerate() {
                unpack_row(words, self.bits, &mut line);
                for (r, z) in rows.clone().zip(all.iter_mut().skip(g).step_by(self.groups)) {
                    // Stored less one, within its bits.
                    let mask = u8::MAX >> (8 - self.bits);
                    *z = if self.less_one { line[r].wrapping_add(1) & mask } else { line[r] };
                }
            }
            packed_zeros(&all, self.bits)
        });
        let group = match &self.order {
            None => Group::Run(self.run),
            Some(t) => {
                let bytes = data(t.index);
                // Columns of a model that was cut keep the numbers of groups they had.
                if let Some(g) = i32s(&bytes).find(|g| *g < 0) {
                    return t.bad(format!("group {g}"));
                }
                order(t, &bytes, self.groups, self.run)?
            }
        };
        let scales = Scales::Float(self.float, scales);
        let values = Values::Int { bits: self.bits, codes, scales, zeros: zeros.map(Into::into), group };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols: self.inputs, pattern: Pattern::Dense, values }))
    }
}

//! bitsandbytes: 4-bit codes into a table (nf4, fp4) over blocks of the flattened matrix, whose scales may be codes
//! themselves, and 8-bit integers by row.

use std::ops::Range;
use std::sync::Arc;

use lacuna_format::{Elem, Float, Group, Pattern, Piece, Scales, Stored, Tables, Values};
use serde_json::Value;

use super::config::Quantized;
use super::fp4::{halves_swapped, nibbles_from};
use super::scales::unsigned;
use super::{Data, Fault, Module, Tensor, Tensors};
use crate::json;
use crate::tensor::TensorType;

const F32: TensorType = TensorType::Float(Float::F32);
const U8: TensorType = TensorType::Uint(Elem::U8);

/// Largest description of a matrix.
const MAX_STATE: usize = 1 << 16;

/// Scales that are 8-bit codes: `table[code] * absmax[block] + offset`.
struct Nested {
    absmax: Tensor,
    table: Tensor,
    block: usize,
    offset: f32,
}

/// A matrix of `shape`, flattened, in blocks of `block`.
struct Four {
    weight: Tensor,
    absmax: Tensor,
    table: Tensor,
    state: Tensor,
    nested: Option<Nested>,
    shape: (usize, usize),
    block: usize,
}

pub(super) fn find(q: &Quantized, t: &Tensors<'_>, module: &str) -> Result<Option<Arc<dyn Module>>, Fault> {
    let Some(weight) = t.get(module, "weight") else { return Ok(None) };
    if weight.is("I8") {
        let scale = t.need(module, "SCB", &weight)?;
        let shape = weight.two()?;
        if scale.dtype != F32 || scale.shape != [shape.0] {
            return scale.bad(format!("{} {:?}, expected F32 [{}]", scale.dtype.name(), scale.shape, shape.0));
        }
        return Ok(Some(Arc::new(Eight { weight, scale, format: t.get(module, "weight_format"), shape })));
    }
    if weight.dtype != U8 {
        return Ok(None);
    }
    let state =
        ["nf4", "fp4"].iter().find_map(|kind| t.get(module, &format!("weight.quant_state.bitsandbytes__{kind}")));
    let Some(state) = state else {
        return weight.bad(format!("U8, and no {module}.weight.quant_state.bitsandbytes__{} lies beside it", q.format));
    };
    let text = (t.data)(state.index);
    if state.dtype != U8 || text.len() > MAX_STATE {
        return state.bad(format!("{} of {} bytes is no description of a matrix", state.dtype.name(), text.len()));
    }
    let says: Value = json::parse(&text).or_else(|e| state.bad(e))?;
    let whole = |key: &str| says[key].as_u64().and_then(|n| usize::try_from(n).ok());
    let sizes: Option<Vec<usize>> = says["shape"]
        .as_array()
        .and_then(|l| l.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect());
    let count = |s: &[usize]| s.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let shape = match sizes.as_deref() {
        Some(&[rows, cols]) if rows > 0 && cols > 0 && count(&[rows, cols]).is_some() => (rows, cols),
        _ => return state.bad(format!("shape is {}, expected two sizes", says["shape"])),
    };
    let n = shape.0 * shape.1;
    let block = match whole("blocksize") {
        Some(b) if (1..=1 << 24).contains(&b) => b,
        _ => return state.bad(format!("blocksize is {}", says["blocksize"])),
    };
    if count(&weight.shape) != Some(n.div_ceil(2)) {
        return weight.bad(format!("shape {:?}, expected {} bytes for {shape:?}", weight.shape, n.div_ceil(2)));
    }
    let table = t.need(module, "weight.quant_map", &weight)?;
    let absmax = t.need(module, "weight.absmax", &weight)?;
    let must = |t: &Tensor, dtype: TensorType, n: usize| match t.dtype == dtype && count(&t.shape) == Some(n) {
        true => Ok(()),
        false => t.bad(format!("{} {:?}, expected {n} of {}", t.dtype.name(), t.shape, dtype.name())),
    };
    must(&table, F32, 16)?;
    let blocks = n.div_ceil(block);
    let nested = match t.get(module, "weight.nested_absmax") {
        None => {
            must(&absmax, F32, blocks)?;
            None
        }
        Some(over) => {
            must(&absmax, U8, blocks)?;
            let table = t.need(module, "weight.nested_quant_map", &weight)?;
            must(&table, F32, 256)?;
            let (Some(block), Some(offset)) =
                (whole("nested_blocksize").filter(|b| (1..=1 << 24).contains(b)), says["nested_offset"].as_f64())
            else {
                return state.bad("nested_blocksize or nested_offset is missing");
            };
            must(&over, F32, blocks.div_ceil(block))?;
            if let Some(dtype) = says["nested_dtype"].as_str().filter(|d| *d != "float32") {
                return state.bad(format!("nested_dtype \"{dtype}\" is not read; float32 is"));
            }
            Some(Nested { absmax: over, table, block, offset: offset as f32 })
        }
    };
    if says["quant_type"] != Value::Null && !["nf4", "fp4"].contains(&says["quant_type"].as_str().unwrap_or("")) {
        return state.bad(format!("quant_type {} is not read; nf4 and fp4 are", says["quant_type"]));
    }
    Ok(Some(Arc::new(Four { weight, absmax, table, state, nested, shape, block })))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

impl Four {
    /// Scales of blocks `range`.
    fn scales(&self, range: Range<usize>, data: Data<'_>) -> Vec<f32> {
        let all = data(self.absmax.index);
        let Some(n) = &self.nested else { return floats(&all[4 * range.start..4 * range.end]) };
        let (table, over) = (floats(&data(n.table.index)), floats(&data(n.absmax.index)));
        let of = |i: usize| table[usize::from(all[i])] * over[i / n.block] + n.offset;
        range.map(of).collect()
    }
}

fn divisor(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Module for Four {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let nested = self.nested.as_ref();
        let all = [
            Some(&self.weight),
            Some(&self.absmax),
            Some(&self.table),
            Some(&self.state),
            nested.map(|n| &n.absmax),
            nested.map(|n| &n.table),
        ];
        all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let cols = self.shape.1;
        let (from, to) = (rows.start * cols, rows.end * cols);
        let bytes = data(self.weight.index);
        let codes = match from % 2 == 0 && to % 2 == 0 {
            true => halves_swapped(&bytes[from / 2..to / 2]),
            false => nibbles_from(&halves_swapped(&bytes[from / 2..to.div_ceil(2)]), from % 2, to - from),
        };
        // Blocks need not end where rows do: what divides both is a run of columns that share a scale.
        let run = divisor(self.block, cols);
        let first = from / self.block;
        let scales = self.scales(first..to.div_ceil(self.block), data);
        let each = (from..to).step_by(run).map(|i| scales[i / self.block - first]);
        let scales: Vec<u8> = each.flat_map(f32::to_le_bytes).collect();
        let tables = Tables::one(&floats(&data(self.table.index)));
        let scales = Some((Scales::Float(Float::F32, scales.into()), Group::Run(run)));
        let values = Values::Codebook { bits: 4, codes: codes.into(), tables, scales };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols, pattern: Pattern::Dense, values }))
    }
}

/// LLM.int8: signed bytes and the largest magnitude of each row.
struct Eight {
    weight: Tensor,
    scale: Tensor,
    /// How a processor wanted them laid out, once; today always row by row.
    format: Option<Tensor>,
    shape: (usize, usize),
}

impl Module for Eight {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let all = [Some(&self.weight), Some(&self.scale), self.format.as_ref()];
        all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        if let Some(f) = &self.format
            && data(f.index).iter().any(|b| *b != 0)
        {
            return f.bad("a layout of one GPU's own is not read; rows are");
        }
        let cols = self.shape.1;
        let codes = unsigned(&data(self.weight.index)[rows.start * cols..rows.end * cols]);
        let scales = floats(&data(self.scale.index)[4 * rows.start..4 * rows.end]);
        let scales: Vec<u8> = scales.iter().flat_map(|s| (s / 127.0).to_le_bytes()).collect();
        let values = Values::Int {
            bits: 8,
            codes: codes.into(),
            scales: Scales::Float(Float::F32, scales.into()),
            zeros: None,
            group: Group::Run(cols),
        };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols, pattern: Pattern::Dense, values }))
    }
}

//! sparse-bitmask and sparse-24-bitmask: which columns a row keeps, and the values kept, row by row; quantized or not.

use std::ops::Range;

use bytes::Bytes;
use lacuna_format::bits::pack;
use lacuna_format::{Pattern, Piece, Stored, Values};

use super::compressed_tensors::{Coded, named_shape};
use super::config::Quantized;
use super::{Data, Fault, Module, Tensor, Tensors};
use crate::tensor::TensorType;

/// `bitmask`, `compressed`, `shape`, and `row_offsets` where rows differ in length; `weight_scale` beside them where
/// values are codes.
pub(super) struct Sparse {
    mask: Tensor,
    values: Tensor,
    shape_of: Tensor,
    shape: (usize, usize),
    /// Values before each row.
    offsets: Option<Tensor>,
    coded: Option<Coded>,
}

pub(super) fn find(q: &Quantized, t: &Tensors<'_>, module: &str, prefix: &str, mask: Tensor) -> Result<Sparse, Fault> {
    let values = t.need(prefix, "compressed", &mask)?;
    let shape_of = t.need(prefix, "shape", &mask)?;
    let (rows, cols) = named_shape(t, &shape_of)?;
    if mask.dtype != TensorType::Uint(lacuna_format::Elem::U8) {
        return mask.bad(format!("{}, expected U8", mask.dtype.name()));
    }
    mask.must_have(&[rows, cols.div_ceil(8)])?;
    let offsets = t.get(prefix, "row_offsets");
    match (&offsets, &values.shape[..]) {
        (Some(o), [_]) => {
            o.must_be("I64")?;
            o.must_have(&[rows])?;
        }
        (Some(_), other) => return values.bad(format!("shape {other:?}, expected one axis")),
        (None, _) => values.must_have(&[rows, cols / 2])?,
    }
    let coded = match (values.dtype, t.get(module, "weight_scale")) {
        (TensorType::Float(f), None) if f.bytes() > 1 => None,
        (TensorType::Float(f), Some(_)) if f.bytes() > 1 => None,
        (TensorType::Float(_) | TensorType::Other("I8"), Some(scale)) => {
            Some(Coded::find(q, t, module, (rows, cols), values.dtype, scale)?)
        }
        (TensorType::Float(_), None) => None,
        (TensorType::Other("I8"), None) => return values.bad(format!("I8, and {module}.weight_scale is missing")),
        (other, _) => return values.bad(format!("{} cannot be weights", other.name())),
    };
    Ok(Sparse { mask, values, shape_of, shape: (rows, cols), offsets, coded })
}

impl Sparse {
    fn size(&self) -> usize {
        match self.values.dtype {
            TensorType::Float(f) => f.bytes(),
            _ => 1,
        }
    }

    /// Values before every row, and after the last; the mask counts, and everything else must agree with it.
    fn starts(&self, mask: &[u8], data: Data<'_>) -> Result<Vec<usize>, Fault> {
        let (rows, cols) = self.shape;
        let width = cols.div_ceil(8);
        let mut starts = Vec::with_capacity(rows + 1);
        starts.push(0);
        for (r, row) in mask.chunks_exact(width).enumerate() {
            if !cols.is_multiple_of(8) && row[width - 1] >> (cols % 8) != 0 {
                return self.mask.bad(format!("row {r} has bits beyond column {cols}"));
            }
            starts.push(starts[r] + row.iter().map(|b| b.count_ones() as usize).sum::<usize>());
        }
        let told: usize = self.values.shape.iter().product();
        if starts[rows] != told {
            return self.values.bad(format!("{told} values, but its bitmask keeps {}", starts[rows]));
        }
        if let Some(o) = &self.offsets {
            let data = data(o.index);
            let offsets = data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b));
            for (r, (said, counted)) in offsets.zip(&starts).enumerate() {
                if usize::try_from(said).ok() != Some(*counted) {
                    return o
                        .bad(format!("row {r} begins at {said}, but the bitmask keeps {counted} values before it"));
                }
            }
        }
        Ok(starts)
    }
}

/// Positions of two values in every run of four columns, two bits each; `None` where a run keeps more or fewer.
fn two_of_four(mask: &[u8], cols: usize) -> Option<Vec<u8>> {
    // Four bits of mask to two positions, lower first; 255 where not two bits are set.
    const NIBBLE: [u8; 16] = {
        let mut t = [255u8; 16];
        (t[0b0011], t[0b0101], t[0b1001], t[0b0110], t[0b1010], t[0b1100]) = (4, 8, 12, 9, 13, 14);
        t
    };
    if !cols.is_multiple_of(4) {
        return None;
    }
    let mut nibbles = Vec::with_capacity(mask.len() * 2);
    for row in mask.chunks_exact(cols.div_ceil(8)) {
        for run in 0..cols / 4 {
            let positions = NIBBLE[usize::from(row[run / 2] >> (run % 2 * 4) & 15)];
            if positions == 255 {
                return None;
            }
            nibbles.push(positions);
        }
    }
    Some(pack(&nibbles, 4))
}

impl Module for Sparse {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let all = [Some(&self.values), Some(&self.mask), Some(&self.shape_of), self.offsets.as_ref()];
        let mut all: Vec<_> = all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect();
        all.extend(self.coded.iter().flat_map(Coded::tensors));
        all
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let (_, cols) = self.shape;
        let width = cols.div_ceil(8);
        let mask = data(self.mask.index);
        let starts = self.starts(&mask, data)?;
        let bits = mask.slice(rows.start * width..rows.end * width);
        let (first, last) = (starts[rows.start], starts[rows.end]);
        let bytes = data(self.values.index).slice(first * self.size()..last * self.size());
        let zeros = self.coded.as_ref().map_or(Ok(None), |c| c.zeros(&rows, data))?;
        if zeros.is_some() {
            // The code of what the mask drops is 0, which with zero points is no value of 0: the matrix is dense.
            let mut all = vec![0u8; rows.len() * cols];
            let mut at = bytes.iter();
            for (i, out) in all.iter_mut().enumerate() {
                if bits[i / cols * width + i % cols / 8] >> (i % cols % 8) & 1 == 1 {
                    *out = at.next().copied().unwrap_or(0);
                }
            }
            return self.stored(rows, Pattern::Dense, all.into(), zeros, data);
        }
        let pattern = match two_of_four(&bits, cols) {
            Some(index) => Pattern::Nm { n: 2, m: 4, index: index.into() },
            None => {
                if last - first > u32::MAX as usize {
                    return self.values.bad(format!("{} values are more than an index can name", last - first));
                }
                let starts = starts[rows.start..=rows.end].iter().flat_map(|s| ((s - first) as u32).to_le_bytes());
                Pattern::Mask { height: 1, bits, starts: starts.collect::<Vec<u8>>().into() }
            }
        };
        self.stored(rows, pattern, bytes, None, data)
    }
}

impl Sparse {
    fn stored(
        &self,
        rows: Range<usize>,
        pattern: Pattern,
        bytes: Bytes,
        zeros: Option<Vec<u8>>,
        data: Data<'_>,
    ) -> Result<Stored, Fault> {
        let values = match (&self.coded, self.values.dtype) {
            (Some(c), _) => c.values(&self.values, rows.clone(), bytes, zeros, data)?,
            (None, TensorType::Float(f)) => Values::Float(f, bytes),
            (None, other) => return self.values.bad(format!("{} cannot be weights", other.name())),
        };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols: self.shape.1, pattern, values }))
    }
}

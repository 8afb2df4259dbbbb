//! FP4 (e2m1), two to a byte, with a scale for 16 columns (nvfp4: 8-bit floats, often under one f32 for the matrix) or
//! for 32 (mxfp4: powers of two).

use std::ops::Range;

use lacuna_format::bits::pack;
use lacuna_format::{Elem, Float, Group, Pattern, Piece, Scales, Stored, Tables, Values};

use super::{Data, Fault, Module, Tensor};
use crate::gguf::{FP4, powers_of_two, shifted};
use crate::tensor::TensorType;

/// What all scales of a matrix are brought together with.
pub(super) enum Over {
    /// compressed-tensors divides by it.
    Divide(Tensor),
    /// ModelOpt multiplies with it.
    Multiply(Tensor),
}

impl Over {
    fn tensor(&self) -> &Tensor {
        match self {
            Over::Divide(t) | Over::Multiply(t) => t,
        }
    }
}

/// A matrix of `rows x cols`.
pub(super) struct Fp4 {
    packed: Tensor,
    scale: Tensor,
    over: Option<Over>,
    shape: (usize, usize),
    /// Columns that share a scale.
    run: usize,
}

impl Fp4 {
    /// Checks `packed`, `[rows, cols / 2]` bytes (MLX: words), and its scales, `[rows, cols / 16 or 32]`.
    pub fn new(packed: Tensor, scale: Tensor, over: Option<Over>) -> Result<Fp4, Fault> {
        let (rows, wide) = packed.two()?;
        let per = match packed.dtype {
            TensorType::Uint(Elem::U8) => 2,
            TensorType::Uint(Elem::U32) => 8,
            other => return packed.bad(format!("{} cannot be packed FP4; U8 can", other.name())),
        };
        let Some(cols) = wide.checked_mul(per).filter(|c| *c > 0 && rows > 0) else {
            return packed.bad(format!("shape {:?} is no matrix", packed.shape));
        };
        let run = match (scale.dtype, &over) {
            (TensorType::Float(Float::F8E4m3), _) => 16,
            (TensorType::Uint(Elem::U8) | TensorType::Other("F8_E8M0"), None) => 32,
            (other, _) => return scale.bad(format!("{} cannot be scales of FP4; F8_E4M3 and U8 can", other.name())),
        };
        scale.must_have(&[rows, cols.div_ceil(run)])?;
        if let Some(over) = &over {
            let t = over.tensor();
            if t.dtype != TensorType::Float(Float::F32) || t.shape.iter().any(|d| *d != 1) {
                return t.bad(format!("{} of shape {:?}, expected one F32", t.dtype.name(), t.shape));
            }
        }
        Ok(Fp4 { packed, scale, over, shape: (rows, cols), run })
    }

    /// The same with scales of MLX's nvfp4, whose 8-bit floats are called bytes.
    pub fn with_sixteens(packed: Tensor, mut scale: Tensor) -> Result<Fp4, Fault> {
        if scale.dtype == TensorType::Uint(Elem::U8) {
            scale.dtype = TensorType::Float(Float::F8E4m3);
        }
        Fp4::new(packed, scale, None)
    }

    fn scales(&self, bytes: &[u8], zeros: impl Fn(usize) -> bool, data: Data<'_>) -> Result<(Scales, Tables), Fault> {
        if self.run == 32 {
            let mut exponents = Vec::with_capacity(bytes.len());
            for (i, e) in bytes.iter().enumerate() {
                if *e == 255 {
                    return self.scale.bad(format!("scale {i} of the rows read is no number (255)"));
                }
                exponents.push(Some(i32::from(*e) - 127).filter(|_| !zeros(i)));
            }
            let (scales, shift) = powers_of_two(&exponents);
            return Ok((scales, shifted(&FP4, shift)));
        }
        let mut scales = vec![0.0; bytes.len()];
        Float::F8E4m3.decode(bytes, &mut scales);
        let float = |scales: &[f32], float: Float| match float.encode(scales) {
            Ok(bytes) => Ok(Scales::Float(float, bytes.into())),
            Err(i) => self.scale.bad(format!("scale {i} of the rows read is {}", scales[i])),
        };
        let Some(over) = &self.over else { return Ok((float(&scales, Float::F16)?, Tables::one(&FP4))) };
        let mut one = [0.0];
        Float::F32.decode(&data(over.tensor().index), &mut one);
        let one = one[0];
        if !one.is_finite() || one == 0.0 {
            return over.tensor().bad(format!("{one} cannot be a scale"));
        }
        match over {
            Over::Divide(_) => scales.iter_mut().for_each(|s| *s /= one),
            Over::Multiply(_) => scales.iter_mut().for_each(|s| *s *= one),
        }
        Ok((float(&scales, Float::F32)?, Tables::one(&FP4)))
    }
}

impl Module for Fp4 {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        let all = [Some(&self.packed), Some(&self.scale), self.over.as_ref().map(Over::tensor)];
        all.into_iter().flatten().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let ((_, cols), groups) = (self.shape, self.shape.1.div_ceil(self.run));
        // Two to a byte, the first in the low half: the stored form.
        let codes = data(self.packed.index).slice(rows.start * cols / 2..rows.end * cols / 2);
        let bytes = data(self.scale.index).slice(rows.start * groups..rows.end * groups);
        let line = |i: usize| {
            let (r, g) = (i / groups, i % groups);
            let from = r * cols + g * self.run;
            from / 2..(r * cols + ((g + 1) * self.run).min(cols)) / 2
        };
        let zeros = |i: usize| codes[line(i)].iter().all(|b| b & 0x77 == 0);
        let (scales, tables) = self.scales(&bytes, zeros, data)?;
        let scales = Some((scales, Group::Run(self.run)));
        let values = Values::Codebook { bits: 4, codes, tables, scales };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols, pattern: Pattern::Dense, values }))
    }
}

/// Halves of bytes the other way round: what bitsandbytes puts first lies in the upper half.
pub(super) fn halves_swapped(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|b| b.rotate_left(4)).collect()
}

/// Codes of one half byte each from `from` on, as a stream of their own.
pub(super) fn nibbles_from(stream: &[u8], from: usize, count: usize) -> Vec<u8> {
    let mut codes = vec![0; count];
    lacuna_format::bits::unpack(stream, 4, from, &mut codes);
    pack(&codes, 4)
}

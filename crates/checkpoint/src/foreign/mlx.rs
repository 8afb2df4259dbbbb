//! Apple's MLX: words of codes along the inputs with `scales` and `biases` (`scale * code + bias`), or 4- and 8-bit
//! floats with scales alone. Experts of a layer lie in tensors with an axis more.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use half::{bf16, f16};
use lacuna_format::{Elem, Float, Group, Pattern, Piece, Scales, Stored, Values, Zeros};

use super::config::Quantized;
use super::fp4::Fp4;
use super::gptq::scale_type;
use super::{Args, Data, Fault, Module, Tensor, Tensors};
use crate::gguf::{powers_of_two, shifted};
use crate::tensor::TensorType;

/// A matrix of `shape`.
struct Affine {
    weight: Tensor,
    scales: Tensor,
    biases: Tensor,
    float: Float,
    shape: (usize, usize),
    bits: u8,
    run: usize,
}

pub(super) fn find(q: &Quantized, t: &Tensors<'_>, module: &str) -> Result<Option<Arc<dyn Module>>, Fault> {
    let Some(mut weight) = t.get(module, "weight") else { return Ok(None) };
    let Some(mut scales) = t.get(module, "scales") else {
        if weight.dtype == TensorType::Uint(Elem::U32) {
            return weight.bad(format!("U32, and {module}.scales is missing"));
        }
        return Ok(None);
    };
    if weight.dtype != TensorType::Uint(Elem::U32) {
        return weight.bad(format!("{}, expected U32 beside scales", weight.dtype.name()));
    }
    let Some(args) = q.args(module) else { return weight.bad("the configuration does not say its bits") };
    let mut biases = t.get(module, "biases");
    let stacked = match weight.shape[..] {
        [experts, ..] if weight.shape.len() == 3 => Some(experts),
        _ => None,
    };
    if let Some(experts) = stacked {
        // One below the other they are a matrix like all others.
        for tensor in [&mut weight, &mut scales].into_iter().chain(&mut biases) {
            flatten(tensor, experts)?;
        }
    }
    let one = whole(args, [weight, scales], biases, module)?;
    Ok(Some(match stacked {
        Some(experts) => Arc::new(Stack { all: one, experts }),
        None => one,
    }))
}

/// Takes the first of three axes away: `experts` matrices below each other.
fn flatten(tensor: &mut Tensor, experts: usize) -> Result<(), Fault> {
    let flat = match tensor.shape[..] {
        [n, rows, wide] if n == experts && n > 0 => n.checked_mul(rows).map(|high| vec![high, wide]),
        _ => None,
    };
    match flat {
        Some(flat) => tensor.shape = flat,
        None => {
            return tensor.bad(format!("shape {:?}, expected a matrix for each of {experts} experts", tensor.shape));
        }
    }
    Ok(())
}

/// Matrices of experts.
struct Stack {
    all: Arc<dyn Module>,
    experts: usize,
}

impl Module for Stack {
    fn shape(&self) -> (usize, usize) {
        self.all.shape()
    }

    fn stacked(&self) -> Option<usize> {
        Some(self.experts)
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        self.all.tensors()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        self.all.read(rows, data)
    }
}

/// A matrix of two axes.
fn whole(
    args: &Args,
    [weight, scales]: [Tensor; 2],
    biases: Option<Tensor>,
    module: &str,
) -> Result<Arc<dyn Module>, Fault> {
    let (rows, words) = weight.two()?;
    let (high, groups) = scales.two()?;
    let bits = args.bits;
    let cols = match words.checked_mul(32) {
        Some(n) if n > 0 && rows > 0 && (2..=8).contains(&bits) && n.is_multiple_of(bits.into()) => {
            n / usize::from(bits)
        }
        _ => return weight.bad(format!("{words} words of a row of {bits}-bit codes")),
    };
    let run = match args.group {
        Some(g) if high == rows && cols.is_multiple_of(g) && groups == cols / g => g,
        other => {
            return scales.bad(format!(
                "shape [{high}, {groups}] for {rows} rows of {cols} columns in groups of {}",
                other.unwrap_or(cols)
            ));
        }
    };
    if args.float {
        return Ok(match (bits, run) {
            (4, 32) => Arc::new(Fp4::new(weight, scales, None)?),
            (4, 16) => Arc::new(Fp4::with_sixteens(weight, scales)?),
            (8, 32) if scales.dtype == TensorType::Uint(Elem::U8) => {
                Arc::new(Eight { weight, scales, shape: (rows, cols) })
            }
            _ => return weight.bad(format!("floats of {bits} bits in groups of {run} are not read")),
        });
    }
    let float = scale_type(&scales)?;
    let Some(biases) = biases else {
        return weight.bad(format!("{module}.biases should lie beside it and is missing"));
    };
    if biases.dtype != scales.dtype {
        return biases.bad(format!("{}, but the scales are {}", biases.dtype.name(), scales.dtype.name()));
    }
    biases.must_have(&scales.shape)?;
    Ok(Arc::new(Affine { weight, scales, biases, float, shape: (rows, cols), bits, run }))
}

/// Floats as f16 where that changes none of them.
fn halves(float: Float, bytes: &[u8]) -> Option<Vec<u8>> {
    if float != Float::Bf16 {
        return None;
    }
    let half = |b: &[u8; 2]| {
        let x = bf16::from_le_bytes(*b).to_f32();
        let h = f16::from_f32(x);
        (h.to_f32() == x).then(|| h.to_le_bytes())
    };
    bytes.as_chunks::<2>().0.iter().map(half).collect::<Option<Vec<[u8; 2]>>>().map(|v| v.concat())
}

impl Module for Affine {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        [&self.weight, &self.scales, &self.biases].into_iter().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let cols = self.shape.1;
        let of = |t: &Tensor, line: usize| data(t.index).slice(rows.start * line..rows.end * line);
        // A row is one stream of whole words, the lowest bits first: the stored form.
        let codes = of(&self.weight, cols * usize::from(self.bits) / 8);
        let line = cols / self.run * self.float.bytes();
        let scales = of(&self.scales, line);
        // What is taken off instead of added: the sign lies in the last byte of each.
        let mut minima = of(&self.biases, line).to_vec();
        minima.chunks_exact_mut(self.float.bytes()).for_each(|b| b[b.len() - 1] ^= 0x80);
        let (float, scales, minima) = match (halves(self.float, &scales), halves(self.float, &minima)) {
            (Some(s), Some(m)) => (Float::F16, Bytes::from(s), m),
            _ => (self.float, scales, minima),
        };
        let zeros = Some(Zeros::Minima(Scales::Float(float, minima.into())));
        let scales = Scales::Float(float, scales);
        let values = Values::Int { bits: self.bits, codes, scales, zeros, group: Group::Run(self.run) };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols, pattern: Pattern::Dense, values }))
    }
}

/// mxfp8: bytes of e4m3, a power of two for 32 columns.
struct Eight {
    weight: Tensor,
    scales: Tensor,
    shape: (usize, usize),
}

impl Module for Eight {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn tensors(&self) -> Vec<(usize, &str)> {
        [&self.weight, &self.scales].into_iter().map(|t| (t.index, t.name.as_str())).collect()
    }

    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault> {
        let cols = self.shape.1;
        let codes = data(self.weight.index).slice(rows.start * cols..rows.end * cols);
        let bytes = data(self.scales.index).slice(rows.start * cols / 32..rows.end * cols / 32);
        if let Some(i) = bytes.iter().position(|e| *e == 255) {
            return self.scales.bad(format!("scale {i} of the rows read is no number (255)"));
        }
        let (scales, shift) = powers_of_two(&bytes.iter().map(|e| Some(i32::from(*e) - 127)).collect::<Vec<_>>());
        let mut table = vec![0.0; 256];
        Float::F8E4m3.decode(&(0..=255).collect::<Vec<u8>>(), &mut table);
        if let Some(i) = codes.iter().position(|c| !table[usize::from(*c)].is_finite()) {
            return self.weight.bad(format!("value {i} of the rows read is no number"));
        }
        table.iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = 0.0);
        let scales = Some((scales, Group::Run(32)));
        let values = Values::Codebook { bits: 8, codes, tables: shifted(&table, shift), scales };
        Ok(Stored::from_piece(Piece { rows: rows.len(), cols, pattern: Pattern::Dense, values }))
    }
}

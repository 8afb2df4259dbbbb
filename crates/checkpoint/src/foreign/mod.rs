//! Checkpoints that other tools compressed, kept as they are: codes stay codes, masks stay masks, nothing is rounded
//! anew.
//!
//! What the tensors say counts. A module is recognised by the tensors that lie beside each other under its name; the
//! configuration is asked only for what no tensor tells (bits that two layouts share, a group whose size several
//! divisions fit).

mod awq;
mod bitsandbytes;
mod compressed_tensors;
mod config;
mod fp4;
mod gptq;
mod marlin24;
mod mlx;
pub(crate) mod mxfp4;
mod peft;
mod scaled;
mod scales;
mod sparse;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use lacuna_format::{FormatError, Stored};

pub use config::Quantized;
pub(crate) use config::read;
use config::{Args, Method};
pub use peft::Adapter;
pub(crate) use peft::Fitted;

use crate::tensor::{TensorInfo, TensorType};

/// What is wrong, and with which tensor.
#[derive(Debug)]
pub(crate) struct Fault {
    /// Its name in the file.
    pub tensor: String,
    /// What is wrong, with the numbers.
    pub what: String,
}

impl Fault {
    fn new<T>(tensor: impl Into<String>, what: impl Into<String>) -> Result<T, Fault> {
        Err(Fault { tensor: tensor.into(), what: what.into() })
    }
}

/// A tensor of a module: all that is needed to read it later.
#[derive(Clone, Debug)]
struct Tensor {
    index: usize,
    name: String,
    shape: Vec<usize>,
    dtype: TensorType,
}

impl Tensor {
    fn bad<T>(&self, what: impl Into<String>) -> Result<T, Fault> {
        Fault::new(&self.name, what)
    }

    fn is(&self, dtype: &'static str) -> bool {
        self.dtype == TensorType::Other(dtype)
    }

    /// Refuses any other type.
    fn must_be(&self, dtype: &'static str) -> Result<(), Fault> {
        if self.is(dtype) { Ok(()) } else { self.bad(format!("{}, expected {dtype}", self.dtype.name())) }
    }

    /// Its two axes.
    fn two(&self) -> Result<(usize, usize), Fault> {
        match self.shape[..] {
            [a, b] => Ok((a, b)),
            _ => self.bad(format!("shape {:?}, expected two axes", self.shape)),
        }
    }

    /// Refuses any other shape.
    fn must_have(&self, shape: &[usize]) -> Result<(), Fault> {
        if self.shape == shape { Ok(()) } else { self.bad(format!("shape {:?}, expected {shape:?}", self.shape)) }
    }
}

/// The bytes of a tensor by its index.
pub(crate) type Data<'a> = &'a dyn Fn(usize) -> Bytes;

/// The tensors of a checkpoint by name.
pub(crate) struct Tensors<'a> {
    /// Index by name.
    pub names: &'a HashMap<String, usize>,
    /// The tensor of an index.
    pub info: &'a dyn Fn(usize) -> &'a TensorInfo,
    /// Its bytes.
    pub data: Data<'a>,
}

impl Tensors<'_> {
    fn get(&self, module: &str, suffix: &str) -> Option<Tensor> {
        let name = format!("{module}.{suffix}");
        let index = *self.names.get(&name)?;
        let info = (self.info)(index);
        Some(Tensor { index, name, shape: info.shape.clone(), dtype: info.dtype })
    }

    fn need(&self, module: &str, suffix: &str, beside: &Tensor) -> Result<Tensor, Fault> {
        match self.get(module, suffix) {
            Some(t) => Ok(t),
            None => beside.bad(format!("{module}.{suffix} should lie beside it and is missing")),
        }
    }

    /// The numbers of a small I64 (or I32) tensor: a shape.
    fn sizes(&self, t: &Tensor) -> Result<Vec<usize>, Fault> {
        let data = (self.data)(t.index);
        let numbers: Vec<i64> = match t.dtype {
            TensorType::Other("I64") if data.len() <= 64 => {
                data.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect()
            }
            TensorType::Other("I32") if data.len() <= 32 => i32s(&data).map(i64::from).collect(),
            _ => return t.bad(format!("{} of shape {:?} is no shape", t.dtype.name(), t.shape)),
        };
        match numbers.iter().map(|n| usize::try_from(*n).ok()).collect() {
            Some(sizes) => Ok(sizes),
            None => t.bad(format!("{numbers:?} is no shape")),
        }
    }
}

fn i32s(data: &[u8]) -> impl Iterator<Item = i32> + '_ {
    data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b))
}

/// A matrix as another tool stored it: several tensors, checked in their shapes when the file is opened and in their
/// values when read.
pub(crate) trait Module: Send + Sync {
    /// Rows and columns of the whole matrix.
    fn shape(&self) -> (usize, usize);
    /// How many matrices lie in it, one below the other, where it is a stack of them.
    fn stacked(&self) -> Option<usize> {
        None
    }
    /// What else a matrix of `cols` columns would say of its form, where it has another number.
    fn doubt(&self, _cols: usize) -> Option<String> {
        None
    }
    /// The tensors it is made of; the first is the one to name.
    fn tensors(&self) -> Vec<(usize, &str)>;
    /// Some of its rows. Nothing in the files is believed that the opening has not checked.
    fn read(&self, rows: Range<usize>, data: Data<'_>) -> Result<Stored, Fault>;
}

/// Rows of a foreign matrix at a place of the network, put together when asked for and kept as long as somebody holds
/// them.
pub(crate) struct Lazy {
    module: Arc<dyn Module>,
    rows: Range<usize>,
    held: Mutex<Weak<Stored>>,
}

impl Lazy {
    /// `rows` of `module`.
    pub fn new(module: Arc<dyn Module>, rows: Range<usize>) -> Lazy {
        Lazy { module, rows, held: Mutex::default() }
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The tensors behind it.
    pub fn tensors(&self) -> impl Iterator<Item = usize> + '_ {
        self.module.tensors().into_iter().map(|t| t.0)
    }

    /// The matrix, checked.
    pub fn get(&self, data: Data<'_>) -> Result<Arc<Stored>, Fault> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stored) = held.upgrade() {
            return Ok(stored);
        }
        let stored = self.module.read(self.rows.clone(), data)?;
        if let Err(FormatError { what }) = stored.check() {
            let tensors = self.module.tensors();
            return Fault::new(tensors.first().map_or("", |t| t.1), what);
        }
        let stored = Arc::new(stored);
        *held = Arc::downgrade(&stored);
        Ok(stored)
    }
}

/// The matrix of `module` where another tool stored it in its own way; `None` where a plain tensor is meant.
pub(crate) fn find(q: &Quantized, t: &Tensors<'_>, module: &str) -> Result<Option<Arc<dyn Module>>, Fault> {
    Ok(Some(match q.method {
        Method::CompressedTensors => return compressed_tensors::find(q, t, module),
        Method::Gptq => match gptq::find(q, t, module)? {
            Some(m) => Arc::new(m),
            None => return Ok(None),
        },
        Method::Awq => match awq::find(q, t, module)? {
            Some(m) => Arc::new(m),
            None => return Ok(None),
        },
        // Found by the expert: see `mxfp4`.
        Method::Mxfp4 => return Ok(None),
        Method::Scaled => return scaled::find(q, t, module),
        Method::Bitsandbytes => return bitsandbytes::find(q, t, module),
        Method::Mlx => return mlx::find(q, t, module),
    }))
}

/// Whether a tensor only tells how activations or keys and values were to be rounded, which Lacuna does not do.
pub(crate) fn about_activations(name: &str) -> bool {
    const ENDS: [&str; 12] = [
        ".input_scale",
        ".input_scale_ub",
        ".input_zero_point",
        ".input_global_scale",
        ".output_scale",
        ".output_zero_point",
        ".k_scale",
        ".v_scale",
        ".q_scale",
        ".k_zero_point",
        ".v_zero_point",
        ".q_zero_point",
    ];
    ENDS.iter().any(|e| name.ends_with(e))
}

/// One row of codes of `bits` bits, written as a stream of its own, in `codes` (overwritten).
fn unpack_row(stream: &[u8], bits: u8, codes: &mut [u8]) {
    lacuna_format::bits::unpack(stream, bits, 0, codes);
}

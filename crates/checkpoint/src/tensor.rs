//! One row of a file's table of tensors, whatever the format.

use std::ops::Range;

use lacuna_format::{Elem, Float, GgufType};

use crate::gguf::GridType;

/// How a stored tensor's values are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    /// Floats as they are.
    Float(Float),
    /// Unsigned integers: codes and indices of packed models.
    Uint(Elem),
    /// A block type of GGUF.
    Block(GgufType),
    /// A block type of GGUF that is read as codes into a table.
    Grid(GridType),
    /// Known to the format and of no use as a weight: only its name.
    Other(&'static str),
}

impl TensorType {
    /// The formats' own name, as in `BF16` or `Q4_K`.
    pub fn name(self) -> String {
        match self {
            TensorType::Float(f) => format!("{:?}", Elem::from(f)),
            TensorType::Uint(e) => format!("{e:?}"),
            TensorType::Block(t) => format!("{t:?}"),
            TensorType::Grid(t) => format!("{t:?}"),
            TensorType::Other(name) => name.into(),
        }
    }

    /// The element type that a packed model means, where there is one.
    pub(crate) fn elem(self) -> Option<Elem> {
        match self {
            TensorType::Float(f) => Some(f.into()),
            TensorType::Uint(e) => Some(e),
            _ => None,
        }
    }
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Its name in the file.
    pub name: String,
    /// Its shape, slowest axis first (GGUF files list the fastest first).
    pub shape: Vec<usize>,
    /// How values are written.
    pub dtype: TensorType,
    /// Where they lie in the file.
    pub bytes: Range<usize>,
}

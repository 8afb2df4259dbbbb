//! Big-endian files: the numbers inside the blocks of a tensor, turned.

use bytes::Bytes;
use lacuna_format::{Float, GgufType};

use super::GridType;
use crate::tensor::TensorType;

/// The types whose order in big-endian files is settled: those that gguf-py's converter knows.
pub(super) const KNOWN: [&str; 8] = ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "MXFP4"];

/// Whether it is settled how a type lies in a big-endian file.
pub(super) fn known(name: &str) -> bool {
    KNOWN.contains(&name)
}

/// Whole values or blocks of a big-endian file as a little-endian one has them.
pub(crate) fn little(dtype: TensorType, bytes: &Bytes) -> Bytes {
    // Bytes of a block, and where in it numbers of two bytes are.
    let (block, at): (usize, &[usize]) = match dtype {
        TensorType::Float(Float::F32) => {
            let mut out = bytes.to_vec();
            out.chunks_exact_mut(4).for_each(<[u8]>::reverse);
            return out.into();
        }
        TensorType::Float(Float::F16 | Float::Bf16) => (2, &[0]),
        TensorType::Block(kind @ (GgufType::Q4_0 | GgufType::Q8_0)) => (kind.block_bytes(), &[0]),
        TensorType::Block(kind @ GgufType::Q4_K) => (kind.block_bytes(), &[0, 2]),
        TensorType::Block(kind @ GgufType::Q6_K) => (kind.block_bytes(), &[208]),
        TensorType::Grid(GridType::MXFP4) => return bytes.clone(),
        _ => unreachable!("refused when the header was read"),
    };
    let mut out = bytes.to_vec();
    for block in out.chunks_exact_mut(block) {
        at.iter().for_each(|at| block.swap(*at, at + 1));
    }
    out.into()
}

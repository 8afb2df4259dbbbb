//! Floats of 8 and 4 bits with scales beside them, as DeepSeek, Qwen, FBGEMM and ModelOpt write them.

use std::sync::Arc;

use lacuna_format::{Elem, Float};

use super::compressed_tensors::{Coded, Plain};
use super::config::Quantized;
use super::fp4::{Fp4, Over};
use super::{Fault, Module, Tensors};
use crate::tensor::TensorType;

/// The matrix of `module`; `None` where its weight is plain floats.
pub(super) fn find(q: &Quantized, t: &Tensors<'_>, module: &str) -> Result<Option<Arc<dyn Module>>, Fault> {
    // AWQ of ModelOpt: its inputs would have to be divided.
    if let Some(s) = t.get(module, "pre_quant_scale") {
        return s.bad("scales of inputs (AWQ of ModelOpt) are not read");
    }
    let Some(weight) = t.get(module, "weight") else { return Ok(None) };
    let scale = t.get(module, "weight_scale_inv").or_else(|| t.get(module, "weight_scale"));
    match (weight.dtype, scale) {
        (TensorType::Float(Float::F8E4m3 | Float::F8E5m2), Some(scale)) => {
            let shape = weight.two()?;
            Ok(Some(Arc::new(Plain { bytes: Coded::find(q, t, module, shape, weight.dtype, scale)?, weight, shape })))
        }
        (TensorType::Uint(Elem::U8), Some(scale)) => {
            // nvfp4's scales of 8 bits are those of a matrix under one scale more.
            let over = match scale.dtype {
                TensorType::Float(Float::F8E4m3) => Some(t.need(module, "weight_scale_2", &weight)?),
                _ => t.get(module, "weight_scale_2"),
            };
            let over = over.map(Over::Multiply);
            Ok(Some(Arc::new(Fp4::new(weight, scale, over)?)))
        }
        (TensorType::Float(Float::F8E4m3 | Float::F8E5m2), None) => {
            weight.bad(format!("{}, and {module}.weight_scale_inv or weight_scale is missing", weight.dtype.name()))
        }
        (TensorType::Uint(Elem::U8), None) => weight.bad(format!("U8, and {module}.weight_scale is missing")),
        _ => Ok(None),
    }
}

//! How are the numbers beside the codes of a rounded matrix written?

pub(crate) mod double_quantization;

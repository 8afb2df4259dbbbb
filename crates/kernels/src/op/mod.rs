//! Operations, each written once over [`Simd`](crate::simd::Simd).

pub(crate) mod adjoint;
pub(crate) mod attention;
pub(crate) mod columns;
pub(crate) mod dot;
pub(crate) mod elementwise;
pub(crate) mod gather;
pub(crate) mod lookup;
pub(crate) mod mass;
pub(crate) mod math;
pub(crate) mod matmul;
pub(crate) mod norm;
pub(crate) mod quantize;
pub(crate) mod recurrent;
pub(crate) mod rope;
pub(crate) mod rotate;
pub(crate) mod sparse;
#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) mod tiles;

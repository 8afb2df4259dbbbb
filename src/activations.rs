//! How activations meet matrices, as the command line says it.

use clap::ValueEnum;

/// How activations meet matrices of integer codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Activations {
    /// As they are, in 32 bits.
    Exact,
    /// Rounded to 8 bits, 32 columns sharing a scale: several times faster.
    Int8,
    /// As int8, simulated for every matrix.
    SimInt8,
    /// Simulated: 4-bit whole numbers, 32 columns sharing a scale.
    SimInt4,
    /// Simulated: 8-bit floats of 4 exponent bits, a row sharing a scale.
    #[value(name = "sim-fp8-e4m3")]
    SimFp8E4m3,
    /// Simulated: 8-bit floats of 5 exponent bits, a row sharing a scale.
    #[value(name = "sim-fp8-e5m2")]
    SimFp8E5m2,
    /// Simulated: 4-bit floats, 32 columns sharing a scale.
    SimFp4,
    /// Simulated: 4-bit floats, 32 columns sharing a power of two.
    SimMxfp4,
    /// Simulated: 4-bit floats, 16 columns sharing an 8-bit scale.
    SimNvfp4,
}

impl Activations {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Activations::Exact => "exact",
            Activations::Int8 => "int8",
            Activations::SimInt8 => "sim-int8",
            Activations::SimInt4 => "sim-int4",
            Activations::SimFp8E4m3 => "sim-fp8-e4m3",
            Activations::SimFp8E5m2 => "sim-fp8-e5m2",
            Activations::SimFp4 => "sim-fp4",
            Activations::SimMxfp4 => "sim-mxfp4",
            Activations::SimNvfp4 => "sim-nvfp4",
        }
    }
}

impl From<Activations> for lacuna_kernels::Activations {
    fn from(a: Activations) -> lacuna_kernels::Activations {
        use lacuna_kernels::Activations::Simulated;
        use lacuna_kernels::Simulated::{Fp4, Fp8E4m3, Fp8E5m2, Int4, Int8, Mxfp4, Nvfp4};
        match a {
            Activations::Exact => lacuna_kernels::Activations::Exact,
            Activations::Int8 => lacuna_kernels::Activations::Int8,
            Activations::SimInt8 => Simulated(Int8),
            Activations::SimInt4 => Simulated(Int4),
            Activations::SimFp8E4m3 => Simulated(Fp8E4m3),
            Activations::SimFp8E5m2 => Simulated(Fp8E5m2),
            Activations::SimFp4 => Simulated(Fp4),
            Activations::SimMxfp4 => Simulated(Mxfp4),
            Activations::SimNvfp4 => Simulated(Nvfp4),
        }
    }
}

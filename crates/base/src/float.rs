//! Small floats: 8-bit formats as f32, and bulk conversion of little-endian bytes.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// F8 E4M3 (no infinities, one NaN pattern, bias 7; the "FN" form of the Open Compute Project) as f32.
pub fn f8_e4m3(byte: u8) -> f32 {
    let sign = if byte & 0x80 != 0 { -1.0 } else { 1.0 };
    let (e, m) = ((byte >> 3) & 0xF, byte & 7);
    match (e, m) {
        (0xF, 7) => f32::NAN,
        (0, m) => sign * f32::from(m) * 2f32.powi(-9),
        (e, m) => sign * (1.0 + f32::from(m) / 8.0) * 2f32.powi(i32::from(e) - 7),
    }
}

/// F8 E5M2 (IEEE-like, bias 15) as f32: the upper byte of an f16.
pub fn f8_e5m2(byte: u8) -> f32 {
    f16::from_bits(u16::from(byte) << 8).to_f32()
}

/// Little-endian f16 bytes to f32; `out.len()` values are read.
#[track_caller]
pub fn f16_to_f32(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * 2, "two bytes a value");
    // Converted by the slice: the processor's own instruction is looked up once for many values.
    let mut halves = [f16::ZERO; 64];
    for (o, b) in out.chunks_mut(64).zip(bytes.chunks(128)) {
        for (h, b) in halves.iter_mut().zip(b.chunks_exact(2)) {
            *h = f16::from_le_bytes([b[0], b[1]]);
        }
        halves[..o.len()].convert_to_f32_slice(o);
    }
}

/// Little-endian bf16 bytes to f32.
#[track_caller]
pub fn bf16_to_f32(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * 2, "two bytes a value");
    for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
    }
}

/// Little-endian f32 bytes to f32.
#[track_caller]
pub fn f32_from_le(bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * 4, "four bytes a value");
    for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
}

/// The nearest f16 of a value, as f32. Values beyond the range of f16 become infinite.
pub fn round_f16(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// The nearest bf16 of a value, as f32.
pub fn round_bf16(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats() {
        assert_eq!(f8_e4m3(0x38), 1.0);
        assert_eq!(f8_e4m3(0x7E), 448.0);
        assert_eq!(f8_e4m3(0x81), -(2f32.powi(-9)));
        assert!(f8_e4m3(0xFF).is_nan());
        assert_eq!(f8_e5m2(0x3C), 1.0);
        assert_eq!(f8_e5m2(0x7C), f32::INFINITY);
    }
}

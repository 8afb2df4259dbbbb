//! Vectors of f32 lanes, one implementation for each instruction set.
//!
//! An operation is written once over [`Simd`] as an [`Op`]; [`dispatch`] runs it inside a function that has the instruction set enabled,
//! into which everything inlines. A token (`Avx2`, `Avx512`) exists only where the processor has the instructions, which is what makes
//! the register-only methods safe.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::Isa;

/// f32 lanes and the few integer loads that decoding needs. All methods inline into the caller's instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector; divides 32.
    const LANES: usize;
    /// A vector.
    type V: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `p` is readable for `LANES` values.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `p` is writable for `LANES` values.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a > b ? a : b` (the second where either is NaN).
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b` (the second where either is NaN).
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? x : y`, lane by lane; a NaN compares false.
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// To the nearest whole number, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^a` for whole `a` in -126..=127.
    fn pow2(self, a: Self::V) -> Self::V;
    /// The sums of four vectors, every one in the same fixed tree.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];
    /// One f16 as f32.
    fn f16(self, bits: u16) -> f32;
    /// `LANES` little-endian f16.
    /// # Safety
    /// `p` is readable for `2 * LANES` bytes.
    unsafe fn load_f16(self, p: *const u8) -> Self::V;
    /// `LANES` little-endian bf16.
    /// # Safety
    /// `p` is readable for `2 * LANES` bytes.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;
    /// `LANES` unsigned bytes.
    /// # Safety
    /// `p` is readable for `LANES` bytes.
    unsafe fn load_u8(self, p: *const u8) -> Self::V;
    /// `LANES` signed bytes.
    /// # Safety
    /// `p` is readable for `LANES` bytes.
    unsafe fn load_i8(self, p: *const u8) -> Self::V;
    /// `LANES` codes of 4 bits, two to a byte, lower half first.
    /// # Safety
    /// `p` is readable for `LANES / 2` bytes.
    unsafe fn load_u4(self, p: *const u8) -> Self::V;
    /// The lower (or upper) halves of `LANES` bytes.
    /// # Safety
    /// `p` is readable for `LANES` bytes.
    unsafe fn load_half_bytes(self, p: *const u8, upper: bool) -> Self::V;

    /// The sum of all lanes, in the tree of [`Simd::sum4`].
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let z = self.splat(0.0);
        self.sum4([v, z, z, z])[0]
    }
}

/// An operation generic over the instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Op {
    /// What it returns.
    type Out;
    /// Runs it.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// Runs `op` with the instructions of `isa`. Panics where the processor lacks them.
#[inline]
pub(crate) fn dispatch<O: Op>(isa: Isa, op: O) -> O::Out {
    match isa {
        Isa::Portable => op.run(portable::Portable),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::run(op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::run(op),
        #[cfg(not(target_arch = "x86_64"))]
        _ => panic!("{isa} is not compiled in for this processor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct All;
    impl Op for All {
        type Out = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let n = S::LANES;
            let bytes: Vec<u8> = (0..64u8).map(|i| i.wrapping_mul(37).wrapping_add(11)).collect();
            let read = |v: S::V| {
                let mut out = vec![0.0f32; n];
                // SAFETY: the buffer holds LANES values.
                unsafe { s.store(out.as_mut_ptr(), v) };
                out
            };
            // SAFETY: 64 bytes are there and no load reads more than 2 * 16.
            unsafe {
                let p = bytes.as_ptr();
                assert_eq!(read(s.load_u8(p)), bytes[..n].iter().map(|&b| f32::from(b)).collect::<Vec<_>>());
                assert_eq!(read(s.load_i8(p)), bytes[..n].iter().map(|&b| f32::from(b as i8)).collect::<Vec<_>>());
                let nibble = |i: usize| f32::from(bytes[i / 2] >> (4 * (i % 2)) & 15);
                assert_eq!(read(s.load_u4(p)), (0..n).map(nibble).collect::<Vec<_>>());
                assert_eq!(
                    read(s.load_half_bytes(p, true)),
                    bytes[..n].iter().map(|&b| f32::from(b >> 4)).collect::<Vec<_>>()
                );
                assert_eq!(
                    read(s.load_half_bytes(p, false)),
                    bytes[..n].iter().map(|&b| f32::from(b & 15)).collect::<Vec<_>>()
                );
            }
            let mut halves = Vec::new();
            let mut brains = Vec::new();
            let plain: Vec<f32> = (0..n).map(|i| (i as f32 - 3.3) * 1.7e-3).collect();
            for &x in &plain {
                halves.extend(half::f16::from_f32(x).to_le_bytes());
                brains.extend(half::bf16::from_f32(x).to_le_bytes());
            }
            // SAFETY: both hold LANES values of two bytes.
            unsafe {
                let want: Vec<f32> = plain.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
                assert_eq!(read(s.load_f16(halves.as_ptr())), want);
                let want: Vec<f32> = plain.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
                assert_eq!(read(s.load_bf16(brains.as_ptr())), want);
            }
            for e in [-126i32, -3, 0, 1, 127] {
                assert_eq!(read(s.pow2(s.splat(e as f32)))[0], 2f32.powi(e));
            }
            assert_eq!(read(s.round(s.splat(2.5)))[0], 2.0);
            assert_eq!(read(s.round(s.splat(-3.7)))[0], -4.0);
            assert_eq!(s.f16(0x3C00), 1.0);
            let ramp: Vec<f32> = (0..n).map(|i| i as f32).collect();
            // SAFETY: LANES values.
            let r = unsafe { s.load(ramp.as_ptr()) };
            let total: f32 = ramp.iter().sum();
            let two = s.splat(2.0);
            assert_eq!(
                s.sum4([r, s.mul(r, two), s.sub(r, two), s.splat(1.0)]),
                [total, 2.0 * total, total - 2.0 * n as f32, n as f32]
            );
            assert_eq!(s.sum(r), total);
            let nan = s.splat(f32::NAN);
            assert_eq!(read(s.select_lt(nan, two, r, two))[0], 2.0);
            assert_eq!(read(s.select_lt(s.splat(1.0), two, r, two)), ramp);
            assert_eq!(read(s.max(nan, two))[0], 2.0);
            assert!(read(s.max(two, nan))[0].is_nan() && read(s.min(two, nan))[0].is_nan());
        }
    }

    #[test]
    fn every_isa_does_what_it_says() {
        for isa in Isa::here() {
            dispatch(isa, All);
        }
    }
}

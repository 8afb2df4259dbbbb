//! Eight lanes in plain Rust; compilers turn them into whatever the baseline has.

use half::{bf16, f16};

use super::Simd;

/// Any processor.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; 8];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    let mut o = a;
    for i in 0..8 {
        o[i] = f(a[i], b[i]);
    }
    o
}

#[inline(always)]
fn fill(f: impl Fn(usize) -> f32) -> V {
    let mut o = [0.0; 8];
    for (i, x) in o.iter_mut().enumerate() {
        *x = f(i);
    }
    o
}

/// # Safety
/// `p` is readable for `N` bytes.
#[inline(always)]
unsafe fn bytes<const N: usize>(p: *const u8) -> [u8; N] {
    // SAFETY: as the caller promises; arrays of bytes have no alignment.
    unsafe { *p.cast::<[u8; N]>() }
}

impl Simd for Portable {
    const LANES: usize = 8;
    type V = V;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller promises LANES readable values.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller promises LANES writable values.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // A real fused operation would be a library call on processors without one; two roundings are this row's arithmetic.
        let mut o = c;
        for i in 0..8 {
            o[i] += a[i] * b[i];
        }
        o
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x / y)
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        fill(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn round(self, a: V) -> V {
        // Adding and taking away 1.5 * 2^23 rounds to even wherever it matters; larger values are whole already.
        const BIG: f32 = 12_582_912.0;
        fill(|i| if a[i].abs() < 4_194_304.0 { (a[i] + BIG) - BIG } else { a[i] })
    }
    #[inline(always)]
    fn pow2(self, a: V) -> V {
        fill(|i| f32::from_bits((((a[i] as i32) + 127) << 23) as u32))
    }
    #[inline(always)]
    fn sum4(self, v: [V; 4]) -> [f32; 4] {
        let mut o = [0.0; 4];
        for (o, v) in o.iter_mut().zip(v) {
            *o = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
        }
        o
    }
    #[inline(always)]
    fn f16(self, bits: u16) -> f32 {
        f16::from_bits(bits).to_f32_const()
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> V {
        // SAFETY: the caller promises 2 * LANES bytes.
        let b = unsafe { bytes::<16>(p) };
        fill(|i| f16::from_le_bytes([b[2 * i], b[2 * i + 1]]).to_f32_const())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> V {
        // SAFETY: the caller promises 2 * LANES bytes.
        let b = unsafe { bytes::<16>(p) };
        fill(|i| bf16::from_le_bytes([b[2 * i], b[2 * i + 1]]).to_f32())
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> V {
        // SAFETY: the caller promises LANES bytes.
        let b = unsafe { bytes::<8>(p) };
        fill(|i| f32::from(b[i]))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> V {
        // SAFETY: the caller promises LANES bytes.
        let b = unsafe { bytes::<8>(p) };
        fill(|i| f32::from(b[i] as i8))
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> V {
        // SAFETY: the caller promises LANES / 2 bytes.
        let b = unsafe { bytes::<4>(p) };
        fill(|i| f32::from(b[i / 2] >> (4 * (i % 2)) & 15))
    }
    #[inline(always)]
    unsafe fn load_half_bytes(self, p: *const u8, upper: bool) -> V {
        // SAFETY: the caller promises LANES bytes.
        let b = unsafe { bytes::<8>(p) };
        fill(|i| f32::from(if upper { b[i] >> 4 } else { b[i] & 15 }))
    }
}

//! Eight lanes in plain Rust; compilers turn them into whatever the baseline has.
//!
//! Where processors without an instruction set of their own are rare (x86-64) or none (AArch64), long methods may stay
//! calls: inlined everywhere, they were half of all code of this crate. With debug assertions all of them do: that
//! takes a third less time to build.

use half::{bf16, f16};

use super::Simd;

/// Any processor.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type V = [f32; 8];

/// 1.5 * 2^23: what is added to it becomes whole.
const BIG: f32 = 12_582_912.0;

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
    type I = I;
    type W = W;

    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn splat(self, x: f32) -> V {
        [x; 8]
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller promises LANES readable values.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller promises LANES writable values.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn fma(self, a: V, b: V, c: V) -> V {
        // A real fused operation would be a library call on processors without one; two roundings are this row's
        // arithmetic.
        let mut o = c;
        for i in 0..8 {
            o[i] += a[i] * b[i];
        }
        o
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x + y)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x - y)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x * y)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |x, y| x / y)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn select_lt(self, a: V, b: V, x: V, y: V) -> V {
        fill(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn round(self, a: V) -> V {
        // Adding and taking it away rounds to even wherever it matters; larger values are whole already.
        fill(|i| if a[i].abs() < 4_194_304.0 { (a[i] + BIG) - BIG } else { a[i] })
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn pow2(self, a: V) -> V {
        fill(|i| f32::from_bits((((a[i] as i32) + 127) << 23) as u32))
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn sum(self, v: V) -> f32 {
        ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]))
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn row_sums(self, p: *const f32) -> V {
        // SAFETY: the caller promises LANES * LANES values.
        fill(|i| self.sum(unsafe { self.load(p.add(8 * i)) }))
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn load_f16(self, p: *const u8) -> V {
        // SAFETY: the caller promises 2 * LANES bytes.
        let b = unsafe { bytes::<16>(p) };
        fill(|i| f16::from_le_bytes([b[2 * i], b[2 * i + 1]]).to_f32_const())
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn load_bf16(self, p: *const u8) -> V {
        // SAFETY: the caller promises 2 * LANES bytes.
        let b = unsafe { bytes::<16>(p) };
        fill(|i| bf16::from_le_bytes([b[2 * i], b[2 * i + 1]]).to_f32())
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn load_i8(self, p: *const i8) -> V {
        // SAFETY: the caller promises LANES bytes.
        let b = unsafe { bytes::<8>(p.cast()) };
        fill(|i| f32::from(b[i] as i8))
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn fused(self, a: V, b: V, c: V) -> V {
        fill(|i| a[i].mul_add(b[i], c[i]))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn top(self, a: V) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn compress(self, a: V, mask: u32) -> V {
        let (mut o, mut n) = (a, 0);
        for (i, &x) in a.iter().enumerate() {
            o[n % 8] = x;
            n += (mask >> i & 1) as usize;
        }
        o
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn flip(self, a: V, mask: u32) -> V {
        fill(|i| f32::from_bits(a[i].to_bits() ^ (mask >> i << 31)))
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn expand_f16(self, p: *const u8, mask: u32) -> V {
        // SAFETY: the caller promises 2 * LANES bytes.
        let b = unsafe { bytes::<16>(p) };
        ranked(mask, |i| f16::from_le_bytes([b[2 * i], b[2 * i + 1]]).to_f32_const())
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn expand_f32(self, p: *const u8, mask: u32) -> V {
        // SAFETY: the caller promises 4 * LANES bytes.
        let b = unsafe { bytes::<32>(p) };
        ranked(mask, |i| f32::from_le_bytes([b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]]))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn spread<const PAIR: bool>(self, p: *const f32) -> V {
        // SAFETY: the caller promises a value, or two.
        unsafe { if PAIR { fill(|i| *p.add(i % 2)) } else { [*p; 8] } }
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn lookup(self, table: *const f32, _: usize, index: I) -> V {
        // SAFETY: the caller promises indices inside.
        fill(|i| unsafe { *table.add(index[i] as usize) })
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn splat_i(self, x: i32) -> I {
        [x as u32; 8]
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn spread_i<const PAIR: bool>(self, p: *const i32) -> I {
        // SAFETY: the caller promises a value, or two.
        unsafe { if PAIR { map(|i| *p.add(i % 2) as u32) } else { [*p as u32; 8] } }
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn load_i(self, p: *const u8) -> I {
        // SAFETY: the caller promises 4 * LANES bytes.
        let b = unsafe { bytes::<32>(p) };
        map(|i| u32::from_le_bytes([b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]]))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn store_i(self, p: *mut u8, a: I) {
        let all = a.map(u32::to_le_bytes);
        // SAFETY: the caller promises 4 * LANES bytes.
        unsafe { p.cast::<[[u8; 4]; 8]>().write_unaligned(all) };
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn widen(self, p: *const u8) -> I {
        // SAFETY: the caller promises LANES bytes.
        let b = unsafe { bytes::<8>(p) };
        map(|i| u32::from(b[i]))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn widen_words(self, p: *const u8) -> I {
        // SAFETY: the caller promises 2 * LANES bytes.
        let b = unsafe { bytes::<16>(p) };
        map(|i| u32::from(u16::from_le_bytes([b[2 * i], b[2 * i + 1]])))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn and_i(self, a: I, byte: u8) -> I {
        let mask = u32::from(byte) * 0x0101_0101;
        map(|i| a[i] & mask)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn or_i(self, a: I, b: I) -> I {
        map(|i| a[i] | b[i])
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn shr_i(self, a: I, n: u32) -> I {
        let mask = (0xFFFFu32 >> n) * 0x1_0001;
        map(|i| a[i] >> n & mask)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn shl_i(self, a: I, n: u32) -> I {
        let mask = (0xFFFFu32 << n & 0xFFFF) * 0x1_0001;
        map(|i| a[i] << n & mask)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn byte(self, a: I, j: usize) -> I {
        map(|i| a[i] >> (8 * j) & 0xFF)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn float(self, a: I) -> V {
        fill(|i| a[i] as i32 as f32)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn sub_i(self, a: I, b: I) -> I {
        map(|i| a[i].wrapping_sub(b[i]))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn sub_bytes(self, a: I, b: I) -> I {
        map(|i| {
            let (a, b) = (a[i].to_le_bytes(), b[i].to_le_bytes());
            u32::from_le_bytes(std::array::from_fn(|j| a[j].wrapping_sub(b[j])))
        })
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn less_product(self, a: I, b: I, c: I) -> I {
        map(|i| a[i].wrapping_sub(b[i].wrapping_mul(c[i])))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn total(self, _: usize, state: [I; 2]) -> I {
        state[0]
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    fn dot(self, _: usize, state: [I; 2], c: [I; 2], x: [I; 2]) -> [I; 2] {
        let sum = map(|i| {
            let mut sum = state[0][i] as i32;
            for (c, x) in c.iter().zip(&x) {
                for (c, x) in c[i].to_le_bytes().into_iter().zip(x[i].to_le_bytes()) {
                    sum += i32::from(c) * i32::from(x as i8);
                }
            }
            sum as u32
        });
        [sum, state[1]]
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn interleave(self, a: V, b: V) -> [V; 2] {
        let (mut low, mut high) = (a, b);
        for i in 0..4 {
            (low[2 * i], low[2 * i + 1]) = (a[i], b[i]);
            (high[2 * i], high[2 * i + 1]) = (a[4 + i], b[4 + i]);
        }
        [low, high]
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn keep(self, x: *const i8, mask: u32, out: *mut i8) {
        let (mut kept, mut n) = ([0i8; 32], 0);
        for i in 0..32 {
            if mask >> i & 1 == 1 {
                // SAFETY: the caller promises 32 bytes.
                kept[n] = unsafe { *x.add(i) };
                n += 1;
            }
        }
        // SAFETY: the caller promises room for 32 bytes.
        unsafe { out.copy_from_nonoverlapping(kept.as_ptr(), 32) };
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn turns(self, a: *const i8, b: *const i8, out: *mut i8) {
        for i in 0..64 {
            let from = if i / 4 % 2 == 0 { a } else { b };
            // SAFETY: the caller promises 32 bytes of each and room for 64.
            unsafe { *out.add(i) = *from.add(i / 8 * 4 + i % 4) };
        }
    }
    #[cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), inline(always))]
    unsafe fn pick(self, x: *const i8, index: I) -> I {
        // SAFETY: the caller promises 16 bytes.
        let x = unsafe { bytes::<16>(x.cast()) };
        map(|i| u32::from_le_bytes(index[i].to_le_bytes().map(|j| x[usize::from(j & 15)])))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn up_i(self, a: I, n: I) -> I {
        map(|i| a[i] << n[i])
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn xor_i(self, a: I, b: I) -> I {
        map(|i| a[i] ^ b[i])
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn tops(self, p: *const f32) -> V {
        // SAFETY: the caller promises 32 values.
        let x = unsafe { p.cast::<[f32; 32]>().read_unaligned() };
        fill(|i| f32::from_bits((0..4).fold(0, |t, j| t.max(x[i + 8 * j].abs().to_bits()))))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn row_tops(self, p: *const f32) -> V {
        // SAFETY: the caller promises LANES * LANES values.
        fill(|i| f32::from_bits(unsafe { self.load(p.add(8 * i)) }.iter().fold(0, |t, x| t.max(x.to_bits()))))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn words(self, p: *const f32, by: f32) -> W {
        // SAFETY: the caller promises 32 values.
        let x = unsafe { p.cast::<[f32; 32]>().read_unaligned() };
        x.map(|x| (x * by + BIG - BIG) as i16)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn load_w(self, p: *const i16) -> W {
        // SAFETY: the caller promises 32 values.
        unsafe { p.cast::<W>().read_unaligned() }
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn store_w(self, p: *mut i16, a: W) {
        // SAFETY: the caller promises room for 32 values.
        unsafe { p.cast::<W>().write_unaligned(a) }
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    unsafe fn store_bytes(self, p: *mut i8, a: W) {
        // SAFETY: the caller promises room for 32 bytes.
        unsafe { *p.cast::<[i8; 32]>() = a.map(|a| a as i8) }
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn splat_w(self, first: i16, second: i16) -> W {
        words(|i| if i < 16 { first } else { second })
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn sub_w(self, a: W, b: W) -> W {
        words(|i| a[i].wrapping_sub(b[i]))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn low_w(self, a: W, b: W) -> W {
        words(|i| a[i].wrapping_mul(b[i]))
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn high_w(self, a: W, b: W) -> W {
        words(|i| ((i32::from(a[i]) * i32::from(b[i]) + (1 << 14)) >> 15) as i16)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn down_w<const N: u32>(self, a: W) -> W {
        words(|i| a[i] >> N)
    }
    #[cfg_attr(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), debug_assertions)), inline(always))]
    fn products_w(self, a: W, b: W) -> I {
        map(|i| (0..4).map(|j| i32::from(a[i + 8 * j]) * i32::from(b[i + 8 * j])).sum::<i32>() as u32)
    }
}

type W = [i16; 32];

#[inline(always)]
fn words(f: impl Fn(usize) -> i16) -> W {
    std::array::from_fn(f)
}

type I = [u32; 8];

#[inline(always)]
fn map(f: impl Fn(usize) -> u32) -> I {
    let mut o = [0; 8];
    for (i, x) in o.iter_mut().enumerate() {
        *x = f(i);
    }
    o
}

/// `f` of each set bit's rank; 0 elsewhere.
#[inline(always)]
fn ranked(mask: u32, f: impl Fn(usize) -> f32) -> V {
    let mut next = 0;
    let mut o = [0.0; 8];
    for (i, x) in o.iter_mut().enumerate() {
        if mask >> i & 1 == 1 {
            *x = f(next);
            next += 1;
        }
    }
    o
}

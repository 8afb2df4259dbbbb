//! Vectors of f32 lanes, one implementation for each instruction set.
//!
//! An operation is written once over [`Simd`] as an [`Op`]; [`dispatch`] runs it inside a function that has the
//! instruction set enabled, into which everything inlines. A token (`Avx2`, `Avx512`, `Neon`) exists only where the
//! processor has the instructions, which is what makes the register-only methods safe.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod masks;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(any(test, target_arch = "x86_64"))]
pub(crate) mod unit;

use crate::Isa;

/// f32 lanes, and the integer ones that codes need. All methods inline into the caller's instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector; divides 32.
    const LANES: usize;
    /// A vector of f32.
    type V: Copy;
    /// A vector of as many 32-bit integers, or of four times as many bytes.
    type I: Copy;
    /// 32 integers of 16 bits, a block of columns: its two halves one after the other, each in an order that only
    /// `words` and `store_bytes` know.
    type W: Copy;

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
    /// The sum of all lanes, in a fixed tree.
    fn sum(self, v: Self::V) -> f32;
    /// The sums of as many vectors as there are lanes, one after the other at `p`; each in a tree of its own.
    /// # Safety
    /// `p` is readable for `LANES * LANES` values.
    unsafe fn row_sums(self, p: *const f32) -> Self::V;
    /// `LANES` little-endian f16.
    /// # Safety
    /// `p` is readable for `2 * LANES` bytes.
    unsafe fn load_f16(self, p: *const u8) -> Self::V;
    /// `LANES` little-endian bf16.
    /// # Safety
    /// `p` is readable for `2 * LANES` bytes.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;
    /// `LANES` signed bytes.
    /// # Safety
    /// `p` is readable for `LANES` bytes.
    unsafe fn load_i8(self, p: *const i8) -> Self::V;
    /// `a * b + c`, rounded once on every processor, however slowly.
    fn fused(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The largest lane; none is NaN.
    fn top(self, a: Self::V) -> f32;
    /// The lanes whose bit is set, moved together from lane 0 on; the others hold anything.
    fn compress(self, a: Self::V, mask: u32) -> Self::V;
    /// `-a` in the lanes whose bit is set, `a` in the others; bits beyond the lanes are ignored.
    fn flip(self, a: Self::V, mask: u32) -> Self::V;
    /// `a[0], b[0], a[1], b[1]` and so on.
    fn interleave(self, a: Self::V, b: Self::V) -> [Self::V; 2];
    /// Of the 32 bytes at `x` those whose bit is set in `mask`, moved together, zeros after them: 32 bytes to `out`.
    /// # Safety
    /// `x` is readable for 32 bytes, `out` writable for as many.
    unsafe fn keep(self, x: *const i8, mask: u32, out: *mut i8);
    /// Four bytes of `a` and four of `b` by turns, 32 of each.
    /// # Safety
    /// Both are readable for 32 bytes, `out` is writable for 64.
    unsafe fn turns(self, a: *const i8, b: *const i8, out: *mut i8);
    /// Packed f16, one for each set bit, to the lanes of the bits; the others are 0.
    /// # Safety
    /// `p` is readable for `2 * LANES` bytes.
    unsafe fn expand_f16(self, p: *const u8, mask: u32) -> Self::V;
    /// As `expand_f16` for two columns one after the other, 16 bits of mask each, in vectors of 16 lanes only.
    /// # Safety
    /// `p` is readable for 64 bytes.
    #[inline(always)]
    unsafe fn expand_two_f16(self, p: *const u8, mask: u32) -> [Self::V; 2] {
        // SAFETY: as the caller promises.
        unsafe {
            let then = p.add(2 * (mask & 0xFFFF).count_ones() as usize);
            [self.expand_f16(p, mask & 0xFFFF), self.expand_f16(then, mask >> 16)]
        }
    }
    /// As `expand_f16` with packed f32.
    /// # Safety
    /// `p` is readable for `4 * LANES` bytes.
    unsafe fn expand_f32(self, p: *const u8, mask: u32) -> Self::V;
    /// All lanes `*p`; with `PAIR` even lanes `p[0]` and odd lanes `p[1]`.
    /// # Safety
    /// `p` is readable for one value, with `PAIR` for two.
    unsafe fn spread<const PAIR: bool>(self, p: *const f32) -> Self::V;
    /// `table[index]`.
    /// # Safety
    /// Every index is below `n`, the table's length; `n` is 16 or more where it is not below.
    unsafe fn lookup(self, table: *const f32, n: usize, index: Self::I) -> Self::V;

    /// `table[index]`, 32 bits each.
    /// # Safety
    /// Every index is below the table's length.
    #[inline(always)]
    unsafe fn entries(self, table: *const u32, index: Self::I) -> Self::I {
        let mut all = [0u32; 16];
        // SAFETY: as the caller promises; there are at most 16 lanes.
        unsafe {
            self.store_i(all.as_mut_ptr().cast(), index);
            let mut i = 0;
            while i < Self::LANES {
                all[i] = (*table.add(u32::from_le(all[i]) as usize)).to_le();
                i += 1;
            }
            self.load_i(all.as_ptr().cast())
        }
    }
    /// `zero + a` byte by byte, or `zero - a` where the bit of the byte is set among four of every lane of `signs`, from
    /// bit `from` on.
    #[inline(always)]
    fn signed(self, a: Self::I, signs: Self::I, from: usize, zero: u8) -> Self::I {
        let (mut bytes, mut bits) = ([0u8; 64], [0u8; 64]);
        // SAFETY: there are at most 16 lanes.
        unsafe {
            self.store_i(bytes.as_mut_ptr(), a);
            self.store_i(bits.as_mut_ptr(), signs);
            let mut i = 0;
            while i < 4 * Self::LANES {
                let minus = bits[i / 4 * 4 + from / 8] >> (from % 8 + i % 4) & 1 == 1;
                bytes[i] = if minus { zero.wrapping_sub(bytes[i]) } else { zero.wrapping_add(bytes[i]) };
                i += 1;
            }
            self.load_i(bytes.as_ptr())
        }
    }

    /// All lanes `x`.
    fn splat_i(self, x: i32) -> Self::I;
    /// As `spread`.
    /// # Safety
    /// As for `spread`.
    unsafe fn spread_i<const PAIR: bool>(self, p: *const i32) -> Self::I;
    /// # Safety
    /// `p` is readable for `4 * LANES` bytes.
    unsafe fn load_i(self, p: *const u8) -> Self::I;
    /// # Safety
    /// `p` is writable for `4 * LANES` bytes.
    // Only tiles ask for it, and there are some on one kind of processor.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    unsafe fn store_i(self, p: *mut u8, a: Self::I);
    /// `LANES` unsigned bytes.
    /// # Safety
    /// `p` is readable for `LANES` bytes.
    unsafe fn widen(self, p: *const u8) -> Self::I;
    /// `LANES` unsigned numbers of 16 bits.
    /// # Safety
    /// `p` is readable for `2 * LANES` bytes.
    unsafe fn widen_words(self, p: *const u8) -> Self::I;
    /// Every byte and `byte`.
    fn and_i(self, a: Self::I, byte: u8) -> Self::I;
    /// Bits of both.
    fn or_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Every pair of bytes, as a little-endian number, `n` bits down.
    fn shr_i(self, a: Self::I, n: u32) -> Self::I;
    /// Every pair of bytes `n` bits up.
    fn shl_i(self, a: Self::I, n: u32) -> Self::I;
    /// Of every byte the bits of `mask`, which begins at bit 0, found from bit `from` on and moved to bit `to` on; the
    /// others are 0.
    #[inline(always)]
    fn moved(self, a: Self::I, from: usize, to: usize, mask: u8) -> Self::I {
        let a = match from.cmp(&to) {
            std::cmp::Ordering::Less => self.shl_i(a, (to - from) as u32),
            std::cmp::Ordering::Equal => a,
            std::cmp::Ordering::Greater => self.shr_i(a, (from - to) as u32),
        };
        self.and_i(a, mask << to)
    }
    /// Byte `j` of every lane.
    fn byte(self, a: Self::I, j: usize) -> Self::I;
    /// Lanes as f32, rounded to nearest.
    fn float(self, a: Self::I) -> Self::V;
    /// `a - b`.
    fn sub_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a - b` byte by byte, the last 8 bits of each.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    fn sub_bytes(self, a: Self::I, b: Self::I) -> Self::I;
    /// `a - b * c`.
    fn less_product(self, a: Self::I, b: Self::I, c: Self::I) -> Self::I;
    /// Adds to every lane the products of its four unsigned bytes in `c[0]`, and then in `c[1]`, of `bits` bits, and
    /// the signed bytes in `x[0]`, and then in `x[1]`, which lie above -128. Exact. The sum is kept in `state`, which
    /// begins as what to add to and zeros.
    fn dot(self, bits: usize, state: [Self::I; 2], c: [Self::I; 2], x: [Self::I; 2]) -> [Self::I; 2];
    /// As `dot` with the same four bytes for all lanes, at `x` and `x + 4`; with `PAIR` even lanes take those at `x`
    /// and `x + 8`, odd ones those at `x + 4` and `x + 12`.
    /// # Safety
    /// `x` is readable for 8 bytes, with `PAIR` for 16.
    #[inline(always)]
    unsafe fn dot8<const PAIR: bool>(
        self,
        bits: usize,
        state: [Self::I; 2],
        c: [Self::I; 2],
        x: *const i8,
    ) -> [Self::I; 2] {
        // SAFETY: as the caller promises.
        let x =
            unsafe { [self.spread_i::<PAIR>(x.cast()), self.spread_i::<PAIR>(x.add(if PAIR { 8 } else { 4 }).cast())] };
        self.dot(bits, state, c, x)
    }
    /// What up to four `dot`s of codes of `bits` bits summed.
    fn total(self, bits: usize, state: [Self::I; 2]) -> Self::I;
    /// Two `dot8`s of the same codes with two rows of x. What is kept where is `total_both`'s to know.
    /// # Safety
    /// Both are readable for 8 bytes.
    #[inline(always)]
    unsafe fn dot8_both(
        self,
        bits: usize,
        state: [[Self::I; 2]; 2],
        c: [Self::I; 2],
        x: [*const i8; 2],
    ) -> [[Self::I; 2]; 2] {
        // SAFETY: as the caller promises.
        unsafe { [self.dot8::<false>(bits, state[0], c, x[0]), self.dot8::<false>(bits, state[1], c, x[1])] }
    }
    /// The two `total`s of what up to four `dot8_both`s summed.
    #[inline(always)]
    fn total_both(self, bits: usize, state: [[Self::I; 2]; 2]) -> [Self::I; 2] {
        [self.total(bits, state[0]), self.total(bits, state[1])]
    }
    /// The bytes at `x` that `index` says, all below 16.
    /// # Safety
    /// `x` is readable for 16 bytes.
    unsafe fn pick(self, x: *const i8, index: Self::I) -> Self::I;
    /// Every lane `n` bits up, each its own number below 32.
    fn up_i(self, a: Self::I, n: Self::I) -> Self::I;
    /// Bits of one of both.
    fn xor_i(self, a: Self::I, b: Self::I) -> Self::I;

    /// The largest magnitude of the 32 values at `p`: the largest lane of these. Of a NaN or an infinity some lane is
    /// one.
    /// # Safety
    /// `p` is readable for 32 values.
    unsafe fn tops(self, p: *const f32) -> Self::V;
    /// The largest lanes of as many vectors of magnitudes as there are lanes, one after the other at `p`; a NaN is
    /// larger than any.
    /// # Safety
    /// `p` is readable for `LANES * LANES` values.
    unsafe fn row_tops(self, p: *const f32) -> Self::V;
    /// The 32 values at `p` times `by`, to the nearest whole number, ties to even; anything where that is no number
    /// within 2^15.
    /// # Safety
    /// `p` is readable for 32 values.
    unsafe fn words(self, p: *const f32, by: f32) -> Self::W;
    /// # Safety
    /// `p` is readable for 32 values.
    unsafe fn load_w(self, p: *const i16) -> Self::W;
    /// # Safety
    /// `p` is writable for 32 values.
    unsafe fn store_w(self, p: *mut i16, a: Self::W);
    /// Writes numbers in -128..=127 as bytes.
    /// # Safety
    /// `p` is writable for 32 bytes.
    unsafe fn store_bytes(self, p: *mut i8, a: Self::W);
    /// `first` sixteen times, then `second`.
    fn splat_w(self, first: i16, second: i16) -> Self::W;
    /// `a - b`, the last 16 bits of it.
    fn sub_w(self, a: Self::W, b: Self::W) -> Self::W;
    /// The last 16 bits of `a * b`.
    fn low_w(self, a: Self::W, b: Self::W) -> Self::W;
    /// `a * b / 2^15` to the nearest, a half up; not both are -2^15.
    fn high_w(self, a: Self::W, b: Self::W) -> Self::W;
    /// `N` bits down, the sign kept.
    fn down_w<const N: u32>(self, a: Self::W) -> Self::W;
    /// Sums of `a * b` whose sum over all lanes is that of the 32 products; neither has two neighbours of -2^15.
    fn products_w(self, a: Self::W, b: Self::W) -> Self::I;
}

/// An operation generic over the instruction set. `run` must be `#[inline(always)]`.
pub(crate) trait Op {
    /// What it returns.
    type Out;
    /// Whether it uses what `Isa::Avx512Vnni` has beyond `Isa::Avx512`, or what others have beyond `Isa::Neon`; if not,
    /// one compiled form serves all.
    const INTEGER: bool = false;
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
        Isa::Avx512Vnni | Isa::Amx if O::INTEGER => avx512::run_vnni(op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx => avx512::run(op),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonDot if O::INTEGER => neon::run_dot(op),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm if O::INTEGER => neon::run_i8mm(op),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon | Isa::NeonDot | Isa::NeonI8mm => neon::run(op),
        _ => panic!("{isa} is not compiled in for this processor"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dots<S: Simd, const BITS: usize>(s: S, bytes: &[u8]) {
        let mut codes: Vec<u8> = bytes.iter().map(|b| b >> (8 - BITS)).collect();
        let mut x: Vec<i8> = bytes.iter().map(|&b| (b as i8).max(-127)).collect();
        for extreme in [false, true] {
            if extreme {
                codes.fill((0xFFu16 >> (8 - BITS)) as u8);
                x.fill(-127);
            }
            // SAFETY: 64 bytes are there.
            let (one, two) = unsafe {
                let c = s.load_i(codes.as_ptr());
                let c = [c, s.and_i(c, 0x5)];
                let five = [s.splat_i(5), s.splat_i(0)];
                let one = s.dot8::<false>(BITS, five, c, x.as_ptr());
                let two = s.dot8::<true>(BITS, five, c, x.as_ptr());
                (s.total(BITS, one), s.total(BITS, two))
            };
            for lane in 0..S::LANES {
                let sum = |first: usize, second: usize| {
                    let part = |at: usize, mask: u8| -> i32 {
                        (0..4).map(|j| i32::from(codes[4 * lane + j] & mask) * i32::from(x[at + j])).sum()
                    };
                    (5 + part(first, 0xFF) + part(second, 5)) as f32
                };
                let mut got = [[0.0; 16]; 2];
                // SAFETY: at most 16 lanes.
                unsafe {
                    s.store(got[0].as_mut_ptr(), s.float(one));
                    s.store(got[1].as_mut_ptr(), s.float(two));
                }
                assert_eq!(got[0][lane], sum(0, 4), "{BITS} bits");
                assert_eq!(got[1][lane], sum(lane % 2 * 4, 8 + lane % 2 * 4), "{BITS} bits, pairs");
            }
            // Two rows of x at once, four times as in a block, each sum from a start of its own.
            // SAFETY: 64 bytes are there.
            let (both, rows) = unsafe {
                let c = s.load_i(codes.as_ptr());
                let c = [c, s.and_i(c, 0x5)];
                let mut state = [[s.splat_i(-7), s.splat_i(0)], [s.splat_i(11), s.splat_i(0)]];
                let mut rows = state;
                for i in 0..4 {
                    let x = [x.as_ptr().add(8 * i), x.as_ptr().add(32 + 8 * (i ^ 1))];
                    state = s.dot8_both(BITS, state, c, x);
                    rows = [s.dot8::<false>(BITS, rows[0], c, x[0]), s.dot8::<false>(BITS, rows[1], c, x[1])];
                }
                (s.total_both(BITS, state), [s.total(BITS, rows[0]), s.total(BITS, rows[1])])
            };
            for (m, (both, single)) in both.into_iter().zip(rows).enumerate() {
                let mut got = [[0.0; 16]; 2];
                // SAFETY: at most 16 lanes.
                unsafe {
                    s.store(got[0].as_mut_ptr(), s.float(both));
                    s.store(got[1].as_mut_ptr(), s.float(single));
                }
                for lane in 0..S::LANES {
                    let code = |j: usize| i32::from(codes[4 * lane + j % 4] & if j < 4 { 0xFF } else { 0x5 });
                    let product = |i: usize| code(i % 8) * i32::from(x[32 * m + (i ^ if m == 1 { 8 } else { 0 })]);
                    let want = [-7, 11][m] + (0..32).map(product).sum::<i32>();
                    assert_eq!([got[0][lane], got[1][lane]], [want as f32; 2], "{BITS} bits, row {m}, lane {lane}");
                }
            }
        }
    }

    fn sparse<S: Simd>(s: S, bytes: &[u8]) {
        let plain: Vec<f32> = (0..16).map(|i| 1.0 + i as f32).collect();
        let halves: Vec<u8> = plain.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
        let mut got = [0.0; 16];
        for mask in (0..1u32 << S::LANES).step_by(if S::LANES == 16 { 251 } else { 1 }) {
            let set: Vec<usize> = (0..S::LANES).filter(|i| mask >> i & 1 == 1).collect();
            let rank =
                |i: usize| if mask >> i & 1 == 1 { 1.0 + (mask & ((1 << i) - 1)).count_ones() as f32 } else { 0.0 };
            let want: Vec<f32> = (0..S::LANES).map(rank).collect();
            // SAFETY: 16 values are everywhere.
            unsafe {
                s.store(got.as_mut_ptr(), s.compress(s.load(plain.as_ptr()), mask));
                assert!(set.iter().zip(&got).all(|(&i, &g)| g == plain[i]));
                s.store(got.as_mut_ptr(), s.flip(s.load(plain.as_ptr()), mask | !0 << S::LANES));
                let sign = |i: usize| if mask >> i & 1 == 1 { -plain[i] } else { plain[i] };
                assert!((0..S::LANES).all(|i| got[i] == sign(i)));
                s.store(got.as_mut_ptr(), s.expand_f16(halves.as_ptr(), mask));
                assert_eq!(got[..S::LANES], want);
                s.store(got.as_mut_ptr(), s.expand_f32(plain.as_ptr().cast(), mask));
                assert_eq!(got[..S::LANES], want);
            }
        }
        if S::LANES == 16 {
            let more: Vec<u8> = [&halves[..], &halves[..]].concat();
            for mask in [0u32, !0, 0x1234_FFFF, 0xFFFF_0001, 0xA5A5_5A5A, 0x8000_0000] {
                // SAFETY: 64 bytes.
                let two = unsafe { s.expand_two_f16(more.as_ptr(), mask) };
                let mut next = plain.iter().cycle();
                for (column, v) in two.into_iter().enumerate() {
                    // SAFETY: 16 values.
                    unsafe { s.store(got.as_mut_ptr(), v) };
                    let want = |i: usize, next: &mut dyn Iterator<Item = &f32>| {
                        if mask >> (16 * column + i) & 1 == 1 { *next.next().unwrap() } else { 0.0 }
                    };
                    assert!((0..16).all(|i| got[i] == want(i, &mut next)), "{mask:x}");
                }
            }
        }
        // SAFETY: 64 bytes.
        unsafe {
            let index = s.and_i(s.load_i(bytes.as_ptr()), 15);
            let v = s.pick(bytes.as_ptr().cast(), index);
            for i in 0..4 * S::LANES {
                s.store(got.as_mut_ptr(), s.float(s.byte(v, i % 4)));
                assert_eq!(got[i / 4], f32::from(bytes[usize::from(bytes[i] & 15)]), "byte {i}");
            }
            let v = s.xor_i(s.splat_i(9), s.up_i(s.splat_i(5), s.byte(index, 1)));
            s.store(got.as_mut_ptr(), s.float(v));
            for i in 0..S::LANES {
                assert_eq!(got[i], (9 ^ 5 << (bytes[4 * i + 1] & 15)) as f32, "lane {i}");
            }
        }
        let x: Vec<i8> = bytes.iter().map(|&b| (b as i8).max(-127)).collect();
        for mask in [0u32, !0, 0x8000_0001, 0x0F0F_1234, 0xA5A5_5A5A, 0xFFFF_0000, 0xFFFF] {
            let mut want: Vec<i8> = (0..32).filter(|i| mask >> i & 1 == 1).map(|i| x[i]).collect();
            want.resize(32, 0);
            want.push(99);
            let mut out = [99i8; 33];
            // SAFETY: 32 bytes are there, and room for as many.
            unsafe { s.keep(x.as_ptr(), mask, out.as_mut_ptr()) };
            assert_eq!(out[..], want, "{mask:x}");
        }
        let (a, b) = x[..64].split_at(32);
        let want: Vec<i8> = a.chunks(4).zip(b.chunks(4)).flat_map(|(a, b)| [a, b].concat()).collect();
        let mut out = [0i8; 64];
        // SAFETY: 32 bytes of each, and room for 64.
        unsafe { s.turns(a.as_ptr(), b.as_ptr(), out.as_mut_ptr()) };
        assert_eq!(out[..], want);
        // SAFETY: 16 values.
        let turns = unsafe { s.interleave(s.load(plain.as_ptr()), s.mul(s.load(plain.as_ptr()), s.splat(-1.0))) };
        for (half, v) in turns.into_iter().enumerate() {
            // SAFETY: 16 values.
            unsafe { s.store(got.as_mut_ptr(), v) };
            let want = |i: usize| plain[(half * S::LANES + i) / 2] * if i % 2 == 1 { -1.0 } else { 1.0 };
            assert!((0..S::LANES).all(|i| got[i] == want(i)));
        }
        let v = [3.0f32, -7.0, 127.0, -127.0, 0.0, 5.0, -1.0, 9.0, 3.0, -7.0, 100.0, -100.0, 0.0, 5.0, -1.0, 9.0];
        // SAFETY: 16 values.
        unsafe { s.store(got.as_mut_ptr(), s.load_i8(v.map(|v| v as i8).as_ptr())) };
        assert_eq!(got[..S::LANES], v[..S::LANES]);
        // SAFETY: 16 values.
        assert_eq!(s.top(unsafe { s.load(v.as_ptr()) }), 127.0);
    }

    /// Operations on 16 bits.
    fn words<S: Simd>(s: S) {
        let x: [f32; 32] = std::array::from_fn(|i| [0.5, 1.5, -2.5, 103.3, -99.7][i % 5] * (1 + i) as f32);
        let (a, b): ([i16; 32], [i16; 32]) = (
            std::array::from_fn(|i| [i16::MAX, -i16::MAX, 11111, -300, 7, 16384][i % 6] ^ (i / 6) as i16),
            std::array::from_fn(|i| [127, 124, -90, 1000, i16::MAX][i % 5]),
        );
        let read = |v: S::V| {
            let mut out = [0.0f32; 16];
            // SAFETY: room for 16 lanes.
            unsafe { s.store(out.as_mut_ptr(), v) };
            out[..S::LANES].to_vec()
        };
        let list = |w: S::W| {
            let mut out = [0i16; 32];
            // SAFETY: room for 32 values.
            unsafe { s.store_w(out.as_mut_ptr(), w) };
            out
        };
        // SAFETY: 32 values each, and room for as many.
        unsafe {
            let want = x.iter().fold(0.0f32, |t, v| t.max(v.abs()));
            let tops = read(s.tops(x.as_ptr()));
            assert_eq!(tops.iter().copied().fold(0.0, f32::max), want);
            for (at, odd) in [(3, f32::NAN), (30, f32::NEG_INFINITY), (17, -f32::NAN)] {
                let mut x = x;
                x[at] = odd;
                let mut square = vec![1.0; S::LANES * S::LANES];
                s.store(square.as_mut_ptr().add(S::LANES), s.tops(x.as_ptr()));
                let tops = read(s.row_tops(square.as_ptr()));
                assert!(!tops[1].is_finite() && tops[1].is_sign_positive() && tops[0] == 1.0 && tops[2] == 1.0);
            }
            let square: Vec<f32> = (0..S::LANES * S::LANES).map(|i| (i * i % 97) as f32).collect();
            let want = square.chunks(S::LANES).map(|row| row.iter().copied().fold(0.0, f32::max));
            assert_eq!(read(s.row_tops(square.as_ptr())), want.collect::<Vec<f32>>());

            let rounded = x.map(|v| (v * 2.5).round_ties_even());
            let small = x.map(|v| (v * 0.03).round_ties_even());
            let mut bytes = [0i8; 32];
            s.store_bytes(bytes.as_mut_ptr(), s.words(x.as_ptr(), 0.03));
            assert_eq!(bytes.map(f32::from), small);
            let (w, one, first) = (s.words(x.as_ptr(), 2.5), s.splat_w(1, 1), s.splat_w(1, 0));
            let sum = |v: S::I| read(s.float(v)).iter().sum::<f32>();
            assert_eq!(sum(s.products_w(w, one)), rounded.iter().sum::<f32>());
            assert_eq!(sum(s.products_w(w, first)), rounded[..16].iter().sum::<f32>());
            assert_eq!(sum(s.products_w(w, s.splat_w(0, 3))), 3.0 * rounded[16..].iter().sum::<f32>());
            let (va, vb) = (s.load_w(a.as_ptr()), s.load_w(b.as_ptr()));
            assert_eq!(list(va), a);
            let both = |f: fn(i32, i32) -> i32| -> [i16; 32] {
                std::array::from_fn(|i| f(i32::from(a[i]), i32::from(b[i])) as i16)
            };
            assert_eq!(list(s.sub_w(va, vb)), both(|a, b| a - b));
            assert_eq!(list(s.low_w(va, vb)), both(|a, b| a.wrapping_mul(b)));
            assert_eq!(list(s.high_w(va, vb)), both(|a, b| (a * b + (1 << 14)) >> 15));
            assert_eq!(list(s.down_w::<7>(va)), a.map(|a| a >> 7));
            // Numbers that an f32 holds.
            let (da, db) = (s.down_w::<5>(va), s.down_w::<4>(vb));
            let want: i32 = a.iter().zip(&b).map(|(a, b)| i32::from(a >> 5) * i32::from(b >> 4)).sum();
            assert_eq!(sum(s.products_w(da, db)), want as f32);
        }
    }

    struct All;
    impl Op for All {
        type Out = ();
        const INTEGER: bool = true;
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
            let read_i = |v: S::I| read(s.float(v));
            // SAFETY: 64 bytes are there and no load reads more; tables have 16 values.
            unsafe {
                let p = bytes.as_ptr();
                let v = s.load_i(p);
                for j in 0..4 {
                    let want: Vec<f32> = (0..n).map(|i| f32::from(bytes[4 * i + j])).collect();
                    assert_eq!(read_i(s.byte(v, j)), want);
                    let want: Vec<f32> = (0..n).map(|i| f32::from(bytes[4 * i + j] >> 5 & 3 | 64)).collect();
                    let got = s.or_i(s.and_i(s.shr_i(v, 5), 3), s.shl_i(s.and_i(s.splat_i(0x0101_0101), 1), 6));
                    assert_eq!(read_i(s.byte(got, j)), want);
                }
                for (from, to, mask) in [(0, 0, 15u8), (4, 0, 15), (6, 2, 3), (2, 6, 3), (7, 3, 1), (0, 7, 1)] {
                    let got = s.moved(v, from, to, mask);
                    for j in 0..4 {
                        let want = (0..n).map(|i| f32::from((bytes[4 * i + j] >> from & mask) << to));
                        let want: Vec<f32> = want.collect();
                        assert_eq!(read_i(s.byte(got, j)), want, "{from} {to} {mask}");
                    }
                }
                assert_eq!(read_i(s.widen(p)), bytes[..n].iter().map(|&b| f32::from(b)).collect::<Vec<_>>());
                let want: Vec<f32> =
                    (0..n).map(|i| f32::from(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]))).collect();
                assert_eq!(read_i(s.widen_words(p)), want);
                let got = s.less_product(s.splat_i(7), s.widen(p), s.splat_i(-3));
                assert_eq!(read_i(got)[1], 7.0 + 3.0 * f32::from(bytes[1]));
                let table: Vec<f32> = (0..64).map(|i| i as f32 * 1.5).collect();
                for small in [8, 16, 64] {
                    let mask = (small - 1) as u8;
                    let index = s.byte(s.and_i(v, mask), 0);
                    let want: Vec<f32> = (0..n).map(|i| table[usize::from(bytes[4 * i] & mask)]).collect();
                    assert_eq!(read(s.lookup(table.as_ptr(), small, index)), want);
                }
                assert_eq!(read(s.spread::<true>(table.as_ptr()))[..4], [0.0, 1.5, 0.0, 1.5]);
                assert_eq!(read(s.spread::<false>(table.as_ptr().add(1)))[..2], [1.5, 1.5]);
                assert_eq!(read_i(s.spread_i::<true>([3, -4].as_ptr()))[..4], [3.0, -4.0, 3.0, -4.0]);
            }
            dots::<S, 4>(s, &bytes);
            dots::<S, 6>(s, &bytes);
            dots::<S, 7>(s, &bytes);
            dots::<S, 8>(s, &bytes);
            sparse(s, &bytes);
            words(s);
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
            let ramp: Vec<f32> = (0..n).map(|i| i as f32).collect();
            // SAFETY: LANES values.
            let r = unsafe { s.load(ramp.as_ptr()) };
            let total: f32 = ramp.iter().sum();
            let two = s.splat(2.0);
            assert_eq!(s.sum(r), total);
            let square: Vec<f32> = (0..n * n).map(|i| (i * i % 97) as f32).collect();
            let want: Vec<f32> = square.chunks(n).map(|row| row.iter().sum()).collect();
            // SAFETY: as many values.
            assert_eq!(read(unsafe { s.row_sums(square.as_ptr()) }), want);
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

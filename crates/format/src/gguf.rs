//! GGUF block types: sizes and decoding.

use half::f16;
use serde::{Deserialize, Serialize};

/// The tensor types of GGUF files that Lacuna reads, each kept exactly as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(non_camel_case_types, missing_docs)]
pub enum GgufType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    IQ2_XXS,
    IQ2_XS,
    IQ2_S,
    IQ3_XXS,
    IQ3_S,
}

/// All of them.
pub const ALL: [GgufType; 17] = [
    GgufType::Q4_0,
    GgufType::Q4_1,
    GgufType::Q5_0,
    GgufType::Q5_1,
    GgufType::Q8_0,
    GgufType::Q2_K,
    GgufType::Q3_K,
    GgufType::Q4_K,
    GgufType::Q5_K,
    GgufType::Q6_K,
    GgufType::IQ4_NL,
    GgufType::IQ4_XS,
    GgufType::IQ2_XXS,
    GgufType::IQ2_XS,
    GgufType::IQ2_S,
    GgufType::IQ3_XXS,
    GgufType::IQ3_S,
];

/// Those that values can be encoded to.
pub const WRITTEN: [GgufType; 12] = *ALL.first_chunk().expect("the first of all");

impl GgufType {
    /// Whether values can be encoded to it; others are only read.
    pub fn is_written(self) -> bool {
        WRITTEN.contains(&self)
    }

    /// Values in a block.
    pub fn block(self) -> usize {
        match self {
            GgufType::Q4_0 | GgufType::Q4_1 | GgufType::Q5_0 | GgufType::Q5_1 | GgufType::Q8_0 | GgufType::IQ4_NL => 32,
            _ => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            GgufType::Q4_0 | GgufType::IQ4_NL => 18,
            GgufType::Q4_1 => 20,
            GgufType::Q5_0 => 22,
            GgufType::Q5_1 => 24,
            GgufType::Q8_0 => 34,
            GgufType::Q2_K => 84,
            GgufType::Q3_K => 110,
            GgufType::Q4_K => 144,
            GgufType::Q5_K => 176,
            GgufType::Q6_K => 210,
            GgufType::IQ4_XS => 136,
            GgufType::IQ2_XXS => 66,
            GgufType::IQ2_XS => 74,
            GgufType::IQ2_S => 82,
            GgufType::IQ3_XXS => 98,
            GgufType::IQ3_S => 110,
        }
    }

    /// Decodes whole blocks. Panics where `bytes` and `out` do not hold the same number of blocks.
    #[track_caller]
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        let (n, size) = (self.block(), self.block_bytes());
        assert_eq!(bytes.len() / size * n, out.len(), "{} bytes of {self:?} are not {} values", bytes.len(), out.len());
        assert_eq!(bytes.len() % size, 0, "{} bytes are not whole blocks of {self:?}", bytes.len());
        let blocks = bytes.chunks_exact(size).zip(out.chunks_exact_mut(n));
        if let Some(lattice) = self.lattice() {
            return blocks.for_each(|(b, o)| lattice.decode(b, o));
        }
        let each = |block: fn(&[u8], &mut [f32])| blocks.for_each(|(b, o)| block(b, o));
        match self {
            GgufType::Q4_0 => each(q4_0),
            GgufType::Q4_1 => each(q4_1),
            GgufType::Q5_0 => each(q5_0),
            GgufType::Q5_1 => each(q5_1),
            GgufType::Q8_0 => each(q8_0),
            GgufType::Q2_K => each(q2_k),
            GgufType::Q3_K => each(q3_k),
            GgufType::Q4_K => each(q4_k),
            GgufType::Q5_K => each(q5_k),
            GgufType::Q6_K => each(q6_k),
            GgufType::IQ4_NL => each(iq4_nl),
            GgufType::IQ4_XS => each(iq4_xs),
            _ => unreachable!("{self:?} has a lattice"),
        }
    }
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

// Layouts: a 32-value block keeps value j in the low half of byte j and value j + 16 in the high half.

fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = f16_at(b, 0);
    for (j, &q) in b[2..18].iter().enumerate() {
        y[j] = (i32::from(q & 15) - 8) as f32 * d;
        y[j + 16] = (i32::from(q >> 4) - 8) as f32 * d;
    }
}

fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (j, &q) in b[4..20].iter().enumerate() {
        y[j] = f32::from(q & 15) * d + m;
        y[j + 16] = f32::from(q >> 4) * d + m;
    }
}

/// The fifth bits of 32 values, as 0 or 16.
fn fifth(b: &[u8], at: usize) -> impl Fn(usize) -> u8 {
    let h = u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    move |j| ((h >> j & 1) as u8) << 4
}

fn q5_0(b: &[u8], y: &mut [f32]) {
    let (d, high) = (f16_at(b, 0), fifth(b, 2));
    for (j, &q) in b[6..22].iter().enumerate() {
        y[j] = (i32::from(q & 15 | high(j)) - 16) as f32 * d;
        y[j + 16] = (i32::from(q >> 4 | high(j + 16)) - 16) as f32 * d;
    }
}

fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m, high) = (f16_at(b, 0), f16_at(b, 2), fifth(b, 4));
    for (j, &q) in b[8..24].iter().enumerate() {
        y[j] = f32::from(q & 15 | high(j)) * d + m;
        y[j + 16] = f32::from(q >> 4 | high(j + 16)) * d + m;
    }
}

fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = f16_at(b, 0);
    for (o, &q) in y.iter_mut().zip(&b[2..34]) {
        *o = f32::from(q as i8) * d;
    }
}

/// 16 scale bytes (scale low, minimum high), 64 bytes of 2-bit codes, d, dmin. Codes of 128 values share 32 bytes, a
/// pair of bits for each run of 32.
fn q2_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 80), f16_at(b, 82));
    for (g, out) in y.chunks_exact_mut(16).enumerate() {
        let (dl, ml) = (d * f32::from(b[g] & 15), dmin * f32::from(b[g] >> 4));
        let (codes, shift) = pair_bits(&b[16..80], g);
        for (o, &q) in out.iter_mut().zip(codes) {
            *o = dl * f32::from(q >> shift & 3) - ml;
        }
    }
}

/// Where the 2-bit codes of the `g`-th sixteen values lie: their bytes and the shift.
fn pair_bits(qs: &[u8], g: usize) -> (&[u8], usize) {
    let at = g / 8 * 32 + g % 2 * 16;
    (&qs[at..at + 16], g % 8 / 2 * 2)
}

/// 32 bytes of third bits, 64 bytes of 2-bit codes as in Q2_K, 12 bytes of sixteen 6-bit scales (offset 32), d. A third
/// bit of 0 takes 4 off.
fn q3_k(b: &[u8], y: &mut [f32]) {
    let (d, sc) = (f16_at(b, 108), &b[96..108]);
    for (g, out) in y.chunks_exact_mut(16).enumerate() {
        let low = if g < 8 { sc[g] & 15 } else { sc[g - 8] >> 4 };
        let scale = low | (sc[8 + g % 4] >> (g / 4 * 2) & 3) << 4;
        let dl = d * (i32::from(scale) - 32) as f32;
        let (codes, shift) = pair_bits(&b[32..96], g);
        let third = &b[g % 2 * 16..][..16];
        for ((o, &q), &h) in out.iter_mut().zip(codes).zip(third) {
            let minus = if h >> (g / 2) & 1 == 1 { 0 } else { 4 };
            *o = dl * (i32::from(q >> shift & 3) - minus) as f32;
        }
    }
}

/// The `j`-th scale and minimum of eight, 6 bits each in 12 bytes.
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(min))
}

/// d, dmin, 12 bytes of scales and minima, 128 bytes of 4-bit codes: 32 bytes hold a run of 32 in their low halves, the
/// next in the high.
fn q4_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for (g, out) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(&b[4..16], g);
        let (dl, ml) = (d * scale, dmin * min);
        for (o, &q) in out.iter_mut().zip(&b[16 + g / 2 * 32..]) {
            *o = dl * f32::from(q >> (g % 2 * 4) & 15) - ml;
        }
    }
}

/// As Q4_K with 32 bytes of fifth bits before the codes, bit `g` for the `g`-th run of 32.
fn q5_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    for (g, out) in y.chunks_exact_mut(32).enumerate() {
        let (scale, min) = scale_min(&b[4..16], g);
        let (dl, ml) = (d * scale, dmin * min);
        for ((o, &q), &h) in out.iter_mut().zip(&b[48 + g / 2 * 32..]).zip(&b[16..48]) {
            *o = dl * f32::from((q >> (g % 2 * 4) & 15) + (h >> g & 1) * 16) - ml;
        }
    }
}

/// 128 bytes of low halves, 64 bytes of upper pairs of bits, 16 signed scales, d. Each half of the block is 4 runs of
/// 32.
fn q6_k(b: &[u8], y: &mut [f32]) {
    let d = f16_at(b, 208);
    for (g, out) in y.chunks_exact_mut(16).enumerate() {
        let (half, run, part) = (g / 8, g % 8 / 2, g % 2 * 16);
        let dl = d * f32::from(b[192 + g] as i8);
        let low = &b[half * 64 + run % 2 * 32 + part..][..16];
        let high = &b[128 + half * 32 + part..][..16];
        for ((o, &l), &h) in out.iter_mut().zip(low).zip(high) {
            let q = l >> (run / 2 * 4) & 15 | (h >> (run * 2) & 3) << 4;
            *o = dl * (i32::from(q) - 32) as f32;
        }
    }
}

/// The sixteen levels of IQ4_NL and IQ4_XS.
pub(crate) const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn iq4(dl: f32, codes: &[u8], y: &mut [f32]) {
    for (j, &q) in codes.iter().enumerate() {
        y[j] = dl * f32::from(IQ4[usize::from(q & 15)]);
        y[j + 16] = dl * f32::from(IQ4[usize::from(q >> 4)]);
    }
}

fn iq4_nl(b: &[u8], y: &mut [f32]) {
    iq4(f16_at(b, 0), &b[2..18], y);
}

/// d, upper pairs of bits of eight 6-bit scales (offset 32), their lower halves, 128 bytes of codes.
fn iq4_xs(b: &[u8], y: &mut [f32]) {
    let (d, high) = (f16_at(b, 0), u16::from_le_bytes([b[2], b[3]]));
    for (g, out) in y.chunks_exact_mut(32).enumerate() {
        let low = b[4 + g / 2] >> (g % 2 * 4) & 15;
        let scale = low | ((high >> (2 * g) & 3) as u8) << 4;
        iq4(d * (i32::from(scale) - 32) as f32, &b[8 + 16 * g..][..16], out);
    }
}

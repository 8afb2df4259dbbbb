//! The bytes of GGUF blocks from their scales and codes: the layouts that `gguf.rs` decodes.

use half::f16;

use crate::GgufType;
use crate::gguf_grid::BlockGrid;

/// Writes a block of 32 symmetric codes of 4, 5 or 8 bits (offset by half their range) under an f16 scale.
pub(crate) fn symmetric_block(kind: GgufType, d: f16, code: impl Fn(usize) -> u8, out: &mut Vec<u8>) {
    out.extend(d.to_le_bytes());
    match kind {
        GgufType::Q8_0 => out.extend((0..32).map(|j| code(j) ^ 0x80)),
        _ => {
            if kind == GgufType::Q5_0 {
                fifths(&code, out);
            }
            halves(&code, out);
        }
    }
}

/// Value j in the low half of byte j and value j + 16 in the high half.
fn halves(code: impl Fn(usize) -> u8, out: &mut Vec<u8>) {
    out.extend((0..16).map(|j| code(j) & 15 | (code(j + 16) & 15) << 4));
}

/// The fifth bits of 32 codes.
fn fifths(code: impl Fn(usize) -> u8, out: &mut Vec<u8>) {
    out.extend((0..32).fold(0u32, |h, j| h | u32::from(code(j) >> 4 & 1) << j).to_le_bytes());
}

/// Eight scales and minima of 6 bits in 12 bytes.
fn scales_mins(scales: &[u8; 16], mins: &[u8; 16], out: &mut Vec<u8>) {
    out.extend((0..4).map(|j| scales[j] | scales[j + 4] >> 4 << 6));
    out.extend((0..4).map(|j| mins[j] | mins[j + 4] >> 4 << 6));
    out.extend((4..8).map(|j| scales[j] & 15 | (mins[j] & 15) << 4));
}

/// The low two bits of 256 codes: 128 values share 32 bytes, a pair of bits for each run of 32.
fn pairs(codes: &[u8], out: &mut Vec<u8>) {
    for half in codes.chunks_exact(128) {
        out.extend((0..32).map(|j| (0..4).fold(0, |b, p| b | (half[p * 32 + j] & 3) << (2 * p))));
    }
}

impl BlockGrid {
    /// Writes a block with these `codes`, as many as it has values. Panics where they are not.
    #[track_caller]
    pub fn write(&self, codes: &[u8], out: &mut Vec<u8>) {
        assert_eq!(codes.len(), self.kind.block(), "codes of a block of {:?}", self.kind);
        let (d, dmin) = (f16::from_f32(self.d), f16::from_f32(self.dmin));
        let code = |j: usize| codes[j];
        match self.kind {
            GgufType::Q4_0 | GgufType::Q5_0 | GgufType::Q8_0 => symmetric_block(self.kind, d, code, out),
            GgufType::Q4_1 | GgufType::Q5_1 => {
                // The file's minimum is added.
                out.extend(d.to_le_bytes());
                out.extend((-dmin).to_le_bytes());
                if self.kind == GgufType::Q5_1 {
                    fifths(code, out);
                }
                halves(code, out);
            }
            GgufType::IQ4_NL => {
                out.extend(d.to_le_bytes());
                halves(code, out);
            }
            GgufType::IQ4_XS => {
                let scales: [u8; 8] = std::array::from_fn(|g| (self.scales[g] + 32) as u8);
                out.extend(d.to_le_bytes());
                out.extend((0..8).fold(0u16, |h, g| h | u16::from(scales[g] >> 4) << (2 * g)).to_le_bytes());
                out.extend((0..4).map(|j| scales[2 * j] & 15 | (scales[2 * j + 1] & 15) << 4));
                codes.chunks_exact(32).for_each(|run| halves(|j| run[j], out));
            }
            GgufType::Q2_K => {
                out.extend((0..16).map(|g| self.scales[g] as u8 | self.mins[g] << 4));
                pairs(codes, out);
                out.extend(d.to_le_bytes());
                out.extend(dmin.to_le_bytes());
            }
            GgufType::Q3_K => {
                out.extend((0..32).map(|j| (0..8).fold(0, |h, g| h | (codes[g * 32 + j] >> 2 & 1) << g)));
                pairs(codes, out);
                let scales: [u8; 16] = std::array::from_fn(|g| (self.scales[g] + 32) as u8);
                out.extend((0..8).map(|g| scales[g] & 15 | (scales[g + 8] & 15) << 4));
                out.extend((0..4).map(|j| (0..4).fold(0, |b, p| b | (scales[p * 4 + j] >> 4) << (2 * p))));
                out.extend(d.to_le_bytes());
            }
            GgufType::Q4_K | GgufType::Q5_K => {
                out.extend(d.to_le_bytes());
                out.extend(dmin.to_le_bytes());
                scales_mins(&self.scales.map(|s| s as u8), &self.mins, out);
                if self.kind == GgufType::Q5_K {
                    out.extend((0..32).map(|j| (0..8).fold(0, |h, g| h | (codes[g * 32 + j] >> 4 & 1) << g)));
                }
                for pair in codes.chunks_exact(64) {
                    out.extend((0..32).map(|j| pair[j] & 15 | (pair[j + 32] & 15) << 4));
                }
            }
            GgufType::Q6_K => {
                let at = out.len();
                out.resize(at + 210, 0);
                let b = &mut out[at..];
                for (i, q) in codes.iter().enumerate() {
                    let (half, run, j) = (i / 128, i % 128 / 32, i % 32);
                    b[half * 64 + run % 2 * 32 + j] |= (q & 15) << (run / 2 * 4);
                    b[128 + half * 32 + j] |= (q >> 4 & 3) << (run * 2);
                }
                b[192..208].iter_mut().zip(self.scales).for_each(|(b, s)| *b = s as i8 as u8);
                b[208..].copy_from_slice(&d.to_le_bytes());
            }
            _ => unreachable!("{:?} has no grid of this kind", self.kind),
        }
    }
}

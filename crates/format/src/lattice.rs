//! GGUF's types whose codes point into a grid: an index says the magnitudes of 4 or 8 values at once, a bit each their
//! signs. `value = d * (2 s + 1) * unit * ±magnitude` with an f16 `d` for 256 values and 4 bits `s` for 16 or 32. They
//! are read and multiplied, not written.
//!
//! | type | values an index | index | signs | scales | bits a weight |
//! |---|---|---|---|---|---|
//! | IQ2_XXS | 8 | 8 bits | 7 of 8 | for 32 | 2.06 |
//! | IQ2_XS | 8 | 9 bits | 7 of 8 | for 16 | 2.31 |
//! | IQ2_S | 8 | 10 bits | 8 | for 16 | 2.56 |
//! | IQ3_XXS | 4 | 8 bits | 7 of 8 | for 32 | 3.06 |
//! | IQ3_S | 4 | 9 bits | 8 | for 32 | 3.44 |
//!
//! Of eight signs of which seven are kept the last makes the number of minus signs even.

use std::sync::LazyLock;

use half::f16;

use crate::GgufType;
use crate::bits::unpack;

/// The grids: what 4 or 8 values at once are, as places in the list of magnitudes, one after the other for each index.
struct Grids {
    iq2_xxs: Vec<u8>,
    iq2_xs: Vec<u8>,
    iq2_s: Vec<u8>,
    iq1: Vec<u8>,
    iq3_xxs: Vec<u8>,
    iq3_s: Vec<u8>,
}

/// In the file, one after the other: 2 bits a value for those of 8 values, 4 bits for those of 4.
static GRIDS: LazyLock<Grids> = LazyLock::new(|| {
    let mut rest = &include_bytes!("grids.bin")[..];
    let mut next = |entries: usize, each: usize, bits: u8| {
        let (these, tail) = rest.split_at(entries * each * usize::from(bits) / 8);
        rest = tail;
        let mut out = vec![0; entries * each];
        unpack(these, bits, 0, &mut out);
        out
    };
    Grids {
        iq2_xxs: next(256, 8, 2),
        iq2_xs: next(512, 8, 2),
        iq2_s: next(1024, 8, 2),
        iq1: next(2048, 8, 2),
        iq3_xxs: next(256, 4, 4),
        iq3_s: next(512, 4, 4),
    }
});

/// The grid of IQ1_S and IQ1_M, `[2048, 8]`: 0, 1 and 2 for -1, 0 and 1.
pub fn ternary() -> &'static [u8] {
    &GRIDS.iq1
}

/// What the indices of a type point into, and how its values are scaled.
#[derive(Clone, Copy, Debug)]
pub struct Lattice {
    kind: GgufType,
    /// Values that an index says: 4 or 8.
    pub each: usize,
    /// `[entries, each]`: places in `levels`.
    pub places: &'static [u8],
    /// The magnitudes that occur.
    pub levels: &'static [u8],
    /// What a magnitude counts under a scale of 1.
    pub unit: f32,
    /// Values that share a scale: 16 or 32.
    pub run: usize,
}

/// One block of 256 values.
#[derive(Clone, Debug, PartialEq)]
pub struct Points {
    /// The scale over all.
    pub d: f16,
    /// 4 bits for each run: `2 s + 1` is the scale. Of as many as there are runs.
    pub scales: [u8; 16],
    /// Of as many as there are indices.
    pub index: [u16; 64],
    /// Eight signs each, the first the lowest bit; set where the value is negative.
    pub signs: [u8; 32],
}

impl GgufType {
    /// What the codes of a type point into, where they do.
    pub fn lattice(self) -> Option<Lattice> {
        const TWO: (&[u8], f32) = (&[8, 25, 43], 0.125);
        let g = &*GRIDS;
        let of = |each, places: &'static [u8], (levels, unit): (&'static [u8], f32), run| {
            Some(Lattice { kind: self, each, places, levels, unit, run })
        };
        match self {
            GgufType::IQ2_XXS => of(8, &g.iq2_xxs, TWO, 32),
            GgufType::IQ2_XS => of(8, &g.iq2_xs, TWO, 16),
            GgufType::IQ2_S => of(8, &g.iq2_s, TWO, 16),
            GgufType::IQ3_XXS => of(4, &g.iq3_xxs, (&[4, 12, 20, 28, 36, 44, 52, 62], 0.25), 32),
            GgufType::IQ3_S => of(4, &g.iq3_s, (&[1, 3, 5, 7, 9, 11, 13, 15], 1.0), 32),
            _ => None,
        }
    }
}

/// Eight signs from seven.
fn eighth(seven: u32) -> u8 {
    let seven = (seven & 127) as u8;
    seven | ((seven.count_ones() & 1) as u8) << 7
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// `i`-th half of a byte of a list.
fn nibble(b: &[u8], i: usize) -> u8 {
    b[i / 2] >> (i % 2 * 4) & 15
}

impl Lattice {
    /// Bits of an index.
    pub fn index_bits(&self) -> u32 {
        (self.places.len() / self.each).trailing_zeros()
    }

    /// The magnitude of the `j`-th value that `index` says.
    pub fn magnitude(&self, index: u16, j: usize) -> u8 {
        self.levels[usize::from(self.places[usize::from(index) * self.each + j])]
    }

    /// A block of the file, taken apart. Panics where it is shorter than one.
    #[track_caller]
    pub fn points(&self, b: &[u8]) -> Points {
        let b = &b[..self.kind.block_bytes()];
        let (mut scales, mut index, mut signs) = ([0; 16], [0; 64], [0; 32]);
        let below = |i: usize| u16::from(b[2 + i]);
        // Bits of an index over its byte, so many to a byte of the list.
        let above = |from: usize, i: usize, n: usize| u16::from(b[from + i * n / 8]) >> (i * n % 8) & ((1 << n) - 1);
        match self.kind {
            GgufType::IQ2_XXS => (0..8).for_each(|run| {
                let more = u32_at(b, 2 + 8 * run + 4);
                scales[run] = (more >> 28) as u8;
                (0..4).for_each(|i| {
                    index[4 * run + i] = below(8 * run + i);
                    signs[4 * run + i] = eighth(more >> (7 * i));
                });
            }),
            GgufType::IQ2_XS => {
                (0..32).for_each(|i| {
                    let q = u16_at(b, 2 + 2 * i);
                    (index[i], signs[i]) = (q & 511, eighth(u32::from(q >> 9)));
                });
                (0..16).for_each(|i| scales[i] = nibble(&b[66..], i));
            }
            GgufType::IQ2_S => {
                (0..32).for_each(|i| (index[i], signs[i]) = (below(i) | above(66, i, 2) << 8, b[34 + i]));
                (0..16).for_each(|i| scales[i] = nibble(&b[74..], i));
            }
            GgufType::IQ3_XXS => {
                (0..64).for_each(|i| index[i] = below(i));
                (0..8).for_each(|run| {
                    let more = u32_at(b, 66 + 4 * run);
                    scales[run] = (more >> 28) as u8;
                    (0..4).for_each(|i| signs[4 * run + i] = eighth(more >> (7 * i)));
                });
            }
            _ => {
                (0..64).for_each(|i| index[i] = below(i) | above(66, i, 1) << 8);
                signs.copy_from_slice(&b[74..106]);
                (0..8).for_each(|i| scales[i] = nibble(&b[106..], i));
            }
        }
        Points { d: f16::from_le_bytes([b[0], b[1]]), scales, index, signs }
    }

    /// The values of a block.
    pub(crate) fn decode(&self, b: &[u8], y: &mut [f32]) {
        let p = self.points(b);
        let d = p.d.to_f32();
        for (i, y) in y.iter_mut().enumerate() {
            // A scale and a magnitude have few enough bits for every product to be exact, in any order.
            let scale = d * (f32::from(2 * p.scales[i / self.run] + 1) * self.unit);
            let magnitude = f32::from(self.magnitude(p.index[i / self.each], i % self.each));
            *y = scale * if p.signs[i / 8] >> (i % 8) & 1 == 1 { -magnitude } else { magnitude };
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use sha2::{Digest, Sha256};

    use super::*;

    #[test]
    fn grids_are_those_of_the_gguf_package() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/dequant.json");
        let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let sum = |bytes: Vec<u8>| -> String { Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect() };
        let kinds = [GgufType::IQ2_XXS, GgufType::IQ2_XS, GgufType::IQ2_S, GgufType::IQ3_XXS, GgufType::IQ3_S];
        for kind in kinds {
            let l = kind.lattice().unwrap();
            let all = (0..l.places.len()).map(|i| l.magnitude((i / l.each) as u16, i % l.each)).collect();
            assert_eq!(golden["grids"][format!("{kind:?}")], sum(all), "{kind:?}");
            assert_eq!(1 << l.index_bits(), l.places.len() / l.each);
        }
        assert_eq!(golden["grids"]["IQ1_S"], sum(ternary().iter().map(|t| t.wrapping_sub(1)).collect()));
    }
}

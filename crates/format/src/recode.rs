//! From one form of grouped integers to another without rounding anew: the codes move, the scales stay.

use half::f16;

use lacuna_base::Mat;

use crate::bits::{pack, unpack};
use crate::gguf_write::symmetric_block;
use crate::pack_scales::pack_multiples;
use crate::{FormatError, GgufType, Group, Pattern, Piece, Stored, Values, Zeros};

/// A matrix that is nothing but grouped integers, whatever form they are stored in: `value = scale * (code - zero)`.
#[derive(Clone, Debug)]
pub struct IntRows<'a> {
    piece: &'a Piece,
    /// Bits of a code.
    pub bits: u8,
    /// Which columns share a scale.
    pub group: Group,
    /// Whether every zero point is `2^(bits-1)`.
    pub symmetric: bool,
}

impl Stored {
    /// The integers behind this matrix, where it is one piece of them whose zero points are codes (positions that its
    /// pattern leaves out get the code of zero).
    pub fn integers(&self) -> Option<IntRows<'_>> {
        let piece = self.single()?;
        let (bits, group, symmetric) = match &piece.values {
            Values::Int { zeros: Some(Zeros::Real(_) | Zeros::Minima(_)), .. } => return None,
            Values::Int { bits, group, zeros, .. } => (*bits, group.clone(), zeros.is_none()),
            Values::Gguf(GgufType::Q4_0, _) => (4, Group::Run(32), true),
            Values::Gguf(GgufType::Q5_0, _) => (5, Group::Run(32), true),
            Values::Gguf(GgufType::Q8_0, _) => (8, Group::Run(32), true),
            _ => return None,
        };
        Some(IntRows { piece, bits, group, symmetric })
    }
}

impl Stored {
    /// The same codes with their scales and minima written as integers of `bits` bits times an f16 for every `per` of
    /// them, where the matrix is one dense piece of codes with f16 scales and minima: Q4_1, Q5_1, or grouped integers
    /// whose zero points are no codes. `None` for any other.
    pub fn with_coded_scales(&self, bits: u8, per: usize) -> Result<Option<Stored>, FormatError> {
        let Some(piece) = self.single().filter(|p| p.pattern == Pattern::Dense) else { return Ok(None) };
        let (rows, cols) = (piece.rows, piece.cols);
        let coded = |width, codes, scales: &Mat, minima: &Mat, group| -> Result<Option<Stored>, FormatError> {
            let values = Values::Int {
                bits: width,
                codes,
                scales: pack_multiples(scales, bits, per)?,
                zeros: Some(Zeros::Minima(pack_multiples(minima, bits, per)?)),
                group,
            };
            let stored = Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values });
            stored.check()?;
            Ok(Some(stored))
        };
        match &piece.values {
            Values::Int { bits: width, codes, scales, zeros: Some(Zeros::Minima(minima)), group } => {
                let floats = [scales, minima].map(|s| {
                    let mut m = Mat::zeros(rows, group.count(cols));
                    (0..rows).for_each(|r| s.row(r, m.row_mut(r)));
                    m
                });
                coded(*width, codes.clone(), &floats[0], &floats[1], group.clone())
            }
            Values::Gguf(kind @ (GgufType::Q4_1 | GgufType::Q5_1), bytes) => {
                let (size, per_row, width) =
                    (kind.block_bytes(), cols / 32, if *kind == GgufType::Q4_1 { 4 } else { 5 });
                let (mut scales, mut minima) = (Mat::zeros(rows, per_row), Mat::zeros(rows, per_row));
                let mut codes = Vec::with_capacity(rows * cols);
                for (i, b) in bytes.chunks_exact(size).enumerate() {
                    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
                    scales.data_mut()[i] = half(0);
                    minima.data_mut()[i] = -half(2);
                    let low = &b[size - 16..];
                    let high = |j: usize| if width == 5 { (b[4 + j / 8] >> (j % 8) & 1) << 4 } else { 0 };
                    codes.extend((0..16).map(|j| low[j] & 15 | high(j)));
                    codes.extend((0..16).map(|j| low[j] >> 4 | high(j + 16)));
                }
                coded(width, pack(&codes, width).into(), &scales, &minima, Group::Run(32))
            }
            _ => Ok(None),
        }
    }
}

impl IntRows<'_> {
    /// Scales of a row.
    pub fn groups(&self) -> usize {
        self.group.count(self.piece.cols)
    }

    /// Row `r`: codes, `[cols]`; scales and zero points, `[groups]`.
    #[track_caller]
    pub fn row(&self, r: usize, codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8]) {
        let (p, cols) = (self.piece, self.piece.cols);
        zeros.fill(1 << (self.bits - 1));
        match &p.values {
            Values::Int { bits, codes: stream, scales: s, zeros: z, group } => {
                s.row(r, scales);
                if let Some(Zeros::Codes(z)) = z {
                    unpack(z, *bits, r * zeros.len(), zeros);
                }
                if p.pattern == Pattern::Dense {
                    unpack(stream, *bits, r * cols, codes);
                    return;
                }
                let (mut at, span) = (Vec::new(), p.pattern.span(r, cols));
                p.pattern.columns(r, cols, &mut at);
                let mut kept = vec![0; span.len()];
                unpack(stream, *bits, span.start, &mut kept);
                (0..cols).for_each(|c| codes[c] = zeros[group.of(c)]);
                at.iter().zip(kept).for_each(|(&c, q)| codes[c as usize] = q);
            }
            Values::Gguf(kind, bytes) => {
                let (size, per) = (kind.block_bytes(), cols / 32);
                for (g, b) in bytes[r * per * size..(r + 1) * per * size].chunks_exact(size).enumerate() {
                    scales[g] = f16::from_le_bytes([b[0], b[1]]).to_f32();
                    let out = &mut codes[g * 32..][..32];
                    let low = &b[size - 16..];
                    match kind {
                        GgufType::Q8_0 => out.iter_mut().zip(&b[2..]).for_each(|(o, q)| *o = q ^ 0x80),
                        _ => (0..16).for_each(|j| (out[j], out[j + 16]) = (low[j] & 15, low[j] >> 4)),
                    }
                    if *kind == GgufType::Q5_0 {
                        let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
                        (0..32).for_each(|j| out[j] |= ((high >> j & 1) as u8) << 4);
                    }
                }
            }
            _ => unreachable!("`integers` gives out no other values"),
        }
    }

    /// Row `r` as blocks of `kind` (Q4_0, Q5_0 or Q8_0) with the same values to the last bit; `None` where they cannot
    /// be had so: zero points, groups that blocks of 32 do not divide, more bits, or a scale that is no f16.
    pub fn row_as_blocks(&self, r: usize, kind: GgufType) -> Option<Vec<u8>> {
        let bits = match kind {
            GgufType::Q4_0 => 4,
            GgufType::Q5_0 => 5,
            GgufType::Q8_0 => 8,
            _ => return None,
        };
        let (cols, run) = (
            self.piece.cols,
            match self.group {
                Group::Run(n) => n,
                Group::Index { .. } => return None,
            },
        );
        if !self.symmetric || self.bits > bits || !cols.is_multiple_of(32) || !(run.is_multiple_of(32) || run >= cols) {
            return None;
        }
        let (mut codes, mut scales) = (vec![0; cols], vec![0.0; self.groups()]);
        let mut zeros = vec![0; scales.len()];
        self.row(r, &mut codes, &mut scales, &mut zeros);
        // Codes of fewer bits keep their distance from the middle.
        let shift = (1u8 << (bits - 1)) - (1 << (self.bits - 1));
        let mut out = Vec::with_capacity(cols / 32 * kind.block_bytes());
        for (b, block) in codes.chunks_exact(32).enumerate() {
            let scale = scales[self.group.of(b * 32)];
            let d = f16::from_f32(scale);
            if d.to_f32() != scale {
                return None;
            }
            symmetric_block(kind, d, |j| block[j] + shift, &mut out);
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Integers, Mask, PatternKind, ScaleCodec, pack_integers};
    use lacuna_base::Rng;

    fn random(bits: u8, group: usize, zeros: bool, rng: &mut Rng) -> Integers {
        let (rows, cols) = (5, 128);
        let groups = cols / group;
        let mut code = |n: usize| (0..n).map(|_| rng.below(1 << bits) as u8).collect::<Vec<_>>();
        let (codes, zeros) = (code(rows * cols), zeros.then(|| code(rows * groups)));
        let scales = Mat::from_fn(rows, groups, |r, g| ((r * 7 + g * 3) as f32 - 9.0) / 64.0);
        Integers { rows, cols, bits, codes, scales, zeros, group: Group::Run(group), offsets: None }
    }

    #[test]
    fn blocks_and_integers_hold_the_same_values_both_ways() {
        let mut rng = Rng::new(4);
        let holds = [(GgufType::Q4_0, 4), (GgufType::Q5_0, 5), (GgufType::Q8_0, 8)];
        for (kind, most) in holds {
            for bits in 2..=8 {
                for group in [32, 64, 128] {
                    let q = random(bits, group, false, &mut rng);
                    let mask = Mask::from_fn(5, 128, |r, c| (r + c) % 3 != 0);
                    for (kept, pattern) in [(None, PatternKind::Dense), (Some(&mask), PatternKind::Csr)] {
                        let s = Stored::from_piece(pack_integers(&q, kept, pattern, ScaleCodec::F16).unwrap());
                        let rows: Option<Vec<Vec<u8>>> =
                            (0..5).map(|r| s.integers().unwrap().row_as_blocks(r, kind)).collect();
                        assert_eq!(rows.is_some(), bits <= most, "{kind:?} of {bits} bits");
                        let Some(rows) = rows else { continue };
                        let values = Values::Gguf(kind, rows.concat().into());
                        let b = Stored::from_piece(Piece { rows: 5, cols: 128, pattern: Pattern::Dense, values });
                        assert_eq!(b.to_mat(), s.to_mat(), "{kind:?} of {bits} bits in groups of {group}");
                        // And back: the codes of the blocks are those that went in.
                        let (mut codes, mut scales, mut zeros) = (vec![0; 128], vec![0.0; 4], vec![0; 4]);
                        let again = b.integers().unwrap();
                        again.row(2, &mut codes, &mut scales, &mut zeros);
                        assert_eq!(again.row_as_blocks(2, kind).unwrap(), rows[2]);
                        assert!((0..128).all(|c| {
                            scales[c / 32] * (f32::from(codes[c]) - f32::from(zeros[c / 32])) == s.to_mat()[(2, c)]
                        }));
                    }
                }
            }
        }
    }

    #[test]
    fn what_blocks_cannot_hold_is_left_to_rounding() {
        let mut rng = Rng::new(5);
        let none = |q: &Integers, codec: ScaleCodec| {
            let s = Stored::from_piece(pack_integers(q, None, PatternKind::Dense, codec).unwrap());
            s.integers().unwrap().row_as_blocks(1, GgufType::Q4_0).is_none()
        };
        assert!(none(&random(4, 32, true, &mut rng), ScaleCodec::F16));
        assert!(none(&random(4, 16, false, &mut rng), ScaleCodec::F16));
        let mut q = random(4, 32, false, &mut rng);
        q.scales[(1, 1)] = 0.1;
        assert!(none(&q, ScaleCodec::F32) && !none(&q, ScaleCodec::F16));
        let float = Values::Float(crate::Float::F32, vec![0; 32 * 4].into());
        let s = Stored::from_piece(Piece { rows: 1, cols: 32, pattern: Pattern::Dense, values: float });
        assert!(s.integers().is_none());
    }

    #[test]
    fn scales_beside_the_same_codes_are_written_as_integers() {
        let mut rng = Rng::new(5);
        for kind in [GgufType::Q4_1, GgufType::Q5_1] {
            let (rows, cols) = (3, 320);
            let bytes: Vec<u8> = (0..rows * cols / 32)
                .flat_map(|_| {
                    let (d, m) = (0.01 + 0.02 * rng.f32(), -0.1 - 0.1 * rng.f32());
                    let mut b = [f16::from_f32(d).to_le_bytes(), f16::from_f32(m).to_le_bytes()].concat();
                    b.extend((4..kind.block_bytes()).map(|_| rng.u64() as u8));
                    b
                })
                .collect();
            let values = Values::Gguf(kind, bytes.into());
            let before = Stored::from_piece(Piece { rows, cols, pattern: Pattern::Dense, values });
            let after = before.with_coded_scales(8, 32).unwrap().unwrap();
            assert!(after.bytes() < before.bytes());
            let (a, b) = (before.to_mat(), after.to_mat());
            let error: f32 = a.data().iter().zip(b.data()).map(|(a, b)| (a - b).powi(2)).sum();
            let all: f32 = a.data().iter().map(|a| a * a).sum();
            assert!(error < 1e-4 * all, "{kind:?}: {error} of {all}");
            // Integers already: the same numbers again.
            let again = after.with_coded_scales(8, 32).unwrap().unwrap().to_mat();
            assert!(again.data().iter().zip(b.data()).all(|(x, y)| (x - y).abs() <= 1e-3 * y.abs().max(0.1)));
        }
        let plain = Stored::from_piece(
            pack_integers(&random(4, 32, false, &mut rng), None, PatternKind::Dense, ScaleCodec::F16).unwrap(),
        );
        assert!(plain.with_coded_scales(8, 32).unwrap().is_none(), "no minima");
        assert!(pack_multiples(&Mat::zeros(2, 3), 9, 8).is_err() && pack_multiples(&Mat::zeros(2, 3), 8, 0).is_err());
        let zeros = pack_multiples(&Mat::zeros(2, 3), 8, 8).unwrap();
        let mut row = [1.0; 3];
        zeros.row(1, &mut row);
        assert_eq!(row, [0.0; 3]);
    }
}

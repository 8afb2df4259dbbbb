//! The smaller models within a piece of nested tables.

use crate::bits::{pack, unpack};
use crate::pack::fail;
use crate::{FormatError, Owner, Piece, Stored, Tables, Term, Values};

impl Stored {
    /// The most bits a code of its pieces of codes into tables has; `None` where it has no such piece.
    pub fn code_bits(&self) -> Option<u8> {
        let bits = |term: &Term| match term {
            Term::Piece(Piece { values: Values::Codebook { bits, .. }, .. }) => Some(*bits),
            _ => None,
        };
        self.terms.iter().filter_map(bits).max()
    }

    /// The matrix with every piece of codes of more than `bits` bits into tables cut to its high bits, by [`narrow`].
    pub fn narrowed(&self, bits: u8) -> Result<Stored, FormatError> {
        let mut out = self.clone();
        for term in &mut out.terms {
            if let Term::Piece(piece) = term
                && matches!(piece.values, Values::Codebook { bits: wide, .. } if wide > bits)
            {
                *piece = narrow(piece, bits)?;
            }
        }
        Ok(out)
    }
}

/// The piece at fewer bits: the high bits of each code, and for each table one in which an entry is the mean of those
/// that share these bits, weighted by how many values chose each (alike, where none did). An entry that is 0 stays 0, so
/// that what a mask dropped stays dropped. Good for tables made by splitting; others lose more.
pub fn narrow(piece: &Piece, bits: u8) -> Result<Piece, FormatError> {
    piece.check()?;
    let Values::Codebook { bits: wide, codes, tables, scales } = &piece.values else {
        return fail("only codes into tables have smaller models within".into());
    };
    if bits == 0 || bits > *wide {
        return fail(format!("{bits} bits of codes of {wide}"));
    }
    let (cols, down) = (piece.cols, wide - bits);
    let (of, high) = (tables.owner.in_row(cols) << wide, 1usize << down);
    let owners = if tables.owner == Owner::Matrix { 1 } else { piece.rows };
    let mut chosen = vec![0u32; of * owners];
    let (mut line, mut at, mut short) = (Vec::new(), Vec::new(), Vec::new());
    for r in 0..piece.rows {
        let span = piece.pattern.span(r, cols);
        line.resize(span.len(), 0u8);
        unpack(codes, *wide, span.start, &mut line);
        piece.pattern.columns(r, cols, &mut at);
        for (i, code) in line.iter().enumerate() {
            let c = at.get(i).map_or(i, |c| *c as usize);
            chosen[(tables.owner.of(r, c, cols) << wide) + usize::from(*code)] += 1;
            short.push(code >> down);
        }
    }
    let mut entries = vec![0.0; chosen.len()];
    tables.float.decode(&tables.bytes, &mut entries);
    let merged = |(entries, chosen): (&[f32], &[u32])| {
        if entries.contains(&0.0) {
            return 0.0;
        }
        let all: f64 = chosen.iter().map(|n| f64::from(*n)).sum();
        let worth = |n: u32| if all > 0.0 { f64::from(n) / all } else { 1.0 / entries.len() as f64 };
        entries.iter().zip(chosen).map(|(e, n)| f64::from(*e) * worth(*n)).sum::<f64>() as f32
    };
    let lower: Vec<f32> = entries.chunks(high).zip(chosen.chunks(high)).map(merged).collect();
    let bytes = tables.float.encode(&lower).or_else(|i| fail(format!("table entry {}", lower[i])))?;
    let tables = Tables { bytes: bytes.into(), ..tables.clone() };
    let values = Values::Codebook { bits, codes: pack(&short, bits).into(), tables, scales: scales.clone() };
    let piece = Piece { pattern: piece.pattern.clone(), values, ..*piece };
    piece.check()?;
    Ok(piece)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Codebook, Float, Mask, PatternKind, ScaleCodec, pack_codebook};
    use lacuna_base::{Mat, Rng};

    #[test]
    fn high_bits_and_means_of_those_that_share_them() {
        let mut rng = Rng::new(4);
        for (rows, cols) in [(3, 40), (1, 1), (5, 16)] {
            for (owner, masked) in [(Owner::Matrix, false), (Owner::Row, true), (Owner::Group(8), false)] {
                let mut tables = Mat::from_fn(owner.count(rows, cols).unwrap(), 16, |_, _| rng.normal().abs() + 0.1);
                (0..tables.rows()).for_each(|o| tables.row_mut(o)[6] = 0.0);
                let codes: Vec<u8> = (0..rows * cols).map(|_| rng.below(16) as u8).collect();
                let q = Codebook { bits: 4, codes, owner, tables, scales: None };
                let mask = masked.then(|| Mask::from_fn(rows, cols, |r, c| (r + c) % 3 != 0));
                for kind in [PatternKind::Dense, PatternKind::Csr] {
                    let mask = mask.clone().or_else(|| Some(Mask::all(rows, cols, true)));
                    let shape = (rows, cols);
                    let piece = pack_codebook(shape, &q, mask.as_ref(), kind, Float::F32, ScaleCodec::F16).unwrap();
                    assert_eq!(narrow(&piece, 4).unwrap(), piece);
                    let (before, after) = (piece.to_mat(), narrow(&piece, 2).unwrap().to_mat());
                    let kept = |r: usize, c: usize| mask.as_ref().unwrap().get(r, c);
                    for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                        if !kept(r, c) {
                            assert_eq!(after[(r, c)], 0.0);
                            continue;
                        }
                        let high = q.codes[r * cols + c] >> 2;
                        // The mean of all stored values with the same table and the same high bits.
                        let table = owner.of(r, c, cols);
                        let mut same = vec![];
                        for (i, j) in (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))) {
                            if kept(i, j) && owner.of(i, j, cols) == table && q.codes[i * cols + j] >> 2 == high {
                                same.push(before[(i, j)]);
                            }
                        }
                        // The four with a 0 among them are all 0.
                        let want = if high == 1 { 0.0 } else { same.iter().sum::<f32>() / same.len() as f32 };
                        assert!((after[(r, c)] - want).abs() < 1e-5, "{owner:?} {kind:?} ({r}, {c})");
                    }
                }
            }
        }
        let floats = crate::pack_float(Mat::zeros(1, 2).view(), None, PatternKind::Dense, Float::F16).unwrap();
        assert!(narrow(&floats, 2).is_err());
    }
}

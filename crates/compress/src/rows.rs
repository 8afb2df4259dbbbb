//! Rows of a stored matrix that stay, written as they are.

use lacuna_base::Mat;
use lacuna_format::{
    Float, FormatError, Integers, Pattern, PatternKind, Piece, ScaleCodec, Scales, Stored, Values, pack_integers,
};

/// Some rows of a matrix in its own form, where that is one dense piece of floats, GGUF blocks or integers with plain
/// scales; nothing is rounded anew.
pub(crate) fn whole_rows(stored: &Stored, rows: &[usize]) -> Option<Result<Stored, FormatError>> {
    let piece = stored.single().filter(|p| p.pattern == Pattern::Dense)?;
    let bytes = |all: &[u8]| {
        let width = all.len() / piece.rows.max(1);
        let mut out = Vec::with_capacity(rows.len() * width);
        rows.iter().for_each(|r| out.extend_from_slice(&all[r * width..(r + 1) * width]));
        out.into()
    };
    let values = match &piece.values {
        Values::Float(float, all) => Values::Float(*float, bytes(all)),
        Values::Gguf(kind, all) => Values::Gguf(*kind, bytes(all)),
        Values::Int { scales: Scales::Float(float, _), .. } => {
            let made = integers(stored, rows)?;
            let codec = match float {
                Float::F32 => ScaleCodec::F32,
                Float::F16 => ScaleCodec::F16,
                _ => return None,
            };
            return Some(pack_integers(&made, None, PatternKind::Dense, codec).map(Stored::from_piece));
        }
        _ => return None,
    };
    let cut = Piece { rows: rows.len(), cols: piece.cols, pattern: Pattern::Dense, values };
    Some(Ok(Stored::from_piece(cut)))
}

fn integers(stored: &Stored, rows: &[usize]) -> Option<Integers> {
    let all = stored.integers()?;
    let (cols, groups) = (stored.cols, all.groups());
    let mut codes = vec![0; rows.len() * cols];
    let (mut scales, mut zeros) = (Mat::zeros(rows.len(), groups), vec![0; rows.len() * groups]);
    for (to, &from) in rows.iter().enumerate() {
        let zeros = &mut zeros[to * groups..(to + 1) * groups];
        all.row(from, &mut codes[to * cols..(to + 1) * cols], scales.row_mut(to), zeros);
    }
    let zeros = (!all.symmetric).then_some(zeros);
    Some(Integers {
        rows: rows.len(),
        cols,
        bits: all.bits,
        codes,
        scales,
        zeros,
        group: all.group.clone(),
        offsets: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_format::{GgufType, Group, Mask, pack_float};

    #[test]
    fn rows_keep_their_values_and_their_form() {
        let (w, rows) = (random(9, 64, 1), [0, 3, 4, 8]);
        let (codes, scales): (Vec<u8>, Mat) = ((0..9 * 64).map(|i| (i * 7 % 16) as u8).collect(), random(9, 4, 2));
        let ints = |zeros: Option<Vec<u8>>, codec| {
            let group = Group::Run(16);
            // Scales that f16 keeps.
            let scales = Mat::from_fn(9, 4, |r, c| (scales[(r, c)] * 64.0).round() / 64.0 + 2.0);
            let q = Integers { rows: 9, cols: 64, bits: 4, codes: codes.clone(), scales, zeros, group, offsets: None };
            Stored::from_piece(pack_integers(&q, None, PatternKind::Dense, codec).unwrap())
        };
        let blocks = |kind: GgufType| {
            let bytes: Vec<u8> = (0..9 * 64 / kind.block() * kind.block_bytes()).map(|i| (i % 50) as u8).collect();
            let values = Values::Gguf(kind, bytes.into());
            Stored::from_piece(Piece { rows: 9, cols: 64, pattern: Pattern::Dense, values })
        };
        let float = |f| Stored::from_piece(pack_float(w.view(), None, PatternKind::Dense, f).unwrap());
        let all = [
            float(Float::F32),
            float(Float::Bf16),
            blocks(GgufType::Q8_0),
            blocks(GgufType::Q4_0),
            ints(None, ScaleCodec::F16),
            ints(Some((0..36).map(|i| i % 16).collect()), ScaleCodec::F32),
        ];
        for stored in &all {
            let cut = whole_rows(stored, &rows).unwrap().unwrap();
            cut.check().unwrap();
            assert_eq!((cut.rows, cut.cols, cut.codec_name()), (4, 64, stored.codec_name()));
            let (was, is) = (stored.to_mat(), cut.to_mat());
            rows.iter().enumerate().for_each(|(to, &from)| assert_eq!(is.row(to), was.row(from)));
        }
        let sparse = Mask::from_fn(9, 64, |r, c| (r + c) % 3 == 0);
        let sparse = pack_float(w.view(), Some(&sparse), PatternKind::Mask { height: 1 }, Float::F32).unwrap();
        assert!(whole_rows(&Stored::from_piece(sparse), &rows).is_none());
    }
}

//! Rounding to tables: a table for each row or run of columns, each weight to its nearest entry.

use lacuna_base::{Mat, MatRef, float};
use lacuna_contract::{MethodError, Table};
use lacuna_format::{Codebook, Float, Mask, Owner};

/// Codes and tables of `w`, with `(bits, group, float)`: columns that share a table (0: a whole row) and how entries
/// are written.
///
/// Where a mask drops something of a group, the entry nearest to 0 becomes 0: a dense piece stores what is dropped as
/// that entry.
pub(super) fn round(
    w: MatRef<'_>,
    mask: Option<&Mask>,
    table: &dyn Table,
    importance: Option<&Mat>,
    (bits, group, written): (u8, usize, Float),
) -> Result<Codebook, MethodError> {
    let (rows, cols) = (w.rows(), w.cols());
    if let Some(m) = importance.filter(|m| (m.rows(), m.cols()) != (rows, cols)) {
        let what = format!("importance of {} x {} for a matrix of {rows} x {cols}", m.rows(), m.cols());
        return Err(MethodError::new(what));
    }
    let run = if group == 0 { cols } else { group.min(cols) }.max(1);
    let groups = cols.div_ceil(run).max(1);
    let size = 1usize << bits;
    let mut tables = Mat::zeros(rows * groups, size);
    let mut codes = vec![0u8; rows * cols];
    let (mut kept, mut weigh) = (Vec::with_capacity(run), Vec::with_capacity(run));
    for r in 0..rows {
        for g in 0..groups {
            let span = g * run..((g + 1) * run).min(cols);
            let stays = |c: &usize| mask.is_none_or(|m| m.get(r, *c));
            kept.clear();
            weigh.clear();
            for c in span.clone().filter(stays) {
                kept.push(w.at(r, c));
                weigh.extend(importance.map(|m| m[(r, c)]));
            }
            let mut entries = table.table(&kept, &weigh, bits)?;
            if entries.len() != size {
                return Err(MethodError::new(format!("a table of {} entries for {bits} bits", entries.len())));
            }
            for e in &mut entries {
                *e = stored(*e, written)?;
            }
            if kept.len() < span.len() {
                let near = (0..size).min_by(|&a, &b| entries[a].abs().total_cmp(&entries[b].abs())).unwrap_or(0);
                entries[near] = 0.0;
            }
            entries.sort_by(f32::total_cmp);
            for c in span.filter(stays) {
                codes[r * cols + c] = nearest(&entries, w.at(r, c));
            }
            tables.row_mut(r * groups + g).copy_from_slice(&entries);
        }
    }
    let owner = if groups == 1 { Owner::Row } else { Owner::Group(run) };
    Ok(Codebook { bits, codes, owner, tables, scales: None })
}

/// The entry as the file will hold it.
fn stored(x: f32, written: Float) -> Result<f32, MethodError> {
    let near = if written == Float::F32 { x } else { float::round_f16(x) };
    if near.is_finite() {
        return Ok(near);
    }
    Err(MethodError::new(format!("a table needs the value {x}, which is beyond f16; scale = \"f32\" holds it")))
}

/// The index of the entry nearest to `v`, of equals the lower.
fn nearest(entries: &[f32], v: f32) -> u8 {
    let above = entries.partition_point(|e| *e < v);
    let below = above.saturating_sub(1);
    let at = match entries.get(above) {
        Some(e) if (e - v).abs() < (v - entries[below]).abs() => above,
        _ => below,
    };
    at as u8
}

/// The values that codes stand for; what the mask drops is 0.
pub(super) fn values(q: &Codebook, mask: Option<&Mask>, (rows, cols): (usize, usize)) -> Mat {
    let groups = q.tables.rows() / rows.max(1);
    let run = match q.owner {
        Owner::Group(n) => n,
        _ => cols.max(1),
    };
    Mat::from_fn(rows, cols, |r, c| {
        let kept = mask.is_none_or(|m| m.get(r, c));
        if kept { q.tables[(r * groups + c / run, usize::from(q.codes[r * cols + c]))] } else { 0.0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_format::{Code, UnpackedPiece};

    /// Evenly spaced from the least to the largest.
    struct Even;

    impl Table for Even {
        fn table(&self, values: &[f32], _: &[f32], bits: u8) -> Result<Vec<f32>, MethodError> {
            let low = values.iter().copied().fold(0.0, f32::min);
            let high = values.iter().copied().fold(0.0, f32::max);
            let top = f32::from((1u16 << bits) - 1);
            Ok((0..1 << bits).map(|i| low + (high - low) * i as f32 / top).collect())
        }

        fn importance(&self) -> Option<lacuna_contract::Ask> {
            None
        }
    }

    #[test]
    fn what_is_packed_decodes_to_the_nearest_entries() {
        for (rows, cols, group) in [(3, 20, 0), (2, 20, 8), (1, 1, 0), (4, 7, 100)] {
            for masked in [false, true] {
                let w = random(rows, cols, 3);
                let mask = masked.then(|| Mask::from_fn(rows, cols, |r, c| (r + c) % 5 != 0));
                let q = round(w.view(), mask.as_ref(), &Even, None, (3, group, Float::F16)).expect("rounds");
                let got = values(&q, mask.as_ref(), (rows, cols));
                let mut piece = UnpackedPiece::dense(got.clone());
                piece.mask = mask.clone();
                let tables = q.tables.clone();
                piece.code = Code::Codebook(q, Float::F16, lacuna_format::ScaleCodec::F16);
                assert_eq!(piece.pack(Float::F32).expect("packs").to_mat(), got, "{rows} {cols} {group} {masked}");
                let run = if group == 0 { cols } else { group.min(cols) };
                for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    let entries = tables.row(r * cols.div_ceil(run) + c / run);
                    let best = entries.iter().map(|e| (e - w[(r, c)]).abs()).fold(f32::INFINITY, f32::min);
                    let kept = mask.as_ref().is_none_or(|m| m.get(r, c));
                    assert!(!kept || (got[(r, c)] - w[(r, c)]).abs() <= best, "({r}, {c})");
                }
            }
        }
    }
}

//! Rounding to tables: a table for each row or run of columns, each weight to its nearest entry.

use lacuna_base::{Mat, MatRef, float};
use lacuna_contract::{GridAsk, MethodError, Scaled, ScaledAsk, ScaledTable, Table};
use lacuna_format::{Codebook, Float, Group, Mask, Owner, ScaleCodec};

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

/// Codes of `w` into the one table of the matrix, and how scales are written; `group` as of [`round`].
pub(super) fn scaled(
    w: MatRef<'_>,
    mask: Option<&Mask>,
    by: &dyn Scaled,
    ask: &GridAsk,
    group: usize,
) -> Result<(Codebook, ScaleCodec), MethodError> {
    let (rows, cols, bits) = (w.rows(), w.cols(), ask.bits);
    let run = if group == 0 { cols } else { group.min(cols) }.max(1);
    let ScaledTable { table, scales, codec } = by.fit(&ScaledAsk { w, mask, ask: *ask, group: run })?;
    let groups = cols.div_ceil(run);
    if table.len() != 1 << bits || (scales.rows(), scales.cols()) != (rows, groups) {
        let (n, r, c) = (table.len(), scales.rows(), scales.cols());
        return Err(MethodError::new(format!(
            "a table of {n} entries and scales of {r} x {c} for {bits} bits and {rows} x {groups} groups"
        )));
    }
    let mut codes = vec![0u8; rows * cols];
    for r in 0..rows {
        for c in (0..cols).filter(|&c| mask.is_none_or(|m| m.get(r, c))) {
            let scale = scales[(r, c / run)];
            codes[r * cols + c] = nearest(&table, if scale == 0.0 { 0.0 } else { w.at(r, c) / scale });
        }
    }
    let tables = Mat::from_vec(1, table.len(), table);
    let scales = Some((scales, Group::Run(run)));
    Ok((Codebook { bits, codes, owner: Owner::Matrix, tables, scales }, codec))
}

/// The values that codes stand for; what the mask drops is 0.
pub(super) fn values(q: &Codebook, mask: Option<&Mask>, (rows, cols): (usize, usize)) -> Mat {
    Mat::from_fn(rows, cols, |r, c| {
        if mask.is_some_and(|m| !m.get(r, c)) {
            return 0.0;
        }
        let entry = q.tables[(q.owner.of(r, c, cols), usize::from(q.codes[r * cols + c]))];
        q.scales.as_ref().map_or(entry, |(scales, group)| scales[(r, group.of(c))] * entry)
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

    /// A table of 0 and ±1, under the largest of each group.
    struct Signs;

    impl Scaled for Signs {
        fn fit(&self, ask: &ScaledAsk<'_>) -> Result<ScaledTable, MethodError> {
            let groups = ask.w.cols().div_ceil(ask.group);
            let most = |r: usize, g: usize| {
                ask.w
                    .row(r)
                    .chunks(ask.group)
                    .nth(g)
                    .map_or(0.0, |v| float::round_f16(v.iter().fold(0.0, |a, x| x.abs().max(a))))
            };
            let scales = Mat::from_fn(ask.w.rows(), groups, most);
            Ok(ScaledTable { table: vec![-1.0, 0.0, 0.0, 1.0], scales, codec: ScaleCodec::F16 })
        }
    }

    #[test]
    fn scaled_tables_are_packed_as_they_are_read() {
        for (rows, cols, group) in [(3, 20, 0), (2, 20, 8), (1, 1, 4), (4, 7, 100)] {
            for masked in [false, true] {
                let w = random(rows, cols, 5);
                let mask = masked.then(|| Mask::from_fn(rows, cols, |r, c| (r + c) % 4 != 0));
                let ask = GridAsk { bits: 2, symmetric: true, scale: Float::F16 };
                let (q, codec) = scaled(w.view(), mask.as_ref(), &Signs, &ask, group).expect("rounds");
                let got = values(&q, mask.as_ref(), (rows, cols));
                let run = if group == 0 { cols } else { group };
                for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                    let scale =
                        w.row(r).chunks(run).nth(c / run).expect("a group").iter().fold(0.0f32, |a, x| x.abs().max(a));
                    let near = [-1.0, 0.0, 1.0].map(|t| (t * float::round_f16(scale) - w[(r, c)]).abs());
                    let best = near.into_iter().fold(f32::INFINITY, f32::min);
                    let kept = mask.as_ref().is_none_or(|m| m.get(r, c));
                    assert!(if kept { (got[(r, c)] - w[(r, c)]).abs() <= best + 1e-6 } else { got[(r, c)] == 0.0 });
                }
                let mut piece = UnpackedPiece::dense(got.clone());
                piece.mask = mask;
                piece.code = Code::Codebook(q, Float::F32, codec);
                assert_eq!(piece.pack(Float::F32).expect("packs").to_mat(), got, "{rows} {cols} {group} {masked}");
            }
        }
    }
}

//! From scores to masks: the lowest scores go, in the groups that compete.

use lacuna_base::Mat;
use lacuna_contract::{Scope, Sparsity};
use lacuna_format::Mask;

/// One matrix's scores, and what earlier steps kept of it.
pub(crate) struct Scored<'a> {
    /// Larger = keep, `[out, in]`.
    pub scores: &'a Mat,
    /// What is left from before; the rest is gone and counts as pruned.
    pub before: Option<&'a Mask>,
    /// Fraction of zeros wanted.
    pub sparsity: f64,
}

/// The masks of matrices that compete in `scope`, in their order. Ties: the entry that comes first (row by row) goes
/// first.
///
/// N:M patterns compete within their run, whatever the scope. Errors name a shape that a pattern does not divide or a
/// score that is no number.
pub(crate) fn select(list: &[Scored<'_>], pattern: Sparsity, scope: Scope) -> Result<Vec<Mask>, String> {
    for s in list {
        if let Some(i) = s.scores.data().iter().position(|x| x.is_nan()) {
            return Err(format!("the score at ({}, {}) is no number", i / s.scores.cols(), i % s.scores.cols()));
        }
    }
    match pattern {
        Sparsity::Nm { n, m } => list.iter().map(|s| nm(s, n, m)).collect(),
        Sparsity::Unstructured => blocks(list, 1, 1, scope),
        Sparsity::Block { height, width } => blocks(list, height, width, scope),
    }
}

fn alive(s: &Scored<'_>, r: usize, c: usize) -> bool {
    s.before.is_none_or(|m| m.get(r, c))
}

fn nm(s: &Scored<'_>, n: usize, m: usize) -> Result<Mask, String> {
    let (rows, cols) = (s.scores.rows(), s.scores.cols());
    if cols % m != 0 {
        return Err(format!("{cols} columns do not divide into runs of {m}"));
    }
    let mut mask = Mask::all(rows, cols, false);
    let mut order: Vec<usize> = Vec::with_capacity(m);
    for r in 0..rows {
        let row = s.scores.row(r);
        for run in (0..cols).step_by(m) {
            order.clear();
            order.extend((run..run + m).filter(|&c| alive(s, r, c)));
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(b.cmp(&a)));
            for &c in order.iter().take(n) {
                mask.set(r, c, true);
            }
        }
    }
    Ok(mask)
}

/// A candidate to go: its score, its matrix, its block row and block column.
type Unit = (f32, u32, u32, u32);

fn blocks(list: &[Scored<'_>], height: usize, width: usize, scope: Scope) -> Result<Vec<Mask>, String> {
    let mut masks = Vec::with_capacity(list.len());
    let mut all: Vec<Unit> = Vec::new();
    let (mut wanted, mut total) = (0.0f64, 0usize);
    for (i, s) in list.iter().enumerate() {
        let (rows, cols) = (s.scores.rows(), s.scores.cols());
        if rows % height != 0 || cols % width != 0 {
            return Err(format!("a {rows} x {cols} matrix does not divide into blocks of {height} x {width}"));
        }
        let mut mask = Mask::all(rows, cols, true);
        let mut units: Vec<Unit> = Vec::new();
        // Shares of rows add up to exactly the share of the whole.
        let until = |rows: usize| asked(s.sparsity, rows * (cols / width));
        for br in 0..rows / height {
            for bc in 0..cols / width {
                units.push((unit_score(s, br, bc, height, width), i as u32, br as u32, bc as u32));
            }
            if scope == Scope::Row {
                let drop = until(br + 1) - until(br);
                clear_lowest(&mut units, drop, std::slice::from_mut(&mut mask), i, height, width);
                units.clear();
            }
        }
        match scope {
            Scope::Row => {}
            Scope::Matrix => {
                let drop = asked(s.sparsity, units.len());
                clear_lowest(&mut units, drop, std::slice::from_mut(&mut mask), i, height, width);
            }
            Scope::Layer => {
                wanted += s.sparsity * units.len() as f64;
                total += units.len();
                all.append(&mut units);
            }
        }
        masks.push(mask);
    }
    if scope == Scope::Layer {
        clear_lowest(&mut all, (wanted.round() as usize).min(total), &mut masks, 0, height, width);
    }
    for (mask, s) in masks.iter_mut().zip(list) {
        if let Some(before) = s.before {
            mask.intersect(before);
        }
    }
    Ok(masks)
}

/// How many of `n` go at a sparsity: the nearest whole number, halves up. The one place that says so.
pub(crate) fn asked(sparsity: f64, n: usize) -> usize {
    ((sparsity * n as f64).round() as usize).min(n)
}

/// The sum of a block's scores; a block that earlier steps emptied ranks below everything.
fn unit_score(s: &Scored<'_>, br: usize, bc: usize, height: usize, width: usize) -> f32 {
    let (mut sum, mut any) = (0.0f64, false);
    for r in br * height..(br + 1) * height {
        for c in bc * width..(bc + 1) * width {
            if alive(s, r, c) {
                sum += f64::from(s.scores[(r, c)]);
                any = true;
            }
        }
    }
    if any { sum as f32 } else { f32::NEG_INFINITY }
}

/// Clears the `drop` lowest units in the masks; `first` is the index of `masks[0]`.
fn clear_lowest(units: &mut [Unit], drop: usize, masks: &mut [Mask], first: usize, height: usize, width: usize) {
    if drop == 0 {
        return;
    }
    let order = |a: &Unit, b: &Unit| a.0.total_cmp(&b.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)));
    if drop < units.len() {
        units.select_nth_unstable_by(drop - 1, order);
    }
    for &(_, i, br, bc) in &units[..drop.min(units.len())] {
        let mask = &mut masks[i as usize - first];
        for r in br as usize * height..(br as usize + 1) * height {
            for c in bc as usize * width..(bc as usize + 1) * width {
                mask.set(r, c, false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use proptest::prelude::*;

    fn scored(scores: &Mat, sparsity: f64) -> Scored<'_> {
        Scored { scores, before: None, sparsity }
    }

    #[test]
    fn row_scope_drops_as_many_in_every_row_and_the_asked_number_in_all() {
        let s = random(7, 33, 1);
        let m = &select(&[scored(&s, 0.5)], Sparsity::Unstructured, Scope::Row).unwrap()[0];
        assert_eq!(7 * 33 - m.kept(), 116);
        for r in 0..7 {
            let kept: Vec<f32> = (0..33).filter(|&c| m.get(r, c)).map(|c| s[(r, c)]).collect();
            let gone: Vec<f32> = (0..33).filter(|&c| !m.get(r, c)).map(|c| s[(r, c)]).collect();
            assert!(gone.len() == 16 || gone.len() == 17);
            let least = kept.iter().copied().fold(f32::INFINITY, f32::min);
            assert!(gone.iter().all(|g| *g <= least));
        }
    }

    #[test]
    fn layer_scope_lets_matrices_compete() {
        let (a, b) = (Mat::from_fn(4, 4, |_, _| 1.0), Mat::from_fn(4, 4, |_, _| 2.0));
        let m = select(&[scored(&a, 0.5), scored(&b, 0.5)], Sparsity::Unstructured, Scope::Layer).unwrap();
        assert_eq!((m[0].kept(), m[1].kept()), (0, 16));
    }

    #[test]
    fn what_is_gone_stays_gone_and_counts() {
        let s = random(8, 64, 3);
        let before = Mask::from_fn(8, 64, |_, c| c >= 16);
        let one = Scored { scores: &s, before: Some(&before), sparsity: 0.5 };
        for pattern in [Sparsity::Unstructured, Sparsity::Nm { n: 2, m: 4 }, Sparsity::Block { height: 8, width: 1 }] {
            let m = &select(&[Scored { ..one }], pattern, Scope::Matrix).unwrap()[0];
            assert!((0..8).all(|r| (0..16).all(|c| !m.get(r, c))));
            if pattern == Sparsity::Unstructured {
                assert_eq!(m.kept(), 256);
            }
        }
    }

    #[test]
    fn shapes_that_do_not_divide_are_refused() {
        let s = random(3, 10, 1);
        assert!(
            select(&[scored(&s, 0.5)], Sparsity::Nm { n: 2, m: 4 }, Scope::Row).unwrap_err().contains("10 columns")
        );
        assert!(select(&[scored(&s, 0.5)], Sparsity::Block { height: 2, width: 1 }, Scope::Row).is_err());
        let nan = Mat::from_fn(1, 4, |_, c| if c == 2 { f32::NAN } else { 1.0 });
        assert!(select(&[scored(&nan, 0.5)], Sparsity::Unstructured, Scope::Row).unwrap_err().contains("(0, 2)"));
    }

    proptest! {
        #[test]
        fn nm_holds_everywhere(rows in 1usize..9, runs in 1usize..9, n in 1usize..4, seed in 0u64..1000) {
            let s = random(rows, runs * 4, seed);
            let m = &select(&[scored(&s, 0.0)], Sparsity::Nm { n, m: 4 }, Scope::Row).unwrap()[0];
            for r in 0..rows {
                for run in 0..runs {
                    prop_assert_eq!((0..4).filter(|i| m.get(r, run * 4 + i)).count(), n);
                }
            }
        }

        #[test]
        fn asked_sparsity_is_met(rows in 1usize..20, cols in 1usize..40, pct in 0u32..=100, seed in 0u64..1000) {
            let s = random(rows, cols, seed);
            for scope in [Scope::Row, Scope::Matrix, Scope::Layer] {
                let m = &select(&[scored(&s, f64::from(pct) / 100.0)], Sparsity::Unstructured, scope).unwrap()[0];
                prop_assert_eq!(rows * cols - m.kept(), (f64::from(pct) / 100.0 * (rows * cols) as f64).round() as usize);
            }
        }
    }
}

//! How far a changed matrix is from its source, for the report.

use std::sync::Arc;

use lacuna_base::{Mat, MatRef, dense};
use lacuna_contract::Stats;
use lacuna_format::Stored;

/// Rows looked at, spread evenly: as telling as all of them, and a small part of what the step itself costs.
const ROWS: usize = 64;

/// What a change of a matrix does to its outputs.
pub(crate) struct Change {
    /// `‖(W - W') X‖²`.
    pub(crate) lost: f64,
    /// `‖W X‖²`.
    pub(crate) whole: f64,
}

/// Both over evenly spread rows, for all of them, where the Gram matrix is known; with its diagonal alone where only
/// squares are, else of the weights alone. `None` where nothing changed.
pub(crate) fn change(before: &Arc<Stored>, after: &Arc<Stored>, stats: &Stats<'_>) -> Option<Change> {
    if Arc::ptr_eq(before, after) || before == after || before.rows != after.rows {
        return None;
    }
    let rows = before.rows.min(ROWS);
    let pick = |stored: &Stored| {
        let mut m = Mat::zeros(rows, stored.cols);
        for i in 0..rows {
            let r = i * stored.rows / rows;
            let row = lacuna_base::MatMut::new(1, stored.cols, m.row_mut(i));
            stored.decode_rows(r, r + 1, row);
        }
        m
    };
    let (b, a) = (pick(before), pick(after));
    let delta = Mat::from_fn(rows, before.cols, |r, c| b[(r, c)] - a[(r, c)]);
    let all = before.rows as f64 / rows.max(1) as f64;
    let [lost, whole] = [delta, b].map(|m| (energy(m.view(), stats) * all).max(0.0));
    Some(Change { lost, whole })
}

/// `‖(W - W') X‖² / ‖W X‖²` of a [`change`]. 0 for zeros; `None` where nothing changed.
pub(crate) fn relative_error(before: &Arc<Stored>, after: &Arc<Stored>, stats: &Stats<'_>) -> Option<f64> {
    change(before, after, stats).map(|c| c.relative())
}

impl Change {
    pub(crate) fn relative(&self) -> f64 {
        if self.whole <= 0.0 { 0.0 } else { self.lost / self.whole }
    }
}

fn energy(w: MatRef<'_>, stats: &Stats<'_>) -> f64 {
    if let Ok(gram) = stats.gram() {
        let n = gram.n();
        let scale = gram.mean_diag().max(f64::MIN_POSITIVE);
        let g = Mat::from_fn(n, n, |i, j| (gram.at(i, j) / scale) as f32);
        let wg = dense::matmul_nn(w, g.view());
        scale * (0..w.rows()).map(|r| dot(w.row(r), wg.row(r))).sum::<f64>()
    } else if let Ok(sq) = stats.squares() {
        (0..w.rows())
            .map(|r| w.row(r).iter().zip(sq).map(|(x, s)| f64::from(*x) * f64::from(*x) * s).sum::<f64>())
            .sum()
    } else {
        (0..w.rows()).map(|r| dot(w.row(r), w.row(r))).sum()
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::{Gram, testkit::random};
    use lacuna_contract::{Ask, Gathered};
    use lacuna_format::{Float, Unpacked};

    #[test]
    fn agrees_with_the_outputs_themselves() {
        let (w, x) = (random(12, 8, 1), random(40, 8, 2));
        let half = Mat::from_fn(12, 8, |r, c| if c % 2 == 0 { w[(r, c)] } else { 0.0 });
        let [before, after] = [&w, &half].map(|m| Arc::new(Unpacked::dense(m.clone()).pack(Float::F32).unwrap()));
        let mut gram = Gram::new(8);
        gram.add(x.view());
        let found = [(Ask::InputGram, Gathered::Gram(gram))];
        let stats = Stats { tokens: 40, found: &found, gradients: &[], sequences: 0, worked: None };
        let (b, a) = (before.to_mat(), after.to_mat());
        let norm = |m: &dyn Fn(usize, usize) -> f64| -> f64 {
            let out = |r: usize, t: usize| (0..8).map(|c| m(r, c) * f64::from(x[(t, c)])).sum::<f64>();
            (0..12).map(|r| (0..40).map(|t| out(r, t).powi(2)).sum::<f64>()).sum()
        };
        let want = norm(&|r, c| f64::from(b[(r, c)] - a[(r, c)])) / norm(&|r, c| f64::from(b[(r, c)]));
        let got = relative_error(&before, &after, &stats).unwrap();
        assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
        let lost = change(&before, &after, &stats).unwrap().lost;
        let all = norm(&|r, c| f64::from(b[(r, c)] - a[(r, c)]));
        assert!((lost / all - 1.0).abs() < 1e-4, "{lost} {all}");
        assert_eq!(relative_error(&before, &before.clone(), &stats), None);
    }
}

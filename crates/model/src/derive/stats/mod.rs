//! What gradients add up to: reducers that a walk shows its gradients, plain data out.

mod each;
mod gram;
mod mean;
mod norms;
mod sides;
mod square;

pub use each::Each;
pub use gram::OutputGrams;
pub use mean::Mean;
pub use norms::Norms;
pub use sides::Sides;
pub use square::Square;

use std::collections::{BTreeMap, BTreeSet};

use lacuna_base::{Mat, MatRef, dense};
use lacuna_spec::Place;

use super::GradientSink;
use crate::ModelError;

/// What becomes of the weight gradients of one matrix, sequence by sequence. Two at once are a pair.
pub trait Fold {
    /// Nothing yet, for a matrix `[outputs, inputs]`.
    fn new(outputs: usize, inputs: usize) -> Self;

    /// Takes one sequence's gradient, `[outputs, inputs]`. A sequence that did not reach the matrix (an expert) has a
    /// gradient of 0, which is not handed in.
    fn add(&mut self, gradient: &Mat);
}

impl<A: Fold, B: Fold> Fold for (A, B) {
    fn new(outputs: usize, inputs: usize) -> Self {
        (A::new(outputs, inputs), B::new(outputs, inputs))
    }
    fn add(&mut self, gradient: &Mat) {
        self.0.add(gradient);
        self.1.add(gradient);
    }
}

/// Sums each sequence's weight gradient, `dYᵀ · X` in f32, and folds it.
#[derive(Clone, Debug)]
pub struct WeightGradients<F> {
    places: BTreeSet<Place>,
    /// Of the sequence that is being shown.
    open: BTreeMap<Place, Mat>,
    folds: BTreeMap<Place, F>,
    /// Sequences of the present part so far, and of the last whole one.
    shown: u64,
    sequences: u64,
    /// Matrices of gradients that were used before.
    free: Vec<Mat>,
}

impl<F: Fold> WeightGradients<F> {
    /// For the matrices at `places`.
    pub fn new(places: impl IntoIterator<Item = Place>) -> WeightGradients<F> {
        WeightGradients {
            places: places.into_iter().collect(),
            open: BTreeMap::new(),
            folds: BTreeMap::new(),
            shown: 0,
            sequences: 0,
            free: Vec::new(),
        }
    }

    /// How many sequences the last whole part was shown: what means are over.
    pub fn sequences(&self) -> u64 {
        self.sequences
    }

    /// What came of the matrix at `place`; `None` where no sequence reached it.
    pub fn get(&self, place: &Place) -> Option<&F> {
        self.folds.get(place)
    }

    /// Takes out everything so far, such as the matrices of a block at its part's end: a walk then never holds more
    /// than a block's.
    pub fn take(&mut self) -> BTreeMap<Place, F> {
        std::mem::take(&mut self.folds)
    }
}

impl<F: Fold> GradientSink for WeightGradients<F> {
    fn wants(&self, place: &Place) -> bool {
        self.places.contains(place)
    }

    fn gradient(&mut self, place: &Place, x: MatRef<'_>, dy: MatRef<'_>) {
        if !self.places.contains(place) {
            return;
        }
        let (rows, cols) = (dy.cols(), x.cols());
        let free = &mut self.free;
        let sum = self.open.entry(*place).or_insert_with(|| {
            let mut data = free.pop().map(Mat::into_vec).unwrap_or_default();
            data.clear();
            data.resize(rows * cols, 0.0);
            Mat::from_vec(rows, cols, data)
        });
        dense::add_matmul_tn(sum.view_mut(), 1.0, dy, x);
    }

    fn end_of_sequence(&mut self) {
        self.shown += 1;
        for (place, gradient) in std::mem::take(&mut self.open) {
            let fold = self.folds.entry(place).or_insert_with(|| F::new(gradient.rows(), gradient.cols()));
            fold.add(&gradient);
            self.free.push(gradient);
        }
    }

    fn end_of_part(&mut self, _: Option<usize>) -> Result<(), ModelError> {
        self.free.clear();
        self.sequences = std::mem::take(&mut self.shown);
        Ok(())
    }
}

/// `sum += f(gradient)`, entry by entry.
fn accumulate(sum: &mut Mat, gradient: &Mat, f: impl Fn(f32) -> f32 + Sync) {
    assert_eq!((sum.rows(), sum.cols()), (gradient.rows(), gradient.cols()), "gradients of two shapes");
    super::rows::each(sum.view_mut(), |r, row| {
        row.iter_mut().zip(gradient.row(r)).for_each(|(s, &g)| *s += f(g));
    });
}

/// `f(sum)`, entry by entry.
fn map(sum: &Mat, f: impl Fn(f32) -> f32) -> Mat {
    Mat::from_vec(sum.rows(), sum.cols(), sum.data().iter().map(|&s| f(s)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_spec::Role;

    #[test]
    fn folds_agree_with_their_definitions() {
        let place = Place::layer(0, Role::Q);
        type All = (((Mean, Square), (Norms, Sides)), Each);
        let mut sink: WeightGradients<All> = WeightGradients::new([place]);
        let mut grams = OutputGrams::new([place]);
        assert!(sink.wants(&place) && !sink.wants(&Place::layer(0, Role::K)) && !grams.wants(&place.bias()));
        let mut exact = Vec::new();
        let mut all_dy = Vec::new();
        // Three sequences; the second reaches nothing; the others come in two calls.
        for sequence in 0..3u64 {
            let mut dw = Mat::zeros(4, 6);
            for call in 0..if sequence == 1 { 0 } else { 2 } {
                let seed = 10 * sequence + call;
                let (x, dy) = (random(5, 6, seed), random(5, 4, seed + 100));
                sink.gradient(&place, x.view(), dy.view());
                sink.gradient(&Place::layer(0, Role::K), x.view(), dy.view());
                grams.gradient(&place, x.view(), dy.view());
                for (o, i) in (0..4).flat_map(|o| (0..6).map(move |i| (o, i))) {
                    dw[(o, i)] += (0..5).map(|t| dy[(t, o)] * x[(t, i)]).sum::<f32>();
                }
                all_dy.push(dy);
            }
            sink.end_of_sequence();
            exact.push(dw);
        }
        sink.end_of_part(Some(0)).unwrap();
        assert_eq!(sink.sequences(), 3);
        assert!(sink.get(&Place::layer(0, Role::K)).is_none());
        let (((mean, square), (norms, sides)), each) = sink.get(&place).unwrap();
        // The second sequence reached nothing and is left out.
        let kept = each.clone().into_mat();
        assert_eq!((kept.rows(), kept.cols()), (8, 6));
        for (n, dw) in [&exact[0], &exact[2]].into_iter().enumerate() {
            assert!(max_abs_diff(kept.view().rows_range(4 * n, 4 * n + 4), dw.view()) < 1e-5, "{n}");
        }
        let over = |f: &dyn Fn(&Mat, usize, usize) -> f32| {
            Mat::from_fn(4, 6, |o, i| exact.iter().map(|dw| f(dw, o, i)).sum::<f32>())
        };
        let third = |m: Mat| map(&m, |x| x / 3.0);
        for (name, got, want) in [
            ("mean", mean.mean(3), third(over(&|m, o, i| m[(o, i)]))),
            ("square", square.mean(3), third(over(&|m, o, i| m[(o, i)] * m[(o, i)]))),
            ("l1", norms.mean_abs(3), third(over(&|m, o, i| m[(o, i)].abs()))),
            ("l2", norms.root_sum_of_squares(), map(&over(&|m, o, i| m[(o, i)] * m[(o, i)]), f32::sqrt)),
        ] {
            assert!(max_abs_diff(got.view(), want.view()) < 1e-4, "{name}");
        }
        let (rows, columns) = (sides.rows(3), sides.columns(3));
        assert_eq!((rows.rows(), columns.rows()), (4, 6));
        for (a, b) in (0..6).flat_map(|a| (0..6).map(move |b| (a, b))) {
            let of = |f: &dyn Fn(&Mat) -> f32| exact.iter().map(f).sum::<f32>() / 3.0;
            let want = of(&|g| (0..4).map(|o| g[(o, a)] * g[(o, b)]).sum());
            assert!((columns[(a, b)] - want).abs() < 1e-3 * (1.0 + want.abs()));
            if a.max(b) < 4 {
                let want = of(&|g| (0..6).map(|i| g[(a, i)] * g[(b, i)]).sum());
                assert!((rows[(a, b)] - want).abs() < 1e-3 * (1.0 + want.abs()));
            }
        }
        let gram = grams.get(&place).unwrap();
        for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
            let want: f64 =
                all_dy.iter().flat_map(|dy| (0..5).map(move |t| f64::from(dy[(t, a)]) * f64::from(dy[(t, b)]))).sum();
            assert!((gram.at(a, b) - want).abs() < 1e-9 * (1.0 + want.abs()));
        }
        assert_eq!(sink.take().len(), 1);
        assert!(sink.get(&place).is_none());
    }
}

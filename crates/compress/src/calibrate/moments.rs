//! Mean and variance of each input of a matrix.

use lacuna_contract::Gathered;

use super::{Event, Reducer};

/// Running mean and sum of squared distances from it (Welford), which loses no digits where the mean is large.
#[derive(Default)]
pub(super) struct InputMoments {
    rows: u64,
    mean: Vec<f64>,
    around: Vec<f64>,
}

impl Reducer for InputMoments {
    fn see(&mut self, event: &Event<'_>) {
        let Event::Input(x) = event else { return };
        self.mean.resize(x.cols(), 0.0);
        self.around.resize(x.cols(), 0.0);
        for r in 0..x.rows() {
            self.rows += 1;
            let n = self.rows as f64;
            for ((m, a), v) in self.mean.iter_mut().zip(&mut self.around).zip(x.row(r)) {
                let off = f64::from(*v) - *m;
                *m += off / n;
                *a += off * (f64::from(*v) - *m);
            }
        }
    }

    fn gathered(self: Box<Self>) -> Gathered {
        let n = (self.rows as f64).max(1.0);
        Gathered::Moments { mean: self.mean, variance: self.around.iter().map(|a| a / n).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    #[test]
    fn agrees_with_two_passes() {
        let x = random(50, 3, 4);
        let mut seen = Box::new(InputMoments::default());
        seen.see(&Event::Input(x.view().rows_range(0, 20)));
        seen.see(&Event::Input(x.view().rows_range(20, 50)));
        let Gathered::Moments { mean, variance } = seen.gathered() else { panic!("moments") };
        for c in 0..3 {
            let column = || (0..50).map(|r| f64::from(x[(r, c)]));
            let m = column().sum::<f64>() / 50.0;
            let v = column().map(|x| (x - m) * (x - m)).sum::<f64>() / 50.0;
            assert!((mean[c] - m).abs() < 1e-12 && (variance[c] - v).abs() < 1e-12);
        }
    }
}

//! `Σ |x|` of each input of a matrix.

use lacuna_contract::Gathered;

use super::{Event, Reducer};

#[derive(Default)]
pub(super) struct InputAbsolute(Vec<f64>);

impl Reducer for InputAbsolute {
    fn see(&mut self, event: &Event<'_>) {
        let Event::Input(x) = event else { return };
        self.0.resize(x.cols(), 0.0);
        for r in 0..x.rows() {
            self.0.iter_mut().zip(x.row(r)).for_each(|(s, v)| *s += f64::from(v.abs()));
        }
    }

    fn gathered(self: Box<Self>) -> Gathered {
        Gathered::Vector(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    #[test]
    fn sums_sizes_over_calls() {
        let x = random(9, 3, 5);
        let mut seen = Box::new(InputAbsolute::default());
        seen.see(&Event::Input(x.view().rows_range(0, 4)));
        seen.see(&Event::Input(x.view().rows_range(4, 9)));
        let Gathered::Vector(got) = seen.gathered() else { panic!("a vector") };
        for (c, got) in got.iter().enumerate() {
            let want: f64 = (0..9).map(|r| f64::from(x[(r, c)].abs())).sum();
            assert!((got - want).abs() < 1e-12);
        }
    }
}

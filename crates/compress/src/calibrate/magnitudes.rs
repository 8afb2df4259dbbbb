//! `Σ |x|` of each input of a matrix.

use lacuna_contract::Gathered;

use super::{Event, Reducer};

#[derive(Default)]
pub(super) struct InputMagnitudes(Vec<f64>);

impl Reducer for InputMagnitudes {
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

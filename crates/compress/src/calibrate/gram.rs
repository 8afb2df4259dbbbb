//! `XᵀX` of a matrix's inputs.

use lacuna_base::dense::Gram;
use lacuna_contract::Gathered;

use super::{Event, Reducer};

#[derive(Default)]
pub(super) struct InputGram(Option<Gram>);

impl Reducer for InputGram {
    fn see(&mut self, event: &Event<'_>) {
        if let Event::Input(x) = event {
            self.0.get_or_insert_with(|| Gram::new(x.cols())).add(*x);
        }
    }

    fn gathered(self: Box<Self>) -> Gathered {
        Gathered::Gram(self.0.unwrap_or_else(|| Gram::new(0)))
    }
}

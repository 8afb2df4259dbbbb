//! How alike the input and the output of a part of a block are: the mean over tokens of the cosine.

use lacuna_contract::{Gathered, Unit};

use super::{Event, Reducer};

pub(super) struct Similarity {
    unit: Unit,
    sum: f64,
    tokens: u64,
}

impl Similarity {
    pub(super) fn new(unit: Unit) -> Similarity {
        Similarity { unit, sum: 0.0, tokens: 0 }
    }
}

impl Reducer for Similarity {
    fn see(&mut self, event: &Event<'_>) {
        let Event::Residual(unit, before, after) = event else { return };
        if *unit != self.unit {
            return;
        }
        for r in 0..before.rows() {
            let (mut ab, mut aa, mut bb) = (0.0f64, 0.0f64, 0.0f64);
            for (a, b) in before.row(r).iter().zip(after.row(r)) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                ab += a * b;
                aa += a * a;
                bb += b * b;
            }
            let norm = (aa * bb).sqrt();
            self.sum += if norm > 0.0 { ab / norm } else { 1.0 };
            self.tokens += 1;
        }
    }

    fn gathered(self: Box<Self>) -> Gathered {
        Gathered::Number(self.sum / self.tokens.max(1) as f64)
    }
}

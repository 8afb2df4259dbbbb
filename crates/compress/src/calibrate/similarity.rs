//! How alike the input and the output of a part of a block are: the mean over tokens of the cosine, or of the angle.

use lacuna_contract::{Gathered, Unit};

use super::{Event, Reducer};

pub(super) struct Similarity {
    unit: Unit,
    /// What is taken of a cosine.
    of: fn(f64) -> f64,
    sum: f64,
    tokens: u64,
}

/// In half turns. A cosine may be rounded beyond 1.
pub(super) fn angle(cos: f64) -> f64 {
    cos.clamp(-1.0, 1.0).acos() / std::f64::consts::PI
}

impl Similarity {
    pub(super) fn new(unit: Unit, of: fn(f64) -> f64) -> Similarity {
        Similarity { unit, of, sum: 0.0, tokens: 0 }
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
            self.sum += (self.of)(if norm > 0.0 { ab / norm } else { 1.0 });
            self.tokens += 1;
        }
    }

    fn gathered(self: Box<Self>) -> Gathered {
        Gathered::Number(self.sum / self.tokens.max(1) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Mat;

    #[test]
    fn the_angle_is_in_half_turns_and_its_mean_is_over_tokens() {
        let (before, after) =
            (vec![1.0, 0.0, 2.0, 0.0, 3.0, 3.0, 0.0, 0.0], vec![0.0, 5.0, -1.0, 0.0, 1.0, 1.0, 1.0, 1.0]);
        let (before, after) = (Mat::from_vec(4, 2, before), Mat::from_vec(4, 2, after));
        let mean = |of: fn(f64) -> f64| {
            let mut one = Box::new(Similarity::new(Unit::Block, of));
            one.see(&Event::Residual(Unit::Block, before.view(), after.view()));
            one.see(&Event::Residual(Unit::Ffn, before.view(), before.view()));
            let Gathered::Number(x) = one.gathered() else { panic!("a number") };
            x
        };
        // A quarter turn, half a turn, none, and none where there is nothing to turn.
        assert!((mean(angle) - 1.5 / 4.0).abs() < 1e-7 && (mean(|cos| cos) - 1.0 / 4.0).abs() < 1e-12);
        assert_eq!((angle(1.0 + 1e-9), angle(-1.0 - 1e-9)), (0.0, 1.0));
    }
}

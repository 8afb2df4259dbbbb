//! Uniform: the same sparsity everywhere.
//!
//! **Paper.** None: the division that every search has to beat.
//!
//! **Idea.** `s_i = s` for every matrix `i`.
//!
//! **Shapes and units.** A slot for each matrix; a sparsity (fraction of zeros) for each.
//!
//! **Cost.** None.
//!
//! **Departs.** Nothing to depart from.

use lacuna_contract::{Budget, Card, Made, Method, MethodError, Needs, Outcome, Slot, Verb};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Uniform {
    /// Whether the one assignment was given out.
    #[serde(skip)]
    asked: bool,
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "uniform",
            paper: "",
            arxiv: "",
            summary: "The same sparsity for every matrix.",
            verb: Verb::Budget,
            needs: Needs::default(),
        },
        make: |given| Ok(Made::Budget(Box::new(make::parameters::<Uniform>("uniform", given)?))),
    }
}

impl Budget for Uniform {
    fn ask(&mut self, slots: &[Slot], target: f64) -> Result<Option<Vec<f64>>, MethodError> {
        if !(0.0..=1.0).contains(&target) {
            return Err(MethodError::new(format!("sparsity {target} is not between 0 and 1")));
        }
        let first = !std::mem::replace(&mut self.asked, true);
        Ok(first.then(|| vec![target; slots.len()]))
    }

    fn tell(&mut self, _: &[f64], _: &Outcome) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_spec::{Place, Role};

    #[test]
    fn agrees_with_brute_force_one_answer_then_none() {
        let slots: Vec<Slot> =
            (0..3).map(|l| Slot { place: Place::layer(l, Role::Q), parameters: 10 * (l as u64 + 1) }).collect();
        let mut u = Uniform::default();
        assert_eq!(u.ask(&slots, 0.4), Ok(Some(vec![0.4; 3])));
        u.tell(&[0.4; 3], &Outcome { loss: 1.0, bytes: 1 });
        assert_eq!(u.ask(&slots, 0.4), Ok(None));
        assert!(Uniform::default().ask(&slots, f64::NAN).is_err());
        assert!((method().make)(serde_json::json!({ "asked": true })).is_err());
    }
}

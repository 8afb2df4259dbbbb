//! Magnitude: the smallest weights go.
//!
//! **Paper.** Song Han, Jeff Pool, John Tran, William J. Dally, "Learning both Weights and Connections for Efficient
//! Neural Networks", 2015, arXiv 1506.02626.
//!
//! **Idea.** `S_ij = |W_ij|`: what is near zero can be zero.
//!
//! **Shapes and units.** `w` `[out, in]` in the model's own units; the scores have the same shape and units.
//!
//! **Cost.** One pass over the matrix; one copy of it.
//!
//! **Departs.** The paper prunes in rounds with training between them, with a threshold for each layer; here once,
//! without training, the lowest of each matrix. The baseline that every method with calibration has to beat.

use lacuna_base::{Mat, MatRef};
use lacuna_contract::{Ability, Card, Made, Method, MethodError, Scope, Score, Stats};
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Magnitude {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "magnitude",
            paper: "Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, 2015",
            arxiv: "1506.02626",
            summary: "The smallest weights of each matrix go.",
            system: None,
            verb: "prune",
            needs: &[],
            abilities: &[Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::FixedMask],
        },
        keys: make::keys::<Magnitude>,
        make: |given| Ok(Made::Score(Box::new(make::parameters::<Magnitude>("magnitude", given)?))),
    }
}

impl Score for Magnitude {
    fn score(&self, w: MatRef<'_>, _: &Stats<'_>) -> Result<Mat, MethodError> {
        make::finite(w)?;
        let mut scores = w.to_mat();
        scores.data_mut().iter_mut().for_each(|v| *v = v.abs());
        Ok(scores)
    }

    fn scope(&self) -> Scope {
        Scope::Matrix
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;

    #[test]
    fn order_agrees_with_brute_force() {
        for (rows, cols) in [(1, 1), (5, 1), (4, 9)] {
            let mut w = random(rows, cols, 3);
            w.data_mut()[0] = -7.0;
            let s = Magnitude {}.score(w.view(), &Stats::default()).expect("scores");
            for a in 0..rows * cols {
                for b in 0..rows * cols {
                    let (wa, wb) = (w.data()[a], w.data()[b]);
                    assert_eq!(wa * wa > wb * wb, s.data()[a] > s.data()[b]);
                }
            }
            assert_eq!(s.data()[0], 7.0);
        }
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let w = Mat::from_vec(1, 2, vec![1.0, f32::NAN]);
        let e = Magnitude {}.score(w.view(), &Stats::default()).expect_err("refused");
        assert!(e.what.contains("column 1"), "{e}");
    }
}

//! Axes: the channels as they are, those of largest mean square first.
//!
//! **Paper.** None: the choice without a rotation, which every rotation has to beat.
//!
//! **Idea.** Keep the `width` channels `j` with the largest `E[x_j²]`.
//!
//! **Shapes and units.** `gram` `[n, n]`, the mean outer product of the rows; the answer `[n, width]` has one 1 in each
//! column.
//!
//! **Cost.** A sort of `n` numbers.
//!
//! **Departs.** Nothing to depart from.

use lacuna_base::Mat64;
use lacuna_contract::{Basis, Card, Made, Method, MethodError};
use serde::Deserialize;

use super::slicegpt::check;
use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Axes {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "axes",
            paper: "",
            arxiv: "",
            summary: "The channels of the residual stream that carry most, as they are.",
            system: None,
            verb: "slice",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Axes>,
        make: |given| Ok(Made::Basis(Box::new(make::parameters::<Axes>("axes", given)?))),
    }
}

impl Basis for Axes {
    fn basis(&self, gram: &Mat64, width: usize) -> Result<Mat64, MethodError> {
        check(gram, width)?;
        let mut order: Vec<usize> = (0..gram.rows()).collect();
        order.sort_by(|&a, &b| gram[(b, b)].total_cmp(&gram[(a, a)]).then(a.cmp(&b)));
        Ok(Mat64::from_fn(gram.rows(), width, |r, c| if order[c] == r { 1.0 } else { 0.0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_brute_force_largest_first() {
        let gram = Mat64::from_fn(4, 4, |r, c| if r == c { [2.0, 7.0, 7.0, 1.0][r] } else { 0.1 });
        let q = Axes {}.basis(&gram, 3).expect("a basis");
        let at: Vec<usize> = (0..3).map(|c| (0..4).find(|&r| q[(r, c)] == 1.0).expect("a one")).collect();
        assert_eq!(at, [1, 2, 0]);
        assert!(q.data().iter().sum::<f64>() == 3.0);
        assert!(Axes {}.basis(&gram, 5).is_err() && Axes {}.basis(&gram, 0).is_err());
    }
}

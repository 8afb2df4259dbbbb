//! The adjoint of routing.

use lacuna_base::{Mat, MatRef};
use lacuna_spec::Experts;

use crate::backend::Routes;

/// The gradient of the router's logits, `[rows, experts]`.
///
/// `p` is the softmax of the logits, `[rows, experts]`; `routes` the rows of each expert with their weights and
/// `dweights` the gradients of those weights, in the same order. Gradients flow through the weights of the chosen
/// experts, not through the choice: where a row's weights are made to sum to 1, `dp_e = (dw_e - Σ dw w) / Σ p` over the
/// chosen, else `dp_e = dw_e`; then through the softmax over all experts.
#[track_caller]
pub(crate) fn routing(p: MatRef<'_>, routes: &Routes, dweights: &[f32], choice: Experts) -> Mat {
    assert_eq!(routes.starts.len(), p.cols() + 1, "routes of {} experts", p.cols());
    assert_eq!(routes.weights.len(), dweights.len(), "a gradient for each weight");
    // Of every row: the sum of the chosen ones' p, and of dw w.
    let (mut total, mut along) = (vec![0.0f32; p.rows()], vec![0.0f32; p.rows()]);
    let mut d = Mat::zeros(p.rows(), p.cols());
    for (e, at) in routes.busy() {
        for i in at {
            let (r, w, dw) = (routes.rows[i], routes.weights[i], dweights[i]);
            d[(r, e)] = dw;
            total[r] += p.at(r, e);
            along[r] += dw * w;
        }
    }
    if choice.normalize {
        for (e, at) in routes.busy() {
            for &r in &routes.rows[at] {
                d[(r, e)] = (d[(r, e)] - along[r]) / total[r];
            }
        }
    }
    for r in 0..p.rows() {
        let (p, d) = (p.row(r), d.row_mut(r));
        let mean: f32 = p.iter().zip(d.iter()).map(|(p, d)| p * d).sum();
        d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - mean));
    }
    d
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::naive::softmax;
    use crate::backend::route;
    use crate::derive::differences::check;
    use lacuna_base::testkit::random;

    #[test]
    fn agrees_with_finite_differences_for_a_fixed_choice() {
        for normalize in [true, false] {
            let choice = Experts { count: 5, used: 2, normalize };
            let logits = random(6, 5, 1);
            let mut p = logits.clone();
            let routes = route(&mut p, choice);
            // What comes out: the weights, expert by expert.
            let dweights: Vec<f32> = random(1, 12, 2).into_vec();
            let d = routing(p.view(), &routes, &dweights, choice);
            check(&format!("normalize {normalize}"), &dweights, &[(logits.data(), d.data())], |v| {
                let p: Vec<Vec<f64>> = v[0].chunks(5).map(softmax).collect();
                let routes = &routes;
                let chosen = |r: usize| routes.busy().filter(move |(_, at)| routes.rows[at.clone()].contains(&r));
                let total = |r: usize| -> f64 { if normalize { chosen(r).map(|(e, _)| p[r][e]).sum() } else { 1.0 } };
                let (p, total) = (&p, &total);
                let of =
                    |(e, at): (usize, std::ops::Range<usize>)| routes.rows[at].iter().map(move |&r| p[r][e] / total(r));
                routes.busy().flat_map(of).collect()
            });
        }
    }
}

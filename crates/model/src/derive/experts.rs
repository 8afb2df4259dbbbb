//! The adjoint of routing.

use lacuna_base::{Mat, MatRef};
use lacuna_spec::Experts;

/// The gradient of the router's logits, `[rows, experts]`.
///
/// `p` is the softmax of the logits, `[rows, experts]`; `routes` the rows of each expert with their weights and
/// `dweights` the gradients of those weights. Gradients flow through the weights of the chosen experts, not through the
/// choice: where a row's weights are made to sum to 1, `dp_e = (dw_e - Σ dw w) / Σ p` over the chosen, else
/// `dp_e = dw_e`; then through the softmax over all experts.
#[track_caller]
pub fn routing(p: MatRef<'_>, routes: &[Vec<(usize, f32)>], dweights: &[Vec<f32>], choice: Experts) -> Mat {
    assert!(routes.len() == p.cols() && dweights.len() == p.cols(), "routes of {} experts", p.cols());
    // Of every row: the sum of the chosen ones' p, and of dw w.
    let (mut total, mut along) = (vec![0.0f32; p.rows()], vec![0.0f32; p.rows()]);
    let mut d = Mat::zeros(p.rows(), p.cols());
    for (e, (rows, dw)) in routes.iter().zip(dweights).enumerate() {
        assert_eq!(rows.len(), dw.len(), "a gradient for each weight");
        for (&(r, w), &dw) in rows.iter().zip(dw) {
            d[(r, e)] = dw;
            total[r] += p.at(r, e);
            along[r] += dw * w;
        }
    }
    if choice.normalize {
        for (e, rows) in routes.iter().enumerate() {
            for &(r, _) in rows {
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
    use crate::block::route;
    use crate::derive::twin::{check, softmax};
    use lacuna_base::testkit::random;

    #[test]
    fn agrees_with_finite_differences_for_a_fixed_choice() {
        for normalize in [true, false] {
            let choice = Experts { count: 5, used: 2, normalize };
            let logits = random(6, 5, 1);
            let mut p = logits.clone();
            let routes = route(&mut p, choice);
            // What comes out: the weights, expert by expert.
            let flat: Vec<f32> = random(1, 12, 2).into_vec();
            let mut rest = flat.iter().copied();
            let dweights: Vec<Vec<f32>> = routes.iter().map(|r| rest.by_ref().take(r.len()).collect()).collect();
            let d = routing(p.view(), &routes, &dweights, choice);
            check(&format!("normalize {normalize}"), &flat, &[(logits.data(), d.data())], |v| {
                let p: Vec<Vec<f64>> = v[0].chunks(5).map(softmax).collect();
                let total = |r: usize| -> f64 {
                    let chosen = routes.iter().enumerate().filter(|(_, rows)| rows.iter().any(|x| x.0 == r));
                    if normalize { chosen.map(|(e, _)| p[r][e]).sum() } else { 1.0 }
                };
                let of = |(e, rows): (usize, &Vec<(usize, f32)>)| -> Vec<f64> {
                    rows.iter().map(|&(r, _)| p[r][e] / total(r)).collect()
                };
                routes.iter().enumerate().flat_map(of).collect()
            });
        }
    }
}

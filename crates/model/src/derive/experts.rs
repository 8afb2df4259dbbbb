//! The adjoints of routing, and of a shared expert's weight.

use lacuna_base::{Mat, MatRef};
use lacuna_spec::{Experts, RouterScore};

use super::rows::{dot, zeros};
use crate::Lent;
use crate::backend::Routes;

/// The adjoint of `y = sigmoid(by) x`, row by row: the gradients of `x` `[rows, columns]` and of `by` `[rows, 1]`.
pub(crate) fn weigh_rows(x: MatRef<'_>, by: MatRef<'_>, dy: MatRef<'_>) -> (Lent, Lent) {
    let (mut dx, mut dby) = (Lent::new(x.rows(), x.cols()), zeros(x.rows(), 1));
    for r in 0..x.rows() {
        let s = 1.0 / (1.0 + (-by.at(r, 0)).exp());
        dx.row_mut(r).iter_mut().zip(dy.row(r)).for_each(|(x, dy)| *x = s * dy);
        dby.row_mut(r)[0] = dot(x.row(r), dy.row(r)) * s * (1.0 - s);
    }
    (dx, dby)
}

/// The gradient of the router's logits, `[rows, experts]`.
///
/// `p` are the scores, `[rows, experts]`: the softmax of the logits, or their sigmoids; `routes` the rows of each expert with their weights and
/// `dweights` the gradients of those weights, in the same order. Gradients flow through the weights of the chosen
/// experts, not through the choice: with weights of `s` times a score, `dp_e = s dw_e`, or, where a row's scores are made
/// to sum to 1, `dp_e = (s dw_e - Σ dw w) / Σ p` over the chosen; then through the softmax over all experts, or each
/// one's sigmoid. `scale`: each expert's own factor beside `s`.
#[track_caller]
pub(crate) fn routing(p: MatRef<'_>, routes: &Routes, dweights: &[f32], choice: Experts, scale: Option<&[f32]>) -> Mat {
    assert_eq!(routes.starts.len(), p.cols() + 1, "routes of {} experts", p.cols());
    assert_eq!(routes.weights.len(), dweights.len(), "a gradient for each weight");
    // Of every row: the sum of the chosen ones' p, and of dw w.
    let (mut total, mut along) = (vec![0.0f32; p.rows()], vec![0.0f32; p.rows()]);
    let mut d = Mat::zeros(p.rows(), p.cols());
    for (e, at) in routes.busy() {
        for i in at {
            let (r, w, dw) = (routes.rows[i], routes.weights[i], dweights[i]);
            d[(r, e)] = choice.scale * scale.map_or(1.0, |s| s[e]) * dw;
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
        match choice.score {
            RouterScore::Softmax => {
                let mean: f32 = p.iter().zip(d.iter()).map(|(p, d)| p * d).sum();
                d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - mean));
            }
            RouterScore::Sigmoid => d.iter_mut().zip(p).for_each(|(d, p)| *d *= p * (1.0 - p)),
        }
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
    fn a_shared_experts_weight_agrees_with_its_finite_differences() {
        let (x, by, dy) = (random(4, 7, 1), random(4, 1, 2), random(4, 7, 3));
        let (dx, dby) = weigh_rows(x.view(), by.view(), dy.view());
        let pairs = [(x.data(), dx.data()), (by.data(), dby.data())];
        check("weigh_rows", dy.data(), &pairs, |v| {
            v[0].iter().enumerate().map(|(i, x)| x / (1.0 + (-v[1][i / 7]).exp())).collect()
        });
    }

    #[test]
    fn agrees_with_finite_differences_for_a_fixed_choice() {
        for (normalize, score, scale) in [
            (true, RouterScore::Softmax, 1.0),
            (false, RouterScore::Softmax, 1.7),
            (true, RouterScore::Sigmoid, 2.5),
            (false, RouterScore::Sigmoid, 1.0),
        ] {
            let choice = Experts { count: 5, used: 2, normalize, score, scale, ..Experts::default() };
            let logits = random(6, 5, 1);
            let mut p = logits.clone();
            let own = choice.normalize.then_some(&[0.7f32, 1.3, -0.4, 2.0, 1.0][..]);
            let routes = route(&mut p, choice, Some(&[0.3, -0.1, 0.0, 0.2, 0.1]), own);
            // What comes out: the weights, expert by expert.
            let dweights: Vec<f32> = random(1, 12, 2).into_vec();
            let d = routing(p.view(), &routes, &dweights, choice, own);
            check(&format!("{choice:?}"), &dweights, &[(logits.data(), d.data())], |v| {
                let scores = |row: &[f64]| match score {
                    RouterScore::Softmax => softmax(row),
                    RouterScore::Sigmoid => row.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
                };
                let p: Vec<Vec<f64>> = v[0].chunks(5).map(scores).collect();
                let routes = &routes;
                let chosen = |r: usize| routes.busy().filter(move |(_, at)| routes.rows[at.clone()].contains(&r));
                let total = |r: usize| -> f64 { if normalize { chosen(r).map(|(e, _)| p[r][e]).sum() } else { 1.0 } };
                let (p, total) = (&p, &total);
                let of = |(e, at): (usize, std::ops::Range<usize>)| {
                    let scale = f64::from(scale) * own.map_or(1.0, |o| f64::from(o[e]));
                    routes.rows[at].iter().map(move |&r| scale * p[r][e] / total(r))
                };
                routes.busy().flat_map(of).collect()
            });
        }
    }
}

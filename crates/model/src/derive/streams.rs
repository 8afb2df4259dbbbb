//! The adjoints of what several residual streams are mixed by, and of a gate's cutoff.

use lacuna_base::MatRef;

use super::rows::{dot, zeros};
use crate::Lent;
use crate::backend::{LEAST_SQUARE, mean_square, spread};

/// The adjoint of streams made of others, `y_i = Σ_j by_ij x_j` row by row: the gradients of `x`, `[rows, ins * width]`,
/// and of `by`, `[rows, outs * ins]`.
pub(crate) fn mix(x: MatRef<'_>, ins: usize, by: MatRef<'_>, dy: MatRef<'_>) -> (Lent, Lent) {
    let width = x.cols() / ins;
    let (mut dx, mut dby) = (zeros(x.rows(), x.cols()), zeros(by.rows(), by.cols()));
    for r in 0..x.rows() {
        for (i, dy) in dy.row(r).chunks_exact(width).enumerate() {
            for (j, x) in x.row(r).chunks_exact(width).enumerate() {
                let weight = by.at(r, i * ins + j);
                dby.row_mut(r)[i * ins + j] = dot(dy, x);
                let to = &mut dx.row_mut(r)[j * width..(j + 1) * width];
                to.iter_mut().zip(dy).for_each(|(to, d)| *to += weight * d);
            }
        }
    }
    (dx, dby)
}

/// The adjoint of rows times a vector: `dy` becomes the gradient of `x`; that of `by`, `[1, columns]`.
pub(crate) fn scale_columns(x: MatRef<'_>, by: MatRef<'_>, dy: &mut Lent) -> Lent {
    let mut dby = zeros(1, dy.cols());
    for r in 0..dy.rows() {
        let all = dby.row_mut(0).iter_mut().zip(x.row(r)).zip(by.row(0));
        dy.row_mut(r).iter_mut().zip(all).for_each(|(d, ((dby, x), by))| {
            *dby += *d * x;
            *d *= by;
        });
    }
    dby
}

/// The adjoint of `y = x · rms(like) / sqrt(max(mean(x²), least))`, row by row.
pub(crate) fn match_magnitude(x: MatRef<'_>, like: MatRef<'_>, dy: MatRef<'_>) -> (Lent, Lent) {
    let (mut dx, mut dlike) = (zeros(x.rows(), x.cols()), zeros(like.rows(), like.cols()));
    let n = x.cols() as f64;
    for r in 0..x.rows() {
        let (square, target) = (mean_square(x.row(r)), mean_square(like.row(r)).sqrt());
        let own = square.max(LEAST_SQUARE).sqrt();
        let along: f64 = x.row(r).iter().zip(dy.row(r)).map(|(x, d)| f64::from(*x) * f64::from(*d)).sum();
        // Below the least the divisor is constant.
        let back = if square > LEAST_SQUARE { target * along / (n * own.powi(3)) } else { 0.0 };
        let all = x.row(r).iter().zip(dy.row(r));
        dx.row_mut(r).iter_mut().zip(all).for_each(|(to, (x, d))| {
            *to = (f64::from(*d) * target / own - back * f64::from(*x)) as f32;
        });
        if target > 0.0 {
            let by = along / (own * n * target);
            let all = like.row(r);
            dlike.row_mut(r).iter_mut().zip(all).for_each(|(to, l)| *to = (by * f64::from(*l)) as f32);
        }
    }
    (dx, dlike)
}

/// The adjoint of `y = max(x - cutoff, 0)`, the cutoff being the row's mean and `by` times its standard deviation.
pub(crate) fn cut_off(x: MatRef<'_>, by: f32, dy: MatRef<'_>) -> Lent {
    let mut dx = zeros(x.rows(), x.cols());
    let n = x.cols() as f64;
    for r in 0..x.rows() {
        let (mean, deviation) = spread(x.row(r));
        let cutoff = (mean + f64::from(by) * deviation) as f32;
        let above = |x: f32| x - cutoff > 0.0;
        let kept = x.row(r).iter().zip(dy.row(r)).filter(|(x, _)| above(**x));
        let total: f64 = kept.map(|(_, d)| f64::from(*d)).sum();
        let all = x.row(r).iter().zip(dy.row(r));
        dx.row_mut(r).iter_mut().zip(all).for_each(|(to, (x, d))| {
            let own = if above(*x) { f64::from(*d) } else { 0.0 };
            let slope = if deviation > 0.0 { (f64::from(*x) - mean) / deviation } else { 0.0 };
            *to = (own - total / n * (1.0 + f64::from(by) * slope)) as f32;
        });
    }
    dx
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Naive};
    use crate::derive::differences::check;
    use lacuna_base::Mat64;
    use lacuna_base::testkit::random;

    #[test]
    fn adjoints_agree_with_finite_differences_of_the_definition() {
        let of = |rows: usize, v: &[f64]| Mat64::from_vec(rows, v.len() / rows, v.to_vec());
        let (x, by, dy) = (random(3, 10, 1), random(3, 6, 2), random(3, 15, 3));
        let (dx, dby) = mix(x.view(), 2, by.view(), dy.view());
        check("mix", dy.data(), &[(x.data(), dx.data()), (by.data(), dby.data())], |v| {
            Naive.mix(&of(3, &v[0]), 2, &of(3, &v[1])).data().to_vec()
        });
        let (like, dy) = (random(3, 10, 4), random(3, 10, 5));
        let (dx, dlike) = match_magnitude(x.view(), like.view(), dy.view());
        check("match_magnitude", dy.data(), &[(x.data(), dx.data()), (like.data(), dlike.data())], |v| {
            let mut y = of(3, &v[0]);
            Naive.match_magnitude(&mut y, &of(3, &v[1]));
            y.data().to_vec()
        });
        let dx = cut_off(x.view(), 0.3, dy.view());
        check("cut_off", dy.data(), &[(x.data(), dx.data())], |v| {
            let mut y = of(3, &v[0]);
            Naive.cut_off(&mut y, 0.3);
            y.data().to_vec()
        });
    }
}

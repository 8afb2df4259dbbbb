//! The adjoints of products and biases.

use lacuna_base::{Mat, MatMut, MatRef, dense};
use lacuna_kernels::Transposed;

use super::rows::chunks;

/// `dx += dy · W`: of `y = x · Wᵀ`, from the gradient `[rows, outputs]` of what came out, that of what went in,
/// `[rows, inputs]`.
#[track_caller]
pub fn product(w: &Transposed, dy: MatRef<'_>, dx: MatMut<'_>) {
    w.add_product(dy, dx);
}

/// `dyᵀ · x`: the gradient of `W`, `[outputs, inputs]`.
#[track_caller]
pub fn product_weight(x: MatRef<'_>, dy: MatRef<'_>) -> Mat {
    dense::matmul_tn(dy, x)
}

/// The gradient of a bias, `[outputs]`: the sum of the rows.
pub fn bias(dy: MatRef<'_>) -> Vec<f32> {
    let mut all = vec![0.0; dy.cols()];
    // The chunks of the other loops, for the same bits wherever rows are summed.
    let mut sums = Mat::zeros(dy.rows().div_ceil(super::rows::ROWS), dy.cols());
    chunks(sums.view_mut(), |first, mut part| {
        for i in 0..part.rows() {
            let from = (first + i) * super::rows::ROWS;
            for r in from..(from + super::rows::ROWS).min(dy.rows()) {
                part.row_mut(i).iter_mut().zip(dy.row(r)).for_each(|(s, &d)| *s += d);
            }
        }
    });
    for r in 0..sums.rows() {
        all.iter_mut().zip(sums.row(r)).for_each(|(a, &s)| *a += s);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::naive;
    use crate::derive::differences::check;
    use lacuna_base::testkit::random;
    use lacuna_format::{Float, PatternKind, Stored, pack_float};

    #[test]
    fn agree_with_finite_differences_of_the_definition() {
        for (rows, out, inputs) in [(1, 1, 1), (7, 5, 9), (50, 3, 4)] {
            let (x, w, b, dy) =
                (random(rows, inputs, 1), random(out, inputs, 2), random(1, out, 3), random(rows, out, 4));
            let stored =
                Stored::from_piece(pack_float(w.view(), None, PatternKind::Dense, Float::F32).expect("a piece"));
            let mut dx = Mat::zeros(rows, inputs);
            product(&Transposed::new(&stored).expect("checked"), dy.view(), dx.view_mut());
            let (dw, db) = (product_weight(x.view(), dy.view()), bias(dy.view()));
            let pairs = [(x.data(), dx.data()), (w.data(), dw.data()), (b.data(), &db[..])];
            check(&format!("{rows} {out} {inputs}"), dy.data(), &pairs, |v| naive::linear(&v[0], &v[1], &v[2], inputs));
        }
    }
}

//! Signs times a product: a term of one bit a weight and two thin matrices.
//!
//! `w[r, c] = ±(left · right)[r, c]`: the product says how large a weight is, the sign bit which way. A sum of such terms
//! is a stack: each is the residual that those before it leave, so that any number of them, from the first on, is a
//! matrix too, and more of them a better one.

use bytes::Bytes;

use crate::{FormatError, Mask, Pattern, Piece, Stored, Term};

/// `sign ⊙ (left · right)`, `[rows, cols]`. Both factors are dense, in any codec.
#[derive(Clone, Debug, PartialEq)]
pub struct Signed {
    /// `[rows, ceil(cols / 8)]`; bit `i` of byte `j` is set where column `8j + i` has the other sign than the product.
    pub signs: Bytes,
    /// `[rows, rank]`.
    pub left: Piece,
    /// `[rank, cols]`.
    pub right: Piece,
}

impl Signed {
    /// The product with the sign turned where `turned` says.
    pub fn new(turned: &Mask, left: Piece, right: Piece) -> Signed {
        let width = turned.cols().div_ceil(8);
        let row = |r: usize| turned.row(r).iter().flat_map(|w| w.to_le_bytes()).take(width);
        let signs: Vec<u8> = (0..turned.rows()).flat_map(row).collect();
        Signed { signs: signs.into(), left, right }
    }

    /// The columns of the left factor, which are the rows of the right one.
    pub fn rank(&self) -> usize {
        self.right.rows
    }

    /// The sign bits of row `r`.
    pub fn row_signs(&self, r: usize) -> &[u8] {
        let width = self.right.cols.div_ceil(8);
        &self.signs[r * width..(r + 1) * width]
    }

    /// Turns the signs of a row of the product.
    pub(crate) fn turn(&self, r: usize, row: &mut [f32]) {
        for (eight, bits) in row.chunks_mut(8).zip(self.row_signs(r)) {
            let turn = |(i, v): (usize, &mut f32)| *v = f32::from_bits(v.to_bits() ^ (u32::from(bits >> i & 1) << 31));
            eight.iter_mut().enumerate().for_each(turn);
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        self.signs.len() as u64 + self.left.bytes() + self.right.bytes()
    }

    /// Whether `other` is signs of a product of the same rank in the same codecs.
    pub(crate) fn is_like(&self, other: &Term) -> bool {
        let Term::Signed(o) = other else { return false };
        let names = |s: &Signed| (s.rank(), s.left.codec_name(), s.right.codec_name());
        names(self) == names(o)
    }

    /// `‖left · right‖²`, the sum of the squares of all entries: signs do not change it, so that the factors alone are
    /// read.
    pub fn energy(&self) -> f64 {
        let (a, b, k) = (self.left.to_mat(), self.right.to_mat(), self.rank());
        // tr(AᵀA BBᵀ).
        let mut outer = vec![0.0f64; k * k];
        for r in 0..a.rows() {
            let row = a.row(r);
            outer.chunks_mut(k).zip(row).for_each(|(o, x)| {
                o.iter_mut().zip(row).for_each(|(o, y)| *o += f64::from(*x) * f64::from(*y));
            });
        }
        let dot = |i: usize, j: usize| -> f64 {
            b.row(i).iter().zip(b.row(j)).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
        };
        (0..k * k).map(|at| outer[at] * dot(at / k, at % k)).sum::<f64>().max(0.0)
    }

    /// Whether every length fits: if so, decoding cannot panic.
    pub(crate) fn check(&self) -> Result<(), FormatError> {
        let fail = |what: String| Err(FormatError { what });
        let (l, r) = (&self.left, &self.right);
        // Before the factors are looked at: what decodes a row needs room for all of them, so that they must be there.
        if l.pattern != Pattern::Dense || r.pattern != Pattern::Dense {
            return fail("signs over a product of sparse factors; dense ones are expected".into());
        }
        if l.cols != r.rows || r.rows == 0 || r.rows > l.rows.min(r.cols) {
            let shapes = format!("{} x {} and {} x {}", l.rows, l.cols, r.rows, r.cols);
            return fail(format!("signs over a product of {shapes}: the rank is 1 to the shorter side"));
        }
        l.check()?;
        r.check()?;
        let width = r.cols.div_ceil(8);
        if l.rows.checked_mul(width) != Some(self.signs.len()) {
            return fail(format!("signs: {} bytes for {} rows of {width}", self.signs.len(), l.rows));
        }
        let beyond = |at: &usize| self.row_signs(*at).last().is_some_and(|b| b >> (r.cols % 8) != 0);
        let rows = if r.cols.is_multiple_of(8) { 0 } else { l.rows };
        (0..rows).find(beyond).map_or(Ok(()), |at| fail(format!("signs of row {at} go beyond column {}", r.cols)))
    }
}

impl Stored {
    /// Where this matrix is a stack, terms of signs alone and at least one: what each is worth, the part of the stack's
    /// energy that it holds, as the maps of the input leave it, and its bytes.
    pub fn stack(&self) -> Option<Vec<(f64, u64)>> {
        let each =
            self.terms.iter().map(|t| if let Term::Signed(s) = t { Some((s.energy(), s.bytes())) } else { None });
        let mut all = each.collect::<Option<Vec<_>>>().filter(|all| !all.is_empty())?;
        let sum: f64 = all.iter().map(|(e, _)| e).sum();
        if sum > 0.0 {
            all.iter_mut().for_each(|(e, _)| *e /= sum);
        }
        Some(all)
    }

    /// The matrix of its first `n` terms.
    pub fn first_terms(&self, n: usize) -> Stored {
        let mut out = self.clone();
        out.terms.truncate(n);
        out
    }
}

/// How many terms of each stack to load within `budget_bytes` for all of them: one of each, then the term that is worth
/// most for its bytes among those next in their stacks, as long as it fits. More bytes never load fewer terms of what is
/// worth more: the order does not hang on the budget. The error is the bytes of the first terms, where these are more.
pub fn terms_within(stacks: &[Vec<(f64, u64)>], budget_bytes: u64) -> Result<Vec<usize>, u64> {
    let mut taken: Vec<usize> = stacks.iter().map(|s| s.len().min(1)).collect();
    let mut bytes: u64 = stacks.iter().filter_map(|s| s.first()).map(|(_, b)| b).sum();
    if bytes > budget_bytes {
        return Err(bytes);
    }
    // A term after one of less worth for its bytes waits behind it and comes right after it: it goes by the least so far.
    let mut order: Vec<(f64, usize, usize)> = Vec::new();
    for (s, stack) in stacks.iter().enumerate() {
        let mut least = f64::INFINITY;
        for (i, (worth, bytes)) in stack.iter().enumerate().skip(1) {
            least = least.min(worth / *bytes.max(&1) as f64);
            order.push((least, i, s));
        }
    }
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    for (_, i, s) in order {
        bytes += stacks[s][i].1;
        // A prefix of one order, and not what else might fit: so that a larger budget holds all that a smaller one does.
        if bytes > budget_bytes {
            break;
        }
        taken[s] = i + 1;
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Float, PatternKind, pack_float};
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;

    fn one(rows: usize, cols: usize, rank: usize, seed: u64) -> Signed {
        let thin = |r, c, s| pack_float(random(r, c, s).view(), None, PatternKind::Dense, Float::F32).unwrap();
        let turned = Mask::from_fn(rows, cols, |r, c| (r * 7 + c * c * 3 + seed as usize) % 5 < 2);
        Signed::new(&turned, thin(rows, rank, seed), thin(rank, cols, seed + 1))
    }

    #[test]
    fn signs_energy_bytes_and_names() {
        for (rows, cols, rank) in [(3, 8, 2), (1, 1, 1), (5, 71, 3), (17, 64, 1)] {
            let s = one(rows, cols, rank, 4);
            let turned = Mask::from_fn(rows, cols, |r, c| (r * 7 + c * c * 3 + 4) % 5 < 2);
            let (a, b) = (s.left.to_mat(), s.right.to_mat());
            let m = Stored::new(rows, cols, vec![Term::Signed(s.clone())]);
            m.check().unwrap();
            let want = |r: usize, c: usize| {
                let product: f64 = (0..rank).map(|k| f64::from(a[(r, k)]) * f64::from(b[(k, c)])).sum();
                if turned.get(r, c) { -product } else { product }
            };
            let (got, mut energy) = (m.to_mat(), 0.0);
            for (r, c) in (0..rows).flat_map(|r| (0..cols).map(move |c| (r, c))) {
                assert!((f64::from(got[(r, c)]) - want(r, c)).abs() < 1e-5);
                energy += want(r, c).powi(2);
            }
            assert!((s.energy() / energy - 1.0).abs() < 1e-6, "{} {energy}", s.energy());
            assert_eq!(m.bytes(), (rows * cols.div_ceil(8) + 4 * rank * (rows + cols)) as u64);
            assert_eq!((m.codec_name(), m.sparsity()), (format!("signs of lowrank {rank} (f32)"), 0.0));
            assert_eq!(m.to_parts().0.version(), 5);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = one(5, 13, 2, 1);
        let says = |s: Signed| Stored::new(5, 13, vec![Term::Signed(s)]).check().unwrap_err().what;
        let with = |f: &dyn Fn(&mut Signed)| {
            let mut s = good.clone();
            f(&mut s);
            says(s)
        };
        assert!(with(&|s| s.signs = s.signs.slice(1..)).contains("signs: 9 bytes for 5 rows of 2"));
        assert!(with(&|s| s.signs = vec![0xFF; 10].into()).contains("signs of row 0 go beyond column 13"));
        assert!(with(&|s| s.left = one(5, 13, 3, 1).left).contains("5 x 3 and 2 x 13"));
        assert!(with(&|s| *s = one(5, 13, 6, 1)).contains("1 to the shorter side"));
        assert!(with(&|s| *s = one(6, 13, 2, 1)).contains("term 0 is 6 x 13"));
        // A factor of any number of rows takes few bytes under a mask that they share: not here.
        let mask = Mask::all(2, 13, false);
        let none = pack_float(Mat::zeros(2, 13).view(), Some(&mask), PatternKind::Mask { height: 2 }, Float::F16);
        assert!(with(&|s| s.right = none.clone().unwrap()).contains("sparse factors"));
    }

    #[test]
    fn more_bytes_hold_all_that_fewer_hold() {
        let stacks = vec![
            vec![(0.6, 10), (0.25, 10), (0.15, 10)],
            vec![(0.7, 40), (0.2, 40), (0.1, 40)],
            vec![(0.9, 5), (0.1, 5)],
        ];
        assert_eq!(terms_within(&stacks, 54), Err(55));
        assert_eq!(terms_within(&stacks, 55), Ok(vec![1, 1, 1]));
        let mut last = vec![0, 0, 0];
        for budget in 55..200 {
            let now = terms_within(&stacks, budget).unwrap();
            let bytes: u64 = now.iter().zip(&stacks).flat_map(|(n, s)| &s[..*n]).map(|(_, b)| b).sum();
            assert!(bytes <= budget && last.iter().zip(&now).all(|(a, b)| a <= b), "{budget}: {last:?} {now:?}");
            last = now;
        }
        assert_eq!(last, [3, 3, 2]);
        // By worth for its bytes: 0.025, 0.02, 0.015, 0.005, 0.0025.
        assert_eq!(terms_within(&stacks, 70), Ok(vec![2, 1, 2]));
        // What is worth more than what it waits for comes right behind it.
        let late = vec![vec![(0.5, 1), (0.1, 1), (0.4, 1)], vec![(0.5, 1), (0.2, 1)]];
        assert_eq!(terms_within(&late, 3), Ok(vec![1, 2]));
        assert_eq!(terms_within(&late, 5), Ok(vec![3, 2]));
        assert_eq!(terms_within(&[], 0), Ok(vec![]));
    }
}

//! Rearrange: input channels are sorted by the size of their weights, so that those that share a scale are alike.
//!
//! **Paper.** Nikita Trukhanov, Ilya Soloveychik, "Accurate Block Quantization in LLMs with Outliers", 2024, arXiv
//! 2403.20137.
//!
//! **Idea.** A block of weights shares one exponent, which its largest weight sets: an outlier costs all others of its
//! block their digits. A product does not change when its terms change places, `W x = (W Pᵀ)(P x)`, so channels are
//! sorted by `‖W_j‖₂` once, ahead of time: outliers then fill blocks of their own.
//!
//! **Shapes and units.** `w` `[out, in]`; the map is an order of the `in` channels, largest first.
//!
//! **Cost.** One pass over the matrix and a sort; where the model runs, `in` values a token change places for each
//! matrix; four bytes for each input.
//!
//! **Departs.** (1) The paper rearranges the channels of the query and key projections' outputs, so that cached keys
//! are rounded in sorted blocks, at no cost in the run; here it is the inputs of any matrix, for its weights, and the
//! inputs change places as the model runs. (2) One order serves all rows of a matrix.

use lacuna_base::MatRef;
use lacuna_contract::{Card, Made, Method, MethodError, Stats, Transform};
use lacuna_format::Map;
use serde::Deserialize;

use crate::make;

/// No parameters.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Rearrange {}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "rearrange",
            paper: "Trukhanov, Soloveychik: Accurate Block Quantization in LLMs with Outliers, 2024",
            arxiv: "2403.20137",
            summary: "Input channels are sorted by the size of their weights: those that share a scale are alike.",
            system: None,
            verb: "transform",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Rearrange>,
        make: |given| Ok(Made::Transform(Box::new(make::parameters::<Rearrange>("rearrange", given)?))),
    }
}

impl Transform for Rearrange {
    fn maps(&self, w: MatRef<'_>, _: &Stats<'_>) -> Result<Vec<Map>, MethodError> {
        make::finite(w)?;
        let mut sizes = vec![0.0f64; w.cols()];
        for r in 0..w.rows() {
            sizes.iter_mut().zip(w.row(r)).for_each(|(s, v)| *s += f64::from(*v) * f64::from(*v));
        }
        let mut order: Vec<u32> = (0..w.cols() as u32).collect();
        order.sort_by(|&a, &b| sizes[b as usize].total_cmp(&sizes[a as usize]));
        Ok(vec![Map::permutation(&order)])
    }

    fn form(&self, inputs: usize) -> Result<Vec<Map>, MethodError> {
        if u32::try_from(inputs).is_err() {
            return Err(MethodError::new(format!("{inputs} inputs; an order holds fewer than 2^32")));
        }
        Ok(vec![Map::permutation(&(0..inputs as u32).collect::<Vec<u32>>())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::bfp::Bfp;
    use crate::transform::testkit::{Rounding, heavy, output_error, rounded, with_maps};
    use lacuna_base::Mat;

    #[test]
    fn agrees_with_brute_force_by_repeated_choice() {
        for (rows, cols) in [(4, 9), (1, 5), (3, 1), (2, 12)] {
            let mut w = Mat::from_fn(rows, cols, |r, c| ((r * 7 + c * 5) % 4) as f32 - 1.5);
            (0..rows).for_each(|r| w[(r, cols / 2)] = 0.0);
            let maps = Rearrange {}.maps(w.view(), &Stats::default()).expect("maps");
            let size = |c: usize| (0..rows).map(|r| f64::from(w[(r, c)]).powi(2)).sum::<f64>();
            let mut left: Vec<usize> = (0..cols).collect();
            let mut want = Vec::new();
            while !left.is_empty() {
                // The first of the largest that are left.
                let most = left.iter().map(|c| size(*c)).fold(f64::MIN, f64::max);
                let at = left.iter().position(|c| size(*c) == most).expect("one");
                want.push(left.remove(at) as u32);
            }
            assert_eq!(maps, [Map::permutation(&want)], "{rows} {cols}");
        }
    }

    #[test]
    fn blocks_of_floating_point_lose_less_once_sorted() {
        for seed in 0..5 {
            for bits in [3, 4, 6] {
                let (w, x) = heavy(24, 256, 200, true, false, seed);
                let turned = with_maps(&w, &x, &Rearrange {});
                let how = Rounding { bits, group: 32, grid: &Bfp {}, solver: None };
                let (plain, sorted) = (rounded(&w, &x, None, &how), rounded(&w, &x, Some(&turned), &how));
                let (plain, sorted) = (output_error(&w, &plain, &x), output_error(&w, &sorted, &x));
                assert!(sorted < 0.7 * plain, "{bits} {seed}: {sorted} {plain}");
            }
        }
    }
}

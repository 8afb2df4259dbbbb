//! Hadamard: inputs are rotated by a Hadamard matrix with random signs, so that no weight and no input stands out.
//!
//! **Paper.** Albert Tseng, Jerry Chee, Qingyao Sun, Volodymyr Kuleshov, Christopher De Sa, "QuIP#: Even Better LLM
//! Quantization with Hadamard Incoherence and Lattice Codebooks", 2024, arXiv 2402.04396 (section 3); Saleh Ashkboos et
//! al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024, arXiv 2404.00456.
//!
//! **Idea.** `W x = (W Vᵀ)(V x)` for an orthogonal `V = H S`: `S` random signs, `H` a Hadamard matrix over the root of
//! its order. Every weight of `W Vᵀ` is a signed mean of a whole row, so that the largest is only about
//! `√(2 log n) ‖w‖ / √n`: a grid is no longer stretched by outliers, and the rounding that follows loses less. The
//! Hessian becomes `V H Vᵀ`.
//!
//! **Shapes and units.** `w` `[out, in]`; the map has one bit of sign for each input, over runs of `size` inputs.
//!
//! **Cost.** `in log size` operations a row here, and as many a token where the model runs, for each matrix; `in / 8`
//! bytes.
//!
//! **Departs.** (1) The papers rotate outputs, too (QuIP#), or fold rotations into neighbouring matrices (QuaRot); here
//! the inputs of each matrix alone are rotated, while the model runs. (2) Where `in` has no Hadamard matrix of its
//! order, runs of the largest order that divides it are rotated each by itself; QuIP# takes a Fourier transform then.
//! (3) The signs depend on the seed and the number of inputs alone: matrices that read the same input share them, and
//! so the rotated statistics and what solvers make of them.

use lacuna_base::{MatRef, Rng};
use lacuna_contract::{Card, Made, Method, MethodError, Stats, Transform};
use lacuna_format::{Map, hadamard_parts};
use serde::Deserialize;

use crate::make;

/// The papers' parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Hadamard {
    /// Inputs that are rotated together, 1, 12, 20, 28, 36 or 44 times a power of two; 0: as many as there is a matrix
    /// for.
    size: usize,
    /// Change the sign of inputs at random first.
    signs: bool,
    /// Where the signs come from.
    seed: u64,
}

impl Default for Hadamard {
    fn default() -> Hadamard {
        Hadamard { size: 0, signs: true, seed: 0 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "hadamard",
            paper: "Tseng, Chee, Sun, Kuleshov, De Sa: QuIP#: Even Better LLM Quantization with Hadamard Incoherence \
             and Lattice Codebooks, 2024",
            arxiv: "2402.04396",
            summary: "Inputs are rotated by a Hadamard matrix with random signs, so that no weight stands out.",
            system: None,
            verb: "transform",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Hadamard>,
        make: |given| {
            let p: Hadamard = make::parameters("hadamard", given)?;
            if p.size != 0 && (p.size == 1 || hadamard_parts(p.size).is_none()) {
                return Err(MethodError::new(format!(
                    "size is {}; it must be a power of two, or 12, 20, 28, 36 or 44 times one, or 0 for the largest",
                    p.size
                )));
            }
            Ok(Made::Transform(Box::new(p)))
        },
    }
}

/// The largest order that divides `n` of which there is a Hadamard matrix.
fn largest(n: usize) -> usize {
    if n == 0 {
        return 1;
    }
    let twos = 1 << n.trailing_zeros();
    let sizes = [11, 9, 7, 5, 3, 1].into_iter().filter(|odd| n.is_multiple_of(*odd)).map(|odd| odd * twos);
    sizes.into_iter().find(|size| hadamard_parts(*size).is_some()).unwrap_or(1)
}

impl Transform for Hadamard {
    fn maps(&self, w: MatRef<'_>, _: &Stats<'_>) -> Result<Vec<Map>, MethodError> {
        make::finite(w)?;
        self.form(w.cols())
    }

    fn form(&self, inputs: usize) -> Result<Vec<Map>, MethodError> {
        let size = if self.size == 0 { largest(inputs) } else { self.size };
        if size < 2 {
            return Err(MethodError::new(format!(
                "{inputs} inputs are odd in number: no Hadamard matrix rotates them"
            )));
        }
        if !inputs.is_multiple_of(size) {
            return Err(MethodError::new(format!("{inputs} inputs do not divide into runs of {size}")));
        }
        let mut rng = Rng::stream(self.seed, inputs as u64);
        let negative: Vec<bool> = (0..inputs).map(|_| rng.u64() >> 63 == 1).collect();
        Ok(vec![Map::hadamard(size, self.signs.then_some(&negative))])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::rtn::Rtn;
    use crate::solve::gptq;
    use crate::transform::testkit::{Rounding, heavy, output_error, rounded, with_maps};
    use lacuna_base::testkit::{max_abs_diff, random};
    use lacuna_base::{Mat, dense};
    use lacuna_format::Unpacked;

    fn made(keys: serde_json::Value) -> Box<dyn Transform> {
        match (method().make)(keys) {
            Ok(Made::Transform(t)) => t,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_largest_order_that_divides() {
        for (n, size) in
            [(576, 576), (1536, 1536), (64, 64), (48, 48), (12, 12), (6, 2), (104, 8), (7, 1), (14336, 14336)]
        {
            assert_eq!(largest(n), size, "{n}");
        }
    }

    #[test]
    fn agrees_with_the_definition() {
        for (rows, cols, size) in [(3, 8, 8), (1, 24, 12), (4, 40, 0), (2, 2, 0), (3, 96, 32)] {
            let (mut w, x) = (random(rows, cols, 1), random(5, cols, 2));
            (0..rows).for_each(|r| w[(r, 0)] = 0.0);
            let map = made(serde_json::json!({ "size": size })).maps(w.view(), &Stats::default()).expect("maps");
            let run = if size == 0 { largest(cols) } else { size };
            let Map::Hadamard { signs: Some(signs), .. } = &map[0] else { panic!("signs") };
            // V from its definition: entries of H by Sylvester's product with Paley's core, signs on the columns.
            let (h, m) = hadamard_parts(run).expect("an order");
            let core = lacuna_format::hadamard_core(h);
            let v = Mat::from_fn(cols, cols, |i, j| {
                if i / run != j / run {
                    return 0.0;
                }
                let (a, b) = (i % run, j % run);
                let walsh = if ((a % m) & (b % m)).count_ones() % 2 == 1 { -1.0 } else { 1.0 };
                let sign = if signs[j / 8] >> (j % 8) & 1 == 1 { -1.0 } else { 1.0 };
                f32::from(core[a / m * h + b / m]) * walsh * sign / (run as f32).sqrt()
            });
            let want = dense::matmul_nt(w.view(), v.view());
            let mut turned = Unpacked::dense(w.clone());
            turned.turn(map).expect("turns");
            assert!(max_abs_diff(turned.sum().view(), want.view()) < 1e-5, "{rows} {cols} {size}");
            assert!(max_abs_diff(turned.to_mat().view(), w.view()) < 1e-5);
            let (turned_x, out) = (dense::matmul_nt(x.view(), v.view()), dense::matmul_nt(x.view(), w.view()));
            assert!(max_abs_diff(dense::matmul_nt(turned_x.view(), turned.sum().view()).view(), out.view()) < 1e-4);
        }
    }

    #[test]
    fn outliers_in_weights_or_inputs_cost_less_once_rotated() {
        let solver = match (gptq::method().make)(serde_json::Value::Null) {
            Ok(Made::Solve(s)) => s,
            other => panic!("{other:?}"),
        };
        for seed in 0..5 {
            for (in_w, in_x) in [(true, false), (false, true), (true, true)] {
                let (w, x) = heavy(32, 128, 300, in_w, in_x, seed);
                let by = made(serde_json::json!({ "seed": seed }));
                let turned = with_maps(&w, &x, by.as_ref());
                for bits in [2, 3] {
                    let solved = Rounding { bits, group: 64, grid: &Rtn {}, solver: Some(solver.as_ref()) };
                    let (plain, rotated) = (rounded(&w, &x, None, &solved), rounded(&w, &x, Some(&turned), &solved));
                    let (plain, rotated) = (output_error(&w, &plain, &x), output_error(&w, &rotated, &x));
                    assert!(rotated < plain, "gptq {bits} {in_w} {in_x} {seed}: {rotated} {plain}");
                    if in_w {
                        let nearest = Rounding { solver: None, ..solved };
                        let (plain, rotated) =
                            (rounded(&w, &x, None, &nearest), rounded(&w, &x, Some(&turned), &nearest));
                        let (plain, rotated) = (output_error(&w, &plain, &x), output_error(&w, &rotated, &x));
                        assert!(rotated < plain, "rtn {bits} {in_w} {in_x} {seed}: {rotated} {plain}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let form = |keys, n| made(keys).form(n).expect_err("refused").what;
        assert!(form(serde_json::json!({}), 7).contains("7 inputs"));
        assert!(form(serde_json::json!({ "size": 16 }), 24).contains("runs of 16"));
        for size in [1, 6, 52] {
            let refused = (method().make)(serde_json::json!({ "size": size })).expect_err("refused").what;
            assert!(refused.contains(&format!("size is {size}")), "{refused}");
        }
        let one = made(serde_json::json!({ "seed": 1 })).form(64).expect("maps");
        assert_eq!(made(serde_json::json!({ "seed": 1 })).form(64).expect("maps"), one);
        assert_ne!(made(serde_json::json!({})).form(64).expect("maps"), one);
        let bare = made(serde_json::json!({ "signs": false })).form(64).expect("maps");
        assert_eq!(bare, [Map::hadamard(64, None)]);
    }
}

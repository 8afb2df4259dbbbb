//! BitStack: a matrix as a stack of blocks of about one bit a weight, of which any number can be loaded.
//!
//! **Paper.** Xinghao Wang, Pengyu Wang, Bo Wang, Dong Zhang, Yunhua Zhou, Xipeng Qiu, "BitStack: Any-Size Compression of
//! Large Language Models in Variable Memory Environments", 2024, arXiv 2410.23918.
//!
//! **Idea.** Iterative absolute value decomposition. `W' = W diag(s)` with `s_c = ‖X_c‖₂`, the size of an input channel on
//! the calibration text. Then, from `R_0 = W'` on, `R_i ≈ S_i ⊙ (A_i B_i)` with `S_i = sign(R_i)` and `A_i B_i` the `k`
//! largest singular triples of `|R_i|`, and `R_{i+1} = R_i - S_i ⊙ (A_i B_i)`: most of `|R_i|` is its mean, so that few
//! triples say much of it. The product is with `diag(s)⁻¹ x`. The blocks of all matrices are one stack, the more important
//! ones first; a budget loads as many of them as it holds.
//!
//! **Shapes and units.** `w` `[out, in]`; of a block: signs `[out, in]`, one bit each, `A` `[out, k]` and `B` `[k, in]`, 8
//! bits a value. What a block is worth: `‖A B‖²`, by which it lowers `‖(W - Ŵ) diag(s)‖²`, the calibrated error of the
//! outputs were inputs uncorrelated (the first block: `2/first - 1` times that).
//!
//! **Cost.** `4 · out · in · (k + 8)` multiply-adds a block and round of subspace iteration; a few copies of the matrix.
//!
//! **Departs.** (1) `A` and `B` have 8 bits and a scale of 16 bits a row, where the authors' have 16: a block is of what
//! the blocks before it leave as they were rounded, so that later ones mend that, too. (2) `k` follows from the shape, at
//! `vectors` bits a weight, where the authors' is 16 for all: that is 16 in a matrix of 4096 x 4096 and 2 in one of
//! 576 x 576, where what 16 cost is better spent on further blocks. `rank` gives one for all. (3) The first block is `first`
//! times what fits best. What it leaves is then spread evenly from 0 on and each further sign halves it, where after the
//! best fit few values far out stay: three blocks of a real matrix lose a third less, four half, one alone a fifth more.
//! (4) The triples are found by subspace iteration. (5) `s` is stored with the matrix and not moved into the norm before
//! it. (6) The order of the stack is by what a block is worth, as a part of its matrix's whole, for its bytes, read off its
//! vectors when a model is loaded ([`lacuna_format::terms_within`]); the authors measure perplexities and go level by
//! level. Measured is what `search` does over `blocks`.

use lacuna_base::{Mat, Mat64, MatRef, Rng, dense, factor, float};
use lacuna_contract::{Ask, Card, Made, Method, MethodError, Stack, Stats};
use lacuna_format::{Affine, Code, Float, Group, Integers, Map, Mask, ScaleCodec, UnpackedPiece, UnpackedSigned};
use serde::Deserialize;

use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct BitStack {
    /// Singular triples of a block, 1 to 256; 0: as many as `vectors` pays for.
    rank: usize,
    /// Bits a weight of a block's vectors.
    vectors: f64,
    /// How many times what fits best the first block is, 1 to 2; 1 is the paper's.
    first: f64,
    /// Rounds of subspace iteration.
    rounds: usize,
}

impl Default for BitStack {
    fn default() -> BitStack {
        BitStack { rank: 0, vectors: 0.0625, first: 1.35, rounds: 4 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "bitstack",
            paper: "Wang, Wang, Wang, Zhang, Zhou, Qiu: BitStack: Any-Size Compression of Large Language Models in \
             Variable Memory Environments, 2024",
            arxiv: "2410.23918",
            summary: "A matrix becomes blocks of signs times a few singular vectors, each of what those before it leave; \
             any number of them is a model.",
            system: Some(342),
            verb: "stack",
            needs: &[Ask::InputSquares],
            abilities: &[],
        },
        keys: make::keys::<BitStack>,
        make: |given| {
            let p: BitStack = make::parameters("bitstack", given)?;
            if p.rank > 256 {
                return Err(MethodError::new(format!(
                    "rank is {}; write 1 to 256, or 0 for what vectors pays",
                    p.rank
                )));
            }
            if !(0.0..=8.0).contains(&p.vectors) {
                return Err(MethodError::new(format!("vectors is {}; write 0 to 8 bits a weight", p.vectors)));
            }
            if !(1.0..=2.0).contains(&p.first) {
                return Err(MethodError::new(format!("first is {}; write 1 (the paper's) to 2", p.first)));
            }
            if !(1..=100).contains(&p.rounds) {
                return Err(MethodError::new(format!("rounds is {}; write 1 to 100", p.rounds)));
            }
            Ok(Made::Stack(Box::new(p)))
        },
    }
}

/// What the smallest input counts for at the least, of the largest.
const LEAST: f64 = 1e-4;
/// Columns of the subspace beyond the triples that are wanted.
const BESIDE: usize = 8;
/// Bits of a value of the vectors.
const BITS: u8 = 8;

/// An orthonormal basis of the columns of `m`, in their place: Gram and Schmidt, twice. A column that the others make up
/// becomes zero.
fn orthonormal(m: &Mat) -> Mat {
    // Rows of the transpose lie together.
    let mut q = Mat64::from_f32(m.transpose().view());
    for i in 0..q.rows() {
        let mut v = q.row(i).to_vec();
        let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let before = norm(&v);
        for j in (0..i).chain(0..i) {
            let dot: f64 = v.iter().zip(q.row(j)).map(|(a, b)| a * b).sum();
            v.iter_mut().zip(q.row(j)).for_each(|(a, b)| *a -= dot * b);
        }
        let after = norm(&v);
        // f32 has nothing beyond its last bit to say of a direction.
        let by = if after > 1e-6 * before { 1.0 / after } else { 0.0 };
        q.row_mut(i).iter_mut().zip(v).for_each(|(q, v)| *q = v * by);
    }
    q.transpose().to_f32()
}

/// `(A, B)`, `[out, rank]` and `[rank, in]`: the largest singular triples of `m`, columns of `A` orthonormal.
fn triples(m: &Mat, rank: usize, rounds: usize) -> Result<(Mat, Mat), MethodError> {
    let (rows, cols) = (m.rows(), m.cols());
    let p = (rank + BESIDE).min(rows.min(cols));
    let mut rng = Rng::new(342);
    // The largest vector of magnitudes has no negative entries: all ones are near it.
    let mut q = Mat::from_fn(cols, p, |_, k| if k == 0 { 1.0 } else { rng.normal() });
    for _ in 0..rounds {
        let y = orthonormal(&dense::matmul_nn(m.view(), q.view()));
        q = orthonormal(&dense::matmul_tn(m.view(), y.view()));
    }
    let y = orthonormal(&dense::matmul_nn(m.view(), q.view()));
    let b = dense::matmul_tn(y.view(), m.view());
    let wide = Mat64::from_f32(b.view());
    let eigen = factor::symmetric_eigen(&dense::matmul_nt_f64(&wide, &wide));
    let eigen = eigen.map_err(|e| MethodError::new(e.to_string()))?;
    // Rising or falling, by their values.
    let mut order: Vec<usize> = (0..p).collect();
    order.sort_by(|&i, &j| eigen.values[j].total_cmp(&eigen.values[i]));
    let turn = Mat::from_fn(p, rank, |i, k| eigen.q[(i, order[k])] as f32);
    Ok((dense::matmul_nn(y.view(), turn.view()), dense::matmul_tn(turn.view(), b.view())))
}

/// `m` times `by` in 8 bits, a scale a row.
fn rounded(m: &Mat, by: f32) -> UnpackedPiece {
    let (rows, cols) = (m.rows(), m.cols());
    let mut codes = Vec::with_capacity(rows * cols);
    let mut scales = Mat::zeros(rows, 1);
    for r in 0..rows {
        let most = m.row(r).iter().fold(0.0f32, |t, v| t.max(v.abs())) * by;
        let grid = Affine { scale: float::round_f16(most / 127.0), zero: 1 << (BITS - 1) };
        codes.extend(m.row(r).iter().map(|v| grid.code(v * by, BITS)));
        scales[(r, 0)] = grid.scale;
    }
    let group = Group::Run(cols.max(1));
    let q = Integers { rows, cols, bits: BITS, codes, scales, zeros: None, offsets: None, group };
    let w = Mat::from_fn(rows, cols, |r, c| q.value(r, c));
    UnpackedPiece { code: Code::Integers(q, ScaleCodec::F16), ..UnpackedPiece::dense(w) }
}

impl BitStack {
    /// Triples of a block of a matrix of `(rows, cols)`.
    fn rank(&self, (rows, cols): (usize, usize)) -> usize {
        let paid = self.vectors * (rows * cols) as f64 / (f64::from(BITS) * (rows + cols) as f64);
        let rank = if self.rank > 0 { self.rank } else { paid.round() as usize };
        rank.clamp(1, rows.min(cols).max(1))
    }
}

impl Stack for BitStack {
    fn maps(&self, inputs: usize, stats: Option<&Stats<'_>>) -> Result<Vec<Map>, MethodError> {
        let mut d = vec![1.0; inputs];
        if let Some(stats) = stats {
            let squares = stats.squares()?;
            if squares.len() != inputs {
                return Err(MethodError::new(format!("squares of {} inputs for a matrix of {inputs}", squares.len())));
            }
            if let Some(i) = squares.iter().position(|s| !s.is_finite() || *s < 0.0) {
                return Err(MethodError::new(format!("the squares of input {i} add up to {}", squares[i])));
            }
            let most = squares.iter().copied().fold(0.0, f64::max).sqrt();
            let s: Vec<f64> =
                squares.iter().map(|s| if most > 0.0 { (s.sqrt() / most).max(LEAST) } else { 1.0 }).collect();
            // As large as it is small, which keeps both within f16.
            let middle = s.iter().copied().fold(1.0, f64::min).sqrt();
            d = s.iter().map(|s| (middle / s) as f32).collect();
        }
        Ok(vec![Map::diagonal(&d, Float::F16).map_err(|e| MethodError::new(e.what))?])
    }

    fn blocks(&self, w: MatRef<'_>, count: usize) -> Result<Vec<UnpackedSigned>, MethodError> {
        make::finite(w)?;
        let (rows, cols) = (w.rows(), w.cols());
        let rank = self.rank((rows, cols));
        let mut residual = w.to_mat();
        let mut out = Vec::with_capacity(count);
        for i in 0..count {
            let turned = Mask::from_fn(rows, cols, |r, c| residual[(r, c)] < 0.0);
            let magnitudes = Mat::from_vec(rows, cols, residual.data().iter().map(|v| v.abs()).collect());
            let (a, b) = triples(&magnitudes, rank, self.rounds)?;
            let over = if i == 0 { self.first as f32 } else { 1.0 };
            let most = |m: &Mat| m.data().iter().fold(0.0f32, |t, v| t.max(v.abs()));
            // Both of one size, which keeps their scales within f16.
            let by = if most(&a) > 0.0 && most(&b) > 0.0 { (most(&b) / most(&a)).sqrt() } else { 1.0 };
            let block = UnpackedSigned { turned, left: rounded(&a, by), right: rounded(&b, over / by) };
            let said = block.to_mat();
            residual.data_mut().iter_mut().zip(said.data()).for_each(|(r, s)| *r -= s);
            out.push(block);
        }
        Ok(out)
    }

    fn form(&self, (rows, cols): (usize, usize), count: usize, seed: u64) -> Result<Vec<UnpackedSigned>, MethodError> {
        let rank = self.rank((rows, cols));
        let mut rng = Rng::new(seed);
        let mut one = || {
            let turned = Mask::from_fn(rows, cols, |_, _| rng.below(2) == 0);
            let mut thin = |r, c| rounded(&Mat::from_fn(r, c, |_, _| rng.normal()), 1.0);
            UnpackedSigned { turned, left: thin(rows, rank), right: thin(rank, cols) }
        };
        Ok((0..count).map(|_| one()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_contract::Gathered;
    use lacuna_format::{Stored, Unpacked, UnpackedTerm, terms_within};
    use serde_json::json;

    fn squared(m: &Mat) -> f64 {
        m.data().iter().map(|v| f64::from(*v).powi(2)).sum()
    }

    fn minus(a: &Mat, b: &Mat) -> Mat {
        Mat::from_fn(a.rows(), a.cols(), |r, c| a[(r, c)] - b[(r, c)])
    }

    fn stored(blocks: Vec<UnpackedSigned>) -> Stored {
        let mut terms = blocks.into_iter().map(|b| UnpackedTerm::Signed(Box::new(b)));
        let main = terms.next().expect("a block");
        Unpacked { main, aside: terms.collect(), input: Vec::new() }.pack(Float::F32).expect("packs")
    }

    /// What is left after each block, straight from the definition: all singular triples, in f64, nothing rounded.
    fn brute_force(w: &Mat, rank: usize, count: usize) -> Vec<f64> {
        let mut r = Mat64::from_f32(w.view());
        let mut out = Vec::new();
        for _ in 0..count {
            let size = Mat64::from_fn(r.rows(), r.cols(), |i, j| r[(i, j)].abs());
            let factor::Svd { u, s, vt } = factor::svd(&size).expect("decomposes");
            r = Mat64::from_fn(r.rows(), r.cols(), |i, j| {
                let near: f64 = (0..rank).map(|k| u[(i, k)] * s[k] * vt[(k, j)]).sum();
                if r[(i, j)] < 0.0 { r[(i, j)] + near } else { r[(i, j)] - near }
            });
            out.push(r.data().iter().map(|v| v * v).sum());
        }
        out
    }

    #[test]
    fn agrees_with_brute_force_block_by_block() {
        for (rows, cols, rank) in [(6, 9, 2), (12, 7, 3), (1, 8, 1), (8, 1, 1), (1, 1, 1), (30, 40, 2), (5, 5, 5)] {
            let mut w = random(rows, cols, 3);
            if rows > 4 && cols > 4 {
                // Ties, and a column and a row of zeros.
                w.row_mut(1).fill(0.5);
                w.row_mut(2).fill(0.0);
                (0..rows).for_each(|r| w[(r, 3)] = 0.0);
            }
            let m = BitStack { rank, first: 1.0, rounds: 30, ..BitStack::default() };
            let blocks = m.blocks(w.view(), 3).expect("taken apart");
            let (mut left, all) = (w.clone(), squared(&w));
            let mut before = all;
            for (i, (block, want)) in blocks.iter().zip(brute_force(&w, rank, 3)).enumerate() {
                left = minus(&left, &block.to_mat());
                let got = squared(&left);
                // Vectors of 8 bits, which later blocks follow.
                let off = if i == 0 { 2e-3 } else { 0.1 } * want + 1e-4 * all;
                assert!((got - want).abs() <= off, "{rows} x {cols}, block {i}: {got} for {want} of {all}");
                // What a block is worth, read off its vectors.
                let worth = stored(vec![block.clone()]);
                let energy = squared(&worth.to_mat());
                assert!((before - got - energy).abs() <= 0.02 * before + 1e-9 * all, "{before} {got} {energy}");
                before = got;
            }
        }
    }

    /// What Departs (3) says: evenly spread is what signs halve.
    #[test]
    fn a_first_block_larger_than_fits_leaves_less_to_the_third() {
        let w = random(120, 160, 5);
        let left = |first: f64, count: usize| {
            let blocks = BitStack { first, ..BitStack::default() }.blocks(w.view(), count).expect("taken apart");
            squared(&minus(&w, &stored(blocks).to_mat())) / squared(&w)
        };
        let [paper, ours] = [1.0, 1.35].map(|first| [1, 2, 3, 4].map(|count| left(first, count)));
        assert!(ours[0] > paper[0] && ours[1] < 0.97 * paper[1], "{ours:?} {paper:?}");
        assert!(ours[2] < 0.75 * paper[2] && ours[3] < 0.6 * paper[3], "{ours:?} {paper:?}");
        // The worth of a first block, by its definition.
        let block = BitStack { first: 1.35, ..BitStack::default() }.blocks(w.view(), 1).expect("taken apart");
        let worth = (2.0 / 1.35 - 1.0) * squared(&stored(block).to_mat()) / squared(&w);
        assert!((worth - (1.0 - ours[0])).abs() < 0.01, "{worth} {ours:?}");
    }

    #[test]
    fn nothing_to_take_apart_is_no_obstacle() {
        let zero = BitStack::default().blocks(Mat::zeros(4, 6).view(), 2).expect("taken apart");
        assert_eq!(squared(&stored(zero).to_mat()), 0.0);
        // Down to what f32 can say, and further.
        let w = random(9, 20, 1);
        let blocks = BitStack { rank: 9, ..BitStack::default() }.blocks(w.view(), 16).expect("taken apart");
        assert!(squared(&minus(&w, &stored(blocks).to_mat())) < 1e-9);
        let mut bad = random(2, 2, 1);
        bad[(1, 0)] = f32::NAN;
        assert!(BitStack::default().blocks(bad.view(), 1).expect_err("refused").what.contains("row 1, column 0"));
    }

    #[test]
    fn bytes_and_ranks_are_foretold() {
        let m = BitStack::default();
        let ranks = [(4096, 4096), (1536, 576), (576, 576), (192, 576), (1, 9)].map(|s| m.rank(s));
        assert_eq!(ranks, [16, 3, 2, 1, 1], "the paper's 16 where matrices are as large as the paper's");
        for (rows, cols) in [(7, 33), (40, 64)] {
            let w = random(rows, cols, 2);
            let made = stored(m.blocks(w.view(), 3).expect("taken apart"));
            let told = stored(m.form((rows, cols), 3, 1).expect("a form"));
            let rank = m.rank((rows, cols));
            assert_eq!(made.bytes(), 3 * (rows * cols.div_ceil(8) + (rank + 2) * rows + rank * (cols + 2)) as u64);
            assert_eq!((made.bytes(), made.codec_name()), (told.bytes(), told.codec_name()));
        }
    }

    /// A few matrices, some inputs far larger than others: in the bytes of rounded rows, signs and what the inputs are
    /// lose less of the outputs, at 2 bits and at 3; and more bytes never lose more.
    #[test]
    fn loses_less_than_rows_rounded_at_the_same_bytes() {
        let (rows, cols, count) = (512, 512, 6);
        let size = |c: usize| if c % 16 == 3 { 8.0 } else { 0.5 + (c % 5) as f64 / 4.0 };
        let found = [(Ask::InputSquares, Gathered::Vector((0..cols).map(|c| 100.0 * size(c).powi(2)).collect()))];
        let stats = Stats { tokens: 100, found: &found, gradients: &[], sequences: 0, worked: None };
        let all: Vec<Mat> = (0..count).map(|i| random(rows, cols, i)).collect();
        let lost =
            |w: &Mat, got: &Mat| squared(&Mat::from_fn(rows, cols, |r, c| (w[(r, c)] - got[(r, c)]) * size(c) as f32));
        let m = BitStack::default();
        let stacks: Vec<Stored> = all
            .iter()
            .map(|w| {
                let maps = m.maps(cols, Some(&stats)).expect("maps");
                let mut turned = Unpacked::dense(w.clone());
                turned.turn(maps.clone()).expect("turned");
                stored(m.blocks(turned.sum().view(), 5).expect("taken apart")).with_maps(maps, vec![])
            })
            .collect();
        let worth: Vec<Vec<(f64, u64)>> = stacks.iter().map(|s| s.stack().expect("a stack")).collect();
        let beside: u64 = (2 * cols * all.len()) as u64;
        let within = |bytes: u64| -> f64 {
            let terms = terms_within(&worth, bytes - beside).expect("fits");
            stacks.iter().zip(terms).zip(&all).map(|((s, n), w)| lost(w, &s.first_terms(n).to_mat())).sum()
        };
        for bits in [2u8, 3] {
            let top = f32::from((1u8 << bits) - 1);
            let rounded = |w: &Mat| {
                let row = |r: usize| {
                    let (low, high) = w.row(r).iter().fold((0.0f32, 0.0f32), |(l, h), v| (l.min(*v), h.max(*v)));
                    (low, (high - low) / top)
                };
                Mat::from_fn(rows, cols, |r, c| {
                    let (low, step) = row(r);
                    low + step * ((w[(r, c)] - low) / step).round()
                })
            };
            let bytes = (rows * cols * usize::from(bits) / 8 + 2 * rows) as u64 * count;
            let (rows, ours) = (all.iter().map(|w| lost(w, &rounded(w))).sum::<f64>(), within(bytes));
            assert!(ours < 0.97 * rows, "{bits} bits: {ours} against {rows}");
        }
        let each: Vec<f64> = (10..40).map(|b| within((rows * cols) as u64 * count * b / 64)).collect();
        assert!(each.windows(2).all(|w| w[1] <= w[0]), "{each:?}");
    }

    #[test]
    fn maps_are_one_over_the_sizes_of_inputs() {
        let squares = [4.0, 0.0, 1.0, 1e-20, 400.0];
        let found = [(Ask::InputSquares, Gathered::Vector(squares.to_vec()))];
        let stats = Stats { tokens: 3, found: &found, gradients: &[], sequences: 0, worked: None };
        let maps = BitStack::default().maps(5, Some(&stats)).expect("maps");
        let [Map::Diagonal(float, bytes)] = &maps[..] else { panic!("one map") };
        let mut d = [0.0; 5];
        float.decode(bytes, &mut d);
        assert!((d[0] / d[2] - 0.5).abs() < 1e-3 && (d[4] / d[2] - 0.05).abs() < 1e-3, "{d:?}");
        assert!(d[1] == d[3] && d[1] < 200.0 && d[4] > 5e-3, "{d:?}");
        let silent = [(Ask::InputSquares, Gathered::Vector(vec![0.0; 5]))];
        let maps = BitStack::default().maps(5, Some(&Stats { found: &silent, ..stats }));
        assert_eq!(maps, BitStack::default().maps(5, None));
        let e = BitStack::default().maps(4, Some(&stats)).expect_err("refused").what;
        assert!(e.contains("5 inputs for a matrix of 4"), "{e}");
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        for (given, says) in [
            (json!({ "rank": 257 }), "rank is 257"),
            (json!({ "vectors": 9.5 }), "vectors is 9.5"),
            (json!({ "first": 0.5 }), "first is 0.5"),
            (json!({ "rounds": 0 }), "rounds is 0"),
        ] {
            let said = (method().make)(given).expect_err("refused").what;
            assert!(said.contains(says), "{said}");
        }
    }
}

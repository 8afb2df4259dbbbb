//! GPTQ's walk onto the grids of GGUF block types, and what makes its answer better afterwards.
//!
//! With `act_order` all scales are fitted beforehand, and the error of column `j` counts `1 / [H⁻¹]_jj`: what it costs
//! when all others make up for it. Without, a block's scales are fitted when the walk reaches it, to the weights as they
//! are then, and it counts `1 / U_jj²`: what the walk itself pays. After the walk all of it is open again: with
//! `E = (w - ŵ) H (w - ŵ)ᵀ` of a row and `g = H (w - ŵ)`, moving `ŵ` by `δ` lowers `E` by `2 δg - δHδ`. Codes move one
//! by one, the integer scale and minimum of a run together with its codes, the two f16 of a block by least squares; a
//! move is made only where it lowers `E`. Columns are taken in chunks as in the walk: within one every row goes alone,
//! and what the chunk changed in `g` of all columns is one matrix product.

use std::ops::Range;

use lacuna_base::{Mat, MatRef, dense};
use lacuna_contract::{MethodError, Stats};
use lacuna_format::{BlockGrid, GgufType, Pattern, Piece, Values};

use crate::make;
use crate::obs::{self, Hessian};

/// How to walk and what to do after.
pub(crate) struct Walk {
    pub damping: f64,
    /// Columns walked between two updates of all later ones.
    pub block: usize,
    /// Walk the inputs by falling `Σ x²`; all scales are then fitted beforehand.
    pub act_order: bool,
    /// Passes of moves after the walk.
    pub passes: usize,
}

/// The grids and codes of one row, in the columns' own order.
struct Row {
    at: usize,
    grids: Vec<BlockGrid>,
    codes: Vec<u8>,
}

/// What `kind` asks of a matrix with `cols` columns.
pub(crate) fn fits(kind: GgufType, cols: usize) -> Result<(), MethodError> {
    let n = kind.block();
    if cols.is_multiple_of(n) {
        return Ok(());
    }
    let all = lacuna_format::gguf::WRITTEN.iter();
    let names: Vec<String> =
        all.filter(|t| cols.is_multiple_of(t.block())).map(|t| format!("{t:?}").to_lowercase()).collect();
    let advice = match names.is_empty() {
        true => "no type fits; leave the matrix out".to_owned(),
        false => format!("these types fit: {}", names.join(", ")),
    };
    let name = format!("{kind:?}").to_lowercase();
    Err(MethodError::new(format!("{cols} columns are not whole blocks of {n}, of which {name} is made; {advice}")))
}

/// What `f` makes of every row of `w`, rows in parallel.
pub(crate) fn each_row<T: Default + Clone + Send>(w: MatRef<'_>, f: impl Fn(&[f32]) -> T + Sync) -> Vec<T> {
    let mut made = vec![T::default(); w.rows()];
    if w.cols() > 0 {
        let (mut rows, mut none) = (Mat::from_fn(w.rows(), w.cols(), |r, c| w.at(r, c)), Mat::zeros(w.rows(), 1));
        let done = dense::each_row(&mut rows, &mut none, &mut made, |row, _, made| {
            *made = f(row);
            Ok::<(), std::convert::Infallible>(())
        });
        done.unwrap_or_else(|never| match never {});
    }
    made
}

/// The matrix in blocks of `kind`.
pub(crate) fn solve(w: MatRef<'_>, stats: &Stats<'_>, kind: GgufType, how: &Walk) -> Result<Piece, MethodError> {
    make::finite(w)?;
    let (out, cols, n) = (w.rows(), w.cols(), kind.block());
    fits(kind, cols)?;
    let hessian = Hessian::new(stats, cols, how.act_order, how.damping)?;
    let h = obs::damped(stats, cols, how.damping)?;
    let mut back = vec![0; cols];
    hessian.order.iter().enumerate().for_each(|(j, &c)| back[c] = j);
    let mut walked = hessian.ordered(w);
    let source = obs::permuted(walked.view(), &back);
    let mut rows: Vec<Row> = (0..out).map(|at| Row { at, grids: Vec::new(), codes: vec![0; cols] }).collect();
    if how.act_order {
        let price = prices(&hessian.u, &back);
        let (mut values, mut none) = (source.clone(), Mat::zeros(out, 1));
        dense::each_row(&mut values, &mut none, &mut rows, |values, _, row| {
            row.grids = values.chunks_exact(n).zip(price.chunks_exact(n)).map(|(v, p)| kind.fit(v, p)).collect();
            Ok::<(), MethodError>(())
        })?;
    }
    // Whole blocks, so that a block's weights are up to date where it starts.
    let step = how.block.next_multiple_of(n);
    let nothing = |_: &Mat, _: Range<usize>, _: &mut [Row]| Ok(());
    obs::walk(&mut walked, &hessian.u, step, &mut rows, nothing, |row, seen| {
        let c = hessian.order[seen.at];
        if !how.act_order && c.is_multiple_of(n) {
            row.grids.push(start(kind, seen, &hessian.u, &h));
        }
        let block = &row.grids[c / n];
        let grid = block.of_run(c % n / block.run());
        row.codes[c] = grid.code(seen.current(seen.at));
        Ok(grid.value(row.codes[c]))
    })?;
    let mut now = obs::permuted(walked.view(), &back);
    improve(&source, &h, kind, how.passes, &mut now, &mut rows)?;
    let mut bytes = Vec::with_capacity(out * cols / n * kind.block_bytes());
    for row in &rows {
        row.grids.iter().zip(row.codes.chunks_exact(n)).for_each(|(grid, codes)| grid.write(codes, &mut bytes));
    }
    Ok(Piece { rows: out, cols, pattern: Pattern::Dense, values: Values::Gguf(kind, bytes.into()) })
}

/// What an error of each input costs when all others make up for it: `1 / [H⁻¹]_jj`. `back[c]` is where the walk meets
/// input `c`.
fn prices(u: &Mat, back: &[usize]) -> Vec<f32> {
    let mut inverse = vec![0.0f64; u.cols()];
    for k in 0..u.rows() {
        inverse.iter_mut().zip(u.row(k)).for_each(|(sum, u)| *sum += f64::from(*u) * f64::from(*u));
    }
    back.iter().map(|&j| (1.0 / inverse[j]) as f32).collect()
}

/// The scales of the block that starts at the row's current column: fitted by what the walk pays for an error and by
/// what an error alone costs, the better of the two as a trial of the walk tells.
fn start(kind: GgufType, seen: &obs::Row<'_>, u: &Mat, h: &Mat) -> BlockGrid {
    let n = kind.block();
    let columns = seen.at..seen.at + n;
    let values: Vec<f32> = columns.clone().map(|c| seen.current(c)).collect();
    let paid: Vec<f32> = columns.clone().map(|c| u[(c, c)].powi(-2)).collect();
    let alone: Vec<f32> = columns.map(|c| h[(c, c)]).collect();
    let mut best = (f32::INFINITY, None);
    let mut consider = |grid: BlockGrid| {
        let mut met = vec![0.0; n];
        let run = grid.run();
        let error = seen.attempt(n, |j, x| {
            met[j] = x;
            let grid = grid.of_run(j / run);
            grid.value(grid.code(x))
        });
        if error < best.0 || best.1.is_none() {
            best = (error, Some(grid));
        }
        met
    };
    let met = consider(kind.fit(&values, &paid));
    consider(kind.fit(&values, &alone));
    // Once more to what the trial met: earlier columns of the block have moved it.
    consider(kind.fit(&met, &paid));
    best.1.unwrap_or_else(|| kind.fit(&values, &paid))
}

/// Columns of a chunk.
const CHUNK: usize = 256;

/// Moves codes and scales as long as `passes` allow. `now` holds what the rows' codes are worth.
fn improve(
    w: &Mat,
    h: &Mat,
    kind: GgufType,
    passes: usize,
    now: &mut Mat,
    rows: &mut [Row],
) -> Result<(), MethodError> {
    let (out, cols) = (w.rows(), w.cols());
    if passes == 0 || out == 0 || cols == 0 {
        return Ok(());
    }
    let mut g = {
        let off = Mat::from_fn(out, cols, |r, c| w[(r, c)] - now[(r, c)]);
        dense::matmul_nn(off.view(), h.view())
    };
    for _ in 0..passes {
        for from in (0..cols).step_by(CHUNK) {
            let columns = from..(from + CHUNK).min(cols);
            let mut moved = Mat::zeros(out, columns.len());
            dense::each_row(now, &mut moved, rows, |now, moved, row| {
                let now = &mut now[columns.clone()];
                moved.copy_from_slice(now);
                let g = g.row(row.at)[columns.clone()].to_vec();
                let n = kind.block();
                let grids = &mut row.grids[columns.start / n..columns.end / n];
                let codes = &mut row.codes[columns.clone()];
                Chunk { h, columns: columns.clone(), now, codes, g }.improve(grids);
                moved.iter_mut().zip(now).for_each(|(m, now)| *m = *now - *m);
                Ok::<(), MethodError>(())
            })?;
            let h = h.view().rows_range(columns.start, columns.end);
            dense::add_matmul_nn(g.view_mut(), -1.0, moved.view(), h);
        }
    }
    Ok(())
}

/// Columns of one row: what their codes are worth, the codes, and `H (w - ŵ)`.
struct Chunk<'a> {
    h: &'a Mat,
    columns: Range<usize>,
    now: &'a mut [f32],
    codes: &'a mut [u8],
    g: Vec<f32>,
}

impl Chunk<'_> {
    fn improve(&mut self, grids: &mut [BlockGrid]) {
        for (b, grid) in grids.iter_mut().enumerate() {
            let n = grid.kind().block();
            let columns = b * n..(b + 1) * n;
            self.move_codes(columns.clone(), grid);
            self.move_runs(columns.clone(), grid);
            self.move_units(columns.clone(), grid);
            self.move_codes(columns, grid);
        }
    }

    /// `H` of a column of the chunk and the others.
    fn h(&self, j: usize) -> &[f32] {
        &self.h.row(self.columns.start + j)[self.columns.clone()]
    }

    /// Column `j` gets another code.
    fn set(&mut self, j: usize, code: u8, value: f32) {
        let off = value - self.now[j];
        (self.codes[j], self.now[j]) = (code, value);
        let h = &self.h.row(self.columns.start + j)[self.columns.clone()];
        self.g.iter_mut().zip(h).for_each(|(g, h)| *g -= off * h);
    }

    /// Each code to the best one, the others as they are.
    fn move_codes(&mut self, columns: Range<usize>, grid: &BlockGrid) {
        for r in columns.clone().step_by(grid.run()) {
            let of_run = grid.of_run((r - columns.start) / grid.run());
            for j in r..r + grid.run() {
                let hjj = self.h(j)[j];
                let code = of_run.code(self.now[j] + self.g[j] / hjj);
                if code == self.codes[j] {
                    continue;
                }
                let value = of_run.value(code);
                let off = value - self.now[j];
                // A hair above nothing, so that rounding cannot go in circles.
                if 2.0 * off * self.g[j] > 1.000_01 * off * off * hjj {
                    self.set(j, code, value);
                }
            }
        }
    }

    /// The integer scale and minimum of each run to their neighbours, with the codes that go with them.
    fn move_runs(&mut self, columns: Range<usize>, grid: &mut BlockGrid) {
        let n = grid.run();
        let (mut codes, mut values, mut g) = (vec![0u8; n], vec![0.0f32; n], vec![0.0f32; n]);
        for r in 0..columns.len() / n {
            let at = columns.start + r * n;
            let mut best: Option<(f32, BlockGrid, Vec<u8>, Vec<f32>)> = None;
            for moved in grid.neighbours(r) {
                let of_run = moved.of_run(r);
                g.copy_from_slice(&self.g[at..at + n]);
                let mut gain = 0.0;
                for j in 0..n {
                    let h = &self.h(at + j)[at..at + n];
                    codes[j] = of_run.code(self.now[at + j] + g[j] / h[j]);
                    values[j] = of_run.value(codes[j]);
                    let off = values[j] - self.now[at + j];
                    gain += off * (2.0 * g[j] - off * h[j]);
                    g.iter_mut().zip(h).for_each(|(g, h)| *g -= off * h);
                }
                if gain > best.as_ref().map_or(0.0, |b| b.0) {
                    best = Some((gain, moved, codes.clone(), values.clone()));
                }
            }
            if let Some((_, moved, codes, values)) = best {
                *grid = moved;
                (0..n).for_each(|j| self.set(at + j, codes[j], values[j]));
            }
        }
    }

    /// The two f16 of a block to those that serve its codes best.
    fn move_units(&mut self, columns: Range<usize>, grid: &mut BlockGrid) {
        let n = columns.len();
        let parts: Vec<(f32, f32)> = (0..n).map(|i| grid.parts(i, self.codes[columns.start + i])).collect();
        // value = d a - dmin b: products under H.
        let (mut aa, mut ab, mut bb, mut ag, mut bg) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
        for (i, &(a, b)) in parts.iter().enumerate() {
            let h = &self.h(columns.start + i)[columns.clone()];
            let (mut ha, mut hb) = (0.0f32, 0.0f32);
            h.iter().zip(&parts).for_each(|(h, p)| {
                ha += h * p.0;
                hb += h * p.1;
            });
            let g = f64::from(self.g[columns.start + i]);
            let (a, b, ha, hb) = (f64::from(a), f64::from(b), f64::from(ha), f64::from(hb));
            aa += a * ha;
            ab += a * hb;
            bb += b * hb;
            ag += a * g;
            bg += b * g;
        }
        let det = aa * bb - ab * ab;
        let (dd, dm) = if det > 1e-9 * aa * bb {
            ((bb * ag - ab * bg) / det, (ab * ag - aa * bg) / det)
        } else if aa > 0.0 {
            (ag / aa, 0.0)
        } else {
            return;
        };
        let (d, dmin) = grid.units();
        let Some(moved) = grid.with_units(d + dd as f32, dmin + dm as f32) else { return };
        let (dd, dm) = (f64::from(moved.units().0) - f64::from(d), f64::from(moved.units().1) - f64::from(dmin));
        let gain = 2.0 * (dd * ag - dm * bg) - (dd * dd * aa - 2.0 * dd * dm * ab + dm * dm * bb);
        if gain > 0.0 {
            *grid = moved;
            for i in 0..n {
                let code = self.codes[columns.start + i];
                self.set(columns.start + i, code, grid.value(i, code));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::obs::slow;
    use lacuna_base::testkit::random;
    use lacuna_base::{Gram, Rng};
    use lacuna_contract::{Ask, Gathered};
    use lacuna_format::gguf::WRITTEN;

    fn with<T>(gram: &Gram, f: impl FnOnce(&Stats<'_>) -> T) -> T {
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        f(&Stats { tokens: gram.tokens(), found: &found, gradients: &[], sequences: 0, worked: None })
    }

    const WALK: Walk = Walk { damping: 0.01, block: 128, act_order: true, passes: 0 };

    /// What `solve` measures: the error under the damped `H`, with weights of dead inputs taken as 0.
    fn error(w: &Mat, new: &Mat, gram: &Gram, h: &[Vec<f64>]) -> f64 {
        let off = |r: usize, c: usize| {
            let w = if gram.at(c, c) == 0.0 { 0.0 } else { f64::from(w[(r, c)]) };
            w - f64::from(new[(r, c)])
        };
        let n = h.len();
        (0..w.rows())
            .map(|r| {
                let off: Vec<f64> = (0..n).map(|c| off(r, c)).collect();
                (0..n).map(|i| off[i] * (0..n).map(|j| h[i][j] * off[j]).sum::<f64>()).sum::<f64>()
            })
            .sum()
    }

    /// The definition: scales beforehand, then every column fixed in turn and the rest solved anew.
    #[test]
    fn the_walk_agrees_with_brute_force() {
        for kind in [GgufType::Q4_0, GgufType::Q4_1, GgufType::IQ4_NL] {
            let (w, gram, n) = (random(2, 64, 1), slow::inputs(64, 200, 2), 64);
            let h = slow::hessian(&gram, 0.01);
            let inverse = slow::inverse(&h);
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by(|&a, &b| gram.at(b, b).total_cmp(&gram.at(a, a)));
            let walked: Vec<Vec<f64>> = order.iter().map(|&i| order.iter().map(|&j| h[i][j]).collect()).collect();
            let price: Vec<f32> = (0..n).map(|c| (1.0 / inverse[c][c]) as f32).collect();
            let solved = with(&gram, |stats| solve(w.view(), stats, kind, &WALK)).expect("solves").to_mat();
            for r in 0..2 {
                let live = |c: usize| if gram.at(c, c) == 0.0 { 0.0 } else { w[(r, c)] };
                let values: Vec<f32> = (0..n).map(live).collect();
                let grids: Vec<BlockGrid> =
                    values.chunks(32).zip(price.chunks(32)).map(|(v, p)| kind.fit(v, p)).collect();
                let mut row: Vec<f64> = order.iter().map(|&c| f64::from(values[c])).collect();
                for (j, &c) in order.iter().enumerate() {
                    let q = grids[c / 32].value(c % 32, grids[c / 32].code(c % 32, row[j] as f32));
                    slow::fix(&mut row, &slow::rest(&walked, j), j, f64::from(q));
                    assert!((q - solved[(r, c)]).abs() < 1e-5, "{kind:?} ({r}, {c}): {q} {}", solved[(r, c)]);
                }
            }
        }
    }

    /// Passes never raise the error, and at their end no single code could be better.
    #[test]
    fn passes_end_where_no_code_can_move() {
        for (kind, cols) in WRITTEN.map(|kind| (kind, if kind.block() == 32 { 96 } else { 512 })) {
            let (w, gram) = (random(2, cols, 3), slow::inputs(cols, 3 * cols, 4));
            let h = slow::hessian(&gram, 0.01);
            let run = |passes: usize, act_order: bool| {
                let how = Walk { passes, act_order, ..WALK };
                with(&gram, |stats| solve(w.view(), stats, kind, &how)).expect("solves")
            };
            for act_order in [false, true] {
                let errors: Vec<f64> =
                    [0, 1, 3].iter().map(|&p| error(&w, &run(p, act_order).to_mat(), &gram, &h)).collect();
                assert!(errors[1] <= errors[0] * 1.0001 && errors[2] <= errors[1] * 1.0001, "{kind:?}: {errors:?}");
            }
            let last = run(60, true);
            let now = last.to_mat();
            let Values::Gguf(_, bytes) = &last.values else { panic!("blocks") };
            // The values that a place can take: those of its run, as far as the block's bytes show them.
            let run_of = if matches!(kind, GgufType::Q2_K | GgufType::Q3_K | GgufType::Q6_K) { 16 } else { 32 };
            assert_eq!(bytes.len(), 2 * cols / kind.block() * kind.block_bytes());
            let mut better = 0;
            for r in 0..2 {
                let live = |c: usize| if gram.at(c, c) == 0.0 { 0.0 } else { f64::from(w[(r, c)]) };
                let off: Vec<f64> = (0..cols).map(|c| live(c) - f64::from(now[(r, c)])).collect();
                for c in 0..cols {
                    let g: f64 = (0..cols).map(|k| h[c][k] * off[k]).sum();
                    let run = c / run_of * run_of;
                    for other in run..run + run_of {
                        let step = f64::from(now[(r, other)]) - f64::from(now[(r, c)]);
                        let gain = step * (2.0 * g - step * h[c][c]);
                        better += usize::from(gain > 1e-3 * step * step * h[c][c]);
                    }
                }
            }
            assert_eq!(better, 0, "{kind:?}: codes that could still move");
        }
    }

    /// On correlated inputs with a few loud ones, against rounding by importance, the same type.
    #[test]
    fn the_error_is_far_below_that_of_rounding_by_importance() {
        let n = 512;
        let mut rng = Rng::new(5);
        let basis = Mat::from_fn(n, n, |i, _| rng.normal() * ((i + 1) as f32).powf(-0.25));
        let z = Mat::from_fn(1536, n, |_, _| rng.normal());
        let x = dense::matmul_nn(z.view(), basis.view());
        let x = Mat::from_fn(1536, n, |t, c| x[(t, c)] * if c % 97 == 13 { 8.0 } else { 1.0 });
        let mut gram = Gram::new(n);
        gram.add(x.view());
        let h = gram.mean();
        let h: Vec<Vec<f64>> = (0..n).map(|r| h.row(r).to_vec()).collect();
        let w = random(8, n, 6);
        let importance: Vec<f32> = (0..8 * n).map(|i| h[i % n][i % n] as f32).collect();
        for kind in WRITTEN {
            let mut plain = Mat::zeros(8, n);
            kind.decode(&kind.encode_weighted(w.data(), &importance), plain.data_mut());
            let how = Walk { passes: 4, ..WALK };
            let solved = with(&gram, |stats| solve(w.view(), stats, kind, &how)).expect("solves").to_mat();
            let (with, without) = (error(&w, &solved, &gram, &h), error(&w, &plain, &gram, &h));
            assert!(with < 0.6 * without, "{kind:?}: {with} against {without}");
        }
    }

    #[test]
    fn what_does_not_fit_and_odd_weights() {
        let said = fits(GgufType::Q4_K, 576).expect_err("refused").what;
        assert!(said.contains("576 columns") && said.contains("q4_k") && said.contains("iq4_nl"), "{said}");
        assert!(fits(GgufType::Q4_K, 33).expect_err("refused").what.contains("no type fits"));
        assert!(fits(GgufType::IQ4_NL, 576).is_ok());
        let gram = slow::inputs(256, 300, 7);
        for kind in WRITTEN {
            for act_order in [false, true] {
                let how = Walk { act_order, passes: 2, ..WALK };
                let run = |w: &Mat| with(&gram, |stats| solve(w.view(), stats, kind, &how));
                let zeros = run(&Mat::zeros(2, 256)).expect("solves").to_mat();
                assert!(zeros.data().iter().all(|x| *x == 0.0), "{kind:?} of zeros");
                let far = run(&Mat::from_fn(2, 256, |r, c| if r == 0 { 1e-7 } else { 3e4 * (c % 3) as f32 }));
                assert!(far.expect("solves").to_mat().data().iter().all(|x| x.is_finite()), "{kind:?}");
                assert!(run(&Mat::from_fn(1, 256, |_, _| f32::NAN)).is_err());
            }
        }
    }
}

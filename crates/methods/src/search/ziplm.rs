//! ZipLM: heads and channels go one by one at least cost to their layer, sizes are divided by the time they save.
//!
//! **Paper.** Eldar Kurtic, Elias Frantar, Dan Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language
//! Models", NeurIPS 2023, arXiv 2302.04089. Its search is that of Frantar, Alistarh, "SPDY: Accurate Pruning with
//! Speedup Guarantees", 2022, arXiv 2201.13096.
//!
//! **Idea.** A structure `S` is a set of columns of the matrix `W` that reads it (`attn.o`, `ffn.down`). With `H =
//! XXᵀ` of its inputs the one goes whose loss `Σ_i W_iS ((H⁻¹)_SS)⁻¹ W_iSᵀ` is least; the rest makes up for it, `W -=
//! W_:S ((H⁻¹)_SS)⁻¹ (H⁻¹)_S:`, and `H⁻¹` loses `S` by the same step of Gauss. So on, one after another; sizes are
//! `factor^i` of the units, and none. The prior of a size is `p = ‖W'X - WX‖² / ‖WX‖²`. Sizes for all parts: a dynamic
//! program over times cut into buckets finds the least `Σ c p` within the time that the target leaves, and the
//! coefficients `c` are searched for by what the model stitched so loses on the calibration text.
//!
//! **Shapes and units.** The reader `[hidden, count * width]`, the Gram matrix of its inputs; cuts with relative
//! errors, 0 to 1. The search takes slots with levels, whose bytes (or nanoseconds) are the time.
//!
//! **Cost.** A part with `n` inputs takes about `3 n³` multiplications whatever the sizes, and five matrices `[n, n]`
//! in f64; a plan takes slots · levels · `buckets` additions; a trial a forward pass over its tokens.
//!
//! **Departs.** (1) Time is what the family says: bytes read per token, which is what decoding waits for, or the times
//! that the recipe gives (measured elsewhere, so that a run repeats). (2) Attention heads are key and value heads with
//! their query heads; channels stay in multiples of `align`. (3) One model a run, for one target, in one shot, without
//! the tuning between targets: every target begins at the source. (4) The first two plans tried are `c = 1` and the
//! same share everywhere; the latter wins against whatever is not better. Then, as in SPDY, coefficients from 0 to 1
//! by lot for a tenth of the trials, and the best ones with a tenth of them drawn anew, fewer and fewer. An assignment
//! is tried once. (5) `H` is damped, inputs that are always zero count as in SparseGPT, and errors are those under
//! that `H`. (6) The experts of a mixture keep equally many channels, each its own.

use std::collections::HashSet;
use std::ops::Range;

use lacuna_base::{Mat64, Rng, dense, factor};
use lacuna_contract::{
    Ask, Assignment, Card, Cut, Lab, Made, Method, MethodError, Search, SearchAsk, Shrink, Shrinking, StructureAsk,
};
use serde::Deserialize;

use super::uniform::uniform;
use crate::make;
use crate::structure::reader;

/// The paper's parameters.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ZipLm {
    /// A size is this part of the size before, 0.5 to 0.99.
    factor: f64,
    /// Sizes below this share of the units are left out, 0.001 to 0.5; then none.
    least: f64,
    /// Added to the diagonal of `H`, as a fraction of its mean, above 0 to 1.
    damping: f64,
    /// Into how many the time is cut for the dynamic program, 100 to 100000.
    buckets: usize,
}

impl Default for ZipLm {
    fn default() -> ZipLm {
        ZipLm { factor: 0.9, least: 0.01, damping: 0.01, buckets: 10_000 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "ziplm",
            paper: "Kurtic, Frantar, Alistarh: ZipLM: Inference-Aware Structured Pruning of Language Models, 2023",
            arxiv: "2302.04089",
            summary: "Heads and channels go one by one at least cost to their layer, the rest makes up for it, and a \
             dynamic program divides sizes so that the time meets a target.",
            system: None,
            verb: "search",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<ZipLm>,
        make: |given| {
            let p: ZipLm = make::parameters("ziplm", given)?;
            let within = |name: &str, value: f64, range: Range<f64>| match value >= range.start && value <= range.end {
                true => Ok(()),
                false => Err(MethodError::new(format!(
                    "{name} is {value}; it must be from {} to {}",
                    range.start, range.end
                ))),
            };
            within("factor", p.factor, 0.5..0.99)?;
            within("least", p.least, 0.001..0.5)?;
            within("damping", p.damping, 1e-9..1.0)?;
            within("buckets", p.buckets as f64, 100.0..1e5)?;
            Ok(Made::Search(Box::new(p)))
        },
    }
}

/// Units whose columns are worked out before all matrices learn of them.
const BLOCK: usize = 32;

/// A reader in the middle of its removal. Columns of what is gone are gone.
struct Left {
    /// The reader's weights, `[rows, n]`.
    w: Mat64,
    /// `H⁻¹`, `[n, n]`.
    inverse: Mat64,
    /// `WᵀW`, `[n, n]`: what single columns are chosen by.
    squares: Mat64,
    /// The units that are left, rising.
    units: Vec<usize>,
    width: usize,
    /// The loss so far, and with nothing left, for the mean token of so many.
    lost: f64,
    whole: f64,
    tokens: u64,
}

/// `at`, each of `width` columns, as columns.
fn spread(at: &[usize], width: usize) -> Vec<usize> {
    at.iter().flat_map(|u| u * width..(u + 1) * width).collect()
}

fn picked(m: &Mat64, rows: &[usize], cols: &[usize]) -> Mat64 {
    Mat64::from_fn(rows.len(), cols.len(), |r, c| m[(rows[r], cols[c])])
}

fn square(m: &[f64]) -> f64 {
    m.iter().map(|x| x * x).sum()
}

impl Left {
    fn new(ask: &StructureAsk<'_>, damping: f64) -> Result<Left, MethodError> {
        let w = reader("ziplm", ask)?;
        let (n, mut w) = (w.cols(), Mat64::from_f32(w));
        let gram = make::gram(&ask.stats, n)?;
        let scale = 1.0 / gram.tokens() as f64;
        let mean = gram.mean_diag() * scale;
        let diagonal = |j: usize| match gram.at(j, j) * scale {
            0.0 => (if mean > 0.0 { mean } else { 1.0 }) + damping * mean,
            d => d + damping * mean,
        };
        let h = Mat64::from_fn(n, n, |r, c| if r == c { diagonal(r) } else { gram.at(r, c) * scale });
        for j in (0..n).filter(|&j| gram.at(j, j) == 0.0) {
            // Nothing ever goes in: whatever the weight is, it is worth nothing.
            (0..w.rows()).for_each(|r| w[(r, j)] = 0.0);
        }
        let inverse = factor::spd_inverse(&h).map_err(|e| {
            MethodError::new(format!("the calibration Hessian: {e}; more samples or a larger damping help"))
        })?;
        let moved = dense::matmul_nn_f64(&w, &h);
        let whole: f64 = moved.data().iter().zip(w.data()).map(|(a, b)| a * b).sum();
        let squares = if ask.width == 1 { dense::matmul_tn_f64(&w, &w) } else { Mat64::zeros(0, 0) };
        let (units, width, tokens) = ((0..ask.count).collect(), ask.width, gram.tokens());
        Ok(Left { w, inverse, squares, units, width, lost: 0.0, whole, tokens })
    }

    /// Removes units until `size` are left.
    fn shrink(&mut self, size: usize) -> Result<(), MethodError> {
        while self.units.len() > size {
            match self.width {
                1 => self.remove_columns((self.units.len() - size).min(BLOCK)),
                _ => self.remove_unit()?,
            }
        }
        Ok(())
    }

    /// Removes the unit of several columns that costs least.
    fn remove_unit(&mut self) -> Result<(), MethodError> {
        let (all, rows): (Vec<usize>, Vec<usize>) = ((0..self.w.cols()).collect(), (0..self.w.rows()).collect());
        let mut best: Option<(f64, usize, Mat64, Mat64)> = None;
        for at in 0..self.units.len() {
            let cols = spread(&[at], self.width);
            // With (H⁻¹)_SS = C Cᵀ the loss is the square of E = W_:S C⁻ᵀ.
            let part = factor::cholesky(&picked(&self.inverse, &cols, &cols));
            let solved =
                part.and_then(|c| Ok((factor::solve_lower(&c, &picked(&self.w, &rows, &cols).transpose())?, c)));
            let (e, c) = solved.map_err(|e| MethodError::new(format!("what is left of the Hessian: {e}")))?;
            let cost = square(e.data());
            if best.as_ref().is_none_or(|b| cost < b.0) {
                best = Some((cost, at, e, c));
            }
        }
        let Some((cost, at, e, c)) = best else { return Ok(()) };
        let turned = picked(&self.inverse, &spread(&[at], self.width), &all);
        let l = factor::solve_lower(&c, &turned).map_err(|e| MethodError::new(e.to_string()))?;
        self.lost += cost;
        self.forget(&[at], &l, &e);
        Ok(())
    }

    /// Removes the `count` columns that cost least, one after another. Until all are known, `H⁻¹`, `W` and `WᵀW` stay
    /// as they are, and what the removed ones did to the column at hand is worked out from their `L` and `E`.
    fn remove_columns(&mut self, count: usize) {
        let n = self.w.cols();
        let mut prices: Vec<f64> = (0..n).map(|j| self.inverse[(j, j)]).collect();
        let mut sizes: Vec<f64> = (0..n).map(|j| self.squares[(j, j)]).collect();
        let (mut gone, mut is_gone) = (Vec::new(), vec![false; n]);
        // A row for each removed column: L of H⁻¹, E of W, Z = WᵀE with W as it stands here.
        let [mut ls, mut es, mut zs]: [Vec<Vec<f64>>; 3] = Default::default();
        for _ in 0..count {
            let cost = |j: usize| sizes[j].max(0.0) / prices[j].max(f64::MIN_POSITIVE);
            let free = (0..n).filter(|&j| !is_gone[j]);
            let Some(u) = free.min_by(|&a, &b| cost(a).total_cmp(&cost(b))) else { break };
            let root = prices[u].max(f64::MIN_POSITIVE).sqrt();
            let mut l = self.inverse.row(u).to_vec();
            let mut e: Vec<f64> = (0..self.w.rows()).map(|r| self.w[(r, u)]).collect();
            let mut z = self.squares.row(u).to_vec();
            for i in 0..ls.len() {
                let by = ls[i][u];
                for (to, of) in [(&mut l, &ls[i]), (&mut e, &es[i]), (&mut z, &zs[i])] {
                    to.iter_mut().zip(of).for_each(|(t, o)| *t -= by * o);
                }
            }
            for v in [&mut l, &mut e, &mut z] {
                v.iter_mut().for_each(|x| *x /= root);
            }
            // What W as it would be by now gives with E.
            let mut with = z.clone();
            for (l, other) in ls.iter().zip(&es) {
                let by: f64 = e.iter().zip(other).map(|(a, b)| a * b).sum();
                with.iter_mut().zip(l).for_each(|(t, l)| *t -= by * l);
            }
            let cost = square(&e);
            for j in 0..n {
                prices[j] -= l[j] * l[j];
                sizes[j] += l[j] * (l[j] * cost - 2.0 * with[j]);
            }
            self.lost += cost;
            is_gone[u] = true;
            gone.push(u);
            (ls, es, zs) = (pushed(ls, l), pushed(es, e), pushed(zs, z));
        }
        let flat = |rows: Vec<Vec<f64>>, cols: usize| Mat64::from_vec(rows.len(), cols, rows.concat());
        let (l, e, z) = (flat(ls, n), flat(es, self.w.rows()), flat(zs, n));
        let stay: Vec<usize> = (0..n).filter(|j| !is_gone[*j]).collect();
        let (l_stay, z_stay) = (picked_cols(&l, &stay), picked_cols(&z, &stay));
        // (W - E Lᵀ)ᵀ (W - E Lᵀ), the rows of `l`, `e` and `z` being the columns of L, E and Z.
        let mixed = dense::matmul_tn_f64(&l_stay, &z_stay);
        let twice = dense::matmul_nn_f64(&dense::matmul_nt_f64(&e, &e), &l_stay);
        let twice = dense::matmul_tn_f64(&l_stay, &twice);
        let old = &self.squares;
        self.squares = Mat64::from_fn(stay.len(), stay.len(), |r, c| {
            old[(stay[r], stay[c])] - mixed[(r, c)] - mixed[(c, r)] + twice[(r, c)]
        });
        self.forget(&gone, &l, &e);
    }

    /// Takes the units at `gone` out, what they did being `H⁻¹ -= LᵀL`, `W -= EᵀL`.
    fn forget(&mut self, gone: &[usize], l: &Mat64, e: &Mat64) {
        let at: Vec<usize> = (0..self.units.len()).filter(|i| !gone.contains(i)).collect();
        let (stay, rows): (Vec<usize>, Vec<usize>) = (spread(&at, self.width), (0..self.w.rows()).collect());
        let l = picked_cols(l, &stay);
        for (m, rows, by) in [(&mut self.inverse, &stay, &l), (&mut self.w, &rows, e)] {
            let drop = dense::matmul_tn_f64(by, &l);
            let mut new = picked(m, rows, &stay);
            new.data_mut().iter_mut().zip(drop.data()).for_each(|(x, d)| *x -= d);
            *m = new;
        }
        self.units = at.iter().map(|&i| self.units[i]).collect();
    }
}

fn picked_cols(m: &Mat64, cols: &[usize]) -> Mat64 {
    Mat64::from_fn(m.rows(), cols.len(), |r, c| m[(r, cols[c])])
}

fn pushed(mut list: Vec<Vec<f64>>, one: Vec<f64>) -> Vec<Vec<f64>> {
    list.push(one);
    list
}

impl Shrink for ZipLm {
    fn shares(&self) -> Vec<f64> {
        let powers = (0..).map(|i| self.factor.powi(i)).take_while(|s| *s >= self.least);
        // Four digits are enough, and can be read.
        powers.map(|s| (s * 1e4).round() / 1e4).chain([0.0]).collect()
    }

    fn needs(&self) -> &'static [Ask] {
        &[Ask::InputGram]
    }

    fn begin(&self, ask: &StructureAsk<'_>) -> Result<Box<dyn Shrinking>, MethodError> {
        Ok(Box::new(Left::new(ask, self.damping)?))
    }
}

impl Shrinking for Left {
    fn cut(&mut self, size: usize) -> Result<Cut, MethodError> {
        self.shrink(size)?;
        let reader = self.w.to_f32();
        make::finite(reader.view())?;
        let error = if self.whole > 0.0 { self.lost / self.whole } else { 0.0 };
        Ok(Cut { kept: self.units.clone(), reader, error, lost: self.lost * self.tokens as f64 })
    }
}

/// Slots with the costs of their levels in buckets.
struct Program {
    /// By slot and level.
    costs: Vec<Vec<usize>>,
    errors: Vec<Vec<f64>>,
    buckets: usize,
}

impl Program {
    fn new(lab: &dyn Lab, budget: u64, buckets: usize) -> Program {
        // Where bytes are few, a bucket is one of them.
        let buckets = buckets.min(usize::try_from(budget).unwrap_or(buckets));
        let cost = |bytes: u64| match (bytes, budget) {
            (0, _) => 0,
            (b, most) if b > most => buckets + 1,
            (b, most) => (u128::from(b) * buckets as u128).div_ceil(u128::from(most)) as usize,
        };
        let slots = 0..lab.slots().len();
        let errors =
            |s: usize| lab.levels(s).iter().map(|l| if l.error.is_nan() { f64::MAX } else { l.error }).collect();
        Program {
            costs: slots.clone().map(|s| lab.levels(s).iter().map(|l| cost(l.bytes)).collect()).collect(),
            errors: slots.map(errors).collect(),
            buckets,
        }
    }

    /// The levels of least `Σ c · error` within the budget; of equal ones the first levels.
    fn plan(&self, c: &[f64]) -> Option<Assignment> {
        let mut best = vec![0.0f64; self.buckets + 1];
        let mut chosen: Vec<Vec<u32>> = Vec::with_capacity(self.costs.len());
        for (s, (costs, errors)) in self.costs.iter().zip(&self.errors).enumerate() {
            let (mut next, mut by) = (vec![f64::INFINITY; best.len()], vec![u32::MAX; best.len()]);
            for (level, (&cost, error)) in costs.iter().zip(errors).enumerate() {
                for k in cost..best.len() {
                    let sum = best[k - cost] + c[s] * error;
                    if sum < next[k] {
                        (next[k], by[k]) = (sum, level as u32);
                    }
                }
            }
            best = next;
            chosen.push(by);
        }
        let mut k = self.buckets;
        let mut out = vec![0; chosen.len()];
        for s in (0..chosen.len()).rev() {
            if chosen[s][k] == u32::MAX {
                return None;
            }
            out[s] = chosen[s][k] as usize;
            k -= self.costs[s][out[s]];
        }
        Some(out)
    }
}

impl Search for ZipLm {
    fn search(&self, lab: &mut dyn Lab, ask: &SearchAsk) -> Result<Assignment, MethodError> {
        let slots = lab.slots().len();
        let program = Program::new(lab, ask.budget_bytes, self.buckets);
        let even = uniform(lab, ask.budget_bytes);
        let plain = program.plan(&vec![1.0; slots]).or_else(|| even.clone()).ok_or_else(|| {
            let least: u64 = (0..slots).filter_map(|s| lab.levels(s).iter().map(|l| l.bytes).min()).sum();
            MethodError::new(format!("the least levels take {least}, above the budget of {}", ask.budget_bytes))
        })?;
        let mut seen = HashSet::from([plain.clone()]);
        let mut first = vec![plain.clone()];
        // The one that wins a tie comes first.
        first.splice(0..0, even.filter(|e| seen.insert(e.clone())));
        if ask.trials < first.len() || slots == 0 {
            return Ok(plain);
        }
        let losses = |lab: &mut dyn Lab, batch: &[Assignment]| -> Result<Vec<f64>, MethodError> {
            let nan = |loss: f64| if loss.is_nan() { f64::INFINITY } else { loss };
            Ok(lab.measure(batch, ask.tokens)?.iter().map(|o| nan(o.loss)).collect())
        };
        let loss = losses(lab, &first)?;
        let (mut best, mut least) = (first[0].clone(), loss[0]);
        if loss.len() > 1 && loss[1] < least {
            (best, least) = (first[1].clone(), loss[1]);
        }
        let (mut rng, mut c) = (Rng::new(ask.seed), vec![1.0; slots]);
        let (left, told) = (ask.trials - first.len(), (loss[0], loss[loss.len() - 1]));
        let (mut trials, mut idle) = (0, 0);
        // Where draws lead to nothing new any more, the search is over.
        while trials < left && idle < 200 {
            let by_lot = trials < left / 10;
            let after = trials.saturating_sub(left / 10) as f64 / (left - left / 10).max(1) as f64;
            let drawn = if by_lot { slots } else { (0.1 * slots as f64 * (1.0 - after)).ceil().max(1.0) as usize };
            let mut tried = c.clone();
            for i in 0..drawn {
                let at = if by_lot { i } else { rng.below(slots) };
                tried[at] = rng.f64();
            }
            let Some(plan) = program.plan(&tried).filter(|p| seen.insert(p.clone())) else {
                idle += 1;
                continue;
            };
            (trials, idle) = (trials + 1, 0);
            let loss = losses(lab, std::slice::from_ref(&plan))?[0];
            if loss < least {
                (best, least, c) = (plan, loss, tried);
            }
        }
        lab.note(format!(
            "nats a token with the same level everywhere {:.4}, with the least error {:.4}, chosen {least:.4}",
            told.0, told.1
        ));
        Ok(best)
    }

    fn shrinker(&self) -> Option<&dyn Shrink> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::obs::slow;
    use crate::search::testkit::Bench;
    use lacuna_base::testkit::random;
    use lacuna_base::{Gram, Mat};
    use lacuna_contract::{Gathered, Level, Stats, Unit};

    /// The weights that lose least when only `cols` stay, `W H_:K (H_KK)⁻¹`, and what they lose, straight from the
    /// definition.
    fn brute(w: &Mat, h: &[Vec<f64>], cols: &[usize]) -> (Vec<Vec<f64>>, f64) {
        let inner = slow::inverse(&cols.iter().map(|&i| cols.iter().map(|&j| h[i][j]).collect()).collect::<Vec<_>>());
        let (n, mut lost) = (w.cols(), 0.0);
        let rows = (0..w.rows()).map(|r| {
            let pull: Vec<f64> =
                cols.iter().map(|&c| (0..n).map(|j| f64::from(w[(r, j)]) * h[j][c]).sum::<f64>()).collect();
            let new: Vec<f64> = (0..cols.len()).map(|i| (0..cols.len()).map(|j| pull[j] * inner[j][i]).sum()).collect();
            let delta: Vec<f64> = (0..n)
                .map(|j| f64::from(w[(r, j)]) - cols.iter().position(|c| *c == j).map_or(0.0, |i| new[i]))
                .collect();
            lost += (0..n).map(|i| (0..n).map(|j| delta[i] * h[i][j] * delta[j]).sum::<f64>()).sum::<f64>();
            new
        });
        (rows.collect(), lost)
    }

    fn cuts(by: &ZipLm, w: &Mat, gram: &Gram, (unit, width): (Unit, usize), sizes: &[usize]) -> Vec<Cut> {
        let found = [(Ask::InputGram, Gathered::Gram(gram.clone()))];
        let stats = Stats { tokens: gram.tokens(), found: &found, gradients: &[], sequences: 0, worked: None };
        let (count, reader) = (w.cols() / width, Some(w.view()));
        let ask = StructureAsk { unit, layer: 0, count, width, reader, writers: &[], stats, writer_stats: &[] };
        let mut left = by.begin(&ask).expect("begins");
        sizes.iter().map(|size| left.cut(*size).expect("cuts")).collect()
    }

    #[test]
    fn agrees_with_brute_force_least_squares_unit_by_unit() {
        for (rows, count, width) in [(5, 9, 1), (1, 6, 1), (4, 1, 1), (7, 4, 3), (3, 1, 2), (40, 12, 1), (2, 3, 2)] {
            for seed in 0..4 {
                let n = count * width;
                let mut w = random(rows, n, seed);
                if n > 4 {
                    // A tie and a column of zeros; input 1 is dead.
                    (0..rows).for_each(|r| (w[(r, 3)], w[(r, 2)]) = (0.0, w[(r, 4)]));
                }
                let gram = slow::inputs(n, 60, seed + 9);
                let h = slow::hessian(&gram, 0.01);
                let mut alive = w.clone();
                for c in (0..n).filter(|&c| gram.at(c, c) == 0.0) {
                    (0..rows).for_each(|r| alive[(r, c)] = 0.0);
                }
                let whole = brute(&alive, &h, &[]).1;
                let sizes: Vec<usize> = (0..count).rev().collect();
                let unit = if width > 1 { Unit::Head } else { Unit::Channel };
                let have = cuts(&ZipLm::default(), &w, &gram, (unit, width), &sizes);
                let mut kept: Vec<usize> = (0..count).collect();
                for (cut, size) in have.iter().zip(&sizes) {
                    assert_eq!((cut.kept.len(), cut.reader.cols()), (*size, size * width));
                    let without = |u: usize| kept.iter().copied().filter(|k| *k != u).collect::<Vec<_>>();
                    let lost = |units: &[usize]| brute(&alive, &h, &spread(units, width)).1;
                    let least = kept.iter().map(|&u| lost(&without(u))).fold(f64::INFINITY, f64::min);
                    assert!(cut.kept.iter().all(|u| kept.contains(u)));
                    let (want, got) = brute(&alive, &h, &spread(&cut.kept, width));
                    assert!(got <= least * (1.0 + 1e-6) + 1e-9, "{rows} {count} {width}: {got} {least}");
                    assert!((cut.error * whole - got).abs() <= 1e-6 * whole, "{} {}", cut.error, got / whole);
                    for (r, row) in want.iter().enumerate() {
                        for (c, v) in row.iter().enumerate() {
                            let have = f64::from(cut.reader[(r, c)]);
                            assert!((have - v).abs() < 1e-4 * (1.0 + v.abs()), "{rows} {count} {width}: {have} {v}");
                        }
                    }
                    kept = cut.kept.clone();
                }
            }
        }
    }

    #[test]
    fn blocks_of_columns_change_nothing_and_the_update_pays() {
        let (w, gram) = (random(24, 150, 1), slow::inputs(150, 400, 2));
        let one_by_one: Vec<usize> = (0..150).rev().collect();
        let slow = cuts(&ZipLm::default(), &w, &gram, (Unit::Channel, 1), &one_by_one);
        for (size, cut) in [(90, 0), (75, 1), (10, 2), (0, 3)] {
            let fast = &cuts(&ZipLm::default(), &w, &gram, (Unit::Channel, 1), &[90, 75, 10, 0])[cut];
            let want = &slow[149 - size];
            assert_eq!(fast.kept, want.kept, "{size}");
            assert!((fast.error - want.error).abs() < 1e-9, "{size}: {} {}", fast.error, want.error);
        }
        assert!((slow[149].error - 1.0).abs() < 1e-9, "{}", slow[149].error);
        assert!(slow.windows(2).all(|p| p[0].error <= p[1].error + 1e-12));
        // The same columns without the update, and the columns that a score of each alone would choose.
        let h = slow::hessian(&gram, 0.01);
        let lost = |kept: &[usize]| {
            let d = |r: usize, j: usize| if kept.contains(&j) { 0.0 } else { f64::from(w[(r, j)]) };
            let row =
                |r: usize| (0..150).map(|i| (0..150).map(|j| d(r, i) * h[i][j] * d(r, j)).sum::<f64>()).sum::<f64>();
            (0..24).map(row).sum::<f64>()
        };
        let price = |j: usize| (0..24).map(|r| f64::from(w[(r, j)]).powi(2)).sum::<f64>() * h[j][j];
        let mut order: Vec<usize> = (0..150).collect();
        order.sort_by(|&a, &b| price(b).total_cmp(&price(a)));
        let (ours, whole) = (slow[74].error, lost(&[]));
        assert!(ours < 0.9 * lost(&slow[74].kept) / whole, "{ours} {}", lost(&slow[74].kept) / whole);
        assert!(ours < 0.9 * lost(&order[..75]) / whole, "{ours} {}", lost(&order[..75]) / whole);
    }

    fn ask(budget_bytes: u64, trials: usize) -> SearchAsk {
        SearchAsk { budget_bytes, trials, tokens: 64, seed: 3 }
    }

    fn errors(lab: &Bench, a: &[usize]) -> f64 {
        a.iter().enumerate().map(|(s, &l)| lab.levels(s)[l].error).sum()
    }

    #[test]
    fn the_program_agrees_with_brute_force_over_all_assignments() {
        for seed in 0..20 {
            let mut lab = Bench::new(4, 5, seed);
            for budget in [lab.bytes(&[4; 4]), lab.bytes(&[2; 4]), lab.bytes(&[1, 2, 3, 0]) + 50, u64::MAX] {
                let chosen = ZipLm::default().search(&mut lab, &ask(budget, 0)).expect("fits");
                let all = (0..625).map(|n| (0..4).map(|s| n / 5usize.pow(s) % 5).collect::<Vec<usize>>());
                let fit = all.filter(|a| lab.bytes(a) <= budget);
                let least = fit.map(|a| errors(&lab, &a)).fold(f64::INFINITY, f64::min);
                assert!(lab.bytes(&chosen) <= budget);
                assert!((errors(&lab, &chosen) - least).abs() < 1e-12, "seed {seed}: {chosen:?}");
            }
            assert_eq!(lab.measured, 0);
            let less = lab.bytes(&[4; 4]) - 1;
            let none = ZipLm::default().search(&mut lab, &ask(less, 9)).expect_err("refused").what;
            assert!(none.contains("least levels"), "{none}");
        }
        assert_eq!(ZipLm::default().search(&mut Bench::of(Vec::new(), 1), &ask(5, 9)), Ok(Vec::new()));
        // Few buckets waste less than a bucket a slot, and never overspend.
        let level = |l: u64| Level { value: 0.0, bytes: 1_000_003 * (3 - l), error: l as f64, lost: 0.0 };
        let mut lab = Bench::of(vec![(0, (0..4).map(level).collect()); 6], 1);
        let chosen = ZipLm { buckets: 100, ..ZipLm::default() }.search(&mut lab, &ask(9_500_000, 0)).expect("fits");
        assert!((8_000_000..=9_500_000).contains(&lab.bytes(&chosen)), "{chosen:?}");
    }

    #[test]
    fn what_is_measured_is_never_worse_than_the_same_everywhere() {
        let (mut better, mut tried) = (0, 0);
        for seed in 0..10 {
            let mut lab = Bench::new(8, 6, seed);
            let budget = lab.bytes(&[3; 8]);
            let chosen = ZipLm::default().search(&mut lab, &ask(budget, 60)).expect("fits");
            assert!(lab.bytes(&chosen) <= budget && lab.measured <= 60, "{}", lab.measured);
            let (even, plain) = (lab.loss(&[3; 8]), ZipLm::default().search(&mut lab, &ask(budget, 0)).expect("fits"));
            assert!(lab.loss(&chosen) <= even.min(lab.loss(&plain)), "seed {seed}");
            better += usize::from(lab.loss(&chosen) < even);
            tried += lab.measured;
            assert_eq!(ZipLm::default().search(&mut lab, &ask(budget, 60)), Ok(chosen), "the same again");
        }
        assert!(better >= 8 && tried > 100, "{better} {tried}");
    }

    #[test]
    fn parameters_out_of_range_are_refused() {
        let all = [("factor", "1.0"), ("least", "0.0"), ("damping", "0.0"), ("buckets", "3")];
        for (name, value) in all {
            let given: serde_json::Value = serde_json::from_str(&format!("{{\"{name}\": {value}}}")).expect("JSON");
            assert!((method().make)(given).expect_err("refused").what.contains(name), "{name}");
        }
        let shares = Shrink::shares(&ZipLm::default());
        assert!(shares[0] == 1.0 && shares[1] == 0.9 && shares[shares.len() - 1] == 0.0 && shares.len() == 45);
    }
}

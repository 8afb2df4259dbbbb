//! Any-precision: a table of few bits whose entries split in two for every further bit, so that the high bits of a code
//! are a code of the smaller model.
//!
//! **Paper.** Yeonhong Park, Jake Hyun, SangLyul Cho, Bonggeun Sim, Jae W. Lee, "Any-Precision LLM: Low-Cost Deployment
//! of Multiple, Different-Sized LLMs", 2024, arXiv 2402.10517.
//!
//! **Idea.** Incremental upscaling. The seed of `seed_bits` bits is the best clustering of a row's weights, weighted by
//! the diagonal of the Fisher matrix (SqueezeLLM). For every further bit each cluster is cut in two, the best cut of its
//! own weights; the cluster's two centres take the place of its one. The entries rise, so that `code >> 1` is the parent
//! and the `b` high bits of an `n`-bit code are the `b`-bit model's.
//!
//! **Shapes and units.** The weights of one row or group with their `F_ii`, in nats² a squared unit of weight; `2^b`
//! values, rising.
//!
//! **Cost.** `n log n` for the order, `2^seed n log n` for the seed, and `n log n` for each further bit.
//!
//! **Departs.** (1) Clusterings are the best there are, by dynamic programming, where the authors iterate. (2) The answer
//! holds the widest table alone. A parent is the mean of its children, weighted by how many weights chose each: known
//! from the codes, so that nothing more is stored ([`lacuna_format::narrow`]). The authors' parents are means weighted
//! by `F_ii`, stored for each width. (3) A weight takes the nearest of all entries, which can be a neighbour's child.

use lacuna_contract::{Ability, Ask, Card, Made, Method, MethodError, Table};
use serde::Deserialize;

use super::squeezellm::{self, centres};
use crate::make;

/// The paper's parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct AnyPrecision {
    /// Bits of the smallest model, 1 to 8.
    seed_bits: u8,
    /// Weigh by the Fisher matrix; otherwise all weights count alike.
    sensitivity: bool,
}

impl Default for AnyPrecision {
    fn default() -> AnyPrecision {
        AnyPrecision { seed_bits: 3, sensitivity: true }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "any-precision",
            paper: "Park, Hyun, Cho, Sim, Lee: Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized \
             LLMs, 2024",
            arxiv: "2402.10517",
            summary: "Tables whose entries split in two for every further bit: the high bits of the codes are the \
             codes of smaller models.",
            system: None,
            verb: "quantize",
            needs: &[Ask::GradientSquares],
            abilities: &[Ability::Round, Ability::FixedMask],
        },
        keys: make::keys::<AnyPrecision>,
        make: |given| {
            let p: AnyPrecision = make::parameters("any-precision", given)?;
            if !(1..=8).contains(&p.seed_bits) {
                return Err(MethodError::new(format!("seed_bits is {}; write 1 to 8 (the paper's 3)", p.seed_bits)));
            }
            Ok(Made::Table(Box::new(p)))
        },
    }
}

/// Weights in rising order with what each is worth, and their mean.
struct Cluster<'a> {
    of: &'a [(f64, f64)],
    mean: f64,
}

/// Cuts `of` at the middles of neighbouring `means`, rising.
fn cut<'a>(mut of: &'a [(f64, f64)], means: &[f64]) -> Vec<Cluster<'a>> {
    let mut out = Vec::with_capacity(means.len());
    for (i, &mean) in means.iter().enumerate() {
        let end = match means.get(i + 1) {
            Some(next) => of.partition_point(|(v, _)| *v <= (mean + next) / 2.0),
            None => of.len(),
        };
        let (mine, rest) = of.split_at(end);
        out.push(Cluster { of: mine, mean });
        of = rest;
    }
    out
}

impl Table for AnyPrecision {
    fn table(&self, values: &[f32], importance: &[f32], bits: u8) -> Result<Vec<f32>, MethodError> {
        let sorted = squeezellm::sorted(values, importance, self.sensitivity)?;
        let seed = self.seed_bits.min(bits);
        let grown = |of: &[(f64, f64)], size: usize, instead: f64| {
            let mut means = centres(of, size);
            means.resize(size, means.last().copied().unwrap_or(instead));
            means
        };
        let mut all = cut(&sorted, &grown(&sorted, 1 << seed, 0.0));
        for _ in seed..bits {
            all = all.iter().flat_map(|c| cut(c.of, &grown(c.of, 2, c.mean))).collect();
        }
        Ok(all.iter().map(|c| c.mean as f32).collect())
    }

    fn importance(&self) -> Option<Ask> {
        self.sensitivity.then_some(Ask::GradientSquares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_format::{Codebook, Float, Owner, PatternKind, ScaleCodec, narrow, pack_codebook};

    fn off(values: &[f32], worth: &[f32], table: &[f32]) -> f64 {
        let near = |v: f32| table.iter().map(|t| f64::from(t - v).powi(2)).fold(f64::INFINITY, f64::min);
        values.iter().zip(worth).map(|(v, w)| f64::from(*w) * near(*v)).sum()
    }

    /// The definition: every cut of the sorted weights of each cluster of the seed is tried.
    fn brute(sorted: &[(f64, f64)], seed: &[f64]) -> Vec<f64> {
        let mean = |p: &[(f64, f64)]| p.iter().map(|x| x.0 * x.1).sum::<f64>() / p.iter().map(|x| x.1).sum::<f64>();
        let spread = |p: &[(f64, f64)]| p.iter().map(|x| x.1 * (x.0 - mean(p)).powi(2)).sum::<f64>();
        let mut out = vec![];
        for (i, centre) in seed.iter().enumerate() {
            let nearest = |v: f64| {
                let far = |k: &usize| (seed[*k] - v).abs();
                (0..seed.len()).min_by(|a, b| far(a).total_cmp(&far(b))).expect("some")
            };
            let mine: Vec<(f64, f64)> = sorted.iter().copied().filter(|(v, _)| nearest(*v) == i).collect();
            let best = (1..mine.len()).min_by(|&a, &b| {
                let cost = |at: usize| spread(&mine[..at]) + spread(&mine[at..]);
                cost(a).total_cmp(&cost(b))
            });
            match best {
                Some(at) => out.extend([mean(&mine[..at]), mean(&mine[at..])]),
                None if mine.is_empty() => out.extend([*centre; 2]),
                None => out.extend([mean(&mine); 2]),
            }
        }
        out
    }

    #[test]
    fn agrees_with_brute_force() {
        for seed in 0..40u64 {
            let n = 6 + seed as usize % 20;
            let values = random(1, n, seed).into_vec();
            let worth: Vec<f32> = random(1, n, seed + 99).into_vec().iter().map(|x| x * x + 0.01).collect();
            let by = AnyPrecision { seed_bits: 2, sensitivity: true };
            let low: Vec<f64> = by.table(&values, &worth, 2).expect("a table").iter().map(|v| f64::from(*v)).collect();
            let mut sorted: Vec<(f64, f64)> =
                values.iter().zip(&worth).map(|(v, w)| (f64::from(*v), f64::from(*w))).collect();
            sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (got, want) = (by.table(&values, &worth, 3).expect("a table"), brute(&sorted, &low));
            assert_eq!(got.len(), 8);
            for (a, b) in got.iter().zip(&want) {
                assert!((f64::from(*a) - b).abs() < 1e-5, "seed {seed}: {got:?} {want:?}");
            }
        }
    }

    #[test]
    fn every_width_lies_within_the_next_and_near_a_table_of_its_own() {
        let n = 2048;
        let values = random(1, n, 5).into_vec();
        let worth: Vec<f32> = random(1, n, 6).into_vec().iter().map(|x| x * x).collect();
        let by = AnyPrecision::default();
        let table = |bits: u8| by.table(&values, &worth, bits).expect("a table");
        for bits in 3..8 {
            let (low, high) = (table(bits), table(bits + 1));
            assert!(high.windows(2).all(|p| p[0] <= p[1]));
            for (i, parent) in low.iter().enumerate() {
                assert!(high[2 * i] <= *parent && *parent <= high[2 * i + 1], "{bits} bits, entry {i}");
            }
            let own = AnyPrecision { seed_bits: bits + 1, ..AnyPrecision::default() };
            let own = own.table(&values, &worth, bits + 1).expect("a table");
            let (nested, alone) = (off(&values, &worth, &high), off(&values, &worth, &own));
            // A bit more is a quarter of the error: at 8 bits nesting costs less than half a bit.
            let most = if bits < 5 { 1.3 } else { 2.0 };
            assert!(nested >= alone * 0.999 && nested < most * alone, "{} bits: {nested} {alone}", bits + 1);
        }
    }

    /// What a file of 6 bits gives at fewer, its lower tables made from the codes alone, against tables of their own.
    #[test]
    fn fewer_bits_of_a_file_err_little_more_than_tables_of_their_own() {
        let (n, bits) = (4096, 6);
        let values = random(1, n, 7).into_vec();
        let worth: Vec<f32> = random(1, n, 8).into_vec().iter().map(|x| x * x).collect();
        let by = AnyPrecision::default();
        let wide = by.table(&values, &worth, bits).expect("a table");
        let near = |v: f32| {
            let far = |i: &usize| (wide[*i] - v).abs();
            (0..wide.len()).min_by(|a, b| far(a).total_cmp(&far(b))).expect("some") as u8
        };
        let codes = values.iter().map(|v| near(*v)).collect();
        let tables = lacuna_base::Mat::from_vec(1, wide.len(), wide.clone());
        let q = Codebook { bits, codes, owner: Owner::Row, tables, scales: None };
        let piece = pack_codebook((1, n), &q, None, PatternKind::Dense, Float::F16, ScaleCodec::F16).expect("packs");
        for bits in 3..6 {
            let less = narrow(&piece, bits).expect("narrows").to_mat();
            let lost = |to: &[f32]| -> f64 {
                values.iter().zip(to).zip(&worth).map(|((a, b), w)| f64::from(*w) * f64::from(a - b).powi(2)).sum()
            };
            let own = off(&values, &worth, &by.table(&values, &worth, bits).expect("a table"));
            let ratio = lost(less.row(0)) / own;
            assert!((0.99..1.1).contains(&ratio), "{bits} bits: {ratio}");
        }
    }

    #[test]
    fn edges_and_refusals() {
        let by = AnyPrecision::default();
        assert_eq!(by.table(&[], &[], 4), Ok(vec![0.0; 16]));
        assert_eq!(by.table(&[0.5; 6], &[0.0; 6], 4), Ok(vec![0.5; 16]));
        let few = by.table(&[1.0, -2.0, 1.0], &[], 5).expect("a table");
        assert!(few.len() == 32 && few.windows(2).all(|p| p[0] <= p[1]));
        assert!(few.contains(&1.0) && few.contains(&-2.0));
        // Some weights that do not matter at all.
        let some = by.table(&[0.1, 0.2, 0.3, 5.0], &[1.0, 0.0, 1.0, 0.0], 5).expect("a table");
        assert!(some.windows(2).all(|p| p[0] <= p[1]), "{some:?}");
        assert!(by.table(&[f32::NAN], &[], 4).is_err() && by.table(&[1.0], &[1.0, 2.0], 4).is_err());
        assert!((method().make)(serde_json::json!({ "seed_bits": 9 })).is_err());
    }
}

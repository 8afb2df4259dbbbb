//! WINA: an input is needed as much as it and the weights that read it are large.
//!
//! **Paper.** Sihan Chen, Dan Zhao, Jongwoo Ko, Colby Banbury, Huiping Zhuang, Luming Liang, Tianyi Chen, "WINA:
//! Weight Informed Neuron Activation for Accelerating Large Language Model Inference", 2025, arXiv 2505.19427.
//!
//! **Idea.** Channel `i` of the input `x` of `W` is kept where `|x_i| · c_i` is among the `K` largest, `c_i =
//! ‖W_·i‖₂`: leaving it out changes the output by a vector of exactly that length. Where the columns of `W` stand at
//! right angles, no other `K` channels have a smaller error.
//!
//! **Shapes and units.** `x` `[in]`, `c` `[in]` from weights `[out, in]`, stacked where several read the same input;
//! channels, rising: `K = keep · in`, rounded, at least 1; with a threshold those whose product is above it.
//!
//! **Cost.** A product and a partial sort a row; a number a column, computed once.
//!
//! **Departs.** The paper turns the weights first so that columns stand at right angles, and spreads the sparsity over
//! layers; here the weights stay as they are and every place keeps the same fraction. Prompt and answer are gated
//! alike, where its code leaves the first hundredth of a prompt alone. Where products are alike the earlier channel is
//! kept; one that is no number is kept, so that a fault shows as it would without a gate.

use std::sync::Arc;

use lacuna_base::MatRef;
use lacuna_contract::{Card, Gate, GatePlan, GateSide, MadeRunning, MethodError, RunMethod};
use lacuna_spec::Target;
use serde::Deserialize;
use serde::de::{Deserializer, Error};
use serde_json::Map;

use crate::make;

/// What is gated, and how much.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Wina {
    /// The matrices whose inputs are gated, as recipes write them, or one text with `+` between them; by default
    /// those of `attn.*` and `ffn.*` that can be.
    targets: Option<Targets>,
    /// Fraction of the channels kept, above 0 and up to 1; 0.5 unless `threshold` is given.
    keep: Option<Kept>,
    /// In its place: channels are kept whose product is larger than this, in units of the output.
    threshold: Option<Least>,
}

/// See [`Wina::keep`].
#[derive(Clone, Copy, Debug)]
struct Kept(f64);

impl<'de> Deserialize<'de> for Kept {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Kept, D::Error> {
        match f64::deserialize(d) {
            Ok(x) if x > 0.0 && x <= 1.0 => Ok(Kept(x)),
            _ => Err(D::Error::custom("write a fraction above 0 and up to 1")),
        }
    }
}

/// See [`Wina::threshold`].
#[derive(Clone, Copy, Debug)]
struct Least(f32);

impl<'de> Deserialize<'de> for Least {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Least, D::Error> {
        match f32::deserialize(d) {
            Ok(x) if x >= 0.0 && x.is_finite() => Ok(Least(x)),
            _ => Err(D::Error::custom("write a number of 0 or more")),
        }
    }
}

/// See [`Wina::targets`].
#[derive(Clone, Debug)]
struct Targets(Vec<Target>);

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Targets, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Said {
            One(String),
            Many(Vec<Target>),
        }
        let list = match Said::deserialize(d) {
            Ok(Said::One(text)) => text.split('+').map(|t| Target(t.into())).collect(),
            Ok(Said::Many(list)) => list,
            Err(_) => Vec::new(),
        };
        match list.iter().all(|t| !t.0.is_empty()) && !list.is_empty() {
            true => Ok(Targets(list)),
            false => Err(D::Error::custom("write targets with + between them, such as attn.*+ffn.down, or a list")),
        }
    }
}

/// See [`Wina::keep`].
const KEEP: f64 = 0.5;

pub(crate) fn method() -> RunMethod {
    RunMethod {
        card: Card {
            name: "wina",
            paper: "Chen, Zhao, Ko, Banbury, Zhuang, Liang, Chen: WINA: Weight Informed Neuron Activation for \
                    Accelerating Large Language Model Inference, 2025",
            arxiv: "2505.19427",
            summary: "A row's inputs are left out where they times the norm of their weights are smallest.",
            system: None,
            verb: "gate",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<Wina>,
        defaults: |given| match given.contains_key("keep") || given.contains_key("threshold") {
            true => Map::new(),
            false => Map::from_iter([("keep".to_owned(), KEEP.into())]),
        },
        make: |given, _| {
            let wina = make::parameters::<Wina>("wina", given)?;
            if wina.keep.is_some() && wina.threshold.is_some() {
                return Err(MethodError::new("keep and threshold: give one of them"));
            }
            Ok(MadeRunning::Gate(Arc::new(wina)))
        },
    }
}

impl Gate for Wina {
    fn plan(&self) -> GatePlan {
        let all = || Targets(["attn.*", "ffn.*"].map(|t| Target(t.into())).into());
        let targets = self.targets.clone().unwrap_or_else(all).0;
        GatePlan { targets, named: self.targets.is_some(), side: GateSide::Inputs }
    }

    fn norms(&self, weights: &[MatRef<'_>]) -> Result<Vec<f32>, MethodError> {
        let Some(first) = weights.first() else {
            return Err(MethodError::new("no matrix reads the input that is to be gated"));
        };
        let n = first.cols();
        let mut squares = vec![0.0f64; n];
        for w in weights {
            if w.cols() != n {
                return Err(MethodError::new(format!("matrices of {n} and {} inputs share a gate", w.cols())));
            }
            make::finite(*w)?;
            for r in 0..w.rows() {
                squares.iter_mut().zip(w.row(r)).for_each(|(s, v)| *s += f64::from(*v) * f64::from(*v));
            }
        }
        Ok(squares.into_iter().map(|s| s.sqrt() as f32).collect())
    }

    fn channels(&self, activations: &[f32], norms: &[f32]) -> Result<Vec<u32>, MethodError> {
        let n = activations.len();
        if norms.len() != n {
            return Err(MethodError::new(format!("{} norms for {n} channels", norms.len())));
        }
        let product = |(x, c): (&f32, &f32)| {
            let p = x.abs() * c;
            if p.is_nan() { f32::INFINITY } else { p }
        };
        let products: Vec<f32> = activations.iter().zip(norms).map(product).collect();
        let above = |t: f32| products.iter().zip(0u32..).filter(move |(p, _)| **p > t).map(|(_, i)| i);
        if let Some(Least(t)) = self.threshold {
            return Ok(above(t).collect());
        }
        let keep = self.keep.map_or(KEEP, |k| k.0);
        let keep = ((keep * n as f64).round() as usize).clamp(1, n.max(1));
        if keep >= n {
            return Ok((0..n as u32).collect());
        }
        let mut sorted = products.clone();
        let least = *sorted.select_nth_unstable_by(keep - 1, |a, b| b.total_cmp(a)).1;
        // Of those that are like the last one kept, the first ones.
        let mut alike = keep - above(least).count();
        let mut kept = Vec::with_capacity(keep);
        for (p, i) in products.iter().zip(0u32..) {
            if *p > least {
                kept.push(i);
            } else if *p == least && alike > 0 {
                alike -= 1;
                kept.push(i);
            }
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::testkit::random;
    use lacuna_base::{Mat, Rng};

    fn keeping(keep: f64) -> Wina {
        Wina { keep: Some(Kept(keep)), ..Wina::default() }
    }

    /// The squared change of `W x` where only `kept` is read.
    fn lost(w: &Mat, x: &[f32], kept: &[u32]) -> f64 {
        let gone = |c: usize| !kept.contains(&(c as u32));
        (0..w.rows())
            .map(|r| (0..w.cols()).filter(|&c| gone(c)).map(|c| f64::from(w[(r, c)]) * f64::from(x[c])).sum::<f64>())
            .map(|change| change * change)
            .sum()
    }

    /// Straight from the definition, with ties, zero columns and a single channel: a channel is kept if fewer than `K`
    /// stand before it.
    #[test]
    fn agrees_with_brute_force() {
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let n = 1 + rng.below(20);
            let draw = |rng: &mut Rng| rng.below(5) as f32 - 2.0;
            let x: Vec<f32> = (0..n).map(|_| draw(&mut rng)).collect();
            let w = Mat::from_fn(1 + rng.below(3), n, |_, c| if c == 1 { 0.0 } else { draw(&mut rng) });
            let keep = 0.05 + 0.95 * f64::from(rng.f32());
            let by = keeping(keep);
            let norms = by.norms(&[w.view()]).expect("norms");
            let have = by.channels(&x, &norms).expect("channels");
            let length = |c: usize| (0..w.rows()).map(|r| w[(r, c)] * w[(r, c)]).sum::<f32>().sqrt();
            let value: Vec<f32> = (0..n).map(|c| x[c].abs() * length(c)).collect();
            let k = ((keep * n as f64).round() as usize).max(1);
            let before = |i: usize| (0..n).filter(|&j| value[j] > value[i] || (value[j] == value[i] && j < i)).count();
            let want: Vec<u32> = (0..n).filter(|&i| before(i) < k).map(|i| i as u32).collect();
            assert_eq!(have, want, "seed {seed}: {value:?}");
            let t = rng.below(4) as f32;
            let by = Wina { threshold: Some(Least(t)), ..Wina::default() };
            let want: Vec<u32> = (0..n).filter(|&i| value[i] > t).map(|i| i as u32).collect();
            assert_eq!(by.channels(&x, &norms), Ok(want), "seed {seed}");
        }
    }

    /// The paper's theorem: with columns at right angles, no set of the same size has a smaller error. All are tried.
    #[test]
    fn no_other_set_is_better_where_columns_stand_at_right_angles() {
        for seed in 0..40 {
            let (n, lengths, x) = (8, random(1, 8, seed), random(1, 8, seed + 99));
            // Columns of a Hadamard matrix, each times its length.
            let sign = |r: usize, c: usize| if (r & c).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            let w = Mat::from_fn(n, n, |r, c| sign(r, c) * lengths[(0, c)]);
            let by = keeping(0.375);
            let norms = by.norms(&[w.view()]).expect("norms");
            let kept = by.channels(x.row(0), &norms).expect("channels");
            let ours = lost(&w, x.row(0), &kept);
            for set in (0u32..256).filter(|s| s.count_ones() == 3) {
                let other: Vec<u32> = (0..8).filter(|c| set >> c & 1 == 1).collect();
                assert!(ours <= lost(&w, x.row(0), &other) * (1.0 + 1e-6), "seed {seed}: {kept:?} {other:?}");
            }
        }
    }

    /// The paper's claim beside what goes by `|x|` alone: a lower error on the whole.
    #[test]
    fn errs_less_than_by_activations_alone() {
        let (mut ours, mut plain) = (0.0, 0.0);
        for seed in 0..50 {
            let (base, scale) = (random(24, 64, seed), random(1, 64, seed + 7));
            let w = Mat::from_fn(24, 64, |r, c| base[(r, c)] * (1.5 * scale[(0, c)]).exp());
            let x = random(1, 64, seed + 70);
            let by = keeping(0.35);
            let norms = by.norms(&[w.view()]).expect("norms");
            ours += lost(&w, x.row(0), &by.channels(x.row(0), &norms).expect("channels"));
            plain += lost(&w, x.row(0), &by.channels(x.row(0), &[1.0; 64]).expect("channels"));
        }
        assert!(ours < 0.8 * plain, "{ours} {plain}");
    }

    #[test]
    fn matrices_that_share_an_input_count_together() {
        let (a, b) = (random(3, 5, 1), random(7, 5, 2));
        let stacked = Mat::from_fn(10, 5, |r, c| if r < 3 { a[(r, c)] } else { b[(r - 3, c)] });
        let by = Wina::default();
        assert_eq!(by.norms(&[a.view(), b.view()]), by.norms(&[stacked.view()]));
        assert!(by.norms(&[]).is_err());
        assert!(by.norms(&[a.view(), random(3, 4, 3).view()]).expect_err("refused").what.contains("5 and 4"));
        assert!(by.norms(&[Mat::from_fn(1, 1, |_, _| f32::NAN).view()]).is_err());
        assert!(by.channels(&[1.0], &[1.0, 2.0]).expect_err("refused").what.contains("2 norms for 1"));
        // What is no number is kept, and shows.
        assert_eq!(keeping(0.5).channels(&[9.0, f32::NAN, 8.0, 7.0], &[1.0; 4]), Ok(vec![0, 1]));
        assert_eq!(by.channels(&[], &[]), Ok(vec![]));
    }

    #[test]
    fn keys_out_of_range_are_refused() {
        for keys in [r#"{"keep": 0.0}"#, r#"{"keep": 1.5}"#, r#"{"threshold": -1.0}"#] {
            let given = serde_json::from_str(keys).expect("JSON");
            let said = make::parameters::<Wina>("wina", given).expect_err("refused").what;
            assert!(said.contains("write a"), "{said}");
        }
        let made = |keys: serde_json::Value| (method().make)(keys, 0).map(|_| ());
        let said = made(serde_json::json!({ "keep": 0.5, "threshold": 1.0 })).expect_err("refused").what;
        assert!(said.contains("give one of them"), "{said}");
        for none in [serde_json::json!([]), serde_json::json!(""), serde_json::json!("attn.*+")] {
            let said = made(serde_json::json!({ "targets": none })).expect_err("refused").what;
            assert!(said.contains("attn.*+ffn.down"), "{said}");
        }
        let given = serde_json::json!({ "targets": "attn.o+ffn.*" });
        let plan = make::parameters::<Wina>("wina", given).expect("keys").plan();
        assert!(plan.named && plan.targets.len() == 2 && plan.targets[1].0 == "ffn.*", "{plan:?}");
    }
}

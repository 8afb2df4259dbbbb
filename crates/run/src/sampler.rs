//! From logits to one token.

use lacuna_base::Rng;
use serde::{Deserialize, Serialize};

use crate::RunError;

/// How the next token is chosen.
///
/// The filters work in this order, as in `transformers` and vLLM: repetition penalty, temperature, top-k, top-p, min-p; then one token is drawn
/// from what is left. Equal logits rank by the lower id.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sampling {
    /// Divides the logits, at least 0. 0: always the largest logit.
    pub temperature: f32,
    /// Keeps this many of the most probable tokens. 0: all.
    pub top_k: usize,
    /// Keeps the fewest of the most probable tokens that have this probability together, above 0 and at most 1.
    pub top_p: f32,
    /// Keeps tokens at least this many times as probable as the most probable one, 0 to 1.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that the text already has, above 0. 1: none.
    pub repetition_penalty: f32,
    /// The same seed gives the same choices.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Chooses tokens by a [`Sampling`].
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Sampling,
    rng: Rng,
    logits: Vec<f32>,
    left: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler at the start of its seed's stream.
    pub fn new(settings: &Sampling) -> Result<Sampler, RunError> {
        let s = settings;
        let check = |ok: bool, setting, value, range| {
            if ok { Ok(()) } else { Err(RunError::Setting { setting, value, range }) }
        };
        check(s.temperature >= 0.0 && s.temperature.is_finite(), "temperature", s.temperature, "0 or more")?;
        check(s.top_p > 0.0 && s.top_p <= 1.0, "top_p", s.top_p, "above 0 and at most 1")?;
        check((0.0..=1.0).contains(&s.min_p), "min_p", s.min_p, "between 0 and 1")?;
        let penalty = s.repetition_penalty;
        check(penalty > 0.0 && penalty.is_finite(), "repetition_penalty", penalty, "above 0 (1 for none)")?;
        Ok(Sampler { settings: s.clone(), rng: Rng::new(s.seed), logits: Vec::new(), left: Vec::new() })
    }

    /// The next token. `text`: the tokens so far, the prompt's included. A logit that is NaN or +infinity is an error, -infinity is a token that
    /// cannot come.
    pub fn pick(&mut self, logits: &[f32], text: &[u32]) -> Result<u32, RunError> {
        let broken = |token: usize| RunError::Logits { token, value: logits[token], tokens: text.len() };
        if let Some(token) = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY) {
            return Err(broken(token));
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        let s = &self.settings;
        if s.repetition_penalty != 1.0 {
            let mut seen = text.to_vec();
            seen.sort_unstable();
            seen.dedup();
            for id in seen {
                let Some(l) = self.logits.get_mut(id as usize) else { continue };
                *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
            }
        }
        // max_by keeps the last of equals: from the back, that is the lowest id.
        let best = self.logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
        let Some((best, &max)) = best else { return Err(RunError::Request("the model has no vocabulary".into())) };
        if max == f32::NEG_INFINITY {
            return Err(broken(best));
        }
        if s.temperature == 0.0 {
            return Ok(best as u32);
        }
        self.left.clear();
        // The maximum is taken off first, so that no temperature makes an infinity of it.
        self.left.extend(self.logits.iter().zip(0..).map(|(&l, id)| ((l - max) / s.temperature, id)));
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if s.top_k > 0 && s.top_k < self.left.len() {
            self.left.select_nth_unstable_by(s.top_k - 1, order);
            self.left.truncate(s.top_k);
        }
        if s.top_k > 0 || s.top_p < 1.0 {
            self.left.sort_unstable_by(order);
        }
        let weight = |l: f32| f64::from(l).exp();
        if s.top_p < 1.0 {
            let enough = f64::from(s.top_p) * self.left.iter().map(|c| weight(c.0)).sum::<f64>();
            let mut sum = 0.0;
            let keep = self.left.iter().position(|c| {
                sum += weight(c.0);
                sum >= enough
            });
            self.left.truncate(keep.map_or(self.left.len(), |k| k + 1));
        }
        if s.min_p > 0.0 {
            self.left.retain(|c| weight(c.0) >= f64::from(s.min_p));
        }
        let mut draw = self.rng.f64() * self.left.iter().map(|c| weight(c.0)).sum::<f64>();
        for &(l, id) in &self.left {
            draw -= weight(l);
            if draw < 0.0 {
                return Ok(id);
            }
        }
        // Rounding may leave a crumb: it belongs to the most probable token.
        Ok(best as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(s: &Sampling, logits: &[f32], text: &[u32]) -> u32 {
        Sampler::new(s).unwrap().pick(logits, text).unwrap()
    }

    /// How often each token comes, of `n` draws.
    fn shares(s: &Sampling, logits: &[f32], n: usize) -> Vec<f64> {
        let mut sampler = Sampler::new(s).unwrap();
        let mut count = vec![0.0; logits.len()];
        for _ in 0..n {
            count[sampler.pick(logits, &[]).unwrap() as usize] += 1.0 / n as f64;
        }
        count
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lower_of_equals() {
        let greedy = Sampling::default();
        assert_eq!(pick(&greedy, &[0.0, 3.0, 3.0, -1.0], &[]), 1);
        assert_eq!(pick(&greedy, &[f32::NEG_INFINITY, -2.0], &[]), 1);
        let one = Sampling { temperature: 1.0, top_k: 1, ..Sampling::default() };
        assert_eq!(pick(&one, &[0.0, 3.0, 3.0, -1.0], &[]), 1);
    }

    #[test]
    fn repetition_moves_both_signs_down() {
        let s = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(pick(&s, &[2.0, 1.5], &[0, 0]), 1);
        assert_eq!(pick(&s, &[-1.0, -1.5], &[0]), 1);
        assert_eq!(pick(&s, &[2.0, 1.5], &[99]), 0);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let near = |got: Vec<f64>, want: [f64; 4]| {
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.02), "{got:?} {want:?}");
        };
        let s = Sampling { temperature: 1.0, ..Sampling::default() };
        near(shares(&s, &logits, 10_000), [0.5, 0.3, 0.15, 0.05]);
        near(shares(&Sampling { top_k: 2, ..s.clone() }, &logits, 10_000), [0.625, 0.375, 0.0, 0.0]);
        // 0.5 is not enough for 0.6, 0.8 is: the token that crosses stays.
        near(shares(&Sampling { top_p: 0.6, ..s.clone() }, &logits, 10_000), [0.625, 0.375, 0.0, 0.0]);
        near(shares(&Sampling { min_p: 0.25, ..s.clone() }, &logits, 10_000), [0.526, 0.316, 0.158, 0.0]);
        // Squared probabilities.
        near(shares(&Sampling { temperature: 0.5, ..s.clone() }, &logits, 10_000), [0.685, 0.247, 0.062, 0.007]);
        assert_eq!(pick(&Sampling { temperature: 1e-30, ..s }, &logits, &[]), 0);
    }

    #[test]
    fn seeds_decide() {
        let s = |seed| Sampling { temperature: 1.0, seed, ..Sampling::default() };
        let run = |seed| {
            let mut sampler = Sampler::new(&s(seed)).unwrap();
            (0..50).map(|_| sampler.pick(&[0.0; 64], &[]).unwrap()).collect::<Vec<u32>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn nonsense_is_an_error() {
        let mut sampler = Sampler::new(&Sampling::default()).unwrap();
        assert!(matches!(sampler.pick(&[0.0, f32::NAN], &[1]), Err(RunError::Logits { token: 1, tokens: 1, .. })));
        assert!(sampler.pick(&[f32::INFINITY], &[]).is_err());
        assert!(sampler.pick(&[f32::NEG_INFINITY; 3], &[]).is_err());
        assert!(sampler.pick(&[], &[]).is_err());
        for bad in [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { min_p: 1.5, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
        ] {
            assert!(matches!(Sampler::new(&bad), Err(RunError::Setting { .. })), "{bad:?}");
        }
    }
}

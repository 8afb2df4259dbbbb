//! From logits to one token.

use lacuna_base::Rng;
use serde::{Deserialize, Serialize};

use crate::RunError;

/// How the next token is chosen.
///
/// The filters work in this order, as in `transformers` and vLLM: penalties, bias, temperature, top-k, top-p, min-p;
/// then one token is drawn from what is left. Equal logits rank by the lower id.
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
    /// Taken off the logits of tokens that were generated before, however often, -2 to 2. 0: none.
    pub presence_penalty: f32,
    /// Taken off the logits of tokens that were generated before, as often as they were, -2 to 2. 0: none.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens, -100 to 100.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same choices.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
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
        for (setting, value) in [("presence_penalty", s.presence_penalty), ("frequency_penalty", s.frequency_penalty)] {
            check((-2.0..=2.0).contains(&value), setting, value, "between -2 and 2")?;
        }
        for &(_, bias) in &s.logit_bias {
            check((-100.0..=100.0).contains(&bias), "logit_bias", bias, "between -100 and 100")?;
        }
        Ok(Sampler { settings: s.clone(), rng: Rng::new(s.seed), logits: Vec::new(), left: Vec::new() })
    }

    /// Whether the largest logit wins as it is: nothing is drawn and no setting moves a logit.
    pub fn is_greedy(&self) -> bool {
        let s = &self.settings;
        let moves = s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
        s.temperature == 0.0 && !moves && s.logit_bias.is_empty()
    }

    /// The next token. `text`: the tokens so far, the first `prompt_tokens` of which were not generated. `allowed`: a
    /// bit for each token that may come, where not all may. A logit that is NaN or +infinity is an error, -infinity is
    /// a token that cannot come.
    pub fn pick(
        &mut self,
        logits: &[f32],
        text: &[u32],
        prompt_tokens: usize,
        allowed: Option<&[u32]>,
    ) -> Result<u32, RunError> {
        let broken = |token: usize| RunError::Logits { token, value: logits[token], tokens: text.len() };
        if self.is_greedy() && allowed.is_none() {
            return match largest(logits) {
                Some((best, max)) if max > f32::NEG_INFINITY && max < f32::INFINITY => Ok(best as u32),
                Some((token, _)) => Err(broken(token)),
                None => Err(RunError::Request(NO_VOCABULARY.into())),
            };
        }
        if !all_below_infinity(logits) {
            return Err(broken(first_broken(logits)));
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
        if s.presence_penalty != 0.0 || s.frequency_penalty != 0.0 {
            let mut made = text[prompt_tokens.min(text.len())..].to_vec();
            made.sort_unstable();
            for same in made.chunk_by(|a, b| a == b) {
                let Some(l) = self.logits.get_mut(same[0] as usize) else { continue };
                *l -= s.presence_penalty + s.frequency_penalty * same.len() as f32;
            }
        }
        for &(id, bias) in &s.logit_bias {
            if let Some(l) = self.logits.get_mut(id as usize) {
                *l += bias;
            }
        }
        if let Some(allowed) = allowed {
            let bit = |id: usize| allowed.get(id / 32).is_some_and(|word| word >> (id % 32) & 1 == 1);
            self.logits.iter_mut().enumerate().filter(|(id, _)| !bit(*id)).for_each(|(_, l)| *l = f32::NEG_INFINITY);
        }
        let max = max_of(&self.logits);
        // The first of equals: the lowest id.
        let Some(best) = self.logits.iter().position(|&l| l == max) else {
            return Err(RunError::Request(NO_VOCABULARY.into()));
        };
        if max == f32::NEG_INFINITY {
            let why = "no token may come next: the grammar allows none that the model's vocabulary and the bias leave";
            return Err(if allowed.is_some() { RunError::Request(why.into()) } else { broken(best) });
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
        if s.top_k > 0 {
            self.left.sort_unstable_by(order);
        }
        let weight = |l: f32| f64::from(l).exp();
        if s.top_p < 1.0 {
            let enough = f64::from(s.top_p) * self.left.iter().map(|c| weight(c.0)).sum::<f64>();
            // A few tokens hold most of the probability: the whole vocabulary is put in order only where they do not.
            let mut few = 64;
            loop {
                few = few.min(self.left.len());
                if few < self.left.len() {
                    self.left.select_nth_unstable_by(few - 1, order);
                }
                self.left[..few].sort_unstable_by(order);
                let mut sum = 0.0;
                let crossing = self.left[..few].iter().position(|c| {
                    sum += weight(c.0);
                    sum >= enough
                });
                if crossing.is_some() || few == self.left.len() {
                    self.left.truncate(crossing.map_or(few, |at| at + 1));
                    break;
                }
                few *= 8;
            }
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

const NO_VOCABULARY: &str = "the model has no vocabulary";

/// Logits looked at together by [`largest`]: they stay in the innermost cache.
const STRETCH: usize = 4096;

/// Whether no logit is NaN or +infinity. One comparison for both, and no branch: the scan of a large vocabulary is most
/// of the work of a choice.
fn all_below_infinity(logits: &[f32]) -> bool {
    logits.iter().fold(true, |all, l| all & (*l < f32::INFINITY))
}

/// The token of the first logit that is NaN or +infinity.
pub(crate) fn broken(logits: &[f32]) -> Option<usize> {
    (!all_below_infinity(logits)).then(|| first_broken(logits))
}

/// The first logit that is NaN or +infinity, where there is one.
fn first_broken(logits: &[f32]) -> usize {
    logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY).unwrap_or_default()
}

/// The largest of some logits that are not NaN; -infinity of none.
fn max_of(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    // Side by side: one after the other would wait for each comparison.
    let mut lanes = [f32::NEG_INFINITY; 32];
    let (whole, rest) = logits.as_chunks::<32>();
    for some in whole {
        lanes.iter_mut().zip(some).for_each(|(m, &l)| *m = larger(l, *m));
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &l| larger(l, m))
}

/// The largest logit, the first of equals, and its value; where one is NaN or +infinity, the first such. Read once, and
/// nothing is copied.
fn largest(logits: &[f32]) -> Option<(usize, f32)> {
    let (mut best, mut max) = (0, *logits.first()?);
    for (i, some) in logits.chunks(STRETCH).enumerate() {
        if !all_below_infinity(some) {
            let at = i * STRETCH + first_broken(some);
            return Some((at, logits[at]));
        }
        let m = max_of(some);
        if m > max {
            (best, max) = (i * STRETCH + some.iter().position(|&l| l == m).unwrap_or_default(), m);
        }
    }
    Some((best, max))
}

/// How probable a model found a token, and its rivals.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Probability {
    /// The token's log probability, of the model's own distribution: before penalties, bias, temperature and filters.
    pub logprob: f32,
    /// The most probable tokens, the first the most; equal ones by the lower id.
    pub top: Vec<(u32, f32)>,
}

impl Probability {
    /// Of token `id` by `logits`, with the `top` most probable tokens.
    pub fn of(logits: &[f32], id: u32, top: usize) -> Probability {
        let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
        let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
        let log = |l: f32| (f64::from(l - max) - sum.ln()) as f32;
        let mut best: Vec<(u32, f32)> = Vec::new();
        if top > 0 {
            let mut all: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
            let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
            if top < all.len() {
                all.select_nth_unstable_by(top - 1, order);
                all.truncate(top);
            }
            all.sort_unstable_by(order);
            best = all.into_iter().map(|(id, l)| (id, log(l))).collect();
        }
        Probability { logprob: logits.get(id as usize).map_or(f32::NEG_INFINITY, |&l| log(l)), top: best }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick(s: &Sampling, logits: &[f32], text: &[u32]) -> u32 {
        Sampler::new(s).unwrap().pick(logits, text, text.len(), None).unwrap()
    }

    /// How often each token comes, of `n` draws.
    fn shares(s: &Sampling, logits: &[f32], n: usize) -> Vec<f64> {
        let mut sampler = Sampler::new(s).unwrap();
        let mut count = vec![0.0; logits.len()];
        for _ in 0..n {
            count[sampler.pick(logits, &[], 0, None).unwrap() as usize] += 1.0 / n as f64;
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

    /// The short way of a greedy choice against the long one, which a bias of nothing takes.
    #[test]
    fn a_choice_without_a_copy_is_the_same_choice() {
        let mut rng = Rng::new(5);
        let long = Sampling { logit_bias: vec![(0, 0.0)], ..Sampling::default() };
        for round in 0..300 {
            let n = 1 + rng.below(3 * STRETCH);
            let mut logits: Vec<f32> = (0..n).map(|_| rng.below(1 << (1 + round % 20)) as f32 - 7.0).collect();
            for bad in [f32::NEG_INFINITY, f32::NAN, f32::INFINITY].into_iter().take(round % 4) {
                logits[rng.below(n)] = bad;
            }
            let pick = |s: &Sampling| Sampler::new(s).unwrap().pick(&logits, &[], 0, None).map_err(|e| e.to_string());
            assert_eq!(pick(&Sampling::default()), pick(&long), "round {round}, {n} logits");
        }
        for all in [[f32::NEG_INFINITY; 9], [-0.0; 9]] {
            let pick = |s: &Sampling| Sampler::new(s).unwrap().pick(&all, &[], 0, None).map_err(|e| e.to_string());
            assert_eq!(pick(&Sampling::default()), pick(&long));
        }
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
            (0..50).map(|_| sampler.pick(&[0.0; 64], &[], 0, None).unwrap()).collect::<Vec<u32>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn nonsense_is_an_error() {
        let mut sampler = Sampler::new(&Sampling::default()).unwrap();
        assert!(matches!(
            sampler.pick(&[0.0, f32::NAN], &[1], 1, None),
            Err(RunError::Logits { token: 1, tokens: 1, .. })
        ));
        assert!(sampler.pick(&[f32::INFINITY], &[], 0, None).is_err());
        assert!(sampler.pick(&[f32::NEG_INFINITY; 3], &[], 0, None).is_err());
        assert!(sampler.pick(&[], &[], 0, None).is_err());
        for bad in [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { min_p: 1.5, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
            Sampling { presence_penalty: 2.5, ..Sampling::default() },
            Sampling { frequency_penalty: f32::NAN, ..Sampling::default() },
            Sampling { logit_bias: vec![(0, 101.0)], ..Sampling::default() },
        ] {
            assert!(matches!(Sampler::new(&bad), Err(RunError::Setting { .. })), "{bad:?}");
        }
    }

    #[test]
    fn penalties_bias_and_grammar_move_logits() {
        let pick = |s: &Sampling, text: &[u32], from, allowed: Option<&[u32]>| {
            Sampler::new(s).unwrap().pick(&[3.0, 2.5, 1.0, 0.0], text, from, allowed)
        };
        let s = Sampling { presence_penalty: 0.6, ..Sampling::default() };
        assert_eq!(pick(&s, &[0], 0, None).unwrap(), 1);
        assert_eq!(pick(&s, &[0], 1, None).unwrap(), 0, "the prompt's own tokens are not held against it");
        let s = Sampling { frequency_penalty: 0.3, ..Sampling::default() };
        assert_eq!((pick(&s, &[0], 0, None).unwrap(), pick(&s, &[0, 0], 0, None).unwrap()), (0, 1));
        let s = Sampling { logit_bias: vec![(3, 10.0), (9, 1.0)], ..Sampling::default() };
        assert_eq!(pick(&s, &[], 0, None).unwrap(), 3);
        assert_eq!(pick(&Sampling::default(), &[], 0, Some(&[0b1100])).unwrap(), 2);
        assert!(matches!(pick(&Sampling::default(), &[], 0, Some(&[0])), Err(RunError::Request(_))));
    }

    #[test]
    fn the_few_most_probable_are_found_without_ordering_all() {
        // Uniform over 1000 tokens: 0.5 of the probability is 500 of them, the lowest ids first.
        let s = Sampling { temperature: 1.0, top_p: 0.4999, ..Sampling::default() };
        let mut sampler = Sampler::new(&s).unwrap();
        let logits = vec![0.0f32; 1000];
        let drawn: Vec<u32> = (0..2000).map(|_| sampler.pick(&logits, &[], 0, None).unwrap()).collect();
        assert!(drawn.iter().all(|&id| id < 500) && drawn.iter().any(|&id| id > 450));
    }

    #[test]
    fn log_probabilities_are_those_of_the_model() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln() + 7.0).collect();
        let p = Probability::of(&logits, 2, 2);
        assert!((p.logprob - 0.15f32.ln()).abs() < 1e-6);
        assert_eq!(p.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1]);
        assert!((p.top[1].1 - 0.3f32.ln()).abs() < 1e-6);
        assert_eq!(Probability::of(&[1.0, 1.0], 1, 9).top.len(), 2);
    }
}

//! PruneNet: a policy learns from the weights alone which rows may go without changing the spectrum.
//!
//! **Paper.** Ayan Sengupta, Siddhant Chaudhary, Tanmoy Chakraborty, "You Only Prune Once: Designing Calibration-Free
//! Model Compression With Policy Learning", ICLR 2025, arXiv 2501.15296.
//!
//! **Idea.** One policy for all layers reads the rows of `W` (gate, or up where there is none): row `i` stays with the
//! probability `α_i = σ(W_i v + c)`, `v = W_projᵀ w_row`, and with noise `ε ~ U(0, 1)` by `o_i = σ(ln ε - ln(1 - ε) +
//! ln α_i - ln(1 - α_i))`. An episode draws so many rows of each layer as will stay, without replacement, as `o`
//! weighs them; the reward is `1 / KS`, `KS` the Kolmogorov-Smirnov distance of the singular values of what stays and
//! of all. REINFORCE: the policy climbs `γ^l · reward · Σ_kept ln o_i`. The policy after the best episode decides.
//!
//! **Shapes and units.** The first writer `[count * rows, hidden]`; the answer is the log-odds that a unit stays, the
//! mean over its rows.
//!
//! **Cost.** `episodes` walks over the model, each with the singular values of one matrix a layer; no text. The policy
//! has `hidden + 1` numbers.
//!
//! **Departs.** (1) The paper's two layers have nothing between them, so that they are the one `v`; it begins as
//! theirs would, and a step of Adam moves it as it would move theirs, `rate · rows / 2` a number (no weight decay).
//! (2) Steps follow each layer at once and not the episode's end. (3) A reward counts less the mean of the same
//! matrix's earlier ones, and the gradient less that of all rows; without that, rewards, which are all positive, raise
//! the odds of whatever was drawn. (4) In the end the most likely rows stay; `draw = true` draws them as the paper
//! does. (5) The paper cuts FFNs only, and so does the recipe; heads can go, a policy of their own reading the rows of
//! q. (6) Where spectra are alike to the last value the reward is that of half a value.

use lacuna_base::{Mat64, Rng, factor};
use lacuna_contract::{Card, Compete, Learner, Made, Method, MethodError, Structure, StructureAsk, Unit};
use serde::Deserialize;

use super::reader;
use crate::make;

/// The paper's parameters.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PruneNet {
    /// Walks over the model to learn from, 1 to 10000.
    episodes: usize,
    /// The learning rate of the paper's layers, above 0 to 1.
    rate: f64,
    /// γ, what a reward counts for from one layer to the next, above 0 to 1.
    discount: f64,
    /// Whether the rows that stay are drawn by their odds; else the likeliest stay.
    draw: bool,
    /// Where the beginning, the noise and the draws come from.
    seed: u64,
}

impl Default for PruneNet {
    fn default() -> PruneNet {
        PruneNet { episodes: 20, rate: 0.001, discount: 0.99, draw: false, seed: 42 }
    }
}

pub(crate) fn method() -> Method {
    Method {
        card: Card {
            name: "prunenet",
            paper: "Sengupta, Chaudhary, Chakraborty: You Only Prune Once: Designing Calibration-Free Model \
             Compression With Policy Learning, 2025",
            arxiv: "2501.15296",
            summary: "The FFN rows go that a policy, learned from the weights alone, finds the spectrum can spare.",
            system: None,
            verb: "structure",
            needs: &[],
            abilities: &[],
        },
        keys: make::keys::<PruneNet>,
        make: |given| {
            let p: PruneNet = make::parameters("prunenet", given)?;
            if !(1..=10_000).contains(&p.episodes) {
                return Err(MethodError::new(format!("episodes is {}; it must be from 1 to 10000", p.episodes)));
            }
            for (name, value) in [("rate", p.rate), ("discount", p.discount)] {
                if !(value > 0.0 && value <= 1.0) {
                    return Err(MethodError::new(format!("{name} is {value}; it must be above 0, up to 1")));
                }
            }
            Ok(Made::Structure(Box::new(p)))
        },
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Uniform above 0 and below 1.
fn open(rng: &mut Rng) -> f64 {
    rng.f64().clamp(1e-12, 1.0 - 1e-12)
}

/// The rows that a policy reads, `[count * rows, hidden]`, and how many are one unit's.
fn state(ask: &StructureAsk<'_>) -> Result<(Mat64, usize), MethodError> {
    reader("prunenet", ask)?;
    let Some(w) = ask.writers.first() else {
        return Err(MethodError::new("prunenet reads writers, and there are none"));
    };
    make::finite(*w)?;
    if w.rows() == 0 || w.cols() == 0 || w.rows() % ask.count > 0 {
        let what = format!("{} units for a writer of {} x {}", ask.count, w.rows(), w.cols());
        return Err(MethodError::new(what));
    }
    Ok((Mat64::from_f32(*w), w.rows() / ask.count))
}

/// The mean of each unit's rows.
fn means(w: &Mat64, rows: usize) -> Mat64 {
    let mut out = Mat64::zeros(w.rows() / rows, w.cols());
    for r in 0..w.rows() {
        out.row_mut(r / rows).iter_mut().zip(w.row(r)).for_each(|(o, x)| *o += x / rows as f64);
    }
    out
}

/// The largest distance of the distributions of two lists that fall.
fn ks(a: &[f64], b: &[f64]) -> f64 {
    let (mut i, mut j, mut most) = (0, 0, 0.0f64);
    while let (Some(x), Some(y)) = (a.get(i), b.get(j)) {
        let at = x.max(*y);
        i += a[i..].iter().take_while(|v| **v >= at).count();
        j += b[j..].iter().take_while(|v| **v >= at).count();
        most = most.max((i as f64 / a.len() as f64 - j as f64 / b.len() as f64).abs());
    }
    most
}

/// `v` and `c`, the last, with Adam's moments.
#[derive(Clone)]
struct Policy {
    v: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
}

impl Policy {
    /// As `W_projᵀ w_row` and `b w_row` begin, `W_proj` and `b` being within `1 / √hidden` and `w_row` from 0 to 1.
    fn new(hidden: usize, rows: usize, rng: &mut Rng) -> Policy {
        let size = (rows as f64 / (9.0 * hidden as f64)).sqrt();
        let v = (0..=hidden).map(|_| size * f64::from(rng.normal())).collect();
        Policy { v, first: vec![0.0; hidden + 1], second: vec![0.0; hidden + 1], steps: 0 }
    }

    /// The log-odds that each unit stays.
    fn odds(&self, units: &Mat64) -> Result<Vec<f64>, MethodError> {
        let (c, v) = self.v.split_last().map_or((0.0, &[][..]), |(c, v)| (*c, v));
        if v.len() != units.cols() {
            return Err(MethodError::new(format!("rows of {} for a policy of {}", units.cols(), v.len())));
        }
        Ok((0..units.rows()).map(|i| c + units.row(i).iter().zip(v).map(|(x, v)| x * v).sum::<f64>()).collect())
    }

    /// One step of Adam up `gradient`.
    fn climb(&mut self, gradient: &[f64], rate: f64) {
        self.steps += 1;
        let (fade, fade2) = (1.0 - 0.9f64.powi(self.steps), 1.0 - 0.999f64.powi(self.steps));
        for (i, g) in gradient.iter().enumerate() {
            self.first[i] = 0.9 * self.first[i] + 0.1 * g;
            self.second[i] = 0.999 * self.second[i] + 0.001 * g * g;
            self.v[i] += rate * (self.first[i] / fade) / ((self.second[i] / fade2).sqrt() + 1e-8);
        }
    }
}

/// The gradient of `Σ_kept ln o_i` by `v` and `c`.
fn gradient(units: &Mat64, kept: &[usize], o: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; units.cols() + 1];
    for &i in kept {
        let by = 1.0 - o[i];
        out.iter_mut().zip(units.row(i).iter().chain([&1.0])).for_each(|(g, x)| *g += by * x);
    }
    out
}

/// `count` of the items that `weights` weigh, without replacement, rising.
fn drawn(weights: &[f64], count: usize, rng: &mut Rng) -> Vec<usize> {
    // The largest of ln w plus a Gumbel number are drawn so.
    let keys: Vec<f64> = weights.iter().map(|w| w.max(1e-300).ln() - (-open(rng).ln()).ln()).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// What is learned of the heads or of the channels.
#[derive(Clone, Default)]
struct Learned {
    policy: Option<Policy>,
    /// The episode's reward, and the largest one with the policy after it.
    reward: f64,
    best: Option<(f64, Policy)>,
}

/// One matrix through the episodes.
struct Seen {
    spectrum: Vec<f64>,
    /// Of earlier episodes.
    rewards: f64,
}

struct Learning {
    p: PruneNet,
    of: [Learned; 2],
    seen: Vec<Seen>,
    /// The matrix at hand, in the order of the walk, and the layers behind.
    at: usize,
    episode: usize,
}

fn index(unit: Unit) -> usize {
    usize::from(unit == Unit::Channel)
}

fn spectrum(w: &Mat64) -> Result<Vec<f64>, MethodError> {
    factor::singular_values(w).map_err(|e| MethodError::new(e.to_string()))
}

impl PruneNet {
    fn begin(&self, unit: Unit, w: &Mat64) -> Policy {
        Policy::new(w.cols(), w.rows(), &mut Rng::stream(self.seed, index(unit) as u64))
    }

    /// What units score by a policy.
    fn odds(&self, policy: &Policy, ask: &StructureAsk<'_>, w: &Mat64, rows: usize) -> Result<Vec<f64>, MethodError> {
        let mut odds = policy.odds(&means(w, rows))?;
        if self.draw {
            let mut rng = Rng::stream(self.seed, (1 << 60) + 2 * ask.layer as u64 + index(ask.unit) as u64);
            for s in &mut odds {
                let e = open(&mut rng);
                *s = sigmoid(*s + e.ln() - (1.0 - e).ln()).max(1e-300).ln() - (-open(&mut rng).ln()).ln();
            }
        }
        Ok(odds)
    }
}

impl Learner for Learning {
    fn look(&mut self, ask: &StructureAsk<'_>, sparsity: f64) -> Result<(), MethodError> {
        let (w, rows) = state(ask)?;
        if self.at == self.seen.len() {
            self.seen.push(Seen { spectrum: spectrum(&w)?, rewards: 0.0 });
        }
        let mut rng = Rng::stream(self.p.seed, 2 + (self.episode * self.seen.len().max(1 << 20) + self.at) as u64);
        let (mine, seen) = (&mut self.of[index(ask.unit)], &mut self.seen[self.at]);
        let policy = mine.policy.get_or_insert_with(|| self.p.begin(ask.unit, &w));
        let units = means(&w, rows);
        let noisy = |s: f64, e: f64| sigmoid(s + e.ln() - (1.0 - e).ln());
        let o: Vec<f64> = policy.odds(&units)?.into_iter().map(|s| noisy(s, open(&mut rng))).collect();
        let stay = (((1.0 - sparsity) * ask.count as f64) as usize).clamp(1, ask.count);
        let kept = drawn(&o, stay, &mut rng);
        let left: Vec<usize> = kept.iter().flat_map(|u| u * rows..(u + 1) * rows).collect();
        let left = spectrum(&Mat64::from_fn(left.len(), w.cols(), |r, c| w[(left[r], c)]))?;
        let reward = 1.0 / ks(&seen.spectrum, &left).max(0.5 / seen.spectrum.len() as f64);
        if self.episode > 0 {
            let by = self.p.discount.powi(ask.layer as i32) * (reward - seen.rewards / self.episode as f64);
            // Less what as many drawn without looking would give.
            let (all, part) = ((0..ask.count).collect::<Vec<_>>(), stay as f64 / ask.count as f64);
            let (mut up, all) = (gradient(&units, &kept, &o), gradient(&units, &all, &o));
            up.iter_mut().zip(all).for_each(|(g, a)| *g = by * (*g - part * a));
            policy.climb(&up, self.p.rate * w.rows() as f64 / 2.0);
        }
        seen.rewards += reward;
        mine.reward += reward;
        self.at += 1;
        Ok(())
    }

    fn again(&mut self) -> bool {
        (self.at, self.episode) = (0, self.episode + 1);
        for mine in &mut self.of {
            let reward = std::mem::take(&mut mine.reward);
            if let Some(policy) = mine.policy.as_ref().filter(|_| mine.best.as_ref().is_none_or(|b| reward > b.0)) {
                mine.best = Some((reward, policy.clone()));
            }
        }
        self.episode < self.p.episodes
    }

    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        let (w, rows) = state(ask)?;
        match &self.of[index(ask.unit)].best {
            Some((_, policy)) => self.p.odds(policy, ask, &w, rows),
            None => Err(MethodError::new("nothing was learned of such units")),
        }
    }
}

impl Structure for PruneNet {
    /// By the policy as it begins.
    fn score(&self, ask: &StructureAsk<'_>) -> Result<Vec<f64>, MethodError> {
        let (w, rows) = state(ask)?;
        self.odds(&self.begin(ask.unit, &w), ask, &w, rows)
    }

    fn compete(&self) -> Compete {
        Compete::Layer
    }

    fn keeps_means(&self) -> bool {
        false
    }

    fn learner(&self) -> Option<Box<dyn Learner>> {
        let (of, seen) = (Default::default(), Vec::new());
        Some(Box::new(Learning { p: self.clone(), of, seen, at: 0, episode: 0 }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Mat;
    use lacuna_base::testkit::random;
    use lacuna_contract::Stats;

    /// Distribution functions from their definition, at every value and just above it.
    fn brute_ks(a: &[f64], b: &[f64]) -> f64 {
        let below = |all: &[f64], x: f64| all.iter().filter(|v| **v < x).count() as f64 / all.len() as f64;
        let upto = |all: &[f64], x: f64| all.iter().filter(|v| **v <= x).count() as f64 / all.len() as f64;
        let at = |x: f64| (below(a, x) - below(b, x)).abs().max((upto(a, x) - upto(b, x)).abs());
        a.iter().chain(b).map(|x| at(*x)).fold(0.0, f64::max)
    }

    #[test]
    fn distances_agree_with_brute_force_distribution_functions() {
        for seed in 0..40 {
            let (n, m) = (1 + seed as usize % 7, 1 + seed as usize % 4);
            let list = |n: usize, s: u64| {
                // Few values, so that there are ties.
                let mut all: Vec<f64> = random(1, n, s).row(0).iter().map(|v| f64::from((v * 2.0).round())).collect();
                all.sort_by(|a, b| b.total_cmp(a));
                all
            };
            let (a, b) = (list(n, seed), list(m, seed + 100));
            assert!((ks(&a, &b) - brute_ks(&a, &b)).abs() < 1e-12, "{a:?} {b:?}");
            assert_eq!(ks(&a, &a), 0.0);
        }
        assert_eq!(ks(&[3.0, 2.0], &[1.0]), 1.0);
    }

    #[test]
    fn gradients_agree_with_brute_force_differences() {
        for (count, hidden, rows) in [(6, 4, 1), (3, 5, 2), (1, 1, 1), (4, 1, 3)] {
            let w = Mat64::from_f32(random(count * rows, hidden, 3).view());
            let (units, mut rng) = (means(&w, rows), Rng::new(5));
            let noise: Vec<f64> = (0..count).map(|_| open(&mut rng)).collect();
            let kept: Vec<usize> = (0..count).step_by(2).collect();
            // Σ ln o straight from the definition, alpha and all.
            let value = |v: &[f64]| {
                let one = |&i: &usize| {
                    let row = |r: usize| (0..hidden).map(|j| w[(r, j)] * v[j]).sum::<f64>();
                    let s = (i * rows..(i + 1) * rows).map(row).sum::<f64>() / rows as f64 + v[hidden];
                    let alpha = 1.0 / (1.0 + (-s).exp());
                    let x = noise[i].ln() - (1.0 - noise[i]).ln() + alpha.ln() - (1.0 - alpha).ln();
                    (1.0 / (1.0 + (-x).exp())).ln()
                };
                kept.iter().map(one).sum::<f64>()
            };
            let policy = Policy::new(hidden, count * rows, &mut rng);
            let o: Vec<f64> = policy
                .odds(&units)
                .expect("odds")
                .iter()
                .zip(&noise)
                .map(|(s, e)| sigmoid(s + e.ln() - (1.0 - e).ln()))
                .collect();
            let have = gradient(&units, &kept, &o);
            for j in 0..=hidden {
                let moved = |by: f64| {
                    let mut v = policy.v.clone();
                    v[j] += by;
                    value(&v)
                };
                let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((have[j] - want).abs() < 1e-6 * (1.0 + want.abs()), "{j}: {} {want}", have[j]);
            }
        }
    }

    #[test]
    fn what_is_drawn_follows_the_weights() {
        let (weights, mut rng, mut first) = ([1.0, 3.0, 0.0, 6.0], Rng::new(1), [0usize; 4]);
        for _ in 0..4000 {
            drawn(&weights, 1, &mut rng).iter().for_each(|i| first[*i] += 1);
        }
        // 400, 1200, 0 and 2400, give or take five deviations.
        assert!((300..500).contains(&first[0]) && first[2] == 0 && (2245..2555).contains(&first[3]), "{first:?}");
        assert_eq!(drawn(&weights, 4, &mut rng), [0, 1, 2, 3]);
    }

    fn ask<'a>(down: &'a Mat, writers: &'a [lacuna_base::MatRef<'a>], layer: usize) -> StructureAsk<'a> {
        let (count, reader, stats) = (down.cols(), Some(down.view()), Stats::default());
        StructureAsk { unit: Unit::Channel, layer, count, width: 1, reader, writers, stats, writer_stats: &[] }
    }

    /// Layers whose rows are large where they lean one way, and hardly anything otherwise: the spectrum lives of the
    /// former.
    fn leaning(layer: u64) -> Mat {
        let (noise, small) = (random(48, 12, 40 + layer), random(48, 12, 60 + layer));
        Mat::from_fn(48, 12, |r, c| match (r * 7 + layer as usize) % 4 {
            0 => 0.05 * small[(r, c)] - 0.5,
            _ => noise[(r, c)] + 1.0,
        })
    }

    fn learn(p: &PruneNet, layers: &[Mat]) -> (Box<dyn Learner>, Vec<Vec<f64>>) {
        let down = random(12, 48, 1);
        let mut learner = p.learner().expect("it learns");
        loop {
            for (l, w) in layers.iter().enumerate() {
                learner.look(&ask(&down, &[w.view()], l), 0.25).expect("looks");
            }
            if !learner.again() {
                break;
            }
        }
        let score = |(l, w): (usize, &Mat)| learner.score(&ask(&down, &[w.view()], l)).expect("scores");
        let scores = layers.iter().enumerate().map(score).collect();
        (learner, scores)
    }

    #[test]
    fn a_learned_policy_spares_the_spectrum_and_comes_out_the_same_again() {
        let layers: Vec<Mat> = (0..6).map(leaning).collect();
        let distance = |scores: &[Vec<f64>]| {
            let one = |(w, s): (&Mat, &Vec<f64>)| {
                let mut order: Vec<usize> = (0..48).collect();
                order.sort_by(|&a, &b| s[b].total_cmp(&s[a]));
                let left = Mat64::from_fn(36, 12, |r, c| f64::from(w[(order[r], c)]));
                brute_ks(&spectrum(&Mat64::from_f32(w.view())).expect("values"), &spectrum(&left).expect("values"))
            };
            layers.iter().zip(scores).map(one).sum::<f64>() / 6.0
        };
        let (mut ours, mut lots) = (0.0, 0.0);
        for seed in 0..5 {
            // Few rows want a larger rate to be moved as many would be.
            let p = PruneNet { seed, episodes: 60, rate: 0.002, ..PruneNet::default() };
            let scores = learn(&p, &layers).1;
            assert_eq!(learn(&p, &layers).1, scores);
            ours += distance(&scores);
            let mut rng = Rng::new(seed);
            lots += distance(&(0..6).map(|_| (0..48).map(|_| rng.f64()).collect()).collect::<Vec<Vec<f64>>>());
            let drawn = learn(&PruneNet { draw: true, ..p.clone() }, &layers).1;
            assert!(drawn != scores && drawn.iter().flatten().all(|s| s.is_finite()));
        }
        assert!(ours < 0.8 * lots, "{ours} {lots}");
    }

    #[test]
    fn what_is_no_ffn_and_parameters_out_of_range_are_refused() {
        let (down, w) = (random(3, 4, 1), random(4, 3, 2));
        let p = PruneNet::default();
        assert!(p.score(&ask(&down, &[], 0)).is_err());
        assert!(p.score(&StructureAsk { reader: None, ..ask(&down, &[w.view()], 0) }).is_err());
        let odd = random(5, 3, 2);
        assert!(p.score(&ask(&down, &[odd.view()], 0)).expect_err("refused").what.contains("4 units"));
        let learner = p.learner().expect("it learns");
        assert!(learner.score(&ask(&down, &[w.view()], 0)).is_err(), "before it learned");
        for bad in [
            serde_json::json!({ "episodes": 0 }),
            serde_json::json!({ "rate": 0 }),
            serde_json::json!({ "discount": 2 }),
        ] {
            assert!((method().make)(bad).is_err());
        }
        // One row, one column.
        let (down, w) = (random(1, 1, 1), random(1, 1, 2));
        let mut learner = p.learner().expect("it learns");
        (0..3).for_each(|_| {
            learner.look(&ask(&down, &[w.view()], 0), 0.5).expect("looks");
            learner.again();
        });
        assert!(learner.score(&ask(&down, &[w.view()], 0)).expect("scores")[0].is_finite());
    }
}

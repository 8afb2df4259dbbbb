//! A lab whose losses are known: a convex cost for each slot, plus products of neighbours' errors.

use lacuna_base::Rng;
use lacuna_contract::{Assignment, Lab, Level, MethodError, Outcome, Slot};

pub(crate) struct Bench {
    slots: Vec<Slot>,
    levels: Vec<Vec<Level>>,
    /// Assignments measured.
    pub measured: usize,
}

impl Bench {
    /// `slots` slots of `levels` levels, bytes falling and errors rising with the level.
    pub fn new(slots: usize, levels: usize, seed: u64) -> Bench {
        let mut rng = Rng::new(seed);
        let list = (0..slots)
            .map(|_| {
                let (size, pain) = (100 + rng.below(4) as u64 * 100, 0.1 + f64::from(rng.below(1000) as u32) / 200.0);
                (0..levels)
                    .map(|l| Level {
                        value: l as f64,
                        bytes: size * (levels - l) as u64,
                        error: pain * (l as f64 / levels as f64).powi(2),
                        lost: 1e4 * pain * (l as f64 / levels as f64).powi(2),
                    })
                    .collect()
            })
            .collect();
        let slots = (0..slots).map(|s| Slot { name: format!("slot {s}"), parameters: 100, group: 0 }).collect();
        Bench { slots, levels: list, measured: 0 }
    }

    /// Of these levels, by slot; slots of one group each.
    pub fn of(levels: Vec<(usize, Vec<Level>)>, parameters: u64) -> Bench {
        let slot = |(s, group): (usize, usize)| Slot { name: format!("slot {s}"), parameters, group };
        let (groups, levels): (Vec<usize>, Vec<Vec<Level>>) = levels.into_iter().unzip();
        Bench { slots: groups.into_iter().enumerate().map(slot).collect(), levels, measured: 0 }
    }

    pub fn bytes(&self, a: &[usize]) -> u64 {
        a.iter().enumerate().map(|(s, &l)| self.levels[s][l].bytes).sum()
    }

    pub fn loss(&self, a: &[usize]) -> f64 {
        let e: Vec<f64> = a.iter().enumerate().map(|(s, &l)| self.levels[s][l].error).collect();
        e.iter().sum::<f64>() + e.windows(2).map(|w| 0.3 * w[0] * w[1]).sum::<f64>()
    }
}

impl Lab for Bench {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn levels(&self, slot: usize) -> &[Level] {
        &self.levels[slot]
    }

    fn measure(&mut self, batch: &[Assignment], _: usize) -> Result<Vec<Outcome>, MethodError> {
        self.measured += batch.len();
        Ok(batch.iter().map(|a| Outcome { loss: self.loss(a), kl: self.loss(a), bytes: self.bytes(a) }).collect())
    }
}

/// A lab of slots of one size with levels of given sparsities and a given loss.
pub(crate) struct Known<F> {
    slots: Vec<Slot>,
    levels: Vec<Level>,
    loss: F,
    /// What looks at the slots gave.
    pub looks: Vec<f64>,
    /// Assignments measured.
    pub measured: usize,
    /// What was told.
    pub notes: Vec<String>,
}

impl<F: FnMut(&[usize]) -> f64> Known<F> {
    pub fn new(slots: usize, sparsity: &[f64], loss: F) -> Known<F> {
        let level =
            |&value: &f64| Level { value, bytes: (1000.0 * (1.0 - value)).round() as u64, error: value, lost: value };
        let slot = |s| Slot { name: format!("slot {s}"), parameters: 1000, group: 0 };
        Known {
            slots: (0..slots).map(slot).collect(),
            levels: sparsity.iter().map(level).collect(),
            loss,
            looks: vec![0.0; slots],
            measured: 0,
            notes: Vec::new(),
        }
    }

    pub fn bytes(&self, a: &[usize]) -> u64 {
        a.iter().map(|&l| self.levels[l].bytes).sum()
    }
}

impl<F: FnMut(&[usize]) -> f64> Lab for Known<F> {
    fn slots(&self) -> &[Slot] {
        &self.slots
    }

    fn levels(&self, _: usize) -> &[Level] {
        &self.levels
    }

    fn measure(&mut self, batch: &[Assignment], _: usize) -> Result<Vec<Outcome>, MethodError> {
        self.measured += batch.len();
        let loss: Vec<f64> = batch.iter().map(|a| (self.loss)(a)).collect();
        Ok(batch.iter().zip(loss).map(|(a, loss)| Outcome { loss, kl: loss, bytes: self.bytes(a) }).collect())
    }

    fn looked(&self, slot: usize) -> f64 {
        self.looks[slot]
    }

    fn note(&mut self, text: String) {
        self.notes.push(text);
    }
}

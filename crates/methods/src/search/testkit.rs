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

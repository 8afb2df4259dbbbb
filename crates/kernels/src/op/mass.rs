//! The attention that keys get, added up over queries: what some keepers of cached entries go by.

use std::ops::Range;
use std::sync::Mutex;

use lacuna_base::MatRef;

use super::attention::Attention;
use super::elementwise::softmax;
use crate::kv::{KEY_BLOCK, KvView};
use crate::parallel;

/// Rows whose scores are computed side by side, so that keys are read once for them.
const ROWS: usize = 8;

/// The attention that the slots of one sequence got in one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mass {
    /// Of each key head.
    pub heads: Vec<HeadMass>,
    /// Rows from this slot on may be taken back: what they give is kept apart.
    pub certain: usize,
}

/// The attention that the slots of one key head got from all query heads that read it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HeadMass {
    /// A number for each slot, or for more: those count as nothing.
    pub sum: Vec<f32>,
    /// What each row kept apart gave, in order: a number for each slot that it sees.
    pub apart: Vec<Vec<f32>>,
}

impl Mass {
    /// Of `heads` key heads, nothing yet.
    pub fn new(heads: usize) -> Mass {
        Mass { heads: vec![HeadMass::default(); heads], certain: 0 }
    }
}

impl HeadMass {
    /// Adds what one row gave to slots.
    pub fn add(&mut self, given: &[f32]) {
        if self.sum.len() < given.len() {
            self.sum.resize(given.len(), 0.0);
        }
        self.sum.iter_mut().zip(given).for_each(|(sum, x)| *sum += x);
    }

    /// Takes the attention that one row gave, at slot `at`: the sum of its query heads' weights.
    pub fn take(&mut self, at: usize, certain: usize, given: &[f32]) {
        if at < certain { self.add(given) } else { self.apart.push(given.to_vec()) }
    }
}

/// What one thread does: one key head of one sequence.
struct Job<'a> {
    rows: Range<usize>,
    kv: &'a KvView<'a>,
    head: usize,
    certain: usize,
    mass: &'a mut HeadMass,
}

impl Attention {
    /// Adds the attention of some rows to the slots that they see, row by row in their order: `q` is `[rows, heads *
    /// head_dim]`, `slots` the rows' own slots, `sequences` the rows cut into sequences. A row's share does not depend
    /// on its company; neither do sums of rows that come in several calls. Panics where shapes do not fit.
    #[track_caller]
    pub fn weigh(&self, q: MatRef<'_>, slots: &[usize], sequences: &mut [(Range<usize>, KvView<'_>, &mut Mass)]) {
        assert_eq!(q.rows(), slots.len(), "a slot for each row");
        let (mut jobs, mut cost) = (Vec::new(), 0);
        for (rows, kv, mass) in sequences {
            assert_eq!(mass.heads.len(), kv.pool.layout().kv_heads, "a sum for each key head");
            cost += rows.len() * self.heads * kv.pool.layout().head_dim * kv.tokens;
            let certain = mass.certain;
            for (head, mass) in mass.heads.iter_mut().enumerate() {
                jobs.push(Mutex::new(Job { rows: rows.clone(), kv, head, certain, mass }));
            }
        }
        parallel::ranges(jobs.len(), 1, 1, cost / jobs.len().max(1), |from, to| {
            for job in &jobs[from..to] {
                // Nobody else meets it.
                self.weigh_head(q, slots, &mut job.lock().unwrap_or_else(|e| e.into_inner()));
            }
        });
    }

    fn weigh_head(&self, q: MatRef<'_>, slots: &[usize], job: &mut Job<'_>) {
        let layout = job.kv.pool.layout();
        let (dim, group) = (layout.head_dim, self.heads / layout.kv_heads);
        let mut keys = vec![0.0; dim * KEY_BLOCK];
        let (mut scores, mut given) = (Vec::new(), Vec::new());
        for from in job.rows.clone().step_by(ROWS) {
            let rows = from..(from + ROWS).min(job.rows.end);
            let blocks = rows.clone().map(|r| slots[r] / KEY_BLOCK + 1).max().unwrap_or(0);
            let stride = blocks * KEY_BLOCK;
            scores.resize(rows.len() * group * stride, 0.0);
            for block in 0..blocks {
                let at = block * KEY_BLOCK;
                job.kv.page_of(at).keys_into(job.head, at % layout.page_tokens / KEY_BLOCK, &mut keys);
                for (i, scores) in scores.chunks_exact_mut(stride).enumerate() {
                    let head = (job.head * group + i % group) * dim;
                    let q = &q.row(rows.start + i / group)[head..head + dim];
                    let mut sums = [0.0f32; KEY_BLOCK];
                    for (q, keys) in q.iter().zip(keys.chunks_exact(KEY_BLOCK)) {
                        sums.iter_mut().zip(keys).for_each(|(s, k)| *s += q * k);
                    }
                    scores[at..at + KEY_BLOCK].copy_from_slice(&sums);
                }
            }
            for (r, scores) in rows.zip(scores.chunks_exact_mut(group * stride)) {
                let high = slots[r];
                let low = self.window.map_or(0, |w| (high + 1).saturating_sub(w));
                given.clear();
                given.resize(high + 1, 0.0f32);
                for scores in scores.chunks_exact_mut(stride) {
                    let seen = &mut scores[low..=high];
                    for s in seen.iter_mut() {
                        *s *= self.scale;
                        *s = self.softcap.map_or(*s, |c| c * (*s / c).tanh());
                    }
                    softmax(seen);
                    given[low..].iter_mut().zip(seen).for_each(|(g, s)| *g += *s);
                }
                job.mass.take(high, job.certain, &given);
            }
        }
    }
}

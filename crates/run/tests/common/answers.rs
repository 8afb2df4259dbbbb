//! Texts under run plans, and all that is told of their answers.

use std::collections::BTreeMap;

use lacuna_base::Rng;
use lacuna_run::{Event, Generation, Job, Request, RunPlan, Sampling, Scheduler, Stop};

pub fn plan(flags: &[(&str, &str)]) -> RunPlan {
    let mut plan = RunPlan::none();
    for (question, said) in flags {
        plan.flag(question, said, &lacuna_methods::registry()).unwrap();
    }
    plan
}

#[derive(Clone, Default, Debug, PartialEq)]
pub struct Answer {
    pub ids: Vec<u32>,
    pub stop: Option<Stop>,
    pub probabilities: Vec<(u32, f32)>,
}

pub fn drain(s: &mut Scheduler) -> BTreeMap<u64, Answer> {
    let mut answers: BTreeMap<u64, Answer> = BTreeMap::new();
    for _ in 0..20_000 {
        if s.is_idle() {
            return answers;
        }
        s.step(&mut |id, event| {
            let a = answers.entry(id).or_default();
            match event {
                Event::Text { tokens, .. } => {
                    a.probabilities.extend(tokens.iter().filter_map(|t| Some((t.id, t.probability.as_ref()?.logprob))));
                }
                Event::Finished(f) => (a.ids, a.stop) = (f.ids, Some(f.stop)),
                other => panic!("text {id}: {other:?}"),
            }
        });
    }
    panic!("the scheduler does not come to an end: {:?}", s.gauges());
}

/// Texts that share beginnings, greedy and drawn.
pub fn requests(n: usize, seed: u64) -> Vec<Generation> {
    let mut rng = Rng::new(seed);
    let room = 240;
    let root: Vec<u32> = (0..room).map(|_| 3 + rng.below(90) as u32).collect();
    (0..n)
        .map(|i| {
            let mut prompt = root[..room / 3 + rng.below(room - room / 3)].to_vec();
            prompt.extend((0..1 + rng.below(20)).map(|_| 3 + rng.below(90) as u32));
            let drawn = Sampling { temperature: 1.0, top_p: 0.95, seed: i as u64, ..Sampling::default() };
            let sampling = if i % 3 == 0 { drawn } else { Sampling::default() };
            let max_tokens = 30 + rng.below(90);
            Generation { prompt, max_tokens, sampling, ignore_end: true, ..Generation::default() }
        })
        .collect()
}

pub fn ask(g: &Generation) -> Request {
    let job = Job::Generate { generation: g.clone(), logprobs: Some(2), grammar: None, special: false };
    Request::new(g.prompt.clone(), job)
}

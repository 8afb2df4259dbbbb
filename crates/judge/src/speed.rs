//! The clock: decode speeds over alternating runs, and this machine's memory bandwidth.

use std::hint::black_box;
use std::time::Instant;

use lacuna_format::Weights;
use lacuna_kernels::{Activations, KvFormat};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{BenchOptions, Engine, RunError};
use rayon::prelude::*;

use crate::gate::Speed;

/// Decode speeds of several models, measured in turn: one run of each, `rounds` times over, after one that does not count. Alternating keeps a
/// machine that drifts from favouring one of them. Every model is held in memory meanwhile.
pub fn time_decode(
    models: &[&dyn Weights],
    rounds: usize,
    tokens: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Option<Speed>>, RunError> {
    let engines: Vec<Engine> = models
        .iter()
        .map(|w| {
            // As `generate` runs them.
            let options = LoadOptions { activations: Activations::Int8, ..LoadOptions::default() };
            Ok(Engine::new(Decoder::load(*w, &options)?).with_kv(KvFormat::F16))
        })
        .collect::<Result<_, RunError>>()?;
    let options = BenchOptions { prompt_tokens: 0, gen_tokens: tokens, depth: 0, reps: 1, seed: 0 };
    let mut runs = vec![Vec::new(); engines.len()];
    for round in 0..=rounds {
        for (engine, runs) in engines.iter().zip(&mut runs) {
            let b = engine.bench(&options, &mut |_, _| {})?;
            if round > 0 {
                runs.extend(b.decode_tok_s);
            }
        }
        progress(round);
    }
    Ok(runs.iter().map(|r| Speed::of(r)).collect())
}

/// The best of five read-only streams over `bytes` of memory with all threads, in bytes a second.
pub fn bandwidth(bytes: usize) -> f64 {
    let words = vec![1u64; (bytes / 8).max(1)];
    let chunk = words.len().div_ceil(rayon::current_num_threads().max(1));
    let mut best = 0.0f64;
    for _ in 0..5 {
        let start = Instant::now();
        let sum: u64 = words
            .par_chunks(chunk)
            .map(|c| {
                // Eight sums in flight, so that the loop waits for memory and not for additions.
                let mut s = [0u64; 8];
                for w in c.chunks_exact(8) {
                    for (s, w) in s.iter_mut().zip(w) {
                        *s = s.wrapping_add(*w);
                    }
                }
                s.iter().fold(0u64, |a, b| a.wrapping_add(*b))
            })
            .reduce(|| 0, u64::wrapping_add);
        black_box(sum);
        best = best.max((words.len() * 8) as f64 / start.elapsed().as_secs_f64());
    }
    best
}

//! The clock: decode speeds over alternating runs.

use lacuna_format::Weights;
use lacuna_kernels::{Activations, KvFormat};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{BenchOptions, Engine, RunError};

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
    let options = BenchOptions { prompt_tokens: 0, gen_tokens: tokens, depth: 0, reps: 1, ..BenchOptions::default() };
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

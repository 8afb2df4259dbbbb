//! The clock: decode speeds over alternating runs.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::Mat;
use lacuna_format::{Group, Integers, PatternKind, ScaleCodec, Stored, Weights, pack_integers};
use lacuna_kernels::{Activations, KvFormat, Linear, Packing};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{BenchOptions, Engine, RunError};

use crate::gate::Speed;

/// Rows and columns of the matrices that tell the pace, and how many there are: together they are beyond a cache.
const SIDE: usize = 1024;
const COUNT: usize = 112;
/// Bytes that timing takes in memory beside the models: 4 bits a weight, and a scale of 16 for 32 of them.
pub const TIMING_BYTES: u64 = (COUNT * SIDE * SIDE * 9 / 16) as u64;
/// Tokens of a run between two readings of the pace, at the most: it changes within a tenth of a second.
const STRETCH: usize = 4;

/// What tells how fast the machine is at a moment: plain 4-bit matrices, multiplied one after the other from memory. Where others use memory and
/// caches too, speeds change by half within a minute, and those of models with this one, far more closely than with that of a mere reading.
pub(crate) struct Pace(Vec<Linear>);

impl Pace {
    pub(crate) fn new() -> Pace {
        let q = Integers {
            rows: SIDE,
            cols: SIDE,
            bits: 4,
            codes: (0..SIDE * SIDE).map(|i| (i * 7 % 16) as u8).collect(),
            scales: Mat::from_fn(SIDE, SIDE / 32, |_, _| 0.01),
            zeros: None,
            group: Group::Run(32),
        };
        let piece = pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).expect("a matrix of our own");
        let stored = Stored::from_piece(piece);
        let packing = Packing { activations: Activations::Int8, ..Packing::default() };
        let packed = || Linear::pack_with(&stored, &packing).expect("a matrix of our own");
        Pace((0..COUNT).map(|_| packed()).collect())
    }

    /// Bytes of weights read a second at this moment.
    pub(crate) fn take(&self) -> f64 {
        let x = Mat::from_fn(1, SIDE, |_, c| (c * 17 % 101) as f32 / 50.0 - 1.0);
        let mut out = Mat::zeros(1, SIDE);
        let start = Instant::now();
        self.0.iter().for_each(|l| l.forward(black_box(x.view()), out.view_mut()));
        self.0.iter().map(Linear::weights_bytes).sum::<u64>() as f64 / start.elapsed().as_secs_f64()
    }
}

/// Decode speeds of several models, measured in turn: one run of each, `rounds` times over, after one that does not count. Alternating keeps a
/// machine that drifts from favouring one of them, and the pace is read all through each run. Every model is held in memory meanwhile.
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
    let context = engines.iter().map(Engine::context).min().unwrap_or(0);
    let stretches = tokens.div_ceil(STRETCH).max(1);
    let options = BenchOptions {
        prompt_tokens: 0,
        gen_tokens: tokens.div_ceil(stretches).min(context.saturating_sub(1)),
        depth: 0,
        reps: stretches,
        ..BenchOptions::default()
    };
    let pace = Pace::new();
    let mut runs = vec![(Vec::new(), Vec::new()); engines.len()];
    for round in 0..=rounds {
        for (engine, (runs, paces)) in engines.iter().zip(&mut runs) {
            let mut read = Vec::new();
            let b = engine.bench(&options, &mut |_, _| read.push(pace.take()))?;
            if round > 0 {
                paces.extend(harmonic(&read));
                runs.extend(harmonic(&b.decode_all_tok_s));
            }
        }
        progress(round);
    }
    Ok(runs.iter().map(|(runs, paces)| Speed::of(runs, paces)).collect())
}

/// The speed over several stretches of the same length; none of none.
fn harmonic(speeds: &[f64]) -> Option<f64> {
    let seconds: f64 = speeds.iter().map(|s| 1.0 / s).sum();
    (seconds > 0.0).then(|| speeds.len() as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timing_takes_what_it_says() {
        let pace = Pace::new();
        assert_eq!(pace.0.iter().map(Linear::weights_bytes).sum::<u64>(), TIMING_BYTES);
        assert!(pace.take() > 0.0);
    }

    #[test]
    fn a_slow_stretch_weighs_as_long_as_it_lasts() {
        assert_eq!(harmonic(&[1.0, 3.0]), Some(1.5));
        assert_eq!(harmonic(&[]), None);
    }
}

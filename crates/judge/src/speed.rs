//! The clock: decode speeds over alternating runs.

use std::hint::black_box;
use std::time::Instant;

use lacuna_base::Mat;
use lacuna_format::{Group, Integers, PatternKind, ScaleCodec, Stored, Weights, pack_integers};
use lacuna_kernels::{Activations, KvFormat, Linear, Packing};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{BenchOptions, Engine, RunError};

use crate::footprint::Footprint;
use crate::gate::Speed;

/// Rows and columns of the matrices that tell the pace.
const SIDE: usize = 1024;
/// Bytes of one of them: 4 bits a weight, and a scale of 16 for 32 of them.
const ONE: u64 = (SIDE * SIDE * 9 / 16) as u64;
/// Bytes read at least for one reading of the pace.
const READING: u64 = 8 << 20;
/// Tokens of a run between two readings of the pace, at the most: it changes within a tenth of a second.
const STRETCH: usize = 4;

/// What tells how fast the machine is at a moment: plain 4-bit matrices, multiplied one after the other, as many bytes of them as a model's
/// footprint. Where others use memory and caches too, speeds change by half within a minute, and those of models with this one, far more closely
/// than with that of a mere reading.
pub(crate) struct Pace {
    matrices: Vec<Linear>,
    passes: usize,
}

impl Pace {
    pub(crate) fn new(footprint: Footprint) -> Pace {
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
        Pace { matrices: (0..Pace::count(footprint)).map(|_| packed()).collect(), passes: footprint.passes() }
    }

    fn count(footprint: Footprint) -> u64 {
        footprint.bytes().div_ceil(ONE)
    }

    /// Bytes that it holds.
    fn bytes(footprint: Footprint) -> u64 {
        ONE * Pace::count(footprint)
    }

    /// Bytes of weights read a second at this moment.
    pub(crate) fn take(&self) -> f64 {
        let x = Mat::from_fn(1, SIDE, |_, c| (c * 17 % 101) as f32 / 50.0 - 1.0);
        let mut out = Mat::zeros(1, SIDE);
        let bytes: u64 = self.matrices.iter().map(Linear::weights_bytes).sum();
        let mut pass = || self.matrices.iter().for_each(|l| l.forward(black_box(x.view()), out.view_mut()));
        // Until they lie where they will lie, then as often as a clock needs.
        (1..self.passes).for_each(|_| pass());
        let times = READING.div_ceil(bytes);
        let start = Instant::now();
        (0..times).for_each(|_| pass());
        (times * bytes) as f64 / start.elapsed().as_secs_f64()
    }
}

/// Bytes that timing a model whose tokens read `footprint` takes in memory beside it.
pub fn timing_bytes(footprint: Footprint) -> u64 {
    Pace::bytes(footprint)
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
    let stretches = tokens.div_ceil(STRETCH).max(1);
    let options = BenchOptions {
        prompt_tokens: 0,
        gen_tokens: tokens.div_ceil(stretches),
        depth: 0,
        reps: stretches,
        ..BenchOptions::default()
    };
    let footprints: Vec<Footprint> = engines.iter().map(|e| Footprint::of(e.model().footprint_bytes())).collect();
    let mut paces: Vec<(Footprint, Pace)> = Vec::new();
    for &f in &footprints {
        if paces.iter().all(|p| p.0 != f) {
            paces.push((f, Pace::new(f)));
        }
    }
    let mut runs = vec![(Vec::new(), Vec::new()); engines.len()];
    for round in 0..=rounds {
        for ((engine, footprint), (runs, at)) in engines.iter().zip(&footprints).zip(&mut runs) {
            let pace = &paces.iter().find(|p| p.0 == *footprint).expect("one for each").1;
            let mut read = Vec::new();
            let b = engine.bench(&options, &mut |_, _| read.push(pace.take()))?;
            if round > 0 {
                at.extend(harmonic(&read));
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
        for footprint in [1, 3 << 20, 1 << 30].map(Footprint::of) {
            let pace = Pace::new(footprint);
            let bytes = pace.matrices.iter().map(Linear::weights_bytes).sum::<u64>();
            assert_eq!(bytes, Pace::bytes(footprint));
            assert!(bytes >= footprint.bytes() && bytes < footprint.bytes() + ONE);
            assert!(pace.take() > 0.0);
        }
    }

    #[test]
    fn a_slow_stretch_weighs_as_long_as_it_lasts() {
        assert_eq!(harmonic(&[1.0, 3.0]), Some(1.5));
        assert_eq!(harmonic(&[]), None);
    }
}

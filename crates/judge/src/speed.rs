//! The clock: decode speeds over alternating runs.

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use lacuna_base::Mat;
use lacuna_format::{Group, Integers, PatternKind, ScaleCodec, Stored, Weights, pack_integers};
use lacuna_kernels::{Activations, KvFormat, Linear, Packing};
use lacuna_model::{Decoder, LoadOptions};
use lacuna_run::{BenchOptions, Engine, RunError, bench};

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

/// What tells how fast the machine is at a moment: plain 4-bit matrices, multiplied one after the other, as many bytes
/// of them as a model's footprint. Where others use memory and caches too, speeds change by half within a minute, and
/// those of models with this one, far more closely than with that of a mere reading.
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
            offsets: None,
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

/// Bytes that timing models of so many bytes takes in memory beside them: what tells the pace at each of their
/// footprints.
fn timing_bytes(stored: &[u64]) -> u64 {
    let mut footprints: Vec<Footprint> = Vec::new();
    for f in stored.iter().map(|&bytes| Footprint::of(bytes)) {
        if !footprints.contains(&f) {
            footprints.push(f);
        }
    }
    footprints.into_iter().map(Pace::bytes).sum()
}

/// How models that are timed against each other share memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// All are held from the first run to the last: runs alternate closely, which is the better measurement.
    Together,
    /// One at a time: for each of its runs a model is loaded, run once for nothing, timed, and dropped.
    InTurn,
}

impl Hold {
    /// How models of `stored` bytes go into `room` bytes of memory (without a number: all together), where `used` are
    /// taken. Where not even the largest alone does, the bytes that it would take.
    pub fn within(room: Option<u64>, used: u64, stored: &[u64]) -> Result<Hold, u64> {
        // A model is there twice for a moment, mapped and repacked, block by block; a quarter covers padding and the
        // block.
        let timing = timing_bytes(stored);
        let need = |bytes: u64| used.saturating_add(timing).saturating_add(bytes.saturating_add(bytes / 4));
        let all = need(stored.iter().fold(0, |a, b| a.saturating_add(*b)));
        let largest = need(stored.iter().copied().max().unwrap_or(0));
        match room {
            Some(room) if largest > room => Err(largest),
            Some(room) if all > room => Ok(Hold::InTurn),
            _ => Ok(Hold::Together),
        }
    }
}

/// Decode speeds of several models, medians of `rounds` runs of each: a round is one run of every model in turn, and
/// each has a run before that does not count. Alternating keeps a machine that drifts from favouring one of them, and
/// the pace is read all through each run. In memory are all models, or the one that runs and no other, as `hold` says;
/// the latter loads each anew for each of its runs.
pub fn time_decode(
    models: &[&dyn Weights],
    rounds: usize,
    tokens: usize,
    hold: Hold,
    progress: impl FnMut(usize),
) -> Result<Vec<Option<Speed>>, RunError> {
    let load = |at: usize| {
        // As `generate` runs them.
        let options = LoadOptions { activations: Activations::Int8, ..LoadOptions::default() };
        Ok(Arc::new(Engine::new(Decoder::load(models[at], &options)?).with_kv(KvFormat::F16)))
    };
    let stretches = tokens.div_ceil(STRETCH).max(1);
    let options = BenchOptions {
        prompt_tokens: 0,
        gen_tokens: tokens.div_ceil(stretches),
        depth: 0,
        reps: stretches,
        ..BenchOptions::default()
    };
    let paces: RefCell<Vec<(Footprint, Pace)>> = RefCell::default();
    let run = |engine: &Arc<Engine>| -> Result<_, RunError> {
        let footprint = Footprint::of(engine.model().footprint_bytes());
        let mut paces = paces.borrow_mut();
        let known = paces.iter().position(|p| p.0 == footprint);
        let at = known.unwrap_or_else(|| {
            paces.push((footprint, Pace::new(footprint)));
            paces.len() - 1
        });
        let pace = &paces[at].1;
        let mut read = Vec::new();
        let gen_tokens = options.gen_tokens.min(engine.context().saturating_sub(1));
        let options = BenchOptions { gen_tokens, ..options.clone() };
        let b = bench(Arc::clone(engine), &options, &mut |_, _| read.push(pace.take()))?;
        Ok((harmonic(&b.decode_all_tok_s), harmonic(&read)))
    };
    let runs = alternate(models.len(), rounds, hold, load, run, progress)?;
    Ok(runs
        .into_iter()
        .map(|runs| {
            let (runs, paces): (Vec<_>, Vec<_>) = runs.into_iter().unzip();
            let some = |list: Vec<Option<f64>>| list.into_iter().flatten().collect::<Vec<f64>>();
            Speed::of(&some(runs), &some(paces))
        })
        .collect())
}

/// `rounds` runs of each of `n` things, in turn.
fn alternate<M, T, E>(
    n: usize,
    rounds: usize,
    hold: Hold,
    load: impl Fn(usize) -> Result<M, E>,
    run: impl Fn(&M) -> Result<T, E>,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<T>>, E> {
    // The first run after loading does not count.
    let warm = |at: usize| -> Result<M, E> {
        let m = load(at)?;
        run(&m)?;
        Ok(m)
    };
    let held: Vec<M> = match hold {
        Hold::Together => {
            let held = (0..n).map(&load).collect::<Result<Vec<M>, E>>()?;
            held.iter().try_for_each(|m| run(m).map(drop))?;
            held
        }
        Hold::InTurn => Vec::new(),
    };
    let mut runs: Vec<Vec<T>> = (0..n).map(|_| Vec::with_capacity(rounds)).collect();
    for round in 0..rounds {
        for (at, runs) in runs.iter_mut().enumerate() {
            runs.push(match held.get(at) {
                Some(m) => run(m)?,
                None => run(&warm(at)?)?,
            });
        }
        progress(round + 1);
    }
    Ok(runs)
}

/// The speed over several stretches of the same length; none of none.
fn harmonic(speeds: &[f64]) -> Option<f64> {
    let seconds: f64 = speeds.iter().map(|s| 1.0 / s).sum();
    (seconds > 0.0).then(|| speeds.len() as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

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

    /// A model that counts how many of its kind are loaded.
    struct Loaded<'a>(usize, &'a Cell<usize>);

    impl Drop for Loaded<'_> {
        fn drop(&mut self) {
            self.1.set(self.1.get() - 1);
        }
    }

    #[test]
    fn models_take_turns_and_those_in_turn_alone() {
        for (hold, most) in [(Hold::Together, 3), (Hold::InTurn, 1)] {
            let (now, peak, ran) = (Cell::new(0), Cell::new(0), RefCell::new(Vec::new()));
            let load = |at| {
                now.set(now.get() + 1);
                peak.set(peak.get().max(now.get()));
                Ok::<_, ()>(Loaded(at, &now))
            };
            let run = |m: &Loaded<'_>| {
                ran.borrow_mut().push(m.0);
                Ok(ran.borrow().len())
            };
            let runs = alternate(3, 5, hold, load, run, |_| ()).unwrap();
            assert_eq!((peak.get(), now.get()), (most, 0), "{hold:?}");
            assert!(runs.iter().all(|r| r.len() == 5), "{hold:?}: {runs:?}");
            let counted = |at: usize| runs[at].iter().map(move |run| (*run, at));
            let mut order: Vec<(usize, usize)> = (0..3).flat_map(counted).collect();
            order.sort_unstable();
            assert_eq!(order.iter().map(|o| o.1).collect::<Vec<_>>(), [0, 1, 2].repeat(5), "{hold:?}");
            // Of each model the first run after it was loaded is none of those that count.
            assert!(order.iter().all(|(run, at)| ran.borrow()[..run - 1].contains(at)), "{hold:?}");
        }
    }

    #[test]
    fn both_ways_time_every_model() {
        let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama");
        let model = lacuna_checkpoint::open(&tiny).unwrap();
        let models: [&dyn Weights; 2] = [&model, &model];
        for hold in [Hold::Together, Hold::InTurn] {
            let mut rounds = Vec::new();
            let speeds = time_decode(&models, 2, 2, hold, |round| rounds.push(round)).unwrap();
            assert_eq!(rounds, [1, 2]);
            assert!(speeds.len() == 2 && speeds.iter().all(|s| s.is_some_and(|s| s.median > 0.0 && s.pace > 0.0)));
        }
    }

    #[test]
    fn the_ceiling_decides_who_is_held() {
        let (used, stored) = (100 << 20, [40 << 20, 100 << 20, 60 << 20]);
        let timing = timing_bytes(&stored);
        let (largest, all) = (used + timing + (125 << 20), used + timing + (250 << 20));
        assert_eq!(Hold::within(None, used, &stored), Ok(Hold::Together));
        assert_eq!(Hold::within(Some(all), used, &stored), Ok(Hold::Together));
        assert_eq!(Hold::within(Some(all - 1), used, &stored), Ok(Hold::InTurn));
        assert_eq!(Hold::within(Some(largest), used, &stored), Ok(Hold::InTurn));
        assert_eq!(Hold::within(Some(largest - 1), used, &stored), Err(largest));
        assert!(Hold::within(Some(1), used, &[u64::MAX, u64::MAX]).is_err());
    }

    #[test]
    fn a_slow_stretch_weighs_as_long_as_it_lasts() {
        assert_eq!(harmonic(&[1.0, 3.0]), Some(1.5));
        assert_eq!(harmonic(&[]), None);
    }
}

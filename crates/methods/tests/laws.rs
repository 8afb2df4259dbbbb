//! The laws that every method keeps, over the registry: a new method is held to them by being listed.

use std::collections::HashSet;

use lacuna_base::testkit::{max_abs_diff, random};
use lacuna_base::{Gram, Mat, Mat64, dense, factor};
use lacuna_contract::{
    Ability, Ask, Factor, Gathered, Grid, GridAsk, Made, Making, PruneAsk, RoundAsk, Score, ShortlistAsk, Solve,
    SolveAsk, Solved, Sparsity, Spectrum, Stats, StructureAsk, Transform, Unit, Vocabulary,
};
use lacuna_format::{Float, Map, Mask, PatternKind, ScaleCodec, Unpacked, pack_integers};
use lacuna_methods::registry;

/// Statistics of correlated inputs; input 1 is zero in every token.
struct Inputs {
    x: Mat,
    gram: Gram,
    found: Vec<(Ask, Gathered)>,
    gradients: Vec<(Ask, Gathered)>,
}

impl Inputs {
    fn new(n: usize, tokens: usize, seed: u64) -> Inputs {
        let (own, shared) = (random(tokens, n, seed), random(tokens, 2, seed + 1));
        let x = Mat::from_fn(tokens, n, |t, c| match c {
            1 => 0.0,
            _ => own[(t, c)] + shared[(t, c % 2)] * (1.0 + (c % 5) as f32),
        });
        Inputs::of(&x)
    }

    /// Of these rows.
    fn of(x: &Mat) -> Inputs {
        let mut gram = Gram::new(x.cols());
        gram.add(x.view());
        let tokens = x.rows() as f64;
        let column = |c: usize| (0..x.rows()).map(move |t| f64::from(x[(t, c)]));
        let mean: Vec<f64> = (0..x.cols()).map(|c| column(c).sum::<f64>() / tokens).collect();
        let around = |c: usize| column(c).map(|v| (v - mean[c]).powi(2)).sum::<f64>() / tokens;
        let variance = (0..x.cols()).map(around).collect();
        let found = vec![
            (Ask::InputGram, Gathered::Gram(gram.clone())),
            (Ask::InputSquares, Gathered::Vector(gram.diag())),
            (Ask::InputMagnitudes, Gathered::Vector((0..x.cols()).map(|c| column(c).map(f64::abs).sum()).collect())),
            (Ask::InputMoments, Gathered::Moments { mean, variance }),
        ];
        Inputs { x: x.clone(), gram, found, gradients: Vec::new() }
    }

    /// With gradients of a matrix of `rows` outputs.
    fn with_gradients(mut self, rows: usize, seed: u64) -> Inputs {
        let g = random(rows, self.gram.n(), seed);
        let of = |f: fn(f32) -> f32| Mat::from_fn(g.rows(), g.cols(), |r, c| f(g[(r, c)]));
        self.gradients = vec![
            (Ask::GradientAbsolute, Gathered::Matrix(of(f32::abs))),
            (Ask::GradientSquares, Gathered::Matrix(of(|x| x * x))),
            (Ask::GradientMean, Gathered::Matrix(of(|x| x))),
            (Ask::GradientRowGram, Gathered::Matrix(dense::matmul_nt(g.view(), g.view()))),
            (Ask::GradientColumnGram, Gathered::Matrix(dense::matmul_tn(g.view(), g.view()))),
            (Ask::OutputGradientGram, Gathered::Matrix(dense::matmul_nt(g.view(), g.view()))),
            // A token a sequence, and an output's gradient of 1: then the Fisher matrix of a row is that of the inputs.
            (
                Ask::SequenceGradients,
                Gathered::Matrix(Mat::from_fn(self.x.rows() * rows, self.x.cols(), |i, c| self.x[(i / rows, c)])),
            ),
        ];
        self
    }

    fn stats(&self) -> Stats<'_> {
        Stats { tokens: self.gram.tokens(), found: &self.found, gradients: &self.gradients, sequences: 3, worked: None }
    }
}

/// `tr(ΔW H ΔWᵀ)`: the change of the outputs on the calibration tokens.
fn output_error(old: &Mat, new: &Mat, inputs: &Inputs) -> f64 {
    let delta = Mat64::from_fn(old.rows(), old.cols(), |r, c| f64::from(old[(r, c)]) - f64::from(new[(r, c)]));
    let moved = dense::matmul_nn_f64(&delta, &inputs.gram.mean());
    moved.data().iter().zip(delta.data()).map(|(a, b)| a * b).sum()
}

/// The registry's answers to one question, made with default parameters.
macro_rules! each {
    ($variant:ident) => {
        registry().methods.into_iter().filter_map(|m| {
            match (m.make)(serde_json::Value::Null).expect("made from nothing") {
                Made::$variant(made) => Some((m.card.name, made)),
                _ => None,
            }
        })
    };
}

fn solves() -> Vec<(&'static str, Box<dyn Solve>)> {
    each!(Solve).collect()
}

fn grid() -> Box<dyn Grid> {
    each!(Grid).next().expect("a grid").1
}

/// The new weights with those that stand aside.
fn whole(solved: &Solved) -> Mat {
    let mut w = solved.w.clone();
    for piece in &solved.aside {
        w.data_mut().iter_mut().zip(piece.w.data()).for_each(|(a, b)| *a += b);
    }
    w
}

/// A matrix with ties, a row of zeros and a column of zeros where there is room.
fn weights(rows: usize, cols: usize, seed: u64) -> Mat {
    let mut w = random(rows, cols, seed);
    if rows > 2 {
        w.row_mut(1).fill(0.5);
        w.row_mut(2).fill(0.0);
    }
    if cols > 3 {
        (0..rows).for_each(|r| w[(r, 3)] = 0.0);
    }
    w
}

const SHAPES: [(usize, usize); 6] = [(1, 1), (5, 1), (1, 24), (7, 48), (40, 200), (16, 260)];

fn unstructured(sparsity: f64) -> Option<PruneAsk> {
    Some(PruneAsk { sparsity, pattern: Sparsity::Unstructured })
}

/// Whether a solver can be asked for something; what its card says and what it does must be the same.
fn can(solve: &dyn Solve, what: Ability) -> bool {
    let (w, inputs, grid) = (random(4, 8, 1), Inputs::new(8, 30, 2).with_gradients(4, 3), grid());
    let ask = GridAsk { bits: 4, symmetric: false, scale: Float::F32 };
    let round = Some(RoundAsk { ask, grid: grid.as_ref(), group: 4 });
    let prune = |pattern| Some(PruneAsk { sparsity: 0.5, pattern });
    let (prune, round) = match what {
        Ability::Unstructured => (unstructured(0.5), None),
        Ability::Nm => (prune(Sparsity::Nm { n: 2, m: 4 }), None),
        Ability::Blocks => (prune(Sparsity::Block { height: 2, width: 2 }), None),
        Ability::PruneAndRound => (unstructured(0.5), round),
        _ => (None, round),
    };
    solve.solve(&SolveAsk { w: w.view(), stats: &inputs.stats(), mask: None, prune, round }).is_ok()
}

fn prunes(solve: &dyn Solve) -> bool {
    can(solve, Ability::Unstructured)
}

#[test]
fn cards_say_what_can_be_asked_together() {
    for m in registry().methods {
        let Made::Solve(solve) = (m.make)(serde_json::Value::Null).expect("made") else { continue };
        for what in [Ability::Unstructured, Ability::Nm, Ability::Blocks, Ability::Round, Ability::PruneAndRound] {
            assert_eq!(m.card.can(what), can(solve.as_ref(), what), "{} {what:?}", m.card.name);
        }
    }
}

#[test]
fn families_tell_their_keys_from_their_methods_keys() {
    let registry = registry();
    for m in &registry.methods {
        let family = registry.family(m.card.verb).expect("a family");
        let shared = (family.keys)();
        assert!(
            (m.keys)().iter().all(|k| !shared.contains(k)),
            "{}: a key of its own that {} has",
            m.card.name,
            family.verb
        );
        let mut keys = serde_json::Map::new();
        keys.insert("no_such_key".into(), serde_json::json!(1));
        let making = Making { method: m, keys: &keys, registry: &registry };
        let refused = (family.make)(&making).expect_err("refused").what;
        assert!(refused.contains("no_such_key"), "{refused}");
        for key in shared {
            let near = format!("{key}x");
            let keys = [(near.clone(), serde_json::json!(1))].into_iter().collect();
            let refused =
                (family.make)(&Making { method: m, keys: &keys, registry: &registry }).expect_err("refused").what;
            assert!(refused.contains(&near) && refused.contains("did you mean"), "{refused}");
        }
    }
}

fn pruners() -> Vec<(&'static str, Box<dyn Solve>)> {
    solves().into_iter().filter(|(_, solve)| prunes(solve.as_ref())).collect()
}

fn rounders() -> Vec<(&'static str, Box<dyn Solve>)> {
    solves().into_iter().filter(|(_, solve)| can(solve.as_ref(), Ability::Round)).collect()
}

/// Everything a solver can do at once: rounding where it rounds, and pruning where it prunes.
fn everything(solve: &dyn Solve, w: &Mat, inputs: &Inputs, ask: GridAsk, group: usize) -> Solved {
    let grid = grid();
    let round = can(solve, Ability::Round).then_some(RoundAsk { ask, grid: grid.as_ref(), group });
    let prune = if prunes(solve) { unstructured(0.4) } else { None };
    let ask = SolveAsk { w: w.view(), stats: &inputs.stats(), mask: None, prune, round };
    solve.solve(&ask).expect("solves")
}

#[test]
fn names_are_unique_and_unknown_keys_are_refused() {
    let mut names = HashSet::new();
    for m in registry().methods {
        let name = m.card.name;
        assert!(names.insert(name), "{name} twice");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'), "{name}");
        assert!(!m.card.summary.is_empty(), "{name}");
        assert!(registry().family(m.card.verb).is_some(), "{name} is of no family");
        let refused = (m.make)(serde_json::json!({ "no_such_key": 1 })).expect_err("refused").what;
        assert!(refused.contains("no_such_key") && refused.contains(name), "{refused}");
    }
}

#[test]
fn scores_are_finite_repeatable_and_larger_for_larger_weights() {
    for (name, score) in each!(Score) {
        let score: Box<dyn Score> = score;
        for (rows, cols) in SHAPES {
            let (w, inputs) = (weights(rows, cols, 3), Inputs::new(cols, 50, 4).with_gradients(rows, 5));
            let s = score.score(w.view(), &inputs.stats()).expect("scores");
            assert_eq!((s.rows(), s.cols()), (rows, cols), "{name}");
            assert!(s.data().iter().all(|v| v.is_finite() && *v >= 0.0), "{name}");
            assert_eq!(score.score(w.view(), &inputs.stats()), Ok(s.clone()), "{name}");
            let twice = Mat::from_fn(rows, cols, |r, c| -2.0 * w[(r, c)]);
            let larger = score.score(twice.view(), &inputs.stats()).expect("scores");
            assert!(larger.data().iter().zip(s.data()).all(|(a, b)| a >= b), "{name}");
        }
        let bad = Mat::from_vec(1, 2, vec![f32::INFINITY, 1.0]);
        assert!(score.score(bad.view(), &Inputs::new(2, 5, 1).stats()).is_err(), "{name}");
    }
}

#[test]
fn units_have_a_finite_score_each_and_the_same_again() {
    for m in registry().methods.iter().filter(|m| m.card.verb == "structure") {
        let name = m.card.name;
        let Made::Structure(by) = (m.make)(serde_json::Value::Null).expect("made") else {
            panic!("{name} answers another question")
        };
        for (unit, count, width) in
            [(Unit::Channel, 24, 1), (Unit::Channel, 1, 1), (Unit::Head, 4, 6), (Unit::Head, 1, 2), (Unit::Head, 3, 1)]
        {
            let n = count * width;
            let (w, inputs) = (weights(7, n, 17), Inputs::new(n, 40, 18).with_gradients(7, 22));
            let of_writers = Inputs::new(7, 40, 23).with_gradients(n, 24);
            let (rows, heads) = (random(n, 7, 19), random(n, 7, 20));
            let writers = [rows.view(), heads.view(), heads.view()];
            let writers = if unit == Unit::Head { &writers[..] } else { &writers[..2] };
            let (reader, stats) = (Some(w.view()), inputs.stats());
            let writer_stats = &[of_writers.stats(); 3][..writers.len()];
            let ask = StructureAsk { unit, layer: 1, count, width, reader, writers, stats, writer_stats };
            let scores = by.score(&ask).unwrap_or_else(|e| panic!("{name} {unit:?}: {e}"));
            assert_eq!(scores.len(), count, "{name}");
            assert!(scores.iter().all(|s| s.is_finite()), "{name} {unit:?}: {scores:?}");
            assert_eq!(by.score(&ask).expect("again"), scores, "{name}");
            let bad = Mat::from_fn(7, n, |r, c| if (r, c) == (3, 0) { f32::NAN } else { w[(r, c)] });
            assert!(by.score(&StructureAsk { reader: Some(bad.view()), ..ask }).is_err(), "{name}");
            assert!(
                by.score(&StructureAsk { stats: Stats::default(), ..ask }).is_err() || m.card.needs.is_empty(),
                "{name}"
            );
        }
        if m.card.needs.is_empty() {
            // It draws lots.
            continue;
        }
        // Alike units score alike.
        let (even, seen) = (Mat::from_fn(5, 8, |r, _| r as f32), random(9, 1, 21));
        let x = Mat::from_fn(9, 8, |t, _| seen[(t, 0)]);
        let inputs = Inputs::of(&x);
        let stats = inputs.stats();
        let reader = Some(even.view());
        let (unit, layer, count, width) = (Unit::Channel, 0, 8, 1);
        let ask = StructureAsk { unit, layer, count, width, reader, writers: &[], stats, writer_stats: &[] };
        if let Ok(scores) = by.score(&ask) {
            assert!(scores.iter().all(|s| *s == scores[0]), "{name}: {scores:?}");
        }
    }
}

#[test]
fn the_asked_sparsity_is_met() {
    for (name, solve) in pruners() {
        for (rows, cols) in SHAPES {
            let (w, inputs) = (weights(rows, cols, 5), Inputs::new(cols, 300, 6).with_gradients(rows, 66));
            for sparsity in [0.0, 0.3, 0.5, 0.75, 1.0] {
                let prune = unstructured(sparsity);
                let ask = SolveAsk { w: w.view(), stats: &inputs.stats(), mask: None, prune, round: None };
                let solved = solve.solve(&ask).expect("solves");
                let mask = solved.mask.expect("a mask");
                let want = (sparsity * (rows * cols) as f64).round() as usize;
                assert_eq!(rows * cols - mask.kept(), want, "{name} {rows} x {cols} at {sparsity}");
                assert!((0..rows).all(|r| (0..cols).all(|c| mask.get(r, c) || solved.w[(r, c)] == 0.0)), "{name}");
            }
        }
    }
}

#[test]
fn runs_and_blocks_hold_everywhere() {
    for (name, solve) in pruners() {
        let (w, inputs) = (weights(8, 240, 7), Inputs::new(240, 300, 8).with_gradients(8, 88));
        let mask_for = |pattern| {
            let prune = Some(PruneAsk { sparsity: 0.25, pattern });
            let ask = SolveAsk { w: w.view(), stats: &inputs.stats(), mask: None, prune, round: None };
            solve.solve(&ask).expect("solves").mask.expect("a mask")
        };
        for (n, m) in [(2, 4), (4, 8), (1, 4), (2, 3), (10, 16)] {
            let mask = mask_for(Sparsity::Nm { n, m });
            for r in 0..8 {
                for run in 0..240 / m {
                    assert_eq!((run * m..(run + 1) * m).filter(|&c| mask.get(r, c)).count(), n, "{name} {n}:{m}");
                }
            }
        }
        if !can(solve.as_ref(), Ability::Blocks) {
            continue;
        }
        let mask = mask_for(Sparsity::Block { height: 2, width: 8 });
        assert_eq!(mask.kept(), 8 * 240 * 3 / 4, "{name}");
        assert!((0..8).all(|r| (0..240).all(|c| mask.get(r, c) == mask.get(r / 2 * 2, c / 8 * 8))), "{name}");
    }
}

fn earlier_mask(rows: usize, cols: usize) -> Mask {
    Mask::from_fn(rows, cols, |r, c| (r * 7 + c * 5 + r * c) % 3 != 0)
}

#[test]
fn earlier_zeros_stay() {
    for (name, solve) in solves() {
        let prunes = prunes(solve.as_ref());
        for (rows, cols) in SHAPES {
            let (w, inputs, before) =
                (weights(rows, cols, 9), Inputs::new(cols, 300, 10).with_gradients(rows, 99), earlier_mask(rows, cols));
            let grid = grid();
            let ask = GridAsk { bits: 4, symmetric: false, scale: Float::F16 };
            let round = (!prunes).then_some(RoundAsk { ask, grid: grid.as_ref(), group: 32 });
            let prune = if prunes { unstructured(0.5) } else { None };
            let ask = SolveAsk { w: w.view(), stats: &inputs.stats(), mask: Some(&before), prune, round };
            let solved = solve.solve(&ask).expect("solves");
            let w = whole(&solved);
            let after = solved.mask.expect("a mask");
            for r in 0..rows {
                for c in 0..cols {
                    assert!(before.get(r, c) || !after.get(r, c), "{name} ({r}, {c})");
                    assert!(after.get(r, c) || w[(r, c)] == 0.0, "{name} ({r}, {c})");
                }
            }
            assert!(prunes || after == before, "{name}");
        }
    }
}

#[test]
fn the_same_answer_on_any_number_of_threads() {
    let ask = GridAsk { bits: 4, symmetric: false, scale: Float::F16 };
    for (name, solve) in solves() {
        let (w, inputs) = (weights(150, 260, 11), Inputs::new(260, 400, 12).with_gradients(150, 13));
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            pool.install(|| everything(solve.as_ref(), &w, &inputs, ask, 64))
        };
        let (one, three) = (run(1), run(3));
        assert_eq!(one.w, three.w, "{name}");
        assert_eq!(whole(&one), whole(&three), "{name}");
        assert_eq!(one.mask, three.mask, "{name}");
        assert_eq!(one.integers.map(|q| q.codes), three.integers.map(|q| q.codes), "{name}");
    }
}

#[test]
fn packed_codes_decode_to_the_answer() {
    for (name, solve) in rounders() {
        for symmetric in [false, true] {
            for group in [0, 32, 48, 300] {
                let (w, inputs) = (weights(9, 140, 13), Inputs::new(140, 300, 14));
                let ask = GridAsk { bits: 4, symmetric, scale: Float::F16 };
                let solved = everything(solve.as_ref(), &w, &inputs, ask, group);
                let kind = if solved.mask.is_some() { PatternKind::Mask { height: 1 } } else { PatternKind::Dense };
                let integers = solved.integers.expect("rounded");
                let codec = solve.rounded_form(&ask).scales.unwrap_or(ScaleCodec::F16);
                let piece = pack_integers(&integers, solved.mask.as_ref(), kind, codec).expect("packs");
                assert_eq!(piece.to_mat(), solved.w, "{name} {symmetric} {group}");
            }
        }
    }
}

#[test]
fn compensation_pays_for_a_fixed_mask() {
    for (name, solve) in pruners() {
        for seed in 0..10 {
            let (w, inputs, mask) = (
                random(24, 150, seed),
                Inputs::new(150, 400, seed + 50).with_gradients(24, seed),
                earlier_mask(24, 150),
            );
            let ask = SolveAsk { w: w.view(), stats: &inputs.stats(), mask: Some(&mask), prune: None, round: None };
            let compensated = solve.solve(&ask).expect("solves").w;
            let bare = Mat::from_fn(24, 150, |r, c| if mask.get(r, c) { w[(r, c)] } else { 0.0 });
            let (with, without) = (output_error(&w, &compensated, &inputs), output_error(&w, &bare, &inputs));
            assert!(with <= without, "{name} seed {seed}: {with} {without}");
        }
    }
}

#[test]
fn rounding_that_reads_statistics_is_no_worse_than_plain_rounding() {
    let grid = grid();
    let registry = registry();
    let reads = |name: &str| !registry.method(name).expect("registered").card.needs.is_empty();
    for (name, solve) in rounders().into_iter().filter(|(name, _)| reads(name)) {
        for seed in 0..10 {
            for (symmetric, bits, group) in [(false, 4, 32), (true, 3, 150), (false, 2, 64)] {
                let (w, inputs) = (random(24, 150, seed), Inputs::new(150, 400, seed + 50));
                let ask = GridAsk { bits, symmetric, scale: Float::F32 };
                let round = Some(RoundAsk { ask, grid: grid.as_ref(), group });
                let asked = SolveAsk { w: w.view(), stats: &inputs.stats(), mask: None, prune: None, round };
                let solved = whole(&solve.solve(&asked).expect("solves"));
                let mut plain = w.clone();
                for r in 0..24 {
                    for values in plain.row_mut(r).chunks_mut(group) {
                        let fitted = grid.fit(values, &ask).expect("fits");
                        values.iter_mut().for_each(|v| *v = fitted.value(fitted.code(*v, bits)));
                    }
                }
                let (with, without) = (output_error(&w, &solved, &inputs), output_error(&w, &plain, &inputs));
                assert!(with <= without, "{name} seed {seed} {bits} bits: {with} {without}");
            }
        }
    }
}

#[test]
fn grids_keep_zero_and_err_no_more_than_plain_rounding() {
    let plain = grid();
    for (name, grid) in each!(Grid) {
        let grid: Box<dyn Grid> = grid;
        // Steps that are powers of two are wider than the values ask for.
        let coarse = name == "bfp";
        let asks = (2..=8).flat_map(|bits| {
            [(false, Float::F32), (true, Float::F32), (false, Float::F16), (true, Float::F16)]
                .map(|(symmetric, scale)| GridAsk { bits, symmetric, scale })
        });
        for ask in asks {
            for seed in 0..30u64 {
                let values = random(1, 1 + seed as usize, seed).into_vec();
                let fitted = grid.fit(&values, &ask).expect("fits");
                assert_eq!(fitted.value(fitted.code(0.0, ask.bits)), 0.0, "{name}");
                assert!(!ask.symmetric || u32::from(fitted.zero) == 1 << (ask.bits - 1), "{name}");
                let ends = [0, ((1u32 << ask.bits) - 1) as u8].map(|code| fitted.value(code));
                let (low, high) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
                for v in &values {
                    let off = (fitted.value(fitted.code(*v, ask.bits)) - v).abs();
                    // Half a step within the ends, and a little for the scale's own rounding.
                    let beyond = (low - v).max(v - high).max(0.0);
                    let bound = 0.51 * fitted.scale.abs() + beyond;
                    assert!(off <= bound, "{name}: {v} off by {off}, {fitted:?} {ask:?}");
                }
                let worth: Vec<f32> = values.iter().map(|v| v * v + 0.1).collect();
                let lost = |grid: lacuna_format::Affine, worth: &[f32]| -> f64 {
                    let off = |v: f32| f64::from(grid.value(grid.code(v, ask.bits)) - v).powi(2);
                    values.iter().zip(worth).map(|(v, h)| off(*v) * f64::from(*h)).sum()
                };
                let to = plain.fit(&values, &ask).expect("fits");
                let ones = vec![1.0; values.len()];
                assert!(coarse || lost(fitted, &ones) <= lost(to, &ones) * (1.0 + 1e-6), "{name} {ask:?}");
                let weighted = grid.fit_weighted(&values, &worth, &ask).expect("fits");
                assert_eq!(weighted.value(weighted.code(0.0, ask.bits)), 0.0, "{name}");
                assert!(coarse || lost(weighted, &worth) <= lost(to, &worth) * (1.0 + 1e-6), "{name} {ask:?}");
            }
        }
        let ask = GridAsk { bits: 4, symmetric: true, scale: Float::F16 };
        assert!(grid.fit(&[f32::NAN], &ask).is_err(), "{name}");
    }
}

#[test]
fn a_full_rank_factor_gives_the_matrix_back() {
    for (name, factor) in each!(Factor) {
        let factor: Box<dyn Factor> = factor;
        for (rows, cols) in SHAPES {
            let (w, inputs) = (weights(rows, cols, 15), Inputs::new(cols, 300, 16).with_gradients(rows, 17));
            let rank = rows.min(cols);
            let (a, b) = factor.factor(w.view(), &inputs.stats(), rank).expect("factors");
            let product = dense::matmul_nn(a.view(), b.view());
            assert!(max_abs_diff(product.view(), w.view()) < 2e-4, "{name} {rows} x {cols}");
            assert!(factor.factor(w.view(), &inputs.stats(), 0).is_err(), "{name}");
            assert!(factor.factor(w.view(), &inputs.stats(), rank + 1).is_err(), "{name}");
        }
    }
}

#[test]
fn ranks_stay_within_what_may_be_kept() {
    for (name, by) in each!(Ranks) {
        let spectra: Vec<Spectrum> = SHAPES
            .iter()
            .enumerate()
            .map(|(i, &(rows, cols))| {
                let w = Mat64::from_f32(weights(rows, cols, 20 + i as u64).view());
                Spectrum { shape: (rows, cols), values: factor::singular_values(&w).expect("values") }
            })
            .collect();
        let size =
            |s: &Spectrum, rank: &Option<usize>| rank.map_or(s.shape.0 * s.shape.1, |r| r * (s.shape.0 + s.shape.1));
        let whole: usize = spectra.iter().map(|s| size(s, &None)).sum();
        let mut last = 0;
        for keep in [0.3, 0.5, 0.8, 0.95, 1.0] {
            let ranks = by.ranks(&spectra, keep).unwrap_or_else(|e| panic!("{name} {keep}: {e}"));
            assert_eq!(ranks.len(), spectra.len(), "{name}");
            let fits = |(s, r): (&Spectrum, &Option<usize>)| r.is_none_or(|r| r >= 1 && r <= s.values.len());
            assert!(spectra.iter().zip(&ranks).all(fits), "{name}: {ranks:?}");
            let held: usize = spectra.iter().zip(&ranks).map(|(s, r)| size(s, r)).sum();
            assert!(held as f64 <= keep * whole as f64 && held >= last, "{name} {keep}: {held} of {whole}");
            last = held;
            assert_eq!(by.ranks(&spectra, keep), Ok(ranks), "{name}");
        }
        assert!(by.ranks(&spectra, 0.0).is_err(), "{name}");
    }
}

#[test]
fn maps_change_the_weights_and_not_the_matrix() {
    let (mut found, mut shapes) = (0, 0);
    for (name, by) in each!(Transform) {
        let by: Box<dyn Transform> = by;
        found += 1;
        for (rows, cols) in SHAPES {
            let (w, inputs) = (weights(rows, cols, 21), Inputs::new(cols, 60, 22));
            // Some widths have no such map: then it says so at once.
            let Ok(form) = by.form(cols) else {
                assert!(by.maps(w.view(), &inputs.stats()).is_err(), "{name} {cols}");
                continue;
            };
            shapes += 1;
            let maps = by.maps(w.view(), &inputs.stats()).unwrap_or_else(|e| panic!("{name} {rows} x {cols}: {e}"));
            let alike = |(a, b): (&Map, &Map)| a.name() == b.name() && a.bytes() == b.bytes();
            assert!(maps.len() == form.len() && maps.iter().zip(&form).all(alike), "{name} {cols}");
            assert_eq!(by.maps(w.view(), &inputs.stats()), Ok(maps.clone()), "{name}: the same again");
            let mut m = Unpacked::dense(w.clone());
            m.turn(maps).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(max_abs_diff(m.to_mat().view(), w.view()) < 1e-5, "{name} {rows} x {cols}");
        }
        let bad = Mat::from_fn(2, 8, |_, c| if c == 3 { f32::NAN } else { 1.0 });
        assert!(by.maps(bad.view(), &Inputs::new(8, 9, 1).stats()).is_err(), "{name}");
    }
    assert!(found > 0 && shapes > 3 * found);
}

#[test]
fn shortlists_keep_what_must_stay_with_its_pieces_within_the_bound() {
    let mut found = 0;
    for (name, by) in each!(Shortlist) {
        found += 1;
        for seed in 0..20 {
            let mut rng = lacuna_base::Rng::new(seed);
            let n = 1 + rng.below(60);
            let vocabulary = Vocabulary {
                counts: (0..n).map(|_| rng.below(3) as u64).collect(),
                bytes: (0..n).map(|id| if id % 7 == 5 { Vec::new() } else { format!("{id}a").into_bytes() }).collect(),
                must: (0..n).map(|_| rng.below(10) == 0).collect(),
                pieces: (0..n).map(|id| (0..rng.below(3)).map(|_| rng.below(id + 1) as u32).collect()).collect(),
            };
            for most in [n, n / 2, 0] {
                // What must stay may be more than may; then the method has to say so.
                let Ok(kept) = by.shortlist(&ShortlistAsk { vocabulary: &vocabulary, most }) else {
                    assert!(most < n && vocabulary.must.contains(&true), "{name}: {most} of {n}");
                    continue;
                };
                assert!(kept.len() <= most && kept.windows(2).all(|w| w[0] < w[1]), "{name}: {kept:?} of {most}");
                assert!((0..n).all(|id| !vocabulary.must[id] || kept.contains(&id)), "{name}: what must stay went");
                let held = |id: &usize| vocabulary.pieces[*id].iter().all(|p| kept.contains(&(*p as usize)));
                assert!(kept.iter().all(held), "{name}: a token stays without its pieces");
                let again = by.shortlist(&ShortlistAsk { vocabulary: &vocabulary, most }).expect("again");
                assert_eq!(kept, again, "{name}");
            }
        }
    }
    assert!(found > 0);
}

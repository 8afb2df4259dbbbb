//! Gradients of the tiny checkpoints' loss against autograd: see `tests/golden/make_gradients.py`.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{Memory, specs};
use lacuna_base::{Mat, MatRef};
use lacuna_format::Weights;
use lacuna_model::derive::{BlockInputs, GradientSink, MemoryInputs, Record, RecordedBlock, gradients};
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, ModelError, NoTap};
use lacuna_spec::{Part, Place};
use serde_json::Value;

/// Of an entry: of its size and the root mean square of its tensor. The twin's norms and softmaxes are in f32, too.
const TOLERANCE: f64 = 1e-4;
/// What is nothing but rounding: without RoPE a bias of all keys changes no weight, so its gradient is 0.
const NOTHING: f64 = 1e-6;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Sums every gradient of every sequence, in f64.
#[derive(Default)]
struct All {
    sequence: usize,
    of: BTreeMap<(usize, Place), Vec<f64>>,
    parts: Vec<Option<usize>>,
}

impl All {
    fn add(&mut self, place: &Place, values: impl ExactSizeIterator<Item = f64>) {
        let n = values.len();
        let sum = self.of.entry((self.sequence, *place)).or_insert_with(|| vec![0.0; n]);
        assert_eq!(sum.len(), n, "{place}");
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
    }
}

impl GradientSink for All {
    fn gradient(&mut self, place: &Place, x: MatRef<'_>, dy: MatRef<'_>) {
        assert_eq!(x.rows(), dy.rows(), "{place}");
        let entry =
            |o: usize, i: usize| -> f64 { (0..x.rows()).map(|t| f64::from(dy.at(t, o)) * f64::from(x.at(t, i))).sum() };
        let all: Vec<f64> =
            (0..dy.cols()).flat_map(|o| (0..x.cols()).map(move |i| (o, i))).map(|(o, i)| entry(o, i)).collect();
        self.add(place, all.into_iter());
    }
    fn vector(&mut self, place: &Place, gradient: &[f32]) {
        self.add(place, gradient.iter().map(|&g| f64::from(g)));
    }
    fn end_of_sequence(&mut self) {
        self.sequence += 1;
    }
    fn end_of_part(&mut self, layer: Option<usize>) -> Result<(), ModelError> {
        self.parts.push(layer);
        self.sequence = 0;
        Ok(())
    }
}

fn walk(weights: &dyn Weights, sequences: &[Vec<u32>]) -> (Vec<f64>, All, MemoryInputs) {
    let (mut all, mut inputs) = (All::default(), MemoryInputs::default());
    let losses = gradients(weights, sequences, &mut inputs, &mut all, &mut |_, _| {}).unwrap();
    (losses, all, inputs)
}

/// What is wrong with a tensor's gradient, given the sample of the twin's.
fn wrong(want: &Value, got: Option<&[f64]>) -> Option<String> {
    let Some(want) = want.as_array() else {
        let reached = got.is_some_and(|g| g.iter().any(|&x| x != 0.0));
        return reached.then(|| "no token reaches it".to_owned());
    };
    let want: Vec<f64> = want.iter().map(|x| x.as_f64().unwrap()).collect();
    let Some(got) = got else { return Some("not shown".to_owned()) };
    let n = got.len();
    let norm = got.iter().map(|x| x * x).sum::<f64>().sqrt();
    let spread = want[0] / (n as f64).sqrt();
    let near = |a: f64, b: f64, size: f64| (a - b).abs() <= TOLERANCE * size + NOTHING;
    let entries = (1..want.len()).map(|i| (got[(7919 * (i - 1) + 5) % n], want[i]));
    let off = entries.filter(|(a, b)| !near(*a, *b, b.abs() + spread)).map(|(a, b)| format!("{a} for {b}"));
    let off: Vec<String> = off.collect();
    (!near(norm, want[0], want[0]) || !off.is_empty()).then(|| format!("norm {norm} for {}, {off:?}", want[0]))
}

#[test]
fn gradients_equal_those_of_autograd() {
    let mut all = json_of(&golden().join("gradients.json"));
    for file in ["gradients_v5.json", "gradients_recurrent.json"] {
        for (name, later) in json_of(&golden().join(file)).as_object().unwrap() {
            all[name] = later.clone();
        }
    }
    let mut bad = Vec::new();
    let mut compared = 0;
    for (name, sequences) in all.as_object().unwrap().iter().filter(|(name, _)| *name != "made_with") {
        let dir = golden().join("tiny").join(name);
        let ids: Vec<Vec<u32>> = json_of(&dir.join("golden.json"))["input_ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect())
            .collect();
        let checkpoint = lacuna_checkpoint::open(&dir).unwrap();
        let (losses, all, mut inputs) = walk(&checkpoint, &ids);
        let spec = checkpoint.spec();
        let expected: Vec<Option<usize>> =
            std::iter::once(None).chain((0..spec.layers.len()).rev().map(Some)).collect();
        assert_eq!(all.parts, expected);
        for (i, sequence) in sequences.as_array().unwrap().iter().enumerate() {
            let want = sequence["loss"].as_f64().unwrap();
            if (losses[i] - want).abs() > 1e-5 {
                bad.push(format!("{name} {i}: loss {} for {want}", losses[i]));
            }
            let places = sequence["gradients"].as_object().unwrap();
            for (place, want) in places {
                compared += 1;
                let residual: Vec<f64>;
                let got = if place == "residual" {
                    let (all, hidden) = (inputs.take(0, i).unwrap(), spec.streams());
                    // Of what goes into the first block the stream alone.
                    residual = (0..all.rows()).flat_map(|r| all.row(r)[..hidden].to_vec()).map(f64::from).collect();
                    Some(&residual[..])
                } else {
                    let mut at: Place = place.parse().unwrap();
                    if spec.tied && place == "head" {
                        at = "embed".parse().unwrap();
                    }
                    all.of.get(&(i, at)).map(Vec::as_slice)
                };
                bad.extend(wrong(want, got).map(|e| format!("{name} {i} {place}: {e}")));
            }
            // Nothing that the twin lacks.
            let known = |p: &Place| places.contains_key(&p.to_string()) || p.layer.is_none();
            assert!(all.of.keys().filter(|k| k.0 == i).all(|k| known(&k.1)), "{name}: {:?}", all.of.keys());
        }
    }
    let n = bad.len();
    bad.truncate(30);
    assert!(bad.is_empty(), "{n} of {compared} wrong:\n{}", bad.join("\n"));
    assert!(compared > 2500, "{compared} tensors");
}

/// Rows as bits.
fn bits(m: &Mat) -> Vec<u32> {
    m.data().iter().map(|x| x.to_bits()).collect()
}

/// Gradients of everything, as bits.
fn all_bits(weights: &dyn Weights, sequences: &[Vec<u32>]) -> (Vec<u64>, Vec<Vec<u64>>) {
    let (losses, all, mut inputs) = walk(weights, sequences);
    let mut out: Vec<Vec<u64>> = all.of.values().map(|v| v.iter().map(|x| x.to_bits()).collect()).collect();
    for i in 0..sequences.len() {
        out.push(inputs.take(0, i).unwrap().data().iter().map(|x| u64::from(x.to_bits())).collect());
    }
    (losses.iter().map(|l| l.to_bits()).collect(), out)
}

fn texts(vocab: usize) -> Vec<Vec<u32>> {
    [150, 2, 37].iter().map(|&n| (0..n).map(|i| ((i * 31 + n) % vocab) as u32).collect()).collect()
}

#[test]
fn any_number_of_threads_and_any_company_give_the_same_bits() {
    for (i, spec) in specs().into_iter().enumerate() {
        let weights = Memory::random(spec, 7);
        let sequences = texts(weights.spec.vocab);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| all_bits(&weights, &sequences))
        };
        let one = on(1);
        for threads in [2, 5] {
            assert!(on(threads) == one, "description {i} on {threads} threads");
        }
        for (s, sequence) in sequences.iter().enumerate() {
            let (losses, _) = all_bits(&weights, std::slice::from_ref(sequence));
            assert_eq!(losses[0], one.0[s], "description {i}, sequence {s} alone");
        }
    }
}

#[test]
fn a_recorded_block_computes_what_the_decoder_computes() {
    for (i, spec) in specs().into_iter().enumerate() {
        let weights = Memory::random(spec, 3);
        let decoder = Decoder::load(&weights, &LoadOptions::default()).unwrap();
        let tokens = &texts(weights.spec.vocab)[0];
        let positions: Vec<usize> = (0..tokens.len()).collect();
        let batch = Batch::one(0, 0..tokens.len());
        let mut kv = ContiguousKv::new(&weights.spec, 1);
        let mut want = decoder.embed.rows(tokens, &positions).unwrap().into_mat();
        let mut got = want.clone();
        for layer in 0..weights.spec.layers.len() {
            decoder.blocks[layer].forward(&mut want, &batch, &mut kv, &mut NoTap).unwrap();
            let record = RecordedBlock::load(&weights, layer).unwrap().forward(&mut got).unwrap();
            let forecast = Record::forecast(&weights.spec, layer, tokens.len());
            assert_eq!(record.bytes(), forecast, "description {i}, block {layer}");
            assert_eq!(bits(&got), bits(&want), "description {i}, block {layer}");
        }
    }
}

#[test]
fn descriptions_of_every_kind_agree_with_finite_differences_of_the_decoder() {
    for (i, spec) in specs().into_iter().enumerate() {
        // Weights with which no row changes its experts, and no channel crosses its cutoff, within a step.
        let weights = Memory::random(spec, if i == 13 { 5 } else { 3 });
        let sequence: Vec<u32> = (0..12).map(|t| (t * 7 + 1) % weights.spec.vocab as u32).collect();
        let (losses, all, _) = walk(&weights, std::slice::from_ref(&sequence));
        // Along its own gradient a tensor changes the loss the most: that change, of a small step, against its
        // prediction.
        for ((_, place), gradient) in &all.of {
            if place.role == lacuna_spec::Role::Embed {
                continue;
            }
            let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
            if norm < 1e-3 {
                continue;
            }
            let (rows, cols) = weights.spec.shape(place).unwrap();
            let values = weights.tensors[place].to_mat();
            let moved = |step: f64| {
                let new: Vec<f32> =
                    values.data().iter().zip(gradient).map(|(&w, g)| (f64::from(w) + step * g / norm) as f32).collect();
                let mut other = Memory { spec: weights.spec.clone(), tensors: weights.tensors.clone() };
                other.tensors.insert(*place, common::stored(rows, cols, &new).into());
                let mut inputs = MemoryInputs::default();
                let mut nobody = Nobody;
                gradients(&other, std::slice::from_ref(&sequence), &mut inputs, &mut nobody, &mut |_, _| {}).unwrap()[0]
            };
            let step = (2e-3 / norm).min(4e-3);
            let got = (moved(step) - moved(-step)) / (2.0 * step);
            let tolerance = if place.part == Part::Bias { 0.02 } else { 0.01 };
            assert!((got - norm).abs() <= tolerance * norm + 2e-4, "description {i}, {place}: {norm}, measured {got}");
        }
        assert!(losses[0].is_finite());
    }
}

/// Wants nothing.
struct Nobody;
impl GradientSink for Nobody {
    fn wants(&self, _: &Place) -> bool {
        false
    }
    fn gradient(&mut self, place: &Place, _: MatRef<'_>, _: MatRef<'_>) {
        panic!("{place} was not asked for");
    }
    fn vector(&mut self, place: &Place, _: &[f32]) {
        panic!("{place} was not asked for");
    }
}

#[test]
fn what_cannot_be_derived_is_refused() {
    let weights = Memory::random(specs().remove(0), 1);
    let run = |tokens: &[u32]| {
        gradients(&weights, &[tokens.to_vec()], &mut MemoryInputs::default(), &mut Nobody, &mut |_, _| {})
    };
    assert!(matches!(run(&[3]), Err(ModelError::Short { tokens: 1 })));
    assert!(matches!(run(&[3, 75]), Err(ModelError::Token { token: 75, vocab: 75 })));
    assert!(run(&[3, 4]).is_ok());
    let mut empty = MemoryInputs::default();
    assert!(matches!(empty.take(2, 0), Err(ModelError::Store { .. })));
}

//! Gates on tiny checkpoints: what a row leaves out is what the gate says of it, with the same answer alone and in
//! company, in any chunks and under drafts; all kept is dense; and less is read.

mod common;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::scheduler;
use lacuna_base::{Mat, MatRef, Rng};
use lacuna_checkpoint::Checkpoint;
use lacuna_contract::{Gate, GatePlan, GateSide, MethodError, StepSeconds};
use lacuna_kernels::{Activations, KvFormat};
use lacuna_model::{Backend, Batch, ContiguousKv, Cpu, Decoder, LoadOptions, ModelError, Naive, NoTap, Reads};
use lacuna_run::{Engine, Event, Generation, Job, Pooling, Request, RunPlan, Sampling, Scheduler, Stop};
use lacuna_spec::Target;

const MODELS: [&str; 6] = ["llama", "gemma3", "qwen3", "gpt2", "phi3", "llama_bf16"];

fn checkpoint(name: &str) -> Checkpoint {
    lacuna_checkpoint::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)).unwrap()
}

fn plan(flags: &[(&str, &str)]) -> RunPlan {
    let mut plan = RunPlan::none();
    for (question, said) in flags {
        plan.flag(question, said, &lacuna_methods::registry()).unwrap();
    }
    plan
}

fn engine(name: &str, flags: &[(&str, &str)]) -> Engine {
    let plan = plan(flags);
    let options = LoadOptions { gate: plan.gate(), activations: Activations::Int8, ..LoadOptions::default() };
    Engine::new(Decoder::load(&checkpoint(name), &options).unwrap()).with_plan(plan).with_kv(KvFormat::F16)
}

#[derive(Default, Debug, PartialEq)]
struct Answer {
    ids: Vec<u32>,
    stop: Option<Stop>,
    probabilities: Vec<(u32, f32)>,
}

fn drain(s: &mut Scheduler) -> BTreeMap<u64, Answer> {
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
fn requests(n: usize, seed: u64) -> Vec<Generation> {
    let mut rng = Rng::new(seed);
    let root: Vec<u32> = (0..40).map(|_| 3 + rng.below(90) as u32).collect();
    (0..n)
        .map(|i| {
            let mut prompt = root[..10 + rng.below(28)].to_vec();
            prompt.extend((0..1 + rng.below(8)).map(|_| 3 + rng.below(90) as u32));
            let drawn = Sampling { temperature: 1.0, top_p: 0.95, seed: i as u64, ..Sampling::default() };
            let sampling = if i % 3 == 0 { drawn } else { Sampling::default() };
            Generation { prompt, max_tokens: 8 + rng.below(10), sampling, ignore_end: true, ..Generation::default() }
        })
        .collect()
}

fn ask(g: &Generation) -> Request {
    let job = Job::Generate { generation: g.clone(), logprobs: Some(2), grammar: None, special: false };
    Request::new(g.prompt.clone(), job)
}

fn alone(name: &str, flags: &[(&str, &str)], all: &[Generation]) -> (Vec<Answer>, Reads) {
    let e = Arc::new(engine(name, flags));
    let answers = all.iter().map(|g| {
        let mut s = scheduler(Arc::clone(&e), 1, 512, 99, false);
        s.submit(0, ask(g)).unwrap();
        drain(&mut s).remove(&0).unwrap()
    });
    (answers.collect(), e.model().gate_reads())
}

#[test]
fn all_kept_changes_no_bit() {
    for name in MODELS {
        let all = requests(6, 1);
        let (dense, none) = alone(name, &[], &all);
        assert_eq!(none, Reads::default());
        let (got, reads) = alone(name, &[("gate", "wina:keep=1.0")], &all);
        assert_eq!(got, dense, "{name}");
        assert!(reads.read == reads.all && reads.all > 0, "{name}: {reads:?}");
        // What keeps less is an approximation, by which less is read.
        let (got, reads) = alone(name, &[("gate", "wina:keep=0.3")], &all);
        assert_ne!(got, dense, "{name}");
        assert!(reads.read * 10 < reads.all * 9, "{name}: {reads:?}");
    }
}

#[test]
fn no_answer_depends_on_company() {
    for name in MODELS {
        let (all, mut accepted) = (requests(8, 2), 0);
        for by in ["wina:keep=0.5", "wina:keep=0.2", "wina:threshold=0.3"] {
            let (expected, _) = alone(name, &[("gate", by)], &all);
            for draft in ["none", "copyspec", "token-recycling"] {
                let e = Arc::new(engine(name, &[("gate", by), ("draft", draft)]));
                for (batch, rows, blocks, reuse) in [(1, 7, 99, true), (8, 33, 999, true), (4, 16, 12, true)] {
                    let mut s = scheduler(Arc::clone(&e), batch, rows, blocks, reuse);
                    s.set_prices(StepSeconds::new(vec![(1, 1.0), (64, 1.0)]).unwrap());
                    all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, ask(g)).unwrap());
                    let got = drain(&mut s);
                    for (i, x) in expected.iter().enumerate() {
                        assert_eq!(&got[&(i as u64)], x, "{name}, {by}, {draft}: text {i} of {batch} x {rows}");
                    }
                    accepted += s.gauges().accepted;
                }
            }
        }
        assert!(accepted > 0, "{name}: nothing that was drafted came");
    }
}

/// Remembers what another gate says, and says it again in the same order.
struct Again {
    inner: Arc<dyn Gate>,
    said: Mutex<VecDeque<Vec<u32>>>,
    again: AtomicBool,
}

impl Gate for Again {
    fn plan(&self) -> GatePlan {
        self.inner.plan()
    }
    fn norms(&self, weights: &[MatRef<'_>]) -> Result<Vec<f32>, MethodError> {
        self.inner.norms(weights)
    }
    fn channels(&self, activations: &[f32], norms: &[f32]) -> Result<Vec<u32>, MethodError> {
        let mut said = self.said.lock().unwrap();
        if self.again.load(Ordering::Relaxed) {
            return said.pop_front().ok_or_else(|| MethodError::new("asked more often"));
        }
        let answer = self.inner.channels(activations, norms)?;
        said.push_back(answer.clone());
        Ok(answer)
    }
}

/// Logits after every token of a text, which is read token by token.
fn logits<B: Backend>(backend: &B, weights: &Checkpoint, gate: Option<&Arc<dyn Gate>>, text: &[u32]) -> (Mat, Reads) {
    let d = Decoder::load_on(backend, weights, &LoadOptions { gate, ..LoadOptions::default() }).unwrap();
    let mut kv = ContiguousKv::on(backend, &d.spec, 1, KvFormat::F32);
    let mut out = Mat::zeros(text.len(), d.spec.vocab);
    for (at, token) in text.iter().enumerate() {
        let mut batch = Batch::new();
        batch.push_part(0, at..at + 1, text.len());
        let hidden = d.forward(&[*token], &batch, &mut kv, &mut NoTap).unwrap();
        let row = d.head.project(&d.head.normed(&hidden));
        out.row_mut(at).copy_from_slice(backend.download(&row, 0..1).unwrap().view().row(0));
    }
    (out, d.gate_reads())
}

/// By the same channels the processor computes what f64 and loops compute of rows with zeros.
#[test]
fn rows_are_those_of_the_slow_twin() {
    for name in MODELS {
        let (weights, mut rng) = (checkpoint(name), Rng::new(7));
        let text: Vec<u32> = (0..40).map(|_| 3 + rng.below(90) as u32).collect();
        let (all, _) = logits(&Naive, &weights, None, &text);
        for by in ["wina:keep=0.5", "wina:keep=0.25"] {
            let inner = Arc::clone(plan(&[("gate", by)]).gate().unwrap());
            let again = Arc::new(Again { inner, said: Mutex::default(), again: AtomicBool::new(false) });
            let gate: Arc<dyn Gate> = Arc::clone(&again) as Arc<dyn Gate>;
            let (got, reads) = logits(&Cpu, &weights, Some(&gate), &text);
            again.again.store(true, Ordering::Relaxed);
            let (want, twin) = logits(&Naive, &weights, Some(&gate), &text);
            assert!(again.said.lock().unwrap().is_empty(), "asked less often");
            let size = want.data().iter().fold(1.0f32, |m, x| m.max(x.abs()));
            let off = lacuna_base::testkit::max_abs_diff(got.view(), want.view());
            assert!(off <= 2e-5 * size, "{name} {by}: off by {off} of {size}");
            let apart = lacuna_base::testkit::max_abs_diff(all.view(), want.view());
            assert!(apart > 1e-2, "{name} {by}: as if all were kept, {apart}");
            assert!(reads.read < reads.all && twin.read < twin.all, "{name}: {reads:?} {twin:?}");
        }
    }
}

#[test]
fn embeddings_are_under_the_plan_too() {
    let text: Vec<u32> = (0..90).map(|i| 3 + i * 11 % 90).collect();
    for pooling in [Pooling::Last, Pooling::Mean] {
        let vector = |flags: &[(&str, &str)], rows: usize| {
            let mut s = scheduler(engine("llama", flags), 1, rows, 20, true);
            s.submit(0, Request::new(text.clone(), Job::Embed(pooling))).unwrap();
            let mut out = None;
            while !s.is_idle() {
                s.step(&mut |_, event| match event {
                    Event::Embedding { vector, .. } => out = Some(vector),
                    other => panic!("{other:?}"),
                });
            }
            out.unwrap()
        };
        let flags = [("gate", "wina:keep=0.4")];
        assert_eq!(vector(&flags, 512), vector(&flags, 5));
        assert_ne!(vector(&flags, 512), vector(&[], 512));
    }
}

/// Says the same of every row, at some matrices.
struct Says {
    targets: &'static [&'static str],
    side: GateSide,
    channels: Vec<u32>,
}

impl Gate for Says {
    fn plan(&self) -> GatePlan {
        let targets = self.targets.iter().map(|t| Target((*t).into())).collect();
        GatePlan { targets, named: true, side: self.side }
    }
    fn norms(&self, weights: &[MatRef<'_>]) -> Result<Vec<f32>, MethodError> {
        Ok(vec![weights.len() as f32; weights[0].cols()])
    }
    fn channels(&self, _: &[f32], norms: &[f32]) -> Result<Vec<u32>, MethodError> {
        if norms[0] > 2.5 { Err(MethodError::new("three matrices")) } else { Ok(self.channels.clone()) }
    }
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let load = |name: &str, gate: &Arc<dyn Gate>| {
        Decoder::load(&checkpoint(name), &LoadOptions { gate: Some(gate), ..LoadOptions::default() })
    };
    let says = |targets: &'static [&'static str], channels: &[u32]| -> Arc<dyn Gate> {
        Arc::new(Says { targets, side: GateSide::Inputs, channels: channels.to_vec() })
    };
    for (model, targets, word) in [
        ("qwen3_moe", &["attn.*", "ffn.*"][..], "layers.0.ffn.experts.0.gate"),
        ("qwen3_moe", &["ffn.router"], "layers.0.ffn.router"),
        ("llama", &["attn.q", "head"], "head"),
        ("llama", &["embed"], "embed"),
        ("llama", &["attn.*", "layers.7.ffn.up"], "'layers.7.ffn.up'"),
    ] {
        let said = load(model, &says(targets, &[])).err().unwrap().to_string();
        assert!(said.contains(word), "{said}");
    }
    let outputs: Arc<dyn Gate> = Arc::new(Says { targets: &["ffn.up"], side: GateSide::Outputs, channels: vec![] });
    assert!(load("llama", &outputs).err().unwrap().to_string().contains("outputs"));
    // Answers that do not fit end the step, and name the place.
    let run = |d: &Decoder| {
        let mut kv = ContiguousKv::new(&d.spec, 1);
        d.forward(&[5, 6, 7], &Batch::one(0, 0..3), &mut kv, &mut NoTap).map(|x| x.view().to_mat())
    };
    for (targets, channels, words) in [
        (&["attn.o"][..], &[3u32, 2][..], ["layers.0.attn.o", "channel 2 after channel 3"]),
        (&["layers.1.ffn.down"], &[0, 99], ["layers.1.ffn.down", "channel 99 of "]),
        (&["attn.q", "attn.k", "attn.v"], &[0], ["layers.0.attn.q", "three matrices"]),
    ] {
        let e: ModelError = run(&load("llama", &says(targets, channels)).unwrap()).unwrap_err();
        let said = e.to_string();
        assert!(words.iter().all(|w| said.contains(w)), "{said}");
    }
    // Experts' neighbours may have one; so may some of the matrices of the same rows.
    assert!(run(&load("qwen3_moe", &says(&["attn.q", "attn.v"], &[0, 5])).unwrap()).is_ok());
    let dense = run(&Decoder::load(&checkpoint("llama"), &LoadOptions::default()).unwrap()).unwrap();
    let all: Vec<u32> = (0..32).collect();
    assert_eq!(run(&load("llama", &says(&["attn.k"], &all)).unwrap()).unwrap(), dense);
    assert_ne!(run(&load("llama", &says(&["attn.v"], &all[1..])).unwrap()).unwrap(), dense);
    // A plan and a model that were not made for each other.
    let flags = [("gate", "wina")];
    let meant = common::engine("llama").with_plan(plan(&flags));
    assert!(meant.check_plan().unwrap_err().to_string().contains("loaded without it"));
    let other = engine("llama", &flags).with_plan(plan(&flags));
    assert!(other.check_plan().is_err());
    assert!(engine("llama", &flags).with_plan(RunPlan::none()).check_plan().unwrap_err().to_string().contains("lacks"));
    assert!(engine("llama", &flags).check_plan().is_ok());
}

#[test]
fn plans_with_a_gate_are_told_and_kept_apart() {
    let said = plan(&[("gate", "wina:keep=0.5"), ("draft", "copyspec")]);
    let names: Vec<String> = said.names().into_iter().map(|[question, method, _]| question + " " + &method).collect();
    assert_eq!(names, ["draft copyspec", "gate wina"]);
    assert!(!said.is_lossless() && said.words()[1].ends_with("an approximation"), "{:?}", said.words());
    assert_eq!(said.to_json()["methods"][1]["keys"]["keep"], 0.5);
    let hash = |by: &str| plan(&[("gate", by)]).hash();
    assert!(hash("wina:keep=0.5") != hash("wina:keep=0.4") && hash("wina") != 0);
    let read = "version = 1\n[gate]\nmethod = \"wina\"\nkeep = 0.4\ntargets = [\"ffn.*\"]\n";
    let read = RunPlan::parse(read, &lacuna_methods::registry()).unwrap();
    assert_eq!(read.gate().unwrap().plan().targets, [Target("ffn.*".into())]);
}

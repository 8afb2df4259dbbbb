//! Selectors that see the whole prompt, on tiny checkpoints: what its tiles read is what their definition says, with the
//! same answer alone and in company of eight, in any chunks, after a text was driven out and under drafts; nothing of a
//! prompt is shared, and rows behind it read all.

#[path = "common/answers.rs"]
mod answers;
mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use answers::{Answer, ask, drain, plan, requests};
use common::{after, tokenizer};
use lacuna_base::Rng;
use lacuna_contract::{MethodError, PromptAsk, SelectPrompt, Selector, StepSeconds};
use lacuna_kernels::KvFormat;
use lacuna_model::{
    Backend, Batch, ContiguousKv, Cpu, Decoder, KvStore, LoadOptions, ModelError, Naive, NoTap, Reads, Table,
};
use lacuna_run::{BlockStore, Engine, Event, Generation, Job, Limits, Pooling, Request, Scheduler};

const MODELS: [&str; 5] = ["llama", "gemma3", "qwen3", "llama_rope_longrope", "qwen3_moe"];
const ALL: &str = "flexprefill:tile=32,gamma=1.0";
/// By columns and diagonals alone, by pooled maps where they are trusted, and of larger tiles.
const SOME: [&str; 3] = [
    "flexprefill:tile=32,gamma=0.3,min_budget=0,tau=0.0",
    "flexprefill:tile=32,gamma=0.3,min_budget=32,tau=1.0",
    "flexprefill:tile=64,gamma=0.4,min_budget=0,tau=0.2",
];

fn engine(name: &str, flags: &[(&str, &str)], kv: KvFormat) -> Engine {
    common::engine(name).with_plan(plan(flags)).with_kv(kv).with_context(400)
}

fn scheduler(e: Engine, batch: usize, prefill_rows: usize, blocks: usize, reuse: bool) -> Scheduler {
    let kv_bytes = blocks * BlockStore::new(&e.model().spec, e.kv_format(), usize::MAX).unit_bytes();
    let mut s = Scheduler::new(e, tokenizer(), Limits { batch, prefill_rows, kv_bytes, reuse });
    assert_eq!(s.gauges().blocks.total, blocks, "a selector of prompts takes nothing of a block");
    s.set_prices(StepSeconds::new(vec![(1, 1.0), (64, 1.0)]).unwrap());
    s
}

fn alone(name: &str, flags: &[(&str, &str)], kv: KvFormat, all: &[Generation]) -> (Vec<Answer>, Reads) {
    let mut reads = Reads::default();
    let answers = all.iter().map(|g| {
        let mut s = scheduler(engine(name, flags, kv), 1, 512, 99, false);
        s.submit(0, ask(g)).unwrap();
        let answer = drain(&mut s).remove(&0).unwrap();
        reads.add(s.gauges().reads);
        answer
    });
    (answers.collect(), reads)
}

#[test]
fn reading_all_changes_no_bit() {
    for name in MODELS {
        let all = requests(6, 1);
        for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let (dense, _) = alone(name, &[], kv, &all);
            // All of the attention, and a budget of all there is.
            for by in [ALL, "flexprefill:tile=32,gamma=0.1,min_budget=400"] {
                let (got, reads) = alone(name, &[("select", by)], kv, &all);
                assert_eq!(got, dense, "{name} {kv:?} {by}");
                assert!(reads.read == reads.all && reads.all > 0, "{reads:?}");
                let mut s = scheduler(engine(name, &[("select", by)], kv), 4, 23, 99, true);
                all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, ask(g)).unwrap());
                assert_eq!(drain(&mut s).into_values().collect::<Vec<_>>(), dense, "{name} {kv:?} {by}");
            }
            let (got, reads) = alone(name, &[("select", SOME[0])], kv, &all);
            assert_ne!(got, dense, "{name} {kv:?}");
            assert!(reads.read * 10 < reads.all * 9, "{name}: {reads:?}");
        }
    }
}

#[test]
fn no_answer_depends_on_company() {
    let (mut preempted, mut accepted) = (0, 0);
    for name in MODELS {
        let all = requests(8, 2);
        for by in SOME {
            let (expected, _) = alone(name, &[("select", by)], KvFormat::F16, &all);
            for draft in ["none", "copyspec"] {
                for (batch, rows, blocks, reuse) in [(1, 7, 99, true), (8, 33, 999, true), (4, 16, 12, true)] {
                    let e = engine(name, &[("select", by), ("draft", draft)], KvFormat::F16);
                    let mut s = scheduler(e, batch, rows, blocks, reuse);
                    for (i, g) in all.iter().enumerate() {
                        s.submit(i as u64, ask(g)).unwrap();
                    }
                    let got = drain(&mut s);
                    for (i, x) in expected.iter().enumerate() {
                        assert_eq!(&got[&(i as u64)], x, "{name}, {by}, {draft}: text {i} of {batch} x {rows}");
                    }
                    let b = s.gauges().blocks;
                    assert_eq!((b.used, b.shared, b.cached, b.free), (0, 0, 0, b.total), "nothing is left for others");
                    preempted += s.gauges().preempted;
                    accepted += s.gauges().accepted;
                }
            }
        }
    }
    assert!(preempted > 0 && accepted > 0);
}

/// Latent attention, one norm for both parts, sinks, gates, and recurrent mixers before, between and beside attention.
#[test]
fn every_kind_of_block_goes_layer_by_layer() {
    for name in ["deepseek_v2", "phi", "gpt_oss", "bloom", "qwen3_next_dense", "lfm2", "bamba", "mamba2"] {
        let mut all = requests(4, 6);
        let vocab = common::engine(name).model().spec.vocab as u32;
        all.iter_mut().flat_map(|g| &mut g.prompt).for_each(|t| *t = 3 + *t % (vocab - 3));
        let (dense, _) = alone(name, &[], KvFormat::F32, &all);
        for (by, same) in [(ALL, true), (SOME[0], name == "mamba2")] {
            let (got, _) = alone(name, &[("select", by)], KvFormat::F32, &all);
            assert_eq!(got == dense, same, "{name}, {by}");
            for (batch, rows) in [(1, 5), (4, 16)] {
                let mut s = scheduler(engine(name, &[("select", by)], KvFormat::F32), batch, rows, 999, true);
                all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, ask(g)).unwrap());
                assert!(drain(&mut s).into_values().eq(got.iter().cloned()), "{name}, {by}: {batch} x {rows}");
            }
        }
    }
}

/// A plain store with a selector in some layers.
struct Asking<B: Backend> {
    kv: ContiguousKv<B>,
    by: Arc<dyn SelectPrompt>,
    layers: Vec<bool>,
    reads: Reads,
}

impl<B: Backend> KvStore<B> for Asking<B> {
    fn prepare(&mut self, layer: usize, batch: &Batch) -> Result<(), ModelError> {
        self.kv.prepare(layer, batch)
    }
    fn table(&self, layer: usize, sequence: usize) -> Result<Table<'_>, ModelError> {
        self.kv.table(layer, sequence)
    }
    fn pages(&mut self, layer: usize) -> Result<&mut B::Pages, ModelError> {
        self.kv.pages(layer)
    }
    fn prompt_selector(&self, layer: usize) -> Option<Arc<dyn SelectPrompt>> {
        self.layers[layer].then(|| Arc::clone(&self.by))
    }
    fn count_reads(&mut self, reads: Reads) {
        self.reads.add(reads);
    }
}

/// The slow twin asks and masks by itself, in f64, and reads the rest of the text as usual.
#[test]
fn tiles_read_what_the_slow_twin_reads() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    for name in ["llama", "gemma3", "qwen3"] {
        let checkpoint = lacuna_checkpoint::open(root.join(name)).unwrap();
        let mut rng = Rng::new(7);
        let text: Vec<u32> = (0..220).map(|_| 3 + rng.below(90) as u32).collect();
        let d = Decoder::load_on(&Naive, &checkpoint, &LoadOptions::default()).unwrap();
        let log = |row: &[f64], id: u32| row[id as usize] - row.iter().map(|x| x.exp()).sum::<f64>().ln();
        let dense = |n: usize| {
            let mut kv = ContiguousKv::on(&Naive, &d.spec, 1, KvFormat::F32);
            let hidden = d.forward(&text[..n], &Batch::one(0, 0..n), &mut kv, &mut NoTap).unwrap();
            d.head.project(&d.head.normed(&hidden)).row(n - 1).to_vec()
        };
        for by in SOME {
            let Some(Selector::Prompt(selector)) = plan(&[("select", by)]).select().cloned() else { panic!("{by}") };
            let mut s = scheduler(engine(name, &[("select", by)], KvFormat::F32), 1, 13, 30, true);
            let mut apart = 0.0f64;
            for n in [33, 64, 65, 130, 192, 220] {
                let layers = d.spec.layers.iter().map(|l| l.attn.as_ref().is_some_and(|a| a.window.is_none()));
                let kv = ContiguousKv::on(&Naive, &d.spec, 1, KvFormat::F32);
                let (by, layers) = (Arc::clone(&selector), layers.collect());
                let mut kv = Asking { kv, by, layers, reads: Reads::default() };
                let mut pass = d.begin_prompt(&text[..n], 0, n, n).unwrap();
                d.go_on(&mut pass, d.blocks.len(), &mut kv, &mut NoTap).unwrap();
                assert_eq!(pass.layers(), d.blocks.len());
                let hidden = pass.parts().next().unwrap();
                let logits = d.head.project(&d.head.normed(hidden));
                let (got, _) = after(&mut s, &text[..n]).unwrap();
                let all = dense(n);
                for (id, logprob) in got {
                    let want = log(logits.row(n - 1), id);
                    assert!((f64::from(logprob) - want).abs() < 1e-4, "{name}, {selector:p}, {n}: {logprob} {want}");
                    apart = apart.max((want - log(&all, id)).abs());
                }
            }
            assert!(apart > 1e-3, "{name}, {by}: as if all were read, {apart}");
        }
    }
}

/// Reads the same tiles in every row, after a look at what it is asked.
struct Listed {
    list: Vec<usize>,
    tile: usize,
    tokens: usize,
    asked: Mutex<Vec<(usize, usize)>>,
}

impl SelectPrompt for Listed {
    fn tile(&self) -> usize {
        self.tile
    }
    fn select(&self, ask: &PromptAsk<'_>) -> Result<Vec<Vec<usize>>, MethodError> {
        assert_eq!((ask.queries.rows(), ask.keys.rows()), (self.tokens, self.tokens));
        assert!(ask.queries.cols().is_multiple_of(ask.keys.cols()));
        self.asked.lock().unwrap().push((ask.layer, ask.head));
        let row = |i: usize| self.list.iter().copied().filter(|b| *b < i || *b > 90).collect();
        Ok((0..self.tokens.div_ceil(self.tile)).map(row).collect())
    }
}

/// What is left out takes no part, whatever lies there, however the prompt is cut; each head of a layer is asked once;
/// answers that do not fit are refused.
#[test]
fn tiles_that_are_left_out_take_no_part() {
    let e = common::engine("llama").with_context(400);
    let (model, spec) = (e.model(), &e.model().spec);
    let text = |other: bool| -> Vec<u32> {
        let mut rng = Rng::new(5);
        let mut text: Vec<u32> = (0..200).map(|_| 3 + rng.below(90) as u32).collect();
        if other {
            (64..128).for_each(|i| text[i] = 3 + rng.below(90) as u32);
        }
        text
    };
    let run = |text: &[u32], tile: usize, list: &[usize], rows: usize| {
        let listed = Listed { list: list.to_vec(), tile, tokens: text.len(), asked: Mutex::default() };
        let listed = Arc::new(listed);
        let by = Selector::Prompt(listed.clone());
        let mut kv = BlockStore::on(&Cpu, spec, KvFormat::F32, 1 << 30).selecting(by, spec, 400, 1 << 30);
        let slot = kv.open(0);
        assert!(kv.reserve(slot, text.len()));
        let mut pass = model.begin_prompt(text, slot, text.len(), rows)?;
        // Some layers at a time.
        while pass.layers() < spec.layers.len() {
            model.go_on(&mut pass, 1, &mut kv, &mut NoTap)?;
        }
        let mut asked = listed.asked.lock().unwrap().clone();
        asked.sort_unstable();
        let each = |(l, layer): (usize, &lacuna_spec::LayerSpec)| {
            let heads = layer.attn.as_ref().map_or(0, |a| a.kv_heads);
            (0..heads).map(move |h| (l, h)).collect::<Vec<_>>()
        };
        assert_eq!(asked, spec.layers.iter().enumerate().flat_map(each).collect::<Vec<_>>());
        let all: Vec<f32> = pass.parts().flat_map(|x| x.data().to_vec()).collect();
        let width = spec.hidden;
        Ok::<_, ModelError>((all[192 * width..].to_vec(), kv.reads()))
    };
    for (tile, list) in [(64, vec![0]), (32, vec![0, 1])] {
        let (a, reads) = run(&text(false), tile, &list, 200).unwrap();
        assert_eq!(a, run(&text(true), tile, &list, 200).unwrap().0, "{tile}");
        assert!(reads.read < reads.all);
        for rows in [1, 9, 64] {
            assert!(run(&text(false), tile, &list, rows).unwrap() == (a.clone(), reads), "{tile}, {rows}");
        }
        let (c, all) = run(&text(false), tile, &[0, 1, 2, 3, 4, 5, 6], 33).unwrap();
        assert_eq!(all.read, all.all);
        assert!(c != a && c != run(&text(true), tile, &[0, 1, 2, 3, 4, 5, 6], 33).unwrap().0);
    }
    for (list, said) in [(vec![1, 0], "tile 0 after 1"), (vec![0, 99], "tile 99 is not before it")] {
        let e = run(&text(false), 32, &list, 64).unwrap_err().to_string();
        assert!(e.contains(said) && e.contains("layer 0, head "), "{e}");
    }
    let e = run(&text(false), 48, &[], 64).unwrap_err().to_string();
    assert!(e.contains("tiles of 48") && e.contains("32"), "{e}");
}

/// Embeddings and the probabilities of a prompt's own tokens are under the plan; nothing is reused; one token alone is
/// read as ever.
#[test]
fn every_job_reads_its_prompt_by_the_plan() {
    let text: Vec<u32> = (0..250).map(|i| 3 + i * i * 11 % 90).collect();
    let flags = [("select", SOME[0])];
    for pooling in [Pooling::Last, Pooling::Mean] {
        let vector = |flags: &[(&str, &str)], rows: usize| {
            let mut s = scheduler(engine("llama", flags, KvFormat::F16), 1, rows, 20, true);
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
        assert_eq!(vector(&flags, 512), vector(&flags, 5));
        assert_ne!(vector(&flags, 512), vector(&[], 512));
    }
    let score = |flags: &[(&str, &str)]| {
        lacuna_run::score(engine("llama", flags, KvFormat::F16), std::slice::from_ref(&text), &mut |_, _| {}).unwrap()
    };
    let (dense, some) = (score(&[]).remove(0), score(&flags).remove(0));
    assert_eq!((dense.len(), some.len()), (249, 249));
    assert!(dense[..31] == some[..31] && dense[100..] != some[100..]);
    assert_eq!(score(&[("select", ALL)]).remove(0), dense);
    let mut s = scheduler(engine("llama", &flags, KvFormat::F16), 1, 64, 20, true);
    let first = after(&mut s, &text).unwrap();
    assert_eq!(first, after(&mut s, &text).unwrap());
    assert_eq!(first.1, 0, "nothing is reused");
    let mut plain = scheduler(engine("llama", &[], KvFormat::F16), 1, 64, 20, true);
    assert_eq!(after(&mut s, &text[..1]).unwrap(), after(&mut plain, &text[..1]).unwrap());
}

#[test]
fn rows_are_told_as_they_are_read() {
    let text: Vec<u32> = (0..250).map(|i| 3 + i * 7 % 90).collect();
    for rows in [1, 16, 100, 512] {
        let mut s = scheduler(engine("llama", &[("select", SOME[1])], KvFormat::F16), 2, rows, 30, true);
        let generation = Generation { prompt: text.clone(), max_tokens: 3, ignore_end: true, ..Generation::default() };
        s.submit(0, ask(&generation)).unwrap();
        let mut read = 0;
        while !s.is_idle() {
            let step = s.step(&mut |_, _| {});
            assert!(step.prefill_rows + step.decode_rows > 0, "no step does nothing");
            read += step.prefill_rows;
        }
        assert_eq!(read, text.len(), "{rows}");
    }
}

#[test]
fn what_cannot_run_is_refused_with_its_numbers() {
    for (flags, words) in [
        (vec![("select", "flexprefill:tile=48")], vec!["blocks of 48", "multiple", "32"]),
        (
            vec![("select", "flexprefill"), ("keep", "streaming-llm:budget=50")],
            vec!["whole prompt", "keeper", "leave one"],
        ),
    ] {
        let e = engine("llama", &flags, KvFormat::F16);
        let said = e.check_plan().unwrap_err().to_string();
        assert!(words.iter().all(|w| said.contains(w)), "{said}");
        let mut s = scheduler(e, 1, 512, 20, true);
        assert_eq!(s.submit(0, ask(&requests(1, 1)[0])).unwrap_err().to_string(), said);
    }
    assert!(engine("llama", &[("select", "flexprefill")], KvFormat::F16).check_plan().is_ok());
    assert!(plan(&[("select", "flexprefill")]).hash() != 0);
}

//! Selectors on tiny checkpoints: what a row reads is what their definition says, with the same answer alone and in
//! company, in any chunks, where texts share beginnings and under drafts; and less is read.

#[path = "common/answers.rs"]
mod answers;
mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use answers::{Answer, ask, drain, plan, requests};
use common::{after, tokenizer};
use lacuna_base::Rng;
use lacuna_contract::{MethodError, Pool, Pooled, Select, SelectAsk, SelectPlan, SelectScope, Selector, StepSeconds};
use lacuna_kernels::KvFormat;
use lacuna_model::{
    Backend, Batch, ContiguousKv, Cpu, Decoder, KvStore, LoadOptions, ModelError, Naive, NoTap, Reads, Table,
};
use lacuna_run::{BlockStore, Engine, Event, Generation, Job, Limits, Pooling, Request, RunPlan, Scheduler};

const MODELS: [&str; 5] = ["llama", "gemma3", "qwen3", "llama_rope_longrope", "qwen3_moe"];
const SELECTORS: [&str; 3] = [
    "pooled-blocks:budget=32,dense_layers=0",
    "pooled-blocks:budget=64,dense_layers=0,pool=mean",
    "pooled-blocks:budget=64,dense_layers=0,block=64",
];
/// Tiles of a block, of less and of more, and such as end within blocks.
const TILES: [&str; 4] = [
    "pooled-blocks:budget=32,dense_layers=0,scope=tile",
    "pooled-blocks:budget=64,dense_layers=0,pool=mean,scope=tile,tile=8",
    "pooled-blocks:budget=32,dense_layers=0,scope=tile,tile=20",
    "pooled-blocks:budget=32,dense_layers=0,scope=tile,tile=96",
];

fn rows_of(said: &str) -> Arc<dyn Select> {
    match plan(&[("select", said)]).select() {
        Some(Selector::Rows(by)) => Arc::clone(by),
        _ => panic!("{said} asks at rows"),
    }
}

fn engine(name: &str, flags: &[(&str, &str)], kv: KvFormat) -> Engine {
    common::engine(name).with_plan(plan(flags)).with_kv(kv).with_context(400)
}

/// A scheduler with room for `blocks` blocks, in which rows cost nothing beside the first.
fn scheduler(e: Engine, batch: usize, prefill_rows: usize, blocks: usize, reuse: bool) -> Scheduler {
    let spec = &e.model().spec;
    let mut store = BlockStore::new(spec, e.kv_format(), usize::MAX);
    if let Some(by) = e.plan().select() {
        store = store.selecting(by.clone(), spec, e.context(), usize::MAX);
    }
    let kv_bytes = blocks * store.block_bytes();
    let mut s = Scheduler::new(e, tokenizer(), Limits { batch, prefill_rows, kv_bytes, reuse });
    assert_eq!(s.gauges().blocks.total, blocks);
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
fn a_budget_of_all_blocks_changes_no_bit() {
    for name in MODELS {
        let all = requests(6, 1);
        for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Q8] {
            let (dense, none) = alone(name, &[], kv, &all);
            assert_eq!(none, Reads::default());
            for by in [
                "pooled-blocks:budget=400,dense_layers=0",
                "pooled-blocks:budget=1,dense_layers=99,pool=mean",
                "pooled-blocks:budget=400,dense_layers=0,scope=tile",
                "pooled-blocks:budget=1,dense_layers=99,scope=tile,tile=50",
            ] {
                let (got, reads) = alone(name, &[("select", by)], kv, &all);
                assert_eq!(got, dense, "{name} {kv:?} {by}");
                assert!(reads.read == reads.all && reads.all > 0, "{reads:?}");
                let mut s = scheduler(engine(name, &[("select", by)], kv), 4, 23, 99, true);
                all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, ask(g)).unwrap());
                assert_eq!(drain(&mut s).into_values().collect::<Vec<_>>(), dense, "{name} {kv:?} {by}");
            }
            // And one that texts exceed is an approximation, by which less is read.
            for by in [SELECTORS[0], TILES[0]] {
                let (got, reads) = alone(name, &[("select", by)], kv, &all);
                assert_ne!(got, dense, "{name} {kv:?}");
                assert!(reads.read * 10 < reads.all * 9, "{name}: {reads:?}");
            }
        }
    }
}

#[test]
fn no_answer_depends_on_company() {
    let mut preempted = 0;
    for name in MODELS {
        let all = requests(8, 2);
        for by in SELECTORS.into_iter().chain(TILES) {
            let (expected, _) = alone(name, &[("select", by)], KvFormat::F16, &all);
            let (mut accepted, mut reused) = (0, 0);
            for draft in ["none", "copyspec", "token-recycling"] {
                for (batch, rows, blocks, reuse) in [(1, 7, 99, true), (8, 33, 999, true), (4, 16, 12, true)] {
                    let e = engine(name, &[("select", by), ("draft", draft)], KvFormat::F16);
                    let mut s = scheduler(e, batch, rows, blocks, reuse);
                    for round in 0..2 {
                        for (i, g) in all.iter().enumerate() {
                            s.submit(i as u64, ask(g)).unwrap();
                        }
                        let got = drain(&mut s);
                        for (i, x) in expected.iter().enumerate() {
                            let what = format!("{name}, {by}, {draft}: text {i} of {batch} x {rows}, {round}");
                            assert_eq!(&got[&(i as u64)], x, "{what}");
                        }
                        let b = s.gauges().blocks;
                        assert_eq!((b.used, b.shared, b.free + b.cached), (0, 0, b.total));
                        reused += b.cached;
                    }
                    preempted += s.gauges().preempted;
                    accepted += s.gauges().accepted;
                }
            }
            // What is tested does happen.
            assert!(reused > 0 && accepted > 0, "{name}, {by}");
        }
    }
    assert!(preempted > 0);
}

/// A plain store that has a selector in some layers.
struct Asking<B: Backend> {
    kv: ContiguousKv<B>,
    by: Arc<dyn Select>,
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
    fn selector(&self, layer: usize) -> Option<Arc<dyn Select>> {
        self.layers[layer].then(|| Arc::clone(&self.by))
    }
    fn count_reads(&mut self, reads: Reads) {
        self.reads.add(reads);
    }
}

/// The slow twin pools, asks and reads by itself, from all keys, for a whole text at once.
#[test]
fn rows_read_what_the_slow_twin_reads() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    for name in ["llama", "gemma3", "qwen3"] {
        let checkpoint = lacuna_checkpoint::open(root.join(name)).unwrap();
        let context = engine(name, &[], KvFormat::F32).context();
        let mut rng = Rng::new(7);
        let text: Vec<u32> = (0..context.min(300) - 1).map(|_| 3 + rng.below(90) as u32).collect();
        let d = Decoder::load_on(&Naive, &checkpoint, &LoadOptions::default()).unwrap();
        let project = |kv: &mut dyn KvStore<Naive>| {
            let hidden = d.forward(&text, &Batch::one(0, 0..text.len()), kv, &mut NoTap).unwrap();
            d.head.project(&d.head.normed(&hidden))
        };
        let all = project(&mut ContiguousKv::on(&Naive, &d.spec, 1, KvFormat::F32));
        for by in SELECTORS.into_iter().chain(TILES) {
            let selector = rows_of(by);
            let layers = d.spec.layers.iter().map(|l| l.attn.as_ref().is_some_and(|a| a.window.is_none())).collect();
            let kv = ContiguousKv::on(&Naive, &d.spec, 1, KvFormat::F32);
            let mut kv = Asking { kv, by: selector, layers, reads: Reads::default() };
            let logits = project(&mut kv);
            assert!(kv.reads.read < kv.reads.all);
            let log = |row: &[f64], id: u32| row[id as usize] - row.iter().map(|x| x.exp()).sum::<f64>().ln();
            let mut apart = 0.0f64;
            let mut s = scheduler(engine(name, &[("select", by)], KvFormat::F32), 1, 13, 30, true);
            for n in [20, 33, 64, 65, 96, 97, 127, 200, 256, 257, text.len()].into_iter().filter(|n| *n <= text.len()) {
                let (got, _) = after(&mut s, &text[..n]).unwrap();
                for (id, logprob) in got {
                    let want = log(logits.row(n - 1), id);
                    assert!((f64::from(logprob) - want).abs() < 1e-4, "{name}, {by}, {n}: {logprob} {want}");
                    apart = apart.max((want - log(all.row(n - 1), id)).abs());
                }
            }
            assert!(apart > 1e-3, "{name}, {by}: as if all were read, {apart}");
        }
    }
}

/// Reads a fixed list of blocks, after a look at what it is asked.
struct Listed {
    list: Vec<usize>,
    block: usize,
    group: usize,
}

impl Select for Listed {
    fn plan(&self) -> SelectPlan {
        SelectPlan { pool: Pool::Mean, block: self.block, scope: SelectScope::Row }
    }
    fn select(&self, ask: &SelectAsk<'_>) -> Result<Vec<usize>, MethodError> {
        let Pooled::Mean(mean) = ask.pooled else { return Err(MethodError::new("other pooled keys".to_string())) };
        assert_eq!((ask.queries.rows(), ask.queries.cols()), (self.group, mean.cols()));
        Ok(self.list.iter().copied().filter(|b| *b < mean.rows() || *b > 90).collect())
    }
}

/// What is left out takes no part, whatever lies there; what is behind the whole blocks is always read; answers that do
/// not fit are refused.
#[test]
fn blocks_that_are_left_out_take_no_part() {
    let e = common::engine("llama").with_context(400);
    let (model, spec) = (e.model(), &e.model().spec);
    let attn = spec.layers[0].attn.as_ref().unwrap();
    let group = attn.heads / attn.kv_heads;
    let text = |other: bool| -> Vec<u32> {
        let mut rng = Rng::new(5);
        let mut text: Vec<u32> = (0..200).map(|_| 3 + rng.below(90) as u32).collect();
        if other {
            (64..128).for_each(|i| text[i] = 3 + rng.below(90) as u32);
        }
        text
    };
    let run = |text: &[u32], block: usize, list: &[usize]| {
        let by = Selector::Rows(Arc::new(Listed { list: list.to_vec(), block, group }));
        let mut kv = BlockStore::on(&Cpu, spec, KvFormat::F32, 1 << 30).selecting(by, spec, 400, 1 << 30);
        let slot = kv.open(0);
        assert!(kv.reserve(slot, text.len()));
        let rows = model.forward(text, &Batch::one(slot, 0..text.len()), &mut kv, &mut NoTap)?;
        Ok::<_, ModelError>((rows.view().rows_range(192, 200).to_mat(), kv.reads()))
    };
    // Rows behind position 192 read what lies before 64 and their own block; nothing of 64..128 comes to them, by no
    // layer, where no row from 128 on reads it.
    for (block, list) in [(64, vec![0]), (32, vec![0, 1])] {
        let (a, reads) = run(&text(false), block, &list).unwrap();
        assert_eq!(a, run(&text(true), block, &list).unwrap().0, "{block}");
        assert!(reads.read < reads.all);
        let (c, all) = run(&text(false), block, &[0, 1, 2, 3, 4, 5]).unwrap();
        assert_eq!(all.read, all.all);
        assert!(c != a && c != run(&text(true), block, &[0, 1, 2, 3, 4, 5]).unwrap().0);
    }
    for (list, said) in [(vec![1, 0], "block 0 after block 1"), (vec![0, 99], "block 99 of ")] {
        let e = run(&text(false), 32, &list).unwrap_err().to_string();
        assert!(e.contains(said) && e.contains("layer 0, head "), "{e}");
    }
    let e = run(&text(false), 48, &[]).unwrap_err().to_string();
    assert!(e.contains("blocks of 48") && e.contains("32"), "{e}");
}

#[test]
fn embeddings_are_under_the_plan_too() {
    let text: Vec<u32> = (0..250).map(|i| 3 + i * 11 % 90).collect();
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
        for by in [SELECTORS[0], TILES[2]] {
            let flags = [("select", by)];
            assert_eq!(vector(&flags, 512), vector(&flags, 5));
            assert_ne!(vector(&flags, 512), vector(&[], 512));
        }
    }
}

#[test]
fn pooled_keys_are_counted() {
    let spec = &common::engine("gemma3").model().spec.clone();
    let plain = BlockStore::new(spec, KvFormat::F16, 1 << 20);
    let with = |said: &str| {
        let by = plan(&[("select", said)]).select().cloned().unwrap();
        BlockStore::new(spec, KvFormat::F16, 1 << 20).selecting(by, spec, 400, 1 << 20)
    };
    let store = with(SELECTORS[0]);
    // Those of layers without a window.
    let asked = spec.layers.iter().filter_map(|l| l.attn.as_ref()).filter(|a| a.window.is_none());
    let more: usize = asked.map(|a| 2 * 4 * a.kv_heads * a.head_dim).sum();
    assert!(more > 0);
    assert_eq!(store.block_bytes(), plain.block_bytes() + more);
    assert_eq!(store.total(), (1 << 20) / store.block_bytes());
    // What is decided where tiles begin counts, too: four of 8 positions in a block of 32, one of 32 or more.
    let decided = |said: &str| with(said).block_bytes() - store.block_bytes();
    assert!(decided(TILES[0]) > 0 && decided(TILES[0]) == decided(TILES[3]));
    let mean = plain.block_bytes() + more / 2;
    assert_eq!(with(TILES[1]).block_bytes() - mean, 4 * decided(TILES[0]));
}

/// Asks somebody else and counts.
struct Counted(Arc<dyn Select>, AtomicUsize);

impl Select for Counted {
    fn plan(&self) -> SelectPlan {
        self.0.plan()
    }
    fn select(&self, ask: &SelectAsk<'_>) -> Result<Vec<usize>, MethodError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.select(ask)
    }
}

/// Once for each head of each layer where a tile begins behind a whole block, however the text is cut.
#[test]
fn tiles_are_asked_about_once() {
    let e = common::engine("llama").with_context(400);
    let spec = &e.model().spec;
    let heads: usize = spec.layers.iter().filter_map(|l| l.attn.as_ref()).map(|a| a.kv_heads).sum();
    let text: Vec<u32> = (0..200).map(|i| 3 + i * 13 % 90).collect();
    for (said, starts) in [
        (TILES[0], (1..7).map(|k| k * 32).collect::<Vec<_>>()),
        (TILES[1], (4..25).map(|k| k * 8).collect()),
        (TILES[2], (2..10).map(|k| k * 20).collect()),
        (TILES[3], vec![96, 192]),
        (SELECTORS[0], (32..200).collect()),
    ] {
        let mut answers = Vec::new();
        for chunk in [200, 64, 7] {
            let by = Arc::new(Counted(rows_of(said), AtomicUsize::new(0)));
            let selector = Selector::Rows(by.clone());
            let mut kv = BlockStore::on(&Cpu, spec, KvFormat::F32, 1 << 30).selecting(selector, spec, 400, 1 << 30);
            let slot = kv.open(0);
            assert!(kv.reserve(slot, text.len()));
            let mut last = None;
            for from in (0..text.len()).step_by(chunk) {
                let to = (from + chunk).min(text.len());
                let batch = Batch::one(slot, from..to);
                let rows = e.model().forward(&text[from..to], &batch, &mut kv, &mut NoTap).unwrap();
                last = Some(rows.row(to - from - 1).to_vec());
            }
            assert_eq!(by.1.load(Ordering::Relaxed), heads * starts.len(), "{said}, {chunk}");
            answers.push((last, kv.reads()));
        }
        assert!(answers[0] == answers[1] && answers[0] == answers[2], "{said}");
    }
}

/// A row whose tile nobody decided about is an error, not a guess.
#[test]
fn a_row_without_a_decision_is_refused() {
    let e = common::engine("llama").with_context(400);
    let (model, spec) = (e.model(), &e.model().spec);
    let layers = vec![true; spec.layers.len()];
    let text: Vec<u32> = (0..40).map(|i| 3 + i * 13 % 90).collect();
    let plain = ContiguousKv::new(spec, 1);
    // This store keeps no decisions.
    let mut kv = Asking { kv: plain, by: Arc::new(Blind(rows_of(TILES[0]))), layers, reads: Reads::default() };
    model.forward(&text[..33], &Batch::one(0, 0..33), &mut kv, &mut NoTap).unwrap();
    let e = model.forward(&text[33..], &Batch::one(0, 33..40), &mut kv, &mut NoTap).unwrap_err().to_string();
    assert!(e.contains("position 33") && e.contains("decided at position 32"), "{e}");
}

/// A selector over pages without pooled keys: tiles that begin before the first whole block ask nothing of them.
struct Blind(Arc<dyn Select>);

impl Select for Blind {
    fn plan(&self) -> SelectPlan {
        SelectPlan { block: 64, ..self.0.plan() }
    }
    fn select(&self, ask: &SelectAsk<'_>) -> Result<Vec<usize>, MethodError> {
        self.0.select(ask)
    }
}

#[test]
fn beside_a_keeper_blocks_are_those_of_what_stays() {
    let keep = ("keep", "streaming-llm:budget=100,every=8");
    for name in ["llama", "qwen3_moe"] {
        let all = requests(6, 5);
        let (kept, _) = alone(name, &[keep], KvFormat::F16, &all);
        let (got, reads) =
            alone(name, &[keep, ("select", "pooled-blocks:budget=400,dense_layers=0")], KvFormat::F16, &all);
        assert!(got == kept && reads.read == reads.all, "{name}: all that stays is read");
        for by in [SELECTORS[0], TILES[1]] {
            let both = [keep, ("select", by)];
            let (expected, reads) = alone(name, &both, KvFormat::F16, &all);
            let most = if by == SELECTORS[0] { 9 } else { 10 };
            assert!(expected != kept && reads.read * 10 < reads.all * most, "{name}: {reads:?}");
            for (batch, rows, blocks, reuse) in [(1, 7, 99, true), (6, 33, 999, true), (3, 16, 14, true)] {
                for draft in ["none", "copyspec"] {
                    let e = engine(name, &[both[0], both[1], ("draft", draft)], KvFormat::F16);
                    let mut s = scheduler(e, batch, rows, blocks, reuse);
                    all.iter().enumerate().for_each(|(i, g)| s.submit(i as u64, ask(g)).unwrap());
                    let got = drain(&mut s).into_values().collect::<Vec<_>>();
                    assert_eq!(got, expected, "{name}, {by}, {draft}: {batch} x {rows} in {blocks} blocks");
                    assert!(s.gauges().evicted > 0);
                }
            }
        }
    }
}

#[test]
fn what_cannot_run_is_refused_with_its_numbers() {
    for (flags, words) in [
        (vec![("select", "pooled-blocks:block=48")], vec!["blocks of 48", "multiple", "32"]),
        (vec![("select", "pooled-blocks:block=16")], vec!["blocks of 16"]),
        (
            vec![("select", TILES[2]), ("keep", "streaming-llm:budget=50,every=32")],
            vec!["tiles of 20", "every 32 positions", "divides 32"],
        ),
        (
            vec![("select", "pooled-blocks"), ("keep", "h2o:budget=50")],
            vec!["keeper that goes by the attention", "leave one"],
        ),
    ] {
        let e = engine("llama", &flags, KvFormat::F16);
        let said = e.check_plan().unwrap_err().to_string();
        assert!(words.iter().all(|w| said.contains(w)), "{said}");
        let mut s = scheduler(e, 1, 512, 20, true);
        assert_eq!(s.submit(0, ask(&requests(1, 1)[0])).unwrap_err().to_string(), said);
    }
    assert!(engine("llama", &[("select", "pooled-blocks:block=96")], KvFormat::F16).check_plan().is_ok());
    let row =
        RunPlan::none().flag("select", "pooled-blocks:tile=8", &lacuna_methods::registry()).unwrap_err().to_string();
    assert!(row.contains("tile = 8") && row.contains("scope = \"tile\""), "{row}");
    let said = plan(&[("select", SELECTORS[0]), ("draft", "copyspec")]).words();
    assert!(said[0].ends_with("lossless") && said[1].ends_with("an approximation"), "{said:?}");
    let hash = |by: &str| plan(&[("select", by)]).hash();
    assert!(hash(SELECTORS[0]) != hash(SELECTORS[1]) && hash(SELECTORS[0]) != 0);
    let read = "version = 1\n[select]\nmethod = \"pooled-blocks\"\nbudget = 256\n";
    assert!(RunPlan::parse(read, &lacuna_methods::registry()).unwrap().select().is_some());
}

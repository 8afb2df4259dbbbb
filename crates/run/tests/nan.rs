//! A model that computes no numbers: whoever asks it gets an error that says so, and no answer.

mod common;

use std::path::Path;

use common::tokenizer;
use lacuna_contract::StepSeconds;
use lacuna_model::{Decoder, LoadOptions, ModelError};
use lacuna_run::{Engine, Event, Generation, Job, Limits, Pooling, Request, RunError, RunPlan, Scheduler};

/// A tiny model with a NaN in the middle of a matrix of its last block.
fn broken(name: &str, tensor: &str, plan: RunPlan) -> Engine {
    loaded(name, tensor, plan).unwrap()
}

fn loaded(name: &str, tensor: &str, plan: RunPlan) -> Result<Engine, ModelError> {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name);
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut file = std::fs::read(from.join("model.safetensors")).unwrap();
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&file[8..8 + n]).unwrap();
    assert_eq!(header[tensor]["dtype"], "F32", "{tensor}");
    let at = |i: usize| header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
    let middle = 8 + n + (at(0) + at(1)) / 2 / 4 * 4;
    file[middle..middle + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let checkpoint = lacuna_checkpoint::open(dir.path()).unwrap();
    let options = LoadOptions { gate: plan.gate(), ..LoadOptions::default() };
    Ok(Engine::new(Decoder::load(&checkpoint, &options)?).with_context(256).with_plan(plan))
}

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

fn text() -> Vec<u32> {
    (0..70).map(|i| 3 + i * 7 % 90).collect()
}

/// What becomes of a request: it must fail, and nothing be told before that.
fn failure(e: Engine, request: Request) -> RunError {
    let limits = Limits { batch: 2, prefill_rows: 32, kv_bytes: 64 << 20, reuse: true };
    let mut s = Scheduler::new(e, tokenizer(), limits);
    s.set_prices(StepSeconds::new(vec![(1, 1.0), (64, 1.0)]).unwrap());
    s.submit(0, request).unwrap();
    let mut failed = None;
    for _ in 0..1000 {
        if s.is_idle() {
            break;
        }
        s.step(&mut |_, event| match event {
            Event::Failed(e) => failed = Some(e),
            other => panic!("{other:?}"),
        });
    }
    let blocks = s.gauges().blocks;
    assert_eq!((blocks.used, blocks.free + blocks.cached), (0, blocks.total));
    failed.expect("no answer comes of it")
}

fn generate(rivals: bool) -> Request {
    let generation = Generation { prompt: text(), max_tokens: 8, ..Generation::default() };
    let logprobs = rivals.then_some(2);
    Request::new(text(), Job::Generate { generation, logprobs, grammar: None, special: false })
}

fn plan(question: &str, said: &str) -> RunPlan {
    let mut plan = RunPlan::none();
    plan.flag(question, said, &lacuna_methods::registry()).unwrap();
    plan
}

#[test]
fn no_token_is_chosen_by_what_is_no_number() {
    for request in [generate(false), generate(true)] {
        match failure(broken("llama", DOWN, RunPlan::none()), request) {
            RunError::Logits { value, tokens, .. } => assert!(value.is_nan() && tokens == 70, "after {tokens} tokens"),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_score_is_no_number_either() {
    let e = failure(broken("llama", DOWN, RunPlan::none()), generate(false).scored(1));
    assert!(matches!(e, RunError::Logits { tokens: 1, .. }), "{e}");
    let texts = [text(), vec![5, 6, 7]];
    let e = lacuna_run::score(broken("llama", DOWN, RunPlan::none()), &texts, &mut |_, _| {}).unwrap_err();
    assert!(e.to_string().contains("broken or its weights were damaged"), "{e}");
}

#[test]
fn an_embedding_is_no_number() {
    for pooling in [Pooling::Mean, Pooling::Last] {
        let e = failure(broken("llama", DOWN, RunPlan::none()), Request::new(text(), Job::Embed(pooling)));
        assert!(matches!(e, RunError::Embedding { tokens: 70, value } if value.is_nan()), "{e}");
    }
}

/// A plan hides nothing: what drafts, keeps, selects or gates meets the same fault.
#[test]
fn a_plan_hides_nothing() {
    for (question, said) in [
        ("draft", "copyspec"),
        ("draft", "token-recycling"),
        ("keep", "streaming-llm:budget=40"),
        ("keep", "h2o:budget=40"),
        ("select", "pooled-blocks:budget=32,dense_layers=0"),
        ("select", "flexprefill:tile=32,min_budget=32"),
        ("gate", "wina:targets=attn.*"),
        ("gate", "wina:targets=attn.*,threshold=0.01"),
    ] {
        let e = failure(broken("llama", DOWN, plan(question, said)), generate(false));
        assert!(e.to_string().contains("broken") || e.to_string().contains("NaN"), "{question} {said}: {e}");
    }
    // A gate goes by the weights themselves.
    for said in ["wina:keep=0.5", "wina:threshold=0.01"] {
        let e = loaded("llama", DOWN, plan("gate", said)).err().expect("a gate at a NaN").to_string();
        assert!(e.contains("layers.1.ffn.down") && e.contains("NaN"), "{e}");
    }
    // In the keys, by which keepers and selectors go.
    let keys = "model.layers.1.self_attn.k_proj.weight";
    for (question, said) in [("keep", "h2o:budget=40"), ("select", "pooled-blocks:budget=32,dense_layers=0")] {
        let e = failure(broken("llama", keys, plan(question, said)), generate(false));
        assert!(!e.to_string().is_empty(), "{question} {said}: {e}");
    }
    // With a state.
    let e =
        failure(broken("mamba2", "backbone.layers.1.mixer.in_proj.weight", plan("draft", "copyspec")), generate(false));
    assert!(matches!(e, RunError::Logits { .. }), "{e}");
}

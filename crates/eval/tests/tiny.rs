//! Evaluations of the tiny checkpoints against the logits that transformers computed.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use lacuna_checkpoint::{Checkpoint, open};
use lacuna_eval::tasks::{Exam, read};
use lacuna_eval::{Eval, EvalError, Means, TakeRows};
use lacuna_format::Weights;
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, NoTap};
use serde_json::Value;

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)
}

fn golden(name: &str) -> (Vec<Vec<u32>>, Vec<Vec<Vec<f64>>>) {
    let g: Value = serde_json::from_slice(&std::fs::read(tiny(name).join("golden.json")).unwrap()).unwrap();
    (serde_json::from_value(g["input_ids"].clone()).unwrap(), serde_json::from_value(g["logits"].clone()).unwrap())
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let z = row.iter().map(|x| x.exp()).sum::<f64>().ln();
    row.iter().map(|x| x - z).collect()
}

fn best(row: &[f64]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

fn eval(ctx: usize) -> Eval<'static> {
    Eval { ctx, ..Eval::default() }
}

#[test]
fn losses_of_every_architecture() {
    let mut seen = 0;
    let dirs = std::fs::read_dir(tiny("")).unwrap().map(|e| e.unwrap().path());
    for dir in dirs.filter(|d| d.join("golden.json").is_file()) {
        let name = dir.file_name().unwrap().to_str().unwrap().to_string();
        let model = open(&dir).unwrap();
        let (ids, logits) = golden(&name);
        for (tokens, rows) in ids.iter().zip(&logits) {
            let want: f64 = (1..tokens.len()).map(|p| -log_softmax(&rows[p - 1])[tokens[p] as usize]).sum();
            let got = eval(tokens.len()).judge(tokens, &model).unwrap();
            assert_eq!((got.tokens, got.windows), (tokens.len() - 1, 1));
            let want = want / got.tokens as f64;
            assert!((got.nll - want).abs() < 1e-5, "{name}: {} instead of {want}", got.nll);
            assert_eq!(got.ppl, got.nll.exp());
        }
        seen += 1;
    }
    assert!(seen >= 20);
}

#[test]
fn divergence_from_the_dense_model() {
    let (dense, model) = (open(tiny("llama")).unwrap(), open(tiny("llama_bf16")).unwrap());
    let ((ids, p), (same, q)) = (golden("llama"), golden("llama_bf16"));
    assert_eq!(ids, same);
    for (s, tokens) in ids.iter().enumerate() {
        let n = tokens.len() - 1;
        let (mut kl, mut agree) = (0.0, 0.0);
        for (p, q) in p[s].iter().zip(&q[s]).take(n) {
            let (a, b) = (log_softmax(p), log_softmax(q));
            kl += a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum::<f64>();
            agree += f64::from(u8::from(best(p) == best(q)));
        }
        let e = eval(tokens.len());
        let mut reference = e.reference(tokens, &dense).unwrap();
        let got = e.against(&model, &mut reference).unwrap();
        let against = got.against.unwrap();
        assert!((against.kl_mean - kl / n as f64).abs() < 1e-6, "{} {}", against.kl_mean, kl / n as f64);
        assert!(against.kl_mean > 1e-6);
        assert_eq!(against.top1_agree, agree / n as f64);
        let alone = e.judge(tokens, &dense).unwrap();
        assert_eq!((against.nll_dense, against.ppl_dense), (alone.nll, alone.ppl));
        // The reference serves again, and a model is no distance from itself.
        let itself = e.against(&dense, &mut reference).unwrap();
        assert_eq!((itself.nll, itself.against.unwrap().kl_mean), (alone.nll, 0.0));
        assert_eq!(itself.against.unwrap().top1_agree, 1.0);
    }
}

fn text(vocab: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * i * 7 + i / 3) % vocab).collect()
}

#[test]
fn memory_and_company_change_no_bit() {
    let model = open(tiny("qwen3_moe")).unwrap();
    let tokens = text(model.spec().vocab as u32, 32 * 80);
    let all = eval(32).judge(&tokens, &model).unwrap();
    assert_eq!((all.windows, all.tokens, all.window_nll.len()), (80, 80 * 31, 80));
    let one = Eval { windows: Some(1), ..eval(32) }.judge(&tokens, &model).unwrap();
    assert_eq!(one.nll, all.window_nll[0]);

    let within = |max: u64, scratch: Option<PathBuf>| {
        Eval { room: Means { max_ram: Some(max), scratch, ..Means::default() }, ..eval(32) }.judge(&tokens, &model)
    };
    let error = within(1000, None).unwrap_err().to_string();
    assert!(error.contains("at least") && error.contains("1000"), "{error}");
    let low = error.split(' ').filter_map(|w| w.parse::<u64>().ok()).max().unwrap();
    assert_eq!(within(low, None).unwrap(), all, "spilled to a scratch file");
    assert!(within(low - 1, None).is_err());
    assert!(within(low, Some("/no/such/folder".into())).unwrap_err().to_string().contains("/no/such/folder"));

    let bos = Eval { bos: Some(1), windows: Some(2), ..eval(32) }.judge(&tokens, &model).unwrap();
    assert_eq!(bos.tokens, 62);
    let steps = RefCell::new(Vec::new());
    let note = |done, total| steps.borrow_mut().push((done, total));
    Eval { progress: Some(&note), ..eval(32) }.judge(&tokens, &model).unwrap();
    let steps = steps.into_inner();
    assert!(!steps.is_empty() && steps.iter().enumerate().all(|(i, s)| *s == (i + 1, steps.len())));
}

#[test]
fn what_does_not_fit_is_an_error() {
    let model = open(tiny("llama")).unwrap();
    let vocab = model.spec().vocab as u32;
    let e = eval(8).judge(&[1, 2, vocab, 3, 4, 5, 6, 7], &model).unwrap_err();
    assert!(e.to_string().contains(&vocab.to_string()));
    assert!(eval(8).judge(&[1, 2], &model).is_err());
}

/// The log likelihood of the last `target` tokens, from the whole decoder at once.
fn slow(model: &Checkpoint, tokens: &[u32], target: usize) -> (f64, bool) {
    let d = Decoder::load(model, &LoadOptions::default()).unwrap();
    let mut kv = ContiguousKv::new(&d.spec, 1);
    let h = d.forward(tokens, &Batch::one(0, 0..tokens.len()), &mut kv, &mut NoTap).unwrap();
    let logits = d.logits(h.view());
    let (mut sum, mut greedy) = (0.0, true);
    for (p, &next) in tokens.iter().enumerate().skip(tokens.len() - target) {
        let row: Vec<f64> = logits.row(p - 1).iter().map(|&x| f64::from(x)).collect();
        sum += log_softmax(&row)[next as usize];
        greedy &= best(&row) == next as usize;
    }
    (sum, greedy)
}

#[test]
fn tasks_measure_what_the_model_says() {
    let model = open(tiny("llama")).unwrap();
    let vocab = model.spec().vocab as u32;
    let ids = |t: &str| t.bytes().map(|b| u32::from(b) % vocab).collect::<Vec<u32>>();
    let encode = |t: &str| Ok(ids(t));
    let exam = Exam::default();

    let file = "{\"ctx\":\"The sky is\",\"choices\":[\"blue\",\"of lead\",\"I\"],\"label\":1}\n\
                {\"ctx\":\"One and one\",\"choices\":[\"are two\",\"never\"],\"label\":0}\n";
    let (_, questions) = read(file).unwrap();
    let (mut acc, mut norm) = (0.0, 0.0);
    for q in &questions {
        let pick = |by: &dyn Fn(&str) -> f64| {
            let s = |c: &String| slow(&model, &ids(&format!("{}{c}", q.context)), c.len()).0 / by(c);
            best(&q.continuations.iter().map(s).collect::<Vec<_>>())
        };
        acc += f64::from(u8::from(pick(&|_| 1.0) == q.label)) / 2.0;
        norm += f64::from(u8::from(pick(&|c| c.len() as f64 - 1.0) == q.label)) / 2.0;
    }
    let got = exam.run(file, &encode, &model).unwrap();
    assert_eq!((got.kind, got.items, got.measures.acc, got.measures.acc_norm), ("choice", 2, Some(acc), Some(norm)));

    let got = exam.run("{\"text\":\"He went out and shut the door\"}", &encode, &model).unwrap();
    let (log, greedy) = slow(&model, &ids("He went out and shut the door"), 5);
    assert_eq!(got.measures.acc, Some(f64::from(u8::from(greedy))));
    assert!((got.measures.ppl.unwrap() / (-log).exp() - 1.0).abs() < 1e-4);
}

/// Who reads in a model's place hands over rows: of the same rows the same numbers come, and what is missing is told.
#[test]
fn a_reader_stands_in_the_models_place() {
    let (model, dense) = (open(tiny("llama")).unwrap(), open(tiny("llama_bf16")).unwrap());
    let tokens: Vec<u32> = (0..64).map(|i| 3 + i * 7 % 60).collect();
    let decoder = Decoder::load(&model, &LoadOptions::default()).unwrap();
    let read = |texts: &[Vec<u32>], rows: TakeRows<'_>| {
        for (s, text) in texts.iter().enumerate() {
            let mut kv = ContiguousKv::new(&decoder.spec, 1);
            let x = decoder.forward(text, &Batch::one(0, 0..text.len()), &mut kv, &mut NoTap)?;
            let half = text.len() / 2;
            rows(s, 0, x.view().rows_range(0, half))?;
            rows(s, half, x.view().rows_range(half, text.len()))?;
        }
        Ok::<(), EvalError>(())
    };
    let own = Eval { reader: Some(&read), ..eval(16) };
    assert_eq!(own.judge(&tokens, &model).unwrap(), eval(16).judge(&tokens, &model).unwrap());
    let against = |e: &Eval<'_>| e.against(&model, &mut e.reference(&tokens, &dense).unwrap()).unwrap();
    let (a, b) = (against(&own), against(&eval(16)));
    assert!(a == b && a.window_kl == b.window_kl && a.against.unwrap().kl_mean > 0.0);
    let jsonl = "{\"text\":\"abc def\"}\n{\"text\":\"de fgh\"}";
    let encode = |t: &str| Ok(t.bytes().map(|b| u32::from(b) % 60).collect());
    let exam = |reader| Exam { reader, ..Exam::default() }.run(jsonl, &encode, &model).unwrap();
    assert_eq!(exam(Some(&read)), exam(None));
    let short = |texts: &[Vec<u32>], rows: TakeRows<'_>| read(&texts[1..], rows);
    let said = Eval { reader: Some(&short), ..eval(16) }.judge(&tokens, &model).unwrap_err().to_string();
    assert!(said.contains("48 rows of 64"), "{said}");
    let wide = |_: &[Vec<u32>], rows: TakeRows<'_>| rows(0, 0, lacuna_base::MatRef::new(1, 2, &[0.0, 1.0]));
    let said = Eval { reader: Some(&wide), ..eval(16) }.judge(&tokens, &model).unwrap_err().to_string();
    assert!(said.contains("1 rows of 2 channels at position 0 of text 0"), "{said}");
}

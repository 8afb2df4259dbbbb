//! The tiny checkpoints under configurations that say something elsewhere, otherwise or not at all, against what
//! transformers makes of them: see `tests/golden/make_variants.py`.

use std::path::{Path, PathBuf};

use lacuna_kernels::KvFormat;
use lacuna_model::{Backend, Batch, ContiguousKv, Cpu, Decoder, LoadOptions, Naive, NoTap};
use lacuna_spec::RopeScaling;
use serde_json::{Value, json};

const TOLERANCE: f64 = 1e-4;
/// Of a sequence's mean loss, in nats.
const NLL_TOLERANCE: f64 = 1e-5;

/// Refused here, computed there: a key and the value that says so.
const NOT_OURS: &[(&str, &str)] = &[("rope_type", "dynamic"), ("hidden_act", "quick_gelu")];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What a configuration makes of the tiny weights.
#[derive(Debug)]
struct Run {
    /// The last position's logits of each sequence.
    logits: Vec<Vec<f64>>,
    /// The mean loss of each sequence, in nats.
    nll: Vec<f64>,
    /// The likeliest tokens after the golden prompt, if there is one.
    greedy: Option<Vec<u32>>,
}

fn run<B: Backend>(backend: &B, variant: &Value, dir: &Path) -> Result<Run, String> {
    let source = golden().join("tiny").join(variant["model"].as_str().unwrap());
    let mut config = json_of(&source.join("config.json"));
    let object = config.as_object_mut().unwrap();
    for key in variant["drop"].as_array().into_iter().flatten() {
        object.remove(key.as_str().unwrap());
    }
    object.extend(variant["set"].as_object().cloned().unwrap_or_default());
    if let Some(outer) = variant["wrap"].as_object() {
        let text = config;
        config = json!({"model_type": "gemma3", "text_config": text});
        config.as_object_mut().unwrap().extend(outer.clone());
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::copy(source.join("model.safetensors"), dir.join("model.safetensors")).unwrap();
    let checkpoint = lacuna_checkpoint::open(dir).map_err(|e| e.to_string())?;
    if let Some(left) = checkpoint.unused().first() {
        return Err(format!("{left:?} is left over"));
    }
    let decoder = Decoder::load_on(backend, &checkpoint, &LoadOptions::default()).map_err(|e| e.to_string())?;
    let mut out = Run { logits: Vec::new(), nll: Vec::new(), greedy: None };
    for ids in json_of(&source.join("golden.json"))["input_ids"].as_array().unwrap() {
        let ids: Vec<u32> = ids.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
        let mut kv = ContiguousKv::on(backend, &decoder.spec, 1, KvFormat::F32);
        let rows = logits(backend, &decoder, &ids, 0, &mut kv)?;
        let losses = rows.iter().zip(&ids[1..]).map(|(row, &next)| loss(row, next as usize));
        out.nll.push(losses.sum::<f64>() / (ids.len() - 1) as f64);
        out.logits.extend(rows.into_iter().last());
    }
    if let Some(said) = said(variant) {
        out.greedy = Some(greedy(backend, &decoder, &said[0], said[1].len())?);
    }
    Ok(out)
}

/// The logits at the positions of `ids` from `from` on; those before lie in `kv`.
fn logits<B: Backend>(
    backend: &B,
    decoder: &Decoder<B>,
    ids: &[u32],
    from: usize,
    kv: &mut ContiguousKv<B>,
) -> Result<Vec<Vec<f64>>, String> {
    let batch = Batch::one(0, from..ids.len());
    let hidden = decoder.forward(&ids[from..], &batch, kv, &mut NoTap).map_err(|e| e.to_string())?;
    let logits = decoder.head.project(&decoder.head.normed(&hidden));
    let logits = backend.download(&logits, 0..ids.len() - from).map_err(|e| e.to_string())?;
    let logits = logits.view();
    Ok((0..logits.rows()).map(|r| logits.row(r).iter().map(|&x| f64::from(x)).collect()).collect())
}

fn loss(row: &[f64], next: usize) -> f64 {
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + row.iter().map(|x| (x - most).exp()).sum::<f64>().ln() - row[next]
}

/// The `n` likeliest tokens after `prompt`, a step each. What LongRoPE read by the list of another length is read
/// again.
fn greedy<B: Backend>(backend: &B, decoder: &Decoder<B>, prompt: &[u32], n: usize) -> Result<Vec<u32>, String> {
    let ropes = decoder.spec.layers.iter().filter_map(|l| l.attn.as_ref()?.rope.as_ref());
    let mut ids = prompt.to_vec();
    let mut kv = ContiguousKv::on(backend, &decoder.spec, 1, KvFormat::F32);
    while ids.len() < prompt.len() + n {
        let crossed = ropes
            .clone()
            .any(|r| matches!(r.scaling, RopeScaling::Longrope { original, .. } if ids.len() == original + 1));
        if crossed {
            kv.truncate(0, 0);
        }
        let rows = logits(backend, decoder, &ids, kv.len(0), &mut kv)?;
        let row = rows.last().unwrap();
        ids.push((0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32);
    }
    Ok(ids.split_off(prompt.len()))
}

/// The golden prompt and what follows it.
fn said(variant: &Value) -> Option<[Vec<u32>; 2]> {
    let bytes = |text: &str| text.as_bytes().chunks(2).map(|two| hex(two[0]) * 16 + hex(two[1])).collect();
    let said = variant.get("greedy")?;
    Some([0, 1].map(|i| bytes(said[i].as_str().unwrap())))
}

fn hex(digit: u8) -> u32 {
    char::from(digit).to_digit(16).unwrap()
}

fn close(ours: &Run, theirs: &Value) -> bool {
    let rows = theirs.as_array().unwrap();
    rows.len() == ours.logits.len()
        && rows.iter().zip(&ours.logits).all(|(row, ours)| {
            let row = row.as_array().unwrap();
            !row.is_empty() && row.iter().zip(ours).all(|(x, y)| (x.as_f64().unwrap() - y).abs() <= TOLERANCE)
        })
}

/// The same losses and the same continuation.
fn says_the_same(ours: &Run, variant: &Value) -> bool {
    let nll = variant["nll"].as_array().unwrap();
    let [_, tokens] = said(variant).unwrap();
    nll.len() == ours.nll.len()
        && nll.iter().zip(&ours.nll).all(|(x, y)| (x.as_f64().unwrap() - y).abs() <= NLL_TOLERANCE)
        && tokens.len() == 64
        && ours.greedy.as_ref() == Some(&tokens)
}

fn not_ours(variant: &Value) -> bool {
    let set = &variant["set"];
    NOT_OURS.iter().any(|(key, v)| set[*key] == **v || set["rope_scaling"][*key] == **v)
}

#[test]
fn configurations_mean_what_transformers_makes_of_them() {
    all(&Cpu);
}

#[test]
fn so_they_do_in_f64() {
    all(&Naive);
}

fn all<B: Backend>(backend: &B) {
    let all = json_of(&golden().join("variants.json"));
    let all = all["variants"].as_array().unwrap();
    assert!(all.len() > 500, "{} variants", all.len());
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for variant in all {
        let ours = run(backend, variant, dir.path());
        let fine = match (&ours, variant.get("logits"), variant.get("v4_logits")) {
            (Ok(ours), Some(theirs), _) => close(ours, theirs) && says_the_same(ours, variant),
            (Err(_), Some(_), _) => not_ours(variant),
            // What the newer cannot run, the older may have run.
            (Ok(ours), None, Some(theirs)) => close(ours, theirs),
            (Ok(_), None, None) => false,
            (Err(_), None, _) => true,
        };
        if !fine {
            wrong.push(format!("{variant}\n    {ours:.4?}"));
        }
    }
    let n = wrong.len();
    wrong.truncate(20);
    assert!(wrong.is_empty(), "{n} wrong, the first:\n{}", wrong.join("\n"));
}

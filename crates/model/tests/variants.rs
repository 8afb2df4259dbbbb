//! The tiny checkpoints under configurations that say something elsewhere, otherwise or not at all, against what transformers makes of
//! them: see `tests/golden/make_variants.py`.

use std::path::{Path, PathBuf};

use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, NoTap};
use serde_json::{Value, json};

const TOLERANCE: f64 = 1e-4;

/// Refused here, computed there: a key and the value that says so.
const NOT_OURS: &[(&str, &str)] = &[("rope_type", "dynamic"), ("hidden_act", "quick_gelu")];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The last position's first logits of each sequence.
fn run(variant: &Value, dir: &Path) -> Result<Vec<Vec<f64>>, String> {
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
    let decoder = Decoder::load(&checkpoint, &LoadOptions::default()).map_err(|e| e.to_string())?;
    let mut out = Vec::new();
    for ids in json_of(&source.join("golden.json"))["input_ids"].as_array().unwrap() {
        let ids: Vec<u32> = ids.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
        let batch = Batch::one(0, 0..ids.len());
        let mut kv = ContiguousKv::new(&decoder.spec, 1);
        let hidden = decoder.forward(&ids, &batch, &mut kv, &mut NoTap).map_err(|e| e.to_string())?;
        let logits = decoder.logits(hidden.view());
        out.push((0..logits.cols()).map(|c| f64::from(logits[(ids.len() - 1, c)])).collect());
    }
    Ok(out)
}

fn close(ours: &[Vec<f64>], theirs: &Value) -> bool {
    let rows = theirs.as_array().unwrap();
    rows.len() == ours.len()
        && rows.iter().zip(ours).all(|(row, ours)| {
            let row = row.as_array().unwrap();
            !row.is_empty() && row.iter().zip(ours).all(|(x, y)| (x.as_f64().unwrap() - y).abs() <= TOLERANCE)
        })
}

fn not_ours(variant: &Value) -> bool {
    let set = &variant["set"];
    NOT_OURS.iter().any(|(key, v)| set[*key] == **v || set["rope_scaling"][*key] == **v)
}

#[test]
fn configurations_mean_what_transformers_makes_of_them() {
    let all = json_of(&golden().join("variants.json"));
    let all = all["variants"].as_array().unwrap();
    assert!(all.len() > 500, "{} variants", all.len());
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = Vec::new();
    for variant in all {
        let ours = run(variant, dir.path());
        let fine = match (&ours, variant.get("logits"), variant.get("v4_logits")) {
            (Ok(ours), Some(theirs), _) => close(ours, theirs),
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

//! Tiny checkpoints of every architecture against logits from transformers: see tests/golden/README.md.

use std::path::{Path, PathBuf};

use lacuna_checkpoint::{Adapter, Checkpoint};
use lacuna_kernels::KvFormat;
use lacuna_model::{Backend, Batch, ContiguousKv, Cpu, Decoder, LoadOptions, Naive, NoTap};

/// Allowed distance of a logit: the twin's own f32 lies up to 4e-6 from its f64.
const TOLERANCE: f32 = 1e-4;

/// The same in f64: what is left is the other side's f32, 9e-6 at the most.
const TOLERANCE_64: f32 = 1e-5;

/// The same where the other tool's values are rounded to 16 bits, and ours are not.
const TOLERANCE_16: f32 = 0.03;

fn checkpoints(of: &str) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(of);
    let mut out: Vec<PathBuf> = std::fs::read_dir(root)
        .expect("golden checkpoints")
        .map(|e| e.expect("a directory entry").path())
        .filter(|p| p.join("golden.json").is_file())
        .collect();
    out.sort();
    out
}

#[test]
fn logits_equal_those_of_transformers() {
    tiny(&Cpu, TOLERANCE);
}

#[test]
fn logits_in_f64_equal_them_closer() {
    tiny(&Naive, TOLERANCE_64);
}

fn tiny<B: Backend>(backend: &B, tolerance: f32) {
    let all = checkpoints("tiny");
    assert!(all.len() >= 20, "only {} golden checkpoints", all.len());
    let mut wrong = Vec::new();
    for dir in all {
        let name = dir.file_name().expect("a name").to_string_lossy().into_owned();
        match worst(backend, &dir) {
            // A scan's f32 may lie further from its f64 than a product's.
            Ok(off) if off <= tolerance.max(1.5 * apart(&dir)) => {}
            Ok(off) => wrong.push(format!("{name}: off by {off}")),
            Err(e) => wrong.push(format!("{name}: {e}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// How far the twin's f32 lies from its f64.
fn apart(dir: &Path) -> f32 {
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("golden.json")).expect("a file")).expect("JSON");
    golden["f32_against_f64_max_abs"].as_f64().unwrap_or(0.0) as f32
}

#[test]
fn checkpoints_of_other_tools_run_as_transformers_runs_what_they_decode_to() {
    foreign(&Cpu);
}

#[test]
fn so_they_do_in_f64() {
    foreign(&Naive);
}

fn foreign<B: Backend>(backend: &B) {
    let all = checkpoints("foreign");
    assert!(all.len() >= 38, "only {} golden checkpoints", all.len());
    let mut wrong = Vec::new();
    for dir in all {
        let golden: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("golden.json")).expect("a file")).expect("JSON");
        let tolerance = if golden["dtype"] == "float32" { TOLERANCE } else { TOLERANCE_16 };
        match worst(backend, &dir) {
            Ok(off) if off <= tolerance => {}
            other => wrong.push(format!("{}: {other:?}", dir.display())),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A checkpoint, or an adapter on the base beside it.
fn open(dir: &Path) -> Result<Checkpoint, Box<dyn std::error::Error>> {
    if !Adapter::is_at(dir) {
        return Ok(lacuna_checkpoint::open(dir)?);
    }
    let adapter = Adapter::open(dir)?;
    let base = dir.join(adapter.base().ok_or("an adapter without a base")?);
    Ok(lacuna_checkpoint::open(base)?.with_adapter(adapter, false)?)
}

/// The largest distance of any logit of a checkpoint.
fn worst<B: Backend>(backend: &B, dir: &Path) -> Result<f32, Box<dyn std::error::Error>> {
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json"))?)?;
    let checkpoint = open(dir)?;
    let decoder = Decoder::load_on(backend, &checkpoint, &LoadOptions::default())?;
    let list = |v: &serde_json::Value| v.as_array().cloned().ok_or("golden.json has another shape");
    let mut worst = 0.0f32;
    for (ids, logits) in list(&golden["input_ids"])?.iter().zip(list(&golden["logits"])?) {
        let ids: Vec<u32> = list(ids)?.iter().filter_map(|i| i.as_u64()).map(|i| i as u32).collect();
        let mut kv = ContiguousKv::on(backend, &decoder.spec, 1, KvFormat::F32);
        let hidden = decoder.forward(&ids, &Batch::one(0, 0..ids.len()), &mut kv, &mut NoTap)?;
        let logits_rows = decoder.head.project(&decoder.head.normed(&hidden));
        let mine = backend.download(&logits_rows, 0..ids.len())?.view().to_mat();
        let rows = list(&logits)?;
        assert_eq!(rows.len(), ids.len(), "a row of logits for each token");
        for (r, row) in rows.iter().enumerate() {
            let row = list(row)?;
            assert_eq!(row.len(), mine.cols(), "a logit for each word");
            for (c, want) in row.iter().enumerate() {
                let off = (f64::from(mine[(r, c)]) - want.as_f64().ok_or("a logit that is no number")?).abs();
                worst = if off.is_nan() { f32::INFINITY } else { worst.max(off as f32) };
            }
        }
    }
    Ok(worst)
}

//! Tiny checkpoints of every architecture against logits from transformers: see tests/golden/README.md.

use std::path::{Path, PathBuf};

use lacuna_checkpoint::save::{GgufKind, save_gguf, save_hf};
use lacuna_checkpoint::{Adapter, Checkpoint};
use lacuna_format::Weights;
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

/// Mixtures, latents and layers that read more than the stream whose networks llama.cpp's files can say, or cannot, and why.
const GGUF: [(&str, Option<&str>); 16] = [
    ("qwen2_moe", Some("layer 0")),
    ("qwen2_moe_stacked", None),
    ("gpt_oss", None),
    ("glm4_moe", None),
    ("glm4_moe_stacked", None),
    ("deepseek_v2", Some("attention_factor")),
    ("deepseek_v2_stacked", None),
    ("deepseek_v3", Some("attn.latent.eps")),
    ("deepseek_v3_stacked", None),
    ("ernie4_5_moe", None),
    ("ernie4_5_moe_stacked", None),
    ("llama4", Some("attn.chunk")),
    ("llama4_plain", None),
    ("gemma4", None),
    ("gemma4_moe", None),
    ("gemma3n", Some("k and v")),
];

#[test]
fn mixtures_and_latents_say_the_same_from_gguf_files_and_back() {
    let (root, out) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny"), tempfile::tempdir());
    let (out, mut wrong) = (out.expect("a directory"), Vec::new());
    for (name, refused) in GGUF {
        let (dir, file) = (root.join(name), out.path().join(format!("{name}.gguf")));
        let source = lacuna_checkpoint::open(&dir).expect("a checkpoint");
        let saved = save_gguf(&source, &file, GgufKind::F32, false, &mut |_, _| {});
        let saved = match (saved, refused) {
            (Err(e), Some(why)) if e.to_string().contains(why) => continue,
            (saved, None) => saved,
            (saved, Some(why)) => Err(lacuna_checkpoint::SaveError::Refused(format!("{why}: {:?}", saved.map(|_| ())))),
        };
        if let Err(e) = saved {
            wrong.push(format!("{name}: {e}"));
            continue;
        }
        let back = out.path().join(format!("{name}-back"));
        let read = lacuna_checkpoint::open(&file).expect("a GGUF file");
        for place in source.spec().places() {
            let of = |c: &Checkpoint| c.get(&place).ok().flatten().map(|s| s.to_mat());
            if of(&read) != of(&source) {
                wrong.push(format!("{name}: {place} is another in the GGUF file"));
            }
        }
        save_hf(&read, &back, None, false, &mut |_, _| {}).expect("a directory");
        for path in [&file, &back] {
            let again = lacuna_checkpoint::open(path).expect("a checkpoint");
            match worst_of(&Cpu, &again, &dir) {
                Ok(off) if off <= TOLERANCE => {}
                other => wrong.push(format!("{}: {other:?}", path.display())),
            }
        }
        let again = lacuna_checkpoint::open(&back).expect("a checkpoint");
        if again.spec().layers != source.spec().layers {
            wrong.push(format!("{name}: another network after the way back"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Of a sequence's mean loss, in nats.
const NLL_TOLERANCE: f64 = 1e-5;

/// The losses of the golden sequences and the likeliest tokens after a prompt, where the file has them; one token after
/// the other, by what was cached.
fn said<B: Backend>(
    backend: &B,
    decoder: &Decoder<B>,
    golden: &serde_json::Value,
) -> Result<(), Box<dyn std::error::Error>> {
    let numbers = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().into_iter().flatten().filter_map(|i| i.as_u64()).map(|i| i as u32).collect()
    };
    let rows = |ids: &[u32], kv: &mut ContiguousKv<B>| -> Result<Vec<Vec<f64>>, Box<dyn std::error::Error>> {
        let from = kv.len(0);
        let hidden = decoder.forward(&ids[from..], &Batch::one(0, from..ids.len()), kv, &mut NoTap)?;
        let logits = decoder.head.project(&decoder.head.normed(&hidden));
        let logits = backend.download(&logits, 0..ids.len() - from)?.view().to_mat();
        Ok((0..logits.rows()).map(|r| logits.row(r).iter().map(|&x| f64::from(x)).collect()).collect())
    };
    let store = || ContiguousKv::on(backend, &decoder.spec, 1, KvFormat::F32);
    for (i, want) in golden["nll"].as_array().into_iter().flatten().enumerate() {
        let ids = numbers(&golden["input_ids"][i]);
        let loss = |(row, next): (Vec<f64>, &u32)| {
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            most + row.iter().map(|x| (x - most).exp()).sum::<f64>().ln() - row[*next as usize]
        };
        let sum: f64 = rows(&ids, &mut store())?.into_iter().zip(&ids[1..]).map(loss).sum();
        let (mine, want) = (sum / (ids.len() - 1) as f64, want.as_f64().ok_or("a loss that is no number")?);
        if (mine - want).abs() > NLL_TOLERANCE {
            return Err(format!("a loss of {mine}, not {want}").into());
        }
    }
    let [mut ids, want] = [0, 1].map(|i| numbers(&golden["greedy"][i]));
    let mut kv = store();
    for (i, want) in want.iter().enumerate() {
        let last = rows(&ids, &mut kv)?.pop().ok_or("no row")?;
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).ok_or("no word")? as u32;
        if best != *want {
            return Err(format!("token {i} after the prompt is {best}, not {want}").into());
        }
        ids.push(best);
    }
    Ok(())
}

/// The largest distance of any logit of a checkpoint.
fn worst<B: Backend>(backend: &B, dir: &Path) -> Result<f32, Box<dyn std::error::Error>> {
    worst_of(backend, &open(dir)?, dir)
}

/// The same of a checkpoint that ought to be the one at `dir`.
fn worst_of<B: Backend>(backend: &B, checkpoint: &Checkpoint, dir: &Path) -> Result<f32, Box<dyn std::error::Error>> {
    let golden: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json"))?)?;
    let decoder = Decoder::load_on(backend, checkpoint, &LoadOptions::default())?;
    said(backend, &decoder, &golden)?;
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

//! Damaged and malicious files: an error that names the file, never a panic, never a large allocation.

use std::fs;
use std::path::{Path, PathBuf};

use lacuna_checkpoint::open;
use serde_json::{Value, json};

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)
}

/// A copy of a tiny checkpoint to be damaged.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(tiny(name)).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("golden.json") {
            fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    dir
}

fn refused(dir: &Path, words: &[&str]) {
    let e = open(dir).expect_err("a damaged checkpoint was opened").to_string();
    assert!(words.iter().all(|w| e.contains(w)), "{words:?} not in: {e}");
}

fn edit(path: &Path, change: impl Fn(&mut Value)) {
    let mut v: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut v);
    fs::write(path, v.to_string()).unwrap();
}

/// Changes the header of a safetensors file and keeps its data.
fn edit_header(path: &Path, change: impl Fn(&mut Value)) {
    let file = fs::read(path).unwrap();
    let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + n]).unwrap();
    change(&mut header);
    let header = header.to_string();
    fs::write(path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &file[8 + n..]].concat()).unwrap();
}

#[test]
fn cut_short_at_every_sixteenth() {
    for name in ["llama", "gpt2", "qwen3_moe"] {
        let dir = copy(name);
        let path = dir.path().join("model.safetensors");
        let file = fs::read(&path).unwrap();
        for i in 0..16 {
            fs::write(&path, &file[..file.len() * i / 16]).unwrap();
            refused(dir.path(), &["model.safetensors"]);
        }
    }
}

#[test]
fn headers_that_lie() {
    const Q: &str = "model.layers.0.self_attn.q_proj.weight";
    let with = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let dir = copy("llama");
        edit_header(&dir.path().join("model.safetensors"), change);
        refused(dir.path(), words);
    };
    with(&|h| h[Q]["shape"] = json!([64, 16]), &[Q, "[64, 16]", "attn.q", "[32, 32]"]);
    with(&|h| h[Q]["shape"] = json!([1024]), &[Q, "[1024]"]);
    with(&|h| h[Q]["dtype"] = json!("I32"), &[Q, "I32 cannot be decoded"]);
    with(&|h| h[Q]["dtype"] = json!("F64"), &[Q, "4096 bytes"]);
    with(&|h| h[Q]["shape"] = json!([1u64 << 60, 1u64 << 60]), &[Q]);
    with(&|h| h[Q]["data_offsets"] = json!([0, 4096]), &["overlaps"]);
    with(&|h| h[Q]["data_offsets"] = json!([0, u64::MAX]), &[Q]);
    with(&|h| drop(h.as_object_mut().unwrap().remove(Q)), &["hole"]);
    with(&|h| h[Q] = json!([1, 2]), &["header"]);
    with(&|h| h[Q] = json!({"x": 1}), &[Q]);
}

#[test]
fn a_missing_tensor_is_named() {
    let dir = copy("llama");
    edit(&dir.path().join("config.json"), |c| c["attention_bias"] = json!(true));
    refused(dir.path(), &["layers.0.attn.q.bias", "model.layers.0.self_attn.q_proj.bias"]);
    edit(&dir.path().join("config.json"), |c| {
        c["attention_bias"] = json!(false);
        c["num_hidden_layers"] = json!(3);
    });
    refused(dir.path(), &["counts 3 layers", "there for 2", "missing: 2", "lacuna repair"]);
}

#[test]
fn a_fused_matrix_must_be_used_up() {
    let dir = copy("phi3");
    edit(&dir.path().join("config.json"), |c| c["num_key_value_heads"] = json!(1));
    refused(dir.path(), &["qkv_proj", "48 of its 64 rows"]);
}

#[test]
fn indices_that_lead_elsewhere() {
    let with = |file: &str, words: &[&str]| {
        let dir = copy("llama_sharded");
        let file = file.to_owned();
        edit(&dir.path().join("model.safetensors.index.json"), |i| i["weight_map"]["lm_head.weight"] = json!(file));
        refused(dir.path(), words);
    };
    with("../model.safetensors", &["index.json", "lm_head.weight"]);
    with("/etc/passwd", &["index.json"]);
    with("model.safetensors.index.json", &["index.json"]);
    with("model-00009-of-00003.safetensors", &["model-00009-of-00003.safetensors"]);
    with("model-00001-of-00003.safetensors", &["index.json", "lm_head.weight", "lacks it"]);
}

#[test]
fn an_index_may_name_what_nobody_needs() {
    let remarks = |change: &dyn Fn(&mut Value)| {
        let dir = copy("llama_sharded");
        edit(&dir.path().join("model.safetensors.index.json"), |i| change(&mut i["weight_map"]));
        let c = open(dir.path()).unwrap();
        let looked = lacuna_checkpoint::examine(dir.path()).unwrap();
        assert!(looked.problems().iter().all(|p| !p.broken) && looked.remarks().is_empty());
        assert_eq!(looked.problems().len(), c.remarks().len());
        c.remarks()
    };
    assert_eq!(remarks(&|_| ()), [""; 0]);
    let told = remarks(&|w| {
        for name in ["mtp.layers.0.up.weight", "mtp.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "x"] {
            w[name] = json!("model-00001-of-00003.safetensors");
        }
    });
    assert!(
        told[0].contains("4 tensors that lie in no file")
            && told[0].contains("inv_freq, mtp.layers.0.up.weight, mtp.norm.weight, ..."),
        "{told:?}"
    );
    // A whole file of them.
    let told = remarks(&|w| w["mtp.norm.weight"] = json!("model-00009-of-00003.safetensors"));
    assert!(told[0].contains("1 tensors") && told[0].contains("(mtp.norm.weight)"), "{told:?}");
    // A file that is there and no safetensors file stays an error.
    let dir = copy("llama_sharded");
    fs::write(dir.path().join("mtp.safetensors"), [7; 100]).unwrap();
    edit(&dir.path().join("model.safetensors.index.json"), |i| i["weight_map"]["mtp.x"] = json!("mtp.safetensors"));
    refused(dir.path(), &["mtp.safetensors"]);
    // A head that is the embedding is not needed; one that is not is.
    let dir = copy("llama_sharded");
    edit(&dir.path().join("model.safetensors.index.json"), |i| {
        i["weight_map"]["lm_head.weight"] = json!("model-00001-of-00003.safetensors");
    });
    refused(dir.path(), &["index.json", "lm_head.weight", "lacks it"]);
    edit(&dir.path().join("config.json"), |c| c["tie_word_embeddings"] = json!(true));
    assert!(open(dir.path()).unwrap().remarks()[0].contains("(lm_head.weight)"));
}

#[test]
fn configurations_that_are_none() {
    let dir = copy("llama");
    let path = dir.path().join("config.json");
    for text in ["", "{", "[]", "null", "{}", "{\"model_type\":7}", &"[".repeat(100_000)] {
        fs::write(&path, text).unwrap();
        refused(dir.path(), &["config.json"]);
    }
    let dir = copy("llama");
    edit(&dir.path().join("config.json"), |c| c["quantization_config"] = json!({"quant_method": "gptq"}));
    refused(dir.path(), &["config.json", "gptq"]);
    let dir = copy("gemma3");
    edit(&dir.path().join("config.json"), |c| c["text_config"] = json!("x"));
    refused(dir.path(), &["text_config"]);
    assert!(open(dir.path().join("nowhere")).unwrap_err().to_string().contains("nowhere"));
}

#[test]
fn every_single_key_may_hold_anything() {
    let dir = copy("gemma3_linear");
    let path = dir.path().join("config.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let odd = [
        json!(null),
        json!(0),
        json!(-1),
        json!(1e300),
        json!(u64::MAX),
        json!("x"),
        json!([]),
        json!({}),
        json!([[]]),
    ];
    for key in good.as_object().unwrap().keys() {
        for value in &odd {
            let mut c = good.clone();
            c[key] = value.clone();
            fs::write(&path, c.to_string()).unwrap();
            let _ = open(dir.path());
        }
    }
}

#[test]
fn odd_extras_load() {
    // Saved from a bare model: no `model.` before the names, and a RoPE table beside the weights.
    let dir = copy("llama");
    edit_header(&dir.path().join("model.safetensors"), |h| {
        let old = std::mem::take(h.as_object_mut().unwrap());
        let new = old.into_iter().map(|(k, v)| (k.trim_start_matches("model.").to_owned(), v));
        h.as_object_mut().unwrap().extend(new);
    });
    let path = dir.path().join("model.safetensors");
    let data = fs::read(&path).unwrap();
    let n = u64::from_le_bytes(data[..8].try_into().unwrap()) as usize;
    let end = data.len() - 8 - n;
    edit_header(&path, |h| {
        h["layers.0.self_attn.rotary_emb.inv_freq"] =
            json!({"dtype": "F64", "shape": [1], "data_offsets": [end, end + 8]});
    });
    let mut file = fs::read(&path).unwrap();
    file.extend([0; 8]);
    fs::write(&path, file).unwrap();
    let c = open(dir.path()).unwrap();
    assert!(c.unused().is_empty());
}

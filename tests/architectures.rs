//! Every architecture through the whole product: its golden checkpoint is opened, computed, converted, compressed and
//! served by the program. `docs/architectures.md` is what comes of it.

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lacuna_arch::FAMILIES;
use lacuna_format::Weights;
use rayon::prelude::*;
use serde_json::{Value, json};
use support::{apart, families, golden, logits_of, make};
use tempfile::TempDir;

/// What the test writes and holds to.
const PAGE: &str = "docs/architectures.md";

/// The golden checkpoints of each architecture, the one of its name first.
fn checkpoints() -> BTreeMap<String, Vec<PathBuf>> {
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let mut dirs: Vec<PathBuf> = std::fs::read_dir(golden("tiny")).unwrap().map(|e| e.unwrap().path()).collect();
    dirs.sort();
    for dir in dirs {
        let arch = lacuna_checkpoint::open(&dir).unwrap().spec().arch.clone();
        let named = dir.file_name().is_some_and(|n| n.to_str() == Some(&arch));
        let all = found.entry(arch).or_default();
        all.insert(if named { 0 } else { all.len() }, dir);
    }
    found
}

/// A copy of a golden checkpoint with a tokenizer of single characters, so that verbs that read text take it.
fn with_text(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    // As many characters as the model has ids for.
    let known = lacuna_checkpoint::open(from).unwrap().spec().vocab;
    let first = ["<|begin|>", "<|pad|>", "<|end|>", "Ċ", "Ġ"].map(str::to_owned);
    let all = first.into_iter().chain(('!'..='~').map(String::from));
    let vocab: BTreeMap<String, usize> = all.take(known).zip(0..).collect();
    let special = |(id, text): (usize, &str)| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let specials: Vec<Value> = ["<|begin|>", "<|pad|>", "<|end|>"].into_iter().enumerate().map(special).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": specials,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config =
        json!({"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"});
    std::fs::write(to.join("tokenizer_config.json"), config.to_string()).unwrap();
}

/// What the program prints with `--json`, or what it says where it refuses.
fn lacuna(args: &[&str]) -> Result<Value, String> {
    let out = Command::new(env!("CARGO_BIN_EXE_lacuna")).args(args).args(["--json", "--offline"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!said.contains("panicked"), "{args:?}: {said}");
    if out.status.success() { Ok(serde_json::from_slice(&out.stdout).unwrap()) } else { Err(said) }
}

fn loss(model: &Path, text: &Path) -> Result<f64, String> {
    let (model, text) = (model.to_str().unwrap(), text.to_str().unwrap());
    let told = lacuna(&["eval", model, "--text", text, "--ctx", "32", "--windows", "4"])?;
    told["nll"].as_f64().ok_or_else(|| format!("{told}"))
}

/// A token or more of an answer, over HTTP.
fn served(model: &Path) -> Result<(), String> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lacuna"))
        .args([
            "serve",
            model.to_str().unwrap(),
            "--port",
            "0",
            "--json",
            "--offline",
            "--served-name",
            "m",
            "--kv-memory",
            "8MiB",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let answer = || -> Result<String, Box<dyn std::error::Error>> {
        let port = serde_json::from_str::<Value>(&line)?["port"].as_u64().ok_or("no port")?;
        let body = r#"{"model": "m", "prompt": "AB CD", "max_tokens": 4, "temperature": 0}"#;
        let mut s = std::net::TcpStream::connect(("127.0.0.1", port as u16))?;
        let n = body.len();
        write!(
            s,
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: \
             close\r\ncontent-length: {n}\r\n\r\n{body}"
        )?;
        let mut answer = String::new();
        s.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = answer();
    child.kill().unwrap();
    child.wait().unwrap();
    match answer {
        Ok(a) if a.starts_with("HTTP/1.1 200") && a.contains("\"finish_reason\"") => Ok(()),
        other => Err(format!("{other:?}, {line}")),
    }
}

/// The row of an architecture: what holds, or why not, of each column.
fn row(arch: &str, dirs: &[PathBuf], home: &Path) -> [Result<(), String>; 5] {
    let dir = &dirs[0];
    let page: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(page["input_ids"][0].clone()).unwrap();
    let want: Vec<Vec<f32>> = serde_json::from_value(page["logits"][0].clone()).unwrap();
    let off = apart(&logits_of(dir, &ids), &want);
    let same = |found: f64, source: f64, most: f64| {
        if (found - source).abs() <= most {
            Ok(())
        } else {
            Err(format!("{arch}: loss {found}, the source's {source}"))
        }
    };
    let golden = if off < 1e-3 { Ok(()) } else { Err(format!("{arch}: logits lie {off} apart")) };

    let (model, text) = (home.join(arch), home.join("text.txt"));
    with_text(dir, &model);
    let source = loss(&model, &text);
    let load = source.clone().map(drop);
    let source = source.unwrap_or(f64::NAN);
    let path = |p: &Path| p.to_str().unwrap().to_owned();

    // A golden one is as odd as it can be, beyond what a GGUF file can say; then another one, or one of plain sizes.
    let there_and_back = |model: &Path| {
        let file = home.join(format!("{}.gguf", model.file_name().unwrap().to_str().unwrap()));
        let source = loss(model, &text)?;
        lacuna(&["convert", &path(model), "--to", "gguf", "--type", "f32", "-o", &path(&file)])?;
        loss(&file, &text).and_then(|found| same(found, source, 1e-4))
    };
    let mut gguf = there_and_back(&model);
    let refused = |gguf: &Result<(), String>| gguf.as_ref().is_err_and(|why| !why.contains("loss"));
    for (i, other) in dirs.iter().enumerate().skip(1) {
        if refused(&gguf) {
            let model = home.join(format!("{arch}-{i}"));
            with_text(other, &model);
            gguf = there_and_back(&model);
        }
    }
    let mine = |config: &Value| lacuna_arch::from_config(config).is_ok_and(|spec| spec.arch == arch);
    for (name, config) in families().into_iter().filter(|(_, config)| mine(config)) {
        if refused(&gguf) {
            let model = home.join(format!("{name}-plain"));
            make(&model, &config);
            gguf = there_and_back(&model);
        }
    }

    let recipe = home.join("recipe.toml");
    let small = home.join(format!("{arch}-small"));
    let compress = lacuna(&[
        "compress",
        &path(&model),
        "--recipe",
        &path(&recipe),
        "--calibration",
        &path(&text),
        "--eval",
        &path(&text),
        "--gate",
        "off",
        "-o",
        &path(&small),
    ])
    .and_then(|_| loss(&small, &text).and_then(|found| same(found, source, 0.05)));
    let serve = if compress.is_ok() { served(&small) } else { served(&model) };
    [load, golden, gguf, compress, serve]
}

#[test]
fn every_architecture_goes_through_the_whole_product() {
    let home = TempDir::new().unwrap();
    let text: String = (0..3000).map(|i| char::from(b'!' + (i * i * 7 + i * 3) as u8 % 50)).collect();
    std::fs::write(home.path().join("text.txt"), text).unwrap();
    let recipe = "version = 1\ncalibration = { samples = 2, seq_len = 32, seed = 0 }\nrest = \"source\"\n[[step]]\nname = \
                  \"quantize\"\nmethod = \"gptq\"\nbits = 8\ngroup = 0\n";
    std::fs::write(home.path().join("recipe.toml"), recipe).unwrap();
    let found = checkpoints();
    let mut page = String::from(
        "# Architectures\n\nWritten by `tests/architectures.rs` from what it sees: each architecture's golden checkpoint \
         (tests/golden) is\nopened, computed (logits of transformers within 1e-3), converted to GGUF and read back \
         (where such a file cannot say\nall of it, another golden one or one of plain sizes), compressed (GPTQ, 8 bits) \
         and served.\n\n| architecture | model_type | loads | golden | GGUF | compresses | serves \
         |\n|---|---|---|---|---|---|---|\n",
    );
    let (mut wrong, mut refused) = (Vec::new(), String::new());
    let rows: Vec<_> = FAMILIES
        .par_iter()
        .map(|family| found.get(family.name).map(|dir| row(family.name, dir, home.path())))
        .collect();
    for (family, cells) in FAMILIES.iter().zip(rows) {
        let Some(cells) = cells else {
            wrong.push(format!("{}: no golden checkpoint", family.name));
            continue;
        };
        let mut line = format!("| {} | {} |", family.name, family.model_types.join(", "));
        for (column, cell) in ["load", "golden", "gguf", "compress", "serve"].iter().zip(&cells) {
            line += if cell.is_ok() { " yes |" } else { " - |" };
            match cell {
                // A file that can be written must say the same; what cannot be written is refused with a reason.
                Err(why) if *column != "gguf" || why.contains("loss") => {
                    wrong.push(format!("{}, {column}: {why}", family.name))
                }
                _ => {}
            }
        }
        page += &line;
        page.push('\n');
        if let Err(why) = &cells[2] {
            let why = why.lines().last().unwrap_or_default().replace(&format!("{}/", home.path().display()), "");
            refused += &format!("- {}: {}\n", family.name, why.trim_start_matches("error: "));
        }
    }
    page += &format!("\nNot to GGUF, in the program's words:\n\n{refused}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    if std::env::var_os("LACUNA_WRITE").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(there == page, "{PAGE} is not what this test sees; LACUNA_WRITE=1 writes it anew:\n{page}");
}

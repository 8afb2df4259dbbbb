//! Writes small valid inputs of every kind into `corpus/`, so that fuzzing starts beyond the first check.

use std::fs;
use std::path::Path;

use lacuna_checkpoint::{PackedWriter, open};
use lacuna_format::{
    Codebook, Float, Group, Integers, Map, Mask, Owner, Pattern, PatternKind, Piece, ScaleCodec, Signed, Stored, Term,
    Values, Weights, Zeros, pack_codebook, pack_float, pack_integers, pack_integers_off, pack_multiples,
};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let corpus = here.join("corpus");
    let tiny = here.join("../tests/golden/tiny");
    let put = |target: &str, name: &str, bytes: &[u8]| -> Result<()> {
        fs::create_dir_all(corpus.join(target))?;
        Ok(fs::write(corpus.join(target).join(name), bytes)?)
    };
    for name in ["llama_f16", "qwen2"] {
        let dir = tiny.join(name);
        put("safetensors", name, &fs::read(dir.join("model.safetensors"))?)?;
        put("packed", name, &directory(&dir)?)?;
        let out = std::env::temp_dir().join(format!("lacuna-seed-{}-{name}", std::process::id()));
        pack(&dir, &out)?;
        put("packed", &format!("packed_{name}"), &directory(&out)?)?;
        fs::remove_dir_all(&out)?;
    }
    let foreign = here.join("../tests/golden/foreign");
    for entry in fs::read_dir(&foreign)? {
        let dir = entry?.path();
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Ok(file) = fs::read(dir.join("adapter_model.bin")) {
            put("torch", &name, &file)?;
            // Its first member is the pickle: from the protocol's number to what follows a member.
            let find =
                |what: &[u8], from: usize| file[from..].windows(what.len()).position(|w| w == what).map(|at| from + at);
            let from = find(b"\x80\x02", 0).ok_or("no pickle")?;
            let to = find(b"PK\x07\x08", from).ok_or("a pickle without end")?;
            put("torch", &format!("{name}.pickle"), &file[from..to])?;
            continue;
        }
        if dir.join("adapter_config.json").is_file() {
            let parts = [fs::read(dir.join("adapter_config.json"))?, fs::read(dir.join("adapter_model.safetensors"))?];
            put("adapter", &name, &joined(&parts)?)?;
            continue;
        }
        let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json"))?)?;
        let beside = fs::read(dir.join("quantize_config.json")).ok().and_then(|b| serde_json::from_slice(&b).ok());
        let flat = fs::read(dir.join("hf_quant_config.json")).ok().and_then(|b| serde_json::from_slice(&b).ok());
        let flat = flat.map(|q: Value| {
            let mut q = q["quantization"].clone();
            q["quant_method"] = json!("modelopt");
            q
        });
        let of = |key: &str| config.get(key).cloned();
        let said = [of("quantization_config"), of("compression_config"), of("quantization"), beside, flat];
        if let Some(mut q) = said.into_iter().flatten().next() {
            let mlx = config.get("quantization").is_some();
            if q.get("bits").is_some() && q.get("quant_method").is_none() && !mlx {
                q["quant_method"] = json!("gptq");
            }
            put("foreign", &name, &joined(&[q.to_string().into_bytes(), fs::read(dir.join("model.safetensors"))?])?)?;
        }
    }
    put("safetensors", "index", &fs::read(tiny.join("llama_sharded/model.safetensors.index.json"))?)?;
    for name in ["whole", "big", "parts-00001-of-00003"] {
        let bytes = fs::read(here.join("../tests/golden/gguf").join(format!("{name}.gguf")))?;
        put("gguf", name, &bytes)?;
        put("gguf_model", name, &bytes)?;
    }
    for model in ["gpt2", "llama"] {
        let bytes = gguf(model);
        put("gguf", model, &bytes)?;
        put("tokenizer_gguf", model, &bytes)?;
    }
    for file in fs::read_dir(here.join("../recipes"))? {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        put("recipe", &name, &fs::read(&path)?)?;
    }
    let templates: Value = serde_json::from_slice(&fs::read(here.join("../tests/golden/templates.json"))?)?;
    for (name, source) in templates["templates"].as_object().into_iter().flatten() {
        put("template", name, source.as_str().unwrap_or_default().as_bytes())?;
    }
    for (i, piece) in templates["pieces"].as_array().into_iter().flatten().enumerate() {
        put("template", &format!("piece_{i}"), piece[0].as_str().unwrap_or_default().as_bytes())?;
    }
    println!("seeds lie in {}", corpus.display());
    Ok(())
}

/// A directory as the target `packed` reads it.
fn directory(dir: &Path) -> Result<Vec<u8>> {
    joined(&[fs::read(dir.join("config.json"))?, fs::read(dir.join("model.safetensors"))?])
}

/// The length of the first, and both.
fn joined([config, tensors]: &[Vec<u8>; 2]) -> Result<Vec<u8>> {
    let length = u32::try_from(config.len())?.to_le_bytes();
    Ok([&length[..], config, tensors].concat())
}

/// The model in `dir` with matrices in many forms.
fn pack(dir: &Path, out: &Path) -> Result<()> {
    let model = open(dir)?;
    let mut writer = PackedWriter::create(out, true)?;
    for (i, place) in model.spec().places().into_iter().enumerate() {
        let Some(stored) = model.get(&place)? else { continue };
        let w = stored.to_mat();
        let (rows, cols) = (stored.rows, stored.cols);
        let mask = Mask::from_fn(rows, cols, |r, c| (c + r / 8) % 2 == 0);
        let float = |kind| Ok::<_, Box<dyn std::error::Error>>(pack_float(w.view(), Some(&mask), kind, Float::F16)?);
        if i % 8 == 7 && rows > 1 && cols > 1 {
            let thin = |r, c| {
                let w = lacuna_base::Mat::from_fn(r, c, |r, c| (r * 3 + c) as f32 / 8.0);
                pack_float(w.view(), None, PatternKind::Dense, Float::F16)
            };
            let term = Term::Signed(Signed::new(&mask, thin(rows, 2)?, thin(2, cols)?));
            writer.put(&place, &Stored::new(rows, cols, vec![term; 2]))?;
            continue;
        }
        let piece = match i % 8 {
            _ if rows == 1 => None,
            0 => Some(float(PatternKind::Mask { height: 1 })?),
            1 => Some(float(PatternKind::Nm { n: 2, m: 4 })?),
            2 => Some(float(PatternKind::Csr)?),
            3 => {
                let groups = cols.div_ceil(8);
                let integers = Integers {
                    rows,
                    cols,
                    bits: 4,
                    codes: (0..rows * cols).map(|i| (i % 16) as u8).collect(),
                    scales: lacuna_base::Mat::from_fn(rows, groups, |_, _| 0.5),
                    zeros: Some((0..rows * groups).map(|i| (i % 16) as u8).collect()),
                    group: Group::Run(8),
                    offsets: None,
                };
                Some(pack_integers(&integers, None, PatternKind::Dense, ScaleCodec::F16)?)
            }
            5 => {
                let groups = cols.div_ceil(16);
                let numbers = |by: f32| lacuna_base::Mat::from_fn(rows, groups, |r, g| by + ((r + g) % 5) as f32);
                let integers = Integers {
                    rows,
                    cols,
                    bits: 3,
                    codes: (0..rows * cols).map(|i| (i % 8) as u8).collect(),
                    scales: numbers(0.5),
                    zeros: None,
                    group: Group::Run(16),
                    offsets: None,
                };
                let codec = ScaleCodec::Int { bits: 3, per: 16 };
                Some(pack_integers_off(&integers, &numbers(1.5), None, PatternKind::Dense, codec, codec)?)
            }
            6 => {
                let groups = cols.div_ceil(32);
                let numbers = lacuna_base::Mat::from_fn(rows, groups, |r, g| 0.5 + ((r + g) % 5) as f32);
                let codes: Vec<u8> = (0..rows * cols).map(|i| (i % 16) as u8).collect();
                let values = Values::Int {
                    bits: 4,
                    codes: lacuna_format::bits::pack(&codes, 4).into(),
                    scales: pack_multiples(&numbers, 8, 8)?,
                    zeros: Some(Zeros::Minima(pack_multiples(&numbers, 6, 8)?)),
                    group: Group::Run(32),
                };
                Some(Piece { rows, cols, pattern: Pattern::Dense, values })
            }
            4 => {
                let owner = if i % 2 == 0 { Owner::Row } else { Owner::Group(8) };
                let tables = owner.count(rows, cols).ok_or("too many tables")?;
                let codebook = Codebook {
                    bits: 3,
                    codes: (0..rows * cols).map(|i| (i % 8) as u8).collect(),
                    owner,
                    tables: lacuna_base::Mat::from_fn(tables, 8, |r, c| (r % 3) as f32 * 0.25 - c as f32),
                    scales: None,
                };
                let kind = PatternKind::Dense;
                Some(pack_codebook((rows, cols), &codebook, None, kind, Float::F16, ScaleCodec::F16)?)
            }
            _ => None,
        };
        match piece {
            Some(piece) => {
                let mut stored = Stored::from_piece(piece);
                if i % 2 == 1 {
                    let signs: Vec<bool> = (0..cols).map(|c| c % 3 == 0).collect();
                    let turned: Vec<u32> = (0..cols as u32).rev().collect();
                    let half = Map::diagonal(&vec![0.5; rows], Float::F16)?;
                    let swap = Map::dense(2, &[0.0, 1.0, 1.0, 0.0], Float::F32)?;
                    let output = if rows % 2 == 0 { vec![half, swap] } else { vec![half] };
                    let input =
                        vec![Map::hadamard(1 << cols.trailing_zeros(), Some(&signs)), Map::permutation(&turned)];
                    stored = stored.with_maps(input, output);
                }
                writer.put(&place, &stored)?
            }
            None => writer.put(&place, &stored)?,
        }
    }
    writer.finish(model.spec().clone(), Value::Null, json!({ "name": "seed" }), vec![], None)?;
    Ok(())
}

/// A GGUF file with the tokenizer of `model` and one tensor.
fn gguf(model: &str) -> Vec<u8> {
    fn text(out: &mut Vec<u8>, s: &str) {
        out.extend((s.len() as u64).to_le_bytes());
        out.extend(s.as_bytes());
    }
    fn key(out: &mut Vec<u8>, name: &str, kind: u32) {
        text(out, name);
        out.extend(kind.to_le_bytes());
    }
    fn list(out: &mut Vec<u8>, name: &str, kind: u32, n: usize) {
        key(out, name, 9);
        out.extend(kind.to_le_bytes());
        out.extend((n as u64).to_le_bytes());
    }
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..=255u8).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(["\u{2581}", "H", "e", "l", "o", "w", "\u{120}", "He", "ll", "Hell", "Hello"].map(str::to_owned));
    let merges = ["H e", "l l", "He ll", "Hell o"];
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.extend(10u64.to_le_bytes());
    for (name, value) in [
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", model),
        ("tokenizer.ggml.pre", "smollm"),
        ("tokenizer.chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ] {
        key(&mut out, name, 8);
        text(&mut out, value);
    }
    list(&mut out, "tokenizer.ggml.tokens", 8, tokens.len());
    tokens.iter().for_each(|t| text(&mut out, t));
    list(&mut out, "tokenizer.ggml.scores", 6, tokens.len());
    (0..tokens.len()).for_each(|i| out.extend((-(i as f32)).to_le_bytes()));
    list(&mut out, "tokenizer.ggml.token_type", 5, tokens.len());
    (0..tokens.len()).for_each(|i| {
        out.extend(
            match i {
                0 => 2i32,
                1 | 2 => 3,
                3..=258 => 6,
                _ => 1,
            }
            .to_le_bytes(),
        )
    });
    list(&mut out, "tokenizer.ggml.merges", 8, merges.len());
    merges.iter().for_each(|m| text(&mut out, m));
    for (name, id) in [("tokenizer.ggml.bos_token_id", 1u32), ("tokenizer.ggml.eos_token_id", 2)] {
        key(&mut out, name, 4);
        out.extend(id.to_le_bytes());
    }
    text(&mut out, "token_embd.weight");
    out.extend(2u32.to_le_bytes());
    out.extend(32u64.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    out.extend(2u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend([0x11; 36]);
    out
}

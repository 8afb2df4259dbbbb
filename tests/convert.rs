//! Models for other programs, read back by Lacuna itself: the same network, the same values. `tests/readers.rs` asks
//! the real readers.

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use lacuna_base::{Mat, Rng};
use lacuna_checkpoint::save::{
    GgufKind, PackQuantized, Rounding, Saved, save_compressed_tensors, save_gguf, save_hf, save_peft,
};
use lacuna_checkpoint::{Checkpoint, PackedWriter, Tokenizer, diagnose, open, repair};
use lacuna_format::{
    Float, GgufType, Group, Integers, PatternKind, ScaleCodec, Stored, Term, Values, Weights, pack_float, pack_integers,
};
use lacuna_spec::{Place, Role, Spec};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::{apart, families, golden, ids, logits, logits_of, make};
use tempfile::TempDir;

fn gguf(source: &Path, out: &Path, kind: GgufKind) -> Saved {
    save_gguf(&open(source).unwrap(), out, kind, false, &mut |_, _| {}).unwrap()
}

fn hf(source: &Path, out: &Path, float: Option<Float>) -> Saved {
    save_hf(&open(source).unwrap(), out, float, false, &mut |_, _| {}).unwrap()
}

fn changed(saved: &Saved) -> u64 {
    saved.tensors.iter().map(|t| t.loss.changed).sum()
}

/// Every family through GGUF and back: the same logits at each station, the same tensors at the end.
#[test]
fn every_family_there_and_back() {
    let home = TempDir::new().unwrap();
    for (name, config) in families() {
        let (dir, file, back) = (
            home.path().join(name),
            home.path().join(format!("{name}.gguf")),
            home.path().join(format!("{name}-back")),
        );
        make(&dir, &config);
        let ids = ids(40, 603);
        let want = logits_of(&dir, &ids);
        let saved = gguf(&dir, &file, GgufKind::F32);
        assert_eq!(changed(&saved), 0, "{name}");
        let off = apart(&logits_of(&file, &ids), &want);
        assert!(off < 2e-3, "{name}: GGUF's logits lie {off} apart");
        hf(&file, &back, Some(Float::F32));
        let off = apart(&logits_of(&back, &ids), &want);
        assert!(off < 2e-3, "{name}: logits after the way back lie {off} apart");
        let (a, b) = (open(&dir).unwrap(), open(&back).unwrap());
        // Falcon-H1's factors stand in the weights of a GGUF file: what comes back computes the same with other tensors.
        let places = if name == "falcon_h1" { Vec::new() } else { a.spec().places() };
        for place in places {
            let (x, y) = (a.get(&place).unwrap().unwrap().to_mat(), b.get(&place).unwrap().unwrap().to_mat());
            let off = x.data().iter().zip(y.data()).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            // Norms less one and logarithms are rounded on their way.
            let less_one = ["gemma", "nemotron", "qwen3_next", "qwen3_5"].iter().any(|family| name.starts_with(family));
            let rounded = less_one || place.role == Role::MixerA;
            assert!(off <= if rounded { 1e-6 } else { 0.0 }, "{name}: {place} lies {off} apart");
        }
        let text = "Hello, world! 123 don't  stop\n\n";
        let ids = |c: &Checkpoint| Tokenizer::open(c).unwrap().encode(text, false).unwrap();
        assert_eq!(ids(&a), ids(&open(&file).unwrap()), "{name}: tokens of the GGUF file");
        assert_eq!(ids(&a), ids(&b), "{name}: tokens after the way back");
        // From GGUF to GGUF as it is: every pair of metadata and every byte of every tensor.
        let again = home.path().join(format!("{name}-again.gguf"));
        gguf(&file, &again, GgufKind::Source);
        let (a, b) = (open(&file).unwrap(), open(&again).unwrap());
        for (key, value) in a.metadata().unwrap().iter() {
            assert_eq!(b.metadata().unwrap().get(key), Some(value), "{name}: {key}");
        }
        assert_eq!(a.spec(), b.spec());
    }
}

/// The golden checkpoints (not all of them networks that llama.cpp computes) keep their logits in the Hugging Face
/// layout.
#[test]
fn golden_checkpoints_keep_their_logits() {
    let home = TempDir::new().unwrap();
    for entry in std::fs::read_dir(golden("tiny")).unwrap() {
        let dir = entry.unwrap().path();
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let page: Value = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let ids: Vec<u32> = serde_json::from_value(page["input_ids"][0].clone()).unwrap();
        let want: Vec<Vec<f32>> = serde_json::from_value(page["logits"][0].clone()).unwrap();
        let out = home.path().join(&name);
        let saved = hf(&dir, &out, None);
        assert_eq!(changed(&saved), 0, "{name}");
        let off = apart(&logits_of(&out, &ids), &want);
        assert!(off < 1e-3, "{name}: {off}");
    }
}

/// A bias that the source has not.
fn bias(n: usize) -> Stored {
    let values = Mat::from_fn(1, n, |_, c| (c * 7 % 19) as f32 / 16.0 - 0.5);
    Stored::from_piece(pack_float(values.view(), None, PatternKind::Dense, Float::F32).unwrap())
}

/// A packed model of `spec`-shaped matrices made by `form` from the model at `dir`.
fn packed(dir: &Path, out: &Path, change: impl Fn(&mut Spec), form: impl Fn(&Place, &Stored) -> Stored) {
    let source = open(dir).unwrap();
    let mut spec = source.spec().clone();
    change(&mut spec);
    let mut w = PackedWriter::create(out, false).unwrap();
    for place in spec.places() {
        let stored = source.get(&place).unwrap().unwrap_or_else(|| Arc::new(bias(spec.shape(&place).unwrap().1)));
        w.put(&place, &form(&place, &stored)).unwrap();
    }
    w.finish(spec, json!({}), json!({}), Vec::new(), Some(&source)).unwrap();
}

/// Layers that share weights compute as copies do, and copies are what other programs' files get.
#[test]
fn shared_layers_are_copies_elsewhere() {
    let home = TempDir::new().unwrap();
    let at = |name: &str| home.path().join(name);
    let (_, config) = families().into_iter().find(|(name, _)| *name == "llama").unwrap();
    make(&at("llama"), &config);
    let source = open(at("llama")).unwrap();
    packed(&at("llama"), &at("shared"), |spec| spec.layers[1].like = Some(0), |_, s| s.clone());
    let first = |p: &Place, s: &Stored| match p.layer {
        Some(1) => source.get(&Place { layer: Some(0), ..*p }).unwrap().unwrap().as_ref().clone(),
        _ => s.clone(),
    };
    packed(&at("llama"), &at("copies"), |_| (), first);
    let ids = ids(40, 603);
    let want = logits_of(&at("copies"), &ids);
    assert!(apart(&logits_of(&at("llama"), &ids), &want) > 0.1, "sharing changes something");
    let shared = open(at("shared")).unwrap();
    assert_eq!(shared.packed().unwrap().version, 6);
    assert!(shared.spec().parameters() < source.spec().parameters());
    assert_eq!(apart(&logits_of(&at("shared"), &ids), &want), 0.0);
    hf(&at("shared"), &at("hf"), Some(Float::F32));
    assert_eq!(apart(&logits_of(&at("hf"), &ids), &want), 0.0);
    gguf(&at("shared"), &at("model.gguf"), GgufKind::F32);
    let off = apart(&logits_of(&at("model.gguf"), &ids), &want);
    assert!(off < 2e-3, "{off}");
    for (layer, like) in [(0, 0), (0, 1), (1, 1), (1, 7)] {
        let mut spec = source.spec().clone();
        spec.layers[layer].like = Some(like);
        let said = spec.check().unwrap_err().what;
        assert!(said.contains(&format!("layer {layer} uses the weights of layer {like}")), "{said}");
    }
    let mut spec = source.spec().clone();
    spec.layers[1].like = Some(0);
    spec.layers[1].ffn.as_mut().unwrap().width += 8;
    assert!(spec.check().unwrap_err().what.contains("made otherwise"));
}

/// Random grouped integers in a matrix's shape.
fn integers(s: &Stored, bits: u8, group: usize, zeros: bool) -> Stored {
    let mut rng = Rng::new(s.rows as u64 * 31 + s.cols as u64);
    let groups = s.cols / group;
    let mut code = |n: usize| (0..n).map(|_| rng.below(1 << bits) as u8).collect::<Vec<_>>();
    let (codes, zeros) = (code(s.rows * s.cols), zeros.then(|| code(s.rows * groups)));
    let scales = Mat::from_fn(s.rows, groups, |r, g| {
        ((r * 5 + g) % 17 + 1) as f32 / 2048.0 * if r % 2 == 0 { 1.0 } else { -1.0 }
    });
    let q =
        Integers { rows: s.rows, cols: s.cols, bits, codes, scales, zeros, offsets: None, group: Group::Run(group) };
    Stored::from_piece(pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).unwrap())
}

fn is_block(place: &Place) -> bool {
    place.layer.is_some() && place.role.is_linear() && place.part == lacuna_spec::Part::Weight
}

/// int4 in groups of 32 -> Q4_0 -> compressed-tensors: the same codes, the same scales, at every station.
#[test]
fn integers_move_without_rounding() {
    let home = TempDir::new().unwrap();
    let dir = home.path().join("llama");
    make(&dir, &families()[0].1);
    let (pack, file, ct) = (home.path().join("packed"), home.path().join("m.gguf"), home.path().join("ct"));
    packed(&dir, &pack, |_| {}, |p, s| if is_block(p) { integers(s, 4, 32, false) } else { s.clone() });
    let saved = gguf(&pack, &file, GgufKind::Source);
    assert_eq!(changed(&saved), 0);
    let (a, b) = (open(&pack).unwrap(), open(&file).unwrap());
    let v = Place::layer(1, Role::V);
    let stored = b.get(&v).unwrap().unwrap();
    assert!(matches!(&stored.terms[..], [Term::Piece(p)] if matches!(p.values, Values::Gguf(GgufType::Q4_0, _))));
    assert_eq!(a.get(&v).unwrap().unwrap().to_mat(), stored.to_mat());
    // Asked for by name it is the same, but for the head, which llama.cpp keeps finer; packed again from GGUF, the
    // codes are those of before.
    let by_name = gguf(&pack, &home.path().join("n.gguf"), GgufKind::Q4_0);
    let touched: Vec<&str> = by_name.tensors.iter().filter(|t| t.loss.changed > 0).map(|t| t.name.as_str()).collect();
    assert_eq!(touched, ["token_embd.weight", "output.weight"]);
    for source in [&pack, &file] {
        let out = ct.with_extension(source.extension().unwrap_or_default());
        let saved =
            save_compressed_tensors(&open(source).unwrap(), &out, PackQuantized::default(), false, &mut |_, _| {})
                .unwrap();
        assert_eq!(changed(&saved), 0);
        assert_unpacked(&out, &open(&pack).unwrap());
    }
}

/// Unpacks every matrix of the blocks by hand and compares with what the model holds.
fn assert_unpacked(dir: &Path, want: &Checkpoint) {
    let config: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let q = &config["quantization_config"];
    assert_eq!(q["sparsity_config"], json!({}));
    let bits = q["config_groups"]["group_0"]["weights"]["num_bits"].as_u64().unwrap() as usize;
    let (per, top) = (32 / bits, (1u32 << bits) - 1);
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut seen = 0;
    for target in lacuna_arch::hf_targets(want.spec()).unwrap() {
        if !is_block(&target.parts[0]) {
            continue;
        }
        let module = target.name.trim_end_matches(".weight");
        let get = |part: &str| file.tensor(&format!("{module}.{part}")).ok().map(|t| t.data().to_vec());
        let ints = |b: Vec<u8>| b.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect::<Vec<_>>();
        let words = ints(get("weight_packed").unwrap());
        let float = if config["dtype"] == "float16" { Float::F16 } else { Float::F32 };
        let mut scales = vec![0.0; get("weight_scale").unwrap().len() / float.bytes()];
        float.decode(&get("weight_scale").unwrap(), &mut scales);
        let zeros = get("weight_zero_point").map(ints);
        let m = want.get(&target.parts[0]).unwrap().unwrap().to_mat();
        let groups = scales.len() / m.rows();
        for r in 0..m.rows() {
            for c in 0..m.cols() {
                let code = words[r * m.cols() / per + c / per] >> (c % per * bits) & top;
                let g = c / (m.cols() / groups);
                let zero =
                    zeros.as_ref().map_or(1 << (bits - 1), |z| z[r / per * groups + g] >> (r % per * bits) & top);
                let value = scales[r * groups + g] * (code as f32 - zero as f32);
                assert_eq!(value, m[(r, c)], "{module} at {r}, {c}");
            }
        }
        seen += 1;
    }
    assert_eq!(seen, 21);
}

#[test]
fn zero_points_and_rounding_go_to_compressed_tensors() {
    let home = TempDir::new().unwrap();
    let dir = home.path().join("llama");
    make(&dir, &families()[0].1);
    let pack = home.path().join("packed");
    packed(&dir, &pack, |_| {}, |p, s| if is_block(p) { integers(s, 4, 64, true) } else { s.clone() });
    // As they are, or, as transformers wants them, without: the values are the same.
    for (zero_points, bits) in [(true, 4), (false, 8)] {
        let out = home.path().join(format!("ct{bits}"));
        let how = PackQuantized { rounding: None, zero_points };
        let saved = save_compressed_tensors(&open(&pack).unwrap(), &out, how, false, &mut |_, _| {}).unwrap();
        assert_eq!(changed(&saved), 0);
        assert!(saved.tensors.iter().any(|t| t.to == format!("int{bits} g64")));
        assert!(saved.notes.iter().any(|n| n.contains("--zero-points") != zero_points), "{:?}", saved.notes);
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(
            config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"],
            json!(!zero_points)
        );
        assert_unpacked(&out, &open(&pack).unwrap());
        let here = (open(&out).unwrap(), open(&pack).unwrap());
        let v = Place::layer(1, Role::V);
        assert_eq!(here.0.get(&v).unwrap().unwrap().to_mat(), here.1.get(&v).unwrap().unwrap().to_mat());
    }
    // A dense model has nothing to keep, and says so; rounded, its zeros stay zeros.
    let dense = open(&dir).unwrap();
    let e = save_compressed_tensors(&dense, &home.path().join("no"), PackQuantized::default(), false, &mut |_, _| {})
        .unwrap_err();
    assert!(e.to_string().contains("--type int4"), "{e}");
    let rounded = |group| PackQuantized { rounding: Some(Rounding { bits: 4, group }), zero_points: false };
    let e = save_compressed_tensors(&dense, &home.path().join("no"), rounded(96), false, &mut |_, _| {}).unwrap_err();
    assert!(
        e.to_string().contains("its 256 columns do not divide into groups of 96; 256, 128, 64, 32, 16 would fit"),
        "{e}"
    );
    let saved = save_compressed_tensors(&dense, &home.path().join("r"), rounded(128), false, &mut |_, _| {}).unwrap();
    let all = saved.tensors.iter().find(|t| t.name.ends_with("up_proj.weight")).unwrap().loss;
    assert!(all.changed > 0 && all.zeros_lost == 0 && all.relative() < 0.12, "{all:?}");
}

/// A layer without attention is written with attention of zeros, a layer without anything not at all: the function
/// stays.
#[test]
fn what_was_dropped_stays_dropped() {
    let home = TempDir::new().unwrap();
    let dir = home.path().join("llama");
    make(&dir, &families()[0].1);
    let pack = home.path().join("packed");
    let spec = |s: &mut Spec| {
        s.layers[0].attn = None;
        (s.layers[1].attn, s.layers[1].ffn) = (None, None);
    };
    packed(&dir, &pack, spec, |_, s| s.clone());
    let ids = ids(30, 603);
    let want = logits_of(&pack, &ids);
    let (h, f) = (home.path().join("hf"), home.path().join("m.gguf"));
    let saved = hf(&pack, &h, None);
    assert_eq!(saved.notes.len(), 2, "{:?}", saved.notes);
    gguf(&pack, &f, GgufKind::F32);
    for out in [&h, &f] {
        assert_eq!(open(out).unwrap().spec().layers.len(), 2);
        let off = apart(&logits_of(out, &ids), &want);
        assert!(off < 1e-4, "{}: {off}", out.display());
    }
}

/// Pruning leaves biases on o and down alone, in some layers: a configuration that says several in one word gets zeros
/// for the others.
#[test]
fn biases_that_stand_alone_go_along_or_are_refused() {
    let home = TempDir::new().unwrap();
    let alone = |s: &mut Spec| {
        s.layers[0].attn.as_mut().unwrap().o_bias = true;
        s.layers[1].ffn.as_mut().unwrap().down_bias = true;
    };
    for (name, config) in families().into_iter().filter(|(name, _)| ["llama", "qwen2"].contains(name)) {
        let (dir, pack) = (home.path().join(name), home.path().join(format!("{name}-packed")));
        make(&dir, &config);
        packed(&dir, &pack, alone, |_, s| s.clone());
        let ids = ids(30, 603);
        let want = logits_of(&pack, &ids);
        assert!(apart(&logits_of(&dir, &ids), &want) > 1e-2, "{name}: the biases do nothing");
        let (h, f) = (home.path().join(format!("{name}-hf")), home.path().join(format!("{name}.gguf")));
        if name == "qwen2" {
            let said = save_hf(&open(&pack).unwrap(), &h, None, false, &mut |_, _| {}).unwrap_err().to_string();
            assert!(said.contains("layer 0: attn.o_bias is true, the file would say false"), "{said}");
            let said =
                save_gguf(&open(&pack).unwrap(), &f, GgufKind::F32, false, &mut |_, _| {}).unwrap_err().to_string();
            assert!(said.contains("layer 0: llama.cpp reads no bias on attn.o in qwen2 files"), "{said}");
            continue;
        }
        let saved = hf(&pack, &h, None);
        assert!(saved.notes.iter().any(|n| n.starts_with("19 biases of zeros")), "{:?}", saved.notes);
        let config: Value = serde_json::from_slice(&std::fs::read(h.join("config.json")).unwrap()).unwrap();
        assert_eq!((&config["attention_bias"], &config["mlp_bias"]), (&json!(true), &json!(true)));
        gguf(&pack, &f, GgufKind::F32);
        assert_eq!(open(&f).unwrap().spec().layers[1].ffn.as_ref().map(|f| (f.bias, f.down_bias)), Some((false, true)));
        for out in [&h, &f] {
            let off = apart(&logits_of(out, &ids), &want);
            assert!(off < 1e-4, "{}: {off}", out.display());
        }
    }
}

#[test]
fn low_rank_parts_become_an_adapter() {
    let home = TempDir::new().unwrap();
    let dir = home.path().join("llama");
    make(&dir, &families()[0].1);
    let e = save_peft(&open(&dir).unwrap(), &home.path().join("no"), None, false, &mut |_, _| {}).unwrap_err();
    assert!(e.to_string().contains("no matrix of this model has a low-rank part"), "{e}");
    let (pack, out) = (home.path().join("packed"), home.path().join("peft"));
    packed(&dir, &pack, |_| {}, low_rank);
    save_peft(&open(&pack).unwrap(), &out, Some(Float::F32), false, &mut |_, _| {}).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(4), &json!(4)));
    assert_eq!(config["rank_pattern"], json!({r"model\.layers\.2\.mlp\.down_proj": 7}));
    // Base and adapter, added up, are the matrix.
    let (base, bytes) =
        (open(out.join("base")).unwrap(), std::fs::read(out.join("adapter_model.safetensors")).unwrap());
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let get = |part: &str| {
        let t = file.tensor(&format!("base_model.model.model.layers.2.mlp.down_proj.{part}.weight")).unwrap();
        let mut v = vec![0.0; t.data().len() / 4];
        Float::F32.decode(t.data(), &mut v);
        Mat::from_vec(t.shape()[0], t.shape()[1], v)
    };
    let (a, b, place) = (get("lora_A"), get("lora_B"), Place::layer(2, Role::Down));
    let (want, have) =
        (open(&pack).unwrap().get(&place).unwrap().unwrap().to_mat(), base.get(&place).unwrap().unwrap().to_mat());
    for r in 0..want.rows() {
        for c in 0..want.cols() {
            let sum = (0..7).fold(have[(r, c)], |s, k| s + b[(r, k)] * a[(k, c)]);
            assert!((sum - want[(r, c)]).abs() < 1e-4, "{r}, {c}: {sum} is not {}", want[(r, c)]);
        }
    }
}

/// A low-rank term beside v of each layer and beside one down, of another rank.
fn low_rank(p: &Place, s: &Stored) -> Stored {
    let rank = match (p.role, p.layer) {
        (Role::V, _) => 4,
        (Role::Down, Some(2)) => 7,
        _ => return s.clone(),
    };
    let mut rng = Rng::new(rank as u64);
    let mut piece = |rows: usize, cols: usize| {
        let m = Mat::from_fn(rows, cols, |_, _| 0.1 * rng.normal());
        pack_float(m.view(), None, PatternKind::Dense, Float::F16).unwrap()
    };
    let mut out = s.clone();
    out.terms.push(Term::Product(piece(s.rows, rank), piece(rank, s.cols)));
    out
}

fn write_json(path: &Path, value: &Value) {
    std::fs::write(path, value.to_string()).unwrap();
}

/// `inspect` names `what` and says that `repair` helps.
fn inspect_points_to_repair(model: &Path, what: &str) {
    let done = Command::new(env!("CARGO_BIN_EXE_lacuna"))
        .args(["inspect", model.to_str().unwrap(), "--json"])
        .output()
        .unwrap();
    let said: Value = serde_json::from_slice(&done.stdout).unwrap();
    let helps = |p: &Value| p["help"].as_str().is_some_and(|h| h.contains("lacuna repair"));
    let named = |p: &Value| p["what"].as_str().is_some_and(|w| w.contains(what));
    assert!(said["problems"].as_array().unwrap().iter().any(|p| named(p) && helps(p)), "{}", said["problems"]);
}

#[test]
fn repair_mends_what_other_programs_left() {
    let home = TempDir::new().unwrap();
    let dir = home.path().join("llama");
    make(&dir, &families()[0].1);
    assert_eq!(diagnose(&dir).unwrap(), []);
    let e = repair(&dir, &home.path().join("no"), false, &mut |_, _| {}).unwrap_err();
    assert!(e.to_string().contains("none of the known breakages"), "{e}");
    let want = logits_of(&dir, &ids(20, 603));

    // A dead sparsity_config, and nothing else that was quantized.
    let mut config = families()[0].1.clone();
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
        "sparsity_config": {"format": "dense", "targets": ["Linear"], "global_sparsity": 0.5, "sparsity_structure": "2:4"},
    });
    write_json(&dir.join("config.json"), &config);
    assert_eq!(logits_of(&dir, &ids(20, 603)), want, "Lacuna can do without repair, other readers cannot");
    let faults = diagnose(&dir).unwrap();
    assert!(faults.len() == 1 && faults[0].what.contains("sparsity_config"), "{faults:?}");
    inspect_points_to_repair(&dir, "sparsity_config");
    let out = home.path().join("mended");
    repair(&dir, &out, false, &mut |_, _| {}).unwrap();
    assert_eq!(logits_of(&out, &ids(20, 603)), want);
    assert!(Tokenizer::from_dir(&out).is_ok());
    // Where something is quantized as well, that stays and only the dead part goes.
    config["quantization_config"]["config_groups"] = json!({"group_0": {"targets": ["Linear"]}});
    write_json(&dir.join("config.json"), &config);
    repair(&dir, &home.path().join("kept"), false, &mut |_, _| {}).unwrap();
    let kept: Value = serde_json::from_slice(&std::fs::read(home.path().join("kept/config.json")).unwrap()).unwrap();
    assert_eq!(kept["quantization_config"]["sparsity_config"], json!({}));
    assert!(kept["quantization_config"]["config_groups"]["group_0"].is_object());

    // Layers that are gone: seven announced, three there under their old numbers, a list with an entry for each.
    let pruned = home.path().join("pruned");
    std::fs::create_dir(&pruned).unwrap();
    let mut config = json!({"model_type": "qwen3"});
    families()[0]
        .1
        .as_object()
        .unwrap()
        .iter()
        .filter(|(k, _)| *k != "model_type")
        .for_each(|(k, v)| config[k] = v.clone());
    let whole = home.path().join("whole");
    make(&whole, &config);
    let bytes = std::fs::read(whole.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let old = |n: &str| n.replace("layers.2.", "layers.6.").replace("layers.1.", "layers.3.");
    let views: Vec<_> = file.tensors().into_iter().map(|(n, t)| (old(&n), t)).collect();
    safetensors::serialize_to_file(views, None, &pruned.join("model.safetensors")).unwrap();
    config["num_hidden_layers"] = json!(7);
    config["layer_types"] = json!(["full_attention", "x", "x", "full_attention", "x", "x", "full_attention"]);
    write_json(&pruned.join("config.json"), &config);
    let what = &diagnose(&pruned).unwrap()[0].what;
    assert!(
        what.contains("num_hidden_layers is 7, but tensors of 3 layers are there (layers [1, 2, 4, 5] are gone)"),
        "{what}"
    );
    inspect_points_to_repair(&pruned, "num_hidden_layers");
    let out = home.path().join("renumbered");
    repair(&pruned, &out, false, &mut |_, _| {}).unwrap();
    assert_eq!(logits_of(&out, &ids(20, 603)), logits_of(&whole, &ids(20, 603)));
}

/// A GGUF file whose count and lists speak of a layer that is not there.
#[test]
fn repair_mends_gguf_files() {
    let home = TempDir::new().unwrap();
    let (dir, file) = (home.path().join("llama"), home.path().join("m.gguf"));
    make(&dir, &families()[0].1);
    gguf(&dir, &file, GgufKind::F16);
    assert_eq!(diagnose(&file).unwrap(), []);
    let want = logits_of(&file, &ids(20, 603));
    // The count is a number of 4 bytes behind its key and type.
    let mut bytes = std::fs::read(&file).unwrap();
    let key = b"llama.block_count";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    assert_eq!(bytes[at], 3);
    bytes[at] = 5;
    let broken = home.path().join("broken.gguf");
    std::fs::write(&broken, bytes).unwrap();
    assert!(open(&broken).is_err());
    let what = &diagnose(&broken).unwrap()[0].what;
    assert!(what.contains("llama.block_count is 5, but tensors of 3 layers are there"), "{what}");
    inspect_points_to_repair(&broken, "counts 5 layers");
    let mended = home.path().join("mended.gguf");
    repair(&broken, &mended, false, &mut |_, _| {}).unwrap();
    assert_eq!(logits_of(&mended, &ids(20, 603)), want);
    assert_eq!(diagnose(&mended).unwrap(), []);
}

/// Special tokens of Phi-3 take the white space behind them away. llama.cpp knows that by the file's name alone, and so
/// it is kept at every station.
#[test]
fn special_tokens_keep_taking_white_space() {
    let home = TempDir::new().unwrap();
    let at = |name: &str| home.path().join(name);
    let phi3 = &families().into_iter().find(|f| f.0 == "phi3").unwrap().1;
    make(&at("model"), phi3);
    std::fs::remove_file(at("model/special_tokens_map.json")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden("tokenizers/phi3").join(file), at("model").join(file)).unwrap();
    }
    let page: Value = serde_json::from_slice(&std::fs::read(golden("tokenizers/phi3/golden.json")).unwrap()).unwrap();
    let same = |path: &Path| {
        let t = Tokenizer::open(&open(path).unwrap()).unwrap();
        for case in page["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            assert_eq!(json!(t.encode(text, false).unwrap()), case["ids"], "{}: {text:?}", path.display());
        }
    };
    let named = |path: &Path| {
        let c = open(path).unwrap();
        c.metadata().unwrap().get_str("general.name").unwrap().unwrap().to_owned()
    };
    same(&at("model"));
    let saved = gguf(&at("model"), &at("m.gguf"), GgufKind::F16);
    assert_eq!(named(&at("m.gguf")), "phi-3 model");
    assert!(saved.notes.iter().any(|n| n.contains("\"phi-3 model\"")), "{:?}", saved.notes);
    same(&at("m.gguf"));
    packed(&at("m.gguf"), &at("packed"), |_| {}, |_, s| s.clone());
    same(&at("packed"));
    gguf(&at("packed"), &at("again.gguf"), GgufKind::F16);
    assert_eq!(named(&at("again.gguf")), "phi-3 packed");
    same(&at("again.gguf"));
    hf(&at("m.gguf"), &at("hf"), None);
    same(&at("hf"));
    // A tokenizer of another kind must not get that name: llama.cpp would not even open the file.
    make(&at("my-Phi3-tune"), phi3);
    let saved = gguf(&at("my-Phi3-tune"), &at("o.gguf"), GgufKind::F16);
    assert_eq!(named(&at("o.gguf")), "my-Phi_3-tune");
    assert!(saved.notes.iter().any(|n| n.contains("my-Phi_3-tune")), "{:?}", saved.notes);
}

/// A tokenizer that GGUF has no words for is refused before anything is written, one with rare differences tells them.
#[test]
fn tokenizers_that_gguf_cannot_say() {
    let home = TempDir::new().unwrap();
    let (dir, out) = (home.path().join("llama"), home.path().join("m.gguf"));
    make(&dir, &families()[0].1);
    let file = dir.join("tokenizer.json");
    let mut t: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let tokens = t["added_tokens"].as_array_mut().unwrap();
    tokens.iter_mut().find(|t| t["content"] == "<|im_start|>").unwrap()["lstrip"] = true.into();
    write_json(&file, &t);
    let run = || {
        let (dir, out) = (dir.to_str().unwrap(), out.to_str().unwrap());
        let args = ["convert", dir, "--to", "gguf", "-o", out, "--json", "--windows", "2", "--ctx", "64"];
        Command::new(env!("CARGO_BIN_EXE_lacuna")).args(args).output().unwrap()
    };
    // Its chats are `<|im_end|>`, a new line, `<|im_start|>`.
    let done = run();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(1) && said.contains("a chat has other ids"), "{said}");
    assert!(!out.exists());
    let tokens = t["added_tokens"].as_array_mut().unwrap();
    tokens.iter_mut().find(|t| t["content"] == "<|im_start|>").unwrap()["lstrip"] = false.into();
    tokens.iter_mut().find(|t| t["content"] == "<|endoftext|>").unwrap()["lstrip"] = true.into();
    write_json(&file, &t);
    let done = run();
    let said: Value = serde_json::from_slice(&done.stdout).unwrap();
    let notes = said["notes"].as_array().unwrap();
    assert!(notes.len() == 1 && notes[0].as_str().unwrap().contains("<|endoftext|>"), "{notes:?}");
}

/// Without `tokenizer.ggml.pre` words are cut by a guess: whoever opens or inspects the file is told.
#[test]
fn guessed_words_are_told() {
    let home = TempDir::new().unwrap();
    let (dir, file) = (home.path().join("llama"), home.path().join("m.gguf"));
    make(&dir, &families()[0].1);
    gguf(&dir, &file, GgufKind::F16);
    let bytes = std::fs::read(&file).unwrap();
    let renamed = |key: &str, to: &str| {
        assert_eq!(key.len(), to.len());
        let mut bytes = bytes.clone();
        let at = bytes.windows(key.len()).position(|w| w == key.as_bytes()).unwrap();
        bytes[at..at + key.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&file, bytes).unwrap();
    };
    let run = |args: &[&str]| {
        let file = file.to_str().unwrap();
        let done =
            Command::new(env!("CARGO_BIN_EXE_lacuna")).args([&[args[0], file], &args[1..]].concat()).output().unwrap();
        (done.status.success(), String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap())
    };
    let problem = || {
        let (_, said, _) = run(&["inspect", "--json", "--quick"]);
        let said: Value = serde_json::from_str(&said).unwrap();
        said["problems"].as_array().unwrap().iter().map(|p| p["what"].as_str().unwrap().to_owned()).collect::<String>()
    };
    let generate = ["generate", "-p", "Hi", "-n", "1", "--temp", "0"];
    assert_eq!(problem(), "");
    assert!(!run(&generate).2.contains("tokenizer.ggml.pre"));
    renamed("tokenizer.ggml.pre", "tokenizer.ggml.prx");
    assert!(problem().contains("no tokenizer.ggml.pre"), "{}", problem());
    let (fine, _, told) = run(&generate);
    assert!(fine && told.contains("no tokenizer.ggml.pre"), "{told}");
    renamed("smaug-bpe", "smaug-xyz");
    assert!(problem().contains("`smaug-xyz`"), "{}", problem());
    let (fine, _, told) = run(&generate);
    assert!(!fine && told.contains("`smaug-xyz`") && told.contains("tokenizer.json"), "{told}");
}

/// The verb: words and JSON, refusals, what was there before.
#[test]
fn the_verb_says_what_changed() {
    let home = TempDir::new().unwrap();
    let (dir, out) = (home.path().join("llama"), home.path().join("m.gguf"));
    make(&dir, &families()[2].1);
    let (dir, out) = (dir.to_str().unwrap(), out.to_str().unwrap());
    let run = |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_lacuna")).args(args).output().unwrap();
    let done =
        run(&["convert", dir, "--to", "gguf", "--type", "q4_k", "-o", out, "--json", "--windows", "2", "--ctx", "64"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let said: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert!(said["kl_mean"].as_f64().unwrap() > 0.0 && said["changed"].as_u64().unwrap() > 0);
    // Rows of 288 do not divide into 256: each such tensor is named with what it became.
    let fell = said["fallbacks"].as_array().unwrap();
    assert!(fell.contains(&json!({"tensor": "blk.0.attn_q.weight", "instead_of": "Q4_K", "type": "Q5_0"})), "{fell:?}");
    assert!(fell.contains(&json!({"tensor": "output.weight", "instead_of": "Q6_K", "type": "Q8_0"})), "{fell:?}");
    assert!(!fell.iter().any(|f| f["tensor"] == "blk.0.ffn_down.weight"));
    let again = run(&["convert", dir, "--to", "gguf", "-o", out, "--no-kl"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--overwrite"));
    let wrong = run(&["convert", dir, "--to", "hf", "--type", "q4_0", "-o", "x"]);
    assert_eq!(wrong.status.code(), Some(2));
    let words = run(&["convert", dir, "--to", "gguf", "--overwrite", "-o", out, "--no-kl"]);
    let text = String::from_utf8_lossy(&words.stdout);
    assert!(words.status.success() && text.contains("--no-kl"), "{text}");
}

/// What no file of a format can say is refused, and nothing is left behind.
#[test]
fn refusals_name_the_layer_and_leave_nothing() {
    let home = TempDir::new().unwrap();
    let dir = home.path().join("llama");
    make(&dir, &families()[0].1);
    let pack = home.path().join("packed");
    let narrow = |s: &mut Spec| s.layers[1].ffn.as_mut().unwrap().width = 256;
    packed(&dir, &pack, narrow, |p, s| match (p.layer, p.role) {
        (Some(1), Role::Gate | Role::Up | Role::Down) => {
            let m = s.to_mat();
            let cut = Mat::from_fn(256, 256, |r, c| m[(r, c)]);
            Stored::from_piece(pack_float(cut.view(), None, PatternKind::Dense, Float::F32).unwrap())
        }
        _ => s.clone(),
    });
    let out = home.path().join("hf");
    let e = save_hf(&open(&pack).unwrap(), &out, None, false, &mut |_, _| {}).unwrap_err().to_string();
    assert!(e.contains("layer 1: ffn.width is 256, the file would say 512"), "{e}");
    let e = save_gguf(&open(&pack).unwrap(), &out, GgufKind::F16, false, &mut |_, _| {}).unwrap_err().to_string();
    assert!(e.contains("layer 1: feed_forward_length is 256, that of layer 0 is 512"), "{e}");
    let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    let _ = logits(&open(&pack).unwrap(), &ids(4, 603));
}

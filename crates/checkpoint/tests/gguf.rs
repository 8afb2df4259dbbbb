//! GGUF files of several families, written here byte by byte.

use std::fs;
use std::path::PathBuf;

use lacuna_checkpoint::save::{GgufKind, save_gguf};
use lacuna_checkpoint::{Checkpoint, Kind, PackedWriter, open};
use lacuna_format::{Float, GgufType, Pattern, Piece, Stored, Term, Values, Weights};
use lacuna_spec::{Part, Place, Positions, Role, RopeScaling, RopeStyle};

enum Meta {
    U32(u32),
    F32(f32),
    Str(&'static str),
    Strs(&'static [&'static str]),
    U32s(&'static [u32]),
}
use Meta::*;

/// A tensor: name, axes slowest first, type id.
type Tensor = (String, Vec<usize>, u32);

fn string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn gguf(keys: &[(&str, Meta)], tensors: &[Tensor]) -> Vec<u8> {
    let mut f = [b"GGUF", &3u32.to_le_bytes()[..]].concat();
    f.extend((tensors.len() as u64).to_le_bytes());
    f.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        f.extend(string(key));
        match value {
            U32(x) => f.extend([4u32.to_le_bytes(), x.to_le_bytes()].concat()),
            F32(x) => f.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
            Str(s) => f.extend([8u32.to_le_bytes().to_vec(), string(s)].concat()),
            Strs(list) => {
                f.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
                f.extend((list.len() as u64).to_le_bytes());
                list.iter().for_each(|s| f.extend(string(s)));
            }
            U32s(list) => {
                f.extend([9u32.to_le_bytes(), 4u32.to_le_bytes()].concat());
                f.extend((list.len() as u64).to_le_bytes());
                list.iter().for_each(|x| f.extend(x.to_le_bytes()));
            }
        }
    }
    let mut offset = 0usize;
    let mut data = Vec::new();
    for (name, shape, kind) in tensors {
        f.extend(string(name));
        f.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|d| f.extend((*d as u64).to_le_bytes()));
        f.extend(kind.to_le_bytes());
        f.extend((offset as u64).to_le_bytes());
        let n: usize = shape.iter().product();
        let size = match kind {
            0 => n * 4,
            1 => n * 2,
            8 => n / 32 * 34,
            _ => unreachable!(),
        };
        // Small exact floats, and different everywhere.
        let value = |i: usize| (offset + i) as f32 / 64.0;
        match kind {
            0 => (0..n).for_each(|i| data.extend(value(i).to_le_bytes())),
            _ => data.extend((0..size).map(|i| (i * 7 % 60) as u8)),
        }
        offset = data.len().next_multiple_of(32);
        data.resize(offset, 0);
    }
    f.resize(f.len().next_multiple_of(32), 0);
    [f, data].concat()
}

fn write(keys: &[(&str, Meta)], tensors: &[Tensor]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, gguf(keys, tensors)).unwrap();
    (dir, path)
}

fn all_there(c: &Checkpoint) {
    assert_eq!(c.kind(), Kind::Gguf);
    for place in c.spec().places() {
        let stored = c.get(&place).unwrap().unwrap_or_else(|| panic!("no {place}"));
        assert_eq!(Some((stored.rows, stored.cols)), c.spec().shape(&place), "{place}");
        stored.check().unwrap();
    }
    assert!(c.unused().is_empty(), "{:?}", c.unused());
}

fn dense(c: &Checkpoint, place: Place) -> Vec<f32> {
    c.get(&place).unwrap().unwrap().to_mat().into_vec()
}

fn layer(l: usize, names: &[(&str, &[usize], u32)]) -> Vec<Tensor> {
    names.iter().map(|(n, s, t)| (format!("blk.{l}.{n}.weight"), s.to_vec(), *t)).collect()
}

/// Two uneven layers, tied, RoPE with factors, q in blocks.
fn llama() -> (Vec<(&'static str, Meta)>, Vec<Tensor>) {
    let keys = vec![
        ("general.architecture", Str("llama")),
        ("tokenizer.ggml.model", Str("gpt2")),
        ("tokenizer.ggml.tokens", Strs(&["a", "b"])),
        ("llama.block_count", U32(2)),
        ("llama.context_length", U32(64)),
        ("llama.embedding_length", U32(32)),
        ("llama.feed_forward_length", U32s(&[48, 32])),
        ("llama.attention.head_count", U32s(&[4, 2])),
        ("llama.attention.head_count_kv", U32(2)),
        ("llama.attention.key_length", U32(8)),
        ("llama.attention.layer_norm_rms_epsilon", F32(1e-5)),
        ("llama.rope.freq_base", F32(500000.0)),
    ];
    let mut tensors = vec![
        ("token_embd.weight".to_owned(), vec![16, 32], 8),
        ("rope_freqs.weight".to_owned(), vec![4], 0),
        ("output_norm.weight".to_owned(), vec![32], 0),
    ];
    for (l, heads, width) in [(0, 4, 48), (1, 2, 32)] {
        tensors.extend(layer(
            l,
            &[
                ("attn_norm", &[32], 0),
                ("attn_q", &[heads * 8, 32], 8),
                ("attn_k", &[16, 32], 1),
                ("attn_v", &[16, 32], 0),
                ("attn_output", &[32, heads * 8], 0),
                ("ffn_norm", &[32], 0),
                ("ffn_gate", &[width, 32], 8),
                ("ffn_up", &[width, 32], 8),
                ("ffn_down", &[32, width], 0),
            ],
        ));
    }
    (keys, tensors)
}

#[test]
fn uneven_layers_factors_and_blocks() {
    let (keys, mut tensors) = llama();
    // Not first in the file, so that no factor is 0.
    assert_eq!(tensors[1].0, "rope_freqs.weight");
    tensors.swap(0, 2);
    let (_dir, path) = write(&keys, &tensors);
    let c = open(&path).unwrap();
    all_there(&c);
    let s = c.spec();
    assert!(s.tied && s.arch == "llama" && s.vocab == 16);
    let attn = |l: usize| s.layers[l].attn.clone().unwrap();
    assert_eq!((attn(0).heads, attn(1).heads, attn(1).kv_heads, attn(0).head_dim), (4, 2, 2, 8));
    assert_eq!(s.layers[1].ffn.as_ref().unwrap().width, 32);
    let rope = attn(0).rope.unwrap();
    assert_eq!((rope.style, rope.theta, rope.dims), (RopeStyle::Interleaved, 500000.0, 8));
    assert!(matches!(rope.scaling, RopeScaling::Factors { factors } if factors.len() == 4));
    let q = c.get(&Place::layer(0, Role::Q)).unwrap().unwrap();
    assert!(
        matches!(&q.terms[0], Term::Piece(p) if matches!(&p.values, Values::Gguf(GgufType::Q8_0, b) if b.len() == 32 * 34))
    );
    let k = c.get(&Place::layer(0, Role::K)).unwrap().unwrap();
    assert!(matches!(&k.terms[0], Term::Piece(p) if matches!(&p.values, Values::Float(Float::F16, _))));
    assert_eq!(c.metadata().unwrap().get_strs("tokenizer.ggml.tokens").unwrap().unwrap(), ["a", "b"]);
}

#[test]
fn packed_as_it_is_a_gguf_keeps_its_bytes_and_its_tokenizer() {
    let (keys, mut tensors) = llama();
    tensors.swap(0, 2);
    let (dir, path) = write(&keys, &tensors);
    let c = open(&path).unwrap();
    let out = dir.path().join("out");
    let mut w = PackedWriter::create(&out, false).unwrap();
    for place in c.spec().places() {
        w.put(&place, &c.get(&place).unwrap().unwrap()).unwrap();
    }
    w.finish(c.spec().clone(), "none".into(), "here".into(), vec![], Some(&c)).unwrap();
    let p = open(&out).unwrap();
    assert_eq!((p.kind(), p.spec()), (Kind::Packed, c.spec()));
    for place in c.spec().places() {
        assert_eq!(p.get(&place).unwrap(), c.get(&place).unwrap(), "{place}");
    }
    let m = p.metadata().unwrap();
    assert_eq!(m.get("tokenizer.ggml.tokens"), c.metadata().unwrap().get("tokenizer.ggml.tokens"));
    assert_eq!(m.get_str("general.architecture"), Ok(Some("llama")));
    assert!(m.get("llama.block_count").is_none());
    // And once more from the packed model.
    let again = dir.path().join("again");
    let mut w = PackedWriter::create(&again, false).unwrap();
    for place in p.spec().places() {
        w.put(&place, &p.get(&place).unwrap().unwrap()).unwrap();
    }
    w.finish(p.spec().clone(), "none".into(), "here".into(), vec![], Some(&p)).unwrap();
    for file in ["model.safetensors", "config.json", "tokenizer.gguf"] {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(again.join(file)).unwrap(), "{file}");
    }
}

/// Blocks of every type, in matrices, embedding and head, go into a GGUF file as they are.
/// Some blocks of `count` values; of a type that is not written, codes by lot under a scale of 2^-4.
fn blocks(kind: GgufType, count: usize, seed: u64) -> Vec<u8> {
    if kind.is_written() {
        return kind.encode(lacuna_base::testkit::random(1, count, seed).data());
    }
    let mut rng = lacuna_base::Rng::new(seed);
    let mut bytes: Vec<u8> = (0..count / kind.block() * kind.block_bytes()).map(|_| rng.u64() as u8).collect();
    bytes.chunks_exact_mut(kind.block_bytes()).for_each(|b| b[..2].copy_from_slice(&[0, 0x2c]));
    bytes
}

#[test]
fn blocks_of_every_type_are_exported_byte_for_byte() {
    for kind in lacuna_format::gguf::ALL {
        let keys = [
            ("general.architecture", Str("llama")),
            ("llama.block_count", U32(1)),
            ("llama.context_length", U32(64)),
            ("llama.embedding_length", U32(256)),
            ("llama.feed_forward_length", U32(256)),
            ("llama.attention.head_count", U32(4)),
            ("llama.attention.head_count_kv", U32(2)),
            ("llama.attention.layer_norm_rms_epsilon", F32(1e-5)),
            ("llama.rope.freq_base", F32(10000.0)),
        ];
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), vec![8, 256], 0),
            ("output.weight".to_owned(), vec![8, 256], 0),
            ("output_norm.weight".to_owned(), vec![256], 0),
        ];
        let square: &[usize] = &[256, 256];
        let mut names = vec![("attn_norm", &[256][..], 0), ("ffn_norm", &[256], 0)];
        names.extend(["attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"].map(|n| (n, square, 0)));
        names.extend(["attn_k", "attn_v"].map(|n| (n, &[128, 256][..], 0)));
        tensors.extend(layer(0, &names));
        let (dir, path) = write(&keys, &tensors);
        let c = open(&path).unwrap();
        let (out, file) = (dir.path().join("out"), dir.path().join("out.gguf"));
        let mut w = PackedWriter::create(&out, false).unwrap();
        for (i, place) in c.spec().places().into_iter().enumerate() {
            let stored = c.get(&place).unwrap().unwrap();
            if place.part != Part::Weight || stored.cols != 256 || stored.rows == 1 {
                w.put(&place, &stored).unwrap();
                continue;
            }
            let values = Values::Gguf(kind, blocks(kind, stored.rows * 256, i as u64).into());
            let piece = Piece { rows: stored.rows, cols: 256, pattern: Pattern::Dense, values };
            w.put(&place, &Stored::from_piece(piece)).unwrap();
        }
        w.finish(c.spec().clone(), "none".into(), "here".into(), vec![], Some(&c)).unwrap();
        let packed = open(&out).unwrap();
        save_gguf(&packed, &file, GgufKind::Source, false, &mut |_, _| {}).unwrap();
        let exported = open(&file).unwrap();
        let mut blocks = 0;
        for place in c.spec().places() {
            let (was, is) = (packed.get(&place).unwrap().unwrap(), exported.get(&place).unwrap().unwrap());
            if let Values::Gguf(..) = was.single().unwrap().values {
                assert_eq!(was, is, "{kind:?} {place}");
                blocks += 1;
            }
        }
        assert_eq!(blocks, 9, "{kind:?}: embedding, head and seven matrices");
    }
}

#[test]
fn experts_stacked_or_one_by_one() {
    let keys = || {
        let (mut keys, _) = llama();
        keys.retain(|k| {
            !["llama.feed_forward_length", "llama.attention.head_count", "llama.block_count"].contains(&k.0)
        });
        keys.extend([
            ("llama.block_count", U32(1)),
            ("llama.feed_forward_length", U32(48)),
            ("llama.attention.head_count", U32(4)),
            ("llama.expert_count", U32(3)),
            ("llama.expert_used_count", U32(2)),
        ]);
        keys
    };
    let (_, tensors) = llama();
    let common: Vec<Tensor> = tensors
        .into_iter()
        .filter(|t| {
            !t.0.starts_with("blk.1") && !["ffn_gate", "ffn_up", "ffn_down", "rope"].iter().any(|n| t.0.contains(n))
        })
        .chain(layer(0, &[("ffn_gate_inp", &[3, 32], 0)]))
        .collect();
    let mut stacked = common.clone();
    stacked.extend(layer(
        0,
        &[("ffn_gate_exps", &[3, 48, 32], 0), ("ffn_up_exps", &[3, 48, 32], 0), ("ffn_down_exps", &[3, 32, 48], 0)],
    ));
    let (_d, path) = write(&keys(), &stacked);
    let c = open(&path).unwrap();
    all_there(&c);
    assert_eq!(c.spec().arch, "mixtral");
    let up = |e: usize| dense(&c, Place::expert(0, Role::Up, e));
    assert_eq!(up(1).len(), 48 * 32);
    assert_eq!(up(1)[0], up(0)[0] + 48.0 * 32.0 / 64.0);
    let mut single = common;
    for e in 0..3 {
        for (name, shape) in [("ffn_gate", [48, 32]), ("ffn_up", [48, 32]), ("ffn_down", [32, 48])] {
            single.push((format!("blk.0.{name}.{e}.weight"), shape.to_vec(), 0));
        }
    }
    let (_d, path) = write(&keys(), &single);
    all_there(&open(&path).unwrap());
    // One expert too many in the file.
    stacked.iter_mut().filter(|t| t.0.contains("ffn_up_exps")).for_each(|t| t.1[0] = 4);
    let (_d, path) = write(&keys(), &stacked);
    let e = open(&path).unwrap_err().to_string();
    assert!(e.contains("ffn_up_exps") && e.contains("144 of its 192 rows"), "{e}");
}

#[test]
fn gemma3_slides_five_layers_of_six() {
    let keys = vec![
        ("general.architecture", Str("gemma3")),
        ("gemma3.block_count", U32(7)),
        ("gemma3.context_length", U32(64)),
        ("gemma3.embedding_length", U32(32)),
        ("gemma3.feed_forward_length", U32(48)),
        ("gemma3.attention.head_count", U32(2)),
        ("gemma3.attention.head_count_kv", U32(1)),
        ("gemma3.attention.key_length", U32(8)),
        ("gemma3.attention.value_length", U32(8)),
        ("gemma3.attention.sliding_window", U32(10)),
        ("gemma3.attention.layer_norm_rms_epsilon", F32(1e-6)),
        ("gemma3.rope.freq_base", F32(1e6)),
        ("gemma3.rope.scaling.type", Str("linear")),
        ("gemma3.rope.scaling.factor", F32(8.0)),
    ];
    let mut tensors =
        vec![("token_embd.weight".to_owned(), vec![16, 32], 8), ("output_norm.weight".to_owned(), vec![32], 0)];
    for l in 0..7 {
        tensors.extend(layer(
            l,
            &[
                ("attn_norm", &[32], 0),
                ("attn_q", &[16, 32], 8),
                ("attn_k", &[8, 32], 8),
                ("attn_v", &[8, 32], 8),
                ("attn_output", &[32, 16], 0),
                ("attn_q_norm", &[8], 0),
                ("attn_k_norm", &[8], 0),
                ("post_attention_norm", &[32], 0),
                ("ffn_norm", &[32], 0),
                ("ffn_gate", &[48, 32], 8),
                ("ffn_up", &[48, 32], 8),
                ("ffn_down", &[32, 48], 0),
                ("post_ffw_norm", &[32], 0),
            ],
        ));
    }
    let (_dir, path) = write(&keys, &tensors);
    let c = open(&path).unwrap();
    all_there(&c);
    let windows: Vec<_> = c.spec().layers.iter().map(|l| l.attn.as_ref().unwrap().window).collect();
    assert_eq!(windows, [Some(10), Some(10), Some(10), Some(10), Some(10), None, Some(10)]);
    let rope = |l: usize| c.spec().layers[l].attn.clone().unwrap().rope.unwrap();
    assert_eq!((rope(0).theta, rope(0).scaling, rope(0).style), (10000.0, RopeScaling::Default, RopeStyle::Half));
    assert_eq!((rope(5).theta, rope(5).scaling), (1e6, RopeScaling::Linear { factor: 8.0 }));
    assert_eq!((c.spec().norm.offset, c.spec().embed_scale), (0.0, 32f32.sqrt()));
}

#[test]
fn fused_matrices_of_gpt2_and_phi3() {
    let mut keys = vec![
        ("general.architecture", Str("gpt2")),
        ("gpt2.block_count", U32(1)),
        ("gpt2.context_length", U32(64)),
        ("gpt2.embedding_length", U32(32)),
        ("gpt2.feed_forward_length", U32(48)),
        ("gpt2.attention.head_count", U32(4)),
        ("gpt2.attention.layer_norm_epsilon", F32(1e-5)),
    ];
    let mut tensors = vec![
        ("output.weight".to_owned(), vec![16, 32], 0),
        ("token_embd.weight".to_owned(), vec![16, 32], 0),
        ("position_embd.weight".to_owned(), vec![64, 32], 0),
        ("output_norm.weight".to_owned(), vec![32], 0),
        ("output_norm.bias".to_owned(), vec![32], 0),
    ];
    for (name, shape) in
        [("attn_qkv", [96, 32]), ("attn_output", [32, 32]), ("ffn_up", [48, 32]), ("ffn_down", [32, 48])]
    {
        tensors.push((format!("blk.0.{name}.weight"), shape.to_vec(), 0));
        tensors.push((format!("blk.0.{name}.bias"), vec![shape[0]], 0));
    }
    for name in ["attn_norm", "ffn_norm"] {
        tensors.push((format!("blk.0.{name}.weight"), vec![32], 0));
        tensors.push((format!("blk.0.{name}.bias"), vec![32], 0));
    }
    let (_dir, path) = write(&keys, &tensors);
    let c = open(&path).unwrap();
    all_there(&c);
    assert_eq!((c.spec().positions, c.spec().tied), (Positions::Learned { offset: 0 }, false));
    let q = dense(&c, Place::layer(0, Role::Q));
    assert_eq!(dense(&c, Place::layer(0, Role::V))[0], q[0] + 64.0 * 32.0 / 64.0);

    keys = vec![
        ("general.architecture", Str("phi3")),
        ("phi3.block_count", U32(1)),
        ("phi3.context_length", U32(64)),
        ("phi3.embedding_length", U32(32)),
        ("phi3.feed_forward_length", U32(48)),
        ("phi3.attention.head_count", U32(4)),
        ("phi3.attention.head_count_kv", U32(2)),
        ("phi3.attention.layer_norm_rms_epsilon", F32(1e-5)),
        ("phi3.rope.scaling.original_context_length", U32(32)),
        ("phi3.rope.scaling.attn_factor", F32(1.25)),
    ];
    let tensors = vec![
        ("output_norm.weight".to_owned(), vec![32], 0),
        ("token_embd.weight".to_owned(), vec![16, 32], 0),
        ("output.weight".to_owned(), vec![16, 32], 0),
        ("rope_factors_long.weight".to_owned(), vec![4], 0),
        ("rope_factors_short.weight".to_owned(), vec![4], 0),
        ("blk.0.attn_norm.weight".to_owned(), vec![32], 0),
        ("blk.0.ffn_norm.weight".to_owned(), vec![32], 0),
        ("blk.0.attn_qkv.weight".to_owned(), vec![64, 32], 8),
        ("blk.0.attn_output.weight".to_owned(), vec![32, 32], 0),
        ("blk.0.ffn_up.weight".to_owned(), vec![96, 32], 8),
        ("blk.0.ffn_down.weight".to_owned(), vec![32, 48], 0),
    ];
    let (_dir, path) = write(&keys, &tensors);
    let c = open(&path).unwrap();
    all_there(&c);
    let scaling = c.spec().layers[0].attn.clone().unwrap().rope.unwrap().scaling;
    assert!(matches!(scaling, RopeScaling::Longrope { original: 32, attention_factor: 1.25, .. }), "{scaling:?}");
}

#[test]
fn damaged_files_name_themselves() {
    let (keys, mut tensors) = llama();
    tensors.swap(0, 2);
    let whole = gguf(&keys, &tensors);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for i in 0..16 {
        fs::write(&path, &whole[..whole.len() * i / 16]).unwrap();
        assert!(open(&path).unwrap_err().to_string().contains("model.gguf"));
    }
    for i in 0..whole.len().min(2000) {
        let mut f = whole.clone();
        f[i] ^= 0x41;
        fs::write(&path, f).unwrap();
        let _ = open(&path);
    }
    let (mut keys, _) = llama();
    keys.push(("llama.attention.clamp_kqv", F32(8.0)));
    fs::write(&path, gguf(&keys, &tensors)).unwrap();
    assert!(open(&path).unwrap_err().to_string().contains("llama.attention.clamp_kqv"));
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/gguf").join(name)
}

fn same_weights(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(a.spec(), b.spec());
    for place in a.spec().places() {
        let (a, b) = (a.get(&place).unwrap().unwrap(), b.get(&place).unwrap().unwrap());
        assert_eq!(a, b, "{place}");
    }
}

fn saved(c: &Checkpoint, kind: GgufKind) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    save_gguf(c, &path, kind, false, &mut |_, _| {}).unwrap();
    fs::read(path).unwrap()
}

/// The whole file holds what the `gguf` package reads from it.
#[test]
fn types_are_read_as_the_package_reads_them() {
    let c = open(golden("whole.gguf")).unwrap();
    all_there(&c);
    let want: serde_json::Value = serde_json::from_slice(&fs::read(golden("golden.json")).unwrap()).unwrap();
    let mut compared = 0;
    for place in c.spec().places() {
        let sources = lacuna_arch::gguf_sources(c.spec(), &place);
        let Some(first) = sources.iter().find_map(|s| want["first"].get(&s.name)) else { continue };
        let have = c.get(&place).unwrap().unwrap().to_mat().into_vec();
        for (have, first) in have.iter().zip(first.as_array().unwrap()) {
            assert_eq!(*have, first.as_f64().unwrap() as f32, "{place}");
        }
        compared += 1;
    }
    assert_eq!(compared, want["first"].as_object().unwrap().len());
    let up = c.get(&Place::layer(0, Role::Up)).unwrap().unwrap();
    assert_eq!(up.codec_name(), "table4 row");
    // Blocks go along as they are, where they may.
    let same = saved(&c, GgufKind::Source);
    let again = tempfile::tempdir().unwrap();
    fs::write(again.path().join("again.gguf"), &same).unwrap();
    same_weights(&c, &open(again.path()).unwrap());
    assert_eq!(same.len() / 1024, fs::read(golden("whole.gguf")).unwrap().len() / 1024);
    // And are made into others.
    assert!(saved(&c, GgufKind::Q8_0).len() > same.len());
}

#[test]
fn a_big_endian_file_is_its_little_endian_twin() {
    let (little, big) = (open(golden("whole.gguf")).unwrap(), open(golden("big.gguf")).unwrap());
    all_there(&big);
    same_weights(&little, &big);
    let text = |c: &Checkpoint| lacuna_checkpoint::Tokenizer::open(c).unwrap().to_json().unwrap();
    assert_eq!(text(&little), text(&big));
    assert_eq!(saved(&little, GgufKind::Source), saved(&big, GgufKind::Source));
    // Older writers leave the first word as it is.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old.gguf");
    let mut bytes = fs::read(golden("big.gguf")).unwrap();
    bytes[..4].copy_from_slice(b"GGUF");
    fs::write(&path, &bytes).unwrap();
    same_weights(&little, &open(&path).unwrap());
    // A type whose order nobody has settled: Q5_K (13) in the place of the last Q6_K (14).
    let at = bytes.windows(4).rposition(|w| w == 14u32.to_be_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&13u32.to_be_bytes());
    fs::write(&path, &bytes).unwrap();
    let said = open(&path).unwrap_err().to_string();
    assert!(said.contains("Q5_K in a big-endian file") && said.contains("ffn_down"), "{said}");
    // Cut anywhere, it is refused and no more.
    for n in (0..bytes.len()).step_by(97) {
        assert!(lacuna_checkpoint::gguf::parse(&fs::read(golden("big.gguf")).unwrap()[..n]).is_err());
    }
}

#[test]
fn parts_of_a_file_are_one_model() {
    let whole = open(golden("whole.gguf")).unwrap();
    let name = |i: usize| format!("parts-{i:05}-of-00003.gguf");
    let dir = tempfile::tempdir().unwrap();
    for i in 1..=3 {
        fs::copy(golden(&name(i)), dir.path().join(name(i))).unwrap();
    }
    for path in [dir.path().to_path_buf(), dir.path().join(name(1)), dir.path().join(name(3))] {
        let c = open(&path).unwrap();
        all_there(&c);
        same_weights(&whole, &c);
        assert_eq!(c.path(), dir.path().join(name(1)));
        // Together again, without a word of parts.
        assert_eq!(saved(&whole, GgufKind::Source), saved(&c, GgufKind::Source));
    }
    let says = |path: &std::path::Path, what: &str| {
        let said = open(path).unwrap_err().to_string();
        assert!(said.contains(what), "{said}");
    };
    let at = dir.path().join(name(1));
    // Under another name nobody finds the others.
    let lone = tempfile::tempdir().unwrap();
    fs::copy(&at, lone.path().join("model.gguf")).unwrap();
    says(&lone.path().join("model.gguf"), "-00001-of-00003.gguf");
    // One that is missing is named, and so is one of something else.
    fs::rename(dir.path().join(name(2)), dir.path().join("aside")).unwrap();
    says(&at, "part 2 of 3");
    says(&at, &name(2));
    fs::copy(&at, dir.path().join(name(2))).unwrap();
    says(&at, "split.no 0");
    // Keys that do not fit: one tensor more is counted.
    fs::rename(dir.path().join("aside"), dir.path().join(name(2))).unwrap();
    for i in 1..=3 {
        let path = dir.path().join(name(i));
        let mut bytes = fs::read(&path).unwrap();
        let key = b"split.tensors.count";
        let from = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
        bytes[from] += 1;
        fs::write(&path, bytes).unwrap();
    }
    says(&at, "split.tensors.count is 21");
}

//! Packed models: what is put comes back bit for bit, and a killed run goes on to the same bytes.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lacuna_checkpoint::save::{GgufKind, save_gguf, save_hf};
use lacuna_checkpoint::{Checkpoint, Kind, PackedWriter, SaveError, open};
use lacuna_format::{
    Codebook, Float, Group, Integers, Map, Mask, Owner, PatternKind, Piece, ScaleCodec, Signed, Stored, Term, Weights,
    pack_codebook, pack_float, pack_integers,
};
use lacuna_spec::{Part, Place, Role};
use serde_json::{Value, json};

fn tiny(name: &str) -> Checkpoint {
    open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)).unwrap()
}

/// Some tensors as they are, some as integers, some sparse, one of tables, some between maps, one of two terms, one of
/// none.
fn compressed(c: &Checkpoint) -> Vec<(Place, Arc<Stored>)> {
    let pick = |place: Place| {
        let stored = c.get(&place).unwrap().unwrap();
        let w = stored.to_mat();
        let (rows, cols) = (w.rows(), w.cols());
        let ints = || {
            let group = Group::Run(16);
            let scales = lacuna_base::Mat::from_fn(rows, group.count(cols), |r, g| 0.1 + (r + g) as f32 / 64.0);
            let codes = (0..rows * cols).map(|i| (i * 5 % 15) as u8).collect();
            let q = Integers { rows, cols, bits: 4, group, codes, scales, zeros: None, offsets: None };
            pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).unwrap()
        };
        let sparse = |kind: PatternKind| {
            let mask = Mask::from_fn(rows, cols, |r, c| (r * 3 + c) % 4 < 2);
            pack_float(w.view(), Some(&mask), kind, Float::F16).unwrap()
        };
        let one = |p: Piece| Arc::new(Stored::from_piece(p));
        match (place.role, place.layer) {
            (Role::Q, _) => one(ints()),
            (Role::K, _) => one(sparse(PatternKind::Mask { height: 1 })),
            (Role::V, _) => one(sparse(PatternKind::Csr)),
            (Role::O, Some(0)) => {
                Arc::new(Stored::new(rows, cols, vec![Term::Piece(ints()), Term::Piece(sparse(PatternKind::Csr))]))
            }
            (Role::O, _) => Arc::new(Stored::new(rows, cols, vec![])),
            (Role::Up, Some(0)) if place.part == Part::Weight => {
                let codes = (0..rows * cols).map(|i| (i * 5 % 8) as u8).collect();
                let tables = lacuna_base::Mat::from_fn(rows, 8, |r, c| (r % 5) as f32 - c as f32 / 4.0);
                let q = Codebook { bits: 3, codes, owner: Owner::Row, tables, scales: None };
                let kind = PatternKind::Dense;
                one(pack_codebook((rows, cols), &q, None, kind, Float::F16, ScaleCodec::F16).unwrap())
            }
            (Role::Down, _) if place.part == Part::Weight => Arc::new(between_maps(ints())),
            _ => stored,
        }
    };
    c.spec().places().into_iter().map(|p| (p, pick(p))).collect()
}

/// A matrix with two maps before it and one behind it.
fn between_maps(piece: Piece) -> Stored {
    let (rows, cols) = (piece.rows, piece.cols);
    let signs: Vec<bool> = (0..cols).map(|c| c % 3 == 0).collect();
    let turned: Vec<u32> = (0..rows as u32).rev().collect();
    let input = vec![Map::hadamard(8, Some(&signs)), Map::diagonal(&vec![0.75; cols], Float::F16).unwrap()];
    Stored::from_piece(piece).with_maps(input, vec![Map::permutation(&turned)])
}

/// Formats without maps get what a matrix with maps comes to, and not its terms.
#[test]
fn exports_do_not_forget_maps() {
    let c = tiny("llama");
    let dir = tempfile::tempdir().unwrap();
    let mut w = PackedWriter::create(&dir.path().join("packed"), false).unwrap();
    let all = compressed(&c);
    for (place, stored) in &all {
        w.put(place, stored).unwrap();
    }
    let packed = open(finish(w, &c)).unwrap();
    assert_eq!(packed.packed().unwrap().version, 2);
    let (hf, gguf) = (dir.path().join("hf"), dir.path().join("m.gguf"));
    save_hf(&packed, &hf, Some(Float::F32), false, &mut |_, _| {}).unwrap();
    save_gguf(&packed, &gguf, GgufKind::F32, false, &mut |_, _| {}).unwrap();
    for file in [hf, gguf] {
        let back = open(&file).unwrap();
        for (place, stored) in all.iter().filter(|(p, _)| [Role::Up, Role::Down].contains(&p.role)) {
            assert_eq!(back.get(place).unwrap().unwrap().to_mat(), stored.to_mat(), "{place} in {}", file.display());
        }
    }
}

/// A model of stacks is loaded within any budget, and more bytes never hold less of a matrix.
#[test]
fn stacks_load_within_any_budget() {
    let c = tiny("llama");
    let dir = tempfile::tempdir().unwrap();
    let mut w = PackedWriter::create(&dir.path().join("packed"), false).unwrap();
    let thin = |r: usize, c: usize, by: f32| {
        let w = lacuna_base::Mat::from_fn(r, c, |r, c| by * (1.0 + ((r * 5 + c * 3) % 7) as f32));
        pack_float(w.view(), None, PatternKind::Dense, Float::F16).unwrap()
    };
    let is_stack = |p: &Place| p.part == Part::Weight && [Role::Q, Role::Up, Role::Down].contains(&p.role);
    for place in c.spec().places() {
        let mut stored = c.get(&place).unwrap().unwrap().as_ref().clone();
        if is_stack(&place) {
            let (rows, cols) = (stored.rows, stored.cols);
            let one = |i: usize| {
                let turned = Mask::from_fn(rows, cols, |r, c| (r * 3 + c * i) % 5 < 2);
                let by = 0.5f32.powi(i as i32 + place.layer.unwrap_or(0) as i32 % 2);
                Term::Signed(Signed::new(&turned, thin(rows, 2, 1.0), thin(2, cols, by)))
            };
            stored = Stored::new(rows, cols, (0..4).map(one).collect());
            stored = stored.with_maps(vec![Map::diagonal(&vec![0.5; cols], Float::F16).unwrap()], vec![]);
        }
        w.put(&place, &stored).unwrap();
    }
    let path = finish(w, &c);
    let whole = open(&path).unwrap();
    assert_eq!(whole.packed().unwrap().version, 5);
    let bytes = |c: &Checkpoint| c.spec().places().iter().map(|p| c.get(p).unwrap().unwrap().bytes()).sum::<u64>();
    let counts = |c: &Checkpoint| -> Vec<usize> {
        let stacks = c.spec().places().into_iter().filter(is_stack);
        stacks.map(|p| c.get(&p).unwrap().unwrap().terms.len()).collect()
    };
    let all = bytes(&whole);
    let least = open(&path).unwrap().within(0).unwrap_err().to_string();
    assert!(least.contains("the least is"), "{least}");
    let mut last = counts(&whole).iter().map(|_| 1).collect::<Vec<_>>();
    for percent in [60, 70, 75, 80, 85, 90, 95, 99, 100] {
        let Ok(some) = open(&path).unwrap().within(all * percent / 100) else { continue };
        let now = counts(&some);
        assert!(bytes(&some) <= all * percent / 100 && last.iter().zip(&now).all(|(a, b)| a <= b), "{last:?} {now:?}");
        assert_eq!(some.remarks().is_empty(), percent == 100, "{:?}", some.remarks());
        for place in some.spec().places() {
            let (part, whole) = (some.get(&place).unwrap().unwrap(), whole.get(&place).unwrap().unwrap());
            assert_eq!(*part, whole.first_terms(part.terms.len()), "{place}");
        }
        last = now;
    }
    assert!(last.iter().all(|n| *n == 4), "everything fits in the end: {last:?}");
    let e = tiny("llama").within(1 << 40).unwrap_err().to_string();
    assert!(e.contains("no matrix is a stack"), "{e}");
}

#[test]
fn nested_codes_load_at_fewer_bits() {
    let c = tiny("llama");
    let dir = tempfile::tempdir().unwrap();
    let mut w = PackedWriter::create(&dir.path().join("packed"), false).unwrap();
    compressed(&c).iter().for_each(|(place, stored)| w.put(place, stored).unwrap());
    let path = finish(w, &c);
    let (whole, cut) = (open(&path).unwrap(), open(&path).unwrap().narrowed(2).unwrap());
    assert!(cut.remarks().iter().any(|r| r == "codes of 1 matrices are loaded at 2 bits"), "{:?}", cut.remarks());
    let mut smaller = 0;
    for place in c.spec().places() {
        let (part, all) = (cut.get(&place).unwrap().unwrap(), whole.get(&place).unwrap().unwrap());
        if all.code_bits().is_some() {
            smaller += 1;
            let Term::Piece(piece) = &all.terms[0] else { panic!("one piece") };
            assert_eq!(part.terms, [Term::Piece(lacuna_format::narrow(piece, 2).unwrap())]);
            assert!(part.bytes() < all.bytes());
        } else {
            assert_eq!(part, all, "{place}");
        }
    }
    assert_eq!(smaller, 1);
    for (bits, why) in
        [(3, "no matrix has codes of more than 3 bits"), (0, "there are 1 to 8"), (9, "there are 1 to 8")]
    {
        let e = open(&path).unwrap().narrowed(bits).unwrap_err().to_string();
        assert!(e.contains(why), "{e}");
    }
    assert!(tiny("llama").narrowed(2).is_err());
}

const SHARD: u64 = 12_000;

fn finish(w: PackedWriter, c: &Checkpoint) -> PathBuf {
    let exact = vec!["weights of attn.q are int4".to_owned()];
    w.finish(c.spec().clone(), json!({"version": 1}), json!({"name": "tiny"}), exact, Some(c)).unwrap()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let one = |e: fs::DirEntry| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap());
    fs::read_dir(dir).unwrap().map(|e| one(e.unwrap())).collect()
}

#[test]
fn what_is_put_comes_back() {
    // The last number: tensors whose headers have room kept for them; 1 is too few, and the data are copied.
    for (name, shard, tensors) in [
        ("llama", u64::MAX, 0),
        ("llama", u64::MAX, 100),
        ("llama", u64::MAX, 1),
        ("llama", SHARD, 0),
        ("gpt2", SHARD, 100),
        ("qwen3_moe", SHARD, 1000),
        ("llama_bf16", 1, 1),
    ] {
        let c = tiny(name);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let w = PackedWriter::open(&out, false, false, &Value::Null, tensors).unwrap();
        let mut w = w.shard_bytes(shard);
        let all = compressed(&c);
        w.put_all(&all[..all.len() / 2]).unwrap();
        for (place, stored) in &all[all.len() / 2..] {
            w.put(place, stored).unwrap();
            assert_eq!(w.read(place).unwrap().as_ref(), Some(stored.as_ref()));
        }
        assert_eq!(finish(w, &c), out);
        let p = open(&out).unwrap();
        assert_eq!((p.kind(), p.spec()), (Kind::Packed, c.spec()));
        for (place, stored) in &all {
            assert_eq!(p.get(place).unwrap().as_ref(), Some(stored), "{name}: {place}");
            p.release(place);
        }
        assert!(p.unused().is_empty(), "{:?}", p.unused());
        let config = p.packed().unwrap();
        assert_eq!(config.approximations, ["weights of attn.q are int4"]);
        assert_eq!(config.files.len() > 1, shard < u64::MAX, "{:?}", config.files);
        // Other readers of safetensors agree that these are.
        for file in &config.files {
            safetensors::SafeTensors::deserialize(&fs::read(out.join(file)).unwrap()).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let c = tiny("llama");
    let all = compressed(&c);
    let dir = tempfile::tempdir().unwrap();
    let put = |w: &mut PackedWriter, range: std::ops::Range<usize>| {
        for (place, stored) in &all[range] {
            if !w.is_done(place) {
                w.put(place, stored).unwrap();
            }
        }
    };
    let whole = dir.path().join("whole");
    let mut w = PackedWriter::open(&whole, false, false, &Value::Null, 40).unwrap().shard_bytes(SHARD);
    put(&mut w, 0..all.len());
    let expected = files(&finish(w, &c));
    assert!(expected.len() > 4);
    for k in 0..=all.len() {
        let out = dir.path().join(format!("cut{k}"));
        let mut w = PackedWriter::open(&out, false, false, &Value::Null, 40).unwrap().shard_bytes(SHARD);
        put(&mut w, 0..k);
        let partial = w.dir().to_owned();
        drop(w);
        // What a kill in the middle of a put leaves: data without a line, and half a line.
        for entry in fs::read_dir(&partial).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "data") {
                OpenOptions::new().append(true).open(&path).unwrap().write_all(&[7; 99]).unwrap();
            }
        }
        let mut journal = OpenOptions::new().append(true).open(partial.join("journal")).unwrap();
        journal.write_all(b"{\"place\":\"layers.0.at").unwrap();
        fs::write(partial.join("shard-00001.sealing"), b"half").unwrap();
        let mut w = PackedWriter::open(&out, false, true, &Value::Null, 40).unwrap().shard_bytes(SHARD);
        assert_eq!(all.iter().filter(|(p, _)| w.is_done(p)).count(), k);
        put(&mut w, 0..all.len());
        assert_eq!(files(&finish(w, &c)), expected, "killed after {k}");
    }
}

#[test]
fn data_that_never_reached_the_disk_are_written_again() {
    let c = tiny("llama");
    let all = compressed(&c);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut w = PackedWriter::create(&out, false).unwrap();
    for (place, stored) in &all[..5] {
        w.put(place, stored).unwrap();
    }
    let data = w.dir().join("shard-00001.data");
    drop(w);
    let file = OpenOptions::new().write(true).open(&data).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    let w = PackedWriter::open(&out, false, true, &Value::Null, 0).unwrap();
    assert!(w.is_done(&all[3].0) && !w.is_done(&all[4].0));
}

#[test]
fn killed_within_finish() {
    let c = tiny("llama");
    let all = compressed(&c);
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        let mut w = PackedWriter::create(&dir.path().join(name), false).unwrap().shard_bytes(SHARD);
        all.iter().for_each(|(p, s)| w.put(p, s).unwrap());
        w
    };
    let expected = files(&finish(make("whole"), &c));
    // Make the last seal happen, then stop before the journal goes: a directory where config.json should be stops it.
    let w = make("stopped");
    let partial = w.dir().to_owned();
    fs::create_dir(partial.join("config.json")).unwrap();
    assert!(w.finish(c.spec().clone(), json!(null), json!(null), vec![], Some(&c)).is_err());
    assert!(partial.join("journal").exists() && !partial.join("shard-00001.safetensors").exists());
    fs::remove_dir(partial.join("config.json")).unwrap();
    let w = PackedWriter::open(&dir.path().join("stopped"), false, true, &Value::Null, 0).unwrap().shard_bytes(SHARD);
    assert!(all.iter().all(|(p, _)| w.is_done(p)));
    assert_eq!(files(&finish(w, &c)), expected);
}

#[test]
fn nothing_is_overwritten_unasked() {
    let c = tiny("llama");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let make = |overwrite: bool| -> Result<PathBuf, SaveError> {
        let mut w = PackedWriter::create(&out, overwrite)?;
        for place in c.spec().places() {
            w.put(&place, &c.get(&place).unwrap().unwrap())?;
        }
        w.finish(c.spec().clone(), json!(null), json!(null), vec![], None)
    };
    make(false).unwrap();
    let e = make(false).unwrap_err().to_string();
    assert!(e.contains("exists"), "{e}");
    make(true).unwrap();
    open(&out).unwrap();
    // A directory of somebody else stays, whatever is asked.
    fs::write(out.join("config.json"), "{}").unwrap();
    assert!(make(true).unwrap_err().to_string().contains("will not be overwritten"));
}

/// Matrices in shortcuts come back as they were; in another shape they are refused, whoever says so.
#[test]
fn shortcuts_come_back_and_fit() {
    let c = tiny("llama");
    let dir = tempfile::tempdir().unwrap();
    let mut spec = c.spec().clone();
    spec.norm.divisor = Some(48);
    (spec.layers[0].attn_shortcut, spec.layers[0].ffn_shortcut, spec.layers[1].ffn_shortcut) = (true, true, true);
    let h = spec.hidden;
    let turned = |rows: usize, cols: usize| {
        let w = lacuna_base::Mat::from_fn(rows, cols, |r, c| ((r * 7 + c * 3) % 11) as f32 / 8.0 - 0.5);
        Arc::new(Stored::from_piece(pack_float(w.view(), None, PatternKind::Dense, Float::F16).unwrap()))
    };
    let write = |name: &str, shape: (usize, usize)| {
        let mut w = PackedWriter::create(&dir.path().join(name), false).unwrap();
        for place in spec.places() {
            let stored = c.get(&place).unwrap().unwrap_or_else(|| turned(shape.0, shape.1));
            w.put(&place, &stored).unwrap();
        }
        w.finish(spec.clone(), json!(null), json!(null), vec![], Some(&c)).map_err(|e| e.to_string())
    };
    let out = write("m", (h, h)).unwrap();
    let p = open(&out).unwrap();
    assert_eq!((p.spec(), p.packed().unwrap().version), (&spec, 3));
    let shortcuts: Vec<Place> = spec.places().into_iter().filter(|p| p.role.is_shortcut()).collect();
    assert_eq!(shortcuts.len(), 3);
    for place in &shortcuts {
        assert_eq!(p.get(place).unwrap().unwrap(), turned(h, h), "{place}");
    }
    assert!(p.unused().is_empty());
    for (i, shape) in [(h, h + 1), (h - 1, h), (1, h), (h * h, 1)].into_iter().enumerate() {
        let said = write(&format!("bad{i}"), shape).unwrap_err();
        assert!(said.contains("layers.0.attn.shortcut") && said.contains(&shape.0.to_string()), "{said}");
    }
    // A file that says so of itself: in its network, in its descriptions, in its buffers.
    let good: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut config = good.clone();
        change(&mut config);
        fs::write(out.join("config.json"), config.to_string()).unwrap();
        let all = |p: Checkpoint| {
            let check = |x: &Place| p.get(x).map_err(|e| e.to_string())?.unwrap().check().map_err(|e| e.to_string());
            p.spec().places().iter().try_for_each(check)
        };
        open(&out).map_err(|e| e.to_string()).and_then(all).unwrap_err()
    };
    for (rows, cols) in [(h, h - 8), (2 * h, h), (0, 0), (1 << 40, 1 << 40)] {
        let said = refused(&|c| {
            let d = &mut c["weights"]["layers.0.ffn.shortcut"];
            (d["rows"], d["cols"]) = (json!(rows), json!(cols));
        });
        assert!(said.contains("layers.0.ffn.shortcut"), "{said}");
    }
    let said = refused(&|c| c["spec"]["layers"][1]["ffn_shortcut"] = json!(false));
    assert!(said.contains("layers.1.ffn.shortcut"), "{said}");
    let said = refused(&|c| drop(c["weights"].as_object_mut().unwrap().remove("layers.1.ffn.shortcut")));
    assert!(said.contains("lack layers.1.ffn.shortcut"), "{said}");
    let said = refused(&|c| {
        let q = c["weights"]["layers.0.attn.k"].clone();
        c["weights"]["layers.0.attn.shortcut"] = q;
    });
    assert!(said.contains("layers.0.attn.shortcut"), "{said}");
    fs::write(out.join("config.json"), good.to_string()).unwrap();
    assert!(open(&out).is_ok());
}

#[test]
fn an_incomplete_model_is_not_finished() {
    let c = tiny("llama");
    let dir = tempfile::tempdir().unwrap();
    let mut w = PackedWriter::create(&dir.path().join("out"), false).unwrap();
    let embed = Place::global(Role::Embed);
    w.put(&embed, &c.get(&embed).unwrap().unwrap()).unwrap();
    assert!(w.put(&embed, &c.get(&embed).unwrap().unwrap()).unwrap_err().to_string().contains("before"));
    let e = w.finish(c.spec().clone(), json!(null), json!(null), vec![], None).unwrap_err().to_string();
    assert!(e.contains("layers.0.attn.norm was never written"), "{e}");
    assert!(!dir.path().join("out").exists());
}

#[test]
fn damaged_packed_models_are_refused() {
    let c = tiny("llama");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut w = PackedWriter::create(&out, false).unwrap();
    compressed(&c).iter().for_each(|(p, s)| w.put(p, s).unwrap());
    finish(w, &c);
    let good: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    // Opened and every matrix asked for; where the damage shows is not said.
    let all = |out: &Path| -> Result<(), String> {
        let p = open(out).map_err(|e| e.to_string())?;
        p.spec().places().iter().try_for_each(|x| p.get(x).map(drop).map_err(|e| e.to_string()))
    };
    let refuse = |change: &dyn Fn(&mut Value), words: &[&str]| {
        let mut config = good.clone();
        change(&mut config);
        fs::write(out.join("config.json"), config.to_string()).unwrap();
        let e = all(&out).unwrap_err();
        assert!(words.iter().all(|w| e.contains(w)), "{words:?} not in: {e}");
    };
    refuse(&|c| c["version"] = json!(8), &["config.json", "version 8"]);
    refuse(&|c| c["spec"]["layers"][0]["attn_shortcut"] = json!(true), &["lack layers.0.attn.shortcut"]);
    refuse(&|c| c["spec"]["layers"][0]["attn_shortcut"] = json!(32), &["config.json"]);
    refuse(&|c| c["weights"]["layers.0.attn.shortcut"] = c["weights"]["layers.0.attn.q"].clone(), &["attn.shortcut"]);
    refuse(&|c| c["spec"]["norm"]["divisor"] = json!(0), &["norm.divisor is 0"]);
    refuse(&|c| c["files"][0] = json!("../model.safetensors"), &["config.json", "same directory"]);
    refuse(&|c| c["files"][0] = json!("other.safetensors"), &["other.safetensors"]);
    refuse(&|c| c["files"] = json!(["model.safetensors", "model.safetensors"]), &["two files"]);
    refuse(&|c| c["spec"]["hidden"] = json!(64), &["config.json", "embed"]);
    refuse(&|c| c["spec"]["hidden"] = json!(u64::MAX), &["config.json", "hidden"]);
    refuse(&|c| drop(c["weights"].as_object_mut().unwrap().remove("embed")), &["lack embed"]);
    refuse(&|c| c["weights"]["layers.9.attn.q"] = c["weights"]["layers.0.attn.q"].clone(), &["layers.9.attn.q"]);
    refuse(&|c| c["weights"]["layers.0.attn.q"] = c["weights"]["layers.0.attn.k"].clone(), &["layers.0.attn.q"]);
    refuse(&|c| c["extra"] = json!(1), &["extra"]);
    refuse(
        &|c| {
            let q = &mut c["weights"]["layers.0.attn.q"];
            *q = serde_json::from_str(&q.to_string().replace("\"bits\":4", "\"bits\":5")).unwrap();
        },
        &["layers.0.attn.q"],
    );
    let twice =
        good.to_string().replacen("\"weights\":{", "\"weights\":{\"embed\":{\"rows\":1,\"cols\":1,\"terms\":[]},", 1);
    fs::write(out.join("config.json"), twice).unwrap();
    assert!(all(&out).unwrap_err().contains("twice"));
    fs::write(out.join("config.json"), good.to_string()).unwrap();
    all(&out).unwrap();
    let path = out.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for i in 0..16 {
        fs::write(&path, &whole[..whole.len() * i / 16]).unwrap();
        assert!(all(&out).unwrap_err().contains("model.safetensors"));
    }
    // Indices that point outside their matrix.
    let st = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let columns = st.tensor("layers.0.attn.v.columns").unwrap().data();
    let at = columns.as_ptr() as usize - whole.as_ptr() as usize;
    let mut bad = whole.clone();
    bad[at..at + 2].copy_from_slice(&[0xff, 0xff]);
    fs::write(&path, bad).unwrap();
    assert!(all(&out).unwrap_err().contains("layers.0.attn.v"));
}

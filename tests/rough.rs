//! Rough handling of whole commands: output that cannot be written, signals, full disks, numbers that are not finite,
//! files that are not what their names say, defaults that do not fit.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "support/mod.rs"]
mod support;

/// A tiny model's configuration with some keys changed.
fn config(changed: Value) -> Value {
    let mut c = json!({
        "model_type": "llama", "vocab_size": 603, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    changed.as_object().unwrap().iter().for_each(|(k, v)| c[k] = v.clone());
    c
}

/// A folder with a tiny model of a context of 64 tokens.
fn home() -> TempDir {
    let dir = TempDir::new().unwrap();
    support::make(&dir.path().join("tiny"), &config(json!({})));
    dir
}

/// A folder with a model that takes a while to write: some tens of megabytes.
fn large_home() -> TempDir {
    let dir = TempDir::new().unwrap();
    let shape =
        json!({"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 6, "max_position_embeddings": 512});
    support::make(&dir.path().join("large"), &config(shape));
    dir
}

fn lacuna(home: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    c.current_dir(home).args(args).args(["--cache-dir", "cache", "--offline"]);
    c
}

/// Runs a command and returns what it said on standard error.
fn told(command: &mut Command, status: i32) -> String {
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(status), "{command:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    once(&said);
    said
}

/// Nothing is said twice: neither a line nor a part of an error's chain.
fn once(said: &str) {
    let unlike = |parts: &mut dyn Iterator<Item = &str>| {
        let mut seen = std::collections::HashSet::new();
        parts.filter(|p| p.len() > 12).for_each(|p| assert!(seen.insert(p), "'{p}' is said twice:\n{said}"));
    };
    unlike(&mut said.lines());
    said.lines().for_each(|l| unlike(&mut l.split(": ")));
}

fn object(home: &Path, args: &[&str]) -> (Value, String) {
    let out = lacuna(home, args).arg("--json").output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{args:?}: {said}");
    once(&said);
    (serde_json::from_slice(&out.stdout).unwrap(), said)
}

/// Names in a folder that are hidden: what an unfinished output would be called.
fn hidden(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.starts_with('.')).collect()
}

/// The tensors of a safetensors file, changed and written again.
fn change(file: &Path, name: &str, values: impl Fn(usize) -> Option<f32>) {
    let bytes = std::fs::read(file).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let all: Vec<(String, Vec<usize>, Vec<u8>)> = read
        .tensors()
        .into_iter()
        .map(|(n, t)| {
            let mut data = t.data().to_vec();
            for (i, four) in data.chunks_exact_mut(4).enumerate().filter(|_| n == name) {
                if let Some(v) = values(i) {
                    four.copy_from_slice(&v.to_le_bytes());
                }
            }
            (n, t.shape().to_vec(), data)
        })
        .collect();
    let views = all.iter().map(|(n, s, b)| (n.clone(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, file).unwrap();
}

#[test]
fn numbers_that_are_not_finite_are_found_where_they_come_from() {
    let home = home();
    let good = std::fs::read(home.path().join("tiny/model.safetensors")).unwrap();
    let file = home.path().join("tiny/model.safetensors");
    let said = |tensor: &str, values: &dyn Fn(usize) -> Option<f32>| {
        std::fs::write(&file, &good).unwrap();
        change(&file, tensor, values);
        let out = lacuna(home.path(), &["eval", "tiny", "--ctx", "32", "--windows", "2", "--json"]).output().unwrap();
        assert!(out.status.code() == Some(1) && out.stdout.is_empty(), "{tensor}");
        String::from_utf8(out.stderr).unwrap()
    };
    let has = |said: String, parts: &[&str]| parts.iter().for_each(|p| assert!(said.contains(p), "no '{p}' in {said}"));
    // A weight that is none.
    let said_up = said("model.layers.1.mlp.up_proj.weight", &|i| (i == 7).then_some(f32::NAN));
    has(
        said_up,
        &["in layer 1, feed-forward part, what goes into layers.1.ffn.down", "layers.1.ffn.up holds 1 weights"],
    );
    // Weights that are finite and too large.
    let said_v = said("model.layers.0.self_attn.v_proj.weight", &|_| Some(3e38));
    has(said_v, &["in layer 0, attention, what goes into layers.0.attn.o", "grows too large"]);
    let said_o = said("model.layers.0.self_attn.o_proj.weight", &|i| (i == 0).then_some(f32::INFINITY));
    has(said_o, &["in layer 0, attention, what comes out of it", "layers.0.attn.o holds 1 weights"]);
    has(said("model.norm.weight", &|i| (i == 3).then_some(f32::NAN)), &["in the final norm: norm holds 1 weights"]);
    has(said("model.embed_tokens.weight", &|_| Some(f32::NAN)), &["in the embedding of token"]);
    // A row that no token of the text uses breaks the logits all the same: the head is the embedding.
    has(said("model.embed_tokens.weight", &|i| (i == 2).then_some(f32::NAN)), &["in the head, which is the embedding"]);
}

/// What is broken is not handed on, in whatever form; where the form keeps values as they are it says which tensor.
#[test]
fn a_model_with_what_is_no_number_is_not_converted() {
    let home = home();
    let file = home.path().join("tiny/model.safetensors");
    change(&file, "model.layers.1.mlp.up_proj.weight", |i| (i == 7).then_some(f32::NAN));
    for (to, kind, out) in [
        ("gguf", "source", "a.gguf"),
        ("gguf", "f16", "b.gguf"),
        ("gguf", "q8_0", "c.gguf"),
        ("hf", "source", "d"),
        ("hf", "bf16", "e"),
        ("compressed-tensors", "int4", "f"),
    ] {
        let mut args = vec!["convert", "tiny", "--to", to, "--type", kind, "-o", out];
        args.extend(if kind == "int4" { &["--group", "16"][..] } else { &[] });
        let run = lacuna(home.path(), &args).output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.code() == Some(1) && run.stdout.is_empty(), "{to} {kind}: {said}");
        let named = ["layers.1", "blk.1.ffn_up"].iter().any(|name| said.contains(name));
        assert!(named && !said.contains("panicked"), "{to} {kind}: {said}");
        assert!(!home.path().join(out).exists() && hidden(home.path()).is_empty(), "{to} {kind}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn output_that_cannot_be_written_is_an_error_and_not_a_panic() {
    let home = home();
    let full = || Stdio::from(std::fs::File::options().write(true).open("/dev/full").unwrap());
    let verbs: &[&[&str]] = &[
        &["inspect", "tiny"],
        &["methods"],
        &["pull", "list"],
        &["pull", "tiny"],
        &["eval", "tiny", "--windows", "1"],
        &["generate", "tiny", "-p", "The sea", "-n", "3"],
        &["bench", "tiny", "--prompt", "4", "--gen", "2", "--reps", "1"],
        &["compress", "tiny", "-r", "rtn", "-o", "out", "--gate", "off", "--overwrite"],
        &["convert", "tiny", "--to", "gguf", "-o", "out.gguf", "--overwrite", "--no-kl"],
        &["serve", "tiny", "--port", "0", "--kv-memory", "8MiB"],
        &["completions", "bash"],
        &["doctor"],
    ];
    for verb in verbs {
        for json in [&["--json"][..], &[]] {
            let mut command = lacuna(home.path(), &[verb, json].concat());
            let said = told(command.stdout(full()), 1);
            assert!(said.lines().any(|l| l.starts_with("error: standard output: No space left")), "{verb:?}: {said}");
        }
    }
    let mut chat = lacuna(home.path(), &["chat", "tiny", "-n", "3"]);
    let mut child = chat.stdin(Stdio::piped()).stdout(full()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"hello\n").unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) || said.contains("template"), "{said}");
    for flag in ["--help", "--version"] {
        let said = told(Command::new(env!("CARGO_BIN_EXE_lacuna")).arg(flag).stdout(full()), 1);
        assert!(said.starts_with("error: standard output: No space left"), "{said}");
    }
    // Words that nobody can hear end no work, and no failure is a panic.
    let status = |args: &[&str]| lacuna(home.path(), args).stderr(full()).output().unwrap().status.code();
    assert_eq!(status(&["eval", "tiny", "--windows", "1"]), Some(0));
    assert_eq!(status(&["eval", "nothing/here"]), Some(1));
    assert_eq!(status(&["frobnicate"]), Some(2));
}

#[test]
fn a_reader_that_goes_away_ends_every_verb_quietly() {
    let home = home();
    for verb in [&["methods"][..], &["inspect", "tiny"], &["generate", "tiny", "-p", "The sea", "-n", "30"]] {
        let mut command = lacuna(home.path(), verb);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let out = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success() && !said.contains("error") && !said.contains("panicked"), "{verb:?}: {said}");
    }
}

/// The signal of ctrl-c and the status it leaves; another one where whoever started the tests has it ignored (a shell's
/// `&` without job control), which the command inherits and heeds.
#[cfg(unix)]
fn ctrl_c() -> (&'static str, i32) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    if mask.is_some_and(|mask| mask >> 1 & 1 == 1) { ("TERM", 143) } else { ("INT", 130) }
}

/// Starts a command, waits until `begun` sees it at work, and sends it a signal.
#[cfg(unix)]
fn interrupted(mut command: Command, signal: &str, begun: impl Fn() -> bool) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    let send = |signal: &str| {
        assert!(
            Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap().success()
        );
    };
    while !begun() {
        assert!(start.elapsed() < Duration::from_secs(60), "the command never began to write");
        std::thread::sleep(Duration::from_micros(200));
    }
    // Held still, so that it cannot finish first.
    send("STOP");
    send(signal);
    send("CONT");
    while child.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(90) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

#[test]
#[cfg(unix)]
fn an_interrupted_conversion_leaves_nothing() {
    let home = large_home();
    let (int, interrupted_by) = ctrl_c();
    let cases: &[(&[&str], &str, &str, i32)] = &[
        (
            &["convert", "large", "--to", "gguf", "--type", "q4_k", "-o", "m.gguf"],
            ".m.gguf.partial",
            int,
            interrupted_by,
        ),
        (&["convert", "large", "--to", "hf", "--type", "f16", "-o", "m"], ".m.partial", "TERM", 143),
        (
            &["convert", "large", "--to", "compressed-tensors", "--type", "int4", "-o", "c"],
            ".c.partial",
            int,
            interrupted_by,
        ),
        (&["convert", "large", "--to", "gguf", "--type", "q8_0", "-o", "h.gguf"], ".h.gguf.partial", "HUP", 129),
    ];
    for (args, partial, signal, status) in cases {
        let seen = home.path().join(partial);
        let out = interrupted(lacuna(home.path(), args), signal, || seen.exists());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(*status), "{said}");
        assert!(
            said.contains(&format!("ended by SIG{signal}; {partial} was not finished and is taken away")),
            "{said}"
        );
        assert!(said.lines().count() == 1 && out.stdout.is_empty(), "{said}");
        assert_eq!(hidden(home.path()), Vec::<String>::new());
        assert!(!home.path().join(args.last().unwrap()).exists());
    }
    // A model that was there before stays whole.
    let args = ["convert", "large", "--to", "hf", "-o", "m", "--no-kl"];
    told(&mut lacuna(home.path(), &args), 0);
    let before = std::fs::read(home.path().join("m/model.safetensors")).unwrap();
    let partial = home.path().join(".m.partial");
    let (signal, status) = ctrl_c();
    let out = interrupted(lacuna(home.path(), &[&args[..], &["--overwrite"]].concat()), signal, || partial.exists());
    assert_eq!(out.status.code(), Some(status));
    assert_eq!(hidden(home.path()), Vec::<String>::new());
    assert!(std::fs::read(home.path().join("m/model.safetensors")).unwrap() == before);
}

#[test]
#[cfg(unix)]
fn an_interrupted_compression_says_how_to_go_on() {
    let home = large_home();
    let args = ["compress", "large", "-r", "rtn", "-o", "small", "--gate", "off"];
    let journal = home.path().join(".small.partial/journal");
    // Its first line is the run's identity; a second one says that a matrix is complete.
    let begun = || std::fs::read_to_string(&journal).is_ok_and(|lines| lines.lines().count() > 1);
    let out = interrupted(lacuna(home.path(), &args), "TERM", begun);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(143), "{said}");
    assert!(
        said.contains("ended by SIGTERM; what is complete is kept in .small.partial: the same command with --resume"),
        "{said}"
    );
    assert_eq!(hidden(home.path()), [".small.partial"]);
    told(&mut lacuna(home.path(), &[&args[..], &["--resume"]].concat()), 0);
    assert_eq!(hidden(home.path()), Vec::<String>::new());
    told(&mut lacuna(home.path(), &["inspect", "small"]), 0);
}

#[test]
#[cfg(unix)]
fn an_interrupted_pull_keeps_only_what_it_can_go_on_with() {
    use std::io::{Read, Write};
    let home = TempDir::new().unwrap();
    let hub = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let endpoint = format!("http://{}", hub.local_addr().unwrap());
    // A hub that lists a file, sends half of it and falls silent.
    let sha256 = "0123456789abcdef".repeat(4);
    let listing = json!({"sha": "0".repeat(40), "siblings": [
        {"rfilename": "m.gguf", "lfs": {"size": 2000, "sha256": sha256}}, {"rfilename": "plain.gguf", "size": 2000}]});
    std::thread::spawn(move || {
        for mut stream in hub.incoming().flatten() {
            let listing = listing.to_string();
            std::thread::spawn(move || {
                let (mut asked, mut buffer) = (String::new(), [0; 4096]);
                while !asked.contains("\r\n\r\n") {
                    let n = stream.read(&mut buffer).unwrap();
                    asked += std::str::from_utf8(&buffer[..n]).unwrap();
                }
                let (length, body) = match asked.contains("/api/") {
                    true => (listing.len(), listing.into_bytes()),
                    false => (2000, vec![7; 1000]),
                };
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
                std::thread::sleep(Duration::from_secs(60));
            });
        }
    });
    let models = home.path().join("cache/models");
    let half = || {
        let inside =
            std::fs::read_dir(&models).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir());
        let files: Vec<PathBuf> =
            inside.flat_map(|d| std::fs::read_dir(d).unwrap().map(|e| e.unwrap().path())).collect();
        files.into_iter().find(|f| std::fs::metadata(f).is_ok_and(|m| m.len() == 1000))
    };
    for (file, kept) in [("plain.gguf", false), ("m.gguf", true)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
        command.current_dir(home.path()).args(["pull", &format!("hf:org/repo:{file}"), "--cache-dir", "cache"]);
        command.env("HF_ENDPOINT", &endpoint).env("HF_HUB_CACHE", home.path().join("hub")).env("NO_PROXY", "*");
        let (signal, status) = ctrl_c();
        let out = interrupted(command, signal, || half().is_some());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(status), "{said}");
        let words = if kept {
            "is kept: the same command goes on from there"
        } else {
            "nothing of hf:org/repo:plain.gguf is kept"
        };
        assert!(said.contains(&format!("ended by SIG{signal}; ")) && said.contains(words), "{said}");
        assert_eq!(half().is_some(), kept);
        let folders = std::fs::read_dir(&models).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count();
        assert_eq!(folders, usize::from(kept));
    }
}

#[test]
#[cfg(unix)]
fn a_full_disk_leaves_nothing_and_is_named() {
    let home = large_home();
    // A file may not grow beyond 100 blocks here, which stands for a disk that is full.
    let limited = |args: &[&str]| {
        let mut c = Command::new("sh");
        c.current_dir(home.path()).args(["-c", "ulimit -f 100; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_lacuna")]);
        c.args(args).args(["--cache-dir", "cache", "--offline"]);
        c
    };
    let out = |name: &str| home.path().join(name).exists();
    for (args, name) in [
        (&["convert", "large", "--to", "gguf", "-o", "a.gguf"][..], "a.gguf"),
        (&["convert", "large", "--to", "hf", "-o", "b"], "b"),
        (&["convert", "large", "--to", "compressed-tensors", "--type", "int4", "-o", "c"], "c"),
    ] {
        let said = told(&mut limited(args), 1);
        assert!(said.contains("File too large") && said.contains(name), "{said}");
        assert!(hidden(home.path()).is_empty() && !out(name), "{args:?}: {said}");
    }
    // A configuration that counts more layers than there are is mended into a copy.
    let path = home.path().join("large/config.json");
    let mut broken: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let good = broken.clone();
    broken["num_hidden_layers"] = json!(7);
    std::fs::write(&path, broken.to_string()).unwrap();
    let said = told(&mut limited(&["repair", "large", "-o", "d"]), 1);
    assert!(said.contains("File too large") && hidden(home.path()).is_empty() && !out("d"), "{said}");
    std::fs::write(&path, good.to_string()).unwrap();
    // Compressing keeps what is complete; where nothing is, nothing stays.
    let said = told(&mut limited(&["compress", "large", "-r", "rtn", "-o", "e", "--gate", "off"]), 1);
    assert!(said.contains("File too large") && !said.contains("--resume"), "{said}");
    assert!(hidden(home.path()).is_empty() && !out("e"), "{said}");
    let report = told(&mut limited(&["compress", "large", "-r", "rtn", "-o", "no/where/e", "--gate", "off"]), 1);
    assert!(report.contains("where"), "{report}");
}

#[test]
fn defaults_fit_and_what_was_typed_must() {
    let home = home();
    let dir = home.path();
    let (eval, said) = object(dir, &["eval", "tiny", "--windows", "2"]);
    assert_eq!(eval["ctx"], 64);
    assert!(said.contains("note: 64 tokens in a window instead of 1024: the model sees no further"), "{said}");
    std::fs::write(dir.join("short.txt"), "The sea was calm and the sky was clear.").unwrap();
    let (eval, said) = object(dir, &["eval", "tiny", "--text", "short.txt"]);
    assert!(eval["windows"] == 1 && eval["ctx"].as_u64() < Some(64) && said.contains("the text has no more"), "{said}");
    assert!(told(&mut lacuna(dir, &["eval", "tiny", "--ctx", "65"]), 2).contains("give 2 to 64"));

    let (bench, said) = object(dir, &["bench", "tiny", "--reps", "1"]);
    assert_eq!((&bench["prompt"], &bench["gen"], &bench["depth"]), (&json!(64), &json!(63), &json!(0)));
    assert!(said.contains("64 prompt tokens instead of 512") && said.contains("63 steps instead of 128"), "{said}");
    let (bench, _) = object(dir, &["bench", "tiny", "--reps", "1", "--depth", "60"]);
    assert_eq!(bench["gen"], 4);
    assert!(told(&mut lacuna(dir, &["bench", "tiny", "--prompt", "65"]), 1).contains("64"));
    assert!(told(&mut lacuna(dir, &["bench", "tiny", "--depth", "64"]), 2).contains("less than 64"));

    let compress =
        |more: &[&'static str]| [&["compress", "tiny", "-r", "wanda", "--overwrite", "-o", "small"], more].concat();
    let (done, said) = object(dir, &compress(&["--gate", "size", "--windows", "2", "--accept"]));
    assert_eq!(done["calibration"]["seq_len"], 64);
    assert!(said.contains("64 tokens in a calibration sequence instead of 1024"), "{said}");
    assert!(said.contains("64 tokens in a window instead of 512"), "{said}");
    let (done, said) = object(dir, &compress(&["--gate", "off", "--seq-len", "32"]));
    assert!(done["calibration"]["seq_len"] == 32 && !said.contains("instead of 1024"), "{said}");
    assert!(
        told(&mut lacuna(dir, &compress(&["--gate", "off", "--seq-len", "100"])), 2)
            .contains("calibration.seq_len = 100")
    );
    std::fs::write(dir.join("mine.toml"), "version = 1\n[calibration]\nseq_len = 99\n[[step]]\nmethod = \"wanda\"\n")
        .unwrap();
    let mine = ["compress", "tiny", "-r", "mine.toml", "-o", "mine", "--gate", "off"];
    assert!(told(&mut lacuna(dir, &mine), 2).contains("calibration.seq_len = 99"));

    let convert =
        |more: &[&'static str]| [&["convert", "tiny", "--to", "hf", "--overwrite", "-o", "hf"], more].concat();
    let (done, said) = object(dir, &convert(&[]));
    assert!(done["kl_mean"].is_number() && said.contains("64 tokens in a window instead of 512"), "{done} {said}");
    assert!(told(&mut lacuna(dir, &convert(&["--ctx", "65"])), 2).contains("give 2 to 64"));
}

#[test]
fn models_are_known_by_their_bytes() {
    let home = home();
    let dir = home.path();
    let ok = |args: &[&str]| object(dir, args).0;
    told(&mut lacuna(dir, &["convert", "tiny", "--to", "gguf", "-o", "m.gguf", "--no-kl"]), 0);
    std::fs::rename(dir.join("m.gguf"), dir.join("blob")).unwrap();
    assert_eq!(ok(&["inspect", "blob"])["kind"], "Gguf");
    let eval = |model: &str| ok(&["eval", model, "--windows", "1", "--ctx", "32"])["ppl"].as_f64().unwrap();
    let ppl = eval("tiny");
    std::fs::rename(dir.join("tiny/model.safetensors"), dir.join("tiny/pytorch_model.bin")).unwrap();
    assert_eq!(eval("tiny"), ppl);
    assert_eq!(eval("tiny/pytorch_model.bin"), ppl);
    // A folder of a GGUF file beside the configuration it was made from, as many have on the hub.
    std::fs::create_dir(dir.join("both")).unwrap();
    std::fs::copy(dir.join("tiny/config.json"), dir.join("both/config.json")).unwrap();
    std::fs::copy(dir.join("blob"), dir.join("both/model-f16")).unwrap();
    assert_eq!(ok(&["inspect", "both"])["kind"], "Gguf");

    let not = |content: &[u8], words: &str| {
        for place in ["tiny/pytorch_model.bin", "tiny/model.safetensors", "tiny/config.json", "tiny/tokenizer.json"] {
            let path = dir.join(place);
            let had = std::fs::read(&path).ok();
            std::fs::write(&path, content).unwrap();
            let model = if place.ends_with("bin") { place } else { "tiny" };
            let said = told(&mut lacuna(dir, &["eval", model, "--windows", "1"]), 1);
            let name = place.rsplit('/').next().unwrap();
            assert!(said.contains(words) && said.contains(name), "{place}: {said}");
            match had {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
        }
    };
    not(b"version https://git-lfs.example/spec/v1\noid sha256:0123\nsize 5\n", "git-LFS pointer");
    not(b"<!doctype html>\n<html><body>Sign in</body></html>", "HTML page");
    not(b"PK\x03\x04\x14\0\x08\0archive/data.pkl", "zip archive");
    not(b"\x80\x02}q\0.", "pickle");
    not(b"", "empty file");
    std::fs::remove_file(dir.join("tiny/pytorch_model.bin")).unwrap();
    std::fs::write(dir.join("tiny/pytorch_model.bin"), b"PK\x03\x04\x14\0\x08\0archive/data.pkl").unwrap();
    let said = told(&mut lacuna(dir, &["eval", "tiny"]), 1);
    assert!(
        said.contains("pytorch_model.bin is a zip archive or a file of Python pickles") && said.contains("safetensors"),
        "{said}"
    );
    assert!(told(&mut lacuna(dir, &["eval", "tiny/config.json"]), 1).contains("give the directory it lies in"));
    assert!(
        told(&mut lacuna(dir, &["eval", "both", "--text", "tiny"]), 1)
            .contains("tiny: a directory, where a text file is expected")
    );
}

#[test]
fn json_is_read_as_python_reads_it() {
    let home = home();
    let dir = home.path();
    let path = dir.join("tiny/config.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let with = |more: &str| format!("\u{feff}{{{more}, {}", good.trim_start_matches('{'));
    let marked = |name: &&str| {
        let file = dir.join("tiny").join(name);
        let text = std::fs::read_to_string(&file).unwrap_or_else(|_| "{}".into());
        std::fs::write(file, format!("\u{feff}{text}")).unwrap();
    };
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
        .iter()
        .for_each(marked);
    std::fs::write(&path, with(r#""unread": NaN, "bounds": [-Infinity, 1e999]"#)).unwrap();
    let eval = ["eval", "tiny", "--windows", "1", "--ctx", "16"];
    told(&mut lacuna(dir, &eval), 0);
    let item = r#"{"id": NaN, "ctx": "one two", "choices": [" three", " four"], "label": 0}"#;
    std::fs::write(dir.join("items.jsonl"), format!("\u{feff}{item}\n{item}\n")).unwrap();
    told(&mut lacuna(dir, &["eval", "tiny", "--tasks", "items.jsonl"]), 0);
    // Mended, it is strict JSON, in which the newest transformers reads the same values.
    std::fs::write(&path, with(r#""unread": NaN"#).replace("\"num_hidden_layers\":2", "\"num_hidden_layers\":3"))
        .unwrap();
    told(&mut lacuna(dir, &["repair", "tiny", "-o", "mended"]), 0);
    let mended: Value = serde_json::from_slice(&std::fs::read(dir.join("mended/config.json")).unwrap()).unwrap();
    assert_eq!(mended["unread"], json!({"__float__": "NaN"}));
    for (key, value) in
        [("rope_theta", "NaN"), ("rms_norm_eps", "Infinity"), ("hidden_size", "-Infinity"), ("eos_token_id", "NaN")]
    {
        // Of a key that stands twice the last one counts, in Python as here.
        let text = format!("{}, \"{key}\": {value}}}", good.trim_end().trim_end_matches('}'));
        std::fs::write(&path, text).unwrap();
        let said = told(&mut lacuna(dir, &eval), 1);
        assert!(said.contains("config.json") && said.contains(key) && said.contains(value), "{said}");
    }
}

#[test]
fn what_people_paste_is_answered_with_what_to_type() {
    let home = home();
    let eval = |model: &str| told(&mut lacuna(home.path(), &["eval", model]), 1);
    assert!(eval("meta-llama/Llama-3.2-1B").contains("hf:meta-llama/Llama-3.2-1B\n"));
    assert!(eval("https://hub.example/org/name").contains("hf:org/name\n"));
    assert!(eval("https://hub.example/org/name/resolve/v1/q.gguf").contains("hf:org/name@v1:q.gguf\n"));
    let against = ["eval", "tiny", "--windows", "1", "--against", "org/name"];
    assert!(told(&mut lacuna(home.path(), &against), 1).contains("hf:org/name\n"));
}

#[test]
fn every_failure_is_said_once() {
    let home = home();
    let dir = home.path();
    std::fs::write(dir.join("bad.toml"), "version = ").unwrap();
    std::fs::write(dir.join("bad.jsonl"), "{\"id\": ").unwrap();
    std::fs::create_dir(dir.join("empty")).unwrap();
    std::fs::create_dir(dir.join("there")).unwrap();
    std::fs::write(dir.join("there/x"), "x").unwrap();
    let long = dir.join("x".repeat(250));
    let long = long.to_str().unwrap();
    let cases: &[&[&str]] = &[
        &["eval", "empty"],
        &["eval", "tiny", "--text", "nowhere.txt"],
        &["eval", "tiny", "--text", "empty"],
        &["eval", "tiny", "--tasks", "bad.jsonl"],
        &["eval", "tiny", "--tasks", "nowhere.jsonl"],
        &["eval", "tiny", "--against", "empty"],
        &["eval", "tiny", "--adapter", "empty"],
        &["inspect", "empty"],
        &["inspect", "/dev/null"],
        &["repair", "tiny", "-o", "x"],
        &["repair", "empty", "-o", "x"],
        &["generate", "empty", "-p", "x"],
        &["chat", "empty"],
        &["bench", "empty"],
        &["serve", "tiny", "--port", "0", "--api-key-file", "nowhere"],
        &["convert", "tiny", "--to", "hf", "-o", "there", "--overwrite"],
        &["convert", "tiny", "--to", "hf", "-o", long],
        &["convert", "tiny", "--to", "gguf", "-o", "nowhere/m.gguf"],
        &["convert", "tiny", "--to", "peft", "-o", "p"],
        &["compress", "tiny", "-o", "there", "--gate", "off"],
        &["compress", "tiny", "-r", "rtn", "-o", long, "--gate", "off"],
        &["compress", "tiny", "-r", "wanda", "-o", "y", "--gate", "off", "--calibration", "nowhere"],
        &["compress", "tiny", "-r", "rtn", "-o", "z", "--gate", "off", "--report", "nowhere/r.html"],
        &["quickstart", "empty"],
        &["pull", "rm", "nothing"],
        &["pull", "hf:org/repo"],
        &["pull", "pypi:some==1"],
        &["compress", "tiny", "-r", "bad.toml", "-o", "y"],
    ];
    for args in cases {
        let out = lacuna(dir, args).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(matches!(out.status.code(), Some(1 | 2)), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
        once(&said);
        assert_eq!(said.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{args:?}: {said}");
    }
}

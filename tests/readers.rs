//! Converted models in the programs that they are for: llama-cpp-python, transformers, compressed-tensors, peft.
//!
//! The programs live in a Python environment: `--python PATH` names one; otherwise `readers/` in the target directory
//! is taken if it is there. Where there is none every test is reported ignored, with the reason. `--require-readers`
//! makes the environment (pip installs `tests/readers/requirements.txt`, a gigabyte or two) and makes its absence a
//! failure.

mod support;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use lacuna_arch as arch;
use lacuna_base::Rng;
use lacuna_checkpoint::save::{
    GgufKind, PackQuantized, Rounding, save_compressed_tensors, save_gguf, save_hf, save_peft,
};
use lacuna_checkpoint::{PackedWriter, Tokenizer, open};
use lacuna_format::{Float, PatternKind, Stored, Term, Weights, pack_float};
use lacuna_kernels::Activations;
use lacuna_pull::{ModelRef, Options, pull};
use lacuna_spec::{Place, Role};
use libtest_mimic::{Arguments, Failed, Trial};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::{apart, compare, families, golden, greedy, ids, logits_of, logits_with, make};

type Tested<T> = Result<T, Box<dyn Error>>;

/// The real model.
const REAL: &str = "smollm2-135m-instruct";
/// Quantized files: how often both programs must agree on the likeliest token, and how far apart they may lie.
const AGREE: f64 = 0.97;
const KL: f64 = 0.01;
/// How llama.cpp is built, so that it multiplies prompts without rounding them: products in an order of its own would
/// go before BLAS.
const BLAS: &str = "-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS -DGGML_CPU_REPACK=OFF";
const QUANTIZED: [(&str, GgufKind); 4] =
    [("q8_0", GgufKind::Q8_0), ("q4_0", GgufKind::Q4_0), ("q4_k", GgufKind::Q4_K), ("q6_k", GgufKind::Q6_K)];

fn main() -> ExitCode {
    let mut given: Vec<String> = std::env::args().collect();
    let required = given.iter().position(|a| a == "--require-readers").map(|i| given.remove(i)).is_some();
    let python = given.iter().position(|a| a == "--python").filter(|i| i + 1 < given.len()).map(|i| {
        given.remove(i);
        given.remove(i)
    });
    let args = Arguments::from_iter(given);
    let found = match (args.list, python) {
        (true, _) => Err("not looked for".to_owned()),
        (false, Some(path)) => usable(Path::new(&path)),
        (false, None) => environment(required),
    };
    libtest_mimic::run(&args, trials(found, required)).exit_code()
}

/// Whether this Python has the packages.
fn usable(python: &Path) -> Result<PathBuf, String> {
    let check = "import llama_cpp, transformers, compressed_tensors, peft, torch";
    match Command::new(python).args(["-c", check]).output() {
        Ok(done) if done.status.success() => Ok(python.to_owned()),
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr);
            Err(format!("{}: {}", python.display(), said.lines().last().unwrap_or("it failed")))
        }
        Err(e) => Err(format!("{}: {e}", python.display())),
    }
}

/// The environment in the target directory; made if it must be.
fn environment(required: bool) -> Result<PathBuf, String> {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("readers");
    let python = home.join("bin/python");
    if python.is_file() {
        return usable(&python);
    }
    if !required {
        return Err("no Python environment with the readers; --require-readers makes one, --python names one".into());
    }
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/readers/requirements.txt");
    let steps = [
        Command::new("python3").args(["-m", "venv"]).arg(&home).output(),
        Command::new(&python).args(["-m", "pip", "install", "-q", "-r"]).arg(list).env("CMAKE_ARGS", BLAS).output(),
    ];
    for step in steps {
        let done = step.map_err(|e| format!("the environment: {e}"))?;
        if !done.status.success() {
            let _ = std::fs::remove_dir_all(&home);
            return Err(format!("the environment: {}", String::from_utf8_lossy(&done.stderr)));
        }
    }
    usable(&python)
}

fn trials(found: Result<PathBuf, String>, required: bool) -> Vec<Trial> {
    let tiny = families().into_iter().map(|f| f.0);
    let names: Vec<String> = tiny
        .clone()
        .map(|f| format!("llama_cpp::tiny::{f}"))
        // transformers 4 lacks the class.
        .chain(tiny.filter(|f| *f != "qwen3_5").map(|f| format!("transformers::tiny::{f}")))
        .chain(
            ["dense", "int4_group", "int8", "zero_points", "zero_points_kept"]
                .map(|n| format!("compressed_tensors::{n}")),
        )
        .chain(["peft::adapter".to_owned(), "llama_cpp::real::floats".to_owned(), "transformers::real".to_owned()])
        .chain(QUANTIZED.map(|q| format!("llama_cpp::real::{}", q.0)))
        .chain(["llama", "llama3", "llama_odd"].map(|f| format!("llama_cpp::own_rounding::{f}")))
        .collect();
    let python = match found {
        Ok(p) => Arc::new(p),
        Err(why) if required => {
            let failed = |name: String| {
                let why = why.clone();
                Trial::test(name, move || Err(Failed::from(why)))
            };
            return names.into_iter().map(failed).collect();
        }
        Err(why) => {
            let ignored = |n| Trial::test(n, || Ok(())).with_ignored_flag(true).with_kind(why.clone());
            return names.into_iter().map(ignored).collect();
        }
    };
    let real = real();
    let trial = |name: String| {
        let (python, real) = (Arc::clone(&python), real.clone());
        if let (Err(why), true, false) = (&real, name.contains("::real"), required) {
            return Trial::test(name, || Ok(())).with_ignored_flag(true).with_kind(why.clone());
        }
        let what = name.clone();
        Trial::test(name, move || run(&python, real, &what).map_err(|e| Failed::from(e.to_string())))
    };
    names.into_iter().map(trial).collect()
}

/// The real model's file: from the cache, or fetched.
fn real() -> Result<PathBuf, String> {
    let model = ModelRef::parse(REAL).map_err(|e| e.to_string())?;
    let cached = Options { offline: true, ..Options::default() };
    let found = pull(&model, &cached).or_else(|_| pull(&model, &Options::default()));
    found.map(|pulled| pulled.path).map_err(|e| e.to_string())
}

fn run(python: &Path, real: Result<PathBuf, String>, name: &str) -> Tested<()> {
    let home = tempfile::TempDir::new()?;
    let at = At { python, home: home.path() };
    match name.split("::").collect::<Vec<_>>()[..] {
        ["llama_cpp", "tiny", family] => at.llama_cpp_tiny(family),
        ["llama_cpp", "own_rounding", family] => at.own_rounding(family),
        ["transformers", "tiny", family] => at.transformers_tiny(family),
        ["compressed_tensors", case] => at.compressed_tensors(case),
        ["peft", ..] => at.peft(),
        ["llama_cpp", "real", "floats"] => at.llama_cpp_floats(&real?),
        ["llama_cpp", "real", kind] => at.llama_cpp_quantized(&real?, kind),
        ["transformers", "real"] => at.transformers_real(&real?),
        _ => Err(format!("{name} is no test").into()),
    }
}

struct At<'a> {
    python: &'a Path,
    home: &'a Path,
}

impl At<'_> {
    /// Runs a script; what it printed.
    fn script(&self, name: &str, args: &[&dyn AsRef<std::ffi::OsStr>]) -> Tested<Value> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/readers").join(name);
        let mut command = Command::new(self.python);
        command.arg(path).args(args.iter().map(|a| a.as_ref()));
        let done = command.output()?;
        if !done.status.success() {
            let said = String::from_utf8_lossy(&done.stderr);
            let tail: Vec<&str> = said.lines().rev().take(12).collect();
            return Err(format!("{name}: {}", tail.into_iter().rev().collect::<Vec<_>>().join("\n")).into());
        }
        let text = String::from_utf8(done.stdout)?;
        Ok(serde_json::from_str(text.lines().last().ok_or("it printed nothing")?)?)
    }

    fn ids_file(&self, ids: &[u32]) -> Tested<PathBuf> {
        let path = self.home.join("ids.json");
        std::fs::write(&path, json!(ids).to_string())?;
        Ok(path)
    }

    fn rows(&self, path: &Path, vocab: &Value) -> Tested<Vec<Vec<f32>>> {
        let bytes = std::fs::read(path)?;
        let mut all = vec![0.0; bytes.len() / 4];
        Float::F32.decode(&bytes, &mut all);
        Ok(all.chunks(vocab.as_u64().ok_or("no vocabulary")? as usize).map(<[f32]>::to_vec).collect())
    }

    /// What llama.cpp makes of a file: its logits of every position, and what it printed.
    fn llama_cpp(&self, file: &Path, ids: &[u32], n: usize) -> Tested<(Vec<Vec<f32>>, Value)> {
        let out = self.home.join("logits.f32");
        let said = self.script("llama_cpp_reader.py", &[&file, &self.ids_file(ids)?, &out, &n.to_string()])?;
        Ok((self.rows(&out, &said["vocab"])?, said))
    }

    fn transformers(&self, dir: &Path, ids: &[u32], adapter: Option<&Path>) -> Tested<(Vec<Vec<f32>>, Value)> {
        let (out, ids) = (self.home.join("logits.f32"), self.ids_file(ids)?);
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&dir, &ids, &out];
        if let Some(a) = &adapter {
            args.push(a);
        }
        let said = self.script("transformers_reader.py", &args)?;
        if said["wrong"] != json!({}) {
            return Err(format!("keys that transformers did not expect or missed: {}", said["wrong"]).into());
        }
        Ok((self.rows(&out, &said["vocab"])?, said))
    }

    fn tiny(&self, family: &str) -> Tested<PathBuf> {
        let config = families().into_iter().find(|f| f.0 == family).ok_or("no such family")?.1;
        let dir = self.home.join("model");
        make(&dir, &config);
        Ok(dir)
    }

    /// The ids that a converted file's tokenizer gives in another program are those of the source.
    fn same_tokens(&self, source: &Path, said: &Value) -> Tested<()> {
        let text = said["text"].as_str().ok_or("no text")?;
        let want = json!(Tokenizer::open(&open(source)?)?.encode(text, false)?);
        if said["tokens"] != want {
            return Err(format!("{text:?} is {} there, {want} here", said["tokens"]).into());
        }
        Ok(())
    }

    /// 32-bit and 16-bit files: the same 32 greedy tokens as here; 32 bits: nearly the same logits.
    fn floats(&self, source: &Path, prompt: &[u32]) -> Tested<()> {
        for (name, kind) in [("f32", GgufKind::F32), ("f16", GgufKind::F16)] {
            let file = self.home.join(format!("{name}.gguf"));
            save_gguf(&open(source)?, &file, kind, false, &mut |_, _| {})?;
            let (rows, said) = self.llama_cpp(&file, prompt, 32)?;
            let (kl, agree) = compare(&logits_of(&file, prompt), &rows);
            let (want, got) = (json!(greedy(&file, prompt, 32)), &said["greedy"]);
            println!("{name}: KL {kl:.2e}, top-1 {agree:.3}, greedy equal {}", *got == want);
            if *got != want {
                return Err(format!("{name}: greedy tokens are {got} there, {want} here (KL {kl:.2e})").into());
            }
            if kl > 1e-3 {
                return Err(format!("{name}: KL {kl}").into());
            }
            self.same_tokens(source, &said)?;
        }
        Ok(())
    }

    fn llama_cpp_tiny(&self, family: &str) -> Tested<()> {
        let dir = self.tiny(family)?;
        self.floats(&dir, &ids(24, 603))?;
        // Every quantized type loads, and both programs see much the same in it. Random logits are flat: only the
        // divergence is asked for. Of experts all are used: which of four random ones come first hangs on the last bits
        // of activations, which both programs round their own way.
        let dir = self.with_all_experts(&dir)?;
        for (name, kind) in QUANTIZED {
            let file = self.home.join(format!("{name}.gguf"));
            save_gguf(&open(&dir)?, &file, kind, false, &mut |_, _| {})?;
            let ids = ids(48, 603);
            let (kl, agree) = self.beside_llama_cpp(&file, &ids)?;
            println!("{family} {name}: KL {kl:.5}, top-1 {agree:.3}");
            if kl > KL {
                return Err(format!("{name}: KL(here || there) is {kl}").into());
            }
        }
        Ok(())
    }

    /// The model with every expert used by every token, if it has experts.
    fn with_all_experts(&self, dir: &Path) -> Tested<PathBuf> {
        let path = dir.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        if let Some(n) = config.get("num_local_experts").cloned() {
            config["num_experts_per_tok"] = n;
            std::fs::write(&path, config.to_string())?;
        }
        Ok(dir.to_owned())
    }

    /// KL(here || there) and agreement on one quantized file. llama.cpp rounds activations to 8 bits where weights are
    /// quantized; so does Lacuna here, as it does by default when it generates.
    fn beside_llama_cpp(&self, file: &Path, ids: &[u32]) -> Tested<(f64, f64)> {
        let (rows, _) = self.llama_cpp(file, ids, 0)?;
        let exact = compare(&logits_of(file, ids), &rows);
        println!("with exact activations: KL {:.5}, top-1 {:.4}", exact.0, exact.1);
        Ok(compare(&logits_with(&open(file)?, ids, Activations::Int8), &rows))
    }

    fn llama_cpp_floats(&self, real: &Path) -> Tested<()> {
        let prompt = Tokenizer::open(&open(real)?)?.encode("The history of the lighthouse begins with", false)?;
        self.floats(real, &prompt)
    }

    /// The same file in both programs, on text, and its values in 32 bits, which nothing rounds. A llama.cpp with BLAS
    /// multiplies prompts exactly: then so does Lacuna. Without, both round activations to 8 bits, each in its way, and
    /// what that alone changes is printed beside: how often llama.cpp agrees with itself, which on small models is less
    /// than is asked here.
    fn llama_cpp_quantized(&self, real: &Path, kind: &str) -> Tested<()> {
        let kind = QUANTIZED.into_iter().find(|q| q.0 == kind).ok_or("no such type")?.1;
        let (half, file, plain) = (self.home.join("half.gguf"), self.home.join("m.gguf"), self.home.join("plain.gguf"));
        save_gguf(&open(real)?, &half, GgufKind::F16, false, &mut |_, _| {})?;
        save_gguf(&open(&half)?, &file, kind, false, &mut |_, _| {})?;
        save_gguf(&open(&file)?, &plain, GgufKind::F32, false, &mut |_, _| {})?;
        let mut ids = Tokenizer::open(&open(real)?)?.encode(lacuna_eval::HELD_OUT, false)?;
        ids.truncate(512);
        let ((there, said), there_plain) = (self.llama_cpp(&file, &ids, 0)?, self.llama_cpp(&plain, &ids, 0)?.0);
        let exact = logits_of(&file, &ids);
        let same = compare(&exact, &there_plain);
        println!("values in 32 bits: KL {:.2e}, top-1 {:.4}", same.0, same.1);
        if same.0 > 1e-6 || same.1 < 0.99 {
            return Err(format!("the values differ: KL {}, the same first choice {}", same.0, same.1).into());
        }
        let blas = said["blas"] == true;
        let bytes = compare(&logits_with(&open(&file)?, &ids, Activations::Int8), &there);
        let (alone, itself) = (compare(&exact, &there), compare(&there_plain, &there).1);
        println!(
            "8-bit activations: KL {:.5}, top-1 {:.4}; exact ones: KL {:.5}, top-1 {:.4}; llama.cpp (BLAS: {blas}) \
             beside itself {itself:.4}",
            bytes.0, bytes.1, alone.0, alone.1
        );
        let (kl, agree) = if blas { alone } else { bytes };
        if kl > KL || agree < AGREE {
            let help = if blas {
                ""
            } else {
                "; this llama.cpp rounds activations: one built with BLAS shows the files alone"
            };
            return Err(format!("KL(here || there) is {kl}, the same first choice {agree}{help}").into());
        }
        Ok(())
    }

    /// Beside llama.cpp's own quantizer on the same file: each tensor of the same type, blocks of 32 of the same bytes,
    /// K types no worse.
    fn own_rounding(&self, family: &str) -> Tested<()> {
        let (dir, half) = (self.tiny(family)?, self.home.join("half.gguf"));
        save_gguf(&open(&dir)?, &half, GgufKind::F16, false, &mut |_, _| {})?;
        let exact = open(&half)?;
        for ((name, kind), number) in QUANTIZED.into_iter().zip(["7", "2", "15", "18"]) {
            let (ours, theirs) =
                (self.home.join(format!("{name}.gguf")), self.home.join(format!("{name}-theirs.gguf")));
            save_gguf(&exact, &ours, kind, false, &mut |_, _| {})?;
            self.script("llama_cpp_quantize.py", &[&half, &theirs, &number])?;
            let (a, b) = (open(&ours)?, open(&theirs)?);
            let types = |c: &lacuna_checkpoint::Checkpoint| -> std::collections::BTreeMap<String, String> {
                c.tensors().map(|t| (t.name.clone(), t.dtype.name())).collect()
            };
            let (x, y) = (types(&a), types(&b));
            if let Some((tensor, was)) = x.iter().find(|(n, t)| y.get(*n) != Some(t)) {
                return Err(format!("{name}: {tensor} is {was} here, {:?} there", y.get(tensor)).into());
            }
            let (mut error, mut other) = (0.0, 0.0);
            for place in exact.spec().places() {
                let get =
                    |c: &lacuna_checkpoint::Checkpoint| -> Tested<Arc<Stored>> { Ok(c.get(&place)?.ok_or("missing")?) };
                let (was, mine, its) = (get(&exact)?, get(&a)?, get(&b)?);
                let blocks_of_32 = ["q4_0", "q5_0", "q8_0"].contains(&mine.codec_name().as_str());
                if blocks_of_32 && mine != its {
                    return Err(format!("{name}: {place} ({}) has other bytes there", mine.codec_name()).into());
                }
                let square = |s: &Stored| -> f64 {
                    s.to_mat().data().iter().zip(was.to_mat().data()).map(|(x, y)| f64::from(x - y).powi(2)).sum()
                };
                if !blocks_of_32 {
                    error += square(&mine);
                    other += square(&its);
                }
            }
            println!("{family} {name}: squared error of K types {error:.4} here, {other:.4} there");
            if error > 1.02 * other {
                return Err(format!("{name}: squared error {error} here, {other} there").into());
            }
        }
        Ok(())
    }

    fn transformers_tiny(&self, family: &str) -> Tested<()> {
        let dir = self.tiny(family)?;
        // By way of GGUF, so that the rows of q and k, the norms and the tokenizer have been turned twice.
        let (file, back) = (self.home.join("m.gguf"), self.home.join("back"));
        save_gguf(&open(&dir)?, &file, GgufKind::F32, false, &mut |_, _| {})?;
        save_hf(&open(&file)?, &back, Some(Float::F32), false, &mut |_, _| {})?;
        let ids = ids(32, 603);
        let (rows, said) = self.transformers(&back, &ids, None)?;
        let off = apart(&rows, &logits_of(&back, &ids));
        if off > 2e-3 {
            return Err(format!("logits lie {off} apart").into());
        }
        self.same_tokens(&dir, &said)
    }

    fn transformers_real(&self, real: &Path) -> Tested<()> {
        let out = self.home.join("hf");
        save_hf(&open(real)?, &out, Some(Float::F32), false, &mut |_, _| {})?;
        let ids = Tokenizer::open(&open(real)?)?.encode("The history of the lighthouse begins with a fire.", false)?;
        let (rows, said) = self.transformers(&out, &ids, None)?;
        let off = apart(&rows, &logits_of(real, &ids));
        println!("logits lie {off} apart");
        if off > 1e-2 {
            return Err(format!("logits lie {off} apart").into());
        }
        self.same_tokens(real, &said)?;
        // The hard page, too.
        let page: Value = serde_json::from_slice(&std::fs::read(golden(&format!("tokenizers/{REAL}.json")))?)?;
        let texts: Vec<&str> =
            page["cases"].as_array().ok_or("no cases")?.iter().filter_map(|c| c["text"].as_str()).collect();
        let tokenizer = Tokenizer::from_dir(&out)?;
        for (i, text) in texts.iter().enumerate() {
            if json!(tokenizer.encode(text, false)?) != page["cases"][i]["ids"] {
                return Err(format!("{text:?} has other ids in the tokenizer.json that was made").into());
            }
        }
        Ok(())
    }

    fn compressed_tensors(&self, case: &str) -> Tested<()> {
        let dir = self.tiny("llama")?;
        let (source, out) = (self.home.join("source"), self.home.join("ct"));
        let (source, rounding) = match case {
            "dense" => (dir, Some(Rounding { bits: 4, group: 128 })),
            "int8" => (dir, Some(Rounding { bits: 8, group: 64 })),
            "int4_group" => {
                let file = self.home.join("m.gguf");
                save_gguf(&open(&dir)?, &file, GgufKind::Q4_0, false, &mut |_, _| {})?;
                (file, None)
            }
            _ => {
                packed(&dir, &source, zero_points)?;
                (source, None)
            }
        };
        let how = PackQuantized { rounding, zero_points: case == "zero_points_kept" };
        save_compressed_tensors(&open(&source)?, &out, how, false, &mut |_, _| {})?;
        let decompressed = self.home.join("decompressed.safetensors");
        let said = self.script("compressed_tensors_reader.py", &[&out, &decompressed])?;
        if said["modules"] != 21 {
            return Err(format!("{} modules, not 21", said["modules"]).into());
        }
        if said["other"] != json!([]) {
            return Err(format!("the package writes otherwise: {}", said["other"]).into());
        }
        let bytes = std::fs::read(&decompressed)?;
        let file = SafeTensors::deserialize(&bytes)?;
        // The dense model of the same values, in the arrangement of the layout.
        let dense = self.home.join("dense");
        save_hf(&open(&source)?, &dense, Some(Float::F32), false, &mut |_, _| {})?;
        let want = open(&dense)?;
        let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json"))?)?;
        let natural = config["dtype"].clone();
        let (mut seen, mut exact) = (0, true);
        for t in arch::hf_targets(want.spec())? {
            let Ok(tensor) = file.tensor(t.name.trim_end_matches(".weight")) else { continue };
            let mut have = vec![0.0; tensor.data().len() / 4];
            Float::F32.decode(tensor.data(), &mut have);
            let was = want.get(&t.parts[0])?.ok_or("a missing tensor")?.to_mat();
            let step = was.data().iter().fold(0.0f32, |a, b| a.max(b.abs())) / if case == "int8" { 100.0 } else { 7.0 };
            // A model of f16 is multiplied out in f16.
            let half = natural == json!("float16");
            for (a, b) in have.iter().zip(was.data()) {
                exact &= *a == if half { lacuna_base::float::round_f16(*b) } else { *b };
                if (a - b).abs() > step {
                    return Err(format!("{}: {a} there, {b} here", t.name).into());
                }
            }
            seen += 1;
        }
        if seen != 21 || (rounding.is_none() && !exact) {
            return Err(format!("{seen} matrices, the same values: {exact}").into());
        }
        // And as a whole in transformers, which asks the same package; but not with zero points: it loads none, not
        // even those that the package itself wrote (4.57 deletes packed ones, 5.23 has no room for them), which is why
        // `convert` writes them only when told to.
        if how.zero_points {
            return Ok(());
        }
        let ids = ids(24, 603);
        let (rows, _) = self.transformers(&out, &ids, None)?;
        let off = compare(&logits_of(&source, &ids), &rows).0;
        println!("{case}: KL in transformers {off:.5}");
        if rounding.is_none() && off > 1e-3 {
            return Err(format!("in transformers the divergence is {off}").into());
        }
        Ok(())
    }

    fn peft(&self) -> Tested<()> {
        let dir = self.tiny("llama")?;
        let (source, out) = (self.home.join("source"), self.home.join("peft"));
        packed(&dir, &source, low_rank)?;
        save_peft(&open(&source)?, &out, Some(Float::F32), false, &mut |_, _| {})?;
        let ids = ids(24, 603);
        let (rows, _) = self.transformers(&out.join("base"), &ids, Some(&out))?;
        let off = apart(&rows, &logits_of(&source, &ids));
        if off > 2e-3 {
            return Err(format!("logits lie {off} apart").into());
        }
        Ok(())
    }
}

/// A packed model whose matrices `form` makes.
fn packed(dir: &Path, out: &Path, form: fn(&Place, &Stored) -> Stored) -> Tested<()> {
    let source = open(dir)?;
    let mut w = PackedWriter::create(out, false)?;
    for place in source.spec().places() {
        let stored = source.get(&place)?.ok_or("a missing tensor")?;
        w.put(&place, &form(&place, &stored))?;
    }
    w.finish(source.spec().clone(), json!({}), json!({}), Vec::new(), Some(&source))?;
    Ok(())
}

/// A low-rank term of rank 4 beside v of each layer, one of rank 7 beside one down.
fn low_rank(p: &Place, s: &Stored) -> Stored {
    let rank = match (p.role, p.layer) {
        (Role::V, _) => 4,
        (Role::Down, Some(2)) => 7,
        _ => return s.clone(),
    };
    let mut rng = Rng::new(rank as u64);
    let mut piece = |rows: usize, cols: usize| {
        let m = lacuna_base::Mat::from_fn(rows, cols, |_, _| 0.1 * rng.normal());
        pack_float(m.view(), None, PatternKind::Dense, Float::F16).expect("finite numbers")
    };
    let mut out = s.clone();
    out.terms.push(Term::Product(piece(s.rows, rank), piece(rank, s.cols)));
    out
}

/// Rounded between the extremes of each 64 columns, with a zero point.
fn zero_points(p: &Place, s: &Stored) -> Stored {
    use lacuna_format::{Affine, Group, Integers, ScaleCodec, pack_integers};
    if p.layer.is_none() || !p.role.is_linear() {
        return s.clone();
    }
    let (m, groups) = (s.to_mat(), s.cols / 64);
    let (mut codes, mut zeros) = (Vec::new(), Vec::new());
    let mut scales = lacuna_base::Mat::zeros(s.rows, groups);
    for r in 0..s.rows {
        for (g, run) in m.row(r).chunks(64).enumerate() {
            let (low, high) = run.iter().fold((0.0f32, 0.0f32), |a, x| (a.0.min(*x), a.1.max(*x)));
            let scale = lacuna_base::float::round_f16((high - low) / 15.0);
            let grid = Affine { scale, zero: (-low / scale).round().clamp(0.0, 15.0) as u8 };
            scales[(r, g)] = scale;
            zeros.push(grid.zero);
            codes.extend(run.iter().map(|x| grid.code(*x, 4)));
        }
    }
    let q = Integers {
        rows: s.rows,
        cols: s.cols,
        bits: 4,
        codes,
        scales,
        zeros: Some(zeros),
        offsets: None,
        group: Group::Run(64),
    };
    Stored::from_piece(pack_integers(&q, None, PatternKind::Dense, ScaleCodec::F16).expect("codes of 4 bits"))
}

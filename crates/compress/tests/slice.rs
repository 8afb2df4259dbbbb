//! Slicing the residual stream, with one basis and with a basis a layer, against a slow f64 network with projections
//! written out.

use std::path::{Path, PathBuf};

use lacuna_base::Rng;
use lacuna_checkpoint::save::{GgufKind, PackQuantized, save_compressed_tensors, save_gguf, save_hf, save_peft};
use lacuna_checkpoint::{Checkpoint, open};
use lacuna_compress::{CompressError, Options, Outcomes, Quiet, Recipe, compress};
use lacuna_format::{Float, Weights};
use lacuna_model::{Batch, ContiguousKv, Decoder, LoadOptions, ModelError, NoTap, Shown, Tap};
use lacuna_spec::{Place, Role, Spec};
use serde_json::{Value, json};

/// Tokens of the one calibration text: more than the stream is wide.
const TOKENS: usize = 80;
/// Of the largest logit. Folded weights are stored as f16, which keeps 11 bits of each.
const TOLERANCE: f64 = 4e-3;

fn tiny(name: &str) -> Checkpoint {
    open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)).unwrap()
}

fn text(vocab: usize) -> Vec<u32> {
    let mut rng = Rng::new(5);
    (0..TOKENS).map(|_| rng.below(vocab) as u32).collect()
}

fn run(model: &Checkpoint, keys: &str, out: &Path) -> Result<Outcomes, CompressError> {
    let text_of = format!("version = 1\nrest = \"source\"\n[[step]]\nmethod = \"slicegpt\"\nalign = 4\n{keys}\n");
    let sets = ["calibration.samples=1".to_owned(), format!("calibration.seq_len={TOKENS}")];
    let recipe = Recipe::parse(&text_of, &lacuna_methods::registry(), &sets).unwrap();
    let source = json!("tiny");
    let options = Options {
        out,
        overwrite: false,
        resume: false,
        scratch: None,
        max_ram: None,
        bos: None,
        imatrix: None,
        source,
    };
    compress(model, &text(model.spec().vocab), &recipe, &options, &mut Quiet)
}

/// Which two experts each row went to, router by router.
#[derive(Default)]
struct Chosen(Vec<Vec<Vec<usize>>>);

impl Tap for Chosen {
    fn output(&mut self, place: &Place, y: Shown<'_>) -> Result<(), ModelError> {
        if place.role == Role::Router {
            let y = y.download()?;
            let y = y.view();
            let two = |r: usize| {
                let mut order: Vec<usize> = (0..y.cols()).collect();
                order.sort_by(|&a, &b| y.at(r, b).total_cmp(&y.at(r, a)));
                order.truncate(2);
                order.sort_unstable();
                order
            };
            self.0.push((0..y.rows()).map(two).collect());
        }
        Ok(())
    }
}

/// The experts of each of the same 24 tokens, in all layers.
fn experts(model: &Checkpoint) -> Vec<Vec<Vec<usize>>> {
    let decoder = Decoder::load(model, &LoadOptions::default()).unwrap();
    let ids = asked(model.spec().vocab);
    let (mut kv, mut chosen) = (ContiguousKv::new(model.spec(), 1), Chosen::default());
    decoder.forward(&ids, &Batch::one(0, 0..ids.len()), &mut kv, &mut chosen).unwrap();
    (0..ids.len()).map(|r| chosen.0.iter().map(|rows| rows[r].clone()).collect()).collect()
}

/// Logits of 24 tokens.
fn logits(model: &Checkpoint) -> Vec<f64> {
    let decoder = Decoder::load(model, &LoadOptions::default()).unwrap();
    let ids = asked(model.spec().vocab);
    let mut kv = ContiguousKv::new(model.spec(), 1);
    let hidden = decoder.forward(&ids, &Batch::one(0, 0..ids.len()), &mut kv, &mut NoTap).unwrap();
    decoder.logits(hidden.view()).data().iter().map(|&x| f64::from(x)).collect()
}

fn asked(vocab: usize) -> Vec<u32> {
    (0..24).map(|i| i * 7 % vocab as u32).collect()
}

/// The largest difference, of the largest value.
fn off(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let most = a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f64, |m, (x, y)| m.max((x - y).abs())) / most
}

fn architectures() -> Vec<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny");
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().to_string_lossy().into_owned()).collect();
    // Networks with recurrent mixers keep their structure: such steps refuse them by name.
    names.retain(|name| tiny(name).spec().first_mixer().is_none());
    names.sort();
    names
}

/// With every axis kept the stream is turned at each reader and nothing is lost: the logits are those of the source but
/// for the rounding of the folded weights to f16. Architectures whose norms do not commute are refused by name.
#[test]
fn turned_and_not_cut_every_model_says_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (mut same, mut refused) = (0, Vec::new());
    for name in architectures() {
        let source = tiny(&name);
        for basis in ["one", "layer"] {
            let out = dir.path().join(format!("{name}-{basis}"));
            match run(&source, &format!("keep = 1.0\nbasis = \"{basis}\""), &out) {
                Ok(done) => {
                    let packed = open(&done.path).unwrap();
                    let spec = packed.spec();
                    assert_eq!((spec.hidden, spec.norm), (source.spec().hidden, source.spec().norm));
                    assert_eq!(spec.first_shortcut().is_some(), basis == "layer", "{name}");
                    // A row on the edge between two experts may go to the other one, and says another thing then.
                    let (before, after) = (experts(&source), experts(&packed));
                    let stays: Vec<bool> = before.iter().zip(&after).map(|(a, b)| a == b).collect();
                    let gone = stays.iter().filter(|stays| !**stays).count();
                    assert!(gone <= 1, "{name}, {basis}: {gone} rows of {} change their experts", stays.len());
                    let of = |logits: Vec<f64>| -> Vec<f64> {
                        let rows = logits.chunks(spec.vocab).zip(&stays).filter(|(_, stays)| **stays);
                        rows.flat_map(|(row, _)| row.to_vec()).collect()
                    };
                    let worst = off(&of(logits(&source)), &of(logits(&packed)));
                    assert!(worst < TOLERANCE, "{name}, {basis}: {worst}");
                    if basis == "layer" {
                        assert!(spec.layers.iter().all(|l| l.attn_shortcut && l.ffn_shortcut));
                        turns(&packed, &name);
                        same += 1;
                    }
                }
                Err(e) => {
                    let said = e.to_string();
                    let turns = said.contains(&source.spec().arch) && said.contains("cannot be turned");
                    assert!(turns || said.contains("such networks keep their structure"), "{said}");
                    refused.push(name.clone());
                }
            }
        }
    }
    assert!(same >= 16, "{same}");
    for post in ["gemma2", "gemma3", "gpt2", "opt"] {
        assert_eq!(refused.iter().filter(|n| *n == post).count(), 2, "{post}: {refused:?}");
    }
}

/// The shortcuts are real rotations: orthogonal, and far from the identity.
fn turns(packed: &Checkpoint, name: &str) {
    for place in packed.spec().places().into_iter().filter(|p| p.role.is_shortcut()) {
        let s = packed.get(&place).unwrap().unwrap().to_mat();
        let n = s.rows();
        let dot = |a: usize, b: usize| (0..n).map(|c| f64::from(s[(a, c)]) * f64::from(s[(b, c)])).sum::<f64>();
        for (a, b) in (0..n).flat_map(|a| (0..=a).map(move |b| (a, b))) {
            assert!((dot(a, b) - f64::from(u8::from(a == b))).abs() < 4e-3, "{name}, {place}: rows {a} and {b}");
        }
        let trace: f64 = (0..n).map(|i| f64::from(s[(i, i)].abs())).sum();
        assert!(trace < 0.9 * n as f64, "{name}, {place}: hardly turned");
    }
}

/// Rows of numbers.
type Rows = Vec<Vec<f64>>;

/// Eigenvectors of a symmetric matrix by Jacobi's rotations, those of the largest eigenvalues first.
fn principal(mut a: Rows) -> Rows {
    let n = a.len();
    let mut v: Rows = (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..60 {
        for p in 0..n {
            for q in p + 1..n {
                if a[p][q].abs() < 1e-300 {
                    continue;
                }
                let t = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
                let t = t.signum() / (t.abs() + (t * t + 1.0).sqrt());
                let (c, s) = (1.0 / (t * t + 1.0).sqrt(), t / (t * t + 1.0).sqrt());
                for row in &mut a {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
                let (above, below) = a.split_at_mut(q);
                for (x, y) in above[p].iter_mut().zip(&mut below[0]) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
                for row in &mut v {
                    (row[p], row[q]) = (c * row[p] - s * row[q], s * row[p] + c * row[q]);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| a[j][j].total_cmp(&a[i][i]));
    order.iter().map(|&k| (0..n).map(|r| v[r][k]).collect()).collect()
}

/// A llama in f64, in the axes of the source throughout.
struct Slow<'a> {
    source: &'a Checkpoint,
    spec: &'a Spec,
}

impl Slow<'_> {
    fn w(&self, place: Place) -> Rows {
        let m = self.source.get(&place).unwrap().unwrap().to_mat();
        (0..m.rows()).map(|r| m.row(r).iter().map(|&x| f64::from(x)).collect()).collect()
    }

    fn linear(&self, place: Place, x: &Rows) -> Rows {
        let w = self.w(place);
        let bias = self.spec.shape(&place.bias()).map(|_| self.w(place.bias()).remove(0));
        let out = |x: &Vec<f64>| -> Vec<f64> {
            let one = |(o, w): (usize, &Vec<f64>)| {
                w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias.as_ref().map_or(0.0, |b| b[o])
            };
            w.iter().enumerate().map(one).collect()
        };
        x.iter().map(out).collect()
    }

    /// Rows over their root mean square, without a scale.
    fn bare(&self, x: &Rows) -> Rows {
        let one = |x: &Vec<f64>| -> Vec<f64> {
            let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
            x.iter().map(|v| v / (mean + f64::from(self.spec.norm.eps)).sqrt()).collect()
        };
        x.iter().map(one).collect()
    }

    fn norm(&self, place: Place, x: &Rows) -> Rows {
        let scale = self.w(place).remove(0);
        self.bare(x).into_iter().map(|x| x.iter().zip(&scale).map(|(x, s)| x * s).collect()).collect()
    }

    fn attention(&self, l: usize, x: &Rows) -> Rows {
        let a = self.spec.layers[l].attn.as_ref().unwrap();
        let h = self.norm(Place::layer(l, Role::AttnNorm), x);
        let [mut q, mut k, v] = [Role::Q, Role::K, Role::V].map(|role| self.linear(Place::layer(l, role), &h));
        let (dim, theta) = (a.head_dim, f64::from(a.rope.as_ref().unwrap().theta));
        for row in [&mut q, &mut k] {
            for (p, row) in row.iter_mut().enumerate() {
                for head in row.chunks_mut(dim) {
                    for i in 0..dim / 2 {
                        let angle = p as f64 * theta.powf(-2.0 * i as f64 / dim as f64);
                        let (s, c) = angle.sin_cos();
                        (head[i], head[i + dim / 2]) =
                            (c * head[i] - s * head[i + dim / 2], c * head[i + dim / 2] + s * head[i]);
                    }
                }
            }
        }
        let mut mixed = vec![vec![0.0; a.heads * dim]; x.len()];
        for (t, row) in mixed.iter_mut().enumerate() {
            for (head, out) in row.chunks_mut(dim).enumerate() {
                let of = head / (a.heads / a.kv_heads) * dim;
                let score = |j: usize| {
                    let s: f64 = (0..dim).map(|c| q[t][head * dim + c] * k[j][of + c]).sum();
                    (s / (dim as f64).sqrt()).exp()
                };
                let all: f64 = (0..=t).map(score).sum();
                (0..=t).for_each(|j| (0..dim).for_each(|c| out[c] += score(j) / all * v[j][of + c]));
            }
        }
        self.linear(Place::layer(l, Role::O), &mixed)
    }

    fn ffn(&self, l: usize, x: &Rows) -> Rows {
        let h = self.norm(Place::layer(l, Role::FfnNorm), x);
        let [mut g, up] = [Role::Gate, Role::Up].map(|role| self.linear(Place::layer(l, role), &h));
        for (g, u) in g.iter_mut().flatten().zip(up.iter().flatten()) {
            *g = *g / (1.0 + (-*g).exp()) * u;
        }
        self.linear(Place::layer(l, Role::Down), &g)
    }

    /// Logits of `ids`, with what `before` makes of the stream before its reader of each number.
    fn logits(&self, ids: &[u32], before: &mut dyn FnMut(usize, Rows) -> Rows) -> Vec<f64> {
        let embed = self.w(Place::global(Role::Embed));
        let mut x: Rows = ids.iter().map(|&t| embed[t as usize].clone()).collect();
        let add = |x: &mut Rows, y: Rows| x.iter_mut().flatten().zip(y.iter().flatten()).for_each(|(x, y)| *x += y);
        for l in 0..self.spec.layers.len() {
            x = before(2 * l, x);
            let y = self.attention(l, &x);
            add(&mut x, y);
            x = before(2 * l + 1, x);
            let y = self.ffn(l, &x);
            add(&mut x, y);
        }
        x = before(2 * self.spec.layers.len(), x);
        let head = Place::global(if self.spec.tied { Role::Embed } else { Role::Head });
        self.linear(head, &self.norm(Place::global(Role::FinalNorm), &x)).concat()
    }
}

/// Rows onto the span of orthonormal `axes`.
fn onto(axes: &[Vec<f64>], x: Rows) -> Rows {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let one = |x: Vec<f64>| {
        let mut out = vec![0.0; x.len()];
        for axis in axes {
            let along = dot(axis, &x);
            out.iter_mut().zip(axis).for_each(|(o, a)| *o += along * a);
        }
        out
    };
    x.into_iter().map(one).collect()
}

/// From the definition: the source with the stream projected, before each reader, onto its principal axes there, once
/// the projections before are in force.
#[test]
fn a_basis_a_layer_is_a_projection_before_each_reader() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "llama_bias", "qwen2"] {
        let source = tiny(name);
        let slow = Slow { source: &source, spec: source.spec() };
        let (vocab, ids) = (source.spec().vocab, asked(source.spec().vocab));
        let worst = off(&slow.logits(&ids, &mut |_, x| x), &logits(&source));
        assert!(worst < 1e-5, "{name}: the slow network is another: {worst}");
        for keep in [0.5, 0.75] {
            let width = (keep * source.spec().hidden as f64) as usize;
            let mut axes: Vec<Rows> = Vec::new();
            slow.logits(&text(vocab), &mut |reader, x| {
                assert_eq!(axes.len(), reader);
                let h = x.clone();
                let gram = |i: usize, j: usize| h.iter().map(|h| h[i] * h[j]).sum::<f64>();
                let n = h[0].len();
                let mut all = principal((0..n).map(|i| (0..n).map(|j| gram(i, j)).collect()).collect());
                all.truncate(width);
                let x = onto(&all, x);
                axes.push(all);
                x
            });
            let want = slow.logits(&ids, &mut |reader, x| onto(&axes[reader], x));
            let out = dir.path().join(format!("{name}-{keep}"));
            let done = run(&source, &format!("keep = {keep:?}\nbasis = \"layer\""), &out).unwrap();
            let packed = open(&done.path).unwrap();
            assert_eq!((packed.spec().hidden, packed.spec().norm.divisor), (width, Some(source.spec().hidden)));
            let worst = off(&want, &logits(&packed));
            assert!(worst < TOLERANCE, "{name} at {keep}: {worst}");
            // The tolerance tells them apart: from the source, and from one basis for all.
            let dense = off(&want, &logits(&source));
            let one = dir.path().join(format!("{name}-{keep}-one"));
            let one = run(&source, &format!("keep = {keep:?}\nbasis = \"one\""), &one).unwrap();
            let plain = off(&want, &logits(&open(one.path).unwrap()));
            assert!(dense > 10.0 * TOLERANCE && plain > 10.0 * TOLERANCE, "{name} at {keep}: {dense} {plain}");
        }
    }
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// What a basis a layer costs is counted and told, and no other program's file can hold it.
#[test]
fn shortcuts_are_counted_and_stay_in_the_packed_format() {
    let dir = tempfile::tempdir().unwrap();
    let source = tied(dir.path());
    let done = run(&source, "keep = 0.5\nbasis = \"layer\"", &dir.path().join("m")).unwrap();
    let packed = open(&done.path).unwrap();
    let spec = packed.spec();
    let (layers, d) = (spec.layers.len(), spec.hidden);
    assert!(source.spec().tied && !spec.tied);
    let bytes = |role: fn(Role) -> bool| -> u64 {
        done.tensors.iter().filter(|t| role(t.place.role)).map(|t| t.bytes_after).sum()
    };
    assert_eq!(bytes(Role::is_shortcut), (2 * layers * d * d * 2) as u64);
    assert_eq!(bytes(|r| r == Role::Head), (2 * spec.vocab * d) as u64);
    assert_eq!(done.bytes, spec.places().iter().map(|p| packed.get(p).unwrap().unwrap().bytes()).sum::<u64>());
    let note = done.notes.iter().find(|n| n.contains("in shortcuts take")).expect("told");
    assert!(note.contains("untied from the embedding and takes"), "{note}");
    assert_eq!(config(&done.path)["version"], 3);

    let out = dir.path().join("out");
    let mut quiet = |_: usize, _: usize| {};
    let refusals = [
        save_hf(&packed, &out, None, false, &mut quiet).map(|s| s.path),
        save_gguf(&packed, &out, GgufKind::F16, false, &mut quiet).map(|s| s.path),
        save_compressed_tensors(&packed, &out, PackQuantized::default(), false, &mut quiet).map(|s| s.path),
        save_peft(&packed, &out, None, false, &mut quiet).map(|s| s.path),
    ];
    for said in refusals {
        let said = said.expect_err("refused").to_string();
        assert!(said.contains("layers.0.attn.shortcut") && said.contains("packed format only"), "{said}");
        assert!(!out.exists());
    }
    // Neither turned a second time nor compared across its shortcuts.
    for (keys, word) in [("keep = 0.5", "layer by layer before"), ("basis = \"layer\"", "layer by layer before")] {
        let said = run(&packed, keys, &dir.path().join("again")).err().expect("refused").to_string();
        assert!(said.contains(word), "{said}");
    }
    let drop = "version = 1\n[[step]]\nmethod = \"llm-drop\"\ncount = 1\n";
    let recipe = Recipe::parse(drop, &lacuna_methods::registry(), &[]).unwrap();
    let said = recipe.check(packed.spec()).expect_err("refused").what;
    assert!(said.contains("turns the residual stream"), "{said}");
}

/// The tiny llama with its head tied.
fn tied(dir: &Path) -> Checkpoint {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama");
    let to: PathBuf = dir.join("tied");
    std::fs::create_dir(&to).unwrap();
    let mut config = config(&from);
    config["tie_word_embeddings"] = json!(true);
    std::fs::write(to.join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    // The head's name goes, and with it the tensor.
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let all = header.as_object_mut().unwrap();
    let head = all.remove("lm_head.weight").expect("a head");
    all.insert("spare.weight".into(), head);
    let header = header.to_string();
    let out = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + n..]].concat();
    std::fs::write(to.join("model.safetensors"), out).unwrap();
    open(to).unwrap()
}

/// One basis leaves a plain model: what the norms' divisor says goes into their scales on the way out.
#[test]
fn one_basis_goes_out_to_other_programs() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "qwen3", "mixtral"] {
        let source = tiny(name);
        let done = run(&source, "keep = 0.5", &dir.path().join(name)).unwrap();
        let packed = open(&done.path).unwrap();
        assert_eq!(packed.spec().norm.divisor, Some(source.spec().hidden));
        let want = logits(&packed);
        let (hf, gguf) = (dir.path().join(format!("{name}-hf")), dir.path().join(format!("{name}.gguf")));
        save_hf(&packed, &hf, Some(Float::F32), false, &mut |_, _| {}).unwrap();
        save_gguf(&packed, &gguf, GgufKind::F32, false, &mut |_, _| {}).unwrap();
        for out in [hf, gguf] {
            let back = open(&out).unwrap();
            assert_eq!(back.spec().norm.divisor, None);
            let worst = off(&want, &logits(&back));
            // One eps serves all norms of a file, those of heads, too.
            assert!(worst < if name == "qwen3" { 1e-3 } else { 1e-5 }, "{}: {worst}", out.display());
        }
    }
}

#[test]
fn a_recipe_that_would_go_wrong_is_refused_before_work() {
    let registry = lacuna_methods::registry();
    let parse = |steps: &str| Recipe::parse(&format!("version = 1\n{steps}"), &registry, &[]);
    let slice = "[[step]]\nmethod = \"slicegpt\"\nkeep = 0.5\n";
    let fisher = "[[step]]\nmethod = \"fisher\"\nfraction = 0.1\n";
    let said = parse(&format!("{slice}{fisher}")).err().expect("gradients of other axes").what;
    assert!(said.contains("'outliers' reads gradients") && said.contains("'slice'"), "{said}");
    assert!(parse(fisher).is_ok());
    let said = parse(&format!("{slice}targets = [\"attn.*\"]\n")).err().expect("targets of all").what;
    assert!(said.contains("takes no targets"), "{said}");
    let source = tiny("llama");
    let wanda = |targets: &str| parse(&format!("[[step]]\nmethod = \"wanda\"\ntargets = [{targets}]\n")).unwrap();
    for targets in ["\"q_proj\"", "\"attention.*\", \"ffn.*\"", "\"layers.9.*\""] {
        let said = wanda(targets).check(source.spec()).expect_err("no such matrix").what;
        assert!(said.contains("is no matrix of this model") && said.contains("attn.q"), "{targets}: {said}");
    }
    assert!(wanda("\"attn.*\", \"layers.0.ffn.up\"").check(source.spec()).is_ok());
}

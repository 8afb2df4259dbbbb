//! Maps at the inputs of matrices: what follows them, what cannot, and that what is saved runs as it decodes.

mod support;

use std::path::Path;

use lacuna_base::Rng;
use lacuna_checkpoint::{Checkpoint, open};
use lacuna_compress::{CompressError, Options, Outcomes, Quiet, Recipe, compress};
use lacuna_format::Weights;
use lacuna_spec::{Place, Role};
use serde_json::json;
use support::{Decoded, apart, logits};

fn tiny(name: &str) -> Checkpoint {
    open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny").join(name)).unwrap()
}

fn tokens(vocab: usize) -> Vec<u32> {
    let mut rng = Rng::new(5);
    (0..400).map(|_| rng.below(vocab) as u32).collect()
}

fn recipe(text: &str) -> Recipe {
    let sets = ["calibration.samples=6".to_owned(), "calibration.seq_len=32".to_owned()];
    Recipe::parse(text, &lacuna_methods::registry(), &sets).unwrap()
}

fn run(model: &Checkpoint, text: &str, out: &Path, max_ram: Option<u64>) -> Result<Outcomes, CompressError> {
    let options = Options {
        out,
        overwrite: false,
        resume: false,
        scratch: None,
        max_ram,
        bos: None,
        imatrix: None,
        source: json!("tiny"),
    };
    compress(model, &tokens(model.spec().vocab), &recipe(text), &options, &mut Quiet)
}

/// Steps, each of them the body of one.
fn steps(bodies: &[&str]) -> String {
    let one = |(i, body): (usize, &&str)| format!("[[step]]\nname = \"s{i}\"\n{body}\n");
    format!("version = 1\n{}", bodies.iter().enumerate().map(one).collect::<String>())
}

const HADAMARD: &str = "method = \"hadamard\"";
const AWQ: &str = "method = \"awq\"\nbits = 4\ngroup = 16";
const SORT: &str = "method = \"rearrange\"";
const GPTQ: &str = "method = \"gptq\"\nbits = 4\ngroup = 16";
const RTN: &str = "method = \"rtn\"\nbits = 4\ngroup = 16";
const WANDA: &str = "method = \"wanda\"\nsparsity = 0.3";

#[test]
fn maps_alone_leave_the_model_what_it_was() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "qwen3_moe", "gpt2"] {
        let source = tiny(name);
        let before = logits(&source);
        for (i, maps) in [&[HADAMARD][..], &[AWQ], &[SORT], &[AWQ, SORT, HADAMARD]].into_iter().enumerate() {
            let done = run(&source, &steps(maps), &dir.path().join(format!("{name}{i}")), None).unwrap();
            let packed = open(&done.path).unwrap();
            let q = packed.get(&Place::layer(0, Role::Q)).unwrap().unwrap();
            assert_eq!((q.input.len(), q.output.len()), (maps.len(), 0), "{}", q.codec_name());
            let off = apart(&logits(&packed), &before);
            // Weights are f16 now.
            assert!(off < 5e-3, "{maps:?} on {name}: {off}");
        }
    }
}

#[test]
fn what_follows_a_map_runs_as_it_decodes() {
    let dir = tempfile::tempdir().unwrap();
    let svd = "method = \"svd-llm\"\nkeep = 0.8";
    let eora = "method = \"eora\"\nof = \"error\"\nrank = 4";
    let outliers = "verb = \"outliers\"\nmethod = \"magnitude\"\nfraction = 0.02";
    let mean = "method = \"spqr\"\nbits = 3\ngroup = 8";
    let chains: [&[&str]; 12] = [
        &[HADAMARD, GPTQ],
        &[HADAMARD, WANDA, GPTQ],
        &[HADAMARD, "method = \"sparsegpt\"\nsparsity = 0.5\npattern = \"2:4\"", RTN],
        &[HADAMARD, svd],
        &[HADAMARD, outliers, RTN],
        &[HADAMARD, RTN, eora],
        &[HADAMARD, mean],
        &[AWQ, RTN],
        &[AWQ, HADAMARD, GPTQ],
        &[SORT, "method = \"bfp\"\nbits = 4\ngroup = 16\nsymmetric = true"],
        &[SORT, WANDA, GPTQ],
        &[AWQ, "method = \"gblm\"\nsparsity = 0.3"],
    ];
    for name in ["llama", "gpt2"] {
        let source = tiny(name);
        let dense = logits(&source);
        for (i, chain) in chains.iter().enumerate() {
            let out = dir.path().join(format!("{name}{i}"));
            let done = run(&source, &steps(chain), &out, None).unwrap_or_else(|e| panic!("{chain:?} on {name}: {e}"));
            let packed = open(&done.path).unwrap();
            let (got, want) = (logits(&packed), logits(&Decoded(open(&done.path).unwrap())));
            assert!(apart(&got, &want) < 1e-4, "{chain:?} on {name}: {}", apart(&got, &want));
            assert!(apart(&got, &dense) > 1e-4, "{chain:?} on {name} did nothing");
            for t in done.tensors.iter().filter(|t| t.error.is_some()) {
                let s = packed.get(&t.place).unwrap().unwrap();
                assert!(s.has_maps() && s.bytes() == t.bytes_after, "{chain:?}: {} is {}", t.place, s.codec_name());
                assert!(t.error.unwrap() < 0.5, "{chain:?}: {} {:?}", t.place, t.error);
            }
        }
    }
}

/// A solver behind a map sees the inputs as mapped: it does better than plain rounding with a small correction, whose
/// error is measured on the same statistics.
#[test]
fn solvers_behind_a_map_see_the_mapped_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    for map in [HADAMARD, AWQ, SORT] {
        let error = |chain: &[&str], at: &str| -> f64 {
            let name = format!("{}-{at}", map.split('"').nth(1).unwrap());
            let done = run(&source, &steps(&[&[map], chain].concat()), &dir.path().join(name), None).unwrap();
            done.tensors.iter().filter(|t| t.place.layer == Some(0)).filter_map(|t| t.error).sum()
        };
        let [gptq, rtn] = ["gptq", "rtn"].map(|m| format!("method = \"{m}\"\nbits = 3\ngroup = 16"));
        let solved = error(&[&gptq], "solved");
        let corrected = error(&[&rtn, "method = \"eora\"\nof = \"error\"\nrank = 1"], "corrected");
        assert!(solved < corrected, "{map}: {solved} {corrected}");
    }
}

#[test]
fn embeddings_have_maps_and_searches_vary_what_follows_one() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "gpt2"] {
        let source = tiny(name);
        let text = steps(&["method = \"hadamard\"\ntargets = [\"embed\"]"]);
        let done = run(&source, &text, &dir.path().join(name), None).unwrap();
        let packed = open(&done.path).unwrap();
        assert!(packed.get(&Place::global(Role::Embed)).unwrap().unwrap().has_maps());
        let off = apart(&logits(&packed), &logits(&source));
        assert!(off < 5e-3, "{name}: {off}");
    }
    // Wanda reads squares, which behind a rotation come of the Gram matrix: in trials, too.
    let source = tiny("llama");
    let search = "method = \"uniform\"\nstep = \"s2\"\nkey = \"sparsity\"\nvalues = [0.25, 0.5, 0.75]\ntarget = 0.5";
    let done = run(&source, &steps(&[search, HADAMARD, WANDA]), &dir.path().join("s"), None).unwrap();
    let plain = run(&source, &steps(&[HADAMARD, &WANDA.replace("0.3", "0.5")]), &dir.path().join("p"), None).unwrap();
    let (a, b) = (open(&done.path).unwrap(), open(&plain.path).unwrap());
    for place in done.spec.places() {
        assert!(a.get(&place).unwrap() == b.get(&place).unwrap(), "{place}");
    }
}

#[test]
fn what_cannot_follow_a_map_is_refused_before_work_begins() {
    let source = tiny("llama");
    let fails = |bodies: &[&str]| match recipe(&steps(bodies)).check(source.spec()) {
        Err(e) => e.what,
        Ok(()) => panic!("accepted: {bodies:?}"),
    };
    for (bodies, word) in [
        (&[HADAMARD, AWQ][..], "the sizes of its inputs cannot be told behind a map"),
        (&[HADAMARD, "method = \"gblm\""], "gradients cannot be told behind a map"),
        (&[HADAMARD, "method = \"squeezellm\"\nbits = 3"], "gradients cannot be told behind a map"),
        (&[RTN, HADAMARD], "put it before"),
        (&[WANDA, SORT], "put it before"),
        (&["method = \"svd\"", AWQ], "put it before"),
        (&[HADAMARD; 5], "at most 4 maps"),
        (&["method = \"hadamard\"\nsize = 1024"], "runs of 1024"),
        (&["method = \"hadamard\"\nsize = 24"], "runs of 24"),
        (&[HADAMARD, "method = \"svd\"\nof = \"error\""], "nothing before"),
        (&["method = \"awq\"\ntargets = [\"embed\"]"], "nothing is multiplied with this matrix"),
    ] {
        let said = fails(bodies);
        assert!(said.contains(word) && said.contains("step '"), "{bodies:?}: {said}");
    }
}

#[test]
fn the_ceiling_and_the_threads_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let source = tiny("llama");
    let text = steps(&[AWQ, HADAMARD, WANDA, GPTQ]);
    let plain = run(&source, &text, &dir.path().join("a"), None).unwrap();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let alone = one.install(|| run(&source, &text, &dir.path().join("b"), None)).unwrap();
    let floor = match run(&source, &text, &dir.path().join("c"), Some(1 << 20)) {
        Err(CompressError::Memory { floor, .. }) => lacuna_base::units::parse_bytes(&floor).unwrap(),
        other => panic!("a ceiling of 1 MiB: {:?}", other.map(|o| o.path)),
    };
    let low = run(&source, &text, &dir.path().join("c"), Some(floor + (8 << 20))).unwrap();
    let (a, b, c) = (open(&plain.path).unwrap(), open(&alone.path).unwrap(), open(&low.path).unwrap());
    for place in plain.spec.places() {
        let [a, b, c] = [&a, &b, &c].map(|m| m.get(&place).unwrap().unwrap());
        assert!(a == b && a == c, "{place}");
    }
}

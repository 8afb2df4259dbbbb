//! Compressions stopped at each of their changes of files: what lies there afterwards is the old model whole, or the
//! new one whole, or work that the same run goes on with to the same bytes and no other run takes over.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use lacuna_checkpoint::{Checkpoint, PackedWriter, SaveError, faults, open};
use lacuna_compress::{CompressError, Options, Outcomes, Quiet, Recipe, compress};
use lacuna_format::Weights;
use serde_json::{Value, json};

type Files = BTreeMap<String, Vec<u8>>;

fn tiny() -> Checkpoint {
    open(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tiny/llama")).unwrap()
}

/// The files of a model; a journal that a stopped run left behind in it is none.
fn files(dir: &Path) -> Option<Files> {
    let read = |e: fs::DirEntry| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap());
    let mut files: Files = fs::read_dir(dir).ok()?.map(|e| read(e.unwrap())).collect();
    files.remove("journal");
    Some(files)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn run(source: &Checkpoint, bits: u8, out: &Path, overwrite: bool, resume: bool) -> Result<Outcomes, CompressError> {
    let text =
        format!("version = 1\n[[step]]\nmethod = \"rtn\"\ntargets = [\"ffn.down\"]\nbits = {bits}\ngroup = 16\n");
    let recipe = Recipe::parse(&text, &lacuna_methods::registry(), &[]).unwrap();
    let options = Options {
        out,
        overwrite,
        resume,
        scratch: None,
        max_ram: None,
        bos: None,
        imatrix: None,
        source: json!("tiny"),
    };
    compress(source, &[], &recipe, &options, &mut Quiet)
}

/// A run that is stopped at its `n`-th change of files; none where it is done before that.
fn stopped<T>(n: u64, work: impl FnOnce() -> T) -> Option<T> {
    faults::stop_at(Some(n));
    let done = work();
    let cut = faults::stopped();
    faults::stop_at(None);
    cut.then_some(done)
}

/// What three recipes come to: the old model, the new one, and another's.
struct Models {
    source: Checkpoint,
    home: tempfile::TempDir,
    all: [Files; 3],
}

const OLD: u8 = 8;
const NEW: u8 = 4;
const OTHER: u8 = 3;

impl Models {
    fn make() -> Models {
        let (source, home) = (tiny(), tempfile::tempdir().unwrap());
        let all = [OLD, NEW, OTHER].map(|bits| {
            let out = home.path().join(bits.to_string());
            run(&source, bits, &out, false, false).unwrap();
            files(&out).unwrap()
        });
        assert!(all[0] != all[1] && all[1] != all[2]);
        Models { source, home, all }
    }

    /// Stops a run at change after change from the `first` on, where the old model stands already or not; how many
    /// changes a whole run makes.
    fn stop_everywhere(&self, first: u64, old_stands: bool, exchange: bool) -> u64 {
        let [old, new, other] = &self.all;
        let mut absent = 0;
        for n in first.. {
            let dir = tempfile::tempdir_in(self.home.path()).unwrap();
            let out = dir.path().join("out");
            if old_stands {
                fs::create_dir(&out).unwrap();
                old.iter().for_each(|(name, bytes)| fs::write(out.join(name), bytes).unwrap());
            }
            faults::exchanges(exchange);
            let cut = stopped(n, || run(&self.source, NEW, &out, old_stands, false));
            faults::exchanges(true);
            let Some(cut) = cut else {
                assert_eq!((files(&out).as_ref(), names(dir.path())), (Some(new), vec!["out".into()]));
                assert!(n > first + 5, "{n} changes and no more");
                assert_eq!(absent, if old_stands && !exchange { 2 } else { 0 }, "stops with no model in its place");
                return n - 1;
            };
            let said = cut.err().expect("a stopped run fails").to_string();
            assert!(said.contains("stopped by a test"), "{said}");
            let there = files(&out);
            let journal = dir.path().join(".out.partial/journal").is_file();
            let whole = there.as_ref().is_some_and(|f| f == new || (old_stands && f == old));
            assert!(whole || (there.is_none() && (journal || !old_stands)), "change {n}: {:?}", names(dir.path()));
            if old_stands && !whole {
                absent += 1;
                assert_eq!(files(&dir.path().join(".out.old")).as_ref(), Some(old), "change {n}");
            }
            if let Some(model) = &there {
                open(&out).unwrap_or_else(|e| panic!("change {n}: {e}; {:?}", model.keys()));
            }
            if journal {
                // Nobody else takes the work over, and whoever tries takes nothing from it.
                let refused = run(&self.source, OTHER, &out, true, true).err().expect("another's journal").to_string();
                assert!(refused.contains("another recipe") && refused.contains("--resume"), "change {n}: {refused}");
                run(&self.source, NEW, &out, true, true).unwrap_or_else(|e| panic!("change {n}: {e}"));
                assert_eq!(files(&out).as_ref(), Some(new), "change {n}");
            } else {
                // Nothing to go on with: whoever comes begins anew.
                run(&self.source, OTHER, &out, true, true).unwrap_or_else(|e| panic!("change {n}: {e}"));
                assert_eq!(files(&out).as_ref(), Some(other), "change {n}");
            }
            assert!(!out.join("journal").exists());
            assert_eq!(names(dir.path()), ["out"], "change {n}");
        }
        unreachable!("the run ends")
    }
}

#[test]
fn a_run_stopped_anywhere_leaves_the_old_model_the_new_one_or_work_to_go_on_with() {
    let models = Models::make();
    let all = models.stop_everywhere(1, false, true);
    // Before the model comes into its place, one that stands there makes no difference.
    models.stop_everywhere(all - 8, true, true);
    models.stop_everywhere(all - 8, true, false);
}

#[test]
fn throwing_work_away_does_not_hand_it_over() {
    let models = Models::make();
    let [_, new, other] = &models.all;
    for n in 1..12 {
        let dir = tempfile::tempdir_in(models.home.path()).unwrap();
        let out = dir.path().join("out");
        for (bits, at) in [(OTHER, 40), (NEW, n)] {
            assert!(stopped(at, || run(&models.source, bits, &out, false, false)).is_some_and(|cut| cut.is_err()));
        }
        let now = match run(&models.source, NEW, &out, false, true) {
            Ok(_) => new,
            Err(e) => {
                assert!(e.to_string().contains("another recipe"), "change {n}: {e}");
                run(&models.source, OTHER, &out, false, true).unwrap();
                other
            }
        };
        assert_eq!((files(&out).as_ref(), names(dir.path())), (Some(now), vec!["out".into()]), "change {n}");
    }
}

/// Several files of weights, which a compression of this size would not have.
#[test]
fn sealed_files_are_resumed_too() {
    let source = tiny();
    let home = tempfile::tempdir().unwrap();
    let write = |out: &Path, resume: bool| -> Result<PathBuf, SaveError> {
        let mut w = PackedWriter::open(out, false, resume, &json!("a"), 40)?.shard_bytes(20_000);
        for place in source.spec().places() {
            if !w.is_done(&place) {
                w.put(&place, &source.get(&place)?.unwrap())?;
            }
        }
        w.finish(source.spec().clone(), json!(null), json!(null), Vec::new(), None)
    };
    let whole = files(&write(&home.path().join("whole"), false).unwrap()).unwrap();
    assert!(whole.keys().filter(|n| n.starts_with("model-")).count() > 2);
    for n in 1.. {
        let out = home.path().join(n.to_string());
        let Some(cut) = stopped(n, || write(&out, false)) else { break };
        assert!(cut.is_err());
        if out.exists() {
            assert_eq!(files(&out).as_ref(), Some(&whole), "change {n}");
            continue;
        }
        // Stopped once more on the way, a few changes on.
        assert!(stopped(1 + n % 7, || write(&out, true)).is_none_or(|again| again.is_err()), "change {n}");
        if !out.exists() {
            write(&out, true).unwrap_or_else(|e| panic!("change {n}: {e}"));
        }
        assert_eq!(files(&out).as_ref(), Some(&whole), "change {n}");
    }
}

#[test]
fn one_run_at_a_time_writes_to_a_place() {
    let source = tiny();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let begin = |resume| PackedWriter::open(&out, false, resume, &Value::Null, 40);
    let mut first = begin(false).unwrap();
    let place = source.spec().places()[0];
    first.put(&place, &source.get(&place).unwrap().unwrap()).unwrap();
    for resume in [false, true] {
        let said = begin(resume).unwrap_err().to_string();
        assert!(said.contains("another run"), "{said}");
    }
    drop(first);
    assert!(begin(true).unwrap().is_done(&place));
}

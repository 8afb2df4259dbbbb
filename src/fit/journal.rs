//! What trials came to, kept beside OUT, so that a search goes on where it was stopped.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A line: an assignment, windows, and their KL (null: no finite number).
#[derive(Serialize, Deserialize)]
struct Line {
    levels: Vec<usize>,
    from: usize,
    kl: Vec<Option<f64>>,
}

/// Outcomes by assignment, first window and number of windows.
pub struct Journal {
    known: HashMap<(Vec<usize>, usize, usize), Vec<f64>>,
    /// None of a dry run, which writes nothing.
    file: Option<File>,
    path: PathBuf,
}

fn path_of(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.fit"))
}

/// The model is whole: its search's journal is of no more use.
pub fn forget(out: &Path) {
    // A file left behind is known to be another run's.
    let _ = fs::remove_file(path_of(out));
}

impl Journal {
    /// For a search that leaves no trace.
    pub fn none() -> Journal {
        Journal { known: HashMap::new(), file: None, path: PathBuf::new() }
    }

    /// For a search of `identity`. With `resume`, what one of the same identity measured is known; that of another one
    /// is an error.
    pub fn open(out: &Path, resume: bool, identity: &Value) -> anyhow::Result<Journal> {
        let path = path_of(out);
        let head = json!({ "identity": identity }).to_string();
        let mut known = HashMap::new();
        if let (true, Ok(file)) = (resume, File::open(&path)) {
            let mut lines = BufReader::new(file).lines();
            if lines.next().and_then(Result::ok).is_none_or(|first| first != head) {
                anyhow::bail!(
                    "{}: the trials of another search (model, texts, levels or program differ); without --resume they \
                     are thrown away",
                    path.display()
                );
            }
            // A torn line ends what is known.
            for line in lines.map_while(Result::ok) {
                let Ok(l) = serde_json::from_str::<Line>(&line) else { break };
                let kl: Vec<f64> = l.kl.into_iter().map(|x| x.unwrap_or(f64::INFINITY)).collect();
                known.insert((l.levels, l.from, kl.len()), kl);
            }
        }
        let at = || format!("{}: cannot be written", path.display());
        let mut whole = head + "\n";
        known.iter().for_each(|((a, from, _), kl)| whole += &line(a, *from, kl));
        lacuna_base::unfinished::write(&path, whole.as_bytes()).with_context(at)?;
        let file = OpenOptions::new().append(true).open(&path).with_context(at)?;
        Ok(Journal { known, file: Some(file), path })
    }

    /// Measurements that it knows.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// What was measured.
    pub fn known(&self, a: &[usize], from: usize, n: usize) -> Option<Vec<f64>> {
        self.known.get(&(a.to_vec(), from, n)).cloned()
    }

    /// Keeps what was measured.
    pub fn learn(&mut self, a: &[usize], from: usize, n: usize, kl: &[f64]) -> anyhow::Result<()> {
        if let Some(file) = &mut self.file {
            file.write_all(line(a, from, kl).as_bytes())
                .with_context(|| format!("{}: cannot be written", self.path.display()))?;
        }
        self.known.insert((a.to_vec(), from, n), kl.to_vec());
        Ok(())
    }
}

fn line(a: &[usize], from: usize, kl: &[f64]) -> String {
    let kl = kl.iter().map(|x| x.is_finite().then_some(*x)).collect();
    serde_json::to_string(&Line { levels: a.to_vec(), from, kl }).unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_that_goes_on_knows_what_was_measured() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        let mut j = Journal::open(&out, false, &json!(1)).unwrap();
        j.learn(&[1, 2], 0, 2, &[0.1 + 0.2, f64::INFINITY]).unwrap();
        drop(j);
        fs::OpenOptions::new().append(true).open(path_of(&out)).unwrap().write_all(b"{\"torn").unwrap();
        let j = Journal::open(&out, true, &json!(1)).unwrap();
        assert_eq!(j.known(&[1, 2], 0, 2), Some(vec![0.1 + 0.2, f64::INFINITY]));
        assert_eq!((j.known(&[1, 2], 1, 2), j.known(&[1, 2], 0, 1)), (None, None));
        let said = Journal::open(&out, true, &json!(2)).err().unwrap().to_string();
        assert!(said.contains("another search"), "{said}");
        assert_eq!(Journal::open(&out, false, &json!(2)).unwrap().len(), 0);
        forget(&out);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

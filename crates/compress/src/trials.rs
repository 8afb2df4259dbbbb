//! What trials of a search came to: known again within a run, and by a run that goes on after it was stopped.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use lacuna_contract::{Assignment, Outcome};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Outcomes by assignment and number of sequences, with a budget of trials.
pub(crate) struct Trials {
    known: HashMap<(Assignment, usize), Outcome>,
    journal: File,
    spent: usize,
    most: usize,
}

/// A line of the journal.
#[derive(Serialize, Deserialize)]
struct Line {
    levels: Assignment,
    sequences: usize,
    loss: Option<f64>,
    kl: Option<f64>,
    bytes: u64,
}

/// Where the journal of a search for `out` lies.
fn journal(out: &Path, step: &str) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    let plain: String = step.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
    out.with_file_name(format!(".{name}.{plain}.trials"))
}

impl Trials {
    /// For the search of `step` in a run of `identity`. With `resume`, what a run of the same identity measured is
    /// known.
    pub(crate) fn open(out: &Path, resume: bool, identity: &Value, step: &str, most: usize) -> io::Result<Trials> {
        let path = journal(out, step);
        let head = json!({ "identity": identity }).to_string();
        let mut known = HashMap::new();
        if let (true, Ok(file)) = (resume, File::open(&path)) {
            let mut lines = BufReader::new(file).lines();
            // A torn or foreign line ends what is known.
            if lines.next().and_then(Result::ok).is_some_and(|first| first == head) {
                for line in lines.map_while(Result::ok) {
                    let Ok(l) = serde_json::from_str::<Line>(&line) else { break };
                    let number = |x: Option<f64>| x.unwrap_or(f64::NAN);
                    let outcome = Outcome { loss: number(l.loss), kl: number(l.kl), bytes: l.bytes };
                    known.insert((l.levels, l.sequences), outcome);
                }
            }
        }
        // Written anew from what is known, so that a torn end is gone.
        let tmp = path.with_extension("trials.new");
        let mut trials = Trials { known, journal: File::create(&tmp)?, spent: 0, most };
        writeln!(trials.journal, "{head}")?;
        let lines: Vec<String> = trials.known.iter().map(|((a, n), o)| line(a, *n, o)).collect();
        lines.iter().try_for_each(|l| writeln!(trials.journal, "{l}"))?;
        trials.journal.sync_all()?;
        fs::rename(&tmp, &path)?;
        trials.journal = OpenOptions::new().append(true).open(&path)?;
        Ok(trials)
    }

    /// What an assignment came to on the first `sequences` sequences, if it was measured.
    pub(crate) fn known(&self, a: &Assignment, sequences: usize) -> Option<Outcome> {
        self.known.get(&(a.clone(), sequences)).copied()
    }

    /// Keeps an outcome.
    pub(crate) fn learn(&mut self, a: Assignment, sequences: usize, outcome: Outcome) -> io::Result<()> {
        writeln!(self.journal, "{}", line(&a, sequences, &outcome))?;
        self.known.insert((a, sequences), outcome);
        Ok(())
    }

    /// Counts a trial; an error once there are too many.
    pub(crate) fn spend(&mut self) -> Result<(), String> {
        if self.spent >= self.most {
            return Err(format!("the budget of {} trials is spent", self.most));
        }
        self.spent += 1;
        Ok(())
    }

    /// Trials so far.
    pub(crate) fn spent(&self) -> usize {
        self.spent
    }
}

/// The model is whole: what its search measured is of no more use.
pub(crate) fn forget(out: &Path, step: &str) {
    // A file left behind costs a few bytes and is known to be another run's.
    let _ = fs::remove_file(journal(out, step));
}

fn line(a: &Assignment, sequences: usize, o: &Outcome) -> String {
    let number = |x: f64| x.is_finite().then_some(x);
    let line = Line { levels: a.clone(), sequences, loss: number(o.loss), kl: number(o.kl), bytes: o.bytes };
    serde_json::to_string(&line).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_goes_on_knows_what_was_measured() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("m");
        let id = json!({"recipe": 1});
        let one = Outcome { loss: 3.25, kl: 0.1 + 0.2, bytes: 7 };
        let mut t = Trials::open(&out, false, &id, "search", 2).unwrap();
        t.learn(vec![1, 2], 3, one).unwrap();
        t.learn(vec![0, 0], 3, Outcome { loss: f64::NAN, ..one }).unwrap();
        assert!(t.spend().is_ok() && t.spend().is_ok() && t.spend().is_err());
        drop(t);
        let t = Trials::open(&out, true, &id, "search", 2).unwrap();
        assert_eq!((t.known(&vec![1, 2], 3), t.known(&vec![1, 2], 4), t.spent()), (Some(one), None, 0));
        assert!(t.known(&vec![0, 0], 3).unwrap().loss.is_nan());
        let other = Trials::open(&out, true, &json!({"recipe": 2}), "search", 2).unwrap();
        assert!(other.known(&vec![1, 2], 3).is_none());
        forget(&out, "search");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

//! What is wrong with a checkpoint, as far as its files tell without running it.

use std::collections::BTreeSet;
use std::fmt;

use lacuna_arch::{self as arch, Source};
use lacuna_base::Mat;
use lacuna_format::{Group, Stored, Values};
use lacuna_spec::{Place, Spec};

use crate::foreign::Quantized;
use crate::open::{Checkpoint, Kind};

/// Something wrong with a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// What, with names and numbers.
    pub what: String,
    /// What helps, where something does.
    pub help: Option<String>,
    /// Whether the model cannot be run as it is.
    pub broken: bool,
}

impl Problem {
    /// Something that keeps the model from running.
    pub fn broken(what: impl Into<String>, help: Option<&str>) -> Problem {
        Problem { what: what.into(), help: help.map(str::to_owned), broken: true }
    }

    /// Something that other readers trip over, or that was hardly meant.
    pub fn odd(what: impl Into<String>, help: Option<&str>) -> Problem {
        Problem { broken: false, ..Problem::broken(what, help) }
    }

    /// Whether `repair` is recommended.
    pub(crate) fn asks_for_repair(&self) -> bool {
        self.help.as_deref() == Some(REPAIR)
    }

    /// Recommends what `repair` cannot do to the user.
    pub(crate) fn by_hand(&mut self) {
        if self.asks_for_repair() {
            let layers = "compare num_hidden_layers in config.json, and its lists with an entry for each layer, with \
                          the layers that the weight files name; if files are missing, fetch them";
            let sparse = "take sparsity_config out of config.json";
            self.help = Some(if self.what.starts_with(SPARSITY) { sparse } else { layers }.to_owned());
        }
    }
}

/// How what is said of a dead `sparsity_config` begins.
const SPARSITY: &str = "sparsity_config";

/// Layers that the configuration counts and the files lack, and the other way round.
pub(crate) struct LayersDiffer {
    counted: usize,
    present: usize,
    /// Counted, but without any tensor.
    pub missing: Vec<usize>,
    /// With tensors, but not counted.
    pub beyond: Vec<usize>,
}

impl fmt::Display for LayersDiffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration counts {} layers, and tensors are there for {}", self.counted, self.present)?;
        let (list, what) = if self.missing.is_empty() { (&self.beyond, "more") } else { (&self.missing, "missing") };
        let shown: Vec<String> = list.iter().take(8).map(usize::to_string).collect();
        let more = if list.len() > 8 { ", ..." } else { "" };
        write!(f, " ({what}: {}{more})", shown.join(", "))?;
        if self.missing.is_empty() { Ok(()) } else { write!(f, "; is the count left over from layer pruning?") }
    }
}

/// Compares the layers that the network has with those that tensors are named for. `None`: the same.
pub(crate) fn layers_differ<'a>(
    spec: &Spec,
    names: impl Iterator<Item = &'a str>,
    sources: fn(&Spec, &Place) -> Vec<Source>,
) -> Option<LayersDiffer> {
    let first = spec.places().into_iter().find(|p| p.layer.is_some())?;
    let mark = format!(".{}.", first.layer?);
    let mut prefixes: Vec<String> =
        sources(spec, &first).iter().filter_map(|s| Some(format!("{}.", s.name.split_once(&mark)?.0))).collect();
    prefixes.dedup();
    let number = |n: &str| {
        let rest = prefixes.iter().find_map(|p| n.strip_prefix(p.as_str()))?;
        rest.split_once('.')?.0.parse::<usize>().ok()
    };
    let present: BTreeSet<usize> = names.filter_map(number).collect();
    // Blocks of which pruning left nothing have no tensors.
    let empty = |l: &usize| spec.layers.get(*l).is_some_and(|x| x.attn.is_none() && x.ffn.is_none());
    let counted = spec.layers.len();
    let missing: Vec<usize> = (0..counted).filter(|l| !present.contains(l) && !empty(l)).collect();
    let beyond: Vec<usize> = present.range(counted..).copied().collect();
    if missing.is_empty() && beyond.is_empty() || present.is_empty() {
        return None;
    }
    Some(LayersDiffer { counted, present: present.len(), missing, beyond })
}

/// What mends layer counts and dead configurations.
pub(crate) const REPAIR: &str = "lacuna repair MODEL -o OUT";

impl Checkpoint {
    /// Notes what is odd beyond what the opening refused.
    pub(crate) fn look_around(&mut self) {
        let sources = if self.kind() == Kind::Gguf { arch::gguf_sources } else { arch::sources };
        if self.kind() != Kind::Packed
            && let Some(d) = layers_differ(self.spec_of(), self.tensors().map(|t| t.name.as_str()), sources)
            && d.missing.is_empty()
        {
            // Some models keep more there than they run (layers that draft); only who made the files knows.
            let help = "they are not run; if they are meant, raise the count in config.json";
            let next = d.beyond.iter().copied().eq(d.counted..d.counted + d.beyond.len());
            self.note(Problem::odd(d.to_string(), Some(help).filter(|_| next)));
        }
        if let Some(q) = self.quantized().cloned() {
            let masked = self.tensors().any(|t| t.name.ends_with(".bitmask"));
            let compressed = self.foreign_places() > 0;
            if let Some(f) = q.sparsity_format.as_ref().filter(|f| !masked && (q.sparsity_targets || *f != "dense")) {
                let what = format!(
                    "{SPARSITY} (format \"{f}\") is left over: no tensor is stored that way, and readers of today \
                     stumble over it"
                );
                self.note(Problem::odd(what, Some(REPAIR)));
            }
            if !compressed && q.quantizes() {
                let what =
                    format!("the configuration says {}, but every matrix is stored as plain numbers", q.describe());
                let help = "if the values are meant as they are, take quantization_config out of config.json";
                self.note(Problem::odd(what, Some(help)));
            }
        }
    }
}

impl Quantized {
    /// How a matrix differs from what every group of the configuration says, if it does.
    pub fn contradiction(&self, stored: &Stored) -> Option<String> {
        let p = stored.single()?;
        let Values::Int { bits, group, .. } = &p.values else { return None };
        let said = self.describe();
        if !self.said_bits().any(|b| b == *bits) {
            return Some(format!("{bits} bits, but the configuration says {said}"));
        }
        match group {
            Group::Run(n) if *n < p.cols && !self.said_groups().any(|g| g == *n) => {
                Some(format!("groups of {n} columns, but the configuration says {said}"))
            }
            _ => None,
        }
    }
}

/// What the values of a matrix are like.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Found {
    /// Entries.
    pub entries: u64,
    /// Zeros among them.
    pub zeros: u64,
    /// Those that are no finite number.
    pub not_finite: u64,
    /// Row and column of the first of those.
    pub first: Option<(usize, usize)>,
    /// Whether no more than two of every four columns of a row are not zero.
    pub two_of_four: bool,
    /// Whether no more than four of every eight columns of a row are not zero.
    pub four_of_eight: bool,
}

impl Found {
    /// Reads every value of a checked matrix.
    pub fn of(stored: &Stored) -> Found {
        const ROWS: usize = 64;
        let (rows, cols) = (stored.rows, stored.cols);
        let runs = |n: usize| rows > 1 && cols.is_multiple_of(n);
        let mut out = Found { two_of_four: runs(4), four_of_eight: runs(8), ..Found::default() };
        out.entries = rows as u64 * cols as u64;
        for from in (0..rows).step_by(ROWS) {
            let to = (from + ROWS).min(rows);
            let mut some = Mat::zeros(to - from, cols);
            stored.decode_rows(from, to, some.view_mut());
            for r in from..to {
                out.row(r, some.row(r - from));
            }
        }
        out
    }

    fn row(&mut self, r: usize, row: &[f32]) {
        self.zeros += row.iter().filter(|v| **v == 0.0).count() as u64;
        let bad = row.iter().filter(|v| !v.is_finite()).count();
        if bad > 0 {
            self.not_finite += bad as u64;
            self.first = self.first.or_else(|| Some((r, row.iter().position(|v| !v.is_finite())?)));
        }
        let most = |m: usize, n: usize| row.chunks(m).all(|c| c.iter().filter(|v| **v != 0.0).count() <= n);
        self.two_of_four = self.two_of_four && most(4, 2);
        self.four_of_eight = self.four_of_eight && most(8, 4);
    }
}

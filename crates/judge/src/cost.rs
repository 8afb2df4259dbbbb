//! This machine's cost table: how long it takes to multiply one row of activations with a matrix in each form, and what a token of a model takes
//! beside its products. It grows as forms and models are met.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lacuna_base::Mat;
use lacuna_checkpoint::Checkpoint;
use lacuna_format::{FormatError, Stored, Weights};
use lacuna_kernels::{Activations, Isa, Linear, Packing};
use lacuna_run::RunError;

use crate::speed::time_decode;

/// Bytes that are multiplied in turn, so that a matrix comes from memory and not from a cache, as in a model.
const STREAM_BYTES: u64 = 64 << 20;
/// How long, and how often at least, they are passed over. The middle pass counts: a token's products meet the machine as it is, not at its best.
const LONG: Duration = Duration::from_millis(150);
const PASSES: usize = 7;
/// Runs, and tokens of each, from which a model's time beside its products is taken.
const RUNS: usize = 9;
const TOKENS: usize = 24;

/// Seconds by form, kept in a file.
pub struct CostTable {
    path: PathBuf,
    seconds: BTreeMap<String, f64>,
}

impl CostTable {
    /// The table of the cache at `cache`, empty where there is none. A broken file is begun anew.
    pub fn open(cache: &Path) -> CostTable {
        let path = cache.join("cost.json");
        let seconds = std::fs::read(&path).ok().and_then(|t| serde_json::from_slice(&t).ok()).unwrap_or_default();
        CostTable { path, seconds }
    }

    /// Seconds that one row takes through `stored` with 8-bit activations, as `generate` runs it; measured where the table does not know.
    pub fn seconds(&mut self, stored: &Stored) -> Result<f64, FormatError> {
        let key = here(format!("{} {}x{} {} bytes", stored.codec_name(), stored.rows, stored.cols, stored.bytes()));
        if let Some(&s) = self.seconds.get(&key) {
            return Ok(s);
        }
        let s = measure(stored)?;
        self.seconds.insert(key, s);
        Ok(s)
    }

    /// Seconds of one token beside its products (attention, norms, activations, whatever threads wait for), which `model` takes in any form: what it
    /// is timed at as it is, less `products` seconds. Measured where the table does not know; the model is loaded for it.
    pub fn beside(&mut self, model: &Checkpoint, products: f64) -> Result<f64, RunError> {
        let spec = model.spec();
        let key =
            here(format!("beside products, {} layers, {} wide, {} tokens", spec.layers.len(), spec.hidden, spec.vocab));
        if let Some(&s) = self.seconds.get(&key) {
            return Ok(s);
        }
        let speed = time_decode(&[model], RUNS, TOKENS, |_| ())?[0];
        let s = speed.map_or(0.0, |s| (1.0 / s.median - products).max(0.0));
        // Nothing at all comes of a machine that was busier during the products: not worth keeping.
        if s > 0.0 {
            self.seconds.insert(key, s);
        }
        Ok(s)
    }

    /// Keeps what was measured. A table that cannot be written is measured again next time.
    pub fn save(&self) {
        let tmp = self.path.with_extension("tmp");
        let text = serde_json::to_vec_pretty(&self.seconds).unwrap_or_default();
        if std::fs::create_dir_all(self.path.parent().unwrap_or(Path::new("."))).is_ok()
            && std::fs::write(&tmp, text).is_ok()
        {
            let _ = std::fs::rename(&tmp, &self.path);
        }
    }
}

/// The name of what was measured with the kernels, the instruction set and the threads that are at work here.
fn here(what: String) -> String {
    let (isa, threads) = (Isa::best().name(), lacuna_kernels::threads());
    format!("{what}, {isa}, {threads} threads, {}", env!("CARGO_PKG_VERSION"))
}

/// The middle one of several passes over copies of the matrix that no cache holds.
fn measure(stored: &Stored) -> Result<f64, FormatError> {
    let packing = Packing { activations: Activations::Int8, ..Packing::default() };
    let first = Linear::pack_with(stored, &packing)?;
    let copies = (STREAM_BYTES / first.weights_bytes().max(1)).clamp(1, 256) as usize;
    let mut all = vec![first];
    for _ in 1..copies {
        all.push(Linear::pack_with(stored, &packing)?);
    }
    let x = Mat::from_fn(1, stored.cols, |_, c| (c * 17 % 101) as f32 / 50.0 - 1.0);
    let mut out = Mat::zeros(1, stored.rows);
    let (begun, mut passes) = (Instant::now(), Vec::new());
    while passes.len() < PASSES || begun.elapsed() < LONG {
        let start = Instant::now();
        for linear in &all {
            linear.forward(black_box(x.view()), out.view_mut());
        }
        passes.push(start.elapsed().as_secs_f64());
    }
    passes.sort_by(f64::total_cmp);
    Ok(passes[passes.len() / 2] / all.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_format::{Float, PatternKind, pack_float};

    #[test]
    fn what_was_measured_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let w = Mat::from_fn(64, 96, |r, c| (r + c) as f32);
        let stored = Stored::from_piece(pack_float(w.view(), None, PatternKind::Dense, Float::F16).unwrap());
        let mut table = CostTable::open(dir.path());
        let s = table.seconds(&stored).unwrap();
        assert!(s > 0.0 && s < 1.0);
        table.save();
        assert_eq!(CostTable::open(dir.path()).seconds(&stored).unwrap(), s);
        std::fs::write(dir.path().join("cost.json"), "{").unwrap();
        assert!(CostTable::open(dir.path()).seconds.is_empty());
    }
}

//! This machine's cost table: how long it takes to multiply one row of activations with a matrix in each form, and what a token of a model takes
//! beside its products. It grows as forms and models are met.
//!
//! On machines that others use too, speeds change by half within a minute. So a product is not kept in seconds but in the bytes that plain 4-bit
//! products read meanwhile, the two measured in turn, and a forecast names the pace that it is for.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lacuna_base::Mat;
use lacuna_checkpoint::Checkpoint;
use lacuna_format::{FormatError, Stored, Weights};
use lacuna_kernels::{Activations, Isa, Linear, Packing};
use lacuna_run::RunError;

use crate::gate::middle;
use crate::speed::{Pace, time_decode};

/// Bytes that are multiplied in turn, so that a matrix comes from memory and not from a cache, as in a model.
const STREAM_BYTES: u64 = 64 << 20;
/// How long, and how often at least, they are passed over. The middle pass counts: a token's products meet the machine as it is, not at its best.
const LONG: Duration = Duration::from_millis(200);
const PASSES: usize = 7;
/// Readings whose middle is the pace.
const READINGS: usize = 15;
/// Runs, and tokens of each, from which a model's time beside its products is taken.
const RUNS: usize = 15;
const TOKENS: usize = 24;

/// Costs by form and by model, kept in a file.
pub struct CostTable {
    path: PathBuf,
    costs: BTreeMap<String, f64>,
    pace: Option<Pace>,
}

/// What a token will take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forecast {
    /// Bytes that plain 4-bit products read while the token's products are computed.
    pub products: f64,
    /// Seconds beside products.
    pub beside: f64,
}

impl Forecast {
    /// Tokens a second at a pace of so many bytes a second.
    pub fn speed(&self, pace: f64) -> f64 {
        1.0 / (self.products / pace + self.beside)
    }
}

impl CostTable {
    /// The table of the cache at `cache`, empty where there is none. A broken file is begun anew.
    pub fn open(cache: &Path) -> CostTable {
        let path = cache.join("costs.json");
        let costs = std::fs::read(&path).ok().and_then(|t| serde_json::from_slice(&t).ok()).unwrap_or_default();
        CostTable { path, costs, pace: None }
    }

    /// Bytes that plain 4-bit products read while one row goes through `stored` with 8-bit activations, as `generate` runs it; measured where the table does
    /// not know.
    pub fn product(&mut self, stored: &Stored) -> Result<f64, FormatError> {
        let key = here(format!("{} {}x{} {} bytes", stored.codec_name(), stored.rows, stored.cols, stored.bytes()));
        if let Some(&bytes) = self.costs.get(&key) {
            return Ok(bytes);
        }
        let bytes = measure(stored, self.held())?;
        self.costs.insert(key, bytes);
        Ok(bytes)
    }

    /// Seconds of one token beside its products (attention, norms, activations, whatever threads wait for), which `model` takes in any form: what it
    /// is timed at as it is, less the time of `products`, in bytes. Measured where the table does not know; the model is loaded for it.
    pub fn beside(&mut self, model: &Checkpoint, products: f64) -> Result<f64, RunError> {
        let spec = model.spec();
        let key =
            here(format!("beside products, {} layers, {} wide, {} tokens", spec.layers.len(), spec.hidden, spec.vocab));
        if let Some(&s) = self.costs.get(&key) {
            return Ok(s);
        }
        let speed = time_decode(&[model], RUNS, TOKENS, |_| ())?[0];
        let s = speed.map_or(0.0, |s| (1.0 / s.median - products / s.pace).max(0.0));
        // Nothing at all comes of a machine that was busier during the products: not worth keeping.
        if s > 0.0 {
            self.costs.insert(key, s);
        }
        Ok(s)
    }

    /// The pace of this moment, bytes a second.
    pub fn pace(&mut self) -> f64 {
        let pace = self.held();
        let read: Vec<f64> = (0..READINGS).map(|_| pace.take()).collect();
        middle(&read).unwrap_or(f64::INFINITY)
    }

    fn held(&mut self) -> &Pace {
        self.pace.get_or_insert_with(Pace::new)
    }

    /// Keeps what was measured. A table that cannot be written is measured again next time.
    pub fn save(&self) {
        let tmp = self.path.with_extension("tmp");
        let text = serde_json::to_vec_pretty(&self.costs).unwrap_or_default();
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

/// The middle one of several passes over copies of the matrix that no cache holds, each in bytes at the pace before it; of one matrix.
fn measure(stored: &Stored, pace: &Pace) -> Result<f64, FormatError> {
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
        let read = pace.take();
        let start = Instant::now();
        for linear in &all {
            linear.forward(black_box(x.view()), out.view_mut());
        }
        passes.push(start.elapsed().as_secs_f64() * read);
    }
    Ok(middle(&passes).unwrap_or(0.0) / all.len() as f64)
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
        let bytes = table.product(&stored).unwrap();
        assert!(bytes > 0.0 && bytes.is_finite());
        table.save();
        assert_eq!(CostTable::open(dir.path()).product(&stored).unwrap(), bytes);
        std::fs::write(dir.path().join("costs.json"), "{").unwrap();
        assert!(CostTable::open(dir.path()).costs.is_empty());
    }

    #[test]
    fn a_forecast_follows_the_pace_as_far_as_products_do() {
        let forecast = Forecast { products: 1e8, beside: 1e-3 };
        assert!((forecast.speed(2e10) - 1.0 / 6e-3).abs() < 1e-9);
        assert!((forecast.speed(4e10) - 1.0 / 3.5e-3).abs() < 1e-9);
    }
}

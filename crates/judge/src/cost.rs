//! This machine's cost table: how long it takes to multiply one row of activations with a matrix in each form. It grows as forms are met.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use lacuna_base::Mat;
use lacuna_format::{FormatError, Stored};
use lacuna_kernels::{Activations, Isa, Linear, Packing};

/// Bytes that are multiplied in turn, so that a matrix comes from memory and not from a cache, as in a model.
const STREAM_BYTES: u64 = 64 << 20;
/// Passes over them, of which the shortest counts.
const PASSES: usize = 5;

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
        let key = format!(
            "{} {}x{} {} bytes, {}, {} threads",
            stored.codec_name(),
            stored.rows,
            stored.cols,
            stored.bytes(),
            Isa::best().name(),
            lacuna_kernels::threads()
        );
        if let Some(&s) = self.seconds.get(&key) {
            return Ok(s);
        }
        let s = measure(stored)?;
        self.seconds.insert(key, s);
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

/// The shortest of several passes over copies of the matrix that no cache holds.
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
    let mut best = f64::INFINITY;
    for _ in 0..=PASSES {
        let start = Instant::now();
        for linear in &all {
            linear.forward(black_box(x.view()), out.view_mut());
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best / all.len() as f64)
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

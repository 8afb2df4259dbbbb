//! This machine's cost table: how long it takes to multiply one row of activations with a matrix in each form, and what
//! a token of a model takes beside its products. It grows as forms and models are met.
//!
//! On machines that others use too, speeds change by half within a minute. So a product is not kept in seconds but in
//! the bytes that plain 4-bit products read meanwhile, the two measured in turn, and a forecast names the pace that it
//! is for.
//!
//! A model that a cache holds is read from there, many times as fast as from memory. So all of it is measured at the
//! model's own [`Footprint`].

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lacuna_base::{Mat, unfinished};
use lacuna_checkpoint::Checkpoint;
use lacuna_format::{FormatError, Stored, Weights};
use lacuna_kernels::{Activations, Isa, Linear, Packing};
use lacuna_run::RunError;

use crate::footprint::Footprint;
use crate::gate::middle;
use crate::speed::{Hold, Pace, time_decode};

/// How long, and how often at least, they are passed over. The middle pass counts: a token's products meet the machine
/// as it is, not at its best.
const LONG: Duration = Duration::from_secs(3);
const PASSES: usize = 15;
/// Copies of one matrix at the most.
const MOST: usize = 4096;
/// Readings whose middle is the pace.
const READINGS: usize = 15;
/// Runs, and tokens of each, from which a model's time beside its products is taken.
const RUNS: usize = 20;
const TOKENS: usize = 24;

/// Costs by form and by model, kept in a file.
pub struct CostTable {
    path: PathBuf,
    costs: BTreeMap<String, f64>,
    pace: Option<(Footprint, Pace)>,
}

/// The products of a token of one model.
#[derive(Clone, Debug)]
pub struct Products<'a> {
    /// A matrix of each form, and how many such products there are.
    pub forms: Vec<(&'a Stored, f64)>,
    /// What one token after the other reads.
    pub footprint: Footprint,
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
    /// The table of the cache at `cache`, empty where there is none. A broken file is begun anew; what other kernels
    /// took is forgotten.
    pub fn open(cache: &Path) -> CostTable {
        let path = cache.join("costs.json");
        let costs: BTreeMap<String, f64> =
            std::fs::read(&path).ok().and_then(|t| serde_json::from_slice(&t).ok()).unwrap_or_default();
        let kernels = kernels();
        let costs = costs.into_iter().filter(|(key, _)| key.ends_with(&kernels)).collect();
        CostTable { path, costs, pace: None }
    }

    /// Bytes that plain 4-bit products read while one row goes through all of `p` with 8-bit activations, as `generate`
    /// runs it. What the table does not know is measured, all in turn, as a token meets them.
    pub fn products(&mut self, p: &Products<'_>) -> Result<f64, FormatError> {
        self.learn(&[p])?;
        Ok(p.forms.iter().map(|(stored, times)| self.costs[&key(stored, p.footprint)] * times).sum())
    }

    /// Measures those forms that the table does not know; of one footprint all in turn.
    pub fn learn(&mut self, all: &[&Products<'_>]) -> Result<(), FormatError> {
        for at in 0..all.len() {
            let footprint = all[at].footprint;
            let mut new: Vec<(String, &Stored, f64)> = Vec::new();
            for &(stored, times) in all[at..].iter().filter(|p| p.footprint == footprint).flat_map(|p| &p.forms) {
                let key = key(stored, footprint);
                if !self.costs.contains_key(&key) && new.iter().all(|n| n.0 != key) {
                    new.push((key, stored, times));
                }
            }
            if !new.is_empty() {
                let forms: Vec<(&Stored, f64)> = new.iter().map(|n| (n.1, n.2)).collect();
                let bytes = measure(&forms, footprint, self.held(footprint))?;
                self.costs.extend(new.into_iter().map(|n| n.0).zip(bytes));
            }
        }
        Ok(())
    }

    /// Seconds of one token beside its products (attention, norms, activations, whatever threads wait for), which
    /// `model` takes in any form: what it is timed at as it is, less the time of its products, `products` in bytes.
    /// Measured where the table does not know; the model is loaded for it.
    pub fn beside(&mut self, model: &Checkpoint, footprint: Footprint, products: f64) -> Result<f64, RunError> {
        let spec = model.spec();
        let (layers, hidden, vocab) = (spec.layers.len(), spec.hidden, spec.vocab);
        let key = here(format!("beside products, {layers} layers, {hidden} wide, {vocab} tokens"), footprint);
        let known = self.costs.get(&key).copied();
        // More than the products take is what a machine busy with other work gives, too: then it is asked again, and
        // the least that was ever seen stays.
        if let Some(s) = known
            && s * self.pace(footprint) <= products
        {
            return Ok(s);
        }
        let speed = time_decode(&[model], RUNS, TOKENS, Hold::Together, |_| ())?[0];
        let s = speed.map_or(0.0, |s| (1.0 / s.median - products / s.pace).max(0.0));
        let s = known.map_or(s, |k| if s > 0.0 { s.min(k) } else { k });
        // Nothing at all comes of a machine that was busier during the products: not worth keeping.
        if s > 0.0 {
            self.costs.insert(key, s);
        }
        Ok(s)
    }

    /// The pace of this moment at a footprint, bytes a second.
    pub fn pace(&mut self, footprint: Footprint) -> f64 {
        let pace = self.held(footprint);
        let read: Vec<f64> = (0..READINGS).map(|_| pace.take()).collect();
        middle(&read).unwrap_or(f64::INFINITY)
    }

    fn held(&mut self, footprint: Footprint) -> &Pace {
        let known = self.pace.take().filter(|(of, _)| *of == footprint);
        &self.pace.insert(known.unwrap_or_else(|| (footprint, Pace::new(footprint)))).1
    }

    /// Keeps what was measured. A table that cannot be written is measured again next time.
    pub fn save(&self) {
        let text = serde_json::to_vec_pretty(&self.costs).unwrap_or_default();
        if std::fs::create_dir_all(self.path.parent().unwrap_or(Path::new("."))).is_ok() {
            let _ = unfinished::write(&self.path, &text);
        }
    }
}

/// The name of a product.
fn key(stored: &Stored, footprint: Footprint) -> String {
    here(format!("{} {}x{} {} bytes", stored.codec_name(), stored.rows, stored.cols, stored.bytes()), footprint)
}

/// The name of what was measured with the kernels, the instruction set and the threads that are at work here.
fn here(what: String, footprint: Footprint) -> String {
    let (isa, threads) = (Isa::best().name(), lacuna_kernels::threads());
    format!("{what}, {footprint}, {isa}, {threads} threads{}", kernels())
}

/// How the names of all that was measured with these kernels end.
fn kernels() -> String {
    format!(", {}, kernels {}", env!("CARGO_PKG_VERSION"), lacuna_kernels::REVISION)
}

/// What one product of each form takes, in bytes at the pace before and after a pass: the middle of several passes over
/// copies of the matrices, as many of each as its share of a token's products, in turn, and together as many bytes as
/// the footprint.
fn measure(forms: &[(&Stored, f64)], footprint: Footprint, pace: &Pace) -> Result<Vec<f64>, FormatError> {
    let packing = Packing { activations: Activations::Int8, ..Packing::default() };
    let firsts = forms.iter().map(|f| Linear::pack_with(f.0, &packing)).collect::<Result<Vec<_>, _>>()?;
    let token: f64 = firsts.iter().zip(forms).map(|(l, f)| l.weights_bytes() as f64 * f.1).sum();
    let mut all = Vec::new();
    for (at, (first, &(stored, times))) in firsts.into_iter().zip(forms).enumerate() {
        let copies = ((times * footprint.bytes() as f64 / token.max(1.0)).ceil() as usize).clamp(1, MOST);
        // Spread over the pass: so far into it comes each.
        let when = |i: usize| (i as f64 + 0.5) / copies as f64;
        all.push((when(0), at, first));
        for i in 1..copies {
            all.push((when(i), at, Linear::pack_with(stored, &packing)?));
        }
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut ends: Vec<(Mat, Mat)> = forms
        .iter()
        .map(|(s, _)| (Mat::from_fn(1, s.cols, |_, c| (c * 17 % 101) as f32 / 50.0 - 1.0), Mat::zeros(1, s.rows)))
        .collect();
    let (begun, mut passes, mut read) = (Instant::now(), Vec::new(), pace.take());
    while passes.len() < PASSES || begun.elapsed() < LONG {
        let mut seconds = vec![0.0; forms.len()];
        // The pace's own matrices may have taken the place of these in a cache: the last pass counts.
        for _ in 0..footprint.passes() {
            seconds.fill(0.0);
            for (_, at, linear) in &all {
                let (x, out) = &mut ends[*at];
                let start = Instant::now();
                linear.forward(black_box(x.view()), out.view_mut());
                seconds[*at] += start.elapsed().as_secs_f64();
            }
        }
        let after = pace.take();
        let meanwhile = 2.0 / (1.0 / read + 1.0 / after);
        passes.push(seconds.into_iter().map(|s| s * meanwhile).collect::<Vec<f64>>());
        read = after;
    }
    let copies = |at| all.iter().filter(|l| l.1 == at).count() as f64;
    let middle = |at| middle(&passes.iter().map(|p| p[at]).collect::<Vec<f64>>()).unwrap_or(0.0);
    Ok((0..forms.len()).map(|at| middle(at) / copies(at)).collect())
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
        let products = |times: &[f64]| Products {
            forms: times.iter().map(|t| (&stored, *t)).collect(),
            footprint: Footprint::of(stored.bytes()),
        };
        let bytes = table.products(&products(&[1.0])).unwrap();
        assert!(bytes > 0.0 && bytes.is_finite());
        table.save();
        let mut again = CostTable::open(dir.path());
        assert_eq!(again.products(&products(&[2.0, 1.0])).unwrap(), 3.0 * bytes);
        assert!(again.pace.is_none(), "what is known is not measured");
        again.costs = again.costs.into_iter().map(|(key, cost)| (format!("{key}0"), cost)).collect();
        again.save();
        assert!(CostTable::open(dir.path()).costs.is_empty(), "other kernels' costs");
        std::fs::write(dir.path().join("costs.json"), "{").unwrap();
        assert!(CostTable::open(dir.path()).costs.is_empty());
    }

    #[test]
    fn any_number_is_read_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = CostTable::open(dir.path());
        let mut rng = lacuna_base::Rng::new(1);
        // Every exponent is as likely as any other; the failure that was seen came first.
        let bits = std::iter::once(68797.28453368829f64).chain(std::iter::from_fn(|| Some(f64::from_bits(rng.u64()))));
        table.costs = bits
            .filter(|x| x.is_finite())
            .take(20_000)
            .enumerate()
            .map(|(i, x)| (here(format!("{i}"), Footprint::of(1)), x))
            .collect();
        table.save();
        let read = CostTable::open(dir.path()).costs;
        assert_eq!(read.len(), table.costs.len());
        for (key, x) in &table.costs {
            assert_eq!(read[key].to_bits(), x.to_bits(), "{key}: {x} was read as {}", read[key]);
        }
    }

    #[test]
    fn a_forecast_follows_the_pace_as_far_as_products_do() {
        let forecast = Forecast { products: 1e8, beside: 1e-3 };
        assert!((forecast.speed(2e10) - 1.0 / 6e-3).abs() < 1e-9);
        assert!((forecast.speed(4e10) - 1.0 / 3.5e-3).abs() < 1e-9);
    }
}

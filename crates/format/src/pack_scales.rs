//! Scales written as floats, or as integers over a scale and a minimum of their own.

use half::f16;
use lacuna_base::Mat;

use crate::bits::pack;
use crate::{Float, FormatError, ScaleCodec, Scales};

use crate::pack::{FloatWriter, fail};

/// Writes scales.
pub fn pack_scales(s: &Mat, codec: ScaleCodec) -> Result<Scales, FormatError> {
    let float = |float| {
        let mut out = FloatWriter::new(float);
        match out.extend(s.data()) {
            Ok(()) => Ok(Scales::Float(float, out.bytes.into())),
            Err(i) => {
                let (v, r, g) = (s.data()[i], i / s.cols(), i % s.cols());
                fail(format!("scale of row {r}, group {g}: {v} is beyond {}", float.name()))
            }
        }
    };
    let (bits, per) = match codec {
        ScaleCodec::F32 => return float(Float::F32),
        ScaleCodec::F16 => return float(Float::F16),
        ScaleCodec::F8E4m3 => return float(Float::F8E4m3),
        ScaleCodec::F8E5m2 => return float(Float::F8E5m2),
        ScaleCodec::Int { bits, per } => (bits, per),
    };
    if !(2..=8).contains(&bits) || per == 0 {
        return fail(format!("scales of {bits} bits over runs of {per}"));
    }
    let top = (1u32 << bits) as f32 - 1.0;
    let (mut codes, mut scales, mut mins) = (Vec::new(), FloatWriter::new(Float::F16), FloatWriter::new(Float::F16));
    for r in 0..s.rows() {
        for run in s.row(r).chunks(per) {
            let low = run.iter().fold(f32::INFINITY, |a, &b| a.min(b));
            let high = run.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let (min, step) = nearest_grid(run, (low, (high - low) / top), top);
            if mins.extend(&[min]).is_err() || scales.extend(&[step]).is_err() {
                return fail(format!("scales of row {r}, {low} to {high}, are beyond f16"));
            }
            codes.extend(run.iter().map(|&v| grid_code(v, (min, step), top)));
        }
    }
    Ok(Scales::Int {
        bits,
        per,
        codes: pack(&codes, bits).into(),
        super_scales: scales.bytes.into(),
        super_mins: Some(mins.bytes.into()),
    })
}

/// Writes numbers as integers of `bits` bits times an f16 for every `per` of a row, without minima: least squares, from
/// the number of largest magnitude on. Those of the other sign become 0.
pub fn pack_multiples(s: &Mat, bits: u8, per: usize) -> Result<Scales, FormatError> {
    if !(2..=8).contains(&bits) || per == 0 {
        return fail(format!("scales of {bits} bits over runs of {per}"));
    }
    let top = (1u32 << bits) as f32 - 1.0;
    let (mut codes, mut steps) = (Vec::new(), FloatWriter::new(Float::F16));
    for r in 0..s.rows() {
        for run in s.row(r).chunks(per) {
            let extreme = run.iter().fold(0.0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
            let step = nearest_step(run, extreme / top, top);
            if steps.extend(&[step]).is_err() {
                return fail(format!("scales of row {r}, {extreme} the largest, are beyond f16"));
            }
            codes.extend(run.iter().map(|&v| grid_code(v, (0.0, step), top)));
        }
    }
    Ok(Scales::Int { bits, per, codes: pack(&codes, bits).into(), super_scales: steps.bytes.into(), super_mins: None })
}

/// As [`nearest_grid`] where the minimum is 0.
fn nearest_step(run: &[f32], first: f32, top: f32) -> f32 {
    let half = |step: f64| f16::from_f64(step).to_f32();
    let lost = |step: f32| -> f64 {
        let far = |v: &f32| f64::from(step * f32::from(grid_code(*v, (0.0, step), top))) - f64::from(*v);
        run.iter().map(|v| far(v).powi(2)).sum()
    };
    let mut best = half(first.into());
    let mut least = lost(best);
    for _ in 0..8 {
        let (mut xx, mut xy) = (0.0, 0.0);
        for &v in run {
            let c = f64::from(grid_code(v, (0.0, best), top));
            (xx, xy) = (xx + c * c, xy + c * f64::from(v));
        }
        let next = if xx > 0.0 { half(xy / xx) } else { best };
        let error = lost(next);
        if error.is_nan() || error >= least {
            break;
        }
        (best, least) = (next, error);
    }
    best
}

/// The nearest code from 0 to `top` of a value on a grid of `min + step * code`.
fn grid_code(v: f32, (min, step): (f32, f32), top: f32) -> u8 {
    if step == 0.0 { 0 } else { ((v - min) / step).round().clamp(0.0, top) as u8 }
}

/// A grid, minimum and step as f16 has them, on which `run` has least square error of those met: from the first on, by
/// turns the nearest codes and the grid of least squares for these codes, as long as that helps.
fn nearest_grid(run: &[f32], first: (f32, f32), top: f32) -> (f32, f32) {
    let half = |(min, step): (f64, f64)| (f16::from_f64(min).to_f32(), f16::from_f64(step).to_f32());
    let lost = |grid: (f32, f32)| -> f64 {
        let far = |v: &f32| f64::from(grid.1 * f32::from(grid_code(*v, grid, top)) + grid.0) - f64::from(*v);
        run.iter().map(|v| far(v).powi(2)).sum()
    };
    let mut best = half((first.0.into(), first.1.into()));
    let mut least = lost(best);
    let n = run.len() as f64;
    for _ in 0..8 {
        let (mut x, mut y, mut xx, mut xy) = (0.0, 0.0, 0.0, 0.0);
        for &v in run {
            let (c, v) = (f64::from(grid_code(v, best, top)), f64::from(v));
            (x, y, xx, xy) = (x + c, y + v, xx + c * c, xy + c * v);
        }
        let spread = n * xx - x * x;
        if spread <= 0.0 {
            break;
        }
        let step = (n * xy - x * y) / spread;
        let next = half(((y - step * x) / n, step));
        let now = lost(next);
        // What f16 cannot say loses more than anything, or is no number.
        if now >= least || now.is_nan() {
            break;
        }
        (best, least) = (next, now);
    }
    best
}

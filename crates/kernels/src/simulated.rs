//! Activations rounded to a number format and multiplied as if they were exact: what a format costs, also where no
//! kernel multiplies in it.

/// A number format of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Simulated {
    /// Signed bytes, 32 columns sharing a scale, by the very rule of the kernels that multiply so.
    Int8,
    /// Whole numbers of -7 to 7, 32 columns sharing a scale in f32.
    Int4,
    /// Four bits of exponent and three of fraction, up to 448; a row shares a scale in f32.
    Fp8E4m3,
    /// Five bits of exponent and two of fraction, up to 57344; a row shares a scale in f32.
    Fp8E5m2,
    /// Two bits of exponent and one of fraction, up to 6; 32 columns share a scale in f32.
    Fp4,
    /// The same with a power of two as the scale of 32 columns (OCX microscaling).
    Mxfp4,
    /// The same with a scale of 8 bits (E4M3) for 16 columns, and one in f32 for a row.
    Nvfp4,
}

impl Simulated {
    /// Every format.
    pub const ALL: [Simulated; 7] = [
        Simulated::Int8,
        Simulated::Int4,
        Simulated::Fp8E4m3,
        Simulated::Fp8E5m2,
        Simulated::Fp4,
        Simulated::Mxfp4,
        Simulated::Nvfp4,
    ];

    /// Rounds one row, in place. It depends on nothing else. A block with a NaN or an infinity becomes NaN.
    pub fn round(self, row: &mut [f32]) {
        match self {
            Simulated::Int8 => row.chunks_mut(32).for_each(int8),
            Simulated::Int4 => row.chunks_mut(32).for_each(|b| {
                let scale = top(b) / 7.0;
                scaled(b, scale, f32::round_ties_even);
            }),
            Simulated::Fp8E4m3 => {
                let scale = top(row) / 448.0;
                scaled(row, scale, e4m3);
            }
            Simulated::Fp8E5m2 => {
                let scale = top(row) / 57344.0;
                scaled(row, scale, |x| small(x, -14, 2, 57344.0));
            }
            Simulated::Fp4 => row.chunks_mut(32).for_each(|b| {
                let scale = top(b) / 6.0;
                scaled(b, scale, e2m1);
            }),
            Simulated::Mxfp4 => row.chunks_mut(32).for_each(|b| {
                // The largest power of two of the format is 4.
                let top = top(b);
                let scale = if top.is_nan() { top } else { power(exponent(top) - 2) };
                scaled(b, scale, e2m1);
            }),
            Simulated::Nvfp4 => {
                let whole = top(row) / (6.0 * 448.0);
                if whole == 0.0 {
                    return row.fill(0.0);
                }
                row.chunks_mut(16).for_each(|b| {
                    let scale = e4m3(top(b) / 6.0 / whole) * whole;
                    scaled(b, scale, e2m1);
                });
            }
        }
    }
}

/// The largest magnitude; NaN where one is no finite number.
fn top(x: &[f32]) -> f32 {
    // `max` would forget a NaN.
    x.iter().fold(0.0f32, |t, v| if v.is_finite() && !t.is_nan() { t.max(v.abs()) } else { f32::NAN })
}

/// `round(x / scale) · scale`; zeros where the scale is 0.
fn scaled(x: &mut [f32], scale: f32, round: impl Fn(f32) -> f32) {
    if scale == 0.0 {
        return x.fill(0.0);
    }
    x.iter_mut().for_each(|v| *v = round(*v / scale) * scale);
}

/// The power of two at or below a magnitude, as a number of f32's range.
fn exponent(x: f32) -> i32 {
    (x.to_bits() >> 23 & 255) as i32 - 127
}

fn power(exponent: i32) -> f32 {
    f32::from_bits(((exponent.clamp(-126, 127) + 127) as u32) << 23)
}

/// To the nearest of a small float, ties to even: `least` is the exponent of its smallest normal numbers, below which
/// steps stay as they are.
fn small(x: f32, least: i32, fraction: i32, largest: f32) -> f32 {
    let step = power(exponent(x).max(least) - fraction);
    ((x / step).round_ties_even() * step).clamp(-largest, largest)
}

fn e4m3(x: f32) -> f32 {
    small(x, -6, 3, 448.0)
}

fn e2m1(x: f32) -> f32 {
    small(x, 0, 1, 6.0)
}

/// A block by the rule of `op::quantize`: 16-bit words first, of these codes under the level of 127 to 124 that loses
/// least, then the scale that suits the codes best.
fn int8(block: &mut [f32]) {
    let top = top(block);
    if top.is_nan() {
        return block.fill(f32::NAN);
    }
    if top < 1e-30 {
        return block.fill(0.0);
    }
    let words: Vec<i64> = block.iter().map(|v| (v * (32767.0 / top)).round_ties_even() as i64).collect();
    // A code, and what rounding takes off it in 2^-16 of a step.
    let code = |w: i64, level: i64| (2 * w * level + (1 << 15)).div_euclid(1 << 16);
    let rest = |w: i64, level: i64| 2 * w * level - (code(w, level) << 16);
    // In 512ths of a step, squared.
    let lost = |level: i64| {
        let all: i64 = words.iter().map(|w| rest(*w, level).div_euclid(1 << 7).pow(2)).sum();
        all as f32 * (1.0 / (level * level) as f32)
    };
    let level = [127, 126, 125, 124].into_iter().reduce(|best, l| if lost(l) < lost(best) { l } else { best });
    let level = level.unwrap_or(127);
    let squares: i64 = words.iter().map(|w| code(*w, level).pow(2)).sum();
    // In 4096ths.
    let rests: i64 = words.iter().map(|w| rest(*w, level).div_euclid(1 << 4) * code(*w, level)).sum();
    let step = top / (level as f32 * (32767.0 / 32768.0));
    let scale = step * (1.0 + rests as f32 / squares as f32 / 4096.0);
    block.iter_mut().zip(&words).for_each(|(v, w)| *v = code(*w, level) as f32 * scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All numbers of a small float that are not negative, with the last bit of each, from its bits.
    fn values(least: i32, fraction: i32, largest: f32) -> Vec<(f32, u32)> {
        let mut all = Vec::new();
        for bits in 0u32.. {
            let (e, f) = ((bits >> fraction) as i32, (bits & ((1 << fraction) - 1)) as f32 / (1 << fraction) as f32);
            let value = if e == 0 { f * 2f32.powi(least) } else { (1.0 + f) * 2f32.powi(least + e - 1) };
            if value > largest {
                return all;
            }
            all.push((value, bits & 1));
        }
        all
    }

    #[test]
    fn small_floats_round_to_the_nearest_of_their_values() {
        for (least, fraction, largest) in [(-6, 3, 448.0), (-14, 2, 57344.0), (0, 1, 6.0)] {
            let all = values(least, fraction, largest);
            let mut tries: Vec<f32> = all.iter().map(|v| v.0).collect();
            // Middles are ties.
            tries.extend(all.windows(2).map(|w| (w[0].0 + w[1].0) / 2.0));
            tries.extend(all.windows(2).flat_map(|w| [0.1, 0.49, 0.51, 0.9].map(|t| w[0].0 + t * (w[1].0 - w[0].0))));
            tries.extend([largest * 1.2, largest * 9.0]);
            for x in tries {
                let near = all.iter().min_by(|a, b| ((a.0 - x).abs()).total_cmp(&(b.0 - x).abs()).then(a.1.cmp(&b.1)));
                let want = near.expect("some").0;
                assert_eq!(small(x, least, fraction, largest), want, "{x} of {least} {fraction}");
                assert_eq!(small(-x, least, fraction, largest), -want);
            }
        }
    }

    #[test]
    fn blocks_share_scales_and_nothing_else() {
        let row: Vec<f32> = (0..80).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.037f32.powi(i / 32)).collect();
        for format in Simulated::ALL {
            let mut all = row.clone();
            format.round(&mut all);
            // A byte is off by half a step of a 124th, its scale by a little more.
            let step = if format == Simulated::Int8 { 62.0 } else { 1.0 };
            for (b, (block, from)) in all.chunks(16).zip(row.chunks(16)).enumerate() {
                let (most, whole) = (top(from), top(&row));
                // Half a step of the coarsest format lies within a quarter of the largest of the block, or of the row where
                // that shares the scale.
                let room = match format {
                    Simulated::Fp8E4m3 | Simulated::Fp8E5m2 => most * 0.13 + whole / 57344.0,
                    Simulated::Int8 | Simulated::Int4 | Simulated::Fp4 | Simulated::Mxfp4 => {
                        top(&row[b / 2 * 32..row.len().min(b / 2 * 32 + 32)]) * 0.26 / step
                    }
                    Simulated::Nvfp4 => most * 0.26 + whole / 448.0 / 64.0,
                };
                for (x, y) in from.iter().zip(block) {
                    assert!((x - y).abs() <= room, "{format:?}: {x} became {y}");
                }
            }
            let mut again = all.clone();
            format.round(&mut again);
            if format != Simulated::Int8 && format != Simulated::Nvfp4 {
                let near = all.iter().zip(&again).all(|(a, b)| (a - b).abs() <= 1e-5 * a.abs());
                assert!(near, "{format:?}: what is rounded stays: {all:?} {again:?}");
            }
            let mut nothing = vec![0.0; 40];
            format.round(&mut nothing);
            assert!(nothing.iter().all(|x| *x == 0.0), "{format:?}: {nothing:?}");
            let mut broken = row.clone();
            broken[3] = f32::NAN;
            format.round(&mut broken);
            assert!(broken[..16].iter().all(|x| x.is_nan()), "{format:?}");
        }
    }
}

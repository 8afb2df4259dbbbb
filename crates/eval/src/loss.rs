//! What a row of logits says: the negative log likelihood of a token, the divergence of two rows, the likeliest token.

/// `exp(x)` for `x` in `[-87, 0]`, within 2 units in the last place; smaller values count as -87. Plain arithmetic that
/// the compiler turns into vector instructions: a vocabulary of 262144 at every position is most of an evaluation's
/// work after the network itself.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest whole number in the low bits
    let x = x.max(-87.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits((n as i32 + 127).cast_unsigned() << 23)
}

fn max(row: &[f32]) -> f32 {
    row.iter().fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// Values summed in f32 before the sum goes on in f64.
const BLOCK: usize = 64;

/// `sum exp(x - max)`.
fn exp_sum(row: &[f32], max: f32) -> f64 {
    let lanes = |block: &[f32]| {
        let mut s = [0.0f32; 8];
        let eights = block.chunks_exact(8);
        let rest: f32 = eights.remainder().iter().map(|&x| exp(x - max)).sum();
        for eight in eights {
            s.iter_mut().zip(eight).for_each(|(s, &x)| *s += exp(x - max));
        }
        f64::from(rest) + s.iter().map(|&s| f64::from(s)).sum::<f64>()
    };
    row.chunks(BLOCK).map(lanes).sum()
}

/// The logarithm of the sum of the exponentials of a row.
pub fn log_sum_exp(row: &[f32]) -> f64 {
    let m = max(row);
    f64::from(m) + exp_sum(row, m).ln()
}

/// Negative log likelihood of `target`, in nats. Not a number where the logits are not.
pub fn nll(row: &[f32], target: u32) -> f64 {
    if row.iter().any(|x| x.is_nan()) {
        return f64::NAN;
    }
    log_sum_exp(row) - f64::from(row[target as usize])
}

/// KL(p || q) in nats, of the distributions that two rows of logits stand for. Equal rows give exactly 0.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    assert_eq!(p.len(), q.len(), "two vocabularies");
    if p.iter().chain(q).any(|x| x.is_nan()) {
        return f64::NAN;
    }
    let m = max(p);
    let mut moment = 0.0;
    for (p, q) in p.chunks(BLOCK).zip(q.chunks(BLOCK)) {
        let mut s = [0.0f64; 8];
        for (p, q) in p.chunks(8).zip(q.chunks(8)) {
            for ((s, &x), &y) in s.iter_mut().zip(p).zip(q) {
                *s += f64::from(exp(x - m)) * (f64::from(x) - f64::from(y));
            }
        }
        moment += s.iter().sum::<f64>();
    }
    // The exponentials round; a true divergence is never below 0.
    (moment / exp_sum(p, m) - log_sum_exp(p) + log_sum_exp(q)).max(0.0)
}

/// The index of the largest value, the first of equals; 0 for a row of nothing but NaN.
pub fn argmax(row: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, &x) in row.iter().enumerate() {
        if x > best.0 {
            best = (x, i as u32);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_base::Rng;

    fn brute(row: &[f32]) -> f64 {
        let m = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
        m + row.iter().map(|&x| (f64::from(x) - m).exp()).sum::<f64>().ln()
    }

    #[test]
    fn exponential_is_exact_to_its_last_places() {
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 2.5e-7 * want, "exp({x})");
        }
        assert!(exp(-1e9) < 1.7e-38 && exp(f32::NEG_INFINITY) < 1.7e-38);
    }

    #[test]
    fn agrees_with_the_definition() {
        let mut rng = Rng::new(1);
        for n in [1, 2, 7, 8, 63, 64, 65, 1000, 50_000] {
            let p: Vec<f32> = (0..n).map(|_| rng.normal() * 5.0 + 3.0).collect();
            let q: Vec<f32> = p.iter().map(|x| x + rng.normal() * 0.3 - 2.0).collect();
            let (zp, zq) = (brute(&p), brute(&q));
            assert!((log_sum_exp(&p) - zp).abs() < 1e-6);
            let t = rng.below(n) as u32;
            assert!((nll(&p, t) - (zp - f64::from(p[t as usize]))).abs() < 1e-6);
            let want: f64 = p
                .iter()
                .zip(&q)
                .map(|(&x, &y)| (f64::from(x) - zp).exp() * ((f64::from(x) - zp) - (f64::from(y) - zq)))
                .sum();
            assert!((kl(&p, &q) - want).abs() < 1e-6 && kl(&p, &p) == 0.0, "{} {want}", kl(&p, &q));
        }
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert!(nll(&[0.0, f32::NAN], 0).is_nan());
    }
}

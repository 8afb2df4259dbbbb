//! The gate: does an omission pay? A pure function of measurements.

use serde::{Deserialize, Serialize};

/// One model, measured on held-out text and, if asked, on the clock.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// What people call it: `int4 g32`, `f16`, `source`.
    pub name: String,
    /// Bytes of its weights.
    pub bytes: u64,
    /// Held-out loss, nats a token of the source.
    pub loss: f64,
    /// The same in nats a byte of the text, where models of different vocabularies are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nats_a_byte: Option<f64>,
    /// `exp(loss)`.
    pub ppl: f64,
    /// KL(source || it), nats a token, where it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Decode speed, where it was timed.
    pub speed: Option<Speed>,
}

/// Decode speed over alternating runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Tokens a second.
    pub median: f64,
    /// Largest minus smallest, over the median.
    pub spread: f64,
    /// Bytes a second that plain 4-bit products read between each run's tokens, the middle run: how fast the machine
    /// was.
    pub pace: f64,
}

impl Speed {
    /// The median and spread of runs, and of the pace during each; `None` of no runs.
    pub fn of(runs: &[f64], paces: &[f64]) -> Option<Speed> {
        let v = sorted(runs);
        let (low, high, median) = (v.first()?, v.last()?, middle(runs)?);
        Some(Speed { median, spread: (high - low) / median, pace: middle(paces).unwrap_or(0.0) })
    }
}

fn sorted(x: &[f64]) -> Vec<f64> {
    let mut v: Vec<f64> = x.iter().copied().filter(|x| x.is_finite()).collect();
    v.sort_by(f64::total_cmp);
    v
}

/// The median of what is finite.
pub(crate) fn middle(x: &[f64]) -> Option<f64> {
    let v = sorted(x);
    let upper = *v.get(v.len() / 2)?;
    Some(if v.len() % 2 == 1 { upper } else { (v[v.len() / 2 - 1] + upper) / 2.0 })
}

/// What counts as no worse in loss, nats a token.
pub const LOSS_SLACK: f64 = 0.01;
/// Smaller by this much counts.
const SMALLER: f64 = 0.03;
/// Faster by this much counts.
const FASTER: f64 = 0.05;
/// Worse by this much in the other is borne.
const BORNE: f64 = 0.01;

/// The comparison with one baseline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Against {
    /// The baseline.
    pub baseline: Measured,
    /// Whether it competes: its loss is no more than 0.01 nat above the result's.
    pub competes: bool,
    /// Whether the result beats it, where it competes.
    pub beaten: bool,
    /// Why or why not, in words.
    pub why: String,
}

/// The verdict and its grounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether the result beats every baseline that competes.
    pub pays: bool,
    /// Baseline by baseline.
    pub against: Vec<Against>,
}

/// Judges `result` by the rule of the house: against every baseline whose loss is no more than 0.01 nat above its own
/// it must be at least 3% smaller or 5% faster, and no more than 1% worse in the other. A difference in speed within
/// the measured spread is no difference. Where speeds were not taken, bytes alone count. A loss that is no number never
/// pays.
pub fn judge(result: &Measured, baselines: &[Measured]) -> Verdict {
    let against: Vec<Against> = baselines.iter().map(|b| compare(result, b)).collect();
    let pays = result.loss.is_finite() && against.iter().all(|a| !a.competes || a.beaten);
    Verdict { pays, against }
}

/// How much more a baseline loses than the result, nats a token of the source: by the byte where both say that.
fn gap(result: &Measured, b: &Measured) -> f64 {
    match (result.nats_a_byte, b.nats_a_byte) {
        (Some(mine), Some(theirs)) if theirs > 0.0 => (theirs - mine) * b.loss / theirs,
        _ => b.loss - result.loss,
    }
}

/// Whether a baseline competes with a result: its loss is no more than [`LOSS_SLACK`] above.
pub fn competes(result: &Measured, b: &Measured) -> bool {
    // A result whose loss is no number is worse than nobody, so everybody competes with it.
    let worse = gap(result, b) > LOSS_SLACK;
    b.loss.is_finite() && !worse
}

fn compare(result: &Measured, b: &Measured) -> Against {
    let competes = competes(result, b);
    let smaller = 1.0 - result.bytes as f64 / b.bytes.max(1) as f64;
    let faster = match (result.speed, b.speed) {
        (Some(r), Some(o)) => {
            let gain = r.median / o.median - 1.0;
            if gain.abs() <= r.spread.max(o.spread) / 2.0 { Some(0.0) } else { Some(gain) }
        }
        _ => None,
    };
    let beaten = match faster {
        None => smaller >= SMALLER,
        Some(f) => (smaller >= SMALLER && f >= -BORNE) || (f >= FASTER && smaller >= -BORNE),
    };
    let size = if smaller >= 0.0 {
        format!("{:.1}% smaller", 100.0 * smaller)
    } else {
        format!("{:.1}% larger", -100.0 * smaller)
    };
    let speed = match faster {
        None => String::new(),
        Some(0.0) => ", as fast".into(),
        Some(f) if f > 0.0 => format!(", {:.0}% faster", 100.0 * f),
        Some(f) => format!(", {:.0}% slower", -100.0 * f),
    };
    let why = match (competes, beaten) {
        (false, _) => format!("loses {:.3} nat more; does not compete", gap(result, b)),
        (true, true) => format!("beaten: {size}{speed}"),
        (true, false) => format!("not beaten: {size}{speed}"),
    };
    Against { baseline: b.clone(), competes, beaten: competes && beaten, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn m(name: &str, bytes: u64, loss: f64, speed: Option<f64>) -> Measured {
        let speed = speed.map(|median| Speed { median, spread: 0.01, pace: 3e10 });
        Measured { name: name.into(), bytes, loss, nats_a_byte: None, ppl: loss.exp(), kl: None, speed }
    }

    #[test]
    fn f16_itself_does_not_pay() {
        let f16 = m("f16", 200, 3.0, Some(50.0));
        assert!(!judge(&f16, &[f16.clone(), m("int8", 110, 3.001, Some(90.0))]).pays);
    }

    #[test]
    fn a_bad_model_loses_to_a_better_one_of_its_size() {
        let bad = m("2-bit", 40, 7.0, Some(200.0));
        let v = judge(&bad, &[m("int4", 60, 3.1, Some(150.0)), m("int3", 50, 3.5, Some(170.0))]);
        assert!(v.pays, "smaller than all that are better is a payment in bytes: {v:?}");
        assert!(!judge(&bad, &[m("int3", 41, 3.5, Some(201.0))]).pays);
    }

    #[test]
    fn baselines_that_lose_more_do_not_compete() {
        let v = judge(&m("r", 60, 3.0, None), &[m("int3", 50, 3.02, None), m("int4", 62, 3.005, None)]);
        assert!(!v.against[0].competes && v.against[1].competes && v.against[1].beaten && v.pays);
    }

    #[test]
    fn a_difference_within_the_spread_is_none() {
        let mut r = m("r", 100, 3.0, Some(105.6));
        let b = m("b", 100, 3.0, Some(100.0));
        assert!(judge(&r, std::slice::from_ref(&b)).pays);
        r.speed = Some(Speed { median: 105.6, spread: 0.2, pace: 3e10 });
        assert!(!judge(&r, &[b]).pays);
    }

    #[test]
    fn other_vocabularies_are_compared_by_the_byte() {
        let at = |name: &str, bytes, loss: f64, by| Measured { nats_a_byte: Some(by), ..m(name, bytes, loss, None) };
        // Four bytes a token of the source. The result's own tokens are shorter, and its loss a token says nothing.
        let b = at("int8", 100, 3.0, 0.75);
        assert!(competes(&at("r", 90, 9.0, 0.7501), &b) && competes(&at("r", 90, 1.0, 0.7476), &b));
        assert!(!competes(&at("r", 90, 9.0, 0.7474), &b));
        let v = judge(&at("r", 90, 9.0, 0.74), std::slice::from_ref(&b));
        assert!(v.pays && v.against[0].why.contains("0.040 nat more"), "{}", v.against[0].why);
        assert!(!judge(&at("r", 99, 1.0, 0.76), std::slice::from_ref(&b)).pays);
        // Where one side does not say, tokens count.
        assert!(!competes(&m("r", 90, 2.9, None), &b));
    }

    #[test]
    fn no_number_never_pays() {
        assert!(!judge(&m("r", 1, f64::NAN, None), &[]).pays);
        assert!(!judge(&m("r", 1, f64::NAN, None), &[m("b", 100, 3.0, None)]).pays);
    }

    #[test]
    fn medians() {
        let s = Speed::of(&[3.0, 1.0, 2.0], &[5.0, 7.0]).unwrap();
        assert_eq!((s.median, s.spread), (2.0, 1.0));
        assert!(Speed::of(&[], &[1.0]).is_none());
    }
}

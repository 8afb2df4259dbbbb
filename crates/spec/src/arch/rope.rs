//! RoPE in config.json: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`, possibly one for
//! each type of layer.

use serde_json::{Map, Value, json};

use super::config::{Config, bad, num};
use crate::spec::{Rope, RopeScaling, RopeStyle, SpecError};

/// Keys that are read, or that say nothing about the result.
const KEYS: &[&str] = &[
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    "partial_rotary_factor",
    "finetuned",
];

/// Most channels for which a list of factors is accepted.
pub(super) const MAX_LISTED: usize = 4096;

/// RoPE of the layers of type `kind` (`None`: of all layers).
pub(super) fn from_config(c: &Config, head_dim: usize, kind: Option<&str>) -> Result<Rope, SpecError> {
    let empty = json!({});
    let (mut o, new) = match (c.get("rope_parameters"), c.get("rope_scaling")) {
        (Some(p), _) => (p, true),
        (None, Some(s)) => (s, false),
        (None, None) => (&empty, false),
    };
    if new && ["full_attention", "sliding_attention"].iter().any(|k| o.get(k).is_some()) {
        let Some(k) = kind else { return bad("rope_parameters differ by type of layer, which this family does not") };
        o = match o.get(k) {
            Some(p) => p,
            None => return bad(format!("rope_parameters has no {k}")),
        };
    }
    let Some(keys) = o.as_object() else { return bad(format!("rope_scaling is {o}, not an object")) };
    if let Some(key) = keys.keys().find(|k| !KEYS.contains(&k.as_str())) {
        return bad(format!("rope_scaling has {key}, which Lacuna does not know"));
    }
    let o = Config(o);
    let theta = match o.opt_f32("rope_theta")? {
        Some(t) => t,
        None => c.f64_or("rope_theta", 10000.0)? as f32,
    };
    let part = match o.opt_f64("partial_rotary_factor")? {
        Some(p) => p,
        None => c.f64_or("partial_rotary_factor", 1.0)?,
    };
    let dims = (head_dim as f64 * part) as usize;
    // Before the lists are repeated for each layer: a hostile file must not turn megabytes into gigabytes.
    for key in ["short_factor", "long_factor"] {
        match o.get(key).and_then(Value::as_array) {
            Some(list) if list.len() != dims / 2 || dims > MAX_LISTED => {
                return bad(format!("{key} has {} factors for {dims} channels", list.len()));
            }
            _ => {}
        }
    }
    Ok(Rope { theta, dims, style: RopeStyle::Half, scaling: scaling(c, &o)? })
}

fn scaling(c: &Config, o: &Config) -> Result<RopeScaling, SpecError> {
    let kind = match o.opt_str("rope_type")? {
        Some(k) => Some(k),
        None => o.opt_str("type")?,
    };
    let must = |key: &str| o.opt_f32(key)?.map_or_else(|| bad(format!("rope_scaling.{key} is missing")), Ok);
    let context = c.usize("max_position_embeddings")?;
    let original = || Ok(o.opt_usize("original_max_position_embeddings")?.unwrap_or(context));
    let lists = o.get("short_factor").is_some() && o.get("long_factor").is_some();
    match kind {
        None if o.get("factor").is_some() => bad("rope_scaling has a factor but no rope_type"),
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: must("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: must("factor")?,
            low_freq_factor: must("low_freq_factor")?,
            high_freq_factor: must("high_freq_factor")?,
            original: original()?,
        }),
        // Early Phi-3 files call longrope "su" or even "yarn".
        Some("longrope" | "su" | "yarn") if lists => {
            // A context before stretching that stands outside gives the stretch itself and wins over `factor`.
            let outside = c.opt_usize("original_max_position_embeddings")?;
            let original = outside.map_or_else(original, Ok)?;
            let factor = match (outside, o.opt_f64("factor")?) {
                (None, Some(f)) => f,
                _ => context as f64 / original as f64,
            };
            let attention_factor = match o.opt_f32("attention_factor")? {
                Some(f) => f,
                None => longrope_attention(factor, original),
            };
            let (short, long) = (o.f32s("short_factor")?, o.f32s("long_factor")?);
            Ok(RopeScaling::Longrope { short, long, attention_factor, original })
        }
        Some("yarn") => {
            let original: usize = original()?;
            let factor = o.f64_or("factor", context as f64 / original as f64)?;
            let attention_factor = match o.opt_f32("attention_factor")? {
                Some(f) => f,
                None => match (o.opt_f64("mscale")?, o.opt_f64("mscale_all_dim")?) {
                    (Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                        (yarn_attention(factor, m) / yarn_attention(factor, all)) as f32
                    }
                    _ => yarn_attention(factor, 1.0) as f32,
                },
            };
            Ok(RopeScaling::Yarn {
                factor: factor as f32,
                beta_fast: o.f64_or("beta_fast", 32.0)? as f32,
                beta_slow: o.f64_or("beta_slow", 1.0)? as f32,
                attention_factor,
                original,
                truncate: o.bool_or("truncate", true)?,
            })
        }
        Some(other) => bad(format!(
            "rope_type is \"{other}\"; supported are default, linear, llama3, yarn and longrope (with its two lists)"
        )),
    }
}

fn yarn_attention(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

fn longrope_attention(factor: f64, original: usize) -> f32 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() as f32 }
}

/// The divisor of each channel pair under llama3 scaling, as GGUF files list them; `None` under any other.
pub(super) fn llama3_factors(rope: &Rope) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } = &rope.scaling else {
        return None;
    };
    let (factor, low, high) = (f64::from(*factor), f64::from(*low_freq_factor), f64::from(*high_freq_factor));
    let one = |i: usize| {
        let turns = f64::from(rope.theta).powf(-2.0 * i as f64 / rope.dims as f64) / std::f64::consts::TAU;
        // Rotations within the context before stretching: few of them mean a low frequency.
        let rotations = *original as f64 * turns;
        if rotations < low {
            factor
        } else if rotations > high {
            1.0
        } else {
            let kept = (rotations - low) / (high - low);
            1.0 / ((1.0 - kept) / factor + kept)
        }
    };
    Some((0..rope.dims / 2).map(|i| one(i) as f32).collect())
}

/// The llama3 scaling behind a list of divisors, with the constants that every published model has; `None` where it is none.
pub(super) fn llama3_of_factors(factors: &[f32], theta: f32, dims: usize) -> Option<RopeScaling> {
    let factor = factors.iter().copied().fold(1.0, f32::max);
    (5..=20).map(|n| 1usize << n).find_map(|original| {
        let scaling = RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original };
        let rope = Rope { theta, dims, style: RopeStyle::Half, scaling };
        let again = llama3_factors(&rope)?;
        let same =
            again.len() == factors.len() && again.iter().zip(factors).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs());
        same.then_some(rope.scaling)
    })
}

/// Writes `rope_theta` and `rope_scaling`, which every transformers reads.
pub(super) fn to_config(
    rope: &Rope,
    head_dim: usize,
    context: usize,
    out: &mut Map<String, Value>,
) -> Result<(), SpecError> {
    if rope.style != RopeStyle::Half {
        let what = "RoPE pairs neighbouring channels (GGUF's order of rows); the rows of q and k must be brought into halves first";
        return Err(SpecError { what: what.into() });
    }
    out.insert("rope_theta".into(), num(rope.theta));
    if rope.dims != head_dim {
        out.insert("partial_rotary_factor".into(), json!(rope.dims as f64 / head_dim as f64));
    }
    let mut o = Map::new();
    let mut set = |key: &str, v: Value| o.insert(key.into(), v);
    match &rope.scaling {
        RopeScaling::Default => return Ok(()),
        RopeScaling::Linear { factor } => {
            set("rope_type", json!("linear"));
            set("factor", num(*factor));
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
            set("rope_type", json!("llama3"));
            set("factor", num(*factor));
            set("low_freq_factor", num(*low_freq_factor));
            set("high_freq_factor", num(*high_freq_factor));
            set("original_max_position_embeddings", json!(original));
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original, truncate } => {
            set("rope_type", json!("yarn"));
            set("factor", num(*factor));
            set("beta_fast", num(*beta_fast));
            set("beta_slow", num(*beta_slow));
            if *attention_factor != yarn_attention((*factor).into(), 1.0) as f32 {
                set("attention_factor", num(*attention_factor));
            }
            set("original_max_position_embeddings", json!(original));
            if !truncate {
                set("truncate", json!(false));
            }
        }
        RopeScaling::Longrope { short, long, attention_factor, original } => {
            // `type` and not `rope_type`: Phi-3's own check wants exactly these three keys.
            set("type", json!("longrope"));
            set("short_factor", short.iter().map(|x| num(*x)).collect());
            set("long_factor", long.iter().map(|x| num(*x)).collect());
            if *attention_factor != longrope_attention(context as f64 / *original as f64, *original) {
                set("attention_factor", num(*attention_factor));
            }
            out.insert("original_max_position_embeddings".into(), json!(original));
        }
        RopeScaling::Factors { .. } => {
            let what = "RoPE has a list of factors as GGUF files carry, which no config.json can say";
            return Err(SpecError { what: what.into() });
        }
    }
    out.insert("rope_scaling".into(), Value::Object(o));
    Ok(())
}

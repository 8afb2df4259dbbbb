//! RoPE in config.json: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 one `rope_parameters`,
//! possibly one for each type of layer. Which of them count, and where, differs by class: `tests/golden/variants.json`
//! holds what transformers computes.

use serde_json::{Map, Value, json};

use super::config::{Config, bad, num};
use lacuna_spec::{Rope, RopeScaling, RopeStyle, SpecError};

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
    // Read by their families.
    "llama_4_scaling_beta",
    "max_position_embeddings",
    "alpha",
];

/// Keys of sets by type of layer.
const BY_TYPE: &[&str] = &["full_attention", "sliding_attention"];

/// Most channels for which a list of factors is accepted.
pub(super) const MAX_LISTED: usize = 4096;

/// Reads RoPE of heads of so many channels.
pub(super) type Reader = fn(&Config, usize) -> Result<Rope, SpecError>;

/// How a class of transformers reads the keys.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    /// One set for all layers; every channel of a head turns.
    Common,
    /// The same, but a part of the channels may turn, under any scaling.
    Part,
    /// The same, but the only scaling is longrope, once called "su" and "yarn".
    Phi3,
    /// A set for each type of layer. `truncate` is looked for beside the sets.
    ByType {
        /// Key of the base where the set has none.
        theta: &'static str,
        truncate: bool,
    },
}

static NOTHING: Value = Value::Null;

/// RoPE of most classes.
pub(super) fn common(c: &Config, head_dim: usize) -> Result<Rope, SpecError> {
    read(c, one_set(c)?, head_dim, Class::Common)
}

/// RoPE of classes that turn a part of each head.
pub(super) fn part(c: &Config, head_dim: usize) -> Result<Rope, SpecError> {
    read(c, one_set(c)?, head_dim, Class::Part)
}

/// RoPE of Phi-3.
pub(super) fn phi3(c: &Config, head_dim: usize) -> Result<Rope, SpecError> {
    read(c, one_set(c)?, head_dim, Class::Phi3)
}

/// RoPE of layers that see everything, where there is a set for each type of layer.
pub(super) fn of_full_layers(c: &Config, head_dim: usize) -> Result<Rope, SpecError> {
    let given = c.get("rope_parameters");
    let mut set = set_of(c, "full_attention")?.cloned();
    if let Some(more) = object(c.get("rope_scaling"), "rope_scaling")? {
        // Without sets the class begins with this one, whose rope_type an older `type` does not replace.
        let set = match (&mut set, given) {
            (Some(set), _) => set,
            (none, None) => none.insert(json!({"rope_type": "default"})),
            _ => return bad("rope_scaling is for full_attention, which rope_parameters lacks"),
        };
        if let (Some(set), Some(more)) = (set.as_object_mut(), more.as_object()) {
            set.extend(more.clone());
        }
    }
    read(c, set.as_ref().unwrap_or(&NOTHING), head_dim, by_type(c, "rope_theta"))
}

/// RoPE of layers that see a window; `theta` is the key of its base where the set has none.
pub(super) fn of_sliding_layers(c: &Config, head_dim: usize, theta: &'static str) -> Result<Rope, SpecError> {
    let set = set_of(c, "sliding_attention")?.unwrap_or(&NOTHING);
    read(c, set, head_dim, by_type(c, theta))
}

/// RoPE of Gemma 4's layers that see everything: a part of the pairs turns, at the pace of all.
pub(super) fn proportional_layers(c: &Config, head_dim: usize) -> Result<Rope, SpecError> {
    let set = set_of(c, "full_attention")?.unwrap_or(&NOTHING);
    let o = Config(set);
    if o.opt_str("rope_type")? != Some("proportional") {
        return of_full_layers(c, head_dim);
    }
    let known = ["rope_type", "rope_theta", "partial_rotary_factor", "factor"];
    if let Some(key) = set.as_object().into_iter().flat_map(Map::keys).find(|k| !known.contains(&k.as_str())) {
        return bad(format!("rope_parameters of full_attention has {key}, which Lacuna does not know"));
    }
    let part = o.opt_f64("partial_rotary_factor")?.unwrap_or(1.0);
    let pairs = (part * head_dim as f64 / 2.0).floor() as usize;
    let factor = o.opt_f32("factor")?.unwrap_or(1.0);
    let theta = o.f64("rope_theta")? as f32;
    let scaling = RopeScaling::Proportional { pairs, factor };
    Ok(Rope { theta, dims: head_dim, style: RopeStyle::Half, scaling })
}

/// What [`proportional_layers`] and [`of_sliding_layers`] read, of one type of layer.
pub(super) fn set_for(rope: Option<&Rope>, spec: &lacuna_spec::Spec) -> Result<Value, SpecError> {
    let Some(r) = rope else { return Err(SpecError { what: "a layer knows no positions".into() }) };
    if let RopeScaling::Proportional { pairs, factor } = r.scaling {
        let part = 2.0 * pairs as f64 / r.dims as f64;
        let mut set = json!({"rope_type": "proportional", "partial_rotary_factor": part, "rope_theta": num(r.theta)});
        if factor != 1.0 {
            set["factor"] = num(factor);
        }
        return Ok(set);
    }
    let mut all = Map::new();
    to_config(r, (r.dims, false), spec.context, &mut all)?;
    let mut set = match all.shift_remove("rope_scaling") {
        Some(set) => set,
        None => json!({"rope_type": "default"}),
    };
    set["rope_theta"] = num(r.theta);
    Ok(set)
}

fn by_type(c: &Config, theta: &'static str) -> Class {
    let said = c.get("rope_parameters").and_then(|p| p.get("truncate"));
    Class::ByType { theta, truncate: said.is_none_or(|t| *t == json!(true)) }
}

/// The set for one type of layer.
fn set_of<'a>(c: &Config<'a>, kind: &str) -> Result<Option<&'a Value>, SpecError> {
    let Some(sets) = object(c.get("rope_parameters"), "rope_parameters")? else { return Ok(None) };
    object(sets.get(kind).filter(|s| !s.is_null()), kind)
}

/// What stands at `key`, where it is an object. A number that is none reaches us as one with a key of its own.
fn object<'a>(v: Option<&'a Value>, key: &str) -> Result<Option<&'a Value>, SpecError> {
    match v {
        Some(v) if !v.is_object() => bad(format!("{key} is {v}, not an object")),
        Some(v) if v.get("__float__").is_some() => bad(format!("{key} is {}, not an object", v["__float__"])),
        v => Ok(v),
    }
}

/// The one set. transformers 4 knows `rope_scaling` alone; transformers 5 reads both names, and the old one wins.
fn one_set<'a>(c: &Config<'a>) -> Result<&'a Value, SpecError> {
    let given = |key| {
        let set = object(c.get(key), key)?;
        Ok(set.filter(|v| v.as_object().is_none_or(|o| !o.is_empty())))
    };
    let (older, newer) = (given("rope_scaling")?, given("rope_parameters")?);
    let set = older.or(newer).unwrap_or(&NOTHING);
    // Classes that know types of layers take such keys for sets, and then miss the one. The others pass them over.
    if c.0.get("layer_types").is_some() && BY_TYPE.iter().any(|k| set.get(k).is_some()) {
        return bad("rope_parameters differ by type of layer, which this family does not");
    }
    Ok(set)
}

fn read(c: &Config, set: &Value, head_dim: usize, class: Class) -> Result<Rope, SpecError> {
    let mut keys = set.as_object().into_iter().flat_map(Map::keys);
    if let Some(key) = keys.find(|k| !KEYS.contains(&k.as_str()) && !BY_TYPE.contains(&k.as_str())) {
        return bad(format!("rope_scaling has {key}, which Lacuna does not know"));
    }
    // Keys that their families read: elsewhere they would be passed over.
    let owner = |key: &str| match key {
        "llama_4_scaling_beta" | "max_position_embeddings" => "ministral3",
        _ => "hunyuan_v1_dense",
    };
    for key in ["llama_4_scaling_beta", "max_position_embeddings", "alpha"] {
        if set.get(key).is_some() && c.opt_str("model_type")? != Some(owner(key)) {
            return bad(format!("rope_scaling has {key}, which this family does not know"));
        }
    }
    let o = Config(set);
    let theta = match (o.opt_f32("rope_theta")?, class) {
        (Some(t), _) => t,
        (None, Class::ByType { theta, .. }) => c.f64(theta)? as f32,
        (None, _) => c.f64("rope_theta")? as f32,
    };
    let (newer, older) = (o.opt_str("rope_type")?, o.opt_str("type")?);
    let kind = match newer.or(older).unwrap_or("default") {
        "yarn" if class == Class::Phi3 => "longrope",
        "su" if class == Class::Phi3 && newer.is_none() => "longrope",
        kind => kind,
    };
    let part = match (o.opt_f64("partial_rotary_factor")?, class) {
        (Some(p), _) => p,
        (None, Class::Phi3 | Class::Part) => c.f64("partial_rotary_factor")?,
        (None, _) => c.opt_f64("partial_rotary_factor")?.unwrap_or(1.0),
    };
    let turning = (head_dim as f64 * part) as usize;
    let dims = match (kind, class) {
        (_, Class::Phi3 | Class::Part) => turning,
        // Written and not read: every channel turns.
        ("default", _) => head_dim,
        _ if turning != head_dim => {
            return bad(format!(
                "partial_rotary_factor is {part} with rope_type \"{kind}\"; this class turns whole heads, and \
                 transformers \
                 fails here"
            ));
        }
        _ => head_dim,
    };
    if class == Class::Phi3 && !matches!(kind, "default" | "longrope") {
        return bad(format!("rope_type is \"{kind}\"; Phi-3 knows default and longrope"));
    }
    Ok(Rope { theta, dims, style: RopeStyle::Half, scaling: scaling(c, &o, kind, dims, class)? })
}

fn scaling(c: &Config, o: &Config, kind: &str, dims: usize, class: Class) -> Result<RopeScaling, SpecError> {
    let must = |key: &str| o.opt_f32(key)?.map_or_else(|| bad(format!("rope_scaling.{key} is missing")), Ok);
    let context = c.usize("max_position_embeddings")?;
    // The context before stretching: where there is one set, the word outside it wins.
    let original = || {
        let (key, outside) = ("original_max_position_embeddings", !matches!(class, Class::ByType { .. }));
        if class == Class::Phi3 {
            return c.usize(key);
        }
        let said = if outside { c.opt_usize(key)? } else { None };
        Ok(said.map_or_else(|| o.opt_usize(key), |n| Ok(Some(n)))?.unwrap_or(context))
    };
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: must("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: must("factor")?,
            low_freq_factor: must("low_freq_factor")?,
            high_freq_factor: must("high_freq_factor")?,
            original: original()?,
        }),
        "longrope" => {
            // Before the lists are repeated for each layer: a hostile file must not turn megabytes into gigabytes.
            for key in ["short_factor", "long_factor"] {
                match o.get(key).and_then(Value::as_array) {
                    Some(list) if list.len() != dims / 2 || dims > MAX_LISTED => {
                        return bad(format!("{key} has {} factors for {dims} channels", list.len()));
                    }
                    _ => {}
                }
            }
            let original: usize = original()?;
            let factor = o.opt_f64("factor")?.unwrap_or(context as f64 / original as f64);
            let attention_factor = match o.opt_f32("attention_factor")? {
                Some(f) => f,
                None => longrope_attention(factor, original),
            };
            let (short, long) = (o.f32s("short_factor")?, o.f32s("long_factor")?);
            Ok(RopeScaling::Longrope { short, long, attention_factor, original })
        }
        "yarn" => {
            let original: usize = original()?;
            // The key must stand there, and may be null.
            let factor = match (o.opt_f64("factor")?, o.0.get("factor")) {
                (Some(f), _) => f,
                (None, Some(_)) => context as f64 / original as f64,
                (None, None) => return bad("rope_scaling.factor is missing"),
            };
            let attention_factor = match o.opt_f32("attention_factor")? {
                Some(f) => f,
                None => match (o.opt_f64("mscale")?, o.opt_f64("mscale_all_dim")?) {
                    (Some(m), Some(all)) if m != 0.0 && all != 0.0 => {
                        (yarn_attention(factor, m) / yarn_attention(factor, all)) as f32
                    }
                    _ => yarn_attention(factor, 1.0) as f32,
                },
            };
            // Python's `or`: zero counts as absent here.
            let beta = |key, default| Ok(o.opt_f32(key)?.filter(|b| *b != 0.0).unwrap_or(default));
            Ok(RopeScaling::Yarn {
                factor: factor as f32,
                beta_fast: beta("beta_fast", 32.0)?,
                beta_slow: beta("beta_slow", 1.0)?,
                attention_factor,
                original,
                truncate: match class {
                    Class::ByType { truncate, .. } => truncate,
                    _ => o.0.get("truncate").is_none() || o.bool("truncate")?,
                },
            })
        }
        other => bad(format!("rope_type is \"{other}\"; supported are default, linear, llama3, yarn and longrope")),
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

/// The llama3 scaling behind a list of divisors, with the constants that every published model has; `None` where it is
/// none.
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

/// Writes `rope_theta` and `rope_scaling`, which every transformers reads; `interleaved`: the class turns neighbours.
pub(super) fn to_config(
    rope: &Rope,
    (head_dim, interleaved): (usize, bool),
    context: usize,
    out: &mut Map<String, Value>,
) -> Result<(), SpecError> {
    if rope.style != RopeStyle::Half && !interleaved {
        let what = "RoPE pairs neighbouring channels (GGUF's order of rows); the rows of q and k must be brought into \
         halves first";
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
        RopeScaling::Proportional { .. } => {
            let what = "a part of RoPE's pairs turns at the pace of all, which this family's config.json cannot say";
            return Err(SpecError { what: what.into() });
        }
        RopeScaling::Factors { .. } => {
            let what = "RoPE has a list of factors as GGUF files carry, which no config.json can say";
            return Err(SpecError { what: what.into() });
        }
    }
    out.insert("rope_scaling".into(), Value::Object(o));
    Ok(())
}

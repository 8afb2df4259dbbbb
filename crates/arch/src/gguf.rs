//! What GGUF files of all families have in common: keys below the architecture's name, tensors named by llama.cpp.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::Source;
use super::config::{inverse_root, named};
use super::rope::MAX_LISTED;
use lacuna_spec::{
    AttnSpec, Experts, FfnSpec, LayerSpec, Norm, NormKind, Rope, RopeScaling, RopeStyle, Spec, SpecError,
};
use lacuna_spec::{Place, Role};

/// What a family may look at in a GGUF file: the metadata (the tokenizer's apart) and which tensors there are.
#[derive(Clone, Debug, Default)]
pub struct GgufHead {
    /// Keys and values.
    pub keys: Map<String, Value>,
    /// Names of all tensors.
    pub tensors: BTreeSet<String>,
    /// Rows of `token_embd.weight`.
    pub vocab: usize,
    /// Values of the small tensors that describe RoPE: `rope_freqs.weight`, `rope_factors_long.weight`,
    /// `rope_factors_short.weight`.
    pub rope_lists: BTreeMap<String, Vec<f32>>,
}

fn bad<T>(what: impl std::fmt::Display) -> Result<T, SpecError> {
    Err(SpecError { what: format!("metadata: {what}") })
}

/// Keys that change results in ways the decoder does not compute.
const REFUSED: &[&str] = &[
    "use_parallel_residual",
    "residual_scale",
    "embedding_scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.temperature_scale",
    "attention.q_lora_rank",
    "attention.shared_kv_layers",
    "expert_shared_count",
    "expert_weights_scale",
    "rope.dimension_sections",
];

impl GgufHead {
    /// The same file where some keys below the architecture's name say nothing: a family has read them.
    pub(super) fn without(&self, keys: &[&str]) -> Result<GgufHead, SpecError> {
        let mut out = self.clone();
        for key in keys {
            let (key, _) = self.value(key)?;
            out.keys.remove(&key);
        }
        Ok(out)
    }

    /// The same file where `{architecture}.{key}` is another number.
    pub(super) fn with(mut self, key: &str, n: usize) -> Result<GgufHead, SpecError> {
        let (key, _) = self.value(key)?;
        self.keys.insert(key, n.into());
        Ok(self)
    }

    /// `{architecture}.{key}` as true or false.
    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, SpecError> {
        let (key, v) = self.value(key)?;
        v.map(|v| v.as_bool().map_or_else(|| bad(format!("{key} is {v}, neither true nor false")), Ok)).transpose()
    }

    /// A string that must be there.
    pub fn str(&self, key: &str) -> Result<&str, SpecError> {
        self.keys.get(key).and_then(Value::as_str).map_or_else(|| bad(format!("{key} is missing or no string")), Ok)
    }

    /// `{architecture}.{key}` as a whole number.
    pub fn usize(&self, key: &str) -> Result<Option<usize>, SpecError> {
        let (key, v) = self.value(key)?;
        let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        v.map(|v| number(v).map_or_else(|| bad(format!("{key} is {v}, not a whole number")), Ok)).transpose()
    }

    /// `{architecture}.{key}` as a number.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, SpecError> {
        let (key, v) = self.value(key)?;
        v.map(|v| v.as_f64().map_or_else(|| bad(format!("{key} is {v}, not a number")), |x| Ok(x as f32))).transpose()
    }

    /// `{architecture}.{key}` for each of `layers` layers: one number for all, or a list.
    pub fn each(&self, key: &str, layers: usize) -> Result<Option<Vec<usize>>, SpecError> {
        let (key, v) = self.value(key)?;
        let number = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).or(v.as_bool().map(usize::from));
        let read = |v: &Value| match v {
            Value::Array(list) => list.iter().map(number).collect::<Option<Vec<usize>>>().filter(|l| l.len() >= layers),
            _ => number(v).map(|n| vec![n; layers]),
        };
        v.map(|v| match read(v) {
            Some(list) => Ok(list),
            None => bad(format!("{key} is neither a whole number nor a list of {layers}")),
        })
        .transpose()
    }

    fn value(&self, key: &str) -> Result<(String, Option<&Value>), SpecError> {
        let key = format!("{}.{key}", self.str("general.architecture")?);
        let v = self.keys.get(&key);
        Ok((key, v))
    }

    pub(super) fn must(&self, key: &str) -> Result<usize, SpecError> {
        self.usize(key)?.map_or_else(|| bad(format!("{}.{key} is missing", self.str("general.architecture")?)), Ok)
    }
}

/// The network that the common keys describe: pre-norm RMS, gated SiLU, RoPE of the given style. Families change what
/// differs.
///
/// A layer whose head count or width is 0 lacks that part, as pruned files say it.
pub(super) fn standard(head: &GgufHead, arch: &str, style: RopeStyle) -> Result<Spec, SpecError> {
    reading(head, arch, style, &[])
}

/// The same where the family reads some of the keys that others refuse.
pub(super) fn reading(head: &GgufHead, arch: &str, style: RopeStyle, keys: &[&str]) -> Result<Spec, SpecError> {
    for key in REFUSED.iter().filter(|k| !keys.contains(k)) {
        if let (key, Some(v)) = head.value(key)?
            && !(v.as_f64() == Some(0.0) || *v == Value::Bool(false))
        {
            return bad(format!("{key} is {v}, which Lacuna does not compute"));
        }
    }
    if head.vocab == 0 {
        return Err(SpecError { what: "token_embd.weight is missing or no matrix".into() });
    }
    if let Some((name, list)) = head.rope_lists.iter().find(|l| l.1.len() > MAX_LISTED) {
        return Err(SpecError {
            what: format!("{name} has {} factors; at most {MAX_LISTED} are accepted", list.len()),
        });
    }
    let layers = head.must("block_count")?;
    if layers > 4096 {
        return bad(format!("block_count is {layers}; at most 4096 are accepted"));
    }
    let hidden = head.must("embedding_length")?;
    let context = head.must("context_length")?;
    let need = |key: &str| match head.each(key, layers)? {
        Some(list) => Ok(list),
        None => bad(format!("{key} is missing")),
    };
    let heads = need("attention.head_count")?;
    let kv_heads = head.each("attention.head_count_kv", layers)?.unwrap_or_else(|| heads.clone());
    let experts = head.usize("expert_count")?.filter(|n| *n > 0);
    let widths = match head.each("expert_feed_forward_length", layers)?.filter(|_| experts.is_some()) {
        Some(list) => list,
        None => need("feed_forward_length")?,
    };
    let most_heads = heads.iter().copied().max().unwrap_or(0);
    let head_dim = match head.usize("attention.key_length")? {
        Some(n) => n,
        None => hidden.checked_div(most_heads).unwrap_or(0),
    };
    if let Some(v) = head.usize("attention.value_length")?.filter(|v| *v != head_dim) {
        return bad(format!("attention.value_length {v} is not attention.key_length {head_dim}"));
    }
    let (eps, kind) = match (head.f32("attention.layer_norm_rms_epsilon")?, head.f32("attention.layer_norm_epsilon")?) {
        (Some(e), _) => (e, NormKind::Rms),
        (None, Some(e)) => (e, NormKind::Layer),
        (None, None) => bad("attention.layer_norm_rms_epsilon is missing")?,
    };
    let rope = Rope {
        theta: head.f32("rope.freq_base")?.unwrap_or(10000.0),
        dims: head.usize("rope.dimension_count")?.unwrap_or(head_dim),
        style,
        scaling: scaling(head, context)?,
    };
    let scale = head.f32("attention.scale")?.filter(|s| *s != 0.0).unwrap_or(inverse_root(head_dim as f64));
    let window = head.usize("attention.sliding_window")?.filter(|w| *w > 0);
    let has = |l: usize, name: &str| head.tensors.contains(&format!("blk.{l}.{name}"));
    let attn = |l: usize| AttnSpec {
        heads: heads[l],
        kv_heads: kv_heads[l],
        head_dim,
        scale,
        window,
        rope: Some(rope.clone()),
        qkv_bias: has(l, "attn_q.bias") || has(l, "attn_qkv.bias"),
        o_bias: has(l, "attn_output.bias"),
        ..AttnSpec::default()
    };
    let ffn = |l: usize| {
        Ok(FfnSpec {
            width: widths[l],
            bias: has(l, "ffn_up.bias"),
            down_bias: has(l, "ffn_down.bias") && !has(l, "ffn_up.bias"),
            experts: match experts {
                Some(count) => Some(Experts {
                    count,
                    used: head.must("expert_used_count")?,
                    normalize: true,
                    ..Experts::default()
                }),
                None => None,
            },
            ..FfnSpec::default()
        })
    };
    let layer = |l: usize| {
        let ffn = if widths[l] > 0 { Some(ffn(l)?) } else { None };
        Ok(LayerSpec { attn: (heads[l] > 0).then(|| attn(l)), ffn, ..LayerSpec::default() })
    };
    Ok(Spec {
        arch: arch.into(),
        hidden,
        vocab: head.vocab,
        context,
        tied: !head.tensors.contains("output.weight"),
        norm: Norm { eps, kind, ..Norm::default() },
        head_bias: head.tensors.contains("output.bias"),
        layers: (0..layers).map(layer).collect::<Result<_, SpecError>>()?,
        logit_softcap: head.f32("final_logit_softcapping")?.filter(|c| *c != 0.0),
        logit_scale: head.f32("logit_scale")?.filter(|s| *s != 0.0).unwrap_or(1.0),
        ..Spec::default()
    })
}

/// Which layers slide: one number is a period whose last layer sees everything; a list says it for each layer.
pub(super) fn slides(head: &GgufHead, layers: usize, usual: usize) -> Result<Vec<bool>, SpecError> {
    Ok(match head.each("attention.sliding_window_pattern", layers)? {
        Some(list) if head.usize("attention.sliding_window_pattern").is_err() => list.iter().map(|s| *s == 1).collect(),
        other => {
            let period = other.and_then(|l| l.first().copied()).unwrap_or(usual).max(1);
            (0..layers).map(|l| !(l + 1).is_multiple_of(period)).collect()
        }
    })
}

fn scaling(head: &GgufHead, context: usize) -> Result<RopeScaling, SpecError> {
    let (long, short) = ("rope_factors_long.weight", "rope_factors_short.weight");
    let original = head.usize("rope.scaling.original_context_length")?.unwrap_or(context);
    let attn_factor = head.f32("rope.scaling.attn_factor")?.filter(|f| *f != 0.0).unwrap_or(1.0);
    if let (Some(long), Some(short)) = (head.rope_lists.get(long), head.rope_lists.get(short)) {
        let (short, long) = (short.clone(), long.clone());
        return Ok(RopeScaling::Longrope { short, long, attention_factor: attn_factor, original });
    }
    if let Some(factors) = head.rope_lists.get("rope_freqs.weight") {
        return Ok(RopeScaling::Factors { factors: factors.clone() });
    }
    let factor = match head.f32("rope.scaling.factor")? {
        Some(f) => Some(f),
        None => head.f32("rope.scale_linear")?,
    };
    let (key, kind) = head.value("rope.scaling.type")?;
    match (kind.and_then(Value::as_str), factor) {
        (Some("none") | None, None) => Ok(RopeScaling::Default),
        (Some("none"), _) | (_, Some(0.0 | 1.0)) => Ok(RopeScaling::Default),
        (Some("linear") | None, Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some("yarn"), Some(factor)) => Ok(RopeScaling::Yarn {
            factor,
            beta_fast: head.f32("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: head.f32("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            attention_factor: attn_factor * (0.1 * f64::from(factor).ln() + 1.0) as f32,
            original,
            truncate: true,
        }),
        (Some(kind), factor) => bad(format!("{key} is \"{kind}\" with factor {factor:?}, which Lacuna does not know")),
    }
}

/// Names of llama.cpp's tensors.
pub(super) fn standard_source(spec: &Spec, place: &Place) -> Option<Source> {
    let attn = place.layer.and_then(|l| spec.layers.get(l as usize)?.attn.as_ref());
    let narrow = attn.and_then(|a| a.latent?.q_rank).is_some();
    let module = match place.role {
        // A vector that llama.cpp calls a bias.
        Role::Correction => return Some(named(&place.bias(), "", "blk", "exp_probs_b")),
        Role::Sinks => "attn_sinks",
        Role::QDown => "attn_q_a",
        Role::QDownNorm => "attn_q_a_norm",
        Role::Q if narrow => "attn_q_b",
        Role::KvDown => "attn_kv_a_mqa",
        Role::KvDownNorm => "attn_kv_a_norm",
        Role::KUp => "attn_k_b",
        Role::VUp => "attn_v_b",
        Role::SharedRouter => "ffn_gate_inp_shexp",
        Role::SharedGate => "ffn_gate_shexp",
        Role::SharedUp => "ffn_up_shexp",
        Role::SharedDown => "ffn_down_shexp",
        Role::Embed => "token_embd",
        Role::Positions => "position_embd",
        Role::FinalNorm => "output_norm",
        Role::Head => "output",
        Role::AttnNorm => "attn_norm",
        Role::Q => "attn_q",
        Role::K => "attn_k",
        Role::V => "attn_v",
        Role::O => "attn_output",
        Role::QNorm => "attn_q_norm",
        Role::KNorm => "attn_k_norm",
        Role::AttnPostNorm => "post_attention_norm",
        Role::FfnNorm => "ffn_norm",
        Role::Router => "ffn_gate_inp",
        Role::Gate if place.expert.is_some() => "ffn_gate_exps",
        Role::Up if place.expert.is_some() => "ffn_up_exps",
        Role::Down if place.expert.is_some() => "ffn_down_exps",
        Role::Gate => "ffn_gate",
        Role::Up => "ffn_up",
        Role::Down => "ffn_down",
        Role::FfnPostNorm => "post_ffw_norm",
        Role::EmbedNorm => "token_embd_norm",
        _ => return None,
    };
    Some(Source { slice: place.expert.map(|e| e as usize), ..named(place, "", "blk", module) })
}

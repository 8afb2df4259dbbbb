//! Metadata of a GGUF file from a network: the way back of `gguf.rs`.

use serde_json::Value;

use super::config::{attn_parts, difference, ffn_parts};
use super::{GgufHead, gguf_targets};
use lacuna_spec::{LayerSpec, NormKind, RopeScaling, Spec, SpecError};

/// A metadata value, of the type that llama.cpp expects at its key.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// An unsigned integer of 32 bits.
    U32(u32),
    /// A float of 32 bits.
    F32(f32),
    /// A string.
    Str(String),
    /// A truth value.
    Bool(bool),
    /// Unsigned integers of 32 bits.
    U32s(Vec<u32>),
    /// Truth values.
    Bools(Vec<bool>),
}

impl GgufValue {
    fn json(&self) -> Value {
        match self {
            GgufValue::U32(x) => (*x).into(),
            GgufValue::F32(x) => (*x).into(),
            GgufValue::Str(x) => x.as_str().into(),
            GgufValue::Bool(x) => (*x).into(),
            GgufValue::U32s(x) => x.clone().into(),
            GgufValue::Bools(x) => x.clone().into(),
        }
    }
}

/// What a GGUF file says about a network.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufKeys {
    /// Keys and values, `general.architecture` first.
    pub pairs: Vec<(String, GgufValue)>,
    /// The small f32 tensors that describe RoPE.
    pub rope_lists: Vec<(String, Vec<f32>)>,
    /// What llama.cpp does otherwise than this network, in words.
    pub notes: Vec<String>,
}

impl GgufKeys {
    /// Sets `{architecture}.{key}`, which is set already, to something else.
    pub(super) fn put(&mut self, key: &str, value: GgufValue) {
        let ends = format!(".{key}");
        self.pairs.retain(|(k, _)| !k.ends_with(&ends));
        self.set(key, value);
    }

    /// Sets `{architecture}.{key}`.
    pub(super) fn set(&mut self, key: &str, value: GgufValue) {
        let arch = match self.pairs.first() {
            Some((_, GgufValue::Str(a))) => a.clone(),
            _ => String::new(),
        };
        self.pairs.push((format!("{arch}.{key}"), value));
    }

    pub(super) fn number(&mut self, key: &str, n: usize) -> Result<(), SpecError> {
        match u32::try_from(n) {
            Ok(n) => self.set(key, GgufValue::U32(n)),
            Err(_) => return Err(SpecError { what: format!("{key} is {n}, beyond 32 bits") }),
        }
        Ok(())
    }

    /// One number, on which all layers must agree: GGUF could list one for each, but llama.cpp takes the first for all
    /// in these families.
    fn each(&mut self, key: &str, list: &[usize]) -> Result<(), SpecError> {
        let first = list.first().copied().unwrap_or(0);
        match list.iter().position(|n| *n != first) {
            None => self.number(key, first),
            Some(l) => {
                let what = format!("layer {l}: {key} is {}, that of layer 0 is {first}", list[l]);
                Err(SpecError { what: format!("{what}; llama.cpp reads one number for all layers") })
            }
        }
    }
}

/// The keys that all families share.
pub(super) fn standard_keys(spec: &Spec, arch: &str) -> Result<GgufKeys, SpecError> {
    keys_with(spec, arch, None)
}

/// The same of a family whose files say elsewhere which layers have attention: `kv_heads` is theirs.
pub(super) fn hybrid_keys(spec: &Spec, arch: &str, kv_heads: usize) -> Result<GgufKeys, SpecError> {
    keys_with(spec, arch, Some(kv_heads))
}

fn keys_with(spec: &Spec, arch: &str, kv_heads: Option<usize>) -> Result<GgufKeys, SpecError> {
    let mut k = GgufKeys::default();
    k.pairs.push(("general.architecture".into(), GgufValue::Str(arch.into())));
    k.number("block_count", spec.layers.len())?;
    k.number("context_length", spec.context)?;
    k.number("embedding_length", spec.hidden)?;
    k.number("vocab_size", spec.vocab)?;
    let ffns = ffn_parts(spec)?;
    loadable_biases(spec, arch)?;
    k.each("feed_forward_length", &ffns.iter().map(|f| f.width).collect::<Vec<_>>())?;
    let attns = attn_parts(spec)?;
    k.each("attention.head_count", &attns.iter().map(|a| a.heads).collect::<Vec<_>>())?;
    if let Some(n) = kv_heads {
        k.number("attention.head_count_kv", n)?;
    } else if spec.layers.iter().all(|l| l.attn.is_some()) {
        k.each("attention.head_count_kv", &attns.iter().map(|a| a.kv_heads).collect::<Vec<_>>())?;
    } else {
        // Layers without attention have no key heads: the list says which.
        let of = |l: &LayerSpec| u32::try_from(l.attn.as_ref().map_or(0, |a| a.kv_heads)).ok();
        let list: Option<Vec<u32>> = spec.layers.iter().map(of).collect();
        let what = "attention.head_count_kv is beyond 32 bits";
        k.set("attention.head_count_kv", GgufValue::U32s(list.ok_or_else(|| SpecError { what: what.into() })?));
    }
    k.number("attention.key_length", attns[0].head_dim)?;
    k.number("attention.value_length", attns[0].head_dim)?;
    let norm = if spec.norm.kind == NormKind::Rms { "layer_norm_rms_epsilon" } else { "layer_norm_epsilon" };
    k.set(&format!("attention.{norm}"), GgufValue::F32(spec.norm.eps));
    if let Some(e) = ffns.iter().find_map(|f| Some((f.experts?, f.width))) {
        k.number("expert_count", e.0.count)?;
        k.number("expert_used_count", e.0.used)?;
        k.number("expert_feed_forward_length", e.1)?;
    }
    if let Some(w) = attns.iter().find_map(|a| a.window) {
        k.number("attention.sliding_window", w)?;
    }
    if let Some(c) = spec.logit_softcap {
        k.set("final_logit_softcapping", GgufValue::F32(c));
    }
    if spec.logit_scale != 1.0 {
        k.set("logit_scale", GgufValue::F32(spec.logit_scale));
    }
    // The layer that sees everything, where some see a window: theirs is the family's to say.
    let turning = || attns.iter().filter(|a| a.rope.is_some());
    let global = turning().find(|a| a.window.is_none()).or(turning().next());
    if let Some(r) = global.and_then(|a| a.rope.as_ref()) {
        k.number("rope.dimension_count", r.dims)?;
        k.set("rope.freq_base", GgufValue::F32(r.theta));
        scaling(&mut k, &r.scaling)?;
    }
    Ok(k)
}

/// Which layers slide, where it is not all but every `usual`th: by a period where there is one, else layer by layer.
pub(super) fn pattern(k: &mut GgufKeys, spec: &Spec, usual: usize) -> Result<(), SpecError> {
    let slides: Vec<bool> = attn_parts(spec)?.iter().map(|a| a.window.is_some()).collect();
    let fits = |period: usize| slides.iter().enumerate().all(|(l, s)| *s != (l + 1).is_multiple_of(period));
    match (1..=slides.len() + 1).find(|p| fits(*p)) {
        _ if fits(usual) => {}
        Some(period) => k.number("attention.sliding_window_pattern", period)?,
        None => k.set("attention.sliding_window_pattern", GgufValue::Bools(slides)),
    }
    Ok(())
}

/// Of the biases on q, k and v, on o, and on the FFN's matrices: those that llama.cpp's loader of this architecture
/// knows. `None` for those that came first, whose rules [`loadable_biases`] has.
fn known_biases(arch: &str) -> Option<[bool; 3]> {
    match arch {
        "llama" | "qwen2" | "qwen3" | "qwen3moe" | "gemma2" | "gemma3" | "phi3" | "gpt2" => None,
        "granite" | "granitehybrid" | "phi2" | "starcoder2" | "nemotron" | "gptneox" | "bloom" => Some([true; 3]),
        "gpt-oss" => Some([true; 3]),
        "glm4" | "chatglm" | "seed_oss" | "stablelm" | "qwen2moe" | "glm4moe" => Some([true, false, false]),
        "ernie4_5" => Some([true, true, false]),
        _ => Some([false; 3]),
    }
}

/// Refuses biases that pruning left and that llama.cpp's loader of this architecture does not know: it would refuse the
/// whole file.
fn loadable_biases(spec: &Spec, arch: &str) -> Result<(), SpecError> {
    for (l, layer) in spec.layers.iter().enumerate() {
        let fail = |what: &str| {
            Err(SpecError { what: format!("layer {l}: llama.cpp reads no bias on {what} in {arch} files") })
        };
        if let Some(known) = known_biases(arch) {
            let (a, f) = (layer.attn.as_ref(), layer.ffn.as_ref());
            let has =
                [a.is_some_and(|a| a.qkv_bias), a.is_some_and(|a| a.o_bias), f.is_some_and(|f| f.bias || f.down_bias)];
            match (0..3).find(|&i| has[i] && !known[i]) {
                Some(i) => return fail(["attn.q, k and v", "attn.o", "the FFN's matrices"][i]),
                None => continue,
            }
        }
        let alone = |a: &lacuna_spec::AttnSpec| a.o_bias && (!a.qkv_bias || arch == "qwen2");
        if layer.attn.as_ref().is_some_and(alone) && arch != "llama" {
            return fail("attn.o");
        }
        match layer.ffn.as_ref().filter(|f| f.down_bias) {
            Some(f) if f.experts.is_some() => return fail("ffn.down of experts"),
            Some(_) if arch != "llama" => return fail("ffn.down alone"),
            _ => {}
        }
    }
    Ok(())
}

fn scaling(k: &mut GgufKeys, scaling: &RopeScaling) -> Result<(), SpecError> {
    match scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => {
            k.set("rope.scaling.type", GgufValue::Str("linear".into()));
            k.set("rope.scaling.factor", GgufValue::F32(*factor));
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original, .. } => {
            k.set("rope.scaling.type", GgufValue::Str("yarn".into()));
            k.set("rope.scaling.factor", GgufValue::F32(*factor));
            k.number("rope.scaling.original_context_length", *original)?;
            k.set("rope.scaling.yarn_beta_fast", GgufValue::F32(*beta_fast));
            k.set("rope.scaling.yarn_beta_slow", GgufValue::F32(*beta_slow));
            // llama.cpp multiplies by the usual factor of its own accord.
            let usual = (0.1 * f64::from(*factor).ln() + 1.0) as f32;
            if *attention_factor != usual {
                k.set("rope.scaling.attn_factor", GgufValue::F32(attention_factor / usual));
            }
        }
        RopeScaling::Longrope { short, long, attention_factor, original } => {
            k.set("rope.scaling.type", GgufValue::Str("longrope".into()));
            k.set("rope.scaling.attn_factor", GgufValue::F32(*attention_factor));
            k.number("rope.scaling.original_context_length", *original)?;
            k.rope_lists.push(("rope_factors_long.weight".into(), long.clone()));
            k.rope_lists.push(("rope_factors_short.weight".into(), short.clone()));
        }
        RopeScaling::Factors { factors } => k.rope_lists.push(("rope_freqs.weight".into(), factors.clone())),
        RopeScaling::Proportional { .. } => {
            return Err(SpecError { what: "a GGUF file says still pairs as a list of factors".into() });
        }
        RopeScaling::Llama3 { .. } => {
            return Err(SpecError { what: "a GGUF file says llama3 scaling as a list of factors".into() });
        }
    }
    Ok(())
}

/// Reads the keys just written and compares: what they cannot say is refused by name.
pub(super) fn verified(
    spec: &Spec,
    keys: GgufKeys,
    read: fn(&GgufHead) -> Result<Spec, SpecError>,
) -> Result<GgufKeys, SpecError> {
    let fault =
        |what: String| SpecError { what: format!("a {} GGUF file cannot describe this network: {what}", spec.arch) };
    let mut head = GgufHead { vocab: spec.vocab, ..GgufHead::default() };
    head.keys = keys.pairs.iter().map(|(k, v)| (k.clone(), v.json())).collect();
    head.rope_lists = keys.rope_lists.iter().cloned().collect();
    head.tensors = gguf_targets(spec)?.into_iter().map(|t| t.name).collect();
    let again = read(&head).map_err(|e| fault(e.what))?;
    if again == *spec {
        return Ok(keys);
    }
    Err(fault(difference(spec, &again)))
}

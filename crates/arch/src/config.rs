//! Reading and writing config.json: typed access with errors that name the key, and what Llama's relatives have in
//! common.

use serde_json::{Map, Value, json};

use super::export::INTERLEAVED;
use super::{Source, rope};
use lacuna_spec::{Activation, AttnSpec, FfnSpec, Latent, LayerSpec, Norm, RopeStyle, Spec, SpecError};
use lacuna_spec::{Part, Place, Role};

/// An error about a key of config.json.
pub(super) fn bad<T>(what: impl std::fmt::Display) -> Result<T, SpecError> {
    Err(SpecError { what: format!("config.json: {what}") })
}

/// A config.json with its defaults filled in, or one of its nested objects.
///
/// What a null means differs by key in transformers: none (`sliding_window`), derived (`head_dim` of Llama), false, or
/// an error. So the plain readers refuse it, `bool` takes it for false as Python does, and the `opt_` ones leave it to
/// the family.
#[derive(Clone, Copy)]
pub(super) struct Config<'a>(pub &'a Value);

impl<'a> Config<'a> {
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    /// What the file calls a key: see [`renamed`].
    fn said<'k>(&self, key: &'k str) -> &'k str
    where
        'a: 'k,
    {
        self.0.get(FILE_NAMES).and_then(|names| names.get(key)?.as_str()).unwrap_or(key)
    }

    fn typed<T>(&self, key: &str, want: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>, SpecError> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => {
                let said = self.said(key);
                read(v).map_or_else(|| bad(format!("{said} is {v}, not {want}")), |t| Ok(Some(t)))
            }
        }
    }

    pub fn opt_usize(&self, key: &str) -> Result<Option<usize>, SpecError> {
        self.typed(key, "a whole number", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>, SpecError> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, SpecError> {
        Ok(self.opt_f64(key)?.map(|x| x as f32))
    }

    pub fn opt_str(&self, key: &str) -> Result<Option<&'a str>, SpecError> {
        self.typed(key, "a string", Value::as_str)
    }

    fn must<T>(&self, key: &str, read: impl Fn(&Self) -> Result<Option<T>, SpecError>) -> Result<T, SpecError> {
        let why = if self.0.get(key).is_some() { "null" } else { "missing" };
        read(self)?.map_or_else(|| bad(format!("{} is {why}", self.said(key))), Ok)
    }

    pub fn usize(&self, key: &str) -> Result<usize, SpecError> {
        self.must(key, |c| c.opt_usize(key))
    }

    pub fn f64(&self, key: &str) -> Result<f64, SpecError> {
        self.must(key, |c| c.opt_f64(key))
    }

    pub fn bool(&self, key: &str) -> Result<bool, SpecError> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    pub fn f32s(&self, key: &str) -> Result<Vec<f32>, SpecError> {
        let list = self.typed(key, "a list of numbers", |v| {
            v.as_array()?.iter().map(|x| Some(x.as_f64()? as f32)).collect::<Option<Vec<f32>>>()
        })?;
        list.map_or_else(|| bad(format!("{key} is missing")), Ok)
    }

    pub fn usizes(&self, key: &str) -> Result<Vec<usize>, SpecError> {
        let list = self.typed(key, "a list of whole numbers", |v| {
            v.as_array()?.iter().map(|x| x.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
        })?;
        Ok(list.unwrap_or_default())
    }

    /// Refuses any value of `key` but `only` (or none): the others change results in a way the decoder does not
    /// compute.
    pub fn only(&self, key: &str, only: Value) -> Result<(), SpecError> {
        match self.get(key) {
            Some(v) if *v != only => bad(format!("{key} is {v}; only {only} is supported")),
            _ => Ok(()),
        }
    }

    pub fn activation(&self, key: &str) -> Result<Activation, SpecError> {
        match self.must(key, |c| c.opt_str(key))? {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu" | "gelu_python" => Ok(Activation::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_accurate" | "gelu_fast" => {
                Ok(Activation::GeluTanh)
            }
            "relu" => Ok(Activation::Relu),
            "relu2" => Ok(Activation::Relu2),
            other => {
                let key = self.said(key);
                bad(format!("{key} is \"{other}\"; supported are silu, gelu, gelu_new, gelu_pytorch_tanh, relu, relu2"))
            }
        }
    }

    /// Which layers see a window only. `layer_types` says so where it stands; otherwise `sliding(layer)` does.
    pub fn windows(
        &self,
        layers: usize,
        window: Option<usize>,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>, SpecError> {
        let slides: Vec<bool> = match self.get("layer_types") {
            None => (0..layers.min(1 << 16)).map(|l| window.is_some() && sliding(l)).collect(),
            Some(v) => {
                let kind = |v: &Value| match v.as_str() {
                    Some("full_attention" | "attention") => Ok(false),
                    Some("sliding_attention") => Ok(true),
                    _ => bad(format!("layer_types has {v}; known are \"full_attention\" and \"sliding_attention\"")),
                };
                let list = v.as_array().map_or_else(|| bad(format!("layer_types is {v}, not a list")), Ok)?;
                list.iter().map(kind).collect::<Result<_, _>>()?
            }
        };
        if slides.len() != layers {
            return bad(format!("layer_types has {} entries for {layers} layers", slides.len()));
        }
        if slides.contains(&true) && window.is_none() {
            return bad("layer_types has sliding_attention, but sliding_window is missing or not used");
        }
        Ok(slides.into_iter().map(|s| window.filter(|_| s)).collect())
    }
}

/// The least value of f64 that prints as `x` does and reads back as `x`: 1e-5 and not 9.99999974737875e-6.
pub(super) fn num(x: f32) -> Value {
    json!(x.to_string().parse::<f64>().unwrap_or(f64::from(x)))
}

/// What Llama's relatives share: RMS norms, a gated feed-forward part, RoPE as `rope` reads it, no biases, no windows.
/// Families change what differs.
pub(super) fn llama_like(c: &Config, arch: &str, act: &str, rope: rope::Reader) -> Result<Spec, SpecError> {
    let hidden = c.usize("hidden_size")?;
    let heads = c.usize("num_attention_heads")?;
    let derived = hidden.checked_div(heads).unwrap_or(0);
    let head_dim = c.opt_usize("head_dim")?.unwrap_or(derived);
    let layers = c.usize("num_hidden_layers")?;
    if layers > 4096 {
        return bad(format!("num_hidden_layers is {layers}; at most 4096 are accepted"));
    }
    let attn = AttnSpec {
        heads,
        kv_heads: c.opt_usize("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        scale: inverse_root(head_dim as f64),
        rope: Some(rope(c, head_dim)?),
        ..AttnSpec::default()
    };
    let ffn = FfnSpec { width: c.usize("intermediate_size")?, act: c.activation(act)?, ..FfnSpec::default() };
    Ok(Spec {
        arch: arch.into(),
        hidden,
        vocab: c.usize("vocab_size")?,
        context: c.usize("max_position_embeddings")?,
        tied: c.bool("tie_word_embeddings")?,
        norm: Norm { eps: c.f64("rms_norm_eps")? as f32, ..Norm::default() },
        layers: vec![LayerSpec { attn: Some(attn), ffn: Some(ffn), ..LayerSpec::default() }; layers],
        ..Spec::default()
    })
}

/// Among the keys of a configuration: what the file calls those that were renamed.
const FILE_NAMES: &str = "\0names";

/// Gives a key the name that [`llama_like`] reads it by. Errors still tell the file's.
pub(super) fn renamed(config: &mut Value, from: &str, to: &str) {
    if let Some(v) = config.as_object_mut().and_then(|o| o.shift_remove(from)) {
        config[to] = v;
        config[FILE_NAMES][to] = from.into();
    }
}

/// The way back, in what [`to_llama_like`] wrote.
pub(super) fn named_back(out: &mut Map<String, Value>, to: &str, from: &str) {
    if let Some(v) = out.shift_remove(to) {
        out.insert(from.into(), v);
    }
}

/// Says that RoPE turns neighbouring channels.
pub(super) fn interleave(spec: &mut Spec) {
    attns(spec).filter_map(|a| a.rope.as_mut()).for_each(|r| r.style = RopeStyle::Interleaved);
}

/// `1 / sqrt(x)`, rounded once.
pub(super) fn inverse_root(x: f64) -> f32 {
    (1.0 / x.sqrt()) as f32
}

/// Every attention of the network.
pub(super) fn attns(spec: &mut Spec) -> impl Iterator<Item = &mut AttnSpec> {
    spec.layers.iter_mut().filter_map(|l| l.attn.as_mut())
}

/// Every feed-forward part of the network.
pub(super) fn ffns(spec: &mut Spec) -> impl Iterator<Item = &mut FfnSpec> {
    spec.layers.iter_mut().filter_map(|l| l.ffn.as_mut())
}

/// The first attention and feed-forward part, from which a configuration for all layers is written.
pub(super) fn first(spec: &Spec) -> Result<(&AttnSpec, &FfnSpec), SpecError> {
    match (spec.layers.iter().find_map(|l| l.attn.as_ref()), spec.layers.iter().find_map(|l| l.ffn.as_ref())) {
        (Some(a), Some(f)) => Ok((a, f)),
        _ => Err(SpecError { what: "no layer has attention, or none has a feed-forward part".into() }),
    }
}

/// The keys that [`llama_like`] reads, from the first layer that has them.
pub(super) fn to_llama_like(spec: &Spec, model_type: &str, class: &str) -> Result<Map<String, Value>, SpecError> {
    let (a, f) = first(spec)?;
    let mut out = Map::new();
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("architectures", json!([class]));
    set("model_type", json!(model_type));
    set("vocab_size", json!(spec.vocab));
    set("hidden_size", json!(spec.hidden));
    set("intermediate_size", json!(f.width));
    set("num_hidden_layers", json!(spec.layers.len()));
    set("num_attention_heads", json!(a.heads));
    set("num_key_value_heads", json!(a.kv_heads));
    set("head_dim", json!(a.head_dim));
    set("hidden_act", json!(activation_name(f.act)));
    set("max_position_embeddings", json!(spec.context));
    set("rms_norm_eps", num(spec.norm.eps));
    set("tie_word_embeddings", json!(spec.tied));
    // Layers without RoPE are the family's to say.
    if let Some(r) = spec.layers.iter().find_map(|l| l.attn.as_ref()?.rope.as_ref()) {
        let interleaved = INTERLEAVED.contains(&spec.arch.as_str());
        rope::to_config(r, (a.head_dim, interleaved), spec.context, &mut out)?;
    }
    Ok(out)
}

/// The name that transformers gives an activation.
pub(super) fn activation_name(act: Activation) -> &'static str {
    match act {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Relu => "relu",
        Activation::Relu2 => "relu2",
        Activation::Xielu => "xielu",
        // GPT-OSS's configuration calls what it does so.
        Activation::SwigluOai => "silu",
        Activation::Sigmoid => "sigmoid",
    }
}

/// `layer_types` as the network has them.
pub(super) fn layer_types(spec: &Spec) -> Value {
    let kind = |l: &LayerSpec| l.attn.as_ref().is_some_and(|a| a.window.is_some());
    spec.layers.iter().map(|l| if kind(l) { "sliding_attention" } else { "full_attention" }).collect()
}

/// The first window there is.
pub(super) fn window(spec: &Spec) -> Option<usize> {
    spec.layers.iter().find_map(|l| l.attn.as_ref()?.window)
}

/// Reads a configuration just written and compares: what it cannot say (uneven layers, a missing part, ...) is refused
/// by name.
pub(super) fn verified(
    spec: &Spec,
    config: Map<String, Value>,
    read: fn(&Value) -> Result<Spec, SpecError>,
) -> Result<Value, SpecError> {
    let config = Value::Object(config);
    let fault =
        |what: String| SpecError { what: format!("a {} config.json cannot describe this network: {what}", spec.arch) };
    let again = read(&config).map_err(|e| fault(e.what))?;
    if again == *spec {
        return Ok(config);
    }
    Err(fault(difference(spec, &again)))
}

/// The first thing that two networks say differently, in words: `layer 1: ffn.width is 40, the file would say 48`.
pub(super) fn difference(have: &Spec, said: &Spec) -> String {
    match (serde_json::to_value(have), serde_json::to_value(said)) {
        (Ok(a), Ok(b)) => match first_difference("", &a, &b) {
            Some(text) => match text.strip_prefix("layers.").and_then(|t| t.split_once('.')) {
                Some((l, rest)) => format!("layer {l}: {rest}"),
                None => text,
            },
            None => "it is no number".into(),
        },
        (Err(e), _) | (_, Err(e)) => e.to_string(),
    }
}

fn first_difference(path: &str, have: &Value, said: &Value) -> Option<String> {
    let at = |key: &dyn std::fmt::Display| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match (have, said) {
        // A key that is left out where it says nothing stands on one side only.
        (Value::Object(a), Value::Object(b)) if a.keys().all(|k| b.contains_key(k)) => {
            b.iter().find_map(|(k, v)| first_difference(&at(k), a.get(k).unwrap_or(&Value::Null), v))
        }
        (Value::Object(a), Value::Object(b)) if b.keys().all(|k| a.contains_key(k)) => {
            a.iter().find_map(|(k, v)| first_difference(&at(k), v, b.get(k).unwrap_or(&Value::Null)))
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().find_map(|(i, (x, y))| first_difference(&at(&i), x, y))
        }
        (a, b) if a == b => None,
        (a, b) => Some(format!("{path} is {a}, the file would say {b}")),
    }
}

/// The attention of every layer but those with a recurrent mixer in its place; an error where another one has none.
pub(super) fn attn_parts(spec: &Spec) -> Result<Vec<&AttnSpec>, SpecError> {
    if let Some(l) = spec.layers.iter().position(|l| l.attn.is_none() && l.mixer.is_none()) {
        return Err(SpecError { what: format!("layer {l} has no attention") });
    }
    if spec.layers.iter().all(|l| l.attn.is_none()) {
        return Err(SpecError { what: "the network has no layers".into() });
    }
    Ok(spec.layers.iter().filter_map(|l| l.attn.as_ref()).collect())
}

/// The feed-forward part of every layer; an error where one has none.
pub(super) fn ffn_parts(spec: &Spec) -> Result<Vec<&FfnSpec>, SpecError> {
    if let Some(l) = spec.layers.iter().position(|l| l.ffn.is_none()) {
        return Err(SpecError { what: format!("layer {l} has no feed-forward part") });
    }
    Ok(spec.layers.iter().filter_map(|l| l.ffn.as_ref()).collect())
}

/// The tensor of `module` for a place, inside `model.layers.N.` or outside: `model.` and `.weight` or `.bias` are put
/// around it.
pub(super) fn named(place: &Place, prefix: &str, layers: &str, module: &str) -> Source {
    let part = if place.part == Part::Bias { "bias" } else { "weight" };
    Source::whole(match place.layer {
        Some(l) => format!("{prefix}{layers}.{l}.{module}.{part}"),
        None => format!("{prefix}{module}.{part}"),
    })
}

/// A head's rows of the matrix that makes keys and values of the latent; those of keys hold the transpose of what
/// queries meet.
pub(super) fn of_head(whole: Source, place: &Place, latent: Latent) -> Option<Source> {
    let Latent { plain, value, .. } = latent;
    let from = place.expert? as usize * (plain + value);
    Some(match place.role {
        Role::KUp => Source { rows: Some((from, from + plain)), turned: true, ..whole },
        _ => Source { rows: Some((from + plain, from + plain + value)), ..whole },
    })
}

/// Names of Llama's tensors, which most families repeat. Experts as Qwen writes them, shared ones and latents as DeepSeek
/// does.
pub(super) fn llama_source(spec: &Spec, place: &Place) -> Option<Source> {
    let attn = place.layer.and_then(|l| spec.layers.get(l as usize)?.attn.as_ref());
    let latent = attn.and_then(|a| a.latent);
    // Parameters of modules that are no matrices: nothing stands behind their names.
    let bare = |name: &str| Some(Source::whole(format!("model.layers.{}.{name}", place.layer?)));
    let module = match place.role {
        Role::Sinks => return bare("self_attn.sinks"),
        Role::Correction => return bare("mlp.gate.e_score_correction_bias"),
        Role::KUp | Role::VUp => {
            return of_head(named(place, "model.", "layers", "self_attn.kv_b_proj"), place, latent?);
        }
        Role::QDown => "self_attn.q_a_proj",
        Role::QDownNorm => "self_attn.q_a_layernorm",
        Role::Q if latent.is_some_and(|m| m.q_rank.is_some()) => "self_attn.q_b_proj",
        Role::KvDown => "self_attn.kv_a_proj_with_mqa",
        Role::KvDownNorm => "self_attn.kv_a_layernorm",
        Role::SharedRouter => "mlp.shared_expert_gate",
        Role::SharedGate => "mlp.shared_experts.gate_proj",
        Role::SharedUp => "mlp.shared_experts.up_proj",
        Role::SharedDown => "mlp.shared_experts.down_proj",
        Role::Head => return Some(named(place, "", "", "lm_head")),
        Role::Embed => "embed_tokens",
        Role::FinalNorm => "norm",
        Role::AttnNorm => "input_layernorm",
        Role::Q => "self_attn.q_proj",
        Role::K => "self_attn.k_proj",
        Role::V => "self_attn.v_proj",
        Role::O => "self_attn.o_proj",
        Role::QNorm => "self_attn.q_norm",
        Role::KNorm => "self_attn.k_norm",
        Role::FfnNorm => "post_attention_layernorm",
        Role::Router => "mlp.gate",
        Role::Gate | Role::Up | Role::Down => {
            let name = match place.role {
                Role::Gate => "gate_proj",
                Role::Up => "up_proj",
                _ => "down_proj",
            };
            let module = match place.expert {
                Some(e) => format!("mlp.experts.{e}.{name}"),
                None => format!("mlp.{name}"),
            };
            return Some(named(place, "model.", "layers", &module));
        }
        _ => return None,
    };
    Some(named(place, "model.", "layers", module))
}

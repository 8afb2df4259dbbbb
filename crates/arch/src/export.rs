//! The way out: the network as another layout holds it, and every tensor that a file of that layout has.
//!
//! The names come from the same mappings that read files. What a layout keeps differently (the order of the rows of q
//! and k, a norm's scale less one) shows as a difference between the two [`Spec`]s, from which a writer sees what to
//! rearrange.

use super::{GgufKeys, Source, SourceOf, falcon_h1, family, mixers, rope};
use lacuna_spec::{LayerSpec, QkNorm, RopeScaling, RopeStyle, Spec, SpecError};
use lacuna_spec::{Part, Place, Role};

/// A tensor of a file to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name in the file.
    pub name: String,
    /// Its shape, slowest axis first.
    pub shape: Vec<usize>,
    /// What it holds, one below the other: one place for most; q, k and v of a fused matrix; every expert of a stack.
    pub parts: Vec<Place>,
    /// The file keeps the transpose, `[in, out]`.
    pub transposed: bool,
    /// The rows lie in so many groups, each with its share of every part.
    pub groups: usize,
    /// Rows of so many parts take turns: row `i` of the first, of the second, ..., then row `i + 1`.
    pub step: usize,
    /// For each part, whether the file keeps its transpose within the matrix.
    pub turned: Vec<bool>,
    /// Where rows of several parts stand by turns: which of the parts, and rows of it; empty where each part is whole.
    pub order: Vec<(usize, usize, usize)>,
}

/// A network without holes, and where its layers come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Whole {
    /// The network: every layer has both parts.
    pub spec: Spec,
    /// For each of its layers the layer of the network whose weights it has.
    pub layers: Vec<usize>,
    /// Layers (of the network it was made from) that are left out: both their parts were missing.
    pub left_out: Vec<usize>,
    /// Layers (of the network it was made from) with a missing part, which becomes a part of zeros: it adds nothing, as
    /// before.
    pub filled: Vec<usize>,
}

/// The network with its missing parts put back as parts of the usual shape, since no other program's files can say that
/// one is missing, and with norms whose divisor is their width: what that changes of them is [`norm_factor`].
///
/// A matrix in a shortcut is refused: it can be neither said nor folded into what stands around it.
pub fn whole(spec: &Spec) -> Result<Whole, SpecError> {
    if let Some(place) = spec.first_shortcut() {
        let what = format!(
            "{place} is a matrix in a shortcut of the residual stream, which no other program's files can say: such a \
             model is kept in the packed format only (a `slice` step with basis = \"one\" leaves a model without)"
        );
        return Err(SpecError { what });
    }
    let (some_attn, some_ffn) =
        (spec.layers.iter().find_map(|l| l.attn.clone()), spec.layers.iter().find_map(|l| l.ffn.clone()));
    let (mut layers, mut from, mut left_out, mut filled) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (l, layer) in spec.layers.iter().enumerate() {
        if layer.attn.is_none() && layer.ffn.is_none() && layer.mixer.is_none() {
            if spec.layer_inputs.is_some() || layer.output_scale || !spec.shared_keys().is_empty() {
                let what = format!(
                    "layer {l} has neither attention nor a feed-forward part, and cannot be left out of a network whose \
                     layers do more, or read each other's keys: such a model is kept in the packed format only"
                );
                return Err(SpecError { what });
            }
            left_out.push(l);
            continue;
        }
        // A mixer stands where attention would, and in networks that are mixers alone also where the FFN would.
        let mixes = layer.mixer.is_some();
        let attn = layer.attn.clone().or_else(|| some_attn.clone().filter(|_| !mixes));
        let ffn = layer.ffn.clone().or_else(|| some_ffn.clone());
        let mixer_alone = mixes && some_ffn.is_none();
        if (attn.is_none() && !mixes) || (ffn.is_none() && !mixer_alone) {
            let part = if ffn.is_some() || mixer_alone { "attention" } else { "a feed-forward part" };
            return Err(SpecError { what: format!("layer {l} lacks {part}, and so does every other layer") });
        }
        if (attn.is_some(), ffn.is_some()) != (layer.attn.is_some(), layer.ffn.is_some()) {
            filled.push(l);
        }
        let (mixer, order, output_scale, laurel) = (layer.mixer.clone(), layer.order, layer.output_scale, layer.laurel);
        layers.push(LayerSpec { attn, ffn, mixer, order, output_scale, laurel, ..LayerSpec::default() });
        // No other program's layers share weights: each gets a copy.
        from.push(spec.weights_of(l));
    }
    if layers.is_empty() {
        return Err(SpecError { what: "no layer is left".into() });
    }
    let mut spec = Spec { layers, ..spec.clone() };
    if let Some(n) = spec.norm.divisor.take() {
        spec.norm.eps = (f64::from(spec.norm.eps) * n as f64 / spec.hidden as f64) as f32;
    }
    Ok(Whole { spec, layers: from, left_out, filled })
}

/// What the scale of a norm of the residual stream is multiplied with where its divisor becomes its width, with
/// `eps * divisor / width`: the root of divisor over width.
pub fn norm_factor(spec: &Spec, place: &Place) -> f32 {
    let stream = matches!(
        place.role,
        Role::EmbedNorm
            | Role::AttnNorm
            | Role::AttnPostNorm
            | Role::MixerNorm
            | Role::FfnNorm
            | Role::FfnPostNorm
            | Role::FinalNorm
    );
    match spec.norm.divisor {
        Some(n) if stream && place.part == Part::Weight => (n as f64 / spec.hidden as f64).sqrt() as f32,
        _ => 1.0,
    }
}

/// What the values of row `row` of a place are multiplied with where a layout has its factors in the weights: `from` is
/// the network as it is stored, its layer `layer` that of the place; `to` the network as the layout holds it.
pub fn fold(from: &Spec, layer: Option<usize>, to: &Spec, place: &Place, row: usize) -> f32 {
    if from.arch != "falcon_h1" {
        return 1.0;
    }
    let layers = layer.zip(place.layer);
    let layers = layers.and_then(|(l, at)| Some([from.layers.get(l)?, to.layers.get(at as usize)?]));
    falcon_h1::fold(place, row, [from, to], layers)
}

/// The families whose GGUF files keep the rows of q and k so that RoPE pairs neighbours.
const NEIGHBOURS: [&str; 10] = [
    "granitemoe",
    "granitemoehybrid",
    "bamba",
    "llama",
    "mistral",
    "mixtral",
    "ministral3",
    "smollm3",
    "granite",
    "olmo",
];
/// The families in which RoPE pairs neighbours in every file.
pub(super) const INTERLEAVED: [&str; 11] = [
    "glm",
    "glm4",
    "cohere",
    "cohere2",
    "ernie4_5",
    "helium",
    "gptj",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "llama4",
];
/// The families whose Hugging Face files keep a norm's scale less one.
const LESS_ONE: [&str; 7] = ["gemma", "gemma2", "gemma3", "nemotron", "qwen3_next", "qwen3_5", "qwen3_5_moe"];
/// The families whose embedding is scaled by the root of its width.
const SCALED: [&str; 5] = ["gemma", "gemma2", "gemma3", "gemma4", "gemma3n"];
/// The families whose config.json has one word for the biases of q, k, v and o of all layers.
const ATTENTION_BIAS: [&str; 21] = [
    "granitemoehybrid",
    "gemma3n",
    "llama4",
    "gemma4",
    "llama",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "cohere",
    "cohere2",
    "nemotron",
    "hunyuan_v1_dense",
    "apertus",
    "gpt_neox",
];
/// The families whose config.json has one word for the biases of gate, up and down of all layers.
const MLP_BIAS: [&str; 6] = ["llama", "smollm3", "granite", "seed_oss", "nemotron", "helium"];
/// The families whose config.json has one word for all biases of all layers.
const ALL_BIASES: [&str; 3] = ["ernie4_5", "starcoder2", "falcon"];

/// Which channels pair in a Hugging Face checkpoint of this family.
pub fn hf_rope_style(spec: &Spec) -> RopeStyle {
    if INTERLEAVED.contains(&spec.arch.as_str()) { RopeStyle::Interleaved } else { RopeStyle::Half }
}

/// The network as a Hugging Face checkpoint holds it.
pub fn hf_spec(spec: &Spec) -> Result<Spec, SpecError> {
    let mut out = spec.clone();
    if LESS_ONE.contains(&spec.arch.as_str()) {
        out.norm.offset = 1.0;
    }
    let style = hf_rope_style(spec);
    for layer in &mut out.layers {
        let Some(r) = layer.attn.as_mut().and_then(|a| a.rope.as_mut()) else { continue };
        r.style = style;
        if let RopeScaling::Factors { factors } = &r.scaling {
            r.scaling = match rope::llama3_of_factors(factors, r.theta, r.dims) {
                Some(s) => s,
                None => {
                    let what = "RoPE has a list of factors that is no llama3 scaling; no config.json can say it";
                    return Err(SpecError { what: what.into() });
                }
            };
        }
    }
    // GGUF files of Mistral call themselves llama; what has windows is not one.
    let mut attns = out.layers.iter().filter_map(|l| l.attn.as_ref());
    if out.arch == "llama" && attns.clone().next().is_some() && attns.all(|a| a.window.is_some()) {
        out.arch = "mistral".into();
    }
    // Half of each head turns in Bamba, all of it or nothing in Granite 4.
    let turns = |l: &LayerSpec| l.attn.as_ref().and_then(|a| Some(a.rope.as_ref()?.dims < a.head_dim));
    if out.arch == "granitemoehybrid" && out.layers.iter().any(|l| turns(l) == Some(true)) {
        out.arch = "bamba".into();
    }
    open_biases(&mut out);
    out.layers.iter_mut().filter_map(|l| l.mixer.as_mut()).for_each(|m| mixers::set_form(m, true, false));
    Ok(out)
}

/// Gives every matrix that one word of config.json speaks of a bias where one of them has one. Those that had none are
/// zeros, which add nothing.
fn open_biases(spec: &mut Spec) {
    let knows = |families: &[&str]| families.contains(&spec.arch.as_str());
    let (attention, mlp) = (knows(&ATTENTION_BIAS), knows(&MLP_BIAS));
    let attns = || spec.layers.iter().filter_map(|l| l.attn.as_ref());
    let ffns = || spec.layers.iter().filter_map(|l| l.ffn.as_ref());
    let attention = attention && attns().any(|a| a.qkv_bias || a.o_bias);
    let mlp = mlp && ffns().any(|f| f.bias || f.down_bias);
    let either = attns().any(|a| a.qkv_bias || a.o_bias) || ffns().any(|f| f.bias || f.down_bias);
    let (attention, mlp) = if knows(&ALL_BIASES) { (either, either) } else { (attention, mlp) };
    for layer in &mut spec.layers {
        if let Some(a) = layer.attn.as_mut().filter(|_| attention) {
            (a.qkv_bias, a.o_bias) = (true, true);
        }
        if let Some(f) = layer.ffn.as_mut().filter(|_| mlp) {
            (f.bias, f.down_bias) = (true, false);
        }
    }
}

/// llama.cpp has one name for Granite 4 and Bamba; where no layer of Granite 4 has a mixer, its files are Granite 3's.
fn hybrid_as_gguf(spec: &mut Spec) {
    if spec.arch == "bamba" {
        spec.arch = "granitemoehybrid".into();
    }
    if spec.arch == "granitemoehybrid" && spec.first_mixer().is_none() {
        let mixture = spec.layers.iter().any(|l| l.ffn.as_ref().is_some_and(|f| f.experts.is_some()));
        spec.arch = if mixture { "granitemoe" } else { "granite" }.into();
    }
}

/// The network as a GGUF file holds it.
pub fn gguf_spec(spec: &Spec) -> Result<Spec, SpecError> {
    let mut out = spec.clone();
    let neighbours = NEIGHBOURS.contains(&spec.arch.as_str());
    if spec.arch == "mistral" {
        out.arch = "llama".into();
    }
    hybrid_as_gguf(&mut out);
    if spec.arch == "falcon_h1" {
        falcon_h1::folded(&mut out);
    }
    if LESS_ONE.contains(&spec.arch.as_str()) {
        out.norm.offset = 0.0;
    }
    if SCALED.contains(&spec.arch.as_str()) {
        out.embed_scale = (spec.hidden as f64).sqrt() as f32;
        if let Some(i) = &mut out.layer_inputs {
            i.embed_scale = (i.width as f64).sqrt() as f32;
        }
    }
    for layer in &mut out.layers {
        let Some(r) = layer.attn.as_mut().and_then(|a| a.rope.as_mut()) else { continue };
        if neighbours {
            r.style = RopeStyle::Interleaved;
        }
        if let Some(factors) = rope::llama3_factors(r) {
            r.scaling = RopeScaling::Factors { factors };
        }
    }
    // llama.cpp reads Qwen3.5's value heads in the order in which it repeats key heads.
    let tiled = spec.arch.starts_with("qwen3_5");
    out.layers.iter_mut().filter_map(|l| l.mixer.as_mut()).for_each(|m| mixers::set_form(m, false, tiled));
    Ok(out)
}

/// The metadata of a GGUF file of `spec` (as [`gguf_spec`] gives it), or why there can be none. What is written is read
/// again and compared.
pub fn to_gguf(spec: &Spec) -> Result<GgufKeys, SpecError> {
    (family(spec)?.to_gguf)(spec)
}

/// Every tensor of a Hugging Face checkpoint of `spec` (as [`hf_spec`] gives it).
pub fn hf_targets(spec: &Spec) -> Result<Vec<Target>, SpecError> {
    targets(spec, family(spec)?.source)
}

/// Every tensor of a GGUF file of `spec` (as [`gguf_spec`] gives it), those that describe RoPE apart.
pub fn gguf_targets(spec: &Spec) -> Result<Vec<Target>, SpecError> {
    targets(spec, family(spec)?.gguf_source)
}

/// The width of a head, where a norm of heads has a scale of its own for each: such a scale has two axes in files.
fn own_scales(spec: &Spec, place: &Place) -> Option<usize> {
    let heads = matches!(place.role, Role::QNorm | Role::KNorm);
    let a = spec.layers.get(place.layer? as usize)?.attn.as_ref()?;
    (heads && a.qk_norm_over == QkNorm::Heads).then_some(a.head_dim)
}

fn targets(spec: &Spec, source_of: SourceOf) -> Result<Vec<Target>, SpecError> {
    let mut out: Vec<(Target, Vec<Source>)> = Vec::new();
    let mut at = std::collections::HashMap::new();
    for place in spec.places() {
        let Some(source) = source_of(spec, &place) else {
            return Err(SpecError { what: format!("{} has no name for {place} in this layout", spec.arch) });
        };
        let i = *at.entry(source.name.clone()).or_insert_with(|| {
            let (name, transposed, step, groups) = (source.name.clone(), source.transposed, source.step, source.groups);
            let (shape, parts, turned, order) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            out.push((Target { name, shape, parts, transposed, groups, step, turned, order }, Vec::new()));
            out.len() - 1
        });
        out[i].0.parts.push(place);
        out[i].1.push(source);
    }
    let finish = |(mut target, sources): (Target, Vec<Source>)| {
        let mut order: Vec<usize> = (0..sources.len()).collect();
        order.sort_by_key(|&i| (sources[i].slice, sources[i].rows));
        target.parts = order.iter().map(|&i| target.parts[i]).collect();
        target.turned = order.iter().map(|&i| sources[i].turned).collect();
        let turn = |(r, c): (usize, usize), turned: bool| if turned { (c, r) } else { (r, c) };
        let shapes = target.parts.iter().filter_map(|p| spec.shape(p));
        let shapes: Vec<(usize, usize)> = shapes.zip(&target.turned).map(|(s, t)| turn(s, *t)).collect();
        let first = target.parts[0];
        let table = first.role.is_table();
        target.order = by_turns(&order.iter().map(|&i| &sources[i]).collect::<Vec<_>>());
        let (rows, cols) = (shapes.iter().map(|s| s.0).sum::<usize>(), shapes[0].1);
        let slices = sources.iter().filter_map(|s| s.slice).max().map(|most| most + 1);
        target.shape = match (table && first.part == Part::Weight, slices) {
            (false, None) => match own_scales(spec, &first) {
                Some(dim) => vec![shapes[0].1 / dim, dim],
                None => vec![shapes.iter().map(|s| s.1).sum()],
            },
            (false, Some(n)) => vec![n, shapes.iter().map(|s| s.1).sum::<usize>() / n],
            (true, Some(n)) if target.transposed => vec![n, cols, rows / n],
            (true, Some(n)) => vec![n, rows / n, cols],
            (true, None) if target.transposed => vec![cols, rows],
            (true, None) => vec![rows, cols],
        };
        if let [one] = sources.as_slice()
            && !one.axes.is_empty()
        {
            target.shape = one.axes.clone();
        }
        target
    };
    Ok(out.into_iter().map(finish).collect())
}

/// The order of rows of several parts that stand by turns.
fn by_turns(sources: &[&Source]) -> Vec<(usize, usize, usize)> {
    let mut all: Vec<(usize, usize, usize, usize)> = Vec::new();
    for (part, source) in sources.iter().enumerate() {
        let mut row = 0;
        for &(from, to) in &source.order {
            all.push((from, part, row, row + to - from));
            row += to - from;
        }
    }
    all.sort_unstable();
    all.into_iter().map(|(_, part, from, to)| (part, from, to)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama(more: serde_json::Value) -> Spec {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        });
        more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
        super::super::from_config(&config).unwrap()
    }

    #[test]
    fn missing_parts_come_back_and_empty_layers_go() {
        let mut spec = llama(json!({}));
        spec.layers[0] = LayerSpec::default();
        spec.layers[2].attn = None;
        let w = whole(&spec).unwrap();
        assert_eq!(
            (w.layers.as_slice(), w.left_out.as_slice(), w.filled.as_slice()),
            (&[1, 2][..], &[0][..], &[2][..])
        );
        assert_eq!(w.spec.layers[1].attn, spec.layers[1].attn);
        spec.layers.iter_mut().for_each(|l| l.attn = None);
        assert!(whole(&spec).unwrap_err().what.contains("layer 1 lacks attention"));
    }

    #[test]
    fn shortcuts_are_refused_and_divisors_folded() {
        let mut spec = llama(json!({}));
        spec.norm.divisor = Some(72);
        let held = whole(&spec).unwrap().spec.norm;
        assert_eq!(held.divisor, None);
        assert!((held.eps - 1e-5 * 72.0 / 32.0).abs() < 1e-10);
        let factor = |role| norm_factor(&spec, &Place::layer(0, role));
        assert_eq!((factor(Role::AttnNorm), factor(Role::QNorm), factor(Role::Q)), (1.5, 1.0, 1.0));
        spec.layers[1].ffn_shortcut = true;
        let said = whole(&spec).unwrap_err().what;
        assert!(said.contains("layers.1.ffn.shortcut") && said.contains("packed format only"), "{said}");
        assert!(hf_targets(&spec).unwrap_err().what.contains("layers.1.ffn.shortcut"));
        assert!(gguf_targets(&spec).unwrap_err().what.contains("layers.1.ffn.shortcut"));
    }

    #[test]
    fn both_ways_give_the_same_network() {
        for more in [
            json!({}),
            json!({"tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true}),
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
            // Wide heads: the lowest frequencies are divided by the whole factor, from which it is found again.
            json!({"head_dim": 64, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}}),
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}),
        ] {
            let spec = llama(more);
            let gguf = gguf_spec(&spec).unwrap();
            let keys = to_gguf(&gguf).unwrap();
            assert_eq!(keys.pairs[0].1, super::super::GgufValue::Str("llama".into()));
            assert_eq!(hf_spec(&gguf).unwrap(), spec);
        }
    }

    #[test]
    fn biases_that_config_json_says_together_come_together() {
        let mut spec = llama(json!({}));
        spec.layers[1].attn.as_mut().unwrap().o_bias = true;
        spec.layers[2].ffn.as_mut().unwrap().down_bias = true;
        let hf = hf_spec(&spec).unwrap();
        assert_eq!(hf, llama(json!({"attention_bias": true, "mlp_bias": true})));
        let config = super::super::to_config(&hf).unwrap();
        assert_eq!((&config["attention_bias"], &config["mlp_bias"]), (&json!(true), &json!(true)));
        // One word does not open the other; a class without the word is refused by name.
        spec.layers[2].ffn.as_mut().unwrap().down_bias = false;
        assert_eq!(hf_spec(&spec).unwrap(), llama(json!({"attention_bias": true})));
        spec.arch = "qwen2".into();
        spec.layers.iter_mut().for_each(|l| l.attn.as_mut().unwrap().qkv_bias = true);
        let e = super::super::to_config(&hf_spec(&spec).unwrap()).unwrap_err().what;
        assert!(e.contains("layer 1: attn.o_bias is true"), "{e}");
        spec.layers[1].attn.as_mut().unwrap().o_bias = false;
        spec.layers[1].ffn.as_mut().unwrap().down_bias = true;
        let e = super::super::to_config(&hf_spec(&spec).unwrap()).unwrap_err().what;
        assert!(e.contains("layer 1: ffn.down_bias is true"), "{e}");
    }

    #[test]
    fn gguf_has_the_biases_that_llama_cpp_reads() {
        let mut spec = llama(json!({}));
        spec.layers[1].attn.as_mut().unwrap().o_bias = true;
        spec.layers[1].ffn.as_mut().unwrap().down_bias = true;
        to_gguf(&gguf_spec(&spec).unwrap()).unwrap();
        spec.arch = "qwen2".into();
        spec.layers.iter_mut().for_each(|l| l.attn.as_mut().unwrap().qkv_bias = true);
        let e = to_gguf(&gguf_spec(&spec).unwrap()).unwrap_err().what;
        assert!(e.contains("layer 1: llama.cpp reads no bias on attn.o"), "{e}");
        spec.layers[1].attn.as_mut().unwrap().o_bias = false;
        let e = to_gguf(&gguf_spec(&spec).unwrap()).unwrap_err().what;
        assert!(e.contains("layer 1: llama.cpp reads no bias on ffn.down"), "{e}");
    }

    #[test]
    fn stacked_and_fused() {
        let spec = |name: &str, more: serde_json::Value| {
            let mut config = json!({
                "model_type": name, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 1e4,
            });
            more.as_object().unwrap().iter().for_each(|(k, v)| config[k] = v.clone());
            super::super::from_config(&config).unwrap()
        };
        let of = |targets: Vec<Target>, name: &str| targets.into_iter().find(|t| t.name == name).unwrap();
        let mixtral = gguf_spec(&spec("mixtral", json!({"num_local_experts": 4, "num_experts_per_tok": 2}))).unwrap();
        let up = of(gguf_targets(&mixtral).unwrap(), "blk.0.ffn_up_exps.weight");
        assert_eq!((up.shape, up.parts.len()), (vec![4, 48, 32], 4));
        to_gguf(&mixtral).unwrap();
        let phi = hf_spec(&spec("phi3", json!({}))).unwrap();
        let qkv = of(hf_targets(&phi).unwrap(), "model.layers.0.self_attn.qkv_proj.weight");
        assert_eq!((qkv.shape, qkv.parts[1].role), (vec![64, 32], Role::K));
    }

    #[test]
    fn what_a_file_cannot_say_is_refused_by_name() {
        let mut spec = gguf_spec(&llama(json!({}))).unwrap();
        spec.layers[1].ffn.as_mut().unwrap().width = 40;
        let e = super::super::to_config(&hf_spec(&spec).unwrap()).unwrap_err().what;
        assert!(e.contains("layer 1: ffn.width is 40"), "{e}");
        spec.layers[1].ffn.as_mut().unwrap().width = 48;
        spec.layers[0].attn.as_mut().unwrap().scale = 0.3;
        let e = to_gguf(&spec).unwrap_err().what;
        assert!(e.contains("layer 0: attn.scale is 0.3"), "{e}");
    }
}

//! What families with experts share: which layers have some, how files say it, and GGUF's keys of routing.

use serde_json::{Map, Value, json};

use super::config::num;
use super::config::{Config, ffns};
use super::gguf::GgufHead;
use super::gguf_out::{GgufKeys, GgufValue, standard_keys};
use lacuna_spec::{ExpertGroups, Experts, RouterScore, SharedExpert, Spec, SpecError};

/// Puts experts of `width` into the layers that `sparse` names.
pub(super) fn put(spec: &mut Spec, width: usize, experts: Experts, sparse: impl Fn(usize) -> bool) {
    for (_, f) in ffns(spec).enumerate().filter(|(l, _)| sparse(*l)) {
        (f.width, f.experts) = (width, Some(experts));
    }
}

/// The experts of the first layer that has some, and their width.
pub(super) fn first(spec: &Spec) -> Result<(Experts, usize), SpecError> {
    let found = spec.layers.iter().find_map(|l| l.ffn.as_ref().and_then(|f| Some((f.experts?, f.width))));
    found.ok_or_else(|| SpecError { what: format!("{} without experts", spec.arch) })
}

/// Layers without experts before the first that has some, and their width; that of experts where there are none.
pub(super) fn dense(spec: &Spec) -> Result<(usize, usize), SpecError> {
    let (_, width) = first(spec)?;
    let mut ffns = spec.layers.iter().map(|l| l.ffn.as_ref().filter(|f| f.experts.is_none()));
    let before = ffns.by_ref().take_while(Option::is_some).flatten().map(|f| f.width).collect::<Vec<_>>();
    Ok((before.len(), before.first().copied().unwrap_or(width)))
}

/// Routing as DeepSeek and GLM say it, beside `count` and `used`.
pub(super) fn routing(c: &Config, count: usize, score: RouterScore) -> Result<Experts, SpecError> {
    let each = c.usize("moe_intermediate_size")?;
    let shared = c.opt_usize("n_shared_experts")?.unwrap_or(0).saturating_mul(each);
    Ok(Experts {
        count,
        used: c.usize("num_experts_per_tok")?,
        normalize: c.bool("norm_topk_prob")?,
        score,
        scale: c.f64("routed_scaling_factor")? as f32,
        shared: (shared > 0).then_some(SharedExpert { width: shared, gate: false }),
        ..Experts::default()
    })
}

/// Groups of which not all are chosen from.
pub(super) fn groups(c: &Config, by: usize) -> Result<Option<ExpertGroups>, SpecError> {
    let (count, used) = (c.opt_usize("n_group")?.unwrap_or(1), c.opt_usize("topk_group")?.unwrap_or(1));
    Ok((count != used).then_some(ExpertGroups { count, used, by }))
}

/// Writes what [`routing`] and [`groups`] read.
pub(super) fn write_routing(spec: &Spec, out: &mut Map<String, Value>) -> Result<(), SpecError> {
    let ((e, width), (before, dense_width)) = (first(spec)?, dense(spec)?);
    let shared = e.shared.map_or(0, |s| s.width);
    if width == 0 || !shared.is_multiple_of(width) {
        let what =
            format!("shared experts of {shared} channels in all; a {} config.json counts {width} each", spec.arch);
        return Err(SpecError { what });
    }
    let mut set = |key: &str, v: Value| out.insert(key.into(), v);
    set("intermediate_size", json!(dense_width));
    set("moe_intermediate_size", json!(width));
    set("first_k_dense_replace", json!(before));
    set("n_routed_experts", json!(e.count));
    set("num_experts_per_tok", json!(e.used));
    set("n_shared_experts", json!(shared / width));
    set("norm_topk_prob", json!(e.normalize));
    set("routed_scaling_factor", num(e.scale));
    set("n_group", json!(e.groups.map_or(1, |g| g.count)));
    set("topk_group", json!(e.groups.map_or(1, |g| g.used)));
    Ok(())
}

/// Keys of routing that [`from_gguf`] reads.
pub(super) const KEYS: [&str; 4] =
    ["expert_shared_count", "expert_weights_scale", "expert_group_count", "expert_group_used_count"];

/// The experts of a GGUF file whose network `spec` is but for them, its first layers dense ones. `normalize` where the
/// file does not say.
pub(super) fn from_gguf(head: &GgufHead, spec: &mut Spec, normalize: bool) -> Result<(), SpecError> {
    let dense = head.usize("leading_dense_block_count")?.unwrap_or(0);
    // Of files whose parts are all as wide, or which have experts alone, each may stand for the other.
    let (width, dense_width) =
        match (head.usize("expert_feed_forward_length")?.filter(|n| *n > 0), head.usize("feed_forward_length")?) {
            (Some(width), Some(dense)) => (width, dense),
            (Some(one), None) | (None, Some(one)) => (one, one),
            (None, None) => (head.must("expert_feed_forward_length")?, 0),
        };
    let score = match head.usize("expert_gating_func")?.unwrap_or(0) {
        0 | 1 => RouterScore::Softmax,
        2 => RouterScore::Sigmoid,
        n => return Err(SpecError { what: format!("metadata: expert_gating_func is {n}; known are 1 and 2") }),
    };
    let each = head.usize("expert_shared_feed_forward_length")?.filter(|n| *n > 0);
    let shared = each.unwrap_or(head.usize("expert_shared_count")?.unwrap_or(0).saturating_mul(width));
    let has = |l: usize, name: &str| head.tensors.contains(&format!("blk.{l}.{name}"));
    let count = head.must("expert_count")?;
    let groups = match (head.usize("expert_group_count")?, head.usize("expert_group_used_count")?) {
        (Some(count), Some(used)) if count > 1 && used < count => Some(ExpertGroups { count, used, by: 2 }),
        _ => None,
    };
    let (used, scale) = (head.must("expert_used_count")?, head.f32("expert_weights_scale")?.filter(|s| *s != 0.0));
    let normalize = head.bool("expert_weights_norm")?.unwrap_or(normalize);
    for (l, f) in ffns(spec).enumerate() {
        if l < dense {
            (f.width, f.experts) = (dense_width, None);
            continue;
        }
        f.width = width;
        f.experts = Some(Experts {
            count,
            used,
            normalize,
            score,
            router_bias: has(l, "ffn_gate_inp.bias"),
            correction: has(l, "exp_probs_b.bias"),
            groups,
            scale: scale.unwrap_or(1.0),
            shared: (shared > 0).then_some(SharedExpert { width: shared, gate: has(l, "ffn_gate_inp_shexp.weight") }),
            ..Experts::default()
        });
        f.bias = has(l, "ffn_up_exps.bias");
        f.down_bias = false;
    }
    Ok(())
}

/// The keys of all networks, without experts and with every layer as wide as the dense ones.
pub(super) fn plain_keys(spec: &Spec, arch: &str) -> Result<GgufKeys, SpecError> {
    let mut plain = spec.clone();
    let (_, width) = dense(spec)?;
    ffns(&mut plain).for_each(|f| (f.width, f.experts) = (width, None));
    standard_keys(&plain, arch)
}

/// Adds what [`from_gguf`] reads.
pub(super) fn to_gguf(spec: &Spec, k: &mut GgufKeys) -> Result<(), SpecError> {
    let ((e, width), (before, _)) = (first(spec)?, dense(spec)?);
    k.number("expert_count", e.count)?;
    k.number("expert_used_count", e.used)?;
    k.number("expert_feed_forward_length", width)?;
    if before > 0 {
        k.number("leading_dense_block_count", before)?;
    }
    if let Some(s) = e.shared {
        if s.width.is_multiple_of(width) {
            k.number("expert_shared_count", s.width / width)?;
        }
        k.number("expert_shared_feed_forward_length", s.width)?;
    }
    if let Some(g) = e.groups {
        k.number("expert_group_count", g.count)?;
        k.number("expert_group_used_count", g.used)?;
    }
    k.set("expert_weights_scale", GgufValue::F32(e.scale));
    k.set("expert_weights_norm", GgufValue::Bool(e.normalize));
    k.number("expert_gating_func", if e.score == RouterScore::Sigmoid { 2 } else { 1 })
}

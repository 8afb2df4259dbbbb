//! What the tools of fp8, fp4, bitsandbytes, MLX and auto-round say in config.json.

use serde_json::{Map, Value};

use super::{Args, MAX_TARGETS, Method, Pattern, Quantized, Target, awq, base, bits, flag, gptq, group, text};

/// What is said of rounding that is not done here.
const ACTIVATIONS: &str = "rounding of activations is recorded, which is not done here";

fn floats(bits: u8, group: Option<usize>, block: Option<(usize, usize)>) -> Args {
    let targets = vec![Target::Name("Linear".into())];
    Args { bits, float: true, symmetric: true, group, block, ordered: false, targets }
}

/// DeepSeek's and Qwen's fp8 (`fp8`) and FBGEMM's: bytes of e4m3 with scales of blocks, rows or a tensor.
pub(super) fn fp8(q: &Map<String, Value>, method: &str) -> Result<Quantized, String> {
    if let Some(other) = text(q, "fmt")?.filter(|f| !["e4m3", "float8_e4m3fn"].contains(f)) {
        return Err(format!("fmt \"{other}\" is not read; e4m3 is"));
    }
    let block = match q.get("weight_block_size").filter(|b| !b.is_null()) {
        None => None,
        Some(b) => {
            let sizes = b.as_array().map(|l| l.iter().filter_map(Value::as_u64).collect::<Vec<u64>>());
            match sizes.as_deref() {
                Some([r, c]) if (1..=1 << 24).contains(r) && (1..=1 << 24).contains(c) => {
                    Some((*r as usize, *c as usize))
                }
                _ => return Err(format!("weight_block_size is {b}, expected two sizes")),
            }
        }
    };
    let mut out = base(Method::Scaled, method, method.into());
    out.groups.push(floats(8, None, block));
    if method == "fbgemm_fp8" || text(q, "activation_scheme")?.is_some() {
        out.notes.push(ACTIVATIONS.into());
    }
    Ok(out)
}

/// NVIDIA's ModelOpt: its keys lie flat in config.json, or under `quantization` in hf_quant_config.json.
pub(super) fn modelopt(q: &Map<String, Value>) -> Result<Quantized, String> {
    let q = q.get("quantization").and_then(Value::as_object).unwrap_or(q);
    let algorithm = text(q, "quant_algo")?.unwrap_or_default().to_uppercase();
    let mut out = base(Method::Scaled, "modelopt", algorithm.to_lowercase());
    match algorithm.as_str() {
        "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" => out.groups.push(floats(8, None, None)),
        "FP8_PB_WO" => out.groups.push(floats(8, None, Some((128, 128)))),
        "NVFP4" | "W4A16_NVFP4" => {
            out.groups.push(floats(4, group(q, &["group_size"])?.or(Some(16)), None));
        }
        "MXFP4" | "W4A16_MXFP4" => out.groups.push(floats(4, Some(32), None)),
        // A word for each module stands in a list; their tensors say the same.
        "MIXED_PRECISION" => {}
        other => {
            return Err(format!(
                "quant_algo \"{other}\" is not read; FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, MXFP4 and \
                 MIXED_PRECISION are"
            ));
        }
    }
    if !algorithm.starts_with("W4A16") && algorithm != "FP8_PB_WO" {
        out.notes.push(ACTIVATIONS.into());
    }
    if q.get("kv_cache_quant_algo").or(q.get("kv_cache_scheme")).is_some_and(|v| !v.is_null()) {
        out.notes.push("8-bit keys and values are recorded; keys and values are kept as --kv says".into());
    }
    Ok(out)
}

/// bitsandbytes: what each matrix is lies in tensors beside it.
pub(super) fn bitsandbytes(q: &Map<String, Value>) -> Result<Quantized, String> {
    let four = flag(q, "load_in_4bit", false)? || flag(q, "_load_in_4bit", false)?;
    let eight = flag(q, "load_in_8bit", false)? || flag(q, "_load_in_8bit", false)?;
    let kind = match (four, eight) {
        (true, false) => text(q, "bnb_4bit_quant_type")?.unwrap_or("fp4"),
        (false, true) => "int8",
        _ => return Err("neither or both of load_in_4bit and load_in_8bit are said".into()),
    };
    let mut out = base(Method::Bitsandbytes, "bitsandbytes", kind.into());
    let mut args = floats(if four { 4 } else { 8 }, four.then_some(64), None);
    args.float = four;
    out.groups.push(args);
    if eight {
        out.notes.push("outliers of activations are multiplied like all others".into());
    }
    Ok(out)
}

/// MLX: `quantization` in config.json, with an entry of its own for each module that differs.
pub(super) fn mlx(q: &Map<String, Value>) -> Result<Quantized, String> {
    let mode = text(q, "mode")?.unwrap_or("affine");
    let args = |q: &Map<String, Value>, targets: Vec<Target>, float: bool| -> Result<Args, String> {
        let bits = bits(q, &["bits"], None)?;
        let group = group(q, &["group_size"])?;
        Ok(Args { bits, float, symmetric: float, group, block: None, ordered: false, targets })
    };
    let float = match mode {
        "affine" => false,
        "mxfp4" | "nvfp4" | "mxfp8" => true,
        other => return Err(format!("mode \"{other}\" is not read; affine, mxfp4, nvfp4 and mxfp8 are")),
    };
    let mut out = base(Method::Mlx, "mlx", mode.into());
    out.groups.push(args(q, vec![Target::Name("Linear".into())], float)?);
    for (name, own) in q {
        let Some(own) = own.as_object().filter(|o| o.contains_key("bits")) else { continue };
        let mode = text(own, "mode")?.unwrap_or(mode);
        out.groups
            .push(args(own, vec![Target::Name(name.clone())], mode != "affine").map_err(|e| format!("{name}: {e}"))?);
        if out.groups.len() > MAX_TARGETS {
            return Err(format!("more than {MAX_TARGETS} modules of their own"));
        }
    }
    Ok(out)
}

/// auto-round: packed as GPTQ or AWQ packs.
pub(super) fn auto_round(q: &Map<String, Value>) -> Result<Quantized, String> {
    let packing = text(q, "packing_format")?.or(text(q, "backend")?).unwrap_or("auto_round:auto_gptq").to_lowercase();
    if let Some(kind) = text(q, "data_type")?.filter(|k| *k != "int") {
        return Err(format!("data_type \"{kind}\" of auto-round is not read; int is"));
    }
    let mut out = if packing.contains("awq") {
        awq(&Map::from_iter([
            ("bits".to_owned(), q.get("bits").cloned().unwrap_or_default()),
            ("group_size".to_owned(), q.get("group_size").cloned().unwrap_or_default()),
            ("zero_point".to_owned(), Value::Bool(!flag(q, "sym", true)?)),
        ]))?
    } else {
        // Its own packing keeps zero points as they are; AutoGPTQ's takes one off.
        let version = match packing.as_str() {
            p if p.contains("gptq") => "gptq",
            "auto_round" | "auto_round:exllamav2" | "auto_round:triton" => "gptq_v2",
            other => {
                return Err(format!(
                    "packing_format \"{other}\" is not read; auto_round:auto_gptq, auto_round:auto_awq, \
                     auto_round:exllamav2 and auto_round:triton are"
                ));
            }
        };
        let mut same = q.clone();
        same.insert("checkpoint_format".into(), version.into());
        gptq(&same)?
    };
    (out.producer, out.format) = ("auto-round".into(), packing);
    for args in &mut out.groups {
        args.targets = vec![Target::Name("Linear".into())];
    }
    let Some(first) = out.groups.first().cloned() else { return Ok(out) };
    for (name, own) in q.get("extra_config").and_then(Value::as_object).into_iter().flatten() {
        let own = own.as_object().ok_or_else(|| format!("extra_config.{name} is no object"))?;
        let inside = |e: String| format!("extra_config.{name}: {e}");
        let bits = bits(own, &["bits"], Some(first.bits)).map_err(inside)?;
        // Left as they were; their tensors say it.
        if bits > 8 {
            continue;
        }
        let group = match own.contains_key("group_size") {
            true => group(own, &["group_size"]).map_err(inside)?,
            false => first.group,
        };
        let symmetric = flag(own, "sym", first.symmetric).map_err(inside)?;
        let pattern = name.contains(['*', '\\', '(', '[', '|', '^', '$']);
        let target = if pattern { Target::Pattern(Pattern::new(name)) } else { Target::Name(name.clone()) };
        out.groups.push(Args { bits, group, symmetric, targets: vec![target], ..first.clone() });
        if out.groups.len() > MAX_TARGETS {
            return Err(format!("more than {MAX_TARGETS} modules of their own"));
        }
    }
    Ok(out)
}

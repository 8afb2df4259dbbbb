//! `compress`: recipe in, smaller model and honest report out.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use lacuna_base::unfinished;
use lacuna_base::units::show_bytes;
use lacuna_checkpoint::{Imatrix, SaveError, Tokenizer};
use lacuna_compress::{CompressError, Options, Outcomes, Planned, Progress, Recipe, compress, memory};
use lacuna_contract::Registry;
use lacuna_eval::{Across, CALIBRATION, Eval, HELD_OUT, Judged, Means};
use lacuna_format::Weights;
use lacuna_judge::{
    Baseline, Bench, CostTable, Footprint, Forecast, Hold, Measured, OwnBits, Products, Verdict, baselines, judge,
    measure, time_decode,
};
use lacuna_spec::{Part, Spec};
use serde_json::{Value, json};

use crate::cli::{self, Gate, Global};
use crate::common::{self, CompressBar, Model, Usage};
pub use crate::told::words;
use crate::{across, recipes, report, texts};

/// Alternating runs of each model that is timed.
const ROUNDS: usize = 5;
/// Tokens of a timed run.
const TIMED_TOKENS: usize = 48;
/// Tokens of a judging window and how many windows, where nobody says.
const JUDGED: (usize, usize) = (512, 16);
/// Bytes of a source that is loaded once to learn what its tokens take beside products.
pub const LOADED: u64 = 1 << 30;

/// What a compression came to.
pub struct Done {
    /// The walk's own account.
    pub outcomes: Outcomes,
    /// Held-out quality beside the dense model, unless judging was off.
    pub judged: Option<Judged>,
    /// The same on texts of other domains, each with its file's name. They decide nothing.
    pub domains: Vec<(String, Judged)>,
    /// The same for a result of another vocabulary, in the place of that.
    pub across: Option<Across>,
    /// The result's numbers.
    pub measured: Option<Measured>,
    /// The gate's word.
    pub verdict: Option<Verdict>,
    /// What the plan said of the result's speed.
    pub forecast: Option<Forecast>,
    /// Bytes of the source's tensors, and of all as f16.
    pub source_bytes: u64,
    /// Two bytes a parameter.
    pub bytes_f16: u64,
    /// Parameters.
    pub parameters: u64,
    /// Wall time.
    pub seconds: f64,
}

/// What the clock ran with and the losses did not, said wherever both are shown.
pub const TIMED_AS: &str = "Speeds are those of `generate`: 8-bit activations where weights are integers, keys and \
 values in 16 bits. Perplexities \
                            are of exact activations.";

/// Said where the source is itself rounded to few bits.
pub const SOURCE_IS_COARSE: &str =
    "The source itself has under 9 bits a weight: comparisons with low-bit rounding on it are weak evidence.";

impl Done {
    /// Bits a weight of so many bytes.
    pub fn bits(&self, bytes: u64) -> f64 {
        8.0 * bytes as f64 / self.parameters.max(1) as f64
    }
}

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Compress) -> anyhow::Result<ExitCode> {
    let source = common::open(g, &a.model)?;
    let done = work(g, a, &source)?;
    let json = json_of(&a.model, &a.recipe, &done);
    common::print(g, &json, || words(&done))?;
    if let Some(path) = &a.judging.report {
        report::write(path, &a.model, &a.recipe, &done, &[], &[])?;
        common::say(format!("report: {}", path.display()));
    }
    let pays = done.verdict.as_ref().is_none_or(|v| v.pays);
    Ok(if pays || a.judging.accept { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

/// Keeps what was measured beside the model, for whoever opens it later; without the list of tensors, which its own
/// description has.
pub fn save_report(model: &Path, report: &Value) -> anyhow::Result<()> {
    let mut report = report.clone();
    if let Some(fields) = report.as_object_mut() {
        fields.retain(|key, _| key != "tensors" && key != "out");
    }
    let path = model.join(crate::serve::REPORT);
    unfinished::write(&path, format!("{report:#}\n").as_bytes())
        .with_context(|| format!("the report at {}", path.display()))
}

/// Everything but the printing.
pub fn work(g: &Global, a: &cli::Compress, source: &Model) -> anyhow::Result<Done> {
    let start = Instant::now();
    let max_ram = common::size(a.max_ram.as_deref())?;
    let registry = lacuna_methods::registry();
    let mut sets = a.sets.clone();
    let flags = [("samples", a.samples.map(|n| n as u64)), ("seq_len", a.seq_len.map(|n| n as u64)), ("seed", a.seed)];
    sets.extend(flags.iter().filter_map(|(k, v)| v.map(|v| format!("calibration.{k}={v}"))));
    let context = source.checkpoint.spec().context;
    let recipe = fitting_recipe(a, sets, &registry, source.checkpoint.spec())?;
    if a.out.exists() && !(a.overwrite || a.resume) {
        anyhow::bail!("{} exists; --overwrite replaces it", a.out.display());
    }
    let tokenizer = source.tokenizer()?;
    // A model made with BOS in front of every text is calibrated and judged so, too.
    let bos = wants_bos(&tokenizer)?;
    let beside = besides(g, &a.judging.beside, a.judging.gate, source)?;
    writable(a.judging.report.as_deref())?;
    let imatrix = imatrix(a.imatrix.as_deref(), source)?;
    let calibration =
        texts::tokens(source, &tokenizer, &a.calibration, CALIBRATION, recipe.calibration.seq_len.min(context))?;
    let held_out = match &a.judging.eval {
        Some(file) => texts::read(source, &tokenizer, file)?,
        None => tokenizer.encode(HELD_OUT, false)?,
    };
    let domains = domains(&a.judging.domains, a.judging.gate, source, &tokenizer)?;
    let had = held_out.len() + usize::from(bos.is_some());
    let ctx = if a.judging.gate == Gate::Off && a.judging.ctx.is_none() {
        0
    } else {
        common::window(a.judging.ctx, JUDGED.0, context, had)?
    };
    let options = Options {
        out: &a.out,
        overwrite: a.overwrite,
        resume: a.resume,
        scratch: a.scratch.as_deref(),
        max_ram,
        bos,
        imatrix: imatrix.as_ref(),
        source: json!({ "model": source.name, "bytes": source.checkpoint.source_bytes() }),
    };
    let forecast = plan(g, source, &recipe, max_ram.is_none()).unwrap_or_else(|e| {
        common::say(format!("plan: not known beforehand: {e}"));
        None
    });
    let mut bar = CompressBar::default();
    let outcomes = kept_if_stopped(&a.out, || compress(&source.checkpoint, &calibration, &recipe, &options, &mut bar))?;
    let whole = outcomes.path.display().to_string();
    let _end = unfinished::on_end(move || Some(format!("{whole} is whole; the rest of the command was not done")));
    for n in &outcomes.notes {
        common::say(format!("note: {n}"));
    }
    let source_bytes = tensor_bytes(&source.checkpoint)?;
    let parameters: u64 = source.checkpoint.spec().parameters();
    let mut done = Done {
        outcomes,
        judged: None,
        domains: Vec::new(),
        across: None,
        measured: None,
        verdict: None,
        forecast,
        source_bytes,
        bytes_f16: 2 * parameters,
        parameters,
        seconds: 0.0,
    };
    if a.judging.gate != Gate::Off {
        let bars = common::bar(0, "judging");
        let progress = |at: usize, all: usize| {
            bars.set_length(all as u64);
            bars.set_position(at as u64);
        };
        let room = Means { max_ram, ..Means::default() };
        let there = held_out.len() / (ctx - usize::from(bos.is_some())).max(1);
        let few = || common::fitting("judging windows", JUDGED.1, there, "the text has no more");
        let windows = Some(a.judging.windows.unwrap_or_else(few));
        let eval = Eval { ctx, windows, bos, room, progress: Some(&progress), reader: None };
        let result = lacuna_checkpoint::open(&done.outcomes.path)?;
        let (mut judged, mut told, mut reference) = (None, None, None);
        let compared = if done.outcomes.kept.is_some() {
            let own = Tokenizer::open(&result)?;
            across::hold(&eval, &held_out, (&result, &own), (&source.checkpoint, &tokenizer)).map(|x| told = Some(x))
        } else {
            let made = reference.insert(eval.reference(&held_out, &source.checkpoint)?);
            eval.against(&result, made).map(|j| judged = Some(j))
        };
        match compared {
            // What ruins a model does not pay, whatever the baselines are.
            Err(e) if e.not_finite => common::say(format!("{}: {e}", done.outcomes.path.display())),
            compared => compared?,
        }
        if judged.is_some() {
            for (name, text) in &domains {
                let there = text.len() / (ctx - usize::from(bos.is_some())).max(1);
                let eval = Eval { windows: Some(a.judging.windows.unwrap_or(JUDGED.1).min(there)), ..eval.clone() };
                let judged = eval.reference(text, &source.checkpoint).and_then(|mut r| eval.against(&result, &mut r));
                done.domains.push((name.clone(), judged.with_context(|| format!("judging on --domain {name}"))?));
            }
        } else if !domains.is_empty() {
            common::say("note: --domain: texts are compared token by token, which a result of other tokens is not");
        }
        bars.finish_and_clear();
        let cache = common::cache_dir(g)?;
        let bench = Bench {
            source: &source.checkpoint,
            registry: &registry,
            cache: &cache,
            held_out: &held_out,
            calibration: &calibration,
            eval: &Eval { progress: None, ..eval.clone() },
            max_ram,
            own: OwnBits::of(&result)?,
        };
        let mut others = baselines(&bench, &mut bar)?;
        for why in std::mem::take(&mut others.left_out) {
            common::say(format!("note: {why}"));
            done.outcomes.notes.push(why);
        }
        for (name, model) in &beside {
            bar.phase(&format!("judging {name}"), 1);
            let mut measured = measure(name, &model.checkpoint, &held_out, bench.eval)
                .with_context(|| format!("judging --beside {name}"))?;
            if let Some(reference) = &mut reference {
                measured.kl = bench.eval.against(&model.checkpoint, reference)?.against.map(|x| x.kl_mean);
            }
            others.all.push(Baseline { measured, path: Some(model.checkpoint.path().to_owned()) });
        }
        let mut measured = Measured {
            name: "result".into(),
            bytes: done.outcomes.bytes,
            loss: judged.as_ref().map_or(f64::INFINITY, |j| j.nll),
            nats_a_byte: None,
            ppl: judged.as_ref().map_or(f64::INFINITY, |j| j.ppl),
            kl: judged.as_ref().and_then(|j| j.against.as_ref()).map(|x| x.kl_mean),
            speed: None,
        };
        if let Some(x) = &told {
            across::in_bytes(x, &mut measured, others.all.iter_mut().map(|b| &mut b.measured));
        }
        if a.judging.gate == Gate::Full && (judged.is_some() || told.is_some()) {
            time(&mut measured, &result, &mut others.all, max_ram)?;
        }
        let list: Vec<Measured> = others.all.into_iter().map(|b| b.measured).collect();
        done.verdict = Some(judge(&measured, &list));
        (done.judged, done.across) = (judged, told);
        done.measured = Some(measured);
    }
    done.seconds = start.elapsed().as_secs_f64();
    save_report(&done.outcomes.path, &json_of(&a.model, &a.recipe, &done))?;
    Ok(done)
}

/// Opens what `--imatrix` names.
pub fn imatrix(path: Option<&Path>, source: &Model) -> anyhow::Result<Option<Imatrix>> {
    let Some(path) = path else { return Ok(None) };
    let read = Imatrix::open(path, source.checkpoint.spec())?;
    let (known, left) = read.counted();
    let foreign = if left > 0 { format!("; {left} of its tensors are none of this model's") } else { String::new() };
    let all = source.checkpoint.spec().places();
    let all = all.iter().filter(|p| p.part == Part::Weight && p.role.is_linear()).count();
    common::say_once(format!(
        "{}: squares of the inputs of {known} matrices{foreign}; of {all} in all, the others' come from the calibration \
         text",
        path.display()
    ));
    Ok(Some(read))
}

/// Refuses a report that could not be written in the end.
pub fn writable(report: Option<&Path>) -> anyhow::Result<()> {
    let Some(path) = report else { return Ok(()) };
    if path.is_dir() {
        return Err(Usage(format!("--report {}: a directory; name a file", path.display())).into());
    }
    match path.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        Some(dir) => Err(Usage(format!("--report {}: there is no folder {}", path.display(), dir.display())).into()),
        None => Ok(()),
    }
}

/// Reads the texts of other domains, before work begins.
fn domains(
    files: &[PathBuf],
    gate: Gate,
    source: &Model,
    tokenizer: &Tokenizer,
) -> anyhow::Result<Vec<(String, Vec<u32>)>> {
    if let (Some(file), Gate::Off) = (files.first(), gate) {
        return Err(Usage(format!("--domain {}: nothing is judged with --gate off", file.display())).into());
    }
    let name = |f: &Path| f.file_stem().unwrap_or(f.as_os_str()).to_string_lossy().into_owned();
    let read = |f: &PathBuf| {
        let text = texts::read(source, tokenizer, f)?;
        if text.len() < 2 {
            anyhow::bail!("--domain {}: {} tokens; nothing can be predicted there", f.display(), text.len());
        }
        Ok((name(f), text))
    };
    files.iter().map(read).collect()
}

/// Opens the models that are to be judged beside the result. They read the source's tokens.
pub fn besides(g: &Global, names: &[String], gate: Gate, source: &Model) -> anyhow::Result<Vec<(String, Model)>> {
    if let (Some(name), Gate::Off) = (names.first(), gate) {
        return Err(Usage(format!("--beside {name}: nothing is judged with --gate off")).into());
    }
    let of = |name: &String| {
        let model = common::open(g, name)?;
        let (theirs, mine) = (model.checkpoint.spec().vocab, source.checkpoint.spec().vocab);
        if theirs != mine {
            return Err(Usage(format!("--beside {name}: it has {theirs} tokens, {} has {mine}", source.name)).into());
        }
        if model.checkpoint.spec().context < source.checkpoint.spec().context {
            common::say_once(format!("note: {name} sees {} positions only", model.checkpoint.spec().context));
        }
        let last = Path::new(name).file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok((last, model))
    };
    names.iter().map(of).collect()
}

/// Bytes of all tensors of a model as they are stored, those included that the result lacks.
pub fn tensor_bytes(weights: &dyn Weights) -> anyhow::Result<u64> {
    let mut sum = 0;
    for place in weights.spec().places() {
        sum += weights.get(&place)?.map_or(0, |s| s.bytes());
        weights.release(&place);
    }
    Ok(sum)
}

/// The recipe with what was set; calibration sequences that nobody asked for by length are no longer than the model's
/// context.
fn fitting_recipe(
    a: &cli::Compress,
    mut sets: Vec<String>,
    registry: &Registry,
    spec: &Spec,
) -> anyhow::Result<Recipe> {
    let context = spec.context;
    const KEY: &str = "calibration.seq_len";
    let text = recipes::text(&a.recipe)?;
    let parse =
        |sets: &[String]| Recipe::parse(&text, registry, sets).map_err(|e| Usage(format!("recipe {}: {e}", a.recipe)));
    let recipe = parse(&sets)?;
    let len = recipe.calibration.seq_len;
    if len <= context || !recipe.calibrates(spec) {
        return Ok(recipe);
    }
    let in_file = recipe.resolved.get("calibration").is_some_and(|c| c.get("seq_len").is_some());
    let set = sets.iter().any(|s| s.split('=').next() == Some(KEY));
    if set || (in_file && !recipes::is_carried(&a.recipe)) {
        return Err(Usage(format!("{KEY} = {len}: give 2 to {context}, the model's context")).into());
    }
    let len = common::fitting("tokens in a calibration sequence", len, context, common::NO_FURTHER);
    sets.push(format!("{KEY}={len}"));
    Ok(parse(&sets)?)
}

/// Compresses, and says how to go on where that comes to no end: what is complete stays in a hidden folder on purpose.
fn kept_if_stopped<T>(out: &Path, compress: impl FnOnce() -> Result<T, CompressError>) -> Result<T, CompressError> {
    let told = |out: &Path| {
        let kept = lacuna_checkpoint::left_behind(out)?;
        Some(format!(
            "what is complete is kept in {}: the same command with --resume goes on from there",
            kept.display()
        ))
    };
    let stopped = out.to_owned();
    let _end = unfinished::on_end(move || told(&stopped));
    compress().inspect_err(|e| {
        // A refusal has not begun.
        if !matches!(e, CompressError::Save(SaveError::Refused(_))) {
            told(out).into_iter().for_each(common::say);
        }
    })
}

/// Times the result beside every baseline that competes with it; the others cannot change the verdict. The models run
/// in turn, all in memory where they fit below the ceiling (without one: into the memory that is free), else one at a
/// time. Where not even the largest fits, nothing is timed, which is said, and bytes alone count.
fn time(
    measured: &mut Measured,
    result: &dyn Weights,
    others: &mut [Baseline],
    max_ram: Option<u64>,
) -> anyhow::Result<()> {
    let competes = |b: &Baseline| lacuna_judge::competes(measured, &b.measured);
    let rivals: Vec<(usize, PathBuf)> = others
        .iter()
        .enumerate()
        .filter(|(_, b)| competes(b))
        .filter_map(|(i, b)| b.path.clone().map(|p| (i, p)))
        .collect();
    let stored: Vec<u64> =
        std::iter::once(measured.bytes).chain(rivals.iter().map(|(i, _)| others[*i].measured.bytes)).collect();
    let used = memory::resident().unwrap_or(0);
    let room = max_ram.or_else(|| Some(memory::available()?.saturating_add(used)));
    let hold = match (Hold::within(room, used, &stored), max_ram) {
        (Ok(hold), _) => hold,
        (Err(need), Some(max)) => {
            common::say(format!(
                "not timed: the largest of {} models would take {}, above the ceiling of {}; bytes alone are compared",
                stored.len(),
                show_bytes(need),
                show_bytes(max)
            ));
            return Ok(());
        }
        // Nobody asked for a ceiling: what is free is the system's guess.
        (Err(_), None) => Hold::InTurn,
    };
    if hold == Hold::InTurn {
        common::say(format!(
            "{} models are timed one at a time, each loaded anew for each run: together they do not fit into memory",
            stored.len()
        ));
    }
    let opened = rivals.iter().map(|(_, p)| Ok(lacuna_checkpoint::open(p)?)).collect::<anyhow::Result<Vec<_>>>()?;
    let mut models: Vec<&dyn Weights> = vec![result];
    models.extend(opened.iter().map(|c| c as &dyn Weights));
    let bar = common::bar(ROUNDS as u64, "timing in turn");
    let speeds = time_decode(&models, ROUNDS, TIMED_TOKENS, hold, |r| bar.set_position(r as u64))?;
    bar.finish_and_clear();
    measured.speed = speeds.first().copied().flatten();
    for ((i, _), speed) in rivals.iter().zip(&speeds[1..]) {
        others[*i].measured.speed = *speed;
    }
    Ok(())
}

/// Whether the model's own tokenizer puts BOS before a text, and which token that is.
pub fn wants_bos(tokenizer: &Tokenizer) -> anyhow::Result<Option<u32>> {
    let first = tokenizer.encode("a", true)?.first().copied();
    Ok(tokenizer.bos().filter(|b| first == Some(*b)))
}

/// Says beforehand what the recipe will come to: bytes by arithmetic, speed from this machine's cost table. Filling the
/// table takes memory, so a run under a ceiling does without. Gives the forecast of decoding, where there is one.
fn plan(g: &Global, source: &Model, recipe: &Recipe, timed: bool) -> anyhow::Result<Option<Forecast>> {
    let forms = lacuna_compress::forms(&source.checkpoint, recipe)?;
    let (mut matrices, mut weights, mut bytes) = (0, 0.0, 0.0);
    for f in forms.iter().filter(|f| f.touched) {
        matrices += f.matrices;
        weights += f.weights as f64 * f.matrices as f64;
        bytes += f.sample.bytes() as f64 * f.scale * f.matrices as f64;
    }
    let drops = recipe.steps.iter().any(|s| s.is_model_wide());
    let mut said = format!(
        "plan: {matrices} matrices, {} at 16 bits, become about {} ({:.2} bits a weight); what no step touches keeps \
         its bytes{}",
        show_bytes((2.0 * weights) as u64),
        show_bytes(bytes as u64),
        8.0 * bytes / f64::max(weights, 1.0),
        if drops { "; what whole parts dropped save is not counted" } else { "" }
    );
    let mut forecast = None;
    if timed {
        let mut table = CostTable::open(&common::cache_dir(g)?);
        let before =
            lacuna_compress::forms(&source.checkpoint, &Recipe::parse("version = 1", &Registry::default(), &[])?)?;
        let [after, before] = [&forms, &before].map(|forms| products(forms));
        table.learn(&[&after, &before])?;
        let loaded = source.checkpoint.source_bytes() <= LOADED;
        let read = table.products(&before)?;
        let beside = if loaded { table.beside(&source.checkpoint, before.footprint, read)? } else { 0.0 };
        let mut foretell = |p: &Products| -> anyhow::Result<(Forecast, f64)> {
            Ok((Forecast { products: table.products(p)?, beside }, table.pace(p.footprint)))
        };
        let ((after, pace), from) = (foretell(&after)?, after.footprint);
        let (result, source) = (after.speed(pace), foretell(&before).map(|(f, pace)| f.speed(pace))?);
        said += &if loaded {
            format!("; it should decode {result:.0} tok/s here, the source {source:.0}")
        } else {
            format!("; its products alone allow {result:.0} tok/s here, the source's {source:.0}")
        };
        let from = if from.cached() { " from cache" } else { "" };
        said += &format!(", while plain 4-bit products read {:.0} GB/s{from} as now", pace / 1e9);
        // What dropped parts save is in what comes and not in the plan.
        forecast = (loaded && !drops).then_some(after);
        table.save();
    }
    common::say(said);
    Ok(forecast)
}

/// The products of a token with matrices of these forms.
pub fn products(forms: &[Planned]) -> Products<'_> {
    let used = || forms.iter().filter(|f| f.used > 0.0);
    let bytes: f64 = used().map(|f| f.sample.bytes() as f64 * f.scale * f.matrices as f64).sum();
    let forms = used().map(|f| (f.sample.as_ref(), f.scale * f.used)).collect();
    Products { forms, footprint: Footprint::of(bytes as u64) }
}

/// What the plan foretells for the pace of the timed runs, and what came.
pub fn foretold(d: &Done) -> Option<(f64, lacuna_judge::Speed)> {
    let speed = d.measured.as_ref()?.speed?;
    Some((d.forecast?.speed(speed.pace), speed))
}

/// What came, for programs.
pub fn json_of(model: &str, recipe: &str, d: &Done) -> Value {
    let mut json = json!({
        "model": model, "recipe": recipe, "out": d.outcomes.path, "source_bytes": d.source_bytes, "bytes_f16": d.bytes_f16,
        "bytes_after": d.outcomes.bytes, "bits_per_weight": d.bits(d.outcomes.bytes),
        "ppl_dense": d.judged.as_ref().and_then(|j| j.against.as_ref()).map(|x| x.ppl_dense),
        "ppl": d.judged.as_ref().map(|j| j.ppl).or(d.across.as_ref().map(|x| x.model.nll.exp())),
        "kl_mean": d.judged.as_ref().and_then(|j| j.against.as_ref()).map(|x| x.kl_mean),
        "kl_p99": d.judged.as_ref().and_then(|j| j.against.as_ref()).map(|x| x.kl_p99),
        "domains": d.domains.iter().map(|(name, j)| json!({ "text": name, "judged": j })).collect::<Vec<_>>(),
        "top1_agree": d.judged.as_ref().and_then(|j| j.against.as_ref()).map(|x| x.top1_agree),
        "decode_tok_s": d.measured.as_ref().and_then(|m| m.speed).map(|s| s.median),
        "decode_tok_s_foretold": foretold(d).map(|(f, _)| f), "pace_bytes_per_second": foretold(d).map(|(_, s)| s.pace),
        "baselines": d.verdict.as_ref().map(|v| &v.against), "pays": d.verdict.as_ref().map(|v| v.pays),
        "calibration": { "samples": d.outcomes.calibration.0, "seq_len": d.outcomes.calibration.1 },
        "notes": d.outcomes.notes, "tensors": d.outcomes.tensors, "seconds": d.seconds, "peak_rss_bytes": memory::peak(),
    });
    if let (Some(x), Some(fields)) = (&d.across, json.as_object_mut()) {
        fields.extend(across::keys(x));
        fields["ppl_dense"] = json!(x.dense.nll.exp());
    }
    json
}

/// Whether speeds were taken.
pub fn timed(d: &Done) -> bool {
    d.measured.as_ref().is_some_and(|m| m.speed.is_some())
}

/// Whether the source is itself rounded to few bits.
pub fn source_is_coarse(d: &Done) -> bool {
    d.bits(d.source_bytes) < 9.0
}

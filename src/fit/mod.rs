//! `fit`: the best model within a budget.

mod account;
mod candidates;
mod journal;
mod speed;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use lacuna_base::unfinished;
use lacuna_base::units::show_bytes;
use lacuna_compress::{Levels, Recipe, Room, levels};
use lacuna_eval::{CALIBRATION, Eval, EvalError, Means, Reference};
use lacuna_format::Weights;
use lacuna_judge::fit::{self, Budget, Found, Measure, Meter, Point, is_end};
use lacuna_spec::{Place, Spec};
use serde_json::json;

use crate::cli::{self, Effort, Global, Reader};
use crate::common::{self, CompressBar, Model, Usage};
use crate::{compress, convert, report, texts};
use account::{card, flags};
use candidates::{Candidate, candidates};
use journal::Journal;

pub use account::{marks, to_json, words};

/// Share of the calibration text that gives statistics; the rest is searched on.
const STATISTICS: f64 = 0.7;
/// Tokens of a window of the search.
const WINDOW: usize = 512;
/// Bits a weight below which a source counts as rounded already.
const COARSE: f64 = 9.0;

/// What a search and its judging came to.
pub struct Fitted {
    /// What is wanted of the result, in words.
    pub wanted: String,
    /// The search's account; `None` of a dry run that found nothing to do.
    pub found: Found,
    /// Points of the front in words: name, point.
    pub front: Vec<(String, Point)>,
    /// The compression, its judgement and its verdict; `None` of a dry run.
    pub done: Option<compress::Done>,
    /// The recipe that makes the result again.
    pub recipe: PathBuf,
    /// What the reader wants, where it is another program.
    pub written: Option<PathBuf>,
    /// The sha256 of the calibration text's tokens.
    pub text: String,
    /// What `compress` needs beside the recipe to make the result again.
    pub flags: String,
}

/// Runs the verb.
pub fn run(g: &Global, a: &cli::Fit) -> anyhow::Result<ExitCode> {
    let source = common::open(g, &a.model)?;
    let fitted = work(g, a, &source)?;
    common::print(g, &to_json(a, &fitted), || words(a, &fitted))?;
    if let (Some(path), Some(done)) = (&a.judging.report, &fitted.done) {
        report::write(path, &a.model, "fit", done, &[], &marks(&fitted))?;
        common::say(format!("report: {}", path.display()));
    }
    let pays = fitted.done.as_ref().and_then(|d| d.verdict.as_ref()).is_none_or(|v| v.pays);
    Ok(if pays || a.judging.accept { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn effort(e: Effort, strategy: cli::Strategy, seed: u64) -> fit::Effort {
    let strategy = match strategy {
        cli::Strategy::Races => fit::Strategy::Races,
        cli::Strategy::Knapsack => fit::Strategy::Knapsack,
        cli::Strategy::Random => fit::Strategy::Random,
        cli::Strategy::Uniform => fit::Strategy::Uniform,
    };
    match e {
        Effort::Quick => fit::Effort { strategy, trials: 12, windows: [2, 4, 6], bands: 0, front: 7, seed },
        Effort::Normal => fit::Effort { strategy, trials: 120, windows: [4, 16, 64], bands: 3, front: 12, seed },
        Effort::Long => fit::Effort { strategy, trials: 1200, windows: [4, 16, 64], bands: 6, front: 16, seed },
    }
}

/// Bytes that keys and values of `context` positions take, in 16 bits.
fn cache_bytes(spec: &Spec, context: usize) -> u64 {
    let one = |l: &lacuna_spec::LayerSpec| {
        l.attn.as_ref().filter(|a| a.kv_from.is_none()).map_or(0, |a| {
            let seen = a.window.or(a.chunk).map_or(context, |w| w.min(context));
            4 * (seen * a.kv_heads * a.head_dim) as u64
        })
    };
    spec.layers.iter().map(one).sum()
}

/// What is asked for.
enum Asked {
    Bytes(u64),
    Loss(f64),
    Speed(f64),
    Nothing,
}

/// What is asked for, and in words.
fn budget(a: &cli::Fit, spec: &Spec) -> anyhow::Result<(Asked, String)> {
    let bytes = common::size(a.max_bytes.as_deref())?;
    if let Some(n) = a.context.filter(|n| *n > spec.context) {
        common::say(format!("note: --context {n}: the model sees {} positions, which are counted", spec.context));
    }
    let memory = match common::size(a.max_ram.as_deref())? {
        None => None,
        Some(ram) => {
            let cache = cache_bytes(spec, a.context.unwrap_or(4096).min(spec.context));
            match ram.checked_sub(cache).filter(|b| *b > 0) {
                Some(left) => Some(left),
                None => {
                    return Err(Usage(format!(
                        "--max-ram {}: keys and values of {} positions alone take {}; give more, or a smaller --context",
                        show_bytes(ram),
                        a.context.unwrap_or(4096).min(spec.context),
                        show_bytes(cache)
                    ))
                    .into());
                }
            }
        }
    };
    let most = [bytes, memory].into_iter().flatten().min();
    let positive = |flag: &str, x: f64, of: &str| {
        let bad = || Usage(format!("{flag} {x}: give a number of {of} above 0"));
        if x.is_finite() && x > 0.0 { Ok(x) } else { Err(bad()) }
    };
    Ok(match (most, a.max_loss, a.min_decode_tok_s) {
        (Some(bytes), None, None) => (Asked::Bytes(bytes), format!("at most {}", show_bytes(bytes))),
        (None, Some(loss), None) => {
            let loss = positive("--max-loss", loss, "nats")?;
            (Asked::Loss(loss), format!("KL of at most {loss} nats a token"))
        }
        (None, None, Some(speed)) => {
            let speed = positive("--min-decode-tok-s", speed, "tokens a second")?;
            (Asked::Speed(speed), format!("at least {speed} tok/s"))
        }
        (None, None, None) => (Asked::Nothing, "where the front bends".into()),
        _ => {
            return Err(Usage(
                "a number of bytes, --max-loss and --min-decode-tok-s exclude each other: one bounds, the others come of it"
                    .into(),
            )
            .into());
        }
    })
}

/// Measures stitched models on the windows of the search's text.
struct Trials<'a> {
    levels: &'a Levels<'a>,
    source: &'a Model,
    /// Windows, one after the other, and tokens of each that the text gives.
    text: &'a [u32],
    each: usize,
    eval: Eval<'a>,
    references: HashMap<(usize, usize), Reference<'a>>,
    journal: Journal,
    bar: indicatif::ProgressBar,
}

impl Measure for Trials<'_> {
    type Error = anyhow::Error;

    fn kl(&mut self, assignment: &[usize], from: usize, n: usize) -> anyhow::Result<Vec<f64>> {
        let n = n.min(self.windows().saturating_sub(from));
        if n == 0 {
            return Ok(Vec::new());
        }
        if let Some(known) = self.journal.known(assignment, from, n) {
            return Ok(known);
        }
        let text = &self.text[from * self.each..(from + n) * self.each];
        let eval = Eval { windows: Some(n), ..self.eval.clone() };
        if !self.references.contains_key(&(from, n)) {
            let made = eval.reference(text, &self.source.checkpoint)?;
            self.references.insert((from, n), made);
        }
        let reference = self.references.get_mut(&(from, n)).context("a reference was lost")?;
        let judged = eval.against(&self.levels.stitch(assignment), reference);
        let kl = match judged {
            // A level that breaks the model loses; it does not end the search.
            Err(EvalError { not_finite: true, .. }) => vec![f64::INFINITY; n],
            judged => judged?.window_kl,
        };
        self.journal.learn(assignment, from, n, &kl)?;
        Ok(kl)
    }

    fn windows(&self) -> usize {
        self.text.len() / self.each
    }

    fn tell(&mut self, trial: usize, bytes: u64, kl: f64) {
        self.bar.set_position(trial as u64);
        let what = format!("{}, KL {kl:.4}", show_bytes(bytes));
        common::tell_slowly(&self.bar.prefix(), trial as u64, self.bar.length(), &what);
        self.bar.set_message(what);
    }
}

/// What most of an assignment's matrices became, blocks and ends apart.
fn name_of(levels: &Levels<'_>, all: &[Candidate], assignment: &[usize]) -> String {
    let part = |ends: bool| {
        let mut weights: BTreeMap<String, u64> = BTreeMap::new();
        for (c, &l) in levels.choices.iter().zip(assignment).filter(|(c, _)| is_end(c) == ends) {
            let name = c.levels[l].recipe.map_or("as it came", |r| all[r].name.as_str());
            *weights.entry(name.to_owned()).or_default() += c.parameters;
        }
        let mut by_weight: Vec<(String, u64)> = weights.into_iter().collect();
        by_weight.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let sum: u64 = by_weight.iter().map(|w| w.1).sum();
        let shown: Vec<String> = by_weight
            .iter()
            .take(3)
            .map(|(n, w)| if *w == sum { n.clone() } else { format!("{n} {:.0}%", 100.0 * *w as f64 / sum as f64) })
            .collect();
        shown.join(", ") + if by_weight.len() > 3 { ", …" } else { "" }
    };
    match (part(false), part(true)) {
        (body, ends) if ends.is_empty() => body,
        (body, ends) if body.is_empty() => format!("embedding {ends}"),
        (body, ends) => format!("{body}; embedding {ends}"),
    }
}

/// The recipe that brings every matrix to its level.
fn recipe_of(
    levels: &Levels<'_>,
    all: &[Candidate],
    assignment: &[usize],
    spec: &Spec,
    calibration: &toml::Table,
) -> String {
    let every: Vec<Place> = levels.choices.iter().map(|c| c.place).collect();
    let mut steps = Vec::new();
    for (i, candidate) in all.iter().enumerate() {
        let mine: Vec<Place> = levels
            .choices
            .iter()
            .zip(assignment)
            .filter(|(c, l)| c.levels[**l].recipe == Some(i))
            .map(|(c, _)| c.place)
            .collect();
        if !mine.is_empty() {
            steps.extend(candidate.steps(spec, &mine, candidates::targets(&mine, &every)));
        }
    }
    candidates::recipe(calibration, steps)
}

/// Searches, makes, judges.
pub fn work(g: &Global, a: &cli::Fit, source: &Model) -> anyhow::Result<Fitted> {
    let spec = source.checkpoint.spec().clone();
    let (asked, wanted) = budget(a, &spec)?;
    if a.reader == Reader::Gguf && a.out.extension().is_none_or(|e| e != "gguf") {
        return Err(Usage(format!("{}: the name of a GGUF file ends in .gguf", a.out.display())).into());
    }
    if a.out.exists() && !(a.overwrite || a.resume) && !a.dry_run {
        anyhow::bail!("{} exists; --overwrite replaces it", a.out.display());
    }
    let written = [beside(&a.out, "recipe.toml"), beside(&a.out, "packed"), beside(&a.out, "README.md")];
    let known = a.overwrite || a.resume || a.dry_run;
    if let Some(there) =
        written.iter().take(if a.reader == Reader::Lacuna { 1 } else { 3 }).find(|p| p.exists() && !known)
    {
        anyhow::bail!("{} exists; --overwrite replaces it", there.display());
    }
    // What the end reads and writes is looked at before the search: an hour is long for a misspelt name.
    compress::writable(a.judging.report.as_deref())?;
    drop(compress::besides(g, &a.judging.beside, a.judging.gate, source)?);
    overwritable(a)?;
    for file in a.judging.eval.iter().chain(&a.judging.domains) {
        common::read_text(file)?;
    }
    if let (Some(ctx), true) = (a.judging.ctx, a.judging.gate != cli::Gate::Off) {
        common::window(Some(ctx), ctx, spec.context, ctx)?;
    }
    let max_ram = common::size(a.max_ram.as_deref())?;
    let bits = 8.0 * compress::tensor_bytes(&source.checkpoint)? as f64 / spec.parameters().max(1) as f64;
    let coarse = bits < COARSE;
    if coarse {
        common::say(format!(
            "note: your source has {bits:.1} bits a weight: it is rounded already, and its codes stay as they are. Give \
             the bf16 model for more"
        ));
    }
    let imatrix = compress::imatrix(a.imatrix.as_deref(), source)?;
    // The texts: what gives statistics, what is searched on. What judges is opened in the end.
    let tokenizer = source.tokenizer()?;
    let bos = compress::wants_bos(&tokenizer)?;
    let text = texts::tokens(source, &tokenizer, &a.calibration, CALIBRATION, WINDOW.min(spec.context))?;
    let len = WINDOW.min(spec.context);
    let samples = ((text.len() as f64 * STATISTICS) as usize / len).min(a.samples.unwrap_or(128)).max(1);
    let searched: Vec<u32> = match &a.search {
        Some(file) => texts::read(source, &tokenizer, file)?,
        None => text.get(samples * len..).unwrap_or_default().to_vec(),
    };
    let each = len - usize::from(bos.is_some());
    if text.len() < samples * len || (a.search.is_none() && searched.len() < each) {
        anyhow::bail!(
            "the calibration text has {} tokens: statistics and search need {} at the least; give a longer one with \
             --calibration, or one for the search with --search",
            text.len(),
            2 * len
        );
    }
    if searched.len() < each {
        anyhow::bail!("the text of --search has {} tokens: give at least {each}", searched.len());
    }
    let mut calibration = toml::Table::new();
    calibration.insert("samples".into(), toml::Value::Integer(samples as i64));
    calibration.insert("seq_len".into(), toml::Value::Integer(len as i64));

    let registry = lacuna_methods::registry();
    let all = candidates(a.reader, coarse, a.effort, imatrix.is_some());
    let recipes = all
        .iter()
        .map(|c| Recipe::parse(&c.recipe(&spec, &calibration), &registry, &[]).context(c.name.clone()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    if imatrix.is_some() && !recipes.iter().any(|r| lacuna_compress::reads_imatrix(r, &spec)) {
        return Err(Usage(format!(
            "--imatrix: nothing that is tried on this source for {} with --effort {} reads it; leave it out",
            a.reader.name(),
            a.effort.name()
        ))
        .into());
    }
    let scratch = a.scratch.clone().unwrap_or_else(|| {
        a.out.parent().filter(|p| !p.as_os_str().is_empty()).map_or_else(|| PathBuf::from("."), PathBuf::from)
    });
    let room = Room { scratch: &scratch, max_ram, bos, imatrix: imatrix.as_ref() };
    let mut bar = CompressBar::default();
    let mut made = levels(&source.checkpoint, &text, &recipes, &room, &mut bar)?;
    drop(bar);
    pin(&mut made, &a.keep, &all)?;
    for n in &made.notes {
        common::say(format!("note: {n}"));
    }
    if made.choices.is_empty() {
        anyhow::bail!(
            "nothing of {} can be made smaller for {}: its matrices are rounded already, or their shapes fit no level",
            a.model,
            a.reader.name()
        );
    }
    let n = made.choices.len();
    common::say(format!(
        "{n} matrices at up to {} levels each, {} on disk; searching for {wanted}",
        made.choices.iter().map(|c| c.levels.len()).max().unwrap_or(0),
        show_bytes(made.scratch_bytes())
    ));

    let plan = effort(a.effort, a.strategy, a.seed);
    let identity = json!({
        "source": lacuna_compress::fingerprint(&source.checkpoint), "program": lacuna_compress::revision(),
        "recipes": recipes.iter().map(|r| r.resolved.to_string()).collect::<Vec<_>>(), "text": lacuna_compress::tokens_fingerprint(&text),
        "searched": lacuna_compress::tokens_fingerprint(&searched), "len": len,
        "imatrix": a.imatrix.as_ref().map(std::fs::read).transpose()?.map(|b| lacuna_compress::bytes_fingerprint(&b)),
    });
    let mut trials = Trials {
        levels: &made,
        source,
        text: &searched,
        each,
        eval: Eval { ctx: len, windows: None, bos, room: Means { max_ram, ..Means::default() }, ..Eval::default() },
        references: HashMap::new(),
        journal: if a.dry_run { Journal::none() } else { Journal::open(&a.out, a.resume, &identity)? },
        bar: common::bar(plan.trials as u64, "trials"),
    };
    if a.resume && !a.dry_run {
        common::say(format!("{} trials are known", trials.journal.len()));
    }
    let (meter, budget) = match asked {
        Asked::Speed(tok_s) => {
            let (meter, most) = speed::meter(g, source, &made, tok_s)?;
            (meter, Budget::Within(most))
        }
        Asked::Bytes(most) => (Meter::bytes(&made), Budget::Within(most)),
        Asked::Loss(most) => (Meter::bytes(&made), Budget::Loss(most)),
        Asked::Nothing => (Meter::bytes(&made), Budget::Knee),
    };
    let found = fit::search(&made, &mut trials, &meter, budget, plan)?;
    trials.bar.finish_and_clear();
    for n in &found.notes {
        common::say(format!("note: {n}"));
    }
    match (asked, budget) {
        (Asked::Bytes(most), _) if found.chosen.bytes > most => {
            anyhow::bail!(
                "nothing as small as {} was found: the smallest for {} takes {}",
                show_bytes(most),
                a.reader.name(),
                show_bytes(found.chosen.bytes)
            );
        }
        (Asked::Speed(tok_s), Budget::Within(most)) if found.chosen.takes > most => {
            let comes = tok_s * most as f64 / found.chosen.takes as f64;
            anyhow::bail!(
                "nothing as fast as {tok_s} tok/s was found: the fastest for {}, {}, should decode {comes:.1} tok/s here",
                a.reader.name(),
                show_bytes(found.chosen.bytes)
            );
        }
        _ => {}
    }
    let front = found.front.iter().map(|p| (name_of(&made, &all, &p.assignment), p.clone())).collect();
    let recipe = beside(&a.out, "recipe.toml");
    let text = lacuna_compress::tokens_fingerprint(&text);
    let mut fitted = Fitted { wanted, found, front, done: None, recipe, written: None, text, flags: String::new() };
    if a.dry_run {
        return Ok(fitted);
    }
    let text = recipe_of(&made, &all, &fitted.found.chosen.assignment, &spec, &calibration);
    // What was chosen may read nothing of it, and `compress` then refuses it.
    let read = Recipe::parse(&text, &registry, &[]).is_ok_and(|r| lacuna_compress::reads_imatrix(&r, &spec));
    fitted.flags = flags(a, read);
    let about = format!(
        "# Written by lacuna fit for {}: {}.\n# Makes it again: lacuna compress {} --recipe THIS{} --out DIR\n",
        a.model, fitted.wanted, a.model, fitted.flags
    );
    // Under another name until the model is there: a recipe and a model of two searches must not lie side by side.
    let new = beside(&a.out, "recipe.partial.toml");
    let _gone = unfinished::Temporary::new(new.clone());
    unfinished::write(&new, (about + &text).as_bytes())
        .with_context(|| format!("{}: cannot be written", new.display()))?;
    drop(made);
    let packed = if a.reader == Reader::Lacuna { a.out.clone() } else { beside(&a.out, "packed") };
    let args = cli::Compress {
        scratch: a.scratch.clone(),
        model: a.model.clone(),
        recipe: new.display().to_string(),
        out: packed.clone(),
        sets: Vec::new(),
        calibration: a.calibration.clone(),
        imatrix: a.imatrix.clone().filter(|_| read),
        samples: None,
        seq_len: None,
        seed: None,
        max_ram: a.max_ram.clone(),
        resume: a.resume,
        overwrite: a.overwrite || a.resume || a.reader != Reader::Lacuna,
        judging: cli::Judging { accept: true, report: None, ..a.judging.clone() },
    };
    let done = compress::work(g, &args, source)?;
    unfinished::replace(&new, &fitted.recipe)
        .with_context(|| format!("{}: cannot be written", fitted.recipe.display()))?;
    let account = compress::json_of(&a.model, &fitted.recipe.display().to_string(), &done);
    compress::save_report(&done.outcomes.path, &account)?;
    if a.reader != Reader::Lacuna {
        convert::write(g, &packed, a.reader, &a.out, a.overwrite)?;
        fitted.written = Some(a.out.clone());
    }
    journal::forget(&a.out);
    let card = card(a, &fitted, &done);
    let at = if a.reader == Reader::Lacuna { a.out.join("README.md") } else { beside(&a.out, "README.md") };
    unfinished::write(&at, card.as_bytes()).with_context(|| format!("{}: cannot be written", at.display()))?;
    fitted.done = Some(done);
    Ok(fitted)
}

/// Refuses to begin what could not be put in its place in the end.
fn overwritable(a: &cli::Fit) -> anyhow::Result<()> {
    if a.dry_run {
        return Ok(());
    }
    let out = a.out.display();
    if a.out.file_name().is_none() {
        return Err(Usage(format!("-o {out}: give the result a name of its own")).into());
    }
    if let Some(dir) = a.out.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        return Err(Usage(format!("-o {out}: there is no folder {}", dir.display())).into());
    }
    match (a.reader, a.out.is_dir(), a.out.exists()) {
        (Reader::Gguf, true, _) => Err(Usage(format!("-o {out}: a directory; name a file")).into()),
        (Reader::Lacuna | Reader::CompressedTensors, false, true) => {
            Err(Usage(format!("-o {out}: a file; name a directory")).into())
        }
        (Reader::Lacuna, true, _) => Ok(lacuna_checkpoint::refuse_existing(&a.out, a.overwrite || a.resume)?),
        _ => Ok(()),
    }
}

/// `OUT.name`, beside it.
fn beside(out: &std::path::Path, name: &str) -> PathBuf {
    let file = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!("{file}.{name}"))
}

/// Keeps matrices at the level that `--keep TARGET=NAME` names.
fn pin(levels: &mut Levels<'_>, pins: &[String], all: &[Candidate]) -> anyhow::Result<()> {
    for pin in pins {
        let Some((target, name)) = pin.split_once('=') else {
            return Err(Usage(format!("--keep {pin}: write TARGET=LEVEL, for example attn.v=source")).into());
        };
        let target = lacuna_spec::Target(target.to_owned());
        let at = all.iter().position(|c| c.name == name);
        if at.is_none() && name != "source" {
            let names: Vec<&str> = all.iter().map(|c| c.name.as_str()).collect();
            return Err(Usage(format!(
                "--keep {pin}: no level is called '{name}'; there are source, {}",
                names.join(", ")
            ))
            .into());
        }
        let mut any = false;
        for c in levels.choices.iter_mut().filter(|c| target.matches(&c.place)) {
            any = true;
            if let Some(level) = c.levels.iter().find(|l| l.recipe == at).copied() {
                c.levels = vec![level];
            } else {
                return Err(Usage(format!(
                    "--keep {pin}: {} cannot be at that level, or is no smaller there",
                    c.place
                ))
                .into());
            }
        }
        if !any {
            return Err(Usage(format!("--keep {pin}: no matrix that can change matches '{}'", target.0)).into());
        }
    }
    Ok(())
}

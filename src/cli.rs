//! The command line: verbs and flags, nothing else.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use crate::activations::Activations;
use crate::texts::Weighed;

/// Makes large language models smaller and faster by leaving out what they do not need, and measures what each omission
/// costs.
///
/// MODEL is a pinned name (smollm2-135m-instruct, gemma-3-270m), hf:org/repo[@rev][:file], pypi:package==version, or a
/// path to a directory or a .gguf file. A directory may hold a LoRA adapter: it goes on the base it names.
#[derive(Debug, Parser)]
#[command(name = "lacuna", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// Everything else.
    #[command(flatten)]
    pub global: Global,
}

/// Flags of every verb.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every verb")]
pub struct Global {
    /// Print one JSON object on standard output; everything else goes to standard error.
    #[arg(long, global = true)]
    pub json: bool,
    /// Worker threads; by default one for each core (products leave out the slow ones of a processor that has fast
    /// ones, too).
    #[arg(long, global = true, value_name = "N")]
    pub threads: Option<usize>,
    /// Ask the caches alone, never the network.
    #[arg(long, global = true)]
    pub offline: bool,
    /// Where pulled models and baselines are kept: of baselines at most 32 GiB, and 30 days after their last use.
    #[arg(long, global = true, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Put a LoRA adapter (a directory that PEFT wrote) on MODEL.
    #[arg(long, global = true, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Merge the adapter into the matrices it changes instead of keeping it beside them.
    #[arg(long, global = true)]
    pub merge: bool,
    /// Of a stacked model (recipes/bitstack.toml) load only as many blocks as keep its weights within SIZE, e.g. 60MB.
    #[arg(long, global = true, value_name = "SIZE")]
    pub load_bytes: Option<String>,
    /// Of codes into nested tables (recipes/any-precision.toml) load only the BITS high ones: the smaller model within.
    #[arg(long, global = true, value_name = "BITS", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub load_bits: Option<u8>,
    /// Read MODEL, whose model_type is unknown, as a family that is known, e.g. llama: where its tensors have that family's
    /// names and shapes.
    #[arg(long = "as", global = true, value_name = "NAME")]
    pub read_as: Option<String>,
    /// More words on standard error; twice for even more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// The whole story in one command: pull a small real model, compress it, compare, generate, write report.html.
    Quickstart(Quickstart),
    /// Fetch a model into the cache, verify it, print its path; `pull list`, `pull rm NAME`.
    Pull(Pull),
    /// What a model is: architecture, parameters and bytes by role, formats, sparsity, anything broken.
    Inspect(Inspect),
    /// Every method in a line; with a WORD or a family, all of those: paper, what it needs, recorded evidence.
    Methods(Methods),
    /// Compress a model by a recipe, judge the result, save it.
    Compress(Compress),
    /// Find the best model within a budget, make it, judge it.
    Fit(Fit),
    /// Perplexity, divergence from the dense model, tasks.
    Eval(Eval),
    /// Write a model for other programs: GGUF, Hugging Face, compressed-tensors, PEFT.
    Convert(Convert),
    /// Mend a checkpoint that another program left broken; `inspect` says what is wrong.
    Repair(Repair),
    /// Continue a text.
    Generate(Generate),
    /// Talk with a model.
    Chat(Chat),
    /// Tokens a second, bytes a token, share of this machine's ceiling.
    Bench(Bench),
    /// An OpenAI-compatible server with a web page.
    Serve(Serve),
    /// Completions for a shell, to be put where it looks for them.
    Completions(Completions),
    /// This machine: processor features, kernels chosen, memory bandwidth, threads.
    Doctor,
}

/// `quickstart`
#[derive(Debug, Args)]
pub struct Quickstart {
    /// The model to begin with.
    #[arg(default_value = "smollm2-135m-instruct")]
    pub model: String,
    /// Where the compressed model goes.
    #[arg(short, long, default_value = "quickstart-model")]
    pub out: PathBuf,
    /// Where the report goes.
    #[arg(long, default_value = "report.html")]
    pub report: PathBuf,
    /// A recipe instead of a search.
    #[arg(long)]
    pub recipe: Option<String>,
}

/// `pull`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Pull {
    /// The model.
    pub model: Option<String>,
    /// Look after the cache.
    #[command(subcommand)]
    pub what: Option<PullWhat>,
}

/// `pull list`, `pull rm`
#[derive(Debug, Subcommand)]
pub enum PullWhat {
    /// What the cache holds, baselines together in one line.
    List,
    /// Remove a model, or the baselines, from the cache.
    Rm {
        /// Its name as `list` prints it.
        name: String,
    },
}

/// `methods`
#[derive(Debug, Args)]
pub struct Methods {
    /// Only methods with all of these words in their name, family, paper or description.
    #[arg(value_name = "WORD")]
    pub words: Vec<String>,
    /// Only those of a family: a recipe's verb, or draft, keep, select, gate.
    #[arg(long, value_name = "NAME")]
    pub family: Option<String>,
}

/// `inspect`
#[derive(Debug, Args)]
pub struct Inspect {
    /// The model.
    pub model: String,
    /// A row for every tensor.
    #[arg(long)]
    pub tensors: bool,
    /// Do not read the values: zeros and numbers that are not finite stay uncounted.
    #[arg(long)]
    pub quick: bool,
}

/// How far the gate goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Gate {
    /// Bytes, loss and speed against every baseline.
    #[default]
    Full,
    /// Bytes and loss; nothing is timed.
    Size,
    /// No judging.
    Off,
}

/// How a result is judged, and what is told of it.
#[derive(Clone, Debug, Default, Args)]
pub struct Judging {
    /// Held-out text to judge on, read once the result is there; by default a small one that Lacuna carries.
    #[arg(long, value_name = "FILE")]
    pub eval: Option<PathBuf>,
    /// Another text to judge on, of another domain: shown beside the result, it decides nothing. May be given several
    /// times.
    #[arg(long = "domain", value_name = "FILE")]
    pub domains: Vec<PathBuf>,
    /// Tokens of a judging window; by default 512, where model and text have as many.
    #[arg(long)]
    pub ctx: Option<usize>,
    /// Judging windows; by default 16, where the text has as many.
    #[arg(long)]
    pub windows: Option<usize>,
    /// How far the judging goes.
    #[arg(long, value_enum, default_value_t = Gate::Full)]
    pub gate: Gate,
    /// Another model to judge beside the result: somebody else's file of the same source. May be given several times.
    #[arg(long, value_name = "MODEL")]
    pub beside: Vec<String>,
    /// Exit with 0 even where the result does not pay.
    #[arg(long)]
    pub accept: bool,
    /// Write a report with plots.
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
}

/// `compress`
#[derive(Debug, Args)]
pub struct Compress {
    /// The model.
    pub model: String,
    /// A recipe: a file, or the name of one that Lacuna carries (see `methods`).
    #[arg(short, long, default_value = "default")]
    pub recipe: String,
    /// Where the compressed model goes (a directory).
    #[arg(short, long)]
    pub out: PathBuf,
    /// Override one value of the recipe: STEP.KEY=VALUE. May be given several times.
    #[arg(long = "set", value_name = "STEP.KEY=VALUE")]
    pub sets: Vec<String>,
    /// Text to calibrate on; by default a small one that Lacuna carries. Conversations (.jsonl, a line a list of
    /// "messages") go through the model's chat template. Given several times, the texts are mixed by weight.
    #[arg(long, value_name = "FILE[=WEIGHT]")]
    pub calibration: Vec<Weighed>,
    /// An importance matrix of llama.cpp's (GGUF or .dat): squares of inputs in the place of those of the calibration
    /// text, for methods that read them.
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,
    /// Calibration sequences.
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Tokens of a calibration sequence.
    #[arg(long, value_name = "L")]
    pub seq_len: Option<usize>,
    /// Where calibration sequences are cut: 0 from the start of the text, else from random places drawn from this seed.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Where scratch files go: activations, gradients, levels of a search; beside the output by default.
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Ceiling of memory for the whole command, e.g. 600MiB.
    #[arg(long, value_name = "SIZE")]
    pub max_ram: Option<String>,
    /// Go on with an interrupted run.
    #[arg(long)]
    pub resume: bool,
    /// Replace what is at OUT.
    #[arg(long)]
    pub overwrite: bool,
    /// How the result is judged.
    #[command(flatten)]
    pub judging: Judging,
}

/// How long a search may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Effort {
    /// Minutes: 12 trials.
    Quick,
    /// An hour or so: 120 trials.
    Normal,
    /// Over night: 1200 trials.
    Long,
}

impl Effort {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Effort::Quick => "quick",
            Effort::Normal => "normal",
            Effort::Long => "long",
        }
    }
}

/// What a search tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// The knapsack's front, then races of its answer's offspring.
    Races,
    /// The knapsack's front alone.
    Knapsack,
    /// As many trials, drawn by lot within the budget.
    Random,
    /// The same level everywhere.
    Uniform,
}

/// Who is to read the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Reader {
    /// Lacuna: whatever is smallest.
    Lacuna,
    /// llama.cpp and its kin: one GGUF file of its block types.
    Gguf,
    /// vLLM and others: a directory of compressed-tensors.
    CompressedTensors,
}

impl Reader {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Reader::Lacuna => "lacuna",
            Reader::Gguf => "gguf",
            Reader::CompressedTensors => "compressed-tensors",
        }
    }
}

/// `fit`
#[derive(Debug, Args)]
pub struct Fit {
    /// The model.
    pub model: String,
    /// Where the result goes: a directory; with --for gguf a file.
    #[arg(short, long)]
    pub out: PathBuf,
    /// Most bytes of the weights, e.g. 90MB. Without any budget: where bytes stop being cheap.
    #[arg(long, value_name = "SIZE")]
    pub max_bytes: Option<String>,
    /// Most KL from the source on the text of the search, nats a token, e.g. 0.02.
    #[arg(long, value_name = "NATS")]
    pub max_loss: Option<f64>,
    /// Fewest tokens a second of decoding here, by this machine's cost table.
    #[arg(long, value_name = "N")]
    pub min_decode_tok_s: Option<f64>,
    /// Memory that weights and the cache of --context positions may take; also the ceiling of the whole command.
    #[arg(long, value_name = "SIZE")]
    pub max_ram: Option<String>,
    /// Positions whose keys and values --max-ram counts, in 16 bits; by default 4096, where the model sees as many.
    #[arg(long, value_name = "N", requires = "max_ram")]
    pub context: Option<usize>,
    /// Who is to read the result: only what that program runs is tried, and its file is written.
    #[arg(long = "for", value_enum, default_value_t = Reader::Lacuna)]
    pub reader: Reader,
    /// How long the search may take.
    #[arg(long, value_enum, default_value_t = Effort::Normal)]
    pub effort: Effort,
    /// What is tried; all but races are what races have to beat.
    #[arg(long, value_enum, default_value_t = Strategy::Races)]
    pub strategy: Strategy,
    /// Keep matrices at a level: TARGET=LEVEL, for example attn.v=source. May be given several times.
    #[arg(long, value_name = "TARGET=LEVEL")]
    pub keep: Vec<String>,
    /// Text whose first 70% give statistics, and the rest is searched on; by default a small one that Lacuna carries.
    /// Conversations (.jsonl, a line a list of "messages") go through the model's chat template. Given several times,
    /// the texts are mixed by weight.
    #[arg(long, value_name = "FILE[=WEIGHT]")]
    pub calibration: Vec<Weighed>,
    /// An importance matrix of llama.cpp's (GGUF or .dat): squares of inputs in the place of those of the calibration
    /// text. Levels are then rounded by weight, without feedback of errors.
    #[arg(long, value_name = "FILE")]
    pub imatrix: Option<PathBuf>,
    /// Calibration sequences of 512 tokens at the most; by default 128.
    #[arg(long, value_name = "N")]
    pub samples: Option<usize>,
    /// Another text to search on.
    #[arg(long, value_name = "FILE")]
    pub search: Option<PathBuf>,
    /// Where randomness comes from.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Search, print the front, write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Where scratch files go: every matrix at every level; beside the output by default.
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Go on with an interrupted search: what was measured is known.
    #[arg(long)]
    pub resume: bool,
    /// Replace what is at OUT.
    #[arg(long)]
    pub overwrite: bool,
    /// How the result is judged.
    #[command(flatten)]
    pub judging: Judging,
}

/// How a model is run.
#[derive(Clone, Debug, Args)]
pub struct Running {
    /// How activations meet matrices of integer codes.
    #[arg(long, value_enum, default_value_t = Activations::Int8)]
    pub activations: Activations,
    /// How keys and values are kept.
    #[arg(long, value_enum, default_value_t = Cache::F16)]
    pub kv: Cache,
    /// What is drafted and left out.
    #[command(flatten)]
    pub plan: Plan,
}

/// A run plan: what is drafted, and what is left out, while a model runs.
#[derive(Clone, Debug, Default, Args)]
pub struct Plan {
    /// A run plan: what is drafted and what is left out while the model runs (TOML; docs/running.md).
    #[arg(long = "run", value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Draft tokens and verify several in one step, where that pays; no answer changes. NAME, NAME:KEY=VALUE,... or
    /// none; `lacuna methods` lists them.
    #[arg(long, value_name = "METHOD")]
    pub draft: Option<String>,
    /// Keep only some cached keys and values, so that a long text takes no more memory than a short one; an
    /// approximation. NAME, NAME:KEY=VALUE,... or none.
    #[arg(long, value_name = "METHOD")]
    pub keep: Option<String>,
    /// Let every token read only some blocks of earlier keys and values; an approximation. NAME, NAME:KEY=VALUE,... or
    /// none.
    #[arg(long, value_name = "METHOD")]
    pub select: Option<String>,
    /// Skip the channels that a token does not need: it reads only some columns of each matrix; an approximation. NAME, NAME:KEY=VALUE,... or none.
    #[arg(long, value_name = "METHOD")]
    pub gate: Option<String>,
}

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// 32 bits: exactly what was computed.
    F32,
    /// 16 bits.
    F16,
    /// Signed bytes, with a factor for each position and head.
    Q8,
}

impl From<Cache> for lacuna_kernels::KvFormat {
    fn from(c: Cache) -> lacuna_kernels::KvFormat {
        match c {
            Cache::F32 => lacuna_kernels::KvFormat::F32,
            Cache::F16 => lacuna_kernels::KvFormat::F16,
            Cache::Q8 => lacuna_kernels::KvFormat::Q8,
        }
    }
}

/// What `convert` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A directory with config.json and dense safetensors.
    Hf,
    /// One GGUF file.
    Gguf,
    /// A directory in the pack-quantized form of compressed-tensors.
    CompressedTensors,
    /// An adapter of the model's low-rank parts, and its base.
    Peft,
}

/// How `convert` writes values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(non_camel_case_types)]
pub enum Type {
    /// As they are stored, where the format can say it.
    Source,
    /// 32-bit floats.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// GGUF: 8 bits, 32 sharing a scale.
    #[value(name = "q8_0")]
    Q8_0,
    /// GGUF: 4 bits, 32 sharing a scale.
    #[value(name = "q4_0")]
    Q4_0,
    /// GGUF: the mixture of Q4_K and Q6_K that llama.cpp calls Q4_K_M.
    #[value(name = "q4_k")]
    Q4_K,
    /// GGUF: 6 bits.
    #[value(name = "q6_k")]
    Q6_K,
    /// compressed-tensors: 4 bits, symmetric.
    Int4,
    /// compressed-tensors: 8 bits, symmetric.
    Int8,
}

/// `convert`
#[derive(Debug, Args)]
pub struct Convert {
    /// The model.
    pub model: String,
    /// The format to write.
    #[arg(long, value_enum)]
    pub to: Format,
    /// How values are written. gguf: source, f32, f16, q8_0, q4_0, q4_k, q6_k. hf and peft: source, f32, f16, bf16.
    /// compressed-tensors: source (integers that are stored already), int4, int8.
    #[arg(long = "type", value_enum, default_value_t = Type::Source)]
    pub kind: Type,
    /// compressed-tensors: columns that share a scale, where int4 or int8 rounds.
    #[arg(long, value_name = "COLUMNS", default_value_t = 128)]
    pub group: usize,
    /// compressed-tensors: keep the zero points of integers that have them, in fewer bytes, for readers other than
    /// transformers, which loads no model with any; else their values are written as symmetric codes of 8 bits.
    #[arg(long)]
    pub zero_points: bool,
    /// Where the converted model goes: a file for gguf, else a directory.
    #[arg(short, long)]
    pub out: PathBuf,
    /// Replace what is at OUT.
    #[arg(long)]
    pub overwrite: bool,
    /// Do not measure KL(source || converted).
    #[arg(long)]
    pub no_kl: bool,
    /// Windows of held-out text on which KL is measured.
    #[arg(long, value_name = "K", default_value_t = 4)]
    pub windows: usize,
    /// Tokens of a window; by default 512, where the model takes as many.
    #[arg(long)]
    pub ctx: Option<usize>,
    /// Ceiling of memory for measuring, e.g. 600MiB.
    #[arg(long, value_name = "SIZE")]
    pub max_ram: Option<String>,
}

/// `repair`
#[derive(Debug, Args)]
pub struct Repair {
    /// The model.
    pub model: String,
    /// Where the mended model goes: a directory, or a file for GGUF.
    #[arg(short, long)]
    pub out: PathBuf,
    /// Replace what is at OUT.
    #[arg(long)]
    pub overwrite: bool,
}

/// `eval`
#[derive(Debug, Args)]
pub struct Eval {
    /// The model.
    pub model: String,
    /// Text for perplexity; by default a small held-out one that Lacuna carries.
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of a window; by default 1024, where model and text have as many.
    #[arg(long)]
    pub ctx: Option<usize>,
    /// Windows at the most; by default all.
    #[arg(long, value_name = "K")]
    pub windows: Option<usize>,
    /// Begin each window with the model's BOS token.
    #[arg(long)]
    pub bos: bool,
    /// A dense model to compare with: KL divergence and top-1 agreement.
    #[arg(long, value_name = "DENSE")]
    pub against: Option<String>,
    /// Multiple-choice files ({id, ctx, choices, label} a line) or last-word files ({text} a line).
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub tasks: Vec<PathBuf>,
    /// How activations meet matrices of integer codes; `generate` runs with int8.
    #[arg(long, value_enum, default_value_t = Activations::Exact)]
    pub activations: Activations,
    /// What is left out while the text is read; keys and values are kept in 32 bits.
    #[command(flatten)]
    pub plan: Plan,
    /// Items of each task at the most.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Ceiling of memory for the whole command, e.g. 600MiB.
    #[arg(long, value_name = "SIZE")]
    pub max_ram: Option<String>,
}

/// How the next token is drawn.
#[derive(Clone, Debug, Args)]
pub struct Sampling {
    /// Temperature; 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.8)]
    pub temp: f32,
    /// Only the K likeliest tokens; 0: all.
    #[arg(long, default_value_t = 40)]
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability.
    #[arg(long, default_value_t = 0.95)]
    pub top_p: f32,
    /// Only tokens at least this likely relative to the likeliest.
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f32,
    /// Divides the logits of tokens that were there before; 1: off.
    #[arg(long, default_value_t = 1.0)]
    pub repeat_penalty: f32,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Stop before this text. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
}

/// What a chat template is told besides the conversation.
#[derive(Debug, Args)]
pub struct TemplateArgs {
    /// A variable of the chat template, such as enable_thinking=false: a number, true, false or null, or else a text.
    /// May be given several times.
    #[arg(long = "template-arg", value_name = "KEY=VALUE", value_parser = template_arg)]
    pub args: Vec<(String, serde_json::Value)>,
}

fn template_arg(text: &str) -> Result<(String, serde_json::Value), String> {
    let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("write it as KEY=VALUE")?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
    Ok((key.to_owned(), value))
}

/// `generate`
#[derive(Debug, Args)]
pub struct Generate {
    /// The model.
    pub model: String,
    /// The text to continue; `-` reads it from standard input.
    #[arg(short, long)]
    pub prompt: String,
    /// Tokens at the most.
    #[arg(short, long, default_value_t = 128)]
    pub n: usize,
    /// Put the prompt into the model's chat template as a user's message.
    #[arg(long)]
    pub chat: bool,
    /// What the chat template is told.
    #[command(flatten)]
    pub template: TemplateArgs,
    /// How the next token is drawn.
    #[command(flatten)]
    pub sampling: Sampling,
    /// How the model is run.
    #[command(flatten)]
    pub running: Running,
}

/// `chat`
#[derive(Debug, Args)]
pub struct Chat {
    /// The model.
    pub model: String,
    /// What the assistant is told first.
    #[arg(long)]
    pub system: Option<String>,
    /// Tokens of an answer at the most.
    #[arg(short, long, default_value_t = 512)]
    pub n: usize,
    /// What the chat template is told.
    #[command(flatten)]
    pub template: TemplateArgs,
    /// How the next token is drawn.
    #[command(flatten)]
    pub sampling: Sampling,
    /// How the model is run.
    #[command(flatten)]
    pub running: Running,
}

/// `bench`
#[derive(Debug, Args)]
pub struct Bench {
    /// The model; left out where --shape names one.
    #[arg(required_unless_present = "shape")]
    pub model: Option<String>,
    /// Random weights in a published model's shape instead of a file: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b,
    /// qwen3-0.6b, smollm2-135m, smollm2-360m.
    #[arg(long, value_name = "NAME", conflicts_with = "model")]
    pub shape: Option<String>,
    /// With --shape: the recipe whose forms the matrices have; without one, f16.
    #[arg(long, short, value_name = "FILE or NAME", requires = "shape")]
    pub recipe: Option<String>,
    /// With --recipe: overrides, as for compress.
    #[arg(long = "set", value_name = "STEP.KEY=VALUE", requires = "recipe")]
    pub set: Vec<String>,
    /// Time every operation, and print where the time goes.
    #[arg(long)]
    pub profile: bool,
    /// Prompt tokens for the prefill timing; by default 512, where the model takes as many.
    #[arg(long)]
    pub prompt: Option<usize>,
    /// Single-token steps for the decode timing; by default 128, where the model takes as many.
    #[arg(long = "gen", value_name = "N")]
    pub generate: Option<usize>,
    /// Tokens of context before the steps.
    #[arg(long, default_value_t = 0)]
    pub depth: usize,
    /// Runs, of which medians are printed.
    #[arg(long, default_value_t = 3)]
    pub reps: usize,
    /// The instruction set, where it should not be the strongest of this machine: portable, avx2, avx512, avx512vnni,
    /// amx.
    #[arg(long, value_name = "NAME")]
    pub isa: Option<String>,
    /// How the model is run.
    #[command(flatten)]
    pub running: Running,
}

/// How texts become vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pooling {
    /// The mean of all rows.
    Mean,
    /// The last row.
    Last,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// `completions`
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    pub shell: clap_complete::Shell,
}

/// `serve`
#[derive(Debug, Args)]
pub struct Serve {
    /// The model.
    pub model: String,
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// The port; 0 takes a free one.
    #[arg(long, default_value_t = 8080)]
    pub port: u16,
    /// The name by which requests call the model; by default the last part of MODEL.
    #[arg(long, value_name = "NAME")]
    pub served_name: Option<String>,
    /// Tokens of a text, prompt and answer together; by default what the model was made for.
    #[arg(long, value_name = "N")]
    pub ctx: Option<usize>,
    /// Texts worked on at once.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = positive)]
    pub max_batch: usize,
    /// Answers that may wait beyond those; more are refused with 429.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_queue: usize,
    /// Tokens of an answer; by default as many as the context has room for.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub max_tokens: Option<usize>,
    /// Rows of prompts computed in one step: more read prompts sooner, fewer hold up others less.
    #[arg(long, value_name = "ROWS", default_value_t = 256, value_parser = positive)]
    pub chunk: usize,
    /// Room for keys and values, e.g. 2GiB; by default for a full batch of full texts, a quarter of the memory at the
    /// most.
    #[arg(long, value_name = "SIZE")]
    pub kv_memory: Option<String>,
    /// How /v1/embeddings makes vectors, unless a request says.
    #[arg(long, value_enum, default_value_t = Pooling::Mean)]
    pub pooling: Pooling,
    /// A file of keys, one a line, of which a request must show one.
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// A further name in the Host header to answer to; a server of this machine alone, without keys, answers to its own
    /// names only.
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
    /// An origin, such as https://example.org, whose pages may use this server from a browser; * for all. May be given
    /// several times.
    #[arg(long, value_name = "ORIGIN")]
    pub cors: Vec<String>,
    /// Speak Ollama's interface, too: /api/chat, /api/generate, /api/embed, /api/tags, /api/show,
    /// /api/ps, /api/version.
    #[arg(long)]
    pub ollama: bool,
    /// What the chat template is told, unless a request says.
    #[command(flatten)]
    pub template: TemplateArgs,
    /// Size of a request.
    #[arg(long, value_name = "SIZE", default_value = "4MiB")]
    pub max_body: String,
    /// Connections at once.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = positive)]
    pub max_connections: usize,
    /// Seconds that a client has to send a request's head, its body, and to take some of an answer.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub client_timeout: f64,
    /// Seconds after which an answer is given up.
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub request_timeout: f64,
    /// Seconds that answers at work have when the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub drain_timeout: f64,
    /// How the log is written; prompts and answers are never in it.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// How the model is run.
    #[command(flatten)]
    pub running: Running,
}

/// A count that is not zero.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("give a whole number above 0".into()),
    }
}

//! How byte-level models cut a text into words before merging: every name that llama.cpp has for it
//! (`tokenizer.ggml.pre`), and which name a tokenizer.json's steps have.
//!
//! Steps are patterns, applied one after the other to the pieces of the one before; what a pattern matches is a piece,
//! and so is what lies between two matches. Where llama.cpp writes a pattern in another way than the model's own
//! tokenizer.json (its engine has no classes of letters by case), the model's own stands here: that is what it learned.

use serde_json::Value;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

use super::{TokenizerError, guarded};

/// GPT-2's words.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3's, of GPT-4.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's.
pub(super) const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// DeepSeek's third.
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const CHINESE_JAPANESE: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DIGIT: &str = r"\p{N}";
/// All but spaces and what ends clauses.
const ENDS_OF_CLAUSES: &str = " ?[^(\\s|.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c})]+";
/// Letters that have case, of the first DeepSeek.
const CASED: &str = concat!(
    "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}",
    "\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-",
    "\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\u{13f8}-\u{13fd}",
    "\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}",
    "\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-",
    "\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}",
    "\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}",
    "\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}",
    "\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}",
    "\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}",
    "\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\u{104b0}-\u{104d3}",
    "\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+",
);
const CHINESE_KOREAN: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";

/// One way to cut.
pub(super) struct Words {
    /// llama.cpp's names for it, the one to write first.
    names: &'static [&'static str],
    steps: &'static [&'static str],
    /// A word that is a token as it stands is taken without merging.
    pub whole_words: bool,
    /// Whether a first token is put before a text where no key says it.
    pub add_bos: bool,
    /// Accents are composed before: the model's own tokenizer does so, llama.cpp does not.
    pub nfc: bool,
}

const fn plain(names: &'static [&'static str], steps: &'static [&'static str]) -> Words {
    Words { names, steps, whole_words: false, add_bos: false, nfc: false }
}

const fn whole(names: &'static [&'static str], steps: &'static [&'static str], add_bos: bool) -> Words {
    Words { names, steps, whole_words: true, add_bos, nfc: false }
}

const fn composed(names: &'static [&'static str], steps: &'static [&'static str]) -> Words {
    Words { names, steps, whole_words: false, add_bos: false, nfc: true }
}

/// All of them.
const ALL: &[Words] = &[
    plain(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "jina-es",
            "jina-de",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v1-en",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        &[GPT2],
    ),
    plain(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[DIGIT, GPT2],
    ),
    whole(
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        &[LLAMA3],
        true,
    ),
    plain(&["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"], &[LLAMA3]),
    composed(&["qwen2", "deepseek-r1-qwen", "f2llmv2"], &[QWEN2]),
    plain(&["hunyuan", "megrez", "kormo", "solar-open", "grok-2", "stablelm2"], &[QWEN2]),
    composed(
        &["qwen35"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    plain(
        &["jais-2"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}",
        ],
    ),
    plain(
        &["deepseek-llm"],
        &[
            r"[\r\n]",
            CASED,
            "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+",
            r"\s+$",
            CHINESE_KOREAN,
            r"\p{N}+",
        ],
    ),
    plain(&["deepseek-coder"], &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE_KOREAN, DIGIT]),
    plain(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[r"\p{N}{1,3}", CHINESE_JAPANESE, DEEPSEEK3]),
    plain(
        &["spark2_5"],
        &[
            r"\p{N}{1,3}",
            CHINESE_JAPANESE,
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##,
            DIGIT,
        ],
    ),
    whole(
        &["youtu"],
        &[
            "[\u{ac00}-\u{d7a3}\u{3131}-\u{318e}]+|[\u{ff01}\u{2026}\u{201c}\u{201d}\u{2018}\u{2019}\u{2014}\u{ff1a}\u{ff1b}\u{ff0c}\u{3001}-\u{303f}\u{fe30}-\u{fe4f}]+|[\u{3105}-\u{312f}]+|[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        false,
    ),
    plain(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"]),
    plain(&["bloom", "poro-chat", "gpt3-finnish"], &[ENDS_OF_CLAUSES]),
    plain(&["viking"], &[ENDS_OF_CLAUSES, DIGIT]),
    whole(
        &["tekken"],
        &[
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        true,
    ),
    Words {
        add_bos: true,
        ..plain(
            &["chameleon"],
            &[
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                GPT2,
            ],
        )
    },
    plain(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    whole(&["granite-embed-multi-97m"], &[GPT4O], false),
    plain(&["tiny_aya", "cohere2moe"], &[r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    plain(
        &["kimi-k2"],
        &[
            r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    plain(&["superbpe"], &[r"\p{N}+", r"(?=(\d{3})+(?!\d))"]),
    plain(
        &["bailingmoe", "bailingmoe2", "llada-moe"],
        &[r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"],
    ),
    plain(
        &["seed-coder"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
    ),
    plain(&["ufakzeka"], &[r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]),
    plain(
        &["afmoe"],
        &[
            r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
            "[\u{4e00}-\u{9fff}\u{3400}-\u{4dbf}\u{f900}-\u{faff}\u{3040}-\u{309f}\u{30a0}-\u{30ff}\u{ff65}-\u{ff9f}\u{2f00}-\u{2fdf}\u{e00}-\u{e7f}\u{e80}-\u{eff}\u{1780}-\u{17ff}\u{1000}-\u{109f}\u{aa60}-\u{aa7f}\u{a9e0}-\u{a9ff}\u{ac00}-\u{d7af}\u{1100}-\u{11ff}]+",
            DEEPSEEK3,
        ],
    ),
    plain(&["laguna"], &[r"[^\n]+|[\n]+", QWEN2]),
    plain(
        &["exaone-moe"],
        &[
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ],
    ),
    whole(
        &["minicpm5"],
        &[
            r"\p{N}{1,3}",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ],
        false,
    ),
    plain(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
];

/// Names of models whose pieces are not bytes but letters, with `▁` for a space, although they list merges.
pub(super) const SPACED: [&str; 3] = ["gemma4", "granite-embed-multi-311m", "sarvam-moe"];

impl Words {
    /// By llama.cpp's name.
    pub fn named(pre: &str) -> Result<&'static Words, TokenizerError> {
        ALL.iter().find(|w| w.names.contains(&pre)).ok_or_else(|| {
            let first: Vec<&str> = ALL.iter().filter_map(|w| w.names.first().copied()).collect();
            TokenizerError::Unsupported(format!(
                "tokenizer.ggml.pre is `{pre}`, and how that cuts words is not known here; known are {}, and what is \
                 like them; take the model in the Hugging Face layout, with its tokenizer.json",
                first.join(", ")
            ))
        })
    }

    /// The steps, and bytes at the end.
    pub fn steps(&self) -> Result<PreTokenizerWrapper, TokenizerError> {
        let mut steps = self.steps.iter().map(|p| isolated(p)).collect::<Result<Vec<_>, _>>()?;
        steps.push(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)));
        Ok(PreTokenizerWrapper::Sequence(Sequence::new(steps)))
    }
}

/// Cuts a text where the pattern matches, and keeps the matches.
pub(super) fn isolated(pattern: &str) -> Result<PreTokenizerWrapper, TokenizerError> {
    guarded(|| Split::new(SplitPattern::Regex(pattern.to_owned()), SplitDelimiterBehavior::Isolated, false))
        .map(PreTokenizerWrapper::Split)
        .map_err(TokenizerError::Broken)
}

/// The two ways in which tokenizer.json files write English endings, as one.
fn spelled(pattern: &str) -> String {
    pattern.replace("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
}

/// llama.cpp's name for the steps of a tokenizer.json, where it has one.
pub(super) fn name_of(steps: &[&Value], whole_words: bool, nfc: bool) -> Option<&'static str> {
    let (last, before) = steps.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    let mut patterns = Vec::new();
    for step in before {
        patterns.push(match step["type"].as_str()? {
            "Split" if step["behavior"] == "Isolated" && step["invert"] != true => {
                spelled(step["pattern"]["Regex"].as_str()?)
            }
            "Digits" if step["individual_digits"] == true => DIGIT.to_owned(),
            "Digits" => r"\p{N}+".to_owned(),
            _ => return None,
        });
    }
    if last["use_regex"] != false {
        patterns.push(GPT2.to_owned());
    }
    let same = |w: &&Words| {
        w.whole_words == whole_words && w.nfc == nfc && w.steps.iter().map(|p| spelled(p)).eq(patterns.iter().cloned())
    };
    ALL.iter().find(same)?.names.first().copied()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::path::Path;

    use serde_json::json;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;
    use crate::tokenizer::Export;

    fn golden() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/tokenizers/pre.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn names_are_told_once_and_all_are_tested() {
        let mut seen = HashSet::new();
        assert!(ALL.iter().flat_map(|w| w.names).all(|n| seen.insert(*n)));
        let golden = golden();
        let families = golden["families"].as_array().unwrap();
        let tested: HashSet<&str> = families.iter().map(|f| f["name"].as_str().unwrap()).collect();
        assert_eq!(tested, ALL.iter().map(|w| w.names[0]).collect());
        // What llama.cpp names, and nothing else.
        let theirs: HashSet<&str> = golden["names"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
        let ours: HashSet<&str> = seen.into_iter().chain(SPACED).collect();
        let apart: HashSet<_> = theirs.symmetric_difference(&ours).collect();
        // The one that is no byte-level model: words as they are, for embeddings.
        assert_eq!(apart, [&"whitespace"].into());
    }

    #[test]
    fn texts_are_cut_as_by_the_models_own() {
        let golden = golden();
        let texts: Vec<&str> = golden["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
        for family in golden["families"].as_array().unwrap() {
            let name = family["name"].as_str().unwrap();
            let words = Words::named(name).unwrap();
            let steps = words.steps().unwrap();
            for (text, want) in texts.iter().zip(family["cuts"].as_array().unwrap()) {
                let mut cut = PreTokenizedString::from(*text);
                steps.pre_tokenize(&mut cut).unwrap();
                let ends: Vec<usize> = cut
                    .get_splits(OffsetReferential::Original, OffsetType::Char)
                    .into_iter()
                    .map(|(_, (_, end), _)| end)
                    .collect();
                let want: Vec<usize> = serde_json::from_value(want.clone()).unwrap();
                assert_eq!(ends, want, "{name}: {text:?}");
            }
        }
    }

    /// A tokenizer.json of each family goes out under the family's name.
    #[test]
    fn steps_of_a_file_have_their_name() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/tokenizers/bytelevel");
        let json: Value = serde_json::from_slice(&std::fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
        for family in golden()["families"].as_array().unwrap() {
            let name = family["name"].as_str().unwrap();
            let words = Words::named(name).unwrap();
            let mut json = json.clone();
            json["pre_tokenizer"] = family["pre_tokenizer"].clone();
            json["model"]["ignore_merges"] = json!(words.whole_words);
            if words.nfc {
                json["normalizer"] = json!({"type": "NFC"});
            }
            let out = tempfile::tempdir().unwrap();
            std::fs::write(out.path().join("tokenizer.json"), json.to_string()).unwrap();
            let export = Export::of_dir(out.path(), 700).unwrap();
            assert_eq!(export.vocabulary.pre.as_deref(), Some(name));
        }
    }
}

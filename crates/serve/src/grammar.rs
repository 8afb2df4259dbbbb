//! Answers held to a JSON schema, by the library `llguidance`: for every state of its parser, the tokens that may come.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use lacuna_checkpoint::Tokenizer;
use lacuna_run::{Grammar, RunError};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

/// Marks a special token's bytes in the library's trie, so that no text can spell it.
const SPECIAL: u8 = 0xFF;

/// Makes grammars for one tokenizer.
pub struct Grammars {
    factory: ParserFactory,
    ends: Vec<u32>,
}

impl Grammars {
    /// Lays out the tokenizer's vocabulary.
    pub fn new(tokenizer: &Tokenizer) -> anyhow::Result<Grammars> {
        let words: Vec<Vec<u8>> = (0..tokenizer.vocab_size() as u32)
            .map(|id| {
                let bytes = tokenizer.token_bytes(id);
                if tokenizer.is_special(id) { [&[SPECIAL], &bytes[..]].concat() } else { bytes }
            })
            .collect();
        let ends = tokenizer.eos_set().to_vec();
        let Some(end) = tokenizer.eos().or(ends.first().copied()) else {
            anyhow::bail!("the tokenizer has no token that ends a text, so that no grammar can end one");
        };
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, end), &words);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env)?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Grammars { factory, ends })
    }

    /// A grammar of the JSON values that a schema allows, or why there is none.
    pub fn json(&self, schema: &Value) -> Result<Box<dyn Grammar>, String> {
        let mut schema = schema.clone();
        if let Some(fields) = schema.as_object_mut() {
            // Free white space lets a small model write spaces until its tokens run out.
            let options = json!({ "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": " });
            fields.insert("x-guidance".into(), options);
        }
        let make = || -> anyhow::Result<Matcher> {
            let mut matcher = Matcher::new(self.factory.create_parser(TopLevelGrammar::from_json_schema(schema)));
            // What is wrong with a grammar shows at its first use.
            matcher.compute_mask()?;
            Ok(matcher)
        };
        let matcher = catch_unwind(AssertUnwindSafe(make))
            .map_err(|_| "it is beyond what the grammar library can take".to_owned())?
            .map_err(|e| short(&e.to_string()))?;
        Ok(Box::new(Json { matcher, ends: self.ends.clone(), bits: Vec::new() }))
    }
}

/// The first line of a message, not too long.
fn short(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(300).collect()
}

/// The parser gave up: the schema grew beyond its limits, or asks for text that the model's tokens cannot spell.
fn stuck(e: &anyhow::Error) -> RunError {
    RunError::Request(format!("the answer cannot go on within its schema: {}", short(&e.to_string())))
}

struct Json {
    matcher: Matcher,
    ends: Vec<u32>,
    bits: Vec<u32>,
}

impl Grammar for Json {
    fn allowed(&mut self) -> Result<&[u32], RunError> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| stuck(&e))?;
        self.bits.clear();
        self.bits.extend_from_slice(mask.as_slice());
        let end = |id: u32| (id as usize / 32, 1u32 << (id % 32));
        // The library knows one end; the model may have several.
        if self.ends.iter().any(|&id| self.bits.get(end(id).0).is_some_and(|w| w & end(id).1 != 0)) {
            for &id in &self.ends {
                if let Some(word) = self.bits.get_mut(end(id).0) {
                    *word |= end(id).1;
                }
            }
        }
        Ok(&self.bits)
    }

    fn accept(&mut self, token: u32) -> Result<bool, RunError> {
        self.matcher.consume_token(token).map_err(|e| stuck(&e))?;
        Ok(self.matcher.is_stopped())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exact;
    use crate::schema::Path;
    use lacuna_base::Rng;
    use lacuna_checkpoint::{TokenKind, Vocabulary};

    fn tokenizer() -> Tokenizer {
        let mut tokens: Vec<String> = ["<|begin|>", "<|end|>", "Ċ", "Ġ"].map(String::from).to_vec();
        tokens.extend(('!'..='~').map(String::from));
        let kinds = (0..tokens.len()).map(|id| if id < 2 { TokenKind::Control } else { TokenKind::Normal }).collect();
        let v = Vocabulary {
            model: "gpt2".into(),
            pre: Some("gpt-2".into()),
            tokens,
            kinds,
            bos: Some(0),
            eos: Some(1),
            ..Vocabulary::default()
        };
        Tokenizer::from_vocabulary(v).unwrap()
    }

    /// A walk through a grammar, any allowed token taken.
    fn walk(g: &mut dyn Grammar, t: &Tokenizer, rng: &mut Rng) -> String {
        let mut ids = Vec::new();
        for _ in 0..400 {
            let bits = g.allowed().unwrap().to_vec();
            let may: Vec<u32> =
                (0..t.vocab_size() as u32).filter(|&id| bits[id as usize / 32] >> (id % 32) & 1 == 1).collect();
            // The end where it may come, so that walks end.
            let id = if may.contains(&1) { 1 } else { may[rng.below(may.len())] };
            if id == 1 {
                return t.decode(&ids);
            }
            ids.push(id);
            if g.accept(id).unwrap() {
                return t.decode(&ids);
            }
        }
        panic!("no end: {}", t.decode(&ids));
    }

    #[test]
    fn random_walks_obey_the_schema() {
        let t = tokenizer();
        let grammars = Grammars::new(&t).unwrap();
        let schema = json!({
            "type": "object", "properties": {"kind": {"enum": ["a", "bee"]}, "n": {"type": "integer", "minimum": 3, "maximum": 12},
            "deep": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}},
            "required": ["kind", "n", "deep"], "additionalProperties": false,
        });
        let mut rng = Rng::new(5);
        for _ in 0..40 {
            let text = walk(&mut *grammars.json(&schema).unwrap(), &t, &mut rng);
            let v: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(["a", "bee"].contains(&v["kind"].as_str().unwrap()), "{text}");
            assert!((3..=12).contains(&v["n"].as_i64().unwrap()), "{text}");
            assert!((1..=3).contains(&v["deep"].as_array().unwrap().len()), "{text}");
            assert_eq!(v.as_object().unwrap().len(), 3, "{text}");
        }
        // Large numbers come out as they went in, where `exact` lets them in.
        for n in [json!(9_007_199_254_740_992_i64), json!(-1_152_921_504_606_846_976_i64), json!(i64::MAX), json!(0.1)]
        {
            for schema in [json!({"const": n}), json!({"type": "number", "enum": [n]})] {
                exact::check_schema(&schema, &Path::Root).unwrap();
                assert_eq!(walk(&mut *grammars.json(&schema).unwrap(), &t, &mut rng), n.to_string(), "{schema}");
            }
        }
        let n = json!(10_000_000_000_000_000_000_u64);
        assert_eq!(walk(&mut *grammars.json(&json!({"const": n})).unwrap(), &t, &mut rng), n.to_string());
        let top = json!({"type": "integer", "minimum": i64::MAX, "maximum": i64::MAX});
        exact::check_schema(&top, &Path::Root).unwrap();
        assert_eq!(walk(&mut *grammars.json(&top).unwrap(), &t, &mut rng), i64::MAX.to_string());
        // A local reference works; what is not understood is said.
        let tree = json!({"$defs": {"b": {"type": "boolean"}}, "$ref": "#/$defs/b"});
        let text = walk(&mut *grammars.json(&tree).unwrap(), &t, &mut rng);
        assert!(text == "true" || text == "false");
        for bad in [
            json!({"type": "nonsense"}),
            json!({"$ref": "https://example.com/x"}),
            json!({"type": "string", "pattern": "("}),
        ] {
            assert!(!grammars.json(&bad).err().unwrap().is_empty(), "{bad}");
        }
    }
}

//! Metadata of a GGUF file on their way to bytes.

use lacuna_arch::GgufValue;

use crate::tokenizer::{Export, TokenKind};

/// Pairs of key and value, written one behind the other.
#[derive(Default)]
pub(crate) struct Pairs {
    pub count: u64,
    pub bytes: Vec<u8>,
}

impl Pairs {
    fn string(&mut self, s: &str) {
        self.bytes.extend((s.len() as u64).to_le_bytes());
        self.bytes.extend(s.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        self.string(key);
        self.bytes.extend(kind.to_le_bytes());
    }

    /// A pair as another file has it, byte for byte.
    pub fn raw(&mut self, pair: &[u8]) {
        self.count += 1;
        self.bytes.extend(pair);
    }

    pub fn u32(&mut self, key: &str, x: u32) {
        self.key(key, 4);
        self.bytes.extend(x.to_le_bytes());
    }

    pub fn str(&mut self, key: &str, s: &str) {
        self.key(key, 8);
        self.string(s);
    }

    fn bool(&mut self, key: &str, x: bool) {
        self.key(key, 7);
        self.bytes.push(x.into());
    }

    fn list(&mut self, key: &str, kind: u32, n: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((n as u64).to_le_bytes());
    }

    pub fn strs(&mut self, key: &str, list: &[String]) {
        self.list(key, 8, list.len());
        list.iter().for_each(|s| self.string(s));
    }

    pub fn f32s(&mut self, key: &str, list: &[f32]) {
        self.list(key, 6, list.len());
        list.iter().for_each(|x| self.bytes.extend(x.to_le_bytes()));
    }

    pub fn i32s(&mut self, key: &str, list: impl ExactSizeIterator<Item = i32>) {
        self.list(key, 5, list.len());
        list.for_each(|x| self.bytes.extend(x.to_le_bytes()));
    }

    pub fn value(&mut self, key: &str, value: &GgufValue) {
        match value {
            GgufValue::U32(x) => self.u32(key, *x),
            GgufValue::F32(x) => {
                self.key(key, 6);
                self.bytes.extend(x.to_le_bytes());
            }
            GgufValue::Str(s) => self.str(key, s),
            GgufValue::U32s(list) => {
                self.list(key, 4, list.len());
                list.iter().for_each(|x| self.bytes.extend(x.to_le_bytes()));
            }
            GgufValue::Bool(x) => {
                self.key(key, 7);
                self.bytes.push(u8::from(*x));
            }
            GgufValue::Bools(list) => {
                self.list(key, 7, list.len());
                self.bytes.extend(list.iter().map(|x| u8::from(*x)));
            }
        }
    }

    /// The tokenizer, as `tokenizer.ggml.*`, and the chat template.
    pub fn tokenizer(&mut self, export: &Export) {
        let v = &export.vocabulary;
        self.str("tokenizer.ggml.model", &v.model);
        if let Some(pre) = &v.pre {
            self.str("tokenizer.ggml.pre", pre);
        }
        self.strs("tokenizer.ggml.tokens", &v.tokens);
        if !v.scores.is_empty() {
            self.f32s("tokenizer.ggml.scores", &v.scores);
        }
        self.i32s("tokenizer.ggml.token_type", v.kinds.iter().map(|k| TokenKind::number(*k)));
        if !v.merges.is_empty() {
            self.strs("tokenizer.ggml.merges", &v.merges);
        }
        let ids = [("bos", v.bos), ("eos", v.eos), ("unknown", v.unknown), ("padding", export.padding)];
        for (name, id) in ids {
            if let Some(id) = id {
                self.u32(&format!("tokenizer.ggml.{name}_token_id"), id);
            }
        }
        let flags =
            [("add_bos_token", v.add_bos), ("add_eos_token", v.add_eos), ("add_space_prefix", v.add_space_prefix)];
        for (name, flag) in flags {
            if let Some(flag) = flag {
                self.bool(&format!("tokenizer.ggml.{name}"), flag);
            }
        }
        // Names become parts of keys, as the format's own writer makes them.
        let letter = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let mut named = Vec::new();
        for (name, template) in &export.templates {
            let name: String = name.chars().map(letter).collect();
            if name == "default" {
                self.str("tokenizer.chat_template", template);
            } else if !name.is_empty() && !named.contains(&name) {
                self.str(&format!("tokenizer.chat_template.{name}"), template);
                named.push(name);
            }
        }
        if !named.is_empty() {
            self.strs("tokenizer.chat_templates", &named);
        }
    }
}

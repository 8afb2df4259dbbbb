//! Ids to text, one at a time or all at once, with the same result.

use super::Tokenizer;

/// How the written form of a token stands for bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pieces {
    /// GPT-2's alphabet: every byte has a printable character of its own.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` is a byte. `strip`: the first space of a text was put there by the
    /// encoder.
    Spaced { strip: bool },
}

/// A streaming decoder: holds back bytes that do not end a character yet.
pub struct Decoder {
    tokenizer: Tokenizer,
    held: Vec<u8>,
    strip: bool,
    special: bool,
}

impl Decoder {
    pub(super) fn new(tokenizer: Tokenizer) -> Decoder {
        let strip = tokenizer.0.pieces == Pieces::Spaced { strip: true };
        Decoder { tokenizer, held: Vec::new(), strip, special: false }
    }

    /// The tokens to come follow a text already shown, so that a leading space is a real one.
    #[must_use]
    pub fn continuing(mut self) -> Decoder {
        self.strip = false;
        self
    }

    /// Special tokens are written out instead of left out.
    #[must_use]
    pub fn with_special(mut self) -> Decoder {
        self.special = true;
        self
    }

    /// Takes one token and returns the text that is complete by now, if any.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.take(id);
        let text = complete(&mut self.held);
        (!text.is_empty()).then_some(text)
    }

    /// Ends the text: what was held back is no UTF-8 and becomes U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        (!self.held.is_empty()).then(|| String::from_utf8_lossy(&std::mem::take(&mut self.held)).into_owned())
    }

    pub(super) fn run(mut self, ids: &[u32]) -> String {
        ids.iter().for_each(|&id| self.take(id));
        self.finish().unwrap_or_default()
    }

    /// Appends the token's bytes to the held ones.
    fn take(&mut self, id: u32) {
        if !self.special && self.tokenizer.is_special(id) {
            return;
        }
        let before = self.held.len();
        self.tokenizer.append_bytes(id, &mut self.held);
        if self.strip && self.held.len() > before {
            self.strip = false;
            if self.held[before] == b' ' {
                self.held.remove(before);
            }
        }
    }
}

impl Tokenizer {
    /// The bytes that a token stands for; a special one stands for its written form. They need not be whole characters.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.append_bytes(id, &mut bytes);
        bytes
    }

    fn append_bytes(&self, id: u32, to: &mut Vec<u8>) {
        let inner = &self.0;
        let Some(text) = self.token_text(id) else { return };
        match inner.pieces {
            Pieces::ByteLevel if inner.added.contains(&id) => to.extend_from_slice(text.as_bytes()),
            Pieces::ByteLevel => {
                let before = to.len();
                to.extend(text.chars().map_while(byte_of));
                if text.chars().any(|c| byte_of(c).is_none()) {
                    // Not in the alphabet: the token stands for itself.
                    to.truncate(before);
                    to.extend_from_slice(text.as_bytes());
                }
            }
            Pieces::Spaced { .. } => match fallback_byte(text) {
                Some(byte) => to.push(byte),
                None => to.extend_from_slice(text.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// Takes from the front of `held` everything that is decided: whole characters, and U+FFFD for what can never become
/// one.
fn complete(held: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    for chunk in held.utf8_chunks() {
        text.push_str(chunk.valid());
        done += chunk.valid().len();
        let bad = chunk.invalid();
        if bad.is_empty() {
            break;
        }
        // Only the last chunk can be a character that later bytes complete.
        let open = done + bad.len() == held.len() && std::str::from_utf8(bad).is_err_and(|e| e.error_len().is_none());
        if open {
            break;
        }
        text.push('\u{FFFD}');
        done += bad.len();
    }
    held.drain(..done);
    text
}

/// `<0x0A>` is the byte 10.
pub(super) fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit())).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 is itself, the 68 others follow from
/// U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        n @ 0..=0xFF => Some(n as u8).filter(|&b| printable(b)),
        n @ 0x100..=0x120 => Some((n - 0x100) as u8),
        n @ 0x121..=0x142 => Some((n - 0x121) as u8 + 0x7F),
        0x143 => Some(0xAD),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_that_of_the_library() {
        let bytes: Vec<u8> = (0..=0x143).filter_map(|n| byte_of(char::from_u32(n)?)).collect();
        let all: std::collections::BTreeSet<u8> = bytes.iter().copied().collect();
        assert_eq!((bytes.len(), all.len()), (256, 256));
        for c in tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet() {
            assert!(byte_of(c).is_some(), "{c:?}");
        }
        assert_eq!(
            (byte_of('Ġ'), byte_of('Ċ'), byte_of('é'), byte_of('日')),
            (Some(b' '), Some(b'\n'), Some(0xE9), None)
        );
    }

    #[test]
    fn only_open_characters_are_held() {
        let mut held = "aé".as_bytes().to_vec();
        held.extend([0xFF, b'b', 0xE6, 0x97]);
        assert_eq!(complete(&mut held), "aé\u{FFFD}b");
        assert_eq!(held, [0xE6, 0x97]);
        held.push(0xA5);
        assert_eq!(complete(&mut held), "日");
        held.extend([0xE6, b'x']);
        assert_eq!(complete(&mut held), "\u{FFFD}x");
        assert!(held.is_empty());
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!((fallback_byte("<0x+A>"), fallback_byte("<0x0A"), fallback_byte("<0x0AB>")), (None, None, None));
    }
}

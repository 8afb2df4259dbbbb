//! Whether two tokenizers give the same ids, asked where tokenizers part: around special tokens, at the white space of
//! a text's edges, in rare letters, and in chats as the model's own template writes them.

use std::collections::BTreeMap;

use tokenizers::AddedToken;

use super::{Tokenizer, TokenizerError};
use crate::{ChatTemplate, Message};

/// Text that anyone writes.
const PLAIN: [&str; 4] = [
    "The river takes the bridge again.",
    "In 1969, 12 people of 1234567 said: it's 3.14159; THEY'D \"know\" (e.g. x_1 != y).",
    "def area(w, h):\n    return w * h  # two\n\n\nprint(area(2, 3))",
    "Größe, naïve, là-bas; Москва, 今日はいい天気, 한국어, العربية 😀",
];

/// White space at the edges, and more of it than one.
const SPACES: [&str; 6] = [
    " one space first",
    "   three spaces first",
    "\nnewline first",
    "\ttab first",
    "two  spaces, and one at the end ",
    "   ",
];

/// What normalization changes.
const RARE: [&str; 4] = ["cafe\u{301} \u{212b}", "ﬁne ① ½ Ａ", "hard\u{a0}space \u{3000}wide \u{200b}none", "▁bar a▁b"];

/// Special tokens that are asked about: some vocabularies have thousands, all alike.
const MOST_TOKENS: usize = 400;

/// What came of holding one tokenizer against another.
#[derive(Debug, Clone, Default)]
pub struct Compared {
    /// Why the other cannot stand for the first: a chat, or text that anyone writes, has other ids.
    pub refused: Option<String>,
    /// Where else ids differ, a sentence each, with the tokens and an example.
    pub notes: Vec<String>,
    /// Texts that differ.
    pub(super) texts: usize,
}

/// A text that two tokenizers read differently.
struct Apart {
    text: String,
    ours: Vec<u32>,
    theirs: Vec<u32>,
}

impl std::fmt::Display for Apart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // What differs, with a little of what stands before.
        let same = self.ours.iter().zip(&self.theirs).take_while(|(a, b)| a == b).count().saturating_sub(1);
        let show = |ids: &[u32]| {
            let shown: Vec<String> = ids[same..].iter().take(8).map(u32::to_string).collect();
            let (before, after) = (if same > 0 { "... " } else { "" }, if ids.len() - same > 8 { " ..." } else { "" });
            format!("{} ids ({before}{}{after})", ids.len(), shown.join(" "))
        };
        let text: String = self.text.chars().take(160).collect();
        write!(f, "{text:?} is {} in the source, {} there", show(&self.ours), show(&self.theirs))
    }
}

impl Tokenizer {
    /// Holds `other`, which is meant to be this tokenizer in another form, against this one. `template`: the model's
    /// own, for text as it meets it in chats; `more`: further texts that must have the same ids.
    pub fn compare(
        &self,
        other: &Tokenizer,
        template: Option<&ChatTemplate>,
        more: &[&str],
    ) -> Result<Compared, TokenizerError> {
        let apart = |text: &str, special: bool| -> Result<Option<Apart>, TokenizerError> {
            // What the source has no ids for needs none there.
            let Ok(ours) = self.encode(text, special) else { return Ok(None) };
            let theirs = other.encode(text, special)?;
            Ok((ours != theirs).then(|| Apart { text: text.to_owned(), ours, theirs }))
        };
        let mut out = Compared::default();
        if let Some(a) = apart("", true)? {
            out.refuse(format!("the tokens put around a text are not the same: {a}"));
        }
        let chats = template.map_or_else(Vec::new, |t| self.chats(t));
        for chat in &chats {
            if let Some(a) = apart(chat, false)? {
                out.refuse(format!("a chat has other ids: {a}"));
            }
        }
        let chat_holds = !chats.is_empty() && out.refused.is_none();
        let mut lacks_space = None;
        for text in PLAIN.iter().chain(more) {
            let Some(a) = apart(text, false)? else { continue };
            if chat_holds && other.encode(&format!(" {text}"), false)? == a.ours {
                (lacks_space, out.texts) = (lacks_space.or(Some(a)), out.texts + 1);
            } else {
                out.refuse(format!("plain text has other ids: {a}"));
            }
        }
        out.notes.extend(lacks_space.map(|a| {
            format!(
                "the source puts a space before a text that begins without one, here it has to be written (chats, \
                 which begin with a token, keep their ids): {a}"
            )
        }));
        for (texts, what) in [(&SPACES[..], "white space at the edge of a text"), (&RARE[..], "rare letters")] {
            let mut found = Vec::new();
            for text in texts {
                found.extend(apart(text, false)?);
            }
            out.texts += found.len();
            out.notes.extend(found.first().map(|a| format!("{what} can have other ids: {a}")));
        }
        self.around_tokens(&apart, &mut out)?;
        Ok(out)
    }

    /// What stands around every special token.
    fn around_tokens(&self, apart: &Asked<'_>, out: &mut Compared) -> Result<(), TokenizerError> {
        let mut tokens: Vec<(u32, AddedToken)> = self.0.encoder.get_added_tokens_decoder().into_iter().collect();
        tokens.sort_by_key(|(id, t)| (how(t) == PLAINLY, *id));
        tokens.truncate(MOST_TOKENS);
        let mut found: Vec<Option<Apart>> = Vec::new();
        for (_, token) in &tokens {
            found.push(out.first(alone(&token.content), apart)?);
        }
        // Two tokens side by side: what one of them does by itself is told already.
        for (i, (_, token)) in tokens.iter().enumerate() {
            let next = (i + 1) % tokens.len();
            if found[i].is_none() && found[next].is_none() {
                found[i] = out.first(beside(&token.content, &tokens[next].1.content), apart)?;
            }
        }
        let mut groups: BTreeMap<&str, (Vec<&str>, Apart)> = BTreeMap::new();
        for ((_, token), first) in tokens.iter().zip(found) {
            if let Some(a) = first {
                groups.entry(how(token)).or_insert_with(|| (Vec::new(), a)).0.push(&token.content);
            }
        }
        for (how, (names, example)) in groups {
            let shown: Vec<&str> = names.iter().take(6).copied().collect();
            let more = if names.len() > 6 { format!(" and {} more", names.len() - 6) } else { String::new() };
            out.notes.push(format!("the source {how} {}{more}; what was written does not: {example}", shown.join(" ")));
        }
        Ok(())
    }

    /// Conversations in the template's words; those that it has no words for are left out.
    pub(super) fn chats(&self, template: &ChatTemplate) -> Vec<String> {
        let text = |id: Option<u32>| id.and_then(|i| self.token_text(i)).unwrap_or_default();
        let (bos, eos) = (text(self.bos()), text(self.eos()));
        let (ask, answer) = (Message::new("user", "Why is it 12 degrees?"), Message::new("assistant", "It's spring."));
        let turns = [ask.clone(), answer, Message::new("user", "Show me:\n\n    x = 1")];
        let told = [Message::new("system", "You answer briefly."), ask];
        let render = |messages: &[Message], prompt: bool| template.render(messages, prompt, bos, eos, None).ok();
        [render(&turns[..1], true), render(&turns, true), render(&turns[..2], false), render(&told, true)]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// Asks both tokenizers for a text, with or without the tokens put around it.
type Asked<'a> = dyn Fn(&str, bool) -> Result<Option<Apart>, TokenizerError> + 'a;

impl Compared {
    /// The first of `texts` that differs; all count.
    fn first<const N: usize>(
        &mut self,
        texts: [String; N],
        apart: &Asked<'_>,
    ) -> Result<Option<Apart>, TokenizerError> {
        let mut first = None;
        for text in texts {
            if let Some(a) = apart(&text, false)? {
                self.texts += 1;
                first.get_or_insert(a);
            }
        }
        Ok(first)
    }

    fn refuse(&mut self, why: String) {
        self.texts += 1;
        self.refused.get_or_insert(why);
    }
}

/// How a token without any setting is found.
const PLAINLY: &str = "reads the text beside special tokens its own way, such as";

/// What a token's settings do, as a sentence about the source that the token ends.
fn how(t: &AddedToken) -> &'static str {
    match (t.lstrip, t.rstrip, t.single_word, t.normalized) {
        (true, true, ..) => "takes away the white space around",
        (true, false, ..) => "takes away the white space before",
        (false, true, ..) => "takes away the white space behind",
        (_, _, true, _) => "finds only between words",
        (_, _, _, true) => "finds only in normalized text",
        _ => PLAINLY,
    }
}

/// What may stand around a special token.
fn alone(a: &str) -> [String; 13] {
    [
        a.to_owned(),
        format!("{a}hi"),
        format!("{a} hi"),
        format!("{a}\nhi"),
        format!("{a}  hi"),
        format!("{a} \n hi"),
        format!("hi{a}"),
        format!("hi {a}"),
        format!("hi\n{a}"),
        format!(" {a}"),
        format!("{a}\n"),
        format!("{a}{a}"),
        format!("  hi{a}there"),
    ]
}

/// Two special tokens and what may lie between.
fn beside(a: &str, b: &str) -> [String; 4] {
    [format!("{a}{b}"), format!("{a} {b}"), format!("{a}\n{b}"), format!("{a}\nhi{b}\n{a}\n")]
}

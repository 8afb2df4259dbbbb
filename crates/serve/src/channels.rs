//! Answers in channels, as GPT-OSS writes them: messages of a header and a text, `<|channel|>analysis<|message|>...<|end|>`
//! and `<|start|>assistant<|channel|>final<|message|>...`; a call is one in `commentary` that names whom it is for,
//! `to=functions.NAME`, and ends with `<|call|>`.

/// Begins the name of a channel.
pub const CHANNEL: &str = "<|channel|>";
/// Ends a header.
pub const MESSAGE: &str = "<|message|>";
/// Ends a call.
pub const CALL: &str = "<|call|>";
/// What stands between a prompt and an answer that is all for the user.
pub const FINAL: &str = "<|channel|>final<|message|>";

const START: &str = "<|start|>";
const END: &str = "<|end|>";
const RETURN: &str = "<|return|>";
/// Whom a call of a request's functions is for.
const FUNCTIONS: &str = "functions.";

/// What ends a message's text.
const ENDS: [&str; 5] = [END, RETURN, CALL, START, CHANNEL];
/// What a header may begin with.
const BEGINNINGS: [&str; 4] = [CHANNEL, START, MESSAGE, "to="];

/// What a message is.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Thought,
    Said,
    Call,
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    /// Behind `<|start|>assistant`, which the prompt of an answer ends with.
    Header,
    /// In a message's text.
    Text(Kind),
    /// Behind a message.
    Between,
}

/// Parts an answer, as it comes, into what is thought and what is said.
#[derive(Debug)]
pub struct Channels {
    state: State,
    held: String,
    /// Whether calls are looked for behind this: they are said as they are.
    calls: bool,
    /// Whether something was thought, and said, and whether the next text of each begins another message.
    told: [bool; 2],
    fresh: bool,
}

/// Whom a header names, and the channel.
pub fn header(text: &str) -> (Option<&str>, &str) {
    let word = |rest: &'static str| {
        let at = text.find(rest)? + rest.len();
        let end = |c: char| c.is_whitespace() || c == '<';
        Some(text[at..].split(end).next().unwrap_or_default())
    };
    (word("to="), word(CHANNEL).unwrap_or_default())
}

/// The function that a header calls.
pub fn called(text: &str) -> Option<&str> {
    header(text).0?.strip_prefix(FUNCTIONS)
}

/// A call of a function, up to its arguments.
pub fn call_of(function: &str) -> String {
    format!("{CHANNEL}commentary to={FUNCTIONS}{function} <|constrain|>json{MESSAGE}")
}

impl Channels {
    /// At the beginning of an answer. `open`: the prompt ends within thoughts; `calls`: there are functions to call.
    pub fn new(open: bool, calls: bool) -> Channels {
        let state = if open { State::Text(Kind::Thought) } else { State::Header };
        Channels { state, held: String::new(), calls, told: [false; 2], fresh: true }
    }

    /// Whether the model is thinking.
    pub fn are_open(&self) -> bool {
        self.state == State::Text(Kind::Thought)
    }

    /// Takes more of the answer; returns what is thought and what is said for certain.
    pub fn push(&mut self, piece: &str) -> (String, String) {
        self.held.push_str(piece);
        let mut out = (String::new(), String::new());
        while self.go_on(&mut out) {}
        out
    }

    /// One part further; false where more must come first.
    fn go_on(&mut self, out: &mut (String, String)) -> bool {
        match self.state.clone() {
            State::Header => {
                let begun = self.held.trim_start();
                if let Some(at) = begun.find(MESSAGE) {
                    let head = &begun[..at];
                    let kind = match (header(head), called(head)) {
                        (_, Some(_)) if self.calls => Kind::Call,
                        ((None, "analysis"), _) => Kind::Thought,
                        _ => Kind::Said,
                    };
                    if kind == Kind::Call {
                        out.1.push_str(CHANNEL);
                        let named = called(head).unwrap_or_default();
                        out.1.push_str(&format!("commentary to={FUNCTIONS}{named}{MESSAGE}"));
                    }
                    self.held = begun[at + MESSAGE.len()..].to_owned();
                    (self.state, self.fresh) = (State::Text(kind), true);
                    return true;
                }
                if BEGINNINGS.iter().any(|b| begun.starts_with(*b) || b.starts_with(begun)) {
                    return false;
                }
                // No header at all.
                self.state = State::Text(Kind::Said);
                true
            }
            State::Text(kind) => {
                let found = ENDS.iter().filter_map(|end| Some((self.held.find(*end)?, *end))).min();
                if let Some((at, end)) = found {
                    let text: String = self.held.drain(..at).collect();
                    self.tell(&kind, &text, out);
                    if kind == Kind::Call {
                        out.1.push_str(CALL);
                    }
                    if ![START, CHANNEL].contains(&end) {
                        self.held.drain(..end.len());
                    }
                    self.state = State::Between;
                    return true;
                }
                // The end may be the beginning of a mark.
                let open = |at: &usize| ENDS.iter().any(|end| end.starts_with(&self.held[*at..]));
                let cut = self.held.char_indices().map(|(at, _)| at).find(open).unwrap_or(self.held.len());
                let text: String = self.held.drain(..cut).collect();
                self.tell(&kind, &text, out);
                false
            }
            State::Between => {
                let begun = self.held.trim_start();
                if let Some(rest) = begun.strip_prefix(START) {
                    // Who speaks is the model, whatever it calls itself.
                    let at = ["<|", " to="].iter().filter_map(|mark| rest.find(*mark)).min();
                    let Some(at) = at else { return false };
                    self.held = rest[at..].to_owned();
                    self.state = State::Header;
                    return true;
                }
                if begun.is_empty() || START.starts_with(begun) || CHANNEL.starts_with(begun) {
                    return false;
                }
                let named = begun.starts_with(CHANNEL);
                self.state = if named { State::Header } else { State::Text(Kind::Said) };
                true
            }
        }
    }

    /// Text of a message. One that comes behind another of its kind begins a line.
    fn tell(&mut self, kind: &Kind, text: &str, out: &mut (String, String)) {
        if text.is_empty() {
            return;
        }
        let fresh = std::mem::take(&mut self.fresh);
        let (to, told) = match kind {
            Kind::Thought => (&mut out.0, &mut self.told[0]),
            Kind::Said => (&mut out.1, &mut self.told[1]),
            Kind::Call => return out.1.push_str(text),
        };
        if fresh && std::mem::replace(told, true) {
            to.push('\n');
        }
        to.push_str(text);
    }

    /// The answer is over: what is left of thoughts and of what is said.
    pub fn finish(mut self) -> (String, String) {
        let mut out = (String::new(), String::new());
        if let State::Text(kind) = self.state.clone() {
            let left = std::mem::take(&mut self.held);
            self.tell(&kind, &left, &mut out);
            if kind == Kind::Call {
                out.1.push_str(CALL);
            }
        }
        // A header that was broken off says nothing; what only might have become one is a text.
        if self.state == State::Header && !BEGINNINGS.iter().any(|b| self.held.trim_start().starts_with(*b)) {
            out.1 = self.held;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(open: bool, calls: bool, text: &str, step: usize) -> (String, String) {
        let mut c = Channels::new(open, calls);
        let chars: Vec<char> = text.chars().collect();
        let (mut thought, mut said) = (String::new(), String::new());
        for piece in chars.chunks(step) {
            let (a, b) = c.push(&piece.iter().collect::<String>());
            thought += &a;
            said += &b;
        }
        let (a, b) = c.finish();
        (thought + &a, said + &b)
    }

    #[test]
    fn channels_are_parted_however_the_answer_is_cut() {
        let both = "<|channel|>analysis<|message|>Let me <see>.\n<|end|><|start|>assistant<|channel|>final<|message|>It \
                    is. <3";
        let call = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.add \
                    <|constrain|>json<|message|>{\"a\": 1}<|call|>";
        let role = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant to=functions.add<|channel|>commentary \
                    json<|message|>{\"a\": 1}";
        let told = "<|channel|>commentary to=functions.add<|message|>{\"a\": 1}<|call|>";
        let preamble = "<|channel|>commentary<|message|>First this.<|end|><|start|>assistant<|channel|>analysis\
                        <|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B<|end|>\
                        <|start|>assistant<|channel|>final<|message|>Then that.<|return|>";
        for (open, calls, text, thought, said) in [
            (false, false, both, "Let me <see>.\n", "It is. <3"),
            (false, true, both, "Let me <see>.\n", "It is. <3"),
            (true, false, "Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes", "Hm.", "Yes"),
            (false, true, call, "Hm", told),
            (false, true, role, "Hm", told),
            // Nobody offered it: a text.
            (false, false, call, "Hm", "{\"a\": 1}"),
            (false, true, " to=functions.add<|channel|>commentary<|message|>{\"a\": 1}", "", told),
            (false, false, preamble, "A\nB", "First this.\nThen that."),
            (false, false, "<|channel|>final<|message|>é<|return|>", "", "é"),
            // Broken off.
            (false, false, "<|channel|>analysis<|message|>no end <|en", "no end <|en", ""),
            (false, false, "<|channel|>anal", "", ""),
            (false, false, "<|channel|>analysis<|message|>x<|end|><|start|>assis", "x", ""),
            (false, false, "", "", ""),
            // No channels.
            (false, false, "It is.", "", "It is."),
            (false, false, "<b>t</b>", "", "<b>t</b>"),
            (false, false, "tome", "", "tome"),
            (false, false, "to", "", "to"),
            (false, false, " \n", "", " \n"),
            (false, false, "<|message|>x", "", "x"),
            // Messages without what should stand between them.
            (false, false, "<|channel|>analysis<|message|>x<|channel|>final<|message|>y", "x", "y"),
            (false, false, "<|channel|>analysis<|message|>x<|end|>y", "x", "y"),
        ] {
            for step in [1, 2, 3, 5, 8, 1000] {
                let want = (thought.to_owned(), said.to_owned());
                assert_eq!(split(open, calls, text, step), want, "{text:?} by {step}");
            }
        }
    }

    #[test]
    fn headers_tell_whom_a_message_is_for() {
        assert_eq!(
            header("<|channel|>commentary to=functions.f <|constrain|>json"),
            (Some("functions.f"), "commentary")
        );
        assert_eq!(header(" to=browser.open<|channel|>analysis"), (Some("browser.open"), "analysis"));
        assert_eq!(header("<|channel|>final"), (None, "final"));
        assert_eq!((called("to=functions.a<"), called("to=python"), called("")), (Some("a"), None, None));
        assert_eq!(called(&call_of("get_x")), Some("get_x"));
    }
}

//! Standard output and standard error: nothing else in the program writes to them.

use std::io::{self, Write};

/// Standard output that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub struct Closed(io::Error);

impl Closed {
    /// Whether a reader has seen enough and went away (`lacuna methods | head`), which is no failure.
    pub fn nobody_reads(&self) -> bool {
        self.0.kind() == io::ErrorKind::BrokenPipe
    }
}

impl From<io::Error> for Closed {
    fn from(e: io::Error) -> Closed {
        Closed(e)
    }
}

/// Writes `text` to standard output as it is, at once.
pub fn write(text: &str) -> Result<(), Closed> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Writes to standard error. Where nobody hears, nothing is said: that ends no work.
pub fn say(text: &str) {
    let mut err = io::stderr().lock();
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// An error and what caused it, each thing said once: many errors of libraries tell their cause in their own words
/// already.
pub fn told(e: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in e.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let io = || io::Error::other("no space");
        let told = |e: anyhow::Error| told(&e);
        assert_eq!(told(io().into()), "no space");
        assert_eq!(told(Err::<(), _>(io()).context("a.gguf").unwrap_err()), "a.gguf: no space");
        // The kind of error that names its cause itself.
        let save = lacuna_checkpoint::SaveError::Io { file: "a.gguf".into(), source: io() };
        assert_eq!(told(save.into()), "a.gguf: no space");
        let open = lacuna_checkpoint::OpenError::Io { file: "b".into(), source: io() };
        assert_eq!(told(anyhow::Error::from(open).context("the tokenizer")), "the tokenizer: b: no space");
    }
}

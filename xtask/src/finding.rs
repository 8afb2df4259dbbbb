//! A place that breaks a law, with what to do about it.

use std::fmt;

/// One broken law.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    file: String,
    line: usize,
    law: &'static str,
    what: String,
    cure: String,
}

impl Finding {
    /// `line` counts from 1; 0 means the file as a whole.
    pub fn new(file: &str, line: usize, law: &'static str, what: impl Into<String>, cure: impl Into<String>) -> Self {
        Finding { file: file.to_owned(), line, law, what: what.into(), cure: cure.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.line.max(1);
        write!(f, "{}:{line}: [{}] {}\n    do: {}", self.file, self.law, self.what, self.cure)
    }
}

#[cfg(test)]
impl Finding {
    /// Where and what, for tests.
    pub fn brief(&self) -> (usize, &str) {
        (self.line, &self.what)
    }
}

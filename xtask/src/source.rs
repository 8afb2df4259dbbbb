//! A Rust file with its words blanked out, so that laws about code look at code alone.

/// A file as the laws see it. Lines correspond one to one with the file's.
pub struct Source {
    /// Code with comments, text and character literals replaced by spaces.
    pub code: Vec<String>,
    /// Whether the line belongs to an item behind `#[cfg(test)]`.
    pub in_test: Vec<bool>,
}

impl Source {
    /// Reads a file's text. `file` decides whether all of it is a test.
    pub fn parse(file: &str, text: &str) -> Source {
        let blanked = blank(text);
        let code: Vec<String> = blanked.lines().map(str::to_owned).collect();
        let all = is_test_file(file);
        let mut in_test = vec![all; code.len()];
        if !all {
            mark_tests(&blanked, &mut in_test);
        }
        Source { code, in_test }
    }

    /// Lines (from 1) that hold code outside tests.
    pub fn code_lines(&self) -> usize {
        self.code.iter().zip(&self.in_test).filter(|(line, test)| !**test && !line.trim().is_empty()).count()
    }

    /// Lines (from 1) where `pattern` stands in code; a pattern that starts with a letter must start a word there.
    pub fn find(&self, pattern: &str) -> Vec<usize> {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let starts_word = pattern.starts_with(word);
        let ends_word = pattern.ends_with(word);
        let inside_word = |line: &str, at: usize| {
            (starts_word && line[..at].ends_with(word)) || (ends_word && line[at + pattern.len()..].starts_with(word))
        };
        let hit = |line: &str| line.match_indices(pattern).any(|(at, _)| !inside_word(line, at));
        self.code.iter().enumerate().filter(|(_, l)| hit(l)).map(|(i, _)| i + 1).collect()
    }
}

/// Whether a file holds nothing but tests.
pub fn is_test_file(file: &str) -> bool {
    file.split('/').any(|part| part == "tests" || part == "tests.rs" || part == "benches")
}

/// Marks the lines of each item behind `#[cfg(test)]`: up to the brace that closes it, or to its semicolon.
fn mark_tests(blanked: &str, in_test: &mut [bool]) {
    let mut from = 0;
    while let Some(at) = blanked[from..].find("#[cfg(test)]") {
        let start = from + at;
        let mut depth = 0usize;
        let mut end = blanked.len();
        for (i, c) in blanked[start + "#[cfg(test)]".len()..].char_indices() {
            let here = start + "#[cfg(test)]".len() + i;
            match c {
                '{' => depth += 1,
                '}' if depth <= 1 => {
                    end = here;
                    break;
                }
                '}' => depth -= 1,
                ';' if depth == 0 => {
                    end = here;
                    break;
                }
                _ => {}
            }
        }
        let line_of = |byte: usize| blanked[..byte].matches('\n').count();
        for line in line_of(start)..=line_of(end).min(in_test.len() - 1) {
            in_test[line] = true;
        }
        from = end.max(start + 1).min(blanked.len());
    }
}

/// Replaces the inside of comments and literals by spaces and keeps line ends.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < chars.len() {
        let end = match literal_or_comment(&chars, i) {
            Some(end) => end,
            None => {
                out.push(chars[i]);
                i += 1;
                continue;
            }
        };
        out.extend(chars[i..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
        // A literal is code, if an empty one: a line that holds only text still counts.
        if chars[i] != '/' {
            for (at, c) in [(i, '"'), (end - 1, '"')] {
                let back = out.len() - (end - at);
                if out.is_char_boundary(back) && out.as_bytes()[back] == b' ' {
                    out.replace_range(back..=back, &c.to_string());
                }
            }
        }
        i = end;
    }
    out
}

/// If a comment or literal starts at `i`: where it ends.
fn literal_or_comment(c: &[char], i: usize) -> Option<usize> {
    let at = |j: usize| c.get(j).copied().unwrap_or('\0');
    let word_before = i > 0 && (at(i - 1).is_alphanumeric() || at(i - 1) == '_');
    match (at(i), at(i + 1)) {
        ('/', '/') => Some((i..c.len()).find(|&j| c[j] == '\n').unwrap_or(c.len())),
        ('/', '*') => {
            let (mut j, mut depth) = (i, 0);
            while j < c.len() {
                match (at(j), at(j + 1)) {
                    ('/', '*') => (depth, j) = (depth + 1, j + 2),
                    ('*', '/') => (depth, j) = (depth - 1, j + 2),
                    _ => j += 1,
                }
                if depth == 0 {
                    break;
                }
            }
            Some(j.min(c.len()))
        }
        ('"', _) => Some(quoted(c, i + 1, '"')),
        ('b' | 'c', '"') if !word_before => Some(quoted(c, i + 2, '"')),
        ('b', '\'') if !word_before => Some(quoted(c, i + 2, '\'')),
        ('r', '"' | '#') if !word_before => raw(c, i + 1),
        ('b' | 'c', 'r') if !word_before => raw(c, i + 2),
        // A character, not a lifetime: 'x' or '\...'.
        ('\'', '\\') => Some(quoted(c, i + 1, '\'')),
        ('\'', _) if at(i + 2) == '\'' => Some(i + 3),
        _ => None,
    }
}

/// The end of a literal whose inside starts at `j`.
fn quoted(c: &[char], mut j: usize, close: char) -> usize {
    while j < c.len() {
        match c[j] {
            '\\' => j += 2,
            x if x == close => return j + 1,
            _ => j += 1,
        }
    }
    c.len()
}

/// The end of a raw string whose hashes start at `j`; nothing if it is a raw identifier.
fn raw(c: &[char], mut j: usize) -> Option<usize> {
    let hashes = c[j..].iter().take_while(|&&x| x == '#').count();
    j += hashes;
    if c.get(j) != Some(&'"') {
        return None;
    }
    j += 1;
    while j < c.len() {
        if c[j] == '"' && c[j + 1..].iter().take(hashes).filter(|&&x| x == '#').count() == hashes {
            return Some(j + 1 + hashes);
        }
        j += 1;
    }
    Some(c.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, pattern: &str) -> Vec<usize> {
        Source::parse("a.rs", text).find(pattern)
    }

    #[test]
    fn words_are_not_code() {
        assert_eq!(lines("// unsafe\nunsafe {}\n/* unsafe\n/* unsafe */ unsafe */ unsafe {}", "unsafe"), [2, 4]);
        assert!(lines("let s = \"unsafe \\\" unsafe\";\nlet t = r#\"unsafe \" unsafe\"#;", "unsafe").is_empty());
        assert_eq!(lines("fn f<'a>(x: &'a str) { '\"'; '\\''; unsafe {} }", "unsafe"), [1]);
        assert_eq!(lines("let r#unsafe_x = br\"unsafe\"; b\"unsafe\"; b'\"'; unsafe {}", "unsafe"), [1]);
        assert!(lines("let more_unsafe = 1; let unsafely = 2;", "unsafe").is_empty());
        assert_eq!(lines("undbg!(1);\ndbg!(1)", "dbg!("), [2]);
        assert_eq!(lines("\"é\"; /* ü */ unsafe {}", "unsafe"), [1]);
    }

    #[test]
    fn lines_of_code_leave_out_words_blanks_and_tests() {
        let text = "//! Head.\n\nfn a() {\n    // why\n    b(\"x\");\n}\n\n#[cfg(test)]\nmod tests {\n    fn t() \
         {}\n}\nfn c() {}\n";
        let s = Source::parse("a.rs", text);
        assert_eq!(s.code_lines(), 4);
        assert_eq!(s.in_test.iter().filter(|t| **t).count(), 4);
        assert_eq!(Source::parse("a.rs", "#[cfg(test)]\nmod tests;\nfn a() {}\n").code_lines(), 1);
        assert_eq!(Source::parse("tests/a.rs", text).code_lines(), 0);
        assert_eq!(Source::parse("a.rs", "f(\n    \"only words\",\n);").code_lines(), 3);
        assert_eq!(Source::parse("a.rs", "#[cfg(test)]").code_lines(), 0);
    }
}

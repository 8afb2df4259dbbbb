//! Tables for terminals.

/// A table of text: the first column to the left, the others to the right.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Heads of the columns.
    pub head: Vec<String>,
    /// Rows; shorter ones are filled up with nothing.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these columns.
    pub fn new<S: Into<String>>(head: impl IntoIterator<Item = S>) -> Table {
        Table { head: head.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) -> &mut Table {
        self.rows.push(cells.into_iter().map(Into::into).collect());
        self
    }

    /// The table as text, columns aligned, two spaces between them, a rule under the head (neither where no column has
    /// a name); a newline behind every line.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).chain([self.head.len()]).max().unwrap_or(0);
        let cell = |row: &'_ [String], c: usize| row.get(c).cloned().unwrap_or_default();
        let width = |c: usize| {
            let all = self.rows.iter().chain([&self.head]);
            all.map(|r| cell(r, c).chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &[String]| {
            let pad = |c: usize| {
                let (text, w) = (cell(row, c), widths[c]);
                if c == 0 { format!("{text:<w$}") } else { format!("{text:>w$}") }
            };
            (0..columns).map(pad).collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
        };
        let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
        let head = if self.head.iter().all(String::is_empty) { String::new() } else { line(&self.head) + &line(&rule) };
        head + &self.rows.iter().map(|r| line(r)).collect::<String>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned() {
        let mut t = Table::new(["model", "ppl", "bytes"]);
        t.row(["f16", "12.31", "269.0 MB"]).row(["größer", "9.8"]);
        assert_eq!(
            t.text(),
            "model     ppl     bytes\n------  -----  --------\nf16     12.31  269.0 MB\ngrößer    9.8\n"
        );
        assert_eq!(Table::new(["", ""]).row(["loss", "3.1"]).text(), "loss  3.1\n");
    }
}

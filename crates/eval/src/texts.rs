//! The two texts that come with Lacuna; `texts/README.md` says what they are and what they are not.

/// Shows a compression method what inputs a layer sees.
pub const CALIBRATION: &str = include_str!("../texts/calibration.txt");

/// Judges the result. Shares no run of 50 characters with [`CALIBRATION`].
pub const HELD_OUT: &str = include_str!("../texts/held-out.txt");

/// A text with every line end as `\n`, as Python's text mode reads it: published perplexities are of texts read so.
pub fn normal_lines(text: &str) -> String {
    text.replace("\r\n", "\n").replace('\r', "\n")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn text_that_calibrates_never_judges() {
        let runs = |text: &'static str| {
            let mut at: Vec<usize> = text.char_indices().map(|(i, _)| i).collect();
            at.push(text.len());
            at.windows(51).map(|w| &text[w[0]..w[50]]).collect::<HashSet<&str>>()
        };
        let (a, b) = (runs(CALIBRATION), runs(HELD_OUT));
        assert!(a.len() > 50_000 && b.len() > 25_000);
        assert_eq!(a.intersection(&b).next(), None);
    }
}

//! A text cut into windows, the way perplexity is counted here.

use crate::EvalError;

/// The first `windows` windows of `ctx` tokens each, not overlapping. With `bos` each is BOS followed by `ctx - 1`
/// tokens of the text.
///
/// `windows: None` takes all that fit. Fewer than asked for are an error that says how many there are: a number
/// measured on less text than it claims is worth nothing.
pub fn cut(tokens: &[u32], ctx: usize, windows: Option<usize>, bos: Option<u32>) -> Result<Vec<Vec<u32>>, EvalError> {
    let fresh = ctx - usize::from(bos.is_some() && ctx > 0);
    if ctx < 2 || fresh == 0 {
        return Err(EvalError::new(format!("windows of {ctx} tokens judge nothing; at least 2 are needed")));
    }
    let there = tokens.len() / fresh;
    let take = windows.unwrap_or(there);
    if take == 0 || there < take {
        return Err(EvalError::new(format!(
            "the text has {} tokens: {there} windows of {ctx}, {} asked for",
            tokens.len(),
            windows.map_or("at least 1".into(), |w| w.to_string())
        )));
    }
    Ok(tokens.chunks_exact(fresh).take(take).map(|w| bos.into_iter().chain(w.iter().copied()).collect()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocol() {
        let t: Vec<u32> = (10..23).collect();
        assert_eq!(cut(&t, 4, Some(2), None).unwrap(), [[10, 11, 12, 13], [14, 15, 16, 17]]);
        assert_eq!(cut(&t, 4, Some(2), Some(1)).unwrap(), [[1, 10, 11, 12], [1, 13, 14, 15]]);
        assert_eq!(cut(&t, 4, None, None).unwrap().len(), 3);
        assert_eq!(cut(&t, 4, None, Some(1)).unwrap().len(), 4);
        let e = cut(&t, 4, Some(4), None).unwrap_err().to_string();
        assert_eq!(e, "the text has 13 tokens: 3 windows of 4, 4 asked for");
        assert!(
            cut(&t, 1, None, None).is_err() && cut(&t, 1, None, Some(1)).is_err() && cut(&t, 0, None, Some(1)).is_err()
        );
        assert!(cut(&t, 100, None, None).is_err());
    }
}

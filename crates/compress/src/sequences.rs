//! Calibration text cut into sequences.

use crate::account::CompressError;
use crate::recipe::Recipe;

/// The sha256 of sequences' ids, by which an interrupted run knows its text again.
pub(crate) fn fingerprint(sequences: &[Vec<u32>]) -> String {
    use sha2::Digest;
    let mut h = sha2::Sha256::new();
    for t in sequences.iter().flatten() {
        h.update(t.to_le_bytes());
    }
    crate::identity::hex(h)
}

/// The sha256 of a text's ids.
pub fn tokens_fingerprint(tokens: &[u32]) -> String {
    fingerprint(&[tokens.to_vec()])
}

/// The sha256 of a file's bytes.
pub fn bytes_fingerprint(bytes: &[u8]) -> String {
    use sha2::Digest;
    crate::identity::hex(sha2::Sha256::new_with_prefix(bytes))
}

/// The calibration sequences: from the start of the text, or from random places for a seed other than 0.
pub(crate) fn cut(
    tokens: &[u32],
    recipe: &Recipe,
    bos: Option<u32>,
    notes: &mut Vec<String>,
) -> Result<Vec<Vec<u32>>, CompressError> {
    let c = &recipe.calibration;
    if tokens.len() < 2 {
        return Err(CompressError::NoText { tokens: tokens.len() });
    }
    let len = c.seq_len.min(tokens.len());
    let samples = c.samples.min(tokens.len() / len);
    if (samples, len) != (c.samples, c.seq_len) {
        notes.push(format!(
            "the calibration text has {} tokens: {samples} sequences of {len} are used instead of {} of {}",
            tokens.len(),
            c.samples,
            c.seq_len
        ));
    }
    let mut rng = lacuna_base::Rng::new(c.seed);
    let one = |i: usize, rng: &mut lacuna_base::Rng| {
        let start = if c.seed == 0 { i * len } else { rng.below(tokens.len() - len + 1) };
        match bos {
            None => tokens[start..start + len].to_vec(),
            Some(b) => std::iter::once(b).chain(tokens[start..start + len - 1].iter().copied()).collect(),
        }
    };
    Ok((0..samples).map(|i| one(i, &mut rng)).collect())
}

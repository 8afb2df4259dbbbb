//! How what is meant lies within the bytes of a tensor.

use bytes::Bytes;

/// How the entries of a place lie within bytes of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Lie {
    /// The bytes are `[cols, all]`; columns from this one on are meant.
    pub(super) transposed: Option<usize>,
    /// Of rows (of those columns, of a vector's entries) every so many-th is meant.
    pub(super) step: usize,
}

/// The first of every `step` rows of `size` bytes.
pub(super) fn every(data: &[u8], size: usize, step: usize) -> Bytes {
    Bytes::from(data.chunks(size).step_by(step).flatten().copied().collect::<Vec<u8>>())
}

/// Rows `from..from + rows` of the transpose of a `[cols, all]` matrix of `size`-byte entries.
pub(crate) fn transpose(data: &[u8], rows: usize, cols: usize, from: usize, size: usize) -> Bytes {
    let all = data.len() / size / cols;
    let mut out = Vec::with_capacity(rows * cols * size);
    for r in from..from + rows {
        for c in 0..cols {
            let at = (c * all + r) * size;
            out.extend_from_slice(&data[at..at + size]);
        }
    }
    out.into()
}

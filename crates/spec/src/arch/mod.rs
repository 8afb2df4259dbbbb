//! Architectures: each file maps one family's configuration and tensor names to a [`Spec`](crate::Spec) and back. No arithmetic.
//!
//! A mapping never touches values. Where a file stores a tensor in another arrangement, [`Source`] says which rows of which stored
//! tensor are meant and whether they lie transposed; the reader does the rest.

/// Where a tensor of the model lies in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The stored tensor's name.
    pub name: String,
    /// Rows `from..to` of the stored tensor (after the transpose, if any); `None`: all.
    pub rows: Option<(usize, usize)>,
    /// The file keeps `[in, out]` instead of `[out, in]` (GPT-2's Conv1D).
    pub transposed: bool,
    /// Index into the first of three axes (stacked experts of GGUF files).
    pub slice: Option<usize>,
}

impl Source {
    /// A tensor stored as the model means it.
    pub fn whole(name: impl Into<String>) -> Source {
        Source { name: name.into(), rows: None, transposed: false, slice: None }
    }
}

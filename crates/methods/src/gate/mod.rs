//! Gates: which channels does this token need?

pub(crate) mod wina;

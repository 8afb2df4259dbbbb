//! lacuna-format

//! lacuna-compress

//! lacuna-run

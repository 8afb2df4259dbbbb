//! lacuna-eval

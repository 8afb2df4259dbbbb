//! lacuna-model

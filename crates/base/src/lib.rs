//! lacuna-base

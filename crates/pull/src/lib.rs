//! lacuna-pull

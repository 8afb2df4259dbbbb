//! lacuna-methods

//! lacuna-contract

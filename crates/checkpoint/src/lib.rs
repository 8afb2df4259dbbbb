//! lacuna-checkpoint

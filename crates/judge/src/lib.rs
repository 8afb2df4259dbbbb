//! lacuna-judge

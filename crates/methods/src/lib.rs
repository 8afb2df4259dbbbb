//! The methods, one paper a file, and their list.
//!
//! Nothing here knows files, kernels or networks: a method gets matrices and statistics and gives an answer of
//! [`lacuna_contract`]. A new method is one file and one line of [`registry`].

mod budget;
mod drop;
mod factor;
mod grid;
mod make;
mod obs;
mod score;
mod solve;

use lacuna_contract::Method;

/// Every method, in the order in which `lacuna methods` shows them.
pub fn registry() -> Vec<Method> {
    vec![
        score::magnitude::method(),
        score::wanda::method(),
        solve::sparsegpt::method(),
        grid::rtn::method(),
        solve::gptq::method(),
        factor::svd::method(),
        factor::svd_llm::method(),
        drop::llm_drop::method(),
        budget::uniform::method(),
    ]
}

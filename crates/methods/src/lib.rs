//! The methods, one paper a file, the families, one verb a file, and their list.
//!
//! Nothing here knows files, kernels or networks: a method gets matrices and statistics and gives an answer of
//! [`lacuna_contract`]; a family turns answers into edits. A new method is one file and one line of [`registry`], and
//! so is a family.

mod basis;
mod factor;
mod family;
mod grid;
mod make;
mod obs;
mod score;
mod search;
mod shortlist;
mod solve;
mod structure;
mod transform;

use lacuna_contract::Registry;

/// Every method, in the order in which `lacuna methods` shows them, and every family.
pub fn registry() -> Registry {
    Registry {
        methods: vec![
            score::magnitude::method(),
            score::wanda::method(),
            score::fisher::method(),
            score::gblm::method(),
            solve::sparsegpt::method(),
            grid::rtn::method(),
            grid::bfp::method(),
            grid::squeezellm::method(),
            solve::gptq::method(),
            solve::spqr::method(),
            factor::svd::method(),
            factor::svd_llm::method(),
            factor::eora::method(),
            transform::hadamard::method(),
            transform::awq::method(),
            transform::rearrange::method(),
            basis::axes::method(),
            basis::slicegpt::method(),
            structure::llm_drop::method(),
            structure::flap::method(),
            structure::wanda_sp::method(),
            shortlist::lexical_shortlist::method(),
            search::uniform::method(),
            search::evopress::method(),
        ],
        families: vec![
            family::prune::family(),
            family::quantize::family(),
            family::factor::family(),
            family::outliers::family(),
            family::transform::family(),
            family::drop::family(),
            family::slice::family(),
            family::structure::family(),
            family::vocabulary::family(),
            family::search::family(),
        ],
    }
}

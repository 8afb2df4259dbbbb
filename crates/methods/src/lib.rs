//! The methods, one paper a file, the families, one verb a file, and their list.
//!
//! Nothing here knows files, kernels or networks: a method gets matrices and statistics and gives an answer of
//! [`lacuna_contract`]; a family turns answers into edits. A new method is one file and one line of [`registry`], and
//! so is a family.

mod activation;
mod basis;
mod blocks;
mod draft;
mod factor;
mod family;
mod gate;
mod grid;
mod keep;
mod make;
mod obs;
mod recode;
mod score;
mod search;
mod select;
mod shortlist;
mod solve;
mod stack;
mod structure;
mod transform;

use lacuna_contract::Registry;

/// Every method, in the order in which `lacuna methods` shows them, every family, and every method of run time.
pub fn registry() -> Registry {
    Registry {
        methods: vec![
            score::magnitude::method(),
            score::wanda::method(),
            score::fisher::method(),
            score::gblm::method(),
            score::gqsa::method(),
            score::constant_blocks::method(),
            solve::sparsegpt::method(),
            solve::sparsellm::method(),
            solve::dsnot::method(),
            solve::llm_surgeon::method(),
            solve::obert::method(),
            grid::rtn::method(),
            grid::weighted_rtn::method(),
            solve::hqq::method(),
            solve::finequant::method(),
            grid::float_format::method(),
            grid::bfp::method(),
            grid::squeezellm::method(),
            grid::any_precision::method(),
            recode::double_quantization::method(),
            stack::bitstack::method(),
            solve::gptq::method(),
            solve::spqr::method(),
            factor::svd::method(),
            factor::fwsvd::method(),
            factor::asvd::method(),
            factor::gfwsvd::method(),
            factor::svd_llm::method(),
            factor::dobi_svd::method(),
            factor::welore::method(),
            factor::eora::method(),
            transform::hadamard::method(),
            transform::awq::method(),
            transform::rearrange::method(),
            basis::axes::method(),
            basis::slicegpt::method(),
            structure::llm_drop::method(),
            structure::flap::method(),
            structure::wanda_sp::method(),
            structure::llm_pruner::method(),
            structure::cfsp::method(),
            structure::prunenet::method(),
            structure::random::method(),
            shortlist::lexical_shortlist::method(),
            search::uniform::method(),
            search::evopress::method(),
            search::svd_llm_v2::method(),
            search::owl::method(),
            search::sv_nup::method(),
            search::essential_sparsity::method(),
            search::ziplm::method(),
        ],
        families: vec![
            family::prune::family(),
            family::quantize::family(),
            family::recode::family(),
            family::stack::family(),
            family::factor::family(),
            family::outliers::family(),
            family::transform::family(),
            family::drop::family(),
            family::slice::family(),
            family::structure::family(),
            family::vocabulary::family(),
            family::search::family(),
        ],
        running: vec![
            draft::token_recycling::method(),
            draft::copyspec::method(),
            keep::streaming_llm::method(),
            keep::h2o::method(),
            select::pooled_blocks::method(),
            select::flexprefill::method(),
            gate::wina::method(),
        ],
    }
}

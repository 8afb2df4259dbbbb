//! LoRA adapters: any adapter_config.json with any adapter_model.safetensors gives a changed model whose every tensor
//! decodes, or an error.
//!
//! Four bytes say how long adapter_config.json is; it follows, and the rest is adapter_model.safetensors.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use lacuna_checkpoint::{Adapter, open};
use lacuna_format::Weights;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("lacuna-fuzz-adapter-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a scratch folder");
        dir
    });
    let Some((length, rest)) = data.split_first_chunk::<4>() else { return };
    let Some((config, tensors)) = rest.split_at_checked(u32::from_le_bytes(*length) as usize) else { return };
    std::fs::write(dir.join("adapter_config.json"), config).expect("written");
    std::fs::write(dir.join("adapter_model.safetensors"), tensors).expect("written");
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/foreign/peft_base");
    for merge in [false, true] {
        let Ok(adapter) = Adapter::open(dir) else { return };
        let Ok(model) = open(&base).expect("the golden base").with_adapter(adapter, merge) else { return };
        for place in model.spec().places() {
            if let Ok(Some(stored)) = model.get(&place) {
                let _ = (stored.to_mat(), stored.bytes());
            }
        }
    }
});

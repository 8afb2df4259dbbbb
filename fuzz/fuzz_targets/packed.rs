//! Directories: any config.json with any safetensors gives a model whose every tensor decodes, or an error.
//!
//! Four bytes say how long config.json is; it follows, and the rest is model.safetensors. Packed models and the Hugging
//! Face layout take the same door.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use lacuna_checkpoint::open;
use lacuna_format::Weights;
use libfuzzer_sys::fuzz_target;

/// Larger matrices are opened and checked, not decoded: a header of a few bytes may name many zeros.
const MOST_VALUES: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    let dir = DIR.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("lacuna-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a scratch folder");
        dir
    });
    let Some((length, rest)) = data.split_first_chunk::<4>() else { return };
    let Some((config, tensors)) = rest.split_at_checked(u32::from_le_bytes(*length) as usize) else { return };
    std::fs::write(dir.join("config.json"), config).expect("written");
    std::fs::write(dir.join("model.safetensors"), tensors).expect("written");
    let Ok(model) = open(dir) else { return };
    for place in model.spec().places() {
        if let Ok(Some(stored)) = model.get(&place)
            && stored.rows.saturating_mul(stored.cols) <= MOST_VALUES
        {
            let _ = (stored.to_mat(), stored.bytes());
        }
    }
});

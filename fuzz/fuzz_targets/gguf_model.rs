//! GGUF models: any bytes give a model whose every tensor decodes, or an error.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use lacuna_checkpoint::{Found, examine, open};
use lacuna_format::Weights;
use libfuzzer_sys::fuzz_target;

/// Larger matrices are opened and checked, not decoded.
const MOST_VALUES: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("lacuna-fuzz-gguf-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a scratch folder");
        dir.join("model-00001-of-00002.gguf")
    });
    std::fs::write(file, data).expect("written");
    let _ = examine(file);
    let Ok(model) = open(file) else { return };
    for place in model.spec().places() {
        if let Ok(Some(stored)) = model.get(&place)
            && stored.rows.saturating_mul(stored.cols) <= MOST_VALUES
        {
            let _ = (stored.to_mat(), stored.bytes(), Found::of(&stored));
        }
    }
});

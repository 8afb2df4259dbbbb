//! Safetensors headers and indices: any bytes give tensors that lie inside the file and do not overlap, or an error.
#![no_main]

use lacuna_checkpoint::safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = safetensors::parse_index(data);
    let Ok(mut tensors) = safetensors::parse(data) else { return };
    for tensor in &tensors {
        assert!(data.get(tensor.bytes.clone()).is_some(), "{} lies outside the file", tensor.name);
    }
    tensors.retain(|t| !t.bytes.is_empty());
    tensors.sort_by_key(|t| t.bytes.start);
    for pair in tensors.windows(2) {
        assert!(pair[0].bytes.end <= pair[1].bytes.start, "{} and {} overlap", pair[0].name, pair[1].name);
    }
});

//! GGUF headers: any bytes give a table whose ranges lie inside the file, or an error.
#![no_main]

use lacuna_checkpoint::gguf;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(file) = gguf::parse(data) else { return };
    for tensor in &file.tensors {
        assert!(data.get(tensor.bytes.clone()).is_some(), "{} lies outside the file", tensor.name);
    }
    for (key, _) in file.metadata.iter() {
        let _ = (file.metadata.get_u64(key), file.metadata.get_f32s(key), file.metadata.get_ints(key));
    }
    // A header cut down to its metadata is a header with the same metadata.
    let again = gguf::parse(&gguf::metadata_only(data, &file, |_| true)).expect("metadata alone parses");
    assert_eq!(again.metadata.iter().count(), file.metadata.iter().count());
});

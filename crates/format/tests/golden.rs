//! Blocks of every GGUF type against the values the `gguf` package reads from them.

use lacuna_format::{Bytes, Float, GgufType, Pattern, Piece, Values};
use serde_json::Value;

fn hex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

#[test]
fn every_gguf_type_reads_as_in_the_gguf_package() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/dequant.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut seen = 0;
    for (name, case) in golden.as_object().unwrap() {
        let values = match name.as_str() {
            "made_with" => continue,
            "F16" => Values::Float(Float::F16, Bytes::new()),
            "BF16" => Values::Float(Float::Bf16, Bytes::new()),
            // Others are read as codes into tables, by the crate that reads files.
            _ => match serde_json::from_value::<GgufType>(name.clone().into()) {
                Ok(kind) => Values::Gguf(kind, Bytes::new()),
                Err(_) => continue,
            },
        };
        let bytes = Bytes::from(hex(case["bytes_hex"].as_str().unwrap()));
        let expected: Vec<f32> =
            case["values"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
        let values = match values {
            Values::Gguf(kind, _) => {
                assert_eq!(kind.block() as u64, case["block_elements"].as_u64().unwrap());
                assert_eq!(kind.block_bytes() as u64, case["block_bytes"].as_u64().unwrap());
                Values::Gguf(kind, bytes)
            }
            Values::Float(float, _) => Values::Float(float, bytes),
            _ => unreachable!(),
        };
        let piece = Piece { rows: 1, cols: expected.len(), pattern: Pattern::Dense, values };
        piece.check().unwrap();
        let got = piece.to_mat();
        for (i, (a, b)) in got.data().iter().zip(&expected).enumerate() {
            assert_eq!(a, b, "{name}: value {i}");
        }
        seen += 1;
    }
    assert_eq!(seen, 19);
}

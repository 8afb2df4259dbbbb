//! What torch.save wrote: any bytes give tensors that lie inside the file, or an error. Checksums are mended first, so
//! that what lies behind them is reached: the bytes are a pickle, put into a zip file with one storage.
#![no_main]

use lacuna_checkpoint::torch::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
    check(&zipped(&[("a/data.pkl", data), ("a/data/0", &[0; 64][..])]));
});

fn check(file: &[u8]) {
    for t in parse(file).unwrap_or_default() {
        assert!(t.bytes.start <= t.bytes.end && t.bytes.end <= file.len());
    }
}

/// A zip file of some members as they are, with true checksums.
fn zipped(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in members {
        let at = out.len() as u32;
        let mut middle = vec![0; 10];
        middle.extend(checksum(bytes).to_le_bytes());
        middle.extend([(bytes.len() as u32).to_le_bytes(); 2].concat());
        middle.extend((name.len() as u16).to_le_bytes());
        middle.extend([0; 2]);
        out.extend([b"PK\x03\x04", &middle[..], name.as_bytes(), bytes].concat());
        directory.extend([b"PK\x01\x02", &[0; 2][..], &middle, &[0; 10], &at.to_le_bytes(), name.as_bytes()].concat());
    }
    let (start, n) = (out.len() as u32, (members.len() as u16).to_le_bytes());
    out.extend(&directory);
    let sizes = [(directory.len() as u32).to_le_bytes(), start.to_le_bytes()].concat();
    out.extend([b"PK\x05\x06", &[0; 4][..], &n, &n, &sizes, &[0; 2]].concat());
    out
}

fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |c: u32, b| {
        (0..8).fold(c ^ u32::from(*b), |c, _| if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 })
    })
}

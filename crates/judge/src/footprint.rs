//! From how many bytes one token after the other is read: it decides whether they come from a cache or from memory.

use std::fmt;

use lacuna_kernels::cpu;

/// So many bytes are beyond most caches; where the system tells of a larger last level, twice that is.
const BEYOND: u64 = 64 << 20;
/// Memory that measuring takes at the most.
const MOST: u64 = 1 << 30;

/// Bytes that one token after the other reads. Up to what is beyond every cache they are told apart by a fifth; all
/// above are one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    bytes: u64,
    /// Not more than the last level of caches has.
    cached: bool,
    beyond: bool,
}

impl Footprint {
    /// The footprint of a model whose tokens read `bytes`.
    pub fn of(bytes: u64) -> Footprint {
        Footprint::beside(bytes, cpu::last_level_cache())
    }

    /// The same beside a cache of so many bytes.
    fn beside(bytes: u64, cache: Option<usize>) -> Footprint {
        let beyond = cache.map_or(0, |c| 2 * c as u64).clamp(BEYOND, MOST);
        let steps = (4.0 * (bytes.max(1) as f64).log2()).round();
        let bytes = (steps / 4.0).exp2().round() as u64;
        let cached = cache.is_some_and(|c| bytes <= c as u64);
        Footprint { bytes: bytes.min(beyond), cached, beyond: bytes >= beyond }
    }

    /// Bytes to measure with: as many, or enough to be beyond caches.
    pub fn bytes(self) -> u64 {
        self.bytes
    }

    /// How often bytes are read until they lie where they will lie: once where no cache holds them, else once more.
    pub(crate) fn passes(self) -> usize {
        if self.beyond { 1 } else { 2 }
    }

    /// Whether the last level of caches holds it, as far as the system tells.
    pub fn cached(self) -> bool {
        self.cached
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.beyond { f.write_str("from memory") } else { write!(f, "of {} kB", self.bytes / 1000) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_models_are_told_apart_and_large_ones_are_one() {
        let of = |mb: f64, cache_mb: usize| Footprint::beside((mb * 1e6) as u64, Some(cache_mb << 20));
        // 32 MB of cache: a model of 90 MB and one of 4 GB both come from memory, one of 10 MB does not.
        assert_eq!(of(90.0, 32), of(4000.0, 32));
        assert_eq!((of(90.0, 32).bytes(), of(90.0, 32).passes(), of(90.0, 32).cached()), (BEYOND, 1, false));
        assert_ne!(of(10.0, 32), of(20.0, 32));
        assert_eq!(of(10.0, 32), of(10.4, 32));
        assert!(of(10.0, 32).cached() && of(10.0, 32).passes() == 2);
        assert!((of(10.0, 32).bytes() as f64 / 10e6 - 1.0).abs() < 0.1);
        // 480 MB of cache hold both of these, and no measuring takes more than a gigabyte.
        assert!(of(90.0, 480).cached() && of(270.0, 480).cached() && of(90.0, 480) != of(270.0, 480));
        assert_eq!(of(9e3, 2000).bytes(), MOST);
        assert_eq!(Footprint::beside(u64::MAX, None), Footprint::beside(BEYOND, None));
        assert_eq!(Footprint::beside(0, None).bytes(), 1);
    }
}

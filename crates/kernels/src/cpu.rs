//! What this processor can do, and the instruction set chosen for it.

use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::simd::amx;

/// Instruction sets that kernels are compiled for, weakest first among those of one processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, any processor.
    Portable,
    /// AVX2 with FMA and F16C (and POPCNT, BMI1 and BMI2, which all such processors have).
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with VNNI, VBMI and VBMI2: dot products of bytes, and bytes moved apart.
    Avx512Vnni,
    /// The same with AMX tiles of bytes: 16 rows times 16 outputs at once.
    Amx,
    /// NEON, which every AArch64 processor has.
    Neon,
    /// The same with dot products of signed bytes (`dotprod`).
    NeonDot,
    /// The same with dot products of unsigned and signed bytes, and products of small matrices of them (`i8mm`).
    NeonI8mm,
}

impl Isa {
    /// Every instruction set, in this order.
    pub const ALL: [Isa; 8] =
        [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Amx, Isa::Neon, Isa::NeonDot, Isa::NeonI8mm];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon-dotprod",
            Isa::NeonI8mm => "neon-i8mm",
        }
    }

    /// f32 lanes of a vector.
    pub(crate) fn lanes(self) -> usize {
        if matches!(self, Isa::Avx512 | Isa::Avx512Vnni | Isa::Amx) { 16 } else { 8 }
    }

    /// Whether this processor runs it, and the system lets this process: tiles have to be asked for.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
                    && is_x86_feature_detected!("popcnt")
                    && is_x86_feature_detected!("bmi1")
                    && is_x86_feature_detected!("bmi2")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => {
                Isa::Avx512.available()
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512vbmi")
                    && is_x86_feature_detected!("avx512vbmi2")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512Vnni.available() && amx::granted(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => Isa::Neon.available() && std::arch::is_aarch64_feature_detected!("dotprod"),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonI8mm => Isa::NeonDot.available() && std::arch::is_aarch64_feature_detected!("i8mm"),
            _ => false,
        }
    }

    /// The strongest that this processor runs, or what [`Isa::choose`] set; asked once.
    pub fn best() -> Isa {
        *BEST.get_or_init(|| Isa::ALL.into_iter().rev().find(|i| i.available()).unwrap_or(Isa::Portable))
    }

    /// Makes it the one that this process uses, instead of the strongest; false where it is not available, or another
    /// is in use already.
    pub fn choose(self) -> bool {
        self.available() && *BEST.get_or_init(|| self) == self
    }

    /// Those that this processor runs, weakest first.
    pub fn here() -> Vec<Isa> {
        Isa::ALL.into_iter().filter(|i| i.available()).collect()
    }
}

/// What [`Isa::best`] answers.
static BEST: OnceLock<Isa> = OnceLock::new();

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where Linux describes processors.
const CPUS: &str = "/sys/devices/system/cpu";

/// Bytes of the caches of the last level that the processors of this machine have together; none where the system does
/// not tell.
pub fn last_level_cache() -> Option<usize> {
    static BYTES: OnceLock<Option<usize>> = OnceLock::new();
    *BYTES.get_or_init(|| last_level(std::path::Path::new(CPUS)))
}

/// The same from Linux's description of processors at `cpus`: each has a folder for every cache it reaches, and shares
/// some with others.
fn last_level(cpus: &std::path::Path) -> Option<usize> {
    let mut caches = Vec::new();
    for cpu in std::fs::read_dir(cpus).ok()?.flatten() {
        let Ok(indices) = std::fs::read_dir(cpu.path().join("cache")) else { continue };
        for index in indices.flatten() {
            let read = |name: &str| std::fs::read_to_string(index.path().join(name)).map(|s| s.trim().to_owned()).ok();
            let (Some(level), Some(size), Some(of)) = (read("level"), read("size"), read("shared_cpu_list")) else {
                continue;
            };
            let kib = size.strip_suffix('K').and_then(|n| n.parse::<usize>().ok());
            if let (Ok(level), Some(bytes)) = (level.parse::<u32>(), kib.and_then(|n| n.checked_mul(1024))) {
                caches.push((level, of, bytes));
            }
        }
    }
    let last = caches.iter().map(|c| c.0).max()?;
    caches.retain(|c| c.0 == last);
    caches.sort();
    caches.dedup_by(|a, b| a.1 == b.1);
    Some(caches.iter().fold(0, |sum, c| sum.saturating_add(c.2)))
}

/// How many of this machine's cores are fast, where it has slow ones as well: threads share products about equally, and
/// what is much slower would hold up the others. None where cores are alike, or the system does not tell.
pub fn fast_cores() -> Option<usize> {
    #[cfg(target_os = "macos")]
    let fast = if told(c"hw.nperflevels")? > 1 { told(c"hw.perflevel0.logicalcpu") } else { None };
    #[cfg(not(target_os = "macos"))]
    let fast = if cfg!(target_arch = "aarch64") { fast(std::path::Path::new(CPUS)) } else { None };
    let may = std::thread::available_parallelism().map_or(usize::MAX, usize::from);
    fast.map(|n| n.min(may))
}

/// A number that macOS tells under a name.
#[cfg(target_os = "macos")]
fn told(name: &std::ffi::CStr) -> Option<usize> {
    let (mut value, mut size) = (0i32, size_of::<i32>());
    // SAFETY: room for as many bytes as `size` says; nothing is set.
    let done =
        unsafe { libc::sysctlbyname(name.as_ptr(), (&raw mut value).cast(), &raw mut size, std::ptr::null_mut(), 0) };
    if done == 0 && size == size_of::<i32>() { usize::try_from(value).ok() } else { None }
}

/// The fast cores by Linux's description of processors at `cpus`, which gives each its part of the largest one's speed
/// in 1024ths: those with three quarters of it, as calls hand three quarters of their work out in equal parts.
#[cfg(any(not(target_os = "macos"), test))]
fn fast(cpus: &std::path::Path) -> Option<usize> {
    let mut speeds = Vec::new();
    for cpu in std::fs::read_dir(cpus).ok()?.flatten() {
        let read = |name: &str| std::fs::read_to_string(cpu.path().join(name)).ok()?.trim().parse::<u32>().ok();
        if read("online") != Some(0) {
            speeds.extend(read("cpu_capacity"));
        }
    }
    let most = u64::from(*speeds.iter().max()?);
    let fast = speeds.iter().filter(|s| 4 * u64::from(**s) >= 3 * most).count();
    (fast < speeds.len()).then_some(fast)
}

/// Names of the features of this processor that matter to kernels, present and future, with whether it has them.
pub fn features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! list {
            ($($name:tt),*) => { vec![$(($name, is_x86_feature_detected!($name))),*] };
        }
        let mut all = list![
            "sse4.1",
            "avx",
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512bw",
            "avx512dq",
            "avx512vl",
            "avx512vbmi",
            "avx512vbmi2",
            "avx512vnni",
            "avx512bf16",
            "avx512fp16",
            "avxvnni"
        ];
        all.extend(amx::features());
        all
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! list {
            ($($name:tt),*) => { vec![$(($name, std::arch::is_aarch64_feature_detected!($name))),*] };
        }
        list!["neon", "fp16", "dotprod", "i8mm", "bf16", "fhm", "sve", "sve2"]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_stays() {
        let best = Isa::best();
        assert!(best.available() && best.choose());
        assert!(Isa::ALL.into_iter().filter(|i| *i != best).all(|i| !i.choose()));
    }

    #[test]
    fn caches_that_processors_share_count_once() {
        let dir = tempfile::tempdir().unwrap();
        let put = |cpu: usize, index: usize, level: u32, size: &str, of: &str| {
            let at = dir.path().join(format!("cpu{cpu}/cache/index{index}"));
            std::fs::create_dir_all(&at).unwrap();
            for (name, text) in [("level", &*level.to_string()), ("size", size), ("shared_cpu_list", of)] {
                std::fs::write(at.join(name), format!("{text}\n")).unwrap();
            }
        };
        assert_eq!(last_level(dir.path()), None);
        assert_eq!(last_level(&dir.path().join("nowhere")), None);
        for cpu in 0..4 {
            put(cpu, 0, 1, "32K", &cpu.to_string());
            put(cpu, 3, 3, "16384K", if cpu < 2 { "0-1" } else { "2-3" });
        }
        assert_eq!(last_level(dir.path()), Some(32 << 20));
        put(0, 4, 4, "broken", "0-3");
        assert_eq!(last_level(dir.path()), Some(32 << 20));
    }

    #[test]
    fn slow_cores_are_told_from_fast_ones() {
        let dir = tempfile::tempdir().unwrap();
        let put = |cpu: usize, name: &str, text: &str| {
            let at = dir.path().join(format!("cpu{cpu}"));
            std::fs::create_dir_all(&at).unwrap();
            std::fs::write(at.join(name), text).unwrap();
        };
        assert_eq!((fast(dir.path()), fast(&dir.path().join("nowhere"))), (None, None));
        std::fs::write(dir.path().join("online"), "0-7\n").unwrap();
        for (cpu, capacity) in [1024, 900, 900, 766].into_iter().enumerate() {
            put(cpu, "cpu_capacity", &format!("{capacity}\n"));
        }
        assert_eq!(fast(dir.path()), Some(3));
        put(3, "online", "0\n");
        assert_eq!(fast(dir.path()), None, "the slow one is off");
        put(4, "cpu_capacity", "of no use");
        assert_eq!(fast(dir.path()), None);
        for cpu in 5..9 {
            put(cpu, "cpu_capacity", "325\n");
            put(cpu, "online", "1\n");
        }
        assert_eq!(fast(dir.path()), Some(3));
        assert!(fast_cores().is_none_or(|n| n > 0));
    }
}

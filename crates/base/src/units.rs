//! Sizes as people write them.

/// Reads `600MiB`, `1.5 GB`, `4096`, `2g` (units of 1024 with an `i` or a bare letter, of 1000 with `B` alone).
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let t = text.trim();
    let split = t.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(t.len());
    let (number, unit) = (&t[..split], t[split..].trim().to_ascii_lowercase());
    let value: f64 = number.parse().map_err(|_| format!("'{text}' is not a size; write for example 600MiB or 2GB"))?;
    let scale: f64 = match unit.as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024.0 * 1024.0,
        "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
        "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return Err(format!("'{text}' has an unknown unit '{unit}'; use KiB, MiB, GiB, kB, MB or GB")),
    };
    let bytes = value * scale;
    if bytes.is_finite() && bytes < 9e18 { Ok(bytes.round() as u64) } else { Err(format!("'{text}' is too large")) }
}

/// Writes a size for people: `91.7 MB`, units of 1000.
pub fn show_bytes(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0..=999 => format!("{bytes} B"),
        1_000..=999_949 => format!("{:.1} kB", b / 1e3),
        999_950..=999_949_999 => format!("{:.1} MB", b / 1e6),
        _ => format!("{:.2} GB", b / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("600MiB"), Ok(600 << 20));
        assert_eq!(parse_bytes(" 1.5 GB"), Ok(1_500_000_000));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert!(parse_bytes("lots").is_err() && parse_bytes("3 furlongs").is_err() && parse_bytes("1e999").is_err());
        assert_eq!(show_bytes(91_700_000), "91.7 MB");
        assert_eq!(show_bytes(12), "12 B");
    }
}

// SPDX-License-Identifier: GPL-2.0
//! Sizes as people write and read them: powers of 1024, a bare number is bytes.

/// Reads `10G`, `64KiB`, `512`, ….
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        "p" | "pb" | "pib" => 50,
        _ => return Err("a size is a whole number and K, M, G or T, or bytes: 10G".into()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size begins with a whole number: 10G".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
}

/// Writes `1.5 GiB` and the like.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let step = (bytes.max(1).ilog2() / 10) as usize;
    let unit = UNITS.get(step).copied().unwrap_or("EiB");
    let one = 1u64 << (10 * step);
    // Rounded down; no floats.
    match u128::from(bytes % one) * 10 / u128::from(one) {
        0 => format!("{} {unit}", bytes / one),
        tenths => format!("{}.{tenths} {unit}", bytes / one),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, want) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1K", 1024),
            ("64KiB", 65536),
            ("10G", 10 << 30),
            ("2TB", 2 << 40),
        ] {
            assert_eq!(parse(text), Ok(want), "{text}");
        }
        for bad in [
            "",
            "G",
            "-1",
            "1.5G",
            "10X",
            "1 G",
            "99999999999999999999",
            "99999999P",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_read_well() {
        for (n, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1 << 30, "1 GiB"),
            (3 << 29, "1.5 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(human(n), want);
        }
    }
}

//! From the text of a setting to its value. Errors say what to write in its place.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::telemetry::log;

pub(super) fn folder(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if !path.is_dir() {
        return Err("there is no such folder: create it, or name another".into());
    }
    Ok(path.to_owned())
}

pub(super) fn address(text: &str) -> Result<SocketAddr, String> {
    let numeric = text
        .strip_prefix("localhost:")
        .map_or_else(|| text.to_owned(), |port| format!("127.0.0.1:{port}"));
    numeric
        .parse()
        .map_err(|_| "not an address: write it as 127.0.0.1:50061 or [::1]:50061".into())
}

pub(super) fn address_or_off(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    address(text).map(Some)
}

pub(super) fn filter(text: &str) -> Result<String, String> {
    log::check_filter(text).map(|()| text.to_owned())
}

pub(super) fn log_format(text: &str) -> Result<log::Format, String> {
    text.parse()
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    const ADVICE: &str = "not a time: write it as 500ms, 30s or 2m, more than nothing";
    let (number, unit) = split(text);
    let number: u64 = number.parse().map_err(|_| ADVICE.to_owned())?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => return Err(ADVICE.into()),
    };
    match number.checked_mul(millis) {
        Some(millis @ 1..=86_400_000) => Ok(Duration::from_millis(millis)),
        Some(0) => Err(ADVICE.into()),
        Some(_) | None => Err("more than a day: write less".into()),
    }
}

pub(super) fn size(text: &str) -> Result<usize, String> {
    const ADVICE: &str = "not a size: write it as 65536, 256KiB, 4MiB or 2GiB, more than nothing";
    let (number, unit) = split(text);
    let number: usize = number.parse().map_err(|_| ADVICE.to_owned())?;
    let factor = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1usize << 40,
        _ => return Err(ADVICE.into()),
    };
    number
        .checked_mul(factor)
        .filter(|n| *n > 0)
        .ok_or_else(|| ADVICE.into())
}

pub(super) fn size_or_unlimited(text: &str) -> Result<Option<u64>, String> {
    if text == "unlimited" {
        return Ok(None);
    }
    match size(text)? {
        small if small < 64 << 20 => {
            Err("too little to load anything: write at least 64MiB, or unlimited".into())
        }
        bytes => Ok(Some(bytes as u64)),
    }
}

pub(super) fn message_size(text: &str) -> Result<usize, String> {
    match size(text)? {
        bytes @ 4096..=0x4000_0000 => Ok(bytes),
        _ => Err("a message limit is between 4KiB and 1GiB".into()),
    }
}

pub(super) fn count(text: &str) -> Result<usize, String> {
    text.parse()
        .map_err(|_| "not a number: write a whole number, not negative".into())
}

pub(super) fn positive(text: &str) -> Result<usize, String> {
    match count(text)? {
        0 => Err("must be at least 1".into()),
        n => Ok(n),
    }
}

pub(super) fn count_or_model(text: &str) -> Result<Option<usize>, String> {
    if text == "model" {
        return Ok(None);
    }
    positive(text).map(Some)
}

pub(super) fn streams(text: &str) -> Result<u32, String> {
    match positive(text)? {
        n @ 1..=10_000 => Ok(u32::try_from(n).unwrap_or(u32::MAX)),
        _ => Err("at most 10000".into()),
    }
}

pub(super) fn truth(text: &str) -> Result<bool, String> {
    text.parse().map_err(|_| "use true or false".into())
}

pub(super) fn provider(text: &str) -> Result<String, String> {
    let known = match text.split_once(':') {
        None => text == "cpu" || text == "cuda",
        Some((name, device)) => name == "cuda" && device.parse::<u32>().is_ok(),
    };
    known
        .then(|| text.to_owned())
        .ok_or_else(|| "use cpu, cuda or cuda:N".into())
}

pub(super) fn library(text: &str) -> Result<Option<PathBuf>, String> {
    if text == "search" {
        return Ok(None);
    }
    let path = Path::new(text);
    if !path.is_absolute() {
        return Err("must be an absolute path".into());
    }
    if !path.is_file() {
        return Err("there is no such file".into());
    }
    Ok(Some(path.to_owned()))
}

pub(super) fn folder_or_beside(text: &str) -> Result<Option<PathBuf>, String> {
    if text == "beside" {
        return Ok(None);
    }
    folder(text).map(Some)
}

/// A number and what follows it.
fn split(text: &str) -> (&str, &str) {
    let at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    (number, unit.trim_start())
}

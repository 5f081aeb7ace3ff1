//! Where the commands write: standard output for results, standard error for what is said about them.
//!
//! Colour only on a terminal and without `NO_COLOR`; lines fit the terminal's width; text of others loses control characters.

use std::{
    fs,
    io::{self, IsTerminal as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use comfy_table::{ColumnConstraint, ContentArrangement, Table, presets};

use super::{error::CliError, picture::terminal};

/// Narrowest terminal that is taken seriously.
const NARROWEST: usize = 40;

/// Writes to standard output, at once.
pub(super) fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes to standard error; when that is closed there is nobody to tell.
pub(super) fn warn(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Writes a JSON value to standard output, as people read it on a terminal and in one line otherwise.
pub(super) fn print_json(value: &serde_json::Value) -> Result<(), CliError> {
    let text = if io::stdout().is_terminal() {
        format!("{value:#}\n")
    } else {
        format!("{value}\n")
    };
    print(&text)
}

/// Columns of the terminal; nothing when standard output is none, and lines may be as long as they are.
pub(super) fn width() -> Option<usize> {
    let stdout = io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    let told = std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok());
    let asked = || {
        let size = rustix::termios::tcgetwinsize(&stdout).ok()?;
        Some(usize::from(size.ws_col)).filter(|c| *c > 0)
    };
    Some(told.or_else(asked).unwrap_or(80).max(NARROWEST))
}

/// Text of others: characters that steer the terminal become visible, line breaks stay.
pub(super) fn clean(text: &str) -> String {
    let shown = |c| if steers(c) { '\u{fffd}' } else { c };
    text.chars().map(shown).collect()
}

/// The same on one line: line breaks become visible, too.
pub(super) fn line(text: &str) -> String {
    clean(text).replace('\n', "↵")
}

/// Control characters, those that end lines elsewhere, and those that turn the direction of what follows (Unicode's `Bidi_Control`).
fn steers(c: char) -> bool {
    match c {
        '\n' => false,
        '\u{061c}' | '\u{200e}' | '\u{200f}' => true,
        '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        other => other.is_control(),
    }
}

/// Emphasis, where the reader can see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint(bool);

impl Paint {
    /// For standard output.
    pub(super) fn of_stdout() -> Self {
        Paint(terminal::Style::of_stdout() == terminal::Style::Colour)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// Of headings.
    pub(super) fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// Of what matters less.
    pub(super) fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    /// Of what is well.
    pub(super) fn good(self, text: &str) -> String {
        self.wrap("32", text)
    }

    /// Of what may not be well.
    pub(super) fn doubtful(self, text: &str) -> String {
        self.wrap("33", text)
    }

    /// Of what is not.
    pub(super) fn bad(self, text: &str) -> String {
        self.wrap("31", text)
    }
}

/// A table with a line under its heading that fits the terminal. Cells are cleaned, and are of one line.
pub(super) fn table(heading: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let paint = Paint::of_stdout();
    table.set_header(heading.iter().map(|h| h.to_uppercase()));
    for row in rows {
        table.add_row(row.iter().map(|cell| line(cell)));
    }
    match width() {
        Some(width) => fit(&mut table, width),
        None => {
            table.set_content_arrangement(ContentArrangement::Disabled);
        }
    }
    table
        .lines()
        .enumerate()
        .map(|(i, line)| {
            let line = line.trim_end();
            let line = if i == 0 {
                paint.dim(line)
            } else {
                line.to_owned()
            };
            format!("{line}\n")
        })
        .collect()
}

/// Breaks lines where the terminal ends, but not the names in the first column, unless they leave too little to the others.
fn fit(table: &mut Table, width: usize) {
    table
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(u16::try_from(width).unwrap_or(u16::MAX));
    let names = table.column_max_content_widths().first().copied();
    if names.is_some_and(|n| usize::from(n) <= width / 2)
        && let Some(column) = table.column_mut(0)
    {
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
}

/// Writes a file whole: under another name first, then moved into place. What is no regular file (a pipe, a device) is written to.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let exists = fs::metadata(path);
    let in_place = exists.as_ref().is_ok_and(|m| !m.is_file());
    // A link stays one; what it leads to is written.
    let target = match exists {
        Ok(_) => fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
        Err(_) => path.to_owned(),
    };
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let write = || -> io::Result<()> {
        if in_place {
            return fs::OpenOptions::new()
                .write(true)
                .open(path)?
                .write_all(bytes);
        }
        let mut file = tempfile::Builder::new()
            .prefix(".introspectd-")
            .permissions(fs::Permissions::from_mode(0o666)) // less the umask
            .tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.persist(&target).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(|e| {
        // The name of the temporary file means nothing to anybody.
        let why = e.raw_os_error().map_or(e, io::Error::from_raw_os_error);
        CliError::new(format!("cannot write \"{}\": {why}", path.display()))
            .advise("choose another place with -o, or make room")
    })
}

/// The same, and says on standard error what was written and how much.
pub(super) fn write_told(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    write_file(path, bytes)?;
    warn(&format!(
        "{} ({})\n",
        path.display(),
        self::bytes(bytes.len() as u64)
    ));
    Ok(())
}

/// Bytes for people.
pub(super) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    #[allow(clippy::cast_precision_loss)] // for people
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Seconds for people.
pub(super) fn seconds(s: f64) -> String {
    if s < 0.001 {
        format!("{:.0} µs", s * 1e6)
    } else if s < 1.0 {
        format!("{:.1} ms", s * 1e3)
    } else {
        format!("{s:.2} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_carry_no_control_characters_of_others() {
        let text = table(
            &["name", "why"],
            [vec!["a\x1b[2J".to_owned(), "b".to_owned()]],
        );
        assert!(!text.contains('\x1b'), "{text:?}");
        assert!(text.starts_with(" NAME"), "{text:?}");
        let text = table(&["name"], [vec!["a\nb\u{202e}c".to_owned()]]);
        assert!(text.contains("a↵b\u{fffd}c"), "{text:?}");
    }

    #[test]
    fn what_turns_the_direction_of_text_becomes_visible() {
        let turns = "\u{061c}\u{200e}\u{200f}\u{202a}\u{202e}\u{2066}\u{2069}\u{2028}\r";
        assert!(clean(turns).chars().all(|c| c == '\u{fffd}'));
        assert_eq!(clean("שלום ü\nb"), "שלום ü\nb");
        assert_eq!(line("a\nb"), "a↵b");
    }

    #[test]
    fn a_file_is_written_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        write_file(&path, b"one").unwrap();
        write_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "no leftovers"
        );
        let link = folder.path().join("link.json");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        write_file(&link, b"three").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert!(link.is_symlink(), "a link stays one");
        write_file(Path::new("/dev/null"), b"gone").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
        assert!(
            write_file(folder.path(), b"x").is_err(),
            "a folder is no file"
        );
        let error = write_file(&folder.path().join("no/such/folder.json"), b"x").unwrap_err();
        assert!(format!("{error:?}").contains("cannot write"), "{error:?}");
    }

    #[test]
    fn units_change_where_people_expect_it() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(seconds(0.0000012), "1 µs");
        assert_eq!(seconds(0.0123), "12.3 ms");
        assert_eq!(seconds(2.5), "2.50 s");
    }
}

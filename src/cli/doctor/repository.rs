//! The folder of models: what would be loaded, what would be left out and why.

use std::{fs, path::Path};

use super::Area;
use crate::{
    cli::out,
    model::{Repository, repository::Found},
};

/// Looks at every folder; opens no model.
pub(super) fn look(models: &Path) -> Area {
    let mut area = Area::new("Repository");
    let scan = Repository::open(models).and_then(|r| Ok((r.root().to_owned(), r.scan()?)));
    let (root, scan) = match scan {
        Ok(found) => found,
        Err(e) => {
            area.problem(
                format!("\"{}\" cannot be read: {e}", models.display()),
                "let the daemon's user read it, or name another with --models",
            );
            return area;
        }
    };
    let counts = (scan.found.len(), scan.skipped.len());
    if scan.found.is_empty() {
        area.warning(
            format!("{} has no model", root.display()),
            "put a folder with model.onnx into it, with tokenizer.json and config.json where there are such",
        );
    } else {
        area.ok(format!(
            "{}: {} models, {} folders left out",
            root.display(),
            counts.0,
            counts.1
        ));
    }
    for found in &scan.found {
        model(&mut area, found);
    }
    for skipped in &scan.skipped {
        area.warning(
            format!("\"{}\" is left out: {}", skipped.name, skipped.reason),
            "mend it, or move it out of the repository",
        );
    }
    area
}

fn model(area: &mut Area, found: &Found) {
    let has = |file: &str| found.folder.join(file).is_file();
    let size = size(&found.folder) + size(&found.folder.join("onnx"));
    let mut line = format!("\"{}\": {}", found.name, out::bytes(size));
    let absent: Vec<&str> = ["tokenizer.json", "config.json"]
        .into_iter()
        .filter(|f| !has(f))
        .collect();
    if !absent.is_empty() {
        line.push_str(&format!(", without {}", absent.join(" and ")));
    }
    area.ok(line);
}

/// Bytes of the files of a folder, links followed.
fn size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .filter_map(|e| fs::metadata(e.ok()?.path()).ok())
        .filter(fs::Metadata::is_file)
        .map(|m| m.len())
        .sum()
}

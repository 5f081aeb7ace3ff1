//! Models in their folders: weights stay in the mapped file, also beyond 2 GiB, and a model written by reference reads the same.

mod onnx_wire;

use std::{
    fs,
    os::unix::fs::{FileExt as _, symlink},
    path::Path,
};

use introspectd::onnx::{Folder, Graph, Limits, Model, OnnxError, Weights};
use onnx_wire::*;

fn open(folder: &Path, file: &str) -> Model {
    let opened = Folder::open(folder).unwrap();
    Model::open(&opened, file, &Limits::default()).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// Every exported model of the project.
fn exports() -> Vec<std::path::PathBuf> {
    let models = fs::read_dir("tests/fixtures/models").unwrap();
    let mut found: Vec<_> = models
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("model.onnx").is_file())
        .collect();
    found.sort();
    assert!(found.len() > 10);
    found
}

/// Name and bytes of every weight.
fn weights(g: &Graph) -> std::collections::BTreeMap<String, Vec<u8>> {
    let bytes = |w: &introspectd::onnx::Initializer| Some(w.tensor()?.bytes().to_vec());
    g.initializers()
        .map(|(name, w)| (name.to_owned(), bytes(w).unwrap()))
        .collect()
}

#[test]
fn exports_come_back_from_their_bytes() {
    for path in exports() {
        let m = open(&path, "model.onnx");
        let whole = m.encode(Weights::Inline);
        let again = Model::parse(whole.clone().into(), &Limits::default()).unwrap();
        assert_eq!(again.graph.dump(), m.graph.dump(), "{}", path.display());
        assert_eq!(
            weights(&again.graph),
            weights(&m.graph),
            "{}",
            path.display()
        );
        assert_eq!(again.encode(Weights::Inline), whole, "{}", path.display());
    }
}

#[test]
fn weights_stay_in_the_file_that_they_came_from() {
    for path in exports() {
        let m = open(&path, "model.onnx");
        let mut seen = 0;
        for (name, weight) in m.graph.initializers() {
            let Some(origin) = weight.origin() else {
                continue;
            };
            let file = fs::read(path.join(&*origin.file)).unwrap();
            let from = usize::try_from(origin.offset).unwrap();
            let tensor = weight.tensor().unwrap();
            assert_eq!(
                file[from..from + tensor.bytes().len()],
                tensor.bytes()[..],
                "{name}"
            );
            seen += 1;
        }
        assert!(seen > 5, "{}: {seen} weights", path.display());
    }
}

#[test]
fn a_model_written_by_reference_is_small_and_reads_the_same() {
    for path in exports() {
        let m = open(&path, "model.onnx");
        let copy = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(&path).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
        let written = m.encode(Weights::ByReference { from_bytes: 1024 });
        let large: usize = weights(&m.graph)
            .values()
            .map(Vec::len)
            .filter(|n| *n >= 1024)
            .sum();
        let inline = m.encode(Weights::Inline).len();
        assert!(written.len() + large / 2 < inline, "{}", path.display());
        fs::write(copy.path().join("again.onnx"), written).unwrap();
        let again = open(copy.path(), "again.onnx");
        assert_eq!(again.graph.dump(), m.graph.dump(), "{}", path.display());
        assert_eq!(
            weights(&again.graph),
            weights(&m.graph),
            "{}",
            path.display()
        );
    }
}

#[test]
fn data_stand_beside_the_model_file_and_not_beside_the_folder() {
    let keep = tempfile::tempdir().unwrap();
    fs::create_dir(keep.path().join("onnx")).unwrap();
    let w = external("w", &[2], &[("location", "./data.bin")]);
    let wire = model(&graph(&["x"], "y = Add x w", &["y"]).put(5, w));
    fs::write(keep.path().join("onnx/model.onnx"), &wire.0).unwrap();
    fs::write(keep.path().join("onnx/data.bin"), f32s(&[1.0, 2.0])).unwrap();
    fs::write(keep.path().join("data.bin"), f32s(&[7.0, 7.0])).unwrap();
    let m = open(keep.path(), "onnx/model.onnx");
    let weight = m.graph.initializers().next().unwrap().1;
    assert_eq!(weight.tensor().unwrap().to_f32().unwrap()[..], [1.0, 2.0]);
    assert_eq!(&*weight.origin().unwrap().file, "data.bin");
    let beside = keep.path().join("onnx").canonicalize().unwrap();
    assert_eq!(m.weights_folder(), Some(&*beside));
}

/// A snapshot as the hub's cache lays it out: every file a link into `blobs/`.
fn hub_cache() -> tempfile::TempDir {
    let keep = tempfile::tempdir().unwrap();
    let snapshot = keep.path().join("models/snapshots/1/onnx");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(keep.path().join("models/blobs")).unwrap();
    let w = external("w", &[512], &[("location", "model.onnx_data")]);
    let inside = tensor("v", FLOAT, &[512], &f32s(&[2.5; 512]));
    let text = "a = Add x w\ny = Add a v";
    let wire = model(&graph(&["x"], text, &["y"]).all(5, [w, inside]));
    fs::write(keep.path().join("models/blobs/f00"), &wire.0).unwrap();
    fs::write(keep.path().join("models/blobs/ba5"), f32s(&[1.5; 512])).unwrap();
    for (name, blob) in [("model.onnx", "f00"), ("model.onnx_data", "ba5")] {
        symlink(format!("../../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    keep
}

#[test]
fn a_snapshot_of_the_hubs_cache_refers_to_the_files_behind_the_links() {
    let keep = hub_cache();
    let inside = Path::new("models/snapshots/1");
    let folder = Folder::in_repository(keep.path(), inside).unwrap();
    let m = Model::open(&folder, "onnx/model.onnx", &Limits::default()).unwrap();
    let base = m.weights_folder().unwrap();
    assert_eq!(base, keep.path().canonicalize().unwrap());
    for (name, file) in [("w", "models/blobs/ba5"), ("v", "models/blobs/f00")] {
        let weight = m.graph.initializer(m.graph.value(name).unwrap()).unwrap();
        let origin = weight.origin().unwrap();
        assert_eq!(&*origin.file, file);
        let bytes = fs::read(base.join(file)).unwrap();
        let from = usize::try_from(origin.offset).unwrap();
        let tensor = weight.tensor().unwrap();
        assert_eq!(bytes[from..from + 2048], tensor.bytes()[..], "{name}");
    }
    // Without a repository a link is a link.
    let alone = Folder::open(&keep.path().join(inside)).unwrap();
    let refused = Model::open(&alone, "onnx/model.onnx", &Limits::default());
    assert!(matches!(refused, Err(OnnxError::Confined { .. })));
}

#[test]
fn the_fingerprint_is_that_of_the_file_and_follows_its_data() {
    use sha2::Digest as _;
    let keep = tempfile::tempdir().unwrap();
    fs::write(keep.path().join("plain.onnx"), &diamond().0).unwrap();
    let plain: [u8; 32] = sha2::Sha256::digest(&diamond().0).into();
    assert_eq!(
        open(keep.path(), "plain.onnx").fingerprint(),
        plain,
        "as sha256sum says"
    );
    let w = external("w", &[1], &[("location", "data.bin")]);
    let wire = model(&graph(&["x"], "y = Add x w", &["y"]).put(5, w));
    fs::write(keep.path().join("model.onnx"), &wire.0).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for value in [1.0, 2.0] {
        fs::write(keep.path().join("data.bin"), f32s(&[value])).unwrap();
        seen.insert(open(keep.path(), "model.onnx").fingerprint());
    }
    assert_eq!(seen.len(), 2);
}

#[test]
fn a_model_of_more_than_two_gibibytes_loads_and_is_written_in_a_few_bytes() {
    // A file with a hole: it takes no disk.
    let keep = tempfile::tempdir().unwrap();
    let far = (2u64 << 30) + 4096;
    let data = fs::File::create(keep.path().join("data.bin")).unwrap();
    data.set_len(far + 4096).unwrap();
    data.write_all_at(&f32s(&[1.5; 1024]), far).unwrap();
    let (offset, rows) = (far.to_string(), 1i64 << 20);
    let huge = external("huge", &[rows, 512], &[("location", "data.bin")]);
    let last = external(
        "last",
        &[1024],
        &[("location", "data.bin"), ("offset", &offset)],
    );
    let text = "a = Gather huge x\ny = Add a last";
    let wire = model(&graph(&["x"], text, &["y"]).all(5, [huge, last]));
    fs::write(keep.path().join("model.onnx"), &wire.0).unwrap();

    let m = open(keep.path(), "model.onnx");
    let weight = |m: &Model, name| {
        let found = m.graph.initializer(m.graph.value(name).unwrap());
        found.unwrap().tensor().unwrap()
    };
    assert_eq!(weight(&m, "huge").bytes().len(), 2 << 30);
    assert_eq!(weight(&m, "last").to_f32().unwrap()[1023], 1.5);
    let written = m.encode(Weights::ByReference { from_bytes: 1024 });
    assert!(written.len() < 1000);
    fs::write(keep.path().join("again.onnx"), written).unwrap();
    let again = open(keep.path(), "again.onnx");
    assert_eq!(again.graph.dump(), m.graph.dump());
    assert_eq!(weight(&again, "last").bytes(), weight(&m, "last").bytes());
}

#[test]
fn weights_of_kinds_that_we_do_not_compute_with_are_passed_on() {
    let keep = tempfile::tempdir().unwrap();
    // Three values of four bits, and two strings.
    let packed = tensor("packed", 22, &[3], &[0x21, 0x03]);
    let strings = Wire::new()
        .int(1, 2)
        .int(2, 8)
        .all(6, ["a", "b"])
        .put(8, "words");
    let wire = model(&graph(&["x"], "y = Relu x", &["y"]).all(5, [packed, strings]));
    fs::write(keep.path().join("model.onnx"), &wire.0).unwrap();
    let m = open(keep.path(), "model.onnx");
    let whole = m.encode(Weights::ByReference { from_bytes: 1 });
    let again = Model::parse(whole.into(), &Limits::default()).unwrap();
    assert_eq!(again.encode(Weights::Inline), m.encode(Weights::Inline));
    assert!(m.graph.dump().contains("weight %packed: type 22[3]"));
}

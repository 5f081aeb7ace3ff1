//! A disk that takes so much and no more: while the test runs, files of this process end at a limit, as they do when a
//! disk is full. The limit counts for the file that the test's own output goes to as well, so it ends with the test.

use std::{collections::BTreeMap, sync::Arc};

use introspectd::{
    engine::EngineError,
    methods::probe::{
        card::{Card, FORMAT, Kind, Report, TensorFile},
        matrices::Matrices,
        store::{Store, Weights},
    },
    tensor::Tensor,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const LIMIT: u64 = 64 << 10;
const HOOK: &str = "hidden_states.0";

fn card(name: &str) -> Card {
    Card {
        format: FORMAT,
        name: name.to_owned(),
        model: "m".to_owned(),
        fingerprint: "f".to_owned(),
        kind: Kind::Logistic,
        options: BTreeMap::new(),
        labels: vec!["no".to_owned(), "yes".to_owned()],
        pooling: None,
        best: HOOK.to_owned(),
        reports: vec![Report {
            hook: HOOK.to_owned(),
            layer: None,
            classes: None,
            numbers: None,
            direction: None,
            iterations: 1,
            converged: true,
            chosen_c: None,
            seconds: 0.0,
            notes: Vec::new(),
        }],
        train_examples: 1,
        test_examples: 1,
        split: String::new(),
        seed: 0,
        created: 0,
        made_by: String::new(),
        tensors: TensorFile::default(),
    }
}

fn weights(width: usize) -> Weights {
    let of = |name: &str, shape: Vec<usize>, count: usize| {
        let values = vec![0.5; count];
        (
            format!("{HOOK}/{name}"),
            Tensor::from_f32(shape, &values).unwrap(),
        )
    };
    BTreeMap::from([of("weight", vec![1, width], width), of("bias", vec![1], 1)])
}

/// The limit, until this is dropped.
struct FullDisk(Rlimit);

impl FullDisk {
    fn new(bytes: u64) -> Self {
        // The kernel's signal would end the process before the error is seen.
        // SAFETY: no handler runs; the signal is ignored.
        #[allow(unsafe_code)]
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN)
        };
        let before = getrlimit(Resource::Fsize);
        let limit = Rlimit {
            current: Some(bytes),
            ..before
        };
        setrlimit(Resource::Fsize, limit).unwrap();
        Self(before)
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        setrlimit(Resource::Fsize, self.0).unwrap();
    }
}

#[test]
fn a_full_disk_is_said_and_what_was_there_stays() {
    let _full = FullDisk::new(LIMIT);
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path().to_owned(), Arc::default());
    store.put(card("kept"), &weights(100), false).unwrap();
    let before = store.export("kept", &[]).unwrap();
    let large = weights(LIMIT as usize);
    for (name, replace) in [("kept", true), ("new", false)] {
        let error = store.put(card(name), &large, replace).unwrap_err();
        assert!(matches!(error, EngineError::Storage { .. }), "{error:?}");
        assert!(error.to_string().contains("could not be stored"), "{error}");
    }
    assert_eq!(store.export("kept", &[]).unwrap(), before);
    assert!(matches!(
        store.card("new").unwrap_err(),
        EngineError::NotFound { .. }
    ));
    let left: Vec<_> = std::fs::read_dir(folder.path().join("kept"))
        .unwrap()
        .collect();
    assert_eq!(left.len(), 2, "nothing half written is left: {left:?}");

    // What memory does not hold of a training.
    let mut matrices = Matrices::new(1, 0);
    let row = [vec![1.0; 1024]];
    let error = (0..1000).find_map(|_| matrices.push(&row).err()).unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::FileTooLarge);
}

//! The front's side of running: worker supervision, variants, queue, batches, admission.

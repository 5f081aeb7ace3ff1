//! Every request ends exactly once: a ticket that records its end, at the latest when it is dropped.
//!
//! Taking a ticket raises the gauges, its end lowers them and counts the outcome. [`Ticket::end`] takes the ticket by value,
//! so a second end cannot be written; a ticket that is dropped without one counts as [`Outcome::Cancelled`],
//! which is what a dropped response stream means.

use std::sync::Arc;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Every row was answered.
    Done,
    /// An error other than those below.
    Failed,
    /// The caller left.
    Cancelled,
    /// The deadline passed.
    Expired,
    /// A bound was met; nothing ran.
    Shed,
}

impl Outcome {
    /// Lower-case name, as metrics label it.
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
            Outcome::Expired => "expired",
            Outcome::Shed => "shed",
        }
    }
}

/// Where beginnings and ends are counted.
pub trait Ledger: Send + Sync {
    /// A request began.
    fn began(&self);
    /// A request ended.
    fn ended(&self, outcome: Outcome);
}

/// See the module.
#[must_use = "a ticket dropped at once records a cancelled request"]
pub struct Ticket {
    ledger: Option<Arc<dyn Ledger>>,
}

impl Ticket {
    /// Begins a request.
    pub fn take(ledger: Arc<dyn Ledger>) -> Self {
        ledger.began();
        Self {
            ledger: Some(ledger),
        }
    }

    /// Ends it.
    pub fn end(mut self, outcome: Outcome) {
        if let Some(ledger) = self.ledger.take() {
            ledger.ended(outcome);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(ledger) = self.ledger.take() {
            ledger.ended(Outcome::Cancelled);
        }
    }
}

impl std::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticket")
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Mutex};

    use super::*;

    #[derive(Default)]
    struct Books(Mutex<(i64, HashMap<Outcome, usize>)>);

    impl Ledger for Books {
        fn began(&self) {
            self.0.lock().unwrap().0 += 1;
        }
        fn ended(&self, outcome: Outcome) {
            let mut books = self.0.lock().unwrap();
            books.0 -= 1;
            *books.1.entry(outcome).or_default() += 1;
        }
    }

    #[test]
    fn every_ticket_ends_once() {
        let books = Arc::new(Books::default());
        Ticket::take(books.clone()).end(Outcome::Done);
        drop(Ticket::take(books.clone()));
        let panicked = std::thread::spawn({
            let books = books.clone();
            move || {
                let _ticket = Ticket::take(books);
                std::panic::resume_unwind(Box::new("a task that panics"));
            }
        });
        assert!(panicked.join().is_err());
        let (open, ends) = &*books.0.lock().unwrap();
        assert_eq!(*open, 0);
        assert_eq!(ends[&Outcome::Done], 1);
        assert_eq!(ends[&Outcome::Cancelled], 2);
    }
}

//! Many texts over one stream, each answer written as it comes.
//!
//! Lines are read while answers arrive, with a bounded number under way; blank lines are passed over. An answer is known by the number of
//! its line, from 1. A text that fails with advice to retry (its model is being loaded, the daemon is full) is sent again
//! after the pause that the daemon asks for, and nothing else meanwhile. One that fails for good is told on standard error, and the
//! others go on; the command then fails at its end.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File},
    io::{self, BufRead as _, BufReader, BufWriter, Read, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{CaptureArgs, FILED, json, npz, watched};
use crate::{
    cli::{
        assemble::{Assembler, Captured, Tally, payload},
        client::Session,
        error::CliError,
        out::{self, clean},
    },
    service::wire::introspect::{
        CaptureRequest, CaptureStreamRequest, CaptureStreamResponse, Failure,
        capture_stream_response::Answer,
    },
};

/// Texts under way at the same time: sent, and not answered in full.
const UNDER_WAY: usize = 64;
/// Lines that are read before there is room to send them.
const AHEAD: usize = 16;
/// A text is sent again for so long after its first failure.
const PATIENCE: Duration = Duration::from_secs(120);
/// Shortest pause before a text is sent again.
const PAUSE: Duration = Duration::from_millis(100);
/// Failures that are told one by one; more are counted.
const TOLD: u64 = 20;
/// Longest line in bytes; what the daemon takes as a text is less.
const LINE_LIMIT: u64 = 1 << 20;

/// Where answers go.
enum Sink {
    /// A line each.
    Lines(BufWriter<File>),
    /// A file each.
    Folder(PathBuf),
}

/// Runs the command for every line of a file.
pub(super) async fn run(args: &CaptureArgs, file: &Path) -> Result<(), CliError> {
    let mut sink = Sink::open(args.output.as_deref())?;
    let reader = open(file)?;
    let intervention = args.edits.intervention(&args.texts)?;
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let selection = args.selection.selection(FILED);
    let bar = bar(count(file));
    let (lines, queue) = mpsc::channel(AHEAD);
    let reading = tokio::task::spawn_blocking(move || read(reader, &lines));
    let request = |text: &str| CaptureRequest {
        model: model.clone(),
        input: Some(args.texts.input(text)),
        selection: Some(selection.clone()),
        intervention: intervention.clone(),
    };
    let mut bulk = Bulk::new(&mut sink, bar.clone());
    let result = bulk.run(&session, queue, request).await;
    let (answered, failed) = (bulk.answered, bulk.failed);
    bar.finish_and_clear();
    session.close().await;
    result?;
    // The stream has ended, so nobody waits for lines any more.
    reading
        .await
        .map_err(|_| CliError::new("reading the texts was interrupted"))??;
    sink.close()?;
    if failed > 0 {
        out::warn(&format!("{failed} of {} texts failed\n", answered + failed));
        return Err(CliError::Told);
    }
    Ok(())
}

/// A file of texts, or standard input.
pub(in crate::cli) fn open(file: &Path) -> Result<Box<dyn Read + Send>, CliError> {
    if file == Path::new("-") {
        return Ok(Box::new(io::stdin()));
    }
    let file_of_texts = File::open(file)
        .map_err(|e| CliError::new(format!("cannot read \"{}\": {e}", file.display())))?;
    Ok(Box::new(file_of_texts))
}

/// All lines of a file that are not blank.
pub(in crate::cli) async fn lines(file: &Path) -> Result<Vec<Line>, CliError> {
    let reader = open(file)?;
    let (sender, mut queue) = mpsc::channel(AHEAD);
    let reading = tokio::task::spawn_blocking(move || read(reader, &sender));
    let mut lines = Vec::new();
    while let Some(line) = queue.recv().await {
        lines.push(line);
    }
    let read = reading.await;
    read.map_err(|_| CliError::new("reading the texts was interrupted"))??;
    if lines.is_empty() {
        return Err(CliError::new(format!(
            "there are no texts in \"{}\"",
            file.display()
        )));
    }
    Ok(lines)
}

/// Lines that will be sent, where the file can be read twice.
fn count(file: &Path) -> Option<u64> {
    if !watched() || !file.is_file() {
        return None;
    }
    let lines = BufReader::new(File::open(file).ok()?).lines();
    Some(
        lines
            .map_while(Result::ok)
            .filter(|l| !l.trim().is_empty())
            .count() as u64,
    )
}

fn bar(length: Option<u64>) -> ProgressBar {
    let bar = match length {
        Some(n) => ProgressBar::new(n),
        None => ProgressBar::no_length(),
    };
    bar.set_draw_target(if watched() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    });
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} texts, {per_sec}, {eta} left")
        .expect("the template is well-formed");
    bar.set_style(style);
    bar
}

/// A line of the file.
pub(in crate::cli) struct Line {
    pub(in crate::cli) number: u64,
    pub(in crate::cli) text: String,
    /// When it failed for the first time with advice to retry.
    first_failure: Option<Instant>,
}

/// Reads every line. Ends early when nobody takes them any more.
pub(in crate::cli) fn read(reader: impl Read, lines: &mpsc::Sender<Line>) -> Result<(), CliError> {
    let mut reader = BufReader::new(reader);
    for number in 1u64.. {
        let mut line = Vec::new();
        let read = (&mut reader)
            .take(LINE_LIMIT + 1)
            .read_until(b'\n', &mut line)
            .map_err(|e| CliError::new(format!("cannot read line {number}: {e}")))?;
        if read == 0 {
            break;
        }
        if line.len() as u64 > LINE_LIMIT {
            return Err(CliError::new(format!(
                "line {number} is longer than {}",
                out::bytes(LINE_LIMIT)
            )));
        }
        let text = std::str::from_utf8(&line)
            .map_err(|_| CliError::new(format!("line {number} is not UTF-8")))?
            .trim_end_matches(['\n', '\r']);
        if text.trim().is_empty() {
            continue;
        }
        let line = Line {
            number,
            text: text.to_owned(),
            first_failure: None,
        };
        if lines.blocking_send(line).is_err() {
            break;
        }
    }
    Ok(())
}

/// A text that was sent.
struct Sent {
    line: Line,
    answer: Assembler,
}

/// The state of the stream.
struct Bulk<'a> {
    sink: &'a mut Sink,
    bar: ProgressBar,
    /// By the id on the wire.
    under_way: HashMap<String, Sent>,
    /// To be sent again, once the pause is over.
    again: VecDeque<Line>,
    paused_until: Instant,
    tally: Tally,
    /// Failures that came, those included that are sent again.
    failures: u64,
    answered: u64,
    failed: u64,
}

fn broken(why: &str) -> CliError {
    CliError::new(format!("the answer is broken: {why}"))
}

impl<'a> Bulk<'a> {
    fn new(sink: &'a mut Sink, bar: ProgressBar) -> Self {
        Self {
            sink,
            bar,
            under_way: HashMap::new(),
            again: VecDeque::new(),
            paused_until: Instant::now(),
            tally: Tally::default(),
            failures: 0,
            answered: 0,
            failed: 0,
        }
    }

    /// Sends every line and takes every answer.
    async fn run(
        &mut self,
        session: &Session,
        mut lines: mpsc::Receiver<Line>,
        request: impl Fn(&str) -> CaptureRequest,
    ) -> Result<(), CliError> {
        // As many as may be under way: sending never waits.
        let (requests, queue) = mpsc::channel(UNDER_WAY);
        let mut requests = Some(requests);
        let mut client = session.captures();
        let opening = client.capture_stream(ReceiverStream::new(queue));
        tokio::pin!(opening);
        let mut stream = None;
        let mut all_read = false;
        loop {
            let sender = requests.as_ref();
            let room = self.under_way.len() < UNDER_WAY && sender.is_some();
            let paused = self.paused_until > Instant::now();
            if room
                && !paused
                && let Some(line) = self.again.pop_front()
            {
                self.send(line, sender, &request);
                continue;
            }
            if all_read && self.again.is_empty() && self.under_way.is_empty() {
                requests = None; // closes our side
            }
            tokio::select! {
                line = lines.recv(), if room && !paused && !all_read => match line {
                    Some(line) => self.send(line, requests.as_ref(), &request),
                    None => all_read = true,
                },
                () = sleep_until(self.paused_until), if paused => {}
                opened = &mut opening, if stream.is_none() => stream = Some(opened?.into_inner()),
                message = next(&mut stream) => match message? {
                    Some(message) => {
                        if self.take(message)? {
                            break;
                        }
                    }
                    None => return Err(broken("the stream ended without its summary")),
                },
            }
        }
        match next(&mut stream).await? {
            None => Ok(()),
            Some(_) => Err(broken("it goes on after its summary")),
        }
    }

    fn send(
        &mut self,
        line: Line,
        requests: Option<&mpsc::Sender<CaptureStreamRequest>>,
        request: impl Fn(&str) -> CaptureRequest,
    ) {
        let id = line.number.to_string();
        let message = CaptureStreamRequest {
            id: id.clone(),
            request: Some(request(&line.text)),
        };
        // When nobody takes requests any more, the stream ends with the reason, which is told then.
        if let Some(requests) = requests {
            let _ = requests.try_send(message);
        }
        self.under_way.insert(
            id,
            Sent {
                line,
                answer: Assembler::default(),
            },
        );
    }

    /// Takes a message; whether it was the last.
    fn take(&mut self, message: CaptureStreamResponse) -> Result<bool, CliError> {
        let CaptureStreamResponse { id, answer } = message;
        match answer {
            Some(Answer::Capture(message)) => {
                self.tally.count(&payload(&message));
                let sent = self.under_way.get_mut(&id);
                let sent = sent.ok_or_else(|| broken("it answers what was not asked"))?;
                if let Some(captured) = sent.answer.take(message)? {
                    self.under_way.remove(&id);
                    self.answered += 1;
                    self.sink.write(&id, &captured)?;
                    self.bar.inc(1);
                }
            }
            Some(Answer::Failure(failure)) => {
                self.tally.count(&[]);
                self.failures += 1;
                let sent = self.under_way.remove(&id);
                let sent = sent.ok_or_else(|| broken("it answers what was not asked"))?;
                self.failure(sent.line, &failure);
            }
            Some(Answer::Summary(s)) => {
                self.tally.check(s.messages, s.bytes, s.crc32c)?;
                if (s.answered, s.failed) != (self.answered, self.failures)
                    || !self.under_way.is_empty()
                {
                    return Err(broken("its summary counts other texts than came"));
                }
                return Ok(true);
            }
            None => {
                return Err(broken(
                    "it has a message of a kind that this client does not know",
                ));
            }
        }
        Ok(false)
    }

    fn failure(&mut self, mut line: Line, failure: &Failure) {
        let now = Instant::now();
        let first = *line.first_failure.get_or_insert(now);
        let retry = failure
            .retry_after_seconds
            .and_then(|s| Duration::try_from_secs_f64(s).ok())
            .filter(|pause| now + *pause < first + PATIENCE);
        if let Some(pause) = retry {
            self.paused_until = self.paused_until.max(now + pause.max(PAUSE));
            self.again.push_back(line);
            return;
        }
        self.failed += 1;
        let text = match self.failed.cmp(&TOLD) {
            std::cmp::Ordering::Less | std::cmp::Ordering::Equal => {
                format!("line {}: {}\n", line.number, clean(&failure.message))
            }
            std::cmp::Ordering::Greater if self.failed == TOLD + 1 => {
                "more failures are only counted\n".to_owned()
            }
            std::cmp::Ordering::Greater => String::new(),
        };
        self.bar.suspend(|| out::warn(&text));
        self.bar.inc(1);
    }
}

/// The next message, once the stream is open.
async fn next(
    stream: &mut Option<Streaming<CaptureStreamResponse>>,
) -> Result<Option<CaptureStreamResponse>, CliError> {
    match stream {
        Some(stream) => Ok(stream.message().await?),
        None => std::future::pending().await,
    }
}

impl Sink {
    fn open(output: Option<&Path>) -> Result<Self, CliError> {
        let path =
            output.ok_or_else(|| CliError::Usage("\"--text-file\" needs \"--output\"".into()))?;
        let refuse =
            |e: io::Error| CliError::new(format!("cannot write \"{}\": {e}", path.display()));
        if path.extension().is_some_and(|e| e == "jsonl") {
            let file = File::create(path).map_err(refuse)?;
            return Ok(Sink::Lines(BufWriter::new(file)));
        }
        if path.extension().is_some() && !path.is_dir() {
            return Err(CliError::Usage(format!(
                "\"{}\": with --text-file, write FILE.jsonl or a folder for an .npz each",
                path.display()
            )));
        }
        fs::create_dir_all(path).map_err(refuse)?;
        Ok(Sink::Folder(path.to_owned()))
    }

    fn write(&mut self, id: &str, captured: &Captured) -> Result<(), CliError> {
        match self {
            Sink::Lines(file) => {
                let mut value = json::whole(captured)?;
                value["line"] = id.parse::<u64>().unwrap_or(0).into();
                writeln!(file, "{value}").map_err(|e| failed_write(&e))
            }
            Sink::Folder(folder) => {
                let number: u64 = id.parse().map_err(|_| {
                    CliError::new("the answer is broken: it names no line that was sent")
                })?;
                out::write_file(
                    &folder.join(format!("{number:06}.npz")),
                    &npz::bytes(captured)?,
                )
            }
        }
    }

    fn close(self) -> Result<(), CliError> {
        match self {
            Sink::Lines(mut file) => file.flush().map_err(|e| failed_write(&e)),
            Sink::Folder(_) => Ok(()),
        }
    }
}

fn failed_write(e: &io::Error) -> CliError {
    CliError::new(format!("cannot write the answers: {e}"))
}

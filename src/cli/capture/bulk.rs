//! Many texts over one stream, each answer written as it comes.
//!
//! Lines are read while answers arrive, a bounded number ahead; blank lines are passed over. An answer is known by the number of its
//! line, from 1. A text that fails is told on standard error, and the others go on; the command then fails at its end.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, BufWriter, Read, Write as _},
    path::{Path, PathBuf},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{CaptureArgs, FILED, json, npz, watched};
use crate::{
    cli::{
        assemble::{Assembler, Captured, Tally, payload},
        client::Session,
        error::CliError,
        out::{self, clean},
    },
    service::wire::introspect::{
        CaptureRequest, CaptureStreamRequest, CaptureStreamResponse, Selection,
        capture_stream_response::Answer,
    },
};

/// Lines that are read ahead of the stream.
const AHEAD: usize = 64;
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
    let (session, model) = Session::for_model(&args.target, &args.model).await?;
    let selection = args.selection.selection(FILED);
    let bar = bar(count(file));
    let (texts, queue) = mpsc::channel(AHEAD);
    let lines = tokio::task::spawn_blocking({
        let args = args.clone();
        move || {
            send(reader, &texts, |text| {
                request(&args, &model, &selection, text)
            })
        }
    });
    let result = receive(&session, queue, &mut sink, &bar).await;
    bar.finish_and_clear();
    session.close().await;
    let (answered, failed) = result?;
    // The stream has ended, so nobody waits for lines any more.
    lines
        .await
        .map_err(|_| CliError::new("reading the texts was interrupted"))??;
    sink.close()?;
    if failed > 0 {
        out::warn(&format!("{failed} of {} texts failed\n", answered + failed));
        return Err(CliError::Told);
    }
    Ok(())
}

fn request(args: &CaptureArgs, model: &str, selection: &Selection, text: &str) -> CaptureRequest {
    CaptureRequest {
        model: model.to_owned(),
        input: Some(args.texts.input(text)),
        selection: Some(selection.clone()),
    }
}

fn open(file: &Path) -> Result<Box<dyn Read + Send>, CliError> {
    if file == Path::new("-") {
        return Ok(Box::new(io::stdin()));
    }
    let file_of_texts = File::open(file)
        .map_err(|e| CliError::new(format!("cannot read \"{}\": {e}", file.display())))?;
    Ok(Box::new(file_of_texts))
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

/// Sends every line. Ends early when nobody takes them any more.
fn send(
    reader: impl Read,
    texts: &mpsc::Sender<CaptureStreamRequest>,
    request: impl Fn(&str) -> CaptureRequest,
) -> Result<(), CliError> {
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
        let message = CaptureStreamRequest {
            id: number.to_string(),
            request: Some(request(text)),
        };
        if texts.blocking_send(message).is_err() {
            break;
        }
    }
    Ok(())
}

/// Takes every answer; gives how many texts were answered and how many failed.
async fn receive(
    session: &Session,
    queue: mpsc::Receiver<CaptureStreamRequest>,
    sink: &mut Sink,
    bar: &ProgressBar,
) -> Result<(u64, u64), CliError> {
    let mut stream = session
        .captures()
        .capture_stream(ReceiverStream::new(queue))
        .await?
        .into_inner();
    let mut answers: HashMap<String, Assembler> = HashMap::new();
    let mut tally = Tally::default();
    let (mut answered, mut failed) = (0u64, 0u64);
    let broken = |why: &str| CliError::new(format!("the answer is broken: {why}"));
    while let Some(CaptureStreamResponse { id, answer }) = stream.message().await? {
        match answer {
            Some(Answer::Capture(message)) => {
                tally.count(&payload(&message));
                if let Some(captured) = answers.entry(id.clone()).or_default().take(message)? {
                    answers.remove(&id);
                    answered += 1;
                    sink.write(&id, &captured)?;
                    bar.inc(1);
                }
            }
            Some(Answer::Failure(failure)) => {
                tally.count(&[]);
                answers.remove(&id);
                failed += 1;
                let line = format!("line {}: {}\n", clean(&id), clean(&failure.message));
                bar.suspend(|| out::warn(&line));
                bar.inc(1);
            }
            Some(Answer::Summary(summary)) => {
                tally.check(summary.messages, summary.bytes, summary.crc32c)?;
                if (summary.answered, summary.failed) != (answered, failed) || !answers.is_empty() {
                    return Err(broken("its summary counts other texts than came"));
                }
                return match stream.message().await? {
                    None => Ok((answered, failed)),
                    Some(_) => Err(broken("it goes on after its summary")),
                };
            }
            None => {
                return Err(broken(
                    "it has a message of a kind that this client does not know",
                ));
            }
        }
    }
    Err(broken("the stream ended without its summary"))
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

//! The least that any server can take: the same bytes over a plain loopback socket, by threads that do nothing else.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    time::{Duration, Instant},
};

/// Bytes of one write and one read: those of a message of the daemon.
const PIECE: usize = 256 << 10;

/// A connection to a thread that sends as many bytes as it is asked for.
pub struct Plain {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Plain {
    pub fn connect() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it has an address");
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the client connects");
            stream.set_nodelay(true).expect("a socket has this option");
            let bytes = vec![1; PIECE];
            let mut wanted = [0; 8];
            // The client that hangs up ends the thread.
            while stream.read_exact(&mut wanted).is_ok() {
                let mut left = usize::from_le_bytes(wanted);
                while left > 0 {
                    let piece = left.min(PIECE);
                    stream.write_all(&bytes[..piece]).expect("the client reads");
                    left -= piece;
                }
            }
        });
        Self {
            stream: TcpStream::connect(address).expect("the thread listens"),
            buffer: vec![0; PIECE],
        }
    }

    /// Asks for bytes and reads all of them.
    pub fn fetch(&mut self, bytes: usize) -> Duration {
        let begun = Instant::now();
        self.stream
            .write_all(&bytes.to_le_bytes())
            .expect("the thread listens");
        let mut left = bytes;
        while left > 0 {
            let room = left.min(PIECE);
            let got = self.stream.read(&mut self.buffer[..room]);
            match got.expect("the thread sends") {
                0 => panic!("the thread hung up"),
                n => left -= n,
            }
        }
        begun.elapsed()
    }
}

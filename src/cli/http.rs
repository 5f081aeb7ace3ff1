//! Just enough HTTP to fetch a page of our own admin listener.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Longest wait for a page.
const PATIENCE: Duration = Duration::from_secs(2);
/// Largest page.
const LIMIT: u64 = 16 << 20;

/// The body of a page. `HTTP/1.0`, so that the server closes behind it and cuts nothing into chunks.
pub(super) async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let fetch = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.take(LIMIT).read_to_end(&mut bytes).await?;
        let text = String::from_utf8(bytes).map_err(io::Error::other)?;
        let (head, body) = text
            .split_once("\r\n\r\n")
            .ok_or_else(|| io::Error::other("the answer is no page"))?;
        match head.split_whitespace().nth(1) {
            Some("200") => Ok(body.to_owned()),
            other => Err(io::Error::other(format!(
                "status {}",
                other.unwrap_or("none")
            ))),
        }
    };
    tokio::time::timeout(PATIENCE, fetch)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

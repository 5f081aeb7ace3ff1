//! A frame: its length as a little-endian `u32`, then the message.

use prost::Message;

/// Largest frame. Tensors travel in shared memory, so a frame holds names, shapes and text.
pub const MAX_FRAME: usize = 16 << 20;

/// Bytes before the message.
pub const HEADER: usize = 4;

/// A message with its header.
pub fn encode(message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut out = Vec::with_capacity(HEADER + length);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    message
        .encode(&mut out)
        .expect("a vector grows to hold the message");
    out
}

/// Bytes received and not yet taken as messages.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
}

impl Inbox {
    /// Adds what was received.
    pub fn extend(&mut self, received: &[u8]) {
        self.bytes.extend_from_slice(received);
    }

    /// Takes the next whole message, if there is one.
    ///
    /// # Errors
    /// When the peer announces a frame over the limit, or sends what is no message: the connection is then of no use.
    pub fn take<M: Message + Default>(&mut self) -> Result<Option<M>, String> {
        let Some(header) = self.bytes.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > MAX_FRAME {
            return Err(format!("a frame of {length} bytes was announced"));
        }
        let Some(message) = self.bytes.get(HEADER..HEADER + length) else {
            return Ok(None);
        };
        let message = M::decode(message).map_err(|e| e.to_string())?;
        self.bytes.drain(..HEADER + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::wire::Encoding, *};

    proptest! {
        #[test]
        fn messages_come_back_however_the_bytes_are_cut(
            texts in prop::collection::vec(prop::collection::vec(".{0,20}", 0..4), 1..5),
            cuts in prop::collection::vec(1usize..40, 1..50),
        ) {
            let sent: Vec<Encoding> =
                texts.into_iter().map(|tokens| Encoding { tokens, ..Encoding::default() }).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(encode).collect();
            let (mut inbox, mut got, mut at) = (Inbox::default(), Vec::new(), 0);
            for cut in cuts.into_iter().cycle() {
                if at == bytes.len() {
                    break;
                }
                let end = (at + cut).min(bytes.len());
                inbox.extend(&bytes[at..end]);
                at = end;
                while let Some(m) = inbox.take::<Encoding>().unwrap() {
                    got.push(m);
                }
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn noise_is_an_error_or_waits_but_never_panics(noise in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut inbox = Inbox::default();
            inbox.extend(&noise);
            let _ = inbox.take::<Encoding>();
        }
    }
}

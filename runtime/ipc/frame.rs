//! Frames: a little-endian u32 length and that many bytes of JSON.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest frame that is read or written, in bytes.
pub const MAX_FRAME: usize = 16 << 20;

fn encode<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let len = bytes.len() - 4;
    if len > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("frame of {len} bytes is too long")));
    }
    bytes[..4].copy_from_slice(&u32::try_from(len).map_err(io::Error::other)?.to_le_bytes());
    Ok(bytes)
}

fn body_len(header: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_le_bytes(header) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {len} bytes is too long")));
    }
    Ok(len)
}

/// Writes one frame.
///
/// # Errors
/// The writer's, or `InvalidInput` when the message is over [`MAX_FRAME`].
pub fn write<T: Serialize>(mut to: impl Write, message: &T) -> io::Result<()> {
    to.write_all(&encode(message)?)
}

/// Reads one frame; `None` when the peer closed the connection between frames.
///
/// # Errors
/// The reader's, or `InvalidData` for a frame that is too long or isn't a `T`.
pub fn read<T: DeserializeOwned>(mut from: impl Read) -> io::Result<Option<T>> {
    let mut header = [0; 4];
    match from.read_exact(&mut header) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let mut body = vec![0; body_len(header)?];
    from.read_exact(&mut body)?;
    Ok(Some(serde_json::from_slice(&body)?))
}

/// As [`write`], asynchronously.
///
/// # Errors
/// As [`write`].
pub async fn send<T: Serialize>(to: &mut (impl AsyncWrite + Unpin), message: &T) -> io::Result<()> {
    to.write_all(&encode(message)?).await
}

/// As [`read`], asynchronously.
///
/// # Errors
/// As [`read`].
pub async fn receive<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<T>> {
    let mut header = [0; 4];
    match from.read_exact(&mut header).await {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let mut body = vec![0; body_len(header)?];
    from.read_exact(&mut body).await?;
    Ok(Some(serde_json::from_slice(&body)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_end() {
        let mut bytes = Vec::new();
        write(&mut bytes, &vec!["a", "b"]).expect("write");
        let mut from = bytes.as_slice();
        assert_eq!(read::<Vec<String>>(&mut from).expect("read"), Some(vec!["a".into(), "b".into()]));
        assert_eq!(read::<Vec<String>>(&mut from).expect("end"), None);
    }

    #[test]
    fn a_length_that_lies_is_refused_before_allocation() {
        let error = read::<String>([0xff; 8].as_slice()).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}

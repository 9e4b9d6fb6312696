//! Bytes from one socket to another and back, untouched: one hop in, one hop out. What a proxy costs at least.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream},
};

/// The bytes that one direction buffers: one answer of 229 KB.
const BUFFER_BYTES: usize = 256 << 10;

/// Relays every connection on `listen` to a new one to `to`, for as long as it is awaited.
///
/// # Errors
///
/// The address cannot be listened on.
pub async fn run(listen: SocketAddr, to: SocketAddr) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    loop {
        let (mut caller, _) = listener.accept().await?;
        tokio::spawn(async move {
            let mut callee = TcpStream::connect(to).await?;
            caller.set_nodelay(true)?;
            callee.set_nodelay(true)?;
            copy_bidirectional_with_sizes(&mut caller, &mut callee, BUFFER_BYTES, BUFFER_BYTES).await
        });
    }
}

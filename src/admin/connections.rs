//! Bounds the HTTP connections: their number, and the lifetime of each. A client that sends half a
//! request keeps nobody else from the server.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::serve::Listener;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

/// The limit of open connections. Another one closes the oldest.
const MAX_CONNECTIONS: usize = 32;
/// The limit for a connection, from its first byte to its last.
const LIFETIME: Duration = Duration::from_secs(30);

/// A listener whose connections are bounded.
pub(super) struct BoundedListener {
    listener: TcpListener,
    /// A sender for each open connection, oldest first. Its drop closes the connection.
    open: VecDeque<oneshot::Sender<()>>,
}

impl BoundedListener {
    pub(super) fn new(listener: TcpListener) -> BoundedListener {
        BoundedListener { listener, open: VecDeque::new() }
    }
}

impl Listener for BoundedListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        // It waits on errors that are not of one connection, such as EMFILE.
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        self.open.retain(|open| !open.is_closed());
        while self.open.len() >= MAX_CONNECTIONS {
            self.open.pop_front();
        }
        let (tx, rx) = oneshot::channel();
        self.open.push_back(tx);
        let closed = async { drop(tokio::time::timeout(LIFETIME, rx).await) };
        (Connection { stream, closed: Some(Box::pin(closed)) }, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends after [`LIFETIME`], or when a newer one needs its place.
pub(super) struct Connection {
    stream: TcpStream,
    /// Returns when the connection is to be closed. `None` after that.
    closed: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Connection {
    /// Fails once the connection is to be closed; until then wakes the task when it is.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        if let Some(closed) = &mut self.closed
            && closed.as_mut().poll(context).is_pending()
        {
            return Ok(());
        }
        self.closed = None;
        Err(io::ErrorKind::TimedOut.into())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

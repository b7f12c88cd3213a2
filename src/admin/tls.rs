//! HTTPS: a listener that opens TLS on bounded connections, with a certificate of files, or with a
//! self-signed one.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use axum::serve::Listener;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        pki_types::{
            CertificateDer, PrivateKeyDer,
            pem::{self, PemObject},
        },
    },
    server::TlsStream,
};

use super::connections::{BoundedListener, Connection};
use crate::telemetry::OutageLog;

/// The common name of the self-signed certificate.
const COMMON_NAME: &str = "kube-lxcfs";

/// The PEM files of a certificate, with those of its issuers after it, and of its key.
#[derive(Clone, Debug)]
pub struct CertificateFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why there is no usable certificate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("failed to read {}: {}", .0.display(), .1)]
    Read(PathBuf, #[source] io::Error),
    #[error("{} is not a PEM file of the expected kind: {}", .0.display(), .1)]
    Pem(PathBuf, #[source] pem::Error),
    #[error("failed to use the certificate: {0}")]
    Unusable(#[from] rustls::Error),
    #[error("failed to make a self-signed certificate: {0}")]
    SelfSigned(#[from] rcgen::Error),
}

/// A listener whose connections are bounded, also while TLS is not open yet.
pub(super) struct TlsListener {
    listener: BoundedListener,
    certificate: Certificate,
    /// A client that is slow to open TLS delays no other.
    opening: JoinSet<io::Result<(TlsStream<Connection>, SocketAddr)>>,
}

impl TlsListener {
    pub(super) fn new(listener: TcpListener, certificate: Certificate) -> TlsListener {
        let listener = BoundedListener::new(listener);
        TlsListener { listener, certificate, opening: JoinSet::new() }
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<Connection>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TlsStream<Connection>, SocketAddr) {
        loop {
            tokio::select! {
                (connection, peer) = self.listener.accept() => {
                    let acceptor = TlsAcceptor::from(self.certificate.config());
                    let open = acceptor.accept(connection);
                    self.opening.spawn(async move { Ok((open.await?, peer)) });
                }
                Some(opened) = self.opening.join_next() => match opened {
                    Ok(Ok(opened)) => return opened,
                    Ok(Err(cause)) => tracing::debug!(%cause, "failed to open TLS"),
                    Err(cause) => tracing::debug!(%cause, "failed to open TLS"),
                },
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// The certificate of a listener.
pub(super) struct Certificate {
    /// `None` for a self-signed one.
    files: Option<CertificateFiles>,
    /// The contents of the files that `config` was made of.
    contents: Contents,
    config: Arc<ServerConfig>,
    outage: OutageLog,
}

impl Certificate {
    /// Reads the files. Without files, it makes a self-signed certificate.
    ///
    /// # Errors
    /// Fails if the files are not readable, or no certificate and its key.
    pub(super) fn new(files: Option<CertificateFiles>) -> Result<Certificate, Error> {
        let (contents, config) = match &files {
            Some(files) => {
                let contents = Contents::read(files)?;
                let config = contents.config(files)?;
                (contents, config)
            }
            None => (Contents::default(), self_signed()?),
        };
        let outage = OutageLog::new("certificate");
        Ok(Certificate { files, contents, config, outage })
    }

    /// The configuration with the certificate that the files have now. While they are not usable,
    /// the former one stays.
    fn config(&mut self) -> Arc<ServerConfig> {
        match self.read_again() {
            Ok(()) => self.outage.recovered("read the certificate again"),
            Err(cause) => self.outage.failed("failed to read the certificate again", &cause),
        }
        self.config.clone()
    }

    fn read_again(&mut self) -> Result<(), Error> {
        let Some(files) = &self.files else { return Ok(()) };
        let contents = Contents::read(files)?;
        if contents != self.contents {
            self.config = contents.config(files)?;
            self.contents = contents;
        }
        Ok(())
    }
}

/// The contents of a certificate's files.
#[derive(Default, PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Contents {
    fn read(files: &CertificateFiles) -> Result<Contents, Error> {
        let read = |path: &Path| fs::read(path).map_err(|e| Error::Read(path.to_owned(), e));
        Ok(Contents { certificate: read(&files.certificate)?, key: read(&files.key)? })
    }

    fn config(&self, files: &CertificateFiles) -> Result<Arc<ServerConfig>, Error> {
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.certificate).collect();
        let chain = chain.map_err(|e| Error::Pem(files.certificate.clone(), e))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key);
        config(chain, key.map_err(|e| Error::Pem(files.key.clone(), e))?)
    }
}

fn self_signed() -> Result<Arc<ServerConfig>, Error> {
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name.push(rcgen::DnType::CommonName, COMMON_NAME);
    let key = rcgen::KeyPair::generate()?;
    let certificate = parameters.self_signed(&key)?;
    config(vec![certificate.into()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
}

fn config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<ServerConfig>, Error> {
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    Ok(Arc::new(config))
}

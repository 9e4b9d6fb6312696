//! A connection to a cluster's public API.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use emu2_proto::v1::{self, emu2_client::Emu2Client};
use emu2_serve::{client::Connector, tenant::Token, tls::ClientTlsConfig};
use tonic::{
    Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use tonic_types::StatusExt;

use crate::args::{ConnectionArgs, RouterArgs};

/// Largest message that this client sends or accepts; a router's own limit may be lower.
const MAX_MESSAGE_BYTES: usize = 256 << 20;

/// A connection to a router; every request carries the caller's deadline and token.
#[derive(Clone, Debug)]
pub struct Client {
    api: Emu2Client<Channel>,
    timeout: Option<Duration>,
    authorization: Option<MetadataValue<Ascii>>,
}

impl Client {
    /// Connects to the router at an address.
    ///
    /// # Errors
    ///
    /// A timeout that is negative or not finite, a token with characters that no token has, TLS files that cannot be
    /// read, or no router at the address.
    pub async fn connect(RouterArgs { addr, connection }: &RouterArgs) -> Result<Self> {
        let timeout = connection.timeout.map(Duration::try_from_secs_f64).transpose().context("--timeout")?;
        let bearer = |token: &Token| token.bearer().context("--token has characters that no token has");
        let authorization = connection.token.as_ref().map(bearer).transpose()?;
        let ConnectionArgs { ca_file, cert_file, key_file, .. } = connection.clone();
        let tls = ClientTlsConfig { ca_file, cert_file, key_file, server_name: None };
        let channel = Connector::open(&tls)?.connect(addr).await;
        let channel =
            channel.with_context(|| format!("no cluster answers at {addr}; start one with `emu2 up`"))?;
        let api = Emu2Client::new(channel);
        let api =
            api.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { api, timeout, authorization })
    }

    /// Starts a generation; returns its events as they come. Failures read as [`explain`] words them.
    pub async fn generate(&mut self, request: v1::GenerateRequest) -> Result<Streaming<v1::GenerateEvent>> {
        let request = self.request(request);
        Ok(self.api.generate(request).await.map_err(explain)?.into_inner())
    }

    /// Returns the embeddings of one image.
    pub async fn embed(&mut self, request: v1::EmbedRequest) -> Result<v1::EmbedResponse> {
        let request = self.request(request);
        Ok(self.api.embed(request).await.map_err(explain)?.into_inner())
    }

    /// Returns the models that the cluster serves.
    pub async fn models(&mut self) -> Result<Vec<v1::Model>> {
        let request = self.request(v1::ListModelsRequest {});
        Ok(self.api.list_models(request).await.map_err(explain)?.into_inner().models)
    }

    /// Returns `name` if there is one, else the name of the first model with the capability.
    ///
    /// # Errors
    ///
    /// The call failed, or no model of the cluster has the capability.
    pub async fn pick(&mut self, name: Option<&str>, capability: v1::Capability) -> Result<String> {
        if let Some(name) = name {
            return Ok(name.to_owned());
        }
        let models = self.models().await?;
        let able = models.into_iter().find(|model| model.capabilities().any(|can| can == capability));
        match able {
            Some(model) => Ok(model.name),
            None => bail!("no model of this cluster can do this ({})", capability.as_str_name()),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(timeout) = self.timeout {
            request.set_timeout(timeout);
        }
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        request
    }
}

/// Words a status for a person: its code, its message, when to try again, and the id of the request to quote.
pub fn explain(status: Status) -> anyhow::Error {
    let details = status.get_error_details();
    let mut text = format!("{:?}: {}", status.code(), status.message());
    if let Some(retry) = details.retry_info().and_then(|info| info.retry_delay) {
        text += &format!(" (try again in {:.1} s)", retry.as_secs_f64());
    }
    if let Some(request) = details.request_info() {
        text += &format!(" [request {}]", request.request_id);
    }
    anyhow!(text)
}

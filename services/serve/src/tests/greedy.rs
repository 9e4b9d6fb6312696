//! Clients that take more than they should, or give less: silent, idle, many, slow, loud. Each is held or cut, and
//! others are served all the while.

use std::time::{Duration, Instant};

use bytes::Bytes;
use emu2_proto::v1::{self, emu2_client::Emu2Client};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{sleep, timeout},
};
use tonic::{Code, Request, Status, Streaming};
use tower::{Service, ServiceExt};

use super::loopback::{Loopback, PATIENCE, embed};
use crate::{client, server::ServerConfig};

/// HTTP/2's client preface and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

async fn connect(server: &Loopback) -> TcpStream {
    TcpStream::connect(server.address).await.unwrap()
}

/// Reads until the server closes.
async fn closed(mut connection: TcpStream) {
    let mut said = Vec::new();
    let read = timeout(PATIENCE, connection.read_to_end(&mut said)).await;
    // A reset is a close as well.
    let _ = read.expect("the connection is closed");
}

async fn served(server: &Loopback) -> Result<(), Status> {
    server.client().list_models(v1::ListModelsRequest {}).await.map(drop)
}

async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_connection_that_says_nothing_or_half_a_preface_is_closed() {
    let server = Loopback::start(ServerConfig { handshake_ms: 50, ..ServerConfig::default() }).await;
    closed(connect(&server).await).await;
    let mut half = connect(&server).await;
    half.write_all(&PREFACE[..10]).await.unwrap();
    closed(half).await;
    served(&server).await.unwrap();
}

#[tokio::test]
async fn a_connection_without_a_call_is_closed_and_one_with_a_quiet_stream_is_not() {
    // A connection is first looked at when its handshake must be over.
    let config = ServerConfig { idle_ms: 100, handshake_ms: 2_000, ..ServerConfig::default() };
    let server = Loopback::start(config).await;
    let mut events = server.generate(1).await;
    let mut idle = connect(&server).await;
    idle.write_all(PREFACE).await.unwrap();
    closed(idle).await;
    sleep(Duration::from_millis(300)).await;
    server.probe.steps.add_permits(1);
    assert!(events.message().await.unwrap().is_some());
    assert!(events.message().await.unwrap().is_none());
}

#[tokio::test]
async fn one_connection_too_many_is_closed_at_once() {
    let server = Loopback::start(ServerConfig { max_connections: 2, ..ServerConfig::default() }).await;
    let mut both = Vec::new();
    for _ in 0..2 {
        let mut connection = connect(&server).await;
        connection.write_all(PREFACE).await.unwrap();
        // Its SETTINGS: the server has taken it.
        connection.read_u8().await.unwrap();
        both.push(connection);
    }
    closed(connect(&server).await).await;
    served(&server).await.unwrap_err();
    both.pop();
    until("a place is free", || async { served(&server).await.is_ok() }).await;
}

/// What the server says at first: so many streams, and headers so long.
#[tokio::test]
async fn streams_and_headers_of_a_connection_are_bounded() {
    let server = Loopback::start(ServerConfig { max_requests: 7, ..ServerConfig::default() }).await;
    let mut connection = connect(&server).await;
    connection.write_all(PREFACE).await.unwrap();
    let mut head = [0; 9];
    connection.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "SETTINGS come first");
    let mut settings = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
    connection.read_exact(&mut settings).await.unwrap();
    let setting = |id: u8| {
        let of = settings.chunks_exact(6).find(|entry| entry[..2] == [0, id]);
        of.map(|entry| u32::from_be_bytes(entry[2..].try_into().unwrap()))
    };
    const MAX_CONCURRENT_STREAMS: u8 = 3;
    const MAX_HEADER_LIST_SIZE: u8 = 6;
    assert_eq!(setting(MAX_CONCURRENT_STREAMS), Some(7 + 256));
    assert_eq!(setting(MAX_HEADER_LIST_SIZE), Some(16 << 10));

    let mut client = server.client();
    let mut long = Request::new(v1::ListModelsRequest {});
    long.metadata_mut().insert("x-long", "x".repeat(20 << 10).parse().unwrap());
    client.list_models(long).await.unwrap_err();
    client.list_models(v1::ListModelsRequest {}).await.unwrap();
}

/// A stream of many events whose window holds not even one.
async fn stall(server: &Loopback, timeout: Option<Duration>) -> Streaming<v1::GenerateEvent> {
    let endpoint = client::endpoint(format!("http://{}", server.address)).unwrap();
    let channel = endpoint.initial_stream_window_size(4).connect_lazy();
    let mut request = Request::new(v1::GenerateRequest { seed: Some(1_000), ..Default::default() });
    if let Some(timeout) = timeout {
        request.set_timeout(timeout);
    }
    Emu2Client::new(channel).generate(request).await.unwrap().into_inner()
}

/// The reader holds on to its stream; only its work and its permit go.
async fn stalled_reader_is_cut(config: ServerConfig, deadline: Option<Duration>, code: &str) {
    let server = Loopback::start(ServerConfig { max_requests: 1, ..config }).await;
    let mut closed = server.probe.closed_streams.subscribe();
    let reader = stall(&server, deadline).await;
    server.probe.steps.add_permits(1_000);
    timeout(PATIENCE, closed.wait_for(|&count| count == 1)).await.expect("the work is dropped").unwrap();
    let next = || v1::GenerateRequest { seed: Some(1), ..Default::default() };
    until("the permit is free", || async { server.client().generate(next()).await.is_ok() }).await;
    let line = format!(r#"emu2_rpc_requests_total{{method="emu2.v1.Emu2/Generate",code="{code}"}} 1"#);
    until("the end is counted", || async { server.admin("/metrics").await.1.contains(&line) }).await;
    drop(reader);
}

#[tokio::test]
async fn a_reader_that_stalls_loses_its_work_and_its_permit() {
    let config = ServerConfig { stalled_ms: 100, ..ServerConfig::default() };
    stalled_reader_is_cut(config, None, "CANCELLED").await;
}

#[tokio::test]
async fn a_deadline_frees_what_a_stalled_reader_holds() {
    let deadline = Some(Duration::from_millis(300));
    stalled_reader_is_cut(ServerConfig::default(), deadline, "DEADLINE_EXCEEDED").await;
}

#[tokio::test]
async fn a_message_that_comes_byte_by_byte_is_cut() {
    let config = ServerConfig { receive_ms: 200, max_requests: 1, ..ServerConfig::default() };
    let server = Loopback::start(config).await;
    // The head of a message of 100 bytes, then one of them at a time.
    let bytes = [0, 0, 0, 0, 100].into_iter().chain([0; 99]);
    let drops = futures::stream::unfold(bytes, async |mut bytes| {
        sleep(Duration::from_millis(10)).await;
        let byte = bytes.next()?;
        Some((Ok::<_, Status>(Frame::data(Bytes::from(vec![byte]))), bytes))
    });
    let request = http::Request::post("/emu2.v1.Emu2/Embed").header("content-type", "application/grpc");
    let request = request.body(tonic::body::Body::new(StreamBody::new(Box::pin(drops)))).unwrap();
    let mut channel = server.channel();
    let answer = timeout(PATIENCE, channel.ready().await.unwrap().call(request)).await;
    let answer = answer.expect("it is answered").unwrap();
    let mut headers = answer.headers().clone();
    headers.extend(answer.into_body().collect().await.unwrap().trailers().cloned().unwrap_or_default());
    let status = Status::from_header_map(&headers).unwrap();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(status.message().contains("server.receive_ms"), "{status:?}");
    until("the permit is free", || async {
        server.client().embed(embed("emu3")).await.unwrap_err().code() == Code::NotFound
    })
    .await;
}

/// Frames as fast as they go, answers unread.
async fn flood(server: &Loopback, frames: impl Fn(u32) -> Vec<u8>) {
    let mut connection = connect(server).await;
    connection.write_all(PREFACE).await.unwrap();
    for round in 0..20_000 {
        // The server may stop to read, or hang up: both are fine.
        match timeout(Duration::from_millis(200), connection.write_all(&frames(round))).await {
            Ok(Ok(())) => {}
            _ => break,
        }
        if round % 2_000 == 0 {
            served(server).await.expect("others are served");
        }
    }
    served(server).await.expect("others are served");
}

#[tokio::test]
async fn a_flood_of_pings_leaves_others_served() {
    let server = Loopback::start(ServerConfig::default()).await;
    flood(&server, |_| [b"\0\0\x08\x06\0\0\0\0\0".as_slice(), &[7; 8]].concat()).await;
}

/// Streams that are opened and reset at once ("rapid reset").
#[tokio::test]
async fn a_flood_of_resets_leaves_others_served() {
    let server = Loopback::start(ServerConfig::default()).await;
    flood(&server, |round| {
        let stream = (round * 2 + 1).to_be_bytes();
        // `:method: POST`, `:scheme: http`, `:path: /` out of HPACK's static table; then RST_STREAM, CANCEL.
        let open = [b"\0\0\x03\x01\x04".as_slice(), &stream, &[0x83, 0x86, 0x84]].concat();
        [open, [b"\0\0\x04\x03\0".as_slice(), &stream, &[0, 0, 0, 8]].concat()].concat()
    })
    .await;
    let idle = "emu2_rpc_in_flight_requests 0";
    until("nothing is left", || async { server.admin("/metrics").await.1.contains(idle) }).await;
}

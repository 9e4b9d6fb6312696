//! What a hop adds: `Embed` through the router and `Encode` through nginx, against `Encode` direct, in turn, from the
//! same client to the same stage. The cache is off and every image new.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use emu2_proto::stage::{EncodeRequest, encode_request::Source, visual_encoder_client::VisualEncoderClient};
use tokio::net::TcpStream;
use tonic::transport::Channel;

use super::setup::{Measured, Setup};
use crate::{
    cluster::Cluster,
    figures::{Bar, Figure, percentile_ms},
    load,
    processes::{Process, free_address, program},
};

/// Calls of one kind before the next kind has its turn.
const TURN: usize = 25;

pub(super) async fn measure(setup: &Setup) -> anyhow::Result<Measured> {
    let cluster = Cluster::start(setup.plan()).await?;
    let stage = cluster.encoders[0].endpoints[0].clone();
    let nginx = Nginx::start(cluster.dir(), &stage, setup.router_core).await?;
    let mut direct = encoder(&stage)?;
    let mut proxied = encoder(&format!("http://{}", nginx.address))?;
    let mut routed = cluster.router().client();

    let turns = if setup.brief { 8 } else { 40 };
    let mut figures = [
        Figure::new("the router adds, p50", "ms").bar(Bar::AtMost(0.5)),
        Figure::new("the router adds, p99", "ms").bar(Bar::AtMost(3.0)),
        Figure::new("p50 that the router adds / p50 that nginx adds", "×").bar(Bar::AtMost(1.5)),
        Figure::new("nginx adds, p50", "ms"),
        Figure::new("nginx adds, p99", "ms"),
        Figure::new("direct, p50", "ms"),
        Figure::new("direct, p99", "ms"),
    ];
    let mut number = 0;
    // The first round warms connections, caches and branch predictors; it is not counted.
    for round in 0..=setup.rounds {
        let [mut straight, mut through_nginx, mut through_router] = [vec![], vec![], vec![]];
        for _ in 0..turns {
            for _ in 0..TURN {
                straight.push(encode(&mut direct, next(&mut number)).await?);
            }
            for _ in 0..TURN {
                through_router.push(embed(&mut routed, next(&mut number)).await?);
            }
            for _ in 0..TURN {
                through_nginx.push(encode(&mut proxied, next(&mut number)).await?);
            }
        }
        if round == 0 {
            continue;
        }
        let at =
            |fraction| [&straight, &through_nginx, &through_router].map(|it| percentile_ms(it, fraction));
        let ([p50, nginx_p50, router_p50], [p99, nginx_p99, router_p99]) = (at(0.5), at(0.99));
        let adds = [router_p50 - p50, router_p99 - p99, 0.0, nginx_p50 - p50, nginx_p99 - p99, p50, p99];
        for (figure, value) in figures.iter_mut().zip(adds) {
            figure.push(value);
        }
        figures[2].values[round - 1] = (router_p50 - p50) / (nginx_p50 - p50);
    }
    Ok(Measured {
        conditions: format!(
            "16 KiB of image up, 229,376 bytes of embeddings down, one call at a time, {} calls of each kind a \
             round; {}; nginx on the router's core in its turn",
            turns * TURN,
            setup.pinning()
        ),
        figures: figures.into(),
        notes: vec![],
    })
}

fn next(number: &mut u64) -> Bytes {
    *number += 1;
    load::image_bytes(*number)
}

pub(super) fn encoder(endpoint: &str) -> anyhow::Result<VisualEncoderClient<Channel>> {
    let channel = emu2_serve::client::endpoint(endpoint)?.connect_lazy();
    Ok(VisualEncoderClient::new(channel))
}

pub(super) async fn encode(
    client: &mut VisualEncoderClient<Channel>,
    image: Bytes,
) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let request = EncodeRequest { source: Some(Source::Image(image)), n_query: 64 };
    let mut answers = client.encode(tokio_stream::once(request)).await?.into_inner();
    let answer = answers.message().await?.context("the stage did not answer")?;
    let took = began.elapsed();
    anyhow::ensure!(
        answer.embeddings.is_some_and(|tensor| tensor.data.len() == 229_376),
        "not 229,376 bytes"
    );
    // The end of the stream is no part of the latency: `Embed` has its answer by then, too.
    while answers.message().await?.is_some() {}
    Ok(took)
}

async fn embed(
    client: &mut emu2_proto::v1::emu2_client::Emu2Client<Channel>,
    image: Bytes,
) -> anyhow::Result<Duration> {
    use emu2_proto::v1::{EmbedRequest, Image};
    let image = Some(Image { data: image });
    let request =
        EmbedRequest { model: crate::cluster::MODEL.into(), image, n_query: None, ..Default::default() };
    let began = Instant::now();
    let answer = client.embed(request).await?.into_inner();
    let took = began.elapsed();
    anyhow::ensure!(
        answer.embeddings.is_some_and(|tensor| tensor.data.len() == 229_376),
        "not 229,376 bytes"
    );
    Ok(took)
}

/// nginx with one worker, its gRPC proxy in front of one stage, connections kept.
struct Nginx {
    address: SocketAddr,
    _process: Process,
}

impl Nginx {
    async fn start(dir: &Path, stage: &str, core: Option<usize>) -> anyhow::Result<Self> {
        let address = free_address();
        let stage = stage.strip_prefix("http://").context("an endpoint is http://…")?;
        let place = dir.display();
        // Buffers that hold an answer: nginx as someone sets it up who wants it fast here.
        let text = format!(
            "daemon off; worker_processes 1; pid {place}/nginx.pid; error_log {place}/nginx.error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {place}/body; proxy_temp_path {place}/proxy; fastcgi_temp_path {place}/fastcgi;
    uwsgi_temp_path {place}/uwsgi; scgi_temp_path {place}/scgi;
    client_max_body_size 0; client_body_buffer_size 256k; keepalive_requests 1000000000; tcp_nodelay on;
    http2_max_concurrent_streams 1024; http2_body_preread_size 1m; http2_chunk_size 64k;
    upstream stage {{ server {stage}; keepalive 64; keepalive_requests 1000000000; }}
    server {{
        listen {address} http2;
        location / {{ grpc_pass grpc://stage; grpc_buffer_size 512k; grpc_socket_keepalive on; }}
    }}
}}
"
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, text)?;
        let arguments = [Path::new("-c"), &file, Path::new("-p"), dir];
        let mut process = Process::start(dir, "nginx", &program("nginx")?, &arguments, core)?;
        let began = Instant::now();
        while TcpStream::connect(address).await.is_err() {
            anyhow::ensure!(
                began.elapsed() < Duration::from_secs(10) && process.is_running(),
                "nginx does not start: {}",
                process.errors()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(Self { address, _process: process })
    }
}

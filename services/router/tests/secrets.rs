//! The router as a process: what it logs at its most talkative, and how it ends.

use std::{
    net::{SocketAddr, TcpListener},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use emu2_proto::v1::{ListModelsRequest, emu2_client::Emu2Client};
use emu2_serve::{client, tenant::Token};
use tonic::{Code, Request};

const TOKEN: &str = "hunter2-hunter2-hunter2";
const TOKEN_SHA256: &str = "ae71c4cdf5d735963a372732e38e6c3198c25c4cc759e915682f4f04219c077e";
const REDIS_PASSWORD: &str = "correct-horse";
const PATIENCE: Duration = Duration::from_secs(20);

/// Nobody's just now; another process is unlikely to take it in between.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

async fn ask(addr: SocketAddr, token: &str) -> Code {
    let channel = client::endpoint(format!("http://{addr}")).unwrap().connect_lazy();
    let mut request = Request::new(ListModelsRequest {});
    request.metadata_mut().insert("authorization", Token::from(token.to_owned()).bearer().unwrap());
    match Emu2Client::new(channel).list_models(request).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn no_log_line_of_a_run_holds_a_token_a_hash_or_the_password_of_redis() {
    let (folder, addr) = (tempfile::tempdir().unwrap(), free());
    let (config, log) = (folder.path().join("router.toml"), folder.path().join("log"));
    let toml = format!(
        r#"
        [server]
        listen = "{addr}"
        admin = "{}"
        [telemetry]
        log = "trace"
        [cache]
        redis_url = "redis://:{REDIS_PASSWORD}@{}"
        [auth]
        mode = "tokens"
        [[auth.tenants]]
        name = "search"
        token_sha256 = ["{TOKEN_SHA256}"]
        "#,
        free(),
        free()
    );
    std::fs::write(&config, toml).unwrap();
    let output = std::fs::File::create(&log).unwrap();
    let mut router = Command::new(env!("CARGO_BIN_EXE_emu2-router"))
        .arg("--config")
        .arg(&config)
        .stdout(Stdio::from(output.try_clone().unwrap()))
        .stderr(Stdio::from(output))
        .spawn()
        .unwrap();

    let begun = Instant::now();
    // There are no stages, so a known caller is told that the router is not ready; an unknown one not even that.
    while ask(addr, "wrong-hunter2").await != Code::Unauthenticated {
        assert!(begun.elapsed() < PATIENCE, "{}", std::fs::read_to_string(&log).unwrap());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(ask(addr, TOKEN).await, Code::Unavailable);

    let terminated = Command::new("kill").args(["-TERM", &router.id().to_string()]).status().unwrap();
    assert!(terminated.success());
    let ended = tokio::task::spawn_blocking(move || router.wait().unwrap());
    let ended = tokio::time::timeout(PATIENCE, ended).await.expect("it ends").unwrap();
    assert!(ended.success(), "{ended:?}");

    let log = std::fs::read_to_string(&log).unwrap();
    assert!(log.contains("UNAUTHENTICATED") && log.contains("\"TRACE\""), "{log}");
    for secret in [TOKEN, "wrong-hunter2", TOKEN_SHA256, REDIS_PASSWORD] {
        assert_eq!(log.lines().find(|line| line.contains(secret)), None);
    }
}

/// A door that is open to the network has to be somebody's word; the error says whose key is missing.
#[test]
fn off_loopback_nothing_starts_without_a_word_on_tls_and_callers() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_emu2-router"));
    let refused = command.env("EMU2__SERVER__LISTEN", "0.0.0.0:0").output().unwrap();
    let told = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(told.contains("server.tls.mode") && told.contains("auth.mode"), "{told}");
}

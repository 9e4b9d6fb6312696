use std::time::Duration;

use http::HeaderValue;
use tonic::Code;

use super::*;
use crate::{priority::Priority, tenant::TokenHash};

fn hash(token: &str) -> TokenHash {
    TokenHash::new(hex::encode(Sha256::digest(token)))
}

fn tenant(name: &str, tokens: &[&str]) -> TenantConfig {
    let token_sha256 = tokens.iter().map(|token| hash(token)).collect();
    TenantConfig {
        name: name.into(),
        token_sha256,
        highest_priority: Priority::Normal,
        limits: TenantLimits::default(),
    }
}

fn config(tenants: Vec<TenantConfig>) -> AuthConfig {
    AuthConfig { mode: Some(AuthMode::Tokens), tenants, tenants_file: None }
}

fn ask(tenants: &Tenants, authorization: &[&str]) -> Result<String, Status> {
    let mut headers = HeaderMap::new();
    for value in authorization {
        headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
    }
    let found = tenants.identify(&mut headers);
    assert!(tenants.book.is_none() || headers.is_empty());
    found.map(|guest| guest.tenant.name().to_owned())
}

#[test]
fn a_token_is_its_tenant_and_anything_else_is_refused() {
    let tenants = config(vec![tenant("search", &["old", "new"]), tenant("ads", &["third"])]);
    let tenants = Tenants::open(&tenants).unwrap();
    for (token, name) in [("old", "search"), ("new", "search"), ("third", "ads")] {
        assert_eq!(ask(&tenants, &[&format!("Bearer {token}")]).unwrap(), name);
    }
    assert_eq!(ask(&tenants, &["bearer third"]).unwrap(), "ads");
    let long = format!("Bearer {}", "x".repeat(MAX_TOKEN_BYTES + 1));
    let refused: [(&[&str], &str); 7] = [
        (&[], "a token is needed"),
        (&["Bearer other"], "not known"),
        (&["Bearer "], "must be `Bearer <token>`"),
        (&["Basic old"], "must be `Bearer <token>`"),
        (&["old"], "must be `Bearer <token>`"),
        (&[&long], "must be `Bearer <token>`"),
        (&["Bearer old", "Bearer old"], "once"),
    ];
    for (authorization, words) in refused {
        let status = ask(&tenants, authorization).unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(status.message().contains(words), "{status:?}");
    }
}

#[test]
fn without_tokens_everybody_is_the_default_tenant() {
    let tenants = Tenants::open(&AuthConfig::default()).unwrap();
    assert_eq!(ask(&tenants, &["Bearer whatever"]).unwrap(), "default");
    assert_eq!(ask(&tenants, &[]).unwrap(), "default");
}

#[tokio::test(start_paused = true)]
async fn a_changed_file_changes_who_may_call() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let write = |tenant: &TenantConfig| {
        let hash = serde_json::to_string(&tenant.token_sha256).unwrap();
        let text = format!("[[tenants]]\nname = {:?}\ntoken_sha256 = {hash}\n", tenant.name);
        std::fs::write(file.path(), text).unwrap();
    };
    write(&tenant("search", &["first"]));
    let inline = vec![tenant("ads", &["inline"])];
    let config = AuthConfig { tenants_file: Some(file.path().into()), ..config(inline) };
    let tenants = Tenants::open(&config).unwrap();
    assert_eq!(ask(&tenants, &["Bearer first"]).unwrap(), "search");

    write(&tenant("search", &["second"]));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(ask(&tenants, &["Bearer first"]).unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(ask(&tenants, &["Bearer second"]).unwrap(), "search");
    assert_eq!(ask(&tenants, &["Bearer inline"]).unwrap(), "ads");

    // A tenant twice, a broken file: what was in force stays.
    for bad in ["[[tenants]]\nname = \"ads\"\ntoken_sha256 = []\n", "[[tenants]]\nname = hunter2"] {
        std::fs::write(file.path(), bad).unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(ask(&tenants, &["Bearer second"]).unwrap(), "search");
    }
    let error = format!("{:#}", Tenants::open(&config).unwrap_err());
    assert!(error.contains("line 2") && !error.contains("hunter2"), "{error}");
}

#[test]
fn all_mistakes_are_told_and_no_secret_is() {
    let limits =
        TenantLimits { max_requests: Some(0), requests_per_second: Some(-1.0), burst_requests: Some(0) };
    let hunter = TenantConfig { token_sha256: vec![TokenHash::new("hunter2")], limits, ..tenant("a b", &[]) };
    let bad = config(vec![hunter, tenant("ads", &["x"]), tenant("ads", &["x"]), tenant("none", &[])]);
    let problems = bad.problems(true);
    assert_eq!(problems.len(), 8, "{problems:?}");
    assert!(!format!("{problems:?}{bad:?}").contains("hunter2"));
    assert_eq!(config(vec![]).problems(false).len(), 1);
    assert_eq!(AuthConfig { mode: None, ..config(vec![tenant("ads", &["x"])]) }.problems(true).len(), 1);
}

/// Whoever may change the file must not be able to begin anew by it.
#[tokio::test(start_paused = true)]
async fn a_changed_file_keeps_the_counts() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let write = |highest: &str| {
        let hash = serde_json::to_string(&hash("first")).unwrap();
        let limits = "limits = { max_requests = 1 }";
        let text = format!(
            "[[tenants]]\nname = \"a\"\ntoken_sha256 = [{hash}]\nhighest_priority = \"{highest}\"\n{limits}"
        );
        std::fs::write(file.path(), text).unwrap();
    };
    write("low");
    let config = AuthConfig { tenants_file: Some(file.path().into()), ..config(vec![]) };
    let tenants = Tenants::open(&config).unwrap();
    let guest = || {
        let bearer = HeaderValue::from_static("Bearer first");
        tenants.identify(&mut HeaderMap::from_iter([(AUTHORIZATION, bearer)])).unwrap()
    };
    assert_eq!(guest().tenant.highest_priority(), Priority::Low);
    let place = guest().enter().unwrap();
    write("high");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(guest().tenant.highest_priority(), Priority::High);
    assert_eq!(guest().enter().unwrap_err().code(), Code::ResourceExhausted);
    drop(place);
    guest().enter().unwrap();
}

#[test]
fn an_open_door_off_loopback_has_to_be_stated() {
    let unsaid = AuthConfig::default();
    assert!(unsaid.problems(true).is_empty());
    assert!(unsaid.problems(false)[0].contains("auth.mode"), "{:?}", unsaid.problems(false));
    assert!(AuthConfig { mode: Some(AuthMode::None), ..unsaid }.problems(false).is_empty());
}

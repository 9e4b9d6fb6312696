//! Mistakes, collected: each names its field, the limit and the value.

use emu2_serve::status::Violation;

#[derive(Default)]
pub(super) struct Checks(Vec<Violation>);

impl Checks {
    pub(super) fn violations(self) -> Vec<Violation> {
        self.0
    }

    pub(super) fn wrong(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation::new(field, description));
    }

    pub(super) fn extend(&mut self, violations: Vec<Violation>) {
        self.0.extend(violations);
    }

    /// Checks what can be told of an image without opening it. A URL in its place is worth a word of its own: other
    /// APIs fetch them.
    pub(super) fn image(&mut self, field: &str, data: &[u8]) {
        if data.is_empty() {
            self.wrong(field, "must be an encoded image, got 0 bytes");
        }
        if let Some(scheme) = url_scheme(data) {
            let got = format!("must be the bytes of an image, got a URL ({scheme}…): URLs are not accepted");
            self.wrong(field, got);
        }
    }

    pub(super) fn at_most(&mut self, field: &str, limit: &str, max: u32, got: usize) {
        if got > max as usize {
            self.wrong(field, format!("must be at most {max} ({limit}), got {got}"));
        }
    }
}

/// The scheme of what begins as a URL does. No format of images begins so.
fn url_scheme(data: &[u8]) -> Option<&'static str> {
    const SCHEMES: [&str; 8] =
        ["http://", "https://", "data:", "file://", "ftp://", "s3://", "gs://", "az://"];
    let data = data.trim_ascii_start();
    let begins =
        |scheme: &&str| data.get(..scheme.len()).is_some_and(|it| it.eq_ignore_ascii_case(scheme.as_bytes()));
    SCHEMES.into_iter().find(begins)
}

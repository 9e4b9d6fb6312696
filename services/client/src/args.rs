//! Arguments that say which cluster is called and how.

use std::path::PathBuf;

use clap::Args;
use emu2_serve::tenant::Token;

/// The router that is called, and how.
#[derive(Clone, Debug, Default, Args)]
pub struct RouterArgs {
    /// Address of a router.
    #[arg(long, env = "EMU2_ADDR", default_value = "http://127.0.0.1:50051")]
    pub addr: String,
    /// Deadline, token and TLS.
    #[command(flatten)]
    pub connection: ConnectionArgs,
}

/// How a cluster is called: deadline, token, TLS.
#[derive(Clone, Debug, Default, Args)]
pub struct ConnectionArgs {
    /// Give up after this many seconds; every stage of the cluster stops then.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// Where the cluster asks for one; the environment is a better place than a command line.
    #[arg(long, env = "EMU2_TOKEN", hide_env_values = true)]
    pub token: Option<Token>,
    /// For https://…: who signs the router's certificate (PEM).
    #[arg(long, env = "EMU2_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Where the router asks for one: a certificate and its key (PEM).
    #[arg(long, value_name = "FILE", requires_all = ["key_file", "ca_file"])]
    pub cert_file: Option<PathBuf>,
    /// The private key of --cert-file (PEM).
    #[arg(long, value_name = "FILE", requires = "cert_file")]
    pub key_file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        router: RouterArgs,
    }

    #[test]
    fn a_token_is_not_printed() {
        let parsed = Cli::parse_from(["emu2", "--token", "hunter2"]);
        assert!(parsed.router.connection.token.is_some());
        assert!(!format!("{parsed:?}").contains("hunter2"));
    }
}

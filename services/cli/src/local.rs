//! Executes `emu2-local`, the binary beside this one that is linked to libtorch, with the arguments of this process.

use std::{
    env::{self, consts::EXE_SUFFIX},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// The name of the binary, without the suffix of executables on some systems.
const NAME: &str = "emu2-local";

/// Hands this process over to `emu2-local`; returns only if that failed or, where processes cannot be replaced, with
/// its end.
pub(crate) fn execute() -> Result<()> {
    let this = env::current_exe().context("the path of this executable is unknown")?;
    let path = beside(&this)?;
    let mut command = Command::new(&path);
    command.args(env::args_os().skip(1));
    replace(command).with_context(|| path.display().to_string())
}

/// Returns the path of `emu2-local` in the folder of this executable.
fn beside(this: &Path) -> Result<PathBuf> {
    let path = this.with_file_name(format!("{NAME}{EXE_SUFFIX}"));
    ensure!(
        path.is_file(),
        "this command is executed by {NAME}, which is absent: {} (`cargo build --package {NAME}` builds it)",
        path.display()
    );
    Ok(path)
}

#[cfg(unix)]
fn replace(mut command: Command) -> Result<()> {
    use std::os::unix::process::CommandExt;
    Err(command.exec().into())
}

#[cfg(not(unix))]
fn replace(mut command: Command) -> Result<()> {
    let status = command.status()?;
    std::process::exit(status.code().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_beside_this_executable() {
        let folder = tempfile::tempdir().unwrap();
        let this = folder.path().join("emu2");
        let error = beside(&this).unwrap_err().to_string();
        let path = folder.path().join(format!("{NAME}{EXE_SUFFIX}"));
        assert!(error.contains(path.to_str().unwrap()) && error.contains("cargo build"), "{error}");
        std::fs::write(&path, "").unwrap();
        assert_eq!(beside(&this).unwrap(), path);
    }
}

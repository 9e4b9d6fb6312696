//! The command `emu2` as a person has it: a client that starts without libtorch, and executes `emu2-local` for the
//! commands that need it.

use std::{fs, process::Command};

use crate::support::{binary, shared};

/// Runs a command, which must succeed; returns its standard output.
fn output(command: &mut Command) -> String {
    let ended = command.output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    String::from_utf8(ended.stdout).unwrap()
}

#[test]
fn the_client_is_not_linked_to_libtorch() {
    let is_linked = |name| {
        let executable = fs::read(binary(name).get_program()).unwrap();
        let library = b"libtorch_cpu.so";
        executable.windows(library.len()).any(|bytes| bytes == library)
    };
    assert!(!is_linked("emu2"));
    assert!(is_linked("emu2-local"), "this test recognises no linked library");
}

#[test]
fn the_client_lists_the_models_of_a_cluster() {
    let said = output(binary("emu2").args(["models", "--addr", &format!("http://{}", shared().addr)]));
    for model in ["emu2 (ready): embed, text\n", "emu2-chat (ready): ", "emu2-gen (ready): "] {
        assert!(said.contains(model), "{model} not in {said}");
    }
}

#[test]
fn one_help_lists_all_commands_and_each_has_its_own() {
    let all = output(binary("emu2").arg("--help"));
    for (command, option) in [
        ("ask", "--max-new-tokens"),
        ("chat", "--system"),
        ("draw", "--guidance"),
        ("embed", "--n-query"),
        ("models", "--addr"),
        ("up", "--model-dir"),
        ("convert", "<OUT>"),
        ("inspect", "--digest"),
        ("demo", "--photos"),
    ] {
        assert!(all.contains(&format!("\n  {command} ")), "{command} not in {all}");
        let own = output(binary("emu2").args([command, "--help"]));
        assert!(own.contains(&format!("Usage: emu2 {command} ")) && own.contains(option), "{own}");
    }
}

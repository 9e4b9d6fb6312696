#!/usr/bin/env bash
# Fuzzes every target, or those named, for FUZZ_RUNS executions each. What a run learns stays in the cache, so that
# the next one goes on from there; a finding is written beside it and ends the run.
#
# libFuzzer with the stable compiler: coverage comes from LLVM's own pass, by the flags that cargo-fuzz uses without a
# sanitizer. Sanitizers need a nightly compiler; what is fuzzed here has no unsafe code of its own. Overflow and debug
# assertions are on.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
runs=${FUZZ_RUNS:-1000000}
learnt=${EMU2_CACHE:-$HOME/.cache/emu2}/fuzz
target=$(rustc -vV | sed -n 's/^host: //p')
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
RUSTFLAGS=$(tr -s ' \n' ' ' <<<"$coverage") CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
    CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true \
    cargo build --quiet --release --target "$target" --package emu2-fuzz --features libfuzzer --bins

# TARGET LONGEST-INPUT FOLDERS-OF-SEEDS…
fuzz() {
    local name=$1 longest=$2
    shift 2
    mkdir -p "$learnt/$name" "$learnt/findings"
    echo "== $name: $runs executions"
    "${CARGO_TARGET_DIR:-$here/../../target}/$target/release/fuzz-${name//_/-}" -runs="$runs" -max_len="$longest" \
        -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
        -artifact_prefix="$learnt/findings/$name-" "$learnt/$name" "$@"
}

for name in "${@:-all}"; do
    [[ $name == all || $name == picture ]] && fuzz picture 16384 "$here/seeds/picture" "$here/../fixtures/images"
    [[ $name == all || $name == request ]] && fuzz request 4096 "$here/seeds/request"
    [[ $name == all || $name == tensor ]] && fuzz tensor 1024 "$here/seeds/tensor"
    [[ $name == all || $name == cache_value ]] && fuzz cache_value 1024 "$here/seeds/cache_value"
done
exit 0

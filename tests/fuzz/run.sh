#!/usr/bin/env bash
# Fuzzes every target, or those named, for FUZZ_RUNS executions each (a million unless said otherwise), and stops. Each
# target ends with a line: what was executed and how fast, the edges of the code that inputs have reached, the inputs
# kept for that and how many of them are new, the slowest input, the most memory. What a run learns stays in the cache,
# so that the next one goes on from there. A finding ends its target: the input is kept, and the exit status is 1 after
# the last target.
#
# libFuzzer with the stable compiler: coverage comes from LLVM's own pass, by the flags that cargo-fuzz uses without a
# sanitizer. Sanitizers need a nightly compiler; the code that could profit is libjpeg's C, which is not instrumented
# here: coverage does not lead into it. Overflow and debug assertions are on.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
runs=${FUZZ_RUNS:-1000000}
learnt=${EMU2_CACHE:-$HOME/.cache/emu2}/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')
binaries=${CARGO_TARGET_DIR:-$here/../../target}/$host/release

# Longest input of each target: room for every kind of header, little for pixels and payloads.
declare -A longest=([image]=4096 [request]=4096 [tensor]=1024 [cache_value]=1024)
targets=(image request tensor cache_value)
# Of one input. Seconds of a wall clock, so that a busy machine finds nothing by itself; megabytes resident, and of
# addresses: an allocation beyond them fails, which ends the process and is a finding as well.
seconds=20
resident_mib=1024
address_mib=4096

build() {
    local coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
        -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
    RUSTFLAGS=$(tr -s ' \n' ' ' <<<"$coverage") CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true \
        CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS=true \
        cargo build --quiet --release --target "$host" --package emu2-fuzz --features libfuzzer --bins
}

# Where a target's seeds lie, beside what was learnt.
seeds() {
    echo "$here/seeds/$1"
    [[ $1 != image ]] || echo "$here/../fixtures/images"
}

fuzz() {
    local name=$1 log=$learnt/$1.log status=0
    local binary=$binaries/fuzz-${name//_/-} corpus=$learnt/$name
    mkdir -p "$corpus" "$learnt/findings"
    local before
    before=$(count "$corpus")
    mapfile -t given < <(seeds "$name")
    (
        ulimit -v $((address_mib * 1024))
        exec "$binary" -runs="$runs" -max_len="${longest[$name]}" -timeout=$seconds -rss_limit_mb=$resident_mib \
            -print_final_stats=1 -artifact_prefix="$learnt/findings/$name-" "$corpus" "${given[@]}"
    ) >"$log" 2>&1 || status=$?
    report "$name" "$log" "$before"
    # libFuzzer's own status after Ctrl-C and SIGTERM: what it has learnt is kept.
    ((status != 72)) || exit 130
    ((status == 0)) || tell "$name" "$log" "$binary"
    return $status
}

count() {
    find "$1" -type f | wc -l
}

report() {
    awk -v name="$1" -v kept="$(count "$learnt/$1")" -v before="$3" '
        { for (i = 1; i < NF; i++) if ($i == "cov:") edges = $(i + 1) }
        /^stat::/ { stat[$1] = $2 }
        END {
            printf "%-12s %9d executions, %6d/s, %6d edges, %5d inputs (%d new), slowest %d s, %d MB\n", name,
                stat["stat::number_of_executed_units:"], stat["stat::average_exec_per_sec:"], edges, kept,
                kept - before, stat["stat::slowest_unit_time_sec:"], stat["stat::peak_rss_mb:"]
        }' "$2"
}

tell() {
    local name=$1 log=$2 binary=$3 input
    input=$(sed -n 's/.*Test unit written to //p' "$log" | tail -n 1)
    echo "$name: FOUND"
    grep -m 1 -A 2 -e 'panicked at' -e '^==[0-9]*== *ERROR' -e '^ALARM' "$log" || tail -n 5 "$log"
    echo "    input:  ${input:-none; see $log}"
    [[ -z $input ]] || echo "    replay: $binary $input"
    echo "    once it is mended: copy the input to tests/fuzz/seeds/$name, where \`make test\` replays it"
}

build
found=0
(($#)) || set -- "${targets[@]}"
for name; do
    [[ -n ${longest[$name]:-} ]] || { echo "no target $name; there are: ${targets[*]}" >&2; exit 2; }
    fuzz "$name" || found=1
done
exit $found

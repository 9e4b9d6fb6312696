#!/usr/bin/env bash
# Four service processes and Redis on this machine's loopback, until Ctrl-C: run.sh BIN_DIR MODEL_DIR [NAME…]
# The model is served under the names given, or as what its folder calls itself.
# Ports are the services' defaults: router 50051, encoder 50052, llm 50053, decoder 50054; metrics 1000 above.
set -euo pipefail
bin=$1 model_dir=$(realpath "$2")
names=("${@:3}")
if [ ${#names[@]} = 0 ]; then
    names=("$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1])).get("name", "emu2"))' "$model_dir/config.json")")
fi
cores=$(($(nproc) / 3 > 0 ? $(nproc) / 3 : 1))
config=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$config"' EXIT

for stage in encoder llm decoder; do
    printf 'model_dir = "%s"\ncores = %s\n' "$model_dir" "$cores" >"$config/$stage.toml"
    "$bin/emu2-$stage" --config "$config/$stage.toml" &
done
redis-server --port 56379 --bind 127.0.0.1 --save "" --dir "$config" >"$config/redis.log" &
for name in "${names[@]}"; do
    cat <<EOF
[[models]]
name = "$name"
encoder = ["http://127.0.0.1:50052"]
llm = ["http://127.0.0.1:50053"]
decoder = ["http://127.0.0.1:50054"]

EOF
done >"$config/router.toml"
cat >>"$config/router.toml" <<EOF
[cache]
redis_url = "redis://127.0.0.1:56379"
EOF
"$bin/emu2-router" --config "$config/router.toml" &
# The first that ends, ends all.
wait -n

#!/usr/bin/env bash
# `make bench-router` compares with nginx and starts real Redis servers: install Debian's where they are absent.
set -euo pipefail
PATH=$PATH:/usr/sbin
"$(dirname "$0")/../../deploy/redis/install.sh"
command -v nginx >/dev/null && exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update --quiet=2
    # The package would start a server; the bench starts its own.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install --quiet=2 --yes --no-install-recommends nginx-light
else
    echo "the bench needs nginx; install it with: sudo apt-get install nginx-light" >&2
    exit 1
fi

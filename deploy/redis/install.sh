#!/usr/bin/env bash
# The tests run against a real redis-server: install Debian's when it is absent.
set -euo pipefail
command -v redis-server >/dev/null && exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update --quiet=2
    # The package would start a server; the tests start their own.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install --quiet=2 --yes --no-install-recommends redis-server
else
    echo "the tests need redis-server; install it with: sudo apt-get install redis-server" >&2
    exit 1
fi

#!/usr/bin/env bash
# A server that the tests or the bench start, from Debian's package where it is absent: package.sh PROGRAM PACKAGE
set -euo pipefail
program=$1 package=$2
# Debian keeps some servers there, out of an ordinary user's PATH.
PATH=$PATH:/usr/sbin
command -v "$program" >/dev/null && exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    apt-get update --quiet=2
    # The package would start a server; we start our own.
    DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install --quiet=2 --yes --no-install-recommends "$package"
else
    echo "$program is needed; install it with: sudo apt-get install $package" >&2
    exit 1
fi

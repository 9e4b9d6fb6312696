#!/usr/bin/env python3
"""Fetch the drawings that scenes are composed of into the cache: `drawings.py` prints their folder.

They are emoji sets that npm packages carry as SVG, and the names of emoji in English:

    noto                Apache-2.0   Noto Emoji, Google
    fluent-emoji-flat   MIT          Fluent Emoji, Microsoft
    emojibase           MIT          names and tags, Miles Johnson
    twemoji             CC-BY-4.0    Twemoji, Twitter: with --unseen only; a style to measure with, never to train on
                                     and not shipped

Pinned by version and by the hash of the package; the npm client fetches them.
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from wheel import cache

# (name in the cache, package, sha256 of the package, files to keep: name in the package -> suffix in the cache)
ICONS = {"package/icons.json": ".icons.json", "package/chars.json": ".chars.json"}
PACKAGES = [
    (
        "noto",
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ICONS,
    ),
    (
        "fluent-emoji-flat",
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ICONS,
    ),
    (
        "emojibase",
        "emojibase-data@17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        {"package/en/data.json": ".json"},
    ),
]
UNSEEN = (
    "twemoji",
    "@iconify-json/twemoji@1.2.5",
    "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ICONS,
)


def main():
    home = cache() / "drawings"
    home.mkdir(parents=True, exist_ok=True)
    for name, package, sha256, files in PACKAGES + ([UNSEEN] if "--unseen" in sys.argv[1:] else []):
        if not all((home / (name + suffix)).is_file() for suffix in files.values()):
            fetch(package, sha256, {member: home / (name + suffix) for member, suffix in files.items()})
    print(home)


def fetch(package, sha256, files):
    print(f"fetching {package}", file=sys.stderr, flush=True)
    home = next(iter(files.values())).parent
    with tempfile.TemporaryDirectory(dir=home, prefix=".fetch-") as aside:
        # fmt: off
        subprocess.run(
            ["npm", "pack", "--silent", "--pack-destination", aside, package],
            check=True,
            stdout=sys.stderr,
        )
        # fmt: on
        (archive,) = Path(aside).glob("*.tgz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            sys.exit(f"{package} has sha256 {found}, not {sha256}")
        with tarfile.open(archive) as members:
            for member, target in files.items():
                whole = Path(aside) / target.name
                whole.write_bytes(members.extractfile(member).read())
                whole.rename(target)


if __name__ == "__main__":
    main()

"""Download a Python wheel by hash, for the files in it; and where the project's cache is."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# pip takes the tags as given, without their older equivalents: the wheels that the project reads carry these.
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_25_x86_64", "manylinux2014_x86_64"]


def cache():
    return Path(os.environ.get("EMU2_CACHE") or Path.home() / ".cache" / "emu2").absolute()


def download(requirement, sha256, aside):
    """The wheel of an exact requirement (`name==version`) under the folder `aside`; pip refuses any other hash."""
    print(f"fetching {requirement}", file=sys.stderr, flush=True)
    folder = Path(tempfile.mkdtemp(dir=aside))
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # fmt: off
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
            "--progress-bar", "on" if sys.stderr.isatty() else "off",
            "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--abi", "none",
            *(word for tag in PLATFORMS for word in ("--platform", tag)),
            "--dest", folder, "--requirement", requirements,
        ],
        check=True,
        stdout=sys.stderr,
    )
    # fmt: on
    (wheel,) = folder.glob("*.whl")
    return wheel

#!/usr/bin/env python3
"""Fetch libtorch 2.11.0 (CPU) for tch 0.24 and link it into the tree as `.libtorch`.

There is no CPU-only wheel of PyTorch 2.11 for Linux, so three wheels of the CUDA build are downloaded by
hash and only the members that a CPU build links are kept (499 MB). The result lives in a cache outside the
clone, beside the cargo target folder, so that binaries find it by a relative rpath and a second clone
downloads nothing:

    $EMU2_CACHE (default ~/.cache/emu2)/libtorch-2.11.0/{lib,include,build-version}
    $EMU2_CACHE/target/                  cargo's output (see the Makefile)

Idempotent (the folder's presence is the stamp), atomic (built aside, then renamed), Python standard library
only.
"""

import platform
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import wheel
from wheel import cache

VERSION = "2.11.0"

# (requirement, sha256 of the wheel, members to keep: name in the wheel -> name in the result).
# A member that ends in "/" is a folder and is kept whole.
WHEELS = [
    (
        "torch==2.11.0",
        "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
        {
            "torch/lib/libtorch_cpu.so": "lib/libtorch_cpu.so",
            "torch/lib/libc10.so": "lib/libc10.so",
            "torch/lib/libgomp.so.1": "lib/libgomp.so.1",
            "torch/include/": "include/",
        },
    ),
    (
        "nvidia-cuda-runtime==13.0.96",
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
        {"nvidia/cu13/lib/libcudart.so.13": "lib/libcudart.so.13"},
    ),
    (
        "nvidia-cuda-cupti==13.0.85",
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
        {"nvidia/cu13/lib/libcupti.so.13": "lib/libcupti.so.13"},
    ),
]


def main():
    refuse_unsupported_platforms()
    home = cache() / f"libtorch-{VERSION}"
    if not home.is_dir():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".libtorch-") as aside:
            build(Path(aside))
            try:
                (Path(aside) / "libtorch").rename(home)
            except OSError:
                # Another fetch won the race; its result is the same bytes.
                if not home.is_dir():
                    raise
    link(home)


def refuse_unsupported_platforms():
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        sys.exit(f"emu2 needs Linux on x86_64; this is {platform.system()} on {platform.machine()}")
    name, version = platform.libc_ver()
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 28):
        sys.exit(f"emu2 needs glibc 2.28 or newer; this is {name or 'another libc'} {version}")
    if sys.version_info < (3, 9):
        sys.exit(f"emu2 needs Python 3.9 or newer; this is {platform.python_version()}")
    if not (cache() / f"libtorch-{VERSION}").is_dir() and shutil.disk_usage(cache_parent()).free < 2 * 2**30:
        sys.exit(f"emu2 needs 2 GiB free under {cache()} to unpack libtorch")


def cache_parent():
    """The nearest folder of the cache's path that exists."""
    return next(path for path in [cache(), *cache().parents] if path.is_dir())


def build(aside):
    out = aside / "libtorch"
    for requirement, sha256, members in WHEELS:
        unpack(wheel.download(requirement, sha256, aside), members, out)
    # The real libtorch.so only drags in libtorch_cuda; a linker script serves the same `-ltorch`.
    (out / "lib" / "libtorch.so").write_text("INPUT(-ltorch_cpu)\n")
    (out / "lib" / "libgomp.so").symlink_to("libgomp.so.1")
    (out / "build-version").write_text(VERSION + "\n")


def unpack(path, members, out):
    with zipfile.ZipFile(path) as archive:
        for name in (name for name in archive.namelist() if not name.endswith("/")):
            for kept, target in members.items():
                if name == kept or (kept.endswith("/") and name.startswith(kept)):
                    member = out / (target + name[len(kept) :])
                    member.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as source, open(member, "wb") as destination:
                        shutil.copyfileobj(source, destination, 1 << 20)
    path.unlink()
    missing = [target for target in members.values() if not (out / target).exists()]
    if missing:
        sys.exit(f"{path.name} does not hold {', '.join(missing)}")


def link(home):
    tree = Path(__file__).resolve().parents[2] / ".libtorch"
    if tree.is_symlink() and tree.readlink() == home:
        return
    tree.unlink(missing_ok=True)
    tree.symlink_to(home)


if __name__ == "__main__":
    main()

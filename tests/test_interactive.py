"""The figures that one can touch, in a real browser: they compute what the library computes."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bs4 import BeautifulSoup
from PIL import Image

from tools import notebooks
from vlm_course.appendix import interactive
from vlm_course.appendix.files import data_folder
from vlm_course.foundations import augmentation
from vlm_course.foundations.images import load, to_float, to_uint8
from vlm_course.generation.gan import load_generator
from vlm_course.generation.stylegan import principal_directions
from vlm_course.self_supervised.contrastive import info_nce, nt_xent, unit

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="no chromium on the PATH, and none named by CHROMIUM"
)


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests of this file."""
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Show a figure with the network closed; complaints of the page and requests fail the test."""
    contexts, complaints = [], []

    def show(figure, *, width: int = 900, live: bool = True, **options):
        figure.save(tmp_path / "figure.html")
        context = browser.new_context(
            viewport={"width": width, "height": 800}, java_script_enabled=live, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.extend([m.text] * (m.type == "error")))
        page.on("request", lambda request: complaints.append(request.url[:80]))
        page.goto((tmp_path / "figure.html").as_uri())
        if live:
            page.wait_for_selector(".vlm-touch.live")
        return page

    yield show
    for context in contexts:
        context.close()
    assert [text for text in complaints if not text.startswith(("file:", "data:image/"))] == []


# ---------------------------------------------------------------------------------- the figures


@lru_cache
def photograph(side: int = 160) -> torch.Tensor:
    """A photograph (3, side, side) that ships."""
    photos = load("photos", size=side, split="all")
    return photos.where(file="animals/scarlet_macaw.webp").images[0]


@lru_cache
def augmentations() -> interactive.Interactive:
    """The augmentation explorer."""
    photo = photograph()
    still = photo.expand(4, -1, -1, -1)
    return interactive.augmentation_explorer(photo, still=still, alt="A parrot, four times.")


def embeddings() -> torch.Tensor:
    """Two views of six pictures, (2, 6, 4)."""
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).double()


@lru_cache
def temperatures(kind: str = "info_nce") -> interactive.Interactive:
    """The temperature of InfoNCE, or of NT-Xent, where nothing is its own candidate."""
    first, second = embeddings()
    if kind == "nt_xent":
        first = second = torch.cat([first, second])
    cosines, partners = unit(first) @ unit(second).T, torch.arange(len(first))
    if kind == "nt_xent":
        cosines.fill_diagonal_(torch.nan)
        partners = partners.roll(6)
    grey = torch.full((len(first), 3, 8, 8), 0.5)
    return interactive.temperature_explorer(cosines, partners=partners, queries=grey, keys=grey)


def attention_weights() -> torch.Tensor:
    """Random attention of two blocks of three heads on 4 x 4 patches."""
    logits = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return (2 * logits).softmax(-1)


@lru_cache
def attention() -> interactive.Interactive:
    """The attention viewer."""
    return interactive.attention_viewer(
        photograph(64), attention_weights(), query=5, alt="A parrot, and three spotlights."
    )


@lru_cache
def latents() -> interactive.Interactive:
    """Twelve flat colours to walk on: red tells the row and green the column."""
    pictures = torch.zeros(3, 4, 3, 16, 16, dtype=torch.uint8)
    pictures[:, :, 0] = torch.tensor([0, 100, 200])[:, None, None, None]
    pictures[:, :, 1] = torch.tensor([0, 80, 160, 240])[:, None, None]
    return interactive.latent_explorer(pictures, names=("red", "green"), alt="Twelve colours.")


FIGURES = {
    "augmentation": augmentations,
    "temperature": temperatures,
    "attention": attention,
    "latent": latents,
}


def in_notebooks() -> dict[str, str]:
    """The HTML of every figure that a notebook holds, by notebook and cell."""
    return {
        f"{notebooks.relative(path)}, cell {number}": output.data["text/html"]
        for path in notebooks.all_notebooks()
        for number, cell in notebooks.code_cells(notebooks.read(path))
        for output in cell.outputs
        if "vlm-touch" in output.get("data", {}).get("text/html", "")
    }


def pixels(page, index: int = 0) -> torch.Tensor:
    """What a canvas shows, (3, H, W) uint8."""
    canvas = page.locator("canvas").nth(index)
    url = canvas.evaluate("(canvas) => canvas.toDataURL()")  # PNG, without loss
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def move(page, **values: float) -> None:
    """Set sliders by their labels, as a hand would."""
    for label, value in values.items():
        page.get_by_label(label.replace("__", ": ").replace("_", " "), exact=True).fill(str(value))
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


# ------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_one_small_piece(name):
    figure = FIGURES[name]()
    assert figure.html == FIGURES[name].__wrapped__().html == figure._repr_html_()
    assert len(figure.html.encode()) <= interactive.LIMIT
    body = BeautifulSoup(figure.html, "html.parser")
    assert body.find("img")["alt"].strip() and body.find("figcaption").get_text().strip()
    sources = [tag["src"] for tag in body.find_all(src=True)]
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert "eval(" not in figure.html and "http" not in figure.html


@needs_browser
@pytest.mark.parametrize("name", FIGURES)
def test_figure_shows_a_picture_without_its_script(name, opened):
    page = opened(FIGURES[name](), live=False, width=360)
    still = page.locator(".still img")
    assert still.is_visible() and still.bounding_box()["height"] > 20
    assert page.locator("input, select, button, canvas").count() == 0


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_usable_on_a_telephone(name, scheme, opened):
    page = opened(FIGURES[name](), width=360, has_touch=True, color_scheme=scheme)
    assert not page.locator(".still").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for control in page.locator("input, select, button").all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, canvas, img")].filter((node) =>
            !(node.labels?.length || node.getAttribute("aria-label") || node.alt)).length"""
    )
    assert unnamed == 0
    axe = Path(__file__).with_name("assets") / "axe-core" / "axe.min.js"
    if axe.exists():
        page.evaluate(axe.read_text("utf-8"))
        found = page.evaluate("axe.run('.vlm-touch')")["violations"]
        serious = [f["id"] for f in found if f["impact"] in ("serious", "critical")]
        assert serious == [], json.dumps(found, indent=1)[:3000]


@needs_browser
@pytest.mark.parametrize("name", FIGURES)
def test_figure_obeys_the_keyboard(name, opened):
    page = opened(FIGURES[name]())
    said = page.get_by_role("status").text_content()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "range":
            break
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "(text) => document.querySelector('[role=status]').textContent !== text", arg=said
    )


@needs_browser
def test_figures_of_the_notebooks_come_alive(browser, tmp_path):
    found = in_notebooks()
    assert found
    for place, html in found.items():
        assert len(html.encode()) <= interactive.LIMIT, place
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    (tmp_path / "all.html").write_text("<!doctype html>" + "".join(found.values()), "utf-8")
    page.goto((tmp_path / "all.html").as_uri())
    page.wait_for_function(
        "(n) => document.querySelectorAll('.vlm-touch.live').length === n", arg=len(found)
    )
    assert errors == []
    page.close()


# --------------------------------------------------------------------------------- augmentation


def by_the_library(photo: torch.Tensor, p: dict, *, kernel: int = 17) -> torch.Tensor:
    """The photograph (3, S, S) uint8, changed by the transforms with these parameters."""
    side, names = photo.shape[1], augmentation.ColorJitter.names
    colours = {name: float(p[name]) for name in names}
    steps = [  # whether anything changes, the transform, its draw
        (p["crop"]["height"] < side, augmentation.RandomResizedCrop(side), p["crop"]),
        (p["angle"], augmentation.RandomRotation(180), {"angle": float(p["angle"])}),
        (
            list(colours.values()) != [1, 1, 1, 0],
            augmentation.ColorJitter(2.0, 2.0, 2.0, 0.5),
            colours | {"order": [0, 1, 2, 3]},
        ),
        (p["sigma"], augmentation.GaussianBlur(kernel), {"sigma": p["sigma"]}),
        (p["threshold"] <= 1, augmentation.RandomSolarize(p["threshold"]), {}),
        (True, augmentation.Cutout(1), p["hole"]),
    ]
    image = to_float(photo[None])
    for _, transform, draw in filter(lambda step: step[0], steps):
        rows = {name: torch.as_tensor(value)[None] for name, value in draw.items()}
        rows |= {"size": (side, side), "chosen": torch.tensor([True])}
        image = transform.apply_images(image, rows)
    return to_uint8(image)[0]


CHANGES = {
    "nothing": {},
    "crop": {"crop__share": 0.3, "crop__down": 0.2, "crop__across": 0.9},
    "smallest crop": {"crop__share": 0.08, "crop__down": 1, "crop__across": 0},
    "rotation": {"rotation": 33},
    "turned round": {"rotation": -180},
    "brightness": {"brightness": 1.6},
    "contrast": {"contrast": 0.25},
    "saturation": {"saturation": 2},
    "no colours": {"saturation": 0},
    "hue": {"hue": 0.31},
    "hue backwards": {"hue": -0.5},
    "blur": {"blur__sigma": 2.3},
    "little blur": {"blur__sigma": 0.4},
    "solarise": {"solarise_from": 0.6},
    "cutout": {"cutout__side": 50, "cutout__down": 0.1, "cutout__across": 0.97},
    "all": {
        "crop__share": 0.5,
        "rotation": -20,
        "brightness": 1.2,
        "contrast": 1.3,
        "saturation": 0.7,
        "hue": -0.08,
        "blur__sigma": 1.2,
        "cutout__side": 40,
    },
}


@needs_browser
def test_changes_are_those_of_the_library(opened):
    page, photo = opened(augmentations()), photograph()
    neutral = {control[0].replace(": ", "__").replace(" ", "_"): control[4]
               for control in interactive.CONTROLS}  # fmt: skip
    for name, values in CHANGES.items():
        move(page, **{**neutral, **values})
        p = json.loads(page.locator(".vlm-touch").get_attribute("data-parameters"))
        shown, wanted = pixels(page, 1).int(), by_the_library(photo, p).int()
        assert (shown - wanted).abs().max() <= 1, name
        assert (shown != wanted).float().mean() < 0.01, name  # halves, rounded up or down
        assert (name == "nothing") == bool((shown == photo).all()), name


@needs_browser
def test_random_draw_and_its_undoing(opened):
    page, photo = opened(augmentations()), photograph()
    for _ in range(3):
        page.get_by_role("button", name="Draw at random").click()
        move(page, solarise_from=1.05)  # at a threshold the last bit decides
        p = json.loads(page.locator(".vlm-touch").get_attribute("data-parameters"))
        off = (pixels(page, 1).int() - by_the_library(photo, p).int()).abs().amax(0)
        assert off.max() <= 1
    page.get_by_role("button", name="Change nothing").click()
    assert torch.equal(pixels(page, 1), photo)
    assert page.get_by_role("status").text_content() == "nothing changed"


# ---------------------------------------------------------------------------------- temperature


def table(page) -> torch.Tensor:
    """The numbers behind the cells."""
    rows = page.locator("tbody tr").all()
    cells = [[cell.get_attribute("data-value") for cell in row.locator("td").all()] for row in rows]
    return torch.tensor([[float(v) if v != "null" else 0.0 for v in row] for row in cells])


@needs_browser
@pytest.mark.parametrize("kind", ["info_nce", "nt_xent"])
def test_loss_probabilities_and_gradient_are_those_of_the_library(kind, opened):
    page = opened(temperatures(kind))
    first, second = embeddings()
    for exponent in (-2, -1.3, -0.7, 0, 1):
        tau = 10**exponent
        move(page, temperature_τ=exponent)
        shown = float(page.locator(".vlm-touch").get_attribute("data-loss"))
        loss = {"info_nce": info_nce, "nt_xent": nt_xent}[kind](first, second, temperature=tau)
        assert shown == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
        cosines = unit(first) @ unit(second).T
        labels = torch.arange(len(cosines))
        if kind == "nt_xent":
            both = unit(torch.cat([first, second]))
            cosines, labels = (both @ both.T).fill_diagonal_(-torch.inf), torch.arange(12).roll(6)
        cosines.requires_grad_()
        summed = F.cross_entropy(cosines / tau, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(summed, cosines)
        for view, wanted in (("probability", (cosines / tau).softmax(1)), ("pull", gradient)):
            page.get_by_label(view).check()
            assert torch.allclose(table(page), wanted.detach().float(), atol=2e-4, rtol=1e-4), tau


@needs_browser
def test_text_is_legible_on_every_shade(opened):
    page = opened(temperatures())
    worst = page.evaluate(
        """() => {
            const light = (rgb) => {
              const [r, g, b] = rgb.match(/\\d+/g).map((v) => v / 255).map((v) =>
                v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
              return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const ratios = [...document.querySelectorAll("tbody td")].map((cell) => {
              const style = getComputedStyle(cell);
              const [a, b] = [light(style.color), light(style.backgroundColor)];
              return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            });
            return Math.min(...ratios);
        }"""
    )
    assert worst >= 4.5


# ------------------------------------------------------------------------- attention and latents


def brightness_of_patches(shown: torch.Tensor, photo: torch.Tensor) -> torch.Tensor:
    """How bright each of 4 x 4 patches is, relative to the photograph; (16,)."""
    side = photo.shape[1] // 4
    both = [F.avg_pool2d(picture.float()[None], side)[0].sum(0) for picture in (shown, photo)]
    return (both[0] / both[1]).flatten()


@needs_browser
def test_heads_look_where_their_weights_are(opened):
    page, weights = opened(attention(), has_touch=True), attention_weights()
    photo = pixels(page, 0)
    page.get_by_label("Attention in").select_option("block 2")
    map_, box = page.locator("canvas").first, page.locator("canvas").first.bounding_box()
    map_.tap(position={"x": box["width"] * 0.9, "y": box["height"] * 0.6})
    assert "row 3, column 4." in page.get_by_role("status").text_content()
    for head in range(3):
        row = weights[1, head, 11]
        seen = brightness_of_patches(pixels(page, 1 + head), photo)
        wanted = interactive.DIM + (1 - interactive.DIM) * row / row.max()
        elsewhere = [k for k in range(16) if k not in (5, 11)]  # frames are there
        assert (seen - wanted)[elsewhere].abs().max() < 0.03
        best = page.locator("canvas").nth(1 + head).get_attribute("aria-label")
        place = f"row {row.argmax() // 4 + 1}, column {row.argmax() % 4 + 1}"
        assert place in best and f"{round(100 * row.max().item())} %" in best
    map_.hover(position={"x": box["width"] * 0.1, "y": box["height"] * 0.1})
    assert "row 1, column 1." in page.get_by_role("status").text_content()


@needs_browser
def test_still_picture_of_attention_is_what_the_script_draws(opened):
    page, photo = opened(attention()), photograph(64)
    relative = interactive._relative(attention_weights())[0, :, 5] / 255
    still = to_uint8(interactive._spotlights(photo / 255, relative, 5))
    for k in range(4):
        off = (still[k].int() - pixels(page, k).int()).abs().float()
        assert off.mean() < 6  # one is lossy, the frames differ by their corners


@needs_browser
def test_walk_shows_the_picture_of_its_place(opened):
    page = opened(latents(), has_touch=True)
    map_, box = page.locator("canvas").first, page.locator("canvas").first.bounding_box()
    for i, j in ((0, 0), (2, 3), (1, 2)):
        position = {"x": box["width"] * (j + 0.5) / 4, "y": box["height"] * (i + 0.5) / 3}
        map_.tap(position=position)
        red, green, _ = pixels(page, 1).float().mean((1, 2))
        assert abs(red - 100 * i) < 12 and abs(green - 80 * j) < 12
        assert page.get_by_role("status").text_content() == f"red {i + 1}, green {j + 1}"
    move(page, red=1, green=2)
    assert json.loads(page.locator(".vlm-touch").get_attribute("data-place")) == [0, 1]


def drawn_faces() -> torch.Tensor:
    """What the generator that ships draws at the 7 x 7 places of the page's walk, uint8."""
    generator = load_generator(data_folder("runs") / "stylegan_emoji_64")
    label = torch.tensor([generator.classes.index("smileys-emotion fluent3d")])
    directions, deviations = principal_directions(generator, labels=label)
    rows = []
    for first in (-3, -2, -1, 0, 1, 2, 3):
        for second in (-3, -2, -1, 0, 1, 2, 3):
            style = generator.mapping.means()[label[0]].clone()
            style += first / 1.5 * deviations[0] * directions[0]
            style += second / 1.5 * deviations[1] * directions[1]
            rows.append(style.expand(generator.num_layers, -1))
    with torch.no_grad():
        return to_uint8((generator.synthesis(torch.stack(rows)) / 2 + 0.5).clamp(0, 1))


@needs_browser
def test_walk_through_the_generator_shows_what_it_draws(opened):
    """Each place: its own picture and no other's, up to what WebP loses, in words as well."""
    (html,) = [html for html in in_notebooks().values() if '"direction 1"' in html]
    page, drawn = opened(interactive.Interactive("walk", html)), drawn_faces()
    said = page.get_by_role("status")
    for place, picture in enumerate(drawn):
        move(page, direction_1=place // 7 + 1, direction_2=place % 7 + 1)
        off = (pixels(page, 1).int() - drawn.int()).abs().float().mean((1, 2, 3))
        assert off.argmin() == place and off[place] < 6  # of 255, on average
        words = said.text_content()
        covered = 100 * (picture.amin(0) < 0.85 * 255).float().mean().item()
        assert abs(int(words.rpartition(" covered")[0].split()[-1].rstrip("%")) - covered) < 1
        assert page.locator("canvas").nth(1).get_attribute("aria-label").endswith(words)
    page.get_by_label("direction 1", exact=True).focus()
    page.keyboard.press("Home")
    assert said.text_content().startswith("direction 1 −2.0 σ, direction 2 +2.0 σ: ")


@needs_browser
def test_walk_without_scripts_shows_every_picture(opened):
    (html,) = [html for html in in_notebooks().values() if '"direction 1"' in html]
    page = opened(interactive.Interactive("walk", html), live=False)
    still = page.locator(".still img")
    assert still.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [448, 448]
    assert "faces" in still.get_attribute("alt")


def test_texts_are_one_a_picture():
    with pytest.raises(ValueError, match=r"texts must be 1 rows of 2; got \[1\]"):
        interactive.latent_explorer(torch.zeros(1, 2, 3, 8, 8), alt="x", texts=[["one"]])

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_sample import make_source, page_of

from phalanx.errors import CorruptError
from phalanx.report import Page, render_html, to_json
from phalanx.report.gallery import card, read_gallery, side


def columns(count: int = 3, shape: tuple[int, int, int] = (1, 8, 8), **changes: Any) -> dict[str, Any]:
    """Images of one value each, the first held, the others broken; two gates."""
    x = np.full((count, *shape), 0.5, dtype=np.float32)
    x_adv = x.copy()
    x_adv[:, 0, 0, 0] += 0.125
    return {
        "x": x,
        "x_adv": x_adv,
        "y": np.full(count, 3),
        "ids": np.arange(count) + 40,
        "predicted": np.array([3, *[5] * (count - 1)]),
        "held": np.array([True, *[False] * (count - 1)]),
        "attack": np.array(["pgd-50"] * count),
        "before": np.zeros((count, 2), dtype=np.int64),
        "after": np.ones((count, 2), dtype=np.int64),
        "gates": np.array(["standard", "robust"]),
        **changes,
    }


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "gallery.npz"
    np.savez_compressed(path, **columns(**changes))
    return path


def shown(tmp_path: Path, rows: int = 1, **changes: Any) -> Page:
    sources = [make_source(tmp_path, f"AT{number}") for number in range(rows)]
    for source in sources:
        written(source.evaluation, **changes)
    return page_of(*sources)


def pixels(address: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_a_card_shows_the_clean_image_the_enlarged_perturbation_and_the_attacked_image(tmp_path: Path) -> None:
    gallery = read_gallery(written(tmp_path))
    assert gallery is not None and [kept.sample for kept in gallery.images] == [41, 42, 40]
    found = card(gallery, gallery.images[0], tuple("0123456789"), 96)
    assert found.became == "3 → 5" and not found.held and found.enlarged == "×4"
    assert found.experts == "standard: expert 0 → 1, robust: expert 0 → 1"
    clean, perturbation, attacked = (pixels(address) for _, address in found.pictures)
    assert (clean == 128).all()
    assert perturbation[0, 0] == 255 and (perturbation.ravel()[1:] == 128).all()
    assert attacked[0, 0] == round(0.625 * 255) and (attacked.ravel()[1:] == 128).all()
    assert [says for says, _ in found.pictures] == [
        "image 41, clean: 3",
        "the perturbation of image 41, enlarged ×4",
        "image 41 after pgd-50: answered 5",
    ]


def test_without_a_perturbation_nothing_is_enlarged(tmp_path: Path) -> None:
    same = columns()["x"]
    gallery = read_gallery(written(tmp_path, x_adv=same))
    assert gallery is not None
    found = card(gallery, gallery.images[0], (), 96)
    assert found.enlarged == "" and found.pictures[1][0] == "no perturbation of image 41"
    assert (pixels(found.pictures[1][1]) == 128).all() and found.became == "3 → 5"


def test_large_images_are_made_smaller_by_whole_squares(tmp_path: Path) -> None:
    gallery = read_gallery(written(tmp_path, shape=(3, 224, 200)))
    assert gallery is not None
    found = card(gallery, gallery.images[0], (), 96)
    assert pixels(found.pictures[0][1]).shape == (74, 66, 3)


def test_many_rows_show_smaller_pictures_and_fewer(tmp_path: Path) -> None:
    gallery = read_gallery(written(tmp_path, count=12, shape=(3, 96, 96)))
    assert gallery is not None
    assert side(1, [gallery]) > side(13, [gallery] * 13) >= 24
    assert len(gallery.images) == 12


def test_the_page_stays_small_however_noisy_the_images(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((12, 3, 64, 64), dtype=np.float32)
    page = shown(tmp_path, 4, count=12, x=noise, x_adv=1 - noise)
    text = render_html(page)
    taken = sum(map(len, re.findall(r'src="(data:[^"]*)"', text)))
    assert 100_000 < taken < 600_000
    assert text == render_html(page)


def test_the_page_shows_the_images_with_a_text_each(tmp_path: Path) -> None:
    page = shown(tmp_path)
    text = render_html(page)
    found = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)">', text)
    assert len(found) == 9 and all(found)
    assert '<li class="broken">' in text and '<li class="held">' in text
    kept = to_json(page)["rows"][0]["gallery"]
    assert json.loads(json.dumps(kept))[0] == {
        "sample": 41, "label": 3, "predicted": 5, "held": False, "attack": "pgd-50", "before": [0, 0], "after": [1, 1],
    }  # fmt: skip


def test_no_file_no_gallery(tmp_path: Path) -> None:
    assert read_gallery(tmp_path / "gallery.npz") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": np.arange(2)},
        {"x": np.zeros((3, 8, 8), dtype=np.float32)},
        {"x": np.full((3, 1, 8, 8), 2, dtype=np.float32)},
        {"x": np.full((3, 1, 8, 8), np.nan, dtype=np.float32)},
        {"x_adv": np.zeros((3, 1, 8, 9), dtype=np.float32)},
        {"x_adv": np.zeros((3, 1, 8, 8))},
        {"before": np.zeros((3, 1), dtype=np.int64)},
        {"attack": np.array([{}, 1, 2], dtype=object)},
        {"y": np.array(["a", "b", "c"])},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"gallery\.npz cannot be read"):
        read_gallery(written(tmp_path, **changes))


def test_a_file_that_is_none_and_one_that_unpacks_to_too_much_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gallery.npz"
    path.write_bytes(b"PK nothing")
    with pytest.raises(CorruptError):
        read_gallery(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x.npy", bytes(300 << 20))
    with pytest.raises(CorruptError, match="unpacks to more"):
        read_gallery(path)

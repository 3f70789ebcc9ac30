from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from data_samples import encoded, noise


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PHALANX_CACHE", str(folder))
    return folder


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder({"train/cats": 3, "train/dogs": 2}) writes that many different grey 6x5 PNG files."""

    def make(counts: dict[str, int], height: int = 5, width: int = 6, channels: tuple[int, ...] = ()) -> Path:
        root = tmp_path / "pictures"
        for number, (name, count) in enumerate(counts.items()):
            folder = root / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise(1000 * number + index, height, width, *channels)
                (folder / f"{index:03}.png").write_bytes(encoded(pixels))
        return root

    return make


@pytest.fixture
def make_parquet(tmp_path: Path) -> Callable[..., Path]:
    """make_parquet("train.parquet", images, labels, names) writes one file into tmp_path/"set"."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def make(
        name: str,
        images: Sequence[bytes | None],
        labels: Sequence[int | None],
        class_names: Sequence[str] | None = ("cat", "dog"),
        columns: tuple[str, str] = ("img", "label"),
    ) -> Path:
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        structs = [None if data is None else {"bytes": data, "path": "x.png"} for data in images]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table(
            {
                columns[0]: pa.array(structs, kind),
                columns[1]: pa.array(labels, pa.int64()),
                "other": list(labels),
            }
        )
        if class_names is not None:
            features = {columns[1]: {"names": list(class_names), "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / name, row_group_size=7)
        return folder

    return make

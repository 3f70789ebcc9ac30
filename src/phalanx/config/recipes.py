"""Recipes: those that come with the package, and files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from phalanx.config.run import RunConfig
from phalanx.config.study import ReproductionConfig, StudyConfig
from phalanx.errors import InputError
from phalanx.loading import Loaded, load_recipe, read_text


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("phalanx") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_reproductions() -> dict[str, Path]:
    """The papers' tables that come with the package, by names such as "dual/table3"."""
    folder = Path(str(resources.files("phalanx") / "reproductions"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def load_reproduction(name: str) -> Loaded[ReproductionConfig]:
    """A paper's table by its name. Raises InputError listing what there is."""
    shipped = shipped_reproductions()
    if name not in shipped:
        raise InputError(f"no table is named {name!r}; there are {', '.join(shipped)}")
    return load_recipe(ReproductionConfig, shipped[name])


def find_recipe(name: str) -> Path:
    """A recipe by its name or by its file's path. Raises InputError listing what there is."""
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    path = Path(name)
    if name and (path.suffix in {".yaml", ".yml"} or path.exists()):
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise InputError(f"recipe {name} {what}; give a YAML file, or one of {', '.join(shipped)}")
        return path
    raise InputError(f"no recipe is named {name!r}; there are {', '.join(shipped)}, or give a path that ends in .yaml")


def is_study(path: Path) -> bool:
    """Whether a recipe describes a study: it, or one that it extends, has a top-level `runs`."""
    met: set[Path] = set()
    while path not in met:
        met.add(path)
        try:
            text = read_text(path)
            if re.search(r"^runs\s*:", text, re.MULTILINE):
                return True
            extended = re.search(r"^extends\s*:\s*([^\s#]+)", text, re.MULTILINE)
            if extended is None:
                return False
            path = find_recipe(extended[1].strip("'\""))
        except InputError:
            return False
    return False


def load_run(
    name: str, overrides: tuple[str, ...] = (), *, written: Mapping[str, str] | None = None
) -> Loaded[RunConfig]:
    """The run configuration of a recipe with `--set` overrides; `written` says where those stand that are a study's.

    Raises RecipeErrors with every mistake at once, InputError for the recipe of a study.
    """
    path = find_recipe(name)
    if is_study(path):
        raise InputError(f"{name} is a study, not one run: phalanx run {name} makes it; name one of its recipes here")
    return load_recipe(RunConfig, path, overrides, extends=_extended, written=written or {})


def load_study(name: str) -> Loaded[StudyConfig]:
    """The study of a recipe."""
    return load_recipe(StudyConfig, find_recipe(name), extends=_extended)


def _extended(name: str) -> Path:
    return find_recipe(name)

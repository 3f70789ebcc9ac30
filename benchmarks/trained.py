"""The network that the attack benchmarks attack: a ResNet-18 of width 16, adversarially trained on CIFAR-10 images.

It is trained on few images, half of each batch attacked, and evaluated on those same images: a small network then has,
within minutes on one core, the mix of robust and breakable images that a long run has on test images (90 % of the
first 512 clean, 46 % under PGD-10). The mix decides how much an attack gains by dropping broken images. As a measure of
generalisation these accuracies say nothing.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from phalanx.attacks import PGD
from phalanx.data import DataConfig, ImageSet, Splits, load_data
from phalanx.experts import build_expert
from phalanx.methods import AT
from phalanx.routing import MixtureOfExperts
from phalanx.runs import RunFolder
from phalanx.runs.checkpoint import load_tensors
from phalanx.training import LAST_NAME, Adam, OneCycle, TrainingConfig, train

WIDTH = 16
IMAGES = 2048
EPOCHS = 24

METHOD = AT(attack=PGD(eps="8/255", steps=2, step_size="5/255"), adversarial_share=0.5)
TRAINING = TrainingConfig(
    epochs=EPOCHS, batch_size=64, optimizer=Adam(lr=3e-3), schedule=OneCycle(), checkpoint_seconds=20.0
)


def chosen(settings: Any) -> str:
    """A dataclass as its call with the fields that are not at their defaults: what a trained network is bound to.

    A field added later, at a default that changes nothing, then makes no network another one.
    """
    if not is_dataclass(settings):
        return repr(settings)
    values = {field: getattr(settings, field.name) for field in fields(settings)}
    named = (f"{field.name}={chosen(value)}" for field, value in values.items() if value != _default(field))
    return f"{type(settings).__name__}({', '.join(named)})"


def _default(field: Field[Any]) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def cifar(source: Path, cache: Path) -> Splits:
    """CIFAR-10 from a folder in the Hugging Face Parquet layout; decoded images are kept in `cache`."""
    return load_data(DataConfig(name=f"parquet:{source}", train_limit=IMAGES, cache=str(cache)))


def network(data: Splits, width: int = WIDTH) -> nn.Module:
    """An untrained ResNet-18 for `data`."""
    return build_expert(
        "resnet18", num_classes=data.num_classes, image_size=data.shape[1], mean=data.mean, std=data.std, width=width
    )


def trained(source: Path, folder: Path) -> tuple[nn.Module, ImageSet]:
    """The network in evaluation mode and the images it was trained on.

    `folder` is a run folder: made on the first call (about five minutes on one core), resumed if it was
    interrupted, loaded from then on.
    """
    data = cifar(source, folder / "cache")
    model = MixtureOfExperts(None, [network(data)])
    run = RunFolder(folder / "run")
    with run.lock():
        run.prepare({"benchmark": "trained", "method": chosen(METHOD), "training": chosen(TRAINING), "width": WIDTH})
        if run.status() != "finished":
            train(model, METHOD, data, TRAINING, run, augment=("flip",))
            run.finish([LAST_NAME])
    weights, _ = load_tensors(run.resolve(LAST_NAME))
    model.load_state_dict(weights)
    return model.experts[0].eval(), data.train

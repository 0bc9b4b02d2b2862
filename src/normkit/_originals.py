"""The model's own modules, from transformers or diffusers, as judges of what load_norm made."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import FrameType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

from normkit._spec import Kind, NormSpec
from normkit.modules import HeadNorm, LayerNorm, RMSNorm
from normkit.recognition import Function, Recognition, recognise
from normkit.recognition._probe import Probe, Unknown, agreement
from normkit.recognition._screen import row_shape

Norm: TypeAlias = RMSNorm | LayerNorm | HeadNorm


NO_MODULE = "the model has no such module"


class NoOriginals(Exception):
    """Why there is no model of transformers or diffusers to compare with."""


@dataclass(frozen=True)
class Verdict:
    """What a model's own module says of a norm.

    Attributes:
        same: whether both compute the same; None where that could not be found out.
        reason: what differs, or why it is not known.
    """

    same: bool | None
    reason: str = ""


class Originals:
    """The model that a config.json describes, built on the meta device, and its modules."""

    model: nn.Module

    def __init__(self, config: Mapping[str, object]) -> None:
        """Build the model.

        Raises:
            NoOriginals: the library is not installed, does not know the family, or cannot build it.
        """
        library = "diffusers" if "_class_name" in config else "transformers"
        build = _diffusers_model if "_class_name" in config else _transformers_model
        with _quiet(), _in_time():
            try:
                _check_sizes(config)
                self.model, self._path_of = build(_as_written(config))
                self._name = f"{type(self.model).__name__} of {library} {version(library)}"
            except NoOriginals:
                raise
            except Exception as error:  # whatever a model's code raises
                text = " ".join(str(error).split())[:200]
                raise NoOriginals(f"{type(error).__name__}: {text}") from error

    def __str__(self) -> str:
        return self._name

    def judge(self, name: str, ours: Norm, kind: Kind) -> Verdict:
        """Run the module that the stored weight of that name belongs to beside ours.

        Both have the tensors of ours, and run in float32 and in the dtype that is stored.
        """
        path, _, parameter = self._path_of(name).rpartition(".")
        try:
            module = self.model.get_submodule(path)
        except AttributeError:
            return Verdict(None, NO_MODULE)
        dtype = ours.weight.dtype
        unfit = _unfit(module, parameter, ours)
        if unfit is not None:
            return Verdict(False, unfit)
        own = recognise(copy.deepcopy(module).to(dtype))
        function = own.function
        if function is None:
            return Verdict(False, f"no norm of rows: {own.reason}")
        if parameter not in (function.weight, function.bias):
            return Verdict(None, f"the model's module has no {parameter}")
        spec = NormSpec(
            kind,
            ours.eps,
            ours.weight_offset,
            ours.round_before_weight,
            ours.bias is not None,
            round_weight=ours.round_weight,
        )
        different = _differences(own, function, spec, dtype)
        if different:
            return Verdict(False, "; ".join(different))
        try:
            return _run_both(module, own, function, spec, ours)
        except Unknown as why:
            return Verdict(None, str(why))


def _unfit(module: nn.Module, parameter: str, ours: Norm) -> str | None:
    """Why the stored tensors cannot be those of the model's module, or None."""
    theirs = module._parameters.get(parameter)
    if theirs is None:
        return None
    shape = row_shape(theirs)
    if shape != row_shape(ours.weight):
        return f"its {parameter} is {shape}, not {row_shape(ours.weight)}"
    count = sum(p is not None for p in module._parameters.values())
    if count == 2 and ours.bias is None:
        return "it has a bias, and none is stored"
    if count == 1 and ours.bias is not None:
        return "it has no bias, and one is stored"
    return None


def _differences(
    own: Recognition, function: Function, spec: NormSpec, dtype: torch.dtype
) -> list[str]:
    """What of the options is another, as the model's own module was measured."""
    names = ["kind", "eps", "weight_offset"]
    if dtype != torch.float32 and dtype in own.specs:
        names += ["round_before_weight", "round_weight"]
    measured = own.specs.get(dtype, function.spec)
    pairs = [(name, getattr(measured, name), getattr(spec, name)) for name in names]
    pairs.append(("groups", own.form.groups, 1))
    return [f"{name} is {theirs}, not {used}" for name, theirs, used in pairs if theirs != used]


def _run_both(
    module: nn.Module, own: Recognition, function: Function, spec: NormSpec, ours: Norm
) -> Verdict:
    pairs = ((function.weight, ours.weight), (function.bias, ours.bias))
    stored = {name: t.detach().cpu() for name, t in pairs if name and t is not None}
    n = ours.weight.shape[-1]
    unknown = ""
    for dtype in dict.fromkeys((torch.float32, ours.weight.dtype)):
        if dtype != torch.float32 and dtype not in own.specs:
            unknown = f"not compared in {dtype}: {own.reasons[dtype]}"
            continue
        tensors = {name: t.to(dtype) for name, t in stored.items()}
        probe = Probe(module, n, own.form).with_tensors(tensors)
        share, near = agreement(probe, function, spec, dtype)
        if not near:
            return Verdict(False, f"{1 - share:.1%} of y are other numbers in {dtype}")
    return Verdict(True, unknown)


# ------------------------------------------------------------------------------- building models

_Built = tuple[nn.Module, Callable[[str], str]]


def _transformers_model(config: Mapping[str, object]) -> _Built:
    transformers = _library("transformers")
    family = config.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(family, str) or family not in known:
        raise NoOriginals(f"transformers {version('transformers')} has no family {family!r:.100}")
    settings = known[family].from_dict(dict(config))
    names = config.get("architectures")
    listed = names if isinstance(names, list) else []
    classes = map(_class_named(transformers, transformers.PreTrainedModel), listed)
    # of another family, it would not know this config
    model_class = next((c for c in classes if c and c.config_class is type(settings)), None)
    with torch.device("meta"):
        if model_class is None:
            model = transformers.AutoModel.from_config(settings, trust_remote_code=False)
        else:
            model = model_class(settings)
    return model, _loaded_name(model)


def _class_named(library: ModuleType, base: type) -> Callable[[object], Any]:
    """Find the class of a model by its name, which a file of a stranger says."""

    def find(name: object) -> type | None:
        found = getattr(library, name, None) if isinstance(name, str) else None
        return found if isinstance(found, type) and issubclass(found, base) else None

    return find


# What has models load other weights, or code of others, and what decides nothing about norms.
_LEFT_OUT = re.compile("attn_implementation|experts_implementation|pretrained|auto_map|dtype$")


def _as_written(value: Any) -> Any:
    """A config without what reaches beyond it, with numbers as transformers' JSON has them.

    JSON has no infinity, and transformers writes {"__float__": "Infinity"}.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {k: _as_written(v) for k, v in value.items() if not _LEFT_OUT.search(k)}
    return [_as_written(v) for v in value] if isinstance(value, list) else value


def _loaded_name(model: Any) -> Callable[[str], str]:
    """The name in the model of a tensor of a file, as from_pretrained finds it."""
    loading = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping")
    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    names = model.state_dict()

    def loaded(name: str) -> str:
        found: str = loading.rename_source_key(
            name, renamings, converters, model.base_model_prefix, names
        )[0]
        return found

    return loaded


def _diffusers_model(config: Mapping[str, object]) -> _Built:
    diffusers = _library("diffusers")
    model_class: Any = _class_named(diffusers, diffusers.ModelMixin)(config["_class_name"])
    if model_class is None:
        found = f"diffusers {version('diffusers')}"
        raise NoOriginals(f"{found} has no {config['_class_name']!r:.100}")
    with torch.device("meta"):
        return model_class.from_config(dict(config)), lambda name: name


# The config may be a stranger's.  On the meta device a model has no elements, but a module for each
# layer and expert: the largest published has 61 layers of 384.
_MOST_LAYERS, _MOST_EXPERTS = 2048, 1 << 16
_MOST_LABELS = 1 << 20  # of which transformers makes a dictionary
# What loops over positions as Python, or keeps a list of them.
_MOST_SECONDS, _MOST_BYTES, _CHECKED_EVERY = 60, 4 << 30, 0.25
_COUNTS = re.compile("(^|_)n?(layer|depth|block|stage)s?($|_)")
_NO_COUNTS = re.compile("(^|_)(size|id|index|dim|channel|type|length|eps)s?($|_)")


def _check_sizes(config: Mapping[str, object]) -> None:
    """Refuse what would be built for ever.

    Raises:
        NoOriginals: it has more layers or experts than any model.
    """
    layers, experts = 0, 1
    sections = [config]
    while sections:
        for key, value in sections.pop().items():
            if isinstance(value, Mapping):
                sections.append(value)
            if isinstance(value, list):
                sections += [inner for inner in value if isinstance(inner, Mapping)]
            counts = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
            if _COUNTS.search(key) and not _NO_COUNTS.search(key):
                layers = max(layers, sum(map(abs, counts)))
            if "expert" in key and "size" not in key and "dim" not in key:
                experts = max(experts, *map(abs, counts), 1)
            if key == "num_labels" and max(map(abs, counts), default=0) > _MOST_LABELS:
                raise NoOriginals(f"config.json: more labels than any model has: {counts[0]}")
    if layers > _MOST_LAYERS or layers * experts > _MOST_EXPERTS:
        raise NoOriginals(f"config.json: more than any model has: {layers} layers of {experts}")


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Raise an error if it takes too long or too much memory, where signals can tell."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return
    start, used = time.monotonic(), _peak_bytes()

    def look(signum: int, frame: FrameType | None) -> None:
        if time.monotonic() - start > _MOST_SECONDS:
            raise TimeoutError(f"not built in {_MOST_SECONDS} s")
        if _peak_bytes() - used > _MOST_BYTES:
            raise MemoryError(f"not built in {_MOST_BYTES >> 30} GiB")

    handler = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, _CHECKED_EVERY, _CHECKED_EVERY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _peak_bytes() -> int:
    import resource  # which Windows lacks, as it does the timer

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NoOriginals(f"{error.name} is not installed") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the net, and without what the libraries say of a config that was only built."""
    offline, level = os.environ.get("HF_HUB_OFFLINE"), logging.root.manager.disable
    constants = _hub_constants()
    os.environ["HF_HUB_OFFLINE"] = "1"
    was_offline = getattr(constants, "HF_HUB_OFFLINE", None)
    if was_offline is not None:  # it read the environment when it was imported
        constants.HF_HUB_OFFLINE = True
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if offline is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = offline
        if was_offline is not None:
            constants.HF_HUB_OFFLINE = was_offline


def _hub_constants() -> Any:
    """The module with huggingface_hub's settings; None where it is not installed."""
    try:
        return importlib.import_module("huggingface_hub.constants")
    except ModuleNotFoundError:
        return None

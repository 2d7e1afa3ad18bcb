"""Several methods at once, as one."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from gkd_d2.methods.method import Level, Method, Term

# What a method can ask for.
_NEEDS = [name for name, value in vars(Method).items() if name.startswith("needs_") and isinstance(value, bool)]
# Those of it that stand in a Level, under the same names.
_GIVEN = {field.name: f"needs_{field.name}" for field in dataclasses.fields(Level)} | {"responses": "needs_predictions"}


class Several(Method):
    """The losses of several methods: ``Several(gkd=GKD(), fitnet=FitNet())``.

    Each method computes what it would by itself: it is given what it needs and nothing that others do, and starts with
    the parameters that it would have alone. One without a loss of a weight above 0 is not called.

    The methods are submodules under their names, so that a distiller's checkpoints hold their parameters as
    ``method.<name>.*``. A name of a loss that several of them have gets the name of its method in front, in the method
    itself too: the attention losses of gkd and fgd become gkd_attention and fgd_attention.

    Args:
        methods: name -> method, which belongs to this one from now on; at least one.

    Raises:
        ValueError: two methods have a loss of one key, a method has no loss at all, or a name can't be that of a
            submodule.
        TypeError: what stands under a name is no Method.
    """

    def __init__(self, /, **methods: Method):
        if not methods:
            raise ValueError("GKD.METHODS has no method: name at least one")
        for name, method in methods.items():
            if not isinstance(method, Method):
                raise TypeError(f"the method {name} is {method!r}, but must be a Method")
        _check_losses(methods)
        shared = _name_apart(methods)
        super().__init__(_terms(methods.values()))
        self._shared = shared
        for name, method in methods.items():
            if hasattr(self, name) or not name or "." in name:
                raise ValueError(f"GKD.METHODS can't have a method of the name {name!r}: register it under another")
            self.add_module(name, method)
        self._settle()

    @property
    def parts(self) -> dict[str, Method]:
        """Name -> method."""
        return dict(self.named_children())

    def weigh_by_ratio(self, ratios):
        for written in ratios:
            if instead := self._shared.get(str(written).lower()):
                raise ValueError(
                    f"GKD.RATIOS.{str(written).upper()} is set, but several of the methods {', '.join(self.parts)} "
                    f"have a loss of this name: set {' or '.join(f'GKD.RATIOS.{name.upper()}' for name in instead)}"
                )
        super().weigh_by_ratio(ratios)
        for part in self.children():
            part.weigh_by_ratio({term.name: self.terms[key].ratio for key, term in part.terms.items()})
        self._settle()

    def check_options(self):
        for part in self.children():
            part.check_options()

    def describe(self):
        texts = {name: part.describe() for name, part in self._on().items()}
        return "; ".join(f"{name}: {text}" for name, text in texts.items() if text)

    def implementation(self, device):
        return "; ".join(f"{part.implementation(device)} ({name})" for name, part in self.parts.items())

    def build_parameters(self, channels):
        for part in self._on().values():
            # Each draws what it would draw alone.
            with torch.random.fork_rng(devices=[]):
                part.build_parameters(channels)

    def forward(self, levels, factor=1.0):
        losses = {}
        for part in self._on().values():
            found = part(list(_as_alone(part, levels)), factor)
            losses |= {key: found[key] for key in part.active()}
        return losses

    def _on(self) -> dict[str, Method]:
        """Name -> method, of those with a loss of a weight above 0."""
        return {name: part for name, part in self.parts.items() if part}

    def _settle(self) -> None:
        """Take over what follows from the weights of the methods."""
        self.terms = _terms(self.children())
        on = self._on().values()
        for need in _NEEDS:
            setattr(self, need, any(getattr(part, need) for part in on))
        by_gradients = [part.map_options for part in on if part.needs_student_grad or part.needs_teacher_grad]
        self.map_options = next(iter(by_gradients), Method.map_options)


def _terms(methods: Iterable[Method]) -> dict[str, Term]:
    """Key -> loss, of all methods."""
    return {key: term for method in methods for key, term in method.terms.items()}


def _check_losses(methods: Mapping[str, Method]) -> None:
    """Refuse methods without losses, and losses of one key."""
    owners: dict[str, str] = {}
    for name, method in methods.items():
        others = [other for other in methods if other != name]
        if not method.terms and others:
            raise ValueError(
                f"GKD.METHODS has {name}, which has no loss, beside {', '.join(others)}: leave it out, or the others"
            )
        for key in method.terms:
            if key in owners:
                raise ValueError(
                    f"GKD.METHODS has {owners[key]} and {name}, which both call a loss {key}: they can't run together"
                )
            owners[key] = name


def _name_apart(methods: Mapping[str, Method]) -> dict[str, list[str]]:
    """Put the names of their methods before names that losses of several methods share.

    Returns:
        Shared name in small letters -> the names instead.
    """
    owners = defaultdict(set)
    for name, method in methods.items():
        for term in method.terms.values():
            # As GKD.RATIOS compares them.
            owners[term.name.lower()].add(name)
    instead = defaultdict(list)
    for name, method in methods.items():
        for key, term in method.terms.items():
            shared = term.name.lower()
            if len(owners[shared]) > 1:
                method.terms[key] = dataclasses.replace(term, name=f"{name}_{term.name}")
                instead[shared].append(method.terms[key].name)
    return dict(instead)


def _as_alone(part: Method, levels: Sequence[Level]) -> Iterator[Level]:
    """Levels without what other methods alone have asked for."""
    spared = {name: None for name, need in _GIVEN.items() if not getattr(part, need, True)}
    for level in levels:
        yield dataclasses.replace(level, **spared)

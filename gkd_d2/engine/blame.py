"""Why the losses of a training step are infinite or NaN: the networks, the images, or a training that diverges."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection

import torch
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from gkd_d2.engine import from_scratch
from gkd_d2.methods import Term
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.split import load_running_state, running_state
from gkd_d2.utils.finite import find_not_finite, running_statistics
from gkd_d2.utils.random_streams import separate_random_stream
from gkd_d2.utils.text import counted, listed


class Blame:
    """Says what makes the losses of a step infinite or NaN, in words for the end of a message.

    An image is named only where it does so by itself with the weights that the run started with, too. For these trials
    a copy of them is kept in the CPU's memory. Nothing here waits for another process.

    Args:
        module: the meta-architecture that is trained.
        optimizer: of it, for the learning rate.
        autocast: makes the context that a training forward runs in.
        from_scratch: whether the model started without pretrained weights.

    Attributes:
        sound_image: an image of a batch whose losses were finite, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], contextlib.AbstractContextManager],
        *,
        from_scratch: bool,
    ):
        self.sound_image: dict | None = None
        self._module = module
        self._optimizer = optimizer
        self._autocast = autocast
        self._from_scratch = from_scratch
        self._start = 0
        self._start_state: dict[str, Tensor] = {}

    def start(self, iteration: int) -> None:
        """Keep the weights as they are ahead of ``iteration``, the first one."""
        self._start = iteration
        self._start_state = _copy_state(self._module)

    def of_networks(self, *, statistics: bool) -> str:
        """Which tensors of the teacher, or else of the model, are not finite; empty where all are.

        Args:
            statistics: whether running statistics count that a forward changes, but does not use.
        """
        teacher = find_not_finite(self._module.teacher) if isinstance(self._module, GKDDistiller) else []
        if teacher:
            return (
                f"the teacher's weights are not finite ({listed(teacher, 3)}): set GKD.TEACHER.WEIGHTS to a sound "
                "checkpoint"
            )
        ignored = [] if statistics else running_statistics(self._module)
        names = find_not_finite(self._module, ignored)
        parameters = {name for name, _ in self._module.named_parameters()}
        weights = [name for name in names if name in parameters]
        if weights:
            return (
                f"the weights themselves are not finite ({listed(weights, 3)}), as the gradients of a step before were "
                f"not: resume an earlier checkpoint. {self._divergence()}"
            )
        if names:
            return (
                f"the model's running statistics are not finite ({listed(names, 3)}), as its features in a step before "
                f"were not: resume an earlier checkpoint. {self._divergence()}"
            )
        return ""

    def of_gradients(self) -> str:
        """What is known where the losses are finite."""
        return self.of_networks(statistics=False) or f"the losses are finite. {self._divergence()}"

    def of_batch(self, batch: list[dict], losses: Collection[str] = ()) -> str:
        """The images that reproduce a fault by themselves, or what to change where it is not theirs.

        Args:
            batch: of this process.
            losses: names of those that are not finite, where there are any losses.
        """
        networks = self.of_networks(statistics=False)
        if networks:
            return networks
        names = [str(x.get("file_name", "an image without file_name")) for x in batch]
        if any(isinstance(m, (nn.SyncBatchNorm, NaiveSyncBatchNorm)) for m in self._module.modules()):
            return (
                "with synchronised norms the images can't be tried one by one. Look at those of the batch, "
                f"{', '.join(names)}; if they are sound, the training diverges. {self._divergence()}"
            )
        # What was seen last is not in the storage of the trials.
        divergence, overflow = self._divergence(), self._divergence(losses)
        with self._trials():
            guilty = [index for index, image in enumerate(batch) if self._fails(image)]
            if not guilty:
                return f"no image of the batch causes it by itself. {divergence}"
            _set_state(self._module, self._start_state)
            guilty = [index for index in guilty if self._fails(batch[index])]
            if not guilty:
                return (
                    f"with the weights that the run started with at iteration {self._start} no image of the batch "
                    f"causes it, so it is not the images' fault. {divergence}"
                )
            others = [self.sound_image] if self.sound_image is not None else []
            if len(guilty) < len(batch) or (others and not any(map(self._fails, others))):
                return (
                    f"of the {counted(len(batch), 'image')} of the batch, these cause it by themselves: "
                    f"{', '.join(names[index] for index in guilty)}"
                )
            advice = self._of_teacher([*batch, *others]) or overflow
        if len(batch) == 1 and not others:
            return (
                f"{names[0]}, the only image of the batch, causes it by itself; it may be sound all the same. {advice}"
            )
        return f"every image causes it, so it is not the images' fault. {advice}"

    def _of_teacher(self, images: list[dict]) -> str:
        """What to say where the teacher fails on every image and the student alone on none; else nothing."""
        if not (isinstance(self._module, GKDDistiller) and self._module.method):
            return ""
        # Without gradients a distiller is its student.
        with torch.no_grad():
            if any(map(self._fails, images)):
                return ""
        with self._autocast():
            if any(self._module.teacher_is_finite([image]) for image in images):
                return ""
        return (
            "The teacher's features, or the gradients of its losses, are not finite, although its weights are: set "
            "GKD.TEACHER.WEIGHTS and GKD.TEACHER.CONFIG_FILE to a sound detector and the config it was trained with; "
            "where SOLVER.AMP.DTYPE is float16, try bfloat16"
        )

    def _divergence(self, losses: Collection[str] = ()) -> str:
        """How large the losses, the learning rate and the ratios were last, and what to change.

        Args:
            losses: names of those that are not finite with the weights that the run started with, too.
        """
        latest = get_event_storage().latest()
        terms = self._module.method.terms if isinstance(self._module, GKDDistiller) else {}
        ratios = _ratios(latest, [term.name for term in terms.values()])
        facts = [
            *_sizes(latest),
            f"learning rate {max(group['lr'] for group in self._optimizer.param_groups):.3g}",
            ", ".join(f"gkd_ratio/{name} {ratio:.3g}" for name, ratio in ratios.items()),
        ]
        found = f"Last seen: {'; '.join(fact for fact in facts if fact)}. "
        if losses and terms.keys() >= set(losses):
            # The student's own losses are finite, so that these are too large by themselves.
            return f"{found}Lower {' and '.join(self._setting(terms[key]) for key in losses)}"
        found += "Lower SOLVER.BASE_LR, or clip the gradients by SOLVER.CLIP_GRADIENTS"
        heaviest = max(terms.values(), key=lambda term: ratios.get(term.name, 0.0), default=None)
        if heaviest and ratios.get(heaviest.name, 0.0) > 1:
            found += f", or lower {self._setting(heaviest)}"
        student = self._module.student if isinstance(self._module, GKDDistiller) else self._module
        if self._from_scratch and from_scratch.has_frozen_random_weights(student):
            advice = from_scratch.advice_for(student)
            found += f". MODEL.WEIGHTS is empty, so that frozen layers keep their random values: {advice}"
        return found

    def _setting(self, term: Term) -> str:
        key, value = self._module.method.setting(term)
        return f"{key}, which is {value:g}"

    @contextlib.contextmanager
    def _trials(self):
        """Within it forwards and other weights may be tried; after it the model and the streams are as they were."""
        distiller = isinstance(self._module, GKDDistiller)
        student = self._module.student if distiller else self._module
        state, averages = _copy_state(self._module), running_state(student)
        listeners = self._module.listeners if distiller else None
        if distiller:
            self._module.listeners = []
        try:
            with (
                separate_random_stream(self._module.device, seed=0),
                EventStorage(get_event_storage().iter),
            ):
                yield
        finally:
            _set_state(self._module, state)
            load_running_state(student, averages)
            if distiller:
                self._module.listeners = listeners

    def _fails(self, image: dict) -> bool:
        try:
            with self._autocast():
                return not all(torch.isfinite(value) for value in self._module([image]).values())
        except FloatingPointError:
            return True


def _sizes(latest: dict[str, tuple[float, int]]) -> list[str]:
    """How the sum of the losses has grown, and which of them is the largest; nothing where none was finite yet.

    Args:
        latest: name of a scalar -> its last value and the iteration of that.
    """
    if "total_loss" not in latest:
        return []
    value, iteration = latest["total_loss"]
    before, first = get_event_storage().history("total_loss").values()[0]
    growth = f"total_loss {before:.3g} in iteration {first}"
    if iteration > first:
        growth += f" and {value:.3g} in iteration {iteration}"
    largest = max((name for name in latest if name.startswith("loss_")), key=lambda name: latest[name][0])
    return [f"{growth}, of which {largest} {latest[largest][0]:.3g}"]


def _ratios(latest: dict[str, tuple[float, int]], names: list[str]) -> dict[str, float]:
    """The gkd_ratio of each loss, by its name, as far as they were measured."""
    return {name: latest[f"gkd_ratio/{name}"][0] for name in names if f"gkd_ratio/{name}" in latest}


def _copy_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, in the CPU's memory."""
    return {name: value.to("cpu", copy=True) for name, value in module.state_dict().items() if torch.is_tensor(value)}


def _set_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    # Not load_state_dict, which takes a state without versions for one of an old Detectron2.
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name in state:
                value.copy_(state[name])

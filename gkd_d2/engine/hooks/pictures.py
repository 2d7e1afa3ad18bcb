"""Pictures of a run for TensorBoard: what both networks see in the first image of a batch."""

from __future__ import annotations

from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from gkd_d2.engine.pictures import take_picture
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.observation import Listener, Observation


class PeriodicPicture(HookBase, Listener):
    """Draws the first image of the batch every so many iterations; only the main process has a writer to take it.

    Args:
        distiller: some weight is above 0.
        period: in iterations; 0: never.

    Raises:
        ValueError: ``period`` is negative.
    """

    needs_teacher_grad = True

    def __init__(self, distiller: GKDDistiller, period: int):
        if period < 0:
            raise ValueError(f"GKD.VIS_PERIOD is {period}, but must be >= 0")
        self._distiller = distiller
        self._period = period
        self._last = -1

    def before_train(self) -> None:
        self._distiller.listen(self)

    def due(self) -> bool:
        # An iteration may consist of several forwards, of which the first is drawn.
        iteration = get_event_storage().iter
        return self._period > 0 and iteration % self._period == 0 and iteration != self._last

    def __call__(self, seen: Observation) -> None:
        self._last = get_event_storage().iter
        picture = take_picture(self._distiller, seen)
        if comm.is_main_process():
            # matplotlib is for runs that draw.
            from gkd_d2.visualize.draw import draw, render

            get_event_storage().put_image("gkd/maps_and_detections", render(draw(picture)).transpose(2, 0, 1))

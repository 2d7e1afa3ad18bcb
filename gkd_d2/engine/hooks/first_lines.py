"""The first lines of a training's log."""

from __future__ import annotations

from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter

# The first line shows that the run trains; from the third iteration on Detectron2 measures its time.
FIRST_LINES = (1, 5)


class FirstLines(HookBase):
    """Prints the losses and the time left after the first iterations, ahead of Detectron2's line after the twentieth.

    Nothing of it goes to metrics.json and TensorBoard.
    """

    def before_train(self) -> None:
        self._printer = CommonMetricPrinter(self.trainer.max_iter)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # Detectron2 prints the last iteration itself.
        last = done == self.trainer.max_iter
        if comm.is_main_process() and done - self.trainer.start_iter in FIRST_LINES and not last:
            self._printer.write()

"""Pictures of what a teacher and its student see: gradient maps, box context masks and detections over the image."""

from __future__ import annotations

import contextlib
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor, nn

from gkd_d2.losses import box_context_mask, gradient_map
from gkd_d2.streams import separate_random_stream

TOP_ROW = (
    "Ground truth, and the detections of both networks in evaluation mode, coloured by class, with their scores. "
    "The thin white boxes further down are the ground truth again."
)
# The columns of maps: heading -> what it shows.
COLUMNS = {
    "teacher's map": "What matters to the teacher: its gradient map, scaled to [0, 1] at each level.",
    "student's map": "What matters to the student: its gradient map, scaled in the same way.",
    "difference": "The teacher's map minus the student's. Red: the teacher looks here, the student does not; blue: the "
    "other way round. Its mean absolute value, summed over the levels, is gkd's loss_gkd_gradient before its weight.",
    "box context mask": "Where gkd's loss_bmfi_box compares features: in the objects, each cell of which weighs the "
    "more the smaller the object is, and fading in the context around them. Elsewhere the mask is 0 and not coloured.",
}
# Inches.
_LARGEST_PANEL, _SMALLEST_PANEL = (4.0, 3.0), (2.4, 1.2)
_LEFT, _RIGHT, _TOP, _BOTTOM, _ACROSS, _DOWN = 0.95, 0.15, 0.75, 0.15, 0.12, 0.28
_DPI = 100
_MAP = {"norm": Normalize(0, 1), "cmap": "inferno", "alpha": 0.65}
# The more opaque, the more the maps differ.
_BLUE, _RED = (0.1, 0.45, 1), (1, 0.2, 0.1)
_STOPS = [(0, (*_BLUE, 1)), (0.5, (*_BLUE, 0)), (0.5, (*_RED, 0)), (1, (*_RED, 1))]
_DIFFERENCE = {"norm": Normalize(-1, 1), "cmap": LinearSegmentedColormap.from_list("difference", _STOPS)}
_CLASS_COLORS = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]


@dataclasses.dataclass(frozen=True)
class LevelMaps:
    """One level of one image: maps of H x W cells that cover the padded batch.

    Attributes:
        name: of the level.
        stride: in pixels.
        teacher: H,W, the teacher's gradient map in [0, 1].
        student: H,W, the student's.
        mask: H,W, the box context mask.
    """

    name: str
    stride: int
    teacher: Tensor
    student: Tensor
    mask: Tensor


@dataclasses.dataclass(frozen=True)
class Picture:
    """What :func:`draw` draws of one image. All tensors are on the CPU.

    Attributes:
        image: height,width,3, uint8, RGB, without padding.
        padded_size: (height, width) in pixels of the batch that the maps cover; the image lies at its top left.
        levels: the maps.
        truth: ``gt_boxes`` and ``gt_classes``.
        teacher: the teacher's ``pred_boxes``, ``pred_classes`` and ``scores``.
        student: the student's.
    """

    image: np.ndarray
    padded_size: tuple[int, int]
    levels: list[LevelMaps]
    truth: Instances
    teacher: Instances
    student: Instances


@torch.no_grad()
def take_picture(
    batched_input: dict,
    padded_size: tuple[int, int],
    strides: dict[str, int],
    student_maps: tuple[list[Tensor], list[Tensor]],
    teacher_maps: tuple[list[Tensor], list[Tensor]],
    *,
    student: nn.Module,
    teacher: nn.Module,
    rectifier: str,
) -> Picture:
    """The picture of the first image of a batch. It changes nothing: no parameter, buffer, mode or random stream.

    Args:
        batched_input: the image, as for Detectron2's meta-architectures, with ground truth.
        padded_size: (height, width) of the padded batch in pixels.
        strides: level name -> stride, L levels.
        student_maps: the student's features and their gradients, L tensors N,C,H,W each. Those before alignment:
            their map is that of the aligned ones.
        teacher_maps: the same of the teacher.
        student: a GeneralizedRCNN or RetinaNet, in any mode.
        teacher: the same.
        rectifier: of the gradient maps.
    """
    truth = batched_input["instances"].to("cpu")
    levels = []
    for level, (name, stride) in enumerate(strides.items()):
        ours, theirs = (
            gradient_map(features[level][:1], gradients[level][:1], rectifier)[0].float().cpu()
            for features, gradients in (student_maps, teacher_maps)
        )
        mask = box_context_mask([truth.gt_boxes.tensor.float()], padded_size, tuple(ours.shape))[0]
        levels.append(LevelMaps(name, stride, teacher=theirs, student=ours, mask=mask))
    return Picture(
        image=_rgb(batched_input["image"], student.input_format),
        padded_size=tuple(padded_size),
        levels=levels,
        truth=truth,
        teacher=detect(teacher, batched_input),
        student=detect(student, batched_input),
    )


def detect(model: nn.Module, batched_input: dict) -> Instances:
    """The detections of a model in evaluation mode, which is left as it was, with the random streams.

    Args:
        model: a Detectron2 meta-architecture, in any mode.
        batched_input: the image.

    Returns:
        Instances on the CPU, in pixels of ``batched_input["image"]`` itself.
    """
    height, width = batched_input["image"].shape[-2:]
    # Evaluation knows no autocast.
    autocast = torch.autocast(model.device.type, enabled=False)
    with _evaluating(model), separate_random_stream(model.device, 0), autocast:
        (output,) = model([{**batched_input, "height": height, "width": width}])
    return output["instances"].to("cpu")


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    """Evaluation mode without gradients; then every module's own mode again, as they may differ."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _rgb(image: Tensor, channel_order: str) -> np.ndarray:
    """C,H,W in INPUT.FORMAT -> H,W,3 of uint8."""
    pixels = convert_image_to_rgb(image.permute(1, 2, 0).to("cpu", torch.uint8), channel_order)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).convert("RGB"))


def put_picture(picture: Picture) -> None:
    """Give a picture to TensorBoard by the EventStorage; only the main process has a writer to take it."""
    if comm.is_main_process():
        get_event_storage().put_image("gkd/maps_and_detections", render(draw(picture)).transpose(2, 0, 1))


def render(figure: Figure) -> np.ndarray:
    """The pixels of a figure: height,width,3, uint8, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(picture: Picture, *, class_names: Sequence[str] = (), score: float = 0.5, title: str = "") -> Figure:
    """A grid: ground truth and both networks' detections on top; below, a row a level and a column a map.

    Args:
        picture: of one image.
        class_names: of the classes; their numbers where it is empty.
        score: detections below it are left out.
        title: at the top left.
    """
    height, width = picture.image.shape[:2]
    scale = min(_LARGEST_PANEL[0] / width, _LARGEST_PANEL[1] / height)
    panel = [max(scale * pixels, least) for pixels, least in zip((width, height), _SMALLEST_PANEL)]
    rows, columns = 1 + len(picture.levels), len(COLUMNS)
    size = (
        _LEFT + columns * panel[0] + (columns - 1) * _ACROSS + _RIGHT,
        _TOP + rows * panel[1] + (rows - 1) * _DOWN + _BOTTOM,
    )
    figure = Figure(figsize=size, dpi=_DPI)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=_LEFT / size[0],
        right=1 - _RIGHT / size[0],
        top=1 - _TOP / size[1],
        bottom=_BOTTOM / size[1],
        wspace=_ACROSS / panel[0],
        hspace=_DOWN / panel[1],
    )
    axes = [[figure.add_subplot(grid[row, column]) for column in range(columns)] for row in range(rows)]
    figure.text(_LEFT / size[0], 1 - 0.1 / size[1], title, va="top", fontsize=11, weight="bold")
    mask = {"norm": _mask_norm(picture.levels), "cmap": "viridis", "alpha": 0.65}
    drawn = _draw_objects(axes[0], picture, score)
    _draw_scales(axes[0][-1], panel, mask)
    for row, level in zip(axes[1:], picture.levels):
        _draw_level(row, picture, level, mask)
    names = [class_names[number] if number < len(class_names) else f"class {number}" for number in drawn]
    handles = [Patch(color=_class_color(number), label=name) for number, name in zip(drawn, names)]
    if handles:
        corner = (_LEFT / size[0], 1 - 0.5 / size[1])
        style = {"borderaxespad": 0, "borderpad": 0, "fontsize": 8, "frameon": False}
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=corner, ncols=len(handles), **style)
    return figure


def _draw_objects(axes: list[Axes], picture: Picture, score: float) -> list[int]:
    """Ground truth and detections in the first three panels; returns the classes drawn."""
    truth = picture.truth
    panels = [(f"ground truth: {len(truth)}", truth.gt_boxes, truth.gt_classes, None)]
    for name, found in (("teacher", picture.teacher), ("student", picture.student)):
        found = found[found.scores >= score]
        heading = f"{name}: {len(found)} of score \N{GREATER-THAN OR EQUAL TO} {score:g}"
        panels.append((heading, found.pred_boxes, found.pred_classes, found.scores))
    for panel, (heading, boxes, classes, scores) in zip(axes, panels):
        _draw_image(panel, picture.image, heading)
        for index, (box, number) in enumerate(zip(boxes.tensor.tolist(), classes.tolist())):
            color = _class_color(number)
            _draw_box(panel, box, color, 1.5)
            if scores is not None:
                style = {"facecolor": color, "edgecolor": "none", "pad": 0.5}
                text = f"{scores[index]:.2f}"
                above = box[1] > 0.1 * picture.image.shape[0]
                panel.text(*box[:2], text, fontsize=6, va="bottom" if above else "top", color="white", bbox=style)
    return sorted({number for _, _, classes, _ in panels for number in classes.tolist()})


def _draw_level(axes: list[Axes], picture: Picture, level: LevelMaps, mask: dict) -> None:
    """The maps of a level, over the image in grey, darkened for the white boxes to be seen."""
    grey = np.asarray(Image.fromarray(picture.image).convert("L").point(lambda value: 0.75 * value).convert("RGB"))
    difference = (level.teacher - level.student).numpy()
    teacher, student, differs, masked = COLUMNS
    for panel, heading, values, style in (
        (axes[0], teacher + _emptiness(level.teacher), level.teacher.numpy(), _MAP),
        (axes[1], student + _emptiness(level.student), level.student.numpy(), _MAP),
        (axes[2], f"{differs} (mean absolute {np.abs(difference).mean():.3f})", difference, _DIFFERENCE),
        (axes[3], masked, np.ma.masked_equal(level.mask.numpy(), 0), mask),
    ):
        _draw_image(panel, grey, heading)
        _lay_over(panel, values, picture.padded_size, **style)
        for box in picture.truth.gt_boxes.tensor.tolist():
            _draw_box(panel, box, "white", 0.6)
    rows, columns = level.teacher.shape
    text = f"{level.name}\nstride {level.stride}\n{rows} \N{MULTIPLICATION SIGN} {columns}"
    axes[0].text(-0.03, 0.5, text, transform=axes[0].transAxes, ha="right", va="center", fontsize=9)


def _emptiness(values: Tensor) -> str:
    """What a black map means: as where the losses drew no sample at this level, so that there is no gradient."""
    return "" if values.any() else " (0 everywhere)"


def _draw_image(axes: Axes, image: np.ndarray, heading: str) -> None:
    axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axes.set_title(heading, fontsize=9, pad=3)
    axes.set(xticks=[], yticks=[])


def _lay_over(axes: Axes, values: np.ndarray, padded_size: tuple[int, int], **style) -> None:
    """Stretch a map over the padded batch, and leave the limits of the image as they are: they cut off the padding."""
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(values, extent=(0, padded_size[1], padded_size[0], 0), interpolation="nearest", **style)
    axes.set(xlim=limits[0], ylim=limits[1])


def _draw_box(axes: Axes, box: list[float], color, width: float) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=width))


def _draw_scales(axes: Axes, panel: tuple[float, float], mask: dict) -> None:
    """The colours of the maps, in the panel that is left free."""
    axes.axis("off")
    for row, (label, style) in enumerate((("gradient map", _MAP), ("difference", _DIFFERENCE), ("mask", mask))):
        bar = axes.inset_axes([0.35, 1 - (0.2 + 0.4 * row) / panel[1], 0.5, 0.12 / panel[1]])
        axes.figure.colorbar(ScalarMappable(style["norm"], style["cmap"]), cax=bar, orientation="horizontal")
        if style is _DIFFERENCE:
            bar.set_xticks([-1, 0, 1], ["\N{MINUS SIGN}1: student's", "0", "1: teacher's"])
        bar.tick_params(labelsize=7, length=2, pad=1)
        bar.text(-0.05, 0.5, label, transform=bar.transAxes, ha="right", va="center", fontsize=8)


def _mask_norm(levels: list[LevelMaps]) -> LogNorm:
    """One logarithmic scale for the masks of all levels."""
    weights = torch.cat([level.mask.flatten() for level in levels])
    weights = weights[weights > 0]
    least, largest = (weights.min().item(), weights.max().item()) if len(weights) else (1.0, 1.0)
    return LogNorm(min(least, 0.1 * largest), largest)


def _class_color(number: int) -> tuple[float, float, float]:
    return _CLASS_COLORS[number % len(_CLASS_COLORS)]


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1800px; padding: 0 1em }}
h1 {{ font-size: 1.4em }}
dl {{ display: grid; grid-template-columns: max-content minmax(0, 50em); gap: .2em 1.2em }}
dt {{ font-weight: 600 }}
dd {{ margin: 0 }}
figure {{ margin: 2em 0; border-top: 1px solid #ccc; padding-top: 1em }}
img {{ width: 100%; height: auto }}
</style>
<h1>{title}</h1>
<dl>
{facts}
</dl>
<h2>What the pictures show</h2>
<dl>
{legend}
</dl>
{figures}
</html>
"""


def write_page(path: Path, title: str, facts: dict[str, str], pictures: dict[str, str]) -> None:
    """Write an HTML page of many pictures, with a legend.

    Args:
        path: of the page.
        title: of the page.
        facts: what the pictures were made of, name -> value.
        pictures: file beside the page -> caption.
    """
    legend = {
        "top row": TOP_ROW,
        "rows below": "One level each: its name, stride in pixels and size in cells.",
    } | COLUMNS
    figures = [
        f'<figure><a href="{quote(name)}"><img src="{quote(name)}" alt="{html.escape(caption)}" loading="lazy"></a>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for name, caption in pictures.items()
    ]
    page = _PAGE.format(
        title=html.escape(title), facts=_terms(facts), legend=_terms(legend), figures="\n".join(figures)
    )
    path.write_text(page, encoding="utf-8")


def _terms(texts: dict[str, str]) -> str:
    return "\n".join(f"<dt>{html.escape(term)}<dd>{html.escape(text)}" for term, text in texts.items())

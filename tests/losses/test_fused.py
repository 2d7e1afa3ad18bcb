"""The extension against the reference, by hand-worked numbers and under every mode of torch that it promises."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import subprocess
import sys

import pytest
import torch
from devices import DEVICES

from gkd_d2.losses import LossOptions, LossWeights, distillation_losses, fused

WEIGHTS = LossWeights(gradient=0.5, box=0.1, attention=0.2, image=0.3)
WEIGHTINGS = ["gradient", "attention", "attention_gradient", "uniform"]
# Largest relative error of a loss, and of a gradient relative to its level's largest element: results of 16 bits are
# rounded to them, half a unit in the last place.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-5, 2**-8),
    torch.float16: (1e-5, 2**-11),
}


def assert_equals_reference(batch, dtype: torch.dtype, device: torch.device | str = "cpu", **options) -> None:
    """``batch`` in ``dtype`` by the extension against float64 by the reference."""
    options = {"weights": WEIGHTS, **options}
    wanted_losses, wanted_gradients = batch.to(torch.float64).losses_and_gradients("reference", **options)
    losses, gradients = batch.to(dtype, device).losses_and_gradients("fused", **options)
    loss_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert losses == pytest.approx(wanted_losses, rel=loss_tolerance, abs=loss_tolerance * 1e-3)
    for level, (gradient, wanted) in enumerate(zip(gradients, wanted_gradients)):
        assert gradient.dtype == dtype
        assert (
            gradient.stride() == batch.student[level].contiguous(memory_format=_format(batch.student[level])).stride()
        )
        error = (gradient.double().cpu() - wanted).abs().max()
        assert error <= gradient_tolerance * wanted.abs().max() + 1e-12, f"level {level}"


def _format(feature: torch.Tensor) -> torch.memory_format:
    if not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rectifier", ["abs", "relu"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_equals_reference(make_batch, device, dtype, weighting, rectifier, layout):
    batch = make_batch(dtype=dtype, layout=layout)
    for map_region in ("image", "boxes"):
        assert_equals_reference(batch, dtype, device, weighting=weighting, rectifier=rectifier, map_region=map_region)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weighting": "attention_gradient", "map_region": "boxes"}], ids=str)
def test_equals_reference_on_large_maps(make_batch, device, dtype, layout, options):
    """Several blocks of every kind, and gradients that are stored past the caches."""
    batch = make_batch([(40, 80, 331), (36, 33, 64)], images=2, box_counts=(40,), dtype=dtype, layout=layout)
    assert_equals_reference(batch, dtype, device, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rectifier", ["abs", "relu"])
@pytest.mark.parametrize("temperature", [0.01, 0.001])
def test_no_part_of_attention_times_gradient_is_lost_to_underflow(make_batch, device, temperature, rectifier, layout):
    """The attention is one cell's, in some images one where the map is 0, and in some of many blocks of cells."""
    batch = make_batch([(7, 10, 33), (3, 80, 81)], images=4, dtype=torch.float32, layout=layout)
    options = {
        "weights": dataclasses.replace(WEIGHTS, attention=0.0),
        "weighting": "attention_gradient",
        "rectifier": rectifier,
        "temperature": temperature,
    }
    wanted_losses, wanted_gradients = batch.to(torch.float64).losses_and_gradients("reference", **options)
    losses, gradients = batch.to(torch.float32, device).losses_and_gradients("fused", **options)
    # Exponents of some hundreds: as many units in the last place.
    assert losses == pytest.approx(wanted_losses, rel=1e-3)
    for gradient, wanted in zip(gradients, wanted_gradients):
        assert (gradient.double().cpu() - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("box", [0.0, 0.1])
def test_maps_in_and_about_the_boxes_with_and_without_the_box_loss(make_batch, device, box):
    """The mask is kept for backward where the box loss is on, and is needed in forward in either case."""
    weights = LossWeights(gradient=0.5, box=box, attention=0.0, image=0.0)
    for weighting in WEIGHTINGS:
        assert_equals_reference(
            make_batch(box_counts=(0, 70)),
            torch.float64,
            device,
            weights=weights,
            weighting=weighting,
            map_region="boxes",
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("term", ["gradient", "box", "attention", "image"])
def test_every_term_alone(make_batch, device, term, weighting):
    weights = LossWeights(**{name: 0.7 * (name == term) for name in ("gradient", "box", "attention", "image")})
    batch = make_batch(layout="channels_last" if term == "box" else "contiguous")
    options = LossOptions(weighting=weighting)
    if not options.need_student_grad(weights):
        batch.student_grad = []
    if not options.need_teacher_grad(weights):
        batch.teacher_grad = []
    assert_equals_reference(batch, torch.float64, device, weights=weights, weighting=weighting)
    losses = batch.to(torch.float64, device).losses("fused", weights=weights, weighting=weighting)
    assert [name for name, loss in losses.items() if loss != 0] == [
        {"gradient": "loss_gkd_gradient"}.get(term, f"loss_bmfi_{term}")
    ]


def two_cells(temperature: float = 1.0, **weights) -> tuple[list[float], list[float]]:
    """The losses and their gradient for S = (1, 3), T = (2, 0) in a map of one row, every alpha being 1."""
    student = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2).requires_grad_()
    losses = distillation_losses(
        [student],
        [torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)],
        [torch.ones(1, 1, 1, 2)],
        [torch.ones(1, 1, 1, 2)],
        [torch.tensor([[0.0, 0.0, 1.0, 1.0]])],
        (1, 2),
        weights=LossWeights(**{**dict.fromkeys(("gradient", "box", "attention", "image"), 0.0), **weights}),
        temperature=temperature,
        map_region="image",
        implementation="fused",
    )
    sum(losses.values()).backward()
    return [loss.item() for loss in losses.values()], student.grad.flatten().tolist()


def test_hand_worked_gradient_loss():
    """Ghat_S = (0, 1) and Ghat_T = (1, 0); both cells are extremes, so nothing that keeps their order changes it."""
    losses, gradient = two_cells(gradient=5.0)
    assert losses == pytest.approx([5.0, 0, 0, 0])
    assert gradient == pytest.approx([0.0, 0.0], abs=1e-6)


def test_hand_worked_imitation():
    """u = 1 and v = (2, 0), so D = (2, 0); the box covers the first cell and its mask is 1/4 there, 0 elsewhere."""
    losses, gradient = two_cells(box=3.0, image=7.0)
    assert losses == pytest.approx([0, 3.0 * 0.25 * 2, 0, 7.0 * 2 / 2])
    assert gradient == pytest.approx([2 * (3.0 * 0.25 + 7.0 / 2) * 2 * (1 - 2), 0.0])


def test_hand_worked_attention():
    """As(S) = 2 softmax(1, 3) and As(T) = 2 softmax(2, 0); one channel has no channel attention to differ in."""
    losses, gradient = two_cells(attention=1.0)
    p = 1 / (1 + math.exp(2))
    assert losses == pytest.approx([0, 0, 4 * (1 - 2 * p), 0])
    mean_sign = (1 - p) - p
    assert gradient == pytest.approx([2 * p * (-1 - mean_sign), 2 * (1 - p) * (1 - mean_sign)])


def transposed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same values in a layout that the kernels don't read; leaves that require a gradient where the tensors did."""
    return [
        tensor.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_(tensor.requires_grad)
        for tensor in tensors
    ]


def op_arguments(batch, save_state=True, weighting="gradient", rectifier="abs", map_region="image"):
    return (
        batch.student,
        batch.teacher,
        batch.student_grad,
        batch.teacher_grad,
        torch.cat(batch.boxes),
        [len(boxes) for boxes in batch.boxes],
        list(batch.image_size),
        [WEIGHTS.gradient, WEIGHTS.box, WEIGHTS.attention, WEIGHTS.image],
        0.5,
        weighting,
        rectifier,
        map_region,
        save_state,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("options", [{}, {"weighting": "attention_gradient", "map_region": "boxes"}], ids=str)
def test_opcheck(make_batch, device, layout, options):
    batch = make_batch([(4, 3, 5), (6, 2, 3)], layout=layout).to(torch.float32, device)
    if layout == "transposed":
        batch.student = transposed(batch.student)
    arguments = op_arguments(batch, **options)
    torch.library.opcheck(torch.ops.gkd_d2.distillation_losses.default, arguments)
    with torch.no_grad():
        _, state = torch.ops.gkd_d2.distillation_losses(*arguments)
    constant = [feature.detach() for feature in batch.student]
    torch.library.opcheck(
        torch.ops.gkd_d2.distillation_losses_backward.default,
        (torch.rand(4, device=device), state, constant, batch.teacher, arguments[7]),
    )


@pytest.mark.parametrize("rectifier", ["abs", "relu"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("map_region", ["image", "boxes"])
def test_gradcheck(make_batch, weighting, rectifier, map_region):
    batch = make_batch([(3, 4, 5), (4, 2, 3)], seed=3).to(torch.float64)

    def losses(*student):
        arguments = op_arguments(batch, weighting=weighting, rectifier=rectifier, map_region=map_region)
        return torch.ops.gkd_d2.distillation_losses(list(student), *arguments[1:])[0]

    assert torch.autograd.gradcheck(losses, batch.student)


def test_compiles_without_a_graph_break(make_batch):
    batch = make_batch([(4, 3, 5), (6, 2, 2)]).to(torch.float32)

    def total(*student):
        losses = fused.distillation_losses(
            [2 * feature for feature in student],
            batch.teacher,
            batch.student_grad,
            batch.teacher_grad,
            batch.boxes,
            batch.image_size,
            weights=WEIGHTS,
            options=LossOptions(),
        )
        return sum(losses.values())

    eager = total(*batch.student)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(*batch.student)
    assert compiled.item() == eager.item()
    wanted = torch.autograd.grad(eager, batch.student)
    for gradient, expected in zip(torch.autograd.grad(compiled, batch.student), wanted):
        assert torch.equal(gradient, expected)


def fail_on_recompile():
    """A context in which torch may not compile again, as far as this version of torch can forbid it."""
    set_stance = getattr(torch.compiler, "set_stance", None)
    return set_stance("fail_on_recompile") if set_stance else contextlib.nullcontext()


def test_compiles_for_any_number_of_boxes(make_batch):
    """Neither a graph break nor, after the number was seen to change, a recompilation."""
    batch = make_batch([(4, 3, 5)], images=2).to(torch.float32)
    compiled = torch.compile(
        lambda student, boxes: sum(
            fused.distillation_losses(
                student,
                batch.teacher,
                batch.student_grad,
                batch.teacher_grad,
                boxes,
                batch.image_size,
                weights=WEIGHTS,
                options=LossOptions(map_region="boxes"),
            ).values()
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    for counts in ((3, 2), (7, 5), (11, 4), (6, 9)):
        batch.boxes = make_batch([], images=2, box_counts=counts).boxes
        with fail_on_recompile() if counts == (6, 9) else contextlib.nullcontext():
            loss = compiled(batch.student, batch.boxes)
        wanted = batch.losses("fused", weights=WEIGHTS, map_region="boxes")
        assert loss.item() == sum(wanted.values()).item()


def test_autocast_changes_nothing(make_batch):
    batch = make_batch().to(torch.bfloat16)
    wanted = batch.losses_and_gradients("fused", weights=WEIGHTS)
    with torch.autocast("cpu", torch.bfloat16):
        losses, gradients = batch.losses_and_gradients("fused", weights=WEIGHTS)
    assert losses == wanted[0]
    assert all(torch.equal(gradient, other) for gradient, other in zip(gradients, wanted[1]))
    assert all(loss.dtype == torch.float32 for loss in batch.losses("fused", weights=WEIGHTS).values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_repeated_calls_and_thread_counts_are_bit_equal(make_batch, layout):
    batch = make_batch([(40, 80, 331), (70, 20, 45)], box_counts=(30,), layout=layout).to(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(batch.losses_and_gradients("fused", weights=WEIGHTS))
    finally:
        torch.set_num_threads(threads)
    for losses, gradients in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(gradient, first) for gradient, first in zip(gradients, results[0][1]))


@pytest.mark.parametrize(
    "capability",
    [
        "default",
        pytest.param(
            "avx2",
            marks=pytest.mark.skipif(
                not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="this processor has no AVX2"
            ),
        ),
    ],
)
def test_every_instruction_set(capability):
    """The kernels of this machine run in the other tests; these are asked for as torch's own are."""
    code = """
import torch
from gkd_d2.losses import LossWeights, distillation_losses
tolerances = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 1e-12}
for dtype, tolerance in tolerances.items():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        shape = (2, 37, 11, 19)
        features = [torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(4)]
        gradients = []
        for implementation, wanted in (("fused", dtype), ("reference", torch.float64)):
            S, T, dS, dT = (feature.to(wanted) for feature in features)
            S.requires_grad_()
            boxes = [torch.tensor([[3.0, 4.0, 40.0, 30.0], [50.0, 2.0, 70.0, 20.0]]), torch.zeros(0, 4)]
            losses = distillation_losses([S], [T], [dS], [dT], boxes, (44, 76), weights=LossWeights(1, 1, 1, 1),
                                         map_region="image", implementation=implementation)
            gradients.append(torch.autograd.grad(sum(losses.values()), S)[0].double())
        assert (gradients[0] - gradients[1]).abs().max() <= tolerance * gradients[1].abs().max(), (dtype, memory_format)
print(torch.backends.cpu.get_cpu_capability())
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    # Names of the baseline differ between versions of torch: DEFAULT, NO AVX.
    assert ("AVX2" in result.stdout) == (capability == "avx2")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("box_counts", [(0, 0), (0, 3), (500, 1)])
def test_box_counts(make_batch, device, box_counts):
    batch = make_batch([(3, 10, 33), (2, 1, 9)], box_counts=box_counts)
    assert_equals_reference(batch, torch.float64, device, weights=LossWeights(0, 1, 0, 0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("image_size", [(40, 132), (37, 1000)])
def test_unusual_boxes(make_batch, device, image_size):
    """Beyond the map on every side, empty, inverted, thinner than a cell, not finite; on cell borders; huge."""
    nan, inf = math.nan, math.inf
    rows = [
        (-50, -20, -10, -5),
        (-30, -30, 20, 10),
        (100, 30, 400, 90),
        (500, 500, 600, 600),
        (10, 10, 10, 20),
        (30, 12, 20, 18),
        (16.0, 8.0, 16.01, 8.01),
        (nan, 0, 10, 10),
        (0, 0, inf, 10),
        (4, 4, 8, 8),
        (-1e30, -1e30, 1e30, 1e30),
        (64, 3, 1e9, 5),
    ]
    batch = make_batch([(3, 10, 33), (2, 5, 7)], images=len(rows) + 1, box_counts=(0,))
    batch.image_size = image_size
    batch.boxes = [torch.tensor([row], dtype=torch.float32) for row in rows] + [torch.tensor(rows, dtype=torch.float32)]
    assert_equals_reference(batch, torch.float64, device, weights=LossWeights(0, 1, 0, 0), weighting="uniform")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rectifier", ["abs", "relu"])
@pytest.mark.parametrize("values", ["ties", "constant", "no gradient", "negative"])
def test_degenerate_maps(make_batch, device, values, rectifier):
    """Cells that tie for the extremes, a map without a range, gradients of 0, and maps that relu leaves empty."""
    batch = make_batch([(1, 6, 7)])
    if values == "ties":
        batch.student[0] = batch.student[0].round().clamp(-1, 1)
    elif values == "constant":
        batch.student[0] = torch.full_like(batch.student[0], 2.0)
        batch.teacher[0] = torch.full_like(batch.teacher[0], 3.0)
    elif values == "no gradient":
        batch.student_grad[0] = torch.zeros_like(batch.student_grad[0])
        batch.teacher_grad[0] = torch.zeros_like(batch.teacher_grad[0])
    else:
        batch.student[0] = batch.student[0].abs()
        batch.student_grad[0] = -batch.student_grad[0].abs()
    assert_equals_reference(batch, torch.float64, device, rectifier=rectifier)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["student", "teacher", "student_grad", "teacher_grad"])
def test_what_is_not_finite_reaches_the_losses(make_batch, device, name, value):
    batch = make_batch([(4, 6, 40)])
    getattr(batch, name)[0][1, 2, 3, 17] = value
    wanted = batch.to(torch.float64).losses("reference", weights=WEIGHTS)
    losses = batch.to(torch.float64, device).losses("fused", weights=WEIGHTS)
    assert {key: bool(loss.isfinite()) for key, loss in losses.items()} == {
        key: bool(loss.isfinite()) for key, loss in wanted.items()
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "mixed", "offset"])
def test_other_layouts(make_batch, device, kind):
    batch = make_batch([(6, 8, 9)])
    copy = batch.to(torch.float64, device)
    feature = copy.student[0].detach()
    if kind == "transposed":
        copy.student = transposed(copy.student)
    elif kind == "sliced":
        copy.student[0] = torch.cat([feature, feature], dim=3)[..., :9]
    elif kind == "expanded":
        copy.student[0] = batch.student[0] = feature[:1].expand(2, -1, -1, -1)
        batch.student[0] = batch.student[0].cpu()
    elif kind == "mixed":
        copy.teacher[0] = copy.teacher[0].contiguous(memory_format=torch.channels_last)
        copy.student_grad[0] = copy.student_grad[0].contiguous(memory_format=torch.channels_last)
        copy.teacher_grad = transposed(copy.teacher_grad)
    else:
        memory = feature.new_zeros(feature.numel() + 1)
        copy.student[0] = memory[1:].view_as(feature).copy_(feature)
    copy.student[0].requires_grad_()
    wanted_losses, wanted_gradients = batch.to(torch.float64).losses_and_gradients("reference", weights=WEIGHTS)
    losses, gradients = copy.losses_and_gradients("fused", weights=WEIGHTS)
    assert losses == pytest.approx(wanted_losses, rel=1e-12)
    torch.testing.assert_close(gradients[0].cpu(), wanted_gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [2, 3])
def test_a_gradient_expanded_along_one_axis_is_summed_up(make_batch, device, axis):
    """It is not the same in all cells."""
    batch = make_batch([(6, 8, 9)])
    batch.teacher_grad = [gradient.mean(dim=axis, keepdim=True) for gradient in batch.teacher_grad]
    copy = batch.to(torch.float64, device)
    for tensors in (batch, copy):
        tensors.teacher_grad = [tensors.teacher_grad[0].expand_as(tensors.student[0])]
    wanted, wanted_gradients = batch.to(torch.float64).losses_and_gradients("reference", weights=WEIGHTS)
    losses, gradients = copy.losses_and_gradients("fused", weights=WEIGHTS)
    assert losses == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gradients[0].cpu(), wanted_gradients[0], rtol=1e-10, atol=1e-12)


def means(gradients: list[torch.Tensor], kind: str) -> list[torch.Tensor]:
    """The gradients' spatial means, N,C,1,1 or expanded over the cells."""
    found = [gradient.mean(dim=(2, 3), keepdim=True) for gradient in gradients]
    return found if kind == "mean" else [mean.expand_as(full) for mean, full in zip(found, gradients)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["mean", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_mean_of_a_gradient_is_enough(make_batch, device, kind, dtype):
    """Of the student or of the teacher, at one level or at all."""
    batch = make_batch(dtype=dtype)
    batch.student_grad = [gradient.to(dtype).double() for gradient in means(batch.student_grad, "mean")]
    batch.teacher_grad[1:2] = [gradient.to(dtype).double() for gradient in means(batch.teacher_grad[1:2], "mean")]
    if kind == "expanded":
        batch.student_grad = [grad.expand_as(s) for grad, s in zip(batch.student_grad, batch.student)]
    assert_equals_reference(batch, dtype, device)


def allocations(function) -> list[int]:
    """The bytes of every piece of memory that a call on the CPU asks for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("kind", ["mean", "expanded"])
def test_the_mean_of_a_gradient_is_not_copied_over_the_cells(make_batch, kind):
    batch = make_batch([(64, 24, 40)], images=1).to(torch.float32)
    batch.student_grad, batch.teacher_grad = means(batch.student_grad, kind), means(batch.teacher_grad, kind)
    with torch.no_grad():
        sizes = allocations(lambda: batch.losses("fused", weights=WEIGHTS))
    assert max(sizes) < batch.student[0].nbytes / 2


def test_features_of_another_layout_are_copied_once(make_batch):
    """For forward and backward together; the gradient is as large as they are."""
    batch = make_batch([(64, 24, 40)], images=1).to(torch.float32)
    size = batch.student[0].nbytes
    large = [n for n in allocations(lambda: batch.losses_and_gradients("fused", weights=WEIGHTS)) if n >= size]
    assert len(large) == 1
    batch.student, batch.teacher = transposed(batch.student), transposed(batch.teacher)
    large = [n for n in allocations(lambda: batch.losses_and_gradients("fused", weights=WEIGHTS)) if n >= size]
    assert len(large) == 3


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_features_are_saved_once_for_backward(make_batch, layout):
    """Hooks that move what is saved to another place would move it twice; a copy of another layout is saved too."""
    batch = make_batch([(64, 24, 40)], images=1).to(torch.float32)
    if layout == "transposed":
        batch.student = transposed(batch.student)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        batch.losses("fused", weights=WEIGHTS)
    large = [tensor for tensor in saved if tensor.numel() == batch.student[0].numel()]
    assert len(large) == (2 if layout == "contiguous" else 3)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("name", ["student", "teacher"])
def test_features_changed_before_backward_are_an_error(make_batch, name, layout):
    """Where backward would read what they hold now."""
    batch = make_batch([(4, 6, 5)]).to(torch.float32)
    leaf = batch.student[0]
    batch.student = [2 * leaf]
    if layout == "transposed":
        leaf = transposed([leaf])[0]
        batch.student, batch.teacher = [2 * leaf], transposed(batch.teacher)
    (wanted,) = torch.autograd.grad(sum(batch.losses("fused", weights=WEIGHTS).values()), leaf, retain_graph=True)
    losses = sum(batch.losses("fused", weights=WEIGHTS).values())
    with torch.no_grad():
        getattr(batch, name)[0].mul_(3)
    if layout == "transposed" and name == "teacher":
        assert torch.equal(torch.autograd.grad(losses, leaf)[0], wanted)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(losses, leaf)


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "compiled_autograd"), reason="this torch has no such option")
def test_backward_under_compiled_autograd(make_batch):
    """With the losses outside the compiled graph, as Detectron2's code, which breaks it, would have them."""
    batch = make_batch([(4, 6, 5)]).to(torch.float32)
    wanted = torch.autograd.grad(sum(batch.losses("fused", weights=WEIGHTS).values()), batch.student)

    @torch._dynamo.disable
    def total(student):
        batch.student = student
        return sum(batch.losses("fused", weights=WEIGHTS).values())

    leaves = batch.student
    step = torch.compile(lambda *student: total([1 * s for s in student]).backward(), backend="aot_eager")
    try:
        with torch._dynamo.config.patch(compiled_autograd=True):
            step(*leaves)
    except RuntimeError as error:
        if "compiled_args not implemented" not in str(error):
            raise
        pytest.skip("this torch's compiled autograd takes no autograd function that is written in C++")
    assert torch.equal(leaves[0].grad, wanted[0])


def test_other_constants_require_no_gradient_whatever_they_are(make_batch):
    """A teacher that requires a gradient gets none, and its graph is not kept for backward."""
    batch = make_batch([(4, 6, 5)]).to(torch.float32)
    wanted = batch.losses_and_gradients("fused", weights=WEIGHTS)
    for tensors in (batch.teacher, batch.student_grad, batch.teacher_grad):
        tensors[0].requires_grad_()
    losses = sum(batch.losses("fused", weights=WEIGHTS).values())
    assert torch.autograd.grad(losses, batch.teacher, allow_unused=True, retain_graph=True) == (None,)
    losses, gradients = batch.losses_and_gradients("fused", weights=WEIGHTS)
    assert losses == wanted[0] and torch.equal(gradients[0], wanted[1][0])
    batch.student = [feature.detach() for feature in batch.student]
    assert not sum(batch.losses("fused", weights=WEIGHTS).values()).requires_grad


@pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_box_dtypes(make_batch, box_dtype):
    batch = make_batch()
    batch.boxes = [boxes.to(box_dtype) for boxes in batch.boxes]
    assert_equals_reference(batch, torch.float64)


def test_backward_may_run_twice_and_keeps_little(make_batch):
    batch = make_batch([(256, 12, 39)]).to(torch.float16)
    losses = sum(batch.losses("fused", weights=WEIGHTS).values())
    first = torch.autograd.grad(losses, batch.student, retain_graph=True)
    second = torch.autograd.grad(losses, batch.student)
    assert torch.equal(first[0], second[0])
    with torch.no_grad():
        _, state = torch.ops.gkd_d2.distillation_losses(*op_arguments(batch))
        _, nothing = torch.ops.gkd_d2.distillation_losses(*op_arguments(batch, save_state=False))
    assert state.nbytes <= 0.05 * batch.student[0].nbytes
    assert nothing.numel() == 0


@pytest.mark.parametrize("copied", [False, True])
def test_a_second_derivative_is_refused(make_batch, copied):
    batch = make_batch().to(torch.float32)
    if copied:
        batch.student = transposed(batch.student)
    loss = sum(batch.losses("fused", weights=WEIGHTS).values())
    (first, *_) = torch.autograd.grad(loss, batch.student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()


def test_without_a_gradient_nothing_is_kept(make_batch, monkeypatch):
    asked = []
    op = torch.ops.gkd_d2.distillation_losses
    monkeypatch.setattr(torch.ops.gkd_d2, "distillation_losses", lambda *a: asked.append(a[-1]) or op(*a))
    batch = make_batch().to(torch.float32)
    batch.losses("fused", weights=WEIGHTS)
    with torch.no_grad():
        batch.losses("fused", weights=WEIGHTS)
    batch.student = [feature.detach() for feature in batch.student]
    assert not any(loss.requires_grad for loss in batch.losses("fused", weights=WEIGHTS).values())
    assert asked == [True, False, False]


def test_weights_of_zero_cost_nothing(make_batch):
    batch = make_batch().to(torch.float32)
    losses = batch.losses("fused", weights=LossWeights(0, 0, 0, 0))
    assert all(loss == 0 for loss in losses.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: []}, "student is an empty list"),
        ({1: []}, r"student has 2 levels, but teacher has 0"),
        ({1: [torch.ones(2, 4, 3, 5)] * 3}, r"student has 2 levels, but teacher has 3"),
        ({1: [torch.ones(2, 4, 15), torch.ones(2, 6, 2, 2)]}, r"student\[0\] has shape .*, but teacher\[0\]"),
        ({2: [torch.ones(2, 4), torch.ones(2, 6, 2, 2)]}, r"student_grad\[0\] has .*, which is not its mean's N,C,1,1"),
        ({2: []}, r"student has 2 levels, but student_grad has 0"),
        ({3: [torch.ones(2, 4, 3, 5), torch.ones(2, 6, 2, 3)]}, r"student\[1\] has shape .*, but teacher_grad\[1\]"),
        (
            {1: [torch.ones(2, 4, 3, 5).double(), torch.ones(2, 6, 2, 2)]},
            r"student\[0\] is Float, but teacher\[0\] is Double",
        ),
        ({0: [torch.ones(2, 4, 3, 5), torch.ones(2, 6, 2)]}, r"student\[1\] has shape .*must be N,C,H,W"),
        (
            {0: [torch.ones(2, 4, 3, 5).int(), torch.ones(2, 6, 2, 2).int()], 1: [torch.ones(2, 4, 3, 5).int()] * 2},
            "Int",
        ),
        ({4: torch.zeros(5, 5)}, "boxes have shape"),
        ({4: torch.zeros(5, 4).int()}, "boxes have shape"),
        ({5: [5]}, "student holds 2 images, but box_counts 1"),
        ({5: [1, 1]}, "box_counts add up to 2, but there are 5 boxes"),
        ({5: [6, -1]}, "must not be negative"),
        ({5: [6, 3]}, "box_counts are .*6, 3.*, but there are 5 boxes"),
        ({5: [2**63 - 1, 2**63 - 1]}, "box_counts are .*, but there are 5 boxes"),
        ({6: [0, 132]}, "image_size is .*both positive"),
        ({7: [1.0, 1.0]}, "weights must hold 4"),
        ({7: [1.0, -1.0, 0.0, 0.0]}, "finite numbers >= 0"),
        ({7: [1.0, 1e39, 0.0, 0.0]}, r"weights are \[1, 1e\+39, 0, 0\], but must be .* that float32 holds"),
        ({8: 0.0}, "temperature is 0, but must be"),
        ({8: math.nan}, "temperature is nan"),
        ({9: "both"}, "weighting is 'both'"),
        ({10: "gelu"}, "rectifier is 'gelu'"),
        ({11: "box"}, "map_region is 'box', but must be 'image' or 'boxes'"),
    ],
)
@pytest.mark.parametrize("under_autograd", [False, True])
def test_bad_arguments(make_batch, change, message, under_autograd):
    batch = make_batch([(4, 3, 5), (6, 2, 2)]).to(torch.float32)
    arguments = list(op_arguments(batch))
    for index, value in change.items():
        arguments[index] = value
    for feature in arguments[0]:
        feature.requires_grad_(under_autograd and feature.is_floating_point())
    with pytest.raises(ValueError, match=message):
        torch.ops.gkd_d2.distillation_losses(*arguments)


def test_bad_state(make_batch):
    batch = make_batch([(4, 3, 5)]).to(torch.float32)
    with pytest.raises(ValueError, match=r"state is \[3\]"), torch.no_grad():
        torch.ops.gkd_d2.distillation_losses_backward(
            torch.ones(4), torch.ones(3), batch.student, batch.teacher, [1.0, 1.0, 1.0, 1.0]
        )
    with pytest.raises(RuntimeError, match="save_state=True"):
        torch.ops.gkd_d2.distillation_losses(*op_arguments(batch, save_state=False))


def test_a_stale_or_missing_extension_is_named(monkeypatch):
    monkeypatch.setattr(fused, "INTERFACE_VERSION", fused.INTERFACE_VERSION + 1)
    extension, reason = fused._load()
    assert extension is None
    assert "is stale" in reason and "pip install" in reason
    monkeypatch.setitem(sys.modules, "gkd_d2._C", None)
    extension, reason = fused._load()
    assert extension is None
    assert "is not built" in reason and "pip install" in reason
    assert "none for mps" in fused.unavailable_reason(torch.device("mps"))


def test_auto_falls_back_and_says_so_once(make_batch, monkeypatch, caplog):
    monkeypatch.setattr(fused, "_load_error", "the extension is not there, for this test")
    batch = make_batch().to(torch.float64)
    with caplog.at_level(logging.WARNING):
        losses = [batch.losses("auto", weights=WEIGHTS) for _ in range(2)]
    assert caplog.text.count("the extension is not there, for this test") == 1
    assert losses[0] == losses[1]
    with pytest.raises(RuntimeError, match="the extension is not there, for this test"):
        batch.losses("fused", weights=WEIGHTS)

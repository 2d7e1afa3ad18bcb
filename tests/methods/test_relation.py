"""The relation loss and its blocks: by hand, number by number, and how they start."""

import dataclasses
from math import exp, log, sqrt

import pytest
import torch
from levels import built, random_level, random_pyramid

from gkd_d2.methods import FGD, GKD, Level
from gkd_d2.methods.relation import GlobalContext, RelationLoss

METHODS = {
    "loss_bmfi_relation": lambda weight: GKD(relation=weight, implementation="reference"),
    "loss_fgd_relation": lambda weight: FGD(relation=weight),
}
both = pytest.mark.parametrize("key", METHODS)


def test_numbers_by_hand():
    """Four channels and two cells. The first channel makes the second cell count three times as much as the first."""
    student = torch.tensor([[[0, log(3)], [4, 8], [8, 0], [0, 0]], [[0.0] * 2] * 4])[:, :, None]
    level = Level(student, torch.zeros_like(student), boxes=[], image_size=(16, 32), name="p3")
    loss = RelationLoss({"p3": 4})
    block = loss["p3"]["student"]
    values = {
        "attention": [[1, 0, 0, 0]],
        # Of the sums 4/4 + 3*8/4 and 8/4 it makes 7 and 3, of those of the second image 0 and 1.
        "squeeze.weight": [[0, 1, 0, 0], [0, 0, 1, 0]],
        "squeeze.bias": [0, 1],
        # (1, -1) becomes (3, -3), and then (3, 0); (-1, 1) becomes (-3, 7), and then (0, 7).
        "norm.weight": [3, 5],
        "norm.bias": [0, 2],
        "expand.weight": [[0, 0], [0, 0], [0, 0], [2, 7]],
        "expand.bias": [0, 0, 0, 1],
    }
    block.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})
    added = block(student) - student
    assert added[:, :3].abs().max() == 0
    assert added[0, 3].flatten().tolist() == pytest.approx([7, 7], rel=1e-4)
    assert added[1, 3].flatten().tolist() == pytest.approx([50, 50], rel=1e-4)
    squares = log(3) ** 2 + 4**2 + 8**2 + 8**2 + 2 * 7**2 + 2 * 50**2
    assert loss(level).item() == pytest.approx(squares / 2, rel=1e-4)


def context(feature, block):
    """R(F) of one image, a list of channels of cells."""
    p = {name: value.tolist() for name, value in block.named_parameters()}
    cells = range(len(feature[0]))
    powers = [exp(sum(w * channel[x] for w, channel in zip(p["attention"][0], feature))) for x in cells]
    summary = [sum(powers[x] * channel[x] for x in cells) / sum(powers) for channel in feature]
    hidden = linear(summary, p["squeeze.weight"], p["squeeze.bias"])
    mean = sum(hidden) / len(hidden)
    variance = sum((value - mean) ** 2 for value in hidden) / len(hidden)
    hidden = [(value - mean) / sqrt(variance + 1e-5) for value in hidden]
    hidden = [max(w * value + b, 0) for w, value, b in zip(p["norm.weight"], hidden, p["norm.bias"])]
    added = linear(hidden, p["expand.weight"], p["expand.bias"])
    return [[value + more for value in channel] for channel, more in zip(feature, added)]


def linear(values, weight, bias):
    return [sum(w * value for w, value in zip(row, values)) + b for row, b in zip(weight, bias)]


@both
@pytest.mark.parametrize("channels", [1, 5, 8])
def test_independent_computation(key, channels):
    """Number by number, over three levels with blocks of their own."""
    levels = random_pyramid((3, 5), (4, 2), (1, 1), channels=channels)
    method = built(METHODS[key](0.25), *levels)
    parts = []
    for level in levels:
        blocks, total = method.relation[level.name], 0.0
        for s, t in zip(level.student.detach().flatten(2).tolist(), level.teacher.flatten(2).tolist()):
            pairs = zip(context(s, blocks["student"]), context(t, blocks["teacher"]))
            total += sum((a - b) ** 2 for ours, theirs in pairs for a, b in zip(ours, theirs))
        parts.append(0.25 * total / len(level.student))
    assert method(levels)[key].item() == pytest.approx(sum(parts), rel=1e-12)
    # As the watch asks for them.
    for level, part in zip(levels, parts):
        assert method([level], factor=0.5)[key].item() == pytest.approx(0.5 * part, rel=1e-12)


def test_gradients_are_right():
    """Of the student's feature and of all parameters, by finite differences."""
    level = random_level((3, 2), channels=4)
    loss = built(GKD(relation=1.0), level).relation
    names, parameters = zip(*loss.named_parameters())
    assert len(parameters) == 2 * 7

    def compute(student, *values):
        given = dataclasses.replace(level, student=student)
        return torch.func.functional_call(loss, dict(zip(names, values)), (given,))

    assert torch.autograd.gradcheck(compute, (level.student, *parameters))


@both
def test_it_starts_as_plain_imitation_and_then_all_of_it_trains(key):
    levels = random_pyramid((11, 19), (6, 10))
    method = METHODS[key](0.25)
    method.build_parameters({level.name: 5 for level in levels})
    method.double()
    loss = method(levels)[key]
    squares = [(level.student - level.teacher).square().sum() / 3 for level in levels]
    assert torch.equal(loss, 0.25 * sum(squares))

    def moving():
        loss = method(levels)[key]
        gradients = torch.autograd.grad(loss, list(method.parameters()))
        return {name for (name, _), gradient in zip(method.named_parameters(), gradients) if gradient.any()}

    names = {name for name, _ in method.named_parameters()}
    assert moving() == {name for name in names if ".expand." in name}
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if ".expand." in name:
                parameter += torch.randn_like(parameter)
    assert moving() == names


@both
def test_autocast_has_no_part_in_it(key):
    level = random_level(dtype=torch.float32)
    method = built(METHODS[key](1.0), level)
    plain = method([level])[key]
    with torch.autocast("cpu", torch.bfloat16):
        half = method([level])[key]
    assert half.dtype == torch.float32 and torch.equal(half, plain)
    gradients = [torch.autograd.grad(loss, [level.student, *method.relation.parameters()]) for loss in (plain, half)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients))


def test_memory_formats_give_the_same():
    level = random_level()
    loss = built(GKD(relation=1.0), level).relation
    last = {name: getattr(level, name).to(memory_format=torch.channels_last) for name in ("student", "teacher")}
    torch.testing.assert_close(loss(dataclasses.replace(level, **last)), loss(level), rtol=1e-12, atol=0)


@both
def test_without_a_weight_there_are_no_blocks(key):
    method = METHODS[key](0.0)
    method.build_parameters({"p3": 8})
    assert not list(method.parameters()) and not method.state_dict()


@both
def test_a_level_without_blocks_is_an_error(key):
    method = METHODS[key](1.0)
    with pytest.raises(RuntimeError, match="no blocks for the level 'p3', only for none: call build_parameters of the"):
        method([random_level()])
    method.build_parameters({"p4": 5, "p5": 5})
    with pytest.raises(RuntimeError, match="no blocks for the level 'p3', only for p4, p5"):
        method([random_level()])


@pytest.mark.parametrize(("channels", "parameters"), [(1, 1 + 2 + 2 + 2), (256, 256 + 128 * 257 + 256 + 256 * 129)])
def test_size_of_a_block(channels, parameters):
    assert sum(parameter.numel() for parameter in GlobalContext(channels).parameters()) == parameters

"""When the extension computes, when the reference does instead, and what is said about it."""

from __future__ import annotations

import types

import pytest
import torch

from gkd_d2.collect_env import collect_env
from gkd_d2.losses import LossOptions, LossWeights, distillation_losses, fused, reference
from gkd_d2.losses.losses import _choose, describe_implementation

WEIGHTS = LossWeights(gradient=0.5, box=0.1, attention=0.2, image=0.3)
# What setup.py builds with CUDA 13.
DEFAULT = "7.5 8.0 8.6 9.0 10.0 12.0+PTX"


@pytest.fixture
def machine(monkeypatch):
    """A function that sets what the extension is built for and the capabilities of the machine's cards."""

    def make(built: str, *capabilities: tuple[int, int]) -> None:
        def number(card) -> int:
            return getattr(card, "index", card) or 0

        monkeypatch.setattr(fused, "_load_error", None)
        monkeypatch.setattr(fused, "_extension", types.SimpleNamespace(CUDA_ARCHITECTURES=built))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=None: capabilities[number(card)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda card=None: f"Card {number(card)}")

    return make


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        # Machine code: the same major version, and no earlier minor one.
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("12.0", (12, 1), True),
        ("10.0", (9, 0), False),
        # PTX: every later capability.
        ("8.0+PTX", (8, 9), True),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (12, 0), True),
        ("8.0+PTX", (7, 5), False),
        # Code for one capability, or for one family, has no PTX for others.
        ("9.0a", (9, 0), True),
        ("10.0a", (10, 3), False),
        ("9.0a+PTX", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.3f", (10, 0), False),
        ("10.0f+PTX", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        # One of a list is enough.
        (DEFAULT, (7, 0), False),
        (DEFAULT, (7, 5), True),
        (DEFAULT, (8, 9), True),
        (DEFAULT, (10, 3), True),
        (DEFAULT, (11, 0), False),
        (DEFAULT, (13, 0), True),
        ("9.0a 9.0", (9, 0), True),
        # What says nothing about capabilities.
        ("Hopper", (9, 0), False),
    ],
)
def test_which_cards_run_it(machine, built, capability, runs):
    machine(built, capability)
    assert (fused.unavailable_reason(torch.device("cuda", 0)) is None) == runs


def test_the_card_is_the_devices_or_the_current_one(machine):
    machine("9.0", (9, 0), (8, 6))
    assert fused.unavailable_reason(torch.device("cuda")) is None
    assert "Card 1 has compute capability 8.6" in fused.unavailable_reason(torch.device("cuda", 1))
    # The answer is not that of an earlier question.
    machine("9.0", (7, 5), (9, 0))
    assert "Card 0 has compute capability 7.5" in fused.unavailable_reason(torch.device("cuda"))
    assert fused.unavailable_reason(torch.device("cuda", 1)) is None


def test_without_a_card_the_kernels_being_there_is_enough(machine):
    machine("9.0")
    assert fused.unavailable_reason(torch.device("cuda")) is None
    machine("")
    assert "built without CUDA kernels" in fused.unavailable_reason(torch.device("cuda"))


def test_the_wrong_card_gets_the_reference_and_one_sentence(machine, caplog):
    machine("9.0 10.0+PTX", (8, 6))
    sentence = (
        "the extension gkd_d2._C is built for 9.0, 10.0+PTX, but Card 0 has compute capability 8.6: "
        '`TORCH_CUDA_ARCH_LIST="8.6" pip install -e . --no-build-isolation` builds it for this card'
    )
    device = torch.device("cuda", 0)
    for _ in range(2):
        assert _choose("auto", LossOptions(), LossWeights(), device) is reference.distillation_losses
    assert caplog.text.count(sentence) == 1
    with pytest.raises(RuntimeError) as error:
        _choose("fused", LossOptions(), LossWeights(), device)
    assert str(error.value) == f"implementation 'fused' is not available: {sentence}"


def test_options_that_the_extension_does_not_know_get_the_reference_and_one_sentence(caplog):
    device = torch.device("cpu")
    for _ in range(2):
        assert _choose("auto", LossOptions(importance="norm"), LossWeights(), device) is reference.distillation_losses
    assert caplog.text.count("is used: the extension does not support importance 'norm'") == 1
    for options in (LossOptions(importance_floor=0.5), LossOptions(importance_cap=5.0)):
        assert _choose("auto", options, LossWeights(), device) is reference.distillation_losses
    # Where they change nothing they cost nothing.
    unused = LossOptions(importance="norm", importance_floor=0.5, weighting="uniform")
    assert _choose("auto", unused, LossWeights(gradient=0.0), device) is fused.distillation_losses
    assert describe_implementation("auto", LossOptions(importance="norm"), LossWeights(), device) == (
        "PyTorch, which is slower: the extension does not support importance 'norm'"
    )


def test_collect_env_names_every_card_that_it_does_not_run_on(machine):
    machine(DEFAULT, (9, 0), (8, 9))
    values = dict(collect_env())
    assert values["GPU"] == "Card 0 (9.0), Card 1 (8.9)"
    assert values["gkd_d2._C CUDA kernels"] == "built for 7.5, 8.0, 8.6, 9.0, 10.0, 12.0+PTX"
    machine("9.0", (9, 0), (8, 9), (7, 0))
    kernels = dict(collect_env())["gkd_d2._C CUDA kernels"]
    assert "Card 1 has compute capability 8.9" in kernels and "Card 2 has compute capability 7.0" in kernels
    assert "Card 0" not in kernels
    machine("9.0")
    values = dict(collect_env())
    assert (values["GPU"], values["gkd_d2._C CUDA kernels"]) == ("none that torch can use", "built for 9.0")


@pytest.mark.parametrize(
    ("implementation", "reason"), [("auto", None), ("fused", None), ("auto", "there is none, for this compilation")]
)
def test_the_choice_is_compiled_without_a_graph_break(make_batch, implementation, reason, monkeypatch, caplog):
    """Where there is no extension, too: what is said then is said once, while it is compiled."""
    monkeypatch.setattr(fused, "_load_error", reason)
    torch.compiler.reset()
    batch = make_batch([(4, 3, 5), (6, 2, 2)]).to(torch.float32)
    arguments = tuple(vars(batch).values())

    def total():
        losses = distillation_losses(*arguments, weights=WEIGHTS, map_region="image", implementation=implementation)
        return sum(losses.values())

    loss = torch.compile(total, fullgraph=True, backend="aot_eager")()
    assert caplog.text.count("The reference implementation of the losses is used") == (reason is not None)
    wanted = sum(batch.losses("reference" if reason else "fused", weights=WEIGHTS).values())
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    gradients, expected = (torch.autograd.grad(total, batch.student) for total in (loss, wanted))
    torch.testing.assert_close(gradients, expected)

"""What each of two processes does in a test; spawned, so that it has to lie in a module of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

import gkd_d2  # noqa: F401  registers the distiller in a spawned process
from gkd_d2.engine.model_ema import ModelEMA
from gkd_d2.engine.trainer import Trainer


def comparable(cfg: CfgNode) -> None:
    """Take from the detectors what makes half batches differ, so that what remains must agree.

    Batch statistics, random samples of anchors and proposals, and the number of proposals, by which Faster R-CNN
    divides its losses: without suppression every image of these has as many.
    """
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 100_000
    cfg.MODEL.RPN.POSITIVE_FRACTION = cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    cfg.MODEL.RPN.NMS_THRESH = 1.0


def gradients(model: torch.nn.Module, batch: list[dict], terms: str, *, steps: int) -> dict[str, Tensor]:
    """The parameters' gradients of the losses whose names start with ``terms``, of the last of some equal steps."""
    with EventStorage():
        for _ in range(steps):
            model.zero_grad()
            losses = model(batch)
            # Every parameter must have a part in what DistributedDataParallel differentiates.
            sum(value * float(name.startswith(terms)) for name, value in losses.items()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def nms(boxes: Tensor, scores: Tensor, *args) -> Tensor:
    """For a float64 model: Detectron2 casts the boxes to float32, but not their scores."""
    return batched_nms(boxes, scores.float(), *args)


def build(cfg: CfgNode) -> torch.nn.Module:
    """A float64 model with weights that depend on the config alone; none of a method's own is 0."""
    torch.manual_seed(3)
    model = build_model(cfg).double().train()
    for parameter in model.method.parameters():
        torch.nn.init.normal_(parameter)
    return model


def half_a_batch(rank: int, cases: dict[str, tuple[CfgNode, str]], batch: list[dict], folder: Path) -> None:
    """Save the gradients that two processes, each with half of ``batch``, agree on in every case."""
    torch.set_num_threads(1)
    proposal_utils.batched_nms = nms
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = len(batch) // 2
    for name, (cfg, terms) in cases.items():
        # As in the trainer: no find_unused_parameters, for which the second step would fail.
        model = DistributedDataParallel(build(cfg), broadcast_buffers=False)
        found = gradients(model, batch[rank * half : (rank + 1) * half], terms, steps=2)
        torch.save({key.removeprefix("module."): value for key, value in found.items()}, folder / f"{name}.{rank}.pth")
    comm.synchronize()
    distributed.destroy_process_group()


def average_of_steps(rank: int, processes: int, folder: Path) -> None:
    """Save the average of a small network's weights over three steps, by its share of each batch."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    network = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    batches = torch.randn(3, 4, 4)
    model = network
    if processes > 1:
        store = f"file://{folder}/store_of_average"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        model = DistributedDataParallel(network, broadcast_buffers=False)
    average = ModelEMA(network, 0.5)
    average.start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in batches.chunk(processes, dim=1)[rank]:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        average.update()
    torch.save(average.state_dict(), folder / f"{rank}_of_{processes}.pth")
    comm.synchronize()
    if processes > 1:
        distributed.destroy_process_group()


def calibrated_run(cfg: CfgNode) -> None:
    """A whole training, from weights that all processes share."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    Trainer(cfg).train()

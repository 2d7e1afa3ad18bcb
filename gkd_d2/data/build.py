"""The training loader: a batch is a function of the seed, the process and the iteration alone.

Detectron2's loader draws the augmentations from whatever state its workers' generators are in, and starts its order of
images anew at a resume. Here every sample has a random stream of its own, so that a resumed run sees what an
uninterrupted one would, two runs of one seed see the same, and the number of workers changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, get_detection_dataset_dicts, samplers
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from gkd_d2.data.workers import init_worker
from gkd_d2.utils.random_streams import mix_seed, separate_data_stream
from gkd_d2.utils.text import counted


class SeededDataset(Dataset):
    """Maps samples, each within its own random stream.

    Args:
        dicts: dataset dicts in Detectron2's form.
        mapper: dataset dict -> training sample; it may change the dict.
        seed: >= 0.
    """

    def __init__(self, dicts: list[dict], mapper: Callable[[dict], dict], seed: int):
        # Serialised: every access is a fresh copy, and workers share the memory.
        self._dicts = DatasetFromList(dicts, copy=False)
        self._mapper = mapper
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dicts)

    def __getitem__(self, sample: tuple[int, int]) -> dict:
        """
        Args:
            sample: its position in the stream of all samples of all processes, and the number of its dict.
        """
        position, index = sample
        with separate_data_stream(mix_seed(self._seed, position)):
            return self._mapper(self._dicts[index])


class BatchSampler(Sampler):
    """Groups the endless stream of one process into batches.

    Args:
        sampler: yields the numbers of this process's images, endlessly; a sampler of Detectron2.
        batch_size: images a batch.
        groups: for every image the group it belongs to; a batch holds images of one group. None: all in one.

    Attributes:
        first: number of the batch to start with, counted from 0.
    """

    def __init__(self, sampler: Sampler, batch_size: int, groups: list[bool] | None):
        self.first = 0
        self._sampler = sampler
        self._batch_size = batch_size
        self._groups = groups
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.first, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[bool, list[tuple[int, int]]] = {}
        for number, index in enumerate(self._sampler):
            batch = waiting.setdefault(self._groups[index] if self._groups else False, [])
            batch.append((number * self._world_size + self._rank, index))
            if len(batch) == self._batch_size:
                yield list(batch)
                batch.clear()


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict]) -> DataLoader:
    """The :func:`seeded_loader` of a config's datasets, sampler and batch.

    Args:
        cfg: SEED must be >= 0.
        mapper: dataset dict -> training sample.

    Raises:
        ValueError: the batch can't be shared evenly, SEED is negative, no image is left to train on, or an option is
            unknown or lacks data.
    """
    solver, model = cfg.SOLVER, cfg.MODEL
    check_batch(
        solver.IMS_PER_BATCH,
        comm.get_world_size(),
        parts=solver.ACCUMULATE_STEPS,
        reference=solver.REFERENCE_WORLD_SIZE,
    )
    try:
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if model.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if model.LOAD_PROPOSALS else None,
        )
    # Where no image is left, and where a dataset is empty.
    except AssertionError as error:
        raise ValueError(
            f"DATASETS.TRAIN names {', '.join(cfg.DATASETS.TRAIN)}, in which no image is left to train on ({error}): "
            "with DATALOADER.FILTER_EMPTY_ANNOTATIONS, images without objects are left out"
        ) from error
    return seeded_loader(
        dicts,
        mapper,
        _build_sampler(cfg, dicts),
        seed=cfg.SEED,
        batch_size=solver.IMS_PER_BATCH,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def seeded_loader(
    dicts: list[dict],
    mapper: Callable[[dict], dict],
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int,
    group_by_aspect_ratio: bool,
    num_workers: int,
    collate_fn: Callable[[list[dict]], object] = list,
) -> DataLoader:
    """An endless loader of lists of samples, whose batches depend on the seed, the process and the iteration alone.

    Its ``batch_sampler`` is a :class:`BatchSampler`: set ``first`` before iterating to start in the middle.

    Args:
        dicts: dataset dicts in Detectron2's form.
        mapper: dataset dict -> training sample.
        sampler: yields the numbers of this process's images, endlessly, from a seed of its own.
        seed: of the samples, >= 0.
        batch_size: samples of all processes in a batch.
        group_by_aspect_ratio: whether a batch holds either images that are wider than high or others.
        num_workers: processes that load; 0: this one.
        collate_fn: list of samples -> batch.

    Raises:
        ValueError: ``seed`` is negative, or the sizes of images, by which they are to be grouped, are not known.
    """
    if seed < 0:
        raise ValueError(f"SEED is {seed}, but the order of the images needs a seed >= 0")
    groups = _wide(dicts) if group_by_aspect_ratio else None
    return DataLoader(
        SeededDataset(dicts, mapper, seed),
        batch_sampler=BatchSampler(sampler, batch_size // comm.get_world_size(), groups),
        num_workers=num_workers,
        collate_fn=collate_fn,
        worker_init_fn=init_worker,
    )


def check_batch(batch: int, processes: int, *, parts: int = 1, reference: int = 0) -> None:
    """Check that the processes of a run can share its batch evenly.

    Args:
        batch: images of all processes, SOLVER.IMS_PER_BATCH.
        processes: their number.
        parts: SOLVER.ACCUMULATE_STEPS.
        reference: SOLVER.REFERENCE_WORLD_SIZE; above 0 the batch belongs to that number of processes, and Detectron2
            scales it to ``processes``.

    Raises:
        ValueError: they can't; the message gives the nearest batches that work.
    """
    if parts < 1:
        raise ValueError(f"SOLVER.ACCUMULATE_STEPS is {parts}, but must be >= 1")
    shares = (reference or processes) * parts
    if batch > 0 and batch % shares == 0:
        return
    below, above = batch // shares * shares, (max(batch, 0) // shares + 1) * shares
    found = counted(reference or processes, "process", "processes")
    found += " of SOLVER.REFERENCE_WORLD_SIZE" if reference else ""
    of_parts = f" in {parts} parts each, as SOLVER.ACCUMULATE_STEPS says" if parts > 1 else ""
    raise ValueError(
        f"SOLVER.IMS_PER_BATCH is {batch}, which can't be shared evenly by {found}{of_parts}: set it to "
        f"{f'{below} or ' if below > 0 else ''}{above}"
    )


def _build_sampler(cfg: CfgNode, dicts: list[dict]) -> Sampler:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return samplers.TrainingSampler(len(dicts), seed=cfg.SEED)
    if name == "RepeatFactorTrainingSampler":
        kind = samplers.RepeatFactorTrainingSampler
        factors = kind.repeat_factors_from_category_frequency(dicts, cfg.DATALOADER.REPEAT_THRESHOLD)
        return kind(factors, seed=cfg.SEED)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {name!r}, but must be 'TrainingSampler' or 'RepeatFactorTrainingSampler'"
    )


def _wide(dicts: list[dict]) -> list[bool]:
    """For each image whether it is wider than high, by which Detectron2 groups images."""
    for record in dicts:
        if "width" not in record or "height" not in record:
            raise ValueError(
                f"{record.get('file_name', 'an image')} has no 'width' and 'height' in its dataset dict, but "
                "DATALOADER.ASPECT_RATIO_GROUPING needs them: add them, or set it to False"
            )
    return [record["width"] > record["height"] for record in dicts]

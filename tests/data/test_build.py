"""Batches are functions of the seed, the process and the iteration, whoever loads them."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from batches import build, equal, load, numbers
from detectron2.data import DatasetCatalog, samplers
from detectron2.utils import comm


def test_workers_and_the_first_batch_change_nothing(cfg):
    """Over three epochs, in which every image is augmented in several ways."""
    whole = load(cfg, 18)
    versions = {}
    for sample in sum(whole, []):
        image = sample["image"].numpy()
        versions.setdefault(sample["image_id"], set()).add((image.shape[1:], image.tobytes()))
    sizes = {number: {size for size, _ in those} for number, those in versions.items()}
    assert {min(size) for those in sizes.values() for size in those} == {24, 32, 40}
    assert all(len(those) > 1 for those in versions.values())
    assert any(len(versions[number]) > len(sizes[number]) for number in sizes)  # flips

    assert equal(load(cfg, 18), whole)
    assert equal(load(cfg, 11, first=7), whole[7:])
    cfg.DATALOADER.NUM_WORKERS = 2
    assert equal(load(cfg, 18), whole)
    assert equal(load(cfg, 11, first=7), whole[7:])


def test_the_seed_decides_on_order_and_augmentation(cfg):
    whole = load(cfg, 12)
    cfg.SEED += 1
    assert numbers(load(cfg, 12)) != numbers(whole)
    # With one image there is one order.
    DatasetCatalog.register("loader_test_single", lambda: DatasetCatalog.get("loader_test")[:1])
    cfg.DATASETS.TRAIN = ("loader_test_single",)
    try:
        ours = load(cfg, 6)
        cfg.SEED += 1
        assert not equal(load(cfg, 6), ours)
    finally:
        DatasetCatalog.remove("loader_test_single")


def test_loading_leaves_the_generators_alone(cfg):
    """What the model draws does not depend on the augmentations."""

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    batches = iter(build(cfg))
    before = states()
    first = next(batches)
    assert states() == before
    # Nor do the augmentations on what the model draws.
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert equal([first, next(batches)], load(cfg, 2))


def test_batches_hold_one_shape_and_no_sample_is_lost(cfg, records):
    stream = list(islice(samplers.TrainingSampler(len(records), seed=cfg.SEED), 100))
    batches = list(islice(build(cfg).batch_sampler, 40))
    taken = dict(sum(batches, []))
    assert len(taken) == 80
    assert all(stream[position] == index for position, index in taken.items())
    wide = [record["width"] > record["height"] for record in records]
    assert all(wide[first] == wide[second] for (_, first), (_, second) in batches)
    # What has not come waits for another image of its group.
    left = set(range(max(taken))) - taken.keys()
    assert len(left) <= 1
    assert {index for position, index in taken.items() if position < 12} >= set(range(12)) - {stream[p] for p in left}

    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    order = [index for batch in islice(build(cfg).batch_sampler, 50) for _, index in batch]
    assert order == stream


def test_processes_share_the_samples_of_one(cfg, monkeypatch):
    """Process by process, but with equal augmentations: those of a sample do not depend on who loads it."""
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    alone = load(cfg, 9)
    shares = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(load(cfg, 9))
    assert all(len(batch) == 2 for share in shares for batch in share)
    both = [[x for pair in zip(first, second) for x in pair] for first, second in zip(*shares)]
    assert equal(both, alone)

    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    positions = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        positions.append({position for batch in islice(build(cfg).batch_sampler, 20) for position, _ in batch})
    assert [len(share) for share in positions] == [40, 40]
    assert not positions[0] & positions[1]


def test_rare_categories_are_repeated(cfg, records):
    """Category 1 is in a quarter of the images: with a threshold of 1 they come sqrt(1 / 0.25) = 2 times."""
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 1.0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 15
    for record in records[:3]:
        record["annotations"].append(dict(record["annotations"][0], category_id=1))
    epoch, other = numbers(load(cfg, 2))
    assert sorted(epoch) == sorted(other) == sorted([*range(12), 0, 1, 2])
    assert epoch != other
    assert numbers(load(cfg, 1, first=1)) == [other]


def test_options_that_contradict_are_refused(cfg, records, monkeypatch):
    def refused(message, **changes):
        changed = cfg.clone()
        changed.merge_from_list([x for key, value in changes.items() for x in (key.replace("__", "."), value)])
        with pytest.raises(ValueError, match=message):
            build(changed)

    refused("SEED is -1", SEED=-1)
    refused("IMS_PER_BATCH is 0", SOLVER__IMS_PER_BATCH=0)
    refused("ACCUMULATE_STEPS is 0, but must be >= 1", SOLVER__ACCUMULATE_STEPS=0)
    refused("SAMPLER_TRAIN is 'Shuffle', but must be 'TrainingSampler'", DATALOADER__SAMPLER_TRAIN="Shuffle")
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    refused(
        "IMS_PER_BATCH is 6, .* by 2 processes in 2 parts each, as SOLVER.ACCUMULATE_STEPS says: set it to 4 or 8",
        SOLVER__IMS_PER_BATCH=6,
        SOLVER__ACCUMULATE_STEPS=2,
    )
    refused("IMS_PER_BATCH is 3, .* by 2 processes: set it to 2 or 4", SOLVER__IMS_PER_BATCH=3)
    refused("IMS_PER_BATCH is 1, .* by 2 processes: set it to 2$", SOLVER__IMS_PER_BATCH=1)
    refused(
        "IMS_PER_BATCH is 8, .* by 3 processes of SOLVER.REFERENCE_WORLD_SIZE: set it to 6 or 9",
        SOLVER__IMS_PER_BATCH=8,
        SOLVER__REFERENCE_WORLD_SIZE=3,
    )
    monkeypatch.setattr(comm, "get_world_size", lambda: 1)
    refused("IMS_PER_BATCH is 3, .* by 1 process in 2 parts each", SOLVER__IMS_PER_BATCH=3, SOLVER__ACCUMULATE_STEPS=2)
    monkeypatch.undo()
    del records[3]["height"]
    refused(f"{records[3]['file_name']} has no 'width' and 'height'.*ASPECT_RATIO_GROUPING")
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert len(build(cfg).dataset) == 12


def test_images_without_objects_alone_are_refused(cfg, records):
    for record in records:
        record["annotations"] = []
    with pytest.raises(ValueError, match="names loader_test, in which no image is left to train on"):
        build(cfg)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert build(cfg).dataset

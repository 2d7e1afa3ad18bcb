"""Runs that are killed, stopped and starved, through the command line: what is kept, and how they go on."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import PATIENCE, wait_until

from gkd_d2.analysis.runs import Run
from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.engine import sigterm
from gkd_d2.utils.checkpoint import CompleteCheckpointer, DamagedCheckpointError

# Small networks and pictures; align convolutions, a ramp, a step of the learning rate and workers, so that a resume
# has everything to get right that there is. On a CPU, where it is bit-equal, and where there is room for two processes.
SMALL = """
    MODEL.DEVICE cpu
    MODEL.RESNETS.DEPTH 18 MODEL.FPN.OUT_CHANNELS 16 INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 30 SOLVER.STEPS (20,) SOLVER.WARMUP_ITERS 10 SOLVER.CHECKPOINT_PERIOD 5
    GKD.WARMUP_ITERS 25 GKD.STUDENT.INIT_FROM_TEACHER False DATALOADER.NUM_WORKERS 1 DATASETS.TEST () SEED -1
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, project):
    """A folder with toy data and one teacher for each detector; a function that starts train_net.py there."""
    folder = tmp_path_factory.mktemp("runs")
    make_toy_kitti(folder / "datasets" / "toy_kitti", 8, 2, 0)
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }

    def start(config, *arguments, processes=1, launcher=(sys.executable,), limit=None):
        command = [*launcher, str(project / "tools" / "train_net.py"), "--num-gpus", str(processes)]
        command += ["--config-file", str(project / "configs" / "toy" / config), *map(str, arguments)]
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
        )

    start.folder = folder
    for detector in ("frcnn", "retinanet"):
        settings = [*SMALL, "MODEL.FPN.OUT_CHANNELS", 24, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", f"teacher_{detector}"]
        finish(start(f"teachers/{detector}.yaml", *settings))
    return start


@pytest.fixture(scope="module")
def distil(workplace):
    """Start the distilled training of a detector in a folder."""

    def start(detector, output, *arguments, seed=5, resume=False, **options):
        settings = [
            *("GKD.TEACHER.WEIGHTS", f"teacher_{detector}/model_final.pth"),
            # The loss that the defaults leave out is saved and resumed, too.
            *("GKD.LOSS_WEIGHTS.ATTENTION", "1e-4"),
            *(*SMALL, "SEED", seed, "OUTPUT_DIR", output, *arguments),
        ]
        # The teacher is made of its config file, which must describe the small one.
        config = workplace.folder / f"teacher_{detector}" / "config.yaml"
        flags = ["--resume"] if resume else []
        return workplace(f"gkd_{detector}.yaml", *flags, *settings, "GKD.TEACHER.CONFIG_FILE", config, **options)

    start.folder = workplace.folder
    return start


def finish(process, status=0):
    """Wait for the end of a run and return its output."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, output[-4000:]
    return output


def wait_for(path: Path, process) -> None:
    """Wait until a running process has written a file."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.02)


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def equal(first, second) -> bool:
    """Whether two checkpoints hold the same, bit by bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def state(folder: Path, name: str) -> dict:
    """What a checkpoint holds, as plain tensors and numbers; but the config, of which OUTPUT_DIR is a part."""
    checkpoint = torch.load(folder / name, weights_only=True)
    del checkpoint["trainer"]["run"]["config"]
    return checkpoint


@pytest.fixture(scope="module")
def uninterrupted(distil):
    """The folder of a run of Faster R-CNN that nothing disturbed; its seed was drawn."""
    output = finish(distil("frcnn", "whole", seed=-1))
    assert "Exception" not in output
    return distil.folder / "whole"


def seed_of(folder: Path) -> int:
    config = torch.load(folder / "model_final.pth", weights_only=True)["trainer"]["run"]["config"]
    return yaml.safe_load(config)["SEED"]


def copy_end(run: Path, folder: Path) -> None:
    """Copy a run with the last two of its checkpoints; all of them are half a gigabyte."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("model_00000[01]*.pth"))
    assert len(list(folder.glob("*.pth"))) == 2


def test_killed_run_resumes_bit_for_bit(distil, uninterrupted):
    folder = distil.folder / "killed"
    run = distil("frcnn", "killed", seed=seed_of(uninterrupted))
    wait_for(folder / "model_0000009.pth", run)
    time.sleep(0.3)
    run.kill()
    finish(run, -signal.SIGKILL)
    assert not (folder / "model_final.pth").exists()
    # With another number of workers the batches are the same.
    output = finish(distil("frcnn", "killed", "DATALOADER.NUM_WORKERS", 2, resume=True, seed=seed_of(uninterrupted)))
    assert "Starting training from iteration" in output and "the resumed run differs" not in output
    whole, resumed = state(uninterrupted, "model_final.pth"), state(folder, "model_final.pth")
    assert any(name.startswith("align.") for name in whole["model"])
    assert not any("teacher" in name for name in whole["model"])
    assert equal(whole, resumed)
    # The watch's scalars stand in metrics.json.
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert {"gkd_value/gradient/p2", "gkd_ratio/box/p5", "gkd_ratio/attention"} <= names


@pytest.mark.stress
def test_ten_kills_at_random_moments_resume_bit_for_bit(distil):
    """In the start-up, within an iteration, while a checkpoint is written: wherever the clock strikes."""
    arguments = ("SOLVER.MAX_ITER", 60, "SOLVER.CHECKPOINT_PERIOD", 2)
    rng = random.Random(0)
    start = time.perf_counter()
    run = distil("frcnn", "chain_whole", *arguments)
    wait_for(distil.folder / "chain_whole" / "model_0000001.pth", run)
    before_training = time.perf_counter() - start
    finish(run)
    during_training = time.perf_counter() - start - before_training
    folder = distil.folder / "chain"
    reached = []
    while len(reached) < 10:
        run = distil("frcnn", "chain", *arguments, resume=True)
        # Together not the whole training, so that each of them finds it running.
        time.sleep(before_training * rng.uniform(0.7, 1) + during_training * rng.uniform(0, 1 / 10))
        os.killpg(run.pid, signal.SIGKILL)
        finish(run, -signal.SIGKILL)
        checkpoints = sorted(folder.glob("model_*.pth"))
        reached.append(checkpoints[-1].stem if checkpoints else "nothing")
        for path in checkpoints[:-2]:
            path.unlink()
    print(f"\nten kills, when the last checkpoint was {', '.join(reached)}")
    finish(distil("frcnn", "chain", *arguments, resume=True))
    assert equal(state(distil.folder / "chain_whole", "model_final.pth"), state(folder, "model_final.pth"))
    print("the last checkpoint equals that of an undisturbed run, bit by bit")


@pytest.mark.stress
def test_a_hundred_flipped_bits_are_noticed(uninterrupted, tmp_path):
    """Of a checkpoint of 10 MB and more; a bit that is padding between tensors changes nothing of them."""
    whole = (uninterrupted / "model_final.pth").read_bytes()
    network = Run("whole", uninterrupted).network
    path = tmp_path / "flipped.pth"
    path.write_bytes(whole)
    rest = CompleteCheckpointer(network).load_weights(str(path))
    tensors = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    rng = random.Random(0)
    refused = 0
    for _ in range(100):
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 1 << bit]))
        try:
            found = CompleteCheckpointer(network).load_weights(str(path))
        except DamagedCheckpointError:
            refused += 1
        else:
            assert equal(tensors, network.state_dict()) and equal(rest, found), f"bit {bit} of byte {place}"
        with path.open("r+b") as file:
            file.seek(place)
            file.write(whole[place : place + 1])
    print(
        f"\n100 bits of {len(whole) / 1e6:.0f} MB flipped, one at a time: {refused} refused, the others change nothing"
    )
    assert refused > 90


def test_drawn_seed_is_kept(distil, uninterrupted):
    folder = distil.folder / "drawn"
    copy_end(uninterrupted, folder)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000024.pth")
    output = finish(distil("frcnn", "drawn", resume=True, seed=-1))
    assert "the resumed run differs" not in output
    assert equal(state(uninterrupted, "model_final.pth"), state(folder, "model_final.pth"))


def test_damaged_last_checkpoint_is_passed_over(distil, uninterrupted):
    folder = distil.folder / "damaged"
    copy_end(uninterrupted, folder)
    final = folder / "model_final.pth"
    final.write_bytes(final.read_bytes()[:-1000])
    output = finish(distil("frcnn", "damaged", resume=True, seed=seed_of(uninterrupted)))
    assert f"{final} is damaged" in output or "model_final.pth is damaged" in output
    assert "Starting training from iteration 25" in output
    assert equal(state(uninterrupted, "model_final.pth"), state(folder, "model_final.pth"))


def test_full_disk_keeps_the_last_checkpoint(distil, uninterrupted):
    folder = distil.folder / "full"
    copy_end(uninterrupted, folder)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000024.pth")
    # Files of this run end at a megabyte, as where a quota is used up.
    output = finish(distil("frcnn", "full", resume=True, seed=seed_of(uninterrupted), limit=1 << 20), status=1)
    assert "model_final.pth can't be written" in output
    assert "The last whole one: full/model_0000024.pth" in output
    assert not list(folder.glob("*.partial")) and not (folder / "model_final.pth").exists()
    assert (folder / "last_checkpoint").read_text() == "model_0000024.pth"
    assert equal(state(uninterrupted, "model_0000024.pth"), state(folder, "model_0000024.pth"))


def test_killed_worker_ends_the_run(distil):
    folder = distil.folder / "worker"
    run = distil("frcnn", "worker", "SOLVER.MAX_ITER", 10000)
    wait_for(folder / "model_0000004.pth", run)
    for pid in children(run):
        os.kill(pid, signal.SIGKILL)
    output = finish(run, status=1)
    assert "DataLoader worker" in output and "killed by signal" in output
    last = (folder / "last_checkpoint").read_text()
    assert state(folder, last)["iteration"] >= 4


def test_two_processes_stopped_by_sigterm_resume_bit_for_bit(distil):
    """RetinaNet, whose processes each keep a moving average of their own."""
    # On these pictures p7 has two cells, of which one is the map's least and one its greatest: no gradient.
    arguments = ("SOLVER.MAX_ITER", 12, "GKD.FEATURES", "('p3', 'p4', 'p5')")
    # torchrun starts the same two processes as --num-gpus 2.
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    finish(distil("retinanet", "pair_whole", *arguments, launcher=torchrun))
    folder = distil.folder / "pair_stopped"
    run = distil("retinanet", "pair_stopped", *arguments, processes=2)
    wait_for(folder / "model_0000004.pth", run)
    # As Slurm does, which signals the loaders' workers too.
    os.killpg(run.pid, signal.SIGTERM)
    output = finish(run, 128 + signal.SIGTERM)
    assert "Stopped by SIGTERM after iteration" in output
    assert not (folder / "model_final.pth").exists()
    last = state(folder, (folder / "last_checkpoint").read_text())
    averages = [row["loss_normalizer"] for row in last["trainer"]["running_states"]]
    assert len(averages) == 2 and averages[0] != averages[1]
    finish(distil("retinanet", "pair_stopped", *arguments, resume=True, processes=2))
    assert equal(state(distil.folder / "pair_whole", "model_final.pth"), state(folder, "model_final.pth"))


def test_killed_process_ends_the_others(distil):
    folder = distil.folder / "pair_killed"
    run = distil("retinanet", "pair_killed", "SOLVER.MAX_ITER", 10000, processes=2)
    wait_for(folder / "model_0000004.pth", run)
    # The parent's first child is Python's resource tracker.
    ranks = children(run)[-2:]
    os.kill(ranks[1], signal.SIGKILL)
    finish(run, 128 + signal.SIGKILL)
    for pid in ranks:
        assert not Path(f"/proc/{pid}").exists()
    assert state(folder, (folder / "last_checkpoint").read_text())["iteration"] >= 4


def test_disk_that_is_full_for_metrics_alone_ends_in_a_sentence(distil, uninterrupted):
    folder = distil.folder / "full_metrics"
    copy_end(uninterrupted, folder)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000024.pth")
    # Files of this run end at a gigabyte, which no checkpoint reaches; metrics.json is as long, most of it a hole.
    with (folder / "metrics.json").open("r+b") as file:
        file.seek((1 << 30) - 1)
        file.write(b"\n")
    output = finish(distil("frcnn", "full_metrics", resume=True, seed=seed_of(uninterrupted), limit=1 << 30), status=1)
    assert output.splitlines()[-1] == (
        "full_metrics/metrics.json can't be written (File too large). The last whole checkpoint is "
        "full_metrics/model_final.pth: --resume goes on from it"
    )
    assert equal(state(uninterrupted, "model_final.pth"), state(folder, "model_final.pth"))


def last_iteration(folder: Path) -> int:
    return state(folder, (folder / "last_checkpoint").read_text())["iteration"]


def test_sigterm_ends_a_run_of_which_a_process_is_stopped(distil):
    """The other waits for it in a collective, where Python's handlers do not run."""
    (distil.folder / "short_grace.py").write_text("from gkd_d2.engine import sigterm\nsigterm.GRACE_SECONDS = 2\n")
    folder = distil.folder / "pair_stuck"
    arguments = ("SOLVER.MAX_ITER", 10000, "GKD.IMPORTS", "('short_grace',)")
    run = distil("retinanet", "pair_stuck", *arguments, processes=2)
    wait_for(folder / "model_0000004.pth", run)
    waiting, stopped = children(run)[-2:]
    os.kill(stopped, signal.SIGSTOP)
    wait_until_idle(waiting)
    start = time.monotonic()
    run.terminate()
    assert "did not end within 2 s" in finish(run, 128 + signal.SIGTERM)
    assert time.monotonic() - start < sigterm.GRACE_SECONDS
    assert last_iteration(folder) >= 4
    # Workers of a process that was killed see that it is gone.
    wait_until(lambda: not any_of_session(run.pid))


def wait_until_idle(pid: int) -> None:
    """Wait until a process has used no processor for a second."""
    before = None
    while (used := Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]) != before:
        before = used
        time.sleep(1)


def any_of_session(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


# The images lie on a disk of each machine, and the second machine's lacks them.
OWN_DISKS = """
import os
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

def records():
    found = DatasetCatalog.get("toy_kitti_train")
    if comm.get_rank() == 1:
        found = [{**r, "file_name": os.path.join("own_disk", os.path.basename(r["file_name"]))} for r in found]
    return found

DatasetCatalog.register("own_disks", records)
MetadataCatalog.get("own_disks").thing_classes = MetadataCatalog.get("toy_kitti_train").thing_classes
"""


def test_an_image_that_another_process_cannot_read_is_named(distil):
    (distil.folder / "own_disks.py").write_text(OWN_DISKS)
    arguments = ("GKD.IMPORTS", "('own_disks',)", "DATASETS.TRAIN", "('own_disks',)")
    output = finish(distil("retinanet", "pair_image", *arguments, processes=2), status=1)
    told = re.compile(r"the process of rank 1 on \S+ failed: .*own_disk/\d+\.png: Detectron2 can't use this image: .*")
    assert told.fullmatch(output.splitlines()[-1])
    # The first process, which waited for the other.
    log = (distil.folder / "pair_image" / "log.txt").read_text().splitlines()
    assert told.search(log[-1])


def test_torchrun_starts_a_failed_run_again_and_it_is_resumed(distil):
    """A worker of one process is killed; the other process says so."""
    logs = distil.folder / "pair_restarted_logs"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    torchrun += ("--max-restarts", "1", "--redirects", "2", "--log-dir", str(logs))
    folder = distil.folder / "pair_restarted"
    arguments = ("SOLVER.MAX_ITER", 16, "GKD.FEATURES", "('p3', 'p4', 'p5')")
    run = distil("retinanet", "pair_restarted", *arguments, resume=True, launcher=torchrun)
    wait_for(folder / "model_0000004.pth", run)
    second = children(run)[-1]
    (worker,) = Path(f"/proc/{second}/task/{second}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    output = finish(run)
    (path,) = logs.glob("*/attempt_0/0/stderr.log")
    told = (
        r"the process of rank 1 on \S+ failed: RuntimeError: DataLoader worker \(pid.*\) is killed by signal: Killed.*"
    )
    assert re.fullmatch(told, path.read_text().splitlines()[-1])
    starts = [int(number) for number in re.findall(r"Starting training from iteration (\d+)", output)]
    assert starts[0] == 0 and starts[1] >= 5
    assert (folder / "model_final.pth").exists()

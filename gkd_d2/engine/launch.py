"""How the processes of a run come to be: torchrun's, Slurm's, Detectron2's launcher, or one."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from detectron2.engine import launch as launch_on_gpus
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

from gkd_d2.engine.failures import failures_told
from gkd_d2.engine.sigterm import EXIT_BY_SIGTERM, SigtermRelay
from gkd_d2.utils.text import counted

# Of the ports that no service is registered for; jobs that share a machine get different ones.
_PORTS = range(20000, 40000)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among the processes that something else has started.

    Attributes:
        rank: its number among all processes.
        world_size: the number of all processes.
        local_rank: its number on its machine.
        machine: the number of its machine.
        url: where the processes meet, as torch.distributed.init_process_group takes it.
    """

    rank: int
    world_size: int
    local_rank: int
    machine: int
    url: str


def launch(main: Callable, args: argparse.Namespace, main_args: tuple, *, device: str) -> None:
    """Run ``main`` in every process of the run; what starts them is decided here, from the environment.

    - torchrun has started the processes: each takes its place.
    - srun has started several tasks: each is a process of its own; or, with --num-gpus above 1, each is a machine whose
      processes Detectron2's launcher starts.
    - Otherwise --num-gpus, --num-machines, --machine-rank and --dist-url have Detectron2's meaning; on a CPU
      --num-gpus is the number of processes.

    Args:
        main: called as ``main(*main_args)``.
        args: of Detectron2's default_argument_parser.
        main_args: must be picklable.
        device: MODEL.DEVICE; on "cpu" the processes talk through gloo, otherwise through NCCL.

    Raises:
        ValueError: the environment or the arguments contradict themselves or the machine.
        SystemExit: a process that was started here failed: with a sentence that names the first one and its reason;
            or ended with an exit status other than 0, as one stopped by a signal does: with its status.
    """
    processes = count_processes(args, device=device)
    args = _machines_of_slurm(args, os.environ)
    place = place_from_environment(args, os.environ)
    if place is not None:
        _run(main, main_args, place, device)
        return
    if processes == 1:
        main(*main_args)
        return
    with tempfile.TemporaryDirectory() as folder, SigtermRelay() as relay:
        report = os.path.join(folder, "failure")
        machines = args.num_machines, args.machine_rank
        try:
            if device == "cpu":
                url = args.dist_url if args.num_machines > 1 else f"tcp://127.0.0.1:{_free_port()}"
                spawn(_start, (main, main_args, args.num_gpus, *machines, url, report), args.num_gpus)
            else:
                launch_on_gpus(_on_gpu, args.num_gpus, *machines, args.dist_url, (main, main_args, report))
        except (ProcessExitedException, ProcessRaisedException) as error:
            _end_like(error, Path(report), relay.killed)


def count_processes(args: argparse.Namespace, *, device: str) -> int:
    """The number of all processes that :func:`launch` will run ``main`` in, found before any of them works.

    Args:
        args: of Detectron2's default_argument_parser.
        device: MODEL.DEVICE.

    Raises:
        ValueError: as :func:`launch`.
    """
    args = _machines_of_slurm(args, os.environ)
    place = place_from_environment(args, os.environ)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts > 0 and not (args.resume or args.eval_only):
        raise ValueError(
            f"torchrun's --max-restarts is {restarts}, but without --resume each restart would train from the "
            "beginning, over the checkpoints of OUTPUT_DIR: add --resume, which starts a new run where there is none"
        )
    if place is not None:
        if device != "cpu":
            _gpu(place, device)
        return place.world_size
    if args.num_machines > 1 and args.num_gpus < 1:
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, with --num-machines {args.num_machines}: each machine would train by "
            "itself; give the number of processes on a machine, on a CPU too"
        )
    if args.num_gpus * args.num_machines <= 1:
        return 1
    _check_gpus(args.num_gpus, device)
    return args.num_gpus * args.num_machines


def place_from_environment(args: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun or srun has given this process; None where neither has.

    Args:
        args: of the command line; with --num-gpus or --num-machines above 1 srun's tasks are no processes of the run.
        environment: of this process.

    Raises:
        ValueError: a variable is missing or no number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK"),
            machine=int(environment.get("GROUP_RANK", 0)),
            url="env://",
        )
    # Of the task that srun started; SLURM_NTASKS is also set in a batch script, which is one process.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and args.num_gpus <= 1 and args.num_machines == 1:
        return Place(
            rank=_number(environment, "SLURM_PROCID"),
            world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            machine=_number(environment, "SLURM_NODEID"),
            url=_url_of_slurm(environment),
        )
    return None


def _machines_of_slurm(args: argparse.Namespace, environment: Mapping[str, str]) -> argparse.Namespace:
    """Where srun started several tasks and each shall start processes itself: the tasks are the machines."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environment or tasks == 1 or args.num_gpus <= 1 or args.num_machines > 1:
        return args
    rank = _number(environment, "SLURM_PROCID")
    changes = {"num_machines": tasks, "machine_rank": rank, "dist_url": _url_of_slurm(environment)}
    return argparse.Namespace(**{**vars(args), **changes})


def _url_of_slurm(environment: Mapping[str, str]) -> str:
    """The first machine of the step, and a port that depends on the job; MASTER_ADDR and MASTER_PORT win."""
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    # Slurm folds names: gpu[03-05,9],login is gpu03, gpu04, gpu05, gpu9, login.
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]
    address = environment.get("MASTER_ADDR", first)
    if not address:
        raise ValueError("srun has set no SLURM_STEP_NODELIST: set MASTER_ADDR to the name of the first machine")
    port = environment.get("MASTER_PORT")
    if port is None:
        # Steps of one job may overlap.
        number = _number(environment, "SLURM_JOB_ID") + 7919 * int(environment.get("SLURM_STEP_ID", 0))
        port = _PORTS[number % len(_PORTS)]
    return f"tcp://{address}:{port}"


def _run(main: Callable, main_args: tuple, place: Place, device: str, report: str | None = None) -> None:
    """Join the other processes, run ``main``, and leave together with them."""
    if device != "cpu":
        torch.cuda.set_device(_gpu(place, device))
    store, *_ = next(distributed.rendezvous(place.url, place.rank, place.world_size))
    # Where torchrun starts the processes again, its store may still hold what those before them have said there.
    store = distributed.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "gloo" if device == "cpu" else "nccl"
    distributed.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size)
    with failures_told(report):
        _form_local_groups(place.machine)
        main(*main_args)
        # A process that leaves first would break the connections of those that still write.
        comm.synchronize()
    distributed.destroy_process_group()


def _start(
    local_rank: int,
    main: Callable,
    main_args: tuple,
    processes: int,
    machines: int,
    machine: int,
    url: str,
    report: str,
) -> None:
    """A process that was started here, on a CPU."""
    place = Place(machine * processes + local_rank, machines * processes, local_rank, machine, url)
    _run(main, main_args, place, "cpu", report)


def _on_gpu(main: Callable, main_args: tuple, report: str) -> None:
    """A process that Detectron2's launcher started, and that has joined the others."""
    with failures_told(report):
        main(*main_args)


def _end_like(error: ProcessExitedException | ProcessRaisedException, report: Path, killed: set[int]) -> NoReturn:
    """End this process as the one that it started and that failed first."""
    raised = isinstance(error, ProcessRaisedException)
    told = report.exists() and (raised or error.exit_code == 1)
    if raised and not told:
        raise error
    if raised or not told:
        # With the traceback, where it raised an error.
        logging.getLogger(__name__).error("%s", error)
    if told:
        raise SystemExit(report.read_text(encoding="utf-8"))
    # torch 2.4 calls it pid.
    if (error.error_pid if hasattr(error, "error_pid") else error.pid) in killed:
        raise SystemExit(EXIT_BY_SIGTERM)
    # A signal's number is negative here and 128 more in a shell.
    raise SystemExit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code)


def _form_local_groups(machine: int) -> None:
    """Tell Detectron2 which processes share a machine; every process must take part in forming every group."""
    machines: list[int | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(machines, machine)
    groups = {m: [rank for rank, other in enumerate(machines) if other == m] for m in sorted(set(machines))}
    for number, ranks in groups.items():
        group = distributed.new_group(ranks)
        if number == machine:
            comm._LOCAL_PROCESS_GROUP = group


def _gpu(place: Place, device: str) -> int:
    """The number of the GPU that a process works on."""
    _check_gpus(1, device)
    # With one GPU visible to each process, as by --gpus-per-task, every process's own is number 0.
    visible = torch.cuda.device_count()
    if place.local_rank >= visible > 1:
        raise ValueError(
            f"process {place.local_rank} of machine {place.machine} has no GPU of its own: {visible} are visible"
        )
    return place.local_rank % visible


def _check_gpus(wanted: int, device: str) -> None:
    if device != "cpu" and torch.cuda.device_count() < wanted:
        raise ValueError(
            f"this run needs {counted(wanted, 'GPU')} on this machine, but torch finds {torch.cuda.device_count()}: "
            "lower --num-gpus, or put `MODEL.DEVICE cpu` at the end of the command line, after all options, to run as "
            "many processes on the CPU"
        )


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise ValueError(f"the environment variable {name} is {value!r}, but must be a number set by the launcher")
    return int(value)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]

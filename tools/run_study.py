#!/usr/bin/env python3
"""Train the missing trainings of a study, several at once, and write its tables and plots.

A study is a YAML file: detectors, settings, seeds, what weights are chosen from; docs/studies.md describes it. Each
training has its own folder below --output and is resumed where it was stopped, so that the same command ends an
interrupted study, trains seeds that were added to the file, or only writes the report where nothing is missing. A
training that fails does not stop the others, but the exit status is then 1. Examples:
    python tools/run_study.py configs/studies/toy.yaml --at-once 2
    python tools/run_study.py configs/studies/toy.yaml configs/studies/kitti_sample.yaml --report-only
    python tools/run_study.py configs/studies/toy.yaml --device cuda --at-once 8 --report results.md
"""

import argparse
import logging
import signal
import sys
from pathlib import Path

from gkd_d2.analysis.study.plan import Study
from gkd_d2.analysis.study.read import read_study
from gkd_d2.analysis.study.report import study_section, write_sections
from gkd_d2.analysis.study.schedule import Scheduler
from gkd_d2.utils.command_line import check_at_least, check_device
from gkd_d2.utils.files import check_writable, naming
from gkd_d2.utils.user_modules import add_import_option, import_modules

import torch
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("gkd_d2")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="FILE", help="YAML files")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output", "studies"),
        metavar="FOLDER",
        help="each study has a folder there, of its file's name (default: output/studies)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="Markdown file whose part about each study is replaced, or added; plots go to images/ beside it "
        "(default: report.md in the folder of each study)",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="to train on"
    )
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="trainings at the same time; on a CPU they share the cores, on GPUs they take turns in placing themselves "
        "(default: 1 a GPU, or 1 for every two cores)",
    )
    add_import_option(parser)
    args = parser.parse_args()
    check_device(parser, args)
    if args.at_once is None:
        args.at_once = torch.cuda.device_count() if args.device == "cuda" else max(1, torch.get_num_threads() // 2)
    check_at_least(parser, args, {"at_once": 1})
    return args


def read_studies(args: argparse.Namespace) -> dict[str, Study]:
    """Name -> study.

    Raises:
        OSError: there is no such file.
        ValueError: one is wrong, or does not fit what its folder holds.
    """
    studies = {}
    for path in args.studies:
        if path.stem in studies:
            raise ValueError(f"{path}: another study is called {path.stem}, too, and would share its folder")
        studies[path.stem] = read_study(path, args.output / path.stem)
        studies[path.stem].check_folders()
    return studies


def check_outputs(args: argparse.Namespace) -> None:
    """Check that what the trainings and the report write can be written.

    Raises:
        OSError: it can't.
    """
    if not (args.report_only and args.report):
        check_writable(args.output, "--output")
    if args.report is not None:
        check_writable(args.report.parent, "the folder of --report")
        if args.report.is_dir():
            raise IsADirectoryError(f"--report {args.report} can't be written: it is a folder")


def main() -> int:
    """Run the command."""
    args = parse_args()
    setup_logger(name="gkd_d2")
    failed = {}
    try:
        import_modules(args.imports, "--import")
        check_outputs(args)
        studies = read_studies(args)
        if not args.report_only:
            scheduler = Scheduler(args.device, args.at_once, imports=args.imports)
            stopped_by = []

            def stop(number, frame):
                stopped_by.append(number)
                scheduler.stop()

            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)
            failed = scheduler.run_all(list(studies.values()))
            if stopped_by:
                print("Stopped; the same command goes on.", file=sys.stderr)
                return 128 + stopped_by[0]
        reports: dict[Path, dict[str, str]] = {}
        for name, study in studies.items():
            path = args.report or study.output / "report.md"
            with naming(path.parent):
                reports.setdefault(path, {})[name] = study_section(study, path.parent / "images")
        for path, sections in reports.items():
            write_sections(path, sections)
            logger.info("Report: %s", path)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for folder, reason in failed.items():
        print(f"error: {folder} is missing in the report: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

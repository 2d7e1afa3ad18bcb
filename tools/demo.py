#!/usr/bin/env python3
"""Show on toy data what distillation does: a teacher, a student alone and the same student distilled.

All three are trained from scratch through tools/train_net.py and evaluated. Both students have one seed, schedule and
order of batches; the distilled one starts with the teacher's heads (GKD.STUDENT.INIT_FROM_TEACHER). The runs are
compared by tools/compare_runs.py and drawn by tools/visualize_gkd.py, and the distilled student is exported to ONNX, in
32 and in 8 bits, by tools/export_student.py. Example:
    python tools/demo.py --output output/demo
It runs on a GPU where torch finds one, else on the CPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from gkd_d2.data.toy import make_toy_kitti
from gkd_d2.export.write import FILES
from gkd_d2.utils.files import check_writable
from gkd_d2.utils.text import counted

import torch

ROOT = Path(__file__).resolve().parent.parent
# What of Detectron2's log is progress: the estimate of the time left, and that of the evaluation.
PROGRESS = (" eta: ", "Inference done")


def tool(name: str, *arguments: str | Path) -> list[str]:
    """The command line of one of the tools."""
    return [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]


def toy_config(name: str) -> Path:
    """A config of configs/toy."""
    return ROOT / "configs" / "toy" / name


def train(title: str, config: str, output: Path, *overrides: str) -> float:
    """Run one training, show its progress, and return the seconds it took.

    Raises:
        SystemExit: it failed; its log is named.
    """
    print(f"\n== {title}", flush=True)
    command = tool("train_net.py", "--config-file", toy_config(config))
    command += ["OUTPUT_DIR", str(output), *overrides]
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    # Earlier results would be appended to.
    (output / "metrics.json").unlink(missing_ok=True)
    log = output / "console.txt"
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process,
        log.open("w", encoding="utf-8") as file,
    ):
        for line in process.stdout:
            file.write(line)
            if any(part in line for part in PROGRESS):
                print(f"   {line.split(']: ', 1)[-1].rstrip()}", flush=True)
    if process.returncode:
        sys.exit(f"{title} failed with exit status {process.returncode}; its output stands in {log}")
    return time.monotonic() - start


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="default: output/demo")
    parser.add_argument("--train", type=int, default=300, metavar="N", help="training images (default: 300)")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="validation images (default: 100)")
    parser.add_argument("--iterations", type=int, metavar="N", help="of every training (default: as configured)")
    args = parser.parse_args()
    output = args.output.resolve()
    overrides = ["SOLVER.MAX_ITER", str(args.iterations), "SOLVER.STEPS", "()"] if args.iterations else []
    # As the built-in datasets toy_kitti_train and toy_kitti_val, in this process and in the trainings.
    os.environ["DETECTRON2_DATASETS"] = str(output / "datasets")
    # Today's torch warns of much that Detectron2 does.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        check_writable(output, "--output")
    except OSError as error:
        sys.exit(str(error))
    print(f"== Toy data: {counted(args.train, 'scene')} to train on, {args.val} to evaluate on", flush=True)
    make_toy_kitti(output / "datasets" / "toy_kitti", args.train, args.val, force=True)

    names = ("teacher", "student_alone", "student_distilled")
    teacher, alone, distilled = runs = [output / name for name in names]
    weights = ["GKD.TEACHER.WEIGHTS", str(teacher / "model_final.pth")]
    seconds = [
        train("1 of 3: the teacher", "teachers/frcnn.yaml", teacher, *overrides),
        train("2 of 3: the student alone", "baselines/frcnn.yaml", alone, *overrides),
        train("3 of 3: the student distilled", "gkd_frcnn.yaml", distilled, *overrides, *weights),
    ]
    print("\n== Comparison and pictures", flush=True)
    subprocess.run(tool("compare_runs.py", "--output", output, "--images", "3", *runs), check=True)
    shutil.rmtree(output / "pictures", ignore_errors=True)
    look = ["--config-file", toy_config("gkd_frcnn.yaml"), "--count", "2", "--output", output / "pictures"]
    subprocess.run(
        tool("visualize_gkd.py", *look, *weights, "MODEL.WEIGHTS", distilled / "model_final.pth"), check=True
    )
    print("\n== The distilled student as an ONNX file", flush=True)
    exported = output / "exported"
    forms = ["--onnx", "--int8", output / "datasets" / "toy_kitti" / "training" / "image_2", "--evaluate", "--force"]
    # After a few iterations nothing may be above the threshold, and a file that detects nothing can't be checked.
    everything = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"] if args.iterations else []
    subprocess.run(
        tool("export_student.py", "--weights", distilled, "--output", exported, *forms, *everything), check=True
    )
    report = output / "report.md"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    times = ", ".join(f"{name} {value:.0f} s" for name, value in zip(names, seconds))
    pictures = "\n".join(
        f"![What both networks see](pictures/{path.name})" for path in sorted(output.glob("pictures/*.png"))
    )
    report.write_text(
        f"""{report.read_text(encoding="utf-8")}
## What this shows

The distilled student starts with the teacher's heads and imitates its features; the table does not tell the two apart.
One seed, toy data and a few hundred iterations: it shows that the pieces work together, not how much the method gains.

Time to train and evaluate on {device}: {times}.

## The distilled student, exported

{(exported / FILES["table"]).read_text(encoding="utf-8")}
## What both networks see

[All pictures, with a legend](pictures/index.html)

{pictures}
""",
        encoding="utf-8",
    )
    print(f"\nReport with pictures: {report}")
    print(f"Student for onnxruntime: {exported / FILES['ONNX']}, see examples/detect_onnx.py")


if __name__ == "__main__":
    main()

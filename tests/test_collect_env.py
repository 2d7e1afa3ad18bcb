import os
import subprocess
import sys

import detectron2
import torch

from gkd_d2.collect_env import collect_env
from gkd_d2.losses import fused


def test_names_the_kernels_that_are_there():
    values = dict(collect_env())
    assert values["torch"] == f"{torch.__version__} in {os.path.dirname(torch.__file__)}"
    reason = fused.unavailable_reason(torch.device("cpu"))
    assert values["gkd_d2._C CPU kernels"] == (reason or "built")
    for architecture in fused.cuda_architectures():
        assert architecture in values["gkd_d2._C CUDA kernels"]


def test_reports_what_is_imported(tmp_path):
    """And not the package that is installed, where PYTHONPATH puts another before it."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text(
        f"__path__.append({os.path.dirname(detectron2.__file__)!r})\n__version__ = '9.9'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gkd_d2.collect_env"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert f"9.9 in {tmp_path / 'detectron2'}" in done.stdout, done.stderr

import torch

from gkd_d2.collect_env import collect_env
from gkd_d2.losses import fused


def test_names_the_kernels_that_are_there():
    values = dict(collect_env())
    assert values["torch"].split("+")[0] == torch.__version__.split("+")[0]
    reason = fused.unavailable_reason(torch.device("cpu"))
    assert values["gkd_d2._C CPU kernels"] == (reason or "built")
    for architecture in fused.cuda_architectures():
        assert architecture in values["gkd_d2._C CUDA kernels"]

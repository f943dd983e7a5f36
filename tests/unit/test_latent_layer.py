"""The projected attention layer, without an engine."""

import torch

from vllm_svd.kernels.products import project


def test_latents_are_contiguous_for_vllms_store_kernels():
    """Kernels that store keys on CUDA step through heads without asking for their stride."""
    x, down = torch.randn(5, 8, 16), torch.randn(8, 4, 16)
    found = project(x, down)
    assert found.shape == (5, 8, 4) and found.is_contiguous()
    torch.testing.assert_close(found, torch.stack([x[:, h] @ down[h].T for h in range(8)], dim=1))


def test_importing_either_package_imports_neither_vllm_nor_cuda():
    import subprocess
    import sys

    code = (
        "import sys, vllm_svd, vllm_svd.format, offline_compress.pipeline, offline_compress.cli;"
        "import torch; assert 'vllm' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

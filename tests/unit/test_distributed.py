"""Two processes that share the samples find what one process finds."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from runs import recipe_for
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

from offline_compress import kv
from offline_compress.calibration import (
    GRADIENTS,
    Moment,
    Network,
    Workers,
    channel_energies,
    collect,
    held_out_errors,
    process_group,
)
from offline_compress.calibration.gradients import gradient_moments
from offline_compress.checkpoint import inspect
from offline_compress.pipeline import compress
from offline_compress.planning import layers_of
from offline_compress.sweep import open_streams
from offline_compress.weights import open_source
from offline_compress.workspace import Workspace, work_root
from vllm_svd.errors import SvdError
from vllm_svd.format import verify

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Far enough that half of the samples would end elsewhere.
RECOVERED = {"name": "svd_llm", "recover": {"steps": 12, "lr": 3e-3}}
EVERY = frozenset(get_args(Moment)) - GRADIENTS


@torch.no_grad()
def measured(directory, samples, work, workers):
    """Every kind of moment, over all workers, by name; hidden states live in files of `work`."""
    network = Network(open_source(str(directory)), CPU, torch.float32)
    generator = torch.Generator().manual_seed(3)
    windows = torch.randint(0, 4096, (samples, 16), generator=generator)
    unseen = torch.randint(0, 4096, (1, 16), generator=generator)
    space = Workspace(work, writable=False)
    streams = open_streams(network, windows, unseen, batch=2, limit=0, work=space, workers=workers)
    layers, family = layers_of(network.source), network.source.family
    index = 1  # that of the mixture with its experts
    for earlier in range(index):
        block = network.block(earlier)
        for rows in streams.every():
            hidden = network.forward(earlier, block, streams.dense.read(rows, CPU))
            streams.dense.write(rows, hidden)
            streams.compressed.write(rows, 1.1 * hidden)
    dense, compressed = network.block(index), network.block(index)
    compressed.self_attn.v_proj.weight.mul_(0.9)
    sites = family.input_sites(network.config)
    widths = {sites[path]: shape[1] for path, shape in layers[index].shapes.items()}
    found = {}
    for path, statistics in collect(
        network, index, dense, compressed, streams, widths, EVERY
    ).items():
        found[f"{path}|tokens"] = torch.tensor([statistics.tokens])
        found |= {f"{path}|{name}": statistics.gathered(name) for name in EVERY}
    weight = dense.self_attn.q_proj.weight
    rough = {f"{layers[index].path}.self_attn.q_proj": lambda x: linear(x, weight.roll(1, 0))}
    errors = held_out_errors(network, index, dense, streams, rough)
    found["held_out"] = torch.tensor(list(errors.values()))
    energies = channel_energies(
        network, index, dense, streams, [family.query_output, family.key_output]
    )
    found |= {"queries": energies[0], "keys": energies[1]}
    for name, rows in (("seen", streams.calibrating()), ("unseen", streams.held_out())):
        moments = kv.collect(network, index, dense, streams.dense, list(rows), streams, "pre")
        tensors = {key: value for key, value in vars(moments).items() if torch.is_tensor(value)}
        found |= {f"{name}|{key}": value for key, value in tensors.items()}
        found[f"{name}|tokens"] = torch.tensor([moments.tokens])

    def keep(_index, of_layer):
        for path, gradients in of_layer.items():
            found.update({f"{path}|{name}": moment for name, moment in gradients.items()})

    shapes = {number: layer.shapes for number, layer in enumerate(layers)}
    mine = windows[workers.share(samples)]
    gradient_moments(
        network, mine, shapes, GRADIENTS, keep, work, batch=2, limit=0, workers=workers
    )
    return {name: value.clone() for name, value in found.items()}


def of_worker(rank):
    """Tensors of every kind that factors have, other ones on each worker."""
    values = torch.arange(12).view(3, 4) + 20 * rank
    kinds = (torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int32)
    return {str(kind): values.to(kind) for kind in kinds} | {"turned": values.double().T}


def worker():
    """What each of the processes runs: measures for every number of samples."""
    directory, out, *samples = sys.argv[1:]
    rank, out = int(os.environ["RANK"]), Path(out)
    dist.init_process_group(
        "gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=2
    )
    for number in samples:
        found = measured(Path(directory), int(number), out, Workers.joined())
        save_file(found, out / f"{number}-{rank}.safetensors")
    agreed = {name: Workers.joined().of_first(own) for name, own in of_worker(rank).items()}
    save_file(agreed, out / f"agreed-{rank}.safetensors")
    (out / f"agreed-{rank}.txt").write_text(Workers.joined().text_of_first("\u03b1" * (3 - rank)))
    dist.destroy_process_group()


def run(command, **environment):
    """Processes in a group of their own, which ends with the test."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*processes, timeout=300):
    """What they printed; all must succeed."""
    try:
        printed = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert not any(process.returncode for process in processes), printed
    return "".join(output for output, _ in printed)


@pytest.fixture(scope="module")
def mixture(noisy_checkpoint):
    return noisy_checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def shared_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def shared(mixture, shared_directory):
    """What both processes measured, by the number of samples."""
    out = shared_directory
    command = [sys.executable, "-c", "from test_distributed import worker; worker()"]
    arguments = [str(mixture), str(out), "1", "5"]
    path = str(Path(__file__).parent)
    started = [
        # of other hash seeds, so that sets of names have other orders
        run(
            [*command, *arguments],
            RANK=str(rank),
            PYTHONPATH=f"{path}:{ROOT}",
            PYTHONHASHSEED=str(rank),
        )
        for rank in range(2)
    ]
    finish(*started)
    return {
        samples: [load_file(out / f"{samples}-{rank}.safetensors") for rank in range(2)]
        for samples in (1, 5)
    }


@pytest.mark.parametrize("samples", [1, 5])  # with one of them a worker has nothing
def test_merged_moments_are_those_of_one_process(shared, mixture, samples, tmp_path):
    expected = measured(mixture, samples, tmp_path, Workers())
    first, second = shared[samples]
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name])
        # batches of other sizes: fp32 sums in another order
        atol = 1e-4 * float(value.abs().max()) if value.is_floating_point() else 0
        torch.testing.assert_close(first[name], value, rtol=0, atol=atol)


@pytest.mark.usefixtures("shared")
def test_both_have_what_the_first_has(shared_directory):
    for rank in range(2):
        found = load_file(shared_directory / f"agreed-{rank}.safetensors")
        for name, tensor in of_worker(0).items():
            assert torch.equal(found[name], tensor)
            assert not torch.equal(found[name], of_worker(1)[name])
        assert (shared_directory / f"agreed-{rank}.txt").read_text() == "\u03b1" * 3
    assert Workers().of_first(tensor) is tensor and Workers().text_of_first("x") == "x"


@pytest.mark.parametrize(
    ("method", "allocator", "cache"),
    [
        ("gfwsvd", "water_filling", {"kept": 0.5}),
        (RECOVERED, "uniform", {"kept": 0.5}),
        ("svd", "uniform", {"kept": 0.15, "store": "tiers", "allocator": "measured"}),
    ],
)
def test_a_run_of_two_processes_writes_one_checkpoint(
    method, allocator, cache, noisy_checkpoint, short_text, tmp_path
):
    model, out, path = noisy_checkpoint("llama"), tmp_path / "out", tmp_path / "recipe.yaml"
    recipe = recipe_for(short_text, method, 0.5, allocator, cache, host_memory_gib=1e-9)
    path.write_text(recipe.yaml())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "offline_compress", "run", str(model), str(out), "--recipe", str(path)]
    output = finish(run([sys.executable, *torchrun, *command]))
    assert output.count("is complete") == 1  # one of them speaks
    verify(out)
    assert not work_root(out).exists()
    alone = compress(recipe, str(model), tmp_path / "alone")
    together = inspect(out)
    assert together.plan == inspect(tmp_path / "alone").plan
    # Latents that fp32 sums of another order move over the border between two codes lose otherwise.
    rel = 3e-3 if "store" in cache else 1e-3
    assert together.measured.perplexity == pytest.approx(alone.perplexity, rel=rel)
    assert together.measured.scored_tokens == alone.scored_tokens


def test_processes_that_cannot_meet_are_told_so(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SvdError, match=r"WORLD_SIZE is 2.*\n.*torchrun"), process_group("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_group("cpu") as workers:
        assert workers == Workers()

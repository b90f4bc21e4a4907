"""Gradients over ranks: the mean, in buckets that never change, the same bits on every rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from hcodec_core.training.ranks import GradientSum, Ranks

dist.init_process_group("gloo")
ranks = Ranks(dist.get_rank(), dist.get_world_size())
torch.manual_seed(0)
layers = [nn.Linear(5, 5) for _ in range(4)]
parameters = [p for layer in layers for p in layer.parameters()]
total = GradientSum(parameters, ranks, bucket_bytes=64)
found = []
for step in range(3):
    for p in parameters:
        p.grad = None
    torch.manual_seed(10 * step + ranks.rank)
    x = torch.randn(2, 5)
    for layer in layers[:-1]:  # the last layer gets no gradient
        x = layer(x) + layer(x)  # each is used twice
    x.square().sum().backward()
    own = [None if p.grad is None else p.grad.clone() for p in parameters]
    # What a bucket sent early must not be what is compared.
    total.finish()
    found.append([p.grad.flatten().tolist() for p in parameters])
gathered = ranks.gather(found)
assert gathered[0] == gathered[-1] == found
assert len(total._buckets) > 4
assert ranks.from_first(ranks.rank) == 0
stacked = ranks.stack(torch.tensor([float(ranks.rank)])).tolist()
assert stacked == [[float(rank)] for rank in range(ranks.size)]
if ranks.is_first:
    plain = []
    for step in range(3):
        means = [torch.zeros_like(p) for p in parameters]
        for rank in range(ranks.size):
            torch.manual_seed(10 * step + rank)
            x = torch.randn(2, 5)
            for layer in layers[:-1]:
                x = layer(x) + layer(x)
            grads = torch.autograd.grad(x.square().sum(), parameters, allow_unused=True)
            for mean, grad in zip(means, grads):
                mean += 0 if grad is None else grad / ranks.size
        plain.append([mean.flatten().tolist() for mean in means])
    print(json.dumps([found, plain]))
dist.destroy_process_group()
"""


def test_gradients_become_means_over_ranks():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = 3
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, outputs
    found, plain = json.loads(outputs[0][0])
    for step, expected in zip(found, plain, strict=True):
        for values, wanted in zip(step, expected, strict=True):
            assert all(
                abs(a - b) <= 1e-5 * max(1.0, abs(b)) for a, b in zip(values, wanted, strict=True)
            )

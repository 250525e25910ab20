"""An update as one CUDA graph, or compiled."""

from __future__ import annotations

import torch

from utils.program import UserError


def cuda_graph(step):
    """`step()` as one CUDA graph: three ordinary calls, then it is recorded once and replayed at every further call.

    A small update is some thousand kernels of a few microseconds, and starting them one by one takes longer than they
    run. `step` must work on the same tensors every time and copy nothing from or to the host.
    """
    stream, graph, calls, output = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0, None

    def replay():
        nonlocal calls, output
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                output = step()
            torch.cuda.current_stream().wait_stream(stream)
            return output
        if calls == 4:
            with torch.cuda.graph(graph):
                output = step()
        graph.replay()
        return output

    return replay


def compiled(step):
    """`step()` through torch.compile; it draws the same random numbers as without.

    Raises:
        UserError: in the first call, if there is no C++ compiler.
    """
    fast = torch.compile(step, dynamic=False, options={"fallback_random": True})

    def run():
        try:
            return fast()
        except RuntimeError as error:
            if "No working C++ compiler" not in str(error):
                raise
            remedy = "install one such as g++, or leave the option out"
            raise UserError(f"--compile: no C++ compiler found; {remedy}") from None

    return run

"""flow_matching.py on a pretend accelerator, and what is compiled."""

import contextlib
import functools
import io
import re
import sys
import unittest.mock
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import flow_matching as fm

SMALL = "--size 8 --width 16 --mults 1,2 --batch 32 --overwrite --steps"
A = f"train --out a --classes --coupling ot --flip --attention 4 --dropout 0.1 {SMALL}"
B = f"train --out b --path vp --time logit-normal {SMALL}"
COMMANDS = [f"{A} 2", f"{A} 3", f"{B} 2", f"{B} 3", "train --out a --resume --steps 4",
            "sample --ckpt a/checkpoint.pt --n 10 --guidance 2 --steps 1",
            "sample --ckpt b/checkpoint.pt --n 2 --solver dopri5 --tolerance 0.5",
            "fid --ckpt b/checkpoint.pt --n 4 --features pixels --steps 1",
            "nll --ckpt a/checkpoint.pt --n 2 --solver euler --steps 1"]
MOVES = {"_to_copy", "copy_", "index.Tensor", "index_put_"}  # may take tensors of two devices
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # item, nonzero, ...


@functools.cache
def has_kernel(operator, backend):
    """Whether PyTorch's own table has one, or makes the operator of others, on any device."""
    table = Path(torchgen.__file__).with_name("packaged") / "ATen/native/native_functions.yaml"
    entry = re.search(rf"^- func: {re.escape(operator)}\(.*\n(  .*\n)*", table.read_text(), re.M)
    if not entry or (operator, backend) == ("native_group_norm_backward", "MPS"):
        return bool(entry)  # that one torch 2.6 registers in torch.backends.mps
    delegates = re.findall(r"structured_delegate: (\S+)", entry[0])
    keys = " ".join(re.findall(r"^    ([\w, ]+):", entry[0], re.M))
    own = re.search(rf"\b({backend}|Composite\w+Autograd(NonFunctional)?)\b", keys)
    composite = not keys and not delegates
    return bool(own or composite) or any(has_kernel(other, backend) for other in delegates)


class OnDevice(torch.Tensor):
    """Claims to be on "meta", the one device that needs no driver; its numbers are on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    __torch_dispatch__, is_meta = None, False  # PretendDevice is asked first

    def __new__(cls, x):
        self = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, x.stride(), x.storage_offset(), dtype=x.dtype, device="meta")
        self.numbers = x
        return self

    def __format__(self, spec):
        return format(self.item(), spec)

    def __reduce_ex__(self, protocol):  # for torch.save
        return self.numbers.__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()


class PretendDevice(TorchDispatchMode):
    """Computes on the CPU and counts what an accelerator would say to each operator."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = operator.name().removeprefix("aten::"), kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        host = [x for x in tensors if not isinstance(x, OnDevice)]
        to = str(kwargs.get("device") or "")
        if len(host) == len(tensors) and to != "meta":
            return operator(*args, **kwargs)
        inputs, named = tree_map_only(OnDevice, lambda x: x.numbers, (args, kwargs))
        result = operator(*inputs, **named | (dict(device="cpu") if to else {}))
        if to != "cpu":
            came = {id(getattr(x, "numbers", x)): x for x in tensors}  # and goes, if in place
            result = tree_map_only(
                torch.Tensor, lambda x: came[id(x)] if id(x) in came else OnDevice(x), result)
        made = [x.dtype for x in tree_leaves(result) if isinstance(x, OnDevice)]
        waits = (name in MOVES | {"where.self"} and (host or to == "cpu")
                 or "index" in name and torch.bool in [x.dtype for x in tensors[1:]]
                 or name not in MOVES and WAITING & {*operator.tags})
        found = {"operator": True, "wait": waits, "float64": torch.float64 in made,
                 "two devices": name not in MOVES and any(x.dim() for x in host),
                 "no CUDA kernel": not has_kernel(name, "CUDA|Generic"),
                 "no MPS kernel": not has_kernel(name, "MPS")}
        frame = sys._getframe()
        while frame.f_code.co_filename != fm.__file__:
            frame = frame.f_back
        for kind in filter(found.get, found):
            self.seen[kind][f"{name} in {frame.f_code.co_name}, line {frame.f_lineno}"] += 1
        return result


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """{command: what was seen as it ran: {kind: {operator and place: how often}}}."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pretended"))
        patch.setattr(fm.odeint, "__defaults__", (0.0, 1.0, "midpoint", 1, 1e-5))  # quick grids
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        fused = "_get_fused_kernels_supported_devices"
        patch.setattr(sys.modules["torch.optim.optimizer"], fused, lambda: ["meta"])
        for command in COMMANDS:
            with PretendDevice() as device:
                device.seen = runs[command] = defaultdict(Counter)
                fm.main([*command.split(), "--device", "meta"])
    return runs


@pytest.mark.parametrize("kind", ["no CUDA kernel", "no MPS kernel", "two devices", "float64"])
def test_an_accelerator_could_run_every_command(pretended, kind):
    for command, seen in pretended.items():
        assert seen["operator"] and not seen[kind], f"{kind}: {[*seen[kind]]} of {command}"


@pytest.mark.parametrize("train", [A, B])
def test_no_training_step_waits_for_the_device(pretended, train):
    """One step more is no wait more, but for coupling, solved on the host: there and back."""
    more = pretended[f"{train} 3"]["wait"] - pretended[f"{train} 2"]["wait"]
    coupling = [wait for wait in more if "in ot_coupling" in wait][:2]
    assert [*more.elements()] == coupling, f"waits of one step: {more}"


@pytest.mark.parametrize("flag, times", [("--compile", 2), ("", 0)])
def test_the_network_is_compiled_where_it_is_asked_for_and_saved_as_it_is(
        flag, times, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    class Module(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.config, self.inner = model.config, model

        def forward(self, *inputs):
            calls.append(inputs)
            return self.inner(*inputs)

    compiled = unittest.mock.Mock(side_effect=Module)
    monkeypatch.setattr(torch, "compile", compiled)
    with contextlib.redirect_stdout(io.StringIO()):
        fm.main(f"train --out run {SMALL} 1 --device cpu {flag}".split())
        assert len(calls) == times / 2
        fm.main(f"sample --ckpt run --n 1 --steps 1 --solver euler {flag}".split())
    assert compiled.call_count == times and len(calls) == times
    assert not any("inner" in name for name in torch.load("run/checkpoint.pt")["model"])

"""Run the Triton kernel on a CPU, in Triton's interpreter, and print its errors against float64 as JSON.

TRITON_INTERPRET=1 python tests/method/run_kernel.py
"""

import json
import sys
import warnings
from itertools import product

import torch
from torch import Tensor

from yolo_cwd import channel_wise_divergence
from yolo_cwd.method import fused
from yolo_cwd.method.kernel import launch

warnings.simplefilter("ignore")  # NumPy's, where numbers are infinite
SHAPES = {"odd": (1, 17, 401), "small": (2, 17, 63), "one position": (2, 3, 1)}
LARGEST = {"160 x 160": (1, 1, 160 * 160)}
ORDERS = {"contiguous": (False, False), "channels-last": (True, True), "one of each": (False, True)}
TAU = 2.0


def error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error; of what should be 0, the absolute one."""
    return float((found.double() - exact).norm() / (exact.norm() or 1.0))


def run(student: Tensor, teacher: Tensor, in_place: bool = False) -> dict[str, float]:
    """Return the errors of the divergence and of its derivative, multiplied by the number of positions."""
    scale = float(student.shape[-1])
    log_q, log_p = ((m.double() / TAU).log_softmax(-1) for m in (student, teacher))
    value, exact = TAU**2 * (log_p.exp() * (log_p - log_q)).sum(-1), scale * (log_q.exp() - log_p.exp())
    made = student if in_place else torch.empty_like(student)
    return {"value": error(launch(student, teacher, made, TAU, scale), value), "derivative": error(made, exact)}


def ordered(maps: Tensor, channels_last: bool) -> Tensor:
    """Return maps [N, C, P] in a memory order."""
    return maps.mT.contiguous().mT if channels_last else maps


def adapted() -> float:
    """Return the error of a divergence of which the derivative takes the place of the adapted map."""
    student, teacher, weight = torch.randn(2, 5, 8, 6), torch.randn(2, 20, 8, 6), torch.randn(20, 5, 1, 1)
    maps = torch.einsum("dc,nchw->ndhw", weight[..., 0, 0].double(), student.double())
    exact = channel_wise_divergence(maps, teacher.double(), TAU)
    return error(fused.compare_adapted(student, teacher, weight, TAU).value, exact)


def main() -> None:
    """Compare all cases."""
    found: dict[str, dict[str, float]] = {}
    torch.manual_seed(0)
    for dtype, (order, lasts) in product((torch.float32, torch.float16, torch.bfloat16), ORDERS.items()):
        name = f"{str(dtype).removeprefix('torch.')}, {order}"
        for size, shape in {**SHAPES, **(LARGEST if order == "contiguous" else {})}.items():
            sides = [ordered((3 * torch.randn(shape)).to(dtype), last) for last in lasts]
            found[f"{name}, {size}"] = run(*sides)
        sides = [ordered(torch.randn(SHAPES["small"]).to(dtype), last) for last in lasts]
        found[f"{name}, large logits"] = run(*(1e4 * side for side in sides))
        found[f"{name}, equal"] = run(sides[0], sides[0].clone())
        if order != "one of each":
            of_place = name.replace(order, "in place")
            for size, shape in SHAPES.items():
                pair = [ordered((3 * torch.randn(shape)).to(dtype), last) for last in lasts]
                found[f"{of_place}, {size}, {order}"] = run(*pair, in_place=True)
    student, teacher = torch.randn(2, *SHAPES["small"])
    student[1, 2, 3] = torch.inf
    channels = launch(student, teacher, torch.empty_like(student), TAU, 1.0)
    found["one infinite number"] = {"channels that are not finite": int((~channels.isfinite()).sum())}
    found["trial"] = {"error": fused.trial(torch.device("cpu"))}
    found["adapted"] = {"value": adapted()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""Run by tests/unit/test_serve_kernel.py in Triton's interpreter, on a CPU: prints one line of JSON."""

import json
import sys

import torch

from serve.embedded import attention, kernel, recorded

CHUNK, BLOCK = kernel.CHUNK, kernel.BLOCK  # as it is served
kernel.CHUNK, kernel.BLOCK, recorded.LEAST = 64, 16, 4  # the interpreter is slow
W = 3 * kernel.CHUNK + 16
PLACES = [0, 5, kernel.BLOCK - 1, kernel.BLOCK, kernel.CHUNK - 1, kernel.CHUNK, 2 * kernel.CHUNK + 25, W - 1]


def against_torch(dtype, heads, groups, size, values, window, alibi):
    """-> the largest difference from attention in double over what each row may see, in units of that dtype's rounding."""
    torch.manual_seed(0)
    rows = len(PLACES)
    columns = torch.tensor(PLACES + [W, W + 7])
    q = torch.randn(rows + 2, heads, 1, size).to(dtype)
    k, v = torch.randn(rows, groups, W, size).to(dtype), torch.randn(rows, groups, W, values).to(dtype)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    for row, place in enumerate(PLACES):  # what no row may see
        k[row, :, place + 1 :], v[row, :, place + 1 :] = float("nan"), float("inf")
    out = kernel.decode(q, k, v, columns, 0.3, window, slopes)
    assert out.shape == (rows + 2, 1, heads, values) and out.dtype == dtype and (out[rows:] == 0).all()
    worst = 0.0
    assert out.isfinite().all()  # NaN is lost in a maximum
    for row, place in enumerate(PLACES):
        first = max(0, place + 1 - window) if window else 0
        keys, theirs = (x[row : row + 1, :, first : place + 1].double().repeat_interleave(heads // groups, 1) for x in (k, v))
        scores = 0.3 * q[row].double() @ keys[0].transpose(-1, -2)
        if slopes is not None:  # rounded as transformers' bloom does
            bias = (slopes[:, None] * torch.arange(first, place + 1)).to(dtype).double()[:, None]
            scores = (scores + bias).to(dtype).double()
        wanted = (scores.softmax(-1) @ theirs[0])[:, 0]
        worst = max(worst, float((out[row, 0].double() - wanted).abs().max()) / torch.finfo(dtype).eps)
    return worst


def broken(columns):
    """-> whether a row whose own keys have no number gets none, in one chunk and in several, and the row beside it does."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 1, 16), torch.randn(2, 1, columns, 16), torch.randn(2, 1, columns, 16)
    k[0, :, 3] = float("nan")
    out = kernel.decode(q, k, v, torch.full((2,), columns - 1), 0.25)
    return bool(out[0].isnan().all() and out[1].isfinite().all())


def company(window, alibi):
    """-> whether a row gets the same bits in passes of all sizes, at any place."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 2, 1, 16), torch.randn(5, 1, W, 16), torch.randn(5, 1, W, 16)
    slopes = 2.0 ** -torch.arange(1, 3) if alibi else None
    for place in PLACES[1::2]:
        width, found = max(48, place + 1), []
        for rows, mine, columns in ((1, 0, width), (2, 1, W), (5, 3, width)):
            places = torch.full((rows,), columns - 1)
            places[mine] = place
            for one in (q, k, v):
                one[mine] = one[-1]
            found.append(kernel.decode(q[:rows], k[:rows, :, :columns], v[:rows, :, :columns], places, 0.25, window, slopes)[mine])
        if not all(torch.equal(one, found[0]) for one in found):
            return False
    return True


def engine(folder):
    """A server's engine that records passes, on a CPU: which kernel it took, and whether greedy tokens are the plain model's."""
    from serve.embedded.engine import Engine
    from tests import greedy

    made = Engine(folder)
    names = []
    plain = attention._fixed
    attention._fixed = lambda q, k, v, step, *more: names.append(step.kernel) or plain(q, k, v, step, *more)
    made.record(lambda: lambda run: run)
    wanted = made.model.__class__.from_pretrained(folder).eval()
    same = greedy.of_engine(made, [5, 6, 7], 4)[0] == greedy.of_model(wanted, [5, 6, 7], 4)
    return {"kernels": sorted(set(names)), "same": same}


def machine_code(capability, dtype, size, groups, one, alibi, window):
    """Compile both kernels for a card that need not be here -> bytes of shared memory that the first needs. Not interpreted."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = {
        "GROUPS": groups, "G": kernel._power(groups), "SIZE": size, "E": kernel._power(size), "VALUES": size,
        "F": kernel._power(size), "ONE": one,
        "CHUNK": CHUNK, "BLOCK": BLOCK, "WINDOW": window, "ALIBI": alibi, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    parts = dtype if one else "fp32"
    kinds = dict.fromkeys(["q", "k", "v", "out"], "*" + dtype) | dict.fromkeys(["sums", "tops", "totals"], "*" + parts)
    kinds.update(slopes="*fp32" if alibi else "*" + dtype, columns="*i64", scale="fp32")
    shared = []
    for function in (kernel._chunk,) if one else (kernel._chunk, kernel._together):
        names = function.arg_names
        made = triton.compile(
            ASTSource(
                fn=function,
                signature={name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in names},
                constexprs={(place,): fixed[name] for place, name in enumerate(names) if name in fixed},
                attrs={
                    (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in kinds and name != "scale"
                },
            ),
            target=GPUTarget("cuda", capability, 32),
        )
        assert made.asm["cubin"]
        shared.append(made.metadata.shared)
    return max(shared)


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    with torch.inference_mode():
        if what == "engine":
            print(json.dumps(engine(*given)))
        else:
            print(json.dumps({case: globals()[what](*eval(case, {"torch": torch})) for case in given}))

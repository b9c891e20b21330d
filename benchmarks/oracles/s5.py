"""The S5 layer: lindermanlab/S5, s5/ssm.py (seen at 3c18fdb). Needs jax and flax beside torch (any recent ones)."""

import sys
from types import ModuleType

import torch

from benchmarks.oracles import difference, report, source
from zoo.ssm.s5 import S5System

CHANNELS, STATES, TIME = 6, 16, 33


def load(path: str) -> ModuleType:
    import jax  # pyright: ignore[reportMissingImports]

    jax.config.update("jax_enable_x64", True)
    jax.numpy.DeviceArray = jax.Array  # a name that recent versions dropped and the authors' annotations use
    sys.path.insert(0, path)
    from s5 import ssm  # pyright: ignore[reportMissingImports]

    return ssm


def main() -> None:
    theirs = load(str(source(__doc__)))
    for rule in ("zoh", "bilinear"):
        torch.manual_seed(3)
        ours = S5System(CHANNELS, STATES, 2, rule, dt_min=0.05, dt_max=0.5).double()
        u = torch.randn(TIME, CHANNELS, dtype=torch.float64)
        given = {name: parameter.detach().numpy() for name, parameter in ours.named_parameters()}
        half = given["B"].shape[0]
        layer = theirs.S5SSM(
            Lambda_re_init=given["A_real"], Lambda_im_init=given["A_imag"], V=torch.zeros(2 * half, half).numpy() + 0j,
            Vinv=torch.zeros(half, 2 * half).numpy() + 0j, H=CHANNELS, P=half, C_init="complex_normal",
            discretization=rule, dt_min=0.05, dt_max=0.5, conj_sym=True, clip_eigs=True,
        )  # fmt: skip
        weights = {"Lambda_re": given["A_real"], "Lambda_im": given["A_imag"], "log_step": given["log_step"][:, None]}
        weights |= {name: given[name] for name in "BCD"}
        wanted = torch.tensor(layer.apply({"params": weights}, u.numpy()).__array__())
        with torch.no_grad():
            report(rule, y=difference(ours(u[None])[0][0], wanted))


if __name__ == "__main__":
    main()

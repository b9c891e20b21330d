"""The DPLR kernel of S4: state-spaces/s4, models/s4/s4.py (seen at e757cef)."""

import sys

import torch

from benchmarks.oracles import difference, perturb, report, source, stand_in
from zoo.ssm.s4 import S4System

CHANNELS, STATES = 5, 16


def main() -> None:
    sys.path.insert(0, str(source(__doc__) / "models" / "s4"))
    stand_in("pytorch_lightning")
    stand_in("pytorch_lightning.utilities", rank_zero_only=lambda function: function)
    import s4 as theirs  # pyright: ignore[reportMissingImports]

    for length in (33, 64, 100):
        torch.manual_seed(0)
        kernel = theirs.SSMKernelDPLR(
            d_model=CHANNELS, d_state=STATES, l_max=length, init="legs", rank=1, n_ssm=CHANNELS, channels=1,
            dt_min=0.01, dt_max=0.2, dt_transform="exp", real_transform="exp", imag_transform="none", verbose=False,
        ).double()  # fmt: skip
        ours = S4System(CHANNELS, STATES).double()
        perturb(kernel, 0.05)
        with torch.no_grad():
            dt, A, B, C, P, _ = kernel._get_params()
            ours.log_step.copy_(dt.real.squeeze().log())
            ours.log_A_real.copy_((-A.real).log())
            ours.A_imag.copy_(A.imag)
            for mine, value in ((ours.P, P), (ours.B, B), (ours.C, C)):
                mine.copy_(torch.view_as_real(value[0].resolve_conj()))
            report(f"length {length}", kernel=difference(ours.kernel(length), kernel(L=length)[0][0]))


if __name__ == "__main__":
    main()

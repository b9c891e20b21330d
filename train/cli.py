"""`zoo pretrain`, `zoo finetune`, `zoo validate`: LightningCLI subcommands with typed configurations."""

import logging
import sys
import warnings
from collections.abc import Sequence

COMMANDS = ("pretrain", "finetune", "validate")


def main(argv: Sequence[str]) -> int:
    """Run a command; `argv[0]` is its name. Returns the exit status: a user's mistake is one line and status 2."""
    argv = list(argv)
    if not argv or argv[0] not in COMMANDS:
        print(f"zoo: choose from {', '.join(COMMANDS)}, got {argv[:1]}", file=sys.stderr)
        return 2
    helping = bool({"-h", "--help"} & set(argv)) or any(each.startswith("--print_config") for each in argv)
    if not helping:
        print(f"zoo {argv[0]}: loading torch and lightning", flush=True)  # their import takes seconds
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*set_vital.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")  # peft asks for it
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)  # hints of products, what hardware is absent

    try:
        from train.arguments import prepared

        prepared_argv = prepared(argv, helping)
        from train.run import Run

        Run(prepared_argv)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"zoo {argv[0]}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

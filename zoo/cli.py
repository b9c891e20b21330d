"""The `zoo` command. Commands of train/ are named as strings, so that zoo imports no train."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ops.native_memory import keep_freed_memory

# Run by another module's `main(argv)`, imported only then; argv begins with the command's name.
ELSEWHERE = {
    "pretrain": ("train.cli:main", "train a model from a YAML configuration"),
    "finetune": ("train.cli:main", "train on from a checkpoint"),
    "validate": ("train.cli:main", "measure a checkpoint's loss"),
    "demo": ("train.demo:main", "pretrain a small hybrid on the standard library's source, then let it write"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit status; a user's mistake is one line on stderr and status 2."""
    if argv is None:  # a process of our own: training on a CPU spends a quarter of its time on pages given back
        keep_freed_memory()
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("torchao", "torch.utils._pytree"):  # where torchao is installed, transformers imports it
        logging.getLogger(name).setLevel(logging.ERROR)
    if argv and argv[0] in ELSEWHERE:
        module, function = ELSEWHERE[argv[0]][0].split(":")
        return getattr(importlib.import_module(module), function)(argv) or 0
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"zoo {argv[0]}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zoo", description="Efficient sequence-model architectures.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, text) in ELSEWHERE.items():
        commands.add_parser(name, help=text)
    listing = commands.add_parser("list", help="kinds of blocks and presets")
    listing.set_defaults(run=_list)
    describe = commands.add_parser("describe", help="parameters, FLOPs and state bytes of a kind or preset")
    describe.add_argument("name", help="a kind (zoo list), a preset, or a model's YAML file")
    describe.add_argument("--width", type=int, default=512, help="for a kind (default 512)")
    describe.set_defaults(run=_describe)
    generate = commands.add_parser("generate", help="continue a prompt with a checkpoint")
    generate.add_argument("--model", required=True, help="zoo or published checkpoint, or an adapter: folder or hub id")
    generate.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    generate.add_argument("--max-new-tokens", type=int, default=200)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default=None, help="cpu, cuda, ... (default: the GPU where there is one)")
    generate.add_argument("--dtype", default=None, help="float32, bfloat16, ... (default: the checkpoint's)")
    generate.add_argument("--quantize", default=None, help="int8 or int4 weights (needs torchao)")
    generate.add_argument("--text", default=None, help="file on which quality is compared (default: the prompt)")
    generate.set_defaults(run=_generate)
    _add_evaluate(commands)
    _add_convert(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    """`zoo evaluate --model DIR [--tasks ...] [--text FILE]`."""
    text = "run lm-eval's tasks, or measure the perplexity of a text"
    evaluate = commands.add_parser("evaluate", help=text, description=f"{text.capitalize()}.")
    evaluate.add_argument("--model", required=True, help="zoo or published checkpoint, or an adapter: folder or hub id")
    evaluate.add_argument("--tasks", default="", help="names with commas between, or YAML files (needs lm-eval)")
    evaluate.add_argument("--include-path", default=None, help="folder of more tasks")
    evaluate.add_argument("--limit", type=float, default=None, help="examples of each task; below 1 a share of them")
    evaluate.add_argument("--fewshot", type=int, default=None, help="solved examples before each (default: the task's)")
    evaluate.add_argument(
        "--max-length", type=int, default=None, help="tokens of context in tasks (default: the model's)"
    )
    evaluate.add_argument("--text", default=None, help="text file whose perplexity is measured")
    evaluate.add_argument("--window", type=int, default=1024, help="tokens read at once (default 1024)")
    evaluate.add_argument("--stride", type=int, default=None, help="tokens between windows (default: half of one)")
    evaluate.add_argument("--stream", action="store_true", help="carry the state on: all of the text is context")
    evaluate.add_argument("--batch-size", default="1", help="requests or windows at once; auto for tasks (default 1)")
    evaluate.add_argument("--quantize", default=None, help="int8 or int4 weights (needs torchao)")
    evaluate.add_argument("--device", default=None, help="cpu, cuda, ... (default: the GPU where there is one)")
    evaluate.add_argument("--dtype", default=None, help="float32, bfloat16, ... (default: the checkpoint's)")
    evaluate.add_argument("--output", default=None, help="JSON file to write")
    evaluate.set_defaults(run=_evaluate)


def _add_convert(commands: Any) -> None:
    """`zoo convert [OPERATION] --from DIR --to DIR`."""
    text = "a published checkpoint to a zoo one or back; or an operation on a model"
    convert = commands.add_parser("convert", help=text, description=f"Convert {text}.")
    convert.set_defaults(run=_convert, operation=None, source=None, target=None)
    convert.add_argument("--family", default=None, help="published format to write (default: where it came from)")
    operations = convert.add_subparsers(metavar="OPERATION")
    each = {
        "upcycle": operations.add_parser("upcycle", help="feed-forward layers become experts that start as copies"),
        "moefy": operations.add_parser("moefy", help="split feed-forward layers into experts of their neurons"),
        "share-kv": operations.add_parser("share-kv", help="fewer key and value heads, each the mean of several"),
        "merge": operations.add_parser("merge", help="add an adapter (LoRA) to the weights it was trained on"),
    }
    for name in ("upcycle", "moefy"):
        each[name].add_argument("--experts", type=int, default=8, help="(default 8)")
        each[name].add_argument("--seed", type=int, default=0)
    each["upcycle"].add_argument("--top-k", type=int, default=2, help="experts a token visits (default 2)")
    each["upcycle"].add_argument("--every", type=int, default=1, help="take every so many-th layer (default 1: all)")
    each["moefy"].add_argument("--top-k", type=int, default=None, help="experts a token visits (default: all)")
    each["moefy"].add_argument(
        "--text", default=None, help="a text file on which routers learn (default: from weights)"
    )
    each["share-kv"].add_argument("--kv-heads", type=int, default=1, help="(default 1: multi-query attention)")
    for name, parser in [(None, convert), *each.items()]:
        # Given before or after the operation's name: a default of its own would undo the former.
        unless = argparse.SUPPRESS
        parser.add_argument("--from", dest="source", default=unless, help="checkpoint folder or hub id")
        parser.add_argument("--to", dest="target", default=unless, help="folder to write")
        if name is not None:
            parser.set_defaults(operation=name)


def _list(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from zoo.config import presets
    from zoo.registry import block_class, kinds

    table = Table("kind", "what it is", title="Blocks")
    for kind in kinds():
        table.add_row(kind, (block_class(kind).__doc__ or "").strip().splitlines()[0])
    console = Console()
    console.print(table)
    console.print("Presets: " + ", ".join(presets()), highlight=False)


def _describe(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from zoo.config import load_config, presets
    from zoo.describe import describe_block, describe_model
    from zoo.registry import KINDS, nearest

    console, name = Console(), arguments.name
    if name in KINDS:
        facts = describe_block(name, arguments.width)
        console.print(f"[bold]{name}[/bold] ({facts['class']}), width {facts['width']}", highlight=False)
        console.print(facts["about"], markup=False, highlight=False)
        console.print(
            "options: " + ", ".join(f"{key}={value!r}" for key, value in facts["options"].items()), markup=False
        )
        console.print("cost, with T tokens, width D and b bytes a number:", highlight=False)
        for what, grows in facts["cost"].items():
            console.print(f"  {what:12}  {grows}", markup=False, highlight=False)
        total = sum(facts["parameters"].values())
    elif name in presets() or Path(name).exists():
        facts = describe_model(load_config(name))
        total = facts["total"]
        console.print(
            f"[bold]{name}[/bold]: {total:,} parameters, {facts['active']:,} used by a token", highlight=False
        )
    else:
        known = (*KINDS, *presets())
        raise ValueError(f"{name!r} is no kind, preset or file{nearest(name, known)}. Known: {', '.join(known)}")
    _tables(console, facts, total)


def _tables(console: Any, facts: dict[str, Any], total: int) -> None:
    from rich.table import Table

    parts = Table("part", "parameters", "share", title="Parameters")
    for part, size in facts["parameters"].items():
        parts.add_row(part, f"{size:,}", f"{100 * size / max(total, 1):.1f}%")
    costs = Table("context", "FLOPs a token", "state bytes a row", title="Cost of one more token (forward; float32)")
    for row in facts["contexts"]:
        costs.add_row(*(f"{row[key]:,}" for key in ("context", "flops", "state_bytes")))
    for table in (parts, costs):
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)


def _generate(arguments: argparse.Namespace) -> None:
    from zoo.convert import load
    from zoo.hf.generate import generate

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    generate(
        arguments.model,
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        device=arguments.device,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        text=arguments.text,
        load=load,
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from zoo.convert import load
    from zoo.convert.published import local_folder
    from zoo.hf import hide_progress
    from zoo.hf.evaluate import evaluate
    from zoo.hf.generate import named_device, named_dtype, tokenizer_of

    size: str = arguments.batch_size
    if not (size.isdecimal() and int(size)) and size.split(":")[0] != "auto":
        raise ValueError(f"batch_size={size!r} must be a number of at least 1, or auto")
    device, dtype = named_device(arguments.device), named_dtype(arguments.dtype)
    folder = local_folder(arguments.model)
    hide_progress()
    tokenizer, model = tokenizer_of(str(folder)), cast(Any, load(folder))
    evaluate(
        model.to(device=device, dtype=dtype).eval(),
        tokenizer,
        tasks=[each for each in arguments.tasks.split(",") if each],
        batch_size=int(size) if size.isdecimal() else size,
        **{
            name: getattr(arguments, name)
            for name in ("text", "window", "stride", "stream", "quantize", "include_path", "limit", "fewshot")
        },
        max_length=arguments.max_length,
        output=arguments.output,
        name=arguments.model,
    )


def _convert(arguments: argparse.Namespace) -> None:
    for name, value in (("--from", arguments.source), ("--to", arguments.target)):
        if value is None:
            raise ValueError(f"which checkpoint? Give {name} a folder")
    from zoo import convert
    from zoo.convert.published import local_folder, operate
    from zoo.hf import hide_progress
    from zoo.hf.lora import is_adapter

    hide_progress()
    if arguments.operation is None:
        written = convert.convert(arguments.source, arguments.target, arguments.family)
        print(f"{arguments.target} holds a {written} checkpoint")
        return
    if arguments.family is not None:
        raise ValueError(
            f"{arguments.operation} writes a zoo checkpoint; leave --family out, and convert the result if it fits"
        )
    source = local_folder(arguments.source)
    if arguments.operation == "merge":
        if not is_adapter(source):
            raise ValueError(f"{arguments.source} holds no adapter (no adapter_config.json); merge takes one")
        operate(source, arguments.target, lambda model: model)  # loading it merges it
        print(f"{arguments.target} holds the model")
        return
    options: dict[str, Any] = {"upcycle": ("experts", "top_k", "every", "seed"), "moefy": ("experts", "top_k", "seed")}
    chosen = {name: getattr(arguments, name) for name in options.get(arguments.operation, ("kv_heads",))}
    if arguments.operation == "moefy" and arguments.text is not None:
        chosen["tokens"] = _windows(source, Path(arguments.text))
    operation = getattr(convert, arguments.operation.replace("-", "_"))
    operate(source, arguments.target, lambda model: operation(model, **chosen))
    print(f"{arguments.target} holds the model; train it further with zoo finetune --from {arguments.target}")


def _windows(model: Path, text: Path, length: int = 512, count: int = 64) -> Any:
    """The first tokens of a text file in up to `count` windows, by the model's tokenizer."""
    import torch

    from zoo.hf import load_tokenizer

    ids = load_tokenizer(model)(text.read_text(encoding="utf-8"))["input_ids"]
    if not ids:
        raise ValueError(f"{text} is empty; give a text like those the model was trained on")
    length = min(length, len(ids))
    windows = torch.tensor(ids[: length * min(count, len(ids) // length)])
    return windows.reshape(-1, length)


if __name__ == "__main__":
    sys.exit(main())

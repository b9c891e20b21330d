"""A whole RWKV-6 model, a token after another: BlinkDL/ChatRWKV, RWKV_v6_demo.py (seen at 965e40b)."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import zoo
from benchmarks.oracles import difference, perturb, report, source

VOCAB, WIDTH, HEADS, LAYERS, TIME = 37, 32, 4, 2, 50
# Theirs: ours.
TIME_MIX = {
    "time_maa_x": "mix_input",
    "time_maa_w2": "mix_decode",
    "time_decay": "decay",
    "time_faaaa": "bonus",
    "ln_x.weight": "norm_weight",
    "ln_x.bias": "norm_bias",
}
TRANSPOSED = {"time_maa_w1": "mix_encode", "time_decay_w1": "decay_encode", "time_decay_w2": "decay_decode"}
SAME = {"receptance", "key", "value", "gate", "output"}
CHANNEL_MIX = {"time_maa_k": "mix_key", "time_maa_r": "mix_receptance"}


def weights(model: zoo.LanguageModel) -> dict[str, Tensor]:
    """Ours under their names."""
    given, found = model.state_dict(), {}
    found |= {"emb.weight": given["embedding.weight"], "head.weight": given["head.weight"]}
    for part in ("weight", "bias"):
        found[f"blocks.0.ln0.{part}"] = given[f"embedding_norm.{part}"]
        found[f"ln_out.{part}"] = given[f"norm.{part}"]
    for index, residual in enumerate(model.residuals):
        layer, half = divmod(index, 2)
        own = residual.block.state_dict()
        theirs = {name: value for name, value in own.items() if name.split(".")[0] in SAME}
        if half:
            theirs |= {name: own[ours] for name, ours in CHANNEL_MIX.items()}
        else:
            theirs |= {name: own[ours] for name, ours in TIME_MIX.items()}
            theirs |= {name: own[f"{ours}.weight"].T for name, ours in TRANSPOSED.items()}
            theirs |= {f"time_maa_{name}": row for name, row in zip("wkvrg", own["mix"], strict=True)}
        found |= {f"blocks.{layer}.{('att', 'ffn')[half]}.{name}": value for name, value in theirs.items()}
        for part in ("weight", "bias"):
            found[f"blocks.{layer}.ln{half + 1}.{part}"] = residual.norm.state_dict()[part]
    return {name: value.clone() for name, value in found.items()}


def authors_model(file: Path, given: dict[str, Tensor]) -> Any:
    """Their RWKV_RNN. Of the file only imports and that class run: the rest loads a checkpoint and prints samples."""
    tree = ast.parse(file.read_text())
    imports: list[ast.stmt] = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
    tree.body = imports + [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == "RWKV_RNN"]
    names: dict[str, Any] = {"MyModule": nn.Module, "MyFunction": lambda function: function}
    exec(compile(tree, str(file), "exec"), names)
    with mock.patch("torch.load", return_value=given):
        return names["RWKV_RNN"](SimpleNamespace(MODEL_NAME="", n_layer=LAYERS, n_embd=WIDTH))


@torch.no_grad()
def main() -> None:
    file = source(__doc__) / "RWKV_v6_demo.py"
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # they round to float32 here and there
    torch.manual_seed(0)
    blocks = [{"kind": "rwkv6", "heads": HEADS, "mix_rank": 6, "decay_rank": 10}, "rwkv6_channel_mix"]
    sizes = {"vocab_size": VOCAB, "width": WIDTH, "norm": "layer", "embedding_norm": True, "tied_embeddings": False}
    ours = zoo.LanguageModel(sizes | {"stack": [{"repeat": LAYERS, "blocks": blocks}]}).eval()
    perturb(ours, 0.3)
    reference = authors_model(file, weights(ours))
    tokens, rows = torch.randint(VOCAB, (TIME,)), []
    state: Any = None
    for token in tokens:
        logits, state = reference.forward(token, state)
        rows.append(logits)
    wanted = torch.stack(rows)
    parts, after = [], ours.init_state(1)
    for token in tokens:
        out = ours(token[None, None], after)
        parts.append(out.logits[0])
        after = out.state
    report(
        f"{LAYERS} layers, {TIME} tokens",
        whole=difference(ours(tokens[None]).logits[0], wanted),
        decoded=difference(torch.cat(parts), wanted),
    )
    for layer, (channel, time, *sums) in enumerate(state.unflatten(0, (LAYERS, -1))):
        matrices = torch.stack(sums).reshape(HEADS, WIDTH // HEADS, -1)
        report(
            f"state of layer {layer}",
            time_mix=difference(after[2 * layer].shift[0], time),
            matrices=difference(after[2 * layer].S[0], matrices),
            channel_mix=difference(after[2 * layer + 1].shift[0], channel),
        )


if __name__ == "__main__":
    main()

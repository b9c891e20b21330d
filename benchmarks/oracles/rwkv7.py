"""A whole RWKV-7 model, a token after another: BlinkDL/RWKV-LM, RWKV-v7/rwkv_v7_numpy.py (seen at 524481d)."""

import ast
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from benchmarks.oracles import difference, perturb, report, source

VOCAB, WIDTH, HEADS, LAYERS, TIME = 37, 32, 4, 3, 50
SQUARE = ("receptance", "key", "value", "output")


def pair(own: dict[str, Tensor], name: str) -> list[Tensor]:
    return [own[f"{name}.encode.weight"].T, own[f"{name}.decode.weight"].T]


def time_mix(own: dict[str, Tensor]) -> list[Tensor]:
    """Ours in the order in which their function takes them."""
    found = [*own["mix"], own["decay.decode.bias"], own["bonus"].flatten()]
    found += [*pair(own, "decay"), *pair(own, "rate"), own["rate.decode.bias"], *pair(own, "gate")]
    if "value_gate.decode.bias" in own:
        found += [*reversed(pair(own, "value_gate")), own["value_gate.decode.bias"]]
    found += [own["removal"], own["replacement"], *(own[f"{name}.weight"] for name in SQUARE)]
    return [*found, own["norm_weight"], own["norm_bias"]]


def weights(model: zoo.LanguageModel, block: Any) -> dict[str, list[Any]]:
    given = model.state_dict()
    found = {"emb": [given["embedding.weight"]], "head": [given["head.weight"]]}
    found["blocks.0.ln0"] = [given["embedding_norm.weight"], given["embedding_norm.bias"]]
    found["ln_out"] = [given["norm.weight"], given["norm.bias"]]
    for index, layer in enumerate(block.each_layer):
        at, channel = f"blocks.{index}", layer.channel_mix
        found[f"{at}.ln1"] = [layer.time_norm.weight, layer.time_norm.bias]
        found[f"{at}.ln2"] = [layer.channel_norm.weight, layer.channel_norm.bias]
        found[f"{at}.att"] = time_mix(layer.time_mix.state_dict())
        found[f"{at}.ffn"] = [channel.mix_key, channel.key.weight, channel.value.weight]
    return {name: [each.detach().numpy().copy() for each in values] for name, values in found.items()}


def authors_functions(file: Path) -> dict[str, Any]:
    """Their imports, functions and one-line functions: the rest loads a checkpoint."""
    tree = ast.parse(file.read_text())
    tree.body = [
        each
        for each in tree.body
        if isinstance(each, ast.Import | ast.ImportFrom | ast.FunctionDef)
        or (
            isinstance(each, ast.Assign)
            and isinstance(each.value, ast.Lambda)
            and ast.unparse(each.targets[0]) != "params"
        )
    ]
    names: dict[str, Any] = {"N_LAYER": LAYERS, "N_HEAD": HEADS, "HEAD_SIZE": WIDTH // HEADS}
    exec(compile(tree, str(file), "exec"), names)
    return names


@torch.no_grad()
def main() -> None:
    file = source(__doc__) / "RWKV-v7/rwkv_v7_numpy.py"
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "width": WIDTH, "norm": "layer", "embedding_norm": True, "tied_embeddings": False}
    ours = zoo.LanguageModel(sizes | {"stack": [{"kind": "rwkv7", "layers": LAYERS, "heads": HEADS}]}).eval()
    perturb(ours, 0.3)
    given, run = weights(ours, ours.residuals[0].block), authors_functions(file)["RWKV7"]
    start = torch.zeros(LAYERS, 2, WIDTH), torch.zeros(LAYERS, HEADS, WIDTH // HEADS, WIDTH // HEADS)
    state: Any = tuple(each.numpy() for each in start)
    tokens, rows, parts, after = torch.randint(VOCAB, (TIME,)), [], [], ours.init_state(1)
    for token in tokens:
        logits, state = run(given.__getitem__, int(token), state)
        rows.append(torch.from_numpy(logits))
        out = ours(token[None, None], after)
        parts.append(out.logits[0])
        after = out.state
    wanted = torch.stack(rows)
    report(
        f"{LAYERS} layers, {TIME} tokens",
        whole=difference(ours(tokens[None]).logits[0], wanted),
        decoded=difference(torch.cat(parts), wanted),
    )
    shifts, matrices = (torch.from_numpy(each) for each in state)
    for index, layer in enumerate(after[0].layers):
        report(
            f"state of layer {index}",
            time_mix=difference(layer.shift[0], shifts[index, 0]),
            matrices=difference(layer.S[0].mT, matrices[index]),
            channel_mix=difference(layer.channel_shift[0], shifts[index, 1]),
        )


if __name__ == "__main__":
    main()

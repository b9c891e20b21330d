"""A whole RWKV-4 model, token by token: BlinkDL/RWKV-LM, RWKV-v4neo/src/model_run.py (seen at 524481d)."""

import os
import sys
from types import SimpleNamespace

import torch

import zoo
from benchmarks.oracles import difference, perturb, report, source

VOCAB, WIDTH, LAYERS, TIME = 37, 24, 3, 19
MIXES = {"time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r"}


def weights(model: zoo.LanguageModel) -> dict[str, torch.Tensor]:
    """Ours under their names."""
    given, found = model.state_dict(), {}
    found |= {"emb.weight": given["embedding.weight"], "head.weight": given["head.weight"]}
    for part in ("weight", "bias"):
        found[f"blocks.0.ln0.{part}"] = given[f"embedding_norm.{part}"]
        found[f"ln_out.{part}"] = given[f"norm.{part}"]
    for index, residual in enumerate(model.residuals):
        layer, half = divmod(index, 2)
        for part in ("weight", "bias"):
            found[f"blocks.{layer}.ln{half + 1}.{part}"] = residual.norm.state_dict()[part]
        for name, value in residual.block.state_dict().items():
            found[f"blocks.{layer}.{('att', 'ffn')[half]}.{MIXES.get(name, name)}"] = value
    return {name: value.clone() for name, value in found.items()}


def main() -> None:
    os.environ["RWKV_JIT_ON"] = "0"
    sys.path.insert(0, str(source(__doc__) / "RWKV-v4neo" / "src"))
    import model_run as theirs  # pyright: ignore[reportMissingImports]

    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # they round to float32 here and there
    torch.manual_seed(0)
    stack = [{"repeat": LAYERS, "blocks": ["rwkv4", "rwkv4_channel_mix"]}]
    sizes = {"vocab_size": VOCAB, "width": WIDTH, "norm": "layer", "embedding_norm": True, "tied_embeddings": False}
    ours = zoo.LanguageModel(sizes | {"stack": stack}).eval()
    perturb(ours, 0.3)
    torch.load = lambda *_, **__: weights(ours)
    options = {"FLOAT_MODE": "as given", "RUN_DEVICE": "cpu", "MODEL_NAME": "", "n_embd": WIDTH, "n_layer": LAYERS}
    reference = theirs.RWKV_RNN(SimpleNamespace(**options))
    tokens, state, wanted = torch.randint(VOCAB, (TIME,)), None, []
    for end in range(1, TIME + 1):
        logits, state = reference.forward(tokens[:end].tolist(), state)
        wanted.append(logits)
    with torch.no_grad():
        whole = ours(tokens[None]).logits[0]
        parts, state = [], ours.init_state(1)
        for token in tokens:
            out = ours(token[None, None], state)
            parts.append(out.logits[0])
            state = out.state
    report(
        f"{LAYERS} layers, {TIME} tokens",
        whole=difference(whole, torch.stack(wanted)),
        decoded=difference(torch.cat(parts), torch.stack(wanted)),
    )


if __name__ == "__main__":
    main()

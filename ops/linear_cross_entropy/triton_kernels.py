"""Cross entropy of rows of logits and its gradient in their place."""

import triton
import triton.language as tl


@triton.jit
def _logits(products, inside, scale, softcap, CAPPED: tl.constexpr):
    """Logits of some products; far below all others outside."""
    found = tl.load(products, mask=inside, other=0.0).to(tl.float32) * scale
    if CAPPED:
        found = softcap * (1 - 2 / (tl.exp(2 * found / softcap) + 1))  # softcap · tanh(found / softcap)
    return tl.where(inside, found, -3e38)


@triton.jit
def losses(
    products,
    targets,
    nats,
    stride,
    vocab,
    ignore_index,
    scale,
    softcap,
    GRADIENT: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = products + row * stride
    target = tl.load(targets + row)
    counts = target != ignore_index
    # Before the reductions, whose barriers keep it ahead of what other warps write.
    chosen = _logits(base + tl.where(counts, target, 0), counts, scale, softcap, CAPPED)
    lanes = tl.arange(0, BLOCK)
    # Every lane has a greatest logit and a sum of its own; a lane without any has 0 of the whole sum, since its
    # greatest lies far below the others'. No infinity: its difference from itself is not a number.
    top = tl.full([BLOCK], -3e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        logits = _logits(base + start + lanes, start + lanes < vocab, scale, softcap, CAPPED)
        higher = tl.maximum(top, logits)
        total = total * tl.exp(top - higher) + tl.exp(logits - higher)
        top = higher
    best = tl.max(top, 0)
    whole = tl.sum(total * tl.exp(top - best), 0)
    tl.store(nats + row, tl.where(counts, tl.log(whole) + best - chosen, 0.0))
    if GRADIENT:
        for start in range(0, vocab, BLOCK):
            place = start + lanes
            inside = place < vocab
            logits = _logits(base + place, inside, scale, softcap, CAPPED)
            slopes = tl.exp(logits - best) / whole - tl.where(place == target, 1.0, 0.0)
            if CAPPED:
                bent = tl.where(inside, logits, 0.0) / softcap
                slopes *= 1 - bent * bent
            slopes = tl.where(counts, slopes * scale, 0.0)
            tl.store(base + place, slopes.to(products.dtype.element_ty), mask=inside)

"""Generated networks of attention, see `sartor.profiling.networks`."""

from __future__ import annotations

from sartor.profiling.network_builder import Net


def vit(net: Net) -> None:
    """Patches, then blocks of attention between tokens or between channels."""
    patch = net.rng.choice(
        [size for size in (8, 16, 16, 32) if net.shape[2] % size == 0 and net.shape[2] <= 16 * size]
    )
    heads = net.rng.choice([2, 3, 4, 6, 8, 12])
    d = 8 * net.rng.randint(3, 8)
    c = heads * d
    net.conv(c, patch, patch)
    tokens = net.shape[2] ** 2
    number = net.model.constant("tokens", [1, c, tokens], "INT64")
    net.node("Reshape", [net.value, number])
    net.node("Transpose", [net.value], perm=[0, 2, 1])
    net.shape = (1, tokens, c)
    joined = net.model.constant("joined", [1, tokens, c], "INT64")
    at_once = net.rng.random() < 0.5
    across = net.rng.random() < 0.3
    hidden = 0
    for _ in range(net.rng.choice([2, 3, 4, 6, 12])):
        if not net.designed or not hidden:
            hidden = net.width(2 * c, 4 * c)
        source = net.value
        normed = net.norm()
        parts: list[str] = []
        if across:
            _attend_across(net, heads, d)
            net.at(net.node("Reshape", [net.value, joined]), (1, tokens, c))
            _transform(net, source, hidden)
            continue
        if at_once:
            parts = _projected_at_once(net, heads, d, (2, 0, 3, 1, 4))
            parts[1] = net.node("Transpose", [parts[1]], perm=[0, 1, 3, 2])
        for perm in () if at_once else ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
            net.value, net.shape = normed, (1, tokens, c)
            net.matmul(c)
            net.reshape((1, tokens, heads, d))
            parts.append(net.node("Transpose", [net.value], perm=perm))
        scores = net.node("MatMul", parts[:2])
        net.node("Mul", [scores, net.model.constant(f"scale{scores}", d**-0.5, "FLOAT")])
        net.node("MatMul", [net.node("Softmax", [net.value], axis=-1), parts[2]])
        net.node("Reshape", [net.node("Transpose", [net.value], perm=[0, 2, 1, 3]), joined])
        net.shape = (1, tokens, c)
        _transform(net, source, hidden)
    net.norm()
    net.node("Transpose", [net.value], perm=[0, 2, 1])
    net.shape = (1, c, tokens)
    net.head()


def _transform(net: Net, source: str, hidden: int) -> None:
    """What follows attention: its projection, and the layers on every token."""
    c = net.shape[-1]
    net.matmul(c)
    source = net.add(source)
    net.norm()
    net.matmul(hidden)
    net.node("Gelu", [net.value])
    net.matmul(c)
    net.add(source)


def _attend_across(net: Net, heads: int, d: int) -> None:
    """Attention between channels instead of tokens (XCiT, arXiv:2106.09681), of normalised queries and keys."""
    tokens = net.shape[1]
    queries, keys, values = _projected_at_once(net, heads, d, (2, 0, 3, 4, 1))
    joined = net.value
    last = net.model.constant(f"last{joined}", [-1], "INT64")
    shape = net.model.constant(f"shape{joined}", [1, heads, d, tokens], "INT64")
    least = net.model.constant(f"least{joined}", 1e-12, "FLOAT")
    normed = []
    for part in (queries, keys):
        length = net.node("Clip", [net.node("ReduceL2", [part, last], keepdims=1), least])
        normed.append(net.node("Div", [part, net.node("Expand", [length, shape])]))
    turned = net.node("Transpose", [normed[1]], perm=[0, 1, 3, 2])
    net.node("Mul", [net.node("MatMul", [normed[0], turned]), net.weight((heads, 1, 1), 1)])
    net.node("MatMul", [net.node("Softmax", [net.value], axis=-1), values])
    net.node("Transpose", [net.value], perm=[0, 3, 1, 2])


def _projected_at_once(net: Net, heads: int, d: int, perm: tuple[int, ...]) -> list[str]:
    """Queries, keys and values of one product, turned together and parted afterwards."""
    _, tokens, c = net.shape
    net.matmul(3 * c)
    net.reshape((1, tokens, 3, heads, d))
    joined = net.transpose(perm)
    parts = []
    for number in range(3):
        index = net.model.constant(f"part{joined}{number}", number, "INT64")
        parts.append(net.node("Gather", [joined, index], axis=0))
    return parts

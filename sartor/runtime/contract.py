"""Whether artifacts fit the stages that name them, and which values of a bundle have an axis of samples.

Shapes are followed through the stages in the bundle's own symbols: an artifact that takes `[B, 3]` and gives `[B, 10]`
makes `[N, 10]` out of `[N, 3]`, and `[4, 10]` out of `[4, 3]`. So what is decided sample by sample is known before
anything runs, and not guessed from sizes that happen to agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from sartor.backends.protocol import Artifact, TensorSpec
from sartor.errors import ModelError

if TYPE_CHECKING:
    from sartor.runtime.bundle import BundleDocument, Condition, Stage


def sample_symbol(inputs: Iterable[TensorSpec]) -> str | None:
    """The symbol of the axis of samples, the first one of inputs; None where a call is one sample as a whole."""
    symbols = {t.shape[0] for t in inputs if t.shape and isinstance(t.shape[0], str) and t.shape[0]}
    return str(symbols.pop()) if len(symbols) == 1 else None


def per_sample(document: BundleDocument, artifacts: Mapping[str, Artifact]) -> frozenset[str]:
    """The values that have an axis of samples, which is their first.

    Args:
        document: with stages whose values are known to be there.
        artifacts: by stage.

    Raises:
        ModelError: a stage names what its artifact does not have, or gives it another type or shape; a condition
            reads something else than what its metric is of; a stage that runs for some of the samples reads or makes
            a value that cannot be told apart by sample.
    """
    samples = sample_symbol(document.inputs)
    values = {tensor.name: tensor for tensor in document.inputs}
    always = set(values)
    for stage in document.stages:
        artifact = artifacts[stage.name]
        made = _made(stage, artifact, values)
        read = [values[name] for name in stage.inputs.values()]
        if stage.when is not None:
            read.append(values[stage.when.value])
            _check_condition(stage, stage.when, values[stage.when.value], samples)
        if stage.when is None and always.issuperset(tensor.name for tensor in read):
            always.update(tensor.name for tensor in made)
        elif samples is not None:
            for tensor, is_made in (*((t, False) for t in read), *((t, True) for t in made)):
                if samples in tensor.shape[1:] or (is_made and tensor.shape[:1] != (samples,)):
                    raise ModelError(
                        f"Stage '{stage.name}' runs for some of the samples, and '{tensor.name}', of shape "
                        f"{_text(tensor)}, cannot be told apart by sample; its first axis would have to be '{samples}'."
                    )
        for tensor in made:
            before = values.setdefault(tensor.name, tensor)
            if not (_fits(before, tensor) and _fits(tensor, before)):
                raise ModelError(
                    f"Stage '{stage.name}' makes '{tensor.name}' as {_text(tensor)}; it is "
                    f"{_text(before)} before. One value has one type and shape."
                )
    for tensor in document.outputs:
        if not _fits(tensor, values[tensor.name]):
            raise ModelError(
                f"Output '{tensor.name}' of the bundle is declared as {_text(tensor)}; its stage makes "
                f"{_text(values[tensor.name])}."
            )
    return frozenset(
        name for name, tensor in values.items() if samples is not None and tensor.shape[:1] == (samples,)
    )


def _made(stage: Stage, artifact: Artifact, values: Mapping[str, TensorSpec]) -> list[TensorSpec]:
    """What the stage adds, in the bundle's symbols."""
    inputs, outputs = ({spec.name: spec for spec in specs} for specs in (artifact.inputs, artifact.outputs))
    if set(stage.inputs) != set(inputs) or not set(stage.outputs) <= set(outputs):
        raise ModelError(
            f"Stage '{stage.name}' has inputs {sorted(stage.inputs)} and outputs {sorted(stage.outputs)}; its artifact "
            f"'{stage.artifact}' takes {sorted(inputs)} and makes {sorted(outputs)}. Name exactly its inputs, and "
            "outputs that it has."
        )
    sizes: dict[str, int | str] = {}
    for name, value in stage.inputs.items():
        spec, given = inputs[name], values[value]
        fits = _fits(spec, given)
        for own, dim in zip(spec.shape, given.shape, strict=False):
            if isinstance(own, str) and own and dim != "":
                fits = fits and sizes.setdefault(own, dim) == dim
        if not fits:
            raise ModelError(
                f"Stage '{stage.name}' gives '{value}', which is {_text(given)}, to input '{name}' of its artifact, "
                f"which takes {_text(spec)}."
            )
    return [
        TensorSpec(
            value,
            outputs[name].dtype,
            tuple(sizes.get(dim, "") if isinstance(dim, str) else dim for dim in outputs[name].shape),
        )
        for name, value in stage.outputs.items()
    ]


def _fits(taken: TensorSpec, given: TensorSpec) -> bool:
    """Whether a value may be given where `taken` is asked for: what has to be fixed is, or is not known."""
    return (
        taken.dtype == given.dtype
        and len(taken.shape) == len(given.shape)
        and all(
            isinstance(own, str) or dim in (own, "")
            for own, dim in zip(taken.shape, given.shape, strict=True)
        )
    )


def _check_condition(stage: Stage, when: Condition, value: TensorSpec, samples: str | None) -> None:
    first, rest = value.shape[:1], value.shape[1:]
    # One decision: for each sample along its axis, or for the call as a whole, which is one sample then.
    one_each = first == ((samples,) if samples is not None else (1,))
    if when.metric == "value":
        numbers = value.shape if samples is None else rest
        fits = (one_each or samples is None) and all(dim == 1 or isinstance(dim, str) for dim in numbers)
        expected = "one number per sample"
    else:
        fits = one_each and len(rest) == 1
        expected = "logits of shape [samples, classes]"
    if not fits:
        axis = f"the axis of samples is '{samples}'" if samples is not None else "a call is one sample"
        raise ModelError(
            f"Stage '{stage.name}' runs on the condition '{when.metric}' of '{value.name}', which is {_text(value)}. "
            f"It is decided by {expected}, and {axis} in this bundle."
        )


def _text(tensor: TensorSpec) -> str:
    dims = ", ".join(str(dim) if dim != "" else "?" for dim in tensor.shape)
    return f"{tensor.dtype} [{dims}]"

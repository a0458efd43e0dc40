"""A torch module to a flatbuffer by litert-torch, without its prints, logs and progress bars."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sartor.backends import telemetry
from sartor.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor, nn

REQUIREMENT = "sartor[tflite]"
_QUIET = {
    "LITERT_TORCH_SHOW_PROGRESS": "n",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",  # its announcement is printed at import, whatever the level
    # Kernels of other accelerators, whose failure to load is logged as a warning.
    "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1",
}


def convert(module: nn.Module, inputs: tuple[Tensor, ...], *, quantized: bool) -> bytes:
    """The flatbuffer of a module at the shapes of `inputs`.

    Raises:
        UsageError: litert-torch is not installed.
        BackendError: it cannot convert the module; its own error is a note.
    """
    with _quiet():
        litert_torch = telemetry.import_vendor("litert_torch", REQUIREMENT)
        try:
            model = litert_torch.convert(module, inputs, quant_config=_static() if quantized else None)
            content: bytes = model.model_content()
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            failure = BackendError(
                f"litert-torch could not convert the model: {type(error).__name__}: {' '.join(lines[:3])[:500]}"
            )
            failure.add_note(str(error)[:4000])
            raise failure from error
    return content


def _static() -> Any:
    """Makes the converter keep the scales and zero points that it finds."""
    from litert_torch.quantize import pt2e_quantizer, quant_config

    quantizer = pt2e_quantizer.PT2EQuantizer()
    quantizer.set_global(pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    return quant_config.QuantConfig(pt2e_quantizer=quantizer)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _QUIET}
    disabled = logging.root.manager.disable
    os.environ.update(_QUIET)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""Where nodes come from in the author's code: read from exporter metadata, kept out of shipped files."""

from __future__ import annotations

import ast
import os
import re

import onnx_ir as ir

from sartor.ir.program import NodeProvenance

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_STACK = "pkg.torch.onnx.stack_trace"
_TORCH = re.compile(r"(site|dist)-packages[/\\](torch|onnxscript)[/\\]")
_LIBRARY_PARTS = ("site-packages", "dist-packages")


def extract(model: ir.Model) -> dict[str, NodeProvenance]:
    """Module path, class and `file.py:line` per node name, branches of `If` included, where recorded.

    Only the file's base name is kept: nothing derived from a Program may name a machine's folders.
    """
    found: dict[str, NodeProvenance] = {}
    seen: set[str] = set()
    for node in model.graph.all_nodes():
        properties = node.metadata_props
        scopes, classes = _strings(properties.get(_SCOPES)), _strings(properties.get(_CLASSES))
        # The last entry of both lists is the operator itself; the one before is the innermost module.
        module = scopes[-2] if len(scopes) >= 2 else ""
        module_class = classes[-2].rpartition(".")[2] if len(classes) >= 2 else ""
        record = NodeProvenance(module, module_class, location(properties.get(_STACK, "")))
        if node.name in seen:  # two branches may share names, of which one will change
            found.pop(node.name, None)
        elif node.name and str(record):
            found[node.name] = record
        seen.add(node.name or "")
    return found


def location(stack_trace: str) -> str:
    """`file.py:line` of the author's innermost frame; of a library's if there is no other, and last of torch's."""
    frames = _FRAME.findall(stack_trace)
    own = [f for f in frames if not any(part in f[0] for part in _LIBRARY_PARTS) and f[0][:1] != "<"]
    models = [f for f in frames if f[0][:1] != "<" and not _TORCH.search(f[0])]
    if not frames:
        return ""
    path, line = (own or models or frames)[-1]
    return f"{os.path.basename(path)}:{line}"


def _strings(text: str | None) -> list[str]:
    try:
        parsed = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return [str(item) for item in parsed] if isinstance(parsed, list) else []

"""The bundled file loads compact checkpoints without this package."""

from __future__ import annotations

import dis
import json

from compress.checkpoint import bundle
from compress.checkpoint.open import open_checkpoint
from compress.checkpoint.write import write_checkpoint
from compress.spec.classes import KINDS
from tests.toolbox import prune


def test_bundle_refuses_missing_weights(tmp_path, pico_llama, stock):
    write_checkpoint(prune(open_checkpoint(pico_llama), sparsity=0.6), tmp_path / "out", store="compact")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["base"]["num_hidden_layers"] = 5
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    out = stock(
        "import transformers\n"
        "try:\n"
        f"    transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert "9 weights are missing, such as model.layers.4." in out


def test_bundle_needs_only_torch_and_transformers():
    import ast

    tree = ast.parse(bundle.source())
    roots = {
        (node.module if isinstance(node, ast.ImportFrom) else name.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert roots <= {
        "__future__",
        "copy",
        "dataclasses",
        "inspect",
        "json",
        "pathlib",
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
    }
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {"decode", "unpack_bits", "part_names", "CompressConfig", "CompressForCausalLM"} <= defined
    for auto in {kind.auto for kind in KINDS}:
        assert auto.replace("AutoModel", "Compress") in defined


def test_the_bundled_file_defines_each_name_once_and_all_that_it_uses():
    """Halves of modules are joined: no name of another half, and none of the package around it, may be missing."""
    import ast
    import builtins
    import types

    tree = ast.parse(bundle.source())
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(defined) == len(set(defined))
    code = compile(bundle.source(), bundle.FILE_NAME, "exec")
    known, used, codes = {*dir(builtins), "__name__"}, set(), [code]
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_NAME", "STORE_GLOBAL"):
            known.add(instruction.argval)
    while codes:
        code = codes.pop()
        used |= {
            instruction.argval for instruction in dis.get_instructions(code) if instruction.opname == "LOAD_GLOBAL"
        }
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    assert used > {"unpack_codes", "torch", "place_kept", "READERS"}
    assert used - known == set()

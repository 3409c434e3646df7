"""A transformers model whose blocks are in memory one at a time.

The skeleton (embeddings, norms outside blocks, rotary tables) is built from the config and stays in memory. A block's
weights are loaded into their modules, used, and released. Transformers' functions that rename and fuse weights are not part
of its public interface; they are used here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.architectures.inferred import Inferred
from compress.architectures.model_map import model_map
from compress.blockwise.read_ahead import ReadAhead
from compress.blockwise.spilled import MappedTables
from compress.checkpoint.values import Checkpoint
from compress.errors import PassError
from compress.models.blocks import find_lists, require_lists
from compress.models.classes import arguments_of, quiet_transformers, stock_class
from compress.spec.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def names_in_files(model: Any, spec: Spec, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values by a model's parameter names ▶ values by the names of a checkpoint's files; fused ones are split.

    Raises:
        PassError: transformers has no way back from the parameters to the files.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with quiet_transformers():
            stored = revert_weight_conversion(model, dict(parameters))
    except (ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise PassError(
            f"transformers cannot tell which tensor of the files holds {next(iter(parameters))}: {error}",
            fix="use a method that needs no calibration",
        ) from error
    prefix = f"{model.base_model_prefix}."  # files of a base class leave it out

    def spelt(name: str) -> str:
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in spec.tensors), name)

    return {name: _as_stored(spec, name, value) for name, value in ((spelt(n), v) for n, v in stored.items())}


def _as_stored(spec: Spec, name: str, value: torch.Tensor) -> torch.Tensor:
    """Experts as the files turn them: some classes read [E, O, I] and [E, I, O], and write the former alone."""
    shape = spec.tensors[name].shape if name in spec.tensors else ()
    turned = value.ndim == 3 and tuple(value.shape) != shape == tuple(value.mT.shape)
    return value.mT if turned else value


class StopForward(Exception):
    """Ends a pass through a model or block once what was asked for has been seen."""


#: Number of a block, its hidden states, and its other arguments ▶ its output.
Stubbed = Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class LoadedList:
    """One list of repeated layers, such as an encoder's.

    Attributes:
        path: see `Architecture.list_of`. name: of the list in memory. modules: the list.
        layers: its layers, for which stubs may stand in ``modules``.
        first: number of its first block among the blocks of all lists.
    """

    path: str
    name: str
    modules: Any
    layers: tuple[Any, ...]
    first: int

    @property
    def end(self) -> int:
        """Number behind its last block."""
        return self.first + len(self.layers)


class StreamedModel:
    """The base model (no head) of a checkpoint, without the weights of its blocks.

    Attributes:
        model: the whole transformers model; weights that are not loaded are on the meta device.
        lists: its lists of repeated layers, in the order in which they run. Blocks are numbered through all of them.
        layers: the blocks of all lists.
        dtype, device: of the weights in memory.
        ahead: reads the next block's tensors while a GPU works on this one; None on a CPU, whose cores are at work.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.ahead = ReadAhead(checkpoint, pinned=True) if device.startswith("cuda") else None
        self.record = model_map(checkpoint.spec).record
        with quiet_transformers():
            self.model = self._skeleton()
            # of a text that is classified, the whole model makes what its decoder reads
            coder = bool(getattr(self.model.config, "is_encoder_decoder", False))
            self.base: Any = self.model if coder else self.model.base_model
            self.lists = self._lists()
            self.layers = [layer for one in self.lists for layer in one.layers]
            self._caching = {"use_cache": False} if "use_cache" in arguments_of(self.model) else {}
            self._tensors: dict[int | None, list[str]] = {}
            for tensor in checkpoint.spec.tensors.values():
                index = self.number_of(tensor.name)
                # blocks may share tensors; what the config ties is outside
                if tensor.alias_of is None or index is not None:
                    self._tensors.setdefault(index, []).append(tensor.name)
            head = f"{self.record.head}."  # with what may stand in front of it; no tensor's name begins with None
            tables = {name for name, m in self.model.named_modules() if isinstance(m, torch.nn.Embedding)}
            outside = self._tensors.get(None, [])  # a table of tokens may be the head as well
            self._load([n for n in outside if not n.startswith(head) or self.record.head in tables])
            if len(self.lists) > 1 or self._has_copies():
                self.model.tie_weights()  # each list may have the embeddings under a name of its own
                self._load_copies()
            self._compute_tables()
        self._mapped: MappedTables | None = None

    def map_tables(self, folder: Path) -> None:
        """Keep embedding tables outside the blocks in a file in that folder; their rows are read when they are asked for."""
        if self._mapped is None:
            self._mapped = MappedTables(folder, self.model)

    def _has_copies(self) -> bool:
        """Whether the class has parameters outside the blocks, beside its head, that are tied to others."""
        record = self.record
        if not isinstance(record, Inferred):
            return False
        return any(p != record.head_pair and record.list_of(p[0]) is None for p in record.pairs)

    def _lists(self) -> list[LoadedList]:
        names = {id(module): name for name, module in self.model.named_modules()}
        lists: list[LoadedList] = []
        require_lists(places := find_lists(self.model, self.record), self.model, self.record)
        for path, modules in places.items():
            first = lists[-1].end if lists else 0
            lists.append(LoadedList(path, names[id(modules)], modules, tuple(modules), first))
        return lists

    def _load_copies(self) -> None:
        """Give parameters outside the blocks that are tied to tables in blocks, such as UDOP's distances, their values."""
        parts = tuple(f"{one.name}." for one in self.lists)
        for target, source in self.model.get_expanded_tied_weights_keys(all_submodels=True).items():
            path, _, key = target.rpartition(".")
            module: Any = self.model.get_submodule(path)
            own = module._parameters.get(key)
            if target.startswith(parts) or not source.startswith(parts) or own is None or not own.is_meta:
                continue
            if not isinstance(module, torch.nn.Embedding):
                continue  # passes change what is no table
            (name,) = names_in_files(self.model, self.checkpoint.spec, {source: own})
            if name in self.checkpoint.spec.tensors:
                values = self.checkpoint.tensor(name).data.to(self.device, self.dtype)
                module._parameters[key] = torch.nn.Parameter(values, requires_grad=False)

    def _compute_tables(self) -> None:
        """Give the parameters that the class computes, and that files lack, their values, such as tables of sines."""
        untyped: Any = self.model
        computed = [*(untyped._keys_to_ignore_on_load_missing or ()), *(untyped._keys_to_ignore_on_save or ())]
        for name, parameter in list(self.model.named_parameters()):
            if parameter.is_meta and any(re.search(pattern, name) for pattern in computed):
                path, _, key = name.rpartition(".")
                module = self.model.get_submodule(path)
                empty = torch.empty_like(parameter, device=self.device)
                module._parameters[key] = torch.nn.Parameter(empty, requires_grad=False)
                untyped._init_weights(module)

    def number_of(self, name: str) -> int | None:
        """Number of the block that a tensor of the checkpoint belongs to, through all lists; None outside the blocks."""
        index, path = self.record.block_index(name), self.record.list_of(name)
        first = next((one.first for one in self.lists if one.path == path), None)
        return None if first is None or index is None else first + index

    def list_of(self, index: int) -> int:
        """Place among ``lists`` of the one that block ``index`` belongs to."""
        return next(place for place, one in enumerate(self.lists) if index < one.end)

    def title_of(self, index: int) -> str:
        """A block for messages: by its number, and in a model of several lists by its name in memory."""
        return f"block {index}" if len(self.lists) == 1 else self.path_of(index)

    def path_of(self, index: int) -> str:
        """Name of a block in memory."""
        one = self.lists[self.list_of(index)]
        return f"{one.name}.{index - one.first}"

    def _skeleton(self) -> PreTrainedModel:
        """The model on the meta device, with the buffers that no file holds computed."""
        stock, config = stock_class(self.checkpoint)
        config._attn_implementation = None  # transformers chooses for the model and for each model in it
        contexts = stock.get_init_context(self.dtype, False, False, None)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            model: PreTrainedModel = stock(config)
        untyped: Any = model
        for key, buffer in list(untyped.named_non_persistent_buffers()):
            module, _, name = key.rpartition(".")
            model.get_submodule(module).register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        for parameter in untyped.parameters():
            parameter._is_hf_initialized = True  # on the meta device: drawing would take long, for nothing
        untyped.initialize_weights()  # computes those buffers
        for key, buffer in list(untyped.named_non_persistent_buffers()):
            module, _, name = key.rpartition(".")
            model.get_submodule(module).register_buffer(name, buffer.to(self.device), persistent=False)
        untyped.eval()
        return model.requires_grad_(False)

    def _load(self, names: list[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        read = self.checkpoint if self.ahead is None else self.ahead
        # a GPU converts what has travelled in its own dtype
        state = {name: read.tensor(name).data.to(self.device, non_blocking=True).to(self.dtype) for name in names}
        config = LoadStateDictConfig(
            dtype=self.dtype,
            device_map={"": self.device},
            weight_mapping=get_model_conversion_mapping(self.model),  # type: ignore[arg-type]
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        problems = [*info.unexpected_keys, *info.mismatched_keys, *info.conversion_errors]
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"position_ids$"]
        if misplaced := [p for p in problems if not any(re.search(i, str(p)) for i in ignored)]:
            raise PassError(f"{type(self.model).__name__} has no place for {misplaced[0]}")

    @contextmanager
    def block(self, index: int) -> Iterator[Any]:
        """Within, the module of a block has its weights; they are released at the end."""
        one = self.lists[self.list_of(index)]
        module, present = self.layers[index], one.modules[index - one.first]
        one.modules[index - one.first] = module  # the loader finds it by its name; `run` may have put a stub there
        try:
            with quiet_transformers():
                self._load(self._tensors.get(index, []))
            if self.ahead is not None:
                self.ahead.begin(self._tensors.get(index + 1, []))
        finally:
            one.modules[index - one.first] = present
        missing = [name for name, p in module.named_parameters() if p.is_meta]
        if missing:
            raise PassError(
                f"{self.title_of(index)} lacks {missing[0]} after loading: blocks may share it in a way that is not known",
                fix="use a method that needs no calibration",
            )
        try:
            yield module
        finally:
            for part in module.modules():
                for name, parameter in list(part._parameters.items()):
                    if parameter is not None:
                        part._parameters[name] = torch.nn.Parameter(
                            torch.empty_like(parameter, device="meta"), requires_grad=False
                        )
                for name, buffer in list(part._buffers.items()):
                    if buffer is not None and name not in part._non_persistent_buffers_set:
                        part._buffers[name] = torch.empty_like(buffer, device="meta")

    def stored_names(self, index: int, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values by the block's parameter names ▶ values by the checkpoint's names; fused ones are split."""
        prefix = f"{self.path_of(index)}."
        return names_in_files(self.model, self.checkpoint.spec, {prefix + k: v for k, v in parameters.items()})

    @contextmanager
    def head(self) -> Iterator[None]:
        """Within, the head that predicts tokens has its weights."""
        prefix = f"{self.record.head}."
        names = [name for name in self._tensors.get(None, ()) if name.startswith(prefix)]
        absent = {n for n, p in self.model.named_parameters(remove_duplicate=False) if p.is_meta}
        with quiet_transformers():
            self._load(names)
            self.model.tie_weights()
            self._load_copies()
        try:
            yield
        finally:
            for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
                if name in absent and not parameter.is_meta:
                    module, _, key = name.rpartition(".")
                    self.model.get_submodule(module)._parameters[key] = torch.nn.Parameter(
                        torch.empty_like(parameter, device="meta"), requires_grad=False
                    )

    def run(self, inputs: Mapping[str, torch.Tensor], stub: Stubbed) -> None:
        """Run the model with every block replaced by ``stub(index, hidden, args, kwargs)``, until `StopForward`.

        The base model runs, or the whole one where that alone takes the inputs.
        """
        whole = not inputs.keys() <= arguments_of(self.base) and inputs.keys() <= arguments_of(self.model)
        with torch.no_grad(), self._stubs(stub), suppress(StopForward):
            self._call(self.model if whole else self.base, inputs, {})

    def predict(self, inputs: Mapping[str, torch.Tensor], stub: Stubbed, extra: Mapping[str, Any]) -> torch.Tensor:
        """The logits of the whole model with every block replaced by ``stub``; ``extra`` are further arguments."""
        with self._stubs(stub):
            result: torch.Tensor = self._call(self.model, inputs, extra)[0]
        return result

    def _call(self, model: Any, inputs: Mapping[str, torch.Tensor], extra: Mapping[str, Any]) -> Any:
        try:
            return model(**{k: v.to(self.device) for k, v in inputs.items()}, **self._caching, **extra)
        finally:
            if self._mapped is not None:
                self._mapped.release()

    @contextmanager
    def _stubs(self, stub: Stubbed) -> Iterator[None]:
        real = self.layers

        class Stub(torch.nn.Module):
            def __init__(self, index: int) -> None:
                super().__init__()
                self.index = index

            def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks, such as attention_type
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(real[self.index], name)

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                return stub(self.index, hidden, args[1:], kwargs)

        try:
            for one in self.lists:
                for i in range(len(one.layers)):
                    one.modules[i] = Stub(one.first + i)
            yield
        finally:
            for one in self.lists:
                for i, module in enumerate(one.layers):
                    one.modules[i] = module

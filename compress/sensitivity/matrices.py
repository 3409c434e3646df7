"""What it costs a model's output to change one matrix, measured by gradients on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from compress.architectures.model_map import model_map
from compress.blockwise.linears import TargetLinear, group_linears
from compress.blockwise.output_curvature import draw
from compress.checkpoint.open import Checkpoint
from compress.data.batches import Batches
from compress.errors import PassError
from compress.models.loading import load_checkpoint
from compress.progress import Progress
from compress.solvers.quant_format import dequantize, fit, to_codes
from compress.spec.formats import QuantFormat

#: Samples that are enough to rank matrices by.
SAMPLES = 32
#: A tensor's name and its weights [O, I] ▶ what each choice would change of them, ΔW [O, I].
WeightDeltas = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]


class RoundingDelta:
    """What rounding to the nearest codes changes, as `WeightDeltas`: of options that differ in the size of groups alone, one.

    The divergence of the others is that of the one measured, scaled by the squared error of the weights.
    """

    def __init__(self, quant_formats: Callable[[str, str], QuantFormat], options: Mapping[str, str]) -> None:
        """``quant_formats``: (tensor, option) ▶ its format. ``options``: option ▶ the option that it is measured by."""
        self.quant_formats, self.options = quant_formats, options
        self._errors: dict[str, dict[str, float]] = {}

    def __call__(self, name: str, W_OI: torch.Tensor) -> dict[str, torch.Tensor]:
        """ΔW of the options to measure."""
        found = {}
        for option in self.options:
            quant_format = self.quant_formats(name, option)
            change = dequantize(to_codes(W_OI, quant_format, fit(W_OI, quant_format), torch.float32)).float() - W_OI
            self._errors.setdefault(name, {})[option] = max(float(change.square().sum()), 1e-30)
            if option in self.options.values():
                found[option] = change
        return found

    def scaled(self, measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """The divergences of all options, from those that were measured."""
        return {
            name: {o: row[m] * self._errors[name][o] / self._errors[name][m] for o, m in self.options.items()}
            for name, row in measured.items()
        }


def divergences(
    checkpoint: Checkpoint,
    names: Sequence[str],
    changes: WeightDeltas,
    batches: Batches,
    *,
    setting: tuple[str, str],
    device: str,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Expected divergence of the model's output, in nats per token, if one matrix alone were changed.

    To second order KL is ½ E (gᵀ ΔW x)², with x a token's inputs of the matrix and g the gradient, at its outputs, of the
    log-likelihood of a token drawn from the model's own prediction (the Fisher information). The whole model is in memory,
    with every ΔW in bfloat16, and its activations for one sample at a time.

    Args:
        batches: calibration samples. setting: what asks for this, and what to do without it, for errors.

    Returns:
        By tensor and choice; and the tensors in groups that read the same inputs.

    Raises:
        PassError: the model predicts no tokens, or a tensor is no module's own weight.
    """
    mapped = model_map(checkpoint.spec)
    model: Any = load_checkpoint(checkpoint, dtype="float32", device=device)
    if not model.can_generate() and model.get_output_embeddings() is None:
        raise PassError(f"{setting[0]} needs a model that predicts tokens", fix=setting[1])
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    owners = {name: modules.get(name.removesuffix(".weight")) for name in names}
    lost = next((n for n, m in owners.items() if m is None or getattr(m, "weight", None) is None), None)
    if lost is not None:
        raise PassError(f"{setting[0]} does not reach {lost}: it is no module of its own", fix=setting[1])
    changed: dict[str, dict[str, torch.Tensor]] = {}
    for name, module in owners.items():
        assert module is not None
        W = module.weight.T if mapped.linears[name].transposed else module.weight
        found = changes(name, W.float().contiguous())
        changed[name] = {k: v.to(device, torch.bfloat16) for k, v in found.items()}  # seven bits of it are enough
    seen: dict[str, torch.Tensor] = {}
    sums = {name: dict.fromkeys(changed[name], 0.0) for name in names}
    counted: list[torch.Tensor | None] = [None]

    def forward(name: str, user: str) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            seen[user] = args[0].detach()
            output.register_hook(backward(name, user))  # type: ignore[no-untyped-call]

        return hook

    def backward(name: str, user: str) -> Callable[[torch.Tensor], None]:
        def hook(gradient: torch.Tensor) -> None:
            x = seen[user].reshape(-1, seen[user].shape[-1])
            g = gradient.reshape(-1, gradient.shape[-1])
            if counted[0] is not None:
                x, g = x[counted[0]], g[counted[0]]
            for choice, change in changed[name].items():
                sums[name][choice] += float(((x @ change.float().T) * g).sum(1).double().square().sum())

        return hook

    linears = [
        TargetLinear(name, name, module.weight, False, module) for name, module in owners.items() if module is not None
    ]
    with torch.no_grad():
        groups, _ = group_linears(linears, lambda: model(**batches.first(1).inputs(device)))
    users = [
        (name, name) for name in names
    ]  # a tensor and each matrix that it is, of several blocks where they share it
    for tensor in checkpoint.spec.tensors.values():
        if tensor.alias_of in owners and mapped.block_of(tensor.name) is not None:
            users.append((tensor.alias_of, tensor.name))
    handles = [modules[user.removesuffix(".weight")].register_forward_hook(forward(name, user)) for name, user in users]
    generator = torch.Generator(device).manual_seed(seed)
    embeddings = model.get_input_embeddings()
    embed = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    tokens = 0
    samples = batches.first(SAMPLES).parts(1)
    with progress.task("measuring what changes cost", len(samples), "samples") as task:
        for sample in samples:
            counted[0] = None if sample.mask is None else sample.mask[0].to(device)
            logits = model(**sample.inputs(device)).logits[0].float()
            losses = torch.nn.functional.cross_entropy(logits, draw(logits, generator), reduction="none")
            chosen = losses if counted[0] is None else losses[counted[0]]
            tokens += len(chosen)
            chosen.sum().backward()  # type: ignore[no-untyped-call]
            task.advance()
    for handle in [*handles, embed]:
        handle.remove()
    divergence = {name: {o: 0.5 * total / max(tokens, 1) for o, total in row.items()} for name, row in sums.items()}
    return divergence, [[linear.name for linear in group] for group in groups]

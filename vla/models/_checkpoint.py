"""Reading released checkpoints: what all families' `checkpoint_filter_fn` have in common."""

from collections.abc import Sequence

from torch import Tensor

CONTAINERS = ("model_ema", "state_dict_ema", "model", "state_dict")
PREFIXES = ("module.", "backbone.", "encoder.", "model.")


def unwrap(
    checkpoint: dict, containers: Sequence[str] = CONTAINERS, prefixes: Sequence[str] = PREFIXES
) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, without wrappers' prefixes.

    Args:
        checkpoint: Contents of a checkpoint file, or a bare state dict.
        containers: Keys under which a state dict is looked for, the preferred first.
        prefixes: Wrappers' prefixes.

    Returns:
        Names and tensors. If some names start with one of `prefixes`, those alone, without it.

    Raises:
        ValueError: If no state dict is found.
    """
    for container in containers:
        if isinstance(checkpoint.get(container), dict):
            return unwrap(checkpoint[container], containers, prefixes)
    state_dict = {name: value for name, value in checkpoint.items() if isinstance(value, Tensor)}
    if not state_dict:
        raise ValueError(f"checkpoint: no tensors among the entries {list(checkpoint)[:5]}, expected a state dict")
    for prefix in prefixes:
        if any(name.startswith(prefix) for name in state_dict):
            state_dict = {n.removeprefix(prefix): v for n, v in state_dict.items() if n.startswith(prefix)}
    return state_dict

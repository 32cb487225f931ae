"""`vla models` and `vla info`: what there is."""

from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.table import Table
from timm.models import PretrainedCfg, list_pretrained, model_entrypoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UserError
from ..models.reported import TOP1
from ..models.vrwkv_mae import PRETRAINING_MODELS
from ..train import build_model
from ..train.weights import published, read_spec, weights_path
from .app import app, examples, out


@app.command("models", epilog=examples("vla models", "vla models vmamba_tiny", "vla models 'convnext*' --all"))
def models_command(
    pattern: Annotated[str, typer.Argument(help="Names to show: a part of them, or with * and ? as wildcards.")] = "*",
    everything: Annotated[bool, typer.Option("--all", help="All models of timm, not only this package's.")] = False,
) -> None:
    """List the models, with parameters, licence of the weights and reported ImageNet-1k accuracy."""
    has_wildcards = not {"*", "?", "["}.isdisjoint(pattern)
    found = timm.list_models(pattern if has_wildcards else f"*{pattern}*")
    names = [n for n in found if everything or _is_ours(n)]
    if not names:
        raise UserError(f"models: no name matches {pattern!r}" + ("" if everything else "; --all searches timm's too"))
    table = Table(title=f"{len(names)} models")
    table.add_column("model", no_wrap=True)
    table.add_column("weights")
    table.add_column("licence")
    table.add_column("parameters", justify="right")
    table.add_column("top-1", justify="right")
    for name in names:
        size = _parameters(name)
        for config in _pretrained(name) or [None]:
            tag = "" if config is None else config.tag
            top1 = TOP1.get(f"{name}.{tag}")
            licence = "-" if config is None else config.license or "unknown"
            table.add_row(name, tag or "-", licence, size, "-" if top1 is None else f"{top1:.1f} %")
    out.print(table)


@app.command("info", epilog=examples("vla info vmamba_tiny_s1l8", "vla info runs/vmamba_atto-digits"))
def info_command(
    model: Annotated[str, typer.Argument(help="Model name, or a run folder.", metavar="MODEL")],
) -> None:
    """Describe a model: size, operations, input, features, weights, and how to build it."""
    if Path(model).expanduser().exists() and not timm.is_model(model):
        path = weights_path(model)
        spec = read_spec(path)
        if spec is None:
            raise UserError(f"info: {path} does not say which model it is")
        name, args = spec.architecture, spec.model_args
        size, call_args = spec.input_size, {**args, "checkpoint_path": str(path)}
    else:
        name, args = model, {}
        size, call_args = None, {"pretrained": True} if _pretrained(model) else {}
    if name in PRETRAINING_MODELS:
        raise UserError(f"info: {name} reconstructs and does not classify; it is trained before a classifier is")
    with torch.device("meta"):
        network = build_model(name, **args).eval()
    config = network.pretrained_cfg or {}
    size = size or tuple(config.get("input_size", (3, 224, 224)))

    table = Table(title=name, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("parameters", f"{sum(p.numel() for p in network.parameters()):,}")
    table.add_row("input", "x".join(map(str, size)))
    table.add_row("multiply-adds", _multiply_adds(network, size))
    table.add_row("classes", str(network.num_classes))
    for stage in getattr(network, "feature_info", None) or []:
        reduction = f"1/{stage['reduction']} of the input" if "reduction" in stage else ""
        table.add_row(f"feature {stage.get('module', '')}", f"{stage['num_chs']} channels, {reduction}")
    for pretrained in _pretrained(name):
        table.add_section()
        _add_weights(table, name, pretrained)
    out.print(table)
    arguments = "".join(f", {key}={value!r}" for key, value in call_args.items())
    # Below the table and unwrapped, to be copied.
    out.print(f"import timm, vla\nmodel = timm.create_model({name!r}{arguments})", soft_wrap=True, highlight=False)


def _add_weights(table: Table, name: str, config: PretrainedCfg) -> None:
    table.add_row("weights", f"{name}.{config.tag}" if config.tag else name)
    top1 = TOP1.get(f"{name}.{config.tag}")
    rows = {
        "reported top-1": None if top1 is None else f"{top1:.1f} %",
        "licence": config.license,
        "paper": config.paper_name,
        "paper id": config.paper_ids if isinstance(config.paper_ids, str) else ", ".join(config.paper_ids or ()),
        "origin": config.origin_url,
        "file": config.hf_hub_id or config.url,
    }
    for label, value in rows.items():
        if value:
            table.add_row(label, value)


def _is_ours(name: str) -> bool:
    return model_entrypoint(name).__module__.startswith("vla.")


def _pretrained(name: str) -> list[PretrainedCfg]:
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        return []
    known = [name] if tag else [n for n in list_pretrained(f"{base}*") if n.partition(".")[0] == base]
    return [config for n in known if (config := published(n)) is not None]


def _parameters(name: str) -> str:
    try:
        with torch.device("meta"):
            network = timm.create_model(name)
    except Exception:  # some of timm's models read their own weights while they are built, which meta tensors lack
        return "?"
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M"


def _multiply_adds(network: nn.Module, size: tuple[int, ...]) -> str:
    try:
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, *size, device="meta"))
    except (RuntimeError, NotImplementedError):  # a model that looks at values cannot run without them
        return "?"
    return f"{counter.get_total_flops() / 2e9:.2f} G"

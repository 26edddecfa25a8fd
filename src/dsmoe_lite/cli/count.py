"""`dsmoe count`: parameters, FLOPs and KV cache of presets or config files, without building a model."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from dsmoe_lite.accounting import by_component, kv_cache_bytes, kv_cache_elements, parameters, training_flops
from dsmoe_lite.cli.tables import json_option, print_rows
from dsmoe_lite.common.errors import InputError, require
from dsmoe_lite.common.files import read_json
from dsmoe_lite.common.yaml_files import read_yaml
from dsmoe_lite.config import ModelConfig, from_dict
from dsmoe_lite.presets import preset

BF16 = 16  # bits
HUGGING_FACE = ("architectures", "model_type")  # which their configs have


@click.command(name="count")
@click.argument("names", nargs=-1, required=True, metavar="NAME|CONFIG...")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sequence; the config's max_seq_len by default.")
@json_option
def command(names: tuple[str, ...], seq_len: int | None, as_json: bool) -> None:
    """Count parameters, training FLOPs and KV cache, and compare models if several are given.

    A model is the NAME of a preset, or a CONFIG in .yaml or .json with the fields of ModelConfig. No model is built.
    """
    configs = {name: load_config(name) for name in names}
    models = {name: count(config, seq_len or config.max_seq_len) for name, config in configs.items()}
    if as_json:
        click.echo(json.dumps([{"name": name, **counts} for name, counts in models.items()], indent=1))
        return
    if len(models) == 1:
        for name, counts in models.items():
            rows = [
                row | {"share": round(row["share"], 4), "training_flops": float(row["training_flops"])}
                for row in counts["components"]
            ]
            print_rows(
                rows, as_json=False, title=f"{name}, by component; the totals below leave out the router's FLOPs"
            )
    print_rows(_side_by_side(models), as_json=False)


def load_config(name: str) -> ModelConfig:
    """The ModelConfig of the preset `name`, or in the .yaml or .json file `name`. Raises InputError."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return preset(name)
    values = read_json(path) if path.suffix == ".json" else read_yaml(path)
    for key in HUGGING_FACE:
        remedy = f"{path} is a Hugging Face config; describe the model with the fields of ModelConfig"
        require(key not in values, key, values.get(key), f"{remedy}: {', '.join(f.name for f in fields(ModelConfig))}")
    try:
        return from_dict(ModelConfig, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def count(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """All counts of one config, for sequences of `seq_len` tokens, as plain data."""
    counted, flops = parameters(config), training_flops(config, seq_len)
    return {
        "seq_len": seq_len,
        "total": counted.total,
        "active_all": counted.active_all,
        "active_no_input_embed": counted.active_no_input_embed,
        "active_no_embed": counted.active_no_embed,
        "ffn_total": counted.ffn.total,
        "ffn_active": counted.ffn.active,
        "mtp_total": counted.mtp.total,  # in no other count, as in the papers
        "training_flops": flops.total,  # the router is left out, as in the papers
        "forward_flops_per_token": flops.forward_per_token,
        "kv_cache_elements_per_token": kv_cache_elements(config),
        "kv_cache_bf16_bytes_per_token": kv_cache_bytes(config, 1, BF16),
        "kv_cache_bf16_bytes": kv_cache_bytes(config, seq_len, BF16),  # of one sequence of seq_len tokens
        "components": [
            {name: value for name, value in row.items() if name != "forward_flops_per_token"}
            | {"share": row["total"] / counted.total}
            for row in by_component(config, seq_len)
        ],
    }


def _side_by_side(models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per quantity, one column per model; several models are also compared by component."""
    columns = {name: {key: counts[key] for key in counts if key != "components"} for name, counts in models.items()}
    if len(models) > 1:
        for name, counts in models.items():
            columns[name] |= {f"{row['component']} params": row["total"] for row in counts["components"]}
            del columns[name]["attention_scores params"]
    if not any(counts["mtp_total"] for counts in models.values()):
        for column in columns.values():
            del column["mtp_total"]
    quantities = next(iter(columns.values()))
    return [{"quantity": key, **{name: column[key] for name, column in columns.items()}} for key in quantities]

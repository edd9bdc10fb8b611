"""Names the variants that can be compared: strategies, Pilot's ablations, and settings of ATA."""

from __future__ import annotations

import dataclasses
import re

from pilot_jax.errors import InputError
from pilot_jax.federation.strategies import STRATEGIES, use
from pilot_jax.words import separated

# Overrides that remove or change one part of Pilot.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "no_difference_loss": ("train.lambda_d=0",),
    "no_client_adapter": ("strategy.client_adapter=none",),
    "client_adapter_in_stage1": ("strategy.client_adapter=stage1",),
    "no_cross_task": ("strategy.cross_task=false",),
    "no_router_losses": ("train.lambda_b=0", "train.lambda_z=0"),
    "text_mean": ("strategy.text_aggregation=mean",),
    "text_per_task_mean": ("strategy.text_aggregation=per_task_mean",),
    "copy_init": ("strategy.init=copy",),
}
# Overrides of ATA's settings: neighbours, weighting, temperature, space, and the preset `notes`.
ATA_SWEEP: dict[str, tuple[str, ...]] = {
    "ata_notes": ("strategy.ata.preset=notes",),
    "ata_auto": ("strategy.ata.temperature=auto", "strategy.ata.auto_factor=1"),
    "ata_auto_0.4": ("strategy.ata.temperature=auto", "strategy.ata.auto_factor=0.4"),
    "ata_auto_0.25": ("strategy.ata.temperature=auto", "strategy.ata.auto_factor=0.25"),
    "ata_1_neighbor": ("strategy.ata.neighbors=1",),
    "ata_4_neighbors": ("strategy.ata.neighbors=4",),
    "ata_8_neighbors": ("strategy.ata.neighbors=8",),
    "ata_temperature_1": ("strategy.ata.temperature=1",),
    "ata_temperature_2": ("strategy.ata.temperature=2",),
    "ata_temperature_16": ("strategy.ata.temperature=16",),
    "ata_inverse_distance": ("strategy.ata.weighting=inverse_distance",),
    "ata_share": ("strategy.ata.weighting=share",),
    "ata_share_of_sizes": ("strategy.ata.weighting=share_of_sizes",),
    "ata_product": ("strategy.ata.space=product",),
    "ata_without_self": ("strategy.ata.include_self=false",),
}
GROUPS = {"all": tuple(STRATEGIES), "ablations": tuple(f"pilot-{n}" for n in ABLATIONS),
          "ata": tuple(f"pilot-{n}" for n in ATA_SWEEP)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A strategy with changes to the config; `family` is the strategy whose tuned learning rates it gets."""

    name: str
    family: str
    overrides: tuple[str, ...]


CHANGES = re.compile(r"\+(?![0-9])")  # not the sign of an exponent, as in 1e+3


def read_variants(text: str) -> list[Variant]:
    """Returns the variants that a text such as "fedavg,ablations,pilot+train.lambda_d=0" names.

    A name is a strategy, "pilot-<ablation>", a group (all, ablations, ata) or "module:Class", a strategy class whose
    module is then imported. "+key=value" after a name changes the config of that variant, as --set does.

    Raises:
        InputError: a name is not known.
    """
    out: dict[str, Variant] = {}
    for item in (name for part in separated(text) for name in GROUPS.get(part, (part,))):
        name, *changes = CHANGES.split(item)
        family, _, ablation = name.partition("-")
        known = ABLATIONS | ATA_SWEEP
        if ":" in family:
            use(family)
        if family not in STRATEGIES or (ablation and (family != "pilot" or ablation not in known)):
            raise InputError(f"--strategies: {name!r} is not known. Strategies: {', '.join(STRATEGIES)}; groups: "
                             f"{', '.join(GROUPS)}; ablations: {', '.join('pilot-' + n for n in known)}.")
        overrides = (f"strategy.name={family}", *known.get(ablation, ()), *changes)
        out[item] = Variant(item, family, overrides)
    return list(out.values())


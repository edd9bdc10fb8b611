"""Who takes part in a round."""

from __future__ import annotations

from pilot_jax.config import Config
from pilot_jax.errors import InputError
from pilot_jax.federation.state import Federation, client_generator


def cohort(config: Config, names: tuple[str, ...], round_: int) -> list[int]:
    """Indices of the clients that take part in `round_` (from 1), in order.

    Raises:
        InputError: a name that is unknown, or no client that could take part.
    """
    f = config.federation
    late = sorted(set(f.joins) - set(names))
    if late:
        raise InputError(f"federation.joins: unknown client {late[0]!r}. Known: {', '.join(names)}.")
    taking = [i for i, name in enumerate(names) if f.joins.get(name, 1) <= round_]
    listed = [] if f.participation == "uniform" else [e for e in f.participation if e.round == round_]
    if listed:
        unknown = sorted(set(listed[0].clients) - set(names))
        if unknown or not listed[0].clients:
            raise InputError(f"federation.participation: round {round_}: unknown or no clients {unknown}. "
                             f"Known: {', '.join(names)}.")
        taking = sorted(names.index(name) for name in set(listed[0].clients))
    if not taking:
        raise InputError(f"federation.joins: nobody is there in round {round_}. Let a client join by then.")
    if f.participation == "uniform" and f.clients_per_round is not None and f.clients_per_round < len(taking):
        rng = client_generator(config.system.seed, "server", round_, "sampling")
        taking = sorted(rng.choice(taking, f.clients_per_round, replace=False).tolist())
    if f.dropout > 0:
        draws = {i: client_generator(config.system.seed, names[i], round_, "dropout").random() for i in taking}
        staying = [i for i in taking if draws[i] >= f.dropout]
        taking = staying or [max(taking, key=lambda i: draws[i])]
    return taking


def most_uploads(fed: Federation) -> int:
    """How often one client uploads in the whole run, at most, if no upload is refused."""
    count = [0] * len(fed.clients)
    for round_ in range(1, fed.config.federation.rounds + 1):
        for c in members_of(fed, round_):
            count[c] += len(fed.strategy.stages(count[c] == 0, round_))
    return max(count)


def members_of(fed: Federation, round_: int) -> list[int]:
    """`cohort` of a federation; pooled data are always there."""
    return [0] if fed.pool_of else cohort(fed.config, tuple(c.name for c in fed.clients), round_)

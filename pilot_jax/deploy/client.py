"""Flower's client app of a federation: a node's answers to the server's messages, each of which is `glue.Node`'s."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from pilot_jax.federation.parcels import Parcel


def to_records(parcel: Parcel) -> RecordDict:
    """Returns a parcel as Flower sends it: one array of bytes and one record, so that little is sent beside numbers."""
    records = RecordDict({"about": ConfigRecord({**parcel.about, "names": list(parcel.names)})})
    if parcel.names:
        records["adapters"] = ArrayRecord({"all": Array("uint8", (len(parcel.data),), "bytes", parcel.data)})
    return records


def from_records(records: RecordDict) -> Parcel:
    """Returns the parcel that `to_records` made into records."""
    about = dict(records.config_records["about"])
    names = tuple(about.pop("names"))  # type: ignore[arg-type]
    return Parcel(about, names, records.array_records["adapters"]["all"].data if names else b"")


def client_app(folder: Path, stages: str) -> ClientApp:
    """Returns the client app of an app folder; `stages`: the strategy's, separated by commas."""
    app = ClientApp()
    for stage in stages.split(","):
        app.train(stage)(lambda message, context: _answered(message, context, folder, lambda node, order: node.train(
            order)))
    app.query("finish")(lambda message, context: _answered(message, context, folder, lambda node, order: node.finish(
        order)))
    app.query("name")(lambda message, context: Message(to_records(Parcel(
        {"name": str(context.node_config["client"])})), reply_to=message))
    return app


def _answered(message: Message, context: Context, folder: Path, answer: Callable[..., Parcel]) -> Message:
    """Returns the reply to a message. Of an error only its kind is sent, because its text may quote the data."""
    from pilot_jax.deploy.glue import node_of

    try:
        with node_of(folder, context.node_config, context.run_config) as node:
            parcel = answer(node, from_records(message.content))
    except Exception as error:
        logging.getLogger("pilot_jax").exception("the message could not be answered")
        parcel = Parcel({"fault": f"did not come: {type(error).__name__}; see the log of its node"})
    return Message(to_records(parcel), reply_to=message)

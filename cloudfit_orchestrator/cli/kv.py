"""`cloudfit kv`: the key-value service of a group."""

import base64
import sys

import click

from cloudfit_orchestrator.cli.clients import Kv
from cloudfit_orchestrator.cli.output import EXIT_ERROR, Session, format_option, guarded, pass_session, print_json

KV_TIMEOUT_S = 30.0


timeout_option = click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=KV_TIMEOUT_S, show_default=True,
    metavar="SECONDS", help="Give up when f+1 replicas have not answered equally by then.",
)  # fmt: skip


@click.group("kv")
def kv_() -> None:
    """The key-value service of a group."""


@kv_.command("put", epilog="Example: cloudfit kv put ledger colour blue")
@click.argument("group")
@click.argument("key")
@click.argument("value")
@timeout_option
@pass_session
@guarded
def kv_put(session: Session, group: str, key: str, value: str, timeout_s: float) -> None:
    """Set KEY to VALUE; returns once f+1 replicas agree."""
    with session.context() as context, Kv(context, session.home, group, timeout_s=timeout_s) as kv:
        kv.put_many([(key.encode(), value.encode())])


@kv_.command("get", epilog="Example: cloudfit kv get ledger colour")
@click.argument("group")
@click.argument("key")
@timeout_option
@format_option
@pass_session
@guarded
def kv_get(session: Session, group: str, key: str, timeout_s: float, form: str) -> None:
    """Print the value of KEY; exit code 1 if there is none."""
    with session.context() as context, Kv(context, session.home, group, timeout_s=timeout_s) as kv:
        (value,) = kv.get_many([key.encode()])
    if form == "json":
        text = None if value is None else base64.b64encode(value).decode()
        print_json({"group": group, "key": key, "found": value is not None, "value_base64": text})
    elif value is not None:
        sys.stdout.buffer.write(value + b"\n")
    else:
        click.echo(f"cloudfit: group {group} has no key {key}", err=True)
    if value is None:
        sys.exit(EXIT_ERROR)


@kv_.command("del", epilog="Example: cloudfit kv del ledger colour")
@click.argument("group")
@click.argument("key")
@timeout_option
@pass_session
@guarded
def kv_del(session: Session, group: str, key: str, timeout_s: float) -> None:
    """Remove KEY."""
    with session.context() as context, Kv(context, session.home, group, timeout_s=timeout_s) as kv:
        kv.delete(key.encode())

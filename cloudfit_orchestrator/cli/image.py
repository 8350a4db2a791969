"""`cloudfit image`: images that machines boot."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from cloudfit_orchestrator.cli.output import (
    Session,
    format_option,
    guarded,
    pass_session,
    print_json,
    print_table,
    show_progress,
)
from cloudfit_orchestrator.controller.ports import Progress
from cloudfit_orchestrator.launcher.build import build_image
from cloudfit_orchestrator.launcher.sil import find_image, list_images, verify_image
from cloudfit_orchestrator.model.signing import public_bytes

IMAGES = ("replica", "recovery")  # what `image build` builds when no name is given


@click.group("image")
def image_() -> None:
    """Images that machines boot."""


@image_.command("build", epilog="Example: cloudfit image build replica")
@click.argument("names", nargs=-1)
@format_option
@pass_session
@guarded
def image_build(session: Session, names: tuple[str, ...], form: str) -> None:
    """Build and sign images (default: replica and recovery)."""
    home, built = session.home, []
    for name in names or IMAGES:
        image = build_image(name, home.images, home.image_key(), _builder(name))
        built.append({"name": name, "digest": image.digest})
    if form == "json":
        print_json({"images": built})
    else:
        print_table(["name", "digest"], [list(b.values()) for b in built])


def _builder(name: str) -> Callable[[str], None]:
    return lambda text: show_progress(Progress("build", name, name, text))


@image_.command("verify", epilog="Example: cloudfit image verify replica")
@click.argument("reference")
@click.option("--allow-adversary", is_flag=True, help="Also judge an image that misbehaves on demand.")
@format_option
@pass_session
@guarded
def image_verify(session: Session, reference: str, allow_adversary: bool, form: str) -> None:  # noqa: FBT001
    """Verify every byte of an image: NAME, NAME@sha256:HEX, sha256:HEX, or a directory."""
    home = session.home
    path = Path(reference) if os.sep in reference else find_image(home.images, reference)
    manifest = verify_image(path, [public_bytes(home.image_key())], allow_adversary=allow_adversary)
    if form == "json":
        print_json({"reference": reference, "directory": str(path), "good": True, "manifest": asdict(manifest)})
    else:
        click.echo(f"image {manifest.name} in {path}: every byte is signed")


@image_.command("list", epilog="Example: cloudfit image list -f json")
@format_option
@pass_session
@guarded
def image_list(session: Session, form: str) -> None:
    """Images in this home's store."""
    home = session.home
    rows = [
        {
            "names": list(i.names), "digest": i.digest, "role": i.manifest.role.value if i.manifest else None,
            "adversary": i.manifest.adversary if i.manifest else None,
            "bytes": sum(p.size for p in i.manifest.parts) if i.manifest else None, "problem": i.problem,
        }
        for i in list_images(home.images, [public_bytes(home.image_key())])
    ]  # fmt: skip
    if form == "json":
        print_json({"images": rows})
    else:
        cells = [[", ".join(r["names"]), *list(r.values())[1:]] for r in rows]  # type: ignore[arg-type]
        print_table(["names", "digest", "role", "adversary", "bytes", "problem"], cells)

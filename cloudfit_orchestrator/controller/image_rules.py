"""How our images stand in an OpenStack cloud's Glance, as a spec file says it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"


class Signature(BaseModel):
    """By whose key images are signed for the cloud: the certificate is in its key manager, the key stays here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    certificate: Annotated[str, StringConstraints(pattern=_UUID)]
    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]{0,62}$")]  # a name under the home's keys


class ImageRules(BaseModel):
    """`images` of an OpenStack cloud."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden: Annotated[bool, Field(strict=True)] = False
    protected: Annotated[bool, Field(strict=True)] = False
    signature: Signature | None = None

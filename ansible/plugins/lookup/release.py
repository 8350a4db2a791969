"""Lookup `release`: names what is to be laid out on a host after its content, so that equal names are equal code."""

import hashlib
import zipfile
from pathlib import Path

from ansible.errors import AnsibleLookupError

from ansible.plugins.lookup import LookupBase

DOCUMENTATION = """
name: release
author: CloudFIT maintainers
short_description: Name of a release of the agent, made from what it consists of
description:
  - The beginning of a SHA-256 over the wheel, the wheels of its requirements if there are some, and the requirements.
options:
  _terms:
    description: The wheel, a file on the control node.
    required: true
    type: list
    elements: path
  wheelhouse:
    description: Directory with wheels of the requirements; none if it is empty.
    type: path
    default: ""
  requirements:
    description: What pip installs beside the wheel.
    type: list
    elements: str
    default: []
"""

EXAMPLES = """
- name: Show the name
  ansible.builtin.debug:
    msg: "{{ lookup('cloudfit.orchestrator.release', 'dist/cloudfit_orchestrator-0.1.0-py3-none-any.whl') }}"
"""

RETURN = """
_raw:
  description: One name a wheel, 16 hexadecimal digits.
  type: list
  elements: str
"""

LAYOUT = "3"  # another one lays the same code out in another way
ENTRY = "cloudfit_orchestrator/wormhole/main.py"
BUILD = "build it in the project's directory: pip wheel --no-deps -w dist ."


class LookupModule(LookupBase):
    """See DOCUMENTATION."""

    def run(self, terms, variables=None, **kwargs):
        """One name a term. Raises AnsibleLookupError."""
        self.set_options(var_options=variables, direct=kwargs)
        wheels = []
        house = self.get_option("wheelhouse")
        if house:
            wheels = sorted(Path(house).expanduser().glob("*.whl"))
            if not wheels:
                raise AnsibleLookupError(f"there is no wheel in agent_wheelhouse {house}; pip download -d {house} …")
        return [name(Path(str(term)).expanduser(), wheels, self.get_option("requirements")) for term in terms]


def name(wheel, others, requirements):
    """The release of one wheel. Raises AnsibleLookupError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if ENTRY not in archive.namelist():
                raise AnsibleLookupError(f"agent_wheel {wheel} has no agent in it; {BUILD}")
        parts = [LAYOUT, *requirements]
        for path in (wheel, *others):
            parts += [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
    except zipfile.BadZipFile as error:
        raise AnsibleLookupError(f"agent_wheel {wheel} is no wheel; {BUILD}") from error
    except OSError as error:
        raise AnsibleLookupError(f"agent_wheel: {error.filename} cannot be read: {error.strerror}; {BUILD}") from error
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

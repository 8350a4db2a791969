"""Module `agent_tidy`; see DOCUMENTATION."""

import pathlib
import re
import shutil

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cloudfit.orchestrator.plugins.module_utils.agent import UNIT, see

DOCUMENTATION = """
module: agent_tidy
author: CloudFIT maintainers
short_description: Removes releases and trusted keys that the agent of a host uses no more
description:
  - In use is what the unit's file, the unit that systemd has loaded, or the running process names. So both stay, what a
    restart that is still pending will need and what the process has until then.
options:
  releases:
    description: Directory with one directory a release.
    type: path
    required: true
  trust:
    description: Directory with the files of trusted public keys.
    type: path
    required: true
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = """
- name: Tidy up
  cloudfit.orchestrator.agent_tidy:
    releases: /opt/cloudfit-agent/releases
    trust: /etc/cloudfit-agent
"""

RETURN = """
removed:
  description: Paths of what was removed.
  returned: always
  type: list
  elements: path
"""


def main():
    """Compare what is there with what is named, and remove the rest."""
    spec = {"releases": {"type": "path", "required": True}, "trust": {"type": "path", "required": True}}
    module = AnsibleModule(spec, supports_check_mode=True)
    if not UNIT.exists():
        module.fail_json(msg=f"there is no {UNIT}: nothing says what is in use here; run the playbook site first")
    named = UNIT.read_text() + see(module).commands
    releases, trust = (pathlib.Path(module.params[name]) for name in ("releases", "trust"))
    there = [*children(releases), *(path for path in children(trust) if path.suffix == ".pub")]
    unused = [path for path in there if not re.search(rf"{re.escape(str(path))}(?![\w.-])", named)]
    if not module.check_mode:
        for path in unused:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    module.exit_json(
        changed=bool(unused),
        removed=[str(path) for path in unused],
        diff={"before": lines(there), "after": lines(path for path in there if path not in unused)},
    )


def children(directory):
    """What lies in it, sorted; nothing if it is not there."""
    return sorted(directory.iterdir()) if directory.is_dir() else []


def lines(paths):
    """One path a line, for a diff."""
    return "".join(f"{path}\n" for path in paths)


if __name__ == "__main__":
    main()

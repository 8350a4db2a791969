"""Module `agent_info`; see DOCUMENTATION."""

import pathlib

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cloudfit.orchestrator.plugins.module_utils.agent import ask, see, serving

DOCUMENTATION = """
module: agent_info
author: CloudFIT maintainers
short_description: Says what there is of the wormhole agent on a host
description: Reads only. Asks systemd, the agent's process, and the agent.
options:
  socket:
    description: The agent's socket for its controller.
    type: path
    required: true
  identity:
    description: The file of the agent's own key. It is not opened.
    type: path
    required: true
  release:
    description: Directory of the release that is wanted.
    type: path
    required: true
attributes:
  check_mode:
    support: full
    description: It changes nothing.
"""

EXAMPLES = """
- name: See what there is
  cloudfit.orchestrator.agent_info:
    socket: /run/cloudfit/agent.sock
    identity: /var/lib/cloudfit-agent/identity.key
    release: /opt/cloudfit-agent/releases/1e1cfc90b8b18119
"""

RETURN = """
identity:
  description: Whether there is a key of the agent's own.
  returned: always
  type: bool
complete:
  description: Whether the release is laid out completely.
  returned: always
  type: bool
key:
  description: The public key that answers at the socket; empty if nobody does.
  returned: always
  type: str
serving:
  description: Guests whose keys end with the agent's process, as GROUP/REPLICA#INCARNATION.
  returned: always
  type: list
  elements: str
running:
  description: Name of the set-up of the agent's process; null if it does not run.
  returned: always
  type: str
"""


def main():
    """Look, and say."""
    spec = {name: {"type": "path", "required": True} for name in ("socket", "identity", "release")}
    module = AnsibleModule(spec, supports_check_mode=True)
    try:
        status = ask(module.params["socket"])
    except (OSError, ValueError):
        status = {"key": "", "guests": []}
    module.exit_json(
        changed=False,
        identity=pathlib.Path(module.params["identity"]).exists(),
        complete=pathlib.Path(module.params["release"], "complete").exists(),
        key=status["key"],
        serving=serving(status),
        running=see(module).running,
    )


if __name__ == "__main__":
    main()

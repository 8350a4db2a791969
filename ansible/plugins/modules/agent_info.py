"""Module `agent_info`; see DOCUMENTATION."""

import os

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
"""

RETURN = """
identity:
  description: Whether there is a key of the agent's own.
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
    spec = {"socket": {"type": "path", "required": True}, "identity": {"type": "path", "required": True}}
    module = AnsibleModule(spec, supports_check_mode=True)
    try:
        status = ask(module.params["socket"])
    except (OSError, ValueError):
        status = {"key": "", "guests": []}
    module.exit_json(
        changed=False,
        identity=os.path.exists(module.params["identity"]),  # noqa: PTH110  as short
        key=status["key"],
        serving=serving(status),
        running=see(module).running,
    )


if __name__ == "__main__":
    main()

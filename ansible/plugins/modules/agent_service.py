"""Module `agent_service`; see DOCUMENTATION."""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.cloudfit.orchestrator.plugins.module_utils.agent import SERVICE, UNIT, ask, see, serving

DOCUMENTATION = """
module: agent_service
author: CloudFIT maintainers
short_description: Has the wormhole agent run with the wanted set-up
description:
  - The unit names the whole set-up (code, options, trusted keys) in the environment that it gives the agent. So the
    running process shows which one it has, whatever was interrupted before, and is restarted if it is another.
  - A restart ends the epochs of all replicas on the host.
  - Tells the same changes in check mode, also if the unit's file is not there yet.
options:
  state:
    description: C(running) with the set-up, and at boot; or C(absent), stopped and without a unit.
    type: str
    choices: [running, absent]
    default: running
  setup:
    description: Name of the wanted set-up, as it stands in the unit's file. Required with O(state=running).
    type: str
  restart:
    description: >-
      Whether an agent that runs with another set-up is restarted (V(always)), only if no guest's keys end with it
      (V(idle)), or V(never). Otherwise that is pending.
    type: str
    choices: [always, idle, never]
    default: always
  socket:
    description: The agent's socket for its controller.
    type: path
    required: true
  wait_s:
    description: Seconds in which a started agent must answer.
    type: int
    default: 120
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = """
- name: Have it run
  cloudfit.orchestrator.agent_service:
    setup: 3b1f09aa51c7e2d4
    socket: /run/cloudfit/agent.sock
"""

RETURN = """
pending:
  description: Whether the agent runs with another set-up than the wanted one.
  returned: with O(state=running)
  type: bool
serving:
  description: Guests whose keys end, or would end, with a restart, as GROUP/REPLICA#INCARNATION.
  returned: always
  type: list
  elements: str
ended:
  description: Those of them whose keys this run has ended.
  returned: with O(state=running)
  type: list
  elements: str
key:
  description: The public key that answers at the socket; empty in check mode if nobody does yet.
  returned: with O(state=running)
  type: str
"""


def main():
    """Compare, and change what differs."""
    module = AnsibleModule(
        {
            "state": {"choices": ["running", "absent"], "default": "running"},
            "setup": {"type": "str"},
            "restart": {"choices": ["always", "idle", "never"], "default": "always"},
            "socket": {"type": "path", "required": True},
            "wait_s": {"type": "int", "default": 120},
        },
        required_if=[("state", "running", ["setup"])],
        supports_check_mode=True,
    )
    before = see(module)
    guests = serving(answer(module, must=False)) if before.running else []
    if module.params["state"] == "absent":
        remove(module, before, guests)
    wanted, restart = module.params["setup"], module.params["restart"]
    restarts = (
        before.running is not None
        and before.running != wanted
        and (restart == "always" or (restart == "idle" and not guests))
    )
    running = wanted if before.running is None or restarts else before.running
    after = {"enabled": True, "loaded": wanted, "running": running}
    if not module.check_mode:
        make(module, before, restarts=restarts)
    module.exit_json(
        changed=before.state() != after,
        diff={"before": before.state(), "after": after},
        pending=running != wanted,
        serving=guests,
        ended=guests if restarts else [],
        key=answer(module, must=not module.check_mode)["key"],
    )


def make(module, before, *, restarts):
    """Load, enable, start or restart, and see that the agent runs with what it should."""
    wanted = module.params["setup"]
    if before.loaded != wanted or before.stale:
        systemctl(module, "daemon-reload")
        loaded = see(module).loaded
        if loaded != wanted:
            module.fail_json(msg=f"{UNIT} has the set-up {loaded}, not {wanted}; see: systemctl cat {SERVICE}")
    if not before.enabled:
        systemctl(module, "enable", SERVICE)
    if before.running is None or restarts:
        systemctl(module, "restart", SERVICE)
        answer(module, must=True)  # before that it may still end for something that it finds wrong
        running = see(module).running
        if running != wanted:
            module.fail_json(
                msg=f"{SERVICE} runs with the set-up {running}, not {wanted}; see: systemctl status {SERVICE}"
            )


def remove(module, before, guests):
    """Stop it and take its unit away, unless it serves somebody."""
    if guests:
        module.fail_json(
            msg=f"the agent serves {', '.join(guests)}; give these another host first: cloudfit group apply, or destroy"
        )
    there = UNIT.exists() or before.loaded is not None
    if there and not module.check_mode:
        if before.loaded is not None:
            systemctl(module, "disable", "--now", SERVICE)
        UNIT.unlink(missing_ok=True)
        systemctl(module, "daemon-reload")
        module.run_command(["systemctl", "reset-failed", SERVICE])  # an error says that it had not failed
    after = {"enabled": False, "loaded": None, "running": None}
    module.exit_json(changed=there, diff={"before": before.state(), "after": after}, serving=[])


def systemctl(module, *words):
    """Run it, or fail with what it said."""
    code, out, err = module.run_command(["systemctl", *words])
    if code:
        module.fail_json(msg=f"systemctl {' '.join(words)}: {(err or out).strip()}; see: journalctl -u {SERVICE}")


def answer(module, *, must):
    """What the agent says of itself, after a while if it `must`."""
    try:
        return ask(module.params["socket"], module.params["wait_s"] if must else 0.0)
    except (OSError, ValueError) as error:
        if must:
            module.fail_json(
                msg=f"the agent does not answer at {module.params['socket']}: {error}; see: journalctl -u {SERVICE}"
            )
        return {"key": "", "guests": []}


if __name__ == "__main__":
    main()

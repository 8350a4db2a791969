"""Module `agent_release`; see DOCUMENTATION."""

import os
import pathlib
import shutil
import tarfile

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: agent_release
author: CloudFIT maintainers
short_description: Lays out a release of the wormhole agent
description:
  - Makes a virtual environment with the agent's wheel and what it requires. Debian's own packages are visible in it,
    for libvirt's binding; pip is not in it, but taken from Debian's package python3-pip-whl.
  - What a run that died has left is cleared and made again. The file C(complete) is written last.
options:
  path:
    description: Directory of the release, named after its content.
    type: path
    required: true
  wheel:
    description: >-
      The agent's wheel, a file on the control node. What it names as required is the controller's, and not installed.
    type: path
    required: true
  wheelhouse:
    description: Directory on the control node with wheels of the requirements. With it nothing is taken from an index.
    type: path
    default: ""
  requirements:
    description: What pip installs beside the wheel.
    type: list
    elements: str
    default: []
  archive:
    description: Set by the action, the wheels on the host.
    type: path
  offline:
    description: Set by the action, whether there is a wheelhouse.
    type: bool
    default: false
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = """
- name: Lay out a release
  cloudfit.orchestrator.agent_release:
    path: /opt/cloudfit-agent/releases/1e1cfc90b8b18119
    wheel: dist/cloudfit_orchestrator-0.1.0-py3-none-any.whl
    requirements: [cryptography>=41]
"""

RETURN = """
path:
  description: The directory.
  returned: always
  type: path
"""

PYTHON = "/usr/bin/python3"
PIP_WHEELS = pathlib.Path("/usr/share/python-wheels")


def main():
    """Make it."""
    module = AnsibleModule(
        {
            "path": {"type": "path", "required": True},
            "wheel": {"type": "path", "required": True},
            "wheelhouse": {"type": "path", "default": ""},
            "requirements": {"type": "list", "elements": "str", "default": []},
            "archive": {"type": "path"},
            "offline": {"type": "bool", "default": False},
        },
    )
    place, wanted = pathlib.Path(module.params["path"]), module.params
    os.umask(0o022)  # the agent's account reads it
    shutil.rmtree(place, ignore_errors=True)
    wheels = place / "wheels"
    wheels.mkdir(parents=True)
    with tarfile.open(wanted["archive"]) as archive:
        for member in archive:
            with (wheels / pathlib.Path(member.name).name).open("wb") as file:
                shutil.copyfileobj(archive.extractfile(member), file)
    pips = sorted(PIP_WHEELS.glob("pip-*.whl"))
    if not pips:
        module.fail_json(msg=f"there is no pip in {PIP_WHEELS}; install python3-pip-whl, which python3-venv needs")
    run(module, [PYTHON, "-m", "venv", "--without-pip", "--system-site-packages", place / "venv"])
    pip = [PYTHON, pips[-1] / "pip", "--python", place / "venv/bin/python", "install", "--quiet", "--no-input"]
    pip += ["--disable-pip-version-check", "--no-cache-dir"]
    if wanted["requirements"]:
        where = ["--no-index", "--find-links", wheels] if wanted["offline"] else []
        run(module, [*pip, *where, *wanted["requirements"]])
    run(module, [*pip, "--no-deps", "--no-index", wheels / wanted["wheel"]])
    (place / "complete").write_text(f"{wanted['wheel']}\n")
    module.exit_json(changed=True, path=str(place))


def run(module, words):
    """Run a program, or fail with what it said."""
    words = [str(word) for word in words]
    code, out, err = module.run_command(words)
    if code:
        module.fail_json(msg=f"{' '.join(words)}: exit code {code}: {(err or out).strip()}")


if __name__ == "__main__":
    main()

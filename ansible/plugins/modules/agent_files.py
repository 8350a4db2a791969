"""Module `agent_files`; see DOCUMENTATION."""

import os
import pathlib
import shutil
import stat

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: agent_files
author: CloudFIT maintainers
short_description: Has some small text files of root's, and has others not
description:
  - In one call, where a host is slow to answer. Each file is replaced as a whole, in the order given, with mode 0644;
    directories that are missing are made with mode 0755.
options:
  present:
    description: Files with their content. No secrets, for a diff shows them.
    type: list
    elements: dict
    default: []
    suboptions:
      path:
        description: Where it belongs.
        type: path
        required: true
      content:
        description: The whole text.
        type: str
        required: true
  absent:
    description: Files that must not be there; and directories, which go with all that is in them.
    type: list
    elements: path
    default: []
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = """
- name: Trust a key, and another no more
  cloudfit.orchestrator.agent_files:
    present:
      - path: /etc/cloudfit-agent/controller-0a1b2c3d4e5f6071.pub
        content: "8zSH2iBKnVr+ElMJJ1on7jXtLEHTQeAIGhNgFHKxqR4=\\n"
    absent:
      - /etc/cloudfit-agent/controller-7160f5e4d3c2b1a0.pub
"""

RETURN = """
files:
  description: Paths that were changed.
  returned: always
  type: list
  elements: path
"""

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755


def main():
    """Compare, and change what differs."""
    options = {"path": {"type": "path", "required": True}, "content": {"type": "str", "required": True}}
    module = AnsibleModule(
        {
            "present": {"type": "list", "elements": "dict", "options": options, "default": []},
            "absent": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    present = {pathlib.Path(file["path"]): file["content"] for file in module.params["present"]}
    differ = {path: text for path, text in present.items() if seen(path) != wanted(text)}
    absent = [path for path in map(pathlib.Path, module.params["absent"]) if os.path.lexists(path)]
    diff = [
        {"before_header": str(path), "after_header": str(path), "before": shown(path), "after": text}
        for path, text in differ.items()
    ]
    diff += [
        {"before": f"{path}\n", "after": "", "before_header": str(path), "after_header": "none"} for path in absent
    ]
    if not module.check_mode:
        for path, text in differ.items():
            write(path, text)
        for path in absent:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    changed = [*map(str, differ), *map(str, absent)]
    module.exit_json(changed=bool(changed), files=changed, diff=diff)


def wanted(text):
    """What `seen` says of a file that is as it should be."""
    return text, FILE_MODE, 0, 0


def seen(path):
    """Content, mode, owner and group; None if there is no such file."""
    if path.is_symlink() or not path.is_file():
        return None
    status = path.stat()
    return path.read_text(errors="replace"), stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid


def shown(path):
    """The present content, and mode and owner where these are other than they should be."""
    found = seen(path)
    if found is None:
        return ""
    text, mode, uid, gid = found
    return text if (mode, uid, gid) == wanted("")[1:] else f"{text}(mode {mode:o}, owner {uid}:{gid})\n"


def write(path, text):
    """The whole file or nothing of it, on the disk."""
    make(path.parent)
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"{path} is a directory; remove it by hand")
    new = path.with_name(f".{path.name}.new")
    with new.open("w") as file:
        os.fchown(file.fileno(), 0, 0)
        os.fchmod(file.fileno(), FILE_MODE)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def make(directory):
    """The directory and those above it."""
    if not directory.is_dir():
        make(directory.parent)
        directory.mkdir()
        directory.chmod(DIRECTORY_MODE)  # whatever the umask is


if __name__ == "__main__":
    main()

"""Action of the module `agent_release`: brings all wheels to the host as one file; in check mode it says which."""

import pathlib
import tarfile
import tempfile

from ansible.plugins.action import ActionBase

NAME = "cloudfit.orchestrator.agent_release"


class ActionModule(ActionBase):
    """See the module's DOCUMENTATION."""

    TRANSFERS_FILES = True

    def run(self, tmp=None, task_vars=None):
        """The task's result."""
        result = super().run(tmp, task_vars)
        args = dict(self._task.args)
        house = args.pop("wheelhouse", "")
        wheel = pathlib.Path(args["wheel"]).expanduser()
        others = sorted(pathlib.Path(house).expanduser().glob("*.whl")) if house else []
        listing = "".join(f"{args['path']}/wheels/{path.name}\n" for path in (wheel, *others))
        diff = {"before": "", "after": listing, "before_header": "none", "after_header": args["path"]}
        if self._task.check_mode:
            return result | {"changed": True, "diff": diff}
        self._make_tmp_path()
        shell = self._connection._shell  # noqa: SLF001  as Ansible's own actions do
        archive = shell.join_path(shell.tmpdir, "wheels.tar")
        try:
            with tempfile.NamedTemporaryFile(suffix=".tar") as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    for path in (wheel, *others):
                        tar.add(path, arcname=path.name)
                file.flush()
                self._transfer_file(file.name, archive)
            self._fixup_perms2((shell.tmpdir, archive))
            args |= {"wheel": wheel.name, "archive": archive, "offline": bool(house)}
            result |= self._execute_module(module_name=NAME, module_args=args, task_vars=task_vars)
        finally:
            self._remove_tmp_path(shell.tmpdir)
        return result | {"diff": diff}

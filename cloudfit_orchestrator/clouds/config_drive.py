"""The file system image of a config drive, as OpenStack makes it: ISO 9660 with Rock Ridge names, label `config-2`."""

import io

import pycdlib

from cloudfit_orchestrator.model.drive import LABEL, USER_DATA


def iso_image(user_data: bytes) -> bytes:
    """A drive with that user data and nothing else."""
    iso = pycdlib.PyCdlib()
    iso.new(vol_ident=LABEL, rock_ridge="1.09")
    *folders, file = USER_DATA.split("/")
    path = ""
    for folder in folders:
        path += "/" + folder[:8].upper()
        iso.add_directory(path, rr_name=folder)
    iso.add_fp(io.BytesIO(user_data), len(user_data), f"{path}/{file[:8].upper()}.;1", rr_name=file)
    image = io.BytesIO()
    iso.write_fp(image)
    iso.close()
    return image.getvalue()

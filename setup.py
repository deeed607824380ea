"""The packages under missrec_t4r/, and the Triton templates: the one folder that is installed under another name."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["missrec_t4r", "missrec_t4r.*"]), "missrec_t4r.triton_models"],
    data_files=[("etc/dask", ["requirements/missrec-dask.yaml"])],
    package_dir={"missrec_t4r.triton_models": "triton_models"},
)
